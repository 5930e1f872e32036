"""What the commands show: on a terminal progress that is drawn anew, elsewhere lines; tables of results.

Results go to stdout, progress to stderr. Read top to bottom: the consoles, progress, tables.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from . import stages
from .config import TrainConfig
from .draw_config import BASE
from .prompt_sets import MEASURED_ON, find_measured

# --- the consoles ---


class PipeConsole(Console):
    """A console that prints texts of others, and whose reader may leave, as `| head` does.

    Whatever a text holds, it cannot drive the terminal; only the console's own control codes do. When the reader has left,
    the command ends without a message, as by SIGPIPE.
    """

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # for what Python writes at its end
        raise SystemExit(141)


output, progress = PipeConsole(force_jupyter=False), PipeConsole(stderr=True, force_jupyter=False)  # in notebooks lines


def can_redraw(console: Console) -> bool:
    """Whether what a console shows can be drawn anew: FORCE_COLOR, which notebooks set, makes no terminal of a file."""
    return console.is_terminal and console.file.isatty()


def printable(text: str) -> str:
    """Text that cannot drive the terminal: control characters other than line ends become spaces."""
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)


def show(result: str) -> None:
    output.print(Text(result), soft_wrap=True)


def say(console: Console, sentence: Text) -> None:
    """Print a sentence: on a terminal in whole words, elsewhere on one line, which can be searched."""
    console.print(sentence, soft_wrap=not can_redraw(console))


def warn(message: str) -> None:
    progress.print(Text(message), soft_wrap=True)


# --- progress ---


class EpochView:
    """Progress on stderr: on a terminal a view of the training that is drawn anew; elsewhere a line an epoch.

    The view answers three questions: whether it works (a bar for what an epoch is at), whether it wins (the measures of base
    and tuned, and the reward over the epochs), and how long it takes.
    """

    def __init__(self, config: TrainConfig, is_drawn: bool = True) -> None:
        """With `is_drawn` false, as in all processes of a run but the first, no view is drawn."""
        self.num_epochs, self.clip_range = config.num_epochs or 0, config.clip_range
        self.moving = config.reward if config.normalise_rewards else None  # the measure whose unit changes with each epoch
        self.epochs: list[dict[str, Any]] = []
        self.begun: dict[str, Any] = {}  # the epoch that this process goes on from
        self.bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(None), TextColumn("{task.fields[count]}"), expand=True
        )
        self.stage = self.bar.add_task("starting", total=None, count="")
        is_drawn = is_drawn and can_redraw(progress)
        self.live = Live(console=progress, get_renderable=self.view, refresh_per_second=8) if is_drawn else None
        self.stack = ExitStack()

    def __enter__(self) -> EpochView:
        if self.live:
            self.stack.enter_context(self.live)
            self.stack.enter_context(stages.reporting_to(self.at_stage))
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.update(self.stage, visible=False)
        self.stack.close()

    def at_stage(self, name: str, done: int, total: int) -> None:
        count = f"{done}/{total}" if total else ""
        self.bar.update(self.stage, description=name, completed=done, total=total or None, count=count)

    def __call__(self, measures: dict[str, Any]) -> None:
        self.epochs += [*measures.get("earlier", ()), measures]
        self.begun = self.begun or measures
        for dropped in measures.get("dropped", ()):
            warn(f"dropped, reward not finite: {dropped['prompt']!r} (seed {dropped['seed']})")
        if not self.live:
            warn(self.line(measures))

    def line(self, measures: dict[str, Any]) -> str:
        """One epoch as a line of a log; metrics.jsonl has every number."""
        parts = [f"epoch {measures['epoch']}/{self.num_epochs}"]
        parts += [f"reward {measures['reward_mean']:z.4f}"] if "reward_mean" in measures else []
        parts += [f"{name} {value:z.4f}" for name, value in measures.get("parts", {}).items()]
        if name := find_measured(measures):
            base = {} if measures["epoch"] == 0 else self.base()
            numbers = [
                f"{measure} {value:z.4f}" + (f" ({value - base[measure]:+z.4f})" if measure in base else "")
                for measure, value in measures[name].items()
            ]
            parts.append(f"{MEASURED_ON[name]}: {', '.join(numbers)}")
        return "  ".join(parts + self.times() + self.troubles())

    def base(self) -> dict[str, float]:
        """What was measured of the base model, where its unit is that of now."""
        first: dict[str, float] = next((epoch[name] for epoch in self.epochs if (name := find_measured(epoch))), {})
        return {measure: value for measure, value in first.items() if measure != self.moving}

    def view(self) -> Group:
        """All that the terminal shows."""
        shown: list[RenderableType] = []
        if self.epochs:
            last = self.epochs[-1]
            counts = [f"{last.get('num_images', 0):,} images"]
            counts += [f"{last['num_relabelled']} images relabelled in this epoch"] if "num_relabelled" in last else []
            shown.append(Text("  ".join([f"epoch {last['epoch']}/{self.num_epochs}", *counts, *self.times()])))
            shown += self.reward_lines() + self.measured_table()
            shown += [Text(trouble, style="bold red") for trouble in self.troubles()]
        return Group(*shown, Constrain(self.bar, progress.width - 4))  # the ^C that a terminal writes stays in the last line

    def reward_lines(self) -> list[RenderableType]:
        """The training reward over the epochs, and its mean over the last ones; the parts of a mixture."""
        rewards = [epoch["reward_mean"] for epoch in self.epochs if "reward_mean" in epoch]
        if not rewards:
            return []
        recent = rewards[-RECENT:]
        lines = [f"reward  {sparkline(rewards)}  {sum(recent) / len(recent):z.4f} over the last {len(recent)}"]
        if parts := self.epochs[-1].get("parts"):
            lines.append("  ".join(f"{name} {value:z.4f}" for name, value in parts.items()))
        return [_cut(line) for line in lines]

    def measured_table(self) -> list[RenderableType]:
        """What was measured of the base model and last, side by side."""
        measured = [(epoch["epoch"], epoch[name], name) for epoch in self.epochs if (name := find_measured(epoch))]
        if not measured:
            return []
        base, (epoch, now, name) = self.base(), measured[-1]
        # Only the first column gives way, and its cells, which do not wrap, are cut.
        columns = [Column(head, justify="right", min_width=8, no_wrap=True) for head in ("base", "now", "change")]
        table = Table(Column(_cut(f"{MEASURED_ON[name]}, epoch {epoch}")), *columns, box=SIMPLE_HEAD)
        for measure, value in now.items():
            known = measure in base
            change = f"{value - base[measure]:+z.4f}" if known and epoch else ""
            table.add_row(_cut(measure), f"{base[measure]:z.4f}" if known else "", f"{value:z.4f}", change)
        return [table]

    def troubles(self) -> list[str]:
        """What matters only when it goes wrong."""
        last, found = self.epochs[-1], []
        if last.get("max_ratio_deviation", 0.0) > self.clip_range / 10:
            found.append(f"the ratio before the first update is off by {last['max_ratio_deviation']:.1e}")
        if last.get("clip_fraction", 0.0) > MANY_CLIPPED:
            found.append(f"{last['clip_fraction']:.0%} of the ratios are clipped; lower the learning rate")
        if dropped := len(last.get("dropped", ())):
            found.append(f"{dropped} images were dropped, as their reward is not finite")
        return found

    def times(self) -> list[str]:
        """How long the run has taken, and how long it will take if its epochs go on as in this process."""
        first, last = self.begun, self.epochs[-1]
        done, seconds = last["epoch"] - first["epoch"], last["seconds"] - first["seconds"]
        to_do = self.num_epochs - last["epoch"]
        left = [f"{stages.duration(seconds / done * to_do)} left"] if done and to_do else []
        return [f"{stages.duration(last['seconds'])} elapsed", *left]


def _cut(text: str) -> Text:
    """A text on one line, which ends in … where there is no room."""
    return Text(text, no_wrap=True, overflow="ellipsis")


RECENT = 10  # epochs that the mean of the reward is over
MANY_CLIPPED = 0.8
SPARKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Values as a row of bars; where there are more than `width`, means of neighbours."""
    size = math.ceil(len(values) / width)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    step = (high - low) / (len(SPARKS) - 1) or 1.0
    return "".join(SPARKS[round((value - low) / step)] for value in means)


