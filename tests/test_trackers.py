"""What a training logs is read back from each tracker, offline; and a tracker without an account stops it before any work.

wandb and trackio are run themselves where they are installed. Elsewhere stand-ins take their places behind accelerate's own
classes, which ask for their packages' functions only.
"""

import importlib.machinery
import json
import os
import sqlite3
import struct
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from texforce import training

from .commands import flags, invoke

TRACKERS = ("wandb", "trackio")


def expected_of(metrics: Path) -> dict[int, dict[str, float]]:
    """The numbers of each epoch after the first, by the names that they have in trackers."""
    expected = {}
    for line in map(json.loads, metrics.read_text().splitlines()[1:]):
        flat = {name: value for name, value in line.items() if isinstance(value, int | float)}
        expected[line["epoch"]] = flat | {f"heldout/{name}": value for name, value in line.get("heldout", {}).items()}
    assert list(expected) == [1, 2]
    return expected


# --- stand-ins ---


class StandIn:
    """A run of a tracker that keeps what is logged."""

    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged[step] = values

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fresh_accelerate():
    """accelerate before anything has made its state, as in a process of its own."""
    from accelerate import PartialState

    PartialState._reset_state()
    yield
    PartialState._reset_state()


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, init) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.init = init
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_gets_the_numbers_of_every_epoch(small_run, tmp_path, monkeypatch, name):
    kept, projects = StandIn(), []
    stand_in(monkeypatch, name, lambda project: projects.append(project) or kept)
    options = small_run | {"output_dir": tmp_path / "out", "num_epochs": 2, "report_to": name}
    result = invoke("train", *flags(options))
    assert result.exit_code == 0, result.output
    assert (projects, kept.finished) == (["texforce"], True)
    assert kept.logged == expected_of(tmp_path / "out" / "metrics.jsonl")


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(("name", "error"), [
    ("wandb", ValueError("No API key configured. Use `wandb login` to log in.")),
    ("wandb", OSError("API key verification failed: 401 Unauthorized")),
    ("trackio", ValueError("You must be logged in to use a Space")),
    ("trackio", KeyError("TRACKIO_SPACE_ID")),
], ids=["no account", "also a wrong key", "also no account of trackio", "also a setting that is missing"])  # fmt: skip
def test_without_an_account_nothing_is_loaded_and_the_folder_stays_free(small_run, tmp_path, monkeypatch, name, error):
    def init(project):
        raise error

    stand_in(monkeypatch, name, init)
    monkeypatch.setattr(training, "prepare", lambda config: pytest.fail("a model was loaded"))
    options = small_run | {"output_dir": tmp_path / "out", "report_to": name}
    result = invoke("train", *flags(options))
    assert result.exit_code == 2, result.output
    assert f"--report-to: {name} failed; fix it, or choose another tracker or none" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


# --- the trackers themselves, offline ---


def train_with(tracker: str, small_run: dict, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """A training by the command in a process of its own, which works in a folder."""
    options = small_run | {"output_dir": folder / "out", "num_epochs": 2, "report_to": tracker}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | environment
    command = [sys.executable, "-P", "-m", "texforce.cli", "train", *flags(options)]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment | {"HOME": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def records_of_wandb(path: Path) -> Iterator[bytes]:
    """The records of a file of wandb: blocks of 32 KiB, in which records, or parts of them, have a head of 7 bytes."""
    content, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:  # no head fits into the end of a block
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def logged_by_wandb(folder: Path) -> dict[int, dict[str, float]]:
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    logged = {}
    for content in records_of_wandb(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        if row:
            logged[row["_step"]] = {key: value for key, value in row.items() if not key.startswith("_")}
    return logged


def logged_by_trackio(folder: Path) -> dict[int, dict[str, float]]:
    database = sqlite3.connect(folder / "trackio" / "texforce.db")
    return {step: json.loads(values) for step, values in database.execute("select step, metrics from metrics")}


READERS = {"wandb": logged_by_wandb, "trackio": logged_by_trackio}


@pytest.mark.parametrize("name", TRACKERS)
def test_what_a_run_logs_offline_is_read_back(small_run, tmp_path, name):
    pytest.importorskip(name)
    done = train_with(name, small_run, tmp_path, WANDB_MODE="offline", TRACKIO_DIR=str(tmp_path / "trackio"))
    assert done.returncode == 0, done.stderr
    expected = expected_of(tmp_path / "out" / "metrics.jsonl")
    logged = READERS[name](tmp_path)
    assert {
        step: {key: pytest.approx(value) for key, value in values.items()} for step, values in expected.items()
    } == logged


@pytest.mark.parametrize("key", [None, "short"], ids=["no account", "also a key that is none"])
def test_wandb_itself_without_an_account_is_bad_input(small_run, tmp_path, key):
    pytest.importorskip("wandb")
    done = train_with("wandb", small_run, tmp_path, **({"WANDB_API_KEY": key} if key else {}))
    assert done.returncode == 2, done.stderr
    assert "--report-to: wandb failed" in done.stderr
    assert "Traceback" not in done.stderr
