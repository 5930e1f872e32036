"""Weights of scorers: fetched from the hub at a pinned revision or given by hand, read without running any code."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SCORER = "a scorer's checkpoint"
MIN_CACHED_BYTES = 2**24  # a smaller pickle is read in no time


class ArtifactError(Exception):
    """A file of weights that is damaged, foreign or unsafe, and was refused."""


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
        FileNotFoundError: it is not there, or the hub cannot be reached.
    """
    source = HUB[name]
    if name in checkpoints:
        path = Path(checkpoints[name])
        if not (path.is_file() if isinstance(source, HubFile) else path.is_dir()):
            kind = "a file" if isinstance(source, HubFile) else "a folder"
            raise FileNotFoundError(f"reward: there is no checkpoint {str(path)!r}; for {name} it must be {kind}")
        return path
    try:
        return _fetch(source)
    except Exception as error:  # the hub's client has changed its HTTP library, and their errors have no class in common
        if isinstance(error, OSError) and error.errno is not None:  # the disk is full, or may not be written to
            raise
        what = source.name if isinstance(source, HubFile) else "the model"
        raise FileNotFoundError(
            f"reward: {what} of {source.repository} could not be had from the hub; give it with "
            f"--reward-checkpoint {name}=PATH ({describe(error)[:120]})"
        ) from error


def _fetch(source: HubFile | HubFolder) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    if isinstance(source, HubFile):
        return Path(hf_hub_download(source.repository, source.name, revision=source.revision))
    wanted = [*source.patterns, *(("model*.safetensors*",) if source.patterns == MODEL else ())]
    folder = Path(snapshot_download(source.repository, revision=source.revision, allow_patterns=wanted))
    if source.patterns == MODEL and not any(folder.glob("*.safetensors")):  # only then the pickle of the same weights
        snapshot_download(source.repository, revision=source.revision, allow_patterns=["pytorch_model*.bin*"])
    return folder


def describe_source(name: str) -> dict[str, Any]:
    """What the hub has for a name of HUB, for the record."""
    return {"repository": HUB[name].repository, "revision": HUB[name].revision}


def describe_files(path: Path) -> dict[str, Any]:
    """A file's or folder's name, and the SHA-256 of what is in it, for the record."""
    if path.is_file():
        return {"name": path.name, "sha256": sha256(path)}
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {"name": path.name, "sha256": {file.relative_to(path).as_posix(): sha256(file) for file in files}}


def is_fetched(name: str) -> bool:
    """Whether what the hub has for a name of HUB is in its local cache; asks nobody."""
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


def read_tensors(path: Path, kind: str = SCORER, keep: bool = True) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, from safetensors or from a pickle, plain or in a `state_dict`; no code is run.

    With `keep`, a large pickle is read once and kept as safetensors in the cache, under its SHA-256; the copy's lies beside.
    What kind of file it was to be is told to who gave another.

    Raises:
        FileNotFoundError: the file is not there.
        ArtifactError: the file is damaged, unsafe, or holds something else.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"reward: there is no checkpoint {str(path)!r}")
    with refused(path, kind):
        if path.suffix == ".safetensors":
            return load_file(path)
        digest = _checked_sha256(path)
        if not keep or path.stat().st_size < MIN_CACHED_BYTES:
            return _unpickle(path)
        copy, note = (cache_folder() / f"{digest}.{ending}" for ending in ("safetensors", "sha256"))
        if copy.is_file() and note.is_file() and note.read_bytes() == sha256(copy).encode():
            return load_file(copy)
        tensors = _unpickle(path)
        try:
            _keep(tensors, copy, note)
        except OSError as error:
            warnings.warn(f"{path} was read, but no copy could be kept in {copy.parent}: {error}", stacklevel=2)
        return tensors


def describe(error: BaseException) -> str:
    """Kind and words of an error, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def read_finite(path: Path, kind: str) -> dict[str, Tensor]:
    """As `read_tensors`, all of them plain and finite; nothing is kept, and 8-bit numbers become 16-bit ones.

    Raises:
        FileNotFoundError, ArtifactError: as `read_tensors`, or a tensor is something else.
    """
    tensors = read_tensors(path, kind, keep=False)
    with refused(path, kind):
        for name, tensor in tensors.items():
            if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
                raise ValueError(f"{name} is no plain tensor")
            if tensor.is_floating_point() and tensor.element_size() == 1:
                tensors[name] = tensor.half()
            if not tensors[name].isfinite().all():
                raise ValueError(f"the tensor {name} holds values that are not finite")
    return tensors


@contextlib.contextmanager
def refused(path: Path, kind: str = SCORER) -> Iterator[None]:
    """Within it, what goes wrong with a file's content is an ArtifactError that names the file."""
    try:
        yield
    except ArtifactError:
        raise
    except pickle.UnpicklingError as error:  # torch's own words advise to run whatever code is in the file
        raise ArtifactError(f"{path}: refused as {kind}: not a file of tensors alone") from error
    except Exception as error:  # what a damaged file can make its reader do is without end
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
            isinstance(error, OSError) and error.errno is not None
        ):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArtifactError(f"{path}: refused as {kind}: {reason[:300]}") from error


def _unpickle(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()):
        raise ValueError("it holds no tensors by name")
    return tensors


def _checked_sha256(path: Path) -> str:
    digest, blob = sha256(path), path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", blob) and blob != digest:  # the hub's cache names a large file by its SHA-256
        raise ValueError(f"its SHA-256 is {digest}; delete it, so that it is fetched anew")
    return digest


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keep(tensors: Mapping[str, Tensor], copy: Path, note: Path) -> None:
    from safetensors.torch import save_file

    copy.parent.mkdir(parents=True, exist_ok=True)
    temporary = copy.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, temporary)
        digest = sha256(temporary)
        temporary.replace(copy)
    finally:
        temporary.unlink(missing_ok=True)
    note.write_text(digest)


def cache_folder() -> Path:
    """Where copies of checkpoints are kept: $XDG_CACHE_HOME/texforce, or ~/.cache/texforce."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "texforce"


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
        ArtifactError: files are missing or damaged, or tensors missing, foreign or of other shapes.
    """
    with refused(folder):
        if any(folder.glob("model*.safetensors")):
            model, info = cls.from_pretrained(folder, output_loading_info=True, use_safetensors=True, local_files_only=True)
        else:
            config = cls.config_class.from_pretrained(folder, local_files_only=True)
            tensors = read_tensors(folder / "pytorch_model.bin")
            model, info = cls.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
        if wrong := [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]:
            raise ValueError(f"{len(wrong)} tensors are missing, foreign or of another shape, as {wrong[0]}")
    return model
