"""The command line: options in, text and exit codes out. Results go to stdout, progress to stderr.

Read top to bottom: exit codes, options, the commands, progress, tables.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import shlex
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperCommand

from texforce import __version__

from . import interrupts
from .config import (
    BASE,
    DrawConfig,
    EvalConfig,
    EvalOptions,
    MergeConfig,
    MergeOptions,
    SampleConfig,
    SampleOptions,
    TrainConfig,
    TrainOptions,
    check_algorithm_options,
    option_fields,
    resolve,
    resolve_eval,
    resolve_merge,
    resolve_sample,
    without_passwords,
)
from .errors import (
    InputError,
    NotFoundError,
    OutOfMemory,
    ProcessLost,
    RewardError,
    StorageError,
    expected,
    naming_origins,
)
from .files import read_json
from .presets import PRESETS
from .prompt_sets import MEASURED_ON, find_measured, read_prompts

EXIT_CODES = "0 ok; 1 a bug; 2 bad input; 3 a file refused; 4 diverged; 5 storage, memory, a lost process; "
EXIT_CODES += "6 reward failed; 130/143 interrupted; 141 nobody reads the output"


class PipeConsole(Console):
    """A console that prints texts of others, and whose reader may leave, as `| head` does.

    Whatever a text holds, it cannot drive the terminal; only the console's own control codes do. When the reader has left,
    the command ends without a message, as by SIGPIPE.
    """

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # for what Python writes at its end
        raise SystemExit(141)


output, progress = PipeConsole(), PipeConsole(stderr=True)
app = typer.Typer(
    help=f"Reinforcement learning of text encoders in text-to-image diffusion models.\n\nExit codes: {EXIT_CODES}.",
    no_args_is_help=True,
    rich_markup_mode=None,  # its tables cut names at 80 columns
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


OPTION_NAMES = sorted(
    {item.name for config in (TrainConfig, SampleConfig, MergeConfig, EvalConfig) for item in option_fields(config)}
    | {"config", "resume", "force_resume", "port", "device"}
)

# --- exit codes ---


@contextmanager
def exit_codes(memory_options: str = "") -> Iterator[None]:
    """Turn expected errors into a message without traceback and the documented exit code; others are bugs.

    `memory_options` are the command's options that save memory, for the message when it runs out.
    """
    try:
        with interrupts.handled():
            yield
    except interrupts.Terminated:
        _fail("terminated", 143)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        known = expected(error)
        if known is None:
            raise
        advice = f"; lower {memory_options}" if memory_options and isinstance(known, OutOfMemory) else ""
        _fail(f"{known}{advice}", known.exit_code)


def _fail(error: object, code: int) -> typing.NoReturn:
    message = as_typed(str(error)) if code == InputError.exit_code else str(error)
    progress.print(Text("error: ", style="bold red") + Text(message))
    raise typer.Exit(code)


def as_typed(message: str) -> str:
    """A message about an option, with which it begins, that calls options as one types them: --num-epochs for num_epochs.

    A message about a file begins with the file, and calls the fields as they are called there.
    """
    if message.partition(":")[0] not in OPTION_NAMES:
        return message
    whole, underscored = "|".join(OPTION_NAMES), "|".join(name for name in OPTION_NAMES if "_" in name)
    # As "name: ...", also after another one; names of two words wherever they are no part of a path or a quoted text.
    pattern = rf"(?:^|(?<=[:;] ))(?:{whole})(?=: )|(?<![\w./'\"-])(?:{underscored})(?![\w./'\"])"
    return re.sub(pattern, lambda found: "--" + found[0].replace("_", "-"), message)


def printable(text: str) -> str:
    """Text that cannot drive the terminal: control characters other than line ends become spaces."""
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)


def show(result: str) -> None:
    output.print(Text(result), soft_wrap=True)


def warn(message: str) -> None:
    progress.print(Text(message), soft_wrap=True)


# --- options and help ---

DRAWING = tuple(item.name for item in option_fields(DrawConfig))
# The options of `train` by subject; the first group is all that `--help` shows.
TRAIN_GROUPS = {
    "Options": (
        "reward", "prompts", "model", "preset", "algorithm", "num_epochs", "learning_rate", "seed", "output_dir", "resume",
        "dry_run", "config",
    ),
    "Rewards": ("eval_reward", "normalise_rewards", "reward_checkpoint", "reward_timeout", "trust_reward_code"),
    "Prompts and images": (
        "heldout_prompts", "num_prompts_per_epoch", "num_samples_per_prompt", "sampler", "num_inference_steps", "eta",
        "guidance_scale", "resolution", "deterministic_elsewhere", "null_prompt",
    ),
    "What is trained, and how": (
        "target", "rank", "lora_alpha", "num_updates_per_epoch", "num_inner_epochs", "advantages", "advantage_clip",
        "lr_scheduler", "lr_warmup_steps", "weight_decay", "max_grad_norm", "ema_decay", "kl_weight", "null_anchor",
        "anchor_prompts",
    ),
    "One algorithm's": (
        "clip_range", "timestep_window", "timestep_fraction", "num_noise_levels", "noise_window", "imitation_weight",
        "backprop_steps",
    ),
    "Memory and speed": (
        "sample_batch_size", "micro_batch_size", "micro_batch", "mixed_precision", "gradient_checkpointing", "compile",
    ),
    "Measuring, saving, stopping": (
        "eval_every", "checkpoint_every", "checkpoints_to_keep", "force_resume", "max_kl", "max_reward_drop", "report_to",
    ),
}  # fmt: skip
# Options as other trainers and pipelines call them, and what they are called here.
ELSEWHERE = {
    "lr": "learning_rate", "epochs": "num_epochs", "max_train_epochs": "num_epochs", "num_train_epochs": "num_epochs",
    "batch_size": "sample_batch_size", "train_batch_size": "micro_batch_size", "network_dim": "rank", "lora_rank": "rank",
    "network_alpha": "lora_alpha", "output": "output_dir", "output_name": "output_dir", "out": "output_dir",
    "steps": "num_inference_steps", "num_steps": "num_inference_steps", "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale", "pretrained_model_name_or_path": "model", "checkpoint": "model", "lora": "adapter",
    "lora_path": "adapter", "num_images_per_prompt": "num_images", "n": "num_images", "width": "resolution",
    "height": "resolution", "reward_fn": "reward", "resume_from_checkpoint": "resume", "save_every": "checkpoint_every",
}  # fmt: skip


class Command(TyperCommand):
    """A command whose help comes in groups, and which knows what its options are called elsewhere."""

    groups: Mapping[str, Sequence[str]] = {}

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the groups' options; `--help` shows the first group alone, `--help-all` all of them."""
        records = {param.name: record for param in self.get_params(ctx) if (record := param.get_help_record(ctx))}
        grouped = {name for names in self.groups.values() for name in names}
        groups = dict(self.groups) or {"Options": [name for name in records if name not in DRAWING]}
        if not self.groups and records.keys() & set(DRAWING):
            groups["How images are drawn"] = [name for name in DRAWING if name in records]
        is_short = bool(self.groups) and not ctx.meta.get("help_all")
        for title, names in list(groups.items())[: 1 if is_short else None]:
            with formatter.section(title):
                formatter.write_dl([records.pop(name) for name in names if name in records], col_max=28)
        if others := [record for name, record in records.items() if name not in grouped]:
            with formatter.section("Help"):
                formatter.write_dl(others, col_max=28)
        if is_short:
            number = sum(len(names) for names in list(groups.values())[1:])
            formatter.write(f"\n{number} further options: --help-all\n")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments; an option that is called otherwise elsewhere is named as it is called here."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            name = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_")
            if ELSEWHERE.get(name) in {param.name for param in self.params}:
                error.possibilities = [f"--{ELSEWHERE[name].replace('_', '-')}"]  # type: ignore[attr-defined]
            raise


