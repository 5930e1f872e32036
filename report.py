"""The page that `texforce eval` writes: one file that opens offline, filled in from the results and the images."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import files
from .config import BASE

TEMPLATE = Path(__file__).parent / "report.html"
COLOURS = ("#0969da", "#d4691e", "#8250df", "#1a9a8f", "#bf3989", "#7d8590")  # of the systems, seen on light and dark
MAX_IMAGES = 4000  # in the page: with more, only the first image of each prompt is shown
MAX_PIXELS = 256  # of a side; larger images are scaled down, smaller ones shown pixel by pixel


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `report.html` into the folder of the images, from what `results.json` holds."""
    benchmark, systems = results["benchmark"], results["systems"]
    told = (
        f"{results['num_prompts_told']} of {benchmark['num_prompts']}" if results["strengths"] else benchmark["num_prompts"]
    )
    about = (
        f"{told} prompts, {results['num_images']} images each, on {results['model']}: {results['num_inference_steps']} DDIM "
        f"steps, guidance {results['guidance_scale']:g}, eta {results['eta']:g}, seed {results['seed']}; every system from "
        f"the same noise."
    )
    note = (
        f"Means over prompts with {results['confidence']:.0%} bootstrap intervals. The change is the paired difference "
        "to the base model; a win is an image that scores higher than the base model's from the same noise, a tie half."
    )
    note += " Of few prompts, as in small categories, such intervals are too narrow."
    if results["strengths"]:
        note += " The strength was chosen on one half of the prompts; everything here is of the other half."
    data = _data(folder, results)
    parts = {
        "title": html.escape(f"texforce eval: {benchmark['name']}"),
        "about": html.escape(about),
        "summary": summary(systems),
        "note": html.escape(note),
        "plots": plots(results),
        "foot": html.escape(f"texforce {results['versions']['texforce']}, commit {(results['commit'] or 'unknown')[:12]}."),
        # A closing tag within a prompt must not end the script.
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    }
    before, *pieces = TEMPLATE.read_text(encoding="utf-8").split("{{")
    page = [before]
    for piece in pieces:  # in one pass, so that nothing that is filled in is looked at again
        name, _, rest = piece.partition("}}")
        page += [parts[name], rest]
    files.write_text(folder / "report.html", "".join(page))


