"""Sample efficiency on the tiny model: `python benchmarks/efficiency.py --output-dir runs`.

The published recipe (`--preset paper`) is trained on 16,384 images at every learning rate of a list with the first seed, and
with the others at the one with the best held-out `hps`; the other systems as SYSTEMS configures them. Runs that are
finished, or have diverged, are not made again. Prints the list and what each system needs to reach an alignment, by default
that of the published recipe's end, averaged over the seeds, and draws held-out alignment against images and against seconds.
Seconds are images times those of one in the fastest epoch, which is the least disturbed one; the measurements on held-out
prompts are left out.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from texforce import DivergedError, training
from texforce.config import TrainOptions, resolve

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
PAPER = {"preset": "paper", "num_epochs": 16, "eval_every": 2}
# More optimizer steps for each image: fewer images, and more time for each.
SMALL_EPOCHS = {
    "num_prompts_per_epoch": 16,
    "num_inner_epochs": 4,
    "num_noise_levels": 4,
    "learning_rate": 1e-3,
    "num_epochs": 50,
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "matching": {"algorithm": "matching", "eval_every": 4},
    "matching, small epochs": {"algorithm": "matching", **SMALL_EPOCHS, "eval_every": 4},
    "gradient": {"algorithm": "gradient", "eval_every": 4},
    "ppo": {"algorithm": "ppo", "num_epochs": 63, "eval_every": 3},  # 16,128 images
}
COLORS = {
    "paper": "tab:blue",
    "ppo": "tab:orange",
    "gradient": "tab:purple",
    "matching": "tab:green",
    "matching, small epochs": "tab:olive",
}
Epochs = list[dict[str, Any]]


def run(folder: Path, **options: Any) -> Epochs:
    """The epochs of one training."""
    diverged = folder / "diverged.txt"
    if not (folder / "result.json").is_file() and not diverged.is_file():
        config = resolve(TrainOptions(model="tiny", output_dir=str(folder), **options))
        try:
            training.train(config, lambda epoch: print(folder.name, epoch["epoch"], epoch.get("heldout", "")), resume=True)
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


def paper(output_dir: Path, learning_rate: float, seed: int) -> Epochs:
    return run(output_dir / f"paper-{learning_rate:g}-{seed}", **PAPER, learning_rate=learning_rate, seed=seed)


def tuned(output_dir: Path, learning_rates: list[float], seed: int, console: Console) -> float:
    """The learning rate with the best held-out reward at the end, among those that do not diverge."""
    table = Table("learning rate", "images", "hps", "alignment", title=f"paper, seed {seed}")
    last = [measured(paper(output_dir, rate, seed))[-1] for rate in learning_rates]  # before it diverged, if it did
    for rate, epoch in zip(learning_rates, last, strict=True):
        scores = (f"{epoch['heldout'][name]:.4f}" for name in ("hps", "alignment"))
        table.add_row(f"{rate:g}", f"{epoch['num_images']:,}", *scores)
    console.print(table)
    best = max(last, key=lambda epoch: (epoch["epoch"], epoch["heldout"]["hps"]))
    return learning_rates[last.index(best)]


def end(runs: list[Epochs]) -> float:
    """The alignment at the end, averaged over the seeds."""
    return statistics.mean(epochs[-1]["heldout"]["alignment"] for epochs in map(measured, runs))


def compare(runs: dict[str, list[Epochs]], target: float, console: Console) -> None:
    """What each system needs for an alignment."""
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


def draw(path: Path, runs: dict[str, list[Epochs]], target: float) -> None:
    """Held-out alignment of every seed, against images and against seconds, beside the base model's and the target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    figure.suptitle("What the text encoder learns from an image (tiny model)")
    panels = figure.subplots(1, 2, sharey=True)
    base = next(iter(runs.values()))[0][0]["heldout"]["alignment"]
    for axes in panels:
        axes.axhline(base, color="grey", linewidth=1, label="base model")
        axes.axhline(target, color="grey", linewidth=1, linestyle="--", label=f"target, {target:.3f}")
        axes.spines[["top", "right"]].set_visible(False)
    for name, color in COLORS.items():
        for seed, epochs in enumerate(runs.get(name, [])):
            units = (1.0, seconds_per_image(epochs))
            for axes, unit, first in zip(panels, units, (0, 1), strict=True):  # a logarithmic axis has no place for the base
                shown = measured(epochs)[first:]
                places = [unit * epoch["num_images"] for epoch in shown]
                alignments = [epoch["heldout"]["alignment"] for epoch in shown]
                label = None if seed else name
                axes.plot(places, alignments, "o-", markersize=3, linewidth=1, alpha=0.8, color=color, label=label)
    panels[0].set(xlabel="images", ylabel="held-out alignment")
    panels[1].set(xlabel="seconds of training, one thread", xscale="log", xlim=(5, None))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=list(LEARNING_RATES), help="of the paper's recipe"
    )
    parser.add_argument("--systems", nargs="+", choices=["paper", *SYSTEMS], default=["paper", *SYSTEMS])
    parser.add_argument("--target", type=float, help="the alignment to reach (default: where the paper's recipe ends)")
    parser.add_argument("--figure", type=Path, help="where the plot goes (default: efficiency.png in the output folder)")
    options = parser.parse_args()
    if "paper" not in options.systems and not options.target:
        parser.error("give --target, or the system paper, whose end is the target")
    console, folder, runs = Console(width=120), options.output_dir, {}
    if "paper" in options.systems:
        rate = tuned(folder, options.learning_rates, options.seeds[0], console)
        runs["paper"] = [paper(folder, rate, seed) for seed in options.seeds]
    for name, system in SYSTEMS.items():
        if name in options.systems:
            base = name.replace(", ", "-").replace(" ", "-")
            runs[name] = [run(folder / f"{base}-{seed}", **system, seed=seed) for seed in options.seeds]
    target = options.target or end(runs["paper"])
    compare(runs, target, console)
    draw(options.figure or folder / "efficiency.png", runs, target)


if __name__ == "__main__":
    main()
