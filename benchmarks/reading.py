"""What weights in prompts and clip skip do, on the tiny model: `python benchmarks/reading.py --adapter out`.

The tiny world's held-out prompts, four images each, with every rare word weighted by a half more or less, or in a half of
the steps, and with a layer skipped. The noise of an image depends on the text of its prompt, weights included, so the
variants are compared by means over prompts. Prints a row a variant: fully right with and without rare words, and `hps`, of
the base model and of the adapter.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from texforce import evaluation, measures, world
from texforce.draw_config import EvalOptions, resolve_eval
from texforce.prompt_sets import read_benchmark

MEASURES = ("alignment_exact", "hps")


def weighted(form: str) -> Callable[[str], str]:
    """A function that writes each rare word of a prompt in a form, as `({}:1.5)`."""

    def written(word: re.Match[str]) -> str:
        return form.format(word[0]) if world.has_rare_word(word[0]) else word[0]

    return lambda prompt: re.sub(r"\w+", written, prompt)


VARIANTS: dict[str, tuple[Callable[[str], str], dict[str, Any]]] = {
    "plain": (weighted("{0}"), {}),
    "(word:1.5)": (weighted("({0}:1.5)"), {"prompt_weights": True}),
    "(word:0.5)": (weighted("({0}:0.5)"), {"prompt_weights": True}),
    "(word:1.5), first half": (weighted("[{0}:0-0.5:1.5][{0}:0.5-1:1]"), {"prompt_weights": True}),
    "(word:1.5), last half": (weighted("[{0}:0-0.5:1][{0}:0.5-1:1.5]"), {"prompt_weights": True}),
    "clip skip 1": (weighted("{0}"), {"clip_skip": 1}),
}


def evaluate(folder: Path, adapter: str, variant: str, number: int) -> dict[str, Any]:
    """The results of a variant, from a file of its prompts."""
    write, options = VARIANTS[variant]
    benchmark = read_benchmark("world")
    rows = zip(map(write, benchmark.prompts), benchmark.categories, strict=True)
    path = folder / f"prompts{number}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt, "category": category}) + "\n" for prompt, category in rows))
    given = {"model": "tiny", "adapter": [adapter], "reward": [",".join(MEASURES)], "num_images": 4}
    return evaluation.evaluate(
        resolve_eval(EvalOptions(**given | options, benchmark=str(path), output_dir=str(folder / f"eval{number}")))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("read"))
    options = parser.parse_args()
    table = Table("variant", "system", "all", "common words", "rare words", "hps", title="fully right")
    for number, variant in enumerate(VARIANTS):
        results = evaluate(options.output_dir, f"tuned={options.adapter}", variant, number)
        is_rare = np.array(["rare words" in prompt["category"] for prompt in results["prompts"]])
        for name, system in results["systems"].items():
            right, hps = (
                measures.mean_over_images(np.array([measures.to_numpy(row) for row in system["scores"][measure]]))
                for measure in MEASURES
            )
            cells = (right, right[~is_rare], right[is_rare], hps)
            table.add_row(variant, name, *(f"{np.nanmean(values):.3f}" for values in cells))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
