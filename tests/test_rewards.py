"""Rewards: names, mixtures, functions of a user's own, scorers over HTTP and their server, and what is refused."""

import base64
import errno
import http.client
import http.server
import importlib.util
import io
import json
import math
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from texforce import hub, reward_specs, rewards, scorers, world
from texforce import server as serving
from texforce.config import TrainOptions, resolve
from texforce.errors import InputError, RewardError

from .commands import invoke
from .hostile import blank_png

PROMPTS = ["a red circle", "zwei Würfel ☃", "a red circle"]


def random_images(num_images: int) -> Tensor:
    return torch.rand(num_images, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# --- loading by name ---


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"reward: unknown name 'hsp'.*hps, hps-v2, imagereward, .*incompress.*file\.py:function.*http"
    ):
        rewards.load_reward("hsp")


def test_alignment_is_the_detector_of_the_tiny_world(tiny_build):
    images = tiny_build.render([world.parse("a red circle")] * 2, random.Random(0))
    assert rewards.load_reward("alignment")(images, ["a red circle", "a blue square"]).tolist() == [1.0, 0.0]


def test_the_hub_checkpoint_that_cannot_be_had_names_the_option():
    with pytest.raises(FileNotFoundError, match=r"HPS_v2\.1_compressed\.pt of xswu/HPSv2 .*--reward-checkpoint"):
        rewards.load_reward("hps", checkpoints={"hps": "hub"})


