"""The newer families: what is drawn, encoded, trained and merged equals what diffusers' own pipelines do."""

import functools
import itertools
import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributions import Normal

import texforce
from texforce import (
    Policy,
    evaluation,
    experience,
    families,
    heldout,
    merging,
    models,
    presets,
    prompt_sets,
    sampler,
    training,
)
from texforce.config import TrainOptions, resolve
from texforce.draw_config import MergeOptions, SampleOptions, resolve_merge, resolve_sample
from texforce.errors import ArtifactError, InputError
from texforce.learner import Learner
from texforce.plan import saved_bytes

from . import small_models
from .commands import invoke

PROMPTS = ["two red circle", "a Blue square and a red circle"]
FAMILIES = tuple(small_models.PIPELINES)
KINDS = ("sd3", "flux", "pixart-sigma", "sana")  # those that differ in more than what the text encoders are given
QUICK = (*KINDS[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS[2:]))
GUIDED = tuple(name for name in FAMILIES if name != "flux")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Pipelines by name, each made when it is first wanted."""
    root = tmp_path_factory.mktemp("families")

    def folder(name):
        return root / name if (root / name).is_dir() else small_models.save_family(name, root / name)

    return folder


def plain_pipeline(folder, scheduler=None):
    """diffusers' own, as anybody loads it."""
    import diffusers

    absent = {"text_encoder_3": None, "tokenizer_3": None} if folder.name == "sd3-without-t5" else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    if scheduler is not None:
        pipeline.scheduler = scheduler(pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_scheduler(name):
    """What our default sampler is in diffusers; None where it is the pipeline's own."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if name.startswith("pixart"):
        return lambda own: DDIMScheduler.from_config(own.config, clip_sample=False, set_alpha_to_one=False)
    return (lambda own: FlowMatchEulerDiscreteScheduler(shift=3.0)) if name == "sana" else None


def drawing(folder, **options):
    config = resolve_sample(SampleOptions(model=str(folder), prompt=PROMPTS, **options))
    return Policy(replace(models.load_model(str(folder)), clip_skip=config.clip_skip), config)


def ddim_of(name):
    """PixArt's default is its pipeline's DPM-Solver, which has a test of its own."""
    return {"sampler": "ddim"} if name.startswith("pixart") else {}


def resolution_of(name):
    return {"sd3": 16, "sd3-without-t5": 16, "flux": 16, "sana": 32}.get(name, 64)


def plain_images(pipeline, name, **options):
    options = {"height": resolution_of(name), "width": resolution_of(name)} | options
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    options |= {} if name.startswith(("sd3", "flux")) else {"use_resolution_binning": False}
    if name.startswith("pixart"):
        options["clean_caption"] = False
    return pipeline(PROMPTS, generator=generator, output_type="pt", **options).images


def our_images(folder, name, **options):
    usual = {} if {"width", "height"} <= options.keys() else {"resolution": resolution_of(name)}
    policy = drawing(folder, **usual | ddim_of(name) | options)
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    return policy.draw(models.tokenize_for(policy.model, PROMPTS), generator)


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_images_equal_those_of_the_plain_pipeline(folders, name, guidance):
    options = {"num_inference_steps": 4, "guidance_scale": guidance}
    ours = our_images(folders(name), name, eta=0.0, **options)
    plain = plain_images(plain_pipeline(folders(name), plain_scheduler(name)), name, **options)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", FAMILIES)
def test_images_that_are_not_square_equal_those_of_the_plain_pipeline(folders, name):
    options = {"num_inference_steps": 3, "guidance_scale": 4.0}
    size = resolution_of(name)
    ours = our_images(folders(name), name, eta=0.0, width=2 * size, **options)
    assert ours.shape[2:] == (size, 2 * size)
    plain = plain_images(plain_pipeline(folders(name), plain_scheduler(name)), name, width=2 * size, **options)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)


def test_pixart_of_1024_pixels_is_given_the_aspect_ratio_of_an_image_that_is_not_square(folders, tmp_path):
    from diffusers import PixArtTransformer2DModel

    folder = shutil.copytree(folders("pixart-alpha"), tmp_path / "large")
    config = PixArtTransformer2DModel.load_config(folder / "transformer")
    config |= {"sample_size": 128, "use_additional_conditions": True, "attention_head_dim": 12, "cross_attention_dim": 48}
    torch.manual_seed(0)
    PixArtTransformer2DModel.from_config(config).save_pretrained(folder / "transformer")
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "width": 32, "height": 64}
    ours = our_images(folder, "pixart-alpha", eta=0.0, **options)
    plain = plain_images(plain_pipeline(folder, plain_scheduler("pixart-alpha")), "pixart-alpha", **options)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)


def test_clip_skip_reads_the_clips_of_sd3_as_the_plain_pipeline_does(folders):
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "clip_skip": 1}
    ours = our_images(folders("sd3"), "sd3", eta=0.0, negative_prompt="Blurry", **options)
    plain = plain_images(plain_pipeline(folders("sd3")), "sd3", negative_prompt=["Blurry"] * 2, **options)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["flux", "pixart-sigma", "sana"])
def test_clip_skip_is_refused_where_no_layer_of_a_clip_is_read(folders, name):
    with pytest.raises(InputError, match=r"^clip_skip: .* reads no layer of a CLIP"):
        resolve_sample(SampleOptions(model=str(folders(name)), prompt=PROMPTS, clip_skip=1))
    with pytest.raises(InputError, match=r"^clip_skip: .* reads no layer of a CLIP"):
        models.check_clip_skip(str(folders(name)), 1)


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", GUIDED)
def test_a_negative_prompt_leads_away_as_in_the_plain_pipeline(folders, name):
    options = {"num_inference_steps": 3, "guidance_scale": 4.0}
    ours = our_images(folders(name), name, eta=0.0, negative_prompt="Blurry", **options)
    pipeline = plain_pipeline(folders(name), plain_scheduler(name))
    plain = plain_images(pipeline, name, negative_prompt=["Blurry"] * 2, **options)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)
    assert (ours - our_images(folders(name), name, eta=0.0, **options)).abs().max() > 1e-4


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", ["sd3", "pixart-alpha", "pixart-sigma", "sana"])
def test_dpm_solver_draws_what_the_plain_pipeline_draws_with_it(folders, name):
    from diffusers import DPMSolverMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = (lambda own: DPMSolverMultistepScheduler(**flow)) if name == "sd3" else None
    options = {"num_inference_steps": 5, "guidance_scale": 4.0}
    ours = our_images(folders(name), name, sampler="dpm-solver", **options)
    plain = plain_images(plain_pipeline(folders(name), scheduler), name, **options)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_equal_encode_prompts(folders, name):
    model = models.load_model(str(folders(name)))
    pipeline = plain_pipeline(folders(name))
    text = model.packing.unpack(models.encode(model, models.tokenize_for(model, PROMPTS)))
    with torch.no_grad():
        if name.startswith("sd3"):
            embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
            expected = families.Text(embeds, pooled)
        elif name == "flux":
            embeds, pooled, _ = pipeline.encode_prompt(PROMPTS, None)
            expected = families.Text(embeds, pooled)
        else:
            instruction = {"complex_human_instruction": families.sana_instruction().split("\n")} if name == "sana" else {}
            embeds, mask, _, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, **instruction)
            expected = families.Text(embeds, mask=mask)
    for ours, theirs in ((text.embeds, expected.embeds), (text.pooled, expected.pooled), (text.mask, expected.mask)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-5)


# --- training ---

TRAINED = {  # by default
    "sd3": ["text_encoder", "text_encoder_2"], "flux": ["text_encoder"], "pixart-sigma": ["text_encoder"],
    "pixart-alpha": ["text_encoder"], "sana": ["text_encoder"],
}  # fmt: skip


def train_config(folder, output, name, **options):
    prompts = output.parent / "prompts.txt"
    prompts.write_text("two red circle\na blue square\na and a\nred and blue\n")
    usual = {
        "model": str(folder), "reward": "jpeg", "prompts": str(prompts), "algorithm": "matching", "num_epochs": 1,
        "num_prompts_per_epoch": 2, "num_samples_per_prompt": 2, "num_inference_steps": 3, "num_noise_levels": 2,
        "resolution": resolution_of(name), "rank": 2, "learning_rate": 3e-2, "lr_warmup_steps": 0, "mixed_precision": "no",
        "sample_batch_size": 4, "micro_batch_size": 4, "ema_decay": 0.0, "output_dir": str(output), "guidance_scale": 3.0,
    }  # fmt: skip
    return resolve(TrainOptions(**usual | ddim_of(name) | options))


def folder_of(output, part):
    return output if part == "text_encoder" else output / part


@pytest.fixture(scope="session")
def trained(folders, tmp_path_factory):
    """The output of an epoch of matching by family."""
    root = tmp_path_factory.mktemp("trained")

    def output(name):
        (root / name).mkdir(exist_ok=True)
        if not (root / name / "out").is_dir():
            training.train(train_config(folders(name), root / name / "out", name))
        return root / name / "out"

    return output


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", QUICK)
def test_an_epoch_of_matching_writes_lora_of_the_usual_text_encoders_alone(trained, name):
    written = {path.parent for path in trained(name).rglob("adapter_model.safetensors")}
    assert written == {folder_of(trained(name), part) for part in TRAINED[name]}
    for folder in written:
        tensors = load_file(folder / "adapter_model.safetensors")
        assert any(tensor.abs().max() > 0 for key, tensor in tensors.items() if "lora_B" in key)


@pytest.mark.parametrize("name", QUICK)
def test_an_epoch_trains_nothing_but_lora(folders, tmp_path, name):
    model = models.load_model(str(folders(name)))
    before = {part: {key: tensor.clone() for key, tensor in module.state_dict().items()} for part, module in
              (model.policy_parts | {"vae": model.vae}).items()}  # fmt: skip
    config = train_config(folders(name), tmp_path / "out", name)
    policy = texforce.make_policy(model, config)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.1)
    for part, module in (policy.model.policy_parts | {"vae": policy.model.vae}).items():
        after = {
            key.replace("base_model.model.", "").replace(".base_layer", ""): t for key, t in module.state_dict().items()
        }
        assert all(torch.equal(tensor, after[key]) for key, tensor in before[part].items())
        assert hasattr(module, "peft_config") == (part in TRAINED[name])
        assert not any(tensor.requires_grad for key, tensor in module.named_parameters() if ".lora_" not in key)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", QUICK)
def test_an_epoch_of_ppo_begins_at_a_ratio_of_one(folders, tmp_path, name):
    sampled = {} if name.startswith("pixart") else {"sampler": "cps" if name == "sana" else "euler"}
    options = {"algorithm": "ppo", "timestep_window": 0.9, "num_updates_per_epoch": 1} | sampled
    config = train_config(folders(name), tmp_path / "out", name, **options)
    training.train(config)
    (_, epoch) = (json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert epoch["ratio_deviation"] <= 5e-6
    assert epoch["grad_norm"] > 0


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["sd3", "sana"])
def test_an_epoch_along_the_rewards_gradient_changes_what_is_drawn(folders, tmp_path, name):
    (tmp_path / "mine.py").write_text(
        "def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\nbrightness.with_gradients = True\n"
    )
    options = {"algorithm": "gradient", "reward": f"{tmp_path / 'mine.py'}:brightness", "backprop_steps": 2}
    options |= {"num_samples_per_prompt": 1, "advantages": "per-prompt"}
    result = training.train(train_config(folders(name), tmp_path / "out", name, **options))
    heldout = result["heldout"][options["reward"]]
    assert heldout["tuned"] != heldout["base"]


@pytest.mark.parametrize("name", QUICK)
def test_the_rewards_gradient_goes_through_the_last_steps_of_sampling(folders, tmp_path, name):
    """Along a random direction it is a finite difference, with all steps in it."""
    config = train_config(folders(name), tmp_path / "out", name, algorithm="gradient", reward="hps", backprop_steps=3)
    policy = texforce.make_policy(models.load_model(str(folders(name))), config)
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(parameter.shape, generator=generator) for parameter in policy.parameters]
    with torch.no_grad():
        for parameter, part in zip(policy.parameters, direction, strict=True):
            parameter.add_(0.05 * part)
    ids = models.tokenize_for(policy.model, PROMPTS)
    noises = list(sampler.draw_noise(3, 2, policy.latent_shape, generator, torch.device("cpu")))

    weights = torch.randn(2, *policy.latent_shape, generator=generator)

    def objective():
        embeds, rows = policy.encode_distinct(ids)
        by_step = [embeds] * config.num_inference_steps
        latents = sampler.sample_with_gradients(policy.denoiser, by_step, rows, noises, config.backprop_steps)
        return (latents.double() * weights).sum()

    objective().backward()
    slope = sum((parameter.grad * part).sum() for parameter, part in zip(policy.parameters, direction, strict=True))
    values = []
    for shift in (0.001, -0.002):
        with torch.no_grad():
            for parameter, part in zip(policy.parameters, direction, strict=True):
                parameter.add_(shift * part)
            values.append(objective().item())
    assert slope.item() == pytest.approx((values[0] - values[1]) / 0.002, rel=0.03)


def our_tuned_images(folder, name, adapter, **options):
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "eta": 0.0, "resolution": resolution_of(name)} | options
    config = resolve_sample(SampleOptions(model=str(folder), adapter=[str(adapter)], prompt=PROMPTS, **given))
    return evaluation.sample(config, PROMPTS, range(len(PROMPTS)))["tuned"]


def plain_tuned_images(pipeline, name):
    return plain_images(pipeline, name, num_inference_steps=4, guidance_scale=3.0)


@pytest.mark.parametrize("name", QUICK)
def test_peft_puts_the_adapter_on_the_plain_pipeline_for_the_same_images(folders, trained, name):
    pipeline = plain_pipeline(folders(name), plain_scheduler(name))
    base = plain_tuned_images(pipeline, name)
    for part in TRAINED[name]:
        adapted = PeftModel.from_pretrained(getattr(pipeline, part), folder_of(trained(name), part))
        setattr(pipeline, part, adapted.merge_and_unload())
    plain = plain_tuned_images(pipeline, name)
    torch.testing.assert_close(our_tuned_images(folders(name), name, trained(name)), plain, rtol=0, atol=1e-4)
    assert (plain - base).abs().max() > 1e-4


def merged(folder, adapter, output, format):
    config = resolve_merge(MergeOptions(model=str(folder), adapter=[str(adapter)], output_dir=str(output), format=format))
    return merging.merge(config)


@pytest.mark.parametrize("name", QUICK)
def test_a_merged_pipeline_draws_the_same_images(folders, trained, tmp_path, name):
    folder = merged(folders(name), trained(name), tmp_path / name, "pipeline")
    plain = plain_tuned_images(plain_pipeline(folder, plain_scheduler(name)), name)
    torch.testing.assert_close(our_tuned_images(folders(name), name, trained(name)), plain, rtol=0, atol=1e-4)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_diffusers_loads_the_lora_of_its_format_for_the_same_images(folders, trained, tmp_path, name):
    folder = merged(folders(name), trained(name), tmp_path / "lora", "diffusers")
    pipeline = plain_pipeline(folders(name))
    pipeline.load_lora_weights(folder)
    ours = our_tuned_images(folders(name), name, trained(name))
    torch.testing.assert_close(ours, plain_tuned_images(pipeline, name), rtol=0, atol=1e-4)
    torch.testing.assert_close(our_tuned_images(folders(name), name, folder), ours, rtol=0, atol=1e-5)


def test_writing_lora_reads_no_transformer_and_no_vae(folders, trained, tmp_path):
    folder = shutil.copytree(folders("flux"), tmp_path / "model")
    for file in (*folder.glob("transformer/*.safetensors"), *folder.glob("vae/*.safetensors")):
        file.unlink()
    assert (merged(folder, trained("flux"), tmp_path / "lora", "kohya") / "lora.safetensors").is_file()


@pytest.mark.quick(1)
@pytest.mark.parametrize(("name", "prefixes"), [
    ("sd3", {"lora_te1_text_model_", "lora_te2_text_model_", "lora_te3_encoder_block_"}),
    ("flux", {"lora_te1_text_model_", "lora_te3_encoder_block_"}),
])  # fmt: skip
def test_kohyas_names_are_those_of_sd_scripts_and_comfyui(folders, tmp_path, name, prefixes):
    chosen = ["text_encoder", "text_encoder_2"] + ["text_encoder_3"] * (name == "sd3")
    training.train(train_config(folders(name), tmp_path / "out", name, text_encoders=chosen))
    folder = merged(folders(name), tmp_path / "out", tmp_path / "kohya", "kohya")
    tensors = load_file(folder / "kohya.safetensors")
    assert {prefix for prefix in prefixes for key in tensors if key.startswith(prefix)} == prefixes
    assert all(key.startswith(tuple(prefixes)) for key in tensors)
    ours = our_tuned_images(folders(name), name, tmp_path / "out")
    torch.testing.assert_close(our_tuned_images(folders(name), name, folder), ours, rtol=0, atol=1e-5)


def test_a_file_of_lora_for_another_family_is_refused_by_its_header(folders, trained, tmp_path):
    folder = merged(folders("sd3"), trained("sd3"), tmp_path / "kohya", "kohya")
    with safe_open(folder / "kohya.safetensors", "pt") as opened:
        header = opened.metadata()
    assert header["ss_base_model_version"] == "sd3_v1"
    for said in ("sdxl_base_v1-0", "flux1", "sd_v1"):
        save_file(load_file(folder / "kohya.safetensors"), tmp_path / "other.safetensors", {"ss_base_model_version": said})
        with pytest.raises(ArtifactError, match=f"made for another model: it says {said}, and this one is sd3"):
            our_tuned_images(folders("sd3"), "sd3", tmp_path / "other.safetensors")


@pytest.mark.quick(1)
@pytest.mark.parametrize(("name", "format", "message"), [
    ("pixart-sigma", "kohya", "no LoRA of the text_encoder of PixArt-Sigma; use peft"),
    ("sana", "kohya", "no LoRA of the text_encoder of Sana; use peft"),
    ("sana", "checkpoint", "checkpoint is a layout of Stable Diffusion 1.x to XL, not of Sana; use pipeline"),
    ("flux", "checkpoint", "checkpoint is a layout of Stable Diffusion 1.x to XL, not of FLUX.1; use pipeline"),
])  # fmt: skip
def test_a_format_that_no_reader_takes_is_refused_with_the_reason(folders, trained, tmp_path, name, format, message):
    with pytest.raises(InputError, match=f"format: .*{message}"):
        merged(folders(name), trained(name), tmp_path / "merged", format)
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_t5_may_be_trained_alone_and_diffusers_format_refuses_it(folders, tmp_path):
    config = train_config(folders("sd3"), tmp_path / "out", "sd3", text_encoders=["text_encoder_3"])
    training.train(config)
    assert [path.parent.name for path in (tmp_path / "out").rglob("adapter_model.safetensors")] == ["text_encoder_3"]
    pipeline = plain_pipeline(folders("sd3"))
    adapted = PeftModel.from_pretrained(pipeline.text_encoder_3, tmp_path / "out" / "text_encoder_3")
    pipeline.text_encoder_3 = adapted.merge_and_unload()
    ours = our_tuned_images(folders("sd3"), "sd3", tmp_path / "out")
    torch.testing.assert_close(ours, plain_tuned_images(pipeline, "sd3"), rtol=0, atol=1e-4)
    with pytest.raises(InputError, match=re.escape("no LoRA of the text_encoder_3 of Stable Diffusion 3 or 3.5; use peft")):
        merged(folders("sd3"), tmp_path / "out", tmp_path / "merged", "diffusers")


def matching_share(policy, config):
    """An epoch's images, noised, and everything an update learns from."""
    generator = torch.Generator().manual_seed(1)
    prompts = ["two red circle", "two red circle", "a blue square", "a blue square"]
    ids = models.tokenize_for(policy.model, prompts)
    latents = torch.randn(4, *policy.latent_shape, generator=generator)
    rewards = torch.randn(4, generator=generator)
    batch = texforce.Batch(prompts, ids, torch.arange(4), rewards, rewards, latents=latents)
    noising = texforce.draw_noising(policy, 2, config, generator)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(config.num_noise_levels))
    return batch, noising, pairs


