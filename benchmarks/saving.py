"""What checkpoints cost the README's training: `python benchmarks/saving.py`.

A few epochs of the command's own settings are trained; snapshots, of which there is one an epoch, and checkpoints are timed
beside them.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from texforce import run, train
from texforce.config import TrainConfig, TrainOptions, resolve

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--num-epochs", type=int, default=5)
options = parser.parse_args()
spent: dict[str, list[float]] = {"snapshot": [], "checkpoint": []}


def timed(name, function):
    def run(*arguments):
        start = time.perf_counter()
        result = function(*arguments)
        spent[name].append(time.perf_counter() - start)
        return result

    return run


run.Run.snapshot = timed("snapshot", run.Run.snapshot)
run.write_checkpoint = timed("checkpoint", run.write_checkpoint)
with tempfile.TemporaryDirectory() as place:
    # Prompts and batches are those of the command; so many checkpoints only to have many times.
    config = TrainConfig(
        model="tiny", num_epochs=options.num_epochs, checkpoint_every=1, output_dir=str(Path(place) / "out")
    )
    seconds = train.train(config)["seconds"] - sum(sum(times) for times in spent.values())
    size = sum(
        path.stat().st_size for path in (Path(place) / "out" / "checkpoints" / f"epoch_{options.num_epochs:06d}").iterdir()
    )
snapshot, checkpoint = (sum(times) / len(times) for times in spent.values())
epoch, every = seconds / options.num_epochs, resolve(TrainOptions(model="tiny")).checkpoint_every
print(
    json.dumps(
        {
            "epoch_seconds": epoch,
            "snapshot_seconds": snapshot,
            "checkpoint_seconds": checkpoint,
            "checkpoint_bytes": size,
            "share": (snapshot + checkpoint / every) / epoch,
        },
        indent=2,
    )
)
