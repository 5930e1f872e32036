"""Files of LoRA of every layout: recognised by their keys, and read to the last tensor or refused.

Whatever the layout, what is read is LoRA (arXiv:2106.09685) by part of the pipeline and name of the layer. Read top to
bottom: records, files, names, reading.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from texforce import ldm
from texforce.checkpoints import ArtifactError, read_tensors
from texforce.config import MAX_RANK

PARTS = ("text_encoder", "text_encoder_2", "unet")


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
        """What is added to the weight, in float32."""
        down, up = self.down.float(), self.up.float()
        return self.scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


Adapter = dict[str, dict[str, Layer]]  # part: name of the layer in a CLIPTextModel or UNet2DConditionModel: LoRA


# --- files ---


@dataclass(frozen=True)
class _File:
    """A file of LoRA, and what its own folder or metadata say of it."""

    path: Path
    part: str | None = None  # that its names without a prefix are of
    config: dict[str, Any] | None = None  # peft's


def check_adapter(path: str | Path) -> None:
    """See that there is something to read, before any model is loaded.

    Raises:
        FileNotFoundError: there is not.
    """
    find_files(Path(path))


def find_files(path: Path) -> list[_File]:
    if path.is_file():
        return [_File(path)]
    if not path.is_dir():
        raise FileNotFoundError(f"adapter: there is no file or folder {str(path)!r}")
    files = []
    for part, folder in {"text_encoder": path, "text_encoder_2": path / "text_encoder_2", "unet": path / "unet"}.items():
        if (folder / "adapter_config.json").is_file():
            weights = [folder / f"adapter_model.{ending}" for ending in ("safetensors", "bin")]
            found = next((file for file in weights if file.is_file()), None)
            if found is None:
                raise FileNotFoundError(f"adapter: {str(folder)!r} holds no adapter_model.safetensors")
            files.append(_File(found, part, _read_peft_config(folder / "adapter_config.json")))
    for ending in ("safetensors", "bin"):
        if not files and (path / f"pytorch_lora_weights.{ending}").is_file():
            files.append(_File(path / f"pytorch_lora_weights.{ending}"))
    if not files:
        raise FileNotFoundError(
            f"adapter: {str(path)!r} holds neither adapter_config.json nor pytorch_lora_weights.safetensors; "
            "give the output folder of a training, or a file"
        )
    return files


def _read_peft_config(path: Path) -> dict[str, Any]:
    """peft's configuration of plain LoRA; what this project does not honour is refused."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a peft adapter's configuration: {error}") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path}: not a peft adapter's configuration: no object")
    layers = config.get("target_modules")
    # A pattern there could hang the matching; peft itself writes a plain list of names.
    if config.get("peft_type") != "LORA" or not isinstance(layers, list) or not all(isinstance(n, str) for n in layers):
        raise ArtifactError(f"{path}: peft_type must be LORA and target_modules a list of layer names")
    _check_lora_config(config, path)
    return config


