"""The benchmarks start; bench.py runs, compares equal work, and writes all its measures."""

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from texforce.errors import InputError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
LIBRARIES = {"architectures", "meters", "textbook"}  # imported by bench.py, and no programs
SMALL = ["--model", "tiny", "--device", "cpu", "--num-images", "4", "--num-inference-steps", "2", "--repeats", "1"]
HALF = [*SMALL, "--mixed-precision", "bf16"]
RATIOS = {"rollout_ratio", "update_ratio", "peak_memory_ratio", "matrix_rate_share", "update_matrix_rate_share"}
RATES = {"images_per_s", "unet_calls_per_s", "pairs_per_s", "textbook_images_per_s", "textbook_pairs_per_s", "matrix_rate"}
SIZES = {"peak_memory_bytes", "equal_micro_batch_peak_memory_bytes", "textbook_peak_memory_bytes", "startup_seconds"}
EXACT = {"ratio_deviation", "textbook_gradient_deviation", "textbook_log_prob_deviation", "textbook_image_deviation"}
COSTS = {"seconds_per_image", "update_seconds_per_image", "images_per_s", "unet_calls_per_image", "peak_memory_bytes"}
PROVENANCE = {"command", "commit", "torch", "machine", "num_threads", "date", "options", "config", "clip_range"}


@pytest.fixture(scope="module")
def scripts():
    """Imports a script of benchmarks/, each once; afterwards none of them is left among the modules."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def bench(scripts):
    return scripts("bench")


@pytest.fixture(scope="module")
def made(bench):
    """The benchmark's policies of the tiny model, in float32. Do not change them."""
    return bench.Bench(bench.parse(SMALL))


@pytest.fixture(scope="module")
def half(bench):
    """The same in bfloat16."""
    return bench.Bench(bench.parse(HALF))


