"""Stable Diffusion XL and the Turbo models, of narrow layers and random weights, against plain diffusers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Normal
from typer.testing import CliRunner

import texforce
from texforce import cli, evaluate, merge, models, rewards, sampler, train
from texforce import PromptStatistics
from texforce.config import PRESETS, TrainConfig, TrainOptions, family, resolve
from texforce.config import MergeOptions, SampleConfig, SampleOptions, resolve_merge, resolve_sample
from texforce import Learner

PROMPTS = ["a red circle", "two blue squares"]
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


# --- narrow pipelines ---


def small_unet(**options):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        **options,
    )  # fmt: skip


def xl_unet(**options):
    """Like SDXL's: more transformer layers, and embeddings of pooled text (24) and 6 sizes (of 4 numbers each)."""
    return small_unet(
        **{
            "cross_attention_dim": 40, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 48, "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
        } | options
    )  # fmt: skip


def small_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 3, sample_size=32, scaling_factor=0.5,
    )  # fmt: skip


def small_text_encoder(cls, tokenizer, width: int, act: str):
    from transformers import CLIPTextConfig

    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=3, projection_dim=24,
            num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length, hidden_act=act,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()  # fmt: skip


def save_pipeline(folder: Path, xl: bool, scheduler) -> Path:
    """A pipeline of SDXL's shape or Stable Diffusion's; the former's tokenizers pad differently, as the published ones."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(models.TINY / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {"vae": small_vae(), "tokenizer": tokenizer, "scheduler": scheduler}
        parts["text_encoder"] = small_text_encoder(CLIPTextModel, tokenizer, 16, "quick_gelu")
        if xl:
            other = CLIPTokenizer.from_pretrained(models.TINY / "tokenizer", pad_token="!")  # noqa: S106
            second = small_text_encoder(CLIPTextModelWithProjection, other, 24, "gelu")
            StableDiffusionXLPipeline(
                **parts, unet=xl_unet(), tokenizer_2=other, text_encoder_2=second
            ).save_pretrained(folder)  # fmt: skip
        else:
            StableDiffusionPipeline(
                **parts, unet=small_unet(cross_attention_dim=16), safety_checker=None, feature_extractor=None,
                requires_safety_checker=False,
            ).save_pretrained(folder)  # fmt: skip
    return folder


def ddim(**options):
    from diffusers import DDIMScheduler

    return DDIMScheduler(**NOISE, **{"clip_sample": False, "set_alpha_to_one": False} | options)


def load_plain(folder: Path):
    """The pipeline as plain diffusers has it, with DDIM."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    terms = {"clip_sample": False, "set_alpha_to_one": False}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **terms)
    return pipeline


def draw_plainly(pipeline, guidance_scale: float, steps: int = 4) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "eta": 1.0, "output_type": "pt"}
    return pipeline(PROMPTS, generator=generators, **options).images


def draw(folder: Path, guidance_scale: float, steps: int = 4, adapter: Path | None = None) -> Tensor:
    """Images of `texforce sample`."""
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "eta": 1.0}
    config = SampleConfig(model=str(folder), adapter=adapter and [str(adapter)], prompt=PROMPTS, **options)
    return next(iter(evaluate.sample(resolve_sample(config), PROMPTS, [5, 6]).values()))


@pytest.fixture(scope="module")
def xl(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("xl"), True, ddim())


@pytest.fixture
def copied(xl, tmp_path) -> Path:
    """A copy, to be changed."""
    return shutil.copytree(xl, tmp_path / "model")


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- sampling ---


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("guidance_scale", [0.0, 4.0])
def test_images_equal_those_of_plain_diffusers(copied, guidance_scale, zeros):
    change(copied / "model_index.json", force_zeros_for_empty_prompt=zeros)
    expected = draw_plainly(load_plain(copied), guidance_scale)
    assert expected.shape == (2, 3, 32, 32)
    torch.testing.assert_close(draw(copied, guidance_scale), expected, rtol=0, atol=1e-4)


