"""Where the weights of scorers are: given by hand, or on the hub at a pinned revision. Loads neither them nor PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import NotFoundError, reading
from .files import describe_files, quiet_hub


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


def given_weights(name: str, path: str | Path) -> Path:
    """The file or folder given for a name of HUB.

    Raises:
        NotFoundError: it is not there.
    """
    path, is_file = Path(path), isinstance(HUB[name], HubFile)
    if not (path.is_file() if is_file else path.is_dir()):
        kind = "a file" if is_file else "a folder"
        raise NotFoundError(f"reward_checkpoint: there is no checkpoint {str(path)!r}; for {name} it must be {kind}")
    return path


def find_weights(name: str, checkpoints: Mapping[str, str | Path]) -> Path:
    """The file or folder given for a name of HUB, or else what the hub has.

    Raises:
        NotFoundError: it is not there, or the hub cannot be reached.
    """
    if checkpoints.get(name, "hub") != "hub":
        return given_weights(name, checkpoints[name])
    source = HUB[name]
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
