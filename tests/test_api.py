"""texforce from Python: functions that do what the commands do, and results that can be worked with."""

import errno
import inspect
import io
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import jedi
import pytest
from PIL import Image

import texforce
from texforce import api, evaluation, files, run, training
from texforce.config import TrainConfig, TrainOptions, resolve
from texforce.draw_config import EvalConfig, MergeConfig, SampleConfig
from texforce.options import option_fields

from .commands import invoke

ROOT = Path(__file__).parents[1]
WEIGHTS = "adapter_model.safetensors"
FUNCTIONS = {
    texforce.train: (TrainConfig, api.TrainArguments), texforce.sample: (SampleConfig, api.SampleArguments),
    texforce.merge: (MergeConfig, api.MergeArguments), texforce.evaluate: (EvalConfig, api.EvaluateArguments),
}  # fmt: skip
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


@pytest.fixture(scope="module")
def options(shared_run) -> dict:
    return shared_run | {"num_epochs": 2, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory) -> api.TrainResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("texforce.run.write_curve", lambda *arguments: None)
        return texforce.train(**options, output_dir=tmp_path_factory.mktemp("trained") / "out", progress=False)


@pytest.fixture(scope="module")
def sampled(trained, tmp_path_factory) -> api.SampleResult:
    folder = tmp_path_factory.mktemp("sampled")
    arguments = {"prompt": "two red squares", "adapter": trained, "num_images": 2, "compare": True}
    return texforce.sample(**arguments, output_dir=folder, progress=False)


@pytest.fixture(scope="module")
def evaluated(trained, options, tmp_path_factory) -> api.EvaluationResult:
    folder = tmp_path_factory.mktemp("evaluated") / "eval"
    arguments = {"adapter": trained.output_dir, "benchmark": options["heldout_prompts"], "reward": "jpeg", "num_images": 2}
    return texforce.evaluate(**arguments, output_dir=folder, progress=False)


# --- results ---