class TrainCommand(Command):
    groups = TRAIN_GROUPS


def show_all_help(ctx: typer.Context, is_given: bool) -> None:
    if is_given:
        ctx.meta["help_all"] = True
        typer.echo(ctx.get_help())
        raise typer.Exit


HELP_ALL = typer.Option("--help-all", is_eager=True, callback=show_all_help, help="Show all options and exit.")


def show_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"texforce {__version__}")
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def with_options(config_class: type, command: Callable[..., None]) -> Callable[..., None]:
    """A command that has an option for every field of a configuration record, beside its own parameters.

    An option that is not given is None, so that a value from --config or the record's default can take its place.
    """
    hints = typing.get_type_hints(config_class)  # without the rules, which the configuration checks
    own = list(inspect.signature(command).parameters.values())[1:]
    parameters = []
    # What a record inherits is shared with other commands, and comes last.
    for item in sorted(option_fields(config_class), key=lambda item: item.name not in config_class.__annotations__):
        kind = str if typing.get_origin(hints[item.name]) is Literal else hints[item.name]
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
    default = None if item.default is dataclasses.MISSING else item.default
    tiny, stable_diffusion, turbo, sdxl = (
        PRESETS[family, "default"].get(item.name, default) if config_class is TrainConfig else default
        for family in ("tiny", "stable-diffusion", "turbo", "sdxl")
    )
    if tiny is None:
        return ""
    large = f"; Stable Diffusion {stable_diffusion}" if stable_diffusion != tiny else ""
    few = f"; Turbo {turbo}" if turbo != stable_diffusion else ""
    pixels = f"; SDXL {sdxl}" if sdxl != stable_diffusion else ""
    return f" (default: {tiny}{large}{few}{pixels})"


