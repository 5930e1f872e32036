"""What each preset sets, for the tiny model and for each family of Stable Diffusion; config.py has the other defaults.

Findings on the tiny model are not carried to Stable Diffusion. Its default takes learning rate, clip range and steps from
the authors' code (arXiv:2311.15657), and the guidance of 7.5 from their unused configuration file; the grouping, the batch
shape and the constant rate are ours. The preset `paper` is the recipe as their code runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import InputError

_TINY = {
    "prompts": "world",
    "num_epochs": 140,
    "guidance_scale": 3.0,
    "micro_batch_size": 128,
    "sample_batch_size": 128,
    "eval_every": 20,
    "checkpoint_every": 10,
}
_SD = {
    "prompts": "general",
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
# As the released code runs with ImageReward's prompts: 51,200 images, 1,600 updates, warm-up over 3 % of them; DDIM and
# Adam are trl 0.9.6's. Ours: the prompts (theirs are `--prompts imagereward`), drawn without replacement, and one gradient
# for several processes.
_PAPER = (
    _PUBLISHED
    | {"algorithm": "ppo", "num_samples_per_prompt": 1, "advantages": "per-prompt", "guidance_scale": 5.0}
    | {"num_epochs": 50, "num_prompts_per_epoch": 1024, "num_updates_per_epoch": 32}
    | {"lr_scheduler": "cosine", "lr_warmup_steps": 48}
)
# Models distilled to few steps without guidance, as SD-Turbo and SDXL-Turbo (arXiv:2311.17042): all steps are trained.
_TURBO = {"num_inference_steps": 4, "guidance_scale": 0.0, "timestep_fraction": 1.0}
_SDXL = {"micro_batch_size": 2, "sample_batch_size": 2}  # of 1024x1024, four times the pixels
_GROUPS = {"num_samples_per_prompt": 8, "advantages": "leave-one-out"}
_TINY_STEPS = {"num_inference_steps": 8, "lr_scheduler": "cosine", "max_grad_norm": 5e-3, "ema_decay": 0.9}
# Options of ppo; the other algorithms ignore them.
_PPO = {"timestep_window": 0.5, "timestep_fraction": 1.0, "clip_range": 5e-3}
_TINY_FAST = (
    _TINY
    | _TINY_STEPS
    | _PPO
    | {"algorithm": "matching", "advantages": "leave-one-out", "null_prompt": "adapted", "null_anchor": 1.0}
    | {"num_epochs": 64, "num_prompts_per_epoch": 32, "num_samples_per_prompt": 4, "num_updates_per_epoch": 1}
    | {"num_inner_epochs": 2, "num_noise_levels": 2, "kl_weight": 1.5, "imitation_weight": 0.5}
    | {"learning_rate": 2e-3, "lr_warmup_steps": 5, "rank": 64, "eval_every": 16, "prompts": "world,common"}
)
# Rate, KL weight, clipping and norm are those of DiffusionNFT's published code for SD 3.5 (arXiv:2509.16117); nobody has
# measured them on Stable Diffusion 1.x to XL yet.
_SD_FAST = (
    _SD
    | _PUBLISHED
    | {"algorithm": "matching", "advantages": "leave-one-out", "null_anchor": 1.0, "kl_weight": 1e-4}
    | {"num_epochs": 80, "num_prompts_per_epoch": 8, "num_samples_per_prompt": 8, "num_inner_epochs": 2, "ema_decay": 0.9}
    | {"num_updates_per_epoch": 1, "num_inference_steps": 20}
)
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("tiny", "ppo"): _TINY
    | _GROUPS
    | _TINY_STEPS
    | _PPO
    | {
        "algorithm": "ppo",
        "num_prompts_per_epoch": 32,
        "num_updates_per_epoch": 1,
        "learning_rate": 2e-3,
        "lr_warmup_steps": 10,
        "null_prompt": "base",
    },
    ("tiny", "paper"): _TINY | _PAPER,
    ("tiny", "fast"): _TINY_FAST,
    ("tiny", "gradient"): _TINY_FAST
    | {"algorithm": "gradient", "num_epochs": 40, "num_prompts_per_epoch": 64, "num_samples_per_prompt": 1}
    | {"advantages": "per-prompt", "num_inner_epochs": 1, "kl_weight": 0.0, "imitation_weight": 0.0}
    | {"prompts": "world", "rank": 16, "eval_every": 10, "micro_batch_size": 32},
    ("stable-diffusion", "ppo"): _SD | _PUBLISHED | _GROUPS | {"algorithm": "ppo", "num_prompts_per_epoch": 8},
    ("stable-diffusion", "paper"): _SD | _PAPER,
    ("stable-diffusion", "fast"): _SD_FAST,
    ("stable-diffusion", "gradient"): _SD_FAST
    | {"algorithm": "gradient", "kl_weight": 0.0, "num_prompts_per_epoch": 64, "num_samples_per_prompt": 1}
    | {"advantages": "per-prompt", "num_inner_epochs": 1},
}
PRESETS["tiny", "default"] = PRESETS["tiny", "fast"]
PRESETS["stable-diffusion", "default"] = PRESETS["stable-diffusion", "ppo"]
for _preset in ("default", "ppo", "paper", "fast", "gradient"):
    PRESETS["turbo", _preset] = PRESETS["stable-diffusion", _preset] | _TURBO
    PRESETS["sdxl", _preset] = PRESETS["stable-diffusion", _preset] | _SDXL


def family(model: str) -> str:
    """The preset that a model takes, by its name, since presets are needed before anything is loaded."""
    if model == "tiny":
        return "tiny"
    name = Path(model).name.lower()
    return "turbo" if "turbo" in name else "sdxl" if "xl" in name else "stable-diffusion"


def preset_for(family: str, preset: str, algorithm: str | None) -> dict[str, Any]:
    """The settings of a preset; of the default one, those for the algorithm that is given.

    Raises:
        InputError: the preset is another algorithm's.
    """
    usual = PRESETS[family, preset]["algorithm"]
    if algorithm in (None, usual):
        return PRESETS[family, preset]
    if preset != "default":
        raise InputError(f"algorithm: --preset {preset} is a recipe of {usual}, not of {algorithm}; leave one of them out")
    return PRESETS[family, {"ppo": "ppo", "matching": "fast", "gradient": "gradient"}[algorithm]]


def sampler_defaults(sampler: str, family: str) -> dict[str, Any]:
    """Settings that a sampler has of its own, instead of a preset's.

    DPM-Solver++ needs 15 to 20 steps of Stable Diffusion (arXiv:2211.01095). The tiny model's few steps, and those that a
    turbo model was distilled to, stay.
    """
    if sampler == "ddim":
        return {}
    return {"eta": 0.0} | ({"num_inference_steps": 20} if family in ("stable-diffusion", "sdxl") else {})
