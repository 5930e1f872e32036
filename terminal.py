"""What the commands show: progress on stderr, and tables for stdout."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from texforce.config import TrainConfig
from texforce.config_inference import BASE

output, progress = Console(), Console(stderr=True)


def printable(text: str) -> str:
    """Text that cannot drive the terminal: control characters other than line ends become spaces."""
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)


def warn(message: str) -> None:
    progress.print(Text(printable(message)), soft_wrap=True)


# --- progress ---


class EpochView:
    """Progress on stderr: on a terminal a table of the last epochs, drawn anew; elsewhere a line an epoch."""

    def __init__(self, config: TrainConfig, num_rows: int = 12) -> None:
        self.num_epochs = config.num_epochs or 0
        self.num_rows = num_rows
        self.rows: list[dict[str, Any]] = []
        self.heldout: dict[str, float] = {}
        self.live = Live(console=progress, auto_refresh=False) if progress.is_terminal else None

    def __enter__(self) -> EpochView:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, measures: dict[str, Any]) -> None:
        self.rows.append(measures)
        self.heldout = measures.get("heldout", self.heldout)
        for dropped in measures.get("dropped", ()):
            progress.print(
                Text(printable(f"dropped, reward not finite: {dropped['prompt']!r} (seed {dropped['seed']})")),
                soft_wrap=True,
            )
        if self.live:
            self.live.update(self.table(), refresh=True)
        else:
            progress.print(Text(printable(self.line(measures))), soft_wrap=True)

    def line(self, measures: dict[str, Any]) -> str:
        parts = [f"epoch {measures['epoch']}/{self.num_epochs}"]
        parts += [f"{label} {measures[name]:{form}}" for name, label, form in EPOCH_COLUMNS if name in measures]
        parts += [f"{name} {value:.4f}" for name, value in measures.get("parts", {}).items()]
        parts += [f"held-out {name} {value:.4f}" for name, value in measures.get("heldout", {}).items()]
        return "  ".join(parts + self.time_left())

    def table(self) -> Table:
        """The last epochs, a row each."""
        shown = [column for column in EPOCH_COLUMNS if column[0] in self.rows[-1]]
        title = "  ".join([f"epoch {self.rows[-1]['epoch']}/{self.num_epochs}", *self.time_left()])
        caption = "held-out  " + "  ".join(f"{name} {value:.4f}" for name, value in self.heldout.items())
        parts = self.rows[-1].get("parts", {})
        table = Table("epoch", *(label for _, label, _ in shown), title=title, caption=Text(printable(caption)))
        for name in parts:
            table.add_column(Text(printable(name)))
        for row in self.rows[-self.num_rows :]:
            cells = [f"{row[name]:{form}}" if name in row else "" for name, _, form in shown]
            cells += [f"{row['parts'][name]:.4f}" if "parts" in row else "" for name in parts]
            table.add_row(str(row["epoch"]), *cells)
        return table

    def time_left(self) -> list[str]:
        epoch, seconds = self.rows[-1]["epoch"], self.rows[-1]["seconds"] - self.rows[0]["seconds"]
        done = epoch - self.rows[0]["epoch"]  # in this process
        return [f"{seconds / done * (self.num_epochs - epoch):.0f} s left"] if done else []


EPOCH_COLUMNS = (
    ("reward_mean", "reward", ".4f"),
    ("reward_std", "spread", ".4f"),
    ("max_ratio_deviation", "ratio-1 at first", ".1e"),
    ("ratio_deviation", "at most", ".1e"),
    ("clip_fraction", "clipped", ".2f"),
    ("kl", "KL", ".2e"),
    ("images_per_s", "images/s", ".0f"),
)


class StageView:
    """Progress on stderr: on a terminal a bar for each stage; elsewhere a line at the end of each."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bars = Progress(*columns, console=progress, disable=not progress.is_terminal)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StageView:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(printable(stage), total=total)
        self.bars.update(self.tasks[stage], completed=done)
        if done == total and self.bars.disable:
            progress.print(Text(printable(f"{stage}: done")), soft_wrap=True)


# --- tables ---


def rows_table(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(Text(name), Text(str(value)))
    return table


def results_table(result: dict[str, Any]) -> Table:
    table = Table("held-out", "base", "tuned", "change", title=f"{result['num_images']} images in {result['seconds']:.0f} s")
    for name, value in result["heldout"].items():
        table.add_row(
            Text(printable(name)), f"{value['base']:.4f}", f"{value['tuned']:.4f}", f"{value['tuned'] - value['base']:+.4f}"
        )
    return table


def evaluation_table(results: dict[str, Any]) -> Table:
    """Means, changes and win rates of an evaluation, with their intervals."""
    from texforce import report

    about = results["benchmark"]
    told_of = f" of {about['num_prompts']}" if results["strengths"] else ""
    title = f"{about['name']}: {results['num_prompts_told']}{told_of} prompts, {results['num_images']} images each"
    table = Table(
        "", "mean", "change", "wins", title=Text(printable(title)), box=None, padding=(0, 1, 0, 0), header_style="underline"
    )
    for measure, base in results["systems"][BASE]["measures"].items():
        table.add_row(Text(printable(measure), style="bold"))
        table.add_row(f" {BASE}", Text(report.interval(base) + report.dropped(base)))
        for name in list(results["systems"])[1:]:
            system = results["systems"][name]
            told = system["measures"][measure]
            style = {"gain": "green", "loss": "red", "": ""}[report.direction(told["paired"])]
            change = Text(report.interval(told["paired"], "+"), style=style)
            cells = (
                f" {report.label(name, system)}",
                report.interval(told) + report.dropped(told),
                change,
                report.interval(told["win_rate"], "%"),
            )
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
    if speeds := [speed for speed in results["timings"]["images_per_s"].values() if speed]:
        table.caption = Text(f"images/s: {min(speeds):.3g} to {max(speeds):.3g}")
    return table