def _negation(kind: Any, name: str) -> str:
    return f"/--no-{name.replace('_', '-')}" if bool in (kind, *typing.get_args(kind)) else ""


# --- train ---


def train_command(
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
        bool,
        typer.Option("--force-resume", help="with --resume, though options, or the content of their files, have changed"),
    ] = False,
    trust_reward_code: Annotated[
        bool,
        typer.Option(
            "--trust-reward-code", help="run the file of a reward function that --config or --resume names, and --reward not"
        ),
    ] = False,
    help_all: Annotated[bool, HELP_ALL] = False,
) -> None:
    """Train LoRA on the text encoder against a reward.

    \b
    texforce train --reward hps
    texforce train --reward hps --model stabilityai/sd-turbo --dry-run
    texforce train --resume out
    """
    with exit_codes("--sample-batch-size, --micro-batch-size or --resolution"):
        from . import processes

        options = merge_options(read_config(config), given)
        if force_resume and not resume:
            raise InputError("force_resume: works only together with --resume")
        if resume:
            options = resumed_options(resume, options)
        settings = resolve(TrainOptions(**options))
        check_algorithm_options(given, settings.algorithm)
        if not (dry_run or trust_reward_code):
            check_trusted(settings, given)
        if processes.is_first():
            warn(f"model: {settings.model} ({_why(options)})")
        from . import train

        if dry_run:
            if processes.is_first():
                output.print(rows_table("plan", train.plan(settings, resume is not None)))
            return
        with hint_to_resume(settings), EpochView(settings) as view:
            result = train.train(settings, view, warn, resume is not None, force_resume)
        if not processes.is_first():
            return
        output.print(results_table(result))
        show(f"adapter, figures and metrics are in {settings.output_dir}")