def _data(folder: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """What the gallery shows."""
    systems = results["systems"]
    rows = [(i, prompt) for i, prompt in enumerate(results["prompts"]) if not prompt["validation"]]
    num_shown = max(1, min(results["num_images"], MAX_IMAGES // (len(rows) * len(systems))))
    shown = []
    for i, prompt in rows:
        paths = [[folder / system["images"] / f"{i:05d}_{k}.png" for k in range(num_shown)] for system in systems.values()]
        shown.append(
            {"index": i, "prompt": prompt["prompt"], "category": prompt["category"], "seeds": prompt["seeds"]}
            | {"scores": [[scores[i] for scores in system["scores"].values()] for system in systems.values()]}
            | {"images": [[_thumbnail(file) for file in own] for own in paths]}
        )
    return {
        "systems": [label(name, system) for name, system in systems.items()],
        "measures": list(systems[BASE]["scores"]),
        "pixelated": files.open_image(paths[0][0]).width <= MAX_PIXELS // 2,
        "rows": shown,
    }


def label(name: str, system: Mapping[str, Any]) -> str:
    """A system's name, with its strength where it is not as given."""
    return name if system["strength"] == 1 else f"{name} at {system['strength']:g}"


def _thumbnail(path: Path) -> str:
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


# --- the summary ---


def summary(systems: Mapping[str, Any]) -> str:
    """The table of means, changes and win rates, as HTML."""
    rows = []
    for measure in systems[BASE]["measures"]:
        for name, system in systems.items():
            told = system["measures"][measure]
            cells = [html.escape(measure), html.escape(label(name, system)), interval(told) + dropped(told)]
            if name == BASE:
                cells += ["", ""]
            else:
                kind = direction(told["paired"])
                cells.append(f'<span class="{kind}">{interval(told["paired"], "+")}</span>')
                cells.append(interval(told["win_rate"], "%"))
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("measure", "system", "mean", "change", "wins"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def interval(told: Mapping[str, Any], kind: str = "") -> str:
    """A mean and its interval as text; kind "+" shows its sign, "%" a share."""
    if told["mean"] is None:
        return "-"
    form = ".0%" if kind == "%" else ".4f"
    text = f"{told['mean']:{'+' if kind == '+' else ''}{form}}"
    return text if told["low"] is None else f"{text} [{told['low']:{form}}, {told['high']:{form}}]"


def dropped(told: Mapping[str, Any]) -> str:
    """A remark on what had no score, if there is such."""
    return f" ({told['num_images_dropped']} without a score)" if told["num_images_dropped"] else ""


def direction(paired: Mapping[str, Any]) -> str:
    """Whether a difference is a gain or a loss, or neither for sure: its interval holds 0."""
    if paired["low"] is None or paired["low"] <= 0 <= paired["high"]:
        return ""
    return "gain" if paired["low"] > 0 else "loss"


# --- plots ---


def plots(results: Mapping[str, Any]) -> str:
    """The strength and the category plot of every measure, as HTML; nothing of what there is none of."""
    tuned = [name for name in results["systems"] if name != BASE]
    measures = results["systems"][BASE]["measures"]
    figures = []
    if results["strengths"]:
        drawn = {measure: strength_plot(results["strengths"], measure) for measure in measures}
        figures.append(_figure("Change by strength, on the half that chose it", drawn, tuned))
    if tuned and all("categories" in told for told in measures.values()):
        drawn = {measure: category_plot(results["systems"], tuned, measure) for measure in measures}
        figures.append(_figure("Change by category", drawn, tuned))
    return f'<h2>Where</h2><div class="plots">{"".join(figures)}</div>' if figures else ""


def _figure(title: str, drawn: Mapping[str, str], systems: Sequence[str]) -> str:
    options = "".join(f"<option>{html.escape(measure)}</option>" for measure in drawn)
    pictures = "".join(
        f'<div data-plot="{html.escape(measure)}"{" hidden" if n else ""}>{picture}</div>'
        for n, (measure, picture) in enumerate(drawn.items())
    )
    keys = "".join(
        f'<span class="key" style="background:{_colour(k)}"></span>{html.escape(name)}' for k, name in enumerate(systems)
    )
    choice = f'<select data-plots aria-label="measure: {html.escape(title)}">{options}</select>'
    return (
        f'<figure class="panel"><figcaption>{html.escape(title)} {choice}</figcaption>{pictures}'
        f'<div class="small">{keys}</div></figure>'
    )


def _colour(k: int) -> str:
    return COLOURS[k % len(COLOURS)]


class Axis:
    """A linear scale from values to places, with room around them, that always shows 0."""

    def __init__(self, values: Sequence[float | None], start: float, end: float) -> None:
        known = [0.0, *(value for value in values if value is not None)]
        low, high = min(known), max(known)
        margin = 0.08 * (high - low) or 1.0
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        from matplotlib.ticker import MaxNLocator

        return [float(t) for t in MaxNLocator(5).tick_values(self.low, self.high) if self.low <= t <= self.high]


def category_plot(systems: Mapping[str, Any], tuned: Sequence[str], measure: str) -> str:
    """Paired differences with their intervals, a row for all prompts and for each category, as SVG."""
    told = {name: systems[name]["measures"][measure] for name in tuned}
    names = ["all", *systems[BASE]["measures"][measure]["categories"]]
    rows = [
        {name: (t if k == 0 else t["categories"][row])["paired"] for name, t in told.items()} for k, row in enumerate(names)
    ]
    shown = next(iter(told.values()))
    counts = [part["num_prompts"] for part in (shown, *shown["categories"].values())]
    left, width, step = 220, 590, 14 * len(tuned) + 12
    axis = Axis(
        [paired[end] for row in rows for paired in row.values() for end in ("mean", "low", "high")], left, width - 12
    )
    height = step * len(names) + 30
    drawn = [_line(axis(0), 0, axis(0), height - 24, "zero")]
    for n, (name, row) in enumerate(zip(names, rows, strict=True)):
        drawn.append(_text(left - 10, step * (n + 0.5) + 4, f"{_short(name or 'none')} ({counts[n]})", "end"))
        for k, paired in enumerate(row.values()):
            y = step * n + 12 + 14 * k
            if paired["low"] is not None:
                drawn.append(_line(axis(paired["low"]), y, axis(paired["high"]), y, "", _colour(k)))
            if paired["mean"] is not None:
                drawn.append(f'<circle cx="{axis(paired["mean"])}" cy="{y}" r="4" fill="{_colour(k)}"/>')
    drawn += [_text(axis(tick), height - 8, f"{tick:g}", "middle") for tick in axis.ticks()]
    return _svg(width, height, drawn, f"change of {measure} by category")


def strength_plot(strengths: Mapping[str, Any], measure: str) -> str:
    """Paired differences with their intervals over the strength, a line for each system, as SVG."""
    curves = {name: [(p["strength"], p["measures"][measure]["paired"]) for p in s["curve"]] for name, s in strengths.items()}
    left, width, height = 60, 560, 300
    points = [point for curve in curves.values() for point in curve]
    across = Axis([strength for strength, _ in points], left, width - 12)
    up = Axis([paired[end] for _, paired in points for end in ("mean", "low", "high")], height - 30, 8)
    drawn = [_line(left, up(0), width - 12, up(0), "zero"), _line(left, 8, left, height - 30, "axis")]
    for k, (name, curve) in enumerate(curves.items()):
        known = [(strength, paired) for strength, paired in sorted(curve, key=lambda p: p[0]) if paired["mean"] is not None]
        line = " ".join(f"{across(strength)},{up(paired['mean'])}" for strength, paired in known)
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{_colour(k)}" stroke-width="2"/>')
        for strength, paired in known:
            x = across(strength)
            if paired["low"] is not None:
                drawn.append(_line(x, up(paired["low"]), x, up(paired["high"]), "", _colour(k)))
            best = strength == strengths[name]["best"]
            drawn.append(f'<circle cx="{x}" cy="{up(paired["mean"])}" r="{6 if best else 3}" fill="{_colour(k)}"/>')
    drawn += [_text(across(tick), height - 10, f"{tick:g}", "middle") for tick in across.ticks()]
    drawn += [_text(left - 8, up(tick) + 4, f"{tick:g}", "end") for tick in up.ticks()]
    return _svg(width, height, drawn, f"change of {measure} by strength")


def _svg(width: int, height: float, drawn: Sequence[str], title: str) -> str:
    return f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{html.escape(title)}">' + "".join(drawn) + "</svg>"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, colour: str = "") -> str:
    drawn = f'stroke="{colour}" stroke-width="2"' if colour else f'class="{kind}"'
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" {drawn}/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _short(text: str) -> str:
    return text if len(text) <= 28 else text[:27] + "\u2026"
