"""Sample efficiency on the tiny model: `python benchmarks/efficiency.py --output-dir runs`.

The published recipe (`--preset paper`), its learning rate and clip range chosen on a grid after a quarter of the images, is
trained on 16,000 images; then the default, until its held-out alignment is what the paper's was. Finished runs are not made
again. Prints both tables and draws held-out alignment against seconds of training (measuring left out) and against images.
"""

import json
from pathlib import Path
from typing import Any

import texforce

NUM_PROMPTS, NUM_EPOCHS = 250, 64  # 16,000 images
LEARNING_RATES, CLIP_RANGES = (1e-3, 3e-3), (1e-4, 5e-3)
GRID_EPOCHS = 16


def paper(learning_rate: float, clip_range: float, seed: int, num_epochs: int) -> dict[str, Any]:
    """Options of a run of the published recipe."""
    return {
        "preset": "paper",
        "learning_rate": learning_rate,
        "clip_range": clip_range,
        "seed": seed,
        "num_prompts_per_epoch": NUM_PROMPTS,
        "num_epochs": num_epochs,
        "eval_every": 8,
    }


def run(folder: Path, **options: Any) -> list[dict[str, Any]]:
    """The epochs of one training, with the seconds that were spent on training alone."""
    if not (folder / "result.json").is_file():
        config = texforce.TrainConfig(model="tiny", output_dir=str(folder), **options)
        texforce.train(
            config, lambda measures: print(folder.name, measures["epoch"], measures.get("heldout", "")), go_on=True
        )
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = images = 0.0
    for epoch in epochs:
        if epoch["epoch"]:
            seconds += (epoch["num_images"] - images) / epoch["images_per_s"]
            images = epoch["num_images"]
        epoch["training_seconds"] = seconds
    return epochs
