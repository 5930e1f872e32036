"""The page that `texforce eval` writes: one file that opens offline, rendered from the results and the images.

Read top to bottom: writing the page, the summary's rows, the plots, the gallery's data. `report.html` is the template.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from . import files
from .config import BASE

COLOURS = ("#0969da", "#d4691e", "#8250df", "#1a9a8f", "#bf3989", "#7d8590")  # of the systems, seen on light and dark
MAX_IMAGES = 4000  # in the page: with more, only the first image of each prompt is shown
MAX_PIXELS = 256  # of a side; larger images are scaled down, smaller ones shown pixel by pixel


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `report.html` into the folder of the images, from the content of `results.json`.

    Raises:
        ArtifactError: an image is damaged. OSError: storage.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        results=results,
        rows=summary_rows(results["systems"]),
        figures=make_figures(results),
        data=to_script(gallery(folder, results)),
    )
    files.write_text(folder / "report.html", page)


def to_script(content: Mapping[str, Any]) -> Markup:
    """An object as JSON that can stand in a script element: no text in it can end the element."""
    return Markup(json.dumps(content, allow_nan=False).replace("<", "\\u003c"))  # noqa: S704  escaped here


# --- the summary ---


@dataclass(frozen=True)
class Row:
    """A row of the summary: a system by a measure. The base model has no change and no wins."""

    measure: str
    system: str
    mean: str
    change: str = ""
    direction: str = ""
    wins: str = ""


def summary_rows(systems: Mapping[str, Any]) -> list[Row]:
    """The rows of the summary, measure by measure."""
    rows = []
    for measure in systems[BASE]["measures"]:
        for name, system in systems.items():
            summary = system["measures"][measure]
            cells = (measure, label(name, system), interval(summary) + dropped(summary))
            if name == BASE:
                rows.append(Row(*cells))
            else:
                paired = summary["paired"]
                rows.append(Row(*cells, interval(paired, "+"), direction(paired), interval(summary["win_rate"], "%")))
    return rows


def label(name: str, system: Mapping[str, Any]) -> str:
    """A system's name, with its strength where that is not 1."""
    return name if system["strength"] == 1 else f"{name} at {system['strength']:g}"


def interval(summary: Mapping[str, Any], kind: str = "") -> str:
    """A mean and its interval as text; kind "+" shows the sign, "%" shows a share."""
    if summary["mean"] is None:
        return "-"
    form = ".0%" if kind == "%" else ".4f"
    text = f"{summary['mean']:{'+' if kind == '+' else ''}{form}}"
    return text if summary["low"] is None else f"{text} [{summary['low']:{form}}, {summary['high']:{form}}]"


def dropped(summary: Mapping[str, Any]) -> str:
    """A remark on the images without a score, if there are any."""
    return f" ({summary['num_images_dropped']} without a score)" if summary["num_images_dropped"] else ""


def direction(paired: Mapping[str, Any]) -> str:
    """Whether a difference is a "gain" or a "loss"; "" where its interval holds 0."""
    if paired["low"] is None or paired["low"] <= 0 <= paired["high"]:
        return ""
    return "gain" if paired["low"] > 0 else "loss"


# --- plots ---


@dataclass(frozen=True)
class Line:
    """A line between two points of a plot."""

    x1: float
    y1: float
    x2: float
    y2: float
    kind: str = ""  # "zero" or "axis"


@dataclass(frozen=True)
class Text:
    """A text in a plot."""

    x: float
    y: float
    text: str
    anchor: str  # SVG's: "start", "middle" or "end"


@dataclass(frozen=True)
class Point:
    """A mean as a dot, and its interval as a line if it has one."""

    x: float
    y: float
    radius: int
    interval: Line | None


@dataclass(frozen=True)
class Series:
    """What a plot shows of one system."""

    system: str
    colour: str
    points: Sequence[Point]
    joined: bool = False  # whether a line joins the points


@dataclass(frozen=True)
class Plot:
    """A plot of one measure."""

    measure: str
    title: str
    size: tuple[float, float]  # width and height
    lines: Sequence[Line]
    texts: Sequence[Text]
    series: Sequence[Series]


@dataclass(frozen=True)
class Figure:
    """A plot for each measure, of which the reader chooses one."""

    title: str
    plots: Sequence[Plot]


class Axis:
    """A linear scale from values to places, with room around them, that always shows 0."""

    def __init__(self, values: Iterable[float | None], start: float, end: float) -> None:
        known = [0.0, *(value for value in values if value is not None)]
        low, high = min(known), max(known)
        margin = 0.08 * (high - low) or 1.0
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        from matplotlib.ticker import MaxNLocator

        return [float(t) for t in MaxNLocator(5).tick_values(self.low, self.high) if self.low <= t <= self.high]


def make_figures(results: Mapping[str, Any]) -> list[Figure]:
    """The figures that the results allow: changes by strength after a sweep, changes by category if there are categories."""
    systems, strengths = results["systems"], results["strengths"]
    measures = systems[BASE]["measures"]
    figures: list[Figure] = []
    if strengths:
        plots = [strength_plot(strengths, measure) for measure in measures]
        figures.append(Figure("Change by strength, on the half that chose it", plots))
    if len(systems) > 1 and all("categories" in summary for summary in measures.values()):
        figures.append(Figure("Change by category", [category_plot(systems, measure) for measure in measures]))
    return figures


