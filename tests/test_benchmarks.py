"""The benchmarks start; bench.py runs, compares equal work, and writes all its measures."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
LIBRARIES = {"architectures", "meters", "textbook"}  # imported by bench.py, and no programs
SMALL = ["--model", "tiny", "--device", "cpu", "--num-images", "4", "--num-inference-steps", "2", "--repeats", "1"]
HALF = [*SMALL, "--mixed-precision", "bf16"]
RATIOS = {"rollout_ratio", "update_ratio", "peak_memory_ratio", "matrix_rate_share", "update_matrix_rate_share"}
RATES = {"images_per_s", "unet_calls_per_s", "pairs_per_s", "textbook_images_per_s", "textbook_pairs_per_s", "matrix_rate"}
SIZES = {"peak_memory_bytes", "equal_micro_batch_peak_memory_bytes", "textbook_peak_memory_bytes", "startup_seconds"}
EXACT = {"ratio_deviation", "textbook_gradient_deviation", "textbook_log_prob_deviation", "textbook_image_deviation"}
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


def test_no_benchmark_puts_a_denoiser_together_itself():
    """The policy owns it: benchmarks that made their own once lost SDXL's pooled text."""
    assert not [name for name in SCRIPTS if "Denoiser(" in (BENCHMARKS / f"{name}.py").read_text()]


def test_what_is_measured_of_a_scorer_is_written_before_the_next_one_fails(scripts, monkeypatch, tmp_path):
    scoring = scripts("scoring")

    def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
        if name == "ocr":
            raise RuntimeError("no tesseract")
        return {"images_per_s_1": 2.0}

    monkeypatch.setattr(scoring, "measure", measure)
    options = ["--names", "jpeg", "ocr", "--device", "cpu", "--json", str(tmp_path / "scoring.json")]
    monkeypatch.setattr(sys, "argv", ["scoring.py", *options])
    with pytest.raises(RuntimeError, match="no tesseract"):
        scoring.main()
    assert json.loads((tmp_path / "scoring.json").read_text())["scorers"] == {"jpeg": {"images_per_s_1": 2.0}}


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


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("null_prompt", ["base", "adapted"])
def test_the_bench_refuses_to_compare_with_a_loop_that_does_something_else(bench, monkeypatch, null_prompt):
    options = bench.parse([*SMALL, "--null-prompt", null_prompt])
    made = bench.Bench(options)
    assert bench.verify(options, made)["textbook_gradient_deviation"] < 1e-4
    made.textbook.config = bench.replace(made.textbook.config, guidance_scale=3.01)
    with pytest.raises(RuntimeError, match="not the same"):
        bench.verify(options, made)


def test_what_half_precision_would_hide_is_checked_in_float32(bench, half):
    found = bench.verify(bench.parse(HALF), half)
    assert found["textbook_image_deviation"] < 1e-5 < found["timed_textbook_image_deviation"]
    assert found["textbook_gradient_deviation"] < 1e-4
    assert "timed_textbook_gradient_deviation" not in found


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
