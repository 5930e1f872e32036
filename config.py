"""Configuration of a training: what it is decided by, with its defaults, presets and checks.

This file imports nothing heavy, so that the command line can show its help at once.
"""

from __future__ import annotations

import importlib.util
import json
import math
import typing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

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
    num_shared_steps: int = option(
        0,
        "first steps that the images of a prompt share, to save U-Net calls; they branch after that, and train what is left",
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
        ValueError: an option has a value that cannot be used; names the option, the rule and the value.
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
        raise ValueError(
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
            raise ValueError(f"{item.name}: must be {wanted}, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{item.name}: must be a finite number, not {value}")


def check_precision(config: Any, device: str) -> None:
    """Raise ValueError for a type that the device does not compute in."""
    if config.mixed_precision == "fp16" and device == "cpu":
        raise ValueError("mixed_precision: fp16 needs a GPU; use no or bf16 on the CPU")


def check_seed(config: Any) -> None:
    """Raise ValueError for a seed that not every generator takes."""
    if not 0 <= config.seed < MAX_SEED:
        raise ValueError(f"seed: must be from 0 to {MAX_SEED - 1}, not {config.seed}")


def check_timeout(config: Any) -> None:
    """Raise ValueError for seconds that no clock can wait for."""
    if not 0 < config.reward_timeout <= MAX_TIMEOUT:
        raise ValueError(f"reward_timeout: must be above 0 and at most {MAX_TIMEOUT} seconds, not {config.reward_timeout}")


def check_choices(config: Any) -> None:
    """Raise ValueError for a value that is none of its option's."""
    for name, choices in CHOICES.items():
        value = getattr(config, name, None)
        if value is not None and value not in choices:
            raise ValueError(f"{name}: must be one of {', '.join(choices)}, not {value!r}")


COUNTS = ("rank", "micro_batch_size", "sample_batch_size", "eval_every", "checkpoint_every", "checkpoints_to_keep")


def _check_together(config: TrainConfig) -> None:
    num_images = config.num_prompts_per_epoch * config.num_samples_per_prompt
    if config.num_updates_per_epoch > num_images:
        raise ValueError(
            f"num_updates_per_epoch: an epoch of {num_images} images cannot be shared out to {config.num_updates_per_epoch}"
        )
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise ValueError(f"report_to: {config.report_to} is not installed; pip install {config.report_to}")
    if config.null_prompt == "base" and config.target != "text-encoder":
        raise ValueError(
            "null_prompt: base keeps the U-Net's predictions, so it needs target text-encoder, not " + config.target
        )
    if config.normalise_rewards and config.advantages == "per-prompt":
        raise ValueError(
            "normalise_rewards: the units of a reward change over a run, which per-prompt statistics compare; "
            "use advantages leave-one-out"
        )
    if config.num_shared_steps >= window_end(config):
        raise ValueError(
            f"num_shared_steps: of {config.num_inference_steps} steps the first {window_end(config)} may be trained "
            f"(timestep_window {config.timestep_window:g}), but not the first {config.num_shared_steps}, which are shared; "
            "lower it or raise timestep_window"
        )
    if config.num_shared_steps and config.num_samples_per_prompt == 1:
        raise ValueError("num_shared_steps: with num_samples_per_prompt 1 there is nobody to share them with; make it 0")
    if config.num_shared_steps and config.sample_batch_size % config.num_samples_per_prompt:
        raise ValueError(
            f"num_shared_steps: they need whole groups in a batch; make sample_batch_size, {config.sample_batch_size}, "
            f"a multiple of num_samples_per_prompt, {config.num_samples_per_prompt}"
        )
    if config.advantages == "leave-one-out" and config.num_samples_per_prompt == 1:
        raise ValueError("num_samples_per_prompt: leave-one-out advantages need at least 2, not 1")


def _check_ranges(config: TrainConfig) -> None:
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name.startswith("num_") or item.name in COUNTS:
            least = 0 if item.name == "num_shared_steps" else 1
            if value < least:
                raise ValueError(f"{item.name}: must be at least {least}, not {value}")
        elif item.name in ("learning_rate", "clip_range", "max_grad_norm", "advantage_clip", "lora_alpha") and not value > 0:
            raise ValueError(f"{item.name}: must be above 0, not {value}")
        elif item.name in ("eta", "timestep_window", "timestep_fraction") and not 0 < value <= 1:
            rule = "a step without randomness has no density to train on" if item.name == "eta" else "a share of the steps"
            raise ValueError(f"{item.name}: must be above 0 and at most 1 ({rule}), not {value}")
        elif (
            item.name in ("weight_decay", "lr_warmup_steps", "kl_weight", "guidance_scale", "max_reward_drop")
            and not value >= 0
        ):
            raise ValueError(f"{item.name}: must not be negative, not {value}")
    check_seed(config)
    check_timeout(config)
    if config.rank > MAX_RANK:
        raise ValueError(f"rank: must be at most {MAX_RANK}, not {config.rank}")
    if config.max_kl is not None and not config.max_kl > 0:
        raise ValueError(f"max_kl: must be above 0, not {config.max_kl}")
    if not 0 <= (config.ema_decay or 0) < 1:
        raise ValueError(f"ema_decay: must be from 0 to below 1, not {config.ema_decay}")


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        FileNotFoundError, ValueError: the file is not there, or holds no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return content


def read_text(path: Path, option_name: str) -> str:
    """The text of a file that an option names.

    Raises:
        ValueError: it is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option_name}: {str(path)!r} is not UTF-8 text (byte {error.start})") from error