def test_zeros_for_the_null_prompt_are_the_default_and_show(copied):
    index = json.loads((copied / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    (copied / "model_index.json").write_text(json.dumps(index))
    expected = draw_plainly(load_plain(copied), 4.0)
    torch.testing.assert_close(draw(copied, 4.0), expected, rtol=0, atol=1e-4)
    change(copied / "model_index.json", force_zeros_for_empty_prompt=False)
    assert (draw(copied, 4.0) - expected).abs().max() > 1e-3


def test_another_resolution_is_told_to_the_unet(xl):
    config = SampleConfig(model=str(xl), prompt=PROMPTS, num_inference_steps=2, guidance_scale=3.0, eta=1.0, resolution=48)
    ours = evaluate.sample(resolve_sample(config), PROMPTS, [5, 6])["base"]
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "eta": 1.0, "output_type": "pt"}
    expected = load_plain(xl)(PROMPTS, height=48, width=48, generator=generators, **options).images
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("zeros", [True, False])
def test_embeddings_equal_those_of_the_pipeline(xl, zeros):
    models = replace(models.load_model(str(xl)), zero_null=zeros)
    pipeline = load_plain(xl)
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    prompt_ids = models.tokenize_for(models, PROMPTS)
    assert prompt_ids.shape == (2, 48)
    assert not torch.equal(*prompt_ids.chunk(2, dim=1))  # padded differently
    with torch.no_grad():
        expected, null, pooled, null_pooled = pipeline.encode_prompt(PROMPTS, device="cpu")
        embeds, rows = models.encode_distinct(models, prompt_ids)
    assert embeds.shape == (3, 25, 40)
    for ours, theirs in ((embeds[rows], (expected, pooled)), (embeds[:1], (null[:1], null_pooled[:1]))):
        torch.testing.assert_close(ours[:, :-1], theirs[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[:, -1, :24], theirs[1], rtol=1e-5, atol=1e-5)
        assert not ours[:, -1, 24:].any()
    torch.testing.assert_close(models.encode_null(models), embeds[:1], rtol=1e-5, atol=1e-5)


def test_the_vae_alone_stays_in_float32_where_it_would_overflow(copied):
    dtypes = {}
    for dtype, upcast in ((torch.float16, True), (torch.bfloat16, True), (torch.float16, False)):
        change(copied / "vae" / "config.json", force_upcast=upcast)
        models = models.load_model(str(copied), dtype=dtype)
        assert {models.unet.dtype, models.text_encoder.dtype, models.text_encoder_2.dtype} == {dtype}
        dtypes[dtype, upcast] = models.vae.dtype
    assert list(dtypes.values()) == [torch.float32, torch.bfloat16, torch.float16]


# --- training ---


def textbook_gradient(policy, denoiser, config, batch, pairs) -> list[Tensor]:
    """Of PPO's loss, one image and step at a time, everything run anew by diffusers' own pipeline, in float64."""
    from diffusers import StableDiffusionXLPipeline

    models = policy.model
    for part in (*models.policy_parts.values(), models.vae):
        part.double()
    parts = ("vae", "unet", "tokenizer", "tokenizer_2", "scheduler", *TEXT_ENCODERS)
    pipeline = StableDiffusionXLPipeline(
        **{name: getattr(models, name) for name in parts}, force_zeros_for_empty_prompt=models.zero_null
    )
    scheduler = models.scheduler
    scheduler.set_timesteps(config.num_inference_steps)
    trajectory = batch.trajectory
    for parameter in policy.parameters:
        parameter.grad = None
    for image, k in pairs.tolist():
        embeds, null, pooled, null_pooled = pipeline.encode_prompt(PROMPTS[image // config.num_samples_per_prompt])
        time_ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]], dtype=torch.float64)
        latents, next_latents = (trajectory.latents[image, i][None].double() for i in (k, k + 1))
        timestep = scheduler.timesteps[k]
        noise_pred, null_pred = (
            models.unet(latents, timestep, text, added_cond_kwargs={"text_embeds": pool, "time_ids": time_ids}).sample
            for text, pool in ((embeds, pooled), (null, null_pooled))
        )
        noise_pred = null_pred + config.guidance_scale * (noise_pred - null_pred)
        step = scheduler.step(noise_pred, timestep, latents, eta=1.0, variance_noise=torch.zeros_like(latents))
        previous = timestep - 1000 // config.num_inference_steps
        log_prob = Normal(step.prev_sample, scheduler._get_variance(timestep, previous).sqrt()).log_prob(next_latents)
        ratio = (log_prob.mean() - trajectory.log_probs[image, k].double()).exp()
        clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
        advantage = batch.advantages[image].double()
        (-torch.min(ratio * advantage, clipped * advantage) / len(pairs)).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters]


