"""`texforce eval`: the same noise for all, results that repeat and resume, the choice of a strength, and bad input."""

import csv
import json
import math
import resource
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from texforce import eval_checks, evaluation, files, measures, models, report, rewards, run, scorers, training
from texforce.config import TrainOptions, resolve
from texforce.draw_config import (
    EvalOptions,
    SampleOptions,
    System,
    parse_measures,
    parse_systems,
    resolve_eval,
    resolve_sample,
)
from texforce.errors import InputError

from .commands import check_failure, flags, invoke

PROMPTS = [
    ("a red circle", "one"),
    ("two navy boxes", "many"),
    ("a crimson disc", "one"),
    ("three white crosses", "many"),
    ("an ivory plus", "one"),
]


@pytest.fixture(scope="module")
def adapter(shared_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "out"
    training.train(resolve(TrainOptions(**shared_run | {"output_dir": str(folder), "learning_rate": 0.03})))
    return folder


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "five.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "category": category}) + "\n" for prompt, category in PROMPTS))
    return path


@pytest.fixture(scope="module")
def options(adapter, benchmark) -> dict:
    return {
        "benchmark": str(benchmark), "adapter": [f"tuned={adapter}"], "reward": ["hps,alignment"], "model": "tiny",
        "num_inference_steps": 2, "num_images": 2, "batch_size": 4,
    }  # fmt: skip


def run_eval(options: dict, folder: Path) -> dict:
    return evaluation.evaluate(resolve_eval(EvalOptions(**options, output_dir=str(folder))))


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "eval"
    run_eval(options, folder)
    return folder


def results_of(folder: Path) -> dict:
    results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    assert results.pop("timings")
    assert results.pop("command").startswith("texforce eval ")
    return results


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


# --- images ---


def test_images_are_what_sample_draws_of_the_same_prompt_and_seed(finished, options, adapter):
    prompt = results_of(finished)["prompts"][2]
    sampling = SampleOptions(adapter=[str(adapter)], prompt=["x"], num_inference_steps=2, compare=True)
    drawn = evaluation.sample(resolve_sample(sampling), 2 * [prompt["prompt"]], prompt["seeds"])
    for name, images in drawn.items():
        for k in range(2):
            expected = (images[k] * 255).round().permute(1, 2, 0).numpy()
            assert np.abs(pixels(finished / "images" / name / f"00002_{k}.png") - expected).max() <= 1


def test_at_scale_0_every_image_equals_the_base_models(options, adapter, tmp_path):
    """At a scale that is nearly 0, where LoRA is in the model, nearly all pixels are equal."""
    systems = [f"off={adapter}:0", f"faint={adapter}:1e-4", f"half={adapter}:0.5"]
    results = run_eval(options | {"adapter": systems, "reward": ["jpeg"]}, tmp_path / "eval")
    images = sorted(path.name for path in (tmp_path / "eval" / "images" / "base").iterdir())
    assert len(images) == 10
    drawn = {
        system: np.stack([pixels(tmp_path / "eval" / "images" / system / name).astype(int) for name in images])
        for system in ("base", "off", "faint", "half")
    }
    assert (drawn["base"] == drawn["off"]).all()
    assert np.abs(drawn["base"] - drawn["faint"]).mean() < 0.02
    assert np.abs(drawn["base"] - drawn["half"]).mean() > 1
    assert results["systems"]["off"]["measures"]["jpeg"]["paired"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_a_prompts_noise_depends_on_nothing_else(finished, options, tmp_path):
    run_eval(options | {"limit": 2, "reward": ["jpeg"]}, tmp_path / "eval")
    whole, part = results_of(finished), results_of(tmp_path / "eval")
    assert [p["prompt"] for p in part["prompts"]] == [PROMPTS[0][0], PROMPTS[2][0]]
    assert part["prompts"][1]["seeds"] == whole["prompts"][2]["seeds"]
    assert len({seed for p in whole["prompts"] for seed in p["seeds"]}) == 10
    difference = pixels(finished / "images/base/00002_1.png") - pixels(tmp_path / "eval/images/base/00001_1.png").astype(int)
    assert np.abs(difference).max() <= 1  # batches of other sizes round otherwise


@pytest.mark.slow
def test_adapters_under_one_name_are_drawn_together(options, adapter, tmp_path):
    options = options | {
        "adapter": [f"sum={adapter}:0.25", f"sum={adapter}:0.25", f"half={adapter}:0.5"],
        "reward": ["jpeg"],
    }
    run_eval(options, tmp_path / "eval")
    for i in range(5):
        one, other = (pixels(tmp_path / "eval/images" / name / f"{i:05d}_0.png").astype(int) for name in ("sum", "half"))
        assert np.abs(one - other).max() <= 1


def test_a_prompt_longer_than_the_encoder_reads_is_cut_as_elsewhere(options, tmp_path):
    (tmp_path / "long.txt").write_text("a red circle " * 40)
    options = options | {"benchmark": str(tmp_path / "long.txt"), "reward": ["jpeg"], "adapter": None}
    assert run_eval(options, tmp_path / "eval")["systems"]["base"]["measures"]["jpeg"]["mean"] < 0


# --- results ---


def test_results_hold_what_the_interface_says(finished):
    results = results_of(finished)
    assert list(results["systems"]) == ["base", "tuned"]
    for name, system in results["systems"].items():
        assert list(system["measures"]) == ["hps", "alignment", "diversity"]
        for measure, summary in system["measures"].items():
            kinds = () if name == "base" else ("paired", *measures.OUTCOMES)
            parts = [summary, *(summary[kind] for kind in kinds)]
            for part in (*parts, *summary["categories"].values()):
                assert part["low"] <= part["mean"] <= part["high"]
            assert set(summary["categories"]) == {"one", "many"}
            assert ("paired" in summary) == ("better" in summary) == ("spread" not in summary) == (name != "base")
            assert np.shape(system["scores"][measure]) == ((5, 1) if measure == "diversity" else (5, 2))
    assert results["benchmark"]["name"] == "five"
    assert {"torch", "diffusers", "texforce"} <= set(results["versions"])
    assert len(results["systems"]["tuned"]["adapters"][0]["sha256"][0]) == 64
    assert results["rewards"]["hps"]["hps"]["name"] == "hps.pt"


@pytest.mark.parametrize("given", [
    {}, {"benchmark": "parti", "limit": 3}, {"reward": ["hps", "clip"], "seed": 0, "num_images": 2}, {"compile": False},
    {"model": "tiny", "num_inference_steps": 3, "exact_preprocessing": True}, {"negative_prompt": "it's grey"},
])  # fmt: skip
def test_the_command_that_results_hold_is_the_shortest_that_means_the_same(given, tmp_path):
    config = resolve_eval(EvalOptions(**given, output_dir="my eval"))
    words = shlex.split(evaluation.shortest_command(config))
    assert words[:2] == ["texforce", "eval"]
    options: dict = {}
    for word in words[2:]:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            options[name.removeprefix("no_")] = [] if name.removeprefix("no_") != name else options.get(name, [])
        else:
            options[name].append(word)
    assert set(options) - {"output_dir"} <= set(given)
    assert options["output_dir"] == ["my eval"]
    assert ("limit" in options, "seed" in options) == ("limit" in given, False)


def test_the_command_that_results_hold_has_no_passwords():
    config = resolve_eval(EvalOptions(reward=["http://me:secret@host:1/score"]))
    assert evaluation.shortest_command(config) == "texforce eval --reward http://me@host:1/score"


def test_results_say_how_an_adapter_was_trained_if_its_folder_is_a_trainings(tmp_path):
    systems = [System("base"), System("one", ((str(tmp_path), 1.0),)), System("other", ((str(tmp_path / "file"), 1.0),))]
    assert evaluation.describe_trainings(systems) == {}
    options = {"reward": "hps", "algorithm": "ppo", "target": "both", "seed": 3, "num_epochs": 2}
    (tmp_path / "config.json").write_text(json.dumps(options))
    assert evaluation.describe_trainings(systems) == {str(tmp_path): "both trained by ppo on hps, seed 3: not finished"}
    result = {"num_images": 96, "seconds": 1.0, "heldout": {"hps": {"base": 0.0, "tuned": 1.0}}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert run.describe_training(tmp_path) == "both trained by ppo on hps, seed 3: 96 images"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not JSON"):
        evaluation.describe_trainings(systems)


def test_results_can_be_computed_anew_from_the_scores_they_hold(finished):
    results = results_of(finished)
    scores = {
        name: {measure: np.array(table, dtype=float) for measure, table in system["scores"].items()}
        for name, system in results["systems"].items()
    }
    summary = measures.summarise(scores, "base", [p["category"] for p in results["prompts"]], results["seed"])
    assert summary == {name: system["measures"] for name, system in results["systems"].items()}


def test_scores_are_those_of_the_written_images(finished):
    results, prompt = results_of(finished), PROMPTS[3][0]
    images = torch.stack([files.read_image(finished / f"images/tuned/00003_{k}.png")[0] for k in range(2)])
    expected = rewards.load_reward("alignment")(images, 2 * [prompt])
    assert results["systems"]["tuned"]["scores"]["alignment"][3] == pytest.approx(expected.tolist())
    with (finished / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    row = next(row for row in rows if row["image"] == "images/tuned/00003_1.png")
    assert (row["system"], row["prompt"], row["category"]) == ("tuned", prompt, "many")
    assert float(row["alignment"]) == pytest.approx(expected[1].item())
    assert int(row["seed"]) == results["prompts"][3]["seeds"][1]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_results_and_another_one_others(finished, options, tmp_path):
    run_eval(options, tmp_path / "again")
    assert results_of(tmp_path / "again") == results_of(finished)
    run_eval(options | {"seed": 1, "adapter": None, "reward": ["hps"]}, tmp_path / "other")
    base, other = (results_of(folder)["systems"]["base"] for folder in (finished, tmp_path / "other"))
    assert base["scores"]["hps"] != other["scores"]["hps"]


def test_diversity_falls_to_0_when_all_images_are_the_same(options, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.Evaluation, "seed", lambda self, i, k: 5)
    results = run_eval(options | {"reward": ["jpeg,hps"], "adapter": None}, tmp_path / "eval")
    assert results["systems"]["base"]["measures"]["diversity"]["mean"] == pytest.approx(0, abs=1e-5)
    assert list(results["systems"]["base"]["measures"]) == ["jpeg", "hps", "diversity"]


def test_an_image_that_is_not_finite_has_no_score_and_is_counted(options, tmp_path, monkeypatch):
    original = evaluation.draw

    def broken(*arguments):
        images = original(*arguments)
        images[1, 0, 0, 0] = math.nan
        return images

    monkeypatch.setattr(evaluation, "draw", broken)
    results = run_eval(options | {"reward": ["jpeg"], "adapter": None}, tmp_path / "eval")
    base = results["systems"]["base"]
    assert [row[1] for row in base["scores"]["jpeg"]].count(None) == 3  # one a chunk
    assert base["measures"]["jpeg"]["num_images_dropped"] == 3


def test_a_strength_is_chosen_on_one_half_and_measured_on_the_other(options, adapter, tmp_path):
    results = run_eval(options | {"strength": "0,0.5,1", "reward": ["alignment,jpeg"]}, tmp_path / "eval")
    sweep = results["strengths"]["tuned"]
    assert [point["strength"] for point in sweep["curve"]] == [0, 0.5, 1]
    means = [point["measures"]["alignment"]["mean"] for point in sweep["curve"]]
    assert means[[0, 0.5, 1].index(sweep["best"])] == max(means)
    assert sweep["curve"][0]["measures"]["alignment"]["paired"]["mean"] == 0
    tuned = results["systems"]["tuned"]
    assert tuned["strength"] == sweep["best"]
    halves = np.array([prompt["validation"] for prompt in results["prompts"]])
    assert results["num_prompts_measured"] == (~halves).sum() == 2
    scores = np.array(tuned["scores"]["alignment"])
    assert tuned["measures"]["alignment"]["mean"] == pytest.approx(scores[~halves].mean())
    drawn = np.array([float(row["alignment"]) for row in csv.DictReader((tmp_path / "eval/results.csv").open())
                      if row["system"] == f"tuned@{sweep['best']:g}"]).reshape(5, 2)  # fmt: skip
    assert max(means) == pytest.approx(drawn[halves].mean())


# --- an evaluation that goes on ---


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(finished, options, tmp_path, monkeypatch):
    original, drawn = evaluation.draw, []

    def interrupted(*arguments):
        if len(drawn) == 4:  # the base's three chunks and the tuned one's first
            raise KeyboardInterrupt
        drawn.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(evaluation, "draw", interrupted)
    result = invoke("eval", *flags(options), "--output-dir", tmp_path / "eval")
    assert result.exit_code == 130
    cut_off = tmp_path / "eval/images/base/.00004_1.png.x.tmp/00004_1.png"
    cut_off.parent.mkdir()
    cut_off.write_bytes(b"cut off")
    monkeypatch.setattr(evaluation, "draw", lambda *arguments: drawn.append(arguments) or original(*arguments))
    run_eval(options, tmp_path / "eval")
    assert len(drawn) == 6
    assert results_of(tmp_path / "eval") == results_of(finished)
    assert not list((tmp_path / "eval").rglob("*.tmp"))


def test_only_what_is_missing_is_made_again(finished, options, tmp_path, monkeypatch):
    folder = tmp_path / "eval"
    shutil.copytree(finished, folder)
    (folder / "images/tuned/00001_0.png").unlink()
    lines = (folder / "scores.jsonl").read_text().splitlines(keepends=True)
    (folder / "scores.jsonl").write_text("".join(lines[:-2]) + lines[-2][:20])  # killed while it wrote
    times = {path: path.stat().st_mtime_ns for path in (folder / "images").rglob("*.png")}
    original, drawn = evaluation.draw, []
    monkeypatch.setattr(evaluation, "draw", lambda *arguments: drawn.append(arguments) or original(*arguments))
    run_eval(options, folder)
    assert len(drawn) == 1
    assert times.items() <= {path: path.stat().st_mtime_ns for path in (folder / "images").rglob("*.png")}.items()
    assert results_of(folder) == results_of(finished)
    assert sorted((folder / "scores.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)


def test_a_finished_evaluation_takes_further_measures_and_systems(finished, options, adapter, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "eval")
    more = options | {"reward": ["hps,alignment,jpeg"], "adapter": [*options["adapter"], f"half={adapter}:0.5"]}
    results = run_eval(more, tmp_path / "eval")
    assert list(results["systems"]) == ["base", "tuned", "half"]
    assert results["systems"]["tuned"]["measures"]["hps"] == results_of(finished)["systems"]["tuned"]["measures"]["hps"]


def test_systems_and_rewards_may_come_in_any_order_into_a_finished_folder(finished, options, adapter, tmp_path):
    shutil.copytree(finished, tmp_path / "eval")
    both = [*options["adapter"], f"half={adapter}:0.5"]
    for changed in ({"reward": ["incompress,hps"], "adapter": both}, {"reward": ["hps,alignment"], "adapter": both}):
        results = run_eval(options | changed, tmp_path / "eval")
        assert list(results["systems"]["half"]["measures"])[-1] == "diversity"
    assert results["systems"]["tuned"]["measures"] == results_of(finished)["systems"]["tuned"]["measures"]


@pytest.mark.parametrize(("kept", "asked", "words"), [
    ({"name": "world", "num_prompts": 24, "sha256": "a"}, {"name": "world", "num_prompts": 256, "sha256": "b"},
     "benchmark world, 24 prompts there, 256 asked for"),
    ({"name": "world", "num_prompts": 24}, {"name": "parti", "num_prompts": 24}, "benchmark world there, parti asked for"),
    ({"name": "mine", "num_prompts": 24, "sha256": "a"}, {"name": "mine", "num_prompts": 24, "sha256": "b"},
     "benchmark mine, other prompts there"),
    ({"torch": "2.10", "python": "3"}, {"torch": "2.11", "python": "3"}, "versions of torch 2.10 there, 2.11 asked for"),
    (0.5, 1.0, "versions 0.5 there, 1.0 asked for"),
])  # fmt: skip
def test_how_an_evaluation_differs_is_told_in_words_without_digests(kept, asked, words):
    name = "benchmark" if isinstance(kept, dict) and "name" in kept else "versions"
    assert eval_checks._difference(name, kept, asked) == words


def test_a_finished_evaluation_is_overwritten_only_where_asked_and_with_nothing_of_others(finished, options, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "eval")
    fewer = options | {"num_images": 1, "reward": ["jpeg"], "adapter": None}
    with pytest.raises(InputError, match=r"num_images .* there, 1 asked for; choose another folder, or give --overwrite"):
        run_eval(fewer, folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt' was not written by texforce"):
        run_eval(fewer | {"overwrite": True}, folder)
    assert results_of(folder)["num_images"] > 1
    (folder / "notes.txt").unlink()
    run_eval(fewer | {"overwrite": True}, folder)
    assert results_of(folder)["num_images"] == 1
    assert len(list(folder.rglob("images/*/*.png"))) == results_of(folder)["num_prompts_measured"]


def test_the_revision_of_a_hub_model_is_known_before_the_first_image(options, tmp_path, monkeypatch):
    """Otherwise a revision that is fetched while loading would look like a change when the evaluation goes on."""
    fetched = []
    monkeypatch.setattr(models, "find_model", lambda name: fetched.append(name) or str(models.TINY))
    monkeypatch.setattr(models, "revision", lambda name: "0123abc" if fetched else None)
    options = options | {"adapter": None, "reward": ["jpeg"], "model": "nobody/small"}
    run_eval(options, tmp_path / "eval")
    run_eval(options, tmp_path / "eval")
    assert results_of(tmp_path / "eval")["model_revision"] == "0123abc"


def test_a_folder_that_moved_is_the_same_and_a_changed_one_is_not(finished, options, adapter, tmp_path):
    shutil.copytree(finished, tmp_path / "eval")
    moved = shutil.copytree(adapter, tmp_path / "moved")
    run_eval(options | {"adapter": [f"tuned={moved}"]}, tmp_path / "eval")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    with pytest.raises(ValueError, match=r"holds another system called tuned"):
        run_eval(options | {"adapter": [f"tuned={moved}"]}, tmp_path / "eval")


def test_results_of_a_sweep_can_be_computed_anew_too(options, tmp_path):
    results = run_eval(options | {"strength": "0,1", "reward": ["alignment"], "num_images": 1}, tmp_path / "eval")
    halves = np.array([prompt["validation"] for prompt in results["prompts"]])
    for point in results["strengths"]["tuned"]["curve"]:
        scores = np.array(point["scores"]["alignment"], dtype=float)
        assert point["measures"]["alignment"]["mean"] == pytest.approx(scores[halves].mean())


def test_exact_preprocessing_is_asked_for_said_in_the_results_and_scored_apart(finished, options, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "eval")
    before, seen = results_of(finished), []
    pad = scorers.pad_to_square_exactly
    monkeypatch.setattr(scorers, "pad_to_square_exactly", lambda *given: seen.append(len(given[0])) or pad(*given))
    given = options | {"reward": ["hps,jpeg"], "num_images": 2}
    run_eval(given, tmp_path / "eval")
    assert seen == []
    run_eval(given | {"exact_preprocessing": True}, tmp_path / "eval")
    results = results_of(tmp_path / "eval")
    assert sum(seen) == 2 * 2 * 2 * len(PROMPTS)  # scores and features, two systems, two images
    assert "preprocessing" not in results["rewards"]["jpeg"]  # which reads images as they are
    assert results["rewards"]["hps"] == before["rewards"]["hps"] | {"preprocessing": "exact"}
    means = [found["systems"]["base"]["measures"]["hps"]["mean"] for found in (before, results)]
    assert 0 < abs(means[0] - means[1]) < 0.01


def test_two_evaluations_in_one_folder_exclude_each_other(options, tmp_path):
    with files.locked(tmp_path / "eval", lambda: None):
        result = invoke("eval", *flags(options), "--output-dir", tmp_path / "eval")
    check_failure(result, 2, "in use by process")
    assert run_eval(options | {"adapter": None, "reward": ["jpeg"]}, tmp_path / "eval")["systems"]


def test_scores_of_other_weights_are_not_taken_for_these(options, tmp_path):
    (tmp_path / "mine.py").write_text("def score(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    options = options | {"adapter": None, "reward": [f"{tmp_path / 'mine.py'}:score"]}
    first = run_eval(options, tmp_path / "eval")["systems"]["base"]["measures"]
    (tmp_path / "mine.py").write_text("def score(images, prompts):\n    return 2 * images.mean(dim=(1, 2, 3))\n")
    second = run_eval(options, tmp_path / "eval")["systems"]["base"]["measures"]
    name = options["reward"][0]
    assert second[name]["mean"] == pytest.approx(2 * first[name]["mean"])


# --- the command line ---


def test_the_command_shows_a_table_and_names_the_report(finished, options):
    result = invoke("eval", *flags(options), "--output-dir", finished)
    assert result.exit_code == 0, result.output
    summary = results_of(finished)["systems"]["tuned"]["measures"]["hps"]
    for number in (summary["mean"], summary["low"], summary["high"], summary["paired"]["low"]):
        assert f"{number:.4f}" in result.stdout
    assert "/".join(str(share) for _, share in report.percents(summary)) in result.stdout
    assert "five: 5 prompts, 2 images each" in result.stdout
    assert str(finished / "report.html") in result.stdout
    assert "drawing tuned: done" in result.stderr


def test_another_evaluations_folder_is_left_alone(finished, options, adapter, tmp_path):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for changed, word in (
        ({"seed": 3}, "seed"), ({"num_images": 3}, "num_images"), ({"limit": 2}, "benchmark"),
        ({"guidance_scale": 2.0}, "guidance_scale"), ({"adapter": [f"tuned={adapter}:0.5"]}, "tuned"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=rf"output_dir: (?s:.*)\b{word}\b"):
            run_eval(options | changed, finished)
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        run_eval(options, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


BAD = {
    "unknown benchmark": (["--benchmark", "drawbenhc"], 2, ["drawbenhc", "known are drawbench"]),
    "hub out of reach": (["--benchmark", "drawbench"], 2, ["sayakpaul/drawbench", "--benchmark FILE"]),
    "malformed line": (["--benchmark", "BAD.jsonl"], 2, ["bad.jsonl, line 2", "not JSON"]),
    "control characters": (["--benchmark", "ESC.txt"], 2, ["esc.txt, line 1", "U+001B"]),
    "unknown reward": (["--reward", "hps,beauty"], 2, ["beauty", "known are"]),
    "a reward twice": (["--reward", "hps,hps"], 2, ["hps,hps"]),
    "prompts it cannot judge": (["--benchmark", "OTHER.txt", "--reward", "alignment"], 2, ["a castle"]),
    "no such adapter": (["--adapter", "x=absent"], 2, ["absent"]),
    "no such unet": (["--unet", "x=absent"], 2, ["absent"]),
    "not an adapter": (["--adapter", "x=OTHER.txt"], 3, ["other.txt"]),
    "base is taken": (["--adapter", "base=OTHER.txt"], 2, ["'base'", "NAME="]),
    "nameless": (["--adapter", "OTHER DIR"], 2, ["NAME="]),
    "one name twice": (["--adapter", "OTHER.txt", "--adapter", "OTHER.txt"], 2, ["comes twice"]),
    "two unets": (["--unet", "a=OTHER.txt", "--unet", "a=OTHER.txt"], 2, ["takes one"]),
    "strength of nothing": (["--strength", "0,1"], 2, ["--adapter"]),
    "no numbers": (["--adapter", "x=ADAPTER", "--strength", "0,strong"], 2, ["0,strong"]),
    "one strength twice": (["--adapter", "x=ADAPTER", "--strength", "1,1.0"], 2, ["different"]),
    "half of one prompt": (["--adapter", "x=ADAPTER", "--strength", "0,1", "--limit", "1"], 2, ["half"]),
    "no images": (["--num-images", "0"], 2, ["--num-images"]),
    "no prompts": (["--limit", "0"], 2, ["limit"]),
    "no time": (["--reward-timeout", "0"], 2, ["--reward-timeout"]),
    "a file for a folder": (["--output-dir", "OTHER.txt/eval"], 2, ["--output-dir", "is a file"]),
    "no such function": (["--reward", "NAN.py:nothing"], 2, ["nothing"]),
    "no such weights": (["--reward", "hps", "--reward-checkpoint", "hps=absent.pt"], 2, ["absent.pt"]),
    "weights out of reach": (["--reward", "clip"], 2, ["--reward-checkpoint clip=PATH"]),
    "a broken reward": (["--reward", "RAISES.py:score"], 6, ["raised", "no score today"]),
    "no finite score": (["--reward", "NAN.py:score"], 6, ["no finite score"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_its_code_and_leaves_nothing_half_done(case, adapter, benchmark, tmp_path, monkeypatch):
    arguments, code, words = BAD[case]
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": \n')
    (tmp_path / "esc.txt").write_text("a \x1b[2J circle\n")
    (tmp_path / "other.txt").write_text("a castle\n")
    (tmp_path / "other dir").mkdir()
    (tmp_path / "raises.py").write_text("def score(images, prompts):\n    raise OSError('no score today')\n")
    (tmp_path / "nan.py").write_text("def score(images, prompts):\n    return images[:, 0, 0, 0] * float('nan')\n")
    monkeypatch.chdir(tmp_path)
    given = {"--benchmark": str(benchmark), "--output-dir": "eval", "--reward": "jpeg"}
    given = {name: value for name, value in given.items() if name not in arguments}
    arguments = [text.replace("ADAPTER", str(adapter)) if "ADAPTER" in text else text.lower() for text in arguments]
    small = ["--num-inference-steps", "1"] + ([] if "--num-images" in arguments else ["--num-images", "1"])
    check_failure(invoke("eval", *arguments, *small, *(text for pair in given.items() for text in pair)), code, *words)
    if code != 6 and case not in ("not an adapter",):
        assert not (tmp_path / "eval").exists()


def test_a_full_disk_ends_with_5_and_the_evaluation_goes_on_later(finished, options, tmp_path):
    """A limit of the file size stands for the full disk: it cuts off the file of scores, and then the report."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (3000, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            check_failure(invoke("eval", *flags(options), "--output-dir", tmp_path / "eval"), 5, "storage", "large")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list((tmp_path / "eval").rglob("*.tmp"))
    run_eval(options, tmp_path / "eval")
    assert results_of(tmp_path / "eval") == results_of(finished)


def test_a_damaged_image_is_named(finished, options, tmp_path):
    shutil.copytree(finished, tmp_path / "eval")
    path = tmp_path / "eval" / "images" / "tuned" / "00002_1.png"
    path.write_bytes(path.read_bytes()[:60])
    for wanted in ("hps,alignment,jpeg", "hps,alignment"):  # to be scored, and to be shown
        result = invoke("eval", *flags(options | {"reward": [wanted]}), "--output-dir", tmp_path / "eval")
        check_failure(result, 3, "00002_1.png", "delete it")


CELLS = ["=1+1", "+1", "-1", "@SUM(A1)", "\ttab", "\rreturn", "also a = b", "'quoted'", "a red circle"]


def test_cells_that_a_spreadsheet_would_compute_are_text(tmp_path):
    config = SimpleNamespace(num_images=1, output_dir=str(tmp_path), batch_size=1, seed=0)
    benchmark = SimpleNamespace(prompts=CELLS, categories=CELLS[::-1])
    small = evaluation.Evaluation(config, benchmark, [System("base")])
    evaluation.write_csv(small, {"base": {"@mine.py:f": -np.ones((len(CELLS), 1))}})
    with (tmp_path / "results.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[-1] == "'@mine.py:f"
    expected = [*(f"'{cell}" for cell in CELLS[:6]), *CELLS[6:]]
    assert [row[1] for row in rows] == expected
    assert [row[2] for row in rows] == expected[::-1]
    assert {row[-1] for row in rows} == {"-1.0"}  # a number stays one


# --- options ---


def test_systems_are_parsed_as_documented(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    adapters = ["runs/out/", "x=runs/out:0.5", "x=other", "te=a=b"]
    assert parse_systems(adapters, ["ddpo.safetensors", "x=u:-2"]) == (
        System("out", (("runs/out/", 1.0),)),
        System("x", (("runs/out", 0.5), ("other", 1.0)), (("u", -2.0),)),
        System("te", (("a=b", 1.0),)),
        System("ddpo", (), (("ddpo.safetensors", 1.0),)),
    )
    with pytest.raises(InputError, match="give a name"):
        parse_systems(["a=b"], [])  # there is such a folder


def test_measures_are_names_or_mixtures():
    assert parse_measures(["hps,clip", "hps=1,jpeg=0.1", "mine.py:f"]) == ("hps", "clip", "hps=1,jpeg=0.1", "mine.py:f")


def test_defaults_follow_the_model_and_the_benchmark():
    config = resolve_eval(EvalOptions(model="tiny"))
    assert (config.benchmark, config.measures) == ("world", ("hps", "alignment", "alignment_exact"))
    config = resolve_eval(EvalOptions(model="some/model"))
    assert (config.benchmark, config.measures, config.num_inference_steps) == ("drawbench", ("hps",), 50)