def test_a_function_of_a_file_is_a_reward(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import torch\n\ndef brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    scorer = rewards.load_reward(f"{path}:brightness")
    images = random_images(3)
    torch.testing.assert_close(scorers.score(scorer, images, ["a"] * 3), images.mean(dim=(1, 2, 3)))


def test_a_reward_file_may_be_called_like_a_package(tmp_path):
    path = tmp_path / "json.py"
    path.write_text("def dark(images, prompts):\n    return -images.mean(dim=(1, 2, 3))\n")
    rewards.load_reward(f"{path}:dark")
    assert sys.modules["json"] is json


def test_a_reward_file_may_hold_dataclasses(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport torch\n\n"
        "@dataclass\nclass Constant:\n    value: float\n\n"
        "    def __call__(self, images, prompts):\n        return torch.full((len(images),), self.value)\n\n"
        "seven = Constant(7.0)\n"
    )
    scorer = rewards.load_reward(f"{path}:seven")
    assert scorers.score(scorer, random_images(2), ["", ""]).tolist() == [7.0, 7.0]


@pytest.mark.parametrize(("file", "attribute", "error", "words"), [
    ("absent.py", "f", FileNotFoundError, "there is no file .*absent.py"),
    ("mine.py", "absent", ValueError, "mine.py' has no function 'absent'"),
    ("mine.py", "", ValueError, "has no function ''"),
    ("mine.py", "number", ValueError, "has no function 'number'"),
    ("mine.txt", "f", ValueError, "mine.txt' is not a Python file"),
    ("broken.py", "f", (ValueError, RewardError), "reward: .*broken.py"),
    ("lacking.py", "f", (ValueError, RewardError), "reward: .*lacking.py"),
    ("script.py", "f", ValueError, "reward: .*script.py.*SystemExit"),
])  # fmt: skip
def test_a_reward_file_that_cannot_be_used_is_named(tmp_path, file, attribute, error, words):
    for name in ("mine.py", "mine.txt"):
        (tmp_path / name).write_text("number = 3\n\ndef f(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "lacking.py").write_text("import no_such_package_anywhere\n")
    (tmp_path / "script.py").write_text("import sys\n\nsys.exit(0)\n\ndef f(): ...\n")
    with pytest.raises(error, match=words):
        rewards.load_reward(f"{tmp_path / file}:{attribute}")


# --- the catalogue ---


@pytest.mark.parametrize("name", reward_specs.CATALOGUE)
def test_the_catalogue_says_of_each_reward_what_one_must_know(name):
    entry = reward_specs.CATALOGUE[name]
    assert entry.measures
    assert entry.scale
    assert set(entry.weights) <= hub.HUB.keys()
    assert (entry.licence != "-") == bool(entry.weights or entry.packages)
    assert entry.features == hasattr(rewards.MAKERS[name], "image_features")
    assert entry.gradients == hasattr(rewards.MAKERS[name], "with_gradients")


def test_every_weight_of_the_hub_is_some_rewards():
    assert {weights for entry in reward_specs.CATALOGUE.values() for weights in entry.weights} == hub.HUB.keys()


@pytest.mark.parametrize(("name", "package"), [("ocr", "rapidocr"), ("ocr", "onnxruntime"), ("face", "pyiqa")])
def test_a_reward_whose_package_is_missing_says_what_to_install(monkeypatch, name, package):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == package else original(wanted))
    packages = " ".join(reward_specs.CATALOGUE[name].packages)
    with pytest.raises(ValueError, match=rf"reward: {name} needs {package}; pip install {packages}"):
        reward_specs.check_reward(f"jpeg=1,{name}=2")


def test_the_extras_install_what_the_rewards_need():
    project = tomllib.loads((Path(rewards.__file__).parent / "pyproject.toml").read_text())["project"]
    for name, entry in reward_specs.CATALOGUE.items():
        extra = [re.sub(r"[^\w].*", "", requirement) for requirement in project["optional-dependencies"].get(name, [])]
        assert sorted(entry.packages) == extra


# --- what --reward and --reward-checkpoint say ---


@pytest.mark.parametrize(("spec", "weights"), [
    ("hps", {"hps": 1.0}),
    ("hps=2", {"hps": 2.0}),
    ("hps=1,jpeg=0.1", {"hps": 1.0, "jpeg": 0.1}),
    ("hps=1, jpeg=-1e-3", {"hps": 1.0, "jpeg": -0.001}),
    ("my/file.py:f", {"my/file.py:f": 1.0}),
    ("my/file.py:f=3,hps=1", {"my/file.py:f": 3.0, "hps": 1.0}),
    ("http://127.0.0.1:8000/score", {"http://127.0.0.1:8000/score": 1.0}),
    ("https://host/score?token=1", {"https://host/score?token=1": 1.0}),
    ("http://host/score=0.5,hps=1", {"http://host/score": 0.5, "hps": 1.0}),
])  # fmt: skip
def test_a_reward_is_names_with_weights(spec, weights):
    assert reward_specs.parse_mixture(spec) == weights


@pytest.mark.parametrize(
    "url", ["http://", "http://:80/x", "http://host:abc/", "https:///score", "http://[::1", "http://h:99999/"]
)
def test_a_url_that_is_none_is_bad_input(url):
    for spec in (url, f"jpeg=1,{url}=1"):
        with pytest.raises(ValueError, match=r"reward: .* is no URL; give http://HOST:PORT/score"):
            reward_specs.check_reward(spec)


@pytest.mark.parametrize("spec", [
    "hps,jpeg", "hps=", "=1", "hps=x", "hps=1,", ",hps=1", "hps=nan", "hps=inf", "hps=0", "hps=1,jpeg", "hps=1;jpeg=1,",
])  # fmt: skip
def test_a_mixture_that_makes_no_sense_is_named(spec):
    with pytest.raises(ValueError, match="reward: a mixture is NAME=WEIGHT,NAME=WEIGHT"):
        reward_specs.parse_mixture(spec)


def test_a_part_must_not_come_twice():
    with pytest.raises(ValueError, match="reward: 'hps' comes twice in"):
        reward_specs.parse_mixture("hps=1,jpeg=1,hps=2")


@pytest.mark.parametrize(("items", "specs", "paths"), [
    ([], ["hps"], {}),
    (["a.pt"], ["hps"], {"hps": "a.pt"}),
    (["hub"], ["hps-v2"], {"hps-v2": "hub"}),
    (["runs/x=1/a.pt"], ["hps"], {"hps": "runs/x=1/a.pt"}),
    (["hps=runs/x=1/a.pt"], ["hps=1,clip=2"], {"hps": "runs/x=1/a.pt"}),
    (["clip=c", "hps=h"], ["hps", "clip"], {"hps": "h", "clip": "c"}),
    (["aesthetic-clip=c"], ["aesthetic"], {"aesthetic-clip": "c"}),
])  # fmt: skip
def test_checkpoints_go_to_their_scorers(items, specs, paths):
    assert reward_specs.parse_checkpoints(items, specs) == paths


@pytest.mark.parametrize(("item", "specs", "words"), [
    ("a.pt", ["jpeg"], "jpeg reads none, not 'a.pt'"),
    ("a.pt", ["hps=1,jpeg=1"], "NAME is one of hps, not 'a.pt'"),
    ("clip=c", ["hps=1,jpeg=1"], "NAME is one of hps, not 'clip=c'"),
    ("hps=", ["hps"], "NAME is one of hps, not 'hps='"),
])  # fmt: skip
def test_a_checkpoint_that_is_no_scorers_is_named(item, specs, words):
    with pytest.raises(ValueError, match=f"reward_checkpoint: give NAME=PATH; {words}"):
        reward_specs.parse_checkpoints([item], specs)


@pytest.mark.parametrize(("specs", "prompts", "words"), [
    (["hps", "alignment"], ["a red circle", "a red horse"], "a red horse"),
    (["jpeg=1,ocr=2"], ["a sign"], "quotation marks"),
])  # fmt: skip
def test_prompts_that_a_reward_cannot_judge_are_found_beforehand(specs, prompts, words):
    with pytest.raises(ValueError, match=words):
        reward_specs.check_prompts(specs, prompts)
    reward_specs.check_prompts(["hps", "jpeg=1,clip=2", "mine.py:f"], prompts)


def test_the_embedded_scorer_is_for_the_tiny_model_only():
    assert rewards.load_reward("hps=1,jpeg=1", checkpoints=reward_specs.EMBEDDED_CHECKPOINTS).parts["hps"].max_size
    for name in ("hps", "hps-v2"):
        with pytest.raises(FileNotFoundError, match="xswu/HPSv2"):
            rewards.load_reward(f"{name}=1,jpeg=1", checkpoints={})


@pytest.mark.parametrize(("items", "found"), [(["hps-v2=hub"], "hub"), (["hps-v2=mine.pt"], "mine.pt")])
def test_the_tiny_world_has_one_scorer_and_it_has_one_name(items, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.pt").touch()
    with pytest.raises(InputError, match="reward: hps-v2 has no scorer for tiny; take hps"):
        reward_specs.checkpoints_for("tiny", None, ["hps=1,hps-v2=1"])
    assert reward_specs.checkpoints_for("tiny", items, ["hps-v2"])["hps-v2"] == found
    assert "hps-v2" not in reward_specs.checkpoints_for("some/model", None, ["hps-v2"])


def test_a_server_that_is_not_there_is_told_without_the_clients_words_before_the_model_loads(monkeypatch, tmp_path):
    from texforce import models, training

    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # no one listens
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}/score"
        monkeypatch.setattr(models, "load_model", lambda *arguments, **options: pytest.fail("a model was loaded"))
        with pytest.raises(RewardError) as raised:
            training.prepare(resolve(TrainOptions(model="tiny", reward=f"jpeg=1,{url}=1", output_dir=str(tmp_path))))
    assert str(raised.value).startswith(f"reward: no server answers at {url}: Connection refused; start it")
    rewards.check_servers("jpeg=1,mine.py:f=1")


def test_each_name_of_the_catalogue_has_its_scorer():
    assert reward_specs.CATALOGUE.keys() == rewards.MAKERS.keys()


# --- mixtures ---


def constant(*scores: float) -> scorers.Scorer:
    return lambda images, prompts: torch.tensor(scores)


def test_a_mixture_is_the_weighted_sum_of_its_parts():
    mixture = rewards.Mixture({"a": constant(1, 2), "b": constant(10, -10)}, {"a": 2.0, "b": -0.5})
    images = random_images(2)
    assert mixture(images, ["", ""]).tolist() == [-3.0, 9.0]
    scores = mixture.score(images, ["", ""])
    assert {name: part.tolist() for name, part in scores.items()} == {"a": [1.0, 2.0], "b": [10.0, -10.0]}
    assert mixture.combine_means({"a": 1.5, "b": 0.0, "more": 7.0}) == 3.0


def test_a_single_reward_is_passed_on_to_the_bit():
    scores = torch.tensor([0.1, -0.2, 1e-30])
    assert torch.equal(rewards.Mixture({"a": lambda *_: scores}, {"a": 1.0})(random_images(3), [""] * 3), scores)


def test_a_part_that_is_not_finite_drops_the_image():
    nan, inf = float("nan"), float("inf")
    mixture = rewards.Mixture({"a": constant(1, nan, inf), "b": constant(1, 2, -inf)}, {"a": 1.0, "b": 1.0})
    assert mixture(random_images(3), [""] * 3).isfinite().tolist() == [True, False, False]


def test_normalised_parts_have_unit_spread():
    mixture = rewards.Mixture({"a": constant(1, 3), "b": constant(100, 300)}, {"a": 1.0, "b": 2.0}, normalise=True)
    scores = mixture.score(random_images(2), ["", ""])
    assert mixture.combine(scores).tolist() == [201.0, 603.0]  # nothing was seen yet
    mixture.observe(scores)
    combined = mixture.combine(scores)
    assert combined.tolist() == pytest.approx([1 + 2 * 1, 3 + 2 * 3])
    assert combined.std(correction=0).item() == pytest.approx(3)
    assert mixture.combine_means({"a": 2.0, "b": 200.0}) == pytest.approx(6)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=6), min_size=1, max_size=6))
