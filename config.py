"""Configuration of the commands: what each is decided by, with its defaults, presets and checks.

This file imports nothing heavy, so that the command line can show its help at once.
"""

from __future__ import annotations

import importlib.util
import math
import re
import typing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import read_json

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
MAX_SEED = 2**63  # room below torch's limit of 2**64 for the seeds that are counted up from it
MAX_RANK = 1024  # of LoRA; no layer here is wider than 1280
MAX_TIMEOUT = 7 * 24 * 3600  # seconds; what threads can wait for is limited too


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})  # the command line shows it


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run.

    What is None is filled in by `resolve`, from the preset for the model; the types are those after it.
    """

    reward: str = option(
        "hps",
        "a name that `texforce rewards` lists, path/to/file.py:function, http://HOST:PORT/score, or a mixture of them as "
        "hps=1,jpeg=0.1",
    )
    normalise_rewards: bool = option(False, "divide each part of a mixture by the running deviation of its scores")
    eval_reward: list[str] | None = option(
        None, "a reward that is only measured, on the held-out prompts, so that hacking of the other one shows; repeatable"
    )
    model: str = option(None, "'tiny', a diffusers folder or a hub name (default: tiny without a GPU, else SD 1.5)")
    prompts: str = option(
        "world", "a file, one prompt a line, or a set: world, colour, count, composition, position, faces, hands, animals"
    )
    heldout_prompts: str | None = option(
        None, "a file of prompts that are only measured (default: the tiny world's, else a tenth of --prompts)"
    )
    output_dir: str = option("out", "where the adapter, the figures and the metrics go; must be new or empty")
    preset: str = option("default", "default, or paper: the published recipe")
    target: str = option("text-encoder", "what gets LoRA: text-encoder (TexForce), unet (DDPO) or both")
    reward_checkpoint: list[str] | None = option(
        None,
        "NAME=PATH, weights of a scorer; repeatable; PATH alone is for the only scorer, 'hub' its published weights "
        "(default: embedded hps for tiny, else hub)",
    )
    reward_timeout: float = option(600.0, "seconds after which a function or a server that gives no scores is given up")
    seed: int = option(0, "seed of everything random")
    num_epochs: int = option(None, "rounds of sampling and updating")
    num_prompts_per_epoch: int = option(None, "prompts drawn an epoch")
    num_samples_per_prompt: int = option(None, "images a prompt: the group whose rewards are compared")
    num_updates_per_epoch: int = option(None, "optimizer steps in a pass over an epoch's images, each on its share of them")
    num_inner_epochs: int = option(
        1, "passes over an epoch's images (PPO's epochs); more of them learn more from an image, in more time"
    )
    num_inference_steps: int = option(None, "DDIM steps")
    eta: float = option(1.0, "randomness of the DDIM steps, above 0 to 1")
    guidance_scale: float = option(None, "classifier-free guidance; 1 or less switches it off")
    timestep_window: float = option(
        None, "share of the denoising steps, from the first and noisiest on, that may be trained on"
    )
    timestep_fraction: float = option(None, "share of the steps in the window that is trained on, drawn anew for each image")
    deterministic_elsewhere: bool = option(
        False, "training samples the steps outside the window without randomness; held-out images are drawn as ever"
    )
    resolution: int | None = option(None, "pixels of a side (default: what the U-Net was made for)")
    learning_rate: float = option(None, "of AdamW")
    lr_scheduler: str = option(None, "of the learning rate after its warm-up: constant, linear or cosine (to 0)")
    lr_warmup_steps: int = option(
        None,
        "optimizer steps over which the learning rate rises from 0: Adam's first steps are long and mostly noise; "
        "by default never over a tenth of the run",
    )
    weight_decay: float = option(1e-4, "of AdamW")
    max_grad_norm: float = option(None, "gradients are clipped to this norm")
    clip_range: float = option(None, "PPO's clip range of the ratio")
    advantages: str = option(None, "leave-one-out (within the group) or per-prompt (running statistics of DDPO)")
    advantage_clip: float = option(5.0, "advantages are clipped to this, in standard deviations")
    kl_weight: float = option(0.0, "weight of the KL divergence from the base policy")
    null_prompt: str = option(None, "whether guidance's null prompt goes through the adapted text encoder or the base one")
    rank: int = option(16, "of LoRA")
    lora_alpha: int = option(None, "of LoRA (default: the rank)")
    ema_decay: float = option(None, "average the adapter over updates with this decay; 0 is off")
    micro_batch_size: int = option(
        None, "(image, step) pairs in one backward pass; changes memory, and of the result the rounding"
    )
    micro_batch: str = option(
        "fixed",
        "fixed takes --micro-batch-size; auto, on a GPU, begins with --sample-batch-size instead, and halves it whenever an "
        "update runs out of memory",
    )
    sample_batch_size: int = option(None, "images sampled at a time")
    mixed_precision: str = option(
        None,
        "no, fp16 or bf16 for the frozen weights (default: fp16 on CUDA, else bf16 where the CPU has it, but no for tiny)",
    )
    gradient_checkpointing: bool = option(False, "recompute the U-Net's activations to save memory")
    compile: bool | None = option(None, "compile the U-Net; the first step takes minutes (default: on CUDA)")
    eval_every: int = option(None, "epochs between measurements on the held-out prompts")
    checkpoint_every: int = option(None, "epochs between checkpoints, from which `--resume` goes on exactly")
    checkpoints_to_keep: int = option(2, "so many of the newest checkpoints stay")
    max_kl: float | None = option(
        None, "stop when the KL divergence from the base policy, before an epoch's last update, is above this"
    )
    max_reward_drop: float = option(
        2.0,
        "stop when the held-out reward is so many deviations of the first epoch's rewards below the base model's; 0 is off",
    )
    report_to: str = option("none", "tensorboard, wandb or trackio, besides metrics.jsonl")


# What was measured on the tiny model is not carried to Stable Diffusion: its learning rate, clip range, steps and guidance
# are published ones (arXiv:2311.15657 and its released code), and only the grouping and the batch shape are ours.
_TINY = {
    "num_epochs": 140,
    "guidance_scale": 3.0,
    "micro_batch_size": 128,
    "sample_batch_size": 128,
    "eval_every": 20,
    "checkpoint_every": 10,
}
_SD = {
    "num_epochs": 320,
    "guidance_scale": 7.5,
    "micro_batch_size": 4,
    "sample_batch_size": 8,
    "eval_every": 10,
    "checkpoint_every": 5,
}
_PUBLISHED = {
    "num_inference_steps": 50,
    "timestep_window": 1.0,
    "timestep_fraction": 0.5,
    "num_updates_per_epoch": 2,
    "learning_rate": 3e-4,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "max_grad_norm": 1.0,
    "clip_range": 1e-4,
    "ema_decay": 0.0,
    "null_prompt": "adapted",
}
_PAPER = _PUBLISHED | {"num_samples_per_prompt": 1, "advantages": "per-prompt"}
# Of models distilled to few steps without guidance, as SD-Turbo and SDXL-Turbo (arXiv:2311.17042): all steps are trained.
_TURBO = {"num_inference_steps": 4, "guidance_scale": 0.0, "timestep_fraction": 1.0}
_SDXL = {"micro_batch_size": 2, "sample_batch_size": 2}  # of 1024x1024, four times the pixels
_GROUPS = {"num_samples_per_prompt": 8, "advantages": "leave-one-out"}
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("tiny", "default"): _TINY
    | _GROUPS
    | {
        "num_prompts_per_epoch": 32,
        "num_updates_per_epoch": 1,
        "num_inference_steps": 8,
        "timestep_window": 0.5,
        "timestep_fraction": 1.0,
        "learning_rate": 2e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 10,
        "max_grad_norm": 5e-3,
        "clip_range": 5e-3,
        "ema_decay": 0.9,
        "null_prompt": "base",
    },
    ("tiny", "paper"): _TINY | _PAPER | {"num_prompts_per_epoch": 256},
    ("stable-diffusion", "default"): _SD | _PUBLISHED | _GROUPS | {"num_prompts_per_epoch": 8},
    ("stable-diffusion", "paper"): _SD | _PAPER | {"num_prompts_per_epoch": 64},
}
for _preset in ("default", "paper"):
    PRESETS["turbo", _preset] = PRESETS["stable-diffusion", _preset] | _TURBO
    PRESETS["sdxl", _preset] = PRESETS["stable-diffusion", _preset] | _SDXL
CHOICES = {
    "preset": ("default", "paper"),
    "lr_scheduler": ("constant", "linear", "cosine"),
    "target": ("text-encoder", "unet", "both"),
    "advantages": ("leave-one-out", "per-prompt"),
    "null_prompt": ("adapted", "base"),
    "micro_batch": ("fixed", "auto"),
    "mixed_precision": ("no", "fp16", "bf16"),
    "format": ("pipeline", "checkpoint", "peft", "diffusers", "kohya"),
    "report_to": ("none", "tensorboard", "wandb", "trackio"),
}


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def default_model(device: str) -> str:
    """The embedded tiny model without a GPU, Stable Diffusion 1.5 with one."""
    return "tiny" if device == "cpu" else STABLE_DIFFUSION


def default_precision(model: str, device: str) -> str:
    """What the frozen weights are trained in: half precision where the device multiplies matrices in it.

    The tiny model's kernels are too small to gain from it on a CPU.
    """
    import torch

    if device != "cpu":
        return "fp16"
    return "bf16" if family(model) != "tiny" and torch.cpu._is_avx512_bf16_supported() else "no"


def rounds_by_batch(mixed_precision: str, device: str) -> bool:
    """Whether a result visibly depends on the size of its batch: in half precision, and in a GPU's TF32 convolutions."""
    return mixed_precision != "no" or device != "cpu"


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what is None, and check every value.

    Raises:
        InputError: an option has a value that cannot be used; names the option, the rule and the value.
    """
    device = default_device()
    check_types(config)
    check_choices(config)
    model = config.model or default_model(device)
    preset = PRESETS[family(model), config.preset]
    preset = preset | {"model": model, "lora_alpha": config.rank, "mixed_precision": default_precision(model, device)}
    if rounds_by_batch(config.mixed_precision or preset["mixed_precision"], device):
        default = preset["micro_batch_size" if device == "cpu" else "sample_batch_size"]
        size = config.sample_batch_size or config.micro_batch_size or default
        preset |= {"sample_batch_size": size, "micro_batch_size": size}  # then the ratio is exact
    if config.target != "text-encoder":
        preset["null_prompt"] = "adapted"
    given = config
    config = replace(config, **{name: value for name, value in preset.items() if getattr(config, name) is None})
    _check_ranges(config)
    check_precision(config, device)
    num_updates = num_optimizer_steps(config)
    if given.lr_warmup_steps is None:
        shortened = min(config.lr_warmup_steps, num_updates // 10)
        config = replace(config, lr_warmup_steps=shortened if shortened > 1 else 0)  # a single step's rate would be 0
    elif config.lr_warmup_steps >= num_updates:
        raise InputError(
            f"lr_warmup_steps: must be below the run's {num_updates} optimizer steps, not {config.lr_warmup_steps}"
        )
    _check_together(config)
    return config


def num_optimizer_steps(config: TrainConfig) -> int:
    """Of a whole run."""
    return config.num_epochs * config.num_inner_epochs * config.num_updates_per_epoch


def window_end(config: TrainConfig) -> int:
    """The number of steps up to the end of the window, at least 1."""
    return math.ceil(config.timestep_window * config.num_inference_steps - 1e-9)  # 0.28 of 25 is 7, though rounded up


def family(model: str) -> str:
    """Whose defaults a model takes: known by its name, since they are needed before anything is loaded."""
    if model == "tiny":
        return "tiny"
    name = Path(model).name.lower()
    return "turbo" if "turbo" in name else "sdxl" if "xl" in name else "stable-diffusion"


def check_types(config: Any) -> None:
    """Values may come from a JSON file: hold them to the fields' types, and numbers to being finite."""
    hints = typing.get_type_hints(type(config))
    for item in fields(config):
        value, kinds = getattr(config, item.name), typing.get_args(hints[item.name]) or (hints[item.name],)
        if value is None and (item.default is None or type(None) in kinds):
            continue
        kinds = tuple(typing.get_origin(kind) or kind for kind in kinds if kind is not type(None))
        if float in kinds:
            kinds = (*kinds, int)
        foreign = isinstance(value, list) and not all(isinstance(element, str) for element in value)  # no others are known
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds) or foreign:
            wanted = " or ".join("a list of texts" if kind is list else kind.__name__ for kind in kinds)
            raise InputError(f"{item.name}: must be {wanted}, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{item.name}: must be a finite number, not {value}")


