"""An evaluation and its folder: what is drawn and measured, and what of it lies there already."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from texforce import adapters, checkpoints, measures, pipelines, record
from texforce.config import default_device, read_json
from texforce.config_inference import EvalConfig, System
from texforce.prompt_sets import Benchmark

SETTINGS, SCORES, SPEED = "settings.json", "scores.jsonl", "speed.jsonl"
BROKEN = "not finite"  # in a PNG's metadata: the image holds no numbers to be scored


@dataclass(frozen=True)
class Evaluation:
    """What is drawn and measured, and where it lies."""

    config: EvalConfig
    benchmark: Benchmark
    systems: list[System]  # the base first; of a sweep, every system at every strength

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def chunks(self) -> list[range]:
        """Prompts, by index, that are drawn and scored together."""
        num_prompts, size = len(self.benchmark.prompts), max(1, self.config.batch_size // self.config.num_images)
        return [range(start, min(start + size, num_prompts)) for start in range(0, num_prompts, size)]

    def seed(self, i: int, k: int) -> int:
        """Of the noise of prompt i's image k, for every system; other prompts and --limit have no say in it."""
        text = f"{self.config.seed} {k} {self.benchmark.prompts[i]}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])  # JavaScript's numbers hold 53 bits

    def images(self, chunk: range) -> Iterator[tuple[int, int]]:
        """Prompt and number of each image of a chunk."""
        return itertools.product(chunk, range(self.config.num_images))

    def repeated_prompts(self, chunk: range) -> list[str]:
        """The prompt of each image of a chunk."""
        return [self.benchmark.prompts[i] for i, _ in self.images(chunk)]

    def image(self, system: System, i: int, k: int) -> Path:
        """Where an image lies in the folder."""
        return Path("images", system.name, f"{i:05d}_{k}.png")

    def is_drawn(self, system: System, chunk: range) -> bool:
        return all((self.folder / self.image(system, i, k)).is_file() for i, k in self.images(chunk))

    def read_images(self, system: System, chunk: range) -> Tensor:
        """Images (N, 3, H, W) of a chunk, as they lie in the folder: NaN where what was drawn is not finite.

        Raises:
            ArtifactError: one is damaged.
        """
        images = []
        for i, k in self.images(chunk):
            pixels, labels = record.read_image(self.folder / self.image(system, i, k))
            images.append(torch.full_like(pixels, torch.nan) if BROKEN in labels else pixels)
        return torch.stack(images)


def at_strengths(config: EvalConfig) -> list[System]:
    """The systems, or each of them at each strength that is tried."""
    if not config.strengths:
        return config.systems
    return [scaled(system, strength) for system in config.systems for strength in config.strengths]


def scaled(system: System, strength: float) -> System:
    """A system with all its weights times a strength, and a name that says so."""
    adapters, unets = (
        tuple((path, weight * strength) for path, weight in terms) for terms in (system.adapters, system.unets)
    )
    return System(f"{system.name}@{strength:g}", adapters, unets)


# --- what was drawn ---


def check_folder(folder: Path) -> None:
    """See that an evaluation can begin, or go on, in a folder.

    Raises:
        ValueError: something else is in it.
    """
    ours = (record.LOCK, record.HOLDER)
    if folder.is_dir() and not (folder / SETTINGS).is_file() and any(path.name not in ours for path in folder.iterdir()):
        raise ValueError(f"output_dir: {str(folder)!r} is not empty and holds no evaluation; choose another folder")