def test_the_running_deviation_is_that_of_all_numbers(chunks):
    spread = rewards.Spread()
    for chunk in chunks:
        spread.add(torch.tensor([*chunk, float("nan"), float("inf")]))
    numbers = torch.tensor([number for chunk in chunks for number in chunk]).double()
    expected = numbers.std(correction=0).item() if len(numbers) else 0.0
    if expected > 1e-4:
        assert spread.std == pytest.approx(expected, rel=1e-5)
    elif len(set(numbers.tolist())) <= 1:
        assert spread.std == 1.0
    else:
        assert spread.std > 0


def test_a_single_reward_is_not_normalised():
    assert not rewards.load_reward("jpeg", normalise=True).normalise
    assert rewards.load_reward("jpeg=1,incompress=1", normalise=True).normalise


# --- captions ---


def captioner(folder: Path, body: str, timeout: float = 30.0) -> rewards.Captioner:
    (folder / "mine.py").write_text(f"import time\n\ndef caption(images, prompts):\n    {body}\n")
    return rewards.load_captioner(f"{folder / 'mine.py'}:caption", timeout)


def test_a_function_captions_images_or_leaves_them_out(tmp_path):
    caption = captioner(tmp_path, "return [f'not {prompts[0]}', None, ' ', 'two\\x00\\nlines\\ud800']")
    assert caption(random_images(4), ["a", "b", "c", "d"]) == ["not a", None, None, "two lines"]


@pytest.mark.parametrize(("body", "words"), [
    ("return ['one']", "a list of 2 items, each a text or None, not \"\\['one'\\]\""),
    ("return 'ab'", "a list of 2 items, each a text or None, not 'ab'"),
    ("return None", "a list of 2 items, each a text or None, not 'None'"),
    ("return [1, 2]", r"a list of 2 items, each a text or None, not '\[1, 2\]'"),
    ("raise KeyError('seed')", "raised KeyError: 'seed'"),
    ("time.sleep(1)", r"gave no captions within 0\.05 s"),
])  # fmt: skip
def test_a_caption_function_that_fails_is_named(tmp_path, body, words):
    with pytest.raises(RewardError, match=rf"^relabel: .*mine\.py:caption .*{words}"):
        captioner(tmp_path, body, 0.05 if "sleep" in body else 30.0)(random_images(2), ["a", "b"])


@pytest.mark.parametrize(("spec", "words"), [
    ("wrold", r"must be world or path/to/file\.py:function, not 'wrold'; did you mean 'world'"),
    ("absent.py:caption", "there is no file 'absent.py'"),
    ("{folder}/mine.py", "is a file; name a function in it, as .*mine.py:function"),
    ("{folder}/mine.py:captoin", "has no function 'captoin'; did you mean 'caption'"),
    ("{folder}/broken.py:caption", "is not Python, line 1: "),
])  # fmt: skip
def test_what_cannot_caption_is_refused_with_what_can(tmp_path, spec, words):
    captioner(tmp_path, "return prompts")
    (tmp_path / "broken.py").write_text("def caption(:\n")
    with pytest.raises(InputError, match=rf"^relabel: .*{words}"):
        rewards.load_captioner(spec.format(folder=tmp_path))