class StageView:
    """Progress on stderr: on a terminal a bar for each stage; elsewhere a line at the end of each."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bars = Progress(*columns, console=progress, disable=not can_redraw(progress))
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StageView:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.tasks:
            for task in self.bars.tasks:  # what has no known end is over when something else begins
                self.bars.update(task.id, visible=task.total is not None)
            self.tasks[stage] = self.bars.add_task(stage, total=total or None)
        self.bars.update(self.tasks[stage], completed=done)
        if done == total > 0 and self.bars.disable:
            warn(f"{stage}: done")


# --- tables ---


def rows_table(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(
            Text(name, overflow="fold"), Text(f"{value:,}" if isinstance(value, int) else str(value), overflow="fold")
        )
    return table


def results_table(result: dict[str, Any]) -> Table:
    measured = find_measured(result) or "heldout"
    title = f"{result['num_images']:,} images in {stages.duration(result['seconds'])}"
    table = Table(MEASURED_ON[measured], "base", "tuned", "change", title=Text(title))
    for name, value in result[measured].items():
        table.add_row(
            Text(name), f"{value['base']:z.4f}", f"{value['tuned']:z.4f}", f"{value['tuned'] - value['base']:+z.4f}"
        )
    return table


def evaluation_table(results: dict[str, Any]) -> Table:
    """Means and changes of an evaluation, with their intervals, and how many prompts are better, the same and worse."""
    from . import report
    from .measures import OUTCOMES

    about = results["benchmark"]
    total = f" of {about['num_prompts']}" if results["strengths"] else ""
    title = f"{about['name']}: {results['num_prompts_measured']}{total} prompts, {results['num_images']} images each"
    heads = ("", "mean", "change", "{}/{}/\n{}, %".format(*OUTCOMES))
    table = Table(*heads, title=Text(title), box=None, padding=(0, 1, 0, 0), header_style="underline")
    for measure, base in results["systems"][BASE]["measures"].items():
        table.add_row(Text(measure, style="bold"))
        table.add_row(f" {BASE}", Text(report.interval(base) + report.dropped(base)))
        for name in list(results["systems"])[1:]:
            system = results["systems"][name]
            summary = system["measures"][measure]
            style = {"gain": "green", "loss": "red", "": ""}[report.direction(summary["paired"], base["spread"])]
            change = Text(report.interval(summary["paired"], "+"), style=style)
            cells = (
                f" {report.label(name, system)}",
                report.interval(summary) + report.dropped(summary),
                change,
                "/".join(str(share) for _, share in report.percents(summary)) or "-",
            )
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
    return table