def textbook_text(model, pipeline, prompt):
    """What the denoiser reads of a prompt, by the plain pipeline's own `encode_prompt` around our text encoders."""
    name = type(pipeline).__name__
    for part, encoder in model.text_encoders.items():
        setattr(pipeline, part, encoder)
    encode = pipeline.encode_prompt.__wrapped__ if hasattr(pipeline.encode_prompt, "__wrapped__") else pipeline.encode_prompt
    if name == "StableDiffusion3Pipeline":
        embeds, _, pooled, _ = encode([prompt], None, None, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
    if name == "FluxPipeline":
        embeds, pooled, ids = encode([prompt], None)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "txt_ids": ids}
    more = {"complex_human_instruction": families.sana_instruction().split("\n")} if name == "SanaPipeline" else {}
    embeds, mask, _, _ = encode([prompt], do_classifier_free_guidance=False, **more)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def textbook_output(pipeline, latents, timestep, text, guidance_scale):
    transformer, name = pipeline.transformer, type(pipeline).__name__
    if name == "FluxPipeline":
        height, width = latents.shape[2:]
        packed = pipeline._pack_latents(latents, 1, latents.shape[1], height, width)
        ids = pipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
        guidance = torch.full([1], guidance_scale)
        output = transformer(
            packed, timestep=timestep[None] / 1000, img_ids=ids, guidance=guidance, return_dict=False, **text
        )[0]
        return pipeline._unpack_latents(output, height * 2, width * 2, 2)
    scale = transformer.config.timestep_scale if name == "SanaPipeline" else 1
    more = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if name.startswith("PixArt") else {}
    output = transformer(latents, timestep=timestep[None] * scale, return_dict=False, **text, **more)[0]
    return output[:, : latents.shape[1]]


