"""texforce from Python: the commands as functions, with progress, and results whose fields have names.

Every option of a command is a keyword argument of its function, by the same name, rule and default (config.py and
draw_config.py). Read top to bottom: the declaration of the options, the results, the functions.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, dataclass_transform, get_type_hints

from .config import FOLLOWING_OPTIONS, TrainConfig
from .draw_config import (
    BASE,
    EvalConfig,
    EvalOptions,
    MergeConfig,
    MergeOptions,
    SampleConfig,
    SampleOptions,
    resolve_eval,
    resolve_merge,
    resolve_sample,
)
from .errors import InputError, expected, naming_origins
from .files import SampledImage
from .options import derived, option_fields
from .presets import PRESETS
from .stages import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


# --- the options ---

T = TypeVar("T")
P = ParamSpec("P")
Result = TypeVar("Result")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(derived,))
def arguments(cls: type[T]) -> type[T]:
    """Make a class one of keyword arguments, for type checkers and editors alone."""
    return cls


@arguments
class TrainArguments(TrainConfig):
    """What `train` takes."""

    config: str | None = None
    resume: str | None = None
    force_resume: bool = False
    trust_reward_code: bool = False
    progress: bool = True


@arguments
class SampleArguments(SampleConfig):
    """What `sample` takes."""

    progress: bool = True


@arguments
class MergeArguments(MergeConfig):
    """What `merge` takes."""

    progress: bool = True


@arguments
class EvaluateArguments(EvalConfig):
    """What `evaluate` takes."""

    progress: bool = True


def takes(config: Callable[P, object]) -> Callable[[Callable[..., Result]], Callable[P, Result]]:
    """Declare the keyword arguments of a function: to type checkers and editors, and to `help` and notebooks.

    The fields of a configuration are written once; type checkers know what its constructor takes.
    """

    def declare(function: Callable[..., Result]) -> Callable[P, Result]:
        signature, options = inspect.signature(function), option_fields(config)
        own = [item for item in signature.parameters.values() if item.kind is item.KEYWORD_ONLY]
        hints = get_type_hints(config)
        given = [_parameter(item, hints[item.name]) for item in options]
        described = [f"    {item.name}: {item.metadata['help']}" for item in options]
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options:", *described])
        function.__signature__ = signature.replace(parameters=[*given, *own])  # type: ignore[attr-defined]
        return function

    return declare


def _parameter(item: Field[Any], kind: Any) -> inspect.Parameter:
    """An option as `help` and notebooks show it: its type, and its default, or None where that depends on others."""
    depends = item.name in FOLLOWING_OPTIONS or any(item.name in preset for preset in PRESETS.values())
    default = None if item.default is MISSING or depends else item.default
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind if default is not None else kind | None
    )


def _given(options: Mapping[str, Any], config: type) -> dict[str, Any]:
    """The options that are given, paths as texts.

    Raises:
        InputError: an option is called otherwise here than in other trainers; or prompts are a list instead of a file.
    """
    from .flags import ELSEWHERE

    names = {item.name for item in option_fields(config)}
    for name in options.keys() - names:
        if ELSEWHERE.get(name) in names:
            raise InputError(f"{name}: there is no such option; did you mean {ELSEWHERE[name]!r}?")
    for name in ("prompts", "heldout_prompts", "anchor_prompts"):
        if isinstance(options.get(name), list | tuple):  # config.json names what a run was trained on
            also = "; prompt takes a list" if config is SampleConfig else ""
            raise InputError(f"{name}: give a file or the name of a set, not a list{also}")
    return {name: _as_text(value) for name, value in options.items() if value is not None}


def _as_text(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_text(item) for item in value]
    return fspath(value) if isinstance(value, PathLike) else value


# --- the results ---


@dataclass(frozen=True, repr=False)
class TrainResult:
    """What a training reached, and where it lies.

    Attributes:
        output_dir: holds the adapter, figures, metrics and checkpoints; `sample` and the others take it as `adapter`.
        config: every option with its value.
        measured_on: the held-out prompts, or where there are none the training prompts.
        base, tuned: the mean of each measure on images of the same prompts and noise, higher is better.
        epochs: the measures of each, as in metrics.jsonl and in its units; the first before training.
        num_images: images that were sampled to train on.
        seconds: how long it took.
        details: as in result.json.
    """

    output_dir: Path
    config: TrainConfig
    measured_on: Literal["heldout", "training_prompts"]
    base: dict[str, float]
    tuned: dict[str, float]
    epochs: list[dict[str, Any]]
    num_images: int
    seconds: float
    details: dict[str, Any]

    def __fspath__(self) -> str:
        """The output folder, so that `adapter` takes a result too."""
        return str(self.output_dir)

    @property
    def change(self) -> dict[str, float]:
        """`tuned` minus `base`, by measure."""
        return {name: self.tuned[name] - value for name, value in self.base.items()}

    def plot(self) -> Figure:
        """The reward over the images that were trained on: a matplotlib figure.

        As in curve.png, but with `normalise_rewards` each epoch is in the units of its own time.
        """
        from .run import draw_curve, main_measure

        return _shown(draw_curve(self.epochs, main_measure(self.config)))

    def to_pandas(self) -> DataFrame:
        """A row for each epoch; a measure of held-out images is in the column `heldout.NAME`."""
        return _pandas().json_normalize(self.epochs)

    def __repr__(self) -> str:
        rows = [
            f"  {name}: {self.base[name]:z.4f} -> {self.tuned[name]:z.4f} ({self.change[name]:+z.4f})" for name in self.base
        ]
        return "\n".join([f"{self.output_dir}: {self.num_images:,} images in {duration(self.seconds)}", *rows])


@dataclass(frozen=True, repr=False)
class SampleResult:
    """Images, and where they lie.

    Attributes:
        output_dir: the folder.
        images: each with its system, prompt, seed and path; `open()` reads it.
        grid: all of them in one picture.
    """

    output_dir: Path
    images: list[SampledImage]
    grid: Path

    def __repr__(self) -> str:
        return f"{self.output_dir}: {len(self.images)} images, all of them in {self.grid}"

    def plot(self) -> Figure:
        """All images in one picture, as in the file `grid`: a matplotlib figure."""
        from matplotlib.figure import Figure
        from PIL import Image

        with Image.open(self.grid) as grid:
            figure = Figure(figsize=(grid.width / 100, grid.height / 100), dpi=100)
            axes = figure.add_axes((0, 0, 1, 1))
            axes.imshow(grid)
        axes.set_axis_off()
        return _shown(figure)

    def to_pandas(self) -> DataFrame:
        """A row for each image: system, prompt, seed and path."""
        return _pandas().DataFrame([vars(image) for image in self.images])


@dataclass(frozen=True)
class MergeResult:
    """What was written, and where.

    Attributes:
        output_dir: the folder.
        format: the option of that name.
        files: all that was written.
    """

    output_dir: Path
    format: Literal["pipeline", "checkpoint", "peft", "diffusers", "kohya"]
    files: list[Path]


@dataclass(frozen=True)
class Measured:
    """The mean of a measure over prompts, and its change against the base model, each with its 95 % interval.

    A number is None where no image has a score, an interval where there is a single prompt; the base has no change.

    Attributes:
        system, measure: what was measured, and by what.
        mean, low, high: the mean and its interval.
        change, change_low, change_high: the mean difference to the base model, prompt by prompt, and its interval.
    """

    system: str
    measure: str
    mean: float | None
    low: float | None
    high: float | None
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """What an evaluation found, and where it lies.

    Attributes:
        output_dir: the folder, with images and results.
        report: the page.
        measured: each system by each measure, the base model first.
        details: as in results.json.
    """

    output_dir: Path
    report: Path
    measured: list[Measured]
    details: dict[str, Any]

    def plot(self) -> Figure:
        """The change of each measure against the base model, with its 95 % interval: a matplotlib figure."""
        import numpy as np
        from matplotlib.figure import Figure

        changed = [item for item in self.measured if item.change is not None]
        names = list(dict.fromkeys(item.measure for item in changed))
        figure = Figure(figsize=(7, 0.8 + 0.9 * max(1, len(names))), layout="constrained")
        for n, name in enumerate(names):  # each on a scale of its own
            axes = figure.add_subplot(
                len(names), 1, n + 1, xlabel="change against the base model" if n + 1 == len(names) else ""
            )
            axes.set_title(name, loc="left", fontsize="medium")
            axes.axvline(0, color="grey", linewidth=1)
            for item in (item for item in changed if item.measure == name):
                low, change, high = (
                    np.nan if end is None else end for end in (item.change_low, item.change, item.change_high)
                )
                axes.plot([low, high], [item.system] * 2, color="tab:blue")
                axes.plot([change], [item.system], "o", color="tab:blue")
        return _shown(figure)

    def to_pandas(self) -> DataFrame:
        """A row for each image: system, prompt, category, seed, number, and a column for each measure."""
        prompts, rows = self.details["prompts"], list[dict[str, Any]]()
        for name, system in self.details["systems"].items():
            for i, prompt in enumerate(prompts):
                for k, seed in enumerate(prompt["seeds"]):
                    scores = {measure: table[i][min(k, len(table[i]) - 1)] for measure, table in system["scores"].items()}
                    about = {"system": name, "prompt": prompt["prompt"], "category": prompt["category"], "seed": seed}
                    rows.append(about | {"image": k} | scores)
        return _pandas().DataFrame(rows)

    def __repr__(self) -> str:
        def numbers(mean: float | None, low: float | None, high: float | None, sign: str = "") -> str:
            text = "-" if mean is None else f"{mean:{sign}z.4f}"
            return text if low is None else f"{text} [{low:{sign}z.4f}, {high:{sign}z.4f}]"

        rows = []
        for item in self.measured:
            change = numbers(item.change, item.change_low, item.change_high, "+")
            text = f"  {item.measure} of {item.system}: {numbers(item.mean, item.low, item.high)}"
            rows.append(text if item.system == BASE else f"{text}, change {change}")
        return "\n".join([f"{self.report}:", *rows])


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise InputError("to_pandas: needs pandas, which is not installed; pip install pandas") from error
    return pandas


def _shown(figure: Figure) -> Figure:
    """A figure that notebooks show, though it is none of pyplot's."""

    def to_png() -> bytes:
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=100)
        return png.getvalue()

    vars(figure)["_repr_png_"] = to_png
    return figure


