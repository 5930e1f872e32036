"""The command line: options in, text and exit codes out. Results go to stdout, progress to stderr.

Read top to bottom: exit codes, the commands. flags.py makes options and help of the configurations, views.py shows progress
and tables.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from . import interrupts, stages, views
from .config import (
    FOLLOWING_OPTIONS,
    TrainConfig,
    TrainOptions,
    check_algorithm_options,
    check_target_options,
    resolve,
)
from .draw_config import (
    SETTINGS,
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
from .errors import (
    InputError,
    NotFoundError,
    OutOfMemory,
    ProcessLost,
    RewardError,
    StorageError,
    expected,
    naming_origins,
    near,
)
from .eval_checks import check_inputs
from .files import check_new_folder, read_json
from .flags import HELP_ALL, Command, DrawCommand, TrainCommand, show_version, with_options
from .hub import HUB, is_fetched
from .options import option_fields
from .presets import PRESETS
from .prompt_sets import (
    BENCHMARKS,
    TRAINING_SETS,
    check_benchmark,
    check_judged,
    read_benchmark,
    read_prompts,
    read_run_prompts,
)
from .reward_specs import CATALOGUE, REWARDS, check_reward, checkpoints_for, missing_packages, without_passwords
from .views import EpochView, StageView, evaluation_table, output, progress, results_table, rows_table, show

EXIT_CODES = "0 ok; 1 a bug; 2 bad input; 3 a file refused; 4 diverged; 5 storage, memory, a lost process; "
EXIT_CODES += "6 reward failed; 130/143 interrupted; 141 output pipe closed"


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


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before the name of a command."""


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
    views.say(progress, Text("error: ", style="bold red") + Text(as_typed(str(error))))
    raise typer.Exit(code)


def warn(message: str) -> None:
    """Print a message on stderr, which calls options as one types them."""
    views.warn(as_typed(message))


def as_typed(message: str) -> str:
    """A message about options, with which it begins, that calls options as one types them: --num-epochs for num_epochs.

    A message about a file begins with the file, and calls the fields as they are called there.
    """
    names, colon, rest = message.partition(": ")
    if not colon or not set(names.split(", ")) <= set(OPTION_NAMES):
        return message
    whole, underscored = "|".join(OPTION_NAMES), "|".join(name for name in OPTION_NAMES if "_" in name)
    # As "name: ...", also after another one; names of two words wherever they are no part of a path or a quoted text.
    pattern = rf"(?:^|(?<=[:;] ))(?:{whole})(?=: )|(?<![\w./'\"-])(?:{underscored})(?![\w./'\"])"
    head = ", ".join("--" + name.replace("_", "-") for name in names.split(", "))
    own, raised, foreign = rest.partition(" raised ")  # what a function of the user's said stays as it is
    return head + colon + re.sub(pattern, lambda found: "--" + found[0].replace("_", "-"), own) + raised + foreign


# --- train ---


