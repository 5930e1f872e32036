"""Sample efficiency on the tiny model: `python benchmarks/efficiency.py --output-dir runs`.

The published recipe (`--preset paper`), its learning rate and clip range chosen by held-out `hps` on a grid after 4,000
images, is trained on 16,000; the default, and its variants with other steps, on as many. Runs that are finished are not
made again. Prints the grid, what each system needs to reach the alignment that the published recipe ends with, and draws
held-out alignment against images and against seconds. Seconds are images times the seconds of one, which are measured by
epochs of both recipes in turns, without the measurements on held-out prompts.
"""

import argparse
import json
import statistics
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import texforce

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
    if not (folder / "result.json").is_file():
        config = texforce.TrainConfig(model="tiny", output_dir=str(folder), **options)
        texforce.train(
            config, lambda measures: print(folder.name, measures["epoch"], measures.get("heldout", "")), go_on=True
        )
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def seconds_per_image(options: dict[str, Any], repeats: int = 3) -> list[float]:
    """Of some epochs of training alone."""
    with tempfile.TemporaryDirectory() as folder:
        epochs = run(Path(folder, "out"), **options | {"num_epochs": repeats, "eval_every": repeats})
    return [1 / epoch["images_per_s"] for epoch in epochs[1:]]


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


def compare(runs: dict[str, list[Epochs]], seconds: dict[str, float], console: Console) -> None:
    """What each system needs for the mean alignment that the published recipe ends with."""
    target = statistics.mean(epochs[-1]["heldout"]["alignment"] for epochs in runs["paper"])
    table = Table("system", "seed", "at the end", "images", "U-Net calls", "seconds", title=f"to reach {target:.4f}")
    for name, seeds in runs.items():
        for seed, epochs in enumerate(seeds):
            reached = epochs[-1] if name == "paper" else needed(epochs, target)
            cells = ["never"] * 3
            if reached:
                images = reached["num_images"]
                cells = [f"{images:,}", f"{reached['num_unet_calls']:,}", f"{images * seconds[name]:.0f}"]
            table.add_row(name, str(seed), f"{epochs[-1]['heldout']['alignment']:.4f}", *cells)
    console.print(table)


def draw(path: Path, runs: dict[str, list[Epochs]], seconds: dict[str, float]) -> None:
    """Mean and range over seeds of held-out alignment, against images and against seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, color in (("default", "tab:orange"), ("paper", "tab:blue")):
        points = [[epoch["heldout"]["alignment"] for epoch in measured(epochs)] for epochs in runs[name]]
        images = [epoch["num_images"] for epoch in measured(runs[name][0])]
        means, lows, highs = ([f(values) for values in zip(*points, strict=True)] for f in (statistics.mean, min, max))
        for axes, unit in zip(panels, (1.0, seconds[name]), strict=True):
            places = [unit * number for number in images]
            axes.plot(places, means, "o-", markersize=3, color=color, label=name)
            axes.fill_between(places, lows, highs, color=color, alpha=0.2)
    panels[0].set(xlabel="images", ylabel="held-out alignment")
    panels[1].set(xlabel="seconds of training, one thread", xscale="log", xlim=(5, None))
    panels[0].legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output-dir", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["paper", *VARIANTS], help="make these runs, and nothing else")
    parser.add_argument("--figure", type=Path, help="where the plot goes (default: efficiency.png in the output folder)")
    options = parser.parse_args()
    console = Console(width=120)
    systems = {name: DEFAULT | variant for name, variant in VARIANTS.items()}
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
    spent = options.output_dir / "seconds_per_image.json"
    if not spent.is_file():
        times = {name: list[float]() for name in systems}
        for _ in range(2):
            for name, settings in systems.items():
                times[name] += seconds_per_image(settings)
        spent.write_text(json.dumps({name: statistics.median(values) for name, values in times.items()}, indent=2) + "\n")
    seconds = json.loads(spent.read_text())
    compare(runs, seconds, console)
    draw(options.figure or options.output_dir / "efficiency.png", runs, seconds)


if __name__ == "__main__":
    main()
