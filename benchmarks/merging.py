"""The tiny model's held-out result with trained adapters side by side, and merged into one pipeline: `merging.py FOLDER...`.

Guidance's null prompt goes through the tuned text encoder in both, as it does in any merged pipeline.
"""

import argparse
import tempfile
from pathlib import Path

from meters import heldout_images, heldout_means
from rich.console import Console
from rich.table import Table
from torch import Tensor

from texforce import Policy, adapters, merging, models, prompt_sets, rewards
from texforce.config import TrainOptions, resolve
from texforce.draw_config import MergeOptions, System, parse_weighted, resolve_merge


def draw(model: models.Model, prompts: list[str]) -> Tensor:
    config = resolve(TrainOptions(model="tiny"))
    return heldout_images(Policy(model, config), prompts, config.sample_batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", help="output folders of trainings, or PATH:WEIGHT")
    folders = parser.parse_args().folders
    prompts = prompt_sets.read_prompts("world-heldout")
    base, side_by_side = models.load_model("tiny"), System("side by side", tuple(map(parse_weighted, folders)))
    drawn = {"base": draw(base, prompts), "side by side": draw(adapters.put_on(base, side_by_side), prompts)}
    with tempfile.TemporaryDirectory() as place:
        given = MergeOptions(adapter=folders, model="tiny", output_dir=str(Path(place) / "merged"))
        merged = merging.merge(resolve_merge(given))
        drawn["merged"] = draw(models.load_model(str(merged)), prompts)
    hps = {"hps": rewards.load_reward("hps")}
    results = {name: heldout_means(images, prompts, hps) for name, images in drawn.items()}
    table = Table("measure", *results)
    for name in results["base"]:
        table.add_row(name, *(f"{result[name]:.4f}" for result in results.values()))
    Console().print(table)
    print(f"largest difference of a pixel: {(drawn['merged'] - drawn['side by side']).abs().max():.1e}")


if __name__ == "__main__":
    main()
