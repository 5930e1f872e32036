"""Stable Diffusion and XL pipelines are loaded whole or refused; prompts are tokenized and encoded as diffusers does."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from texforce import evaluation, merging, models, sampler, tokenization
from texforce.draw_config import SampleOptions, resolve_sample
from texforce.errors import ArtifactError, InputError, NotFoundError

from .commands import invoke

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
    ids = tokenization.tokenize(small.tokenizer, PROMPTS)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected)


def test_a_prompt_may_fill_the_text_encoder_and_what_exceeds_it_is_cut_and_known(small):
    fits = " ".join(["red"] * 22)  # with start and end, 24
    exceeds = fits + " blue"
    ids = tokenization.tokenize(small.tokenizer, [fits, exceeds])
    assert ids.shape == (2, 24)
    assert torch.equal(ids[0], ids[1])
    cut = tokenization.find_cut(list(small.readers.values()), ["a red circle", fits, exceeds, exceeds])
    assert cut == tokenization.Cut([exceeds], 3, 24)
    assert str(cut).startswith("1 of 3 prompts are cut to the 24 tokens that the text encoder reads, as 'red red ")
    assert tokenization.find_cut(list(small.readers.values()), []).prompts == []


def test_a_lone_surrogate_is_refused_as_no_text(small):
    with pytest.raises(InputError, match="surrogate"):
        tokenization.tokenize(small.tokenizer, ["a red circle", "a \ud800 circle"])


def shapes_of(vae_levels: int, unet_levels: int, sample_size: int = 64):
    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(8,) * vae_levels, latent_channels=4))
    config = SimpleNamespace(block_out_channels=(8,) * unet_levels, sample_size=sample_size, in_channels=4)
    return models.Model("model", None, None, SimpleNamespace(config=config), vae)


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
    with pytest.raises(InputError, match=r"resolution: the denoiser of this model does not say .* give --resolution"):
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
    assert torch.equal(tokenization.tokenize(small.tokenizer, PROMPTS), tokenization.tokenize(pipeline.tokenizer, PROMPTS))


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


def test_stable_diffusion_never_clips_its_samples_as_the_plain_pipeline(copied):
    change(copied / "scheduler" / "scheduler_config.json", clip_sample=True)
    assert models.load_model(str(copied)).scheduler.config.clip_sample is False


def test_a_scheduler_of_sdxl_that_clips_is_refused(copied_xl):
    change(copied_xl / "scheduler" / "scheduler_config.json", clip_sample=True)
    model = models.load_model(str(copied_xl))
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


# --- the scheduler's family ---


SCHEDULER_FILE = "scheduler/scheduler_config.json"
NO_NOISE = {
    "FlowMatchEulerDiscreteScheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    "EDMEulerScheduler": {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "prediction_type": "epsilon"},
    "also a DPM-Solver of flow matching": {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
    "also UniPC's prediction of a flow": {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
    "also an Euler of continuous time": {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
    "also one of another signal": {"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0},
}


@pytest.mark.parametrize("kind", NO_NOISE)
def test_a_scheduler_of_another_noise_than_ddims_is_refused(copied, kind):
    (copied / SCHEDULER_FILE).write_text(json.dumps(NO_NOISE[kind] | {"num_train_timesteps": 1000}))
    with pytest.raises(InputError, match=f"model: .*{NO_NOISE[kind]['_class_name']} whose noise is not DDIM's"):
        models.load_model(str(copied))


@pytest.mark.parametrize("lacking", ["beta_start", "beta_schedule", "prediction_type", "num_train_timesteps"])
def test_a_scheduler_that_is_not_known_must_say_what_ddim_needs(copied, lacking):
    path = copied / SCHEDULER_FILE
    change(path, _class_name="MyScheduler")
    known = models.load_scheduler(str(copied))
    assert known.config.beta_schedule == "scaled_linear"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != lacking}))
    with pytest.raises(InputError, match=f"MyScheduler, which texforce does not know, and lacks {lacking}"):
        models.load_scheduler(str(copied))
    if lacking.startswith("beta"):
        change(path, trained_betas=[0.1] * 10, num_train_timesteps=10)
        torch.testing.assert_close(models.load_scheduler(str(copied)).alphas_cumprod[-1], torch.tensor(0.9**10))


@pytest.mark.filterwarnings("ignore:.*__array__ implementation")  # some of diffusers' schedulers beside today's numpy
@pytest.mark.parametrize("name", models.SCHEDULERS)
def test_what_the_file_of_a_known_scheduler_leaves_out_is_its_own_default(copied, name):
    import diffusers

    cls = getattr(diffusers, f"{name}Scheduler")
    (copied / SCHEDULER_FILE).write_text(json.dumps({"_class_name": cls.__name__}))
    try:
        expected = cls.from_pretrained(copied / "scheduler")
    except ImportError:  # of a package that is not needed here
        with pytest.raises(InputError, match="lacks beta_end, beta_schedule"):
            models.load_scheduler(str(copied))
        return
    ours = models.load_scheduler(str(copied))
    torch.testing.assert_close(ours.alphas_cumprod, torch.as_tensor(expected.alphas_cumprod), rtol=0, atol=0)
    assert ours.config.prediction_type == expected.config.prediction_type


LEFT_OUT = {
    "PNDM without clip_sample and steps_offset": ("PNDMScheduler", ("clip_sample", "steps_offset"), {}),
    "DDPM without clip_sample and steps_offset": ("DDPMScheduler", ("clip_sample", "steps_offset"), {}),
    "also DDIM without them": ("DDIMScheduler", ("clip_sample", "steps_offset"), {}),
    "also a steps_offset of 0": ("DDIMScheduler", (), {"steps_offset": 0}),
    "also a steps_offset of 2": ("DDIMScheduler", (), {"steps_offset": 2}),
}


def draw_both(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of `texforce sample`, and of the plain pipeline with DDIM by the same file."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "eta": 1.0}
    config = resolve_sample(SampleOptions(model=str(folder), prompt=PROMPTS, **options))
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    plain = StableDiffusionPipeline.from_pretrained(folder, scheduler=scheduler)
    plain.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    return evaluation.sample(config, PROMPTS, [5, 6, 7])["base"], plain(
        PROMPTS, generator=generators, output_type="pt", **options
    ).images


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", LEFT_OUT)
def test_stable_diffusions_old_scheduler_files_are_completed_as_the_plain_pipeline_does(copied, kind):
    name, without, values = LEFT_OUT[kind]
    path = copied / SCHEDULER_FILE
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps(config | values | {"_class_name": name}))
    ours, plain = draw_both(copied)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)


# --- files of weights ---


def rename(folder: Path, ending: str, half: bool) -> None:
    """Save a part's weights anew, by names that end so, in two files where the ending holds %d."""
    safe = next(folder.glob("*.safetensors"))
    stem, tensors, kind = safe.stem, load_file(safe), ending.rpartition(".")[2]
    safe.unlink()
    stem = "pytorch_model" if kind == "bin" and stem == "model" else stem
    names, index = sorted(tensors), {}
    for number, share in enumerate((names[::2], names[1::2]) if "%d" in ending else (names,), 1):
        file = stem + (ending % number if "%d" in ending else ending)
        content = {name: tensors[name].half() if half else tensors[name] for name in share}
        save_file(content, folder / file, {"format": "pt"}) if kind == "safetensors" else torch.save(content, folder / file)
        index |= dict.fromkeys(share, file)
    if "%d" in ending:
        variant = ending.partition("-")[0]
        name = f"{stem}.{kind}.index{variant}.json"
        (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))


