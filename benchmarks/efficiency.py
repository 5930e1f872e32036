"""Sample efficiency on the tiny model: `python benchmarks/efficiency.py --output-dir runs`.

The published recipe (`--preset paper`), its learning rate and clip range chosen by held-out `hps` on a grid after 4,000
images, is trained on 16,000; the default, and its variants with other steps, on as many. Runs that are finished, or have
diverged, are not made again. Prints the grid and what each system needs to reach the best alignment that the published
recipe has at any measurement, and draws held-out alignment against images and against seconds. Seconds are images times
those of one in the fastest epoch, which is the least disturbed one; the measurements on held-out prompts are left out.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import texforce
from texforce import training

LEARNING_RATES, CLIP_RANGES = (1e-3, 3e-3), (1e-4, 5e-3)
PAPER = {"preset": "paper", "num_prompts_per_epoch": 250, "eval_every": 8}
DEFAULT = {"num_epochs": 63, "eval_every": 3}  # 16,128 images
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "deterministic elsewhere": {"deterministic_elsewhere": True},
    "1 shared step": {"num_shared_steps": 1},
    "2 shared steps": {"num_shared_steps": 2},
}
Epochs = list[dict[str, Any]]


def run(folder: Path, **options: Any) -> Epochs:
    """The epochs of one training."""
    diverged = folder / "diverged.txt"
    if not (folder / "result.json").is_file() and not diverged.is_file():
        config = texforce.TrainConfig(model="tiny", output_dir=str(folder), **options)
        try:
            training.train(config, lambda told: print(folder.name, told["epoch"], told.get("heldout", "")), go_on=True)
        except texforce.DivergedError as error:
            diverged.write_text(f"{error}\n")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def seconds_per_image(epochs: Epochs) -> float:
    return 1 / max(epoch["images_per_s"] for epoch in epochs[1:])


def measured(epochs: Epochs) -> Epochs:
    return [epoch for epoch in epochs if "heldout" in epoch]


def needed(epochs: Epochs, alignment: float) -> dict[str, Any] | None:
    """The first measured epoch whose alignment is that good."""
    return next((epoch for epoch in measured(epochs)[1:] if epoch["heldout"]["alignment"] >= alignment), None)


def grid(output_dir: Path, console: Console) -> dict[str, float]:
    """The learning rate and clip range with the best held-out reward."""
    table, rewards = Table("learning rate", "clip range", "hps", "alignment", title="paper, 4,000 images, seed 0"), {}
    for learning_rate, clip_range in product(LEARNING_RATES, CLIP_RANGES):
        options = {"learning_rate": learning_rate, "clip_range": clip_range}
        folder = output_dir / f"grid-{learning_rate}-{clip_range}"
        heldout = run(folder, **PAPER, **options, num_epochs=16)[-1]["heldout"]
        table.add_row(f"{learning_rate:g}", f"{clip_range:g}", f"{heldout['hps']:.4f}", f"{heldout['alignment']:.4f}")
        rewards[heldout["hps"]] = options
    console.print(table)
    return rewards[max(rewards)]


def compare(runs: dict[str, list[Epochs]], console: Console) -> None:
    """What each system needs for the best alignment that the published recipe has at any measurement."""
    target = max(best(epochs) for epochs in runs["paper"])
    table = Table("system", "seed", "best", "images", "U-Net calls", "seconds", title=f"to reach {target:.4f}")
    for name, seeds in runs.items():
        for seed, epochs in enumerate(seeds):
            reached, cells = needed(epochs, target), ["never"] * 3
            if reached:
                images = reached["num_images"]
                cells = [f"{images:,}", f"{reached['num_unet_calls']:,}", f"{images * seconds_per_image(epochs):.0f}"]
            table.add_row(name, str(seed), f"{best(epochs):.4f}", *cells)
    console.print(table)


def best(epochs: Epochs) -> float:
    return max(epoch["heldout"]["alignment"] for epoch in measured(epochs)[1:])


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
    panels[0].legend(loc="lower left")
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
    systems = {name: DEFAULT | variant for name, variant in VARIANTS.items() if name not in options.leave_out}
    if options.only in (None, "paper"):
        systems = {"paper": PAPER | {"num_epochs": 64} | grid(options.output_dir, console)} | systems
    if options.only:
        systems = {options.only: systems[options.only]}
    runs = {}
    for name, settings in systems.items():
        folder = options.output_dir / name.replace(" ", "-")
        runs[name] = [run(folder.with_name(f"{folder.name}-{seed}"), **settings, seed=seed) for seed in options.seeds]
    if options.only:
        return
    compare(runs, console)
    draw(options.figure or options.output_dir / "efficiency.png", runs)


if __name__ == "__main__":
    main()
