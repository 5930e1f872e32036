"""Weights read without running any code, and networks made of them; what is not sound is refused."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import NotFoundError, reading
from .files import check_content, quiet_hub, sha256

SCORER = "a scorer's checkpoint"


@functools.cache
def quiet_libraries() -> None:
    """Keep the libraries that load networks from printing bars and advice of their own; downloads keep their bar."""
    import diffusers.utils.logging
    import transformers.utils.logging
    from huggingface_hub import utils as hub

    are_shown = not hub.are_progress_bars_disabled()
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    if are_shown:  # transformers switches off those of downloads as well
        hub.enable_progress_bars()
    quiet_hub()
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|diffusers|peft)[.]")


def refused(path: Path, kind: str = SCORER) -> contextlib.AbstractContextManager[None]:
    """Raise ArtifactError, with the file and what it was to be, for whatever goes wrong with its content."""
    return reading(f"{path}: refused as {kind}")


def read_tensors(path: Path, kind: str = SCORER) -> dict[str, Tensor]:
    """A file's tensors by name, from safetensors or from a pickle, plain or in a `state_dict`; no code is run.

    `kind` says in messages what the file was to be.

    Raises:
        NotFoundError: the file is not there.
        ArtifactError: the file is damaged, unsafe, or holds something else.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise NotFoundError(f"reward: there is no checkpoint {str(path)!r}")
    with refused(path, kind):
        check_content(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        check_cached(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        tensors = content.get("state_dict", content) if isinstance(content, dict) else content
        if not isinstance(tensors, dict) or not all(
            isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()
        ):
            raise ValueError("it holds no tensors by name")
        return tensors


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, none of other files; raises what safetensors does."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of a safetensors file's tensors by name, read from its header alone; raises what safetensors does."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping


def check_cached(path: Path) -> None:
    """Check a file of the hub's cache, which names a large file by its SHA-256; raises ValueError."""
    blob = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", blob) and (digest := sha256(path)) != blob:
        raise ValueError(f"its SHA-256 is {digest}; delete it, so that it is fetched anew")


def read_finite(path: Path, kind: str) -> dict[str, Tensor]:
    """As `read_tensors`, all of them plain and finite; 8-bit numbers become 16-bit ones.

    Raises:
        NotFoundError, ArtifactError: as `read_tensors`, or a tensor is something else.
    """
    tensors = read_tensors(path, kind)
    with refused(path, kind):
        for name, tensor in tensors.items():
            if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
                raise ValueError(f"{name} is no plain tensor")
            if tensor.is_floating_point() and tensor.element_size() == 1:
                tensors[name] = tensor.half()
            if not tensors[name].isfinite().all():
                raise ValueError(f"the tensor {name} holds values that are not finite")
    return tensors


# --- using them ---


def build_empty(make: Any, *arguments: Any, **keywords: Any) -> Any:
    """A model without memory for its weights, which `fill` brings: drawing a billion random ones first takes a minute."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return make(*arguments, **keywords)


def fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give a model its weights, every one used and none missing.

    Raises:
        ArtifactError: the tensors are another architecture's.
    """
    with refused(path):
        model.load_state_dict(tensors, strict=True, assign=True)


def load_pretrained(cls: Any, folder: Path) -> Any:
    """A model of a folder in transformers' format, none of its tensors missing or unused; transformers would only warn.

    Raises:
        NotFoundError: its configuration or its weights are missing.
        ArtifactError: files are damaged, or tensors missing, foreign or of other shapes.
    """
    quiet_libraries()
    if not (folder / "config.json").is_file():  # without it transformers builds its default architecture
        raise NotFoundError(f"reward: there is no config.json in {str(folder)!r}")
    safe, pickle = any(folder.glob("model*.safetensors")), folder / "pytorch_model.bin"
    if not safe and not pickle.exists():
        raise NotFoundError(f"reward: {str(folder)!r} holds neither model.safetensors nor pytorch_model.bin")
    with refused(folder):
        if safe:
            model, info = cls.from_pretrained(folder, output_loading_info=True, use_safetensors=True, local_files_only=True)
        else:
            config = cls.config_class.from_pretrained(folder, local_files_only=True)
            tensors = read_tensors(pickle)
            model, info = cls.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
        if wrong := [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]:
            raise ValueError(f"{len(wrong)} tensors are missing, foreign or of another shape, as {wrong[0]}")
    return model