WEIGHT_FILES = {
    "only fp16": ".fp16.safetensors", "sharded bin": "-0000%d-of-00002.bin",
    "also sharded fp16": ".fp16-0000%d-of-00002.safetensors", "also a variant of bin": ".non_ema.bin",
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHT_FILES)
def test_weights_of_every_kind_of_files_are_the_models(copied, small, kind):
    half = "fp16" in kind
    for part in ("unet", "vae", "text_encoder"):
        rename(copied / part, WEIGHT_FILES[kind], half)
    loaded = models.load_model(str(copied))
    for part in ("unet", "vae", "text_encoder"):
        state = getattr(loaded, part).state_dict()
        for name, tensor in getattr(small, part).state_dict().items():
            assert torch.equal(state[name], tensor.half().float() if half else tensor)


def test_two_variants_without_plain_weights_are_refused_by_name(copied):
    rename(copied / "unet", ".fp16.safetensors", half=True)
    shutil.copy(
        copied / "unet" / UNET_WEIGHTS.replace(".s", ".fp16.s"), copied / "unet" / UNET_WEIGHTS.replace(".s", ".ema.s")
    )
    with pytest.raises(InputError, match=r"unet' holds weights of the variants ema, fp16; keep one"):
        models.load_model(str(copied))


# --- what is missing is named ---