# --- the functions ---


@takes(TrainArguments)
def train(
    *,
    config: str | None = None,
    resume: str | None = None,
    force_resume: bool = False,
    trust_reward_code: bool = False,
    progress: bool = True,
    **options: Any,
) -> TrainResult:
    """Train LoRA on the text encoder against a reward, as `texforce train` does.

    Args:
        config: a JSON file with options, as a run's config.json; arguments override it.
        resume: go on with the run in this folder, whose options need not be given again; begin it if there is none.
        force_resume: resume though options, or the content of their files, have changed.
        trust_reward_code: run a reward function's file that `config` or `resume` names instead of `reward`.
        progress: show the training on stderr: in a terminal drawn anew, elsewhere a line for each epoch.

    Raises:
        TexforceError: its subclasses in texforce.errors say what went wrong; anything else is a bug.
    """
    from . import processes, training, views
    from .cli import check_trusted, train_settings
    from .files import read_lines

    with _expected_errors():
        if force_resume and not resume:
            raise InputError("force_resume: works only together with resume")
        given, say = _given(options, TrainConfig), _warn if progress else _silent
        settings = train_settings(given, Path(config) if config else None, Path(resume) if resume else None, say)
        if not trust_reward_code:
            check_trusted(settings, given)
        with views.EpochView(settings, processes.is_first()) if progress else contextlib.nullcontext(_silent) as view:
            result = training.train(settings, view, say, resume is not None, force_resume)
        output_dir = Path(settings.output_dir)
        name: Literal["heldout", "training_prompts"] = "heldout" if "heldout" in result else "training_prompts"
        base, tuned = ({measure: value[kind] for measure, value in result[name].items()} for kind in ("base", "tuned"))
        epochs = read_lines(output_dir / "metrics.jsonl") if processes.is_first() else []
    facts = {"num_images": result["num_images"], "seconds": result["seconds"], "details": result}
    return TrainResult(output_dir, settings, name, base, tuned, epochs, **facts)


