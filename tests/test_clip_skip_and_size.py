"""--clip-skip, --width and --height of sample and eval: images equal plain diffusers', bad values are refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from texforce import evaluation, models, run
from texforce.draw_config import EvalOptions, SampleOptions, resolve_eval, resolve_sample
from texforce.errors import InputError

from .commands import invoke

PROMPTS = ["a red circle", "two blue squares"]
DRAWING = {"num_inference_steps": 2, "guidance_scale": 4.0, "eta": 1.0}


def plain_images(folder, **options):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    encoder = pipeline.text_encoder
    if not hasattr(encoder, "text_model"):  # transformers 5.6 took the level away, at which diffusers looks for the norm
        vars(encoder)["text_model"] = SimpleNamespace(final_layer_norm=encoder.final_layer_norm)
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipeline(PROMPTS, generator=generator, output_type="pt", **DRAWING, **options).images


def our_images(folder, **options):
    config = resolve_sample(SampleOptions(model=str(folder), prompt=PROMPTS, **DRAWING | options))
    return evaluation.sample(config, PROMPTS, [0, 1])["base"]


# --- what is drawn ---


@pytest.mark.parametrize(("family", "clip_skip", "negative"), [
    ("stable_diffusion", 1, None), ("stable_diffusion", 2, "blurry"), ("sdxl", 1, "blurry"),
])  # fmt: skip
def test_clip_skip_draws_what_the_plain_pipeline_draws_with_it(family, clip_skip, negative, request):
    folder = request.getfixturevalue(family)
    ours = our_images(folder, clip_skip=clip_skip, negative_prompt=negative)
    plain = plain_images(folder, clip_skip=clip_skip, negative_prompt=negative and [negative] * 2)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)
    assert (ours - our_images(folder, negative_prompt=negative)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl"])
def test_a_clip_skip_of_none_draws_as_ever_to_the_byte(family, request):
    folder = request.getfixturevalue(family)
    assert torch.equal(our_images(folder, clip_skip=0), our_images(folder))


def test_the_layers_of_an_adapted_text_encoder_are_skipped_too(stable_diffusion, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = models.load_model(str(stable_diffusion))
    ids = models.tokenize_for(model, PROMPTS)
    lora = LoraConfig(r=2, target_modules=list(model.family.text["text_encoder"].lora_layers))
    adapted = replace(model, text_encoder=get_peft_model(model.text_encoder, lora), clip_skip=1)
    torch.testing.assert_close(models.encode(adapted, ids), models.encode(replace(model, clip_skip=1), ids))


@pytest.mark.parametrize(("options", "is_refused"), [
    ({"width": 64}, True), ({"height": 48, "width": 32}, True), ({"width": 64, "height": 64}, False),
    ({"resolution": 64, "width": 64}, False), ({"resolution": 64, "width": 32}, True),
])  # fmt: skip
def test_the_detector_judges_square_images_alone(tmp_path, monkeypatch, options, is_refused):
    monkeypatch.setattr(evaluation, "draw_missing", lambda *_: (_ for _ in ()).throw(SystemExit))
    given = {"model": "tiny", "reward": ["jpeg=1,alignment=1"], "output_dir": str(tmp_path / "eval"), "limit": 2}
    match = "width: .*alignment.* judges square images" if is_refused else "^$"
    with pytest.raises(InputError if is_refused else SystemExit, match=match):
        evaluation.evaluate(resolve_eval(EvalOptions(**given, **options)))


def test_a_grid_of_images_that_are_not_square_has_no_marks(tmp_path, monkeypatch):
    marks = []
    monkeypatch.setattr(run, "_draw_mark", lambda *arguments: marks.append(arguments))
    for n, width in enumerate((32, 64)):
        run.write_grid(tmp_path / f"{width}.png", PROMPTS, {"base": torch.zeros(2, 3, 32, width)})
        assert len(marks) == 2 * (1 - n)
        marks.clear()


def test_both_sides_settle_what_adapters_of_different_resolutions_leave_open(tmp_path):
    for name, resolution in (("a", 32), ("b", 64)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model": "tiny", "resolution": resolution}))
    options = {"prompt": PROMPTS, "adapter": [str(tmp_path / "a"), str(tmp_path / "b")]}
    with pytest.raises(InputError, match="resolution: the adapters were trained with 32 and 64; say which to use"):
        resolve_sample(SampleOptions(**options, width=64))
    config = resolve_sample(SampleOptions(**options, width=64, height=48))
    assert (config.width, config.height) == (64, 48)


@pytest.mark.parametrize(("width", "height"), [(64, 32), (32, 48)])
@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl"])
def test_images_that_are_not_square_equal_those_of_plain_diffusers(family, width, height, request):
    folder = request.getfixturevalue(family)
    ours = our_images(folder, width=width, height=height)
    assert ours.shape[2:] == (height, width)
    torch.testing.assert_close(ours, plain_images(folder, width=width, height=height), rtol=0, atol=1e-4)


def test_the_side_that_is_not_given_is_the_resolution_or_the_models_own(stable_diffusion):
    model = models.load_model(str(stable_diffusion))
    assert models.latent_shape(model, None, width=64) == (4, 8, 16)
    assert models.latent_shape(model, 48, height=64) == (4, 16, 12)
    assert models.latent_shape(model, 48) == models.latent_shape(model, None, 48, 48)


def test_a_grid_keeps_the_shape_of_images_that_are_not_square(tmp_path):
    run.write_grid(tmp_path / "grid.png", ["wide", "high"], {"base": [torch.zeros(3, 16, 32), torch.zeros(3, 32, 16)]})
    with Image.open(tmp_path / "grid.png") as grid:
        top = 2 * run.LINE + 12  # below the systems' names and the prompts
        cells = [grid.convert("L").crop((x, top, x + 130, top + 128)) for x in (12, 12 + run.CELL + run.GAP + 12)]
    drawn = [cell.point(lambda value: 255 * (value == 0)).getbbox() for cell in cells]
    assert drawn == [(0, 0, 128, 64), (0, 0, 64, 128)]


# --- what is refused ---


@pytest.mark.parametrize(("options", "message"), [
    ("--clip-skip 3", "--clip-skip: must be at most 2 for 'tiny', by the layers of its CLIP, not 3"),
    ("--clip-skip -1", "--clip-skip: must be a whole number from 0"),
    ("--width 33", "--width: must be a multiple of 16 pixels for this model, not 33"),
    ("--height 0", "--height: must be a whole number, at least 1"),
    ("--width 32 --height 36", "--height: must be a multiple of 16 pixels for this model, not 36"),
    ("--width 32 --height 32 --resolution 32", "--resolution: has no effect beside --width and --height"),
    ("--model tiny-flow --clip-skip 9", "--clip-skip: must be at most 1 for 'tiny-flow'"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["sample", "eval"])
def test_values_that_do_not_fit_the_model_are_refused_by_their_options_names(command, options, message, tmp_path):
    given = options.split() if "--model" in options else ["--model", "tiny", *options.split()]
    result = invoke(*commands(tmp_path)[command], *given)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def commands(tmp_path):
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    few = ["--num-images", "1", "--num-inference-steps", "1", "--output-dir", str(tmp_path / "out")]
    benchmark = ["--benchmark", str(tmp_path / "prompts.txt"), "--reward", "jpeg"]
    return {"sample": ["sample", "--prompt", PROMPTS[0], *few], "eval": ["eval", *benchmark, *few]}


# --- what is written down ---

ALL = ["--model", "tiny", "--width", "48", "--clip-skip", "1", "--negative-prompt", "blurry"]


def test_sample_writes_clip_skip_size_and_negative_prompt_into_the_images(tmp_path):
    result = invoke(*commands(tmp_path)["sample"], *ALL)
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out" / "00000.png") as image:
        assert image.size == (48, 32)
        written = {name: image.text.get(name) for name in ("clip_skip", "width", "height", "negative_prompt")}
    assert written == {"clip_skip": "1", "width": "48", "height": None, "negative_prompt": "blurry"}


def test_eval_writes_them_into_the_results_and_goes_on_only_with_the_same(tmp_path):
    command = commands(tmp_path)["eval"]
    result = invoke(*command, *ALL)
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["clip_skip"], results["width"], results["negative_prompt"]) == (1, 48, "blurry")
    changes = (
        (ALL[:-2], "--negative-prompt"),
        (ALL[:4] + ALL[6:], "--clip-skip 1 there, 0 asked for"),
        (ALL[:2] + ALL[4:], "48"),
    )
    for other, said in changes:
        result = invoke(*command, *other)
        assert result.exit_code == 2
        assert said in " ".join(result.output.split())
