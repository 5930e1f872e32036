"""Runs that are killed, terminated, or run out of disk, in processes of their own; slow, so `make check` runs them.

`TEXFORCE_KILLS` says how many SIGKILLs, SIGTERMs and file size limits at random there are (5 of each),
`TEXFORCE_PROMPT_FILES` how many prompt files (1,000).
"""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from texforce import prompt_sets, run
from texforce.errors import InputError

pytestmark = pytest.mark.slow
NUM_KILLS = int(os.environ.get("TEXFORCE_KILLS", "5"))
NUM_PROMPT_FILES = int(os.environ.get("TEXFORCE_PROMPT_FILES", "1000"))
WEIGHTS = "adapter_model.safetensors"


class Server:
    """The fork server, and a command of it that runs."""

    def __init__(self, log: Path) -> None:
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def start(self, arguments: list[str], prepare: str | None = None, value: object = None) -> int:
        job = {"arguments": arguments, "log": str(self.log), "prepare": prepare, "value": value}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def run(self, arguments: list[str], prepare: str | None = None, value: object = None) -> int:
        self.start(arguments, prepare, value)
        return self.wait()

    def run_until(self, arguments: list[str], seconds: float, number: int) -> tuple[int, float]:
        """Send a signal after some seconds; the exit status, and how long the end took from then on."""
        child = self.start(arguments)
        time.sleep(seconds)
        sent = time.perf_counter()
        os.kill(child, number)  # even if it has ended, its number is its own until it is waited for
        return self.wait(), time.perf_counter() - sent

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server") / "log")
    yield server
    server.process.stdin.close()
    server.process.wait(30)


