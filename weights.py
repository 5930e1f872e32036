"""Weights of scorers: fetched from the hub at a pinned revision or given by hand, read without running any code."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import NotFoundError, reading
from .files import LFS_POINTER, describe_files, quiet_hub, sha256

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


# --- where they are ---


@dataclass(frozen=True)
class HubFile:
    """A file on the hub at one revision."""

    repository: str
    revision: str
    name: str


@dataclass(frozen=True)
class HubFolder:
    """What is needed of a repository in transformers' format at one revision."""

    repository: str
    revision: str
    patterns: tuple[str, ...]


TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt")
MODEL = ("config.json", "preprocessor_config.json", *TOKENIZER)  # and the weights
HPS_REVISION = "697403c78157020a1ae59d23f111aa58ced35b0a"
HUB: dict[str, HubFile | HubFolder] = {
    "hps": HubFile("xswu/HPSv2", HPS_REVISION, "HPS_v2.1_compressed.pt"),
    "hps-v2": HubFile("xswu/HPSv2", HPS_REVISION, "HPS_v2_compressed.pt"),
    "imagereward": HubFile("zai-org/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72", "ImageReward.pt"),
    "imagereward-tokenizer": HubFolder(
        "google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594", TOKENIZER
    ),
    "pickscore": HubFolder("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800", MODEL),
    "aesthetic": HubFile(
        "trl-lib/ddpo-aesthetic-predictor", "cf4bd10345610935a80a5d3be9a3133c50f121e4", "aesthetic-model.pth"
    ),
    "aesthetic-clip": HubFolder("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", MODEL),
    "hand": HubFolder("google/owlv2-base-patch16-ensemble", "cfd3195ba4ea9592eec887ded089f4c08eff231d", MODEL),
    "clip": HubFolder("openai/clip-vit-base-patch32", "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268", MODEL),
}


def find_weights(name: str, checkpoints: Mapping[str, str | Path]) -> Path:
    """The file or folder given for a name of HUB, or else what the hub has.

    Raises:
        NotFoundError: it is not there, or the hub cannot be reached.
    """
    source = HUB[name]
    if checkpoints.get(name, "hub") != "hub":
        path = Path(checkpoints[name])
        if not (path.is_file() if isinstance(source, HubFile) else path.is_dir()):
            kind = "a file" if isinstance(source, HubFile) else "a folder"
            raise NotFoundError(f"reward_checkpoint: there is no checkpoint {str(path)!r}; for {name} it must be {kind}")
        return path
    what = source.name if isinstance(source, HubFile) else "the model"
    advice = f"give it with --reward-checkpoint {name}=PATH"
    with reading(f"reward: {what} of {source.repository} could not be downloaded from the hub; {advice}", NotFoundError):
        return _fetch(source)


def _fetch(source: HubFile | HubFolder) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    quiet_hub()
    if isinstance(source, HubFile):
        return Path(hf_hub_download(source.repository, source.name, revision=source.revision))
    wanted = [*source.patterns, *(("model*.safetensors*",) if source.patterns == MODEL else ())]
    folder = Path(snapshot_download(source.repository, revision=source.revision, allow_patterns=wanted))
    if source.patterns == MODEL and not any(folder.glob("*.safetensors")):  # only then the pickle of the same weights
        snapshot_download(source.repository, revision=source.revision, allow_patterns=["pytorch_model*.bin*"])
    return folder


def describe_weights(path: Path) -> dict[str, Any]:
    """A given checkpoint's name, and the SHA-256 of what is read of it: hps also reads what lies beside the file."""
    beside = (path.with_suffix(".json"), path.parent / "tokenizer") if path.is_file() else ()
    return describe_files(path) | {other.name: describe_files(other)["sha256"] for other in beside if other.exists()}


def describe_source(name: str) -> dict[str, Any]:
    """Repository and revision of a name of HUB."""
    return {"repository": HUB[name].repository, "revision": HUB[name].revision}


def is_fetched(name: str) -> bool:
    """Whether the files of a name of HUB are in the hub's local cache; asks no server."""
    from huggingface_hub import try_to_load_from_cache

    source = HUB[name]
    if isinstance(source, HubFile):
        files = [source.name]
    elif source.patterns == MODEL:
        kinds = ("model.safetensors", "pytorch_model.bin")
        files = [name + ending for name in kinds for ending in ("", ".index.json")]
    else:
        files = ["tokenizer.json", "vocab.txt"]
    return any(isinstance(try_to_load_from_cache(source.repository, file, revision=source.revision), str) for file in files)


# --- reading them ---


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


def check_content(path: Path) -> None:
    """Check that a file of weights is neither empty nor a pointer of git-lfs; raises ValueError."""
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER.encode():
        raise ValueError("it is a git-lfs pointer and not the weights; fetch them with `git lfs pull`")
    if not start:
        raise ValueError("it is empty; fetch it anew")


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
