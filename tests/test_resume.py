"""Going on exactly, checkpoints that are known when they are broken, guards, the lock; in this process, so in seconds.

The tests are tested too: `DEFECTS` breaks the code in one place each, and the check named with it must notice. Covered are:
no renaming of a checkpoint, no check of its manifest, generators, optimizer, average, statistics or the order of the prompts
not saved, no lock, a gradient of NaN let through, half of the gradients dropped.
"""

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from typer.testing import CliRunner

import texforce
from texforce import cli, DivergedError, files, interrupts, rewards, run, train
from texforce import PromptStatistics
from texforce.config import TrainConfig, resolve
from texforce import Learner
from texforce.errors import RewardError

WEIGHTS = "adapter_model.safetensors"


class Stop(Exception):
    """What stops a run in these tests."""


@pytest.fixture
def options(small_run) -> dict:
    """A short run in which everything that a checkpoint holds has a say."""
    return small_run | {
        "num_epochs": 4, "num_prompts_per_epoch": 3, "num_samples_per_prompt": 2, "num_inference_steps": 2, "ema_decay": 0.5,
        "lr_scheduler": "cosine", "eval_every": 2, "checkpoint_every": 2, "advantages": "per-prompt", "reward": "jpeg",
        "learning_rate": 1e-2,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def early_statistics(monkeypatch):
    """So that a prompt's own statistics count from its second visit on, and not from its sixteenth."""
    monkeypatch.setattr(PromptStatistics.__init__, "__defaults__", (32, 3))


def train(options: dict, folder: Path, stop_in: int | None = None, **arguments: object) -> dict:
    """A run, or what there is of it up to the middle of an epoch."""
    config, original = TrainConfig(**options, output_dir=str(folder)), texforce.update
    epochs = []

    def update(*given):
        epochs.append(given)
        result = original(*given)
        if len(epochs) == stop_in:
            raise Stop
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texforce, "update", update)
        with contextlib.suppress(Stop):
            return train.train(config, **arguments)
    return {}