def test_a_training_by_the_function_is_the_commands(trained, options, tmp_path, monkeypatch):
    monkeypatch.setattr("texforce.run.write_curve", lambda *arguments: None)
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    result = invoke("train", *flags, "--output-dir", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (trained.output_dir / WEIGHTS).read_bytes()


def test_a_trainings_result_is_what_it_wrote(trained):
    written = files.read_json(trained.output_dir / "result.json")
    assert trained.details == written
    assert (trained.measured_on, trained.num_images) == ("heldout", 16)
    assert {name: {"base": trained.base[name], "tuned": trained.tuned[name]} for name in trained.base} == written["heldout"]
    assert trained.change["jpeg"] == trained.tuned["jpeg"] - trained.base["jpeg"]
    assert [epoch["epoch"] for epoch in trained.epochs] == [0, 1, 2]
    assert trained.config.reward == "jpeg"
    assert f"{trained.base['jpeg']:.4f} -> {trained.tuned['jpeg']:.4f}" in repr(trained)


def test_sampled_images_lie_where_the_result_says(sampled):
    assert [(image.system, image.seed) for image in sampled.images] == [("base", 0), ("base", 1), ("tuned", 0), ("tuned", 1)]
    with sampled.images[2].open() as image:
        assert (image.size, image.text["seed"], image.text["system"]) == ((32, 32), "0", "tuned")
    assert sampled.grid.is_file()


def test_a_merge_names_its_files(trained, tmp_path):
    merged = texforce.merge(adapter=[trained.output_dir], format="kohya", output_dir=tmp_path / "lora")
    assert (merged.output_dir, merged.format) == (tmp_path / "lora", "kohya")
    assert tmp_path / "lora" / "lora.safetensors" in merged.files


def test_an_evaluations_result_is_what_it_wrote(evaluated):
    written = files.read_json(evaluated.output_dir / "results.json")
    assert evaluated.details == written
    assert evaluated.report.is_file()
    measured = {(item.system, item.measure): item for item in evaluated.measured}
    assert list(measured) == [("base", "jpeg"), ("out", "jpeg")]
    summary = written["systems"]["out"]["measures"]["jpeg"]
    found = measured["out", "jpeg"]
    assert (found.mean, found.low, found.high) == tuple(summary[name] for name in ("mean", "low", "high"))
    assert (found.change, found.change_low, found.change_high) == tuple(summary["paired"].values())
    assert measured["base", "jpeg"].change is None
    assert f"{found.mean:.4f}" in repr(evaluated)


@pytest.mark.parametrize("result", ["trained", "sampled", "evaluated"])
def test_a_result_draws_a_figure_that_notebooks_show(result, request):
    figure = request.getfixturevalue(result).plot()
    assert figure.axes
    Image.open(io.BytesIO(figure._repr_png_())).verify()


def test_results_become_tables_of_pandas(trained, sampled, evaluated):
    epochs, images, scores = (result.to_pandas() for result in (trained, sampled, evaluated))
    assert epochs["heldout.jpeg"].dropna().tolist() == [trained.base["jpeg"], trained.tuned["jpeg"]]
    assert images.columns.tolist() == ["system", "prompt", "seed", "path"]
    assert len(scores) == 2 * 2 * 2  # systems, prompts, images
    means = scores.groupby("system")["jpeg"].mean()
    assert means["out"] == pytest.approx(next(item.mean for item in evaluated.measured if item.system == "out"))


def test_without_pandas_it_is_named(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(texforce.InputError, match=r"pip install pandas"):
        trained.to_pandas()


def test_functions_and_results_can_be_pickled(trained, sampled):
    for value in (texforce.train, trained, sampled):
        assert pickle.loads(pickle.dumps(value)) == value  # noqa: S301


# --- overwriting ---


def test_a_training_writes_nothing_that_overwrite_does_not_remove(trained, tmp_path):
    names = {path.name for path in trained.output_dir.iterdir()}
    assert names >= {"config.json", "result.json", "metrics.jsonl", "grids", "checkpoints", WEIGHTS}
    folder = shutil.copytree(trained.output_dir, tmp_path / "out")
    files.remove_written(folder, run.WRITTEN)
    assert {path.name for path in folder.iterdir()} <= {files.LOCK, files.HOLDER}


@pytest.mark.parametrize("name", ["notes.txt", "grids/notes.txt", "checkpoints/best/tensors.safetensors", "unet/mine.bin"])
def test_nothing_is_overwritten_beside_what_somebody_else_put_there(trained, options, tmp_path, name):
    folder = shutil.copytree(trained.output_dir, tmp_path / "out")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    with pytest.raises(texforce.InputError, match="was not written by texforce"):
        texforce.train(**options | {"output_dir": folder, "progress": False}, overwrite=True)
    assert (folder / name).read_text() == "mine"
    assert (folder / "result.json").is_file()


def test_a_run_is_not_overwritten_by_one_that_cannot_begin(trained, options, tmp_path):
    folder = shutil.copytree(trained.output_dir, tmp_path / "out")
    with pytest.raises(texforce.InputError, match="lora_modules"):
        texforce.train(**options | {"output_dir": folder, "progress": False}, overwrite=True, lora_modules=["q_porj"])
    assert (folder / "result.json").is_file()
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(texforce.InputError, match=r"holds an adapter, and no metrics\.jsonl"):
        texforce.train(**options | {"output_dir": folder, "progress": False}, overwrite=True)


def test_a_measured_reward_may_be_a_single_text(options, tmp_path):
    with pytest.raises(texforce.InputError, match="reward: unknown name 'x'"):
        texforce.train(**options | {"output_dir": tmp_path / "out", "progress": False, "eval_reward": "jpeg=1,x=2"})


def test_a_run_is_overwritten_only_where_asked_and_with_nothing_of_others(trained, options, tmp_path, monkeypatch):
    monkeypatch.setattr("texforce.run.write_curve", lambda *arguments: None)
    folder = shutil.copytree(trained.output_dir, tmp_path / "out")
    once = options | {"num_epochs": 1, "output_dir": folder, "progress": False}
    with pytest.raises(texforce.InputError, match="is not empty; choose another folder"):
        texforce.train(**once)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(texforce.InputError, match=r"notes\.txt' was not written by texforce"):
        texforce.train(**once, overwrite=True)
    with pytest.raises(texforce.InputError, match="overwrite: it begins anew, and resume goes on"):
        texforce.train(resume=folder, overwrite=True)
    assert files.read_json(folder / "result.json")["num_images"] == 16
    (folder / "notes.txt").unlink()
    assert [epoch["epoch"] for epoch in texforce.train(**once, overwrite=True).epochs] == [0, 1]
    assert files.read_json(folder / "config.json")["overwrite"] is False
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [
        path.name for path in run.checkpoints(folder / "checkpoints")
    ]
    assert texforce.train(resume=folder, progress=False).num_images == 8  # it is finished, and is not removed


# --- progress ---


def show_stages(monkeypatch, function: str, **arguments: object) -> None:
    """Call a function whose work is replaced by a report of its stages."""

    def work(*given: object) -> object:
        from texforce import stages

        stages.report("drawing base", 4, 4)
        return {"systems": {}} if function == "evaluate" else ([], Path("grid.png"))

    monkeypatch.setattr(evaluation, "evaluate" if function == "evaluate" else "sample_to_folder", work)
    getattr(texforce, function)(**arguments)


@pytest.mark.parametrize(("function", "arguments"), [("sample", {"prompt": "a"}), ("evaluate", {})])
@pytest.mark.parametrize(("progress", "shown"), [({}, "drawing base: done\n"), ({"progress": False}, "")])
def test_progress_is_shown_unless_it_is_switched_off(function, arguments, progress, shown, monkeypatch, capfd):
    show_stages(monkeypatch, function, **arguments, **progress)
    assert capfd.readouterr() == ("", shown)


@pytest.mark.parametrize(
    ("progress", "lines"), [({}, ["model: tiny (as asked)", "epoch 0/2", "epoch 1/2"]), ({"progress": False}, [])]
)
def test_a_trainings_progress_is_a_line_an_epoch_unless_it_is_switched_off(
    progress, lines, options, tmp_path, monkeypatch, capfd
):
    result = {"heldout": {"jpeg": {"base": 0.0, "tuned": 1.0}}, "num_images": 8, "seconds": 1.0}

    def train(config, report, warn, resume, force):
        for epoch in range(2):
            report({"epoch": epoch, "seconds": 0.0})
        return result

    monkeypatch.setattr(training, "train", train)
    assert texforce.train(**options, output_dir=tmp_path, **progress).change == {"jpeg": 1.0}
    out, shown = capfd.readouterr()
    assert out == ""
    assert len(shown.splitlines()) == len(lines)
    assert all(line.startswith(start) for line, start in zip(shown.splitlines(), lines, strict=True))


# --- bad input ---


@pytest.mark.parametrize(("function", "arguments", "words"), [
    ("train", {"learning_rte": 1.0}, "learning_rte: there is no such option; did you mean 'learning_rate'?"),
    ("train", {"lr": 1.0}, "lr: there is no such option; did you mean 'learning_rate'?"),
    ("train", {"algorithm": "pp0"}, "algorithm: must be one of ppo, matching, gradient, not 'pp0'; did you mean 'ppo'?"),
    ("train", {"force_resume": True}, "force_resume: works only together with resume"),
    ("train", {"resume": "nowhere"}, "there is no run in 'nowhere'"),
    ("sample", {}, "prompt: give prompt or prompts"), ("train", {"output_dir": "full"}, "by resume full"),
    ("train", {"prompts": ["a", "b"]}, "prompts: give a file or the name of a set, not a list"),
    ("sample", {"prompts": ["a"]}, "prompts: give a file or the name of a set, not a list; prompt takes a list"),
    ("train", {"config": "nope --lr.json"}, "there is no file 'nope --lr.json'"),
    ("sample", {"prompt": 5}, "prompt: must be a text or a list of texts, not 5"),
    ("merge", {}, "there is nothing to merge"), ("evaluate", {"adapter": "nowhere"}, "nowhere"),
])  # fmt: skip
def test_bad_input_is_an_input_error_in_the_words_of_python(function, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    with pytest.raises(texforce.InputError) as raised:
        getattr(texforce, function)(**arguments)
    assert words in str(raised.value)
    assert "--" not in str(raised.value).replace("--lr.json", "")


@pytest.mark.parametrize(("error", "kind"), [
    (OSError(errno.ENOSPC, "full"), texforce.StorageError), (MemoryError(), texforce.OutOfMemory), (KeyError("x"), KeyError),
])  # fmt: skip
def test_a_full_disk_and_a_lack_of_memory_are_errors_of_ours_and_a_bug_stays_one(error, kind, monkeypatch):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(evaluation, "sample_to_folder", fail)
    with pytest.raises(kind):
        texforce.sample(prompt="a", progress=False)


def test_code_that_another_run_names_is_not_run_unasked(options, tmp_path):
    (tmp_path / "mine.py").write_text("def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    files.write_json(tmp_path / "config.json", {"reward": f"{tmp_path / 'mine.py'}:brightness"})
    with pytest.raises(texforce.InputError, match="is code that"):
        texforce.train(config=tmp_path / "config.json", output_dir=tmp_path / "out")


# --- what editors and notebooks see ---


@each_function
def test_a_function_takes_every_option_of_its_command_and_what_type_checkers_are_told(function):
    config, arguments = FUNCTIONS[function]
    options = [item.name for item in option_fields(config)]
    own = list(vars(arguments)["__annotations__"])
    assert list(inspect.signature(function).parameters) == [*options, *own]
    assert [getattr(arguments, name) for name in own] == [
        item.default for name, item in inspect.signature(function).parameters.items() if name in own
    ]


@pytest.mark.parametrize("model", ["tiny", "tiny-flow", "stabilityai/sdxl-turbo", "black-forest-labs/FLUX.1-dev"])
def test_a_default_in_the_signature_is_what_a_training_takes(model):
    config = resolve(TrainOptions(model=model, mixed_precision="no"))
    shown = {name: item.default for name, item in inspect.signature(texforce.train).parameters.items()}
    options = {item.name for item in option_fields(TrainConfig)} - {"model", "mixed_precision"}
    assert {name for name in options if shown[name] is not None and shown[name] != getattr(config, name)} == set()
    assert sum(shown[name] is not None for name in options) > 10


def test_a_function_in_the_place_of_a_text_is_told_how_it_is_named():
    with pytest.raises(texforce.InputError, match=r"reward: must be a text, .*; write a function as 'path/to/file"):
        texforce.train(reward=lambda images, prompts: [0.0] * len(prompts))


@each_function
def test_help_in_python_holds_every_option_with_its_text(function):
    text = inspect.getdoc(function)
    assert all(f"    {item.name}: {item.metadata['help']}" in text for item in option_fields(FUNCTIONS[function][0]))


def test_a_notebook_completes_options_and_results(trained):
    names = [{"texforce": texforce, "result": trained}]
    completed = [item.name for item in jedi.Interpreter("texforce.train(num_e", names).complete()]
    assert "num_epochs=" in completed
    assert "to_pandas" in [item.name for item in jedi.Interpreter("result.to_", names).complete()]


def test_what_is_public_is_there_and_importing_it_loads_nothing_heavy():
    program = (
        "import sys; from texforce import *; print(train.__name__, InputError.exit_code, "
        "[name for name in sys.modules if name in ('torch', 'numpy', 'pandas', 'matplotlib', 'rich', 'typer', 'PIL')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "train 2 []", done.stderr
    assert set(texforce.__all__) >= {"train", "sample", "merge", "evaluate"}
    assert all(hasattr(texforce, name) for name in texforce.__all__)
    assert {*texforce.__all__, "models"} <= set(dir(texforce))  # what an interpreter offers
    assert {"ppo_loss", "torch", "Any"}.isdisjoint(dir(texforce))
