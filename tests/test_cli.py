"""The command line: exit codes and messages, what a run leaves behind, and what reaches the terminal."""

import http.server
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import texforce
from texforce import cli, eval_checks, hub, models, reward_specs, rewards, sampler, training, views
from texforce import server as serving
from texforce.config import TrainConfig, TrainOptions, resolve
from texforce.draw_config import (
    DrawConfig,
    EvalConfig,
    EvalOptions,
    MergeConfig,
    SampleConfig,
    SampleOptions,
    resolve_eval,
    resolve_sample,
)
from texforce.errors import DivergedError, InputError, RewardError
from texforce.flags import TRAIN_GROUPS
from texforce.options import option_fields
from texforce.presets import PRESETS
from texforce.prompt_sets import read_benchmark
from texforce.run import model_card as write_card

from .commands import check_failure, flags, invoke

ROOT = Path(__file__).parents[1]
WEIGHTS = "adapter_model.safetensors"
NO_GPU = not torch.cuda.is_available()


@pytest.fixture
def small_run(small_run, monkeypatch) -> dict:
    """Options of a training of two denoising steps that draws no curve."""
    monkeypatch.setattr("texforce.run.write_curve", lambda *arguments: None)
    return small_run | {"num_inference_steps": 2}


@pytest.fixture
def without_pyiqa(monkeypatch):
    monkeypatch.setattr(reward_specs, "missing_packages", lambda name: ["pyiqa"] if name == "face" else [])


def squash(text: str) -> str:
    """Text without what a terminal's width decides: white space and frames."""
    return re.sub(r"[\s│╭╮╰╯─]", "", text)


def run_train(small_run: dict, *arguments: object, **options: object) -> Result:
    own = {"reward"} if "--reward" in arguments else set[str]()  # which is given once
    return invoke(
        "train", *flags({name: value for name, value in (small_run | options).items() if name not in own}), *arguments
    )


@pytest.fixture(scope="module")
def trained(shared_run, tmp_path_factory) -> tuple[Path, Result]:
    """A training by the command line, and what it said."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    options = shared_run | {"reward": "hps", "num_epochs": 2, "eval_every": 2, "output_dir": folder, "seed": 11}
    return folder, invoke("train", *flags(options))


@pytest.fixture
def adapter(trained) -> Path:
    return trained[0]


@pytest.fixture(scope="module")
def trained_by_jpeg(shared_run, tmp_path_factory) -> bytes:
    """The adapter of a small run."""
    folder = tmp_path_factory.mktemp("jpeg")
    result = run_train(shared_run | {"num_inference_steps": 2}, output_dir=folder / "out")
    assert result.exit_code == 0, result.output
    return (folder / "out" / WEIGHTS).read_bytes()


# --- help ---


def python(program: str, *arguments: object) -> subprocess.CompletedProcess:
    """A fresh process that runs a program where the package lies."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_help_takes_at_most_three_seconds_and_loads_neither_torch_nor_what_builds_on_it():
    heavy = ("torch", "diffusers", "transformers", "peft", "open_clip", "numpy", "PIL", "matplotlib", "datasets")
    program = f"""
import sys, time
from texforce.cli import app
try:
    app(["--help"])
except SystemExit as exit:
    print([m for m in sys.modules if m.partition(".")[0] in {heavy}], exit.code, time.process_time())
"""
    result = python(program)
    assert "train" in result.stdout, result.stderr
    modules, code, seconds = result.stdout.splitlines()[-1].rsplit(" ", 2)
    assert (modules, code) == ("[]", "0")
    assert float(seconds) <= 3  # of computing, which other processes do not disturb