def write_settings(evaluation: Evaluation) -> dict[str, Any]:
    """Write down what decides the images, or see that those in the folder are of the same; returns it.

    Raises:
        ValueError: the folder holds images of something else. OSError: storage.
    """
    path, settings = evaluation.folder / SETTINGS, describe(evaluation)
    kept = read_json(path) if path.is_file() else settings
    for name, value in settings.items():
        if name != "systems" and kept.get(name) != value:
            old, new = _where_they_differ(kept.get(name), value)
            raise ValueError(
                f"output_dir: {str(evaluation.folder)!r} holds another evaluation, of {name} {old} and not {new}; choose "
                "another folder"
            )
    systems = dict(kept.get("systems", {}))
    for name, system in settings["systems"].items():
        if _without_paths(systems.setdefault(name, system)) != _without_paths(system):
            raise ValueError(
                f"output_dir: {name} in {str(evaluation.folder)!r} is another one; choose another name or another folder"
            )
    record.write_json(path, settings | {"systems": systems})
    for orphan in evaluation.folder.rglob("*.tmp"):  # of a writing that was cut off
        orphan.unlink()
    return settings


def _where_they_differ(old: Any, new: Any) -> tuple[str, str]:
    """Two values, or of two objects the parts that differ, to be shown."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in new if old.get(name) != new[name]]
        old, new = ({name: item.get(name) for name in names} for item in (old, new))
    return json.dumps(old)[:120], json.dumps(new)[:120]


def describe(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that decides the images."""
    config, benchmark = evaluation.config, evaluation.benchmark
    names = (
        "model", "num_inference_steps", "eta", "guidance_scale", "null_prompt", "resolution", "mixed_precision", "compile",
        "num_images", "batch_size", "seed",
    )  # fmt: skip
    about = {"name": benchmark.name, "num_prompts": len(benchmark.prompts), "sha256": benchmark.sha256}
    return {
        "benchmark": about | benchmark.source,
        **{name: getattr(config, name) for name in names},
        "model_revision": pipelines.revision(config.model),
        "device": default_device(),
        "versions": record.versions(),
        "systems": describe_systems(evaluation.systems),
    }


def describe_systems(systems: Sequence[System]) -> dict[str, Any]:
    """Of each system by name, what is on the base model: paths as they were given, weights, and SHA-256 of the files."""
    sums: dict[tuple[str, str], list[str]] = {}  # a sweep has the same files in every system
    readers = {"adapters": adapters.adapter_files, "unets": adapters.unet_files}

    def terms(kind: str, given: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
        for path, _ in given:
            if (kind, path) not in sums:
                sums[kind, path] = [checkpoints.sha256(file) for file in readers[kind](Path(path))]
        return [{"path": path, "weight": weight, "sha256": sums[kind, path]} for path, weight in given]

    return {
        system.name: {"adapters": terms("adapters", system.adapters), "unets": terms("unets", system.unets)}
        for system in systems
    }


def _without_paths(described: dict[str, Any]) -> Any:
    """What must stay the same of a system: a folder may be named otherwise, or have moved."""
    return {kind: [term | {"path": ""} for term in terms] for kind, terms in described.items()}


# --- what was measured ---


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; what a writing that was cut off left of its last one is taken away."""
    if not path.is_file():
        return []
    content, lines = path.read_bytes(), []
    for text in content.split(b"\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    if whole.encode() != content:
        record.write_text(path, whole)
    return lines


def append_line(path: Path, content: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(content, allow_nan=False) + "\n")


class ScoreFile:
    """The scores there are, by system, measure and first prompt of a chunk: a line of the file for each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scores = {(line["system"], line["measure"], line["start"]): line["scores"] for line in read_lines(path)}

    def __contains__(self, key: tuple[str, str, int]) -> bool:
        return key in self.scores

    def add(self, system: str, measure: str, start: int, scores: Tensor) -> None:
        values = self.scores[system, measure, start] = measures.to_json(scores)
        append_line(self.path, {"system": system, "measure": measure, "start": start, "scores": values})

    def table(self, system: str, measure: str, chunks: Sequence[range]) -> np.ndarray:
        """All scores (P, K) of a system by a measure."""
        scores = itertools.chain.from_iterable(self.scores[system, measure, chunk.start] for chunk in chunks)
        return measures.to_numpy(list(scores)).reshape(chunks[-1].stop, -1)
