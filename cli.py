"""The command line: options in, text and exit codes out. Results go to stdout, progress to stderr."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

import texforce
from texforce import interrupts
from texforce.config import (
    PRESETS,
    TrainConfig,
    read_json,
    resolve,
)
from texforce.config_inference import (
    EvalConfig,
    MergeConfig,
    SampleConfig,
    resolve_eval,
    resolve_merge,
    resolve_sample,
)
from texforce.prompt_sets import read_prompts
from texforce.terminal import (
    EpochView,
    StageView,
    evaluation_table,
    output,
    printable,
    progress,
    results_table,
    rows_table,
    warn,
)

EXIT_CODES = "0 ok; 1 a bug; 2 bad input; 3 a file refused; 4 diverged; 5 storage, memory, a lost process; "
EXIT_CODES += "6 reward failed; 130/143 interrupted"
OUT_OF_MEMORY = "out of memory; lower --{} or --resolution ({})"
app = typer.Typer(
    help=f"Reinforcement learning of text encoders in text-to-image diffusion models.\n\nExit codes: {EXIT_CODES}.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@contextmanager
def exit_codes(batch_option: str = "batch-size") -> Iterator[None]:
    """Turn expected errors into a message without traceback and the documented exit code."""
    from texforce.checkpoints import ArtifactError
    from texforce.processes import ProcessLost
    from texforce.scorers import RewardError

    try:
        with interrupts.handled():
            yield
    except (RuntimeError, MemoryError) as error:
        if not texforce.is_out_of_memory(error):
            raise
        _fail(OUT_OF_MEMORY.format(batch_option, str(error).partition("\n")[0]), 5)
    except ValueError as error:
        _fail(error, 2)
    except ArtifactError as error:
        _fail(error, 3)
    except texforce.DivergedError as error:
        _fail(error, 4)
    except ProcessLost as error:
        _fail(error, 5)
    except RewardError as error:
        _fail(error, 6)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.errno is None:  # ours: the system's own have a number
            _fail(error, 2)
        _fail(f"storage: {error.strerror or error}: {error.filename or ''}", 5)
    except interrupts.Terminated:
        _fail("terminated", 143)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(error: object, code: int) -> typing.NoReturn:
    progress.print(Text("error: ", style="bold red") + Text(printable(str(error))))
    raise typer.Exit(code)


# --- train ---


def with_options(config_class: type, command: Callable[..., None]) -> Callable[..., None]:
    """A command that has an option for every field of a configuration record, beside its own parameters.

    An option that is not given is None, so that a value from --config or the record's default can take its place.
    """
    hints = typing.get_type_hints(config_class)
    own = list(inspect.signature(command).parameters.values())[1:]
    parameters = []
    # What a record inherits is shared with other commands, and comes last.
    for item in sorted(dataclasses.fields(config_class), key=lambda item: item.name not in config_class.__annotations__):
        kind = hints[item.name]
        text = item.metadata["help"] + _default_text(item, config_class)
        option = typer.Option(f"--{item.name.replace('_', '-')}" + _negation(kind, item.name), help=text, show_default=False)
        parameters.append(
            inspect.Parameter(
                item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
            )
        )

    def run(**arguments: Any) -> None:
        names = {parameter.name for parameter in own}
        given = {name: value for name, value in arguments.items() if name not in names and value is not None}
        command(given, **{name: value for name, value in arguments.items() if name in names})

    hinted = typing.get_type_hints(command, include_extras=True)
    own = [parameter.replace(annotation=hinted[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    run.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*parameters, *own)}
    return run


def _default_text(item: dataclasses.Field[Any], config_class: type) -> str:
    if item.default is not None:
        return f" (default: {item.default})"
    families = ("tiny", "stable-diffusion", "turbo", "sdxl")
    tiny, stable_diffusion, turbo, sdxl = (PRESETS[family, "default"].get(item.name) for family in families)
    if config_class is not TrainConfig or tiny is None:
        return ""
    large = f"; Stable Diffusion {stable_diffusion}" if stable_diffusion != tiny else ""
    few = f"; Turbo {turbo}" if turbo != stable_diffusion else ""
    pixels = f"; SDXL {sdxl}" if sdxl != stable_diffusion else ""
    return f" (default: {tiny}{large}{few}{pixels})"


def _negation(kind: Any, name: str) -> str:
    return f"/--no-{name.replace('_', '-')}" if bool in (kind, *typing.get_args(kind)) else ""


def train(
    given: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="JSON file with options, as a run's config.json; flags override it")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="go on with the run in this folder, whose options need not be given again; begin it if there is none"
        ),
    ] = None,
    force_resume: Annotated[
        bool, typer.Option("--force-resume", help="with --resume, though options or prompts have changed")
    ] = False,
) -> None:
    """Train LoRA on the text encoder by PPO against a reward."""
    with exit_codes("sample-batch-size and --micro-batch-size"):
        from texforce import processes

        options = merge_options(read_config(config), given)
        if force_resume and not resume:
            raise ValueError("force_resume: it is about a run to go on with; give --resume")
        if resume:
            options = resumed_options(resume, options)
        settings = resolve(TrainConfig(**options))
        if processes.is_first():
            progress.print(Text(f"model: {settings.model} ({_why(options)})"))
        if dry_run:
            from texforce import plan

            if processes.is_first():
                output.print(rows_table("plan", plan.plan(settings, go_on=resume is not None)))
            return
        with told_how_to_go_on(settings), EpochView(settings) as view:
            from texforce import training

            result = training.train(settings, view, warn, go_on=resume is not None, changed=force_resume)
        if not processes.is_first():
            return
        output.print(results_table(result))
        output.print(Text(f"adapter, figures and metrics are in {settings.output_dir}"))


def resumed_options(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The options of the run in a folder, with those given over them.

    Raises:
        FileNotFoundError: there is no run, and no option to begin one with. ValueError: another output folder is given.
    """
    if Path(given.get("output_dir") or folder) != folder:
        raise ValueError(f"resume: it names the output folder itself; leave --output-dir {given['output_dir']} out")
    saved = folder / "config.json"
    if folder.is_file():
        raise ValueError(f"resume: {str(folder)!r} is a file; give the output folder of a training")
    if not saved.is_file() and not given:
        raise FileNotFoundError(f"resume: there is no run in {str(folder)!r}; to begin one there, give its options too")
    return merge_options(read_config(saved) if saved.is_file() else {}, given) | {"output_dir": str(folder)}