@pytest.mark.parametrize(("target", "zeros"), [("text-encoder", True), ("text-encoder", False), ("both", True)])
def test_the_gradient_on_every_part_equals_that_of_the_textbook_loop(xl, target, zeros):
    config = resolve(
        TrainConfig(
            model=str(xl), target=target, guidance_scale=3.0, num_inference_steps=4, num_samples_per_prompt=2,
            num_prompts_per_epoch=2, sample_batch_size=4, micro_batch_size=3, rank=4, clip_range=0.1,
        )
    )  # fmt: skip
    policy, denoiser = texforce.make_policy(replace(models.load_model(str(xl)), zero_null=zeros), config)
    reward = rewards.Mixture({"brightness": lambda images, prompts: images.mean(dim=(1, 2, 3))}, {"brightness": 1.0})
    noise, statistics = torch.Generator().manual_seed(0), PromptStatistics()
    batch = texforce.collect(policy, denoiser, reward, PROMPTS, config, noise, statistics)
    with torch.no_grad():  # off the start, where half of LoRA has no gradient
        for parameter in policy.parameters:
            parameter += 1e-2 * torch.randn(parameter.shape, generator=noise)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(3))
    learner = Learner(policy.parameters, config)
    statistics = texforce.accumulate_gradients(policy, denoiser, batch, pairs, config, learner)
    kept = zeros and target == "text-encoder"  # then the null prompt's branch learns nothing
    assert (batch.trajectory.null_outputs is not None) == kept
    assert statistics.num_unet_calls == len(pairs) * (1 if kept else 2)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters]
    references = textbook_gradient(policy, denoiser, config, batch, pairs)
    sizes = [
        sum(parameter.requires_grad for parameter in part.parameters())
        for part in (policy.model.policy_parts.values() if target == "both" else policy.model.text_encoders.values())
    ]
    assert sum(sizes) == len(gradients)
    for number in sizes:  # each part on its own
        ours, theirs = (torch.cat([g.flatten().double() for g in own[:number]]) for own in (gradients, references))
        assert theirs.norm() > 0
        assert (ours - theirs).norm() / theirs.norm() <= 1e-4
        gradients, references = gradients[number:], references[number:]


def train(folder: Path, output: Path, options: dict, **more) -> dict:
    return train.train(resolve(TrainOptions(**options | {"model": str(folder), "output_dir": str(output)} | more)))


@pytest.fixture(scope="module")
def trained(xl, shared_run, tmp_path_factory) -> Path:
    """The output folder of two epochs on both text encoders."""
    output = tmp_path_factory.mktemp("trained") / "run"
    train(xl, output, shared_run, num_epochs=2, learning_rate=3e-2)
    return output


def check_loads_plainly(folder: Path, run: Path, parts: tuple[str, ...], guidance_scale: float, steps: int) -> Tensor:
    """A trained adapter in plain models, from peft's folders, draws the same images as here, which are returned."""
    from peft import PeftModel

    base, expected = draw(folder, guidance_scale, steps), draw(folder, guidance_scale, steps, run)
    assert (expected - base).abs().max() > 1e-3
    pipeline = load_plain(folder)
    for part in parts:
        place = run if part == "text_encoder" else run / part
        setattr(pipeline, part, PeftModel.from_pretrained(getattr(pipeline, part), place).merge_and_unload())
    torch.testing.assert_close(draw_plainly(pipeline, guidance_scale, steps), expected, rtol=0, atol=1e-4)
    return expected