def textbook_matching_loss(policy, pipeline, batch, noising, image, draw, config):
    """Advantage-weighted matching of one image at one noise level, as one would write it down."""
    level, noise = noising.levels[image // 2, draw], noising.noise[image // 2, draw][None]
    timestep, sample, flow = policy.noise_process.timesteps[level], batch.latents[image][None], policy.model.family.flow
    sigma = timestep / 1000
    noised = (1 - sigma) * sample + sigma * noise if flow else pipeline.scheduler.add_noise(sample, noise, timestep[None])

    def predict():
        text = textbook_text(policy.model, pipeline, batch.prompts[image])
        output = textbook_output(pipeline, noised, timestep, text, config.guidance_scale)
        if flow:
            return noised - sigma * output
        alpha = pipeline.scheduler.alphas_cumprod[timestep]
        return (noised - (1 - alpha).sqrt() * output) / alpha.sqrt()

    prediction = predict()
    with policy.base(), torch.no_grad():
        base = predict()
    error = prediction - sample
    loss = batch.advantages[image] * error.square().mean() / error.detach().abs().mean()
    return loss + config.kl_weight * (prediction - base).square().mean()


def gradient_of(policy):
    gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters])
    for parameter in policy.parameters:
        parameter.grad = None
    return gradient


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", [*KINDS, "sd3-without-t5"])
def test_the_gradient_of_matching_equals_that_of_the_textbook_loop(folders, tmp_path, name):
    config = train_config(folders(name), tmp_path / "out", name, kl_weight=0.3, micro_batch_size=3)
    policy = texforce.make_policy(models.load_model(str(folders(name))), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    batch, noising, pairs = matching_share(policy, config)
    loss = functools.partial(texforce.matching_micro_batch, noising=noising)
    texforce.accumulate_gradients(policy, texforce.Share(batch, pairs, loss), Learner(policy.parameters, config), config)
    ours, pipeline = gradient_of(policy), plain_pipeline(folders(name), plain_scheduler(name))
    losses = [textbook_matching_loss(policy, pipeline, batch, noising, *pair, config) for pair in pairs.tolist()]
    torch.stack(losses).mean().backward()
    theirs = gradient_of(policy)
    assert (ours - theirs).norm() / theirs.norm() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [
    ("sd3", {"algorithm": "ppo", "sampler": "euler", "timestep_window": 0.5}),
    ("flux", {"offload_text_encoders": True, "gradient_checkpointing": True}),
    ("sana", {"kl_weight": 0.1, "null_anchor": 1.0, "num_inner_epochs": 2}),
])  # fmt: skip
def test_a_run_that_is_stopped_goes_on_exactly(folders, tmp_path, monkeypatch, name, options):
    options |= {"num_epochs": 3, "checkpoint_every": 1, "ema_decay": 0.5}
    training.train(train_config(folders(name), tmp_path / "whole", name, **options))
    updates = []

    def stopping(update):
        def stopping_update(*given):
            updates.append(given)
            if len(updates) == 2:
                raise RuntimeError("stopped")
            return update(*given)

        return stopping_update

    with monkeypatch.context() as patch:
        for function in ("ppo_update", "matching_update"):
            patch.setattr(training, function, stopping(getattr(texforce, function)))
        with pytest.raises(RuntimeError, match="stopped"):
            training.train(train_config(folders(name), tmp_path / "parted", name, **options))
    training.train(train_config(folders(name), tmp_path / "parted", name, **options), resume=True)
    for part in TRAINED[name]:
        files = [folder_of(tmp_path / run, part) / "adapter_model.safetensors" for run in ("whole", "parted")]
        assert files[0].read_bytes() == files[1].read_bytes()


