"""Configuration of the commands: what decides each, with its defaults, presets and checks.

A command has two types. Its *Options* are what is given, each None unless somebody sets it; its *Config* is resolved: every
field has a value, from the options, the preset or the adapter's run. Types, rules, defaults and help texts stand once, at
the fields of the Config. This file imports nothing heavy, so that `--help` is at once there.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, dataclass_transform

import pydantic
import pydantic.dataclasses
from pydantic import Field

from .errors import InputError, NotFoundError, naming_origins, near
from .files import locate, read_json
from .presets import EMBEDDED, PRESETS, family, is_flow, preset_for, sampler_defaults
from .reward_specs import NO_REWARD, check_captioner, check_reward, without_passwords

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
MAX_SEED = 2**63  # room below torch's limit of 2**64 for the seeds that are counted up from it
MAX_COUNT = 10**9  # more of anything is a typing error, and would overflow in some library
MAX_RANK = 1024  # of LoRA; no layer here is wider than 1280
MAX_TIMEOUT = 7 * 24 * 3600  # seconds; what threads can wait for is limited too
SETTINGS = "texforce.json"  # how the output of `texforce merge` is to be sampled
BASE = "base"  # the name of the base model among the systems
PROMPT_FILES = "a file, one prompt a line, or a .jsonl, .json, .csv, .tsv or .parquet with `prompt` in each row"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # a system's name

# The description of a rule completes "must be ..." in messages.
Count = Annotated[int, Field(ge=1, le=MAX_COUNT, description=f"a whole number, at least 1 and at most {MAX_COUNT}")]
Natural = Annotated[int, Field(ge=0, le=MAX_COUNT, description=f"a whole number from 0 to {MAX_COUNT}")]
Rank = Annotated[int, Field(ge=1, le=MAX_RANK, description=f"a whole number, at least 1 and at most {MAX_RANK}")]
Seed = Annotated[int, Field(ge=0, lt=MAX_SEED, description=f"a whole number from 0 to {MAX_SEED - 1}")]
Positive = Annotated[float, Field(gt=0, description="a finite number above 0")]
NonNegative = Annotated[float, Field(ge=0, description="a finite number, not negative")]
StepShare = Annotated[float, Field(gt=0, le=1, description="above 0 and at most 1 (a share of the steps)")]
DrawEta = Annotated[float, Field(ge=0, le=1, description="from 0 to 1")]
LoraLayers = Annotated[
    str,
    Field(pattern=r"^(all|(first|last):[1-9]\d{0,3})$", description="all, first:N or last:N with N from 1 on, as last:4"),
]
Decay = Annotated[float, Field(ge=0, lt=1, description="from 0 to below 1")]
AdapterSteps = Annotated[
    str,
    Field(description="a range A-B of shares of the denoising steps with 0 <= A < B <= 1, as 0.8-1"),
    pydantic.AfterValidator(lambda text: parse_steps(text) and text),
]
Seconds = Annotated[float, Field(gt=0, le=MAX_TIMEOUT, description=f"above 0 and at most {MAX_TIMEOUT} seconds")]
Algorithm = Literal["ppo", "matching", "gradient"]
Precision = Literal["no", "fp16", "bf16"]
Sampler = Literal["ddim", "dpm-solver", "euler", "cps"]
FLOW_SAMPLERS = ("euler", "cps")  # for models of flow matching
NullPrompt = Literal["adapted", "base"]
LongPrompt = Literal["refuse", "cut", "chunk"]
Reward = Annotated[str, Field(description="a text"), pydantic.AfterValidator(lambda spec: without_passwords(spec))]
PLAIN = {str: "a text", bool: "true or false", int: "a whole number", float: "a finite number"}


def _as_list(given: Any) -> Any:
    """A text as a list of one, and a tuple as a list."""
    return [given] if isinstance(given, str) else list(given) if isinstance(given, tuple) else given


# A list; for type checkers a sequence, as a single text is one too.
Texts = Annotated[Sequence[str], Field(description="a text or a list of texts"), pydantic.BeforeValidator(_as_list)]
Rewards = Annotated[Sequence[Reward], Field(description="a text or a list of texts"), pydantic.BeforeValidator(_as_list)]


# --- ranges of steps ---


@functools.cache
def parse_steps(text: str) -> tuple[float, float]:
    """Beginning and end of a range A-B of shares of the denoising steps; raises ValueError unless 0 <= A < B <= 1."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)-(\d+\.?\d*|\.\d+)", text)
    first, end = map(float, found.groups()) if found else (math.nan, math.nan)
    if not 0 <= first < end <= 1:
        raise ValueError(f"must be A-B with 0 <= A < B <= 1, as 0.8-1, not {text!r}")
    return first, end


def is_inside(steps: str | None, share: float) -> bool:
    """Whether a share of the denoising, from 0 at the pure noise to 1, lies in a range A-B of them; None is all of it."""
    first, end = parse_steps(steps) if steps else (0.0, 1.0)
    return first <= share and (share < end or end == 1)


def steps_inside(steps: str | None, num_steps: int) -> list[bool]:
    """Which of the denoising steps lie in a range A-B: step k does where A <= (k + 0.5) / num_steps < B."""
    return [is_inside(steps, (k + 0.5) / num_steps) for k in range(num_steps)]


def check_steps(steps: str | None, num_steps: int) -> None:
    """Raise InputError for a range in which no step lies."""
    if not any(steps_inside(steps, num_steps)):
        raise InputError(
            f"adapter_steps: none of the {num_steps} denoising steps lies in {steps} (step k does by (k + 0.5) / "
            f"{num_steps}); widen it, or raise --num-inference-steps"
        )


# --- validated records ---

T = TypeVar("T")


def derived(default: Any = MISSING, *, init: Literal[False] = False, **others: Any) -> Any:
    """A field that follows from the options; `init` says to type checkers and editors that nobody gives it."""
    return field(**others) if default is MISSING else field(default=default, **others)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, derived))
