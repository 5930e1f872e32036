"""Adapters and tuned U-Nets on a model: fused exactly, put on as LoRA that can be switched off, or baked in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from texforce import ldm, sampler
from texforce.checkpoints import ArtifactError, read_tensors
from texforce.config import parse_weighted
from texforce.lora import Adapter, Layer, find_files, read_adapter
from texforce.sampler import Models

PROBE = "a photo of a red cube on a blue sphere"


# --- fusion ---


def fuse(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """The adapter that changes the weights by the weighted sum of what each changes.

    The factors are put side by side, so the sum is exact and its rank the sum of theirs. What has weight 0 is left out, and
    a single one of weight 1 stays as it is.
    """
    gathered: dict[str, dict[str, list[tuple[Layer, float]]]] = defaultdict(lambda: defaultdict(list))
    for adapter, weight in adapters:
        if weight != 0:
            for part, layers in adapter.items():
                for name, layer in layers.items():
                    gathered[part][name].append((layer, weight))
    return {part: {name: _join(terms) for name, terms in layers.items()} for part, layers in gathered.items()}


def _join(terms: Sequence[tuple[Layer, float]]) -> Layer:
    if len(terms) == 1 and terms[0][1] == 1:
        return terms[0][0]
    ndim = max(layer.down.ndim for layer, _ in terms)
    down = torch.cat([_with_ndim(layer.down.float(), ndim) for layer, _ in terms])
    up = torch.cat([weight * layer.scale * _with_ndim(layer.up.float(), ndim) for layer, weight in terms], dim=1)
    return Layer(down, up, float(len(down)))


def _with_ndim(matrix: Tensor, ndim: int) -> Tensor:
    """A matrix as that of a convolution of 1 x 1, where others are."""
    return matrix if matrix.ndim == ndim else matrix[..., None, None]


# --- application ---


def load_adapters(models: Models, specs: Sequence[str], scale: float = 1.0) -> Models:
    """Put the sum of adapters, each PATH or PATH:WEIGHT, times a scale, on models as LoRA that can be switched off.

    Raises:
        FileNotFoundError, ValueError, ArtifactError: as `parse_weighted`, `read_adapter` and `apply`.
    """
    terms = [(read_adapter(path, models), weight * scale) for path, weight in map(parse_weighted, specs)]
    return apply(models, fuse(terms))


def apply(models: Models, adapter: Adapter) -> Models:
    """Put an adapter on models as LoRA that can be switched off.

    Raises:
        ArtifactError: the embedding of a prompt, or the U-Net, does not change.
    """
    check_changes(adapter)
    adapted = replace(models, **{part: _add_lora(getattr(models, part), layers) for part, layers in adapter.items()})
    if "text_encoder" in adapter:
        prompt_ids = sampler.tokenize(models.tokenizer, [PROBE]).to(models.device)
        with torch.no_grad():
            tuned = sampler.encode(adapted, prompt_ids)
            with sampler.adapters_disabled(adapted):
                base = sampler.encode(adapted, prompt_ids)
        if torch.equal(tuned, base):
            raise ArtifactError("adapter: it is loaded, and the embedding of a prompt does not change")
    for part in adapter:
        getattr(adapted, part).requires_grad_(False)  # switching peft's adapters on again makes them trainable
    return adapted


def check_changes(adapter: Adapter) -> None:
    for part, layers in adapter.items():
        if not any(layer.up.any() and layer.down.any() for layer in layers.values()):
            raise ArtifactError(f"adapter: it changes nothing in the {part}: all its matrices are zero")


def lora_config(layers: Mapping[str, Layer]) -> dict[str, Any]:
    """The fields of peft's LoraConfig for layers by name; ranks and alphas other than the first one's go by the name."""
    first = next(iter(layers.values()))
    return {
        "r": first.rank,
        "lora_alpha": first.alpha,
        "target_modules": sorted(layers),
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != first.rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != first.alpha},
    }


def lora_tensors(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """By peft's names."""
    named = {}
    for name, layer in layers.items():
        named[f"{name}.lora_A.weight"] = layer.down.contiguous()
        named[f"{name}.lora_B.weight"] = layer.up.contiguous()
    return named


