"""Stable Diffusion and XL pipelines are loaded whole or refused; prompts are tokenized and encoded as diffusers does."""

import copy
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from texforce import cli, models, sampler
from texforce.errors import InputError, NotFoundError

PROMPTS = ["a red circle", "a crimson disc left of a blue square", "three white crosses"]
UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipeline(stable_diffusion):
    """The small pipeline in plain diffusers."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(stable_diffusion)


@pytest.fixture(scope="module")
def small(stable_diffusion) -> models.Model:
    return models.load_model(str(stable_diffusion))


@pytest.fixture
def copied(stable_diffusion, tmp_path):
    """A copy of the small pipeline's folder, to be damaged."""
    return shutil.copytree(stable_diffusion, tmp_path / "model")


@pytest.fixture
def copied_xl(sdxl, tmp_path):
    """A copy of the small SDXL pipeline's folder, to be damaged."""
    return shutil.copytree(sdxl, tmp_path / "model")


def change(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def replace_unet(folder, **changes) -> None:
    """Put another U-Net into a pipeline's folder: the same but for some options of its configuration."""
    from diffusers import UNet2DConditionModel

    config = json.loads((folder / "unet" / "config.json").read_text())
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel.from_config(config | changes).save_pretrained(folder / "unet")


# --- tokens and shapes ---


def test_tokenize_equals_the_tokenizer_with_its_padding(small):
    expected = small.tokenizer(PROMPTS, padding="max_length", max_length=24, return_tensors="pt").input_ids
    ids = models.tokenize(small.tokenizer, PROMPTS)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected)


def test_a_prompt_may_fill_the_text_encoder_and_what_exceeds_it_is_cut_and_known(small):
    fits = " ".join(["red"] * 22)  # with start and end, 24
    exceeds = fits + " blue"
    ids = models.tokenize(small.tokenizer, [fits, exceeds])
    assert ids.shape == (2, 24)
    assert torch.equal(ids[0], ids[1])
    cut = models.find_cut([small.tokenizer], ["a red circle", fits, exceeds, exceeds])
    assert cut == models.Cut([exceeds], 3, 24)
    assert str(cut).startswith("1 of 3 prompts are cut to the 24 tokens that the text encoder reads, as 'red red ")
    assert models.find_cut([small.tokenizer], []).prompts == []


def test_a_lone_surrogate_is_refused_as_no_text(small):
    with pytest.raises(InputError, match="surrogate"):
        models.tokenize(small.tokenizer, ["a red circle", "a \ud800 circle"])


def shapes_of(vae_levels: int, unet_levels: int, sample_size: int = 64):
    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(8,) * vae_levels))
    config = SimpleNamespace(block_out_channels=(8,) * unet_levels, sample_size=sample_size, in_channels=4)
    return SimpleNamespace(vae=vae, unet=SimpleNamespace(config=config))


@pytest.mark.parametrize(("resolution", "expected"), [(None, 64), (512, 64), (64, 8), (576, 72), (768, 96)])
def test_latent_shape_of_stable_diffusion(resolution, expected):
    assert models.latent_shape(shapes_of(4, 4), resolution) == (4, expected, expected)


@pytest.mark.parametrize("resolution", [0, -64, 1, 32, 513, 520, 96])
def test_latent_shape_refuses_what_the_models_cannot_divide(resolution):
    with pytest.raises(InputError, match=f"resolution: .* multiple of 64 pixels .* not {resolution}"):
        models.latent_shape(shapes_of(4, 4), resolution)


@pytest.mark.parametrize(("size", "expected"), [([64, 64], 64), ((64, 64), 64), (64, 64)])
def test_the_size_of_a_unet_is_a_number_or_two_equal_ones(size, expected):
    assert models.latent_shape(shapes_of(4, 4, size)) == (4, expected, expected)


def test_a_unet_without_a_size_needs_a_resolution():
    assert models.latent_shape(shapes_of(4, 4, None), 512) == (4, 64, 64)
    with pytest.raises(InputError, match=r"resolution: the U-Net of this model does not say .* give --resolution"):
        models.latent_shape(shapes_of(4, 4, None))