def test_the_worlds_captions_are_for_its_own_prompts():
    reward_specs.check_captioner("world", ["a red circle"])
    with pytest.raises(InputError, match=r"relabel: world captions images of the tiny world's .* 'a red horse' is not"):
        reward_specs.check_captioner("world", ["a red circle", "a red horse"])


# --- scorers that are not ours ---


def supervised(function, timeout: float = 30.0) -> rewards.Supervised:
    return rewards.Supervised(function, "mine", timeout)


def test_a_scorer_that_hangs_is_given_up_and_its_late_answer_is_not_the_next_ones():
    release = threading.Event()

    def hang(images, prompts):
        if prompts == ["hang"]:
            release.wait(20)
            return torch.tensor([666.0])
        return torch.tensor([7.0])

    scorer = supervised(hang, timeout=0.2)
    start = time.perf_counter()
    with pytest.raises(RewardError, match=r"reward: mine gave no scores within 0\.2 s"):
        scorer(random_images(1), ["hang"])
    assert time.perf_counter() - start < 5
    release.set()
    assert scorer(random_images(1), ["go on"]).tolist() == [7.0]


def test_a_call_may_take_longer_than_one_wait():
    def slow(images, prompts):
        time.sleep(1.2)
        return torch.tensor([7.0])

    assert supervised(slow, timeout=30)(random_images(1), ["a"]).tolist() == [7.0]


def test_an_interrupted_call_leaves_no_answer_for_the_next_one():
    entered, release = threading.Event(), threading.Event()

    def slow(images, prompts):
        if prompts == ["slow"]:
            entered.set()
            release.wait(20)
            return torch.tensor([666.0])
        return torch.tensor([7.0])

    scorer = supervised(slow)

    def interrupt() -> None:
        entered.wait(20)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's workers ignore it
    try:
        threading.Timer(0, interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            scorer(random_images(1), ["slow"])
    finally:
        signal.signal(signal.SIGINT, previous)
    release.set()
    assert scorer(random_images(1), ["go on"]).tolist() == [7.0]


def test_a_function_runs_on_the_gpu_of_its_process(monkeypatch):
    """Its thread would begin with the first one, where another process is at home."""

    class OnGpu(torch.Tensor):
        is_cuda, device = True, torch.device("cuda:3")

    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((threading.current_thread(), device)))
    scorer = supervised(lambda images, prompts: torch.tensor([float(len(chosen))]))
    assert scorer(random_images(1).as_subclass(OnGpu), ["a red disc"]).tolist() == [1.0]
    assert scorer(random_images(1), ["a red disc"]).tolist() == [1.0]
    ((thread, device),) = chosen
    assert thread is not threading.current_thread()
    assert device == torch.device("cuda:3")


def test_a_function_that_changes_its_images_changes_nobody_elses(tmp_path):
    (tmp_path / "mine.py").write_text("def f(images, prompts):\n    return images.mul_(0).sum(dim=(1, 2, 3))\n")
    images = random_images(2)
    before = images.clone()
    scores = rewards.load_reward(f"{tmp_path / 'mine.py'}:f=1,jpeg=1").score(images, ["", ""])
    assert torch.equal(images, before)
    assert torch.equal(scores["jpeg"], scorers.jpeg(before, ["", ""]))


@pytest.mark.parametrize(("body", "scores"), [
    ("images.mean(dim=(1, 2, 3)).tolist()", "as the tensor's"),
    ("images.mean(dim=(1, 2, 3)).numpy()", "as the tensor's"),
    ("None", "must return .*shape \\(3,\\) but returned NoneType"),
    ("1 / 0", r"raised ZeroDivisionError: division by zero \(mine\.py, line 2\)"),
    ("['a'] * 3", "must return .* returned list"),
], ids=["a list", "an array", "nothing", "also an exception", "also texts"])  # fmt: skip
def test_a_function_of_a_file_may_return_numbers_and_is_named_if_it_does_not(tmp_path, body, scores):
    (tmp_path / "mine.py").write_text(f"def f(images, prompts):\n    return {body}\n")
    reward, images = rewards.load_reward(f"{tmp_path / 'mine.py'}:f"), random_images(3)
    if scores == "as the tensor's":
        torch.testing.assert_close(reward(images, PROMPTS), images.mean(dim=(1, 2, 3)))
    else:
        with pytest.raises(RewardError, match=rf"^reward: {tmp_path / 'mine.py'}:f {scores}"):
            reward(images, PROMPTS)


@pytest.mark.parametrize(("body", "words"), [
    ("images.mean(dim=(1, 2, 3)).detach()", "says with_gradients = True, but its scores carry no gradients"),
    ("images.mean(dim=(1, 2, 3)).tolist()", "says with_gradients = True, but its scores carry no gradients"),
    ("1 / 0", "raised ZeroDivisionError"),
], ids=["also detached scores", "a list", "also an exception"])  # fmt: skip
def test_a_function_that_promises_gradients_must_have_them(tmp_path, body, words):
    (tmp_path / "mine.py").write_text(f"def f(images, prompts):\n    return {body}\nf.with_gradients = True\n")
    reward = rewards.load_reward(f"{tmp_path / 'mine.py'}:f")
    with pytest.raises(RewardError, match=rf"mine\.py:f {words}"):
        reward.with_gradients(random_images(3).requires_grad_(), PROMPTS)


