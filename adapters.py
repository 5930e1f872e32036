"""Adapters: files of LoRA of every layout read to the last tensor or refused, fused exactly, put on a model or baked in.

Whatever the layout, what is read is LoRA (arXiv:2106.09685) by part of the pipeline and name of the layer. Read top to
bottom: records, files, names, reading, fusion, application, tuned U-Nets.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from . import ldm, models, tokenization
from .config import MAX_RANK, System, parse_weighted
from .errors import ArtifactError, InputError, NotFoundError, reading
from .families import FAMILIES
from .files import locate, replacing
from .models import Model, family_of
from .weights import read_finite

PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "unet")
PROBE = "a photo of a red cube on a blue sphere"
MATCHING_SECONDS = 3.0  # for the names of all layers; a pattern in a foreign file may take for ever
MAX_PATTERN = 1000  # letters of a pattern, and repetitions that it counts, on which its compilation depends


# --- records ---


@dataclass(frozen=True)
class Layer:
    """LoRA of one layer: its weight changes by scale * up @ down."""

    down: Tensor  # (r, in), or (r, in, h, w) of a convolution
    up: Tensor  # (out, r), or (out, r, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """The change of the weight, in float32."""
        down, up = self.down.float(), self.up.float()
        return self.scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


Adapter = dict[str, dict[str, Layer]]  # part: name of the layer in the text encoder or UNet2DConditionModel: LoRA


# --- files ---


@dataclass(frozen=True)
class _File:
    """A file of LoRA, with the part and the configuration that its folder declares."""

    path: Path
    part: str | None = None  # of names without a prefix
    config: dict[str, Any] | None = None  # peft's


def find_files(path: Path) -> list[_File]:
    """The files to read of a file or folder.

    Raises:
        NotFoundError: there is nothing. ArtifactError: a configuration cannot be honoured.
    """
    path = locate(path, "adapter")
    if path.is_file():
        config = path.parent / "adapter_config.json"
        if path.name.startswith("adapter_model.") and config.is_file():
            return [_File(path, None, _read_peft_config(config))]
        return [_File(path)]
    files = []
    for part, folder in ((None, path), *((part, path / part) for part in PARTS[1:])):
        if (folder / "adapter_config.json").is_file():
            weights = [folder / f"adapter_model.{ending}" for ending in ("safetensors", "bin")]
            found = next((file for file in weights if file.is_file()), None)
            if found is None:
                raise NotFoundError(f"adapter: {str(folder)!r} holds no adapter_model.safetensors")
            files.append(_File(found, part, _read_peft_config(folder / "adapter_config.json")))
    if files:
        return files
    for pattern in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "*.safetensors"):
        found_files = list(path.glob(pattern))
        if len(found_files) == 1:
            return [_File(found_files[0])]
    raise NotFoundError(
        f"adapter: {str(path)!r} holds neither adapter_config.json nor pytorch_lora_weights.safetensors nor a single other "
        "file of weights; give the output folder of a training, or a file"
    )


def _read_peft_config(path: Path) -> dict[str, Any]:
    """peft's configuration of plain LoRA; options that this project does not honour are refused."""
    with reading(f"{path}: not a peft adapter's configuration"):
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ArtifactError(f"{path}: not a peft adapter's configuration: no object")
    if config.get("peft_type") != "LORA" or config.get("target_modules") is None:
        raise ArtifactError(f"{path}: peft_type must be LORA and target_modules a list of layer names or a pattern")
    _check_lora_config(config, path)
    return config