def category_plot(systems: Mapping[str, Any], measure: str) -> Plot:
    """Paired differences with their intervals, a row for all prompts and a row for each category."""
    summaries = {name: system["measures"][measure] for name, system in systems.items() if name != BASE}
    parts = {name: [summary, *summary["categories"].values()] for name, summary in summaries.items()}
    first = next(iter(summaries))
    rows = ["all", *summaries[first]["categories"]]
    left, width, step = 220, 590, 14 * len(parts) + 12
    height = step * len(rows) + 30
    axis = Axis(ends([part["paired"] for own in parts.values() for part in own]), left, width - 12)
    texts = [
        Text(left - 10, step * (n + 0.5) + 4, f"{shorten(name or 'none')} ({part['num_prompts']})", "end")
        for n, (name, part) in enumerate(zip(rows, parts[first], strict=True))
    ]
    texts += [Text(axis(tick), height - 8, f"{tick:g}", "middle") for tick in axis.ticks()]
    series = []
    for k, (name, own) in enumerate(parts.items()):
        points = []
        for n, part in enumerate(own):
            y, paired = step * n + 12 + 14 * k, part["paired"]
            if paired["mean"] is not None:
                line = None if paired["low"] is None else Line(axis(paired["low"]), y, axis(paired["high"]), y)
                points.append(Point(axis(paired["mean"]), y, 4, line))
        series.append(Series(name, COLOURS[k % len(COLOURS)], points))
    zero = Line(axis(0), 0, axis(0), height - 24, "zero")
    return Plot(measure, f"change of {measure} by category", (width, height), [zero], texts, series)


def strength_plot(strengths: Mapping[str, Any], measure: str) -> Plot:
    """Paired differences with their intervals over the strength, a line for each system; the best strength is larger."""
    curves = {
        name: [(point["strength"], point["measures"][measure]["paired"]) for point in sweep["curve"]]
        for name, sweep in strengths.items()
    }
    left, width, height = 60, 560, 300
    everything = [point for curve in curves.values() for point in curve]
    across = Axis([strength for strength, _ in everything], left, width - 12)
    up = Axis(ends([paired for _, paired in everything]), height - 30, 8)
    series = []
    for k, (name, curve) in enumerate(curves.items()):
        points = []
        for strength, paired in sorted(curve, key=lambda point: point[0]):
            if paired["mean"] is not None:
                x, radius = across(strength), 6 if strength == strengths[name]["best"] else 3
                line = None if paired["low"] is None else Line(x, up(paired["low"]), x, up(paired["high"]))
                points.append(Point(x, up(paired["mean"]), radius, line))
        series.append(Series(name, COLOURS[k % len(COLOURS)], points, joined=True))
    lines = [Line(left, up(0), width - 12, up(0), "zero"), Line(left, 8, left, height - 30, "axis")]
    texts = [Text(across(tick), height - 10, f"{tick:g}", "middle") for tick in across.ticks()]
    texts += [Text(left - 8, up(tick) + 4, f"{tick:g}", "end") for tick in up.ticks()]
    return Plot(measure, f"change of {measure} by strength", (width, height), lines, texts, series)


def ends(differences: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Means and both ends of the intervals of paired differences."""
    return [paired[end] for paired in differences for end in ("mean", "low", "high")]


def shorten(text: str) -> str:
    """A text of at most 28 letters."""
    return text if len(text) <= 28 else text[:27] + "\u2026"


# --- the gallery ---


def gallery(folder: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """The prompts, scores and images that the page's script shows and sorts."""
    systems = results["systems"]
    prompts = [(i, prompt) for i, prompt in enumerate(results["prompts"]) if not prompt["validation"]]
    num_shown = max(1, min(results["num_images"], MAX_IMAGES // (len(prompts) * len(systems))))
    rows = []
    for i, prompt in prompts:
        paths = [[folder / system["images"] / f"{i:05d}_{k}.png" for k in range(num_shown)] for system in systems.values()]
        rows.append(
            {"index": i, "prompt": prompt["prompt"], "category": prompt["category"], "seeds": prompt["seeds"]}
            | {"scores": [[scores[i] for scores in system["scores"].values()] for system in systems.values()]}
            | {"images": [[thumbnail(path) for path in own] for own in paths]}
        )
    return {
        "systems": [label(name, system) for name, system in systems.items()],
        "measures": list(systems[BASE]["scores"]),
        "pixelated": files.open_image(paths[0][0]).width <= MAX_PIXELS // 2,
        "rows": rows,
    }


def thumbnail(path: Path) -> str:
    """An image as the address of its own content, scaled down if it is large.

    Raises:
        ArtifactError: it is damaged.
    """
    image = files.open_image(path)
    if max(image.size) <= MAX_PIXELS:
        kind, content = "png", path.read_bytes()
    else:
        image.thumbnail((MAX_PIXELS, MAX_PIXELS))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "webp", quality=80)
        kind, content = "webp", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