# --- flow matching as Gaussian transitions ---


def flow_scheduler(**options):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


@pytest.mark.parametrize(("options", "linear"), [
    ({"shift": 3.0}, False), ({"shift": 1.0}, False), ({"use_dynamic_shifting": True}, True),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, True), ({"shift_terminal": 0.02, "shift": 2.0}, False),
    ({"use_karras_sigmas": True}, False), ({"use_beta_sigmas": True}, False),
])  # fmt: skip
def test_without_randomness_a_step_is_diffusers_step_of_flow_matching(options, linear):
    sigmas, timesteps = sampler.flow_levels(flow_scheduler(**options), 6, 1024, linear)
    schedule, scheduler = sampler.flow_schedule(sigmas, timesteps), flow_scheduler(**options)
    given = {"sigmas": np.linspace(1.0, 1 / 6, 6)} if linear else {}
    mu = {"mu": calculate_shift(1024)} if "use_dynamic_shifting" in options else {}
    scheduler.set_timesteps(6, **given, **mu)
    torch.testing.assert_close(schedule.timesteps, scheduler.timesteps, rtol=1e-6, atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    for k, timestep in enumerate(scheduler.timesteps):
        latents, output = torch.randn(2, 1, 4, 2, 2, generator=generator)
        expected = scheduler.step(output, timestep, latents).prev_sample
        torch.testing.assert_close(schedule.mean(latents, output, torch.tensor([k])), expected, rtol=1e-5, atol=1e-5)
    assert not schedule.std.any()


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_flow_grpos_transition_is_the_published_sde(eta):
    sigmas, timesteps = sampler.flow_levels(flow_scheduler(shift=3.0), 5, 1024, False)
    schedule = sampler.flow_schedule(sigmas, timesteps, eta)
    x, v = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in range(5):
        sigma, step = sigmas[k].double(), (sigmas[k + 1] - sigmas[k]).double()
        s = eta * (sigma / (1 - (sigma if sigma < 1 else sigmas[1].double()))).sqrt()
        # dx = [v + s^2 / (2 sigma) (x + (1 - sigma) v)] dt + s dw
        mean = x + (v + s**2 / (2 * sigma) * (x + (1 - sigma) * v)) * step
        torch.testing.assert_close(
            schedule.latents_weight[k] * x + schedule.output_weight[k] * v, mean, rtol=1e-5, atol=1e-5
        )
        assert schedule.std[k].item() == pytest.approx((s * (-step).sqrt()).item(), rel=1e-5)
    assert schedule.std[-1] > 0


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_cps_leaves_the_noise_that_each_level_should_have(eta):
    sigmas, timesteps = sampler.flow_levels(flow_scheduler(shift=3.0), 5, 1024, False)
    schedule = sampler.flow_schedule(sigmas, timesteps, eta, "cps")
    for k, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        # x = (1 - sigma) sample + sigma noise, v = noise - sample
        of_sample = schedule.latents_weight[k] * (1 - sigma) - schedule.output_weight[k]
        of_noise = schedule.latents_weight[k] * sigma + schedule.output_weight[k]
        assert of_sample.item() == pytest.approx(1 - after.item(), abs=1e-5)
        assert (of_noise**2 + schedule.std[k] ** 2).item() == pytest.approx(after.item() ** 2, abs=1e-5)
        assert schedule.std[k].item() == pytest.approx(after.item() * math.sin(eta * math.pi / 2), abs=1e-6)


@pytest.mark.parametrize("kind", ["euler", "cps"])
def test_log_probabilities_of_flow_matching_are_those_of_the_normal_distribution(folders, kind):
    config = train_config(folders("sd3"), folders("sd3"), "sd3", algorithm="ppo", sampler=kind, timestep_window=0.5)
    policy = texforce.make_policy(models.load_model(str(folders("sd3"))), config)
    ids = models.tokenize_for(policy.model, PROMPTS)
    with torch.no_grad():
        conditioning = policy.conditioning(ids)
        path = sampler.rollout(policy.denoiser, ids, conditioning, policy.latent_shape, torch.Generator().manual_seed(0))
        for k in policy.denoiser.schedule.trainable_steps.tolist():
            steps = torch.full((2,), k)
            mean, _ = policy.denoiser.mean(path.latents[:, k], steps, conditioning)
            expected = Normal(mean, policy.denoiser.std(steps)).log_prob(path.latents[:, k + 1]).flatten(1).mean(dim=1)
            torch.testing.assert_close(path.log_probs[:, k], expected, rtol=1e-4, atol=1e-5)


def test_steps_outside_the_window_may_be_deterministic_in_flow_matching(folders, tmp_path):
    options = {"algorithm": "ppo", "timestep_window": 0.4, "num_inference_steps": 5, "deterministic_elsewhere": True}
    config = train_config(folders("sd3"), tmp_path / "out", "sd3", **options)
    policy = texforce.make_policy(models.load_model(str(folders("sd3"))), config)
    assert (policy.denoiser.schedule.std > 0).tolist() == [True, True, False, False, False]
    assert policy.denoiser.schedule.output_weight[2:].equal(policy.drawing_denoiser.schedule.output_weight[2:])
    assert not policy.drawing_denoiser.schedule.std.any()


# --- memory ---


@pytest.mark.slow
def test_text_encoders_that_are_not_trained_may_leave_the_device_and_encode_a_prompt_once(folders, tmp_path, monkeypatch):
    calls = []

    def read(encoder, ids):
        calls.append(len(ids))
        return families.t5(encoder, ids)

    monkeypatch.setitem(families.SD3.text, "text_encoder_3", replace(families.SD3.text["text_encoder_3"], read=read))
    outputs = []
    for name, offload in (("kept", False), ("offloaded", True)):
        (tmp_path / name).mkdir()
        calls.clear()
        output = tmp_path / name / "out"
        training.train(train_config(folders("sd3"), output, "sd3", num_epochs=2, offload_text_encoders=offload))
        outputs.append([load_file(folder_of(output, part) / "adapter_model.safetensors") for part in TRAINED["sd3"]])
    assert calls == [1] * 5  # the four prompts and the null prompt
    for kept, offloaded in zip(*outputs, strict=True):
        for key, tensor in kept.items():
            torch.testing.assert_close(offloaded[key], tensor, rtol=0, atol=1e-4)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["sd3", "flux", "pixart-sigma", "sana"])