@takes(SampleArguments)
def sample(*, progress: bool = True, **options: Any) -> SampleResult:
    """Draw images, with or without an adapter, as `texforce sample` does.

    Args:
        progress: show on stderr what is being done.

    Raises:
        TexforceError: its subclasses in texforce.errors say what went wrong; anything else is a bug.
    """
    from . import evaluation

    with _expected_errors():
        config = resolve_sample(SampleOptions(**_given(options, SampleConfig)))
        with _stages_shown(progress) as say, naming_origins(config.origins):
            images, grid = evaluation.sample_to_folder(config, say)
    return SampleResult(Path(config.output_dir), images, grid)


@takes(MergeArguments)
def merge(*, progress: bool = True, **options: Any) -> MergeResult:
    """Join adapters and a U-Net with a base model, and write them for other tools, as `texforce merge` does.

    Args:
        progress: show on stderr what is being done.

    Raises:
        TexforceError: its subclasses in texforce.errors say what went wrong; anything else is a bug.
    """
    from . import merging

    with _expected_errors():
        config = resolve_merge(MergeOptions(**_given(options, MergeConfig)))
        with _stages_shown(progress), naming_origins(config.origins):
            folder = merging.merge(config)
    return MergeResult(folder, config.format, sorted(path for path in folder.rglob("*") if path.is_file()))