# --- loading ---


def test_the_loaded_model_is_the_saved_one_frozen_and_in_evaluation(small, pipeline):
    for part in ("unet", "vae", "text_encoder"):
        module = getattr(small, part)
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        expected = getattr(pipeline, part).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())
    assert small.device.type == "cpu"
    assert models.latent_shape(small) == (4, 8, 8)
    assert torch.equal(models.tokenize(small.tokenizer, PROMPTS), models.tokenize(pipeline.tokenizer, PROMPTS))


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "./nowhere/model", "~/model"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(NotFoundError, match="model: .*" + name):
        models.load_model(name)


@pytest.mark.parametrize("name", ["nobody/nothing", ""])
def test_a_name_that_is_no_pipelines_is_named(name):
    with pytest.raises(InputError, match=f"model: '{name}' could not be loaded"):
        models.load_model(name)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing of a model")
    with pytest.raises(InputError, match=tmp_path.name):
        models.load_model(str(tmp_path))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_a_pipeline_without_one_of_its_parts_is_refused(copied, part):
    shutil.rmtree(copied / part)
    with pytest.raises(InputError, match="model: "):
        models.load_model(str(copied))


@pytest.mark.parametrize(
    ("part", "file"), [("unet", UNET_WEIGHTS), ("vae", UNET_WEIGHTS), ("text_encoder", "model.safetensors")]
)
@pytest.mark.parametrize("damage", ["lacking", "misshapen", "truncated"])
def test_weights_that_do_not_fill_the_model_are_refused(copied, part, file, damage):
    from safetensors.torch import load_file, save_file

    path = copied / part / file
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        tensors = load_file(path)
        name = sorted(tensors)[0]
        tensor = tensors.pop(name)
        if damage == "misshapen":
            tensors[name] = tensor.new_zeros(3, 3)
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=part if damage == "lacking" else "model: "):
        models.load_model(str(copied))


@pytest.mark.parametrize("changes", [
    {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 40},  # XL
    {"in_channels": 9},  # inpainting
    {"cross_attention_dim": 24},  # of another text encoder
])  # fmt: skip
def test_a_unet_of_another_kind_of_pipeline_is_refused(copied, changes):
    replace_unet(copied, **changes)
    with pytest.raises(InputError, match="model: "):
        models.load_model(str(copied))


def test_a_scheduler_that_clips_is_refused(copied):
    change(copied / "scheduler" / "scheduler_config.json", clip_sample=True)
    model = models.load_model(str(copied))
    with pytest.raises(InputError, match="clip_sample"):
        sampler.ddim_schedule(model.scheduler, 10, 1.0)


def test_sdxls_vae_alone_stays_in_float32_where_it_would_overflow(copied_xl):
    dtypes = {}
    for dtype, upcast in ((torch.float16, True), (torch.bfloat16, True), (torch.float16, False)):
        change(copied_xl / "vae" / "config.json", force_upcast=upcast)
        model = models.load_model(str(copied_xl), dtype=dtype)
        assert {model.unet.dtype, model.text_encoder.dtype, model.text_encoder_2.dtype} == {dtype}
        dtypes[dtype, upcast] = model.vae.dtype
    assert list(dtypes.values()) == [torch.float32, torch.bfloat16, torch.float16]


