"""What a run leaves, and how it goes on exactly: checkpoints that are known when they are broken, guards, the lock, figures.

The tests are tested too: `DEFECTS` breaks the code in one place each, and the check named with it must notice. Covered are:
no renaming of a checkpoint, no check of its manifest, generators, optimizer, average, statistics, schedule or the order of
the prompts not saved, no lock, a gradient of NaN let through, half of the gradients dropped.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import texforce
from texforce import files, models, report, rewards, run, training
from texforce.config import TrainConfig, TrainOptions, resolve
from texforce.errors import DivergedError, InputError, RewardError
from texforce.experience import PromptStatistics
from texforce.heldout import Heldout, _Drawn
from texforce.learner import Learner

from .commands import check_failure, flags, invoke

WEIGHTS = "adapter_model.safetensors"
WRITE_CURVE = run.write_curve  # which the fixture `quick` replaces


class Stop(Exception):
    """What stops a run in these tests."""


@pytest.fixture(scope="module", autouse=True)
def quick(narrow_model):
    """Let a prompt's own statistics count from its second visit on, not from its sixteenth; a narrow U-Net, and no curves.

    A curve takes longer than the training of these runs.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load_model", lambda name, device, dtype, **_: narrow_model(dtype))
        patch.setattr(PromptStatistics.__init__, "__defaults__", (32, 3))
        patch.setattr(run, "write_curve", lambda path, epochs, reward: path.write_bytes(b""))
        yield


@pytest.fixture(scope="module")
def options(shared_run) -> dict:
    """A short run in which everything that a checkpoint holds has a say."""
    return shared_run | {
        "num_epochs": 4, "num_prompts_per_epoch": 3, "num_samples_per_prompt": 2, "num_inference_steps": 2, "ema_decay": 0.5,
        "lr_scheduler": "cosine", "eval_every": 2, "checkpoint_every": 2, "advantages": "per-prompt", "reward": "jpeg",
        "learning_rate": 1e-2,
    }  # fmt: skip


def configure(**options: object) -> TrainConfig:
    return resolve(TrainOptions(**options))


def run_training(options: dict, folder: Path, stop_in: int | None = None, **arguments: object) -> dict:
    """A run, or what there is of it up to the middle of its epoch `stop_in` from here."""
    epochs = []

    def stopping(update):
        def stopping_update(*given):
            epochs.append(given)
            result = update(*given)
            if len(epochs) == stop_in:
                raise Stop
            return result

        return stopping_update

    with pytest.MonkeyPatch.context() as patch:
        for name in ("ppo_update", "matching_update", "gradient_update"):
            patch.setattr(training, name, stopping(getattr(texforce, name)))
        with contextlib.suppress(Stop):
            return training.train(configure(**options, output_dir=str(folder)), **arguments)
    return {}


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory) -> Path:
    """A run that is not stopped. Do not change it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_training(options, folder)
    return folder


@pytest.fixture(scope="module")
def stopped(options, tmp_path_factory) -> Path:
    """The same run, stopped in the middle of its third epoch. Do not change it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run_training(options, folder, stop_in=3)
    return folder


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    """A copy of the run that is over."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def checkpoint(stopped, tmp_path) -> Path:
    """The checkpoint of a copy of the run that was stopped."""
    return shutil.copytree(stopped, tmp_path / "run") / "checkpoints" / "epoch_000002"


def weights(folder: Path) -> str:
    """A digest: where they differ, pytest would take minutes to print in what, if CI is set."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_same_run(folder: Path, whole: Path) -> None:
    """Two runs have the same adapter, measures and result."""
    assert weights(folder) == weights(whole)
    names = ("epoch", "reward_mean", "heldout", "grad_norm", "num_images", "num_unet_calls")
    ours, theirs = ([{name: line.get(name) for name in names} for line in metrics(path)] for path in (folder, whole))
    assert ours == theirs
    results = [json.loads((path / "result.json").read_text())["heldout"] for path in (folder, whole)]
    assert results[0] == results[1]


def check_goes_on_exactly(options: dict, whole: Path, stopped: Path, folder: Path) -> None:
    """A run that was stopped in the middle of an epoch, and goes on, ends as one that was not."""
    shutil.copytree(stopped, folder / "parted")
    assert not (folder / "parted" / "result.json").exists()
    run_training(options, folder / "parted", resume=True)
    check_same_run(folder / "parted", whole)


# --- going on ---


LITTER = (".config.json.abc.tmp/config.json", ".room.tmp", ".holder", ".README.md.x.tmp/README.md", ".adapter.a.tmp/file",
          "checkpoints/.epoch_000004.x.tmp/state.json", "checkpoints/.epoch_000001.old.tmp/state.json",
          "unet/.adapter_config.json.x.tmp/file", "mine.tmp/file")  # fmt: skip


