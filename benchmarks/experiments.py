"""The experiments of EXPERIMENTS.md on the tiny model: `python benchmarks/experiments.py --output-dir runs`.

For every seed: the text encoder (TexForce) and the U-Net (DDPO) trained with the same number of images, and the two adapters
loaded together without more training, at full and at half strength; with --paper the published recipe too. Finished runs are
not made again. Prints a table of the share of held-out prompts fully right, base and tuned from the same noise.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from texforce import Policy, adapters, models, prompt_sets, rewards, train
from texforce.config import TrainOptions, resolve

BOTH = ("text-encoder", "unet")
COMBINATIONS = {  # name: (the adapters loaded side by side, their strength)
    "combined": (BOTH, 1.0),
    "combined at half strength": (BOTH, 0.5),
    "text-encoder at half strength": (("text-encoder",), 0.5),
    "unet at half strength": (("unet",), 0.5),
}


def run(output_dir: Path, **options: Any) -> dict[str, dict[str, float]]:
    """Held-out measures, base and tuned, of one training."""
    result = output_dir / "result.json"
    if not result.is_file():
        train.train(resolve(TrainOptions(output_dir=str(output_dir), model="tiny", **options)))
    return json.loads(result.read_text())["heldout"]


def load_and_measure(folders: list[Path], scale: float) -> dict[str, dict[str, float]]:
    """Held-out measures of adapters loaded side by side at a strength, from the noise of the trainings' own measurements."""
    config = resolve(TrainOptions(model="tiny"))
    model = adapters.load_adapters(models.load_model("tiny"), [str(folder) for folder in folders], scale)
    policy = Policy(model, config)
    prompts = prompt_sets.read_prompts("world-heldout")
    scorers = {"hps": rewards.load_reward("hps")}
    tuned = train.measure(train.heldout_images(policy, prompts, config.sample_batch_size), prompts, scorers)
    with policy.base():
        base = train.measure(train.heldout_images(policy, prompts, config.sample_batch_size), prompts, scorers)
    return {name: {"base": base[name], "tuned": tuned[name]} for name in base}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", default=[*BOTH, *COMBINATIONS])
    parser.add_argument("--paper", type=int, metavar="EPOCHS", help="also run --preset paper for so many epochs")
    options = parser.parse_args()
    table = Table("seed", "system", "hps", "alignment", "fully right", "common words", "rare words")
    for seed in options.seeds:
        folders = {name: options.output_dir / f"{name}-{seed}" for name in BOTH}
        measures = {}
        for name in options.systems:
            if name in COMBINATIONS:
                parts, scale = COMBINATIONS[name]
                measures[name] = load_and_measure([folders[part] for part in parts], scale)
            else:
                measures[name] = run(folders[name], target=name, seed=seed)
        if options.paper:
            folder = options.output_dir / f"paper-{seed}"
            measures["paper"] = run(folder, preset="paper", seed=seed, num_epochs=options.paper)
        for name, measured in measures.items():
            columns = ("hps", "alignment", "alignment_exact", "alignment_exact_common", "alignment_exact_rare")
            cells = (f"{measured[key]['base']:.3f} > {measured[key]['tuned']:.3f}" for key in columns)
            table.add_row(str(seed), name, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
