"""The live view and the tables, in a real terminal (tmux) at several sizes, and line by line elsewhere."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from texforce import stages, training, views
from texforce.config import TrainOptions, resolve

EPOCHS = [
    {"epoch": 0, "seconds": 5.0, "heldout": {"hps": 0.25}},
    {"epoch": 1, "seconds": 15.0, "reward_mean": 0.5, "reward_std": 0.125, "images_per_s": 40.0},
    {"epoch": 2, "seconds": 25.0, "reward_mean": 0.75, "reward_std": 0.125, "images_per_s": 40.0, "heldout": {"hps": 0.375}},
]
LONG_NAMES = {f"some/where/deep/mine.py:a_reward_with_a_very_long_name_{k}": 0.1234 * k for k in range(3)}
SIZES = [(80, 24), (110, 30), (200, 50)]


# --- in a terminal ---

VIEW = """
import json, sys, time, types
from texforce import views

with views.EpochView(types.SimpleNamespace(num_epochs=400, clip_range=5e-3, normalise_rewards=False)) as view:
    for epoch in json.loads(sys.argv[1]):
        view(epoch)
    view.at_stage("sampling", 12, 64)
    time.sleep(600)
"""


class Screen:
    """What a program shows in a terminal of tmux."""

    def __init__(self, socket: Path) -> None:
        self.tmux = ["tmux", "-f", "/dev/null", "-S", str(socket)]

    def start(self, command: list[str], width: int, height: int) -> None:
        size = ["-x", str(width), "-y", str(height)]
        subprocess.run([*self.tmux, "new-session", "-d", *size, shlex.join(command)], check=True)
        subprocess.run([*self.tmux, "set", "-w", "remain-on-exit", "on"], check=True)

    def text(self, *options: str) -> str:
        command = [*self.tmux, "capture-pane", "-p", *options]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def wait(self, is_reached: Callable[[str], object], seconds: float = 30) -> str:
        """The text of the screen once it is as wanted."""
        until = time.monotonic() + seconds
        while not is_reached(text := self.text()):
            assert time.monotonic() < until, text
            time.sleep(0.05)
        return text

    def close(self) -> None:
        subprocess.run([*self.tmux, "kill-server"], check=False, capture_output=True)


@pytest.fixture
def screen(tmp_path, monkeypatch) -> Iterator[Screen]:
    if not shutil.which("tmux"):
        pytest.skip("no tmux: apt-get install tmux (Debian)")
    monkeypatch.setenv("LANG", "C.UTF-8")
    for name in ("TMUX", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    opened = Screen(tmp_path / "tmux")
    yield opened
    opened.close()


def show_epochs(screen: Screen, epochs: list[dict], width: int, height: int) -> str:
    screen.start([sys.executable, "-P", "-c", VIEW, json.dumps(epochs)], width, height)
    return screen.wait(lambda text: re.search(r"sampling .* 12/64", text))


def with_long_names(epoch: dict) -> dict:
    """An epoch of a mixture of rewards with long names."""
    return epoch | ({"heldout": LONG_NAMES | {"alignment_exact": 0.75}} if "heldout" in epoch else {"parts": LONG_NAMES})


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_terminal_shows_all_three_answers_whatever_its_size(screen, width, height):
    lines = show_epochs(screen, [with_long_names(epoch) for epoch in EPOCHS], width, height).rstrip("\n").split("\n")
    shown = [line.rstrip() for line in lines if line.strip()]
    assert shown[0] == "epoch 2/400  0 images  25 s elapsed  66 min left"
    assert shown[1] == "reward  ▁█  0.6250 over the last 2"
    assert re.fullmatch(r" *held-out, epoch 2 +base +now +change", shown[2])
    assert any(re.fullmatch(r" *alignment_exact +0\.7500 +0\.7500 +\+0\.0000", line) for line in shown)
    assert re.fullmatch(r"sampling [━╸╺]+ 12/64", shown[-1])
    assert width - 4 <= max(map(len, shown)) <= width
    # A name that does not fit is cut with a sign, and only then.
    cut = [line for line in shown if "some/where" in line]
    assert len(cut) == len(LONG_NAMES)
    assert all(("…" in line) == (width == 80) for line in cut)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_at_the_base_measurement_there_is_no_change_yet(screen, width, height):
    shown = show_epochs(screen, [with_long_names(EPOCHS[0])], width, height)
    assert re.search(r"held-out, epoch 0 +base +now +change", shown)
    assert re.search(r"alignment_exact +0\.7500 +0\.7500 *$", shown, re.MULTILINE)
    assert "reward  " not in shown


def test_text_has_the_terminals_own_colours_so_that_it_is_legible_on_light_and_on_dark(screen):
    troubles = {"max_ratio_deviation": 1.0, "clip_fraction": 0.9, "dropped": [{"prompt": "a", "seed": 1}]}
    show_epochs(screen, [*EPOCHS[:2], EPOCHS[2] | troubles], 110, 30)
    found = re.findall(r"\x1b\[([0-9;]*)m([^\x1b]*)", screen.text("-e"))
    coloured = {codes for codes, text in found if re.search(r"\w", text)}
    assert any("31" in codes.split(";") for codes in coloured)  # troubles are red
    # No black or white, no grey, no shade of its own, no background: bold, default, or one of the theme's colours.
    allowed = {"", "0", "1", "3", "22", "23", "39", "49", *map(str, range(31, 37))}
    assert {code for codes in coloured for code in codes.split(";")} <= allowed


def test_the_view_is_drawn_in_place_and_its_end_stays(screen):
    code = VIEW.replace("    time.sleep(600)", "print('the end', flush=True)\ntime.sleep(600)")
    screen.start([sys.executable, "-P", "-c", code, json.dumps(EPOCHS)], 80, 24)
    shown = screen.wait(lambda text: "the end" in text)
    assert shown.count("epoch 2/400") == 1
    assert "epoch 1/400" not in shown
    assert "sampling" not in shown  # nothing is being done any more


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_training_in_a_terminal_moves_within_an_epoch_and_shows_nothing_of_others(
    screen, small_run, width, height, tmp_path
):
    options = small_run | {"num_epochs": 3, "sample_batch_size": 2, "output_dir": tmp_path / "out"}
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    screen.start([sys.executable, "-P", "-m", "texforce.cli", "train", *flags], width, height)
    seen, text = set[str](), ""
    until = time.monotonic() + 120
    while "metrics and report.html" not in text:
        assert time.monotonic() < until, text
        time.sleep(0.05)
        text = screen.text()
        seen |= set(re.findall(r"^(loading the model|measuring|sampling|scoring|updating) ", text, re.MULTILINE))
        for foreign in ("Loading weights", "Writing model shards", "Warning", "it/s", "%|"):
            assert foreign not in text
    assert {"loading the model", "measuring", "sampling"} <= seen
    assert screen.text("-S", "-").count("epoch 3/3") == 1  # with what has left the screen above
    assert max(map(len, text.splitlines())) <= width


# --- elsewhere ---


def view_of_epochs(monkeypatch, **console) -> str:
    shown = io.StringIO()
    monkeypatch.setattr(views, "progress", Console(file=shown, width=200, **console))
    with views.EpochView(resolve(TrainOptions(model="tiny", num_epochs=4))) as view:
        for measures in EPOCHS:
            view(measures)
    return shown.getvalue()


def test_a_file_gets_lines_though_colours_are_forced_as_in_notebooks(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = views.PipeConsole(file=io.StringIO(), force_jupyter=False)
    assert console.is_terminal
    monkeypatch.setattr(views, "progress", console)
    with views.EpochView(resolve(TrainOptions(model="tiny", num_epochs=4))) as view:
        for measures in EPOCHS:
            view(measures)
    assert [line.split("  ")[0] for line in console.file.getvalue().splitlines()] == ["epoch 0/4", "epoch 1/4", "epoch 2/4"]


def test_a_measure_whose_unit_changes_has_no_change():
    config = resolve(TrainOptions(model="tiny", reward="hps=1,jpeg=0.1", normalise_rewards=True, num_epochs=4))
    view = views.EpochView(config)
    for epoch in (0, 1):
        measures = {"epoch": epoch, "seconds": 1.0, "heldout": {"hps=1,jpeg=0.1": 0.5 + epoch, "hps": 0.25 + epoch}}
        view(measures)
    assert "held-out: hps=1,jpeg=0.1 1.5000, hps 1.2500 (+1.0000)" in view.line(measures)
    (table,) = view.measured_table()
    assert [list(column.cells) for column in table.columns[1:]] == [["", "0.2500"], ["1.5000", "1.2500"], ["", "+1.0000"]]


@pytest.mark.parametrize("width", [80, 200])
def test_the_last_line_has_room_for_the_sign_of_an_interruption(monkeypatch, width):
    """Else ^C, which the terminal itself writes, begins another line, and the view is drawn one line too low."""
    console = views.PipeConsole(file=io.StringIO(), width=width, force_terminal=True)
    monkeypatch.setattr(views, "progress", console)
    view = views.EpochView(resolve(TrainOptions(model="tiny", num_epochs=4)))
    view.at_stage("sampling", 3, 12)
    *_, last = console.render_lines(view.view(), pad=False)
    assert "sampling" in last[0].text
    assert sum(segment.cell_length for segment in last) <= width - 2


def test_elsewhere_every_epoch_is_a_line(monkeypatch):
    lines = view_of_epochs(monkeypatch).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 0/4", "epoch 1/4", "epoch 2/4"]
    assert "held-out: hps 0.2500" in lines[0]
    assert re.search(r"held-out: hps 0\.\d{4} \([+-]0\.\d{4}\)", lines[2])
    assert lines[1].endswith("reward 0.5000  15 s elapsed  30 s left")
    assert "\x1b" not in "".join(lines)


def test_a_resumed_run_is_shown_against_the_base_model_and_timed_by_this_process_alone():
    view = views.EpochView(resolve(TrainOptions(model="tiny", num_epochs=4)))
    view(EPOCHS[1] | {"earlier": EPOCHS[:1]})
    view(EPOCHS[2])
    assert view.epochs[0] is EPOCHS[0]
    assert view.begun["epoch"] == EPOCHS[1]["epoch"]
    (table,) = view.measured_table()
    assert next(iter(table.columns[1].cells)) == f"{EPOCHS[0]['heldout']['hps']:.4f}"


def test_only_the_first_process_of_a_run_draws_the_view(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(views, "progress", views.PipeConsole(file=screen))
    config = resolve(TrainOptions(model="tiny"))
    assert views.EpochView(config).live is not None
    assert views.EpochView(config, is_drawn=False).live is None


# --- what is in the view ---


def test_what_goes_wrong_is_shown_only_then():
    view = views.EpochView(resolve(TrainOptions(model="tiny", algorithm="ppo", num_epochs=4)))
    view(EPOCHS[1] | {"max_ratio_deviation": 1e-7, "clip_fraction": 0.1, "dropped": []})
    assert view.troubles() == []
    view(EPOCHS[2] | {"max_ratio_deviation": 1e-3, "clip_fraction": 0.9, "dropped": [{"prompt": "a", "seed": 1}]})
    assert [trouble.split()[0] for trouble in view.troubles()] == ["the", "90%", "1"]


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0 s"), (95, "95 s"), (120, "2 min"), (7199, "120 min"), (7200, "2.0 h"), (100_000, "27.8 h"),
    (200_000, "2.3 days"),
])  # fmt: skip
def test_a_duration_is_in_the_unit_that_one_would_say(seconds, text):
    assert stages.duration(seconds) == text


@pytest.mark.parametrize(("values", "line"), [
    ([1.0], "▁"), ([0.0, 1.0], "▁█"), ([1.0, 1.0, 1.0], "▁▁▁"), ([0.0, 7.0, 3.5], "▁█▅"), (list(range(80)), 40),
])  # fmt: skip
def test_a_sparkline_goes_from_the_lowest_to_the_highest(values, line):
    drawn = views.sparkline(values)
    assert (drawn if isinstance(line, str) else len(drawn)) == line
    assert list(drawn) == sorted(drawn) or values != sorted(values)


def test_a_training_reports_what_it_is_doing(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr("texforce.run.write_curve", lambda *arguments: None)
    reported, options = (
        [],
        small_run | {"num_inference_steps": 2, "sample_batch_size": 4, "output_dir": str(tmp_path / "out")},
    )
    with stages.reporting_to(lambda stage, done, total: reported.append((stage, done, total))):
        training.train(resolve(TrainOptions(**options)))
    assert list(dict.fromkeys(stage for stage, _, _ in reported)) == [
        "loading the model", "loading jpeg", "measuring", "scoring", "sampling", "updating",
    ]  # fmt: skip
    assert all(0 <= done <= total for _, done, total in reported)
    assert [done for stage, done, _ in reported if stage == "sampling"] == [0, 4]
    reported.clear()
    stages.report("nobody listens")
    assert reported == []
