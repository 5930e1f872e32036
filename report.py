"""The page that `texforce eval` writes, and `texforce train` as it goes: one file that opens offline.

Read top to bottom: the page, what it says of an evaluation and of a training, the summary with the verdicts, the plots, the
gallery's data.
`report.html` is the template of both.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup

from . import files, measures, world
from .config import TrainConfig, specs_of
from .draw_config import BASE, LATER_OPTIONS
from .options import option_fields
from .presets import EMBEDDED
from .prompt_sets import MEASURED_ON, find_measured
from .reward_specs import EMBEDDED_HPS, NO_REWARD, WORLD, explain, judges_world, parse_checkpoints, parse_mixture
from .stages import duration

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_COLOURS = 6  # of the systems, in the template
MAX_IMAGES = 4000  # in the page: with more, only the first image of each prompt is shown
MAX_PIXELS = 256  # of a side; larger images are scaled down, smaller ones shown pixel by pixel
FULL_COLOUR = 0.5  # of the deviation of the base's scores: a change from here on is in full colour, a smaller one in less
EXACT = "alignment_exact"  # the measure that says whether an image is right
RUNNING, FINISHED = "running", "finished"  # states of a training
RELOAD_SECONDS = 20  # after which the page of a running training loads itself anew
MAX_FRAMES = 24  # measurements of a training whose images are in its page
NUM_CHANGED = 4  # prompts in each table of those that changed most and least
MIN_GROUP = 20  # prompts of a category that a verdict speaks of: with fewer the intervals are too narrow
NUM_MEANS = 100  # points of the curve of the training reward: of more epochs means of neighbours


# --- the page ---


@dataclass(frozen=True)
class Fact:
    """Something to know about the results, with its name; `is_code` for a command."""

    name: str
    text: str
    is_code: bool = False


@dataclass(frozen=True)
class Page:
    """What the template shows."""

    title: str
    verdicts: Sequence[Verdict]
    facts: Sequence[Fact]
    tables: Sequence[Table]
    remarks: Sequence[str]  # under the tables
    figures: Sequence[Figure]
    gallery: Mapping[str, Any]  # for the page's script
    versions: str = ""
    figures_title: str = "Where"
    state: str = ""  # of a training
    commands: Sequence[Fact] = ()
    settings: Sequence[Fact] = ()


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `report.html` into the folder of the images, from the content of `results.json`.

    Raises:
        ArtifactError: an image is damaged. OSError: storage.
    """
    files.write_text(folder / "report.html", render(evaluation_page(folder, results)))


def render(page: Page) -> str:
    """The page as HTML."""
    return template().render(page=page, data=to_script(page.gallery), num_colours=NUM_COLOURS)


@functools.cache
def template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


def to_script(content: Mapping[str, Any]) -> Markup:
    """An object as JSON that can stand in a script element: no text in it can end the element."""
    return Markup(json.dumps(content, allow_nan=False).replace("<", "\\u003c"))  # noqa: S704  escaped here


def now() -> str:
    """The date and the time here, with the time zone."""
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")


def minus(text: str) -> str:
    """A text whose negative numbers have the minus sign that is as wide as the plus; names with hyphens keep them."""
    return re.sub(r"(?<![\w.])-(?=[\d.])", "\N{MINUS SIGN}", text)


# --- an evaluation ---


def evaluation_page(folder: Path, results: Mapping[str, Any]) -> Page:
    """The page of an evaluation, from the content of `results.json` and the images in its folder."""
    systems, about = results["systems"], results["benchmark"]
    return Page(
        title=f"texforce eval: {about['name']}",
        verdicts=make_verdicts(systems),
        facts=[
            Fact("date", results["timings"]["date"]),
            Fact("command", results["command"], is_code=True),
            Fact("model", _drawn_by(results)),
            Fact("images", _what_was_drawn(results)),
            *(Fact(label(name, system), _made_of(system, results["trainings"])) for name, system in systems.items()),
        ],
        tables=[summary(systems)],
        remarks=[*_how_measured(results["confidence"]), *_meanings(systems, _has_own_hps(results)), *_remarks(results)],
        figures=make_figures(results),
        gallery=gallery(_labels(systems), systems[BASE]["measures"], _with_thumbnails(folder, results)),
        versions=f"texforce {results['versions']['texforce']}, commit {(results['commit'] or 'unknown')[:12]}",
    )