@pytest.mark.parametrize(("given", "error", "message"), [
    ("a.safetensors", InputError, "a.safetensors' could not be read"),
    ("some/a.safetensors", InputError, "a.safetensors' could not be read"),
    ("also/a.ckpt", ArtifactError, "a.ckpt: refused as a checkpoint of a model"),
    ("also/unet/config.json", InputError, "'also/unet/config.json' is no .safetensors or .ckpt; give 'tiny', a folder"),
])  # fmt: skip
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, monkeypatch, given, error, message):
    monkeypatch.chdir(tmp_path)
    Path(given).parent.mkdir(parents=True, exist_ok=True)
    Path(given).write_bytes(b"weights")
    with pytest.raises(error, match=message):
        models.load_model(given)


PARTS = ("text_encoder", "unet", "vae", "scheduler", "tokenizer")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("load", [models.load_model, merging.load_pipeline], ids=["to sample", "also to merge"])
def test_a_missing_part_is_named_and_not_the_folder_above_it(copied, part, load):
    """diffusers reads the pipeline's own config.json where a part has none."""
    shutil.copytree(copied / part, copied, dirs_exist_ok=True)
    shutil.rmtree(copied / part)
    with pytest.raises(NotFoundError, match=f"model: the {part} could not be loaded: there is no .* in '{copied / part}'"):
        load(str(copied))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_part_without_weights_is_named(copied, part):
    next((copied / part).glob("*.safetensors")).unlink()
    with pytest.raises(NotFoundError, match=f"model: there are no weights in '{copied / part}'"):
        models.load_model(str(copied))


# --- parts that do not fit each other ---


def add_tokens(folder: Path, *tokens: str) -> None:
    """Add tokens to a tokenizer's folder."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)


def number_past_the_rows(folder: Path) -> None:
    """Give a token a number past those of the others."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["red</w>"] = 5000
    path.write_text(json.dumps(content))


MISFITS = {
    "more tokens than rows": lambda folder: add_tokens(folder / "tokenizer", "<cat>", "<dog>"),
    "also a token of a number past the rows": lambda folder: number_past_the_rows(folder / "tokenizer"),
    "also an end that is never found": lambda folder: change(folder / "text_encoder" / "config.json", eos_token_id=7),
    "also longer prompts": lambda folder: change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=30),
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("kind", MISFITS)
@pytest.mark.parametrize("load", [models.load_model, merging.load_pipeline], ids=["to sample", "also to merge"])
def test_a_tokenizer_that_does_not_fit_its_text_encoder_is_refused_by_name(copied, kind, load):
    MISFITS[kind](copied)
    with pytest.raises(
        InputError, match=f"model: the tokenizer in '{copied / 'tokenizer'}' does not fit its text encoder: "
    ):
        load(str(copied))


