"""What checkpoints cost the README's training: `python benchmarks/saving.py`.

It trains a few epochs with the command's own settings, and times snapshots, one an epoch, and checkpoints beside them.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from texforce import run, training
from texforce.config import TrainOptions, resolve


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, which adds the seconds of each call to a list."""

    def call(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - start)
        return result

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--num-epochs", type=int, default=5)
    num_epochs = parser.parse_args().num_epochs
    snapshots: list[float] = []
    checkpoints: list[float] = []
    with (
        tempfile.TemporaryDirectory() as place,
        mock.patch.object(run.Run, "snapshot", timed(run.Run.snapshot, snapshots)),
        mock.patch.object(run, "write_checkpoint", timed(run.write_checkpoint, checkpoints)),
    ):
        # Prompts and batches are the command's; a checkpoint an epoch gives many times to average.
        output_dir = Path(place, "out")
        given = TrainOptions(model="tiny", num_epochs=num_epochs, checkpoint_every=1, output_dir=str(output_dir))
        seconds = training.train(resolve(given))["seconds"] - sum(snapshots) - sum(checkpoints)
        newest = output_dir / run.CHECKPOINTS / f"epoch_{num_epochs:06d}"
        size = sum(path.stat().st_size for path in newest.iterdir())
    snapshot, checkpoint = (sum(times) / len(times) for times in (snapshots, checkpoints))
    epoch, every = seconds / num_epochs, resolve(TrainOptions(model="tiny")).checkpoint_every
    costs = {
        "epoch_seconds": epoch,
        "snapshot_seconds": snapshot,
        "checkpoint_seconds": checkpoint,
        "checkpoint_bytes": size,
        "share": (snapshot + checkpoint / every) / epoch,
    }
    print(json.dumps(costs, indent=2))


if __name__ == "__main__":
    main()
