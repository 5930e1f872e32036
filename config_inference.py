"""Configuration of what uses a trained adapter: sampling, merging and evaluation.

This file imports nothing heavy, so that the command line can show its help at once.
"""

from __future__ import annotations

import math
import re
import typing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from texforce.config import (
    PRESETS,
    TrainConfig,
    check_choices,
    check_precision,
    check_seed,
    check_timeout,
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
            raise ValueError(f"{name}: must be at least 1, not {getattr(config, name)}")
    if config.guidance_scale < 0:
        raise ValueError(f"guidance_scale: must not be negative, not {config.guidance_scale}")
    check_seed(config)
    check_choices(config)
    check_precision(config, device)
    return config


def sampling_settings(config: SampleConfig | MergeConfig | EvalConfig) -> dict[str, Any]:
    """How adapters, a U-Net and a model were trained, or merged, to be sampled, as far as their folders say it.

    Raises:
        ValueError: a file is nonsense, or runs disagree in what the command line does not decide.
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
            ValueError: a name is missing or unusable, or comes twice without having been given.
        """
        parts: dict[str, System] = {}
        given: dict[str, bool] = {}
        for kind, specs in (("adapters", self.adapter), ("unets", self.unet)):
            for spec in specs or ():
                name, path, scale = parse_named(spec)
                own = name or Path(path).absolute().name.removesuffix(".safetensors")
                if not NAME.fullmatch(own) or own.lower() == BASE:
                    raise ValueError(f"adapter: give a name, of letters, digits, - and _, as NAME={path}; not {own!r}")
                if own in parts and not (name and given[own]):
                    raise ValueError(f"adapter: {own!r} comes twice; give names, as NAME={path}")
                given[own] = bool(name)
                system = parts.get(own, System(own))
                terms: dict[str, Any] = {kind: (*getattr(system, kind), (path, scale))}
                parts[own] = replace(system, **terms)
        return list(parts.values())

    @property
    def strengths(self) -> list[float]:
        """Strengths to try; none where they are as given.

        Raises:
            ValueError: not numbers, or one twice.
        """
        if self.strength is None:
            return []
        try:
            strengths = [float(text) for text in self.strength.split(",")]
        except ValueError:
            strengths = [math.nan]
        if not all(map(math.isfinite, strengths)) or len({f"{strength:g}" for strength in strengths}) < len(strengths):
            raise ValueError(f"strength: must be different numbers, as 0,0.5,1; not {self.strength!r}")
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
        ValueError, FileNotFoundError: an option has a value that cannot be used.
    """
    check_types(config)
    for system in config.systems:
        if len(system.unets) > 1:
            raise ValueError(f"unet: {system.name} has {len(system.unets)}; a system takes one, give the others names")
    if config.strengths and not config.systems:
        raise ValueError("strength: it is about adapters and U-Nets; give --adapter or --unet")
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"limit: must be at least 1, not {config.limit}")
    config = _resolve_drawing(config)
    check_timeout(config)
    benchmark = config.benchmark or ("world" if config.model == "tiny" else "drawbench")
    usual = ["hps", "alignment", "alignment_exact"] if benchmark == "world" else ["hps"]
    config = replace(config, benchmark=benchmark, reward=config.reward or usual)
    if "" in config.measures or len(set(config.measures)) < len(config.measures):
        raise ValueError(f"reward: must be different names, as hps,clip; not {','.join(config.measures)!r}")
    return config