@takes(EvaluateArguments)
def evaluate(*, progress: bool = True, **options: Any) -> EvaluationResult:
    """Measure adapters and U-Nets against the base model on a benchmark, and write a report, as `texforce eval` does.

    Args:
        progress: show on stderr what is being done.

    Raises:
        TexforceError: its subclasses in texforce.errors say what went wrong; anything else is a bug.
    """
    from . import evaluation

    with _expected_errors():
        config = resolve_eval(EvalOptions(**_given(options, EvalConfig)))
        with _stages_shown(progress) as say, naming_origins(config.origins):
            results = evaluation.evaluate(config, say)
    measured = [
        Measured(name, measure, *_interval(summary), *_interval(summary.get("paired", {})))
        for name, system in results["systems"].items()
        for measure, summary in system["measures"].items()
    ]
    output_dir = Path(config.output_dir)
    return EvaluationResult(output_dir, output_dir / "report.html", measured, results)


def _interval(summary: Mapping[str, Any]) -> list[float | None]:
    return [summary.get(name) for name in ("mean", "low", "high")]


def _warn(message: str) -> None:
    from .views import warn

    warn(_in_python(message))


def _silent(*arguments: Any) -> None:
    """Show nothing."""


@contextlib.contextmanager
def _stages_shown(progress: bool) -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being done, or nothing; gives what takes messages."""
    from . import stages, views

    if not progress:
        yield _silent
        return
    with views.StageView() as view, stages.reporting_to(view):
        yield _warn


@contextlib.contextmanager
def _expected_errors() -> Iterator[None]:
    """Raise expected errors in the words of Python, a full disk and a lack of memory too; bugs pass unchanged."""
    try:
        yield
    except Exception as error:
        if (known := expected(error)) is None:
            raise
        known.args = (_in_python(str(known)),)
        if known is error:
            raise
        raise known from error


def _in_python(message: str) -> str:
    """A message that calls options as keyword arguments: output_dir and not --output-dir."""
    own, raised, foreign = message.partition(" raised ")  # what a function of the user's said stays as it is
    names = {name for function in (train, sample, merge, evaluate) for name in inspect.signature(function).parameters}

    def renamed(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        return name if name in names else found[0]

    return re.sub(r"(?<![\w./'\"-])--([a-z][a-z-]*[a-z])(?![\w./'\"-])", renamed, own) + raised + foreign