def check_precision(config: Any, device: str) -> None:
    """Raise InputError for a type that the device does not compute in."""
    if config.mixed_precision == "fp16" and device == "cpu":
        raise InputError("mixed_precision: fp16 needs a GPU; use no or bf16 on the CPU")


def check_seed(config: Any) -> None:
    """Raise InputError for a seed that not every generator takes."""
    if not 0 <= config.seed < MAX_SEED:
        raise InputError(f"seed: must be from 0 to {MAX_SEED - 1}, not {config.seed}")


def check_timeout(config: Any) -> None:
    """Raise InputError for seconds that no clock can wait for."""
    if not 0 < config.reward_timeout <= MAX_TIMEOUT:
        raise InputError(f"reward_timeout: must be above 0 and at most {MAX_TIMEOUT} seconds, not {config.reward_timeout}")


def check_choices(config: Any) -> None:
    """Raise InputError for a value that is none of its option's."""
    for name, choices in CHOICES.items():
        value = getattr(config, name, None)
        if value is not None and value not in choices:
            raise InputError(f"{name}: must be one of {', '.join(choices)}, not {value!r}")


COUNTS = ("rank", "micro_batch_size", "sample_batch_size", "eval_every", "checkpoint_every", "checkpoints_to_keep")


def _check_together(config: TrainConfig) -> None:
    num_images = config.num_prompts_per_epoch * config.num_samples_per_prompt
    if config.num_updates_per_epoch > num_images:
        raise InputError(
            f"num_updates_per_epoch: an epoch of {num_images} images cannot be shared out to {config.num_updates_per_epoch}"
        )
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise InputError(f"report_to: {config.report_to} is not installed; pip install {config.report_to}")
    if config.null_prompt == "base" and config.target != "text-encoder":
        raise InputError(
            "null_prompt: base keeps the U-Net's predictions, so it needs target text-encoder, not " + config.target
        )
    if config.normalise_rewards and config.advantages == "per-prompt":
        raise InputError(
            "normalise_rewards: the units of a reward change over a run, which per-prompt statistics compare; "
            "use advantages leave-one-out"
        )
    if config.advantages == "leave-one-out" and config.num_samples_per_prompt == 1:
        raise InputError("num_samples_per_prompt: leave-one-out advantages need at least 2, not 1")