@contextmanager
def told_how_to_go_on(config: TrainConfig) -> Iterator[None]:
    """Say, when a training is stopped by what is not its own fault, how it can go on."""
    import torch

    from texforce import processes, resume
    from texforce.scorers import RewardError

    try:
        with interrupts.recognised():
            yield
    except (KeyboardInterrupt, torch.OutOfMemoryError, MemoryError, OSError, RewardError, processes.ProcessLost):
        with interrupts.deferred():  # as in the saving before it
            if processes.is_first() and resume.newest(Path(config.output_dir, resume.CHECKPOINTS)):
                warn(f"go on by: texforce train --resume {shlex.quote(config.output_dir)}")
            raise


def _why(options: dict[str, Any]) -> str:
    if options.get("model") is not None:
        return "as asked"
    from texforce.config import default_device

    return "no GPU found, so the embedded model" if default_device() == "cpu" else "a GPU was found"


def read_config(path: Path | None) -> dict[str, Any]:
    """Options of train from a JSON file.

    Raises:
        FileNotFoundError, ValueError: the file is not there, not JSON, or has fields that are no options.
    """
    content = read_json(path) if path else {}
    if foreign := sorted(set(content) - {item.name for item in dataclasses.fields(TrainConfig)}):
        raise ValueError(f"config: {str(path)!r} has fields that are no options of train: {', '.join(foreign)}")
    return content