def weights(folder: Path) -> str:
    """A digest: where they differ, pytest would take minutes to print in what, if CI is set."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def check_goes_on_exactly(options: dict, folder: Path, stop_in: int = 3) -> None:
    """A run that is stopped in the middle of an epoch, and goes on, ends as one that is not."""
    train(options, folder / "whole")
    train(options, folder / "parted", stop_in)
    assert not (folder / "parted" / "result.json").exists()
    train(options, folder / "parted", go_on=True)
    assert weights(folder / "parted") == weights(folder / "whole")
    told = [
        [{name: run.get(name) for name in ("epoch", "reward_mean", "heldout")} for record in metrics(folder / name)]
        for name in ("whole", "parted")
    ]
    assert told[0] == told[1]
    results = [json.loads((folder / name / "result.json").read_text())["heldout"] for name in ("whole", "parted")]
    assert results[0] == results[1]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def checkpoint(options, tmp_path) -> Path:
    train(options, tmp_path / "run", stop_in=3)
    return tmp_path / "run" / "checkpoints" / "epoch_000002"


# --- going on ---


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"advantages": "leave-one-out", "reward": "jpeg=1,hps=2", "normalise_rewards": True, "num_epochs": 3},
        {"target": "both", "kl_weight": 0.1, "lr_scheduler": "linear", "num_epochs": 3},
        {"null_prompt": "base", "ema_decay": 0.0, "lr_scheduler": "constant", "weight_decay": 0.1, "num_epochs": 3},
    ],
    ids=["statistics and average", "normalised mixture", "U-Net too", "base null prompt"],
)
def test_a_run_that_is_stopped_goes_on_exactly(options, tmp_path, changes):
    check_goes_on_exactly(options | changes, tmp_path)


def test_a_run_stopped_in_its_first_epoch_and_twice_more_goes_on_exactly(options, tmp_path):
    train(options, tmp_path / "whole")
    train(options, tmp_path / "parted", 1)
    for _ in range(2):
        train(options, tmp_path / "parted", 2, go_on=True)
    train(options, tmp_path / "parted", go_on=True)
    assert weights(tmp_path / "parted") == weights(tmp_path / "whole")


def test_what_was_written_after_the_checkpoint_is_gone_from_the_metrics(options, checkpoint):
    folder = checkpoint.parents[1]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "loss": 1}\n{"epoch": 4, "lo')
    train(options, folder, go_on=True)
    assert [line["epoch"] for line in metrics(folder)] == [0, 1, 2, 3, 4]
    assert "loss" not in metrics(folder)[3]


def test_checkpoints_come_as_often_and_stay_as_many_as_asked(options, tmp_path):
    train(options | {"checkpoint_every": 1, "checkpoints_to_keep": 3}, tmp_path / "a")
    assert sorted(path.name[-1] for path in (tmp_path / "a" / "checkpoints").iterdir()) == ["2", "3", "4"]
    train(options | {"checkpoint_every": 3, "checkpoints_to_keep": 3}, tmp_path / "b")
    assert sorted(path.name[-1] for path in (tmp_path / "b" / "checkpoints").iterdir()) == ["3", "4"]  # the last one always


def test_a_finished_run_gives_its_result_and_changes_nothing(options, tmp_path):
    result = train(options, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    said = []
    assert train(options, tmp_path / "run", go_on=True, warn=said.append) == result
    assert "finished" in said[0]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


def test_a_changed_run_is_refused_with_what_has_changed_unless_forced(options, checkpoint, small_run):
    folder = checkpoint.parents[1]
    changed = options | {"learning_rate": 1e-3, "rank": 8}
    with pytest.raises(ValueError, match=r"learning_rate: 0.01 -> 0.001; .*rank: 4 -> 8; .*--force-resume"):
        train(changed, folder, go_on=True)
    Path(small_run["prompts"]).write_text("a red box\ntwo blue squares\na navy disc\n")
    with pytest.raises(ValueError, match="the prompts"):
        train(options, folder, go_on=True)
    with pytest.raises(ValueError, match="other layers or another rank"):
        train(options | {"rank": 8}, folder, go_on=True, changed=True)
    with pytest.raises(ValueError, match=r"cannot change in it: reward: jpeg -> hps; begin another"):
        train(options | {"reward": "hps"}, folder, go_on=True, changed=True)
    assert json.loads((folder / "config.json").read_text())["rank"] == 4
    forced = options | {"learning_rate": 1e-3, "num_epochs": 5, "lr_scheduler": "linear"}
    rates = []
    step = Learner.step

    def seen(learner, *arguments):
        rates.append(learner.optimizer.param_groups[0]["lr"])
        return step(learner, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", seen)
        train(forced, folder, stop_in=1, go_on=True, changed=True)
        train(forced, folder, go_on=True)  # it is what was forced that goes on
    assert [line["epoch"] for line in metrics(folder)] == [0, 1, 2, 3, 4, 5]
    assert rates == pytest.approx([1e-3 * (10 - k) / 10 for k in (4, 5, 4, 5, 6, 7, 8, 9)])


def test_a_signal_that_a_finaliser_swallows_and_a_nohup_are_heeded():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.handled():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)


def test_what_a_kill_leaves_behind_does_not_keep_a_run_from_going_on(options, checkpoint, tmp_path):
    folder = checkpoint.parents[1]
    for name in ("config.json.tmp", "metrics.jsonl.tmp", ".room.tmp", ".holder", "README.md.tmp"):
        (folder / name).write_text("cut off")
    for name in (".adapter-abc.tmp", "checkpoints/epoch_000004.tmp", "checkpoints/epoch_000001.old.tmp"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("")
    (folder / "mine.tmp").mkdir()
    train(options, folder, go_on=True)
    train(options, tmp_path / "whole")
    assert weights(folder) == weights(tmp_path / "whole")
    assert [path.name for path in folder.rglob("*.tmp")] == ["mine.tmp"]
    assert not (folder / ".holder").exists()


def test_a_checkpoint_is_kept_though_broken_ones_seem_newer(options, checkpoint):
    folder = checkpoint.parents[1]
    shutil.copytree(checkpoint, checkpoint.with_name("epoch_000009"))
    (checkpoint.with_name("epoch_000009") / "state.json").unlink()
    train(options | {"checkpoints_to_keep": 1, "checkpoint_every": 1}, folder, stop_in=2, go_on=True)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["epoch_000003"]
    assert run.newest_checkpoint(checkpoint.parent)


def test_a_result_that_is_not_this_runs_is_gone(options, tmp_path):
    train(options, tmp_path / "run")
    train(options | {"num_epochs": 6}, tmp_path / "run", stop_in=1, go_on=True, changed=True)
    assert not (tmp_path / "run" / "result.json").exists()
    assert train(options | {"num_epochs": 6}, tmp_path / "run", go_on=True)["num_images"] == 36


def test_a_finished_run_without_checkpoints_is_not_overwritten(options, tmp_path):
    train(options, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match="seed: 0 -> 7"):
        train(options | {"seed": 7}, tmp_path / "run", go_on=True)
    said = []
    train(options, tmp_path / "run", go_on=True, warn=said.append)
    assert "finished" in said[-1]


def test_what_is_measured_stays_when_a_run_is_stopped_and_then_diverges(options, tmp_path):
    measured = []
    train(options, tmp_path / "run", stop_in=4, report=lambda told: measured.append(told) if "heldout" in told else None)
    kept = weights(tmp_path / "run")

    def diverge(*arguments):
        raise DivergedError("it went wrong")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experience, "collect", diverge)
        with pytest.raises(DivergedError, match="the adapter of epoch 2 is kept"):
            train(options, tmp_path / "run", go_on=True)
    assert weights(tmp_path / "run") == kept
    assert len(measured) == 2


def test_a_measure_that_is_not_finite_is_a_divergence():
    told = {"epoch": 3, "ratio_deviation": math.inf, "reward_std": 0.1}
    with pytest.raises(DivergedError, match="ratio_deviation of epoch 3 is not finite"):
        train.check_guards([*epochs(0.5, 0.5), told], TrainConfig(reward="hps"), REWARD)


def test_options_that_decide_nothing_may_change(options, checkpoint):
    free = {"checkpoint_every": 1, "checkpoints_to_keep": 1, "reward_timeout": 5.0}
    train(options | free, checkpoint.parents[1], go_on=True)
    assert [path.name[-1] for path in checkpoint.parent.iterdir()] == ["4"]
    assert set(free) <= set(run.FREE_OPTIONS)


# --- checkpoints ---


def test_every_bit_flip_and_every_truncation_is_noticed(checkpoint):
    assert run.is_valid(checkpoint)
    files = {path: path.read_bytes() for path in checkpoint.iterdir()}
    assert {path.name for path in files} == {"tensors.safetensors", "state.json", "manifest.json"}
    chance = random.Random(0)
    for number in range(1100):
        path = chance.choice(sorted(files))
        content = bytearray(files[path])
        if number < 1000:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            del content[chance.randrange(len(content)) :]
        path.write_bytes(content)
        assert not run.is_valid(checkpoint), (path.name, number)
        path.write_bytes(files[path])
    assert run.is_valid(checkpoint)
    for change in (lambda: (checkpoint / "state.json").unlink(), lambda: (checkpoint / "more").write_text("")):
        change()
        assert not run.is_valid(checkpoint)


def test_a_broken_checkpoint_is_told_and_passed_over(options, tmp_path):
    train(options | {"checkpoint_every": 1}, tmp_path / "run", stop_in=4)
    newest = tmp_path / "run" / "checkpoints" / "epoch_000003"
    (newest / "state.json").write_text("{}")
    said = []
    train(options, tmp_path / "run", go_on=True, warn=said.append)
    assert len(said) == 1
    assert "epoch_000003 is damaged" in said[0]
    train(options, tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_with_no_valid_checkpoint_a_run_starts_over(options, checkpoint, tmp_path):
    (checkpoint / "manifest.json").unlink()
    train(options, checkpoint.parents[1], go_on=True)
    train(options, tmp_path / "whole")
    assert weights(checkpoint.parents[1]) == weights(tmp_path / "whole")


def check_save_is_whole(options: dict, folder: Path) -> None:
    """A save that fails at any of its steps leaves the checkpoints as they were, and nothing else."""
    train(options, folder / "run", stop_in=3)
    place = folder / "run" / "checkpoints"
    snapshot = run.read_checkpoint(place / "epoch_000002")
    snapshot.state["epochs"][-1]["epoch"] = 9
    config = resolve(TrainConfig(**options))
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    steps = [(record, "sync"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text"), (record, "open_to_umask")]
    for owner, step in steps:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, step, lambda path, *arguments, **options: _fail(path))
            with pytest.raises(OSError, match="No space"):
                run.write_checkpoint(place, snapshot, config, [], 2)
        assert before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def _fail(path: Path) -> None:
    raise OSError(28, "No space left on device", str(path))


def test_a_save_that_fails_leaves_the_checkpoints_as_they_were(options, tmp_path):
    check_save_is_whole(options, tmp_path)


def test_a_checkpoint_holds_no_pickle_and_follows_the_umask(checkpoint):
    for path in checkpoint.iterdir():
        assert path.suffix in (".json", ".safetensors")
        assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_run_of_before_there_was_an_option_goes_on_with_its_default():
    config = asdict(TrainConfig(learning_rate=1e-3))
    older = {name: value for name, value in config.items() if name != "num_shared_steps"}
    assert run.differences(older, config) == []
    assert run.differences(older, config | {"num_shared_steps": 1}) == ["num_shared_steps: 0 -> 1"]


# --- signals ---


def test_a_signal_waits_for_a_save_and_is_not_lost_when_it_was_swallowed():
    with interrupts.handled():
        done = []
        with pytest.raises(interrupts.Terminated), interrupts.deferred():
            done.append(os.kill(os.getpid(), signal.SIGTERM))
        assert done
        with pytest.raises(interrupts.Terminated):
            interrupts.check()
    interrupts.check()
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's workers ignore it
    with interrupts.handled(), contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it was obeyed too late")
    signal.signal(signal.SIGINT, previous)


def break_off(number: int) -> NoReturn:
    """As diffusers does, which takes a signal in the loading of weights for a damaged file."""
    try:
        os.kill(os.getpid(), number)
    except BaseException as error:
        raise OSError("the weights are damaged") from error
    raise OSError("no room")


def test_an_error_that_a_signal_was_turned_into_is_the_signal():
    with pytest.raises(interrupts.Terminated), interrupts.handled():
        break_off(signal.SIGTERM)


def test_an_error_beside_a_signal_that_was_deferred_stays():
    with pytest.raises(OSError, match="no room"), interrupts.handled(), interrupts.deferred():
        break_off(signal.SIGTERM)


def test_a_save_that_fails_after_a_signal_is_told_and_the_signal_is_obeyed(options, tmp_path, monkeypatch):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "_train_epoch", interrupted)
    monkeypatch.setattr(resume, "write", full)
    result = command_line(*flags(options), "--output-dir", tmp_path / "out")
    assert result.exit_code == 143
    assert "could not be saved: [Errno 28] No space left on device" in " ".join(result.stderr.split())


def test_a_second_signal_ends_the_process_at_once():
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with interrupts.handled(), interrupts.deferred():
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


# --- guards ---


def epochs(*heldout_rewards: float, std: float = 0.1, kl: float | None = None) -> list[dict]:
    told = [{"heldout": {"hps": value}, "reward_std": std} for value in heldout_rewards]
    return [*told[:-1], told[-1] | ({"kl": kl} if kl is not None else {})]


REWARD = rewards.Mixture({"hps": lambda images, prompts: None}, {"hps": 1.0})


@pytest.mark.parametrize(("final", "limit", "stops"), [(0.31, 2, False), (0.29, 2, True), (0.29, 3, False), (-9, 0, False)])
def test_a_held_out_reward_that_collapses_stops_the_run(final, limit, stops):
    config = TrainConfig(reward="hps", max_reward_drop=limit)
    with pytest.raises(DivergedError, match=r"hps has collapsed from 0.5000 to") if stops else contextlib.nullcontext():
        train.check_guards(epochs(0.5, 0.6, final), config, REWARD)


def test_a_kl_divergence_above_the_limit_stops_the_run(options, tmp_path):
    with pytest.raises(DivergedError, match=r"above --max-kl 2; lower"):
        train.check_guards(epochs(0.5, 0.5, kl=3.0), TrainConfig(reward="hps", max_kl=2.0), REWARD)
    train.check_guards(epochs(0.5, 0.5, kl=1.0), TrainConfig(reward="hps", max_kl=2.0), REWARD)
    with pytest.raises(DivergedError, match=r"KL divergence.*the adapter of epoch 1 is kept in"):
        train(options | {"max_kl": 1e-9, "num_updates_per_epoch": 1, "eval_every": 1}, tmp_path / "run")
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [0, 1]


def check_nan_is_stopped(options: dict, folder: Path) -> None:
    """A gradient that is not finite ends a run, and the adapter that was last measured stays."""
    original = texforce.accumulate_gradients
    calls, kept = [], []

    def poisoned(policy, *arguments):
        statistics = original(policy, *arguments)
        calls.append(statistics)
        if len(calls) == 5:  # in the third epoch of two updates
            kept.append(weights(folder / "run"))
        if len(calls) > 4:
            policy.parameters[0].grad[0, 0] = math.nan
        return statistics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texforce, "accumulate_gradients", poisoned)
        with pytest.raises(DivergedError, match=r"the gradient is not finite.*the adapter of epoch 2 is kept in"):
            train(options, folder / "run")
    assert weights(folder / "run") == kept[0]
    assert [line["epoch"] for line in metrics(folder / "run")] == [0, 1, 2]


def test_a_gradient_that_is_not_finite_keeps_the_last_good_adapter(options, tmp_path):
    check_nan_is_stopped(options, tmp_path)


def check_gradient_is_whole(options: dict, folder: Path) -> None:
    """The gradient of all pairs at once is the one of micro-batches."""
    results = []
    for size in (2, 100):
        changes = {"micro_batch_size": size, "num_epochs": 1, "ema_decay": 0.0, "lr_scheduler": "constant"}
        train(options | changes, folder / str(size))
        results.append(metrics(folder / str(size))[-1]["grad_norm"])
    assert results[0] == pytest.approx(results[1], rel=1e-3)


# --- the lock, the disk ---


def check_folder_is_locked(options: dict, folder: Path) -> None:
    """A second run in a folder is refused while the first one trains, and told who that is."""
    refused = []

    def second(measures: dict) -> None:
        if not refused:
            with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on ") as error:
                train.train(TrainConfig(**options, output_dir=str(folder / "run")), go_on=True)
            refused.append(error)

    train.train(TrainConfig(**options | {"num_epochs": 1}, output_dir=str(folder / "run")), second)
    assert refused
    assert not (folder / "run" / files.HOLDER).exists()


def test_a_second_run_in_a_folder_is_refused_and_told_who_has_it(options, tmp_path):
    check_folder_is_locked(options, tmp_path)


def command_line(*arguments: object):
    return CliRunner().invoke(cli.app, ["train", *map(str, arguments)], env={"COLUMNS": "500"})


def flags(options: dict) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def check_failure(result, code: int, *words: str) -> None:
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output
    message = result.stderr.replace("\n", " ")
    for word in words:
        assert word in message


def test_the_same_command_begins_and_goes_on_and_says_when_it_is_over(options, tmp_path, monkeypatch):
    arguments = [*flags(options | {"num_epochs": 2}), "--resume", tmp_path / "out"]
    original = texforce.collect
    monkeypatch.setattr(experience, "collect", lambda *given: (_ for _ in ()).throw(RewardError("reward: gone")))
    check_failure(command_line(*arguments), 6, "go on by: texforce train --resume", "reward: gone")
    monkeypatch.setattr(experience, "collect", original)
    assert command_line(*arguments).exit_code == 0
    result = command_line("--resume", tmp_path / "out")
    assert result.exit_code == 0
    assert "is finished" in result.stderr
    assert "held-out" in result.stdout
    check_failure(command_line("--resume", tmp_path / "out", "--seed", 5), 2, "seed: 0 -> 5", "--force-resume")
    check_failure(command_line("--force-resume", "--output-dir", tmp_path / "new"), 2, "give --resume")
    check_failure(command_line("--resume", Path(__file__)), 2, "is a file")
    check_failure(command_line("--resume", tmp_path / "absent"), 2, "there is no run in", "absent")
    check_failure(command_line("--resume", tmp_path / "out", "--output-dir", "other"), 2, "leave --output-dir other out")
    check_failure(command_line(*flags(options), "--output-dir", tmp_path / "out"), 2, "not empty", "--resume")


def test_no_room_is_found_out_before_the_model_is_loaded(options, tmp_path, monkeypatch):
    import resource

    monkeypatch.setattr(training, "prepare", lambda config: pytest.fail("it loaded the model"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        check_failure(command_line(*flags(options), "--output-dir", tmp_path / "out"), 5, "storage")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {files.LOCK}
    monkeypatch.undo()
    assert command_line(*flags(options | {"num_epochs": 1}), "--output-dir", tmp_path / "out").exit_code == 0


def test_a_micro_batch_size_that_was_found_out_is_kept_and_one_that_is_given_is_not(options):
    config = resolve(TrainConfig(**options))
    setup = train.prepare(config)
    run = train._begin(setup, config, ["a red circle"])
    run.epochs.append({"epoch": 0})
    run.learner.micro_batch_size = 7  # after halving
    snapshot = run.snapshot()
    for begins, found, expected in ((8, True, 7), (4, True, 4), (8, False, 8)):
        run.learner.micro_batch_size, run.learner.finds_micro_batch = begins, found
        run.restore(snapshot)
        assert run.learner.micro_batch_size == expected


# --- the tests themselves ---


def written_in_place(folder, snapshot, config, prompts, num_kept):
    """`run.write_checkpoint` without the renaming."""
    from safetensors.torch import save_file

    place = folder / f"epoch_{snapshot.epoch:06d}"
    place.mkdir(parents=True, exist_ok=True)
    save_file(snapshot.tensors, place / run.TENSORS)
    state = {"config": run.asdict(config), "prompts": run.digest(prompts), **snapshot.state}
    (place / run.STATE).write_text(json.dumps(state))
    (place / run.MANIFEST).write_text(run.manifest(place))
    files.sync(place)
    return place


def forgets(*starts: str, **state: object) -> Callable:
    """A reading that does not find some of the tensors, or finds something else in the state."""
    original = run.Run.restore

    def restore(run, snapshot):
        tensors = {name: tensor for name, tensor in snapshot.tensors.items() if not name.startswith(starts)}
        tensors |= {name: tensor for name, tensor in run.snapshot().tensors.items() if name.startswith(starts)}
        original(run, run.Snapshot(tensors, snapshot.state | state))

    return restore


def half_dropped(original: Callable) -> Callable:
    """Gradients of the first half of the micro-batches only."""

    def accumulate(policy, denoiser, batch, pairs, config, *more):
        keep = max(1, (len(pairs) + config.micro_batch_size - 1) // config.micro_batch_size // 2) * config.micro_batch_size
        return original(policy, denoiser, batch, pairs[:keep], config, *more)

    return accumulate


@contextlib.contextmanager
def unlocked(folder, check) -> Iterator[None]:
    check()
    folder.mkdir(parents=True, exist_ok=True)
    yield


def steps_without_looking(self, parameters, max_grad_norm):
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    self.optimizer.step()
    self.optimizer.zero_grad()
    self.lr_scheduler.step()
    return norm.item()


def check_bit_flip(options: dict, folder: Path) -> None:
    train(options, folder / "run", stop_in=3)
    path = folder / "run" / "checkpoints" / "epoch_000002" / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not run.is_valid(path.parent)


DEFECTS: dict[str, tuple[object, str, Callable, Callable]] = {
    "no renaming": (resume, "write", lambda: written_in_place, check_save_is_whole),
    "no check of the manifest": (resume, "is_valid", lambda: lambda checkpoint: True, check_bit_flip),
    "generators not saved": (run.Run, "restore", lambda: forgets("generator."), check_goes_on_exactly),
    "optimizer not saved": (run.Run, "restore", lambda: forgets("optimizer."), check_goes_on_exactly),
    "average not saved": (run.Run, "restore", lambda: forgets("ema."), check_goes_on_exactly),
    "statistics not saved": (run.Run, "restore", lambda: forgets(statistics={}), check_goes_on_exactly),
    "schedule not saved": (run.Run, "restore", lambda: forgets(num_steps=0), check_goes_on_exactly),
    "order not saved": (run.Run, "restore", lambda: forgets(order=[]), check_goes_on_exactly),
    "no lock": (record, "held", lambda: unlocked, check_folder_is_locked),
    "NaN let through": (Learner, "step", lambda: steps_without_looking, check_nan_is_stopped),
    "half of the gradients dropped": (
        texforce, "accumulate_gradients", lambda: half_dropped(texforce.accumulate_gradients), check_gradient_is_whole,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_noticed_by_the_check_that_is_meant_for_it(defect, options, tmp_path, monkeypatch):
    place, name, make, check = DEFECTS[defect]
    check(options, tmp_path / "sound")
    monkeypatch.setattr(place, name, make())
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(options, tmp_path / "broken")