def check_changed(run: Path, parts: tuple[str, ...]) -> None:
    result = json.loads((run / "result.json").read_text())
    assert result["max_ratio_deviation"] <= texforce.FLOAT32_TOLERANCE
    for part in parts:
        place = run if part == "text_encoder" else run / part
        tensors = load_file(place / "adapter_model.safetensors")
        assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_a_trained_adapter_draws_the_same_images_everywhere(xl, trained, tmp_path):
    check_changed(trained, TEXT_ENCODERS)
    assert not (trained / "unet").exists()
    expected = check_loads_plainly(xl, trained, TEXT_ENCODERS, 3.0, 4)
    for format in ("diffusers", "kohya"):
        merge.merge(resolve_merge(MergeOptions(adapter=[str(trained)], output=str(tmp_path / format), format=format)))
        pipeline = load_plain(xl)
        pipeline.load_lora_weights(tmp_path / format / ("kohya.safetensors" if format == "kohya" else ""))
        torch.testing.assert_close(draw_plainly(pipeline, 3.0), expected, rtol=0, atol=1e-4)


def test_text_encoders_and_unet_are_trained_together(xl, small_run, tmp_path):
    train(xl, tmp_path / "run", small_run, target="both", learning_rate=1e-2)
    check_changed(tmp_path / "run", (*TEXT_ENCODERS, "unet"))
    check_loads_plainly(xl, tmp_path / "run", (*TEXT_ENCODERS, "unet"), 3.0, 4)


def test_a_run_that_is_stopped_goes_on_to_the_same_adapter(xl, trained, shared_run, tmp_path):
    """Not every layer has a gradient: nothing reads the first text encoder's last one."""
    options = {"model": str(xl), "output_dir": str(tmp_path / "run"), "num_epochs": 2, "learning_rate": 3e-2}
    config = TrainConfig(**shared_run | options)

    def stop(measures):
        if measures["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(config, report=stop)
    train.train(config, go_on=True)
    for place in ("", "text_encoder_2"):
        one, other = (load_file(run / place / "adapter_model.safetensors") for run in (trained, tmp_path / "run"))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# --- Turbo ---


def turbo_scheduler(kind: str):
    """As SD-Turbo (EulerDiscrete) and SDXL-Turbo (EulerAncestral) have it."""
    import diffusers

    return getattr(diffusers, f"{kind}Scheduler")(**NOISE, timestep_spacing="trailing", prediction_type="epsilon")


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def turbo(request, tmp_path_factory) -> Path:
    kind = "EulerDiscrete" if request.param == "sd" else "EulerAncestralDiscrete"
    folder = tmp_path_factory.mktemp("turbo") / f"{request.param}-turbo"
    save_pipeline(folder, request.param == "sdxl", turbo_scheduler(kind))
    if request.param == "sdxl":  # what the published file holds besides
        change(folder / "scheduler" / "scheduler_config.json", clip_sample=False, set_alpha_to_one=False)
    return folder


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_turbo_models_are_trained_at_few_steps_without_guidance(turbo, small_run, tmp_path, steps):
    given = None if steps == 4 else steps  # the default
    options = {"guidance_scale": None, "num_inference_steps": given, "learning_rate": 3e-2, "num_updates_per_epoch": 1}
    train(turbo, tmp_path / "run", small_run, **options)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["num_inference_steps"], config["guidance_scale"]) == (steps, 0)
    parts = TEXT_ENCODERS if turbo.name == "sdxl-turbo" else ("text_encoder",)
    check_changed(tmp_path / "run", parts)
    check_loads_plainly(turbo, tmp_path / "run", parts, 0.0, steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 30])
