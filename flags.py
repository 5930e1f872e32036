"""How a configuration's fields become options of a command, and its help: groups of options, and what others call them."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from texforce import __version__

from .config import TrainConfig
from .draw_config import DrawConfig
from .options import option_fields
from .presets import EMBEDDED, PRESETS
from .prompt_sets import BENCHMARKS, TRAINING_SETS
from .reward_specs import REWARDS, WORLD

DRAWING = tuple(item.name for item in option_fields(DrawConfig) if item.name != "model")
# The options of `train` by subject; the first group is all that `--help` shows.
TRAIN_GROUPS = {
    "Options": (
        "reward", "prompts", "model", "preset", "algorithm", "num_epochs", "learning_rate", "seed", "output_dir",
        "overwrite", "resume", "dry_run", "config",
    ),
    "Rewards": ("eval_reward", "normalise_rewards", "reward_checkpoint", "reward_timeout", "trust_reward_code"),
    "Prompts and images": (
        "heldout_prompts", "long_prompt", "num_prompts_per_epoch", "num_samples_per_prompt", "sampler",
        "num_inference_steps", "eta", "guidance_scale", "resolution", "deterministic_elsewhere", "null_prompt",
    ),
    "What is trained, and how": (
        "target", "num_tokens", "text_encoders", "lora_layers", "lora_modules", "adapter_steps", "rank", "lora_alpha",
        "num_updates_per_epoch", "num_inner_epochs", "advantages", "advantage_clip", "lr_scheduler", "lr_warmup_steps",
        "weight_decay", "max_grad_norm", "ema_decay", "kl_weight", "null_anchor", "anchor_prompts",
    ),
    "One algorithm's": (
        "clip_range", "timestep_window", "timestep_fraction", "num_noise_levels", "noise_window", "imitation_weight",
        "relabel", "relabel_weight", "backprop_steps",
    ),
    "Memory and speed": (
        "sample_batch_size", "micro_batch_size", "micro_batch", "mixed_precision", "gradient_checkpointing",
        "offload_text_encoders", "compile",
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
    "save_every_n_epochs": "checkpoint_every", "num_vectors": "num_tokens", "scale": "strength", "lora_scale": "strength",
    "unet_scale": "unet_strength", "text_encoder_lr": "learning_rate", "unet_lr": "learning_rate",
    "train_data_dir": "prompts",
}  # fmt: skip


# Names that the values of options may be.
NAMES = {
    "reward": REWARDS, "eval_reward": REWARDS, "model": EMBEDDED, "benchmark": (*BENCHMARKS, "world"),
    "prompts": ("world", *TRAINING_SETS), "relabel": (WORLD,),
}  # fmt: skip


class Command(TyperCommand):
    """A command whose help comes in groups, and which knows what its options are called elsewhere."""

    groups: Mapping[str, Sequence[str]] = {}

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the groups' options; `--help` shows the first group alone, `--help-all` all of them."""
        records = {param.name: record for param in self.get_params(ctx) if (record := param.get_help_record(ctx))}
        groups = self.groups or {"Options": [name for name in records if name != "help"]}
        grouped = {name for names in groups.values() for name in names}
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
        if not self.groups:  # --help tells all
            args = ["--help" if arg == "--help-all" else arg for arg in args]
        try:
            return super().parse_args(ctx, list(args))
        except Exception as error:
            if values := _values_of(getattr(error, "param", None), args):
                error.message = f"{values[-1]!r}. {error.message}"  # type: ignore[attr-defined]
            name = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_")
            if ELSEWHERE.get(name) in {param.name for param in self.params}:
                error.possibilities = [f"--{ELSEWHERE[name].replace('_', '-')}"]  # type: ignore[attr-defined]
            raise


def _values_of(param: Any, args: Sequence[str]) -> list[str]:
    """The values that an option, if it is one, has on the command line."""
    pairs = [(arg.partition("="), following) for arg, following in itertools.pairwise([*args, ""])]
    names = param.opts if param else ()
    return [value if equals else following for (name, equals, value), following in pairs if name in names]


class TrainCommand(Command):
    """The command `train`, whose help has TRAIN_GROUPS."""

    groups = TRAIN_GROUPS

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments; a reward that is given twice, as `eval` takes it, is refused and not silently forgotten."""
        if not ctx.resilient_parsing and sum(arg == "--reward" or arg.startswith("--reward=") for arg in args) > 1:
            raise typer.BadParameter("--reward: is given twice; a mixture is one value, as hps=1,jpeg=0.1", ctx)
        return super().parse_args(ctx, args)


class DrawCommand(Command):
    """A command that draws images; how it does so is for --help-all."""

    @property
    def groups(self) -> Mapping[str, Sequence[str]]:  # type: ignore[override]
        """Its own options, and those of how images are drawn."""
        own = [param.name or "" for param in self.params if param.name not in (*DRAWING, "help", "help_all")]
        return {"Options": own, "How images are drawn": DRAWING}


def show_all_help(ctx: typer.Context, is_given: bool) -> None:
    """Show the help with all options, and end the command."""
    if is_given:
        ctx.meta["help_all"] = True
        typer.echo(ctx.get_help())
        raise typer.Exit


HELP_ALL = typer.Option("--help-all", is_eager=True, callback=show_all_help, help="Show all options and exit.")


def show_version(is_given: bool) -> None:
    """Show the version, and end the command."""
    if is_given:
        typer.echo(f"texforce {__version__}")
        raise typer.Exit


def with_options(config_class: type, command: Callable[..., None]) -> Callable[..., None]:
    """A command that has an option for every field of a configuration record, beside its own parameters.

    An option that is not given is None, so that a value from --config or the record's default can take its place.
    """
    hints = typing.get_type_hints(config_class)  # without the rules, which the configuration checks
    own = list(inspect.signature(command).parameters.values())[1:]
    parameters = []
    # What a record inherits is shared with other commands, and comes last.
    for item in sorted(option_fields(config_class), key=lambda item: item.name not in config_class.__annotations__):
        kind = _on_the_command_line(hints[item.name])
        text = item.metadata["help"] + _default_text(item, config_class)
        name = f"--{item.name.replace('_', '-')}" + _negation(kind, item.name)
        option = typer.Option(name, help=text, show_default=False, autocompletion=_completion(item.name, hints[item.name]))
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


def _completion(name: str, kind: Any) -> Callable[[str], list[str]] | None:
    """What the shell offers for a value: an option's choices, or the names there are; None leaves it to files."""
    parts = (kind, *typing.get_args(kind))
    choices = [value for part in parts if typing.get_origin(part) is Literal for value in typing.get_args(part)]
    choices = choices or list(NAMES.get(name, ()))
    return (lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]) if choices else None


def _on_the_command_line(kind: Any) -> Any:
    """A field's type as Typer takes it: choices as texts, which the configuration checks, and sequences as lists."""
    parts = {typing.get_origin(part) for part in (kind, *typing.get_args(kind))}
    return str if typing.get_origin(kind) is Literal else list[str] if Sequence in parts else kind


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