def validated(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass that holds its fields to their types and rules.

    Its `__init__` raises InputError with the field, the rule and the value.
    """
    config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    record: Any = pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=True, config=config)
    validate = record.__init__

    @functools.wraps(validate)
    def init(self: object, **values: Any) -> None:
        try:
            validate(self, **values)
        except pydantic.ValidationError as error:
            raise InputError(_first_message(error, record)) from error

    record.__init__ = init
    return record


def _first_message(error: pydantic.ValidationError, record: type) -> str:
    """What is wrong first: field, rule and value."""
    found = error.errors()[0]
    name = str(found["loc"][0])
    if found["type"] == "unexpected_keyword_argument":
        return f"{name}: there is no such option{near(name, typing.get_type_hints(record))}"
    if found["type"] == "missing":
        return f"{name}: must be given"
    kind = typing.get_type_hints(record, include_extras=True)[name]
    return f"{name}: must be {_rule(kind)}, not {repr(found['input'])[:100]}{near(found['input'], _choices(kind))}"


def _choices(kind: Any) -> list[str]:
    """The values that a field's type names."""
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    return [choice for part in typing.get_args(kind) for choice in _choices(part)]


def _rule(kind: Any) -> str:
    """What a field's type asks for, in words."""
    if typing.get_origin(kind) is Annotated:
        return kind.__metadata__[0].description
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_rule(part) for part in typing.get_args(kind) if part is not type(None))
    return PLAIN.get(typing.get_origin(kind) or kind, str(kind))


def option(text: str, default: Any = MISSING) -> Any:
    """A field that is an option of the command, with its help text; without a default the preset or `resolve` has it."""
    return field(metadata={"help": text}) if default is MISSING else field(default=default, metadata={"help": text})


