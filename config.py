"""Configuration of a training: what decides it, with its defaults, presets and checks.

options.py says how such records are made.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from . import model_files
from .errors import InputError, NotFoundError, near
from .options import (
    AdapterSteps,
    Algorithm,
    Count,
    Decay,
    DrawEta,
    LongPrompt,
    LoraLayers,
    Natural,
    NonNegative,
    NullPrompt,
    Options,
    Positive,
    Precision,
    Rank,
    Reward,
    Rewards,
    Sampler,
    Seconds,
    Seed,
    StepShare,
    Texts,
    check_steps,
    default_of,
    given_values,
    option,
    options_of,
    parse_steps,
    steps_inside,
    validated,
)
from .presets import EMBEDDED, family, is_flow, preset_for, sampler_defaults
from .reward_specs import NO_REWARD, check_captioner, check_gradients, check_reward, checkpoints_for

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PROMPT_FILES = "a file, one prompt a line, or a .jsonl, .json, .csv, .tsv or .parquet with `prompt` in each row"


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
    normalise_rewards: bool = option("divide each part of a mixture by the running standard deviation of its scores", False)
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
        "text encoders that get LoRA, for example text_encoder_2; repeatable (default: the CLIPs, else the only one)", None
    )
    lora_layers: LoraLayers = option(
        "blocks of each trained text encoder that get LoRA: all, first:N or last:N, which counts back from the last block "
        "that the denoiser reads",
        "all",
    )
    lora_modules: Texts | None = option(
        "projections in these blocks that get LoRA, for example q_proj; repeatable (default: those of attention)", None
    )
    adapter_steps: AdapterSteps | None = option(
        "range A-B of shares of the denoising steps, for example 0.8-1, in which the text encoder's adapter is on; outside, "
        "the base text encoder conditions the denoiser, and nothing is trained (default: all steps)",
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
    reward_timeout: Seconds = option("seconds to wait for the scores of a function or a server", 600.0)
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
        "matching: weight of self-imitation: trains also on images above the epoch's mean reward where all images of their "
        "prompt are, which keeps what the model already draws well",
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
    learning_rate: Positive = option("learning rate of AdamW")
    lr_scheduler: Literal["constant", "linear", "cosine"] = option(
        "of the learning rate after its warm-up: constant, linear or cosine (to 0)"
    )
    lr_warmup_steps: Natural = option(
        "optimizer steps over which the learning rate rises from 0: Adam's first steps are long and mostly noise; "
        "by default never over a tenth of the run"
    )
    weight_decay: NonNegative = option("weight decay of AdamW", 0.0001)
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
        "prompts whose embeddings are kept near the base model's like the null prompt's, for example your negative prompts; "
        "as --prompts takes them",
        None,
    )
    null_prompt: NullPrompt = option(
        "whether the null prompt, the empty one that guidance leads away from, goes through the adapted text encoder or the "
        "base one"
    )
    rank: Rank = option("of LoRA", 16)
    lora_alpha: Count = option("of LoRA (default: the rank)")
    ema_decay: Decay = option("average the adapter over updates with this decay; 0 is off")
    micro_batch_size: Count = option(
        "(image, step) pairs in one backward pass; affects memory, and the result only by rounding; on a GPU and in half "
        "precision the same as --sample-batch-size by default"
    )
    micro_batch: Literal["fixed", "auto"] = option(
        "fixed takes --micro-batch-size; auto, on a GPU, begins with --sample-batch-size instead, and halves it "
        "whenever an update runs out of memory",
        "fixed",
    )
    sample_batch_size: Count = option(
        "images sampled at a time; on a CPU in half precision the same as --micro-batch-size by default"
    )
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
    checkpoints_to_keep: Count = option("number of newest checkpoints to keep", 2)
    max_kl: Positive | None = option(
        "stop when the KL divergence from the base policy, before an epoch's last update, is above this", None
    )
    max_reward_drop: NonNegative = option(
        "stop when the held-out reward is so many standard deviations of the first epoch's rewards below the base model's; "
        "0 is off",
        2.0,
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = option(
        "tensorboard, wandb or trackio, besides metrics.jsonl", "none"
    )


TrainOptions = options_of(TrainConfig)


def specs_of(config: TrainConfig) -> list[str]:
    """The reward, and those that are only measured."""
    return [*([] if config.reward == NO_REWARD else [config.reward]), *(config.eval_reward or ())]


def default_device() -> str:
    """`cuda` with a GPU that PyTorch can use, else `cpu`; where there can be none, PyTorch is not loaded for that."""
    if "torch" not in sys.modules and not _may_have_gpu():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _may_have_gpu() -> bool:
    """Whether a GPU may be here: on Linux the drivers of NVIDIA, also in Windows' Linux, and AMD have files in /dev."""
    return sys.platform not in ("linux", "darwin") or any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")))


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
    if device != "cpu":
        return "bf16" if is_flow(model) else "fp16"
    if model in EMBEDDED:
        return "no"
    import torch

    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"


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
    if "torch" not in sys.modules:  # loading it takes seconds: first check what holds on every device
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
        if "," in spec and "=" not in spec:
            raise InputError(f"eval_reward: give one reward a time, and the option for each; not {spec!r}")
        check_reward(spec, "eval_reward")
    if given.get("relabel"):
        check_captioner(given["relabel"])