def test_the_second_tokenizer_of_sdxl_is_held_against_the_second_text_encoder(copied_xl):
    add_tokens(copied_xl / "tokenizer_2", "<cat>")
    with pytest.raises(InputError, match=r"model: the tokenizer_2 in .* 1145 tokens, its text encoder 1144"):
        models.load_model(str(copied_xl))


@pytest.mark.parametrize(("changes", "words"), [
    ({"out_channels": 8}, "gives 8"),  # learned variances
    ({"time_cond_proj_dim": 8}, "time_cond_proj_dim"),  # latent consistency models take the guidance
    ({"class_embed_type": "timestep"}, "class_embed_type"),
    ({"num_class_embeds": 10}, "num_class_embeds"),  # upscalers take the noise level
    ({"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 16}, "encoder_hid_dim_type"),
])  # fmt: skip
def test_a_unet_that_takes_or_gives_more_than_the_other_parts_do_is_refused(copied, changes, words):
    replace_unet(copied, **changes)
    with pytest.raises(InputError, match=f"model: the U-Net of .*{words}"):
        models.load_model(str(copied))


# --- textual inversion ---


TOKEN = "<cat>"  # noqa: S105


@pytest.fixture(scope="module", params=["stable_diffusion", "also sdxl"])
def inverted(request, tmp_path_factory):
    """The folder of a pipeline with a textual inversion of three vectors, as plain diffusers saves it, and the pipeline."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(request.getfixturevalue(request.param.removeprefix("also ")))
    vectors = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    pipeline.load_textual_inversion(
        {TOKEN: vectors[:, :16]}, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer
    )
    if "text_encoder_2" in pipeline.config:
        second = {"text_encoder": pipeline.text_encoder_2, "tokenizer": pipeline.tokenizer_2}
        pipeline.load_textual_inversion({TOKEN: vectors}, **second)
    folder = tmp_path_factory.mktemp("inverted") / "model"
    pipeline.save_pretrained(folder)
    return folder, pipeline


@pytest.mark.quick(2)
@pytest.mark.parametrize("prompt", [f"a {TOKEN} circle", f"also {TOKEN} left of {TOKEN}", "also a red circle"])
def test_a_textual_inversion_in_a_saved_pipeline_has_all_its_vectors(inverted, prompt):
    folder, pipeline = inverted
    model = models.load_model(str(folder))
    with torch.no_grad():
        expected = pipeline.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        embeds = models.encode(model, models.tokenize_for(model, [prompt]))
    if model.text_encoder_2 is not None:
        torch.testing.assert_close(embeds[:, -1, :24], expected[2], rtol=1e-5, atol=1e-5)
        embeds = embeds[:, :-1]
    torch.testing.assert_close(embeds, expected[0], rtol=1e-5, atol=1e-5)


def test_the_length_of_a_prompt_is_that_with_all_vectors(inverted):
    model = models.load_model(str(inverted[0]))
    long = " ".join(["red"] * 20 + [TOKEN])  # 21 tokens before and 23 after, with start and end 25
    whole = long.replace("red ", "", 1)
    assert tokenization.find_cut(list(model.readers.values()), [long, whole]).prompts == [long]
    assert tokenization.tokenize(model.tokenizer, [long])[0, -2:].tolist() == [
        model.tokenizer.convert_tokens_to_ids(f"{TOKEN}_1"), model.tokenizer.eos_token_id,
    ]  # fmt: skip


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
        result = invoke("sample", *options)
        assert result.exit_code == 2
        assert "refiner" in result.output


# --- prompts ---


def test_prompts_encoded_once_each_equal_diffusers_embeddings(small, pipeline):
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[1]]
    ids = tokenization.tokenize(small.tokenizer, prompts)
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

    ids = tokenization.tokenize(small.tokenizer, PROMPTS)
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
