"""What each preset sets, for the tiny model and for each family of models; config.py has the other defaults.

Findings on the tiny model are not carried to Stable Diffusion. Its default takes learning rate, clip range and steps from
the authors' code (arXiv:2311.15657), and the guidance of 7.5 from their unused configuration file; the grouping, the batch
shape and the constant rate are ours. The preset `paper` is the recipe as their code runs it.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from .errors import ArtifactError, InputError
from .files import read_json

EMBEDDED = ("tiny", "tiny-flow")  # models that come with texforce: the tiny world as Stable Diffusion and as SD 3 have it
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
# Steps and guidance of families that no published recipe of TexForce is for: those of their pipelines in diffusers, but
# FLUX.1's guidance of its model card. Their default is `fast`, whose figures are from SD 3.5.
_OTHERS: dict[str, dict[str, Any]] = {
    "sd3": {"sampler": "euler", "num_inference_steps": 28, "guidance_scale": 7.0},
    "flux": {"sampler": "euler", "num_inference_steps": 28, "guidance_scale": 3.5},
    "sana": {"sampler": "euler", "num_inference_steps": 20, "guidance_scale": 4.5},
    "pixart": {"num_inference_steps": 20, "guidance_scale": 4.5},
}
_ALL = ("default", "ppo", "paper", "fast", "gradient")
for _preset in _ALL:
    PRESETS["turbo", _preset] = PRESETS["stable-diffusion", _preset] | _TURBO
    PRESETS["sdxl", _preset] = PRESETS["stable-diffusion", _preset] | _SDXL
    for _family, _own in _OTHERS.items():
        if _preset == "paper":  # there is none
            continue
        _as = "fast" if _preset == "default" else _preset
        _settings = PRESETS["stable-diffusion", _as] | _SDXL | _own
        if _family == "pixart" and _settings["algorithm"] != "ppo":
            _settings["sampler"] = "dpm-solver"  # its pipeline's, for which the steps are
        PRESETS[_family, _preset] = _settings
        PRESETS[f"{_family}-turbo", _preset] = _settings | _TURBO

# As many updates from an image as are worth their time: it is worse at drawing than tiny, and learns more slowly.
_FLOW_FAST = {"num_epochs": 56, "num_inner_epochs": 4, "num_updates_per_epoch": 2, "eval_every": 14}
for _preset in _ALL:
    PRESETS["tiny-flow", _preset] = PRESETS["tiny", _preset] | {"sampler": "euler", "null_prompt": "adapted"}
    PRESETS["tiny-flow", _preset] |= {"text_encoders": ["text_encoder", "text_encoder_2", "text_encoder_3"]}
    PRESETS["tiny-flow", _preset] |= {"guidance_scale": 4.0}  # draws most prompts right in 8 steps, among 2 to 6
    if _preset in ("default", "fast"):
        PRESETS["tiny-flow", _preset] |= _FLOW_FAST

DISTILLED = re.compile(r"turbo|schnell|lightning|lcm|hyper-?sd|sprint|dmd", re.IGNORECASE)  # in names: to few steps
# Parts of the names of pipelines' classes, and of models on the hub, with the preset that they take.
_PIPELINES = {"StableDiffusion3": "sd3", "Flux": "flux", "Sana": "sana", "PixArt": "pixart"}
_NAMES = {"stable-diffusion-3": "sd3", "sd3": "sd3", "flux": "flux", "sana": "sana", "pixart": "pixart"}


def family(model: str) -> str:
    """The preset that a model takes, since presets are needed before anything is loaded.

    A folder is known by the class of its pipeline, a .safetensors file by its header, anything else by its name: to look
    into a .ckpt its weights would have to be read.
    """
    if model in EMBEDDED:
        return model
    held = _held_by(Path(model))
    if held in EMBEDDED:
        return held
    pipeline, name = _pipeline_class(model), Path(model).name.lower()
    known = [found for start, found in _PIPELINES.items() if pipeline.startswith(start)]
    known += [found for part, found in _NAMES.items() if not pipeline and not held and part in name]
    if known:
        return f"{known[0]}-turbo" if DISTILLED.search(name) else known[0]
    if DISTILLED.search(name):
        return "turbo"
    is_xl = pipeline.startswith("StableDiffusionXL") or (not pipeline and "xl" in name)
    return held or ("sdxl" if is_xl else "stable-diffusion")


def _held_by(file: Path) -> str:
    """The preset of what a checkpoint of one file holds, by its header; empty where it does not say it."""
    if file.suffix != ".safetensors" or not file.is_file():
        return ""
    from . import single_file

    with contextlib.suppress(InputError, ArtifactError):  # what is wrong with it is said where it is loaded
        base = single_file.base_model(single_file.header_of(file))
        if base in EMBEDDED:
            return base
        if architecture := single_file.architecture_of(single_file.shapes_of(file)):
            return "sdxl" if architecture["pipeline"] == "StableDiffusionXLPipeline" else "stable-diffusion"
    return ""


def is_flow(model: str) -> bool:
    """Whether a model is one of flow matching, as far as its name or folder says it."""
    return PRESETS[family(model), "default"].get("sampler") == "euler"


def model_file(model: str, name: str) -> Path:
    """Where a file of a model is, in its folder or in the hub's cache; perhaps it is not there."""
    path = Path(model, name)
    if model.count("/") == 1 and not path.is_file():
        from huggingface_hub import try_to_load_from_cache

        with contextlib.suppress(ValueError):  # no name of the hub
            cached = try_to_load_from_cache(model, name)
            path = Path(cached) if isinstance(cached, str) else path
    return path


def _pipeline_class(model: str) -> str:
    """The pipeline's class in a model's folder or in the hub's cache; empty where there is none or it cannot be read."""
    path = model_file(model, "model_index.json")
    try:
        return str(read_json(path).get("_class_name", "")) if path.is_file() else ""
    except (InputError, AttributeError):
        return ""


def preset_for(family: str, preset: str, algorithm: str | None) -> dict[str, Any]:
    """The settings of a preset; of the default one, those for the algorithm that is given.

    Raises:
        InputError: the preset is another algorithm's, or of no use for the family.
    """
    if (family, preset) not in PRESETS:
        raise InputError(f"preset: {preset} is a recipe for Stable Diffusion 1.x to XL; for this model take default or fast")
    usual = PRESETS[family, preset]["algorithm"]
    if algorithm in (None, usual):
        return PRESETS[family, preset]
    if preset != "default":
        raise InputError(f"algorithm: --preset {preset} is a recipe of {usual}, not of {algorithm}; leave one of them out")
    return PRESETS[family, {"ppo": "ppo", "matching": "fast", "gradient": "gradient"}[algorithm]]


def sampler_defaults(sampler: str, family: str, algorithm: str = "") -> dict[str, Any]:
    """Settings that a sampler has of its own, instead of a preset's.

    DPM-Solver++ needs 15 to 20 steps of Stable Diffusion (arXiv:2211.01095). The tiny model's few steps, and those that a
    turbo model was distilled to, stay. Flow matching is random for ppo alone, as far as Flow-GRPO has it (arXiv:2505.05470).
    """
    if sampler == "ddim":
        return {}
    if sampler != "dpm-solver":
        return {"eta": 0.7 if algorithm == "ppo" else 0.0}
    return {"eta": 0.0} | ({"num_inference_steps": 20} if family in ("stable-diffusion", "sdxl") else {})
