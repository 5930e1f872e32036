"""Several processes of one run, connected by gloo: forked here, so that they start in no time."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import diffusers.optimization
import diffusers.training_utils
import diffusers.utils.torch_utils  # noqa: F401
import matplotlib.figure  # noqa: F401 - with the others: what is imported before the fork need not be after it
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: F401
from peft import LoraConfig, get_peft_model  # noqa: F401
from safetensors.torch import load_file

from texforce import processes, resume, rewards, training
from texforce.config import TrainConfig, resolve

WEIGHTS = "adapter_model.safetensors"
# Two prompts of four images are two batches, one for each of two processes.
OPTIONS = {"num_epochs": 2, "sample_batch_size": 4, "micro_batch_size": 4, "eval_every": 1, "checkpoint_every": 1}


def start(number: int, work, log: Path) -> list[int]:
    """Fork so many processes, each of which does the work as one of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(number):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            torch.set_num_threads(1)
            work()
            status = 0
        except BaseException as error:
            log.with_suffix(f".{rank}").write_text(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        finally:
            sys.stdout.flush()
            os._exit(status)
    return children


def finish(children: list[int]) -> list[int]:
    """Their exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def said(log: Path) -> str:
    return "".join(path.read_text() for path in sorted(log.parent.glob(f"{log.stem}.*")))


def train(number: int, options: dict, log: Path, **arguments) -> None:
    codes = finish(start(number, lambda: training.train(TrainConfig(**options), **arguments), log))
    assert codes == [0] * number, said(log)


def relative_difference(ours: Path, theirs: Path) -> float:
    """|a - b| / |b| of whole adapters."""
    one, other = (load_file(folder / WEIGHTS) for folder in (ours, theirs))
    assert one.keys() == other.keys()
    a, b = (torch.cat([tensors[name].flatten() for name in one]) for tensors in (one, other))
    return ((a - b).norm() / b.norm()).item()


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def pair(shared_run, tmp_path_factory) -> Path:
    """What two processes made, in `2`, and beside it what one made of the same, in `1`."""
    folder = tmp_path_factory.mktemp("pair")
    for number in (1, 2):
        train(number, shared_run | OPTIONS | {"output_dir": str(folder / str(number))}, folder / "log")
    return folder


def test_two_processes_give_the_adapter_of_one_with_twice_the_batch(pair):
    assert relative_difference(pair / "2", pair / "1") < 1e-6
    assert {path.name for path in (pair / "2").iterdir()} == {path.name for path in (pair / "1").iterdir()}


def test_two_processes_count_and_measure_what_one_does(pair):
    for ours, theirs in zip(lines(pair / "2"), lines(pair / "1"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("epoch", "num_images", "num_unet_calls", "clip_fraction"):
            assert ours.get(name) == theirs.get(name)
        for name in {"reward_mean", "reward_std", "grad_norm"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
        assert ours["heldout"] == pytest.approx(theirs["heldout"], rel=1e-4)


def test_each_process_samples_and_scores_its_share_only(small_run, tmp_path, monkeypatch):
    seen = tmp_path / "seen"
    original = rewards.Mixture.score

    def noted(self, images, prompts):
        with seen.open("a") as file:
            file.write(json.dumps({"rank": processes.rank(), "prompts": list(prompts)}) + "\n")
        return original(self, images, prompts)

    monkeypatch.setattr(rewards.Mixture, "score", noted)
    train(2, small_run | OPTIONS | {"num_epochs": 1, "output_dir": str(tmp_path / "out")}, tmp_path / "log")
    calls = sorted((json.loads(line) for line in seen.read_text().splitlines()), key=lambda call: call["rank"])
    assert [(call["rank"], len(call["prompts"])) for call in calls] == [(0, 4), (1, 4)]
    assert calls[0]["prompts"] != calls[1]["prompts"]


def test_without_the_sum_of_gradients_the_processes_part(pair, shared_run, tmp_path, monkeypatch):
    """The test above would see it."""
    monkeypatch.setattr(processes, "sum_gradients", lambda parameters: None)
    train(2, shared_run | OPTIONS | {"output_dir": str(tmp_path / "out")}, tmp_path / "log")
    assert relative_difference(tmp_path / "out", pair / "1") > 1e-4


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_dies_the_others_end_soon_and_the_run_goes_on(pair, shared_run, tmp_path, monkeypatch, victim):
    options = shared_run | OPTIONS | {"output_dir": str(tmp_path / "out")}
    original = training._train_epoch

    def dying(run, setup, config):
        if len(run.epochs) == 2 and processes.rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(run, setup, config)

    monkeypatch.setattr(training, "_train_epoch", dying)
    begin = time.perf_counter()
    codes = finish(start(2, lambda: training.train(TrainConfig(**options)), tmp_path / "log"))
    assert time.perf_counter() - begin < 60
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    assert "ProcessLost: process" in said(tmp_path / "log")
    monkeypatch.undo()
    train(2, options, tmp_path / "log", go_on=True)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (pair / "2" / WEIGHTS).read_bytes()


def test_bad_input_ends_every_process(small_run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    options = small_run | OPTIONS | {"output_dir": str(tmp_path / "out")}
    assert finish(start(2, lambda: training.train(TrainConfig(**options)), tmp_path / "log")) == [1, 1]
    assert "ValueError: output_dir" in (tmp_path / "log.0").read_text()
    assert "ends with the first one (output_dir" in (tmp_path / "log.1").read_text()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_more_processes_than_batches_are_refused(monkeypatch, small_run):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="sample_batch_size: 8 images an epoch in batches of 4 are too few"):
        training.check_shares(resolve(TrainConfig(**small_run | OPTIONS)))


@pytest.mark.slow
def test_torchrun_trains_and_ends_when_a_process_dies(small_run, tmp_path):
    """The command of the README; a process is killed when the first epoch is over."""
    options = small_run | OPTIONS | {"num_epochs": 200, "eval_every": 200, "output_dir": str(tmp_path / "out")}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "texforce.cli", "train", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items()),
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as launched:
        heard = []
        for line in launched.stderr:
            heard.append(line)
            if line.startswith("epoch 1/200"):
                break
        children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
        workers = [child for child in children if b"RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()]
        begin = time.perf_counter()
        os.kill(int(workers[-1]), signal.SIGKILL)
        heard.append(launched.stderr.read())
        assert launched.wait() != 0, "".join(heard)
    assert time.perf_counter() - begin < 60
    rest = "".join(heard)
    assert "error: terminated" in rest or "has lost another one of the run" in rest.replace("\n", " "), rest
    assert "go on by: texforce train --resume" in rest.replace("\n", " ")
    assert resume.newest(tmp_path / "out" / "checkpoints")
