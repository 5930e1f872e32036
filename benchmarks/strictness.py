"""How much of a training's gain a stricter detector confirms: `python benchmarks/strictness.py out [more folders]`.

The detector names the shape that overlaps a region most, so a blend of two shapes counts as the nearer one. Here the shape
must also overlap its ideal drawing by a minimum. Printed is the share of held-out prompts fully right, base and tuned, from
the noise of the training's own measurement; and of exact renderings, which shows what a minimum asks of a flawless image.
"""

import argparse
import random
import runpy
from pathlib import Path

import torch
from meters import heldout_images
from rich.console import Console
from rich.table import Table

from texforce import Policy, adapters, detector, models, prompt_sets, world
from texforce.config import TrainOptions, resolve
from texforce.draw_config import System

MINIMA = (0.6, 0.85, 0.9, 0.925, 0.95)  # the first is the detector's own


def exact(images: torch.Tensor, scenes: list[world.Scene], min_overlap: float) -> float:
    found = detector.detect(images, min_overlap=min_overlap)
    return sum(detector.judge(seen, scene) == 1 for seen, scene in zip(found, scenes, strict=True)) / len(scenes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", help="output folders of trainings")
    folders = parser.parse_args().folders
    config = resolve(TrainOptions(model="tiny"))
    prompts = prompt_sets.read_prompts("world-heldout")
    scenes = [world.parse(prompt) for prompt in prompts]
    render = runpy.run_path(str(Path(__file__).parents[1] / "tiny" / "build.py"))["render"]
    systems = {"exact renderings": render(scenes, random.Random(0))}
    for folder in (None, *folders):
        system = System(folder or "base", ((folder, 1.0),) if folder else ())
        policy = Policy(adapters.put_on(models.load_model("tiny"), system), config)
        systems[system.name] = heldout_images(policy, prompts, config.sample_batch_size)
    table = Table("system", *(f"overlap {minimum}" for minimum in MINIMA))
    for name, images in systems.items():
        table.add_row(name, *(f"{exact(images, scenes, minimum):.3f}" for minimum in MINIMA))
    Console().print(table)


if __name__ == "__main__":
    main()
