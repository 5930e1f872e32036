"""How much of a training's gain a stricter detector confirms: `python benchmarks/strictness.py out [more folders]`.

The detector names the shape that overlaps a region most, so a blend of two shapes counts as the nearer one. Here the shape
must also overlap its ideal drawing by a minimum. Printed is the share of held-out prompts fully right, base and tuned, from
the noise of the training's own measurement; and of exact renderings, which shows what a minimum asks of a flawless image.
"""

import random
import sys

import torch
from rich.console import Console
from rich.table import Table

import texforce
from texforce import adapters, models, prompt_sets, sampler, train, world
from texforce.config import resolve

MINIMA = (0.6, 0.85, 0.9, 0.925, 0.95)  # the first is the detector's own


def exact(images: torch.Tensor, scenes: list[world.Scene], min_overlap: float) -> float:
    found = world.detect(images, min_overlap=min_overlap)
    return sum(world.judge(seen, scene) == 1 for seen, scene in zip(found, scenes, strict=True)) / len(scenes)


def main() -> None:
    options = resolve(texforce.TrainConfig(model="tiny"))
    prompts = prompt_sets.read_prompts("world-heldout")
    scenes = [world.parse(prompt) for prompt in prompts]
    systems = {"exact renderings": world.render(scenes, random.Random(0))}
    for folder in (None, *sys.argv[1:]):
        models = models.load_model("tiny")
        models = adapters.load_adapters(models, [folder]) if folder else models
        schedule = sampler.ddim_schedule(models.scheduler, options.num_inference_steps, options.eta)
        denoiser = sampler.Denoiser(models.unet, schedule, options.guidance_scale)
        policy = texforce.Policy(models, options.null_prompt)
        systems[folder or "base"] = train.heldout_images(policy, denoiser, prompts, options)
    table = Table("system", *(f"overlap {minimum}" for minimum in MINIMA))
    for name, images in systems.items():
        table.add_row(name, *(f"{exact(images, scenes, minimum):.3f}" for minimum in MINIMA))
    Console().print(table)


if __name__ == "__main__":
    main()