def test_gradient_checkpointing_changes_nothing_but_memory(folders, tmp_path, name):
    gradients, kept = [], []
    chosen = {"text_encoders": ["text_encoder", "text_encoder_2", "text_encoder_3"]} if name == "sd3" else {}
    for checkpointing in (False, True):
        config = train_config(folders(name), tmp_path / "out", name, gradient_checkpointing=checkpointing, **chosen)
        policy = texforce.make_policy(models.load_model(str(folders(name))), config)
        batch, noising, pairs = matching_share(policy, config)
        loss = functools.partial(texforce.matching_micro_batch, noising=noising)
        texforce.accumulate_gradients(policy, texforce.Share(batch, pairs, loss), Learner(policy.parameters, config), config)
        gradients.append(gradient_of(policy))
        kept.append(saved_bytes(policy.model, lambda: models.encode(policy.model, batch.prompt_ids)))  # noqa: B023
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    assert kept[1] < 0.7 * kept[0]


# --- what is refused ---


def changed(folder, tmp_path, file, **changes):
    """A copy of a pipeline with fields of a JSON file changed; None removes one."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    fields = json.loads((copy / file).read_text()) | changes
    (copy / file).write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return copy


INDEX, SCHEDULER, TRANSFORMER = "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"


@pytest.mark.parametrize(("name", "file", "changes", "message"), [
    ("sd3", INDEX, {"_class_name": "HunyuanDiTPipeline"}, "is a HunyuanDiTPipeline, which is not supported; known are"),
    ("sd3", INDEX, {"_class_name": "StableDiffusion3InpaintPipeline"}, "is a StableDiffusion3InpaintPipeline, which is not"),
    ("flux", INDEX, {"_class_name": "FluxFillPipeline"}, "is a FluxFillPipeline, which is not supported"),
    ("sana", INDEX, {"_class_name": "SanaSprintPipeline"}, "is a SanaSprintPipeline, which is not supported"),
    ("sd3", INDEX, {"text_encoder_2": [None, None]}, "names no text_encoder_2"),
    ("flux", INDEX, {"transformer": None}, "names no transformer"),
    ("sd3", SCHEDULER, {"_class_name": "DDIMScheduler"}, "of a DDIMScheduler whose noise is not that of flow matching"),
    ("flux", SCHEDULER, {"_class_name": "FlowMatchHeunDiscreteScheduler"}, "of a FlowMatchHeunDiscreteScheduler"),
    ("sana", SCHEDULER, {"use_flow_sigmas": False}, "of a DPMSolverMultistepScheduler whose noise is not that of flow"),
    ("sd3", SCHEDULER, {"invert_sigmas": True}, "of a FlowMatchEulerDiscreteScheduler whose noise is not"),
    ("pixart-alpha", SCHEDULER, {"use_flow_sigmas": True}, "of a DPMSolverMultistepScheduler whose noise is not DDIM's"),
    ("pixart-alpha", SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "whose noise is not DDIM's"),
])  # fmt: skip
def test_a_pipeline_of_no_family_or_schedule_here_is_refused(folders, tmp_path, name, file, changes, message):
    folder = changed(folders(name), tmp_path, file, **changes)
    with pytest.raises(InputError, match=f"model: .*{message}"):
        models.load_model(str(folder))


@pytest.mark.parametrize(("options", "message"), [
    ({"name": "sd3", "target": "unet"}, "target: .*sd3' has no U-Net"),
    ({"name": "sana", "target": "both", "null_prompt": "adapted"}, "target: .*sana' has no U-Net"),
    ({"name": "sd3", "text_encoders": ["text_encoder_4"]}, "has no 'text_encoder_4', it has text_encoder, .*; did you mean"),
    ({"name": "sd3-without-t5", "text_encoders": ["text_encoder_3"]}, "has no 'text_encoder_3', it has"),
    ({"name": "sd3", "sampler": "ddim"}, "sampler: must be euler or cps or dpm-solver for .*, not ddim"),
    ({"name": "pixart-alpha", "sampler": "euler"}, "sampler: must be ddim or dpm-solver for .*, not euler"),
    ({"name": "sd3", "algorithm": "ppo", "eta": 0.0}, "eta: must be above 0 for ppo"),
    ({"name": "flux", "sampler": "dpm-solver"}, "sampler: the scheduler shifts its noise levels by the image's size"),
    ({"name": "sd3", "resolution": 80}, "resolution: must be at most 64 pixels for this model, not 80"),
    ({"name": "sd3", "resolution": 18}, "resolution: must be a multiple of 4 pixels"),
    ({"name": "flux", "resolution": 18}, "resolution: must be a multiple of 4 pixels"),
])  # fmt: skip
def test_options_that_do_not_fit_the_family_are_refused(folders, tmp_path, options, message):
    name = options.pop("name")
    with pytest.raises(InputError, match=message):
        training.train(train_config(folders(name), tmp_path / "out", name, **options))


def test_flux_takes_no_negative_prompt_and_flow_matching_is_drawn_without_randomness(folders):
    for options, message in (
        ({"negative_prompt": "blurry"}, "negative_prompt: FLUX.1 takes none"),
        ({"eta": 0.5}, "flow matching is drawn by euler at an eta of 0, not by euler at 0.5"),
        ({"sampler": "cps"}, "flow matching is drawn by euler at an eta of 0, not by cps"),
    ):
        with pytest.raises(InputError, match=message):
            our_images(folders("flux"), "flux", **options)


def test_a_text_encoder_of_another_width_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders("pixart-sigma"), tmp_path / "wide")
    small_models.t5_of_shape(40).save_pretrained(folder / "text_encoder")
    with pytest.raises(InputError, match=r"the transformer of .* takes embeddings of 24, its text encoder makes 40"):
        models.load_model(str(folder))


@pytest.mark.parametrize(("name", "algorithm", "expected"), [
    ("black-forest-labs/FLUX.1-schnell", "matching", True), ("black-forest-labs/FLUX.1-schnell", "ppo", True),
    ("black-forest-labs/FLUX.1-schnell", "gradient", False), ("black-forest-labs/FLUX.1-dev", "matching", False),
    ("stabilityai/stable-diffusion-3.5-large-turbo", "matching", True),
])  # fmt: skip
def test_a_warning_says_where_an_algorithm_is_known_to_fail_on_distilled_models(folders, name, algorithm, expected):
    model = replace(models.load_model(str(folders("flux" if "FLUX" in name else "sd3"))), name=name)
    note = models.distillation_note(model, algorithm)
    assert (note is not None and "Flow-Factory's issue 158" in note) == expected


def test_the_transformer_of_flux_schnell_says_so_itself_and_training_warns(folders, tmp_path):
    folder = tmp_path / "renamed"
    torch.manual_seed(0)
    small_models.flux_pipeline(guidance_embeds=False).save_pretrained(folder)
    said = []
    training.train(train_config(folder, tmp_path / "out", "flux"), warn=said.append)
    assert [line for line in said if line.startswith("model: it was distilled to few steps")]
    ours = our_images(folder, "flux", num_inference_steps=3, guidance_scale=3.0)
    plain = plain_images(plain_pipeline(folder), "flux", num_inference_steps=3, guidance_scale=3.0)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)


# --- folders as people have them ---


def variant_of(folder, tmp_path, variant=None, shards="1GB"):
    """A pipeline saved again in float16 under a variant's names, or in shards."""
    pipeline = plain_pipeline(folder)
    if variant:
        pipeline.to(torch.float16)
    pipeline.save_pretrained(tmp_path / "saved", variant=variant, max_shard_size=shards)
    return tmp_path / "saved"


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["sd3", "flux", "sana", "pixart-sigma"])
def test_a_folder_of_an_fp16_variant_alone_is_read(folders, tmp_path, name):
    folder = variant_of(folders(name), tmp_path, "fp16")
    assert not list(folder.rglob("model.safetensors"))
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "eta": 0.0}
    torch.testing.assert_close(
        our_images(folder, name, **options), our_images(folders(name), name, **options), rtol=0, atol=0.05
    )


