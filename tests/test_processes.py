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

import texforce
from texforce import heldout, interrupts, models, processes, rewards, run, scorers, training
from texforce.config import TrainConfig, TrainOptions, resolve
from texforce.errors import DivergedError, InputError, NotFoundError, RewardError
from texforce.learner import Learner

from .commands import invoke

WEIGHTS = "adapter_model.safetensors"
LOAD_MODEL = models.load_model  # which the fixture `quick` replaces
# Two prompts of four images are two batches, one for each of two processes.
# Adam enlarges rounding by its learning rate; of 1e-3 some processors make 1.05e-6 of the adapter's norm.
OPTIONS = {"learning_rate": 5e-4, "num_epochs": 2, "eval_every": 1, "checkpoint_every": 1}
OPTIONS |= {"sample_batch_size": 4, "micro_batch_size": 4}


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


def configure(options: dict) -> TrainConfig:
    return resolve(TrainOptions(**options))


def run_training(number: int, options: dict, log: Path, **arguments) -> None:
    codes = finish(start(number, lambda: training.train(configure(options), **arguments), log))
    assert codes == [0] * number, said(log)


def relative_difference(ours: Path, theirs: Path) -> float:
    """|a - b| / |b| of whole adapters."""
    one, other = (load_file(next(folder.glob("*.safetensors"))) for folder in (ours, theirs))
    assert one.keys() == other.keys()
    a, b = (torch.cat([tensors[name].flatten() for name in one]) for tensors in (one, other))
    return ((a - b).norm() / b.norm()).item()


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def quick(narrow_model):
    """Train a narrow U-Net, and draw no curve, which takes longer than the training of these runs."""
    narrow_model()  # loaded before the processes are forked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load_model", lambda name, device, dtype, **_: narrow_model(dtype))
        patch.setattr(run, "write_curve", lambda path, epochs, reward: path.write_bytes(b""))
        yield