def _check_ranges(config: TrainConfig) -> None:
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name.startswith("num_") or item.name in COUNTS:
            if value < 1:
                raise InputError(f"{item.name}: must be at least 1, not {value}")
        elif item.name in ("learning_rate", "clip_range", "max_grad_norm", "advantage_clip", "lora_alpha") and not value > 0:
            raise InputError(f"{item.name}: must be above 0, not {value}")
        elif item.name in ("eta", "timestep_window", "timestep_fraction") and not 0 < value <= 1:
            rule = "a step without randomness has no density to train on" if item.name == "eta" else "a share of the steps"
            raise InputError(f"{item.name}: must be above 0 and at most 1 ({rule}), not {value}")
        elif (
            item.name in ("weight_decay", "lr_warmup_steps", "kl_weight", "guidance_scale", "max_reward_drop")
            and not value >= 0
        ):
            raise InputError(f"{item.name}: must not be negative, not {value}")
    check_seed(config)
    check_timeout(config)
    if config.rank > MAX_RANK:
        raise InputError(f"rank: must be at most {MAX_RANK}, not {config.rank}")
    if config.max_kl is not None and not config.max_kl > 0:
        raise InputError(f"max_kl: must be above 0, not {config.max_kl}")
    if not 0 <= (config.ema_decay or 0) < 1:
        raise InputError(f"ema_decay: must be from 0 to below 1, not {config.ema_decay}")