def test_the_transformer_of_early_pixart_alpha_folders_has_another_class_name(folders, tmp_path):
    from diffusers import Transformer2DModel

    folder = changed(folders("pixart-alpha"), tmp_path, INDEX, transformer=["diffusers", "Transformer2DModel"])
    torch.manual_seed(0)
    early = Transformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
        cross_attention_dim=32, out_channels=8, caption_channels=24, norm_type="ada_norm_single", norm_eps=1e-6,
        norm_elementwise_affine=False, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
    )  # fmt: skip
    early.save_pretrained(folder / "transformer")
    options = {"num_inference_steps": 2, "guidance_scale": 3.0}
    plain = plain_images(plain_pipeline(folder, plain_scheduler("pixart-alpha")), "pixart-alpha", **options)
    torch.testing.assert_close(our_images(folder, "pixart-alpha", eta=0.0, **options), plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_sharded_weights_are_read_and_a_missing_shard_is_named(folders, tmp_path, name):
    folder = variant_of(folders(name), tmp_path, shards="50KB")
    shards = sorted((folder / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "eta": 0.0}
    assert torch.equal(our_images(folder, name, **options), our_images(folders(name), name, **options))
    shards[-1].unlink()
    with pytest.raises(InputError, match=r"model: the transformer in .* could not be loaded"):
        models.load_model(str(folder))


def test_a_tokenizer_may_come_as_a_sentencepiece_model_alone(folders, tmp_path):
    """As PixArt's does."""
    import sentencepiece

    folder = shutil.copytree(folders("pixart-sigma"), tmp_path / "model")
    (tmp_path / "text").write_text("two red circle\na blue square and a red circle\n" * 20)
    options = {"vocab_size": 30, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False}
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spiece"), **options)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    shutil.copy(tmp_path / "spiece.model", folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0, "model_max_length": 300}))
    options = {"num_inference_steps": 2, "guidance_scale": 3.0}
    plain = plain_images(plain_pipeline(folder, plain_scheduler("pixart-sigma")), "pixart-sigma", **options)
    torch.testing.assert_close(our_images(folder, "pixart-sigma", eta=0.0, **options), plain, rtol=0, atol=1e-4)


# --- what a model's name decides before it is loaded ---


@pytest.mark.parametrize(("name", "family", "steps", "guidance", "sampler"), [
    ("stabilityai/stable-diffusion-3.5-medium", "sd3", 28, 7.0, "euler"),
    ("stabilityai/stable-diffusion-3.5-large-turbo", "sd3-turbo", 4, 0.0, "euler"),
    ("black-forest-labs/FLUX.1-dev", "flux", 28, 3.5, "euler"),
    ("black-forest-labs/FLUX.1-schnell", "flux-turbo", 4, 0.0, "euler"),
    ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "pixart", 20, 4.5, "dpm-solver"),
    ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", "sana", 20, 4.5, "euler"),
])  # fmt: skip
def test_the_names_of_published_models_decide_steps_guidance_and_sampler(name, family, steps, guidance, sampler):
    assert presets.family(name) == family
    config = resolve(TrainOptions(model=name, reward="jpeg"))
    assert (config.num_inference_steps, config.guidance_scale, config.sampler) == (steps, guidance, sampler)
    assert config.algorithm == "matching"
    ppo = resolve(TrainOptions(model=name, reward="jpeg", algorithm="ppo"))
    assert (ppo.sampler, ppo.eta) == (("ddim", 1.0) if family == "pixart" else ("euler", 0.7))
    drawn = resolve_sample(SampleOptions(model=name, prompt=["a"]))
    assert (drawn.sampler, drawn.eta) == (sampler, 0.0)


def test_the_class_in_a_folder_decides_where_its_name_says_nothing(folders, tmp_path):
    shutil.copytree(folders("flux"), tmp_path / "my-finetune")
    assert presets.family(str(tmp_path / "my-finetune")) == "flux"


# --- anchors ---


@pytest.mark.parametrize("name", QUICK)
def test_an_anchor_is_the_mean_distance_of_what_the_trained_text_encoders_move(folders, tmp_path, name):
    (tmp_path / "anchors.txt").write_text("blurry\n")
    config = train_config(
        folders(name), tmp_path / "out", name, null_anchor=1.0, anchor_prompts=str(tmp_path / "anchors.txt")
    )
    policy = texforce.make_policy(models.load_model(str(folders(name))), config)
    assert len(policy.anchors.prompt_ids) == (1 if name == "flux" else 2)  # FLUX.1 has no null prompt
    assert policy.anchors.drift(policy.model).item() == 0
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(0.1)
        parts = models._read(policy.model, policy.anchors.prompt_ids)
        with policy.base():
            base = models._read(policy.model, policy.anchors.prompt_ids)
    pairs = [
        (getattr(parts[part], kind), getattr(base[part], kind)) for part in TRAINED[name] for kind in ("embeds", "pooled")
    ]
    moved = torch.cat([(one - other).flatten() for one, other in pairs if one is not None])
    torch.testing.assert_close(policy.anchors.drift(policy.model).detach(), moved.square().mean(), rtol=1e-4, atol=1e-8)


# --- the embedded model of flow matching ---


def test_tiny_flow_draws_what_plain_diffusers_draws():
    prompts = ["a red circle", "two crimson discs"]
    config = resolve_sample(SampleOptions(model="tiny-flow", prompt=prompts))
    policy = Policy(models.load_model("tiny-flow"), config)
    ours = policy.draw(models.tokenize_for(policy.model, prompts), [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    pipeline = DiffusionPipeline.from_pretrained(models.TINY_FLOW, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    plain = pipeline(prompts, max_sequence_length=24, generator=generator, output_type="pt", **options).images
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)


def test_tiny_flow_takes_at_most_six_megabytes():
    assert sum(path.stat().st_size for path in models.TINY_FLOW.rglob("*") if path.is_file()) <= 6_000_000


@pytest.mark.slow
def test_tiny_flow_is_imperfect_as_tiny_is():
    policy = Policy(models.load_model("tiny-flow"), resolve(TrainOptions(model="tiny-flow")))
    prompts = prompt_sets.read_prompts("world-heldout")
    scored = heldout.score_share(heldout.draw_share(policy, prompts, 128), prompts, {})
    measures = heldout.means(experience.gather_scores(scored).scores, prompts)
    assert 0.25 <= measures["alignment_exact"] <= 0.65
    assert measures["alignment_exact_rare"] <= measures["alignment_exact_common"] - 0.15


# --- the commands ---


@pytest.mark.slow
def test_the_commands_train_sample_evaluate_and_go_on_with_a_model_of_flow_matching(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("two red circle\na blue square\na and a\nred and blue\n")
    model = ["--model", str(folders("sd3")), "--resolution", "16", "--num-inference-steps", "3"]
    small = ["--prompts", "prompts.txt", "--reward", "jpeg", "--num-prompts-per-epoch", "2", "--num-samples-per-prompt", "2"]

    def run(*arguments):
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
        return result.output

    run("train", *model, *small, "--num-epochs", "2", "--checkpoint-every", "1", "--output-dir", "whole")
    run("train", *model, *small, "--num-epochs", "2", "--checkpoint-every", "1", "--output-dir", "again")
    for part in ("", "text_encoder_2"):
        whole, again = (load_file(tmp_path / run / part / "adapter_model.safetensors") for run in ("whole", "again"))
        assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())
    assert "text_encoder_2" in run("train", *model, *small, "--dry-run")
    run("sample", "--adapter", "whole", "--prompt", "two red circle", "--negative-prompt", "blurry", "--num-images", "1")
    assert (tmp_path / "samples" / "00000.png").is_file()
    with Image.open(tmp_path / "samples" / "00000.png") as image:
        assert image.text["negative_prompt"] == "blurry"
    evaluation = ["eval", "--adapter", "whole", "--benchmark", "prompts.txt", "--reward", "jpeg", "--num-images", "1"]
    run(*evaluation)
    assert (tmp_path / "eval" / "results.json").is_file()
    result = invoke(*evaluation, "--negative-prompt", "blurry")
    assert result.exit_code == 2
    assert "--negative-prompt None there, blurry asked for" in result.output.replace("\n", " ")