def merge_options(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A config file's options with those of the command line over them.

    A run's config.json holds everything. What in it follows from other options follows anew from those of the command line.

    Raises:
        ValueError: a preset over a file that decides all that a preset would, so that it would change nothing.
    """
    preset = saved.get("preset", "default")
    if given.get("preset", preset) != preset and all(saved.get(name) is not None for name in PRESETS["tiny", "default"]):
        raise ValueError("preset: the config file decides all that a preset would; give --preset or --config, not both")
    for name in set(FOLLOWING_OPTIONS) & set(saved) - set(given):
        with suppress(ValueError):  # the file alone may be unusable, without what is given
            if getattr(resolve(TrainConfig(**saved | {name: None})), name) == saved[name]:
                saved = saved | {name: None}
    return saved | given


FOLLOWING_OPTIONS = ("lora_alpha", "lr_warmup_steps", "null_prompt")


# --- sample ---


def sample(given: dict[str, Any]) -> None:
    """Draw images, with or without an adapter."""
    with exit_codes():
        from texforce import evaluate, record

        config = resolve_sample(SampleConfig(**given))
        progress.print(Text(f"model: {config.model}"))
        prompts = [*(config.prompt or ()), *(read_prompts(config.prompts) if config.prompts else ())]
        record.check_writable(Path(config.output_dir))
        prompts = [prompt for prompt in prompts for _ in range(config.num_images)]
        seeds = [config.seed + i for i in range(len(prompts))]
        images = evaluate.sample(config, prompts, seeds)
        folder = Path(config.output_dir)
        shown = {
            "model": config.model, "scale": config.scale, "guidance_scale": config.guidance_scale, "eta": config.eta,
            "num_inference_steps": config.num_inference_steps, "adapter": ", ".join(config.adapter or ()),
            "unet": config.unet or "",
        }  # fmt: skip
        for name, drawn in images.items():
            labels = [{"system": name, "prompt": p, "seed": s} | shown for p, s in zip(prompts, seeds, strict=True)]
            paths = record.write_images(folder, drawn, labels)
            output.print(Text(f"{name}: {paths[0]}" + (f" to {paths[-1].name}" if len(paths) > 1 else "")))
        record.write_grid(folder / f"grid_{paths[-1].stem}.png", prompts, images)
        output.print(Text(f"grid: {folder / f'grid_{paths[-1].stem}.png'}"))


# --- merge ---


def merge(given: dict[str, Any]) -> None:
    """Join adapters and a U-Net with a base model, and write them for other tools."""
    with exit_codes():
        from texforce import export

        config = resolve_merge(MergeConfig(**given))
        progress.print(Text(printable(f"model: {config.model}")))
        folder = export.merge(config)
        output.print(Text(printable(f"{config.format}: {folder}")), soft_wrap=True)


# --- eval ---


def evaluate(given: dict[str, Any]) -> None:
    """Measure adapters and U-Nets against the base model on a benchmark, and write a report."""
    with exit_codes():
        config = resolve_eval(EvalConfig(**given))
        progress.print(Text(printable(f"model: {config.model}; benchmark: {config.benchmark}")))
        from texforce import evaluate

        try:
            with StageView() as view:
                results = evaluate.evaluate(config, view)
        except KeyboardInterrupt:
            warn("what is finished is kept; the same command goes on from there")
            raise
        output.print(evaluation_table(results))
        for name, sweep in results["strengths"].items():
            text = (
                f"{name}: strength {sweep['best']:g} was the best by {sweep['chosen_by']} on the other half of the prompts"
            )
            output.print(Text(printable(text)), soft_wrap=True)
        output.print(Text(printable(f"report: {Path(config.output_dir) / 'report.html'}")), soft_wrap=True)


# --- rewards ---


def list_rewards() -> None:
    """Show the rewards there are, what they need, and whether it is here."""
    from texforce.checkpoints import HUB, is_fetched
    from texforce.rewards import CATALOGUE, missing_packages

    table = Table(Column("reward", no_wrap=True), show_lines=True)
    for title in ("measures", "range; higher is better", "gradients", "needs", "licence", "here"):
        table.add_column(title, overflow="fold")
    for name, entry in CATALOGUE.items():
        needs = "\n".join(HUB[item].repository for item in entry.weights) or "-"
        if entry.packages:
            needs = f"pip install 'texforce[{name}]'"
        here = not missing_packages(name) and all(is_fetched(item) for item in entry.weights)
        cells = (name, entry.measures, entry.scale, "yes" if entry.gradients else "no", needs, entry.licence)
        tiny = "for tiny" if "hps" in name else "no"
        table.add_row(*(Text(cell) for cell in cells), "yes" if here else tiny)
    output.print(table)
    output.print(
        "Others: path/to/file.py:function, http://HOST:PORT/score, and mixtures of any as hps=1,jpeg=0.1. What is not "
        "here is fetched from the hub at first use.",
        soft_wrap=True,
    )
    output.print("With the tiny model, hps is an embedded scorer of its world, and nothing is fetched.", soft_wrap=True)


app.command("train")(with_options(TrainConfig, train))
app.command("sample")(with_options(SampleConfig, sample))
app.command("merge")(with_options(MergeConfig, merge))
app.command("eval")(with_options(EvalConfig, evaluate))
app.command("rewards")(list_rewards)


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of calls that peft makes
    app()


if __name__ == "__main__":
    main()
