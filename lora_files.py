"""Files of LoRA of every layout: read to the last tensor or refused, and what is written into them.

Whatever the layout, what is read is LoRA (arXiv:2106.09685) by part of the pipeline and name of the layer. Read top to
bottom: records, files, names, reading, writing.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from . import ldm
from .errors import ArtifactError, InputError, NotFoundError, reading
from .families import FAMILIES
from .files import locate
from .models import family_of
from .options import MAX_RANK
from .weights import read_finite, read_header

PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "unet")
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
            raise ArtifactError(f"{path}: {name} must map the names of layers to numbers")
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


def _read_configs(header: Mapping[str, str], path: Path) -> dict[str | None, dict[str, Any]]:
    """peft's configurations by part, from a file's header, where diffusers keeps them; by None if the file has one part."""
    text = header.get("lora_adapter_metadata")
    if text is None:
        return {}
    with reading(f"{path}: its lora_adapter_metadata is not JSON"):
        flat = json.loads(text)
    if not isinstance(flat, dict):
        raise ArtifactError(f"{path}: its lora_adapter_metadata is no JSON object")
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
        header = read_header(file.path)
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
            raise ArtifactError(f"{file.path}: the tensor {key} belongs to no layer of this model; see --model")
        part, name, kind = place
        if kind in found[part][name]:
            raise ArtifactError(f"{file.path}: two tensors are for {kind} of {name} in the {part}, as {key}")
        found[part][name][kind] = tensor
    if not found:
        raise ArtifactError(f"{file.path}: it holds no tensor")
    return found


def _make_layer(name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, path: Path) -> Layer:
    if missing := {"down", "up"} - tensors.keys():
        raise ArtifactError(f"{path}: {name} lacks its {missing.pop()} matrix")
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


# --- writing ---


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