@pytest.mark.slow
def test_the_package_is_whole_though_torch_is_imported_before_it():
    loaded_late = "sampler.Schedule, texforce.ppo_loss(*torch.rand(3, 2), 0.1)"
    result = python(f"import torch, texforce; from texforce import sampler; {loaded_late}")
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def fresh_process(trained, shared_run, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """A process that imports diffusers after the package, trains as `trained` did, and then by a function that hangs."""
    folder = tmp_path_factory.mktemp("fresh")
    reward = reward_file(folder, "    import time\n    time.sleep(600)")
    hanging = shared_run | {"output_dir": folder / "hanging", "reward": reward, "reward_timeout": 0.5}
    program = f"""
import texforce, diffusers, torch
from texforce import cli, eval_checks, sampler
sampler.Schedule, texforce.ppo_loss(*torch.rand(3, 2), 0.1)
print("the package is whole", flush=True)
try:
    cli.app({["train", "--config", str(trained[0] / "config.json"), "--output-dir", str(folder / "out")]})
except SystemExit as exit:
    print("the training ended with", exit.code, flush=True)
cli.app({["train", *flags(hanging)]})
"""
    return python(program), folder


@pytest.mark.slow
@pytest.mark.slow
def test_the_package_is_whole_though_diffusers_is_imported_before_what_it_loads_late(fresh_process):
    assert "the package is whole" in fresh_process[0].stdout, fresh_process[0].stderr


def test_help_shows_the_commands_that_there_are():
    result = invoke("--help")
    commands = re.findall(r"^  (\w+)  ", result.stdout, flags=re.MULTILINE)
    assert commands == ["train", "sample", "merge", "eval", "rewards", "serve"]
    assert invoke("merge").exit_code == invoke("evaluate").exit_code == 2
    assert "2 bad input" in result.stdout
    assert "143" in result.stdout


@pytest.mark.parametrize(
    ("command", "config"), [("train", TrainConfig), ("sample", SampleConfig), ("merge", MergeConfig), ("eval", EvalConfig)]
)
def test_help_holds_every_option_with_its_text_and_default(command, config):
    shown = squash(invoke(command, "--help" if command == "merge" else "--help-all").stdout)
    for item in option_fields(config):
        assert f"--{item.name.replace('_', '-')}" in shown
        assert squash(item.metadata["help"]) in shown
        default = None if item.default is MISSING else item.default
        families = ("tiny", "stable-diffusion", "turbo", "sdxl") if config is TrainConfig else ()
        values = [PRESETS[family, "default"].get(item.name, default) for family in families] or [default] * 4
        if values[0] is not None:
            tiny, large, turbo, xl = values
            text = f"{tiny}; Stable Diffusion {large}" if large != tiny else f"{tiny}"
            text += f"; Turbo {turbo}" if turbo != large else ""
            text += f"; SDXL {xl}" if xl != large else ""
            assert squash(f"{item.metadata['help']} (default: {text})") in shown


@pytest.mark.parametrize(("arguments", "most"), [
    (["train", "-h"], 60), (["train", "--help-all"], 260), (["sample", "-h"], 40), (["sample", "--help-all"], 100),
    (["merge", "-h"], 40), (["eval", "-h"], 60), (["eval", "--help-all"], 115), (["-h"], 40), (["rewards", "-h"], 20),
    (["serve", "-h"], 30),
])  # fmt: skip
def test_help_fits_eighty_columns_and_cuts_no_name(arguments, most):
    lines = invoke(*arguments, columns=80).stdout.splitlines()
    assert len(lines) <= most
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_how_images_are_drawn_is_for_the_whole_help(command):
    short, whole = (invoke(command, option, columns=80).stdout for option in ("--help", "--help-all"))
    for name in (item.name for item in option_fields(DrawConfig) if item.name != "model"):
        flag = f"--{name.replace('_', '-')}"
        assert re.search(rf"^  {flag}\b", whole, re.MULTILINE)
        assert not re.search(rf"^  {flag}\b", short, re.MULTILINE)
    assert re.search(r"\d+ further options: --help-all", short)
    assert "further" not in whole


@pytest.mark.parametrize("command", ["train", "sample", "merge", "eval", "rewards", "serve"])
def test_help_begins_with_examples_that_can_be_typed(command):
    examples = re.findall(r"^  texforce (.+)", invoke(command, "-h").stdout, re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        name, *arguments = shlex.split(example)
        assert name == command
        typer.main.get_command(cli.app).commands[name].make_context(name, arguments)


@pytest.mark.parametrize(("typed", "offered"), [
    ("train --algorithm ", ["ppo", "matching", "gradient"]), ("train --reward image", ["imagereward"]),
    ("sample --sampler eu", ["euler"]), ("eval --benchmark dr", ["drawbench"]), ("merge --format k", ["kohya"]),
    ("train --reward hps --reward jp", ["jpeg"]),
])  # fmt: skip
def test_the_shell_completes_values(typed, offered, monkeypatch):
    words = ["texforce", *typed.split(" ")]
    for name, value in (("_TEXFORCE_COMPLETE", "complete_bash"), ("COMP_WORDS", f"texforce {typed}"),
                        ("COMP_CWORD", str(len(words) - 1))):  # fmt: skip
        monkeypatch.setenv(name, value)
    assert CliRunner().invoke(cli.app, prog_name="texforce").stdout.split() == offered


def test_every_option_of_train_is_in_one_group_of_its_help():
    grouped = [name for names in TRAIN_GROUPS.values() for name in names]
    own = {"config", "dry_run", "resume", "force_resume", "trust_reward_code"}
    assert sorted(grouped) == sorted({item.name for item in option_fields(TrainConfig)} | own)


@pytest.mark.parametrize(("command", "typed", "here"), [
    ("train", "--lr", "--learning-rate"), ("train", "--epochs", "--num-epochs"), ("train", "--lora_rank", "--rank"),
    ("train", "--batch-size", "--sample-batch-size"), ("train", "--learning-rte", "--learning-rate"),
    ("merge", "--output", "--output-dir"), ("sample", "--scale", "--strength"), ("eval", "--scale", "--strength"),
    ("merge", "--unet-scale", "--unet-strength"),
    ("sample", "--steps", "--num-inference-steps"), ("eval", "--lora", "--adapter"),
    ("train", "--text_encoder_lr", "--learning-rate"), ("train", "--train_data_dir", "--prompts"),
])  # fmt: skip
def test_an_option_that_is_called_otherwise_elsewhere_is_named_as_it_is_here(command, typed, here):
    result = invoke(command, typed, "1")
    assert result.exit_code == 2
    assert re.search(rf"No such option:? {typed}.*{here}", result.output, flags=re.DOTALL)


@pytest.mark.parametrize(("arguments", "value"), [
    (["train", "--learning-rate", "1e-4x"], "1e-4x"), (["train", "--num-epochs=3.5"], "3.5"),
    (["train", "--num-epochs", "3", "--num-epochs=x"], "x"), (["train", "--num-epochs=3", "--num-epochs", "x"], "x"),
    (["serve", "hps", "--port", "a"], "a"),
])  # fmt: skip
def test_a_value_that_is_no_number_is_repeated(arguments, value):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert re.search(rf"--[a-z-]+': '{value}'\. Input should be a valid", result.output)


@pytest.mark.parametrize("command", ["train", "sample", "merge", "eval", "rewards", "serve"])
def test_every_command_takes_help_all(command):
    result = invoke(command, "--help-all")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_a_bad_value_is_told_before_a_folder_that_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    for bad in ("--reward", "hsp"), ("--learning-rate", "-1"), ("--num-epochs", "0"), ("--algorithm", "pp0"):
        result = invoke("train", "--model", "tiny", *bad, "--output-dir", tmp_path / "out")
        check_failure(result, 2, f"error: {bad[0]}: ")
    result = invoke("train", "--model", "tiny", "--output-dir", tmp_path / "out")
    check_failure(result, 2, "--output-dir", "is not empty")


def test_a_message_is_one_line_where_it_is_not_on_a_terminal(tmp_path):
    name = "very/long/" * 20 + "name.json"
    result = invoke("train", "--config", name)
    assert result.stderr.splitlines() == [f"error: --config: there is no file '{name}'"]


@pytest.mark.parametrize("command", ["sample", "merge"])
@pytest.mark.parametrize("name", ["notes.txt", "config.json", "adapter.bin"])
def test_a_text_is_no_adapter(command, name, tmp_path):
    (tmp_path / name).write_text("{}" if name.endswith("json") else "hello")
    prompt = ["--prompt", "a"] if command == "sample" else []
    result = invoke(command, "--adapter", str(tmp_path / name), *prompt, "--output-dir", str(tmp_path / "out"))
    check_failure(result, 3, "refused as an adapter: it holds no weights")


@pytest.mark.parametrize(("arguments", "meant"), [
    (["train", "--reward", "hsp"], "hps"), (["train", "--reward", "hps=1,astetic=1"], "aesthetic"),
    (["train", "--prompts", "wolrd"], "world"), (["train", "--eval-reward", "hsp"], "hps"),
    (["train", "--model", "tinny"], "tiny"), (["train", "--relabel", "wrld"], "world"),
    (["train", "--algorithm", "machting"], "matching"),
    (["train", "--target", "text_encoder"], "text-encoder"), (["train", "--prompts", "world,comon"], "common"),
    (["eval", "--benchmark", "drawbnech"], "drawbench"), (["train", "--reward", "mine.py:brightnes"], "brightness"),
    (["merge", "--adapter", "out", "--format", "koyha"], "kohya"), (["train", "--reward", "HPS"], "hps"),
])  # fmt: skip
def test_a_value_that_is_nearly_right_is_asked_for(arguments, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    check_failure(invoke(*arguments), 2, f"did you mean {meant!r}?", "error: " + (arguments[-2] + ":"))


@pytest.mark.parametrize("arguments", [
    ["train", "--num-epochs", "0"], ["train", "--reward", "hsp"], ["train", "--reward", "hps=1,astetic=1"],
    ["train", "--eval-reward", "hsp"], ["train", "--prompts", "wolrd"], ["train", "--heldout-prompts", "nowhere.txt"],
    ["train", "--resume", "nowhere"], ["sample", "--prompt", "a", "--adapter", "nowhere"], ["merge", "--unet", "nowhere"],
    ["merge", "--adapter", "nowhere"], ["eval", "--reward", "hsp"], ["eval", "--adapter", "nowhere"],
], ids=" ".join)  # fmt: skip
def test_what_is_mistyped_is_told_before_pytorch_loads_and_before_anything_is_written(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("texforce.config.default_device", lambda: pytest.fail("PyTorch was asked for"))
    check_failure(invoke(*arguments), 2, arguments[-1].partition("=")[0].removeprefix("hps") or "astetic")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_run_is_told_before_a_new_one_begins_there(tmp_path, monkeypatch):
    said: list[str] = []
    assert cli.resumed_options(tmp_path / "nope", {"reward": "jpeg"}, said.append)["output_dir"] == str(tmp_path / "nope")
    assert said == [f"there is no run in {str(tmp_path / 'nope')!r}, so a new one begins there"]


@pytest.mark.parametrize(("held", "words"), [("config.json", "--resume"), ("photo.jpg", "choose another folder")])
def test_only_a_run_in_the_way_is_one_to_go_on_with(tmp_path, held, words):
    (tmp_path / held).write_text("{}")
    result = invoke("train", "--model", "tiny", "--output-dir", tmp_path)
    check_failure(result, 2, "--output-dir: ", "is not empty", words)
    assert ("--resume" in result.stderr) == (held == "config.json")


BAD = [
    "sample --prompt a --adapter nowhere", "sample --prompt a --adapter full:x",
    "merge --adapter full:1,5", "sample --prompts wolrd", "sample --prompt a --model ./nowhere",
    "train --algorithm ppo --eta 0", "train --model tiny --num-updates-per-epoch 1000", "train --report-to wandb",
    "train --model ./nowhere", "train --reward absent.py:f", "train --reward mine.py:g", "train --relabel mine.py:g",
    "train --eval-reward hsp", "train --output-dir full", "train --resume nowhere",
    "train --algorithm matching --adapter-steps 0.9-1",
    "train --target unet --num-tokens 3", "train --reward hps --reward jpeg", "train --reward=hps --reward=jpeg",
    "train --eval-reward hps,clip", "eval --benchmark drawbnech", "eval --reward mine.py:g",
    "merge --adapter nowhere", "rewards hsp", "serve hsp", "train --clip-range 0.1", "train --reward face",
    # What the files of the model, the reward or the prompts say.
    "train --lora-layers first:9", "train --lora-modules to_q", "train --resolution 33", "sample --prompt a --resolution 33",
    "train --text-encoders text_encoder_2", "train --target tokens --num-tokens 100", "sample --prompt a --clip-skip 9",
    "train --model tiny-flow --target unet", "train --model tiny-flow --lora-layers first:9",
    "train --reward jpeg --algorithm gradient", "train --reward mine.py:f --algorithm gradient", "train --reward hps-v2",
    "train --reward ocr", "train --reward alignment --prompts general", "train --relabel world --prompts faces",
    "train --reward broken.py:f", "train --reward foreign.py:f", "train --reward-checkpoint nowhere.pt",
    "eval --reward alignment --benchmark general", "eval --resolution 33", "eval --exact-preprocessing --reward jpeg",
    "eval --output-dir full", "eval --output-dir begun --limit 24", "eval --output-dir begun --num-images 2",
]  # fmt: skip


@pytest.mark.skipif(not NO_GPU, reason="whether there is a GPU only PyTorch knows")
def test_bad_input_takes_at_most_a_second_and_loads_nothing_heavy(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "mine.py").write_text("def f(images, prompts): return [0] * len(prompts)")
    (tmp_path / "broken.py").write_text("def f(images, prompts) return 0")
    (tmp_path / "foreign.py").write_text("import no_such_package\n\ndef f(images, prompts): return 0")
    (tmp_path / "begun").mkdir()
    begun = eval_checks.describe_drawing(resolve_eval(EvalOptions(model="tiny")), read_benchmark("world"))
    (tmp_path / "begun" / eval_checks.SETTINGS).write_text(json.dumps(begun))
    program = f"""
import os, sys, time
from texforce.cli import app
os.chdir({str(tmp_path)!r})
for line in {BAD}:
    start = time.process_time() if line != {BAD[0]!r} else 0
    try:
        app(line.split())
    except SystemExit as exit:
        print(exit.code, "torch" in sys.modules, time.process_time() - start)
"""
    told = [line.split() for line in python(program).stdout.splitlines()]
    assert [(code, loaded) for code, loaded, _ in told] == [("2", "False")] * len(BAD)
    assert max(float(seconds) for _, _, seconds in told) <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "broken.py", "foreign.py", "full", "mine.py"]
    assert [path.name for path in (tmp_path / "begun").iterdir()] == [eval_checks.SETTINGS]


def test_the_version_is_shown():
    assert invoke("--version").stdout.strip() == f"texforce {texforce.__version__}"


def readme_block(words: str) -> str:
    """The Python code in the README that holds some words."""
    blocks = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return next(block for block in blocks if words in block)


def test_the_readmes_commands_work_as_printed(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(readme_block("def brightness"))
    commands = re.findall(
        r"^(?:pip .* && )?texforce ((?:train|sample|merge|eval) .+?)(?:  +#.*)?$",
        (ROOT / "README.md").read_text(),
        flags=re.MULTILINE,
    )
    assert len(commands) >= 10
    for number, command in enumerate(commands):
        arguments = [re.sub(r"(^|=)out(?=$|:)", rf"\g<1>{adapter}", text) for text in shlex.split(command)]
        if arguments[0] == "train":
            arguments += ["--model", "tiny", "--dry-run"]
        if arguments[0] == "eval":
            arguments = ["--limit=2" if text == "drawbench" else text for text in arguments if text != "--benchmark"]
            arguments += ["--num-inference-steps", "1", "--limit", "2"]
        result = invoke(*arguments, "--output-dir", tmp_path / str(number))
        assert result.exit_code == 0, (command, result.output)


def test_the_readmes_python_draws_an_image(adapter):
    code = readme_block("StableDiffusionPipeline")
    names: dict = {}
    exec(code.replace('"out"', repr(str(adapter))).replace('"tiny"', repr(str(models.TINY))), names)  # noqa: S102
    assert names["image"].size == (32, 32)


# --- bad input ---


def test_prompts_that_the_worlds_captions_are_not_for_are_refused_before_the_training(tmp_path):
    result = invoke("train", "--model", "tiny", "--relabel", "world", "--prompts", "faces", "--output-dir", tmp_path / "out")
    check_failure(result, 2, "--relabel: world", "a portrait of")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("arguments", "words"), [
    (["--algorithm", "matching", "--clip-range", "0.1"], ["--clip-range", "ppo", "matching"]),
    (["--algorithm", "ppo", "--backprop-steps", "2"], ["--backprop-steps", "gradient", "ppo"]),
    (["--algorithm", "gradient", "--reward", "jpeg"], ["jpeg", "no gradients", "hps"]),
    (["--algorithm", "gradient", "--reward", "hps=1,http://a:1/score=1"], ["http://a:1/score", "no gradients"]),
    (["--algorithm", "ppo", "--relabel-weight", "0.5"], ["--relabel-weight", "matching", "ppo"]),
    (["--relabel", "wrold"], ["--relabel: must be world", "did you mean 'world'"]),
    (["--relabel", "absent.py:f"], ["--relabel: there is no file 'absent.py'"]),
])  # fmt: skip
def test_options_and_rewards_of_another_algorithm_are_refused_by_name(tmp_path, arguments, words):
    result = invoke("train", "--model", "tiny", *arguments, "--output-dir", tmp_path / "out")
    check_failure(result, 2, *words)
    assert not (tmp_path / "out" / "config.json").exists()


BAD_TRAINING = [
    (["--reward", "beauty"], ["'beauty'", "hps", "hps-v2", "alignment", "jpeg", "incompress", "path/to/file.py:function"]),
    (["--reward", "absent.py:reward"], ["absent.py"]),
    (["--prompts", "absent.txt"], ["absent.txt", "composition"]),
    (["--prompts", "EMPTY"], ["empty.txt", "holds no prompt"]),
    (["--heldout-prompts", "absent.txt"], ["absent.txt"]),
    (["--model", "./nowhere"], ["./nowhere"]),
    (["--model", "./nowhere", "--reward", "hps"], ["./nowhere"]),
    (["--model", "nobody/no-such-model"], ["nobody/no-such-model"]),
    (["--reward", "hps", "--reward-checkpoint", "absent.pt"], ["absent.pt"]),
    (["--eta", "0"], ["eta", "above 0"]),
    (["--sampler", "dpm-solver"], ["sampler", "ddim", "ppo"]),
    (["--algorithm", "matching", "--sampler", "dpm-solver", "--eta", "1"], ["eta", "dpm-solver", "not 1"]),
    (["--algorithm", "dpo"], ["algorithm", "ppo, matching, gradient"]),
    (["--null-anchor", "1", "--anchor-prompts", "absent.txt"], ["absent.txt"]),
    (["--eta", "1.5"], ["eta"]),
    (["--timestep-fraction", "0"], ["--timestep-fraction"]),
    (["--timestep-window", "0"], ["--timestep-window"]),
    (["--num-samples-per-prompt", "1"], ["--num-samples-per-prompt"]),
    (["--num-epochs", "0"], ["--num-epochs"]),
    (["--num-updates-per-epoch", "9"], ["--num-updates-per-epoch", "8 images"]),
    (["--lr-warmup-steps", "2"], ["--lr-warmup-steps", "2 optimizer steps"]),
    (["--reward", "jpeg", "--reward-checkpoint", "hps.pt"], ["--reward-checkpoint", "jpeg"]),
    (["--reward", "hps=1,jpeg=1", "--reward-checkpoint", "hps.pt"], ["--reward-checkpoint", "NAME=PATH"]),
    (["--reward", "hps,jpeg"], ["mixture", "NAME=WEIGHT"]),
    (["--reward", "hps=1,hsp=2"], ["hsp", "imagereward"]),
    (["--reward", "hps=1,jpeg=x"], ["mixture", "jpeg=x"]),
    (["--eval-reward", "hsp"], ["hsp", "imagereward"]),
    (["--eval-reward", "absent.py:f"], ["absent.py"]),
    (["--eval-reward", "face"], ["pyiqa", "pip install pyiqa"]),
    (["--reward", "pickscore"], ["PickScore", "--reward-checkpoint pickscore=PATH"]),
    (["--reward", "clip", "--reward-checkpoint", "LICENSE"], ["LICENSE", "folder"]),
    (["--eval-reward", "ocr"], ["ocr", "quotation marks"]),
    (["--reward-timeout", "0"], ["--reward-timeout"]),
    (["--relabel", "world"], ["--relabel", "matching"]),
    (["--reward", "none"], ["--reward: none", "--relabel"]),
    (["--eval-reward", "none"], ["'none'", "hps"]),
    (["--normalise-rewards", "--preset", "paper"], ["--normalise-rewards", "leave-one-out"]),
    (["--reward", "http://host:abc/score"], ["http://host:abc/score", "is no URL"]),
    (["--reward-timeout", "1e10"], ["--reward-timeout"]),
    (["--eval-reward", "alignment", "--prompts", "HORSES"], ["a red horse", "tiny world"]),
    (["--prompts", "SAME", "--heldout-prompts", "SAME"], ["same.txt", "held out"]),
    (["--reward", "alignment", "--prompts", "HORSES"], ["a red horse", "tiny world"]),
    (["--num-inference-steps", "1001"], ["--num-inference-steps"]),
    (["--rank", "0"], ["rank"]),
    (["--rank", "100000000"], ["rank", "1024"]),
    (["--seed", "-1"], ["seed"]),
    (["--seed", str(2**64)], ["seed"]),
    (["--resolution", "33"], ["resolution", "33"]),
    (["--target", "vae"], ["target", "text-encoder, unet, both"]),
    (["--preset", "best"], ["preset"]),
    (["--null-prompt", "base", "--target", "unet"], ["--null-prompt"]),
    (["--learning-rate", "nan"], ["--learning-rate"]),
    (["--learning-rate", "inf"], ["--learning-rate"]),
    (["--clip-range", "nan"], ["--clip-range"]),
    (["--guidance-scale", "nan"], ["--guidance-scale"]),
    (["--guidance-scale", "inf"], ["--guidance-scale"]),
    (["--kl-weight", "nan"], ["--kl-weight"]),
    (["--kl-weight", "inf"], ["--kl-weight"]),
    (["--weight-decay", "nan"], ["--weight-decay"]),
    (["--weight-decay", "inf"], ["--weight-decay"]),
    (["--ema-decay", "1"], ["--ema-decay"]),
    (["--ema-decay", "nan"], ["--ema-decay"]),
]


def bad_files(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "binary.txt").write_bytes(b"a red circle\n\xff\xfe")
    (tmp_path / "same.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "horses.txt").write_text("a red circle\na red horse\n")
    return {name.upper(): str(tmp_path / f"{name}.txt") for name in ("empty", "same", "horses")}


@pytest.mark.parametrize(("arguments", "words"), BAD_TRAINING, ids=[" ".join(arguments) for arguments, _ in BAD_TRAINING])
def test_bad_input_to_train_is_named_in_a_line(small_run, tmp_path, without_pyiqa, arguments, words):
    files = bad_files(tmp_path)
    result = run_train(small_run, *[files.get(text, text) for text in arguments], output_dir=tmp_path / "out")
    check_failure(result, 2, *words)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_prompts_file_that_is_no_text_is_named(small_run, tmp_path):
    bad_files(tmp_path)
    check_failure(
        run_train(small_run, output_dir=tmp_path / "out", prompts=tmp_path / "binary.txt"), 2, "binary.txt", "UTF-8"
    )


def test_a_short_run_does_not_spend_its_steps_on_the_warm_up():
    for num_epochs, expected in ((1, 0), (5, 0), (12, 0), (50, 5), (140, 10), (1000, 10)):
        assert resolve(TrainOptions(model="tiny", algorithm="ppo", num_epochs=num_epochs)).lr_warmup_steps == expected
    assert resolve(TrainOptions(model="tiny", algorithm="ppo", num_epochs=5, lr_warmup_steps=4)).lr_warmup_steps == 4


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_stable_diffusion_is_trained_in_bfloat16_on_a_cpu_that_has_it(monkeypatch):
    for has_it, precision, size in ((True, "bf16", 4), (False, "no", 8)):
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda has_it=has_it: has_it)
        config = resolve(TrainOptions(model="some/model"))
        assert (config.mixed_precision, config.micro_batch_size, config.sample_batch_size) == (precision, 4, size)
        assert resolve(TrainOptions(model="tiny")).mixed_precision == "no"
        assert resolve(TrainOptions(model="some/model", mixed_precision="no")).sample_batch_size == 8
    for given in ("sample_batch_size", "micro_batch_size"):
        config = resolve(TrainOptions(model="some/model", mixed_precision="bf16", **{given: 2}))
        assert (config.micro_batch_size, config.sample_batch_size) == (2, 2)


def test_fp16_without_a_gpu_is_refused(small_run, tmp_path):
    check_failure(run_train(small_run, output_dir=tmp_path / "out", mixed_precision="fp16"), 2, "--mixed-precision", "bf16")
    result = invoke("sample", "--prompt", "a red circle", "--mixed-precision", "fp16", "--output-dir", tmp_path / "images")
    check_failure(result, 2, "--mixed-precision")


def test_an_output_folder_that_is_not_empty_is_left_as_it_is(small_run, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("of value")
    check_failure(run_train(small_run, output_dir=folder), 2, "--output-dir", "mine", "not empty")
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    assert (folder / "thesis.txt").read_text() == "of value"


def test_an_output_folder_that_cannot_be_made_is_a_storage_error(small_run, tmp_path):
    check_failure(run_train(small_run, output_dir="/proc/out"), 5, "storage", "/proc")


BAD_CONFIGS = {
    "foreign field": ('{"epochs": 3}', ["epochs"]),
    "malformed": ('{"num_epochs": 3', ["not JSON"]),
    "misspelt": ('{"lerning_rate": 1.0}', ["lerning_rate; did you mean 'learning_rate'?"]),
    "list": ("[1]", ["JSON object"]),
    "nested": ("[" * 100_000, [""]),
    "text for a count": ('{"num_epochs": "three"}', ["num_epochs"]),
    "share of a count": ('{"num_epochs": 1.5}', ["num_epochs"]),
    "text for a number": ('{"learning_rate": "fast"}', ["learning_rate"]),
    "number for a file": ('{"prompts": 5}', ["prompts"]),
    "text for a switch": ('{"gradient_checkpointing": "no"}', ["gradient_checkpointing"]),
    "list for a choice": ('{"target": ["unet"]}', ["target"]),
    "NaN": ('{"eta": NaN}', ["eta"]),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_bad_config_file_is_named(small_run, tmp_path, name):
    content, words = BAD_CONFIGS[name]
    (tmp_path / "config.json").write_text(content)
    # The file's fields must not be overridden by flags.
    options = {key: value for key, value in small_run.items() if f'"{key}"' not in content}
    result = run_train(options, "--config", tmp_path / "config.json", output_dir=tmp_path / "out")
    check_failure(result, 2, *words)


def test_a_preset_over_a_whole_config_file_is_refused_and_not_passed_over(trained, tmp_path):
    arguments = ["--config", trained[0] / "config.json", "--output-dir", tmp_path / "again"]
    check_failure(invoke("train", *arguments, "--preset", "paper"), 2, "--preset or --config")
    assert not (tmp_path / "again").exists()


def test_a_preset_fills_in_what_a_file_of_a_few_options_leaves_open():
    for preset in ("paper", "default"):
        merged = cli.merge_options({"num_epochs": 1, "model": "tiny"}, {"preset": preset})
        assert resolve(TrainOptions(**merged)).num_inference_steps == PRESETS["tiny", preset]["num_inference_steps"]


@pytest.mark.parametrize(("given", "expected"), [
    ({"rank": 4}, {"rank": 4, "lora_alpha": 4, "lr_warmup_steps": 10}),
    ({"rank": 4, "lora_alpha": 2}, {"rank": 4, "lora_alpha": 2}),
    ({"num_epochs": 5}, {"num_epochs": 5, "lr_warmup_steps": 0}),
    ({"num_epochs": 5, "lr_warmup_steps": 3}, {"lr_warmup_steps": 3}),
    ({"target": "unet"}, {"target": "unet", "null_prompt": "adapted"}),
])  # fmt: skip
def test_what_follows_from_an_option_follows_anew_when_it_is_given_over_a_saved_config(given, expected):
    saved = asdict(resolve(TrainOptions(model="tiny", algorithm="ppo")))
    assert (saved["lora_alpha"], saved["lr_warmup_steps"], saved["null_prompt"]) == (16, 10, "base")
    config = resolve(TrainOptions(**cli.merge_options(saved, given)))
    assert {name: getattr(config, name) for name in expected} == expected


def test_no_null_prompt_is_anchored_where_a_saved_config_is_taken_to_the_unet():
    saved = asdict(resolve(TrainOptions(model="tiny")))
    config = resolve(TrainOptions(**cli.merge_options(saved, {"target": "unet"})))
    assert (saved["null_anchor"], config.null_anchor) == (1.0, 0.0)


def test_what_a_config_file_sets_apart_stays():
    saved = asdict(resolve(TrainOptions(model="tiny", lora_alpha=32, lr_warmup_steps=4, null_prompt="adapted")))
    config = resolve(TrainOptions(**cli.merge_options(saved, {"rank": 4, "num_epochs": 100})))
    assert (config.lora_alpha, config.lr_warmup_steps, config.null_prompt) == (32, 4, "adapted")


@pytest.mark.parametrize(("saved", "given", "expected"), [
    ({}, {"sampler": "dpm-solver"}, ("dpm-solver", 0.0)),
    ({"sampler": "dpm-solver"}, {}, ("dpm-solver", 0.0)),
    ({"sampler": "dpm-solver"}, {"sampler": "ddim"}, ("ddim", 1.0)),
    ({"eta": 0.5}, {}, ("ddim", 0.5)),
])  # fmt: skip
def test_eta_follows_from_the_sampler_that_is_given_over_a_saved_config(saved, given, expected):
    saved = asdict(resolve(TrainOptions(model="tiny", algorithm="matching", **saved)))
    config = resolve(TrainOptions(**cli.merge_options(saved, given)))
    assert (config.sampler, config.eta) == expected


@pytest.mark.parametrize(("model", "steps"), [("tiny", 8), ("a/sd", 20), ("a/sdxl", 20), ("a/sdxl-turbo", 4)])
def test_dpm_solver_takes_twenty_steps_of_stable_diffusion_where_ddim_takes_more(model, steps):
    for algorithm in ("matching", "gradient"):
        config = resolve(TrainOptions(model=model, algorithm=algorithm, sampler="dpm-solver", mixed_precision="no"))
        assert (config.num_inference_steps, config.eta) == (steps, 0.0)
    options = SampleOptions(model=model, prompt=["a red circle"], sampler="dpm-solver")
    assert (resolve_sample(options).num_inference_steps, resolve_sample(options).eta) == (steps, 0.0)


def test_null_in_a_config_file_is_as_if_the_option_was_not_given():
    assert resolve(TrainOptions(**cli.merge_options({"eta": None, "model": "tiny"}, {}))).eta == 1


def test_a_config_file_that_is_not_there_is_named(small_run, tmp_path):
    check_failure(run_train(small_run, "--config", "absent.json", output_dir=tmp_path / "out"), 2, "absent.json")


# --- failures ---


def reward_file(tmp_path: Path, body: str) -> str:
    path = tmp_path / "my_reward.py"
    path.write_text(f"import torch\n\ncalls = []\n\ndef reward(images, prompts):\n    calls.append(1)\n{body}\n")
    return f"{path}:reward"


def test_a_reward_that_is_always_nan_ends_with_six(small_run, tmp_path):
    reward = reward_file(tmp_path, "    return torch.full((len(images),), float('nan'))")
    check_failure(run_train(small_run, output_dir=tmp_path / "out", reward=reward), 6, "no finite score")


@pytest.mark.parametrize(("error", "call"), [("KeyError", 1), ("SystemExit", 1), ("ValueError", 2)])
def test_a_reward_that_raises_ends_with_six_and_its_words(small_run, tmp_path, call, error):
    body = f"    if len(calls) == {call}:\n        raise {error}('no such colour')\n    return images.mean(dim=(1, 2, 3))"
    result = run_train(small_run, output_dir=tmp_path / "out", reward=reward_file(tmp_path, body))
    check_failure(result, 6, error, "no such colour")


def breaking_function(scores: Callable[[int], Any]) -> Callable:
    """A reward that gives the scores of so many images, or breaks as they say."""

    def function(images, prompts):
        result = scores(len(images))
        if result == "hangs":
            time.sleep(20)
        elif result in ("raises", "ends the process", "is reset"):
            raise {"raises": KeyError, "ends the process": SystemExit, "is reset": ConnectionResetError}[result](result)
        return torch.tensor(result) if isinstance(result, list) else result

    return function


@contextmanager
def breaking_server(scores: Callable[[int], Any]) -> Iterator[str]:
    """The address of a server that does the same."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            result = scores(len(request["images"]))
            if result == "hangs":
                time.sleep(20)
            elif result in ("ends the process", "is reset"):
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self.send_response(500 if result == "raises" else 200)
                self.end_headers()
                self.wfile.write(json.dumps({"scores": result}).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/score"
        server.shutdown()


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["function", pytest.param("server", marks=pytest.mark.slow)])
@pytest.mark.parametrize("flaw", [
    "raises", "hangs", "gives too few", "gives words", "ends the process", "is reset", "gives NaN for all",
])  # fmt: skip
def test_a_reward_that_breaks_in_the_second_epoch_ends_with_six_and_the_adapter_saved(small_run, tmp_path, kind, flaw):
    """The first call is for the 2 held-out prompts, the second for the first epoch's 4 images, the third for the next's."""
    calls = []

    def scores(num_images: int) -> Any:
        calls.append(num_images)
        if len(calls) < 3:
            return [float(number) for number in range(num_images)]
        return {"gives too few": [1.0], "gives words": "good", "gives NaN for all": [math.nan] * num_images}.get(flaw, flaw)

    (tmp_path / "mine.py").write_text("reward = None\n")
    reward = f"{tmp_path / 'mine.py'}:reward"
    with breaking_server(scores) as address, pytest.MonkeyPatch.context() as patch:
        if kind == "server":
            reward = address
            patch.setattr(rewards.Remote.__init__, "__defaults__", (2, 0.01))
        else:
            patch.setattr(rewards, "_load_function", lambda spec: breaking_function(scores))
        options = {"output_dir": tmp_path / "out", "num_epochs": 3, "eval_every": 3, "reward_timeout": 2.0}
        options |= {"num_samples_per_prompt": 2, "num_updates_per_epoch": 1}
        start = time.perf_counter()
        result = run_train(small_run | options, reward=reward)
    assert time.perf_counter() - start < 15
    check_failure(result, 6, "reward: ")
    assert calls[:2] == [2, 4]
    check_saved(tmp_path / "out")


@pytest.mark.slow
def test_a_function_that_hangs_does_not_keep_the_process(fresh_process):
    done, _ = fresh_process
    assert (done.returncode, "no scores within 0.5 s" in " ".join(done.stderr.split())) == (6, True), done.stderr


@pytest.mark.parametrize("option", ["reward", "eval_reward"])
def test_a_mistyped_reward_does_not_wait_for_the_model(small_run, tmp_path, monkeypatch, without_pyiqa, option):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    for reward in ("hsp", "absent.py:reward", "face"):
        result = run_train(small_run | {option: reward}, output_dir=tmp_path / "out")
        check_failure(result, 2, reward.partition(":")[0])


def test_a_refused_checkpoint_is_not_followed_by_the_advice_to_run_its_code(small_run, tmp_path):
    (tmp_path / "code.pt").write_bytes(pickle.dumps(print))
    options = {"reward": "hps", "reward_checkpoint": tmp_path / "code.pt", "output_dir": tmp_path / "out"}
    result = run_train(small_run | options)
    check_failure(result, 3, "code.pt", "not a file of tensors")
    assert "weights_only" not in result.output


def test_a_truncated_hps_checkpoint_ends_with_three(small_run, tmp_path):
    content = (models.TINY / "hps.pt").read_bytes()
    (tmp_path / "hps.pt").write_bytes(content[: len(content) // 2])
    shutil.copy(models.TINY / "hps.json", tmp_path)
    shutil.copytree(models.TINY / "tokenizer", tmp_path / "tokenizer")
    result = run_train(small_run, output_dir=tmp_path / "out", reward="hps", reward_checkpoint=tmp_path / "hps.pt")
    check_failure(result, 3, "hps.pt", "refused")


def test_a_diverged_training_ends_with_four(small_run, tmp_path, monkeypatch):
    original = sampler.gaussian_log_prob
    monkeypatch.setattr(sampler, "gaussian_log_prob", lambda *args: original(*args) * float("nan"))
    check_failure(run_train(small_run, output_dir=tmp_path / "out"), 4, "not finite")


def test_a_full_disk_ends_with_five(small_run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "adapter_model.safetensors")

    monkeypatch.setattr(texforce.Policy, "save", full)
    result = run_train(small_run, output_dir=tmp_path / "out")
    check_failure(result, 5, "storage", "No space left on device", "adapter_model.safetensors")


def test_lack_of_memory_ends_with_five_and_the_option_that_helps(small_run, tmp_path, monkeypatch):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "ppo_update", exhausted)
    check_failure(run_train(small_run, output_dir=tmp_path / "out"), 5, "--micro-batch-size")


def test_lack_of_memory_on_the_cpu_is_named_too(small_run, tmp_path):
    result = run_train(small_run, "--dry-run", output_dir=tmp_path / "out", resolution=16_000_000)
    check_failure(result, 5, "out of memory", "--resolution")


@pytest.mark.quick(1)
@pytest.mark.parametrize("program", [
    "cli.rewards_command()",
    "cli.progress.print('text')",
    "cli.warn('text')",
])  # fmt: skip
def test_a_reader_that_leaves_ends_a_command_without_a_word(program):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", f"from texforce import cli; {program}; print('it went on')"]
    streams = {"stdout": writer, "stderr": subprocess.PIPE} if "rewards" in program else {"stderr": writer}
    done = subprocess.run(command, cwd=ROOT, timeout=300, **streams)
    os.close(writer)
    assert (done.returncode, done.stderr or b"") == (141, b"")


def test_what_a_user_named_cannot_drive_the_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    cli.show("images in \x1b[2Jout\x07")
    cli.warn("model: \x1b[2Jm")
    cli.output.print(views.rows_table("plan", {"model": "\x1b[2Jm"}))
    assert "images in  [2Jout" in sys.stdout.getvalue()
    assert "\x1b" not in sys.stdout.getvalue() + sys.stderr.getvalue()


HOSTILE = "\x1b[2J\x1b]0;title\x07[/b]\x9b31m\u202etxt"
HOSTILE_SIGNS = {"\x07", "\x9b", "\u202e"}


def results_of_systems(measure: str, name: str) -> dict[str, Any]:
    """The results of an evaluation, with names of somebody else."""
    numbers = {"mean": 0.5, "low": 0.4, "high": 0.6}
    shares = {name: numbers for name in ("better", "same", "worse")}
    summary = numbers | {"paired": numbers, **shares, "num_images_dropped": 0, "spread": 1.0}
    systems = {system: {"strength": 1, "measures": {measure: summary}} for system in ("base", name)}
    about = {"name": name, "num_prompts": 1}
    return {"benchmark": about, "strengths": {}, "num_prompts_measured": 1, "num_images": 1, "systems": systems}


def show_stages(name: str) -> None:
    with views.StageView() as view:
        view(name, 1, 1)


def show_epochs(name: str) -> None:
    with views.EpochView(resolve(TrainOptions(model="tiny", num_epochs=1))) as view:
        measures = {"epoch": 0, "seconds": 0.0, "parts": {name: 1.0}, "heldout": {name: 1.0}}
        view(measures | {"dropped": [{"prompt": name, "seed": 0}]})


VIEWS: dict[str, Callable[[str], object]] = {
    "a result": lambda text: cli.show(text),
    "also a warning": lambda text: cli.warn(text),
    "also a plan": lambda text: cli.output.print(views.rows_table("plan", {text: text})),
    "also results": lambda text: cli.output.print(
        views.results_table({"num_images": 1, "seconds": 1.0, "heldout": {text: {"base": 0.0, "tuned": 1.0}}})
    ),
    "also an evaluation": lambda text: cli.output.print(views.evaluation_table(results_of_systems(text, text))),
    "also stages": show_stages,
    "also epochs": show_epochs,
}


@pytest.mark.slow
def test_neither_bars_nor_warnings_of_libraries_reach_the_terminal(stable_diffusion, adapter, small_run, tmp_path):
    """Of a process of its own: libraries write to the real stderr. One warns of a foreign model's escape sequence."""
    folder = shutil.copytree(stable_diffusion, tmp_path / "model")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"model_type": "\x1b[31mevil\x1b]0;x\x07"}))
    commands = [
        ["sample", "--model", folder, "--prompt", "a", "--num-images", 1, "--num-inference-steps", 1, "--output-dir", "a"],
        ["merge", "--adapter", adapter, "--output-dir", "b"],
        ["train", *flags(small_run | {"output_dir": "c"})],
        ["eval", "--adapter", "c", "--benchmark", small_run["heldout_prompts"], "--reward", "jpeg", "--output-dir", "d"],
    ]
    program = f"import os, texforce\nfrom texforce import cli\nos.chdir({str(tmp_path)!r})\n"
    for command in commands:
        program += (
            f"try:\n    cli.app({list(map(str, command))!r})\nexcept SystemExit as end:\n    print('ended', end.code)\n"
        )
    program += "texforce.sample(adapter='c', prompt='a red circle', output_dir='e', num_images=1, num_inference_steps=1)\n"
    done = python(program)
    assert done.stdout.count("ended 0") == 4, (done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert lines[:3] == [f"model: {folder}", "drawing base: done", "model: tiny"]
    ours = r"(model: tiny.*|epoch \d/1  .*|(drawing \w+|jpeg of \w+): done)"
    assert [line for line in lines[3:] if not re.fullmatch(ours, line)] == []
    assert len(lines) == 12


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("case", VIEWS)
def test_no_view_lets_a_text_drive_the_terminal(monkeypatch, case, terminal):
    shown = io.StringIO()
    console = views.PipeConsole(file=shown, width=1000, force_terminal=terminal)
    for module, name in itertools.product((cli, views), ("output", "progress")):
        monkeypatch.setattr(module, name, console)
    VIEWS[case](HOSTILE)
    assert "title" in shown.getvalue()
    assert not set(shown.getvalue()) & HOSTILE_SIGNS
    assert "\x1b[2J" not in shown.getvalue()
    assert "\x1b]" not in shown.getvalue()


@pytest.mark.parametrize("command", [
    "sample --prompt a --adapter", "merge --adapter", "eval --adapter", "train --dry-run --config", "train --resume",
    "train --dry-run --reward",
], ids=lambda command: command.split(" --")[0])  # fmt: skip
def test_a_model_that_a_foreign_folder_names_cannot_drive_the_terminal(tmp_path, command):
    (tmp_path / "config.json").write_text(json.dumps({"model": HOSTILE, "num_inference_steps": 2, HOSTILE: 1}))
    argument = tmp_path / "config.json" if "--config" in command else HOSTILE if "--reward" in command else tmp_path
    result = invoke(*command.split(), argument)
    assert result.exit_code in (2, 3), result.output
    assert "title" in result.output
    assert not set(result.output) & (HOSTILE_SIGNS | {"\x1b"})


def train_until_second_epoch(small_run: dict, output_dir: Path, monkeypatch, stop: Callable[[], None]) -> Result:
    original, epochs = training.train_epoch, []

    def train_epoch(*args):
        epochs.append(1)
        if len(epochs) == 2:
            stop()
        return original(*args)

    monkeypatch.setattr(training, "train_epoch", train_epoch)
    return run_train({"eval_every": 3} | small_run, output_dir=output_dir, num_epochs=3)


def check_saved(folder: Path) -> None:
    assert (folder / WEIGHTS).is_file()
    assert (folder / "adapter_config.json").is_file()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2  # before training, and the first epoch
    assert (folder / "checkpoints" / "epoch_000001").is_dir()


@pytest.mark.quick(2)
@pytest.mark.parametrize(("error", "code", "words"), [
    (KeyboardInterrupt(), 130, "interrupted"),
    (RewardError("reward: the server is gone"), 6, "server is gone"),
    (torch.OutOfMemoryError("CUDA out of memory"), 5, "--micro-batch-size"),
    (InputError("prompts: no such prompt"), 2, "no such prompt"),
    (OSError(5, "Input/output error"), 5, "Input/output error"),
], ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None)  # fmt: skip
def test_a_training_that_stops_midway_saves_the_adapter_first(small_run, tmp_path, monkeypatch, error, code, words):
    policies, original = [], training.prepare

    def prepare(config):
        prepared = original(config)
        policies.append(prepared.policy)
        return prepared

    def stop():
        raise error

    monkeypatch.setattr(training, "prepare", prepare)
    result = train_until_second_epoch(small_run, tmp_path / "out", monkeypatch, stop)
    check_failure(result, code, words)
    check_saved(tmp_path / "out")
    saved = load_file(tmp_path / "out" / WEIGHTS)
    trained = {n: p for n, p in policies[0].model.text_encoder.named_parameters() if p.requires_grad}
    assert len(saved) == len(trained)
    assert all(torch.equal(saved[name.replace(".default", "")], weight) for name, weight in trained.items())
    assert any(saved[name].any() for name in saved if "lora_B" in name)


def test_a_bug_in_the_middle_of_a_training_is_not_hidden_and_the_adapter_is_saved_first(small_run, tmp_path, monkeypatch):
    bug = ValueError("not enough values to unpack")

    def stop():
        raise bug

    result = train_until_second_epoch(small_run, tmp_path / "out", monkeypatch, stop)
    assert (result.exit_code, result.exception) == (1, bug)
    assert "error: " not in result.stderr
    check_saved(tmp_path / "out")


def test_a_training_that_diverges_keeps_the_adapter_of_its_last_measurement(small_run, tmp_path, monkeypatch):
    kept = []

    def stop():
        kept.append((tmp_path / "out" / WEIGHTS).read_bytes())
        raise DivergedError("the loss is not finite")

    result = train_until_second_epoch(small_run | {"eval_every": 1}, tmp_path / "out", monkeypatch, stop)
    check_failure(result, 4, "not finite")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == kept[0]


@pytest.mark.quick(1)
@pytest.mark.parametrize("eval_every", [1, 2])
def test_a_policy_that_explodes_is_not_the_scorers_failure(small_run, tmp_path, eval_every):
    options = {"learning_rate": 1e30, "num_epochs": 2, "num_updates_per_epoch": 1, "eval_every": eval_every}
    result = run_train(small_run | options, output_dir=tmp_path / "out")
    check_failure(result, 4, "images are not finite", "--learning-rate")
    assert not (tmp_path / "out" / WEIGHTS).exists()


def test_images_that_are_not_finite_are_not_written_as_black_ones(adapter, tmp_path):
    result = sample(
        "--adapter", adapter, "--strength", 1e30, "--prompt", "a red circle", "--output-dir", tmp_path / "images"
    )
    check_failure(result, 4, "images are not finite", "--strength")
    assert not (tmp_path / "images").exists()


def test_a_terminated_training_ends_with_143_after_saving_the_adapter(small_run, tmp_path, monkeypatch):
    def unhandled(*_):
        raise AssertionError("nothing handles SIGTERM")

    previous = signal.signal(signal.SIGTERM, unhandled)
    try:
        result = train_until_second_epoch(
            small_run, tmp_path / "out", monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM)
        )
    finally:
        signal.signal(signal.SIGTERM, previous)
    check_failure(result, 143)
    check_saved(tmp_path / "out")


@pytest.mark.slow
def test_a_signal_that_broke_an_import_off_is_told_as_the_signal(small_run, tmp_path, monkeypatch):
    def write_curve(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr("texforce.run.write_curve", write_curve)
    result = run_train(small_run, output_dir=tmp_path / "out")
    check_failure(result, 143, "terminated")
    assert "resume with: texforce train --resume" in result.stderr.replace("\n", " ")

    def fail(*_):
        raise ImportError("initialization failed")

    monkeypatch.setattr("texforce.run.write_curve", fail)
    assert isinstance(run_train(small_run, resume=tmp_path / "out").exception, ImportError)


# --- rewards ---


@pytest.mark.slow
def test_a_mixture_with_a_scorer_that_is_only_measured(shared_run, tmp_path):
    options = {"reward": "hps=1,jpeg=0.1", "eval_reward": "incompress", "output_dir": tmp_path / "out", "num_epochs": 2}
    result = run_train(shared_run | options, eval_every=1)
    assert result.exit_code == 0, result.output
    lines = [strict(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["epoch"]:
            assert line["parts"].keys() == {"hps", "jpeg"}
            assert line["reward_mean"] == pytest.approx(line["parts"]["hps"] + 0.1 * line["parts"]["jpeg"], abs=1e-6)
        heldout = line["heldout"]
        assert {"hps=1,jpeg=0.1", "hps", "jpeg", "incompress"} <= heldout.keys()
        assert heldout["hps=1,jpeg=0.1"] == pytest.approx(heldout["hps"] + 0.1 * heldout["jpeg"], abs=1e-6)
        assert heldout["incompress"] == pytest.approx(-heldout["jpeg"])
    final = strict((tmp_path / "out" / "result.json").read_text())["heldout"]
    assert final["hps"]["tuned"] == lines[-1]["heldout"]["hps"]
    assert "hps=1,jpeg=0.1" in result.stdout
    assert (tmp_path / "out" / "curve.png").is_file()


@pytest.mark.quick(1)
@pytest.mark.parametrize(("options", "same"), [({"eval_reward": "hps"}, True), ({"reward": "jpeg=1,hps=100"}, False)])
def test_a_mixture_trains_otherwise_than_its_first_part_and_what_is_only_measured_does_not(
    small_run, trained_by_jpeg, tmp_path, options, same
):
    assert run_train(small_run | options, output_dir=tmp_path / "out").exit_code == 0
    assert ((tmp_path / "out" / WEIGHTS).read_bytes() == trained_by_jpeg) == same


@pytest.mark.slow
def test_the_parts_of_a_normalised_mixture_have_unit_spread(small_run, tmp_path):
    name = "hps=1,jpeg=1"
    options = {"reward": name, "output_dir": tmp_path / "out", "num_epochs": 3, "eval_every": 1}
    result = run_train(small_run | options, "--normalise-rewards")
    assert result.exit_code == 0, result.output
    lines = [strict(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        assert 0.3 < line["reward_std"] < 2.5  # two parts of unit spread, in whatever units they came
    final = strict((tmp_path / "out" / "result.json").read_text())["heldout"]
    assert final[name]["tuned"] == pytest.approx(lines[-1]["heldout"][name])


def test_a_reward_served_over_http_trains_to_the_same_adapter(small_run, trained_by_jpeg, tmp_path):
    server = serving.make_server(rewards.load_reward("jpeg"), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        result = run_train(small_run, output_dir=tmp_path / "out", reward=f"http://127.0.0.1:{server.server_port}/score")
    finally:
        server.shutdown()
        server.server_close()
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == trained_by_jpeg


@pytest.mark.parametrize("name", reward_specs.CATALOGUE)
def test_each_reward_is_described_in_full_by_its_name(name):
    entry, shown = reward_specs.CATALOGUE[name], squash(invoke("rewards", name).stdout)
    needs = [hub.HUB[item].repository for item in entry.weights]
    needs = [f"pip install {' '.join(entry.packages)}"] if entry.packages else needs
    for words in (name, entry.measures, entry.scale, entry.licence, *needs):
        assert squash(words) in shown


def test_a_reward_that_there_is_not_is_bad_input():
    check_failure(invoke("rewards", "hsp"), 2, "unknown reward 'hsp'", "did you mean 'hps'?")


def test_the_table_of_rewards_names_each_and_whether_it_is_here_within_eighty_columns(without_pyiqa, monkeypatch):
    monkeypatch.setattr(cli.output, "_width", 80)
    result = invoke("rewards")
    assert result.exit_code == 0, result.output
    table = squash(result.stdout)
    for name in reward_specs.CATALOGUE:
        assert f"{name} " in result.stdout
    assert "…" not in result.stdout
    assert squash("path/to/file.py:function") in table
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    here = {row[0]: row[-1] for row in rows if row[0]}
    assert (here["jpeg"], here["alignment"], here["ocr"], here["face"], here["hps"]) == (
        "yes",
        "yes",
        "yes",
        "no",
        "for tiny",
    )


# --- what a training leaves behind ---


def strict(text: str) -> dict:
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_training_says_its_model_and_results(trained):
    folder, result = trained
    assert result.exit_code == 0, result.output
    assert "model: tiny (as asked)" in result.stderr
    assert "epoch 2/2" in result.stderr
    for words in ("alignment_exact", "base", "tuned", "hps"):
        assert words in result.stdout
    assert str(folder) in squash(result.stdout)
    assert "epoch" not in result.stdout  # progress is no result
    verdict = strict((folder / "result.json").read_text())["verdict"]
    change = r"[+-][\d.]+ \[-?[\d.]+, -?[\d.]+\]; \d+ % of prompts better, \d+ % worse"
    assert re.fullmatch(rf"hps {change}(; .* fell)?\. Not trained on: alignment_exact {change}", verdict)
    assert squash(verdict) in squash(result.stdout)
    assert squash(f"texforce sample --adapter {folder} --prompt 'a crimson disc' --compare") in squash(result.stdout)


def test_a_training_leaves_an_adapter_figures_and_a_card(trained):
    folder, _ = trained
    config = strict((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    assert (folder / WEIGHTS).stat().st_size > 10_000
    for picture in (folder / "curve.png", *(folder / "grids").glob("*.png")):
        assert Image.open(picture).size > (100, 100)
    assert [path.name for path in (folder / "grids").iterdir()] == ["epoch_0002.png"]
    assert not list(folder.rglob("*.tmp"))
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "library_name: peft" in card.split("---")[1]
    assert "hps: preference by the tiny world's own scorer, which is not HPSv2.1;" in card
    for words in ("| alignment_exact |", "| measure | base | tuned | change |", "on `hps`:", "seed 11", "rank 4", "tiny"):
        assert words in card
    for picture in re.findall(r"!\[.+?\]\((.+?)\)", card):
        assert (folder / picture).is_file()
    assert "(grids/epoch_0002.png)" in card


def test_the_model_cards_python_draws_the_image_of_the_adapter(trained, monkeypatch):
    """Compared with the pipeline in which the adapter is put on by hand, and with the base model's."""
    folder, _ = trained
    monkeypatch.chdir(folder.parent)
    (code,) = re.findall(r"```python\n(.+?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    seeded = code.replace("eta=1)", "eta=1, generator=torch.Generator().manual_seed(0))")
    assert seeded != code
    names: dict = {"torch": torch}
    exec(seeded, names)  # noqa: S102
    pipeline = StableDiffusionPipeline.from_pretrained(models.TINY)

    def draw() -> bytes:
        settings = {"num_inference_steps": 4, "guidance_scale": 3, "eta": 1}
        return pipeline("a crimson disc", **settings, generator=torch.Generator().manual_seed(0)).images[0].tobytes()

    base = draw()
    pipeline.text_encoder = PeftModel.from_pretrained(pipeline.text_encoder, folder)
    assert names["image"].tobytes() == draw() != base


@pytest.mark.parametrize(("options", "held", "missing"), [
    (
        {"model": "stabilityai/stable-diffusion-xl-base-1.0", "preset": "fast", "sampler": "dpm-solver", "target": "both"},
        ['base_model: "stabilityai/stable-diffusion-xl-base-1.0"', "license: other",
         "license_link: https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0", "DPMSolverMultistepScheduler",
         'pipeline.text_encoder_2, "out", subfolder="text_encoder_2")', 'pipeline.unet, "out", subfolder="unet")'],
        ["eta=", "apache-2.0"],
    ),
    ({"model": "black-forest-labs/FLUX.1-dev"}, ['from_pretrained("black-forest-labs/FLUX.1-dev")'], ["eta=", "Scheduler"]),
    ({"model": "tiny", "algorithm": "ppo"}, ["license: apache-2.0", "models.TINY", "null prompt"], ["base_model"]),
    ({"model": "tiny", "adapter_steps": "0-0.5"}, ["outside of 0-0.5 of the steps, so only texforce"], ["null prompt"]),
    ({"model": "tiny-flow"}, ["models.TINY_FLOW"], ["base_model", "eta=", "null prompt"]),
    ({"model": "model.safetensors"}, ["texforce sample"], ["base_model", "```python"]),
    ({"model": "models/mine"}, ['from_pretrained("models/mine")'], ["base_model:"]),
])  # fmt: skip
def test_the_model_card_names_base_model_licence_and_usage(options, held, missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "model.safetensors").touch()
    for place in ("", "text_encoder_2", "unet"):
        (tmp_path / "out" / place).mkdir(exist_ok=True)
        (tmp_path / "out" / place / "adapter_config.json").touch()
    result = {"heldout": {"hps": {"base": 0.25, "tuned": 0.2}}, "num_prompts_cut": 0, "num_images": 1, "seconds": 1.0}
    about = {"device": "cpu", "verdict": "hps -0.05; 0 % of prompts better, 100 % worse"}
    card = write_card(resolve(TrainOptions(**options)), result | about, tmp_path / "out")
    assert "| hps | 0.2500 | 0.2000 | -0.0500 |" in card
    assert f"\n{about['verdict']}.\n" in card
    assert [words for words in held if words not in card] == []
    assert [words for words in missing if words in card] == []


def test_the_result_has_what_one_needs_to_compare_and_repeat(trained):
    folder, _ = trained
    result = strict((folder / "result.json").read_text())
    assert result["seed"] == 11
    assert result["model"] == "tiny"
    assert result["device"] == ("cpu" if NO_GPU else "cuda:0")
    assert set(result["versions"]) >= {"texforce", "python", "torch", "diffusers", "transformers", "peft"}
    assert all(isinstance(version, str) for version in result["versions"].values())
    assert result["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert result["seconds"] > 0
    assert result["num_images"] == 2 * 2 * 4
    assert result["num_unet_calls"] == 2 * (2 * 4 * 4) * (2 + 2)
    assert 0 <= result["max_ratio_deviation"] <= 1e-6
    assert set(result["heldout"]) >= {"hps", "alignment", "alignment_exact"}
    for value in result["heldout"].values():
        assert set(value) == {"base", "tuned"}
        assert all(isinstance(number, float) for number in value.values())
    assert 0 <= result["heldout"]["alignment_exact"]["base"] <= 1


def test_metrics_are_strict_json_with_a_line_for_each_epoch(trained):
    folder, _ = trained
    lines = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert [line["num_images"] for line in lines] == [0, 8, 16]
    assert 0 == lines[0]["num_unet_calls"] < lines[1]["num_unet_calls"] < lines[2]["num_unet_calls"]
    assert ["heldout" in line for line in lines] == [True, False, True]
    for line in lines[1:]:
        assert line["images_per_s"] > 0
        assert 0 <= line["clip_fraction"] <= 1
        assert 0 < line["sampling_share"] < 1


@pytest.mark.slow
@pytest.mark.slow
def test_the_saved_config_is_resolved_and_a_process_of_its_own_repeats_the_run_to_the_byte(trained, fresh_process):
    folder, _ = trained
    config = strict((folder / "config.json").read_text())
    assert set(config) == {item.name for item in option_fields(TrainConfig)}
    nullable = {"reward_checkpoint", "eval_reward", "resolution", "compile", "max_kl", "anchor_prompts", "text_encoders"}
    nullable |= {"adapter_steps", "lora_modules", "relabel"}
    assert {name for name, value in config.items() if value is None} <= nullable
    done, other = fresh_process
    assert "the training ended with 0" in done.stdout, done.stderr
    assert "alignment_exact" in done.stdout
    assert "Traceback" not in done.stderr
    assert (other / "out" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_flags_override_the_config_file(trained, tmp_path):
    result = invoke(
        "train", "--config", trained[0] / "config.json", "--output-dir", tmp_path / "again", "--seed", 12,
        "--num-epochs", 1, "--reward", "jpeg",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    config = strict((tmp_path / "again" / "config.json").read_text())
    assert (config["seed"], config["num_epochs"], config["reward"], config["rank"]) == (12, 1, "jpeg", 4)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() != (trained[0] / WEIGHTS).read_bytes()


def test_a_dry_run_minds_no_output_folder(small_run, adapter):
    assert run_train(small_run, "--dry-run", output_dir=adapter).exit_code == 0
    check_failure(run_train(small_run, output_dir=adapter), 2, "--output-dir", "not empty")


@pytest.mark.parametrize("command", ["train", "sample --prompt a", "eval --benchmark colour --limit 1", "merge --adapter"])
def test_a_file_as_the_output_folder_is_bad_input(adapter, tmp_path, command):
    (tmp_path / "file").write_text("")
    arguments = command.split() + ([adapter] if command.startswith("merge") else ["--model", "tiny"])
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        result = invoke(*arguments, "--output-dir", place)
        assert result.exit_code == 2, result.output
        assert f"--output-dir: '{tmp_path / 'file'}'" in result.stderr


def test_a_training_that_was_refused_before_its_first_image_leaves_no_folder_in_the_way(small_run, tmp_path):
    (tmp_path / "mine.py").write_text("def broken(images, prompts):\n    raise ValueError\n")
    result = run_train(small_run, reward=f"{tmp_path / 'mine.py'}:broken", output_dir=tmp_path / "out")
    assert result.exit_code == 6
    assert run_train(small_run, output_dir=tmp_path / "out").exit_code == 0
    check_failure(run_train(small_run, output_dir=tmp_path / "out"), 2, "--output-dir", "not empty")


def test_a_dry_run_tells_of_a_run_to_go_on_with(adapter, tmp_path):
    result = invoke("train", "--resume", tmp_path / "new", "--reward", "jpeg", "--model", "tiny", "--dry-run")
    assert "model: tiny (as asked)" in result.stderr
    result = invoke("train", "--resume", adapter, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "model: tiny (as before)" in result.stderr
    assert "U-Net calls an epoch" in result.stdout


def test_a_plan_is_whole_whatever_the_width():
    name = "somewhere/" + "a-very-long-name-" * 8
    shown = io.StringIO()
    views.PipeConsole(file=shown, width=60).print(views.rows_table("plan", {"model": name, "images in all": 1234567}))
    assert name in squash(shown.getvalue())
    assert "1,234,567" in shown.getvalue()


def test_a_dry_run_prints_the_plan_and_writes_nothing(small_run, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = run_train(small_run, "--dry-run", output_dir=tmp_path / "out", num_epochs=5)
    assert result.exit_code == 0, result.output
    assert sorted(tmp_path.rglob("*")) == before
    plan = dict(re.findall(r"^│ (.+?) +│ (.+?) +│$", result.stdout, flags=re.MULTILINE))
    assert plan["model"] == "tiny"
    assert plan["images in all"] == "40"
    parts = ("weights", "trajectories", "U-Net activations of a micro-batch", "text encoder activations")
    together = float(plan["together, without decoding and scorer, MB"])
    assert together == pytest.approx(sum(float(plan[f"{part}, MB"]) for part in parts), abs=0.3)
    assert plan["U-Net calls an epoch"] == str(8 * 2 * 4)
    assert plan["(image, step) pairs an optimizer step"] == "8"
    assert float(plan["weights, MB"]) > 5
    assert float(plan["U-Net activations of a micro-batch, MB"]) > 1
    assert float(plan["text encoder activations, MB"]) > 0.1


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("null_prompt", "more"),
    [
        ("adapted", {"num_inner_epochs": 2}),
        ("adapted", {"kl_weight": 0.1}),
        pytest.param("base", {"kl_weight": 0.1}, marks=pytest.mark.slow),
        pytest.param("base", {"max_kl": 1e6}, marks=pytest.mark.slow),
    ],
)
def test_the_plans_count_of_unet_calls_comes_true(small_run, tmp_path, null_prompt, more):
    options = small_run | {"output_dir": tmp_path / "out", "null_prompt": null_prompt} | more
    dry = run_train(options, "--dry-run")
    planned = int(re.search(r"U-Net calls an epoch +│ (\d+)", dry.stdout)[1])
    assert run_train(options).exit_code == 0
    assert strict((tmp_path / "out" / "result.json").read_text())["num_unet_calls"] == planned


@pytest.mark.slow
def test_tensorboard_gets_every_epochs_numbers(small_run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run_train(small_run, output_dir=tmp_path / "out", num_epochs=2, report_to="tensorboard")
    assert result.exit_code == 0, result.output
    files = list((tmp_path / "out").rglob("events.out.tfevents.*"))
    assert files
    events = EventAccumulator(str(files[0].parent)).Reload()
    metrics = [strict(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    seen = [(event.step, event.value) for event in events.Scalars("reward_mean")]
    assert seen == [(line["epoch"], pytest.approx(line["reward_mean"])) for line in metrics[1:]]
    assert [event.value for event in events.Scalars("heldout/jpeg")] == [pytest.approx(metrics[-1]["heldout"]["jpeg"])]


@pytest.mark.quick(2)
@pytest.mark.parametrize("broken", ["__init__", "start", "log", "finish"])
def test_a_tracker_that_fails_is_named(small_run, tmp_path, monkeypatch, broken):
    from accelerate import tracking

    class Tracker:
        def __init__(self, *arguments, **options):
            self.do("__init__")

        def do(self, step):
            if step == broken:
                raise RuntimeError("api_key not configured\nlog in first")

        start = lambda self: self.do("start")  # noqa: E731
        log = lambda self, values, step: self.do("log")  # noqa: E731
        finish = lambda self: self.do("finish")  # noqa: E731

    monkeypatch.setattr(tracking, "TensorBoardTracker", Tracker)
    result = run_train(small_run, output_dir=tmp_path / "out", report_to="tensorboard")
    check_failure(result, 2, "--report-to: tensorboard failed", "api_key not configured")


def test_a_tracker_that_fails_at_its_finish_does_not_hide_why_the_run_ended(small_run, tmp_path, monkeypatch):
    from accelerate import tracking

    def fail(*arguments):
        raise RuntimeError("no connection")

    def diverge(*arguments):
        raise DivergedError("the loss is not finite")

    monkeypatch.setattr(tracking.TensorBoardTracker, "finish", fail)
    monkeypatch.setattr(training, "train_epoch", diverge)
    result = run_train(small_run, output_dir=tmp_path / "out", report_to="tensorboard")
    check_failure(result, 4, "the loss is not finite")


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_names_what_to_install(small_run, tmp_path, package):
    pytest.importorskip("accelerate")
    if shutil.which(package):
        pytest.skip(f"{package} is installed")
    check_failure(run_train(small_run, output_dir=tmp_path / "out", report_to=package), 2, f"pip install {package}")


def test_neither_saving_nor_loading_an_adapter_asks_the_hub_about_the_base_model(small_run, tmp_path, monkeypatch):
    """It does not know the text encoder's part of a pipeline, and a run without network would wait for it."""
    from peft.utils import save_and_load

    asked = []
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda *args: asked.append(args))
    assert run_train(small_run, output_dir=tmp_path / "out").exit_code == 0
    assert sample("--adapter", tmp_path / "out", "--prompt", "a red circle", "--output-dir", tmp_path).exit_code == 0
    assert asked == []


# --- sample ---


def sample(*arguments: object) -> Result:
    return invoke("sample", "--model", "tiny", "--num-inference-steps", 2, "--num-images", 2, *arguments)


def pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.png") if path.stem.partition("_")[0].isdigit())


def test_sixty_four_tiny_images_take_less_than_five_seconds_of_computing(adapter, tmp_path):
    begin = time.process_time()  # unlike the clock on the wall, other processes do not disturb it
    result = invoke(
        "sample", "--adapter", adapter, "--prompt", "a red disc", "--num-images", 64, "--output-dir", tmp_path / "images"
    )
    assert result.exit_code == 0, result.output
    assert time.process_time() - begin < 5
    assert len(pictures(tmp_path / "images")) == 64


@pytest.mark.parametrize("prompt", ["a red horse", "a red circle"])
@pytest.mark.parametrize(
    "command", [["sample", "--num-images"], ["eval", "--reward", "jpeg", "--num-images"]], ids=lambda c: c[0]
)
def test_a_prompt_that_the_tiny_model_cannot_draw_is_named(command, prompt, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"a blue square\n{prompt}\n")
    given = ["--prompts" if command[0] == "sample" else "--benchmark", tmp_path / "prompts.txt"]
    result = invoke(*command, 1, *given, "--model", "tiny", "--num-inference-steps", 1, "--output-dir", tmp_path / "out")
    assert result.exit_code == 0, result.output
    words = "tiny knows only coloured shapes, so 1 of 2 prompts mean nothing to it, as 'a red horse'"
    assert (words in result.stderr) == ("horse" in prompt)


def test_sampled_images_carry_their_prompt_and_seed(adapter, tmp_path):
    result = sample(
        "--adapter", adapter, "--prompt", "a red circle", "--prompt", "zwei Würfel", "--seed", 7,
        "--output-dir", tmp_path / "images",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    labels = [Image.open(path).text for path in pictures(tmp_path / "images")]
    assert [(label["prompt"], label["seed"], label["system"]) for label in labels] == [
        ("a red circle", "7", "tuned"), ("a red circle", "8", "tuned"),
        ("zwei Würfel", "9", "tuned"), ("zwei Würfel", "10", "tuned"),
    ]  # fmt: skip
    assert {label["num_inference_steps"] for label in labels} == {"2"}
    assert {label["adapter"] for label in labels} == {str(adapter)}
    assert all(Image.open(path).size == (32, 32) for path in pictures(tmp_path / "images"))
    assert len(list((tmp_path / "images").glob("grid_*.png"))) == 1


def test_an_image_is_drawn_anew_from_its_prompt_and_seed(adapter, tmp_path):
    sample("--adapter", adapter, "--prompt", "a red circle", "--seed", 7, "--output-dir", tmp_path / "two")
    invoke(
        "sample", "--adapter", adapter, "--prompt", "a red circle", "--seed", 8, "--num-images", 1,
        "--num-inference-steps", 2, "--output-dir", tmp_path / "one",
    )  # fmt: skip
    two, (one,) = pictures(tmp_path / "two"), pictures(tmp_path / "one")
    difference = [abs(a - b) for a, b in zip(Image.open(two[1]).tobytes(), Image.open(one).tobytes(), strict=True)]
    assert max(difference) <= 1  # other batches round otherwise
    assert Image.open(two[0]).tobytes() != Image.open(two[1]).tobytes()


def test_compared_images_start_from_the_same_noise(adapter, tmp_path):
    for strength in (0, 1, 3):
        folder = tmp_path / str(strength)
        result = sample(
            "--adapter", adapter, "--prompt", "a red circle", "--compare", "--strength", strength, "--output-dir", folder
        )
        assert result.exit_code == 0, result.output
        images = {}
        for path in pictures(folder):
            image = Image.open(path)
            images[image.text["system"], image.text["seed"]] = image.tobytes()
            assert path.stem == f"{int(image.text['seed']):05d}_{image.text['system']}"
        assert len(images) == 4
        for seed in ("0", "1"):
            assert (images["base", seed] == images["tuned", seed]) == (strength == 0)


def test_without_an_adapter_the_base_model_draws(tmp_path):
    assert sample("--prompt", "a red circle", "--output-dir", tmp_path / "images").exit_code == 0
    assert {Image.open(path).text["system"] for path in pictures(tmp_path / "images")} == {"base"}


def test_a_second_call_overwrites_nothing_of_the_first(adapter, tmp_path):
    arguments = ["--adapter", adapter, "--prompt", "a red circle", "--compare", "--output-dir", tmp_path / "images"]
    sample(*arguments)
    first = {path: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    assert len(first) == 5
    assert sample(*arguments, "--seed", 9).exit_code == 0
    assert len(list((tmp_path / "images").iterdir())) == 10
    for path, content in first.items():
        assert path.read_bytes() == content


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "prompt", ["[/b]", "[red]a circle[/red] [link=x]", "\x1b[31ma\x1b]0;title\x07 disc\x9b2J", ":smile:"]
)
def test_a_prompt_cannot_drive_the_terminal(adapter, tmp_path, prompt):
    result = sample("--adapter", adapter, "--prompt", prompt, "--output-dir", tmp_path / "images")
    assert result.exit_code == 0, result.output
    assert not set(result.output) & {"\x1b", "\x07", "\x9b"}
    assert {Image.open(path).text["prompt"] for path in pictures(tmp_path / "images")} == {prompt}
    result = sample("--prompt", f"{prompt} {'and a red circle ' * 30}", "--output-dir", tmp_path / "images")
    assert "1 of 1 prompts are cut to the 24 tokens" in result.stderr
    assert not set(result.output) & {"\x1b", "\x07", "\x9b"}


def test_a_training_prompt_cannot_drive_the_terminal(small_run, tmp_path):
    prompts = ["[/b] a circle", "[link=x] a red circle\u202e"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    drop = "    if len(calls) == 2:\n        scores[::4] = float('nan')\n"
    body = f"    scores = images.mean(dim=(1, 2, 3))\n{drop}    return scores"
    result = run_train(small_run, output_dir=tmp_path / "out", reward=reward_file(tmp_path, body))
    assert result.exit_code == 0, result.output
    assert "[/b] a circle" in result.stderr  # named as dropped
    assert not set(result.output) & {"\x1b", "\u202e"}
    _, metrics = (strict(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert {dropped["prompt"] for dropped in metrics["dropped"]} == set(prompts)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["matching", "gradient"])
def test_an_adapter_trained_with_dpm_solver_is_reproducible_and_sampled_with_it(shared_run, tmp_path, algorithm):
    own = ("eta", "clip_range", "timestep_window", "timestep_fraction")
    options = {name: value for name, value in shared_run.items() if name not in own} | {
        "algorithm": algorithm, "sampler": "dpm-solver", "reward": "hps", "null_anchor": 0, "output_dir": tmp_path / "out",
    }  # fmt: skip
    result = invoke("train", *flags(options))
    assert result.exit_code == 0, result.output
    config = strict((tmp_path / "out" / "config.json").read_text())
    assert (config["sampler"], config["eta"]) == ("dpm-solver", 0.0)
    result = invoke("train", "--config", tmp_path / "out" / "config.json", "--output-dir", tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "again" / WEIGHTS).read_bytes()
    labels, arguments = [], ["--adapter", tmp_path / "out", "--prompt", "a red circle", "--num-images", 1]
    for number, given in enumerate(([], ["--sampler", "dpm-solver"], ["--sampler", "ddim", "--eta", 0])):
        result = invoke("sample", *arguments, *given, "--num-inference-steps", 4, "--output-dir", tmp_path / str(number))
        assert result.exit_code == 0, result.output
        (picture,) = pictures(tmp_path / str(number))
        labels.append((Image.open(picture).text["sampler"], Image.open(picture).text["eta"], Image.open(picture).tobytes()))
    assert labels[0] == labels[1]
    assert [label[:2] for label in labels] == [("dpm-solver", "0.0")] * 2 + [("ddim", "0.0")]
    assert labels[2][2] != labels[0][2]


BAD_SAMPLING = [
    ([], ["--prompt"]),
    (["--prompt", "a red circle", "--adapter", "absent"], ["absent"]),
    (["--prompt", "a red circle", "--num-images", "0"], ["--num-images"]),
    (["--prompt", "a red circle", "--batch-size", "0"], ["--batch-size"]),
    (["--prompt", "a red circle", "--num-inference-steps", "0"], ["--num-inference-steps"]),
    (["--prompt", "a red circle", "--seed", "-1"], ["seed"]),
    (["--prompt", "a red circle", "--seed", str(2**64)], ["seed"]),
    (["--prompt", "a red circle", "--eta", "2"], ["eta"]),
    (["--prompt", "a red circle", "--sampler", "dpm-solver", "--eta", "1"], ["eta", "dpm-solver", "not 1"]),
    (["--prompt", "a red circle", "--sampler", "heun"], ["sampler", "ddim, dpm-solver"]),
    (["--prompt", "a red circle", "--eta", "nan"], ["eta"]),
    (["--prompt", "a red circle", "--strength", "nan"], ["strength"]),
    (["--prompt", "a red circle", "--strength", "inf"], ["strength"]),
    (["--prompt", "a red circle", "--strength", "0.5"], ["--strength", "--adapter"]),
    (["--prompt", "a red circle", "--compare"], ["--compare", "--adapter"]),
    (["--prompt", "a red circle", "--guidance-scale", "nan"], ["--guidance-scale"]),
    (["--prompt", "a red circle", "--guidance-scale", "-3"], ["--guidance-scale"]),
    (["--prompt", "a red circle", "--resolution", "33"], ["resolution"]),
    (["--prompt", "a red circle", "--null-prompt", "none"], ["--null-prompt"]),
    (["--prompts", "absent.txt"], ["absent.txt"]),
    (["--prompts", "EMPTY"], ["empty.txt"]),
    (["--prompt", "a red circle", "--model", "./nowhere"], ["./nowhere"]),
]


@pytest.mark.parametrize(
    ("arguments", "words"), BAD_SAMPLING, ids=[" ".join(arguments)[:40] or "nothing" for arguments, _ in BAD_SAMPLING]
)
def test_bad_input_to_sample_is_named_in_a_line(tmp_path, arguments, words):
    files = bad_files(tmp_path)
    arguments = [files.get(text, text) for text in arguments]
    model = [] if "--model" in arguments else ["--model", "tiny"]
    check_failure(invoke("sample", *model, *arguments, "--output-dir", tmp_path / "images"), 2, *words)
    assert not (tmp_path / "images").exists()


def test_a_strength_that_is_no_number_is_refused_with_an_adapter_too(adapter, tmp_path):
    for scale in ("nan", "inf", "-inf"):
        arguments = ["--adapter", adapter, "--prompt", "a red circle", "--strength", scale]
        check_failure(sample(*arguments, "--output-dir", tmp_path / "images"), 2, "strength")


def test_a_damaged_adapter_ends_with_three(adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "damaged"))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    check_failure(sample("--adapter", folder, "--prompt", "a red circle", "--output-dir", tmp_path / "images"), 3, WEIGHTS)


@pytest.mark.parametrize("content", ['{"num_inference_steps": "ten"}', '{"model": 5}', '{"guidance_scale": []}', "{", "[]"])
def test_an_adapter_whose_settings_are_nonsense_is_refused(adapter, tmp_path, content):
    folder = Path(shutil.copytree(adapter, tmp_path / "damaged"))
    (folder / "config.json").write_text(content)
    result = invoke("sample", "--adapter", folder, "--prompt", "a red circle", "--output-dir", tmp_path / "images")
    check_failure(result, 3 if result.exit_code == 3 else 2, "config.json")


def test_neither_a_mistyped_adapter_nor_an_output_that_is_a_file_waits_for_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    check_failure(
        invoke("sample", "--prompt", "a red circle", "--output-dir", tmp_path / "file"), 2, "--output-dir", "is a file"
    )
    check_failure(invoke("sample", "--prompt", "a red circle", "--adapter", tmp_path / "absent"), 2, "absent")


def test_adapters_of_runs_that_disagree_are_refused_until_the_command_line_decides(adapter, tmp_path):
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_inference_steps": 3}))
    arguments = ["--adapter", adapter, "--adapter", other, "--prompt", "a red circle", "--output-dir", tmp_path / "images"]
    check_failure(invoke("sample", *arguments), 2, "--num-inference-steps", "4", "3")
    assert invoke("sample", *arguments, "--num-inference-steps", 3, "--num-images", 1).exit_code == 0


def test_the_null_prompt_is_what_the_text_encoders_run_made_of_it(adapter, tmp_path):
    for name, target, null_prompt in (("text", "text-encoder", "base"), ("unet", "unet", "adapted")):
        (tmp_path / name).mkdir()
        content = {"model": "tiny", "target": target, "null_prompt": null_prompt}
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    for order in (["text", "unet"], ["unet", "text"]):
        config = SampleOptions(prompt=["a red circle"], adapter=[str(tmp_path / name) for name in order])
        assert resolve_sample(config).null_prompt == "base"


def test_the_adapters_run_decides_what_is_not_given(adapter, tmp_path):
    result = invoke("sample", "--adapter", adapter, "--prompt", "a red circle", "--output-dir", tmp_path / "images")
    assert result.exit_code == 0, result.output
    label = Image.open(pictures(tmp_path / "images")[0]).text
    assert (label["model"], label["num_inference_steps"], label["guidance_scale"]) == ("tiny", "4", "3.0")