def _drawn_by(results: Mapping[str, Any]) -> str:
    parts = [
        f"{results['model']}, {results['num_inference_steps']} {results['sampler']} steps",
        f"guidance {results['guidance_scale']:g}",
        f"eta {results['eta']:g}",
    ]
    parts += [f"negative prompt {results['negative_prompt']!r}"] if results["negative_prompt"] else []
    changed = {name: results[name] for name in ("resolution", *LATER_OPTIONS) if results.get(name)}
    if changed.pop("prompt_weights", False):
        parts.append("weights in prompts read")
    return ", ".join(parts + [f"{name.replace('_', ' ')} {value}" for name, value in changed.items()])


def _what_was_drawn(results: Mapping[str, Any]) -> str:
    of_all = f" of {results['benchmark']['num_prompts']}" if results["strengths"] else ""
    return (
        f"{results['num_prompts_measured']}{of_all} prompts, {results['num_images']} images each, seed {results['seed']}; "
        "every system from the same noise"
    )


def _made_of(system: Mapping[str, Any], trainings: Mapping[str, str]) -> str:
    """What a system is, and how its adapters were trained where their folders say it."""
    terms = [
        f"{kind} {term['path']}"
        + (f" times {term['weight']:g}" if term["weight"] != 1 else "")
        + (f" ({trainings[term['path']]})" if term["path"] in trainings else "")
        for kind in ("adapter", "unet")
        for term in system[f"{kind}s"]
    ]
    if system.get("adapter_steps"):
        terms.append(f"adapters on in the steps {system['adapter_steps']} alone")
    return "; ".join(terms) or "the model as it is"


def _how_measured(confidence: float) -> list[str]:
    return [
        f"Means over prompts with {100 * confidence:.0f} % bootstrap intervals, which are too narrow where there are few "
        "prompts. The change is the difference to the base model on the same prompts and noise. It is green or red if its "
        "interval does not contain 0 and it is larger than the limit below; a larger change has a stronger colour.",
        f"A prompt is the same where its score changes by at most {measures.NEGLIGIBLE:g} of the standard deviation of the "
        "base model's scores.",
    ]


def _has_own_hps(results: Mapping[str, Any]) -> bool:
    """Whether `hps` of an evaluation is the tiny world's own scorer, by the digest of its weights."""
    source = results["rewards"].get("hps", {}).get("hps", {})
    return source.get("sha256") == files.sha256(EMBEDDED_HPS)


def _meanings(systems: Mapping[str, Any], has_own_hps: bool) -> list[str]:
    meanings = explain(systems[BASE]["measures"], has_own_hps)
    return [f"{meanings}."] if meanings else []


def _remarks(results: Mapping[str, Any]) -> list[str]:
    remarks = []
    if results["strengths"]:
        remarks.append("The strength was chosen on one half of the prompts; everything here is of the other half.")
    if results["prompts_cut"]:
        remarks.append(
            f"{len(results['prompts_cut'])} prompts are longer than the {results['num_tokens']} tokens that the text "
            "encoder reads: the images are of their beginnings, the scores of the whole prompts."
        )
    if number := results.get("negative_prompt_cut_to"):
        remarks.append(f"The negative prompt is longer than the {number} tokens that are read of it.")
    if results.get("num_chunks", 1) > 1:
        remarks.append(f"Prompts are read in {results['num_chunks']} chunks of tokens, as many as the longest one has.")
    return remarks


# --- a training ---


@dataclass(frozen=True)
class Training:
    """A training as far as it has come."""

    config: TrainConfig
    prompts: Sequence[str]  # that are measured
    epochs: Sequence[Mapping[str, Any]]  # as in metrics.jsonl, the first before training
    frames: Sequence[Mapping[str, Any]]  # as in heldout.jsonl, the first of the base model
    resume: str  # the command to go on
    state: str = RUNNING  # or FINISHED, or why it stopped


def describe_method(options: Mapping[str, Any]) -> str:
    """What a training trains, by which algorithm and on what, from its options."""
    target, algorithm, seed = (options.get(name, "?") for name in ("target", "algorithm", "seed"))
    layers, modules = options.get("lora_layers", "all"), options.get("lora_modules")
    limits = [f"blocks {layers}"] if layers != "all" else []
    limits += [f"projections {', '.join(modules)}"] if modules else []
    limits += [f"in the steps {steps}"] if (steps := options.get("adapter_steps")) else []
    what = target + (f" ({', '.join(limits)})" if limits else "")
    return f"{what} trained by {algorithm} on {' and '.join(taught_by(options))}, seed {seed}"