def test_what_an_update_takes_is_foreseen_for_a_model_of_the_hub(scripts):
    script = scripts("foresee")
    cells = dict(zip(script.COLUMNS, script.row(*script.SIZES[0]), strict=True))
    assert (cells["model"], cells["trained by default"]) == ("stable-diffusion-v1-5", "text_encoder")
    assert (cells["their parameters, 1e9"], cells["denoiser, 1e9"]) == ("0.12", "0.86")
    assert float(cells["weights in bfloat16, GB"]) == pytest.approx(2 * (0.12 + 0.86), abs=0.05)
    assert float(cells["with --gradient-checkpointing"]) < 0.5 * float(cells["kept of an image, GB"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_is_imported_and_parses_its_arguments(scripts, monkeypatch, capsys, name):
    script = scripts(name)
    assert hasattr(script, "main") == (name not in LIBRARIES)
    if name not in LIBRARIES:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        with pytest.raises(SystemExit) as ended:
            script.main()
        assert ended.value.code == 0
        assert f"usage: {name}.py" in capsys.readouterr().out


def test_readmes_pictures_are_the_last_grid_the_curve_and_the_page_of_one_run(scripts, monkeypatch, tmp_path):
    script, commands, pages = scripts("readme_figures"), [], []

    def pretend(folder, *arguments):
        commands.append(arguments[0])
        if arguments[0] == "train":
            grids = folder / arguments[-1] / "grids"
            grids.mkdir(parents=True)
            for epoch in (32, 64):
                (grids / f"epoch_{epoch:04d}.png").write_text(f"grid {epoch}")
            (grids.parent / "curve.png").write_text("curve")

    monkeypatch.setattr(script, "texforce", pretend)
    monkeypatch.setattr(script, "take_picture", lambda page, path: pages.append((page, path)))
    monkeypatch.setattr(sys, "argv", ["readme_figures.py", "--work-dir", f"{tmp_path}/w", "--output-dir", f"{tmp_path}/f"])
    script.main()
    assert commands == ["train", "eval"]
    assert {path.name: path.read_text() for path in (tmp_path / "f").iterdir()} == {
        "grid.png": "grid 64",
        "curve.png": "curve",
    }
    assert pages == [(tmp_path / "w" / "eval" / "report.html", tmp_path / "f" / "report.png")]


def test_no_benchmark_puts_a_denoiser_together_itself():
    """The policy owns it: benchmarks that made their own once lost SDXL's pooled text."""
    assert not [name for name in SCRIPTS if "Denoiser(" in (BENCHMARKS / f"{name}.py").read_text()]


@pytest.mark.parametrize("error", [
    InputError("prompts: 'red' is none of the world's"), RuntimeError("no tesseract"), KeyboardInterrupt("stop"),
], ids=["a prompt it cannot judge", "also a bug", "also an interruption"])  # fmt: skip
def test_what_is_measured_of_a_scorer_is_written_and_shown_before_the_next_one_fails(
    scripts, monkeypatch, tmp_path, capsys, error
):
    scoring = scripts("scoring")

    def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
        if name == "ocr":
            raise error
        return {"images_per_s_1": 2.0}

    monkeypatch.setattr(scoring, "measure", measure)
    monkeypatch.setattr(scoring, "pixel_deviations", lambda resolution: {})
    options = ["--names", "jpeg", "ocr", "--device", "cpu", "--json", str(tmp_path / "scoring.json")]
    monkeypatch.setattr(sys, "argv", ["scoring.py", *options])
    with pytest.raises(type(error)):
        scoring.main()
    assert json.loads((tmp_path / "scoring.json").read_text())["scorers"] == {"jpeg": {"images_per_s_1": 2.0}}
    assert re.search(r"jpeg\W+2\b", capsys.readouterr().out.partition("scorer")[2])  # the table


def test_scorers_whose_packages_are_missing_are_left_out_unless_they_are_named(scripts, monkeypatch):
    scoring, measured = scripts("scoring"), []
    monkeypatch.setattr(scoring.reward_specs, "missing_packages", lambda name: ["rapidocr"] if name == "ocr" else [])
    monkeypatch.setattr(scoring, "measure", lambda name, options: measured.append(name) or {})
    monkeypatch.setattr(scoring, "pixel_deviations", lambda resolution: {})
    monkeypatch.setattr(sys, "argv", ["scoring.py", "--device", "cpu"])
    scoring.main()
    assert measured == [name for name in scoring.NAMES if name != "ocr"]


def test_the_preprocessing_of_training_is_near_the_scorers_own_in_levels_of_255(scripts):
    levels = scripts("scoring").pixel_deviations(64, size=32)
    assert set(levels) == {f"{way}, {kind}" for way in ("crop", "pad") for kind in ("smooth", "edges", "noise")}
    assert levels["pad, edges"]["largest"] > 5  # HPSv2's own code keeps what the filter overshoots
    assert 0 < levels["crop, smooth"]["mean"] < levels["crop, smooth"]["largest"] < 2  # of the rounding to 8 bits


def test_scorers_that_judge_only_the_tiny_world_are_not_timed(scripts):
    names = scripts("scoring").NAMES
    assert {"hps", "jpeg", "ocr"} <= set(names)
    assert not {"alignment", "alignment_exact", "face"} & set(names)


@pytest.mark.slow
def test_the_bench_measures_ours_against_a_textbook_loop_that_does_the_same(bench, tmp_path, capsys):
    bench.main([*SMALL, "--no-compile", "--json", str(tmp_path / "bench.json")])
    results = json.loads((tmp_path / "bench.json").read_text())
    assert set(results) >= RATIOS | RATES | SIZES | EXACT | PROVENANCE
    assert all(results[name] > 0 for name in RATIOS | RATES | SIZES)
    assert results["textbook_gradient_deviation"] < 1e-4
    assert results["ratio_deviation"] < results["clip_range"] / 1000
    assert "rollout_ratio" in capsys.readouterr().out


@pytest.mark.slow
def test_ours_alone_is_measured_without_the_textbook_loop(bench, tmp_path, monkeypatch):
    monkeypatch.delattr(bench.textbook.Textbook, "rollout")
    monkeypatch.delattr(bench.textbook.Textbook, "accumulate_gradients")
    monkeypatch.setattr(bench, "fresh_start", lambda device: 1.0)  # a new process, which imports everything
    bench.main([*SMALL, "--no-compile", "--ours-alone", "--json", str(tmp_path / "bench.json")])
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["ratio_deviation"] < results["clip_range"] / 1000
    assert all(
        results[name] > 0 for name in ("images_per_s", "pairs_per_s", "peak_memory_bytes", "rollout_peak_memory_bytes")
    )


@pytest.fixture
def untrained(bench, monkeypatch):
    """The tiny architecture with random weights: the trained U-Net enlarges float32's rounding up to a thousandfold."""
    build = bench.architectures.build

    def build_untrained(*arguments):
        model = build(*arguments)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = type(model.unet).from_config(model.unet.config).requires_grad_(False).eval().to(model.unet.dtype)
        return bench.replace(model, unet=unet)

    monkeypatch.setattr(bench.architectures, "build", build_untrained)


@pytest.mark.slow
@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("null_prompt", ["base", "adapted"])
def test_the_bench_refuses_to_compare_with_a_loop_that_does_something_else(bench, monkeypatch, null_prompt):
    options = bench.parse([*SMALL, "--null-prompt", null_prompt])
    made = bench.Bench(options)
    assert bench.verify(options, made)["textbook_gradient_deviation"] < 1e-4
    made.textbook.config = bench.replace(made.textbook.config, guidance_scale=3.01)
    with pytest.raises(RuntimeError, match="not the same"):
        bench.verify(options, made)


@pytest.mark.slow
def test_what_half_precision_would_hide_is_checked_in_float32(bench, half):
    found = bench.verify(bench.parse(HALF), half)
    assert found["textbook_image_deviation"] < 1e-5 < found["timed_textbook_image_deviation"]
    assert found["textbook_gradient_deviation"] < 1e-4
    assert "timed_textbook_gradient_deviation" not in found


@pytest.mark.slow
def test_what_is_timed_in_half_precision_is_held_to_the_same_images(bench, made, half, monkeypatch):
    monkeypatch.setattr(bench, "Bench", lambda options: made)  # the float32 copy, which is the same as the textbook's
    monkeypatch.setattr(half.textbook, "config", bench.replace(half.textbook.config, guidance_scale=1.1))
    with pytest.raises(RuntimeError, match=r"not the same.*0\.01"):
        bench.verify(bench.parse(HALF), half)


def test_the_meter_counts_what_is_alive_at_most_and_was_not_there_before(bench):
    before = torch.ones(1000)

    def work():
        doubled = before.view(10, 100) * 2  # 4 kB
        tripled = doubled.t() * 3  # 4 kB more
        del doubled
        return tripled + 1  # in the room of the first

    assert bench.meters.peak_bytes(work, "cpu") == 8000


def test_the_sweep_gives_images_per_second_of_each_sample_batch(bench, made, monkeypatch):
    monkeypatch.setattr(made, "config", made.config)  # put back afterwards
    monkeypatch.setattr(bench, "SWEEP", (1, 4))
    rates = bench.sweep(made, repeats=1)
    assert list(rates) == ["1", "4"]
    assert all(rate > 0 for rate in rates.values())


@pytest.mark.slow
def test_every_algorithm_is_measured_by_epochs_of_a_training(scripts, tmp_path, monkeypatch, capsys):
    algorithms, epochs = scripts("algorithms"), []
    train_epoch = algorithms.training.train_epoch
    monkeypatch.setattr(
        algorithms.training, "train_epoch", lambda run, config: epochs.append(config.algorithm) or train_epoch(run, config)
    )
    algorithms.main([*SMALL, "--json", str(tmp_path / "algorithms.json")])
    assert epochs == ["ppo", "ppo", "matching", "matching", "gradient", "gradient"]  # one for memory, one is timed
    results = json.loads((tmp_path / "algorithms.json").read_text())
    measured = results["algorithms"]
    assert set(results) >= {"commit", "machine", "date", "options"}
    assert all(costs[name] > 0 for costs in measured.values() for name in COSTS)
    calls = {name: costs["unet_calls_per_image"] for name, costs in measured.items()}
    # Two steps with guidance, then: ppo the one step of the window, without the null prompt, which is the base model's;
    # matching two passes over two noise levels, each also with the base model; gradient both steps a second time.
    assert calls == {"ppo": 4 + 1, "matching": 4 + 8, "gradient": 4 + 4}
    assert measured["ppo"]["sampling_seconds_per_image"] > 0 == measured["gradient"]["sampling_seconds_per_image"]
    assert measured["ppo"]["ratio_deviation"] < measured["ppo"]["clip_range"] / 1000
    assert "unet_calls_per_image" in capsys.readouterr().out


def test_what_is_measured_of_an_algorithm_is_written_before_the_next_one_fails(scripts, tmp_path, monkeypatch):
    algorithms = scripts("algorithms")

    def measure(algorithm: str, options: argparse.Namespace) -> dict[str, float]:
        if algorithm == "matching":
            raise torch.OutOfMemoryError
        return {"images_per_s": 2.0}

    monkeypatch.setattr(algorithms, "measure", measure)
    with pytest.raises(torch.OutOfMemoryError):
        algorithms.main([*SMALL, "--json", str(tmp_path / "algorithms.json")])
    assert json.loads((tmp_path / "algorithms.json").read_text())["algorithms"] == {"ppo": {"images_per_s": 2.0}}


def test_an_algorithm_is_measured_with_its_own_defaults_but_for_what_is_given(scripts):
    algorithms = scripts("algorithms")
    options = algorithms.parse(["--model", "sd15", "--device", "cpu", "--num-images", "4", "--mixed-precision", "no"])
    ppo, matching, gradient = (algorithms.configure(name, options) for name in algorithms.ALGORITHMS)
    assert [config.algorithm for config in (ppo, matching, gradient)] == ["ppo", "matching", "gradient"]
    assert (ppo.num_inference_steps, matching.num_inference_steps, gradient.backprop_steps) == (50, 20, 4)
    assert (ppo.num_updates_per_epoch, matching.num_inner_epochs, matching.kl_weight) == (2, 2, 1e-4)
    assert (ppo.num_prompts_per_epoch, ppo.num_samples_per_prompt, gradient.num_prompts_per_epoch) == (1, 4, 4)
    options = algorithms.parse(["--model", "tiny", "--device", "cpu", "--num-inference-steps", "2"])
    config = algorithms.configure("gradient", options)
    assert (config.num_prompts_per_epoch, config.num_inference_steps, config.backprop_steps) == (64, 2, 2)


@pytest.mark.slow
def test_random_weights_are_trained_on_a_reward_that_costs_nothing(scripts, monkeypatch):
    algorithms = scripts("algorithms")
    build = algorithms.bench.architectures.build
    monkeypatch.setattr(algorithms.bench.architectures, "build", lambda _, *arguments: build("tiny", *arguments))
    given = ["--model", "sd15", "--device", "cpu", "--num-images", "2", "--num-inference-steps", "2", "--repeats", "1"]
    costs = algorithms.measure("gradient", algorithms.parse([*given, "--mixed-precision", "no"]))
    assert costs["config"]["reward"].endswith(":brightness")
    assert (costs["num_images"], costs["unet_calls_per_image"]) == (2, 8)


def test_an_odd_number_of_images_is_refused_as_groups_of_one_teach_nothing(scripts, capsys):
    with pytest.raises(SystemExit):
        scripts("algorithms").parse(["--num-images", "3"])
    assert "--num-images must be even, not 3" in capsys.readouterr().err


def run_gpu_script(folder, **environment):
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(BENCHMARKS / "gpu.sh"), str(folder)]
    return subprocess.run(command, env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True)


def program(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_the_gpu_script_goes_on_after_a_failure_and_ends_within_twelve_minutes(scripts, tmp_path):
    """`timeout` is replaced by a program that writes its arguments down, so that nothing is measured."""
    program(tmp_path / "timeout", f'echo "$@" >> {tmp_path}/commands; [[ "$*" != *exact* ]]')
    done = run_gpu_script(tmp_path, GPU_OPTIONS="--device cpu --repeats 1")
    assert done.returncode == 1
    assert done.stderr == "sd15-exact failed or took more than 180 s\n"
    commands = [shlex.split(line) for line in (tmp_path / "commands").read_text().splitlines()]
    assert [Path(command[-1]).stem for command in commands] == [
        "gpu-sd15-exact", "gpu-sd15-checkpointing", "gpu-sd15-algorithms", "gpu-sdxl", "gpu-sd35",
    ]  # fmt: skip
    assert sum(int(command[1]) + int(command[0].removeprefix("--kill-after=")) for command in commands) <= 12 * 60
    for _, _, _, script, *arguments in commands:
        assert scripts(Path(script).stem).parse(arguments).device == "cpu"


def test_the_gpu_script_runs_the_benches_that_are_named(scripts, tmp_path):
    program(tmp_path / "timeout", f'echo "$@" >> {tmp_path}/commands')
    assert run_gpu_script(tmp_path, GPU_BENCHES="tiny sd15").returncode == 0
    commands = [shlex.split(line) for line in (tmp_path / "commands").read_text().splitlines()]
    assert [scripts(Path(command[3]).stem).parse(command[4:]).model for command in commands] == ["sd15", "tiny"]


@pytest.mark.slow
def test_the_gpu_script_measures_small_shapes_on_a_cpu(tmp_path):
    small = "--device cpu --model tiny --resolution 64 --num-images 4 --num-inference-steps 2 --repeats 1"
    done = run_gpu_script(tmp_path, GPU_OPTIONS=small)
    assert done.returncode == 0, done.stderr
    results = {path.stem: json.loads(path.read_text())["algorithms"] for path in tmp_path.glob("*.json")}
    assert {name: list(costs) for name, costs in results.items()} == {
        "gpu-sd15-exact": ["ppo"],
        "gpu-sd15-checkpointing": ["ppo"],
        "gpu-sd15-algorithms": ["ppo", "matching", "gradient"],
        "gpu-sdxl": ["ppo", "matching", "gradient"],
        "gpu-sd35": ["ppo", "matching"],
    }
    exact, checkpointing = (results[f"gpu-sd15-{name}"]["ppo"] for name in ("exact", "checkpointing"))
    assert checkpointing["peak_memory_bytes"] < exact["peak_memory_bytes"]