@pytest.fixture(scope="module")
def resumed(options, stopped, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run that goes on after a kill has left all it can, with other options that decide nothing; and what it warned of."""
    folder = shutil.copytree(stopped, tmp_path_factory.mktemp("resumed") / "run")
    for name in LITTER:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("cut off")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "loss": 1}\n{"epoch": 4, "lo')
    later = json.loads((folder / run.FRAMES).read_text().splitlines()[1]) | {"epoch": 4}
    with (folder / run.FRAMES).open("a") as file:
        file.write(f'{json.dumps(later)}\n{{"epoch": 4, "sc')
    broken = shutil.copytree(folder / "checkpoints" / "epoch_000002", folder / "checkpoints" / "epoch_000009")
    (broken / "state.json").write_text("{}")
    said: list[str] = []
    run_training(options | FREE, folder, resume=True, warn=said.append)
    return folder, said


FREE = {"checkpoint_every": 1, "checkpoints_to_keep": 1, "reward_timeout": 5.0}


def test_a_run_that_is_stopped_goes_on_exactly(resumed, whole):
    """What a kill leaves behind does not keep it from that, nor do other options that decide nothing."""
    check_same_run(resumed[0], whole)
    assert set(FREE) <= set(run.FREE_OPTIONS)


def test_what_a_kill_leaves_behind_is_removed(resumed):
    assert [path.name for path in resumed[0].rglob("*.tmp")] == ["mine.tmp"]
    assert not (resumed[0] / ".holder").exists()


def test_what_was_written_after_the_checkpoint_is_gone_from_the_metrics(resumed):
    assert [line["epoch"] for line in metrics(resumed[0])] == [0, 1, 2, 3, 4]
    assert not any("loss" in line for line in metrics(resumed[0]))


def test_a_broken_checkpoint_is_told_and_passed_over(resumed):
    assert len(resumed[1]) == 1
    assert "epoch_000009 is damaged" in resumed[1][0]


def test_a_checkpoint_is_kept_though_broken_ones_seem_newer(resumed):
    assert [path.name for path in (resumed[0] / "checkpoints").iterdir()] == ["epoch_000004"]
    assert run.is_valid(resumed[0] / "checkpoints" / "epoch_000004")


@pytest.mark.parametrize(
    "changes",
    [
        {"advantages": "leave-one-out", "reward": "jpeg=1,hps=2", "normalise_rewards": True, "lr_scheduler": "constant",
         "null_prompt": "base"},
        {"target": "both", "kl_weight": 0.1, "lr_scheduler": "linear", "weight_decay": 0.1, "ema_decay": 0.0},
        {"algorithm": "matching", "num_inner_epochs": 2, "kl_weight": 0.1, "null_anchor": 1.0, "eta": 0.0},
        {"algorithm": "gradient", "reward": "hps", "backprop_steps": 2, "null_anchor": 1.0, "sampler": "dpm-solver",
         "num_inference_steps": 3, "adapter_steps": "0.5-1"},
        pytest.param({"adapter_steps": "0.5-1", "target": "both", "num_inference_steps": 4}, marks=pytest.mark.slow),
        {"algorithm": "matching", "reward": "none", "eval_reward": ["jpeg"], "relabel": "CAPTIONS", "relabel_weight": 2.0,
         "imitation_weight": 0.5, "null_anchor": 1.0, "adapter_steps": "0-0.5"},
    ],
    ids=[
        "normalised mixture, base null prompt", "U-Net too, no average", "matching", "gradient, dpm-solver, in some steps",
        "ppo in some steps", "relabelling alone in some steps",
    ],
)  # fmt: skip
@pytest.mark.quick(1)
def test_a_run_of_other_options_that_is_stopped_goes_on_exactly(options, tmp_path, changes):
    options = options | {"num_epochs": 2, "checkpoint_every": 1} | changes
    if "relabel" in changes:
        (tmp_path / "mine.py").write_text("def caption(images, prompts):\n    return ['two blue squares'] * len(images)\n")
        options |= {"relabel": f"{tmp_path / 'mine.py'}:caption"}
    for name, stop_in in (("whole", None), ("stopped", 2)):
        run_training(options, tmp_path / name, stop_in)
    check_goes_on_exactly(options, tmp_path / "whole", tmp_path / "stopped", tmp_path)


@pytest.mark.slow
def test_a_run_stopped_in_its_first_epoch_and_once_more_goes_on_exactly(options, whole, tmp_path):
    run_training(options, tmp_path, 1)
    run_training(options, tmp_path, 2, resume=True)
    assert run.newest_checkpoint(tmp_path / "checkpoints").name == "epoch_000001"
    run_training(options, tmp_path, resume=True)
    check_same_run(tmp_path, whole)


def test_with_no_valid_checkpoint_a_run_starts_over(options, checkpoint):
    folder = checkpoint.parents[1]
    (checkpoint / "manifest.json").unlink()
    said, seen = [], []
    run_training(options, folder, stop_in=1, resume=True, warn=said.append, report=seen.append)
    assert [measures["epoch"] for measures in seen] == [0]
    assert any("has no checkpoint to go on from, and starts over" in message for message in said)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["epoch_000000"]


@pytest.mark.slow
def test_checkpoints_come_as_often_and_stay_as_many_as_asked(options, whole, tmp_path):
    assert sorted(path.name[-1] for path in (whole / "checkpoints").iterdir()) == ["2", "4"]
    few = options | {"num_prompts_per_epoch": 2, "num_updates_per_epoch": 1, "eval_every": 5, "checkpoints_to_keep": 3}
    run_training(few | {"checkpoint_every": 1}, tmp_path / "a")
    assert sorted(path.name[-1] for path in (tmp_path / "a" / "checkpoints").iterdir()) == ["2", "3", "4"]
    run_training(few | {"checkpoint_every": 3}, tmp_path / "b")
    assert sorted(path.name[-1] for path in (tmp_path / "b" / "checkpoints").iterdir()) == ["3", "4"]  # the last one always


@pytest.mark.parametrize(("name", "value"), [
    ("num_images", "many"), ("seconds", 10**400), ("heldout", None), ("heldout", {"jpeg": {"base": 1}}),
    ("heldout", {"jpeg": {"base": "[/b]", "tuned": 1}}), ("heldout", {"jpeg": {"base": [], "tuned": 1}}),
])  # fmt: skip
def test_a_damaged_result_of_a_finished_run_is_bad_input_that_is_named(options, finished, name, value):
    result = json.loads((finished / "result.json").read_text())
    (finished / "result.json").write_text(json.dumps(result | {name: value}))
    with pytest.raises(InputError, match=r"result\.json is no result of a training; delete it"):
        run_training(options, finished, resume=True)


def test_a_finished_run_gives_its_result_and_changes_nothing(options, finished, monkeypatch):
    monkeypatch.setattr(training, "prepare", lambda config: pytest.fail("it loaded the model"))
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    said = []
    result = run_training(options, finished, resume=True, warn=said.append)
    assert result == json.loads((finished / "result.json").read_text())
    assert "finished" in said[0]
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_a_finished_run_without_checkpoints_is_not_overwritten(options, finished, monkeypatch):
    monkeypatch.setattr(training, "prepare", lambda config: pytest.fail("it loaded the model"))
    shutil.rmtree(finished / "checkpoints")
    with pytest.raises(InputError, match="seed: 0 -> 7"):
        run_training(options | {"seed": 7}, finished, resume=True)
    said = []
    run_training(options, finished, resume=True, warn=said.append)
    assert "finished" in said[-1]


def test_a_result_that_is_not_this_runs_is_gone(options, finished):
    more = options | {"num_epochs": 5}
    run_training(more, finished, stop_in=1, resume=True, force=True)
    assert not (finished / "result.json").exists()
    assert run_training(more, finished, resume=True)["num_images"] == 30


def test_a_changed_run_is_refused_with_what_has_changed_unless_forced(options, checkpoint, tmp_path):
    folder = checkpoint.parents[1]
    changed = options | {"learning_rate": 1e-3, "rank": 8}
    with pytest.raises(InputError, match=r"learning_rate: 0.01 -> 0.001; .*rank: 4 -> 8; .*--force-resume"):
        run_training(changed, folder, resume=True)
    (tmp_path / "prompts.txt").write_text("a red box\ntwo blue squares\na navy disc\n")
    with pytest.raises(InputError, match="the training prompts"):
        run_training(options | {"prompts": str(tmp_path / "prompts.txt")}, folder, resume=True)
    with pytest.raises(InputError, match="other layers or another rank"):
        run_training(options | {"rank": 8}, folder, resume=True, force=True)
    for force in (False, True):  # what --force-resume cannot do is not advised
        with pytest.raises(InputError, match=r"cannot change in it: reward: jpeg -> hps; begin another"):
            run_training(options | {"reward": "hps"}, folder, resume=True, force=force)
    assert json.loads((folder / "config.json").read_text())["rank"] == 4


def test_a_changed_run_that_is_forced_goes_on_with_the_new_options(options, checkpoint, monkeypatch):
    folder = checkpoint.parents[1]
    forced = options | {"learning_rate": 1e-3, "lr_scheduler": "linear"}
    rates, step = [], Learner.step

    def noted_step(learner):
        rates.append(learner.optimizer.param_groups[0]["lr"])
        return step(learner)

    monkeypatch.setattr(Learner, "step", noted_step)
    run_training(forced, folder, stop_in=1, resume=True, force=True)
    run_training(forced, folder, resume=True)  # it is what was forced that goes on
    assert [line["epoch"] for line in metrics(folder)] == [0, 1, 2, 3, 4]
    assert rates == pytest.approx([1e-3 * (8 - k) / 8 for k in (4, 5, 4, 5, 6, 7)])


# --- what was edited since ---


@pytest.mark.parametrize(("field", "value", "words"), [
    ("learning_rate", 0.1, "--learning-rate: 0.01 -> 0.1"),
    ("lora_alpha", 64, "--lora-alpha: 4 -> 64"),
    ("seed", 7, "--seed: 0 -> 7"),
    pytest.param("num_inference_steps", 3, "--num-inference-steps: 2 -> 3", id="also"),
    pytest.param("heldout_prompts", None, "--heldout-prompts: ", id="also back to the default"),
])  # fmt: skip
def test_an_edit_of_config_json_is_a_change_and_refused(checkpoint, field, value, words):
    saved = checkpoint.parents[1] / "config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {field: value}))
    check_failure(invoke("train", "--resume", saved.parent), 2, words, "--force-resume")
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


@pytest.mark.parametrize(("field", "value"), [("num_epochs", 5), pytest.param("ema_decay", 0.25, id="also")])
def test_a_finished_run_whose_config_json_says_something_else_is_not_finished(finished, field, value):
    saved = finished / "config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {field: value}))
    check_failure(
        invoke("train", "--resume", finished), 2, f"--{field.replace('_', '-')}: ", f" -> {value}", "--force-resume"
    )


REWARD = "def reward(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n"


@pytest.fixture(scope="module")
def from_files(options, tmp_path_factory) -> tuple[Path, dict]:
    """A run, stopped in its second epoch, that files of every kind decide, and its options. Change nothing for good."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "mine.py").write_text(REWARD)
    for name in ("hps.pt", "hps.json"):
        shutil.copy(models.TINY / name, folder)
    shutil.copytree(models.TINY / "tokenizer", folder / "tokenizer")
    for name in ("model_index.json", "unet/config.json", "notes.txt"):
        (folder / "model" / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / "model" / name).write_text("{}")
    (folder / "prompts.txt").write_text("a red circle\na blue square\na navy box\na green disc\na red cross\n")
    (folder / "anchors.txt").write_text("ugly\n")
    (folder / "heldout.txt").write_text("a green square\nan ivory box\n")
    options = options | {
        "model": str(folder / "model"), "reward": f"{folder / 'mine.py'}:reward", "eval_reward": ["hps"],
        "reward_checkpoint": [f"hps={folder / 'hps.pt'}"], "prompts": str(folder / "prompts.txt"), "num_epochs": 2,
        "heldout_prompts": str(folder / "heldout.txt"), "anchor_prompts": str(folder / "anchors.txt"), "null_anchor": 1.0,
        "mixed_precision": "no", "checkpoint_every": 1,
    }  # fmt: skip
    run_training(options, folder / "run", stop_in=2)
    return folder, options


@contextlib.contextmanager
def edited(path: Path, content: str) -> Iterator[None]:
    """A file with another content for a while."""
    whole = path.read_bytes()
    path.write_text(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(("name", "words"), [
    ("mine.py", "the content of the reward .*mine.py:reward"),
    ("hps.pt", "the content of the reward hps"),
    ("model/unet/config.json", "the files of the model"),
    ("prompts.txt", "the training prompts"),
    pytest.param("hps.json", "the content of the reward hps", id="also what lies beside a checkpoint"),
    pytest.param("heldout.txt", "the training prompts; the held-out prompts", id="also held-out prompts"),
    pytest.param("anchors.txt", "the anchor prompts", id="also anchors"),
])  # fmt: skip
def test_a_file_that_decides_a_run_and_has_another_content_since_is_refused_by_name(from_files, name, words, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("it loaded the model"))
    folder, options = from_files
    before = contents(folder / "run" / "checkpoints")
    content = "a red circle\na blue disc\n" if name.endswith(".txt") else REWARD.replace("images.", "1 + images.")
    with edited(folder / name, content), pytest.raises(InputError, match=f"changed since the checkpoint: {words}; --force"):
        run_training(options, folder / "run", resume=True)
    assert contents(folder / "run" / "checkpoints") == before


def test_another_revision_on_the_hub_is_refused(from_files, monkeypatch):
    folder, options = from_files
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("it loaded the model"))
    monkeypatch.setattr(models, "revision", lambda name: "0123abc")
    with pytest.raises(InputError, match="changed since the checkpoint: the files of the model; --force"):
        run_training(options, folder / "run", resume=True)


@pytest.mark.slow
def test_files_that_decide_nothing_may_change_and_force_measures_the_base_model_anew(from_files, tmp_path):
    """Else the old reward's base stood beside the new reward's tuned, as a gain of 1."""
    folder, options = from_files
    (folder / "model" / "notes.txt").write_text("other notes")
    for name in ("goes on", "forced"):
        shutil.copytree(folder / "run", tmp_path / name)
    result = run_training(options, tmp_path / "goes on", resume=True)
    with edited(folder / "mine.py", REWARD.replace("images.", "1 + images.")):
        forced = run_training(options, tmp_path / "forced", resume=True, force=True)
        assert run_training(options, tmp_path / "forced", resume=True) == forced
    before, after = (given["heldout"][options["reward"]] for given in (result, forced))
    assert after == pytest.approx({name: 1 + value for name, value in before.items()}, abs=1e-4)


def test_a_forced_run_with_fewer_prompts_begins_a_new_order_of_them(from_files, tmp_path):
    folder, options = from_files
    shutil.copytree(folder / "run", tmp_path / "run")
    with edited(folder / "prompts.txt", "a navy disc\n"):
        assert run_training(options, tmp_path / "run", resume=True, force=True)["num_images"] == 12


# --- a run without its config.json ---


def test_a_run_whose_config_json_is_gone_goes_on_exactly_by_its_checkpoint(checkpoint, whole):
    folder = checkpoint.parents[1]
    (folder / "config.json").unlink()
    result = invoke("train", "--resume", folder)
    assert result.exit_code == 0, result.output
    check_same_run(folder, whole)
    assert (folder / "config.json").read_text().replace(str(folder), str(whole)) == (whole / "config.json").read_text()


@pytest.mark.parametrize("left", ["also: a finished run", "also: no valid checkpoint"])
def test_other_runs_whose_config_json_is_gone(finished, left):
    (finished / "config.json").unlink()
    if left == "also: a finished run":
        result = invoke("train", "--resume", finished)
        assert (result.exit_code, "is finished" in result.stderr) == (0, True), result.output
    else:
        for manifest in finished.rglob("manifest.json"):
            manifest.unlink()
        check_failure(invoke("train", "--resume", finished), 2, "there is no run in")


# --- checkpoints of others ---


NONSENSE = {
    "an order of no prompt": {"order": [99]},
    "also: an index of no prompt": {"order": {"waiting": [99]}},
    "also: no epochs": {"epochs": []},
    "also: epochs of texts": {"epochs": ["x"]},
    "also: a count that is none": {"epochs": [{"epoch": 0, "num_images": 10**400, "num_unet_calls": 0, "seconds": 1}]},
    "also: no options": {"config": 5},
    "also: statistics of texts": {"statistics": {"a red circle": ["x"]}},
    "also: spreads of a text": {"reward": {"jpeg": {"count": "x"}}},
    "also: a learner of numbers": {"learner": [7]},
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_checkpoint_with_a_valid_manifest_and_no_training_in_it_is_refused_by_name(checkpoint, kind):
    state = json.loads((checkpoint / "state.json").read_text()) | NONSENSE[kind]
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").write_text(run.manifest(checkpoint))
    check_failure(
        invoke("train", "--resume", checkpoint.parents[1]), 3, str(checkpoint), "refused as a training's checkpoint"
    )


@pytest.mark.parametrize("content", ["[]", "{", '"text"'])
def test_a_state_that_is_no_object_is_refused_by_name(checkpoint, content):
    (checkpoint / "state.json").write_text(content)
    (checkpoint / "manifest.json").write_text(run.manifest(checkpoint))
    check_failure(
        invoke("train", "--resume", checkpoint.parents[1]), 3, str(checkpoint), "refused as a training's checkpoint"
    )


@pytest.mark.parametrize("kind", ["a file", "also a link", "also a link to nothing"])
def test_what_is_called_like_a_checkpoint_and_is_none_is_passed_over_and_replaced(
    options, checkpoint, whole, tmp_path, kind
):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    for name in ("epoch_000004", "epoch_000009"):
        if kind == "a file":
            (checkpoint.parent / name).write_text("a file")
        else:
            (checkpoint.parent / name).symlink_to(tmp_path / ("elsewhere" if kind == "also a link" else "nowhere"))
    said = []
    run_training(options, checkpoint.parents[1], resume=True, warn=said.append)
    assert [message.partition(" is ")[0][-12:] for message in said] == ["epoch_000009", "epoch_000004"]
    check_same_run(checkpoint.parents[1], whole)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["epoch_000002", "epoch_000004"]
    assert (tmp_path / "elsewhere" / "file").read_text() == "mine"


def test_a_run_on_another_kind_of_device_is_refused(options, checkpoint, monkeypatch):
    original = run.read_checkpoint

    def read_checkpoint(path):
        snapshot = original(path)
        return run.Snapshot(snapshot.tensors, snapshot.state | {"device": "cuda"})

    monkeypatch.setattr(run, "read_checkpoint", read_checkpoint)
    with pytest.raises(InputError, match="resume: the run used cuda and can only be resumed on cuda"):
        run_training(options, checkpoint.parents[1], resume=True)


def test_what_is_measured_stays_when_a_run_is_stopped_and_then_diverges(options, checkpoint, monkeypatch):
    folder = checkpoint.parents[1]
    kept = weights(folder)
    run_training(options, folder, stop_in=2, resume=True)  # epoch 3, which is not measured, is over
    assert run.newest_checkpoint(checkpoint.parent).name == "epoch_000003"

    def diverge(*arguments):
        raise DivergedError("it went wrong")

    monkeypatch.setattr(training, "collect", diverge)
    with pytest.raises(DivergedError, match="it went wrong; the adapter of epoch 2 is kept in"):
        run_training(options, folder, resume=True)
    assert weights(folder) == kept
    assert [line["epoch"] for line in metrics(folder) if "heldout" in line] == [0, 2]


def test_options_that_an_older_run_did_not_know_had_their_default():
    config = asdict(configure(model="tiny", algorithm="ppo"))
    older = {name: value for name, value in config.items() if name != "num_inner_epochs"}
    assert run.differences(older, config) == []
    assert run.differences(older, config | {"num_inner_epochs": 7}) == ["num_inner_epochs: 1 -> 7"]


def test_a_micro_batch_size_that_was_found_out_is_kept_and_one_that_is_given_is_not(options):
    config, parameters = configure(**options), [torch.nn.Parameter(torch.zeros(2))]
    for found_out, begins, expected in ((True, 8, 7), (True, 4, 4), (False, 8, 8)):
        halved, learner = Learner(parameters, config), Learner(parameters, config)
        halved.micro_batch_size = 7
        learner.micro_batch_size, learner.finds_micro_batch = begins, found_out
        learner.load_state_dict(halved.state_dict() | {"optimizer": {}})
        assert learner.micro_batch_size == expected


# --- checkpoints ---


def test_every_bit_flip_and_every_truncation_is_noticed(checkpoint):
    assert run.is_valid(checkpoint)
    content = {path: path.read_bytes() for path in checkpoint.iterdir()}
    assert {path.name for path in content} == {"tensors.safetensors", "state.json", "manifest.json"}
    chance = random.Random(0)
    for number in range(330):
        path = chance.choice(sorted(content))
        changed = bytearray(content[path])
        if number < 300:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        else:
            del changed[chance.randrange(len(changed)) :]
        path.write_bytes(changed)
        assert not run.is_valid(checkpoint), (path.name, number)
        path.write_bytes(content[path])
    assert run.is_valid(checkpoint)


def test_a_checkpoint_with_a_file_more_less_or_of_another_kind_is_broken(checkpoint):
    (checkpoint / "more").write_text("")
    assert not run.is_valid(checkpoint)
    (checkpoint / "more").unlink()
    assert run.is_valid(checkpoint)
    (checkpoint / "state.json").unlink()
    assert not run.is_valid(checkpoint)
    (checkpoint / "state.json").mkdir()
    assert not run.is_valid(checkpoint)
    assert not run.is_valid(checkpoint / "manifest.json")
    assert not run.is_valid(checkpoint / "absent")


@pytest.mark.parametrize("format", [None, 1, run.STATE_FORMAT + 1])
def test_a_checkpoint_of_another_version_is_refused_and_stays(options, checkpoint, monkeypatch, format):
    monkeypatch.setattr(training, "prepare", lambda config: pytest.fail("it loaded the model"))
    state = json.loads((checkpoint / "state.json").read_text())
    assert state.pop("format") == run.STATE_FORMAT
    (checkpoint / "state.json").write_text(json.dumps(state if format is None else state | {"format": format}))
    (checkpoint / "manifest.json").write_text(run.manifest(checkpoint))
    before = contents(checkpoint.parents[1])
    with pytest.raises(InputError, match=r"resume: .*epoch_000002 was written by another version of texforce"):
        run_training(options, checkpoint.parents[1], resume=True)
    assert contents(checkpoint.parents[1]) | {checkpoint.parents[1] / files.LOCK: b""} == before | {
        checkpoint.parents[1] / files.LOCK: b""
    }


def check_save_is_whole(options: dict, whole: Path, stopped: Path, folder: Path) -> None:
    """A save that fails at any of its steps leaves the checkpoints as they were, and nothing else."""
    place = shutil.copytree(stopped / "checkpoints", folder / "checkpoints")
    snapshot = run.read_checkpoint(place / "epoch_000002")
    snapshot.state["epochs"][-1]["epoch"] = 9
    config = configure(**options)
    before = sorted(place.rglob("*")), contents(place)
    for owner, step in ((files, "sync"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text"), (files, "open_to_umask")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, step, lambda path, *arguments, **options: _fail(path))
            with pytest.raises(OSError, match="No space"):
                run.write_checkpoint(place, snapshot, config, {})
        assert before == (sorted(place.rglob("*")), contents(place)), step


def _fail(path: Path) -> None:
    raise OSError(28, "No space left on device", str(path))


def test_a_save_that_fails_leaves_the_checkpoints_as_they_were(options, whole, stopped, tmp_path):
    check_save_is_whole(options, whole, stopped, tmp_path)


def test_a_save_takes_the_place_of_a_broken_checkpoint_and_leaves_a_sound_one(options, checkpoint):
    snapshot, config = run.read_checkpoint(checkpoint), configure(**options)
    config = replace(config, **json.loads((checkpoint / "state.json").read_text())["config"])
    before = {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    assert run.write_checkpoint(checkpoint.parent, snapshot, config, snapshot.state["sources"]) == checkpoint
    assert before == {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    (checkpoint / "state.json").write_bytes(b"")
    run.write_checkpoint(checkpoint.parent, snapshot, config, snapshot.state["sources"])
    assert run.is_valid(checkpoint)


def test_a_checkpoint_holds_no_pickle_and_follows_the_umask(checkpoint):
    umask = os.umask(0)
    os.umask(umask)
    for path in checkpoint.iterdir():
        assert path.suffix in (".json", ".safetensors")
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


# --- signals ---


def test_a_save_that_fails_after_a_signal_is_told_and_the_signal_is_obeyed(options, tmp_path, monkeypatch):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "train_epoch", interrupted)
    monkeypatch.setattr(run, "write_checkpoint", full)
    result = invoke("train", *flags(options), "--output-dir", tmp_path / "out")
    assert result.exit_code == 143
    assert "Traceback" not in result.output
    assert "could not be saved: [Errno 28] No space left on device" in result.stderr


# --- guards ---


def epochs(*heldout_rewards: float, std: float = 0.1, kl: float | None = None) -> list[dict]:
    measured = [{"heldout": {"hps": value}, "reward_std": std} for value in heldout_rewards]
    return [*measured[:-1], measured[-1] | ({"kl": kl} if kl is not None else {})]


MIXTURE = rewards.Mixture({"hps": lambda images, prompts: None}, {"hps": 1.0})


@pytest.mark.parametrize(("final", "limit", "stops"), [(0.31, 2, False), (0.29, 2, True), (0.29, 3, False), (-9, 0, False)])
def test_a_held_out_reward_that_collapses_stops_the_run(final, limit, stops):
    config = configure(model="tiny", reward="hps", max_reward_drop=limit)
    with pytest.raises(DivergedError, match=r"hps has collapsed from 0.5000 to") if stops else contextlib.nullcontext():
        training.check_guards(epochs(0.5, 0.6, final), config, MIXTURE)


def test_a_measure_that_is_not_finite_is_a_divergence():
    last = {"epoch": 3, "ratio_deviation": math.inf, "reward_std": 0.1}
    with pytest.raises(DivergedError, match="ratio_deviation of epoch 3 is not finite"):
        training.check_guards([*epochs(0.5, 0.5), last], configure(model="tiny", reward="hps"), MIXTURE)


def test_a_kl_divergence_above_the_limit_stops_the_run(options, tmp_path):
    with pytest.raises(DivergedError, match=r"above --max-kl 2; lower"):
        training.check_guards(epochs(0.5, 0.5, kl=3.0), configure(model="tiny", reward="hps", max_kl=2.0), MIXTURE)
    training.check_guards(epochs(0.5, 0.5, kl=1.0), configure(model="tiny", reward="hps", max_kl=2.0), MIXTURE)
    with pytest.raises(DivergedError, match=r"KL divergence.*the adapter of epoch 1 is kept in"):
        run_training(options | {"max_kl": 1e-9, "num_updates_per_epoch": 1, "eval_every": 1}, tmp_path / "run")
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [0, 1]


def check_nan_is_stopped(options: dict, whole: Path, stopped: Path, folder: Path) -> None:
    """A gradient that is not finite ends a run, and the adapter that was last measured stays."""
    shutil.copytree(stopped, folder / "run")
    accumulate_gradients = texforce.accumulate_gradients

    def poisoned(policy, *arguments):
        statistics = accumulate_gradients(policy, *arguments)
        policy.parameters[0].grad[0, 0] = math.nan
        return statistics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texforce, "accumulate_gradients", poisoned)
        with pytest.raises(DivergedError, match=r"the gradient is not finite.*the adapter of epoch 2 is kept in"):
            run_training(options, folder / "run", resume=True)
    assert weights(folder / "run") == weights(stopped)
    assert [line["epoch"] for line in metrics(folder / "run")] == [0, 1, 2]


def test_a_gradient_that_is_not_finite_keeps_the_last_good_adapter(options, whole, stopped, tmp_path):
    check_nan_is_stopped(options, whole, stopped, tmp_path)


def check_gradient_is_whole(options: dict, whole: Path, stopped: Path, folder: Path) -> None:
    """The gradient of all pairs at once is that of micro-batches."""
    norms, step = {}, Learner.step
    for size in (2, 100):

        def noted_step(learner, size=size):
            norms[size] = step(learner)
            raise Stop

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Learner, "step", noted_step)
            run_training(options | {"micro_batch_size": size, "num_updates_per_epoch": 1}, folder / str(size))
    assert norms[2] == pytest.approx(norms[100], rel=1e-3)


# --- the lock, the disk, the command ---


def check_folder_is_locked(options: dict, whole: Path, stopped: Path, folder: Path) -> None:
    """A second run in a folder is refused while the first one trains, and the message says which process that is."""
    refused = []

    def second(measures: dict) -> None:
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on ") as error:
            run_training(options, folder, resume=True)
        refused.append(error)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "ppo_update", lambda *_: pytest.fail("it trained"))
        run_training(options, folder, report=second)
    assert refused
    assert not (folder / files.HOLDER).exists()


def test_a_second_run_in_a_folder_is_refused_with_the_process_that_has_it(options, whole, stopped, tmp_path):
    check_folder_is_locked(options, whole, stopped, tmp_path)


def test_the_same_command_begins_and_goes_on_and_says_when_it_is_over(options, tmp_path, monkeypatch):
    arguments = [*flags(options | {"num_epochs": 1}), "--resume", tmp_path / "out"]

    def fail(*_):
        raise RewardError("reward: gone")

    with monkeypatch.context() as patch:
        patch.setattr(training, "collect", fail)
        result = invoke("train", *arguments)
    check_failure(result, 6, "reward: gone")
    assert "resume with: texforce train --resume" in result.stderr
    assert invoke("train", *arguments).exit_code == 0
    result = invoke("train", "--resume", tmp_path / "out")
    assert result.exit_code == 0
    assert "is finished" in result.stderr
    assert "held-out" in result.stdout
    check_failure(invoke("train", "--resume", tmp_path / "out", "--seed", 5), 2, "seed: 0 -> 5", "--force-resume")


def test_how_not_to_go_on_is_told(options, finished):
    folder = finished.parent
    check_failure(invoke("train", "--force-resume", "--output-dir", folder / "new"), 2, "works only together with --resume")
    check_failure(invoke("train", "--resume", Path(__file__)), 2, "is a file")
    check_failure(invoke("train", "--resume", folder / "absent"), 2, "there is no run in", "absent")
    check_failure(invoke("train", "--resume", finished, "--output-dir", "other"), 2, "leave --output-dir other out")
    check_failure(invoke("train", *flags(options), "--output-dir", finished), 2, "not empty", "--resume")
    assert [path.name for path in folder.iterdir()] == ["run"]


@pytest.fixture
def files_of_50_kb():
    """No file may be longer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_room_is_found_out_before_the_model_is_loaded(options, tmp_path, monkeypatch, files_of_50_kb):
    monkeypatch.setattr(training, "prepare", lambda config: pytest.fail("it loaded the model"))
    check_failure(invoke("train", *flags(options), "--output-dir", tmp_path / "out"), 5, "storage")
    assert not (tmp_path / "out").exists()
    run.check_folder(str(tmp_path / "out"))  # so that the same command begins the run when there is room


# --- metrics and figures ---


def test_metrics_begin_with_the_epochs_that_there_are_and_go_on_line_by_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1, "old": 1}\n{"epo')
    log = run.metrics(tmp_path, [{"epoch": 0}], lambda measures: None)
    log({"epoch": 1, "reward_mean": 0.5})
    assert metrics(tmp_path) == [{"epoch": 0}, {"epoch": 1, "reward_mean": 0.5}]
    with pytest.raises(ValueError, match="JSON"):
        log({"epoch": 2, "reward_mean": math.nan})
    assert metrics(tmp_path) == [{"epoch": 0}, {"epoch": 1, "reward_mean": 0.5}]


def test_a_grid_has_a_row_for_each_prompt_whatever_it_holds_and_a_column_for_each_system(tmp_path):
    from PIL import Image

    prompts = ["a red circle", "", "a very long prompt " * 20_000, "\x1b[31m\nein Würfel 🎲"]
    colours = {"base": torch.tensor([1.0, 0, 0]), "tuned": torch.tensor([0, 0, 1.0])}
    columns = {name: colour.view(1, 3, 1, 1).expand(len(prompts), 3, 8, 8) for name, colour in colours.items()}
    run.write_grid(tmp_path / "grid.png", prompts, columns)
    counts = {colour: count for count, colour in Image.open(tmp_path / "grid.png").getcolors(2**20)}
    assert counts[255, 0, 0] == counts[0, 0, 255] == len(prompts) * run.CELL**2


GREEN, RED, BLUE = (0x1A, 0x7F, 0x37), (0xCF, 0x22, 0x2E), (0x09, 0x69, 0xDA)  # of a tick, a cross, and an underline


def colours(path: Path) -> set:
    from PIL import Image

    return {colour for _, colour in Image.open(path).getcolors(2**20)}


def test_a_grid_marks_what_is_right_and_underlines_rare_words_in_the_tiny_world_only(tmp_path):
    from texforce import detector

    circle = detector.coverage(torch.tensor([0]), torch.tensor([[16.0, 16.0]]), torch.tensor([7.0]))[0]
    image = detector.BACKGROUND[:, None, None] + circle * (detector.PALETTE[0] - detector.BACKGROUND)[:, None, None]
    for prompts, expected in (
        (["a red circle"], {GREEN}), (["a blue circle"], {RED}), (["a crimson disc"], {GREEN, BLUE}),
        (["a crimson disc", "a blue circle"], {GREEN, RED, BLUE}), (["a crimson disc", "a tower"], set()),
    ):  # fmt: skip
        run.write_grid(tmp_path / "grid.png", prompts, {"base": image.expand(len(prompts), 3, 32, 32)})
        assert colours(tmp_path / "grid.png") & {GREEN, RED, BLUE} == expected


@pytest.mark.parametrize(("count", "across"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 3), (6, 3), (8, 4), (9, 3), (16, 4)])
def test_a_grid_has_no_empty_half(tmp_path, count, across):
    from PIL import Image

    columns = {name: torch.full((count, 3, 8, 8), 0.5) for name in ("base", "tuned")}
    run.write_grid(tmp_path / "grid.png", ["a red circle"] * count, columns)
    assert run._num_across(count) == across
    width = Image.open(tmp_path / "grid.png").width
    assert width == pytest.approx(across * 2 * run.CELL, rel=0.2)


def test_a_long_prompt_takes_two_lines_of_a_grid_and_says_that_it_goes_on():
    assert run._wrapped("a red circle", 200) == ["a red circle"]
    first, second = run._wrapped("a very long prompt " * 1000, 200)
    assert first.startswith("a very")
    assert second.endswith("\u2026")
    assert run._wrapped("x" * 10_000, 200)[0].endswith("\u2026")
    assert run._wrapped("", 200) == [""]
    assert all(run._font().getlength(line) <= 200 for line in (first, second))


def test_the_font_of_grids_has_every_sign_that_they_add():
    unknown = bytes(run._font().getmask("\uffff"))
    assert not [sign for sign in "0123456789.-\u2026" if bytes(run._font().getmask(sign)) == unknown]
    assert bytes(run._font().getmask("\N{MINUS SIGN}")) == unknown  # which is why the scores have a hyphen


def test_a_trainings_grid_is_sorted_by_the_change_of_the_reward(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(run, "write_grid", lambda *arguments: drawn.append(arguments))
    heldout = Heldout.__new__(Heldout)
    heldout.prompts, heldout.shown, heldout.folder = list("abcd"), [0, 1, 3], tmp_path
    heldout.config, heldout.setup = (
        configure(model="tiny", reward="jpeg"),
        SimpleNamespace(reward=rewards.Mixture({"jpeg": 0}, {})),
    )
    images = {i: torch.full((3, 2, 2), i / 10) for i in heldout.shown}
    base, tuned = torch.tensor([1.0, 1.0, 1.0, math.nan]), torch.tensor([2.0, 5.0, 9.0, 1.0])
    heldout.base = _Drawn({}, {"jpeg": base}, images)
    heldout._write_grid(7, _Drawn({}, {"jpeg": tuned}, images))
    path, prompts, columns, scores, title = drawn[0]
    assert (path.name, prompts, title) == ("epoch_0007.png", ["b", "a", "d"], "jpeg after epoch 7, largest gain first")
    assert columns["tuned"][:, 0, 0, 0].tolist() == pytest.approx([0.1, 0.0, 0.3])
    assert scores["tuned"] == [5.0, 2.0, 1.0]


def test_a_curve_is_drawn_of_what_was_measured(tmp_path, whole):
    from PIL import Image

    WRITE_CURVE(tmp_path / "curve.png", metrics(whole), "jpeg")
    assert Image.open(tmp_path / "curve.png").size == (840, 696)
    epochs = metrics(whole)
    figure = run.draw_curve(epochs, "jpeg")
    (legend,) = figure.legends  # one, which no panel holds
    assert [text.get_text() for text in legend.get_texts()] == ["training prompts", "base model", "held-out prompts"]
    for axes, measure in zip(figure.axes, ("jpeg", "alignment_exact"), strict=True):
        assert axes.get_legend() is None
        values = [epoch["heldout"][measure] for epoch in epochs if "heldout" in epoch]
        assert axes.get_title("left") == f"{measure} on held-out prompts: {values[0]:.3f} to {values[-1]:.3f}"
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        assert lines["base model"] == [values[0]] * 2
        assert lines["held-out prompts"] == values
        low, high = axes.get_ylim()
        assert low <= min(values) <= max(values) <= high


# --- the page ---


def page_of(folder: Path) -> tuple[str, dict]:
    """The state of a training that its page shows, and what its gallery holds."""
    text = (folder / "report.html").read_text()
    state = re.search(r'id="state"[^>]*>(.*?)</span>', text, re.DOTALL)[1]
    return state, json.loads(re.search(r"application/json[^>]*>(.*?)</script>", text, re.DOTALL)[1])


def test_a_training_leaves_scores_and_images_of_each_measurement_and_a_page_of_them(whole):
    frames = [json.loads(line) for line in (whole / run.FRAMES).read_text().splitlines()]
    assert [frame["epoch"] for frame in frames] == [0, 2, 4]
    for frame, measures in zip(frames, [metrics(whole)[n] for n in (0, 2, 4)], strict=True):
        for name, values in frame["scores"].items():
            assert sum(values) / len(values) == pytest.approx(measures["heldout"][name], rel=1e-5)
    state, gallery = page_of(whole)
    assert state == "finished"
    assert gallery["systems"] == ["base", "epoch 2", "epoch 4"]
    assert gallery["reload"] == 0
    for row in gallery["rows"]:
        assert row["images"] == [[frame["images"][str(row["index"])]] for frame in frames]


def test_a_run_that_goes_on_has_the_page_of_one_that_never_stopped(resumed, whole):
    assert (resumed[0] / run.FRAMES).read_text() == (whole / run.FRAMES).read_text()
    assert page_of(resumed[0]) == page_of(whole)


def test_a_run_that_was_stopped_has_a_page_that_says_so(stopped):
    state, gallery = page_of(stopped)
    assert state == "stopped after epoch 2"
    assert gallery["systems"] == ["base", "epoch 2"]
    assert gallery["reload"] == 0


def test_the_page_is_written_anew_at_each_measurement_and_loads_itself_until_the_end(options, tmp_path, monkeypatch):
    pages, write = [], report.write_training

    def noted(training):
        write(training)
        pages.append(page_of(tmp_path / "out"))

    monkeypatch.setattr(report, "write_training", noted)
    run_training(options | {"num_epochs": 3}, tmp_path / "out")
    assert [(state, len(gallery["systems"]), gallery["reload"] > 0) for state, gallery in pages] == [
        ("running", 1, True), ("running", 2, True), ("running", 3, True), ("finished", 3, False),
    ]  # fmt: skip


def test_a_page_that_cannot_be_written_stops_the_run_which_goes_on_exactly(options, whole, tmp_path, monkeypatch):
    write = report.write_training

    def full(training):
        if len(training.epochs) > 2:
            raise OSError(errno.ENOSPC, "No space left on device", "report.html")
        write(training)

    monkeypatch.setattr(report, "write_training", full)
    check_failure(invoke("train", *flags(options), "--output-dir", tmp_path / "out"), 5, "storage", "report.html")
    monkeypatch.undo()
    run_training(options, tmp_path / "out", resume=True)
    check_same_run(tmp_path / "out", whole)
    assert page_of(tmp_path / "out") == page_of(whole)


def test_a_diverged_run_has_a_page_that_says_so(options, tmp_path, monkeypatch):
    def failing(current, config):
        raise DivergedError("it went wrong")

    monkeypatch.setattr(training, "train_epoch", failing)
    with pytest.raises(DivergedError):
        run_training(options, tmp_path / "out")
    assert page_of(tmp_path / "out")[0] == "diverged: it went wrong"


DAMAGED_FRAMES = [
    "{\n", "[]\n", "{}\n", '{"epoch": 0, "scores": {"jpeg": [1, 2]}, "images": {"2": "data:image/png;base64,"}}\n',
    '{"epoch": 0, "scores": {"jpeg": [1, 2]}, "images": {"0": "https://example.org/a.png"}}\n',
    '{"epoch": "0", "scores": {"jpeg": [1, 2]}, "images": {}}\n', '{"epoch": 0, "scores": {"jpeg": "x"}, "images": {}}\n',
    '{"epoch": 0, "scores": {"jpeg": [1e999]}, "images": {}}\n', '{"epoch": 0, "scores": {"jpeg": [NaN]}, "images": {}}\n',
    '{"epoch": 0, "scores": {"jpeg": [1], "clip": [1, 2]}, "images": {}}\n', '{"epoch": 0, "scores": 1, "images": {}}\n',
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED_FRAMES)
def test_damaged_images_of_earlier_epochs_are_bad_input_that_says_what_to_do(tmp_path, content):
    (tmp_path / run.FRAMES).write_text(content)
    with pytest.raises(InputError, match=r"heldout\.jsonl is damaged; remove it to go on without the images"):
        run.read_frames(tmp_path)


def test_without_the_images_of_earlier_epochs_a_run_goes_on_all_the_same(options, whole, checkpoint):
    folder = checkpoint.parents[1]
    (folder / run.FRAMES).unlink()
    run_training(options, folder, resume=True)
    check_same_run(folder, whole)
    assert page_of(folder)[1]["systems"] == ["base", "epoch 4"]


def test_frames_of_other_prompts_or_measures_are_left_out(tmp_path):
    heldout = Heldout.__new__(Heldout)
    heldout.prompts, heldout.folder = ["a", "b"], tmp_path / "grids"
    base = {"epoch": 0, "scores": {"jpeg": [1.0, 2.0]}, "images": {"0": "data:image/png;base64,"}}
    first, other = base | {"prompts": ["a", "b"]}, base | {"scores": {"clip": [1.0, 2.0]}}
    for frames, kept in (
        ([first, base | {"epoch": 1}, base | {"epoch": 2}], [0, 1]), ([first, other | {"epoch": 1}], [0]),
        ([base | {"prompts": ["a", "c"]}, base | {"epoch": 1}], [0]), ([base | {"epoch": 1}], [0]), ([], [0]),
        ([first, base | {"epoch": 1, "scores": {"jpeg": [1.0]}}], [0]),
    ):  # fmt: skip
        heldout.frames = [first]
        heldout.take_up(frames, 1)
        assert [frame["epoch"] for frame in heldout.frames] == kept
        assert run.read_frames(tmp_path) == heldout.frames


def test_the_page_has_a_mixtures_scores_in_the_units_of_the_end(tmp_path):
    heldout = Heldout.__new__(Heldout)
    mixture = rewards.Mixture({"hps": None, "jpeg": None}, {"hps": 1.0, "jpeg": 0.5}, normalise=True)
    mixture.observe({"hps": torch.tensor([0.0, 4.0]), "jpeg": torch.tensor([1.0, 3.0])})  # deviations 2 and 1
    heldout.config, heldout.setup = SimpleNamespace(reward="hps=1,jpeg=0.5"), SimpleNamespace(reward=mixture)
    heldout.frames = [{"epoch": n, "scores": {"hps": [1.0, None], "jpeg": [2.0, 3.0]}, "images": {}} for n in (0, 2, 4)]
    frames = heldout.frames_until([{"epoch": 0}, {"epoch": 3}])
    assert [frame["epoch"] for frame in frames] == [0, 2]
    assert frames[1]["scores"] == {"hps=1,jpeg=0.5": [1.5, None], "hps": [1.0, None], "jpeg": [2.0, 3.0]}


def test_only_the_first_process_writes_the_page(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(report, "write_training", lambda training: pytest.fail("it wrote"))
    training._Training(None, None, None, None, {})._write_page(report.RUNNING)


# --- the tests themselves ---


def write_in_place(folder, snapshot, config, sources):
    """`run.write_checkpoint` without the renaming."""
    from safetensors.torch import save_file

    place = folder / f"epoch_{snapshot.epoch:06d}"
    place.mkdir(parents=True, exist_ok=True)
    save_file(snapshot.tensors, place / run.TENSORS)
    state = {"config": asdict(config), "sources": dict(sources), **snapshot.state}
    (place / run.STATE).write_text(json.dumps(state))
    (place / run.MANIFEST).write_text(run.manifest(place))
    files.sync(place)
    return place


def forgets(*starts: str, **state: object) -> Callable:
    """A restoring that does not find some of the tensors, or finds something else in the state."""
    original = run.Run.restore

    def restore(current, snapshot):
        tensors = {name: tensor for name, tensor in snapshot.tensors.items() if not name.startswith(starts)}
        tensors |= {name: tensor for name, tensor in current.snapshot().tensors.items() if name.startswith(starts)}
        changed = {name: value(snapshot.state[name]) if callable(value) else value for name, value in state.items()}
        original(current, run.Snapshot(tensors, snapshot.state | changed))

    return restore


def half_dropped() -> Callable:
    """Gradients of the first half of the micro-batches only."""
    original = texforce.accumulate_gradients

    def accumulate(policy, share, learner, config):
        size = learner.micro_batch_size
        kept = max(1, math.ceil(len(share.pairs) / size) // 2) * size
        return original(policy, replace(share, pairs=share.pairs[:kept]), learner, config)

    return accumulate


@contextlib.contextmanager
def unlocked(folder, check) -> Iterator[None]:
    check()
    folder.mkdir(parents=True, exist_ok=True)
    yield


def step_without_looking(learner):
    norm = torch.nn.utils.clip_grad_norm_(learner.parameters, learner.max_grad_norm)
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    learner.lr_scheduler.step()
    return norm.item()


def check_bit_flip(options: dict, whole: Path, stopped: Path, folder: Path) -> None:
    place = shutil.copytree(stopped / "checkpoints", folder / "checkpoints") / "epoch_000002"
    content = bytearray((place / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (place / "tensors.safetensors").write_bytes(content)
    assert not run.is_valid(place)


DEFECTS: dict[str, tuple[object, str, Callable, Callable]] = {
    "no renaming": (run, "write_checkpoint", lambda: write_in_place, check_save_is_whole),
    "no check of the manifest": (run, "is_valid", lambda: lambda checkpoint: True, check_bit_flip),
    "generators not saved": (run.Run, "restore", lambda: forgets("generator."), check_goes_on_exactly),
    "optimizer not saved": (run.Run, "restore", lambda: forgets("learner.optimizer."), check_goes_on_exactly),
    "average not saved": (run.Run, "restore", lambda: forgets("learner.ema."), check_goes_on_exactly),
    "statistics not saved": (run.Run, "restore", lambda: forgets(statistics={}), check_goes_on_exactly),
    "schedule not saved": (
        run.Run, "restore", lambda: forgets(learner=lambda state: state | {"num_steps": 0}), check_goes_on_exactly,
    ),
    "order not saved": (run.Run, "restore", lambda: forgets(order={"waiting": []}), check_goes_on_exactly),
    "no lock": (files, "locked", lambda: unlocked, check_folder_is_locked),
    "NaN let through": (Learner, "step", lambda: step_without_looking, check_nan_is_stopped),
    "half of the gradients dropped": (texforce, "accumulate_gradients", half_dropped, check_gradient_is_whole),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("check", sorted({entry[-1] for entry in DEFECTS.values()}, key=lambda check: check.__name__))
def test_the_checks_pass_without_a_defect(check, options, whole, stopped, tmp_path):
    check(options, whole, stopped, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_noticed_by_the_check_that_is_meant_for_it(defect, options, whole, stopped, tmp_path, monkeypatch):
    place, name, make, check = DEFECTS[defect]
    monkeypatch.setattr(place, name, make())
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(options, whole, stopped, tmp_path)