def _check_lora_config(config: dict[str, Any], path: Path) -> None:
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if not _is_number(rank) or not 1 <= rank <= MAX_RANK or not _is_number(alpha) or not 0 < alpha < 1e6:
        raise ArtifactError(f"{path}: r must be 1 to {MAX_RANK} and lora_alpha a number, not {rank!r} and {alpha!r}")
    _check_targets(config, path)
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        # peft takes these names for regular expressions, which can hang; here they are names and nothing else.
        if not isinstance(pattern, dict) or not all(
            re.fullmatch(r"\^?[\w.]+", key) and _is_number(value) and 0 < value < 1e6 for key, value in pattern.items()
        ):
            raise ArtifactError(f"{path}: {name} must hold numbers by the names of layers")
    unsupported = [name for name in ("use_dora", "modules_to_save", "lora_bias", "fan_in_fan_out") if config.get(name)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if config.get("init_lora_weights") not in (None, True, False, "gaussian", "eva", "orthogonal"):
        unsupported.append("init_lora_weights")  # the others change the base weights too
    if unsupported:
        raise ArtifactError(f"{path}: {unsupported[0]} is not supported")


def _check_targets(config: dict[str, Any], path: Path) -> None:
    """Check the types of what says which layers have LoRA."""
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value: Any = config.get(name) or []
        if not isinstance(value, str | list) or not all(isinstance(item, str) for item in value):
            raise ArtifactError(f"{path}: {name} must be a list of names or a pattern, not {value!r}"[:300])
    patterns = config.get("layers_pattern") or []
    if not all(re.fullmatch(r"[\w.]+", name) for name in ([patterns] if isinstance(patterns, str) else patterns)):
        raise ArtifactError(f"{path}: layers_pattern must hold names of layers")  # peft takes them for expressions
    indices: Any = config.get("layers_to_transform") or []
    if not all(isinstance(index, int) for index in (indices if isinstance(indices, list) else [indices])):
        raise ArtifactError(f"{path}: layers_to_transform must be numbers of layers")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def _read_header(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _read_configs(header: Mapping[str, str], path: Path) -> dict[str | None, dict[str, Any]]:
    """peft's configurations by part, from a file's header, where diffusers keeps them; by None if the file has one part."""
    text = header.get("lora_adapter_metadata")
    if text is None:
        return {}
    with reading(f"{path}: its lora_adapter_metadata are not JSON"):
        flat = json.loads(text)
    if not isinstance(flat, dict):
        raise ArtifactError(f"{path}: its lora_adapter_metadata are no object")
    configs: dict[str | None, dict[str, Any]] = defaultdict(dict)
    for key, value in flat.items():
        part, _, name = key.partition(".")
        configs[part if part in PARTS else None][name if part in PARTS else key] = value
    for config in configs.values():
        _check_lora_config(config, path)
    return dict(configs)


ARCHITECTURES = {  # kohya's base model and modelspec's architecture, by the width of the text that the U-Net takes
    768: ("sd_v1", "stable-diffusion-v1"),
    1024: ("sd_v2", "stable-diffusion-v2"),
    2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}


def _check_family(header: Mapping[str, str], model: Any, path: Path) -> None:
    said = header.get("ss_base_model_version", "")
    families = {width: base.removesuffix("_base_v1-0") for width, (base, _) in ARCHITECTURES.items()}  # sdxl has variants
    others = [family.kohya_base.partition("_")[0] for family in FAMILIES if family.kohya_base]
    unet, own = getattr(model, "unet", None), family_of(model).kohya_base.partition("_")[0]
    if unet is not None:
        own = families.get(unet.config.cross_attention_dim, "")
    family = next((family for family in (*families.values(), *others) if said.startswith(family)), None)
    own = own or ("another" if family and unet is None else "")
    if family and own and family != own:
        raise ArtifactError(f"{path}: made for another model: it says {said}, and this one is {own}; see --model")


# --- names ---

_DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", ".lora_linear_layer.down.weight")
_UP = (".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight", ".lora_linear_layer.up.weight")
_SUFFIXES = {
    **dict.fromkeys((*_DOWN, ".lora_down.weight", "_lora.down.weight"), "down"),
    **dict.fromkeys((*_UP, ".lora_up.weight", "_lora.up.weight"), "up"),
    ".alpha": "alpha",
}
# Parts of names by which other changes of weights than LoRA are known, and what they are.
_OTHER_KINDS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "boft_": "BOFT",
    "oft_blocks": "OFT", "a1.weight": "GLoRA", "on_input": "IA3", "ia3_": "IA3", "lora_mid": "LoRA in Tucker's form",
    "diff": "full differences of weights", "diff_b": "full differences of weights", "w_norm": "norms", "b_norm": "norms",
    "emb_params": "a textual inversion", "string_to_param": "a textual inversion", "lora_embedding_": "LoRA of embeddings",
    "lora_bias": "LoRA with a bias",
}  # fmt: skip
_PREFIXES = {
    **{f"{part}.": part for part in PARTS},
    "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_unet_": "unet",
}  # fmt: skip


def layer_names(part: str, module: nn.Module) -> dict[str, str]:
    """Names that files use for the layers of a part (without the part's prefix), each with ours.

    Ours are those of a CLIPTextModel of transformers 5 (no `text_model.`) or of a UNet2DConditionModel.
    """
    names: dict[str, str] = {}
    kinds = (nn.Linear, nn.Conv2d)
    for name in (name for name, layer in module.named_modules() if isinstance(layer, kinds)):
        ours = name.removeprefix("text_model.")
        if part == "unet":
            variants = [ours, re.sub(r"\.(to_(?:q|k|v|out))(?:\.0)?$", r".processor.\1", ours)]
            underscored = [ours]
            with contextlib.suppress(InputError):  # a U-Net that has no such layout
                underscored.append(ldm.unet_name(ours, module.config))  # kohya's for Stable Diffusion XL
        else:
            old = re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", ours)
            variants = [*(prefix + variant for prefix in ("", "text_model.") for variant in (ours, old))]
            underscored = ["text_model." + ours, ours]
        names |= dict.fromkeys(variants, ours)
        names |= {variant.replace(".", "_"): ours for variant in underscored}
    return names


def _place(
    key: str, names: Mapping[str, Mapping[str, str]], default: str | None, prefixes: Mapping[str, str]
) -> tuple[str, str, str] | None:
    """Part, layer and kind (down, up or alpha) of a key; None where it is of no part."""
    suffix = next((suffix for suffix in sorted(_SUFFIXES, key=len, reverse=True) if key.endswith(suffix)), None)
    if suffix is None:
        return None
    name = key.removesuffix(suffix).removeprefix("base_model.model.")
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    if prefix is not None:
        name, candidates = name.removeprefix(prefix).removeprefix("base_model.model."), [prefixes[prefix]]
    else:
        candidates = [default] if default else list(names)
    for part in candidates:
        if name in names.get(part, {}):
            return part, names[part][name], _SUFFIXES[suffix]
    return None


def _other_kind(key: str) -> str | None:
    """What a tensor that is no LoRA is, by the ends of its name's levels; None if it is not known."""
    levels = key.removesuffix(".weight").split(".")[1:]
    starts = [kind for mark, kind in _OTHER_KINDS.items() if mark.endswith("_") and any(x.startswith(mark) for x in levels)]
    return next(iter(starts), None) or next((_OTHER_KINDS[level] for level in levels if level in _OTHER_KINDS), None)


# --- reading ---


def read_adapter(path: str | Path, model: Any) -> Adapter:
    """The LoRA of a file or folder, for the parts of `model` (attributes named as in PARTS).

    peft's folders, of the old (`text_model.`) and the new layout; diffusers' files, with and without metadata; kohya's;
    attention processors' without any prefix.

    Raises:
        NotFoundError: there is no such file or folder, or it holds no adapter.
        ArtifactError: it is damaged, unsafe, of another model, or holds a tensor that is not used.
        InputError: a part has an adapter already.
    """
    modules = {part: getattr(model, part) for part in PARTS if getattr(model, part, None) is not None}
    if adapted := [part for part, module in modules.items() if hasattr(module, "peft_config")]:
        raise InputError(f"adapter: the {adapted[0]} has an adapter already; give them together")
    names = {part: layer_names(part, module) for part, module in modules.items()}
    prefixes = _PREFIXES | {prefix: part for part, prefix in family_of(model).kohya.items()}
    adapter: Adapter = {}
    for file in find_files(Path(path)):
        tensors = read_finite(file.path, "an adapter")
        header = _read_header(file.path)
        _check_family(header, model, file.path)
        configs = {file.part: file.config} if file.config else _read_configs(header, file.path)
        for part, found in _by_part(tensors, names, file, prefixes).items():
            config = configs.get(part, configs.get(None))
            layers = {name: _make_layer(name, layer, config, file.path) for name, layer in found.items()}
            if not _is_declared_whole(layers, part, header, file.path):
                _check_whole(layers, part, names[part], _Declared(config or {}, file.path))
            adapter[part] = _fit(layers, modules[part], file.path)
    return adapter


def _by_part(
    tensors: Mapping[str, Tensor], names: Mapping[str, Mapping[str, str]], file: _File, prefixes: Mapping[str, str]
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The down, up and alpha of each layer of each part."""
    found: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for key, tensor in tensors.items():
        place = _place(key, names, file.part, prefixes)
        if place is None:
            if "unet" not in names and key.startswith(("transformer.", "lora_unet_", "lora_transformer_")):
                raise ArtifactError(
                    f"{file.path}: it changes the transformer, as {key}, which texforce does not train or read"
                )
            if kind := _other_kind(key):
                raise ArtifactError(
                    f"{file.path}: it holds {kind}, as {key}, and only LoRA is supported; train or export it so"
                )
            raise ArtifactError(f"{file.path}: the tensor {key} is of no layer of this model; see --model")
        part, name, kind = place
        if kind in found[part][name]:
            raise ArtifactError(f"{file.path}: two tensors are for {kind} of {name} in the {part}, as {key}")
        found[part][name][kind] = tensor
    if not found:
        raise ArtifactError(f"{file.path}: it holds no tensor")
    return found


def _make_layer(name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, path: Path) -> Layer:
    if missing := {"down", "up"} - tensors.keys():
        raise ArtifactError(f"{path}: of {name} the {missing.pop()} matrix is missing")
    down, up = tensors["down"], tensors["up"]
    matching = down.ndim in (2, 4) and up.ndim in (2, 4) and 1 <= down.shape[0] == up.shape[1] <= MAX_RANK
    if not matching or up.numel() != up.shape[0] * up.shape[1]:
        raise ArtifactError(f"{path}: of {name} the shapes {tuple(down.shape)} and {tuple(up.shape)} are of no LoRA")
    rank, alpha = down.shape[0], float(down.shape[0])  # alpha is the rank unless the file says otherwise
    if config is not None:
        wanted = _by_pattern(name, config.get("rank_pattern"), config["r"])
        if wanted != rank:
            raise ArtifactError(f"{path}: {name} has rank {rank}, and its configuration says {wanted}")
        alpha = _by_pattern(name, config.get("alpha_pattern"), config["lora_alpha"])
        if config.get("use_rslora"):
            alpha *= math.sqrt(rank)
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1 or not 0 < tensors["alpha"].item() < 1e6:
            raise ArtifactError(f"{path}: alpha of {name} is not a number above 0")
        alpha = tensors["alpha"].item()
    return Layer(down, up, float(alpha))


def _by_pattern(name: str, pattern: Mapping[str, float] | None, default: float) -> float:
    for key, value in (pattern or {}).items():
        plain = key.removeprefix("^").removeprefix("text_model.")
        if name == plain or (not key.startswith("^") and name.endswith("." + plain)):
            return value
    return default


def _fit(layers: Mapping[str, Layer], module: nn.Module, path: Path) -> dict[str, Layer]:
    """The layers with factors of as many axes as the weights that they change have."""
    modules: dict[str, Any] = {name.removeprefix("text_model."): layer for name, layer in module.named_modules()}
    fitted = {}
    for name, layer in layers.items():
        weight = modules[name].weight
        shape = (layer.up.shape[0], *layer.down.shape[1:])
        if math.prod(shape) != weight.numel() or shape[:2] != tuple(weight.shape[:2]):
            raise ArtifactError(
                f"{path}: made for another model: {name} changes a weight of shape {shape}, here of {tuple(weight.shape)}"
            )
        down = layer.down.reshape(layer.rank, *weight.shape[1:])
        up = layer.up.reshape(weight.shape[0], layer.rank, *(1 for _ in weight.shape[2:]))
        fitted[name] = Layer(down, up, layer.alpha)
    return fitted


@dataclass(frozen=True)
class _Declared:
    """What a configuration of peft says of the layers that have LoRA; empty where there is no configuration."""

    config: Mapping[str, Any]
    path: Path  # the file that holds the tensors

    def layers(self, names: Iterable[str]) -> set[str]:
        """The names of layers that peft would choose."""
        from peft.tuners.tuners_utils import check_target_module_exists

        fields = {name: self.config.get(name) for name in ("target_modules", "exclude_modules")}
        for name, value in fields.items():
            if isinstance(value, str):
                fields[name] = _matching(value, names, f"{self.path}: the {name} {value[:80]!r} cannot be used")
        wanted = {name: self.config.get(name) for name in ("layers_to_transform", "layers_pattern")} | fields
        choice = SimpleNamespace(**wanted, modules_to_save=None, target_parameters=None)
        return {name for name in names if check_target_module_exists(choice, name)}


def _matching(pattern: str, names: Iterable[str], what: str) -> list[str]:
    """The names that a pattern of a foreign file matches as a whole, stopped after MATCHING_SECONDS."""
    import regex  # unlike re it can be stopped

    repetitions = math.prod(max(1, int(number)) for number in re.findall(r"[{,]\s*(\d+)", pattern[:MAX_PATTERN]))
    with reading(what):
        if len(pattern) > MAX_PATTERN or repetitions > MAX_PATTERN:
            raise ValueError("the pattern is too long, or counts too many repetitions")
        re.compile(pattern)  # as peft does: it knows no recursion, which would take all memory
        expression, end = regex.compile(pattern, regex.VERSION0), time.monotonic() + MATCHING_SECONDS
        return [name for name in names if expression.fullmatch(name, timeout=max(1e-3, end - time.monotonic()))]


def _is_declared_whole(layers: Mapping[str, Layer], part: str, header: Mapping[str, str], path: Path) -> bool:
    """Whether the header that `merge` writes into kohya's files says that the layers are all there are."""
    with reading(f"{path}: its metadata of texforce cannot be read"):
        said = json.loads(header.get("texforce", "{}"))
    numbers = said.get("layers") if isinstance(said, dict) else None
    return isinstance(numbers, dict) and numbers.get(part) == len(layers)


def _check_whole(layers: Mapping[str, Layer], part: str, names: Mapping[str, str], declared: _Declared) -> None:
    """Check that no layer is missing: of peft's configuration, or else of a text encoder, or of a block beside its kind."""
    known = set(names.values())
    if declared.config.get("target_modules") is not None:
        chosen = []
        for prefix in ("", "text_model."):  # a configuration has the names of the transformers that wrote it
            spelled = {prefix + name: name for name in known}
            chosen.append({spelled[name] for name in declared.layers(spelled)})
        if wrong := min((expected ^ layers.keys() for expected in chosen), key=len):
            raise ArtifactError(
                f"{declared.path}: {len(wrong)} layers are missing or not among target_modules, as {min(wrong)}"
            )
        return
    possible, present = _children(known), _children(layers)
    for kind in {_kind(parent) for parent in present}:
        alike = {parent for parent in possible if _kind(parent) == kind}
        wanted = set().union(*(present.get(parent, set()) for parent in alike))
        for parent in sorted(alike if part != "unet" else alike & present.keys()):
            if lacking := (wanted & possible[parent]) - present.get(parent, set()):
                raise ArtifactError(f"{declared.path}: the {part} is incomplete: {parent} lacks {min(lacking)}")


def _children(names: Iterable[str]) -> dict[str, set[str]]:
    """The layers of each block, as q_proj of encoder.layers.0.self_attn."""
    children: dict[str, set[str]] = defaultdict(set)
    for name in names:
        parent, _, child = name.removesuffix(".0").rpartition(".")
        children[parent].add(child)
    return children


def _kind(parent: str) -> str:
    """A block's name without its numbers, which blocks of one kind share."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", parent)


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
    from safetensors import SafetensorError, safe_open

    file, shapes = find_files(Path(path))[0].path, dict[str, list[int]]()
    if file.suffix == ".safetensors":
        with contextlib.suppress(SafetensorError), safe_open(file, framework="pt") as content:  # whoever reads it refuses it
            shapes = {key: content.get_slice(key).get_shape() for key in content.keys()}  # noqa: SIM118 - no mapping
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
    tokens, most = {part: torch.cat(tensors) for part, tensors in found.items()}, models.most_learned(model)
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


def load_adapters(model: Model, specs: Sequence[str], scale: float = 1.0) -> Model:
    """Put the sum of adapters, each PATH or PATH:WEIGHT, times a scale, on models as LoRA that can be switched off.

    Raises:
        NotFoundError, InputError, ArtifactError: as `read_terms` and `apply`.
    """
    return apply(model, fuse(read_terms([(path, weight * scale) for path, weight in map(parse_weighted, specs)], model)))


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
    """Layers by the names of the module itself, some or all of which have `text_model.` by version and class."""
    own = {name.removeprefix("text_model."): name for name, _ in module.named_modules()}
    return {own[name]: layer for name, layer in layers.items()}


def named_as_published(module: nn.Module, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """A text encoder's layers by the names that files of LoRA have kept: all within `text_model.` but the projection."""
    named = named_as_in(module, layers)
    config: Any = module.config
    is_plain = hasattr(module, "text_model") or not config.model_type.startswith("clip")
    return named if is_plain else {f"text_model.{name}": layer for name, layer in named.items()}


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