def _check_lora_config(config: dict[str, Any], path: Path) -> None:
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if not _is_number(rank) or not 1 <= rank <= MAX_RANK or not _is_number(alpha) or not 0 < alpha < 1e6:
        raise ArtifactError(f"{path}: r must be 1 to {MAX_RANK} and lora_alpha a number, not {rank!r} and {alpha!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        # peft takes these names for regular expressions, which can hang; here they are names and nothing else.
        if not isinstance(pattern, dict) or not all(
            re.fullmatch(r"[\w.]+", key) and _is_number(value) and 0 < value < 1e6 for key, value in pattern.items()
        ):
            raise ArtifactError(f"{path}: {name} must hold numbers by the names of layers")
    bias = config.get("bias") or "none"
    unsupported = [name for name in ("use_dora", "modules_to_save", "lora_bias", "fan_in_fan_out") if config.get(name)]
    if unsupported or bias != "none":
        raise ArtifactError(f"{path}: {(unsupported or ['bias'])[0]} is not supported")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """peft's configurations by part, which diffusers keeps in the header of a file; empty without one."""
    if path.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        flat = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: its lora_adapter_metadata are not JSON: {error}") from error
    if not isinstance(flat, dict):
        raise ArtifactError(f"{path}: its lora_adapter_metadata are no object")
    configs: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in flat.items():
        part, _, name = key.partition(".")
        configs[part][name] = value
    for config in configs.values():
        _check_lora_config(config, path)
    return configs


# --- names ---

_DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", ".lora_linear_layer.down.weight")
_UP = (".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight", ".lora_linear_layer.up.weight")
_SUFFIXES = {
    **dict.fromkeys((*_DOWN, ".lora_down.weight", "_lora.down.weight"), "down"),
    **dict.fromkeys((*_UP, ".lora_up.weight", "_lora.up.weight"), "up"),
    ".alpha": "alpha",
}
_PREFIXES = {
    "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2", "unet.": "unet",
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
            with contextlib.suppress(ValueError):  # a U-Net that has no such layout
                underscored.append(ldm.unet_name(ours, module.config))  # kohya's for Stable Diffusion XL
        else:
            old = re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", ours)
            variants = [*(prefix + variant for prefix in ("", "text_model.") for variant in (ours, old))]
            underscored = ["text_model." + ours, ours]
        names |= dict.fromkeys(variants, ours)
        names |= {variant.replace(".", "_"): ours for variant in underscored}
    return names


def _place(key: str, names: Mapping[str, Mapping[str, str]], default: str | None) -> tuple[str, str, str] | None:
    """Part, layer and kind (down, up or alpha) of a key; None where it is of no part."""
    suffix = next((suffix for suffix in sorted(_SUFFIXES, key=len, reverse=True) if key.endswith(suffix)), None)
    if suffix is None:
        return None
    name = key.removesuffix(suffix).removeprefix("base_model.model.")
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
    if prefix is not None:
        name, candidates = name.removeprefix(prefix).removeprefix("base_model.model."), [_PREFIXES[prefix]]
    else:
        candidates = [default] if default else list(names)
    for part in candidates:
        if name in names.get(part, {}):
            return part, names[part][name], _SUFFIXES[suffix]
    return None


# --- reading ---


def read_adapter(path: str | Path, models: Any) -> Adapter:
    """The LoRA of a file or folder, for the parts of `models` (attributes named as in PARTS).

    peft's folders, of the old (`text_model.`) and the new layout; diffusers' files, with and without metadata; kohya's;
    attention processors' without any prefix.

    Raises:
        FileNotFoundError: there is no such file or folder, or it holds no adapter.
        ArtifactError: it is damaged, unsafe, of another model, or holds a tensor that is not used.
        ValueError: a part has an adapter already.
    """
    modules = {part: getattr(models, part) for part in PARTS if getattr(models, part, None) is not None}
    if adapted := [part for part, module in modules.items() if hasattr(module, "peft_config")]:
        raise ValueError(f"adapter: the {adapted[0]} has an adapter already; give them together")
    names = {part: layer_names(part, module) for part, module in modules.items()}
    adapter: Adapter = {}
    for file in find_files(Path(path)):
        for part, layers in _read_file(file, names).items():
            _check_shapes(layers, modules[part], file.path)
            _check_whole(layers, part, names[part], file)
            adapter[part] = layers
    return adapter


def _read_file(file: _File, names: Mapping[str, Mapping[str, str]]) -> Adapter:
    tensors = read_tensors(file.path, "an adapter")
    if bad := next((key for key, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise ArtifactError(f"{file.path}: the tensor {bad} holds values that are not finite")
    found: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for key, tensor in tensors.items():
        place = _place(key, names, file.part)
        if place is None:
            raise ArtifactError(f"{file.path}: the tensor {key} is of no layer of this model")
        part, name, kind = place
        if kind in found[part][name]:
            raise ArtifactError(f"{file.path}: two tensors are for {kind} of {name} in the {part}, as {key}")
        found[part][name][kind] = tensor
    if not found:
        raise ArtifactError(f"{file.path}: it holds no tensor")
    configs = {file.part: file.config} if file.part and file.config else dict(_read_metadata(file.path))
    return {
        part: {name: _make_layer(name, layer, configs.get(part), file.path) for name, layer in layers.items()}
        for part, layers in found.items()
    }


def _make_layer(name: str, tensors: Mapping[str, Tensor], config: dict[str, Any] | None, path: Path) -> Layer:
    if missing := {"down", "up"} - tensors.keys():
        raise ArtifactError(f"{path}: of {name} the {missing.pop()} matrix is missing")
    down, up = tensors["down"], tensors["up"]
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or not 1 <= down.shape[0] == up.shape[1] <= MAX_RANK:
        raise ArtifactError(f"{path}: of {name} the shapes {tuple(down.shape)} and {tuple(up.shape)} are of no LoRA")
    rank, alpha = down.shape[0], float(down.shape[0])  # the convention where nothing is said
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
        if name == key.removeprefix("text_model.") or name.endswith("." + key):
            return value
    return default


def _check_shapes(layers: Mapping[str, Layer], module: nn.Module, path: Path) -> None:
    modules: dict[str, Any] = {name.removeprefix("text_model."): layer for name, layer in module.named_modules()}
    for name, layer in layers.items():
        weight = modules[name].weight
        shape = (layer.up.shape[0], *layer.down.shape[1:])
        if math.prod(shape) != weight.numel() or shape[:2] != tuple(weight.shape[:2]):
            raise ArtifactError(
                f"{path}: made for another model: {name} changes a weight of shape {shape}, here of {tuple(weight.shape)}"
            )


def _check_whole(layers: Mapping[str, Layer], part: str, names: Mapping[str, str], file: _File) -> None:
    """Nothing is missing: what peft's configuration names, layers of a text encoder, in an attention what others have."""
    known = set(names.values())
    if file.config is not None:
        targets = [str(target).removeprefix("text_model.") for target in file.config["target_modules"]]
        expected = {name for name in known if any(name == target or name.endswith("." + target) for target in targets)}
        if expected != layers.keys():
            wrong = expected ^ layers.keys()
            raise ArtifactError(f"{file.path}: {len(wrong)} layers are missing or not among target_modules, as {min(wrong)}")
    siblings: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in layers:
        parent, _, child = name.removesuffix(".0").rpartition(".")
        siblings[re.sub(r"\d+", "#", parent)][parent].add(child)
    for kind, parents in siblings.items():
        children = set().union(*parents.values())
        if part != "unet":
            for name in known:
                parent = name.rpartition(".")[0]
                if re.sub(r"\d+", "#", parent) == kind:
                    parents.setdefault(parent, set())
        if lacking := {parent for parent, present in parents.items() if present != children}:
            parent = min(lacking)
            missing = min(children - parents[parent])
            raise ArtifactError(
                f"{file.path}: {len(lacking)} layers of the {part} are incomplete, as {parent} without {missing}"
            )