def _check_on_any_device(given: dict[str, Any]) -> None:
    """Raise what `_resolve_on` raises whatever the device, and the precision that follows from it."""
    failures = []
    for device in ("cpu", "cuda"):
        try:
            _resolve_on(device, {"mixed_precision": "no"} | given)
        except InputError as error:
            failures.append(error)
    if len(failures) == 2 and str(failures[0]) == str(failures[1]):
        raise failures[0]


def _resolve_on(device: str, given: dict[str, Any]) -> TrainConfig:
    """The configuration of a training on a device; raises as `resolve`."""
    model = given.get("model", default_model(device))
    preset = preset_for(family(model), given.get("preset", "default"), given.get("algorithm"))
    precision = given.get("mixed_precision") or default_precision(model, device)
    check_precision(precision, device)
    rank = given.get("rank", preset.get("rank", default_of(TrainConfig, "rank")))
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


# Options whose default follows from others.
FOLLOWING_OPTIONS = ("lora_alpha", "lr_warmup_steps", "null_prompt", "null_anchor", "sampler", "eta")
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


def num_optimizer_steps(config: TrainConfig) -> int:
    """Optimizer steps of a whole run."""
    return config.num_epochs * config.num_inner_epochs * config.num_updates_per_epoch


def window_end(config: TrainConfig) -> int:
    """The number of steps up to the end of the window, at least 1."""
    return math.ceil(config.timestep_window * config.num_inference_steps - 1e-9)  # 0.28 of 25 is 7, though rounded up


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
    elif config.relabel_weight != default_of(TrainConfig, "relabel_weight"):
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


def _check_model(config: TrainConfig) -> None:
    """Check what is asked of a model as far as its files are here; raises as the functions of model_files.py."""
    model_files.check_sides(config.model, {"resolution": config.resolution})
    facts = model_files.find_facts(config.model)
    if facts is None:
        return
    model_files.check_has_unet(config.target, facts.has_unet, config.model)
    clips = {name: text.num_positions for name, text in facts.text_encoders.items() if text.num_positions}
    if config.target == "tokens":
        model_files.check_num_tokens(config.num_tokens, clips.values(), config.model)
    model_files.check_text_encoders(config.text_encoders or (), facts.text_encoders, config.model)
    for name in config.text_encoders or clips or facts.text_encoders:
        text = facts.text_encoders[name]
        model_files.check_projections(config.lora_modules or (), text.projections, name, config.model)
        model_files.check_blocks(config.lora_layers, text.num_read, name, config.model)


def _check_together(config: TrainConfig) -> None:
    _check_algorithm(config)
    _check_model(config)
    if config.algorithm == "gradient":
        check_gradients(config.reward)
    checkpoints_for(config.model, config.reward_checkpoint, specs_of(config))
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
