"""Weights in: adapters are loaded so that every tensor is used and checked, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from texforce.checkpoints import ArtifactError
from texforce.config import MAX_RANK
from texforce.sampler import Models


def load_adapter(models: Models, folder: str | Path, scale: float = 1.0) -> Models:
    """Put a trained adapter on models: the text encoder's in the folder itself, the U-Net's in its subfolder `unet`.

    The deltas of the weights are multiplied by the scale: 0 is the base model, 1 the adapter as trained.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: a part of the model has an adapter already.
        ArtifactError: the adapter is damaged, of another model, or not all of its tensors are used.
    """
    parts = find_parts(folder)
    return replace(models, **{part: _load_lora(getattr(models, part), path, scale) for part, path in parts.items()})


def find_parts(folder: str | Path) -> dict[str, Path]:
    """Where the adapters in a training's output folder lie, by the part of the model that they are for.

    Raises:
        FileNotFoundError: the folder holds no adapter.
    """
    places = {"text_encoder": Path(folder), "unet": Path(folder) / "unet"}
    parts = {part: path for part, path in places.items() if (path / "adapter_config.json").is_file()}
    if not parts:
        raise FileNotFoundError(
            f"adapter: {str(folder)!r} holds no adapter_config.json; give the output folder of a training"
        )
    return parts


def _load_lora(module: nn.Module, folder: Path, scale: float) -> Any:
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if hasattr(module, "peft_config"):
        raise ValueError(f"adapter: {str(folder)!r} is for a part of the model that has an adapter already")
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"adapter: {str(folder)!r} holds no adapter_model.safetensors")
    config = _read_config(folder / "adapter_config.json")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: not a whole safetensors file: {error}") from error
    if bad := next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise ArtifactError(f"{path}: the tensor {bad} holds values that are not finite")
    try:
        adapted = get_peft_model(module, config)
    except ValueError as error:
        raise ArtifactError(f"{folder}: made for another model: {str(error).splitlines()[0][:200]}") from error
    # peft passes over foreign keys and leaves missing ones at their random start: compare the names and shapes first.
    expected = {key: tensor.shape for key, tensor in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()}
    if wrong := {k for k in expected.keys() | tensors.keys() if k not in tensors or expected.get(k) != tensors[k].shape}:
        raise ArtifactError(f"{path}: {len(wrong)} tensors are missing, foreign or of another shape, as {min(wrong)}")
    set_peft_model_state_dict(adapted, tensors)
    for layer in adapted.modules():
        if hasattr(layer, "lora_A"):
            layer.set_scale("default", scale)
    return adapted.requires_grad_(False).eval()


def _read_config(path: Path) -> Any:
    """A LoraConfig from the fields that this project writes; others, and patterns as layer names, are refused."""
    from peft import LoraConfig

    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha, layers = raw["r"], raw["lora_alpha"], raw["target_modules"]
        kind = raw["peft_type"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a peft adapter's configuration: {type(error).__name__} {error}") from error
    # A pattern in target_modules could hang the matching; peft itself writes a plain list of names.
    if kind != "LORA" or not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise ArtifactError(f"{path}: peft_type must be LORA and target_modules a list of layer names")
    if not isinstance(rank, int) or not 1 <= rank <= MAX_RANK or not isinstance(alpha, int | float) or not 0 < alpha < 1e6:
        raise ArtifactError(f"{path}: r must be 1 to {MAX_RANK} and lora_alpha a number, not {rank!r} and {alpha!r}")
    unsupported = [
        name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save") if raw.get(name)
    ]
    if unsupported:
        raise ArtifactError(f"{path}: {unsupported[0]} is not supported")
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers)