@pytest.fixture(scope="module")
def options(shared_run) -> list[str]:
    """A run in which everything that a checkpoint holds has a say in the adapter, with a checkpoint an epoch."""
    shared_run = shared_run | {
        "num_epochs": 5, "checkpoint_every": 1, "eval_every": 2, "ema_decay": 0.5, "lr_scheduler": "cosine",
        "num_prompts_per_epoch": 2, "num_samples_per_prompt": 2, "num_inference_steps": 2, "reward": "hps",
    }  # fmt: skip
    return [text for name, value in shared_run.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def undisturbed(server, options, tmp_path_factory) -> tuple[Path, float]:
    """A run that nothing has happened to, and how long it took."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    server.run(["--help"])
    start = time.perf_counter()
    assert server.run(["train", *options, "--resume", str(folder)]) == 0, server.said()
    return folder, time.perf_counter() - start


@pytest.fixture(scope="module")
def begun(server, options, tmp_path_factory) -> Path:
    """A run that was killed when it began to save its third epoch."""
    folder = tmp_path_factory.mktemp("begun") / "out"
    at = {"epoch": 3, "number": 0}
    assert server.run(["train", *options, "--resume", str(folder)], "kill_at_io_step", at) == -signal.SIGKILL
    return folder


def check_same(folder: Path, undisturbed: Path) -> None:
    assert (folder / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()
    epochs = [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(6))
    assert not list(folder.rglob("*.tmp"))
    same = {path.name: run.is_valid(path) for path in (folder / "checkpoints").iterdir()}
    assert same == {"epoch_000005": True, "epoch_000004": True}


def test_a_run_killed_at_random_moments_ends_in_the_very_same_adapter(server, options, undisturbed, tmp_path):
    """Killed again and again, each time started by the same command; a run that ends makes room for another one."""
    moments, kills, runs = random.Random(0), 0, 0
    while kills < NUM_KILLS:
        folder = tmp_path / str(runs)
        while kills < NUM_KILLS:
            status, _ = server.run_until(
                ["train", *options, "--resume", str(folder)], moments.uniform(0, undisturbed[1]), signal.SIGKILL
            )
            if status == 0:
                break
            assert status == -signal.SIGKILL, server.said()
            kills += 1
        assert server.run(["train", *options, "--resume", str(folder)]) == 0, server.said()
        check_same(folder, undisturbed[0])
        runs += 1


def layout(folder: Path) -> list[tuple[str, bool]]:
    """Names in a folder, without what is random in those of temporary ones, and whether anything is in the files."""
    names = ((re.sub(r"\.\w{8}\.tmp", ".RANDOM.tmp", str(path.relative_to(folder))), path) for path in folder.rglob("*"))
    return sorted((name, path.is_file() and path.stat().st_size > 0) for name, path in names)


def test_a_run_killed_at_any_step_of_a_save_ends_in_the_very_same_adapter(server, options, undisturbed, begun, tmp_path):
    newest, seen = [], []
    for number in itertools.count():
        folder = shutil.copytree(begun, tmp_path / str(number))
        command = ["train", *options, "--resume", str(folder)]
        status = server.run(command, "kill_at_io_step", {"epoch": 3, "number": number})
        if status == 0:  # there are no more steps
            break
        assert status == -signal.SIGKILL, (number, server.said())
        newest.append(run.newest_checkpoint(folder / "checkpoints").name)
        if layout(folder) not in seen:  # a step that only reads leaves what the one before it has left
            seen.append(layout(folder))
            assert server.run(command) == 0, server.said()
            check_same(folder, undisturbed[0])
        shutil.rmtree(folder)
    assert len(newest) > 20
    assert len(seen) > 6
    # Up to the renaming the old one counts, from then on the new one.
    assert newest == sorted(newest)
    assert set(newest) == {"epoch_000002", "epoch_000003"}


def test_a_run_that_is_terminated_saves_at_once_and_goes_on(server, options, undisturbed, tmp_path):
    """The command to resume is printed whenever there is a checkpoint."""
    moments, terms, runs = random.Random(1), 0, 0
    while terms < NUM_KILLS:
        folder = tmp_path / str(runs)
        while terms < NUM_KILLS:
            status, seconds = server.run_until(
                ["train", *options, "--resume", str(folder)], moments.uniform(0, undisturbed[1]), signal.SIGTERM
            )
            if status == 0:
                break
            if status == -signal.SIGTERM:  # before the command had looked at signals
                continue
            assert status == 143, server.said()
            assert seconds < 10  # at once, even where other tests keep the machine busy
            terms += 1
            said = " ".join(server.said().split())
            if (folder / "checkpoints").is_dir():
                assert run.newest_checkpoint(folder / "checkpoints")
                assert "resume with: texforce train --resume" in said
            assert "Traceback" not in said
        assert server.run(["train", *options, "--resume", str(folder)]) == 0
        check_same(folder, undisturbed[0])
        runs += 1


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_size_limit_leaves_the_previous_checkpoint_as_it_was(server, options, undisturbed, begun, tmp_path):
    largest = max(path.stat().st_size for path in undisturbed[0].rglob("*.safetensors"))
    command = ["train", *options, "--resume", str(tmp_path / "out")]
    before = contents(begun / "checkpoints" / "epoch_000002")
    sizes = random.Random(2)
    for _ in range(NUM_KILLS):
        shutil.copytree(begun, tmp_path / "out")
        assert server.run(command, "limit_file_size", sizes.randrange(4096, largest)) == 5, server.said()
        assert contents(tmp_path / "out" / "checkpoints" / "epoch_000002") == before
        if sizes.random() < 0.2:
            assert server.run(command) == 0, server.said()
            check_same(tmp_path / "out", undisturbed[0])
        shutil.rmtree(tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint_as_it_was(server, options, undisturbed, small_disk):
    folder = small_disk / "out"
    command = ["train", *options, "--resume", str(folder)]
    at = {"epoch": 3, "number": 0}
    assert server.run(command, "kill_at_io_step", at) == -signal.SIGKILL, server.said()
    for left in (0, 10_000, 300_000, 1_500_000):  # for nothing, a text, the first checkpoint perhaps, everything
        place = run.newest_checkpoint(folder / "checkpoints")
        before = contents(place)
        free = shutil.disk_usage(small_disk).free
        (small_disk / "filler").write_bytes(bytes(max(0, free - left)))
        status = server.run(command)
        (small_disk / "filler").unlink()
        assert status == (0 if left == 1_500_000 else 5), server.said()
        newest = run.newest_checkpoint(folder / "checkpoints")
        assert newest.name > place.name or contents(place) == before
    assert server.run(command) == 0, server.said()
    check_same(folder, undisturbed[0])


TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="\n\r\t\x0b\x0c\x1b\x85\u2028\u202e\ufeff\x00 ab{}[]\"':,\\", max_size=60),
    st.lists(
        st.one_of(
            st.fixed_dictionaries({"prompt": st.text(max_size=20)}, optional={"category": st.text(max_size=8)}),
            st.recursive(
                st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda kids: st.lists(kids, max_size=3)
            ),
        ).map(json.dumps),
        max_size=4,
    ).map("\n".join),
)


@pytest.fixture(scope="module")
def prompt_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prompts")


@settings(max_examples=NUM_PROMPT_FILES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(content=st.one_of(st.binary(max_size=60), TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass"))),
       ending=st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet"]))  # fmt: skip
def test_no_prompt_file_ends_otherwise_than_in_prompts_or_a_clear_error(prompt_folder, content, ending):
    path = prompt_folder / f"prompts{ending}"
    path.write_bytes(content)
    for read in (prompt_sets.read_prompts, lambda name: prompt_sets.read_benchmark(name).prompts):
        message, prompts = "", [""]
        try:
            prompts = read(str(path))
        except InputError as error:
            message = str(error)
        assert all(prompt.strip() for prompt in prompts) or message.startswith(("prompts: ", "benchmark: "))
