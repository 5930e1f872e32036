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

import texforce
from texforce import evaluation, experience, merging, models, rewards, sampler, training
from texforce.config import TrainOptions, resolve
from texforce.draw_config import MergeOptions, SampleOptions, resolve_merge, resolve_sample
from texforce.learner import Learner
from texforce.plan import plan
from texforce.presets import PRESETS, family

from .commands import invoke

PROMPTS = ["a red circle", "two blue squares"]
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


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
    given = SampleOptions(model=str(folder), adapter=adapter and [str(adapter)], prompt=PROMPTS, **options)
    return next(iter(evaluation.sample(resolve_sample(given), PROMPTS, [5, 6]).values()))


@pytest.fixture
def copied(sdxl, tmp_path) -> Path:
    """A copy, to be changed."""
    return shutil.copytree(sdxl, tmp_path / "model")


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- sampling ---


@pytest.mark.quick(2)
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


def test_the_unet_is_given_another_resolution(sdxl):
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "eta": 1.0}
    given = SampleOptions(model=str(sdxl), prompt=PROMPTS, resolution=48, **options)
    ours = evaluation.sample(resolve_sample(given), PROMPTS, [5, 6])["base"]
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = load_plain(sdxl)(PROMPTS, height=48, width=48, generator=generators, output_type="pt", **options).images
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


# --- training ---


def textbook_gradient(policy, config, batch, pairs) -> list[Tensor]:
    """Gradient of PPO's loss, one image and step at a time, everything run anew by diffusers' own pipeline, in float64."""
    from diffusers import StableDiffusionXLPipeline

    model = policy.model
    for part in (*model.policy_parts.values(), model.vae):
        part.double()
    parts = ("vae", "unet", "tokenizer", "tokenizer_2", "scheduler", *TEXT_ENCODERS)
    pipeline = StableDiffusionXLPipeline(
        **{name: getattr(model, name) for name in parts}, force_zeros_for_empty_prompt=model.zero_null
    )
    scheduler = model.scheduler
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
            model.unet(latents, timestep, text, added_cond_kwargs={"text_embeds": pool, "time_ids": time_ids}).sample
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


@pytest.mark.quick(1)
@pytest.mark.parametrize(("target", "zeros"), [("text-encoder", True), ("text-encoder", False), ("both", True)])
def test_the_gradient_on_every_part_equals_that_of_the_textbook_loop(sdxl, target, zeros):
    config = resolve(
        TrainOptions(
            model=str(sdxl), target=target, guidance_scale=3.0, num_inference_steps=4, num_samples_per_prompt=2,
            num_prompts_per_epoch=2, sample_batch_size=4, micro_batch_size=3, rank=4, clip_range=0.1,
            mixed_precision="no",
        )
    )  # fmt: skip
    policy = texforce.make_policy(replace(models.load_model(str(sdxl)), zero_null=zeros), config)
    reward = rewards.Mixture({"brightness": lambda images, prompts: images.mean(dim=(1, 2, 3))}, {"brightness": 1.0})
    noise = torch.Generator().manual_seed(0)
    samples = experience.collect(policy, reward, PROMPTS, config, noise)
    advantages = experience.compute_advantages(samples, config, experience.PromptStatistics())
    batch = texforce.make_batch(samples, advantages, config, policy.model.device)
    with torch.no_grad():  # off the start, where half of LoRA has no gradient
        for parameter in policy.parameters:
            parameter += 1e-2 * torch.randn(parameter.shape, generator=noise)
    pairs = torch.tensor([[0, 0], [0, 2], [1, 1], [2, 0], [3, 1], [3, 2]])
    learner = Learner(policy.parameters, config)
    statistics = texforce.accumulate_gradients(
        policy, texforce.Share(batch, pairs, texforce.ppo_micro_batch), learner, config
    )
    kept = zeros and target == "text-encoder"  # then the null prompt's branch learns nothing
    assert (batch.trajectory.null_outputs is not None) == kept
    assert statistics.num_unet_calls == len(pairs) * (1 if kept else 2)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters]
    references = textbook_gradient(policy, config, batch, pairs)
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


def run_training(folder: Path, output: Path, options: dict, **more) -> dict:
    return training.train(resolve(TrainOptions(**options | {"model": str(folder), "output_dir": str(output)} | more)))


@pytest.fixture(scope="module")
def trained(sdxl, shared_run, tmp_path_factory) -> Path:
    """The output folder of two epochs on both text encoders."""
    output = tmp_path_factory.mktemp("trained") / "run"
    run_training(sdxl, output, shared_run, num_epochs=2, learning_rate=3e-2)
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