@pytest.fixture(scope="module")
def pair(shared_run, tmp_path_factory) -> Path:
    """What two processes made, in `2`, and beside it what one made of the same, in `1`.

    Each has noted its first gradient, `gradient-NUMBER-RANK.pt`, and the prompts whose images it has scored, `scored-...`.
    """
    folder = tmp_path_factory.mktemp("pair")
    step, score = Learner.step, rewards.Mixture.score

    def noting_step(learner):
        gradient = folder / f"gradient-{processes.count()}-{processes.rank()}.pt"
        if not gradient.exists():
            torch.save(torch.cat([parameter.grad.double().flatten() for parameter in learner.parameters]), gradient)
        return step(learner)

    def noting_score(mixture, images, prompts):
        with (folder / f"scored-{processes.count()}-{processes.rank()}").open("a") as file:
            file.write(json.dumps(list(prompts)) + "\n")
        return score(mixture, images, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", noting_step)
        patch.setattr(rewards.Mixture, "score", noting_score)
        for number in (1, 2):
            run_training(number, shared_run | OPTIONS | {"output_dir": str(folder / str(number))}, folder / "log")
    return folder


def test_two_processes_give_the_adapter_of_one_with_twice_the_batch(pair):
    assert relative_difference(pair / "2", pair / "1") < 1e-6
    assert {path.name for path in (pair / "2").iterdir()} == {path.name for path in (pair / "1").iterdir()}


@pytest.mark.parametrize("options", [
    {"algorithm": "matching", "kl_weight": 0.1, "null_anchor": 1.0, "num_inner_epochs": 2},
    {"algorithm": "gradient", "reward": "hps", "backprop_steps": 2, "null_anchor": 1.0, "adapter_steps": "0.5-1"},
    pytest.param({"lora_layers": "last:1", "lora_modules": ["v_proj", "fc1"]}, marks=pytest.mark.slow),
    pytest.param({"adapter_steps": "0-0.5"}, marks=pytest.mark.slow),
    {"algorithm": "matching", "kl_weight": 0.1, "null_anchor": 1.0, "relabel": "CAPTIONS", "adapter_steps": "0-0.5"},
    pytest.param({"target": "tokens", "null_prompt": "base", "num_tokens": 3}, marks=pytest.mark.slow),
], ids=[
    "matching", "gradient in some steps", "some layers", "ppo in some steps", "relabelling in some steps", "tokens",
])  # fmt: skip
@pytest.mark.quick(1)
def test_two_processes_give_the_adapter_of_one_by_every_algorithm(shared_run, tmp_path, options):
    if "relabel" in options:  # by colours, so that each image has its own
        dark = "images.mean(dim=(1, 2, 3)) < images.mean()"
        body = f"return ['two blue squares' if is_dark else None for is_dark in {dark}]"
        (tmp_path / "mine.py").write_text(f"def caption(images, prompts):\n    {body}\n")
        options = options | {"relabel": f"{tmp_path / 'mine.py'}:caption"}
    for number in (1, 2):
        given = shared_run | OPTIONS | options | {"num_epochs": 1, "output_dir": str(tmp_path / str(number))}
        run_training(number, given, tmp_path / "log")
    assert relative_difference(tmp_path / "2", tmp_path / "1") < 1e-6
    counts = [[line.get("num_relabelled") for line in lines(tmp_path / number)][1:] for number in "12"]
    assert counts[0] == counts[1]
    assert (0 < counts[0][0] < 8) if "relabel" in options else counts[0] == [None]


def test_the_first_gradient_of_two_processes_is_that_of_one(pair):
    """Which no learning rate makes larger or smaller."""
    expected, *others = (torch.load(pair / f"gradient-{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert torch.equal(*others)
    assert (others[0] - expected).norm() < 1e-6 * expected.norm()


def test_two_processes_count_and_measure_what_one_does(pair):
    for ours, theirs in zip(lines(pair / "2"), lines(pair / "1"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("epoch", "num_images", "num_unet_calls", "clip_fraction"):
            assert ours.get(name) == theirs.get(name)
        for name in {"reward_mean", "reward_std", "grad_norm"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
        assert ours["heldout"] == pytest.approx(theirs["heldout"], rel=1e-4)


def test_each_process_samples_and_scores_its_share_only(pair):
    one, first, second = (
        [json.loads(line) for line in (pair / f"scored-{name}").read_text().splitlines()] for name in ("1-0", "2-0", "2-1")
    )
    assert [len(prompts) for prompts in first + second] == [4] * 4  # a batch in each of two epochs
    assert one == [batch for epoch in zip(first, second, strict=True) for batch in epoch]
    assert first[0] != second[0]


@pytest.mark.slow
def test_without_the_sum_of_gradients_the_processes_part(pair, shared_run, tmp_path, monkeypatch):
    """The test above would see it."""
    monkeypatch.setattr(processes, "sum_gradients", lambda parameters: None)
    run_training(2, shared_run | OPTIONS | {"output_dir": str(tmp_path / "out")}, tmp_path / "log")
    assert relative_difference(tmp_path / "out", pair / "1") > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_dies_the_others_end_soon_and_the_run_goes_on(pair, shared_run, tmp_path, monkeypatch, victim):
    options = shared_run | OPTIONS | {"output_dir": str(tmp_path / "out")}
    original = training.train_epoch

    def dying(current, config):
        if len(current.epochs) == 2 and processes.rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(current, config)

    monkeypatch.setattr(training, "train_epoch", dying)
    begin = time.perf_counter()
    codes = finish(start(2, lambda: training.train(configure(options)), tmp_path / "log"))
    assert time.perf_counter() - begin < 60
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    assert "ProcessLost: process" in said(tmp_path / "log")
    monkeypatch.undo()
    run_training(2, options, tmp_path / "log", resume=True)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (pair / "2" / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(pair, shared_run, tmp_path, monkeypatch):
    options = shared_run | OPTIONS | {"output_dir": str(tmp_path / "out")}
    original = training.train_epoch

    def stopping(current, config):
        if len(current.epochs) == 2:
            raise OSError("stopped")
        return original(current, config)

    monkeypatch.setattr(training, "train_epoch", stopping)
    assert finish(start(2, lambda: training.train(configure(options)), tmp_path / "log")) == [1, 1]
    monkeypatch.undo()
    run_training(1, options, tmp_path / "log", resume=True)
    assert [line["epoch"] for line in lines(tmp_path / "out")] == [0, 1, 2]
    assert relative_difference(tmp_path / "out", pair / "1") < 1e-6


# --- errors ---


class Awkward(Exception):
    """It holds what cannot be pickled; of its text alone another can be made."""

    def __init__(self, text: str, held: object = None) -> None:
        super().__init__(text)
        self.held = held


class Stubborn(Exception):
    """It is pickled, but cannot be unpickled."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)


def ends(work, log: Path) -> list[str]:
    """With which error each of two processes ends."""
    assert finish(start(2, work, log)) == [1, 1]
    return [log.with_suffix(f".{rank}").read_text().splitlines()[0] for rank in range(2)]


@pytest.mark.quick(1)
@pytest.mark.parametrize(("place", "error", "message"), [
    ((rewards, "load_reward"), NotFoundError("no weights"), "NotFoundError: no weights"),
    ((heldout, "draw_share"), torch.OutOfMemoryError("full"), "OutOfMemoryError: full"),
    ((rewards.Mixture, "score"), RewardError("reward: broken"), "RewardError: reward: broken"),
    ((texforce, "ppo_micro_batch"), DivergedError("not finite"), "DivergedError: not finite; no adapter was measured yet"),
], ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "")  # fmt: skip
def test_an_error_in_one_process_ends_all_of_them_by_the_same_error(small_run, tmp_path, monkeypatch, place, error, message):
    original = getattr(*place)

    def failing(*given, **named):
        if processes.rank() == 1:
            raise error
        return original(*given, **named)

    monkeypatch.setattr(*place, failing)
    options = small_run | OPTIONS | {"output_dir": str(tmp_path / "out")}
    assert ends(lambda: training.train(configure(options)), tmp_path / "log") == [message] * 2


@pytest.mark.parametrize(("error", "first", "second"), [
    (Awkward("odd", lambda: None), "Awkward: odd", "Awkward: odd"),
    (Stubborn("odd", 1), "RuntimeError: Stubborn: odd", "Stubborn: odd"),
], ids=["not pickled", "not unpickled"])  # fmt: skip
def test_an_error_that_cannot_be_sent_ends_the_others_by_its_text(tmp_path, error, first, second):
    def fail():
        if processes.rank() == 1:
            raise error

    def work():
        with processes.joined():
            processes.agreed(fail)

    assert ends(work, tmp_path / "log") == [first, second]


def test_of_two_errors_the_first_processs_is_every_ones(tmp_path):
    def fail():
        raise ValueError(f"in {processes.rank()}")

    def work():
        with processes.joined():
            processes.agreed(fail)

    assert ends(work, tmp_path / "log") == ["ValueError: in 0"] * 2


@pytest.mark.parametrize("signal_like", [KeyboardInterrupt, interrupts.Terminated, SystemExit])
def test_a_signal_to_one_process_is_a_loss_to_the_others(tmp_path, signal_like):
    def interrupted():
        if processes.rank() == 1:
            raise signal_like

    def work():
        with processes.joined():
            processes.agreed(interrupted)

    first, second = ends(work, tmp_path / "log")
    assert first.startswith("ProcessLost: process 0 of 2 has lost another one")
    assert second.startswith(signal_like.__name__)


def test_bad_input_ends_every_process(small_run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    options = small_run | OPTIONS | {"output_dir": str(tmp_path / "out")}
    first, second = ends(lambda: training.train(configure(options)), tmp_path / "log")
    assert first.startswith("InputError: output_dir")
    assert second == first
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_the_launchers_signal_while_a_loss_is_saved_does_not_take_its_place(small_run, tmp_path, monkeypatch):
    options = small_run | OPTIONS | {"output_dir": str(tmp_path / "out"), "checkpoint_every": 2}
    original, write = training.train_epoch, run.write_checkpoint

    def dying(current, config):
        if len(current.epochs) == 2 and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(current, config)

    def terminated(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*given)

    def work():
        with interrupts.handled():
            training.train(configure(options))

    monkeypatch.setattr(training, "train_epoch", dying)
    monkeypatch.setattr(run, "write_checkpoint", terminated)
    assert finish(start(2, work, tmp_path / "log")) == [1, -signal.SIGKILL]
    assert said(tmp_path / "log").startswith("ProcessLost: process 0 of 2 has lost another one")
    assert run.newest_checkpoint(tmp_path / "out" / "checkpoints").name == "epoch_000001"


# --- held-out prompts, gradients, what is said ---


@pytest.mark.slow
def test_each_process_scores_its_held_out_images_and_all_decide_by_the_same_numbers(small_run, tmp_path, monkeypatch):
    seen = tmp_path / "seen"
    original, check_guards = scorers.score, training.check_guards

    def note(**entry):
        with seen.open("a") as file:
            file.write(json.dumps({"rank": processes.rank()} | entry) + "\n")

    def unlike(scorer, images, prompts, name):
        note(prompts=list(prompts))
        return original(scorer, images, prompts, name) + processes.rank()

    def noted(epochs, config, reward):
        note(heldout=epochs[-1]["heldout"])
        check_guards(epochs, config, reward)

    monkeypatch.setattr(scorers, "score", unlike)  # rewards.py has a name of its own for it
    monkeypatch.setattr(training, "check_guards", noted)
    options = {"num_epochs": 1, "sample_batch_size": 1, "output_dir": str(tmp_path / "out")}
    run_training(2, small_run | OPTIONS | options, tmp_path / "log")
    entries = [json.loads(line) for line in seen.read_text().splitlines()]
    prompts = Path(small_run["heldout_prompts"]).read_text().splitlines()
    for rank in range(2):
        scored = [entry["prompts"] for entry in entries if entry["rank"] == rank and "prompts" in entry]
        assert scored == [[prompts[rank]]] * 4  # by the reward and by alignment, of the base and of the tuned model
    decided = [entry["heldout"] for entry in entries if "heldout" in entry]
    assert len(decided) == 2
    assert decided[0] == decided[1]


def test_a_gradient_that_no_process_has_stays_missing(tmp_path):
    """As AdamW passes it over in one process; one that some have not counts as 0."""

    def work():
        with processes.joined():
            parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
            parameters[0].grad = torch.tensor([1.0, 2.0])
            if processes.rank() == 1:
                parameters[1].grad = torch.tensor([3.0, 4.0])
            processes.sum_gradients(parameters)
            assert [item.grad is None or item.grad.tolist() for item in parameters] == [[2.0, 4.0], [3.0, 4.0], True]

    assert finish(start(2, work, tmp_path / "log")) == [0, 0], said(tmp_path / "log")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_plan_is_printed_by_the_first_process(small_run, monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in small_run.items()]
    result = invoke("train", *arguments, "--dry-run")
    assert result.exit_code == 0
    assert bool(result.stdout) is (rank == 0)


def test_more_processes_than_batches_are_refused(monkeypatch, small_run):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="sample_batch_size: 8 images an epoch in batches of 4 are too few"):
        training.check_shares(configure(small_run | OPTIONS))


def worker(launcher: int, rank: int) -> int:
    """The process that torchrun has started as this one of the run."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    text = f"\0RANK={rank}\0".encode()
    return next(int(child) for child in children if text in Path(f"/proc/{child}/environ").read_bytes())


@pytest.mark.slow
def test_accelerate_launch_on_two_machines_gives_the_adapter_of_one_process(shared_run, tmp_path, monkeypatch):
    """Both of them this one."""
    monkeypatch.setattr(models, "load_model", LOAD_MODEL)
    run_training(1, shared_run | OPTIONS | {"output_dir": str(tmp_path / "one")}, tmp_path / "log")
    options = shared_run | OPTIONS | {"output_dir": str(tmp_path / "out")}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    machines = [
        subprocess.Popen([
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=2",
            f"--machine_rank={rank}", "--main_process_ip=127.0.0.1", f"--main_process_port={port}", "--mixed_precision=no",
            "--dynamo_backend=no",
            "-m", "texforce.cli", "train", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items()),
        ], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[1])
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert [f"are in {tmp_path / 'out'}" in " ".join(output.split()) for output in outputs] == [True, False]
    assert relative_difference(tmp_path / "out", tmp_path / "one") < 1e-6


@pytest.mark.slow
def test_torchrun_trains_and_ends_when_a_process_dies(small_run, tmp_path):
    """The command of the README; a process is killed when the first epoch is over.

    torchrun, which may be the first to see that and then terminates the other, is held until that one has seen it too.
    """
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
        other, victim = (worker(launched.pid, rank) for rank in range(2))
        begin = time.perf_counter()
        os.kill(launched.pid, signal.SIGSTOP)
        os.kill(victim, signal.SIGKILL)
        while time.perf_counter() - begin < 50 and ") Z " not in Path(f"/proc/{other}/stat").read_text():
            time.sleep(0.1)
        os.kill(launched.pid, signal.SIGCONT)
        heard.append(launched.stderr.read())
        assert launched.wait() != 0, "".join(heard)
    assert time.perf_counter() - begin < 60
    rest = "".join(heard)
    assert "has lost another one of the run" in rest.replace("\n", " "), rest
    assert "resume with: texforce train --resume" in rest.replace("\n", " ")
    assert run.newest_checkpoint(tmp_path / "out" / "checkpoints")