def train_command(
    given: dict[str, Any],
    *,
    config: Annotated[
        Path | None, typer.Option(help="JSON file with options, as a run's config.json; flags override it")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
    resume: Annotated[
        Path | None,
        typer.Option(help="go on with the run in this folder, with its options, or begin a run there if there is none"),
    ] = None,
    force_resume: Annotated[
        bool,
        typer.Option("--force-resume", help="with --resume: go on although options or their files have changed"),
    ] = False,
    trust_reward_code: Annotated[
        bool,
        typer.Option(
            "--trust-reward-code",
            help="allow --config or --resume to name a Python file whose reward or caption function is run",
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
        if force_resume and not resume:
            raise InputError("force_resume: works only together with --resume")
        settings = train_settings(given, config, resume, needs_folder=not dry_run)
        if not (dry_run or trust_reward_code):
            check_trusted(settings, given)
        if dry_run:
            show_plan(settings)
            return
        from . import processes, training

        with hint_to_resume(settings), EpochView(settings, processes.is_first()) as view:
            result = training.train(settings, view, warn, resume is not None, force_resume)
        show_trained(result, settings)


def show_plan(settings: TrainConfig) -> None:
    """Print what a training would do, in its first process."""
    from . import processes

    if processes.is_first():
        from .plan import plan

        output.print(rows_table("plan", plan(settings)))


def show_trained(result: dict[str, Any], settings: TrainConfig) -> None:
    """Print what a training reached, in its first process."""
    from . import processes

    if processes.is_first():
        from .report import example_prompt, sample_command

        output.print(results_table(result))
        if verdict := result.get("verdict"):  # which results of earlier states lack
            views.say(output, Text(verdict))
        show(f"adapter, figures, metrics and report.html are in {settings.output_dir}; to see what it does:")
        show(f"  {sample_command(settings.output_dir, example_prompt(settings.model))}")


def train_settings(
    given: dict[str, Any],
    config: Path | None,
    resume: Path | None,
    warn: Callable[[str], None] = views.warn,
    needs_folder: bool = True,
) -> TrainConfig:
    """The configuration of a training: what is given, over the run to resume or over a file; says which model it takes.

    Raises:
        NotFoundError, InputError, ArtifactError: as `read_config`, `resumed_options` and `resolve`; or a folder is needed
            for a new run, and the output folder is in use. OSError: it cannot be made.
    """
    options = merge_options(read_config(config), given)
    is_asked = options.get("model") is not None
    if resume:
        options = resumed_options(resume, options, warn)
    asked = TrainOptions(**options)
    for name in ("prompts", "heldout_prompts", "anchor_prompts"):
        if options.get(name) and options[name] not in TRAINING_SETS:
            read_prompts(options[name], name)  # now, since PyTorch takes seconds to load
    check_target_options(given, asked.target or TrainConfig.target)
    settings = resolve(asked)
    check_algorithm_options(given, settings.algorithm)
    if {settings.prompts, settings.heldout_prompts, settings.anchor_prompts}.isdisjoint(TRAINING_SETS):
        check_judged(settings, read_run_prompts(settings))  # else a training fetches them first
    if needs_folder and not resume and not settings.overwrite:
        check_new_folder(Path(settings.output_dir))
    from . import processes

    if processes.is_first():
        is_saved = options.get("model") is not None and not is_asked
        warn(f"model: {settings.model} ({'as before' if is_saved else _why(options)})")
    return settings


def resumed_options(folder: Path, given: dict[str, Any], warn: Callable[[str], None] = views.warn) -> dict[str, Any]:
    """The options of the run in a folder, with those given over them.

    Raises:
        NotFoundError: there is no run, and no option to begin one with. InputError: another output folder is given.
    """
    if given.get("overwrite"):
        raise InputError("overwrite: it begins anew, and --resume goes on; give one of them")
    if Path(given.get("output_dir") or folder) != folder:
        raise InputError(f"resume: it names the output folder itself; leave --output-dir {given['output_dir']} out")
    if folder.is_file():
        raise InputError(f"resume: {str(folder)!r} is a file; give the output folder of a training")
    nothing = NotFoundError(f"resume: there is no run in {str(folder)!r}; to begin one there, give its options too")
    if not folder.exists() and not given:
        raise nothing
    from . import run

    if not run.is_run(folder) and not given:
        raise nothing
    if not run.is_run(folder):
        warn(f"there is no run in {str(folder)!r}, so a new one begins there")
    saved = check_options(run.saved_options(folder), folder / "config.json") if run.is_run(folder) else {}
    return merge_options(saved, given) | {"output_dir": str(folder)}


def check_trusted(config: TrainConfig, given: dict[str, Any]) -> None:
    """Check that the files of functions, which are code, are named on the command line itself.

    Raises:
        InputError: one comes from --config or --resume alone.
    """
    from .reward_specs import caption_files, functions_of

    def paths(specs: Iterable[str], relabel: str | None) -> dict[Path, str]:
        """Each file, with the option that names it."""
        files = {Path(name.rpartition(":")[0]): "reward" for spec in specs for name in functions_of(spec)}
        return files | dict.fromkeys(caption_files(relabel), "relabel")

    measured = given.get("eval_reward", ())
    measured = [measured] if isinstance(measured, str) else measured  # from Python
    named = paths([*([given["reward"]] if "reward" in given else []), *measured], given.get("relabel"))
    found = paths([config.reward, *(config.eval_reward or ())], config.relabel)
    if foreign := found.keys() - named.keys():
        raise InputError(
            f"{found[min(foreign)]}: {str(min(foreign))!r} is code that --config or --resume names, not this command line; "
            "read it, and give --trust-reward-code to run it"
        )


@contextmanager
def hint_to_resume(config: TrainConfig) -> Iterator[None]:
    """Say how a training can go on that was stopped by a signal, the disk, memory, a scorer or a lost process."""
    from . import processes, run

    try:
        with interrupts.recognised():
            yield
    except (KeyboardInterrupt, Exception) as error:
        passing = StorageError | OutOfMemory | RewardError | ProcessLost
        if isinstance(error, KeyboardInterrupt) or isinstance(expected(error), passing):
            with interrupts.deferred():  # as in the saving before it
                if processes.is_first() and run.newest_checkpoint(Path(config.output_dir, run.CHECKPOINTS)):
                    warn(f"resume with: {run.resume_command(config)}")
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
    if path is None:
        return {}
    if not path.is_file():
        raise NotFoundError(f"config: there is no file {str(path)!r}{', but a folder' if path.is_dir() else ''}")
    return check_options(read_json(path), path)


def check_options(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Options of train from a file, as they are.

    Raises:
        InputError: there are fields that are no options, or values that an option does not take; names the file.
    """
    names = [item.name for item in option_fields(TrainConfig)]
    if foreign := sorted(set(content) - set(names)):
        hint = near(foreign[0], names)
        raise InputError(f"{path}: has fields that are no options of train: {', '.join(foreign)}{hint}")
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


# --- sample ---


def sample_command(given: dict[str, Any], *, help_all: Annotated[bool, HELP_ALL] = False) -> None:
    """Draw images, with or without an adapter.

    \b
    texforce sample --prompt "two red squares"
    texforce sample --adapter out --prompt "two red squares" --compare
    texforce sample --adapter out:0.7 --prompts prompts.txt --num-images 1
    """
    with exit_codes("--batch-size or --resolution"):
        if given.get("prompts"):
            read_prompts(given["prompts"])  # now, since PyTorch takes seconds to load
        config = resolve_sample(SampleOptions(**given))
        views.warn(f"model: {config.model}")
        from . import evaluation

        with StageView() as view, stages.reporting_to(view), naming_origins(config.origins):
            images, grid = evaluation.sample_to_folder(config, warn)
        for name in dict.fromkeys(image.system for image in images):
            paths = [image.path for image in images if image.system == name]
            show(f"{name}: {paths[0]}" + (f" to {paths[-1].name}" if len(paths) > 1 else ""))
        show(f"grid: {grid}")


# --- merge ---


def merge_command(given: dict[str, Any]) -> None:
    """Merge adapters and a U-Net into files for other tools.

    \b
    texforce merge --adapter out
    texforce merge --adapter out:0.8 --format kohya --output-dir lora
    texforce merge --adapter out --unet ddpo.safetensors
    """
    with exit_codes():
        config = resolve_merge(MergeOptions(**given))
        from . import merging

        views.warn(f"model: {config.model}")
        with StageView() as view, stages.reporting_to(view), naming_origins(config.origins):
            folder = merging.merge(config)
        if steps := config.settings.get("adapter_steps"):
            warn(f"adapter_steps: {folder / SETTINGS} has {steps}, which texforce honours; peft itself does not know it")
        if dropped := config.dropped_steps:
            warn(f"drop_adapter_steps: what was trained for the steps {' and '.join(dropped)} is on in all of them")
        written = sorted(folder.glob("*.safetensors"))
        is_file = config.format in ("checkpoint", "kohya", "diffusers") and len(written) == 1
        show(f"{config.format}: {written[0] if is_file else folder}")


# --- eval ---


def eval_command(given: dict[str, Any], *, help_all: Annotated[bool, HELP_ALL] = False) -> None:
    """Measure adapters and U-Nets against the base model.

    \b
    texforce eval --adapter out
    texforce eval --adapter out --benchmark drawbench --reward hps,clip
    texforce eval --adapter first=a --adapter second=b --strength 0,0.5,1
    """
    with exit_codes("--batch-size or --resolution"):
        if given.get("benchmark"):
            check_benchmark(given["benchmark"])
        config = resolve_eval(EvalOptions(**given))
        if config.benchmark not in BENCHMARKS:  # else an evaluation fetches it first
            check_inputs(config, read_benchmark(config.benchmark).limited(config.limit))
        views.warn(f"model: {config.model}; benchmark: {config.benchmark}")
        from . import evaluation

        try:
            with StageView() as view, stages.reporting_to(view), naming_origins(config.origins):
                results = evaluation.evaluate(config, warn)
        except KeyboardInterrupt:
            again = "the same command" + (" without --overwrite" if config.overwrite else "")
            warn(f"what is finished is kept; {again} goes on from there")
            raise
        output.print(evaluation_table(results))
        for name, sweep in results["strengths"].items():
            text = (
                f"{name}: strength {sweep['best']:g} was the best by {sweep['chosen_by']} on the other half of the prompts"
            )
            show(text)
        show(f"report: {Path(config.output_dir) / 'report.html'}")


# --- rewards ---


def rewards_command(name: Annotated[str | None, typer.Argument(help="one of them, to read all about it")] = None) -> None:
    """Show the rewards there are, and whether what they need is here.

    \b
    texforce rewards
    texforce rewards hps
    """
    with exit_codes():
        if name is not None:
            if name not in REWARDS:
                raise InputError(f"name: unknown reward {name!r}; known are {', '.join(REWARDS)}{near(name, REWARDS)}")
            output.print(rows_table(name, _about_reward(name)))
            return
        table = Table("reward", "measures", "gradients", "here")
        for name in REWARDS:
            about = _about_reward(name)
            table.add_row(*(Text(text) for text in (name, about["measures"], about["gradients"], about["here"])))
        output.print(table)
        show("texforce rewards NAME tells range, licence and what it needs. What is not here is fetched at first use.")
        show("Others: path/to/file.py:function, http://HOST:PORT/score, and mixtures of any as hps=1,jpeg=0.1.")
        show("With the tiny model, hps is an embedded scorer of its world, and nothing is fetched.")


def _about_reward(name: str) -> dict[str, str]:
    """What there is to know of a reward of the catalogue."""
    entry = CATALOGUE[name]
    is_here = not missing_packages(name) and all(is_fetched(item) for item in entry.weights)
    return {
        "measures": entry.measures,
        "range; higher is better": entry.scale,
        "gradients": "yes" if entry.gradients else "no",
        "needs": f"pip install {' '.join(entry.packages)}"
        if entry.packages
        else "\n".join(HUB[item].repository for item in entry.weights) or "nothing",
        "licence": entry.licence,
        "here": "yes" if is_here else "for tiny" if name == "hps" else "no",
    }


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
    """Serve a scorer over HTTP, for trainings elsewhere.

    \b
    texforce serve pickscore
    texforce serve hps=1,aesthetic=0.1 --host 0.0.0.0 --port 9000
    texforce serve mine.py:brightness --device cuda:1
    """
    with exit_codes():
        check_reward(reward, "the reward")
        if not 0 <= port < 65536:
            raise InputError(f"port: must be from 0 to 65535, not {port}")
        from . import rewards, server
        from .config import check_device, default_device, default_model

        device = check_device(device) if device else default_device()
        checkpoints = checkpoints_for(default_model(device), reward_checkpoint, [reward])
        scorer, reward = rewards.load_reward(reward, device, checkpoints), without_passwords(reward)
        try:
            listening = server.make_server(scorer, port, host)
        except OSError as error:
            raise InputError(f"port: {host}:{port} cannot be listened at: {error.strerror or error}") from error
        show(f"{reward} at http://{host}:{listening.server_port}/score")
        listening.serve_forever()


app.command("train", cls=TrainCommand)(with_options(TrainConfig, train_command))
app.command("sample", cls=DrawCommand)(with_options(SampleConfig, sample_command))
app.command("merge", cls=Command)(with_options(MergeConfig, merge_command))
app.command("eval", cls=DrawCommand)(with_options(EvalConfig, eval_command))
app.command("rewards", cls=Command)(rewards_command)
app.command("serve", cls=Command)(serve_command)


if __name__ == "__main__":
    app()
