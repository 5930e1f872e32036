"""Adapters: LoRA of files and learned tokens, fused exactly, put on a model or baked in, and tuned U-Nets.

Read top to bottom: learned tokens, fusion, application, tuned U-Nets. lora_files.py reads and writes the files.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import ldm, tokenization
from .draw_config import System
from .errors import ArtifactError, InputError
from .files import locate, replacing
from .lora_files import Adapter, Layer, find_files, lora_config, lora_tensors, named_as_in, read_adapter
from .model_files import most_learned
from .models import Model, family_of
from .weights import read_finite, read_shapes

PROBE = "a photo of a red cube on a blue sphere"


# --- learned tokens ---

TOKENS = "learned_embeds.safetensors"  # where diffusers looks for textual inversions in a folder
TOKEN_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # A1111's and ComfyUI's, of models with several encoders


def token_keys(model: Model) -> dict[str, str]:
    """The keys of learned tokens in a file, by the text encoders that read them."""
    if list(model.family.text) == ["text_encoder"]:
        return {"text_encoder": "emb_params"} if model.family.text["text_encoder"].is_clip else {}
    return {part: key for part, key in TOKEN_KEYS.items() if model.family.text[part].is_clip}


def token_shapes(path: str | Path) -> dict[str, list[int]]:
    """The shapes of the learned tokens in a file or folder by their keys; none if it holds something else.

    Raises:
        NotFoundError, ArtifactError: as `find_files`.
    """
    from safetensors import SafetensorError

    file, shapes = find_files(Path(path))[0].path, dict[str, list[int]]()
    if file.suffix == ".safetensors":
        with contextlib.suppress(SafetensorError):  # whoever reads it refuses it
            shapes = read_shapes(file)
    if not shapes.keys() <= {"emb_params", *TOKEN_KEYS.values()}:
        return {}
    if any(len(shape) != 2 or not shape[0] for shape in shapes.values()):
        raise ArtifactError(f"{file}: learned tokens must be of shape (tokens, width), not {list(shapes.values())}")
    return shapes


def num_learned(system: System) -> int:
    """The learned tokens that a system's prompts end in."""
    shapes = [token_shapes(path) for path, weight in system.adapters if weight != 0]
    return sum(max(shape[0] for shape in found.values()) for found in shapes if found)


def save_tokens(model: Model, folder: Path) -> None:
    """Write a model's learned tokens, if it has any, as a textual inversion for diffusers, A1111 and ComfyUI."""
    from safetensors.torch import save_file

    tokens = {key: tokenization.learned_tokens(getattr(model, part)) for part, key in token_keys(model).items()}
    tensors = {key: found.learned.detach().cpu().contiguous() for key, found in tokens.items() if found is not None}
    if tensors:
        with replacing(folder / TOKENS) as temporary:
            save_file(tensors, temporary, {"format": "pt"})


def read_tokens(paths: Sequence[str], model: Model) -> dict[str, Tensor]:
    """Learned tokens (N, D) of files or folders, one after another, by the text encoders that read them.

    Raises:
        ArtifactError: one is damaged or of another model. InputError: prompts have no room for so many.
    """
    keys, found = token_keys(model), defaultdict[str, list[Tensor]](list)
    for path in paths:
        file = find_files(Path(path))[0].path
        tensors = read_finite(file, "learned tokens")
        number = len(next(iter(tensors.values())))
        wanted = {key: (number, getattr(model, part).config.hidden_size) for part, key in keys.items()}
        if wanted != (given := {key: tuple(tensor.shape) for key, tensor in sorted(tensors.items())}):
            raise ArtifactError(f"{file}: made for another model: it holds {given}, this one takes {wanted}; see --model")
        for part, key in keys.items():
            found[part].append(tensors[key].float())
    tokens = {part: torch.cat(tensors) for part, tensors in found.items()}
    most = most_learned([reader.num_read for reader in model.readers.values() if reader.part.is_clip])
    if tokens and (number := max(map(len, tokens.values()))) > most:
        raise InputError(f"adapter: {number} learned tokens leave no room for prompts; {model.name!r} reads at most {most}")
    return tokens