PLAIN_UNET = dict.fromkeys(
    ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
)  # all None
NO_FIRST_TEXT_ENCODER = {"text_encoder": [None, None], "tokenizer": [None, None]}
BAD_MODELS = {
    "a refiner's U-Net": (lambda folder: replace_unet(folder, projection_class_embeddings_input_dim=44), "refiner"),
    "a refiner": (lambda folder: change(folder / "model_index.json", **NO_FIRST_TEXT_ENCODER), "refiner"),
    "no second tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer_2"), "tokenizer"),
    "a shorter tokenizer": (
        lambda folder: change(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=20), "length",
    ),
    "another width": (lambda folder: replace_unet(folder, cross_attention_dim=24), "takes embeddings of 24"),
    "a plain U-Net": (lambda folder: replace_unet(folder, **PLAIN_UNET), "conditioning"),
    "inpainting": (lambda folder: replace_unet(folder, in_channels=9), "9 channels"),
    "shifted latents": (lambda folder: change(folder / "vae" / "config.json", latents_mean=[0.0] * 4), "shifts"),
    "no second text encoder": (lambda folder: shutil.rmtree(folder / "text_encoder_2"), "could not be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_what_is_not_sdxls_base_pipeline_is_refused(copied_xl, tmp_path, kind):
    damage, word = BAD_MODELS[kind]
    damage(copied_xl)
    with pytest.raises(InputError, match=f"model: .*{word}"):
        models.load_model(str(copied_xl))
    if kind == "a refiner":
        options = ["--model", str(copied_xl), "--prompt", "a red circle", "--output-dir", str(tmp_path / "samples")]
        result = CliRunner().invoke(cli.app, ["sample", *options])
        assert result.exit_code == 2
        assert "refiner" in result.output


# --- prompts ---


def test_prompts_encoded_once_each_equal_diffusers_embeddings(small, pipeline):
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[1]]
    ids = models.tokenize(small.tokenizer, prompts)
    sizes = []
    hook = small.text_encoder.register_forward_pre_hook(
        lambda module, arguments, options: sizes.append(len(options["input_ids"])), with_kwargs=True
    )
    with torch.no_grad():
        embeds, rows = models.encode_distinct(small, ids)
        hook.remove()
        expected, null_embeds = pipeline.encode_prompt(prompts, "cpu", 1, True)
        given, given_rows = models.encode_distinct(small, ids, torch.zeros(1, 24, 16))
    assert sizes == [4]  # the null prompt and three distinct ones
    assert embeds.shape == (4, 24, 16)
    torch.testing.assert_close(embeds[rows], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embeds[:1], null_embeds[:1], rtol=1e-5, atol=1e-5)
    assert torch.equal(given_rows, rows)
    assert given[0].eq(0).all()
    torch.testing.assert_close(given[1:], embeds[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxls_embeddings_equal_those_of_the_pipeline(sdxl, zeros):
    from diffusers import StableDiffusionXLPipeline

    model = replace(models.load_model(str(sdxl)), zero_null=zeros)
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl, force_zeros_for_empty_prompt=zeros)
    prompt_ids = models.tokenize_for(model, PROMPTS[:2])
    assert prompt_ids.shape == (2, 48)
    assert not torch.equal(*prompt_ids.chunk(2, dim=1))  # padded differently
    with torch.no_grad():
        expected, null, pooled, null_pooled = pipeline.encode_prompt(PROMPTS[:2], device="cpu")
        embeds, rows = models.encode_distinct(model, prompt_ids)
    assert embeds.shape == (3, 25, 40)
    for ours, theirs in ((embeds[rows], (expected, pooled)), (embeds[:1], (null[:1], null_pooled[:1]))):
        torch.testing.assert_close(ours[:, :-1], theirs[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[:, -1, :24], theirs[1], rtol=1e-5, atol=1e-5)
        assert not ours[:, -1, 24:].any()
    torch.testing.assert_close(models.encode_null(model), embeds[:1], rtol=1e-5, atol=1e-5)


def test_disabled_adapters_give_the_base_model_and_come_back(small):
    from peft import LoraConfig, get_peft_model

    ids = models.tokenize(small.tokenizer, PROMPTS)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    tuned = get_peft_model(copy.deepcopy(small.text_encoder), lora)
    with torch.no_grad():
        expected, adapted = small.text_encoder(ids).last_hidden_state, tuned(input_ids=ids).last_hidden_state
        with models.adapters_disabled(replace(small, text_encoder=tuned)):
            disabled = tuned(input_ids=ids).last_hidden_state
        again = tuned(input_ids=ids).last_hidden_state
    assert not torch.allclose(adapted, expected)
    torch.testing.assert_close(disabled, expected, rtol=0, atol=0)
    torch.testing.assert_close(again, adapted, rtol=0, atol=0)