def takes_own_hps(config: TrainConfig) -> bool:
    """Whether `hps` of a training is the tiny world's own scorer."""
    return config.model in EMBEDDED and "hps" not in parse_checkpoints(config.reward_checkpoint or (), specs_of(config))


def taught_by(options: Mapping[str, Any], quote: str = "") -> list[str]:
    """What a training learns from, from its options, names in quotation marks that Markdown may need."""
    reward, relabel = (f"{quote}{options.get(name, '?')}{quote}" for name in ("reward", "relabel"))
    rewards = [] if options.get("reward") == NO_REWARD else [reward]
    return rewards + ([f"failed images relabelled by {relabel}"] if options.get("relabel") else [])


def write_training(training: Training) -> None:
    """Write `report.html` into the output folder of a training.

    Raises:
        OSError: storage.
    """
    files.write_text(Path(training.config.output_dir, "report.html"), render(training_page(training)))


def training_page(training: Training) -> Page:
    """The page of a training; its systems are the base model and the epochs that were measured."""
    config, epochs, frames = training.config, training.epochs, _some_frames(training.frames)
    scores, systems = _first_and_last(training)
    return Page(
        title=f"texforce train: {' and '.join(taught_by(dataclasses.asdict(config)))} on {config.model}",
        verdicts=_verdicts_of_training(config, systems),
        facts=[
            Fact("date", now()),
            Fact("training", describe_method(dataclasses.asdict(config))),
            Fact("progress", _progress(training)),
            Fact("measured on", f"{len(training.prompts)} {measured_on(epochs)}, every epoch from the same noise"),
        ],
        tables=[summary(systems), *_changed_most(scores, systems, training.prompts)],
        remarks=[*_how_measured(measures.CONFIDENCE), *_meanings(systems, takes_own_hps(config))],
        figures=[*curves(epochs, config.reward), *category_figures(systems)],
        gallery=gallery([_frame_name(frame) for frame in frames], systems[BASE]["measures"], _film(frames, training.prompts))
        | {"reload": RELOAD_SECONDS if training.state == RUNNING else 0},
        figures_title="Curves",
        state=training.state,
        commands=_commands(training),
        settings=[
            Fact(item.name, str(value))
            for item in option_fields(type(config))
            if (value := getattr(config, item.name)) is not None
        ],
    )


def verdict_of(training: Training) -> str:
    """What a training reached, in a sentence or two; nothing where only the base model was measured.

    For terminals and JSON: with the signs of a keyboard.
    """
    _, systems = _first_and_last(training)
    plain = str.maketrans({"\N{MINUS SIGN}": "-", "\N{NO-BREAK SPACE}": " "})
    verdicts = _verdicts_of_training(training.config, systems)
    sentences = [f"Not trained on: {verdict.text}" if verdict.by_judge else verdict.text for verdict in verdicts]
    return ". ".join(sentences).translate(plain)


def _verdicts_of_training(config: TrainConfig, systems: Mapping[str, Any]) -> list[Verdict]:
    """By the reward, and by a measure that was not trained on: the reward alone does not show whether images are better."""
    first, *others = systems[BASE]["measures"]
    trained = {config.reward, *parse_mixture(config.reward)}
    if judges_world(config.reward) or config.relabel == WORLD:
        trained |= {"alignment", EXACT}  # both are of the detector that taught
    judges = [name for name in others if name not in trained]
    verdicts = make_verdicts(systems)
    if judges and first in trained:
        by_judge = make_verdicts(systems, EXACT if EXACT in judges else judges[0])
        verdicts += [dataclasses.replace(verdict, by_judge=True) for verdict in by_judge]
    return verdicts


def _first_and_last(training: Training) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """The scores (P, 1) of the base model and of the last measurement, by measure, and what they come to."""
    frames = {_frame_name(frame): frame["scores"] for frame in (training.frames[0], training.frames[-1])}
    scores = {
        name: {measure: measures.to_numpy(values)[:, None] for measure, values in frame.items()}
        for name, frame in frames.items()
    }
    summaries = measures.summarise(scores, BASE, _word_categories(training.prompts), training.config.seed)
    return scores, {name: {"strength": 1, "measures": summaries[name]} for name in scores}