def resumed_options(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The options of the run in a folder, with those given over them.

    Raises:
        NotFoundError: there is no run, and no option to begin one with. InputError: another output folder is given.
    """
    if Path(given.get("output_dir") or folder) != folder:
        raise InputError(f"resume: it names the output folder itself; leave --output-dir {given['output_dir']} out")
    if folder.is_file():
        raise InputError(f"resume: {str(folder)!r} is a file; give the output folder of a training")
    from . import run

    if not run.is_run(folder) and not given:
        raise NotFoundError(f"resume: there is no run in {str(folder)!r}; to begin one there, give its options too")
    saved = check_options(run.saved_options(folder), folder / "config.json") if run.is_run(folder) else {}
    return merge_options(saved, given) | {"output_dir": str(folder)}


def check_trusted(config: TrainConfig, given: dict[str, Any]) -> None:
    """Check that the files of reward functions, which are code, are named on the command line itself.

    Raises:
        InputError: one comes from --config or --resume alone.
    """
    from .rewards import functions_of

    def paths(specs: Iterable[str]) -> set[Path]:
        return {Path(name.rpartition(":")[0]) for spec in specs for name in functions_of(spec)}

    named = paths([*([given["reward"]] if "reward" in given else []), *given.get("eval_reward", ())])
    if foreign := paths([config.reward, *(config.eval_reward or ())]) - named:
        raise InputError(
            f"reward: {str(min(foreign))!r} is code that --config or --resume names, not this command line; read it, and "
            "give --trust-reward-code to run it"
        )


@contextmanager
def hint_to_resume(config: TrainConfig) -> Iterator[None]:
    """Say how a training can go on that was stopped by a signal, the disk, memory, a scorer or a lost process."""
    from . import processes, rewards, run

    try:
        with interrupts.recognised():
            yield
    except (KeyboardInterrupt, Exception) as error:
        passing = StorageError | OutOfMemory | RewardError | ProcessLost
        if isinstance(error, KeyboardInterrupt) or isinstance(expected(error), passing):
            with interrupts.deferred():  # as in the saving before it
                if processes.is_first() and run.newest_checkpoint(Path(config.output_dir, run.CHECKPOINTS)):
                    code = any(map(rewards.functions_of, [config.reward, *(config.eval_reward or ())]))
                    trust = " --trust-reward-code" if code else ""
                    warn(f"resume with: texforce train --resume {shlex.quote(config.output_dir)}{trust}")
        raise


def _why(options: dict[str, Any]) -> str:
    if options.get("model") is not None:
        return "as asked"
    from .config import default_device

    return "no GPU found, so the embedded model" if default_device() == "cpu" else "a GPU was found"


def read_config(path: Path | None) -> dict[str, Any]:
    """Options of train from a JSON file.

    Raises:
        NotFoundError, InputError: the file is not there, not JSON, or has fields that are no options.
    """
    return check_options(read_json(path), path) if path else {}


def check_options(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Options of train from a file, as they are.

    Raises:
        InputError: there are fields that are no options, or values that an option does not take; names the file.
    """
    if foreign := sorted(set(content) - {item.name for item in option_fields(TrainConfig)}):
        raise InputError(f"{path}: has fields that are no options of train: {', '.join(foreign)}")
    try:
        TrainOptions(**content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return content


def merge_options(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A config file's options with those of the command line over them.

    A run's config.json holds every option. Those that follow from others follow from the command line's options again.

    Raises:
        InputError: a preset over a file that decides all that a preset would, so that it would change nothing.
    """
    preset = saved.get("preset", "default")
    if given.get("preset", preset) != preset and all(saved.get(name) is not None for name in PRESETS["tiny", "ppo"]):
        raise InputError("preset: the config file decides all that a preset would; give --preset or --config, not both")
    for name in set(FOLLOWING_OPTIONS) & set(saved) - set(given):
        with suppress(InputError):  # the file alone may be unusable, without what is given
            if getattr(resolve(TrainOptions(**saved | {name: None})), name) == saved[name]:
                saved = saved | {name: None}
    return saved | given


FOLLOWING_OPTIONS = ("lora_alpha", "lr_warmup_steps", "null_prompt", "null_anchor", "eta")


# --- sample ---


def sample_command(given: dict[str, Any]) -> None:
    """Draw images, with or without an adapter.

    \b
    texforce sample --prompt "two red squares"
    texforce sample --adapter out --prompt "two red squares" --compare
    texforce sample --adapter out:0.7 --prompts prompts.txt --num-images 1
    """
    with exit_codes("--batch-size or --resolution"):
        from . import evaluate, files, run

        config = resolve_sample(SampleOptions(**given))
        warn(f"model: {config.model}")
        prompts = [*(config.prompt or ()), *(read_prompts(config.prompts) if config.prompts else ())]
        files.check_writable(Path(config.output_dir))
        repeated = [prompt for prompt in prompts for _ in range(config.num_images)]
        seeds = [config.seed + i for i in range(len(repeated))]
        with naming_origins(config.origins):
            cut = evaluate.find_cut(config, prompts)
            if cut.prompts:
                warn(f"prompt: {cut}")
            images = evaluate.sample(config, repeated, seeds)
        folder = Path(config.output_dir)
        shown = {
            "model": config.model, "scale": config.scale, "guidance_scale": config.guidance_scale, "eta": config.eta,
            "sampler": config.sampler, "num_inference_steps": config.num_inference_steps,
            "adapter": ", ".join(config.adapter or ()), "unet": config.unet or "",
        }  # fmt: skip
        for name, drawn in images.items():
            labels = [
                {"system": name, "prompt": prompt, "seed": seed}
                | ({"prompt_cut_to": f"{cut.num_tokens} tokens"} if prompt in cut.prompts else {})
                | shown
                for prompt, seed in zip(repeated, seeds, strict=True)
            ]
            paths = files.write_images(folder, drawn, labels)
            show(f"{name}: {paths[0]}" + (f" to {paths[-1].name}" if len(paths) > 1 else ""))
        run.write_grid(folder / f"grid_{paths[-1].stem}.png", repeated, images)
        show(f"grid: {folder / f'grid_{paths[-1].stem}.png'}")


# --- merge ---


def merge_command(given: dict[str, Any]) -> None:
    """Join adapters and a U-Net with a base model, and write them for other tools.

    \b
    texforce merge --adapter out
    texforce merge --adapter out:0.8 --format kohya --output-dir lora
    texforce merge --adapter out --unet ddpo.safetensors
    """
    with exit_codes():
        from . import merge

        config = resolve_merge(MergeOptions(**given))
        warn(f"model: {config.model}")
        with naming_origins(config.origins):
            folder = merge.merge(config)
        show(f"{config.format}: {folder}")


# --- eval ---


def eval_command(given: dict[str, Any]) -> None:
    """Measure adapters and U-Nets against the base model on a benchmark, and write a report.

    \b
    texforce eval --adapter out
    texforce eval --adapter out --benchmark drawbench --reward hps,clip
    texforce eval --adapter first=a --adapter second=b --strength 0,0.5,1
    """
    with exit_codes("--batch-size or --resolution"):
        config = resolve_eval(EvalOptions(**given))
        warn(f"model: {config.model}; benchmark: {config.benchmark}")
        from . import evaluate

        try:
            with StageView() as view, naming_origins(config.origins):
                results = evaluate.evaluate(config, view, warn)
        except KeyboardInterrupt:
            warn("what is finished is kept; the same command goes on from there")
            raise
        output.print(evaluation_table(results))
        for name, sweep in results["strengths"].items():
            text = (
                f"{name}: strength {sweep['best']:g} was the best by {sweep['chosen_by']} on the other half of the prompts"
            )
            show(text)
        show(f"report: {Path(config.output_dir) / 'report.html'}")


# --- rewards ---


def rewards_command() -> None:
    """Show the rewards there are, what they need, and whether it is here."""
    from .rewards import CATALOGUE, missing_packages
    from .weights import HUB, is_fetched

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
    show(
        "Others: path/to/file.py:function, http://HOST:PORT/score, and mixtures of any as hps=1,jpeg=0.1. What is not "
        "here is fetched from the hub at first use."
    )
    show("With the tiny model, hps is an embedded scorer of its world, and nothing is fetched.")


# --- serve ---


def serve_command(
    reward: Annotated[str, typer.Argument(help="what --reward of train takes")],
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in, and asks no password")] = "127.0.0.1",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")] = None,
    reward_checkpoint: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH, weights of a scorer; repeatable; as in train")
    ] = None,
) -> None:
    """Serve a scorer over HTTP, for `texforce train --reward http://HOST:PORT/score`, until interrupted."""
    with exit_codes():
        from . import rewards, server
        from .config import check_device, default_device

        if not 0 <= port < 65536:
            raise InputError(f"port: must be from 0 to 65535, not {port}")
        device = check_device(device) if device else default_device()
        checkpoints = rewards.EMBEDDED if device == "cpu" else {}
        checkpoints = checkpoints | rewards.parse_checkpoints(reward_checkpoint or (), [reward])
        scorer, reward = rewards.load_reward(reward, device, checkpoints), without_passwords(reward)
        try:
            listening = server.make_server(scorer, port, host)
        except OSError as error:
            raise InputError(f"port: {host}:{port} cannot be listened at: {error.strerror or error}") from error
        show(f"{reward} at http://{host}:{listening.server_port}/score")
        listening.serve_forever()


# --- progress ---


class EpochView:
    """Progress on stderr: on a terminal a table of the last epochs, drawn anew; elsewhere a line an epoch."""

    def __init__(self, config: TrainConfig, num_rows: int = 12) -> None:
        self.num_epochs = config.num_epochs or 0
        self.num_rows = num_rows
        self.rows: list[dict[str, Any]] = []
        self.measured = ""  # what was measured last
        self.live = Live(console=progress, auto_refresh=False) if progress.is_terminal else None

    def __enter__(self) -> EpochView:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, measures: dict[str, Any]) -> None:
        self.rows.append(measures)
        if name := find_measured(measures):
            self.measured = "  ".join([MEASURED_ON[name], *(f"{k} {value:.4f}" for k, value in measures[name].items())])
        for dropped in measures.get("dropped", ()):
            warn(f"dropped, reward not finite: {dropped['prompt']!r} (seed {dropped['seed']})")
        if self.live:
            self.live.update(self.table(), refresh=True)
        else:
            warn(self.line(measures))

    def line(self, measures: dict[str, Any]) -> str:
        parts = [f"epoch {measures['epoch']}/{self.num_epochs}"]
        parts += [f"{label} {measures[name]:{form}}" for name, label, form in EPOCH_COLUMNS if name in measures]
        parts += [f"{name} {value:.4f}" for name, value in measures.get("parts", {}).items()]
        if name := find_measured(measures):
            parts += [f"{MEASURED_ON[name]} {measure} {value:.4f}" for measure, value in measures[name].items()]
        return "  ".join(parts + self.time_left())

    def table(self) -> Table:
        """The last epochs, a row each."""
        shown = [column for column in EPOCH_COLUMNS if column[0] in self.rows[-1]]
        title = "  ".join([f"epoch {self.rows[-1]['epoch']}/{self.num_epochs}", *self.time_left()])
        parts = self.rows[-1].get("parts", {})
        table = Table("epoch", *(label for _, label, _ in shown), title=title, caption=Text(self.measured))
        for name in parts:
            table.add_column(Text(name))
        for row in self.rows[-self.num_rows :]:
            cells = [f"{row[name]:{form}}" if name in row else "" for name, _, form in shown]
            cells += [f"{row['parts'][name]:.4f}" if "parts" in row else "" for name in parts]
            table.add_row(str(row["epoch"]), *cells)
        return table

    def time_left(self) -> list[str]:
        epoch, seconds = self.rows[-1]["epoch"], self.rows[-1]["seconds"] - self.rows[0]["seconds"]
        done = epoch - self.rows[0]["epoch"]  # in this process
        return [f"{seconds / done * (self.num_epochs - epoch):.0f} s left"] if done else []


EPOCH_COLUMNS = (
    ("reward_mean", "reward", ".4f"),
    ("reward_std", "spread", ".4f"),
    ("max_ratio_deviation", "ratio-1 at first", ".1e"),
    ("ratio_deviation", "at most", ".1e"),
    ("clip_fraction", "clipped", ".2f"),
    ("loss", "loss", ".4f"),
    ("anchor_drift", "null drift", ".1e"),
    ("kl", "KL", ".2e"),
    ("images_per_s", "images/s", ".0f"),
)


class StageView:
    """Progress on stderr: on a terminal a bar for each stage; elsewhere a line at the end of each."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bars = Progress(*columns, console=progress, disable=not progress.is_terminal)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StageView:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=total)
        self.bars.update(self.tasks[stage], completed=done)
        if done == total and self.bars.disable:
            warn(f"{stage}: done")


# --- tables ---


def rows_table(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(Text(name), Text(str(value)))
    return table


def results_table(result: dict[str, Any]) -> Table:
    measured = find_measured(result) or "heldout"
    title = f"{result['num_images']} images in {result['seconds']:.0f} s"
    table = Table(MEASURED_ON[measured], "base", "tuned", "change", title=Text(title))
    for name, value in result[measured].items():
        table.add_row(Text(name), f"{value['base']:.4f}", f"{value['tuned']:.4f}", f"{value['tuned'] - value['base']:+.4f}")
    return table


def evaluation_table(results: dict[str, Any]) -> Table:
    """Means, changes and win rates of an evaluation, with their intervals."""
    from . import report

    about = results["benchmark"]
    total = f" of {about['num_prompts']}" if results["strengths"] else ""
    title = f"{about['name']}: {results['num_prompts_measured']}{total} prompts, {results['num_images']} images each"
    table = Table("", "mean", "change", "wins", title=Text(title), box=None, padding=(0, 1, 0, 0), header_style="underline")
    for measure, base in results["systems"][BASE]["measures"].items():
        table.add_row(Text(measure, style="bold"))
        table.add_row(f" {BASE}", Text(report.interval(base) + report.dropped(base)))
        for name in list(results["systems"])[1:]:
            system = results["systems"][name]
            summary = system["measures"][measure]
            style = {"gain": "green", "loss": "red", "": ""}[report.direction(summary["paired"])]
            change = Text(report.interval(summary["paired"], "+"), style=style)
            cells = (
                f" {report.label(name, system)}",
                report.interval(summary) + report.dropped(summary),
                change,
                report.interval(summary["win_rate"], "%"),
            )
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
    return table


app.command("train", cls=TrainCommand)(with_options(TrainConfig, train_command))
app.command("sample", cls=Command)(with_options(SampleConfig, sample_command))
app.command("merge", cls=Command)(with_options(MergeConfig, merge_command))
app.command("eval", cls=Command)(with_options(EvalConfig, eval_command))
app.command("rewards", cls=Command)(rewards_command)
app.command("serve", cls=Command)(serve_command)


if __name__ == "__main__":
    app()
