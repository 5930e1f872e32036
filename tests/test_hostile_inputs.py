"""Every file that a command reads, broken at random: the command refuses it or works, and nothing else happens."""

import contextlib
import copy
import json
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from typer.testing import Result

from texforce.files import HOLDER, LOCK

from .commands import invoke
from .conftest import small_options
from .hostile import hostile_objects, recorded
from .test_boundaries import DAMAGES, link_folder

GIB_IN_KB = 2**20
PROMPTS = ["a red circle", "two blue squares", "a green cross"]
# Values that take the place of one in JSON: of another type, too large, too deep, or written to do harm.
VALUES = [
    None, True, -1, 0, 10**400, 1e308, float("nan"), "", "\x1b[2J\x1b]0;x\x07", "../../../etc/passwd", "\ud800",
    "x" * 100_000, "evil.py:f", "(a+)+$", [], {}, [[[[]]]], {"": {"": None}},
]  # fmt: skip
KINDS = ("value", "value", "value", "bytes", "cut", "insert", "pickle", *DAMAGES)


DRAWING = "--num-images 1 --num-inference-steps 1 --output-dir new"
COMMANDS = {  # what reads the files whose path begins so
    "model": f"sample --model model --prompt x {DRAWING}",
    "out/checkpoints": "train --resume out --num-epochs 2 --force-resume",
    "out/metrics.jsonl": "train --resume out",
    "out/heldout.jsonl": "train --resume out",
    "out": f"sample --adapter out --prompt x {DRAWING}",
    "prompts": f"eval --model model --benchmark {{file}} --reward jpeg {DRAWING}",
    "lines": f"sample --model model --prompts {{file}} {DRAWING}",
    "evaluation": "eval --adapter out --benchmark prompts/a.jsonl --reward jpeg --num-images 1 --output-dir evaluation",
    "merged": "merge --adapter out --output-dir merged --overwrite",
}


@dataclass(frozen=True)
class Scene:
    """A folder of valid inputs, and for each part of it the command that reads it."""

    folder: Path

    def files(self) -> dict[str, list[str]]:
        """The files that each command of COMMANDS reads; what only people read is not among them."""
        unread = {LOCK, HOLDER, "README.md", "report.html", "results.csv", "curve.png"}
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file() and path.name not in unread)
        found = {}
        for path in (path.relative_to(self.folder).as_posix() for path in paths):
            if part := next((part for part in COMMANDS if path.startswith(part)), None):
                found.setdefault(part, []).append(path)
        return found


def run(command: str, folder: Path) -> Result:
    with contextlib.chdir(folder):
        return invoke(*command.split())