def _frame_name(frame: Mapping[str, Any]) -> str:
    return f"epoch {frame['epoch']}" if frame["epoch"] else BASE


def measured_on(epochs: Sequence[Mapping[str, Any]]) -> str:
    """The name of the prompts that a training is measured on."""
    name = MEASURED_ON[find_measured(epochs[0]) or "heldout"]
    return name if name.endswith("prompts") else f"{name} prompts"


def _some_frames(frames: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most MAX_FRAMES of them, from the first to the last."""
    step = max(1.0, (len(frames) - 1) / (MAX_FRAMES - 1))
    return [frames[round(n * step)] for n in range(min(len(frames), MAX_FRAMES))]


def _word_categories(prompts: Sequence[str]) -> list[str]:
    """Whether each prompt has a rare word of the tiny world; nothing where they are not of that world."""
    if not world.is_world(prompts):
        return [""] * len(prompts)
    return ["rare words" if world.has_rare_word(prompt) else "common words" for prompt in prompts]


def _progress(training: Training) -> str:
    last = training.epochs[-1]
    return (
        f"epoch {last['epoch']} of {training.config.num_epochs}, {last['num_images']:,} images, {duration(last['seconds'])}"
    )


def _commands(training: Training) -> list[Fact]:
    """What one can type now: to go on with the training, and to use its adapter once there is one."""
    config = training.config
    facts = [("use", sample_command(config.output_dir, training.prompts[0]))]
    facts += [("measure", f"texforce eval --adapter {shlex.quote(config.output_dir)}")]
    if training.state == FINISHED:
        more = f"{training.resume} --num-epochs {2 * (config.num_epochs or 1)} --force-resume"
        return [Fact(name, text, is_code=True) for name, text in [*facts, ("train on", more)]]
    facts = [("go on, once it has stopped", training.resume), *(facts if len(training.frames) > 1 else [])]
    return [Fact(name, text, is_code=True) for name, text in facts]


def sample_command(adapter: str, prompt: str) -> str:
    """The command that draws a prompt with and without an adapter."""
    return shlex.join(["texforce", "sample", "--adapter", adapter, "--prompt", prompt, "--compare"])


def example_prompt(model: str) -> str:
    """A prompt that a model can draw."""
    return "a crimson disc" if model in EMBEDDED else "a lighthouse in a storm"


def _changed_most(
    scores: Mapping[str, Mapping[str, np.ndarray]], systems: Mapping[str, Any], prompts: Sequence[str]
) -> list[Table]:
    """The prompts that gained most, lost most and changed least by the first measure, with their scores."""
    if len(systems) == 1:
        return []
    (measure, base), now = next(iter(scores[BASE].items())), list(scores.values())[-1]
    before, after = base[:, 0], now[measure][:, 0]
    spread, changes = systems[BASE]["measures"][measure]["spread"], after - before
    known = np.flatnonzero(np.isfinite(changes))
    size = max(1, min(NUM_CHANGED, len(known) // 3))
    orders = {"gained most": -changes, "lost most": changes, "changed least": np.abs(changes)}

    def row(i: int) -> Row:
        change = float(changes[i])
        kind = direction({"mean": change, "low": change, "high": change}, spread)
        was, is_now, by = (minus(f"{value:{form}z.3f}") for value, form in ((before[i], ""), (after[i], ""), (change, "+")))
        return Row(prompts[i], [Cell(was), Cell(is_now, by, kind, strength(change, spread))])

    return [
        Table(
            f"{measure}: prompts that {name}",
            list(systems),
            [row(i) for i in known[np.argsort(key[known], kind="stable")][:size]],
        )
        for name, key in orders.items()
    ]


def _film(frames: Sequence[Mapping[str, Any]], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """The gallery's rows of a training, whose systems are frames."""
    categories = _word_categories(prompts)
    return [
        {"index": i, "prompt": prompts[i], "category": categories[i], "seeds": []}
        | {"scores": [[[values[i]] for values in frame["scores"].values()] for frame in frames]}
        | {"images": [[frame["images"][str(i)]] for frame in frames]}
        for i in map(int, frames[0]["images"])
    ]


# --- the summary ---


@dataclass(frozen=True)
class Cell:
    """A system by a measure. The base model has no change and no outcomes."""

    mean: str
    change: str = ""
    direction: str = ""  # "gain" or "loss", as `direction` has it
    size: int = 0  # of the change, in percent of one in full colour
    outcomes: Sequence[tuple[str, int]] = ()  # percent of the prompts by measures.OUTCOMES


@dataclass(frozen=True)
class Row:
    """A row of a table: the systems by a measure, or on a prompt."""

    name: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Table:
    """A table with a column for each system."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Verdict:
    """What came out of a comparison, in a sentence."""

    system: str
    text: str
    direction: str
    by_judge: bool = False  # by a measure that was not trained on


def make_verdicts(systems: Mapping[str, Any], measure: str = "") -> list[Verdict]:
    """What came out of each comparison by a measure, and what fell: that one in a category, or with the first one others."""
    base = systems[BASE]["measures"]
    first, *others = [measure] if measure else base
    verdicts = []
    for name, system in list(systems.items())[1:]:
        summaries = system["measures"]
        fell = [other for other in others if direction(summaries[other]["paired"], base[other]["spread"]) == "loss"]
        text = f"{first}: no prompt has a score in both systems"
        if outcomes := dict(percents(summaries[first])):
            text = (
                f"{first} {interval(summaries[first]['paired'], '+', _digits(systems, first))}; "
                f"{percent(outcomes['better'])} of prompts better, {percent(outcomes['worse'])} worse"
            )
        groups = summaries[first].get("categories", {}).items()
        fell += [
            f"{first} for {category}"
            for category, part in groups
            if part["num_prompts"] >= MIN_GROUP and direction(part["paired"], base[first]["spread"]) == "loss"
        ]
        text = minus(text) + (f"; {' and '.join(fell)} fell" if fell else "")
        verdicts.append(Verdict(label(name, system), text, direction(summaries[first]["paired"], base[first]["spread"])))
    return verdicts


def summary(systems: Mapping[str, Any]) -> Table:
    """The systems measure by measure."""
    rows = []
    for measure, base in systems[BASE]["measures"].items():
        summaries, digits = [system["measures"][measure] for system in systems.values()], _digits(systems, measure)
        rows.append(Row(measure, [_cell(summary, base["spread"], digits) for summary in summaries]))
    return Table("Summary", _labels(systems), rows)


def _digits(systems: Mapping[str, Any], measure: str) -> int:
    """Decimals of a measure: the same for all systems."""
    summaries = [system["measures"][measure] for system in systems.values()]
    return max(decimals(part) for summary in summaries for part in (summary, summary.get("paired", summary)))


def _cell(summary: Mapping[str, Any], spread: float, digits: int) -> Cell:
    mean, paired = minus(interval(summary, digits=digits)) + dropped(summary), summary.get("paired")
    if paired is None:
        return Cell(mean)
    size = strength(paired["mean"] or 0.0, spread)
    return Cell(mean, minus(interval(paired, "+", digits)), direction(paired, spread), size, percents(summary))


def strength(change: float, spread: float) -> int:
    """The size of a change in percent of one in full colour; `spread` is the deviation of the base's scores."""
    return round(100 * min(1.0, abs(change) / (FULL_COLOUR * spread))) if spread else 100


def _labels(systems: Mapping[str, Any]) -> list[str]:
    return [label(name, system) for name, system in systems.items()]


def label(name: str, system: Mapping[str, Any]) -> str:
    """A system's name, with its strength where that is not 1."""
    return name if system["strength"] == 1 else f"{name} at {system['strength']:g}"


def interval(summary: Mapping[str, Any], kind: str = "", digits: int = 4) -> str:
    """A mean and its interval as text; kind "+" shows the sign."""
    if summary["mean"] is None:
        return "none"
    text = f"{summary['mean']:{kind}z.{digits}f}"
    return text if summary["low"] is None else f"{text} [{summary['low']:z.{digits}f}, {summary['high']:z.{digits}f}]"


def decimals(summary: Mapping[str, Any]) -> int:
    """Decimals that show two digits of an interval's width, or where there is none at least two digits of the mean."""
    has_width = summary["low"] is not None and summary["low"] != summary["high"]
    width = summary["high"] - summary["low"] if has_width else abs(summary["mean"] or 0.0)
    needed = 1 - math.floor(math.log10(width)) if width else 3
    return max(0 if has_width else 3, min(8, needed))


def dropped(summary: Mapping[str, Any]) -> str:
    """A remark on the images without a score, if there are any."""
    return f" ({summary['num_images_dropped']} without a score)" if summary["num_images_dropped"] else ""


def direction(paired: Mapping[str, Any], spread: float) -> str:
    """Whether a change is a "gain" or a "loss"; "" where it is negligible, or its interval holds 0.

    `spread` is the deviation of the base's scores.
    """
    if paired["low"] is None or paired["low"] <= 0 <= paired["high"]:
        return ""
    if abs(paired["mean"]) <= measures.NEGLIGIBLE * spread:
        return ""
    return "gain" if paired["low"] > 0 else "loss"


def percents(summary: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Percent of the prompts by measures.OUTCOMES, which add up to 100."""
    if summary["better"]["mean"] is None:  # no prompt has a score in both systems
        return []
    better, worse = (round(100 * summary[outcome]["mean"]) for outcome in ("better", "worse"))
    return list(zip(measures.OUTCOMES, (better, 100 - better - worse, worse), strict=True))


def percent(share: int) -> str:
    return f"{share}\N{NO-BREAK SPACE}%"


# --- plots ---

# Places across are in percent of the width and places down in pixels, so that a plot fills whatever is there, and its texts
# have one size on a phone and on a desk.


Pair = tuple[int, float]  # a number of images, and a value
TOP = 30  # pixels above a plot, for the title of its axis


@dataclass(frozen=True)
class Line:
    """A line between two points of a plot."""

    x1: float
    y1: float
    x2: float
    y2: float
    kind: str = ""  # "zero", "grid" or "faint"


@dataclass(frozen=True)
class Text:
    """A text in a plot, `shift` pixels right of its place."""

    x: float
    y: float
    text: str
    anchor: str = "start"  # SVG's: "start", "middle" or "end"
    shift: int = 0
    kind: str = ""  # "title" of an axis, "label" of a row, or "halo" over lines


@dataclass(frozen=True)
class Point:
    """A mean as a dot, and its interval as a line if it has one."""

    x: float
    y: float
    radius: int
    interval: Line | None = None
    about: str = ""  # shown when the pointer rests on it


@dataclass(frozen=True)
class Series:
    """What a plot shows of one system."""

    system: str
    colour: int
    points: Sequence[Point]
    joined: bool = False  # whether a line joins the points

    @property
    def lines(self) -> list[Line]:
        pairs = zip(self.points, self.points[1:], strict=False) if self.joined else ()
        return [Line(one.x, one.y, other.x, other.y) for one, other in pairs]


@dataclass(frozen=True)
class Plot:
    """A plot of one measure."""

    measure: str
    title: str
    height: float
    lines: Sequence[Line]
    texts: Sequence[Text]
    series: Sequence[Series]
    margin: str = ""  # for what stands left of it: "scaled" for numbers, "labelled" for labels where the page is wide


@dataclass(frozen=True)
class Figure:
    """A plot for each measure, of which the reader chooses one."""

    title: str
    plots: Sequence[Plot]


class Axis:
    """A linear scale from values to places, with room around them."""

    def __init__(self, values: Iterable[float | None], start: float, end: float) -> None:
        known = [value for value in values if value is not None]
        low, high = min(known, default=0.0), max(known, default=0.0)
        margin = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)

    def ticks(self, most: int = 5) -> list[tuple[float, str]]:
        """At most so many round values on the scale, and their texts."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
        numbers = range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        return [(n * step, minus(f"{n * step:.12g}")) for n in numbers]


def across(axis: Axis, height: float, title: str) -> tuple[list[Line], list[Text]]:
    """The ticks and the title of an axis below a plot."""
    lines = [Line(axis(value), 0, axis(value), height, "grid") for value, _ in axis.ticks()]
    texts = [Text(axis(value), height + 18, text, "middle") for value, text in axis.ticks()]
    return lines, [*texts, Text(50, height + 38, title, "middle", kind="title")]


def upward(axis: Axis) -> tuple[list[Line], list[Text]]:
    """The ticks of an axis left of a plot."""
    lines = [Line(0, axis(value), 100, axis(value), "grid") for value, _ in axis.ticks()]
    return lines, [Text(0, axis(value) + 4, text, "end", -8) for value, text in axis.ticks()]


def make_figures(results: Mapping[str, Any]) -> list[Figure]:
    """The figures that the results allow: changes by strength after a sweep, changes by category if there are categories."""
    systems, strengths = results["systems"], results["strengths"]
    figures: list[Figure] = []
    if strengths:
        plots = [strength_plot(strengths, measure) for measure in systems[BASE]["measures"]]
        figures.append(Figure("Change by strength, on the half that chose it", plots))
    return figures + category_figures(systems)


def curves(epochs: Sequence[Mapping[str, Any]], reward: str) -> list[Figure]:
    """A figure for each measure of a training, once something was measured after its beginning."""
    measured = [(epoch["num_images"], epoch[name]) for epoch in epochs if (name := find_measured(epoch))]
    if len(measured) == 1:
        return []
    figures = []
    for measure in measured[0][1]:
        values = [(num_images, found[measure]) for num_images, found in measured if measure in found]
        rewards = [(epoch["num_images"], epoch["reward_mean"]) for epoch in epochs[1:]] if measure == reward else []
        title = minus(f"{measure}: {values[0][1]:z.3f} \N{RIGHTWARDS ARROW} {values[-1][1]:z.3f}")
        figures.append(Figure(title, [curve(measure, values, _thinned(rewards), measured_on(epochs))]))
    return figures


def curve(measure: str, values: Sequence[Pair], rewards: Sequence[Pair], name: str) -> Plot:
    """A measure over the number of images, the base model's as a line, and the training reward where there is one."""
    height = 200
    horizontal = Axis([x for x, _ in (*values, *rewards)], 0, 100)
    vertical = Axis([y for _, y in (*values, *rewards)], height, TOP)

    def points(pairs: Sequence[Pair], radius: int) -> list[Point]:
        return [Point(horizontal(x), vertical(y), radius, None, minus(f"{x:,} images: {y:z.4f}")) for x, y in pairs]

    lines, texts = framed(horizontal, vertical, "images", measure)
    base = vertical(values[0][1])
    lines.append(Line(0, base, 100, base, "zero"))
    texts.append(Text(100, base - 5 if values[-1][1] < values[0][1] else base + 14, "base model", "end", kind="halo"))
    series = [Series(name, 0, points(values, 4), joined=True)]
    if rewards:
        series.insert(0, Series("training prompts, as sampled", NUM_COLOURS - 1, points(rewards, 0), joined=True))
    return Plot(measure, f"{measure} by images", height + 44, lines, texts, series, "scaled")


def _thinned(pairs: Sequence[Pair]) -> list[Pair]:
    """At most NUM_MEANS pairs: means of neighbours."""
    size = math.ceil(len(pairs) / NUM_MEANS)
    chunks = [pairs[i : i + size] for i in range(0, len(pairs), size or 1)]
    return [(round(sum(x for x, _ in chunk) / len(chunk)), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def category_figures(systems: Mapping[str, Any]) -> list[Figure]:
    """The figure of changes by category, if there are categories."""
    summaries = systems[BASE]["measures"]
    if len(systems) == 1 or not all("categories" in summary for summary in summaries.values()):
        return []
    return [Figure("Change by category", [category_plot(systems, measure) for measure in summaries])]


def category_plot(systems: Mapping[str, Any], measure: str) -> Plot:
    """Paired differences with their intervals, for all prompts and for each category under its name."""
    summaries = {name: system["measures"][measure] for name, system in systems.items() if name != BASE}
    parts = {name: [summary, *summary["categories"].values()] for name, summary in summaries.items()}
    first = next(iter(summaries))
    rows = ["all", *summaries[first]["categories"]]
    step = 14 * len(parts) + 26
    height = step * len(rows)
    axis = Axis([0.0, *ends([part["paired"] for own in parts.values() for part in own])], 1, 99)
    lines, texts = across(axis, height, f"change of {measure}, with its interval")
    texts += [
        Text(0, step * n + 15, f"{shorten(name or 'none')} ({part['num_prompts']})", kind="label")
        for n, (name, part) in enumerate(zip(rows, parts[first], strict=True))
    ]
    series = []
    for k, (name, own) in enumerate(parts.items()):
        points = []
        for n, part in enumerate(own):
            y, paired = step * n + 27 + 14 * k, part["paired"]
            if paired["mean"] is not None:
                line = None if paired["low"] is None else Line(axis(paired["low"]), y, axis(paired["high"]), y)
                points.append(Point(axis(paired["mean"]), y, 4, line, minus(interval(paired, "+"))))
        series.append(Series(label(name, systems[name]), k, points))
    zero = Line(axis(0), 0, axis(0), height, "zero")
    return Plot(measure, f"change of {measure} by category", height + 44, [*lines, zero], texts, series, "labelled")


def strength_plot(strengths: Mapping[str, Any], measure: str) -> Plot:
    """Paired differences with their intervals over the strength, a line for each system; the best strength is larger."""
    curves = {
        name: [(point["strength"], point["measures"][measure]["paired"]) for point in sweep["curve"]]
        for name, sweep in strengths.items()
    }
    everything, height = [point for curve in curves.values() for point in curve], 240
    horizontal = Axis([0.0, *(strength for strength, _ in everything)], 0, 100)
    vertical = Axis([0.0, *ends([paired for _, paired in everything])], height, TOP)
    series = []
    for k, (name, curve) in enumerate(curves.items()):
        points = []
        for strength, paired in sorted(curve, key=lambda point: point[0]):
            if paired["mean"] is not None:
                x, radius = horizontal(strength), 6 if strength == strengths[name]["best"] else 3
                line = None if paired["low"] is None else Line(x, vertical(paired["low"]), x, vertical(paired["high"]))
                points.append(Point(x, vertical(paired["mean"]), radius, line, minus(interval(paired, "+"))))
        series.append(Series(name, k, points, joined=True))
    lines, texts = framed(horizontal, vertical, "strength", f"change of {measure}")
    lines.append(Line(0, vertical(0), 100, vertical(0), "zero"))
    return Plot(measure, f"change of {measure} by strength", height + 44, lines, texts, series, "scaled")


def framed(horizontal: Axis, vertical: Axis, below: str, above: str) -> tuple[list[Line], list[Text]]:
    """The ticks and titles of both axes of a plot: the one across says its title below, the one upward above."""
    (_, texts), (lines, numbers) = across(horizontal, vertical.start, below), upward(vertical)
    return lines, [*texts, *numbers, Text(0, 12, above, shift=-44, kind="title")]


def ends(differences: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Means and both ends of the intervals of paired differences."""
    return [paired[end] for paired in differences for end in ("mean", "low", "high")]


def shorten(text: str) -> str:
    """A text of at most 36 letters."""
    return text if len(text) <= 36 else text[:35] + "\u2026"


# --- the gallery ---


def gallery(names: Sequence[str], base: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The prompts, scores and images of systems, which the page's script shows and sorts; `base` sums up the base model.

    A row holds its prompt's `index`, `prompt`, `category` and `seeds`, and for each system `scores`, a list for each
    measure, and `images`, the address of each.
    """
    prompts = [row["prompt"] for row in rows]
    in_world = world.is_world(prompts)
    return {
        "systems": list(names),
        "rare_words": sorted({word for prompt in prompts for word in world.rare_words(prompt)} if in_world else ()),
        "measures": list(base),
        "exact": list(base).index(EXACT) if EXACT in base else None,
        "negligible": [measures.NEGLIGIBLE * summary["spread"] for summary in base.values()],
        "full": [FULL_COLOUR * summary["spread"] for summary in base.values()],
        "rows": rows,
    }


def _with_thumbnails(folder: Path, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The gallery's rows of an evaluation."""
    systems = results["systems"]
    prompts = [(i, prompt) for i, prompt in enumerate(results["prompts"]) if not prompt["validation"]]
    num_shown = max(1, min(results["num_images"], MAX_IMAGES // (len(prompts) * len(systems))))
    return [
        {"index": i, "prompt": prompt["prompt"], "category": prompt["category"], "seeds": prompt["seeds"]}
        | {"scores": [[scores[i] for scores in system["scores"].values()] for system in systems.values()]}
        | {
            "images": [
                [thumbnail(folder / system["images"] / f"{i:05d}_{k}.png") for k in range(num_shown)]
                for system in systems.values()
            ]
        }
        for i, prompt in prompts
    ]


def thumbnail(path: Path) -> str:
    """An image file as the address of its own content, scaled down if it is large.

    Raises:
        ArtifactError: it is damaged.
    """
    return embed(files.open_image(path))


def embed(image: Image) -> str:
    """An image as the address of its own content, scaled down if it is large."""
    buffer, kind = io.BytesIO(), "png" if max(image.size) <= MAX_PIXELS else "webp"
    if kind == "webp":
        image.thumbnail((MAX_PIXELS, MAX_PIXELS))
    image.convert("RGB").save(buffer, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
