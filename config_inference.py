"""Configuration of what uses a trained adapter: sampling, merging and evaluation.

This file imports nothing heavy, so that the command line can show its help at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from texforce.config import (
    PRESETS,
    TrainConfig,
    check_choices,
    check_precision,
    check_seed,
    check_types,
    default_device,
    default_model,
    family,
    option,
    read_json,
)

SETTINGS = "texforce.json"  # what `texforce merge` says of how its output is to be sampled
ADAPTER_HELP = (
    "output folder of a training, or a LoRA file or folder of any layout; PATH:WEIGHT weights it; repeatable, summed"
)
UNET_SCALE_HELP = "strength of that U-Net's change: 0 is the base model's, 1 as it was tuned"
UNET_HELP = "a U-Net tuned elsewhere: a LoRA file, a diffusers U-Net or a single-file checkpoint"


@dataclass(frozen=True)
class SampleConfig:
    """Everything that decides what `texforce sample` draws."""

    adapter: list[str] | None = option(None, ADAPTER_HELP)
    unet: str | None = option(None, UNET_HELP)
    unet_scale: float = option(1.0, UNET_SCALE_HELP)
    prompt: list[str] | None = option(None, "what to draw; repeatable")
    prompts: str | None = option(None, "a file, one prompt a line, or the name of a shipped set")
    model: str = option(None, "'tiny', a diffusers folder or a hub name (default: the adapter's, else as in training)")
    output_dir: str = option("samples", "where the images go; their numbers go on from those already there")
    num_images: int = option(4, "images for each prompt")
    seed: int = option(0, "of the first image; the next has the next seed")
    scale: float = option(1.0, "strength of the adapter: 0 is the base model, 1 as trained")
    compare: bool = option(False, "also draw the base model's images from the same noise")
    num_inference_steps: int = option(None, "DDIM steps (default: the adapter's)")
    eta: float = option(None, "randomness of the DDIM steps, 0 to 1 (default: the adapter's, else 1)")
    guidance_scale: float = option(None, "classifier-free guidance (default: the adapter's)")
    resolution: int | None = option(None, "pixels of a side (default: what the U-Net was made for)")
    batch_size: int = option(16, "images drawn at a time")
    mixed_precision: str = option(None, "no, fp16 or bf16 (default: fp16 on CUDA, else no)")
    compile: bool | None = option(None, "compile the denoising step (default: on CUDA)")
    null_prompt: str = option(None, "adapted or base (default: the adapter's)")


def parse_weighted(spec: str) -> tuple[str, float]:
    """Path and weight of PATH:0.7; without a weight it is 1.

    Raises:
        ValueError: the weight is not finite.
    """
    path, colon, text = spec.rpartition(":")
    if not colon or Path(spec).exists():
        return spec, 1.0
    try:
        weight = float(text)
    except ValueError:
        return spec, 1.0  # a colon in a path
    if not math.isfinite(weight):
        raise ValueError(f"adapter: the weight in {spec!r} must be a finite number")
    return path, weight


def resolve_sample(config: SampleConfig) -> SampleConfig:
    """Fill in what is None from the adapter's run, or else from the model's defaults, and check every value.

    Raises:
        ValueError, FileNotFoundError: an option has a value that cannot be used.
    """
    check_types(config)
    if not config.prompt and not config.prompts:
        raise ValueError("prompt: give --prompt or --prompts")
    if not config.adapter and config.scale != 1:
        raise ValueError("adapter: --scale is about an adapter; give --adapter")
    if not config.unet and config.unet_scale != 1:
        raise ValueError("unet_scale: it is about a U-Net; give --unet")
    if not config.adapter and not config.unet and config.compare:
        raise ValueError("adapter: --compare needs something to compare; give --adapter or --unet")
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
            raise ValueError(f"{name}: must be at least 1, not {getattr(config, name)}")
    if config.guidance_scale < 0:
        raise ValueError(f"guidance_scale: must not be negative, not {config.guidance_scale}")
    check_seed(config)
    check_choices(config)
    check_precision(config, device)
    return config


def _run_files(config: SampleConfig | MergeConfig) -> list[Path]:
    """Where a training, or a merge, says how the adapters, the U-Net and the model that are given are to be sampled."""
    paths = [parse_weighted(spec)[0] for spec in config.adapter or ()]
    paths += [path for path in (config.unet, config.model) if path]
    return [Path(path) / name for path in paths for name in ("config.json", SETTINGS)]


def sampling_settings(config: SampleConfig | MergeConfig) -> dict[str, Any]:
    """How adapters, a U-Net and a model were trained to be sampled, as far as they say it."""
    return _read_runs(_run_files(config), config)


def _read_runs(paths: list[Path], config: SampleConfig | MergeConfig) -> dict[str, Any]:
    """What is taken over from the config.json of adapters' runs, where there is one.

    Raises:
        ValueError: a file is nonsense, or runs disagree in what the command line does not decide.
    """
    runs: dict[str, Any] = {}
    for path in paths:
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
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        for name, value in run.items():
            if runs.setdefault(name, value) != value and getattr(config, name, value) is None:
                raise ValueError(f"{name}: the adapters were trained with {runs[name]!r} and {value!r}; say which to use")
    return runs


@dataclass(frozen=True)
class MergeConfig:
    """Everything that decides what `texforce merge` writes."""

    adapter: list[str] | None = option(None, ADAPTER_HELP)
    unet: str | None = option(None, UNET_HELP)
    unet_scale: float = option(1.0, UNET_SCALE_HELP)
    model: str = option(None, "'tiny', a diffusers folder or a hub name (default: the adapter's, else as in training)")
    format: str = option(
        "pipeline",
        "pipeline (a diffusers folder) or checkpoint (one file), all baked in; or LoRA alone: peft, diffusers, kohya",
    )
    output: str = option("merged", "the folder to write")
    overwrite: bool = option(False, "replace the output if it exists")


def resolve_merge(config: MergeConfig) -> MergeConfig:
    """Fill in the model, and check every value.

    Raises:
        ValueError: an option has a value that cannot be used.
    """
    check_types(config)
    check_choices(config)
    if not config.adapter and not config.unet:
        raise ValueError("adapter: there is nothing to merge; give --adapter, --unet or both")
    if config.unet_scale != 1 and not config.unet:
        raise ValueError("unet_scale: it is about a U-Net; give --unet")
    if not config.output.strip("./ "):
        raise ValueError(f"output: must name a folder to be made, not {config.output!r}")
    model = config.model or sampling_settings(config).get("model") or default_model(default_device())
    return replace(config, model=model)
