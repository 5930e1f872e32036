"""Checkpoints of a training, from which it goes on exactly: what they hold, how they are written, and which one is taken.

A checkpoint is a folder of safetensors and JSON, no pickle. It is written beside its place, with the SHA-256 of every file
in a manifest, and moved there whole; so one that was cut off, or has changed since, is known and passed over.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from texforce import record
from texforce.advantages import PromptStatistics
from texforce.config import TrainConfig

if TYPE_CHECKING:
    import texforce
    from texforce import rewards
    from texforce.experience import PromptOrder
    from texforce.learner import Learner

CHECKPOINTS = "checkpoints"  # their folder in that of a run
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
# What a run may go on with though it has changed: none of it decides the adapter.
FREE_OPTIONS = (
    "output_dir", "report_to", "checkpoint_every", "checkpoints_to_keep", "reward_timeout", "max_kl", "max_reward_drop",
    "micro_batch", "micro_batch_size", "gradient_checkpointing",  # but for the rounding of sums
)  # fmt: skip
# What one cannot change in the middle: earlier epochs were measured by it.
LASTING_OPTIONS = ("reward", "normalise_rewards", "eval_reward")


# --- what changes in a run ---


@dataclass(frozen=True)
class Snapshot:
    """A run between two epochs: tensors on the CPU, and everything else as JSON."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def epoch(self) -> int:
        return self.state["epochs"][-1]["epoch"]