def test_a_failure_is_told_in_a_line_of_bounded_length():
    def fail(images, prompts):
        raise RuntimeError("CUDA error:\n" + 100 * "For debugging consider passing\n")

    for scorer in (supervised(fail), lambda *_: fail(*_)):
        with pytest.raises(RewardError) as caught:
            scorers.score(scorer, random_images(1), [""])
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_a_package_that_cannot_be_imported_is_bad_input(monkeypatch):
    def broken(device):
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setitem(rewards.MAKERS, "ocr", broken)
    with pytest.raises(ValueError, match=r"reward: ocr cannot be used: ImportError: libGL\.so\.1"):
        rewards.load_reward("ocr")


@pytest.mark.parametrize("error", [ValueError("boom"), KeyError("boom"), SystemExit("boom"), KeyboardInterrupt("boom")])
def test_whatever_a_foreign_scorer_raises_is_its_failure(error):
    def fail(images, prompts):
        raise error

    scorer = supervised(fail)
    for _ in range(2):
        with pytest.raises(RewardError, match=f"reward: mine raised {type(error).__name__}: .*boom") as caught:
            scorer(random_images(1), [""])
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RewardError("reward: gone"), torch.OutOfMemoryError("out")])
def test_what_has_its_own_exit_code_keeps_it(error):
    def fail(images, prompts):
        raise error

    with pytest.raises(type(error)) as caught:
        supervised(fail)(random_images(1), [""])
    assert caught.value is error


def test_a_foreign_scorer_keeps_no_graph_and_its_thread():
    weight, threads = torch.nn.Parameter(torch.ones(1)), []

    def mine(images, prompts):
        threads.append(threading.get_ident())
        scores = weight * images.mean(dim=(1, 2, 3))
        assert not scores.requires_grad
        return scores

    scorer = supervised(mine)
    for _ in range(3):
        scorer(random_images(2), ["", ""])
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


# --- scorers over HTTP ---


def eight_bit_images(num_images: int, height: int = 8, width: int = 12) -> Tensor:
    """Images of whole levels of 255, which PNG keeps."""
    return torch.randint(256, (num_images, 3, height, width), generator=torch.Generator().manual_seed(0)) / 255


@contextmanager
def running(server: http.server.HTTPServer) -> Iterator[str]:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def answering(respond: Callable) -> Iterator[str]:
    """A server that lets `respond(handler, request)` do what it likes; handler.number counts the requests from 0."""
    numbers = iter(range(1000))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.number = next(numbers)
            respond(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url


def ask(url: str, timeout: float = 10.0, backoff: float = 0.001) -> Tensor:
    return rewards.Remote(url, timeout, backoff=backoff)(eight_bit_images(3), PROMPTS)


def scores_of(*scores: object) -> bytes:
    return json.dumps({"scores": list(scores)}).encode()


# --- the client ---


def test_a_request_holds_the_prompts_and_the_images_as_png():
    seen = []

    def respond(handler, request):
        seen.append(request)
        handler.send(200, scores_of(1, 2.5, -3))

    with answering(respond) as url:
        assert ask(url).tolist() == [1, 2.5, -3]
    assert seen[0].keys() == {"prompts", "images"}
    assert seen[0]["prompts"] == PROMPTS
    for image, text in zip(eight_bit_images(3), seen[0]["images"], strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(text)))
        assert (picture.format, picture.size) == ("PNG", (12, 8))
        assert torch.equal(torch.from_numpy(np.array(picture)).permute(2, 0, 1), (255 * image).round().byte())


def test_null_and_what_is_not_finite_drop_the_image():
    with answering(lambda handler, _: handler.send(200, b'{"scores": [null, NaN, 1e999]}')) as url:
        assert not ask(url).isfinite().any()
    with answering(lambda handler, _: handler.send(200, b'{"scores": [1' + 400 * b"0" + b", 2, 3]}")) as url:
        assert ask(url).tolist() == [math.inf, 2, 3]


@pytest.mark.parametrize(("body", "words"), [
    (scores_of(1, 2), "must answer with 3 scores, but gave 2 scores"),
    (scores_of(1, 2, 3, 4), "but gave 4 scores"),
    (scores_of(), "but gave 0 scores"),
    (b"[1, 2, 3]", "no list of scores"),
    (b'{"scores": 3}', "no list of scores"),
    (b'{"score": [1, 2, 3]}', "no list of scores"),
    (scores_of(1, "2", 3), "gave '2' for a score"),
    (scores_of(1, True, 3), "gave 'True' for a score"),
    (scores_of(1, [2], 3), r"gave '\[2\]' for a score"),
    (b"<html>welcome</html>", "is not JSON"),
    (b"", "is not JSON"),
    (b"\xff\xfe", "is not JSON"),
    (100_000 * b"[", "is not JSON"),
    (b" " * (rewards.MAX_RESPONSE_BYTES + 10), "is longer than 16777216 bytes"),
], ids=lambda value: None if isinstance(value, str) else f"{value[:20]!r}")  # fmt: skip
def test_an_answer_that_breaks_the_protocol_is_a_reward_error_at_once(body, words):
    requests = []

    def respond(handler, _):
        requests.append(handler.number)
        handler.send(200, body)

    with answering(respond) as url, pytest.raises(RewardError, match=f"{re.escape(url)}.*{words}"):
        ask(url)
    assert requests == [0]


