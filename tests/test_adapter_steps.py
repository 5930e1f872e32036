"""`--adapter-steps` beyond the training: what sample, eval and merge make of an adapter that is on in some steps."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from texforce import evaluation, models, run, sampler, training
from texforce.config import TrainOptions, resolve
from texforce.draw_config import (
    EvalOptions,
    MergeOptions,
    SampleOptions,
    resolve_eval,
    resolve_merge,
    resolve_sample,
)
from texforce.errors import InputError
from texforce.options import steps_inside

from .commands import invoke

PROMPTS = ["a red circle", "two navy boxes"]
STEPS = "0.25-0.75"  # of four steps the second and the third


@pytest.fixture(scope="module", autouse=True)
def quick(narrow_model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load_model", lambda name, device, dtype, **_: narrow_model(dtype))
        patch.setattr(run, "write_curve", lambda path, epochs, reward: path.write_bytes(b""))
        yield


@pytest.fixture(scope="module")
def adapter(shared_run, tmp_path_factory) -> Path:
    """A run of both the text encoder and the U-Net with a range of steps. Do not change it."""
    folder = tmp_path_factory.mktemp("adapter") / "out"
    own = {"output_dir": str(folder), "learning_rate": 0.03, "adapter_steps": STEPS, "target": "both"}
    training.train(resolve(TrainOptions(**shared_run | own)))
    return folder


def with_config(adapter: Path, folder: Path, **changes: object) -> str:
    """A copy of the adapter whose config.json says something else."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def sample(**options: object) -> Tensor:
    return evaluation.sample(resolve_sample(SampleOptions(prompt=PROMPTS, **options)), PROMPTS, [5, 6])["tuned"]


@pytest.mark.parametrize(("steps", "number", "expected"), [
    (None, 3, [True, True, True]),
    ("0-1", 3, [True, True, True]),
    ("0.8-1", 5, [False, False, False, False, True]),
    ("0.5-1", 5, [False, False, True, True, True]),  # the middle of a step decides
    ("0-0.5", 5, [True, True, False, False, False]),
    (".125-.375", 4, [True, False, False, False]),  # A is inside, B is not
    ("0.96-1", 50, [False] * 48 + [True] * 2),
])  # fmt: skip
def test_a_step_is_inside_by_its_middle(steps, number, expected):
    assert steps_inside(steps, number) == expected


def test_sample_takes_the_steps_of_the_run_and_the_command_line_overrides_them(adapter, tmp_path):
    assert json.loads((adapter / "config.json").read_text())["adapter_steps"] == STEPS
    assert "share 0.25-0.75 of the denoising steps alone" in (adapter / "README.md").read_text()
    of_the_run = sample(adapter=[str(adapter)])
    everywhere = with_config(adapter, tmp_path / "everywhere", adapter_steps=None)
    assert torch.equal(sample(adapter=[everywhere], adapter_steps=STEPS), of_the_run)
    assert torch.equal(sample(adapter=[str(adapter / "adapter_model.safetensors")], adapter_steps="0-1"),
                       sample(adapter=[str(adapter / "adapter_model.safetensors")], adapter_steps="0.0-1.0"))  # fmt: skip
    always = sample(adapter=[everywhere])
    assert torch.equal(sample(adapter=[str(adapter)], adapter_steps="0-1"), always)
    assert not torch.equal(always, of_the_run)
    older = with_config(adapter, tmp_path / "older")
    content = json.loads(Path(older, "config.json").read_text())
    del content["adapter_steps"]  # of before there was the option
    Path(older, "config.json").write_text(json.dumps(content))
    assert torch.equal(sample(adapter=[older]), always)


def test_the_file_of_weights_alone_knows_its_runs_steps_too(adapter):
    config = resolve_sample(SampleOptions(prompt=PROMPTS, adapter=[str(adapter / "adapter_model.safetensors")]))
    assert [system.adapter_steps for system in config.systems] == [STEPS]


def test_images_are_drawn_with_the_base_embedding_outside_the_steps(adapter, monkeypatch):
    conditionings, rollout = [], sampler.rollout

    def noting(denoiser, prompt_ids, conditioning, *rest):
        conditionings.append(conditioning)
        return rollout(denoiser, prompt_ids, conditioning, *rest)

    monkeypatch.setattr(sampler, "rollout", noting)
    config = resolve_sample(SampleOptions(prompt=PROMPTS, adapter=[str(adapter)], compare=True))
    evaluation.sample(config, PROMPTS, [5, 6])
    base, tuned = conditionings  # each in four steps
    assert all(text is base[0] for text in base)
    for field in ("prompt_embeds", "null_embeds"):
        expected, *others = (getattr(text, field) for text in (base[0], *tuned))
        assert [torch.equal(embeds, expected) for embeds in others] == [True, False, False, True]


def test_adapters_that_are_summed_must_be_for_the_same_steps_unless_the_command_line_decides(adapter, tmp_path):
    other = with_config(adapter, tmp_path / "other", adapter_steps=None)
    with pytest.raises(InputError, match=r"adapter_steps: adapters that are summed .* 0\.25-0\.75 and all steps; say which"):
        sample(adapter=[str(adapter), other])
    given = SampleOptions(prompt=PROMPTS, adapter=[str(adapter), other], adapter_steps="0.5-1")
    assert resolve_sample(given).systems[0].adapter_steps == "0.5-1"
    unet = with_config(adapter, tmp_path / "unet", adapter_steps=None, target="unet")  # has no text encoder's adapter
    config = resolve_sample(SampleOptions(prompt=PROMPTS, adapter=[str(adapter), unet]))
    assert config.systems[0].adapter_steps == STEPS


