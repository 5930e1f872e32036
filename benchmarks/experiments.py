"""The experiments of EXPERIMENTS.md on the tiny model: `python benchmarks/experiments.py --output-dir runs`.

For every seed it trains the text encoder and the U-Net by matching on `hps`, the text encoder and the U-Net (by DDPO) on
`alignment`, the judge itself, the text encoder on more images, by matching and by the reward's gradient, and a text encoder
for each of two tasks; then it loads adapters side by side without more
training, at full and at half strength. Finished runs are not made again. Prints a table of held-out measures, all from the
same noise; the second row is the base model with each rare word replaced by its common synonym: what a text encoder that
knew them would draw.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from meters import heldout_images, heldout_means
from rich.console import Console
from rich.table import Table

from texforce import Policy, adapters, models, prompt_sets, rewards, training, world
from texforce.config import TrainOptions, resolve
from texforce.draw_config import System

TRAINED: dict[str, dict[str, Any]] = {
    "text-encoder": {},
    "text-encoder-alignment": {"reward": "alignment"},
    "text-encoder-long": {"num_epochs": 280, "eval_every": 35},  # 35,840 images
    "gradient-long": {"algorithm": "gradient", "num_epochs": 560, "eval_every": 70},  # the same
    "unet": {"target": "unet", "algorithm": "matching"},
    "unet-ddpo": {"target": "unet", "algorithm": "ppo", "reward": "alignment", "num_epochs": 63, "eval_every": 63},
    "count": {"prompts": "count", "heldout_prompts": "world-heldout"},
    "composition": {"prompts": "composition", "heldout_prompts": "world-heldout"},
}
COMBINED = {  # adapters loaded side by side, and their strength
    "text-encoder + unet": 1.0,
    "text-encoder + unet, half": 0.5,
    "text-encoder + unet-ddpo": 1.0,
    "text-encoder + unet-ddpo, half": 0.5,
    "count + composition": 1.0,
    "count + composition, half": 0.5,
}
SETS = ("world", "count", "composition")  # whose held-out prompts are measured


def run(folder: Path, **options: Any) -> None:
    """Train a system, unless it is there."""
    if not (folder / "result.json").is_file():
        training.train(resolve(TrainOptions(output_dir=str(folder), model="tiny", **options)))


def with_common_words(prompt: str) -> str:
    common = {rare: word for word, rare in (*world.COLOUR_WORDS, *world.SHAPE_WORDS)}
    common |= {world.plural(rare): world.plural(word) for rare, word in common.items()}
    words = " ".join(common.get(word, word) for word in prompt.split())
    return re.sub(r"\ban? (?=[^aeiou])", "a ", re.sub(r"\ban? (?=[aeiou])", "an ", words))


def measure(folders: list[Path], scale: float, replaced: bool = False) -> dict[str, dict[str, float]]:
    """Held-out measures by set of adapters loaded side by side at a strength, from the noise of the trainings' own."""
    config, hps = resolve(TrainOptions(model="tiny")), rewards.load_reward("hps")
    system = System("tuned", tuple((str(folder), scale) for folder in folders))
    policy = Policy(adapters.put_on(models.load_model("tiny"), system), config)
    measures = {}
    for name in SETS:
        prompts = prompt_sets.read_prompts(f"{name}-heldout")
        drawn = [with_common_words(prompt) for prompt in prompts] if replaced else prompts
        images = heldout_images(policy, drawn, config.sample_batch_size)
        measures[name] = heldout_means(images, prompts, {"hps": hps})
    return measures


def cells(measures: dict[str, dict[str, float]]) -> list[str]:
    names = ("hps", "alignment", "alignment_exact", "alignment_exact_common", "alignment_exact_rare")
    values = [measures["world"][name] for name in names]
    return [f"{value:.3f}" for value in (*values, *(measures[name]["alignment_exact"] for name in SETS[1:]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", choices=[*TRAINED, *COMBINED], default=[*TRAINED, *COMBINED])
    options = parser.parse_args()
    columns = ("hps", "alignment", "fully right", "common words", "rare words", "count", "composition")
    table = Table("seed", "system", *columns)
    table.add_row("", "base", *cells(measure([], 1.0)))
    table.add_row("", "base, common words instead", *cells(measure([], 1.0, replaced=True)))
    for seed in options.seeds:
        for name in options.systems:
            parts = name.partition(",")[0].split(" + ")
            folders = [options.output_dir / f"{part}-{seed}" for part in parts]
            if name in TRAINED:
                run(folders[0], seed=seed, **TRAINED[name])
            table.add_row(str(seed), name, *cells(measure(folders, COMBINED.get(name, 1.0))))
    Console(width=140).print(table)
    (options.output_dir / "table.json").write_text(json.dumps([list(column.cells) for column in table.columns]))


if __name__ == "__main__":
    main()