@pytest.fixture(scope="module")
def scene(stable_diffusion, tmp_path_factory) -> Scene:
    folder = tmp_path_factory.mktemp("scene")
    (folder / "evil.py").write_text("open('created', 'w')\n\ndef f(images, prompts):\n    return [0.0] * len(images)\n")
    shutil.copytree(stable_diffusion, folder / "model")
    for name in ("prompts", "lines"):
        (folder / name).mkdir()
    rows = [{"prompt": prompt, "category": "x"} for prompt in PROMPTS]
    (folder / "prompts" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("prompts/a.json", "lines/a.json"):
        (folder / name).write_text(json.dumps(rows))
    for name in ("prompts/a.csv", "lines/a.csv"):
        (folder / name).write_text("prompt,category\n" + "".join(f"{prompt},x\n" for prompt in PROMPTS))
    for name in ("prompts/a.txt", "lines/a.txt"):
        (folder / name).write_text("\n".join(PROMPTS) + "\n")
    options = small_options(folder) | {"model": "model", "output_dir": "out", "num_inference_steps": 2}
    options |= {"num_prompts_per_epoch": 2, "num_samples_per_prompt": 2, "max_reward_drop": 0.0}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    for command in (f"train {flags}", COMMANDS["evaluation"], "merge --adapter out --output-dir merged"):
        result = run(command, folder)
        assert result.exit_code == 0, result.output
    (folder / "out" / "result.json").unlink()  # a run that is not over goes on
    return Scene(folder)


def damaged(whole: bytes, kind: str, place: float, value: object, folder: Path) -> bytes:
    """The content of a file with something wrong in it, at a place between its begin and end."""
    where = int(place * len(whole))
    if kind == "bytes" or (kind == "value" and not is_json(whole)):
        return whole[:where] + bytes(byte ^ 0xA5 for byte in whole[where : where + 8]) + whole[where + 8 :]
    if kind == "cut":
        return whole[:where]
    if kind == "insert":
        return whole[:where] + b'{"r": 1e999}' * 20 + whole[where:]
    if kind == "pickle":
        return pickle.dumps(hostile_objects(folder)[0])
    if kind in DAMAGES:
        return DAMAGES[kind](whole)
    return json.dumps(replaced(json.loads(whole), where, value)).encode()


def replaced(content: object, number: int, value: object) -> object:
    """JSON with one of its values, chosen by a number, replaced by another."""
    content, holders = copy.deepcopy(content), []

    def walk(part: object) -> None:
        for key in range(len(part)) if isinstance(part, list) else part if isinstance(part, dict) else ():
            holders.append((part, key))
            walk(part[key])

    walk(content)
    if not holders:
        return value
    holder, key = holders[number % len(holders)]
    holder[key] = value
    return content


def is_json(whole: bytes) -> bool:
    try:
        return isinstance(json.loads(whole), dict | list)
    except ValueError:
        return False


def harm(result: Result, events: list[str], folder: Path) -> str:
    """What went wrong in a command besides its refusal of a broken file; nothing if all is well."""
    if result.exit_code not in (0, 2, 3):
        return f"exit code {result.exit_code}: {result.exception!r}"
    if "Traceback" in result.output or "\x1b" in result.output:
        return f"what it printed: {result.output[-500:]!r}"
    if (folder / "created").exists():
        return "code was run"
    outside = [path for path in re.findall(r"^open (.*)$", "\n".join(events), re.M) if not inside(path, folder)]
    starts = ("os.system", "subprocess", "os.posix_spawn", "os.exec", "socket")
    ours = "subprocess.Popen git"  # asks for the commit
    started = [event for event in events if event.startswith(starts) and event != ours]
    return f"events: {outside + started}" if outside or started else ""


def inside(path: str, folder: Path) -> bool:
    """Whether a file that was opened for writing lies in the folder; descriptors and /dev/null are no files."""
    return path.isdigit() or path == os.devnull or Path(folder, path).resolve().is_relative_to(folder.resolve())


def peak_of_memory() -> int:
    """The largest size in kB that this process had in memory since the peak was reset."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak_of_memory_from_now_on() -> int:
    """Reset the peak to what the process has in memory now, and return it."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_of_memory()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory cannot be measured here")
def test_whatever_is_wrong_in_a_file_a_command_refuses_it_or_works(scene, tmp_path):
    """200 broken files: exit code 0, 2 or 3, no traceback, nothing run or written elsewhere, less than a GiB more memory."""
    for command in set(COMMANDS.values()):  # imports what it needs
        run(command.format(file="prompts/a.txt"), link_folder(scene.folder, tmp_path / "warm"))
        shutil.rmtree(tmp_path / "warm")
    files, failures = scene.files(), []
    assert files.keys() == COMMANDS.keys()
    broken = st.one_of(*(st.tuples(st.just(part), st.sampled_from(found)) for part, found in files.items()))

    @settings(max_examples=200, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(broken, st.sampled_from(KINDS), st.floats(0, 0.999), st.sampled_from(VALUES))
    def check(broken, kind, place, value):
        (part, file), folder = broken, link_folder(scene.folder, tmp_path / "copy")
        try:
            whole = (folder / file).read_bytes()
            (folder / file).unlink()  # it may be a hard link
            (folder / file).write_bytes(damaged(whole, kind, place, value, folder))
            with recorded() as events:
                result = run(COMMANDS[part].format(file=file), folder)
            if problem := harm(result, events, folder):
                failures.append((file, kind, place, value if kind == "value" else "", problem))
        finally:
            shutil.rmtree(folder)

    before = peak_of_memory_from_now_on()
    check()
    assert not failures, "\n".join(map(str, failures))
    assert peak_of_memory() - before < GIB_IN_KB