# --- sampling, merging ---

SETTINGS = "texforce.json"  # what `texforce merge` says of how its output is to be sampled
ADAPTER_HELP = (
    "output folder of a training, or a LoRA file or folder of any layout; PATH:WEIGHT weights it; repeatable, summed"
)
UNET_SCALE_HELP = "strength of that U-Net's change: 0 is the base model's, 1 as it was tuned"
UNET_HELP = "a U-Net tuned elsewhere: a LoRA file, a diffusers U-Net or a single-file checkpoint"
MODEL_HELP = "'tiny', a diffusers folder or a hub name (default: the adapter's, else as in training)"


@dataclass(frozen=True)
class System:
    """Adapters and a U-Net on a base model, each as path and weight."""

    name: str
    adapters: tuple[tuple[str, float], ...] = ()
    unets: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How images are drawn, by `sample` and by `eval`."""

    model: str = option(None, MODEL_HELP)
    num_inference_steps: int = option(None, "DDIM steps (default: the adapter's)")
    eta: float = option(None, "randomness of the DDIM steps, 0 to 1 (default: the adapter's, else 1)")
    guidance_scale: float = option(None, "classifier-free guidance (default: the adapter's)")
    resolution: int | None = option(None, "pixels of a side (default: what the U-Net was made for)")
    batch_size: int = option(16, "images drawn at a time")
    mixed_precision: str = option(None, "no, fp16 or bf16 (default: fp16 on CUDA, else no)")
    compile: bool | None = option(None, "compile the U-Net (default: on CUDA)")
    null_prompt: str = option(None, "adapted or base (default: the adapter's)")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(DrawConfig):
    """Everything that decides what `texforce sample` draws."""

    adapter: list[str] | None = option(None, ADAPTER_HELP)
    unet: str | None = option(None, UNET_HELP)
    unet_scale: float = option(1.0, UNET_SCALE_HELP)
    prompt: list[str] | None = option(None, "what to draw; repeatable")
    prompts: str | None = option(None, "a file, one prompt a line, or the name of a shipped set")
    output_dir: str = option("samples", "where the images go; their numbers go on from those already there")
    num_images: int = option(4, "images for each prompt")
    seed: int = option(0, "of the first image; the next has the next seed")
    scale: float = option(1.0, "strength of the adapter: 0 is the base model, 1 as trained")
    compare: bool = option(False, "also draw the base model's images from the same noise")

    @property
    def systems(self) -> list[System]:
        """What is drawn besides the base model: one, or none."""
        return _one_system(self.adapter, self.unet, self.scale, self.unet_scale)


def _one_system(adapter: list[str] | None, unet: str | None, scale: float, unet_scale: float) -> list[System]:
    adapters = tuple((path, weight * scale) for path, weight in map(parse_weighted, adapter or ()))
    unets = ((unet, unet_scale),) if unet else ()
    return [System("tuned", adapters, unets)] if adapters or unets else []


def parse_weighted(spec: str) -> tuple[str, float]:
    """Path and weight of PATH:0.7; without a weight it is 1.

    Raises:
        InputError: the weight is not finite.
    """
    path, colon, text = spec.rpartition(":")
    if not colon or Path(spec).exists():
        return spec, 1.0
    try:
        weight = float(text)
    except ValueError:
        return spec, 1.0  # a colon in a path
    if not math.isfinite(weight):
        raise InputError(f"adapter: the weight in {spec!r} must be a finite number")
    return path, weight


def resolve_sample(config: SampleConfig) -> SampleConfig:
    """Fill in what is None from the adapter's run, or else from the model's defaults, and check every value.

    Raises:
        InputError, NotFoundError: an option has a value that cannot be used.
    """
    check_types(config)
    if not config.prompt and not config.prompts:
        raise InputError("prompt: give --prompt or --prompts")
    if not config.adapter and config.scale != 1:
        raise InputError("adapter: --scale is about an adapter; give --adapter")
    if not config.unet and config.unet_scale != 1:
        raise InputError("unet_scale: it is about a U-Net; give --unet")
    if not config.adapter and not config.unet and config.compare:
        raise InputError("adapter: --compare needs something to compare; give --adapter or --unet")
    return _resolve_drawing(config)


def _resolve_drawing(config: Drawing) -> Drawing:
    """Fill in how images are drawn, and check it."""
    run = sampling_settings(config)
    device = default_device()
    model = config.model or run.get("model") or default_model(device)
    preset = PRESETS[family(model), "default"]
    defaults: dict[str, Any] = {name: run.get(name, preset.get(name)) for name in ("num_inference_steps", "guidance_scale")}
    defaults |= {"model": model, "resolution": run.get("resolution"), "eta": run.get("eta", 1.0)}
    defaults |= {"null_prompt": run.get("null_prompt", "adapted"), "mixed_precision": "no" if device == "cpu" else "fp16"}
    config = replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})
    for name in ("num_images", "batch_size", "num_inference_steps"):
        if getattr(config, name) < 1:
            raise InputError(f"{name}: must be at least 1, not {getattr(config, name)}")
    if config.guidance_scale < 0:
        raise InputError(f"guidance_scale: must not be negative, not {config.guidance_scale}")
    check_seed(config)
    check_choices(config)
    check_precision(config, device)
    return config


def sampling_settings(config: SampleConfig | MergeConfig | EvalConfig) -> dict[str, Any]:
    """How adapters, a U-Net and a model were trained, or merged, to be sampled, as far as their folders say it.

    Raises:
        InputError: a file is nonsense, or runs disagree in what the command line does not decide.
    """
    paths = [path for system in config.systems for path, _ in (*system.adapters, *system.unets)]
    paths += [config.model] if config.model else []
    runs: dict[str, Any] = {}
    for path in (Path(path) / name for path in paths for name in ("config.json", SETTINGS)):
        if not path.is_file():
            continue
        content = read_json(path)
        names = ["model", "num_inference_steps", "guidance_scale", "eta"]
        if content.get("target") != "unet":  # the null prompt goes through the text encoder
            names.append("null_prompt")
        run = {name: content[name] for name in names if content.get(name) is not None}
        if "resolution" in content:
            run["resolution"] = content["resolution"]  # null says something: what the U-Net was made for
        try:
            check_types(TrainConfig(**run))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        for name, value in run.items():
            if runs.setdefault(name, value) != value and getattr(config, name, value) is None:
                raise InputError(f"{name}: the adapters were trained with {runs[name]!r} and {value!r}; say which to use")
    return runs


@dataclass(frozen=True)
class MergeConfig:
    """Everything that decides what `texforce merge` writes."""

    adapter: list[str] | None = option(None, ADAPTER_HELP)
    unet: str | None = option(None, UNET_HELP)
    unet_scale: float = option(1.0, UNET_SCALE_HELP)
    model: str = option(None, MODEL_HELP)
    format: str = option(
        "pipeline",
        "pipeline (a diffusers folder) or checkpoint (one file), all baked in; or LoRA alone: peft, diffusers, kohya",
    )
    output: str = option("merged", "the folder to write")
    overwrite: bool = option(False, "replace the output if it exists")

    @property
    def systems(self) -> list[System]:
        """What is merged: one, or none."""
        return _one_system(self.adapter, self.unet, 1.0, self.unet_scale)


def resolve_merge(config: MergeConfig) -> MergeConfig:
    """Fill in the model, and check every value.

    Raises:
        InputError: an option has a value that cannot be used.
    """
    check_types(config)
    check_choices(config)
    if not config.adapter and not config.unet:
        raise InputError("adapter: there is nothing to merge; give --adapter, --unet or both")
    if config.unet_scale != 1 and not config.unet:
        raise InputError("unet_scale: it is about a U-Net; give --unet")
    if not config.output.strip("./ "):
        raise InputError(f"output: must name a folder to be made, not {config.output!r}")
    model = config.model or sampling_settings(config).get("model") or default_model(default_device())
    return replace(config, model=model)


# --- evaluation ---


@dataclass(frozen=True, kw_only=True)
class EvalConfig(DrawConfig):
    """Everything that decides what `texforce eval` measures."""

    benchmark: str = option(
        None,
        "drawbench, parti, hps, imagereward, world, another shipped prompt set, or a file with `prompt` and perhaps "
        "`category` in each row: .txt, .jsonl, .json, .csv, .tsv, .parquet (default: world for tiny, else drawbench)",
    )
    adapter: list[str] | None = option(
        None, "[NAME=]PATH[:SCALE], compared with the base model; repeatable; what has one NAME is drawn together"
    )
    unet: list[str] | None = option(None, "[NAME=]PATH[:SCALE], likewise; " + UNET_HELP)
    reward: list[str] | None = option(
        None,
        "measures, as --reward of train, several as hps,clip or by repeating it; the first one chooses the best strength "
        "(default: hps; for world alignment too)",
    )
    reward_checkpoint: list[str] | None = option(None, "NAME=PATH, weights of a scorer; repeatable; as in train")
    reward_timeout: float = option(600.0, "seconds after which a function or a server that gives no scores is given up")
    strength: str | None = option(
        None, "strengths to try of every system, as 0,0.5,1: the best of one half of the prompts is told on the other half"
    )
    num_images: int = option(4, "images for each prompt")
    limit: int | None = option(None, "so many of the prompts, from all over the benchmark")
    seed: int = option(0, "of the noise; every system gets the same, prompt by prompt")
    output_dir: str = option("eval", "where images, results and the report go; an interrupted evaluation there goes on")

    @property
    def systems(self) -> list[System]:
        """What is compared with the base model, by the names given.

        Raises:
            InputError: a name is missing or unusable, or comes twice without having been given.
        """
        parts: dict[str, System] = {}
        given: dict[str, bool] = {}
        for kind, specs in (("adapters", self.adapter), ("unets", self.unet)):
            for spec in specs or ():
                name, path, scale = parse_named(spec)
                own = name or Path(path).absolute().name.removesuffix(".safetensors")
                if not NAME.fullmatch(own) or own.lower() == BASE:
                    raise InputError(f"adapter: give a name, of letters, digits, - and _, as NAME={path}; not {own!r}")
                if own in parts and not (name and given[own]):
                    raise InputError(f"adapter: {own!r} comes twice; give names, as NAME={path}")
                given[own] = bool(name)
                system = parts.get(own, System(own))
                terms: dict[str, Any] = {kind: (*getattr(system, kind), (path, scale))}
                parts[own] = replace(system, **terms)
        return list(parts.values())

    @property
    def strengths(self) -> list[float]:
        """Strengths to try; none where they are as given.

        Raises:
            InputError: not numbers, or one twice.
        """
        if self.strength is None:
            return []
        try:
            strengths = [float(text) for text in self.strength.split(",")]
        except ValueError:
            strengths = [math.nan]
        if not all(map(math.isfinite, strengths)) or len({f"{strength:g}" for strength in strengths}) < len(strengths):
            raise InputError(f"strength: must be different numbers, as 0,0.5,1; not {self.strength!r}")
        return strengths

    @property
    def measures(self) -> list[str]:
        """The rewards that are measured, each as `rewards.load_reward` takes it."""
        specs = [part for spec in self.reward or () for part in ([spec] if "=" in spec else spec.split(","))]
        return [spec.strip() for spec in specs]


BASE = "base"  # the name of the base model among the systems
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Drawing = typing.TypeVar("Drawing", SampleConfig, EvalConfig)


def parse_named(spec: str) -> tuple[str, str, float]:
    """Name, path and weight of [NAME=]PATH[:WEIGHT]; the name is empty where it is not given."""
    name, equals, rest = spec.partition("=")
    path, weight = parse_weighted(spec)
    if equals and NAME.fullmatch(name) and not Path(path).exists():
        return name, *parse_weighted(rest)
    return "", path, weight


def resolve_eval(config: EvalConfig) -> EvalConfig:
    """Fill in what is None from the adapters' runs, or else from the model's defaults, and check every value.

    Raises:
        InputError, NotFoundError: an option has a value that cannot be used.
    """
    check_types(config)
    for system in config.systems:
        if len(system.unets) > 1:
            raise InputError(f"unet: {system.name} has {len(system.unets)}; a system takes one, give the others names")
    if config.strengths and not config.systems:
        raise InputError("strength: it is about adapters and U-Nets; give --adapter or --unet")
    if config.limit is not None and config.limit < 1:
        raise InputError(f"limit: must be at least 1, not {config.limit}")
    config = _resolve_drawing(config)
    check_timeout(config)
    benchmark = config.benchmark or ("world" if config.model == "tiny" else "drawbench")
    usual = ["hps", "alignment", "alignment_exact"] if benchmark == "world" else ["hps"]
    config = replace(config, benchmark=benchmark, reward=config.reward or usual)
    if "" in config.measures or len(set(config.measures)) < len(config.measures):
        raise InputError(f"reward: must be different names, as hps,clip; not {','.join(config.measures)!r}")
    return config
