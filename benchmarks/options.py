"""Other ways to train the text, beside plain LoRA, on the tiny model: `python benchmarks/options.py --output-dir runs`.

For every seed each system is trained on `hps` (unless it trains on no reward), by matching unless it says otherwise, from
4,096 images each, half of the default's. All are evaluated on the tiny world's held-out prompts, two images each, from the
same noise as the base model. Finished runs and images are not made again. Prints a row a system and seed, and what each
system changes beside the system `--against` of the same seeds, paired over prompts, with 95 % intervals: on all prompts,
and by words and by kind.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from texforce import evaluation, measures, training
from texforce.config import TrainOptions, resolve
from texforce.draw_config import EvalOptions, resolve_eval

SYSTEMS: dict[str, dict[str, Any]] = {
    "lora": {},  # the others differ from it by what is named
    "layers-last-1": {"lora_layers": "last:1"},
    "layers-first-1": {"lora_layers": "first:1"},
    "steps-first-half": {"adapter_steps": "0-0.5"},
    "steps-last-half": {"adapter_steps": "0.5-1", "noise_window": 1.0},  # else most of their noise is not trained
    "tokens": {"target": "tokens", "num_tokens": 4},
    "relabel": {"relabel": "world"},
    "relabel-alone": {"relabel": "world", "reward": "none", "eval_reward": ["hps"]},
    "gradient": {"algorithm": "gradient", "num_epochs": 64, "eval_every": 64},
    "gradient-last-half": {"algorithm": "gradient", "num_epochs": 64, "eval_every": 64, "adapter_steps": "0.5-1"},
}
SAME = {"model": "tiny", "num_epochs": 32, "eval_every": 32}
MEASURES = ("hps", "alignment_exact")


def run(folder: Path, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Train a system, unless it is there; returns what the run left of itself."""
    if not (folder / "result.json").is_file():
        training.train(resolve(TrainOptions(**SAME | options, output_dir=str(folder), seed=seed)))
    return json.loads((folder / "result.json").read_text())


def scores_by_system(results: Mapping[str, Any], measure: str) -> dict[str, np.ndarray]:
    """Scores (P, K) of each system by a measure."""
    systems = results["systems"].items()
    return {name: np.array([measures.to_numpy(row) for row in system["scores"][measure]]) for name, system in systems}


def groups(results: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Which prompts (P,) are of common words, of rare words, and of each kind."""
    categories = [prompt["category"] for prompt in results["prompts"]]
    names = sorted({part for category in categories for part in category.split(", ")})
    return {"all": np.ones(len(categories), bool)} | {
        name: np.array([name in category.split(", ") for category in categories]) for name in names
    }


def together(scores: Mapping[str, np.ndarray], system: str, options: argparse.Namespace, rows: np.ndarray) -> str:
    """The paired change of some prompts by a system's adapters beside those of the same seeds, with its interval.

    Seeds count as further images of a prompt.
    """
    pairs = [(scores[f"{system}-{seed}"], scores[f"{options.against}-{seed}"]) for seed in options.seeds]
    paired = measures.mean_over_images(np.concatenate([ours - theirs for ours, theirs in pairs], axis=1)[rows])
    low, high = measures.bootstrap(paired[:, None], seed=0)
    return f"{np.nanmean(paired):+.3f} [{low[0]:+.3f}, {high[0]:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--against", default="lora", help="the system that the others are compared with")
    options = parser.parse_args()
    runs = {}
    for seed in options.seeds:
        for name in options.systems:
            folder = options.output_dir / f"{name}-{seed}"
            runs[folder.name] = run(folder, seed, SYSTEMS[name])
    adapters = [f"{name}={options.output_dir / name}" for name in runs]
    given: dict[str, Any] = {
        "benchmark": "world",
        "reward": [",".join(MEASURES)],
        "output_dir": str(options.output_dir / "eval"),
    }
    given["null_prompt"] = "adapted"  # of learned tokens too: no null prompt has them
    results = evaluation.evaluate(resolve_eval(EvalOptions(model="tiny", num_images=2, adapter=adapters, **given)))
    table = Table("system", *groups(results), "hps", "diversity", "parameters", "images", "seconds", title="fully right")
    right, hps = (scores_by_system(results, measure) for measure in ("alignment_exact", "hps"))
    diversity = scores_by_system(results, evaluation.DIVERSITY)
    for name in right:
        cells = [f"{np.nanmean(right[name][rows]):.3f}" for rows in groups(results).values()]
        left = runs.get(name, {})
        about = [str(left.get(key, "")) for key in ("num_parameters", "num_images")]
        seconds = f"{left['seconds']:.0f}" if "seconds" in left else ""
        table.add_row(name, *cells, f"{np.nanmean(hps[name]):.3f}", f"{np.nanmean(diversity[name]):.3f}", *about, seconds)
    changes = Table(
        "system", *groups(results), "hps", "diversity", title=f"changes beside {options.against}, seeds together"
    )
    for system in options.systems:
        if system == options.against:
            continue
        cells = [together(right, system, options, rows) for rows in groups(results).values()]
        every = next(iter(groups(results).values()))
        changes.add_row(system, *cells, *(together(scores, system, options, every) for scores in (hps, diversity)))
    console = Console(width=220)
    console.print(table, changes)


if __name__ == "__main__":
    main()