@dataclass
class Run:
    """All that changes while a training runs."""

    policy: texforce.Policy
    learner: Learner
    reward: rewards.Mixture
    statistics: PromptStatistics
    order: PromptOrder
    generators: dict[str, torch.Generator]
    epochs: list[dict[str, Any]]  # what was measured of each, the first before training

    def snapshot(self) -> Snapshot:
        """A copy of all of it."""
        learner = self.learner
        tensors: dict[str, Tensor] = {f"policy.{i}": parameter for i, parameter in enumerate(self.policy.parameters)}
        for i, parameter in enumerate(self.policy.parameters):
            tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in learner.optimizer.state[parameter].items()}
        if learner.ema is not None:
            tensors |= {f"ema.{i}": tensor for i, tensor in enumerate(learner.ema.shadow_params)}
        tensors |= {f"generator.{name}": generator.get_state() for name, generator in self.generators.items()}
        state = {
            "epochs": list(self.epochs),
            "order": list(self.order.waiting),
            "statistics": {prompt: list(seen) for prompt, seen in self.statistics.history.items()},
            "spreads": {name: dict(vars(spread)) for name, spread in self.reward.spreads.items()},
            "num_steps": learner.lr_scheduler.last_epoch,
            "scaler": learner.scaler.state_dict(),
            "num_skipped": learner.num_skipped,
            "micro_batch_size": learner.micro_batch_size,
            "ema_step": learner.ema.optimization_step if learner.ema is not None else None,
            "device": self.policy.models.device.type,
        }
        return Snapshot({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, state)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Put everything as it was.

        Raises:
            ValueError: the snapshot is of other parameters, or of another kind of device, whose random numbers differ.
        """
        learner, tensors, state = self.learner, snapshot.tensors, snapshot.state
        if state["device"] != self.policy.models.device.type:
            raise ValueError(f"resume: the run was on {state['device']}, and goes on there only")
        parameters = self.policy.parameters
        shapes = [tensors[name].shape for name in (f"policy.{i}" for i in range(len(parameters))) if name in tensors]
        if shapes != [parameter.shape for parameter in parameters] or f"policy.{len(parameters)}" in tensors:
            raise ValueError("resume: the checkpoint's adapter has other layers or another rank than this run's")
        learner.optimizer.state.clear()
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"policy.{i}"])
            start = f"optimizer.{i}."
            moments = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
            if moments:  # none before the first step; the step count stays on the CPU, as AdamW has it
                learner.optimizer.state[parameter] = {
                    name: tensor.clone() if name == "step" else tensor.to(parameter.device, copy=True)
                    for name, tensor in moments.items()
                }
        if learner.ema is not None and "ema.0" in tensors:
            for i, average in enumerate(learner.ema.shadow_params):
                average.copy_(tensors[f"ema.{i}"])
            learner.ema.optimization_step = state["ema_step"]
        for name, generator in self.generators.items():
            generator.set_state(tensors[f"generator.{name}"])
        learner.set_num_steps(state["num_steps"])
        if state["scaler"]:
            learner.scaler.load_state_dict(state["scaler"])
        learner.num_skipped = state["num_skipped"]
        if learner.finds_micro_batch:  # as it was found before: another size rounds otherwise
            learner.micro_batch_size = min(learner.micro_batch_size, state.get("micro_batch_size", learner.micro_batch_size))
        self.order.waiting = list(state["order"])
        self.statistics.history.clear()
        for prompt, seen in state["statistics"].items():
            self.statistics.history[prompt].extend(seen)
        for name, numbers in state["spreads"].items():
            vars(self.reward.spreads[name]).update(numbers)
        self.epochs[:] = state["epochs"]


# --- writing ---


def write(folder: Path, snapshot: Snapshot, config: TrainConfig, prompts: Sequence[str], num_kept: int) -> Path:
    """Write a checkpoint into a run's folder of them, and remove all but the newest ones; returns where it lies.

    Raises:
        OSError: storage. What was there before is as it was.
    """
    from safetensors.torch import save_file

    place = folder / f"epoch_{snapshot.epoch:06d}"
    content = {"config": asdict(config), "prompts": digest(prompts), **snapshot.state}
    if place.is_dir() and is_valid(place) and read(place).state["config"] == content["config"]:
        return place
    if not folder.exists():
        folder.mkdir()
        record.sync(folder.parent)
    remove_orphans(folder)
    temporary = folder / f"{place.name}.tmp"
    temporary.mkdir()
    try:
        with record.storage_errors(temporary / TENSORS):
            save_file(snapshot.tensors, temporary / TENSORS)
        record.open_to_umask(temporary / TENSORS)
        (temporary / STATE).write_text(json.dumps(content, allow_nan=False))
        (temporary / MANIFEST).write_text(manifest(temporary))
        for path in (*temporary.iterdir(), temporary):
            record.sync(path)
        if place.exists():  # broken, or of a run that has since been changed by force
            _remove(place)
        temporary.rename(place)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    record.sync(folder)
    later = [other for other in checkpoints(folder) if other.name > place.name]  # broken: the run goes on from before them
    for other in (*later, *checkpoints(folder)[len(later) + num_kept :]):
        _remove(other)
    return place


def manifest(folder: Path) -> str:
    """The SHA-256 of each of a checkpoint's files, as the manifest's own text: any other text is not it."""
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != MANIFEST}
    return json.dumps(dict(sorted(sums.items())), indent=2) + "\n"


def digest(prompts: Sequence[str]) -> str:
    """SHA-256 of prompts in their order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that, cut off half-way, none is left that looks like one."""
    doomed = checkpoint.with_suffix(".old.tmp")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def remove_orphans(folder: Path) -> None:
    """Remove what savings that were cut off have left in a run's folder, or in that of its checkpoints; raises OSError."""
    for orphan in folder.glob("*.tmp"):
        if orphan.is_file():
            orphan.unlink()
        elif orphan.name.startswith((record.ADAPTER, "epoch_")):
            shutil.rmtree(orphan)


# --- reading ---


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest first, valid or not."""
    return sorted(folder.glob("epoch_" + 6 * "[0-9]"), reverse=True)


def is_valid(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is the one that was written, and none is missing; raises OSError."""
    try:
        names = {path.name for path in checkpoint.iterdir()}
        return names == {TENSORS, STATE, MANIFEST} and (checkpoint / MANIFEST).read_bytes() == manifest(checkpoint).encode()
    except (FileNotFoundError, NotADirectoryError):
        return False


def newest(folder: Path, passed_over: Callable[[Path], None] = lambda checkpoint: None) -> Path | None:
    """The newest valid checkpoint, if there is one; each broken one before it is told. Raises OSError."""
    for checkpoint in checkpoints(folder):
        if is_valid(checkpoint):
            return checkpoint
        passed_over(checkpoint)
    return None


def read(checkpoint: Path) -> Snapshot:
    """What a valid checkpoint holds."""
    from safetensors.torch import load_file

    return Snapshot(load_file(checkpoint / TENSORS), json.loads((checkpoint / STATE).read_text()))


def check_same(
    saved: Mapping[str, Any], config: TrainConfig, snapshot: Snapshot | None, prompts: Sequence[str], forced: bool
) -> None:
    """See that a run goes on as it began, by the options that were saved with it and the prompts in its checkpoint.

    Raises:
        ValueError: an option or the prompts have changed, and it is not forced or cannot be; tells which, and how.
    """
    changes = differences(saved, asdict(config))
    lasting = [change for change in changes if change.partition(":")[0] in LASTING_OPTIONS]
    if forced and lasting and snapshot:
        raise ValueError(f"resume: what measures a run cannot change in it: {'; '.join(lasting)}; begin another")
    if snapshot and snapshot.state["prompts"] != digest(prompts):
        changes.append("the prompts")
    if changes and not forced:
        raise ValueError(f"resume: changed since the checkpoint: {'; '.join(changes)}; --force-resume goes on with the new")


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Options that decide a run and differ, as `name: old -> new`; what was no option yet had its default."""
    saved = {item.name: item.default for item in fields(TrainConfig)} | dict(saved)
    names = [name for name in given if name not in FREE_OPTIONS and saved.get(name) != given[name]]
    return [f"{name}: {saved.get(name)} -> {given[name]}" for name in names]