def named_as_in(module: nn.Module, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Layers by the names of the module itself, which has `text_model.` in some versions of transformers."""
    prefix = "text_model." if hasattr(module, "text_model") else ""
    return {prefix + name: layer for name, layer in layers.items()}


def _add_lora(module: nn.Module, layers: Mapping[str, Layer]) -> Any:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    named = named_as_in(module, layers)
    adapted = get_peft_model(module, LoraConfig(**lora_config(named)))
    tensors = {f"base_model.model.{name}": tensor.float() for name, tensor in lora_tensors(named).items()}
    result = set_peft_model_state_dict(adapted, tensors)
    lora = {name for name, _ in adapted.named_parameters() if ".lora_" in name}
    if result.unexpected_keys or len(lora) != len(tensors):
        raise RuntimeError(f"peft took {len(lora)} of {len(tensors)} tensors")  # it would be a change in peft
    return adapted.requires_grad_(False).eval()


# --- U-Nets ---


@dataclass(frozen=True)
class TunedUNet:
    """What a file holds for a U-Net: LoRA, or all its tensors by diffusers' names; the other is empty."""

    adapter: Adapter
    tensors: dict[str, Tensor]


def read_unet(path: str | Path, models: Any) -> TunedUNet:
    """LoRA as in `read_adapter`, a diffusers U-Net (a file, its folder, a pipeline's) or a single-file checkpoint.

    Raises:
        FileNotFoundError, ArtifactError: as `read_adapter`; or there is LoRA for a text encoder in it, or the tensors are
            another U-Net's, or all equal to this one's.
    """
    path = Path(path)
    if path.is_dir():
        for folder in (path, path / "unet"):
            for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
                if (folder / name).is_file():
                    tensors = read_tensors(folder / name, "a U-Net")
                    return TunedUNet({}, _whole_unet(tensors, models.unet, folder / name))
    for file in find_files(path):
        if file.config is None:
            tensors = read_tensors(file.path, "a U-Net")
            if any(key.startswith(ldm.UNET) for key in tensors):
                return TunedUNet({}, _whole_unet(ldm.unet_tensors(tensors, models.unet), models.unet, file.path))
            if "conv_in.weight" in tensors:
                return TunedUNet({}, _whole_unet(tensors, models.unet, file.path))
    adapter = read_adapter(path, models)
    if foreign := [part for part in adapter if part != "unet"]:
        raise ArtifactError(f"{path}: it holds LoRA for the {foreign[0]}; give it with --adapter")
    check_changes(adapter)
    return TunedUNet(adapter, {})


def _whole_unet(tensors: dict[str, Tensor], unet: nn.Module, path: Path) -> dict[str, Tensor]:
    own = unet.state_dict()
    both = own.keys() & tensors.keys()
    wrong = (own.keys() ^ tensors.keys()) | {key for key in both if own[key].shape != tensors[key].shape}
    if wrong:
        raise ArtifactError(
            f"{path}: another U-Net: {len(wrong)} tensors are missing, foreign or misshapen, as {min(wrong)}"
        )
    if bad := next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise ArtifactError(f"{path}: the tensor {bad} holds values that are not finite")
    if all(torch.equal(tensor.to(own[key].dtype), own[key].cpu()) for key, tensor in tensors.items()):
        raise ArtifactError(f"{path}: it is this very U-Net, so that it changes nothing")
    return tensors


@torch.no_grad()
def bake(module: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Add what LoRA changes to a module's own weights, in float32."""
    modules: dict[str, Any] = {name.removeprefix("text_model."): layer for name, layer in module.named_modules()}
    for name, layer in layers.items():
        weight = modules[name].weight
        delta = layer.delta().to(weight.device).reshape(weight.shape)
        weight.copy_((weight.float() + delta).to(weight.dtype))


@torch.no_grad()
def move_towards(module: nn.Module, tensors: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Move a module's weights to given ones: 0 stays, 1 arrives."""
    for name, weight in module.state_dict().items():
        target = tensors[name].to(weight.device)
        weight.copy_(target if scale == 1 else weight.float() + scale * (target.float() - weight.float()))