def test_the_steps_of_an_adapter_of_the_unet_alone_are_refused(adapter):
    with pytest.raises(InputError, match="adapter_steps: is of the text encoder's adapter, and this one is the U-Net's"):
        sample(adapter=[str(adapter / "unet")], adapter_steps="0.5-1", null_prompt="adapted")


@pytest.mark.parametrize(("options", "words"), [
    (["--adapter-steps", "0.5-1"], "--adapter-steps: works only together with --adapter"),
    (["--adapter", "OUT", "--adapter-steps", "1-0"], "--adapter-steps: must be a range A-B of shares"),
    (["--adapter", "OUT", "--num-inference-steps", "1", "--adapter-steps", "0.6-1"], "--adapter-steps: none of the 1"),
    (["--adapter", "BROKEN"], "config.json: adapter_steps: must be a range A-B of shares"),
])  # fmt: skip
def test_steps_that_cannot_be_are_named(adapter, tmp_path, options, words):
    with_config(adapter, tmp_path / "broken", adapter_steps="0.5")
    named = {"OUT": str(adapter), "BROKEN": str(tmp_path / "broken")}
    arguments = [named.get(option, option) for option in options]
    result = invoke("sample", "--prompt", "a red circle", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_images_hold_the_steps_in_their_metadata(adapter, tmp_path):
    arguments = ["--adapter", str(adapter), "--prompt", PROMPTS[0], "--num-images", "1", "--output-dir", str(tmp_path)]
    assert invoke("sample", *arguments).exit_code == 0
    (image,) = (path for path in tmp_path.glob("*.png") if "grid" not in path.name)
    assert Image.open(image).info["adapter_steps"] == STEPS


@pytest.mark.slow
def test_eval_draws_each_system_in_its_own_steps_and_refuses_a_folder_of_others(adapter, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    everywhere = with_config(adapter, tmp_path / "everywhere", adapter_steps=None)
    options = {"benchmark": str(tmp_path / "prompts.txt"), "reward": ["jpeg"], "num_images": 1, "model": "tiny"}
    options |= {"adapter": [f"late={adapter}", f"always={everywhere}"], "output_dir": str(tmp_path / "eval")}
    results = evaluation.evaluate(resolve_eval(EvalOptions(**options)))
    found = {name: system.get("adapter_steps", "none") for name, system in results["systems"].items()}
    assert found == {"base": "none", "late": STEPS, "always": "none"}
    images = {name: (tmp_path / "eval" / "images" / name / "00000_0.png").read_bytes() for name in found}
    assert len(set(images.values())) == 3
    assert evaluation.scaled(resolve_eval(EvalOptions(**options)).systems[0], 0.5).adapter_steps == STEPS
    with pytest.raises(InputError, match=r"holds another system called late"):
        evaluation.evaluate(resolve_eval(EvalOptions(**options, adapter_steps="0-0.5")))


@pytest.mark.parametrize("format", ["pipeline", "checkpoint", "diffusers", "kohya"])
def test_merge_refuses_a_format_that_cannot_say_the_steps_unless_they_are_dropped(adapter, tmp_path, format):
    options = {"adapter": [str(adapter)], "format": format, "output_dir": str(tmp_path / "merged")}
    with pytest.raises(InputError, match=rf"format: .* steps 0\.25-0\.75, .* {format} .* --drop-adapter-steps"):
        resolve_merge(MergeOptions(**options))
    config = resolve_merge(MergeOptions(**options, drop_adapter_steps=True))
    assert "adapter_steps" not in config.settings
    assert config.dropped_steps == (STEPS,)
    without = resolve_merge(MergeOptions(**options | {"adapter": [f"{adapter}:0"]}))  # it has no effect
    assert "adapter_steps" not in without.settings


def test_merge_of_adapters_for_different_steps_names_the_option_that_it_has(adapter, tmp_path):
    other = with_config(adapter, tmp_path / "other", adapter_steps=None)
    options = {"adapter": [str(adapter), other], "format": "peft"}
    with pytest.raises(InputError, match=r"0\.25-0\.75 and all steps; give --drop-adapter-steps, and all are on in all"):
        resolve_merge(MergeOptions(**options))
    assert resolve_merge(MergeOptions(**options, drop_adapter_steps=True)).dropped_steps == (STEPS,)


@pytest.mark.slow
def test_merge_writes_the_steps_beside_pefts_format_and_sample_reads_them_back(adapter, tmp_path):
    place, adapter = str(tmp_path / "merged"), Path(shutil.copytree(adapter, tmp_path / "text"))
    shutil.rmtree(adapter / "unet")  # a narrow one's, which merge does not load
    arguments = ["merge", "--adapter", str(adapter), "--format", "peft", "--output-dir", place]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "texforce.json has 0.25-0.75" in result.stderr
    assert json.loads(Path(place, "texforce.json").read_text())["adapter_steps"] == STEPS
    assert "share 0.25-0.75 of the denoising steps" in Path(place, "README.md").read_text()
    torch.testing.assert_close(sample(adapter=[place]), sample(adapter=[str(adapter)]), rtol=0, atol=1e-5)
    dropped = invoke(*arguments, "--drop-adapter-steps", "--overwrite")
    assert dropped.exit_code == 0, dropped.output
    assert "--drop-adapter-steps: what was trained for the steps 0.25-0.75 is on in all of them" in dropped.stderr
    assert "0.25-0.75" not in Path(place, "README.md").read_text() + Path(place, "texforce.json").read_text()
    always = sample(adapter=[str(adapter)], adapter_steps="0-1")
    torch.testing.assert_close(sample(adapter=[place]), always, rtol=0, atol=1e-5)