class Options:
    """What is given for a command: a field for each option, None where nothing is given."""

    if TYPE_CHECKING:

        def __init__(self, **given: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...


def options_of(config_class: Any) -> type[Options]:
    """The Options of a Config: its fields that are options, each of which may be None."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    given = option_fields(config_class)
    body: dict[str, Any] = {item.name: field(default=None, metadata=item.metadata) for item in given}
    body["__annotations__"] = {item.name: hints[item.name] | None for item in given}
    return validated(type(config_class.__name__.replace("Config", "Options"), (Options,), body | {"__module__": __name__}))


def option_fields(record: Any) -> list[Any]:
    """The fields of a Config or of its Options that are options of the command."""
    return [item for item in fields(record) if "help" in item.metadata]


def given_values(options: Options) -> dict[str, Any]:
    """The options that are given, by name."""
    values = {item.name: getattr(options, item.name) for item in option_fields(type(options))}
    return {name: value for name, value in values.items() if value is not None}


# --- train ---

LONG_PROMPT_HELP = (
    "prompts that are longer than what the text encoders read (75 tokens of CLIP's): refuse, cut, or for models of CLIPs "
    "alone chunk, which encodes 75 tokens at a time and joins them, as A1111 does"
)


@validated
class TrainConfig:
    """Everything that decides a training run."""

    reward: Reward = option(
        "a name that `texforce rewards` lists, path/to/file.py:function, http://HOST:PORT/score, or a mixture of "
        "them as hps=1,jpeg=0.1; or none, with --relabel",
        "hps",
    )
    normalise_rewards: bool = option("divide each part of a mixture by the running deviation of its scores", False)
    eval_reward: Rewards | None = option(
        "a reward that is only measured, on the held-out prompts, so that hacking of the other one shows; repeatable", None
    )
    model: str = option(
        "'tiny', 'tiny-flow', a diffusers folder, a checkpoint or a hub name (default: tiny without a GPU, else SD 1.5)"
    )
    prompts: str = option(
        f"{PROMPT_FILES}; sets joined by commas: world, colour, count, composition, position, common, general, "
        "faces, hands, animals, text; or the published training prompts of hps, imagereward or pickapic"
    )
    heldout_prompts: str | None = option(
        "prompts that are only measured, from a file as --prompts takes it (default: those kept apart from the shipped "
        "sets, as world's and general's, else a tenth of --prompts, at most 64)",
        None,
    )
    long_prompt: LongPrompt = option(LONG_PROMPT_HELP, "cut")
    output_dir: str = option("where the adapter, the figures and the metrics go; must be new or empty", "out")
    overwrite: bool = option("remove the run in the output folder, and begin anew", False)
    preset: Literal["default", "paper", "fast"] = option(
        "default (ppo for Stable Diffusion 1.x to XL, else matching), paper: the published recipe, or fast: matching",
        "default",
    )
    algorithm: Algorithm = option(
        "ppo (TexForce as published), matching (advantage-weighted matching of final images: fewer images) or "
        "gradient (the reward's own gradient, for scorers that have one)"
    )
    target: Literal["text-encoder", "unet", "both", "tokens"] = option(
        "what gets LoRA: text-encoder (TexForce), unet (DDPO) or both; or tokens: instead of LoRA, tokens are learned that "
        "are read at the end of every prompt",
        "text-encoder",
    )
    num_tokens: Count = option("target tokens: how many of them", 8)
    text_encoders: Texts | None = option(
        "text encoders that get LoRA, as text_encoder_2; repeatable (default: the CLIPs, else the only one)", None
    )
    lora_layers: LoraLayers = option(
        "blocks of each trained text encoder that get LoRA: all, first:N or last:N, which counts back from the last block "
        "that the denoiser reads",
        "all",
    )
    lora_modules: Texts | None = option(
        "projections in these blocks that get LoRA, as q_proj; repeatable (default: those of attention)", None
    )
    adapter_steps: AdapterSteps | None = option(
        "range A-B of shares of the denoising steps, as 0.8-1, in which the text encoder's adapter is on; outside, the base "
        "text encoder conditions the denoiser, and nothing is trained (default: all steps)",
        None,
    )
    offload_text_encoders: bool = option(
        "keep the text encoders that are not trained off the GPU; they encode each prompt once", False
    )
    reward_checkpoint: Texts | None = option(
        "NAME=PATH, weights of a scorer; repeatable; PATH alone is for the only scorer, 'hub' its published "
        "weights (default: embedded hps for tiny, else hub)",
        None,
    )
    reward_timeout: Seconds = option("seconds after which a function or a server that gives no scores is given up", 600.0)
    seed: Seed = option("seed of everything random", 0)
    num_epochs: Count = option("rounds of sampling and updating")
    num_prompts_per_epoch: Count = option("prompts drawn an epoch")
    num_samples_per_prompt: Count = option("images a prompt: the group whose rewards are compared")
    num_updates_per_epoch: Count = option("optimizer steps in a pass over an epoch's images, each on its share of them")
    num_inner_epochs: Count = option(
        "passes over an epoch's images (PPO's epochs); more of them learn more from an image, in more time", 1
    )
    sampler: Sampler = option(
        "ddim, or dpm-solver (DPM-Solver++ 2M: fewer steps, none of them random, so not for ppo); for flow matching euler "
        "(with eta Flow-GRPO's SDE), which is its default, or cps (coefficients-preserving)",
        "ddim",
    )
    num_inference_steps: Count = option("denoising steps")
    eta: DrawEta = option(
        "randomness of the steps, 0 to 1; ppo needs some; dpm-solver has none, flow matching 0.7 for ppo, else none",
        1.0,
    )
    guidance_scale: NonNegative = option("classifier-free guidance; 1 or less switches it off")
    timestep_window: StepShare = option(
        "share of the denoising steps, from the first and noisiest on, that may be trained on"
    )
    timestep_fraction: StepShare = option("share of the steps in the window that is trained on, drawn anew for each image")
    deterministic_elsewhere: bool = option(
        "training samples the steps outside the window without randomness; held-out images are drawn as ever", False
    )
    num_noise_levels: Count = option("matching: noise levels at which each image is trained in a pass", 4)
    noise_window: StepShare = option("matching: share of the noise levels, from the noisiest on, that is trained", 0.6)
    imitation_weight: NonNegative = option(
        "matching: weight of self-imitation: images above the epoch's mean reward are matched also where all of their "
        "prompt's are, which holds what is already drawn well",
        0.0,
    )
    relabel: str | None = option(
        "matching: make an image that failed its prompt an example of what it shows, by path/to/file.py:function, which "
        "captions it, or for the tiny world's prompts by world: its detector (default: nothing)",
        None,
    )
    relabel_weight: Positive = option(
        "matching: weight of a relabelled image under its caption; an advantage of one standard deviation has 1", 0.5
    )
    backprop_steps: Count = option("gradient: last sampling steps that the reward's gradient goes through", 4)
    resolution: Count | None = option("pixels of a side (default: what the denoiser was made for)", None)
    learning_rate: Positive = option("of AdamW")
    lr_scheduler: Literal["constant", "linear", "cosine"] = option(
        "of the learning rate after its warm-up: constant, linear or cosine (to 0)"
    )
    lr_warmup_steps: Natural = option(
        "optimizer steps over which the learning rate rises from 0: Adam's first steps are long and mostly noise; "
        "by default never over a tenth of the run"
    )
    weight_decay: NonNegative = option("of AdamW", 0.0001)
    max_grad_norm: Positive = option("gradients are clipped to this norm")
    clip_range: Positive = option("PPO's clip range of the ratio")
    advantages: Literal["leave-one-out", "per-prompt"] = option(
        "leave-one-out (within the group) or per-prompt (running statistics of DDPO)"
    )
    advantage_clip: Positive = option("advantages are clipped to this, in standard deviations", 5.0)
    kl_weight: NonNegative = option(
        "weight of the KL divergence from the base policy; of matching, of the squared distance to its prediction", 0.0
    )
    null_anchor: NonNegative = option(
        "weight of the squared distance of the null prompt's embedding to the base one's, which holds it there", 0.0
    )
    anchor_prompts: str | None = option(
        "prompts that are held like the null prompt, as negative prompts, from a file as --prompts takes it", None
    )
    null_prompt: NullPrompt = option("whether guidance's null prompt goes through the adapted text encoder or the base one")
    rank: Rank = option("of LoRA", 16)
    lora_alpha: Count = option("of LoRA (default: the rank)")
    ema_decay: Decay = option("average the adapter over updates with this decay; 0 is off")
    micro_batch_size: Count = option(
        "(image, step) pairs in one backward pass; changes memory, and of the result the rounding"
    )
    micro_batch: Literal["fixed", "auto"] = option(
        "fixed takes --micro-batch-size; auto, on a GPU, begins with --sample-batch-size instead, and halves it "
        "whenever an update runs out of memory",
        "fixed",
    )
    sample_batch_size: Count = option("images sampled at a time")
    mixed_precision: Precision = option(
        "no, fp16 or bf16 for the frozen weights (default: on CUDA fp16, in flow matching bf16; on a CPU that has it bf16, "
        "but no for tiny)"
    )
    gradient_checkpointing: bool = option(
        "recompute the activations of the denoiser and of the trained text encoders to save memory", False
    )
    compile: bool | None = option("compile the denoiser; the first step takes minutes (default: on CUDA)", None)
    eval_every: Count = option("epochs between measurements on the held-out prompts")
    checkpoint_every: Count = option("epochs between checkpoints, from which `--resume` goes on exactly")
    checkpoints_to_keep: Count = option("so many of the newest checkpoints stay", 2)
    max_kl: Positive | None = option(
        "stop when the KL divergence from the base policy, before an epoch's last update, is above this", None
    )
    max_reward_drop: NonNegative = option(
        "stop when the held-out reward is so many deviations of the first epoch's rewards below the base model's; 0 is off",
        2.0,
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = option(
        "tensorboard, wandb or trackio, besides metrics.jsonl", "none"
    )


TrainOptions = options_of(TrainConfig)


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_model(name: str) -> None:
    """Raise NotFoundError for a model whose folder or file is not there, and whose name can be none on the hub."""
    on_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if name not in EMBEDDED and not on_hub and not Path(name).exists():
        raise NotFoundError(
            f"model: there is no folder {name!r}; give 'tiny', a diffusers folder, a file or a name on the hub"
            f"{near(name, EMBEDDED)}"
        )


def check_device(device: str) -> str:
    """The name of a device, which is here.

    Raises:
        InputError: it is not cpu, cuda or cuda:N, or there is no such GPU.
    """
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"device: must be cpu, cuda or cuda:N, not {device!r}")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device != "cpu" and int(device.partition(":")[2] or 0) >= num_gpus:
        raise InputError(f"device: there is no {device!r}; PyTorch finds {num_gpus} GPU(s) here")
    return device


def default_model(device: str) -> str:
    """The embedded tiny model without a GPU, Stable Diffusion 1.5 with one."""
    return "tiny" if device == "cpu" else STABLE_DIFFUSION


def default_precision(model: str, device: str) -> str:
    """The precision of the frozen weights in training: half where the device multiplies matrices in it.

    The tiny model's kernels are too small to gain from it on a CPU.
    """
    import torch

    if device != "cpu":
        return "bf16" if is_flow(model) else "fp16"
    return "bf16" if model not in EMBEDDED and torch.cpu._is_avx512_bf16_supported() else "no"


def rounds_by_batch(mixed_precision: str, device: str) -> bool:
    """Whether a result depends on its batch's size beyond float32's rounding: in half precision, and in TF32 on a GPU."""
    return mixed_precision != "no" or device != "cpu"


def resolve(options: Options) -> TrainConfig:
    """The configuration of a training: the options that are given, and else the preset for the model.

    Raises:
        InputError: options do not fit each other or the device; names them, the rule and the values.
    """
    given = given_values(options)
    _check_names(given)
    if "torch" not in sys.modules:  # loading it takes seconds, so what is wrong on any device is told before
        _check_on_any_device(given)
    return _resolve_on(default_device(), given)


def _check_names(given: dict[str, Any]) -> None:
    """Check what the model, the rewards and what captions images are called.

    Raises:
        As `check_model`, `reward_specs.check_reward` and `reward_specs.check_captioner`.
    """
    if given.get("model"):
        check_model(given["model"])
    for spec in [given["reward"]] if given.get("reward", NO_REWARD) != NO_REWARD else []:
        check_reward(spec)
    for spec in given.get("eval_reward", ()):
        check_reward(spec, "eval_reward")
    if given.get("relabel"):
        check_captioner(given["relabel"])


def _check_on_any_device(given: dict[str, Any]) -> None:
    """Raise what `_resolve_on` raises of options that no device, and no precision that follows from it, would suit."""
    failures = []
    for device in ("cpu", "cuda"):
        try:
            _resolve_on(device, {"mixed_precision": "no"} | given)
        except InputError as error:
            failures.append(error)
    if len(failures) > 1:
        raise failures[0]


def _resolve_on(device: str, given: dict[str, Any]) -> TrainConfig:
    """The configuration of a training on a device; raises as `resolve`."""
    model = given.get("model", default_model(device))
    preset = preset_for(family(model), given.get("preset", "default"), given.get("algorithm"))
    precision = given.get("mixed_precision") or default_precision(model, device)
    check_precision(precision, device)
    rank = given.get("rank", preset.get("rank", _default(TrainConfig, "rank")))
    follows = {"model": model, "mixed_precision": precision, "lora_alpha": rank}
    sampler = given.get("sampler", preset.get("sampler", "ddim"))
    follows |= sampler_defaults(sampler, family(model), given.get("algorithm", preset["algorithm"]))
    if rounds_by_batch(precision, device):
        usual = preset["micro_batch_size" if device == "cpu" else "sample_batch_size"]
        size = given.get("sample_batch_size", given.get("micro_batch_size", usual))
        follows |= {"sample_batch_size": size, "micro_batch_size": size}  # then the ratio is exact
    if given.get("target", "text-encoder") != "text-encoder":
        follows["null_prompt"] = "adapted"
    if given.get("target") == "unet":
        follows |= {"null_anchor": 0.0, "text_encoders": None}  # nothing of the text moves
    if given.get("target") == "tokens":
        follows |= {"null_prompt": "base", "null_anchor": 0.0, "text_encoders": None}  # the null prompt is without them
    config = TrainConfig(**preset | follows | given)
    num_updates = num_optimizer_steps(config)
    if "lr_warmup_steps" not in given:
        shortened = min(config.lr_warmup_steps, num_updates // 10)
        config = replace(config, lr_warmup_steps=shortened if shortened > 1 else 0)  # a single step's rate would be 0
    elif config.lr_warmup_steps >= num_updates:
        raise InputError(
            f"lr_warmup_steps: must be below the run's {num_updates} optimizer steps, not {config.lr_warmup_steps}"
        )
    _check_together(config)
    return config


# Options that one algorithm has, and that have no effect on the others.
ALGORITHM_OPTIONS = {
    "timestep_window": "ppo", "timestep_fraction": "ppo", "deterministic_elsewhere": "ppo", "clip_range": "ppo",
    "num_noise_levels": "matching", "noise_window": "matching", "imitation_weight": "matching",
    "relabel": "matching", "relabel_weight": "matching",
    "backprop_steps": "gradient",
}  # fmt: skip


def check_algorithm_options(given: Iterable[str], algorithm: str) -> None:
    """Check that options that are given have an effect.

    Raises:
        InputError: one belongs to another algorithm.
    """
    for name in given:
        if ALGORITHM_OPTIONS.get(name, algorithm) != algorithm:
            raise InputError(f"{name}: is an option of --algorithm {ALGORITHM_OPTIONS[name]}, not of {algorithm}")


def check_target_options(given: Iterable[str], target: str) -> None:
    """Check that options that are given have an effect.

    Raises:
        InputError: one belongs to another target.
    """
    for name in given:
        if name == "num_tokens" and target != "tokens":
            raise InputError(f"num_tokens: is an option of --target tokens, not of {target}")
        if name in ("rank", "lora_alpha") and target == "tokens":
            raise InputError(f"{name}: is an option of LoRA, in whose place --target tokens learns tokens")


def _default(record: Any, name: str) -> Any:
    """The default of a field."""
    return next(item.default for item in fields(record) if item.name == name)


def num_optimizer_steps(config: TrainConfig) -> int:
    """Optimizer steps of a whole run."""
    return config.num_epochs * config.num_inner_epochs * config.num_updates_per_epoch


def window_end(config: TrainConfig) -> int:
    """The number of steps up to the end of the window, at least 1."""
    return math.ceil(config.timestep_window * config.num_inference_steps - 1e-9)  # 0.28 of 25 is 7, though rounded up


def check_drawn(sampler: str, eta: float) -> None:
    """Raise InputError for randomness in how images are drawn that a sampler does not have."""
    if sampler == "cps" or (sampler == "euler" and eta != 0):
        raise InputError(f"sampler, eta: flow matching is drawn by euler at an eta of 0, not by {sampler} at {eta:g}")
    check_sampler(sampler, eta)


def check_sampler(sampler: str, eta: float) -> None:
    """Raise InputError for randomness that a sampler does not have."""
    if sampler == "dpm-solver" and eta != 0:
        raise InputError(f"eta: must be 0 for dpm-solver, not {eta:g}: its steps are not random; leave it out, or use ddim")


def _check_algorithm(config: TrainConfig) -> None:
    if config.algorithm == "ppo" and config.sampler == "dpm-solver":
        raise InputError(
            "sampler: must be ddim for ppo (in flow matching euler or cps), not dpm-solver: a step without randomness has "
            "no density to train on"
        )
    check_sampler(config.sampler, config.eta)
    if config.algorithm == "ppo" and config.eta == 0:
        raise InputError("eta: must be above 0 for ppo, not 0: a step without randomness has no density to train on")
    if config.algorithm != "ppo" and config.num_updates_per_epoch > config.num_prompts_per_epoch:
        raise InputError(
            f"num_updates_per_epoch: an epoch of {config.num_prompts_per_epoch} prompts cannot be shared out to "
            f"{config.num_updates_per_epoch}"
        )
    if config.algorithm == "gradient" and config.backprop_steps > config.num_inference_steps:
        raise InputError(
            f"backprop_steps: must be at most num_inference_steps, {config.num_inference_steps}, not {config.backprop_steps}"
        )
    if config.algorithm == "gradient" and (config.kl_weight or config.max_kl):
        name = "kl_weight" if config.kl_weight else "max_kl"
        raise InputError(f"{name}: has no effect with gradient, whose updates do not measure the divergence; leave it out")
    if config.algorithm == "gradient" and config.num_inner_epochs > 1:
        raise InputError("num_inner_epochs: must be 1 for gradient, which samples its images in the update")
    if config.target == "unet" and (config.text_encoders or config.offload_text_encoders):
        name = "text_encoders" if config.text_encoders else "offload_text_encoders"
        raise InputError(f"{name}: needs a text encoder that is trained; target unet trains none")
    if config.target == "unet" and (config.lora_layers != "all" or config.lora_modules):
        name = "lora_modules" if config.lora_layers == "all" else "lora_layers"
        raise InputError(f"{name}: chooses layers of a text encoder that is trained; target unet trains none")
    if config.target == "tokens":
        _check_tokens(config)
    if config.null_anchor and config.target == "unet":
        raise InputError("null_anchor: needs a text encoder that is trained; target unet trains none")
    if config.anchor_prompts and not config.null_anchor:
        raise InputError("anchor_prompts: needs a null_anchor above 0, the weight that holds them")
    if config.adapter_steps:
        _check_adapter_steps(config, config.adapter_steps)
    _check_relabelling(config)


def _check_adapter_steps(config: TrainConfig, steps: str) -> None:
    """Raise InputError for a range of steps in which nothing would be trained."""
    if config.target == "unet":
        raise InputError("adapter_steps: needs a text encoder that is trained; target unet trains none")
    check_steps(steps, config.num_inference_steps)
    inside = steps_inside(steps, config.num_inference_steps)
    number, last = window_end(config), config.backprop_steps
    if config.algorithm == "ppo" and not any(inside[:number]):
        raise InputError(
            f"adapter_steps, timestep_window: none of the first {number} of {len(inside)} steps, which may be trained on, "
            f"lies in {steps}; raise --timestep-window"
        )
    if config.algorithm == "gradient" and not any(inside[-last:]):
        raise InputError(
            f"adapter_steps, backprop_steps: none of the last {last} of {len(inside)} steps, which the gradient goes "
            f"through, lies in {steps}; raise --backprop-steps"
        )
    if config.algorithm == "matching" and parse_steps(steps)[0] >= config.noise_window:
        raise InputError(
            f"adapter_steps, noise_window: the noisiest {config.noise_window:g} of the noise levels hold none of those that "
            f"{steps} stands for (level l of L by 1 - l/L); raise --noise-window"
        )


def _check_relabelling(config: TrainConfig) -> None:
    if config.relabel:
        check_algorithm_options(["relabel"], config.algorithm)
    elif config.relabel_weight != _default(TrainConfig, "relabel_weight"):
        raise InputError("relabel_weight: works only together with --relabel")
    if config.reward == NO_REWARD and not config.relabel:
        raise InputError("reward: none teaches nothing by itself; give a reward, or --relabel, whose images teach alone")
    if config.reward == NO_REWARD and not config.eval_reward:
        raise InputError("reward: none measures nothing; say by --eval-reward what the held-out prompts are measured by")


def _check_tokens(config: TrainConfig) -> None:
    """Refuse options that have no effect where tokens are learned, since every CLIP reads them, and no null prompt does."""
    reasons = {
        "text_encoders": "every CLIP of the model reads the tokens",
        "lora_modules": "there is no LoRA",
        "null_anchor": "the null prompt is without the tokens, so that it does not move",
    }
    if config.long_prompt != "cut":
        raise InputError(f"long_prompt: must be cut with target tokens, not {config.long_prompt}: the tokens end the prompt")
    if config.adapter_steps:
        raise InputError("adapter_steps: is for LoRA, in whose place target tokens learns tokens; leave it out")
    reasons |= {"lora_layers": reasons["lora_modules"]} if config.lora_layers != "all" else {}
    for name, reason in reasons.items():
        if getattr(config, name):
            raise InputError(f"{name}: has no effect with target tokens: {reason}; leave it out")


def check_precision(mixed_precision: str, device: str) -> None:
    """Raise InputError for a type that the device does not compute in."""
    if mixed_precision == "fp16" and device == "cpu":
        raise InputError("mixed_precision: fp16 needs a GPU; use no or bf16 on the CPU")


def _check_together(config: TrainConfig) -> None:
    _check_algorithm(config)
    num_images = config.num_prompts_per_epoch * config.num_samples_per_prompt
    if config.num_updates_per_epoch > num_images:
        raise InputError(
            f"num_updates_per_epoch: an epoch of {num_images} images cannot be shared out to {config.num_updates_per_epoch}"
        )
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise InputError(f"report_to: {config.report_to} is not installed; pip install {config.report_to}")
    if config.null_prompt == "base" and config.target in ("unet", "both"):
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


# --- sample ---

ADAPTER_HELP = (
    "output folder of a training, a LoRA file or folder of any layout, learned tokens, or a hub name; PATH:WEIGHT weights "
    "it; repeatable, summed"
)
UNET_SCALE_HELP = "strength of that U-Net's change: 0 is the base model's, 1 as it was tuned"
UNET_HELP = "a U-Net tuned elsewhere: a LoRA file, a diffusers U-Net, a single-file checkpoint or a hub name"
MODEL_HELP = (
    "'tiny', 'tiny-flow', a diffusers folder, a checkpoint or a hub name (default: the adapter's, else as in training)"
)


@dataclass(frozen=True)
class System:
    """Adapters and a U-Net on a base model, each as path and weight."""

    name: str
    adapters: tuple[tuple[str, float], ...] = ()
    unets: tuple[tuple[str, float], ...] = ()
    adapter_steps: str | None = None  # in which the text encoder's adapter is on; None: all


@validated
class DrawConfig:
    """How images are drawn, by `sample` and by `eval`."""

    model: str = option(MODEL_HELP)
    sampler: Sampler = option("ddim or dpm-solver, for flow matching euler (default: the adapter's, else ddim or euler)")
    num_inference_steps: Count = option("denoising steps (default: the adapter's)")
    eta: DrawEta = option("randomness of DDIM's steps, 0 to 1 (default: the adapter's, else 1; 0 for the other samplers)")
    guidance_scale: NonNegative = option("classifier-free guidance (default: the adapter's)")
    resolution: Count | None = option("pixels of a side (default: what the denoiser was made for)", None)
    width: Count | None = option("pixels from left to right, instead of --resolution", None)
    height: Count | None = option("pixels from top to bottom, instead of --resolution", None)
    batch_size: Count = option("images drawn at a time", 16)
    mixed_precision: Precision = option("no, fp16 or bf16 (default: on CUDA fp16, in flow matching bf16; else no)")
    compile: bool | None = option("compile the denoiser (default: on CUDA)", None)
    null_prompt: NullPrompt = option("adapted or base (default: the adapter's)")
    negative_prompt: str | None = option("what guidance leads away from, as 'blurry' (default: nothing)", None)
    long_prompt: LongPrompt = option(f"{LONG_PROMPT_HELP} (default: the adapter's, else cut)")
    clip_skip: Natural = option(
        "last layers of CLIP that are skipped, as diffusers counts them (A1111's 2 is 1); null and negative prompts skip "
        "none",
        0,
    )
    prompt_weights: bool = option(
        "read weights in prompts and the negative prompt, as A1111 does: (word:1.3), (word), [word], \\( for a bracket; and "
        "[word:0-0.5:1.25], a word for a range of the steps (docs/prompts.md); else brackets are text",
        False,
    )
    adapter_steps: AdapterSteps | None = option(
        "range A-B of shares of the denoising steps, as 0.8-1, in which the text encoder's adapter is on; 0-1 is all of "
        "them (default: the adapter's, else all)",
        None,
    )
    origins: dict[str, str] = derived(default_factory=dict)  # of options that are not given: the file that each comes from


# Options that came after others: results and metadata name them where they are not these, so that they stay as they were.
LATER_OPTIONS: dict[str, Any] = {
    "long_prompt": "cut",
    "clip_skip": 0,
    "width": None,
    "height": None,
    "prompt_weights": False,
}


def changed_later_options(config: DrawConfig) -> dict[str, Any]:
    """Those of LATER_OPTIONS that are not as they were before there was a choice, with their values."""
    return {name: getattr(config, name) for name, usual in LATER_OPTIONS.items() if getattr(config, name) != usual}


@validated
class SampleConfig(DrawConfig):
    """Everything that decides what `texforce sample` draws."""

    adapter: Texts | None = option(ADAPTER_HELP, None)
    unet: str | None = option(UNET_HELP, None)
    unet_scale: float = option(UNET_SCALE_HELP, 1.0)
    prompt: Texts | None = option("what to draw; repeatable", None)
    prompts: str | None = option(f"{PROMPT_FILES}; or the name of a shipped set", None)
    output_dir: str = option("where the images go; their numbers go on from those already there", "samples")
    num_images: Count = option("images for each prompt", 4)
    seed: Seed = option("of the first image; the next has the next seed", 0)
    scale: float = option("strength of the adapter: 0 is the base model, 1 as trained", 1.0)
    compare: bool = option("also draw the base model's images from the same noise", False)
    systems: tuple[System, ...] = derived(())  # drawn besides the base model: one, or none


SampleOptions = options_of(SampleConfig)


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


def _one_system(given: dict[str, Any], scale: float = 1.0) -> tuple[System, ...]:
    """The adapters and the U-Net that are given, as one system; none if nothing is given."""
    adapters = tuple((path, weight * scale) for path, weight in map(parse_weighted, given.get("adapter", ())))
    unets = ((given["unet"], given.get("unet_scale", 1.0)),) if given.get("unet") else ()
    return (System("tuned", adapters, unets),) if adapters or unets else ()


def resolve_sample(options: Options) -> SampleConfig:
    """The configuration of `texforce sample`: the options, and else the adapter's run or the model's defaults.

    Raises:
        InputError: options do not fit each other, or an adapter's folder is nonsense.
    """
    given = given_values(options)
    scale = given.get("scale", 1.0)
    if not given.get("prompt") and not given.get("prompts"):
        raise InputError("prompt: give --prompt or --prompts")
    if not given.get("adapter") and scale != 1:
        raise InputError("scale: works only together with --adapter")
    _check_unet_scale(given)
    if not given.get("adapter") and not given.get("unet") and given.get("compare"):
        raise InputError("compare: works only together with --adapter or --unet")
    systems = _with_steps(_one_system(given, scale), given)
    return SampleConfig(**_drawing(given, systems) | {"systems": systems})


def _with_steps(systems: Sequence[System], given: dict[str, Any], advice: str = "say which to use") -> tuple[System, ...]:
    """Systems with the steps in which their adapters are on: as given, or else as the adapters' runs have it.

    Raises:
        InputError: the runs of adapters that are summed differ, or steps are given without an adapter.
    """
    if "adapter_steps" in given and not given.get("adapter"):
        raise InputError("adapter_steps: works only together with --adapter")
    found = []
    for system in systems:
        saved = _steps_of(system)
        if "adapter_steps" in given:
            saved = [given["adapter_steps"]] if system.adapters else []
        if len(saved) > 1:
            texts = " and ".join(steps or "all steps" for steps in saved[:2])
            raise InputError(f"adapter_steps: adapters that are summed were trained with {texts}; {advice}")
        found.append(replace(system, adapter_steps=saved[0] if saved else None))
    return tuple(found)


def _steps_of(system: System) -> list[str | None]:
    """The different steps in which the adapters of a system that have an effect are on; raises as `_saved_steps`."""
    return list(dict.fromkeys(steps for path, weight in system.adapters if weight for steps in _saved_steps(path)))


def _saved_steps(adapter: str) -> list[str | None]:
    """The steps in which an adapter's run, or a merge, has it on; nothing of a run that trained the U-Net alone.

    Raises:
        InputError: a file in its folder is nonsense.
    """
    folder = locate(adapter, "adapter")
    folder = folder.parent if folder.name.startswith("adapter_model.") else folder
    contents = {path: read_json(path) for path in (folder / "config.json", folder / SETTINGS) if path.is_file()}
    for path, content in contents.items():
        try:
            TrainOptions(adapter_steps=content.get("adapter_steps"))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    if any(content.get("target") == "unet" for content in contents.values()):
        return []
    return [next((steps for content in contents.values() if (steps := content.get("adapter_steps"))), None)]


def _check_unet_scale(given: dict[str, Any]) -> None:
    if given.get("unet_scale", 1.0) != 1 and not given.get("unet"):
        raise InputError("unet_scale: works only together with --unet")


def _drawing(given: dict[str, Any], systems: Sequence[System]) -> dict[str, Any]:
    """What is given, and how images are drawn where it is not.

    Raises:
        InputError: the adapters' runs disagree in what is not given.
    """
    if {"resolution", "width", "height"} <= given.keys():
        raise InputError("resolution: has no effect beside --width and --height; leave it out")
    if given.get("model"):
        check_model(given["model"])
    saved, origins = dict[str, Any](), dict[str, str]()
    settled = given.keys() | ({"resolution"} if {"width", "height"} <= given.keys() else set())
    for path, settings in sampling_settings(given, systems):
        for name, value in settings.items():
            if name not in settled:
                origins.setdefault(name, str(path))
            if saved.setdefault(name, value) != value and name not in settled:
                raise InputError(f"{name}: the adapters were trained with {saved[name]!r} and {value!r}; say which to use")
    device = default_device()  # loads PyTorch, so a mistyped path comes before it
    model = given.get("model") or saved.get("model") or default_model(device)
    preset = PRESETS[family(model), "default"]
    usual: dict[str, Any] = {"eta": 1.0, "sampler": preset.get("sampler", "ddim"), "null_prompt": "adapted"}
    usual["long_prompt"] = "cut"
    usual["mixed_precision"] = "no" if device == "cpu" else "bf16" if is_flow(model) else "fp16"
    usual |= {name: preset[name] for name in ("num_inference_steps", "guidance_scale")}
    sampler = given.get("sampler", saved.get("sampler", usual["sampler"]))
    usual |= {"sampler": sampler} | sampler_defaults(sampler, family(model))
    if saved.get("sampler", sampler) != sampler:
        saved.pop("eta", None)  # it was the other sampler's
        origins.pop("eta", None)
    values = usual | saved | given | {"model": model}
    with naming_origins(origins):
        check_precision(values["mixed_precision"], device)
        check_drawn(sampler, values["eta"])
    for system in systems:
        check_steps(system.adapter_steps, values["num_inference_steps"])
    return values | {"origins": origins}


def sampling_settings(given: dict[str, Any], systems: Sequence[System]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """How each adapter, U-Net and given model was trained, or merged, to be sampled, as far as a file in its folder says it.

    Raises:
        InputError: a file is nonsense.
    """
    paths = [locate(path, "adapter") for system in systems for path, _ in system.adapters]
    paths += [locate(path, "unet") for system in systems for path, _ in system.unets]
    model, named = Path(given.get("model", "")), [path / name for path in paths for name in ("config.json", SETTINGS)]
    if given.get("model"):
        named += [model.parent / SETTINGS] if model.is_file() else [model / "config.json", model / SETTINGS]
    for path in named:
        if path.is_file():
            yield path, _saved_settings(path)


def _saved_settings(path: Path) -> dict[str, Any]:
    """How a run's config.json, or a merge's texforce.json, says that images are to be sampled."""
    content = read_json(path)
    if "eta" in content:  # a run of before there was a choice
        content = {"sampler": "ddim"} | content
    if content.get("sampler") in FLOW_SAMPLERS:  # random for training on alone
        content |= {"sampler": "euler", "eta": 0.0}
    names = ["model", "sampler", "num_inference_steps", "guidance_scale", "eta", "long_prompt"]
    if content.get("target") != "unet":  # the null prompt goes through the text encoder
        names.append("null_prompt")
    saved = {name: content[name] for name in names if content.get(name) is not None}
    if "resolution" in content:
        saved["resolution"] = content["resolution"]  # null says something: what the U-Net was made for
    try:
        TrainOptions(**saved)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return saved


# --- merge ---


@validated
class MergeConfig:
    """Everything that decides what `texforce merge` writes."""

    adapter: Texts | None = option(ADAPTER_HELP, None)
    unet: str | None = option(UNET_HELP, None)
    unet_scale: float = option(UNET_SCALE_HELP, 1.0)
    model: str = option(MODEL_HELP)
    format: Literal["pipeline", "checkpoint", "peft", "diffusers", "kohya"] = option(
        "pipeline (a diffusers folder) or checkpoint (one file), all baked in; or LoRA alone: peft, diffusers, kohya",
        "pipeline",
    )
    output_dir: str = option("the folder to write", "merged")
    overwrite: bool = option("replace the output if it exists", False)
    drop_adapter_steps: bool = option(
        "write an adapter that was trained for a range of steps (--adapter-steps) as one that is on in all of them", False
    )
    system: System = derived(System("tuned"))  # what is merged
    settings: dict[str, Any] = derived(default_factory=dict)  # how what is written is to be sampled
    dropped_steps: tuple[str, ...] = derived(())  # of adapters that are on in all steps from now on
    origins: dict[str, str] = derived(default_factory=dict)  # as of DrawConfig


MergeOptions = options_of(MergeConfig)


def resolve_merge(options: Options) -> MergeConfig:
    """The configuration of `texforce merge`: the options, and else the adapters' run.

    Raises:
        InputError: options do not fit each other, or an adapter's folder is nonsense.
    """
    given = given_values(options)
    if not given.get("adapter") and not given.get("unet"):
        raise InputError("adapter: there is nothing to merge; give --adapter, --unet or both")
    _check_unet_scale(given)
    if given.get("model"):
        check_model(given["model"])
    if not given.get("output_dir", "merged").strip("./ "):
        raise InputError(f"output_dir: must name a folder to be made, not {given['output_dir']!r}")
    systems, dropped = _one_system(given), tuple[str, ...]()
    if given.get("drop_adapter_steps"):
        dropped = tuple(filter(None, _steps_of(systems[0])))
    else:
        systems = _with_steps(systems, {}, "give --drop-adapter-steps, and all are on in all steps")
        _check_carried(systems[0].adapter_steps, given.get("format", _default(MergeConfig, "format")))
    settings: dict[str, Any] = {"adapter_steps": systems[0].adapter_steps} if systems[0].adapter_steps else {}
    origins: dict[str, str] = {}
    for path, saved in sampling_settings(given, systems):
        settings = saved | settings  # of runs that disagree the first one
        if "model" in saved and "model" not in given:
            origins.setdefault("model", str(path))
    model = given.get("model") or settings.get("model") or default_model(default_device())
    settings |= {"model": model}
    found = {"system": systems[0], "settings": settings, "dropped_steps": dropped, "origins": origins}
    return MergeConfig(**given | {"model": model} | found)


def _check_carried(adapter_steps: str | None, format: str) -> None:
    """Raise InputError for a range of steps that what reads a format would not honour."""
    if adapter_steps and format != "peft":
        raise InputError(
            f"format: the adapter is for the steps {adapter_steps} alone, and no reader of the format {format} switches it "
            "off in the others; take peft, beside which texforce.json says it to texforce, or --drop-adapter-steps, and it "
            "is on in all steps"
        )


# --- evaluation ---


@validated
class EvalConfig(DrawConfig):
    """Everything that decides what `texforce eval` measures."""

    benchmark: str = option(
        "drawbench, parti, hps, imagereward, world, another shipped prompt set, or a file with `prompt` and "
        "perhaps `category` in each row: .txt, .jsonl, .json, .csv, .tsv, .parquet (default: world for tiny, else "
        "drawbench)"
    )
    adapter: Texts | None = option(
        "[NAME=]PATH[:SCALE], compared with the base model; repeatable; what has one NAME is drawn together", None
    )
    unet: Texts | None = option("[NAME=]PATH[:SCALE], likewise; " + UNET_HELP, None)
    reward: Rewards = option(
        "measures, as --reward of train, several as hps,clip or by repeating it; the first one chooses the best "
        "strength (default: hps; for world alignment too)"
    )
    reward_checkpoint: Texts | None = option("NAME=PATH, weights of a scorer; repeatable; as in train", None)
    reward_timeout: Seconds = option("seconds after which a function or a server that gives no scores is given up", 600.0)
    exact_preprocessing: bool = option(
        "resize images for the scorers as their own code does, on 8 bits, for figures beside published ones; else as in "
        "training, on floats (docs/rewards.md)",
        False,
    )
    strength: str | None = option(
        "strengths to try of every system, as 0,0.5,1: the best one on half of the prompts is measured on the other half",
        None,
    )
    num_images: Count = option("images for each prompt", 4)
    limit: Count | None = option("so many of the prompts, from all over the benchmark", None)
    seed: Seed = option("of the noise; every system gets the same, prompt by prompt", 0)
    output_dir: str = option("where images, results and the report go; an interrupted evaluation there goes on", "eval")
    overwrite: bool = option("remove the evaluation in the output folder, and begin anew", False)
    systems: tuple[System, ...] = derived(())  # compared with the base model, by their names
    strengths: tuple[float, ...] = derived(())  # to try of every system; none where they are as given
    measures: tuple[str, ...] = derived(())  # each as `rewards.load_reward` takes it


EvalOptions = options_of(EvalConfig)


def resolve_eval(options: Options) -> EvalConfig:
    """The configuration of `texforce eval`: the options, and else the adapters' runs or the model's defaults.

    Raises:
        InputError: options do not fit each other, or an adapter's folder is nonsense.
    """
    given = given_values(options)
    for spec in parse_measures(given.get("reward", ())):
        check_reward(spec)
    systems = _with_steps(parse_systems(given.get("adapter", ()), given.get("unet", ())), given)
    strengths = parse_strengths(given["strength"]) if "strength" in given else ()
    for system in systems:
        if len(system.unets) > 1:
            raise InputError(f"unet: {system.name} has {len(system.unets)}; a system takes one, give the others names")
    if strengths and not systems:
        raise InputError("strength: works only together with --adapter or --unet")
    values = _drawing(given, systems)
    benchmark = given.get("benchmark", "world" if values["model"] in EMBEDDED else "drawbench")
    usual = ["hps", "alignment", "alignment_exact"] if benchmark == "world" else ["hps"]
    values |= {"benchmark": benchmark, "reward": given.get("reward") or usual}
    values |= {"systems": systems, "strengths": strengths, "measures": parse_measures(values["reward"])}
    return EvalConfig(**values)


def parse_systems(adapters: Sequence[str], unets: Sequence[str]) -> tuple[System, ...]:
    """The systems of `[NAME=]PATH[:SCALE]`; what has one given name is one system.

    Raises:
        InputError: a name is missing or unusable, or comes twice without having been given.
    """
    systems: dict[str, System] = {}
    given: dict[str, bool] = {}
    for kind, specs in (("adapters", adapters), ("unets", unets)):
        for spec in specs:
            name, path, scale = parse_named(spec)
            own = name or Path(path).absolute().name.removesuffix(".safetensors")
            if not NAME.fullmatch(own) or own.lower() == BASE:
                raise InputError(f"adapter: give a name, of letters, digits, - and _, as NAME={path}; not {own!r}")
            if own in systems and not (name and given[own]):
                raise InputError(f"adapter: {own!r} comes twice; give names, as NAME={path}")
            given[own] = bool(name)
            system = systems.get(own, System(own))
            terms: dict[str, Any] = {kind: (*getattr(system, kind), (path, scale))}
            systems[own] = replace(system, **terms)
    return tuple(systems.values())


def parse_named(spec: str) -> tuple[str, str, float]:
    """Name, path and weight of [NAME=]PATH[:WEIGHT]; the name is empty where it is not given."""
    name, equals, rest = spec.partition("=")
    path, weight = parse_weighted(spec)
    if equals and NAME.fullmatch(name) and not Path(path).exists():
        return name, *parse_weighted(rest)
    return "", path, weight


def parse_strengths(text: str) -> tuple[float, ...]:
    """The strengths of `0,0.5,1`.

    Raises:
        InputError: not numbers, or one twice.
    """
    try:
        strengths = tuple(float(part) for part in text.split(","))
    except ValueError:
        strengths = (math.nan,)
    if not all(map(math.isfinite, strengths)) or len({f"{strength:g}" for strength in strengths}) < len(strengths):
        raise InputError(f"strength: must be different numbers, as 0,0.5,1; not {text!r}")
    return strengths


def parse_measures(specs: Sequence[str]) -> tuple[str, ...]:
    """The rewards of `--reward hps,clip --reward jpeg=0.1`, each as `rewards.load_reward` takes it.

    Raises:
        InputError: one is empty or comes twice.
    """
    measures = tuple(part.strip() for spec in specs for part in ([spec] if "=" in spec else spec.split(",")))
    if "" in measures or len(set(measures)) < len(measures):
        raise InputError(f"reward: must be different names, as hps,clip; not {','.join(measures)!r}")
    return measures
