"""Adapters and tuned U-Nets on a model: fused exactly, put on as LoRA that can be switched off, or baked in."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from texforce import ldm, pipelines
from texforce.checkpoints import ArtifactError, read_finite
from texforce.config_inference import System, parse_weighted
from texforce.lora import Adapter, Layer, find_files, read_adapter
from texforce.pipelines import Models

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
    down = torch.cat([layer.down.float() for layer, _ in terms])
    up = torch.cat([weight * layer.scale * layer.up.float() for layer, weight in terms], dim=1)
    return Layer(down, up, float(len(down)))


# --- application ---


def check_inputs(system: System) -> None:
    """See that there is something to read, before any model is loaded.

    Raises:
        FileNotFoundError: there is not. ArtifactError: an adapter's configuration cannot be honoured.
    """
    for path, _ in system.adapters:
        find_files(Path(path))
    for path, _ in system.unets:
        if not Path(path).exists():
            raise FileNotFoundError(f"unet: there is no file or folder {path!r}")


def adapter_files(path: Path) -> list[Path]:
    """The files that decide what an adapter is.

    Raises:
        FileNotFoundError, ArtifactError: as `lora.find_files`.
    """
    found = [file.path for file in find_files(path)]
    configs = [file.with_name("adapter_config.json") for file in found]
    return [*found, *(config for config in configs if config.is_file())]


def unet_files(path: Path) -> list[Path]:
    """The files that decide what a tuned U-Net is; raises what `adapter_files` does."""
    whole = [file for file in (unet_file(path), unet_file(path / "unet")) if file]
    return whole[:1] or adapter_files(path)


def put_on(models: Models, system: System) -> Models:
    """Models with a system's adapters and U-Net on copies of the parts that they change; those given stay as they are.

    Raises:
        FileNotFoundError, ArtifactError: as `read_terms`, `read_unet` and `apply`.
    """
    terms = read_terms(system.adapters, models)
    changed: dict[str, Any] = {}
    for path, weight in system.unets:
        unet = read_unet(path, models)
        terms.append((unet.adapter, weight))
        if unet.tensors:
            changed["unet"] = copy.deepcopy(models.unet)
            move_towards(changed["unet"], unet.tensors, weight)
    adapter = fuse(terms)
    for part in adapter.keys() - changed.keys():
        changed[part] = copy.deepcopy(getattr(models, part))
    return apply(replace(models, **changed), adapter)


def load_adapters(models: Models, specs: Sequence[str], scale: float = 1.0) -> Models:
    """Put the sum of adapters, each PATH or PATH:WEIGHT, times a scale, on models as LoRA that can be switched off.

    Raises:
        FileNotFoundError, ValueError, ArtifactError: as `read_terms` and `apply`.
    """
    return apply(models, fuse(read_terms([(path, weight * scale) for path, weight in map(parse_weighted, specs)], models)))


def read_terms(weighted: Sequence[tuple[str, float]], models: Any) -> list[tuple[Adapter, float]]:
    """Adapters, each given as path and weight.

    Raises:
        FileNotFoundError, ArtifactError: as `read_adapter`; or one changes nothing.
    """
    terms = []
    for path, weight in weighted:
        adapter = read_adapter(path, models)
        check_changes(adapter, path)
        terms.append((adapter, weight))
    return terms


def check_changes(adapter: Adapter, path: str | Path) -> None:
    for part, layers in adapter.items():
        if not any(layer.delta().any() for layer in layers.values()):
            raise ArtifactError(f"{path}: it changes nothing in the {part}")


def apply(models: Models, adapter: Adapter) -> Models:
    """Put an adapter on models as LoRA that can be switched off.

    Raises:
        ArtifactError: the embedding of a prompt does not change.
    """
    check_embeddings(models, adapter)
    return replace(models, **{part: _add_lora(getattr(models, part), layers) for part, layers in adapter.items()})


def check_embeddings(models: Any, adapter: Adapter) -> None:
    """See that an adapter changes what each text encoder that it is for says.

    Raises:
        ArtifactError: it does not.
    """
    for part, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if part in adapter:
            check_embedding(getattr(models, tokenizer), getattr(models, part), adapter[part])


@torch.no_grad()
def check_embedding(tokenizer: Any, text_encoder: Any, layers: Mapping[str, Layer]) -> None:
    """See that layers change the embedding of a prompt.

    Raises:
        ArtifactError: they do not.
    """
    tuned = copy.deepcopy(text_encoder)
    bake(tuned, layers)
    prompt_ids = pipelines.tokenize(tokenizer, [PROBE]).to(text_encoder.device)
    base, changed = (encoder(input_ids=prompt_ids).last_hidden_state for encoder in (text_encoder, tuned))
    if torch.equal(base, changed):
        raise ArtifactError("adapter: it is loaded, and the embedding of a prompt does not change")


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
    for folder in (path, path / "unet"):
        if file := unet_file(folder):
            return TunedUNet({}, _whole_unet(read_finite(file, "a U-Net"), models.unet, file))
    for found in find_files(path):
        if found.config is None:
            tensors = read_finite(found.path, "a U-Net")
            if any(key.startswith(ldm.UNET) for key in tensors):
                return TunedUNet({}, _whole_unet(ldm.unet_tensors(tensors, models.unet), models.unet, found.path))
            if "conv_in.weight" in tensors:
                return TunedUNet({}, _whole_unet(tensors, models.unet, found.path))
    adapter = read_adapter(path, models)
    if foreign := [part for part in adapter if part != "unet"]:
        raise ArtifactError(f"{path}: it holds LoRA for the {foreign[0]}; give it with --adapter")
    check_changes(adapter, path)
    return TunedUNet(adapter, {})


def unet_file(folder: Path) -> Path | None:
    """The weights in a U-Net's folder, of whatever variant (fp16, non_ema) if it is the only one."""
    for ending in ("safetensors", "bin"):
        files = sorted(folder.glob(f"diffusion_pytorch_model*.{ending}"))
        plain = folder / f"diffusion_pytorch_model.{ending}"
        if len(files) > 1 and plain not in files:
            raise ArtifactError(
                f"{folder}: it holds {len(files)} files of a U-Net, as {files[0].name}; give one that is whole"
            )
        if files:
            return plain if plain in files else files[0]
    return None


def _whole_unet(tensors: dict[str, Tensor], unet: nn.Module, path: Path) -> dict[str, Tensor]:
    own = unet.state_dict()
    both = own.keys() & tensors.keys()
    wrong = (own.keys() ^ tensors.keys()) | {key for key in both if own[key].shape != tensors[key].shape}
    if wrong:
        raise ArtifactError(
            f"{path}: another U-Net: {len(wrong)} tensors are missing, foreign or misshapen, as {min(wrong)}; see --model"
        )
    if all(_same(tensor, own[key].cpu()) for key, tensor in tensors.items()):
        raise ArtifactError(f"{path}: it is this very U-Net, so that it changes nothing")
    return tensors


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether tensors are equal, up to the rounding of the coarser one."""
    coarser = min(one, other, key=lambda tensor: tensor.element_size()).dtype
    return torch.equal(one.to(coarser), other.to(coarser))


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