# --- fusion ---


def fuse(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """The adapter whose change of the weights is the weighted sum of the adapters' changes.

    The factors are concatenated, so the sum is exact and its rank the sum of the ranks. Adapters of weight 0 are left out,
    and a single one of weight 1 stays as it is.
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
    """Check that there is something to read, before any model is loaded.

    Raises:
        NotFoundError: there is not. ArtifactError: an adapter's configuration cannot be honoured, or it is damaged.
        InputError: learned tokens have a weight.
    """
    for path, weight in system.adapters:
        if token_shapes(path) and weight not in (0, 1):
            raise InputError(
                f"adapter: {path!r} holds learned tokens, which are read or not: their weight is 1 or 0, not {weight:g}"
            )
    for path, _ in system.unets:
        locate(path, "unet")


def adapter_files(path: Path) -> list[Path]:
    """The files that an adapter consists of.

    Raises:
        NotFoundError, ArtifactError: as `find_files`.
    """
    found = [file.path for file in find_files(path)]
    configs = [file.with_name("adapter_config.json") for file in found]
    return [*found, *(config for config in configs if config.is_file())]


def unet_files(path: Path) -> list[Path]:
    """The files that a tuned U-Net consists of; raises what `adapter_files` does."""
    path = locate(path, "unet")
    whole = [file for file in (unet_file(path), unet_file(path / "unet")) if file]
    return whole[:1] or adapter_files(path)


def put_on(model: Model, system: System) -> Model:
    """Model with a system's adapters and U-Net on copies of the parts that they change; those given stay as they are.

    LoRA changes no weight of its part, so copies that it is put on share the weights of the parts given.

    Raises:
        NotFoundError, ArtifactError: as `read_terms`, `read_unet` and `apply`. InputError: as `read_tokens`.
    """
    inversions = [path for path, weight in system.adapters if weight != 0 and token_shapes(path)]
    terms = read_terms([(path, weight) for path, weight in system.adapters if not token_shapes(path)], model)
    tokens = read_tokens(inversions, model)
    changed: dict[str, Any] = {}
    for path, weight in system.unets:
        unet = read_unet(path, model)
        terms.append((unet.adapter, weight))
        if unet.tensors:
            changed["unet"] = copy.deepcopy(model.unet)
            move_towards(changed["unet"], unet.tensors, weight)
    adapter = fuse(terms)
    for part in (adapter.keys() | tokens.keys()) - changed.keys():
        changed[part] = _with_the_same_weights(getattr(model, part))
    for part, learned in tokens.items():
        words = changed[part].get_input_embeddings()
        changed[part].set_input_embeddings(tokenization.LearnedTokens(words, learned.to(model.device)).requires_grad_(False))
    return apply(replace(model, **changed), adapter)


def _with_the_same_weights(module: nn.Module) -> Any:
    """A copy of a module for LoRA to be put on, whose parameters and buffers are the module's own."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def read_terms(weighted: Sequence[tuple[str, float]], model: Any) -> list[tuple[Adapter, float]]:
    """Adapters, each given as path and weight.

    Raises:
        NotFoundError, ArtifactError: as `read_adapter`; or one changes nothing.
    """
    terms = []
    for path, weight in weighted:
        adapter = read_adapter(path, model)
        check_changes(adapter, path)
        terms.append((adapter, weight))
    return terms


def check_changes(adapter: Adapter, path: str | Path) -> None:
    for part, layers in adapter.items():
        if not any(layer.delta().any() for layer in layers.values()):
            raise ArtifactError(f"{path}: it changes nothing in the {part}")


def apply(model: Model, adapter: Adapter) -> Model:
    """Put an adapter on models as LoRA that can be switched off.

    Raises:
        ArtifactError: the embedding of a prompt does not change.
    """
    check_embeddings(model, adapter)
    return replace(model, **{part: _add_lora(getattr(model, part), layers) for part, layers in adapter.items()})


def check_embeddings(model: Any, adapter: Adapter) -> None:
    """Check that an adapter changes the embeddings of each text encoder that it has layers for.

    Raises:
        ArtifactError: it does not.
    """
    for part in adapter.keys() - {"unet"}:
        check_embedding(getattr(model, part.replace("text_encoder", "tokenizer")), getattr(model, part), adapter[part])


@torch.no_grad()
def check_embedding(tokenizer: Any, text_encoder: Any, layers: Mapping[str, Layer]) -> None:
    """Check that layers change the embedding of a prompt.

    Raises:
        ArtifactError: they do not.
    """
    prompt_ids = torch.tensor(tokenizer([PROBE], truncation=True).input_ids).to(text_encoder.device)
    outputs = [text_encoder(input_ids=prompt_ids).to_tuple()]
    with _added(text_encoder, layers):
        outputs.append(text_encoder(input_ids=prompt_ids).to_tuple())
    base, changed = ([tensor for tensor in output if isinstance(tensor, Tensor)] for output in outputs)
    if all(torch.equal(one, other) for one, other in zip(base, changed, strict=True)):  # the pooled text is among them
        raise ArtifactError("adapter: it is loaded, and the embedding of a prompt does not change")


@contextlib.contextmanager
def _added(module: nn.Module, layers: Mapping[str, Layer]) -> Iterator[None]:
    """Let layers add to what a module's linear layers give, without a copy of its weights."""
    modules = {name.removeprefix("text_model."): layer for name, layer in module.named_modules()}

    def adding(layer: Layer) -> Callable[[Any, Any, Tensor], Tensor]:
        def add(_: Any, inputs: Any, output: Tensor) -> Tensor:
            down, up = (factor.to(output.device, torch.float32) for factor in (layer.down, layer.up))
            return (output.float() + layer.scale * nn.functional.linear(inputs[0].float() @ down.T, up)).to(output.dtype)

        return add

    hooks = [modules[name].register_forward_hook(adding(layer)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
    """A tuned U-Net: LoRA, or all its tensors by diffusers' names; the other one is empty."""

    adapter: Adapter
    tensors: dict[str, Tensor]


def read_unet(path: str | Path, model: Any) -> TunedUNet:
    """LoRA as in `read_adapter`, a diffusers U-Net (a file, its folder, a pipeline's) or a single-file checkpoint.

    Raises:
        NotFoundError, ArtifactError: as `read_adapter`; or there is LoRA for a text encoder in it, or the tensors are
            another U-Net's, or all equal to this one's. InputError: the model has no U-Net.
    """
    path = locate(path, "unet")
    if getattr(model, "unet", None) is None:
        raise InputError(f"unet: {family_of(model).name} has no U-Net, so that none can take its place")
    for folder in (path, path / "unet"):
        if file := unet_file(folder):
            return TunedUNet({}, _whole_unet(read_finite(file, "a U-Net"), model.unet, file))
    for found in find_files(path):
        if found.config is None:
            tensors = read_finite(found.path, "a U-Net")
            if any(key.startswith(ldm.UNET) for key in tensors):
                return TunedUNet({}, _whole_unet(ldm.unet_tensors(tensors, model.unet), model.unet, found.path))
            if "conv_in.weight" in tensors:
                return TunedUNet({}, _whole_unet(tensors, model.unet, found.path))
    adapter = read_adapter(path, model)
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
    """Add LoRA's change to a module's own weights, in float32."""
    modules: dict[str, Any] = {name.removeprefix("text_model."): layer for name, layer in module.named_modules()}
    for name, layer in layers.items():
        weight = modules[name].weight
        delta = layer.delta().to(weight.device).reshape(weight.shape)
        weight.copy_((weight.float() + delta).to(weight.dtype))


@torch.no_grad()
def move_towards(module: nn.Module, tensors: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Interpolate a module's weights towards given tensors: 0 is the module's, 1 the tensors."""
    for name, weight in module.state_dict().items():
        target = tensors[name].to(weight.device)
        weight.copy_(target if scale == 1 else weight.float() + scale * (target.float() - weight.float()))