@pytest.mark.slow
def test_a_trained_adapter_draws_the_same_images_everywhere(sdxl, trained, tmp_path):
    check_changed(trained, TEXT_ENCODERS)
    assert not (trained / "unet").exists()
    expected = check_loads_plainly(sdxl, trained, TEXT_ENCODERS, 3.0, 4)
    for format in ("diffusers", "kohya"):
        merging.merge(resolve_merge(MergeOptions(adapter=[str(trained)], output_dir=str(tmp_path / format), format=format)))
        pipeline = load_plain(sdxl)
        pipeline.load_lora_weights(tmp_path / format / ("kohya.safetensors" if format == "kohya" else ""))
        torch.testing.assert_close(draw_plainly(pipeline, 3.0), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_text_encoders_and_unet_are_trained_together(sdxl, small_run, tmp_path):
    run_training(sdxl, tmp_path / "run", small_run, target="both", learning_rate=1e-2)
    check_changed(tmp_path / "run", (*TEXT_ENCODERS, "unet"))
    check_loads_plainly(sdxl, tmp_path / "run", (*TEXT_ENCODERS, "unet"), 3.0, 4)


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_to_the_same_adapter(sdxl, trained, shared_run, tmp_path):
    """Not every layer has a gradient: nothing reads the first text encoder's last one."""
    options = {"model": str(sdxl), "output_dir": str(tmp_path / "run"), "num_epochs": 2, "learning_rate": 3e-2}
    config = resolve(TrainOptions(**shared_run | options))

    def stop(measures):
        if measures["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(config, report=stop)
    training.train(config, resume=True)
    for place in ("", "text_encoder_2"):
        one, other = (load_file(run / place / "adapter_model.safetensors") for run in (trained, tmp_path / "run"))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# --- Turbo ---


@pytest.fixture(scope="module")
def turbo_models(stable_diffusion, sdxl, tmp_path_factory) -> dict[str, Path]:
    """The small pipelines with the schedulers of SD-Turbo (EulerDiscrete) and SDXL-Turbo (EulerAncestral)."""
    import diffusers

    folders = {}
    for kind, source, name in (("sd", stable_diffusion, "EulerDiscrete"), ("sdxl", sdxl, "EulerAncestralDiscrete")):
        folder = folders[kind] = shutil.copytree(source, tmp_path_factory.mktemp("turbo") / f"{kind}-turbo")
        scheduler = getattr(diffusers, f"{name}Scheduler")(**NOISE, timestep_spacing="trailing", prediction_type="epsilon")
        scheduler.save_pretrained(folder / "scheduler")
        change(folder / "model_index.json", scheduler=["diffusers", f"{name}Scheduler"])
    # The published file of SDXL-Turbo says more.
    change(folders["sdxl"] / "scheduler" / "scheduler_config.json", clip_sample=False, set_alpha_to_one=False)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [("sd", 1), ("sdxl", 2), ("sdxl", None)])
def test_turbo_models_are_trained_at_few_steps_without_guidance(turbo_models, small_run, tmp_path, kind, steps):
    options = {"guidance_scale": None, "num_inference_steps": steps, "learning_rate": 3e-2, "num_updates_per_epoch": 1}
    run_training(turbo_models[kind], tmp_path / "run", small_run, **options)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["num_inference_steps"], config["guidance_scale"]) == (steps or 4, 0)
    parts = TEXT_ENCODERS if kind == "sdxl" else ("text_encoder",)
    check_changed(tmp_path / "run", parts)
    check_loads_plainly(turbo_models[kind], tmp_path / "run", parts, 0.0, steps or 4)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 30])
def test_every_step_of_a_turbo_schedule_is_diffusers_and_has_a_density(turbo_models, kind, steps):
    scheduler = models.load_scheduler(str(turbo_models[kind]))
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


def test_the_plan_counts_both_text_encoders(sdxl, small_run, tmp_path):
    options = {"model": str(sdxl), "output_dir": str(tmp_path / "run"), "mixed_precision": "no"}
    config = resolve(TrainOptions(**small_run | options))
    shown = plan(config)
    layers = 3 * 4 * 2 * config.rank  # of each text encoder, four matrices with two factors
    assert shown["trained parameters"] == layers * (16 + 24)
    model = models.load_model(str(sdxl))
    numbers = [p.numel() for part in (*model.policy_parts.values(), model.vae) for p in part.parameters()]
    assert shown["weights, MB"] == pytest.approx((sum(numbers) + layers * 40) * 4 / 1e6, abs=0.1)


def test_an_adapter_is_evaluated(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = ["--benchmark", str(tmp_path / "prompts.txt"), "--reward", "jpeg", "--num-images", "1"]
    output = ["--output-dir", str(tmp_path / "eval")]
    result = invoke("eval", "--adapter", str(trained), *options, *output)
    assert result.exit_code == 0, result.output
    systems = json.loads((tmp_path / "eval" / "results.json").read_text())["systems"]
    assert set(systems) == {"base", "run"}


@pytest.mark.parametrize(("pipeline", "preset"), [
    ("StableDiffusionXLPipeline", "sdxl"), ("StableDiffusionPipeline", "stable-diffusion"),
    ("StableDiffusion3Pipeline", "sd3"),
])  # fmt: skip
def test_a_folders_preset_goes_by_its_pipeline_and_not_by_its_name(tmp_path, pipeline, preset):
    for name in ("plain", "some-xl"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
        assert family(str(folder)) == preset