def reset(handler) -> None:
    """Close the connection with RST."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


FAILURES = {
    "500": lambda handler: handler.send(500, b'{"error": "no memory left"}'),
    "503": lambda handler: handler.send(503, b"", Retry_After="0"),
    "501": lambda handler: handler.send(501, b""),
    "520": lambda handler: handler.send(520, b""),
    "half an answer": lambda handler: handler.send(200, b'{"scores"', Content_Length="100"),
    "429": lambda handler: handler.send(429, b""),
    "reset": reset,
    "no answer": lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
    "no HTTP": lambda handler: handler.wfile.write(b"220 smtp ready\r\n"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_may_pass_is_tried_again(failure):
    with answering(
        lambda handler, _: FAILURES[failure](handler) if handler.number < 2 else handler.send(200, scores_of(1, 2, 3))
    ) as url:
        assert ask(url).tolist() == [1, 2, 3]


@pytest.mark.parametrize("failure", FAILURES)
def test_what_does_not_pass_is_given_up_after_five_tries(failure):
    requests = []

    def respond(handler, _):
        requests.append(handler.number)
        FAILURES[failure](handler)

    with answering(respond) as url, pytest.raises(RewardError, match=re.escape(url)) as caught:
        ask(url)
    assert requests == [0, 1, 2, 3, 4]
    if failure == "500":
        assert "status 500" in str(caught.value)
        assert "no memory left" in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 301, 302, 307])
def test_a_refusal_or_redirection_is_not_tried_again(status):
    requests = []

    def respond(handler, _):
        requests.append(handler.number)
        handler.send(status, b'{"error": "because"}', Location="http://127.0.0.1:9/elsewhere")

    with (
        answering(respond) as url,
        pytest.raises(RewardError, match=f"status {status}: " + (".*because" if status >= 400 else "")),
    ):
        ask(url)
    assert requests == [0]


def test_the_pauses_between_tries_grow(monkeypatch):
    pauses = []
    monkeypatch.setattr(rewards.time, "sleep", pauses.append)
    with answering(lambda handler, _: handler.send(500, b"")) as url, pytest.raises(RewardError):
        ask(url, backoff=0.5)
    assert pauses == [0.5, 1, 2, 4]


@pytest.mark.parametrize("way", ["says nothing", "drips", "wants a long pause"])
def test_a_server_that_hangs_is_given_up_in_time(way):
    release = threading.Event()

    def respond(handler, _):
        if way == "drips":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            while not release.wait(0.05):
                handler.wfile.write(b" ")
        elif way == "wants a long pause":
            handler.send(503, b"", Retry_After="3600")
        else:
            release.wait(30)

    with answering(respond) as url:
        scorer = rewards.load_reward(url, timeout=0.3)
        start = time.perf_counter()
        with pytest.raises(RewardError, match=re.escape(url)):
            scorer(eight_bit_images(3), PROMPTS)
        assert time.perf_counter() - start < 5
        release.set()


def test_nobody_at_the_port_is_a_reward_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(RewardError, match=f"http://127.0.0.1:{port}/score does not answer: ConnectionRefusedError"):
        ask(f"http://127.0.0.1:{port}/score")


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with answering(lambda handler, _: handler.send(200, scores_of(1, 2, 3))) as url:
        assert ask(url).tolist() == [1, 2, 3]


# --- the server ---


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    if "fail" in prompts:
        raise ZeroDivisionError("fail")
    if "refuse" in prompts:
        raise InputError("such a prompt")
    scores = images.mean(dim=(1, 2, 3))
    return torch.tensor([math.nan if prompt == "nan" else score for prompt, score in zip(prompts, scores, strict=True)])


@pytest.fixture
def served():
    with running(serving.make_server(brightness, 0)) as url:
        yield url


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection(*re.match(r"http://(.+):(\d+)", url).groups(), timeout=10)
    connection.request("POST", url.split("/", 3)[3].join(["/", ""]), body, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_a_served_scorer_scores_as_it_does_here(served):
    scorer = rewards.load_reward(served)
    torch.testing.assert_close(scorer(eight_bit_images(3), PROMPTS), brightness(eight_bit_images(3), PROMPTS))
    nan = scorer(eight_bit_images(3), ["a", "nan", "b"])
    assert nan.isfinite().tolist() == [True, False, True]


def test_the_embedded_hps_scores_the_same_over_http():
    hps, images = rewards.load_reward("hps"), eight_bit_images(3, 32, 32)
    with running(serving.make_server(hps, 0)) as url:
        torch.testing.assert_close(rewards.load_reward(url)(images, PROMPTS), hps(images, PROMPTS))


def test_what_the_served_scorer_raises_reaches_the_client(served):
    scorer = rewards.Remote(served, 10.0, backoff=0.001)
    with pytest.raises(RewardError, match=r"status 500: .*ZeroDivisionError: fail"):
        scorer(eight_bit_images(1), ["fail"])
    with pytest.raises(RewardError, match=r"status 400: .*such a prompt"):
        scorer(eight_bit_images(1), ["refuse"])
    assert scorer(eight_bit_images(1), ["fine"]).isfinite().all()


def png(width: int = 4, height: int = 4) -> str:
    return rewards.encode_png(torch.rand(3, height, width))


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"3", b"\xff", 100_000 * b"[",
    json.dumps({"prompts": ["a"]}).encode(),
    json.dumps({"prompts": ["a", "b"], "images": [png()]}).encode(),
    json.dumps({"prompts": [], "images": []}).encode(),
    json.dumps({"prompts": "a", "images": [png()]}).encode(),
    json.dumps({"prompts": [1], "images": [png()]}).encode(),
    json.dumps({"prompts": ["a", "b"], "images": [png(4), png(5)]}).encode(),
    json.dumps({"prompts": ["a"], "images": ["no base64!"]}).encode(),
    json.dumps({"prompts": ["a"], "images": [base64.b64encode(b"no png").decode()]}).encode(),
    json.dumps({"prompts": ["a"], "images": [png()[:60]]}).encode(),
    json.dumps({"prompts": ["a"], "images": [7]}).encode(),
], ids=range(16))  # fmt: skip
def test_a_bad_request_is_answered_with_400_and_the_server_goes_on(served, body):
    status, content = post(served, body)
    assert status == 400
    assert content["error"]
    assert ask(served).isfinite().all()


def test_other_pictures_than_png_are_not_opened(served):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "JPEG")
    body = json.dumps({"prompts": ["a"], "images": [base64.b64encode(buffer.getvalue()).decode()]})
    assert post(served, body.encode())[0] == 400


def test_a_request_elsewhere_or_too_long_is_refused(served):
    assert post(served.replace("/score", "/other"), b"{}")[0] == 404
    assert post(served, b"", **{"Content-Length": str(10 * serving.MAX_REQUEST_BYTES)})[0] == 413


def test_a_client_that_keeps_its_connection_open_does_not_stop_the_others(served):
    with connected(served, b"POST /score HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"):
        assert ask(served, timeout=5).isfinite().all()


# --- the server's limits ---


def connected(url: str, sent: bytes = b"") -> socket.socket:
    host, port = re.match(r"http://(.+):(\d+)", url).groups()
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(sent)
    return connection


def status_of(connection: socket.socket) -> int:
    """The status that a connection is answered with, read to its end."""
    answered = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert json.loads(answered.partition(b"\r\n\r\n")[2])["error"]
    return int(answered.split()[1])


def encoded_png(*sizes: tuple[int, int], rows: int | None = None) -> str:
    return base64.b64encode(blank_png(*sizes, rows=rows)).decode()


def request_of(images: list[str], prompt: str = "a") -> bytes:
    return json.dumps({"prompts": [prompt] * len(images), "images": images}).encode()


LARGE = encoded_png((4000, 4000))
TOO_MUCH = {
    "blank images of 4,000 x 4,000": lambda: request_of([LARGE] * 200),
    "also an image of 60,000 x 60,000": lambda: request_of([encoded_png((60_000, 60_000), rows=1)]),
    "also a second header with another size": lambda: request_of([encoded_png((4, 4), (10_000, 10_000))]),
    "also images that are too many together": lambda: request_of([encoded_png((2048, 2048))] * 3),
    "also lists that take more room when they are read": lambda: b'{"prompts": [' + b"[]," * 13_000_000 + b"[]]}",
    "also numbers": lambda: b'{"images": [' + b"0," * 19_000_000 + b"0]}",
    "also very many images": lambda: request_of([encoded_png((1, 1))] * 5000),
    "also a long prompt": lambda: request_of([encoded_png((1, 1))], "a" * 30_000_000),
}


@pytest.fixture(scope="module")
def server_of_its_own():
    """The URL and the process of a server, whose memory is nobody else's."""
    code = (
        "from texforce import server\n"
        "server = server.make_server(lambda images, prompts: images[:, 0, 0, 0], 0)\n"
        "print(server.server_port, flush=True)\nserver.serve_forever()\n"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/score", process.pid
        finally:
            process.kill()


def most_memory(pid: int) -> int:
    """Bytes of memory that a process has had at most."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells what memory a process has had")
@pytest.mark.parametrize("case", TOO_MUCH)
def test_a_request_beyond_a_limit_is_answered_with_413_and_takes_less_than_a_gibibyte(server_of_its_own, case):
    url, pid = server_of_its_own
    status, content = post(url, TOO_MUCH[case]())
    assert (status, "may have" in content["error"]) == (413, True)
    assert most_memory(pid) < 2**30
    assert post(url, request_of([encoded_png((8, 8))])) == (200, {"scores": [0.0]})


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells what memory a process has had")
def test_as_many_pixels_and_bytes_as_the_limits_allow_take_less_than_a_gibibyte(server_of_its_own):
    url, pid = server_of_its_own
    assert post(url, request_of([encoded_png((2048, 2048))] * 2))[0] == 200
    announced = b"POST /score HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % serving.MAX_REQUEST_BYTES
    waiting = [connected(url, announced + bytes(serving.MAX_REQUEST_BYTES - 1)) for _ in range(4)]
    assert status_of(connected(url, announced)) == 503  # there is no room for a fifth
    strange = '{"prompts": ["\U0001f6a9"], "images": ["' + "A" * 39_000_000 + '"]}'  # text of four bytes a letter
    for connection in waiting:
        connection.close()
    while (status := post(url, strange.encode())[0]) == 503:
        time.sleep(0.05)
    assert status == 400
    assert most_memory(pid) < 2**30


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "+5", "1_0", "4e3", "\xb2", str(2**40), ""], ids=[
    "of 5,000 digits", "also negative", "also with a sign", "also with an underscore", "also with an exponent",
    "also of a raised digit", "also of a tebibyte", "also none",
])  # fmt: skip
def test_a_content_length_that_is_none_is_answered_with_413(served, length):
    assert (
        status_of(connected(served, f"POST /score HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{{}}".encode("latin-1")))
        == 413
    )
    assert ask(served).isfinite().all()


def test_a_refusal_reaches_a_client_that_is_still_sending(served):
    connection = connected(served, b"POST /score HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n" + bytes(10_000_000))
    connection.shutdown(socket.SHUT_WR)
    assert status_of(connection) == 413


def test_clients_that_are_too_many_are_answered_with_503_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(serving, "MAX_CLIENTS", 3)
    server = serving.make_server(brightness, 0)
    with running(server) as url:
        idle = [connected(url) for _ in range(3)]
        while server.num_clients < 3:
            time.sleep(0.01)
        num_threads = threading.active_count()
        assert [status_of(connected(url)) for _ in range(10)] == [503] * 10
        assert threading.active_count() <= num_threads + 1
        idle.pop().close()
        assert rewards.Remote(url, 10.0, backoff=0.05)(eight_bit_images(3), PROMPTS).isfinite().all()  # 503 is tried again


@pytest.mark.quick(1)
@pytest.mark.parametrize("sent", [
    b"", b"POST /sc", b"POST /score HTTP/1.1\r\nContent-Length: 100\r\n\r\n{",
    b"POST /score HTTP/1.1\r\nX: ",
], ids=["nothing", "also half a line", "half a request", "also half a header"])  # fmt: skip
def test_a_client_that_drips_is_answered_with_408_when_its_time_is_over(monkeypatch, sent):
    monkeypatch.setattr(serving, "SECONDS_TO_SEND", 0.6)
    with running(serving.make_server(brightness, 0)) as url:
        connection, start = connected(url, sent), time.monotonic()
        while sent and not select.select([connection], [], [], 0.1)[0]:
            connection.sendall(b"a")  # each byte within any time that a single one may take
        assert status_of(connection) == 408
        assert 0.5 < time.monotonic() - start < 10
        assert ask(url).isfinite().all()


def test_more_images_than_a_request_may_hold_are_sent_in_several(monkeypatch):
    images = eight_bit_images(5)
    with running(serving.make_server(brightness, 0)) as url:
        monkeypatch.setattr(rewards, "MAX_REQUEST_PIXELS", 2 * images[0, 0].numel())
        prompts = ["a", "b", "nan", "d", "e"]
        torch.testing.assert_close(rewards.load_reward(url)(images, prompts), brightness(images, prompts), equal_nan=True)


def test_a_client_that_leaves_is_no_bug_with_a_traceback(served, capsys):
    for sent in (b"", b"GET / HTTP/1.1\r\n", b"POST /score HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"):
        connection = connected(served, sent)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # so that it ends by a reset
        connection.close()
    assert ask(served).isfinite().all()
    assert "Traceback" not in capsys.readouterr().err


def test_png_keeps_eight_bits_and_any_shape():
    image = eight_bit_images(1, 5, 9)[0]
    torch.testing.assert_close(serving.decode_png(rewards.encode_png(image)), image)
    assert torch.equal(
        serving.decode_png(rewards.encode_png(2 * image - 0.5)),
        scorers.to_bytes((2 * image - 0.5)[None])[0].permute(2, 0, 1) / 255,
    )


# --- texforce serve ---


def test_the_command_serves_until_it_is_terminated(monkeypatch):
    served, original = {}, serving.make_server

    def ask_and_terminate(url: str) -> None:
        try:
            served[url] = ask(url)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def make_server(scorer, port, host):
        server = original(scorer, port, host)
        threading.Thread(target=ask_and_terminate, args=(f"http://{host}:{server.server_port}/score",)).start()
        return server

    monkeypatch.setattr(serving, "make_server", make_server)
    previous = signal.signal(signal.SIGTERM, lambda *_: None)  # should the command have ended before
    try:
        result = invoke("serve", "jpeg", "--port", "0")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert (result.exit_code, result.stderr.strip()) == (143, "error: terminated")
    ((url, scores),) = served.items()
    assert result.stdout == f"jpeg at {url}\n"
    torch.testing.assert_close(scores, rewards.load_reward("jpeg")(eight_bit_images(3), PROMPTS))


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["hsp"], 2, "unknown name 'hsp'"),
    (["jpeg", "--device", "foo"], 2, "device: must be cpu, cuda or cuda:N, not 'foo'"),
    (["jpeg", "--device", "meta"], 2, "device: must be"), (["absent.py:score"], 2, "no file 'absent.py'"),
    (["jpeg", "--device", "cuda:99"], 2, "device: there is no 'cuda:99'"),
    (["jpeg", "--port", "70000"], 2, "port: must be from 0 to 65535, not 70000"),
    (["jpeg", "--host", "203.0.113.1"], 2, "port: 203.0.113.1:8000 cannot be listened at"),
    (["hps", "--reward-checkpoint", "absent.pt"], 2, "absent.pt"),
    (["hps", "--reward-checkpoint", __file__], 3, "refused"),
])  # fmt: skip
def test_a_server_that_cannot_start_says_why(arguments, code, words):
    result = invoke("serve", *arguments)
    assert result.exit_code == code, result.output
    assert words in result.stderr


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = invoke("serve", "jpeg", "--port", str(port))
    assert result.exit_code == 2
    assert f"port: 127.0.0.1:{port} cannot be listened at: Address already in use" in result.stderr


def test_a_server_names_a_gpu_that_is_not_there_before_it_loads_anything(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(rewards, "load_reward", lambda *arguments: pytest.fail("it was loaded"))
    result = invoke("serve", "jpeg", "--device", "cuda")
    assert result.exit_code == 2
    assert "device: there is no 'cuda'; PyTorch finds 0 GPU(s) here" in result.stderr


@pytest.mark.parametrize("error", [MemoryError("no memory"), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_a_server_answers_a_lack_of_memory_with_500(error):
    def exhausted(images, prompts):
        raise error

    body = json.dumps({"prompts": ["a"], "images": [rewards.encode_png(torch.rand(3, 8, 8))]}).encode()
    status, content = serving.answer(exhausted, body)
    assert (status, "out of memory" in content["error"]) == (500, True)


def test_lack_of_memory_gets_no_advice_of_options_that_a_command_lacks(monkeypatch):
    def exhausted(*arguments):
        raise MemoryError("no memory")

    monkeypatch.setattr(rewards, "load_reward", exhausted)
    result = invoke("serve", "jpeg")
    assert (result.exit_code, result.stderr.strip()) == (5, "error: out of memory (no memory)")
