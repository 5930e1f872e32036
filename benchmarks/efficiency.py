"""Sample efficiency on the tiny model: `python benchmarks/efficiency.py --output-dir runs`.

The published recipe (`--preset paper`) is trained on 16,000 images at every learning rate and clip range of a grid with
one seed, and at those with the best held-out `hps` with the others; the default, and its variants with other steps, on as
many. Runs that are finished, or have diverged, are not made again. Prints the grid and what each system needs to reach the
alignment that the published recipe ends with, averaged over the seeds, and draws held-out alignment against images and
against seconds. Seconds are images times those of one in the fastest epoch, which is the least disturbed one; the
measurements on held-out prompts are left out.
"""

import argparse
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from texforce import DivergedError, train
from texforce.config import TrainOptions, resolve

LEARNING_RATES, CLIP_RANGES = (1e-3, 3e-3), (1e-4, 5e-3)
PAPER = {"preset": "paper", "num_prompts_per_epoch": 250, "num_epochs": 64, "eval_every": 8}
DEFAULT = {"num_epochs": 63, "eval_every": 3}  # 16,128 images
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "deterministic elsewhere": {"deterministic_elsewhere": True},
    "small epochs": {
        "num_prompts_per_epoch": 8,
        "num_epochs": 75,
        "num_inner_epochs": 2,
        "deterministic_elsewhere": True,
        "learning_rate": 7e-4,
        "eval_every": 5,
    },  # 4,800 images
}
Epochs = list[dict[str, Any]]


def run(folder: Path, **options: Any) -> Epochs:
    """The epochs of one training."""
    diverged = folder / "diverged.txt"
    if not (folder / "result.json").is_file() and not diverged.is_file():
        config = resolve(TrainOptions(model="tiny", output_dir=str(folder), **options))
        try:
            train.train(config, lambda epoch: print(folder.name, epoch["epoch"], epoch.get("heldout", "")), resume=True)
        except DivergedError as error:
            diverged.write_text(f"{error}\n")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def seconds_per_image(epochs: Epochs) -> float:
    return 1 / max(epoch["images_per_s"] for epoch in epochs[1:])


def measured(epochs: Epochs) -> Epochs:
    return [epoch for epoch in epochs if "heldout" in epoch]


def needed(epochs: Epochs, alignment: float) -> dict[str, Any] | None:
    """The first measured epoch whose alignment is that good."""
    return next((epoch for epoch in measured(epochs)[1:] if epoch["heldout"]["alignment"] >= alignment), None)


def paper(output_dir: Path, learning_rate: float, clip_range: float, seed: int) -> Epochs:
    folder = output_dir / f"paper-{learning_rate:g}-{clip_range:g}-{seed}"
    return run(folder, **PAPER, learning_rate=learning_rate, clip_range=clip_range, seed=seed)


def tuned(output_dir: Path, seed: int, console: Console) -> tuple[float, float]:
    """The learning rate and clip range with the best held-out reward at the end, among those that do not diverge."""
    table = Table("learning rate", "clip range", "images", "hps", "alignment", title=f"paper, seed {seed}")
    grid = list(product(LEARNING_RATES, CLIP_RANGES))
    last = [measured(paper(output_dir, *rates, seed))[-1] for rates in grid]  # before it diverged, if it did
    for rates, epoch in zip(grid, last, strict=True):
        scores = (f"{epoch['heldout'][name]:.4f}" for name in ("hps", "alignment"))
        table.add_row(*(f"{rate:g}" for rate in rates), f"{epoch['num_images']:,}", *scores)
    console.print(table)
    return max(zip(last, grid, strict=True), key=lambda pair: (pair[0]["epoch"], pair[0]["heldout"]["hps"]))[1]


def compare(runs: dict[str, list[Epochs]], console: Console) -> None:
    """What each system needs for the alignment that the published recipe ends with."""
    target = statistics.mean(ends[-1]["heldout"]["alignment"] for ends in map(measured, runs["paper"]))
    columns = ("system", "seed", "at the end", "best", "images", "U-Net calls", "seconds")
    table = Table(*columns, title=f"to reach {target:.4f}")
    for name, seeds in runs.items():
        for seed, epochs in enumerate(seeds):
            alignments = [epoch["heldout"]["alignment"] for epoch in measured(epochs)[1:]]
            reached, cells = needed(epochs, target), ["never"] * 3
            if reached:
                images = reached["num_images"]
                cells = [f"{images:,}", f"{reached['num_unet_calls']:,}", f"{images * seconds_per_image(epochs):.0f}"]
            table.add_row(name, str(seed), f"{alignments[-1]:.4f}", f"{max(alignments):.4f}", *cells)
    console.print(table)


def draw(path: Path, runs: dict[str, list[Epochs]]) -> None:
    """Held-out alignment of every seed, against images and against seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, color in (("default", "tab:orange"), ("paper", "tab:blue")):
        for seed, epochs in enumerate(runs[name]):
            alignments = [epoch["heldout"]["alignment"] for epoch in measured(epochs)]
            for axes, unit in zip(panels, (1.0, seconds_per_image(epochs)), strict=True):
                places = [unit * epoch["num_images"] for epoch in measured(epochs)]
                label = None if seed else name
                axes.plot(places, alignments, "o-", markersize=3, linewidth=1, alpha=0.8, color=color, label=label)
    panels[0].set(xlabel="images", ylabel="held-out alignment")
    panels[1].set(xlabel="seconds of training, one thread", xscale="log", xlim=(5, None))
    panels[0].legend(loc="upper left")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["paper", *VARIANTS], help="make these runs, and nothing else")
    parser.add_argument("--leave-out", nargs="+", default=[], choices=list(VARIANTS), help="do not make these")
    parser.add_argument("--figure", type=Path, help="where the plot goes (default: efficiency.png in the output folder)")
    options = parser.parse_args()
    console = Console(width=120)
    runs = {}
    if options.only in (None, "paper"):
        rates = tuned(options.output_dir, options.seeds[0], console)
        runs["paper"] = [paper(options.output_dir, *rates, seed) for seed in options.seeds]
    for name, variant in VARIANTS.items():
        if options.only in (None, name) and name not in options.leave_out:
            folder = options.output_dir / name.replace(" ", "-")
            settings = DEFAULT | variant
            runs[name] = [run(folder.with_name(f"{folder.name}-{seed}"), **settings, seed=seed) for seed in options.seeds]
    if not options.only:
        compare(runs, console)
        draw(options.figure or options.output_dir / "efficiency.png", runs)


if __name__ == "__main__":
    main()