def test_every_step_of_a_turbo_schedule_is_diffusers_and_has_a_density(turbo, steps):
    scheduler = models.load_model(str(turbo)).scheduler
    schedule = sampler.ddim_schedule(scheduler, steps, 1.0)
    plain = ddim(timestep_spacing="trailing")
    plain.set_timesteps(steps)
    assert schedule.timesteps.tolist() == plain.timesteps.tolist()
    assert schedule.timesteps[0] == 999
    assert schedule.trainable_steps.tolist() == list(range(steps))
    generator = torch.Generator().manual_seed(0)
    latents, output, noise = (torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    for k, timestep in enumerate(plain.timesteps):
        expected = plain.step(output, timestep, latents, eta=1.0, variance_noise=noise).prev_sample
        ours = schedule.latents_weight[k] * latents + schedule.output_weight[k] * output + schedule.std[k] * noise
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_trailing_schedule_that_diffusers_rounds_to_a_step_too_many_is_refused():
    with pytest.raises(ValueError, match="num_inference_steps: 61"):
        sampler.ddim_schedule(ddim(timestep_spacing="trailing"), 61, 1.0)


@pytest.mark.parametrize(("name", "expected"), [
    ("stabilityai/sd-turbo", "turbo"), ("models/SDXL-Turbo/", "turbo"), ("turbo/plain", "stable-diffusion"),
    ("tiny", "tiny"), ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl"), ("xl/plain", "stable-diffusion"),
])  # fmt: skip
def test_a_model_is_known_by_its_name(name, expected):
    assert family(name) == expected


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_the_large_models_defaults_are_stable_diffusions_but_for_smaller_batches(preset):
    changed = PRESETS["sdxl", preset].items() - PRESETS["stable-diffusion", preset].items()
    assert changed == {("micro_batch_size", 2), ("sample_batch_size", 2)}


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_turbos_defaults_are_stable_diffusions_but_for_few_steps_without_guidance(preset):
    turbo, large = PRESETS["turbo", preset], PRESETS["stable-diffusion", preset]
    changed = {name: value for name, value in turbo.items() if large[name] != value}
    assert changed == {"num_inference_steps": 4, "guidance_scale": 0.0, "timestep_fraction": 1.0}
    assert turbo.keys() == large.keys()
    config = resolve_sample(SampleOptions(model="stabilityai/sd-turbo", prompt=PROMPTS))
    assert (config.num_inference_steps, config.guidance_scale) == (4, 0.0)


# --- the command line ---


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_the_plan_counts_both_text_encoders(xl, small_run, tmp_path):
    config = resolve(
        TrainConfig(**small_run | {"model": str(xl), "output_dir": str(tmp_path / "run"), "mixed_precision": "no"})
    )
    shown = train.plan(config)
    layers = 3 * 4 * 2 * config.rank  # of each text encoder, four matrices with two factors
    assert shown["trained parameters"] == layers * (16 + 24)
    models = models.load_model(str(xl))
    numbers = [p.numel() for part in (*models.policy_parts.values(), models.vae) for p in part.parameters()]
    assert shown["weights, MiB"] == pytest.approx((sum(numbers) + layers * 40) * 4 / 2**20, abs=0.1)


def test_an_adapter_is_evaluated(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = ["--benchmark", tmp_path / "prompts.txt", "--reward", "jpeg", "--num-images", 1]
    result = run("eval", "--adapter", trained, *options, "--output-dir", tmp_path / "eval")
    assert result.exit_code == 0, result.output
    systems = json.loads((tmp_path / "eval" / "results.json").read_text())["systems"]
    assert set(systems) == {"base", "run"}


def replace_unet(folder: Path, **options) -> None:
    shutil.rmtree(folder / "unet")
    xl_unet(**options).save_pretrained(folder / "unet")


def drop_first_text_encoder(folder: Path) -> None:
    change(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])


BAD_MODELS = {
    "a refiner's U-Net": (lambda folder: replace_unet(folder, projection_class_embeddings_input_dim=44), "refiner"),
    "a refiner": (drop_first_text_encoder, "refiner"),
    "no second tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer_2"), "tokenizer"),
    "a shorter tokenizer": (
        lambda folder: change(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=20), "length",
    ),
    "another width": (lambda folder: replace_unet(folder, cross_attention_dim=24), "takes embeddings of 24"),
    "a plain U-Net": (
        lambda folder: replace_unet(
            folder, addition_embed_type=None, addition_time_embed_dim=None, projection_class_embeddings_input_dim=None
        ), "conditioning",
    ),
    "inpainting": (lambda folder: replace_unet(folder, in_channels=9), "9 channels"),
    "shifted latents": (lambda folder: change(folder / "vae" / "config.json", latents_mean=[0.0] * 4), "shifts"),
    "no second text encoder": (lambda folder: shutil.rmtree(folder / "text_encoder_2"), "could not be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_what_is_not_sdxls_base_pipeline_is_refused(copied, tmp_path, kind):
    damage, word = BAD_MODELS[kind]
    damage(copied)
    with pytest.raises((ValueError, FileNotFoundError), match=f"model: .*{word}"):
        models.load_model(str(copied))
    if kind == "a refiner":
        result = run("sample", "--model", copied, "--prompt", "a red circle", "--output-dir", tmp_path / "samples")
        assert result.exit_code == 2
        assert "refiner" in result.output
