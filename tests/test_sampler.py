"""The transition against diffusers' scheduler and pipeline, log-probabilities against torch.distributions, and rollouts."""

import itertools
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from texforce import Policy, evaluation, models, sampler, tokenization
from texforce.draw_config import SampleOptions, resolve_sample
from texforce.errors import InputError, expected
from texforce.models import Conditioning
from texforce.sampler import Denoiser, Trajectory, ddim_schedule, dpm_solver_schedule, random_until

PROMPTS = ["a red circle", "a crimson disc left of a blue square", "three white crosses"]


class FakeUNet(nn.Module):
    """Predicts a fixed pattern times the mean of the prompt's embedding, and remembers how it was called."""

    def __init__(self, pattern: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.pattern = pattern
        self.batch_sizes: list[int] = []

    def forward(self, latents: Tensor, timesteps: Tensor, embeds: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        assert len(latents) == len(timesteps) == len(embeds)
        self.batch_sizes.append(len(latents))
        return (self.gain * embeds.mean(dim=(1, 2))[:, None, None, None] * self.pattern,)


class SmallUNet(nn.Module):
    """One convolution, shifted by the timestep and the prompt: compiles in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, latents: Tensor, timesteps: Tensor, embeds: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        shift = embeds.mean(dim=(1, 2)) + (timesteps / 1000).sin()
        return (self.convolution(latents).tanh() + shift[:, None, None, None],)


def make_scheduler(**options):
    from diffusers import DDIMScheduler

    options = {
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "beta_schedule": "scaled_linear",
    } | options
    return DDIMScheduler(**options)


def micro_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return unet.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def pipeline(stable_diffusion):
    """The small pipeline in plain diffusers."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(stable_diffusion)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def conditioning(num_samples: int, seed: int = 0) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(torch.randn(num_samples, 5, 16, generator=generator), torch.randn(1, 5, 16, generator=generator))


def micro_denoiser(num_steps: int = 10, eta: float = 1.0, guidance_scale: float = 3.0) -> Denoiser:
    return Denoiser(
        micro_unet(), ddim_schedule(make_scheduler(prediction_type="v_prediction"), num_steps, eta), guidance_scale
    )


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def rows_of(cond: Conditioning, rows: Tensor) -> Conditioning:
    return replace(cond, prompt_embeds=cond.prompt_embeds[rows])


def micro_rollout(denoiser: Denoiser, generator, num_samples: int = 3, keep_null_outputs: bool = False) -> Trajectory:
    prompt_ids = torch.arange(num_samples * 5).reshape(num_samples, 5)
    cond = conditioning(num_samples)
    if keep_null_outputs:
        denoiser = replace(denoiser, keep_null_outputs=True)
    return sampler.rollout(denoiser, prompt_ids, cond, (4, 8, 8), generator)


# --- the transition ---


@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_step_and_its_log_prob_equal_diffusers_and_torch(prediction_type, eta, set_alpha_to_one, steps_offset):
    reference = make_scheduler(prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one, steps_offset=steps_offset)
    schedules = {num_steps: ddim_schedule(reference, num_steps, eta) for num_steps in (10, 50)}
    # Diffusers in float64: in float32 its own rounding error reaches 6e-5 in the last step of sample prediction.
    reference.alphas_cumprod = reference.alphas_cumprod.double()
    reference.final_alpha_cumprod = reference.final_alpha_cumprod.double()
    torch.manual_seed(0)
    num_densities = 0
    for num_steps, schedule in schedules.items():
        reference.set_timesteps(num_steps)
        assert torch.equal(schedule.timesteps, reference.timesteps)
        for k, timestep in enumerate(reference.timesteps.tolist()):
            latents, noise = torch.randn(2, 3, 4, 2, 2)
            outputs = torch.randn(4, 2, 2)
            denoiser = Denoiser(FakeUNet(outputs), schedule, guidance_scale=1.0)
            cond = Conditioning(torch.ones(3, 1, 1), torch.zeros(1, 1, 1))
            step = denoiser.step(latents, torch.full((3,), k), cond, noise)
            move = partial(reference.step, outputs.expand(3, -1, -1, -1).double(), timestep, latents.double(), eta=eta)
            expected = move(variance_noise=noise.double()).prev_sample
            torch.testing.assert_close(step.next_latents.double(), expected, rtol=1e-5, atol=1e-5)
            assert step.null_outputs is None
            assert step.history is None
            std = eta * reference._get_variance(timestep, timestep - 1000 // num_steps).sqrt()
            torch.testing.assert_close(schedule.std[k].double(), std, rtol=1e-5, atol=1e-7)
            if k in schedule.trainable_steps:
                num_densities += 1
                normal = torch.distributions.Normal(move(variance_noise=torch.zeros(())).prev_sample, std)
                per_image = normal.log_prob(step.next_latents.double()).mean(dim=(1, 2, 3))
                torch.testing.assert_close(step.log_probs.double(), per_image, rtol=1e-5, atol=1e-5)
    lasts = 2 * (set_alpha_to_one or steps_offset == 0)  # there the last step is deterministic
    assert num_densities == (60 - lasts if eta else 0)


def test_a_step_equals_diffusers_in_float32_too():
    reference = make_scheduler()
    torch.manual_seed(0)
    latents, outputs, noise = torch.randn(3, 2, 4, 2, 2)
    schedule = ddim_schedule(reference, 50, 1.0)
    for k, timestep in enumerate(reference.timesteps):
        expected = reference.step(outputs, timestep, latents, eta=1.0, variance_noise=noise).prev_sample
        mine = schedule.latents_weight[k] * latents + schedule.output_weight[k] * outputs + schedule.std[k] * noise
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [
    {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"timestep_spacing": "linspace"},
    {"num_train_timesteps": 700},
])  # fmt: skip
def test_other_spacings_equal_diffusers_too(options):
    reference = make_scheduler(steps_offset=0) if "timestep_spacing" in options else make_scheduler()
    reference = type(reference).from_config(reference.config, **options)
    schedule = ddim_schedule(reference, 7, 1.0)
    torch.manual_seed(0)
    latents, outputs, noise = torch.randn(3, 2, 4, 2, 2)
    for k, timestep in enumerate(reference.timesteps):
        expected = reference.step(outputs, timestep, latents, eta=1.0, variance_noise=noise).prev_sample
        mine = schedule.latents_weight[k] * latents + schedule.output_weight[k] * outputs + schedule.std[k] * noise
        assert mine.isfinite().all()
        if k == 0 and "rescale_betas_zero_snr" in options:
            continue  # there diffusers takes the root of a rounding error below zero
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=2e-5)


def test_a_transition_equals_the_equations_by_hand():
    """arXiv:2010.02502, eq. 12 and 16, for one step from alpha 0.5 to alpha 0.8 with eta 1."""
    scheduler = make_scheduler(trained_betas=[0.2, 0.375], num_train_timesteps=2, steps_offset=0)
    schedule = ddim_schedule(scheduler, 2, 1.0)
    assert schedule.timesteps.tolist() == [1, 0]
    variance = (0.2 / 0.5) * (1 - 0.5 / 0.8)
    assert schedule.std[0].item() == pytest.approx(variance**0.5, rel=1e-5)
    sample_weight = 0.8**0.5  # of the predicted clean sample, (latents - sqrt(0.5) output) / sqrt(0.5)
    assert schedule.latents_weight[0].item() == pytest.approx(sample_weight / 0.5**0.5, rel=1e-5)
    output_weight = -sample_weight + (0.2 - variance) ** 0.5
    assert schedule.output_weight[0].item() == pytest.approx(output_weight, rel=1e-5)


def test_log_prob_is_the_mean_of_normal_log_densities():
    values, mean = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    std = torch.tensor([0.01, 0.1, 1.0, 2.0, 5.0])[:, None, None, None]
    expected = torch.distributions.Normal(mean, std).log_prob(values).mean(dim=(1, 2, 3))
    torch.testing.assert_close(sampler.gaussian_log_prob(values, mean, std), expected, rtol=1e-5, atol=1e-5)


def test_log_prob_of_half_precision_values_is_computed_in_float32():
    values, mean = torch.randn(2, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0)).half()
    std = torch.full((2, 1, 1, 1), 0.02)
    log_probs = sampler.gaussian_log_prob(values, mean, std)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, sampler.gaussian_log_prob(values.float(), mean.float(), std), rtol=0, atol=0)


@pytest.mark.parametrize(("options", "eta", "trainable"), [
    ({"set_alpha_to_one": False, "steps_offset": 1}, 1.0, 5),
    ({"set_alpha_to_one": True, "steps_offset": 0}, 1.0, 4),
    ({"set_alpha_to_one": True, "steps_offset": 1}, 0.3, 4),
    ({"set_alpha_to_one": False, "steps_offset": 0}, 1.0, 4),
    ({"set_alpha_to_one": False, "steps_offset": 1}, 0.0, 0),
])  # fmt: skip
def test_steps_without_density_are_not_trainable(options, eta, trainable):
    schedule = ddim_schedule(make_scheduler(**options), 5, eta)
    assert schedule.trainable_steps.tolist() == list(range(trainable))
    assert (schedule.std[schedule.trainable_steps] > sampler.MIN_STD).all()


@pytest.mark.parametrize(("num_steps", "eta", "options", "words"), [
    (10, -0.1, {}, "eta: .* not -0.1"),
    (10, 1.5, {}, "eta: .* not 1.5"),
    (10, float("nan"), {}, "eta: .* not nan"),
    (0, 1.0, {}, "num_inference_steps: .* 1000, not 0"),
    (1001, 1.0, {}, "num_inference_steps: .* 1000, not 1001"),
    (1000, 1.0, {"steps_offset": 1}, "num_inference_steps"),  # the offset leads past the last training timestep
    (10, 1.0, {"clip_sample": True}, "clip_sample"),
    (10, 1.0, {"thresholding": True}, "thresholding"),
    (10, 1.0, {"prediction_type": "flow"}, "prediction_type"),
])  # fmt: skip
def test_schedule_refuses_what_it_cannot_do(num_steps, eta, options, words):
    with pytest.raises(ValueError, match=words):
        ddim_schedule(make_scheduler(**options), num_steps, eta)


# --- DPM-Solver++ ---


@pytest.mark.parametrize("options", [
    {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    {"timestep_spacing": "linspace", "rescale_betas_zero_snr": True},
    {"prediction_type": "sample", "trained_betas": [0.0] + [0.1] * 9, "num_train_timesteps": 10},  # a noise that is none
], ids=["trailing", "also linspace", "also no noise"])  # fmt: skip
def test_a_schedule_with_a_step_that_the_prediction_says_nothing_of_is_refused_as_such(options):
    scheduler = make_scheduler(**{"prediction_type": "epsilon", "steps_offset": 0} | options)
    with pytest.raises(InputError, match=r"model: the prediction_type '(epsilon|sample)' in its scheduler_config.json says"):
        ddim_schedule(scheduler, 5, 1.0)


def test_an_epsilon_model_of_zero_terminal_snr_may_leave_the_last_timestep_out():
    scheduler = make_scheduler(prediction_type="epsilon", rescale_betas_zero_snr=True, timestep_spacing="leading")
    assert ddim_schedule(scheduler, 5, 1.0).output_weight.isfinite().all()


def dpm_solver(scheduler, num_steps: int):
    """Diffusers' own solver for a model's scheduler."""
    from diffusers import DPMSolverMultistepScheduler

    solver = DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="dpmsolver++", solver_order=2)
    solver.set_timesteps(num_steps)
    return solver


@pytest.mark.parametrize("options", [
    {}, {"timestep_spacing": "leading"}, {"timestep_spacing": "linspace", "num_train_timesteps": 700},
    {"timestep_spacing": "trailing", "steps_offset": 0, "rescale_betas_zero_snr": True}, {"use_karras_sigmas": True},
])  # fmt: skip
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_step_of_dpm_solver_equals_diffusers(prediction_type, options):
    scheduler = make_scheduler()
    scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction_type, **options)
    torch.manual_seed(0)
    mixing = torch.randn(4, 4) / 2

    def model_output(latents: Tensor, timestep: Tensor) -> Tensor:
        return torch.einsum("ij,njhw->nihw", mixing, latents).tanh() + (timestep / 1000).sin()

    for num_steps in (1, 2, 4, 8, 20, 50):
        solver, schedule = dpm_solver(scheduler, num_steps), dpm_solver_schedule(scheduler, num_steps)
        assert torch.equal(schedule.timesteps, solver.timesteps)
        assert len(schedule.trainable_steps) == 0
        latents = expected = torch.randn(2, 4, 2, 2)
        history: Tensor | float | None = 0.0
        for k, timestep in enumerate(solver.timesteps):
            output, steps = model_output(latents, timestep), torch.full((2,), k)
            next_latents = schedule.mean(latents, output, steps) + history
            history = schedule.history(latents, output, steps)
            latents = next_latents
            expected = solver.step(model_output(expected, timestep), timestep, expected).prev_sample
            torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        assert not history.any()


def test_a_second_step_of_dpm_solver_equals_the_equations_by_hand():
    """arXiv:2211.01095, algorithm 2, at alphas 0.2, 0.5 and 0.8: its step from 0.5 to 0.8, with the step before."""
    scheduler = make_scheduler(trained_betas=[0.2, 0.375, 0.6], num_train_timesteps=3, timestep_spacing="trailing")
    schedule = dpm_solver_schedule(type(scheduler).from_config(scheduler.config, steps_offset=0), 3)
    assert schedule.timesteps.tolist() == [2, 1, 0]
    before, now, then = (0.5 * math.log(alpha / (1 - alpha)) for alpha in (0.2, 0.5, 0.8))
    r = (now - before) / (then - now)
    both = 0.8**0.5 * (1 - math.exp(now - then))  # the weight of D, which both predicted clean samples make up
    sample, previous_sample = both * (1 + 1 / (2 * r)), -both / (2 * r)
    # A clean sample is (latents - sqrt(1 - alpha) * output) / sqrt(alpha).
    assert schedule.latents_weight[1].item() == pytest.approx((0.2 / 0.5) ** 0.5 + sample / 0.5**0.5, rel=1e-5)
    assert schedule.output_weight[1].item() == pytest.approx(-sample, rel=1e-5)
    assert schedule.history_latents_weight[0].item() == pytest.approx(previous_sample / 0.2**0.5, rel=1e-5)
    assert schedule.history_output_weight[0].item() == pytest.approx(-previous_sample * (0.8 / 0.2) ** 0.5, rel=1e-5)


@pytest.mark.parametrize(("num_steps", "options", "words"), [
    (0, {}, "num_inference_steps: .* 1000, not 0"),
    (1001, {}, "num_inference_steps: .* 1000, not 1001"),
    (1000, {"timestep_spacing": "leading"}, "num_inference_steps: 1000 repeat a timestep"),
    (999, {"timestep_spacing": "leading"}, "steps_offset of 1, 999 lead past"),
    (10, {"clip_sample": True}, "clip_sample"),
    (10, {"thresholding": True}, "thresholding"),
    (10, {"prediction_type": "flow"}, "prediction_type"),
])  # fmt: skip
def test_dpm_solver_refuses_what_it_cannot_do(num_steps, options, words):
    scheduler = make_scheduler(**options)
    with pytest.raises(InputError, match=words):
        dpm_solver_schedule(scheduler, num_steps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [4, 8, 20])
def test_a_rollout_with_dpm_solver_equals_diffusers_pipeline(pipeline, prediction_type, num_steps):
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    solving = type(pipeline)(
        **pipeline.components | {"scheduler": dpm_solver(scheduler, num_steps)}, requires_safety_checker=False
    )
    solving.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": num_steps, "guidance_scale": 3.0, "output_type": "latent"}
    with torch.no_grad():
        expected = solving(PROMPTS, generator=seeded(7)[0], **options).images
        ids = tokenization.tokenize(pipeline.tokenizer, [*PROMPTS, ""])
        embeds = pipeline.text_encoder(ids).last_hidden_state
        denoiser = Denoiser(pipeline.unet, dpm_solver_schedule(scheduler, num_steps), 3.0)
        trajectory = sampler.rollout(denoiser, ids[:-1], Conditioning(embeds[:-1], embeds[-1:]), (4, 8, 8), seeded(7)[0])
    torch.testing.assert_close(trajectory.latents[:, -1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", ["ddim", "dpm-solver"])
@pytest.mark.parametrize(("num_gradient_steps", "others"), [(2, ()), (3, ()), (5, ()), (3, (0, 3)), (5, (1, 4))])
def test_the_gradient_through_the_last_steps_equals_that_of_diffusers_loop(name, num_gradient_steps, others):
    """Some steps may read other embeddings, which get no gradient."""
    scheduler, num_steps, scale = make_scheduler(prediction_type="v_prediction"), 5, 3.0
    make = dpm_solver_schedule if name == "dpm-solver" else partial(ddim_schedule, eta=0.0)
    denoiser = Denoiser(micro_unet(), make(scheduler, num_steps), scale)
    unet, rows = micro_unet().double(), torch.tensor([0, 1, 1])
    torch.manual_seed(1)
    embeds, noises, direction = torch.randn(3, 5, 16), torch.randn(1 + num_steps, 3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    leaf = embeds.clone().requires_grad_()
    by_step = [embeds.flip(-1) if k in others else leaf for k in range(num_steps)]
    latents = sampler.sample_with_gradients(denoiser, by_step, 1 + rows, noises.unbind(0), num_gradient_steps)
    (gradient,) = torch.autograd.grad((latents * direction).sum(), leaf)

    if name == "dpm-solver":
        scheduler = dpm_solver(scheduler, num_steps)
    leaf, expected = embeds.double().requires_grad_(), noises[0].double()
    for k, timestep in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(k >= num_steps - num_gradient_steps):
            read = embeds.double().flip(-1) if k in others else leaf
            null, text = (unet(expected, timestep, cond).sample for cond in (read[:1].expand(3, -1, -1), read[1 + rows]))
            expected = scheduler.step(null + scale * (text - null), timestep, expected).prev_sample
    (reference,) = torch.autograd.grad((expected * direction).sum(), leaf)
    torch.testing.assert_close(latents.double(), expected, rtol=1e-5, atol=1e-5)
    assert ((gradient - reference).norm() / reference.norm()).item() <= 1e-5


# --- guidance ---


def test_guidance_is_uncond_plus_scale_times_difference_in_one_call():
    pattern = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(0))
    schedule = ddim_schedule(make_scheduler(), 10, 1.0)
    steps = torch.tensor([0, 4, 9])
    latents = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    cond = Conditioning(torch.tensor([1.0, 2.0, 3.0])[:, None, None], torch.full((1, 1, 1), 0.5))
    denoiser = Denoiser(FakeUNet(pattern), schedule, guidance_scale=4.0)
    mean, null_outputs = denoiser.mean(latents, steps, cond)
    assert denoiser.network.batch_sizes == [6]
    torch.testing.assert_close(null_outputs, 0.5 * pattern.expand(3, -1, -1, -1))
    for i, step in enumerate(steps):
        output = (0.5 + 4.0 * (1.0 + i - 0.5)) * pattern
        expected = schedule.latents_weight[step] * latents[i] + schedule.output_weight[step] * output
        torch.testing.assert_close(mean[i], expected)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_guidance_is_off_at_a_scale_of_one_or_less(scale):
    cond = conditioning(2)
    latents, steps = torch.randn(2, 4, 2, 2), torch.tensor([3, 3])
    pattern = torch.randn(4, 2, 2)
    schedule = ddim_schedule(make_scheduler(), 10, 1.0)
    denoiser = Denoiser(FakeUNet(pattern), schedule, scale)
    mean, null_outputs = denoiser.mean(latents, steps, cond)
    assert not denoiser.guided
    assert null_outputs is None
    assert denoiser.network.batch_sizes == [2]
    output = cond.prompt_embeds.mean(dim=(1, 2))[:, None, None, None] * pattern
    torch.testing.assert_close(mean, schedule.latents_weight[3] * latents + schedule.output_weight[3] * output)


def test_kept_null_outputs_give_the_same_mean_for_half_the_work():
    denoiser = micro_denoiser()
    calls = []
    denoiser.network.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    latents, steps, cond = torch.randn(3, 4, 8, 8), torch.tensor([0, 5, 9]), conditioning(3)
    mean, null_outputs = denoiser.mean(latents, steps, cond)
    again, kept = denoiser.mean(latents, steps, cond, null_outputs)
    assert calls == [6, 3]
    torch.testing.assert_close(again, mean, rtol=1e-5, atol=1e-5)
    assert torch.equal(kept, null_outputs)


def test_gradients_reach_the_embeddings_of_prompt_and_null_prompt():
    denoiser, cond = micro_denoiser(), conditioning(2)
    cond = Conditioning(cond.prompt_embeds.requires_grad_(), cond.null_embeds.requires_grad_())
    denoiser.mean(torch.randn(2, 4, 8, 8), torch.tensor([0, 5]), cond)[0].square().sum().backward()
    assert cond.prompt_embeds.grad.abs().sum() > 0
    assert cond.null_embeds.grad.abs().sum() > 0


# --- rollouts ---


@pytest.mark.parametrize(("eta", "guidance_scale"), [(1.0, 3.0), (0.4, 1.0), (0.0, 3.0)])
@pytest.mark.parametrize("many_generators", [False, True])
def test_rollout_equals_diffusers_pipeline(pipeline, eta, guidance_scale, many_generators):
    def generator():
        return seeded(*range(len(PROMPTS))) if many_generators else seeded(7)[0]

    with torch.no_grad():
        expected = pipeline(
            PROMPTS,
            num_inference_steps=4,
            eta=eta,
            guidance_scale=guidance_scale,
            generator=generator(),
            output_type="latent",
        ).images
        ids = tokenization.tokenize(pipeline.tokenizer, [*PROMPTS, ""])
        embeds = pipeline.text_encoder(ids).last_hidden_state
        denoiser = Denoiser(pipeline.unet, ddim_schedule(pipeline.scheduler, 4, eta), guidance_scale)
        cond = Conditioning(embeds[:-1], embeds[-1:])
        trajectory = sampler.rollout(denoiser, ids[:-1], cond, (4, 8, 8), generator())
    torch.testing.assert_close(trajectory.latents[:, -1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("width", "at_a_time"), [(8, 16), (128, 4), (256, 1), (512, 1)])
def test_as_many_images_are_decoded_at_a_time_as_have_the_pixels_of_sixteen(width, at_a_time):
    sizes = []

    class VAE(torch.nn.Linear):
        config = SimpleNamespace(scaling_factor=1.0, block_out_channels=(1, 1, 1, 1))

        def decode(self, latents):
            sizes.append(len(latents))
            return SimpleNamespace(sample=latents)

    images = sampler.decode(VAE(1, 1), torch.zeros(18, 1, width, width))
    assert images.shape == (18, 1, width, width)
    assert sizes == [at_a_time] * (18 // at_a_time) + [18 % at_a_time] * (18 % at_a_time > 0)


def test_decode_equals_diffusers_pipeline(pipeline, monkeypatch):
    monkeypatch.setattr(sampler, "MAX_DECODED", 2)
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipeline.vae.decode(latents / 0.5).sample
        expected = pipeline.image_processor.postprocess(expected, output_type="pt")
    images = sampler.decode(pipeline.vae, latents)
    assert images.shape == (3, 3, 32, 32)
    assert images.min() >= 0
    assert images.max() <= 1
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)


def test_rollout_returns_what_its_shapes_promise():
    denoiser = micro_denoiser(num_steps=4)
    trajectory = micro_rollout(denoiser, seeded(0)[0], keep_null_outputs=True)
    assert trajectory.prompt_ids.shape == (3, 5)
    assert trajectory.timesteps.tolist() == [denoiser.schedule.timesteps.tolist()] * 3
    assert trajectory.latents.shape == (3, 5, 4, 8, 8)
    assert trajectory.log_probs.shape == (3, 4)
    assert trajectory.log_probs.dtype == torch.float32
    assert trajectory.null_outputs.shape == (3, 4, 4, 8, 8)
    assert not trajectory.latents.requires_grad
    assert micro_rollout(denoiser, seeded(0)[0]).null_outputs is None
    unguided = replace(denoiser, guidance_scale=1.0)
    assert micro_rollout(unguided, seeded(0)[0], keep_null_outputs=True).null_outputs is None


def test_the_text_is_projected_once_a_rollout_and_nothing_else_changes(monkeypatch):
    denoiser = micro_denoiser(num_steps=4)
    attention = next(module for name, module in denoiser.network.named_modules() if name.endswith(".attn2"))
    calls, forward = [], nn.Linear.forward

    def counted(self: nn.Linear, inputs: Tensor) -> Tensor:
        if self in (attention.to_k, attention.to_v):
            calls.append(len(inputs))
        return forward(self, inputs)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    kept = micro_rollout(denoiser, seeded(0)[0])
    assert calls == [6, 6]
    calls.clear()
    monkeypatch.setattr(sampler, "text_projected_once", nullcontext)
    plain = micro_rollout(denoiser, seeded(0)[0])
    assert calls == [6, 6] * 4
    assert torch.equal(kept.latents, plain.latents)
    assert torch.equal(kept.log_probs, plain.log_probs)


def test_a_rollout_whose_text_changes_equals_diffusers_loop_and_projects_each_text_anew(monkeypatch):
    one, other = conditioning(3), conditioning(3, seed=1)
    denoiser, by_step, unet = micro_denoiser(num_steps=4), [one, one, other, one], micro_unet()
    attention = next(module for name, module in denoiser.network.named_modules() if name.endswith(".attn2"))
    calls, forward = [], nn.Linear.forward

    def counted(self: nn.Linear, inputs: Tensor) -> Tensor:
        calls.extend([self] if self in (attention.to_k, attention.to_v) else [])
        return forward(self, inputs)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    trajectory = sampler.rollout(denoiser, torch.zeros(3, 5).long(), by_step, (4, 8, 8), seeded(0)[0])
    assert len(calls) == 2 * 3  # of both projections, at the first step and wherever the text is another one
    monkeypatch.undo()
    scheduler, noises = (
        make_scheduler(prediction_type="v_prediction"),
        sampler.draw_noise(4, 3, (4, 8, 8), seeded(0)[0], "cpu"),
    )
    scheduler.set_timesteps(4)
    latents = next(noises)
    for timestep, text, noise in zip(scheduler.timesteps, by_step, noises, strict=True):
        null, prompt = (
            unet(latents, timestep, embeds).sample for embeds in (text.null_embeds.expand(3, -1, -1), text.prompt_embeds)
        )
        latents = scheduler.step(null + 3 * (prompt - null), timestep, latents, eta=1.0, variance_noise=noise).prev_sample
    torch.testing.assert_close(trajectory.latents[:, -1], latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_steps_after_the_stochastic_ones_are_those_of_eta_0(prediction_type):
    scheduler = make_scheduler(prediction_type=prediction_type)
    random, none = (ddim_schedule(scheduler, 6, eta) for eta in (1.0, 0.0))
    mixed = random_until(random, none, 2)
    for name in ("timesteps", "latents_weight", "output_weight", "std"):
        for part, source in ((slice(0, 2), random), (slice(2, 6), none)):
            assert torch.equal(getattr(mixed, name)[part], getattr(source, name)[part])
    assert mixed.trainable_steps.tolist() == [0, 1]


def test_same_seed_gives_the_same_bits_and_another_does_not():
    denoiser = micro_denoiser(num_steps=3)
    first, second, other = (micro_rollout(denoiser, seeded(seed)[0]) for seed in (5, 5, 6))
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.log_probs, second.log_probs)
    assert not torch.equal(first.latents, other.latents)


def test_with_a_generator_each_an_image_does_not_depend_on_its_batch():
    denoiser, cond = micro_denoiser(num_steps=5), conditioning(4)
    ids = torch.zeros(4, 5, dtype=torch.long)

    def run(rows: list[int]) -> Trajectory:
        rows_tensor = torch.tensor(rows)
        return sampler.rollout(denoiser, ids[rows_tensor], rows_of(cond, rows_tensor), (4, 8, 8), seeded(*rows))

    whole = run([0, 1, 2, 3])
    for rows in ([2], [3, 1]):
        part = run(rows)
        torch.testing.assert_close(part.latents, whole.latents[rows], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part.log_probs, whole.log_probs[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep_null_outputs", [False, True])
def test_ratio_is_one_when_log_probs_are_recomputed_in_other_batches(keep_null_outputs):
    denoiser = micro_denoiser(num_steps=10)
    trajectory = micro_rollout(denoiser, seeded(0)[0], num_samples=6, keep_null_outputs=keep_null_outputs)
    cond = conditioning(6)
    pairs = torch.tensor(list(itertools.product(range(6), denoiser.schedule.trainable_steps.tolist())))
    pairs = pairs[torch.randperm(len(pairs), generator=seeded(1)[0])]
    worst = 0.0
    for samples, steps in (chunk.unbind(1) for chunk in pairs.split(7)):
        null_outputs = trajectory.null_outputs[samples, steps] if keep_null_outputs else None
        mean, _ = denoiser.mean(trajectory.latents[samples, steps], steps, rows_of(cond, samples), null_outputs)
        log_probs = sampler.gaussian_log_prob(trajectory.latents[samples, steps + 1], mean, denoiser.std(steps))
        ratio = (log_probs - trajectory.log_probs[samples, steps]).exp()
        worst = max(worst, (ratio - 1).abs().max().item())
    assert worst <= 1e-6


@pytest.mark.slow
def test_a_compiled_unet_equals_the_plain_one(monkeypatch):
    """A small module through inductor: the U-Net of diffusers takes it over 100 s on two cores (see the next test)."""
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "vec_isa_ok", False)  # without vector instructions a kernel is compiled far sooner
    torch.manual_seed(0)
    denoiser = Denoiser(SmallUNet().requires_grad_(False), ddim_schedule(make_scheduler(), 10, 1.0), 3.0)
    check_compiled(denoiser)


@pytest.mark.slow
def test_the_real_unet_is_one_graph_without_breaks(monkeypatch):
    """Traced whole and then run as it is: inductor's code generation is too slow for a test."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    check_compiled(micro_denoiser())


def check_compiled(denoiser: Denoiser) -> None:
    arguments = (torch.randn(2, 4, 8, 8), torch.tensor([0, 9]), conditioning(2), torch.randn(2, 4, 8, 8))
    with torch.no_grad():
        plain, fused = denoiser.step(*arguments), replace(denoiser, compile=True).step(*arguments)
    for name in ("next_latents", "log_probs", "null_outputs"):
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name), rtol=1e-5, atol=1e-5)


def test_the_unet_is_compiled_once_and_not_for_every_rollout(monkeypatch):
    graphs = []

    def compile(function, **options):
        graphs.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    denoiser = replace(micro_denoiser(num_steps=3), compile=True)
    fused = [micro_rollout(denoiser, seeded(0)[0]) for _ in range(3)]
    assert graphs == [{"dynamic": False}]  # one graph for several sizes would round otherwise than one for each
    assert torch.equal(fused[-1].latents, micro_rollout(micro_denoiser(num_steps=3), seeded(0)[0]).latents)


def test_nothing_is_compiled_without_cuda_or_when_it_is_not_wanted(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    for compile in (False, None):
        micro_rollout(replace(micro_denoiser(num_steps=2), compile=compile), seeded(0)[0])


# --- images ---


def test_images_depend_on_their_prompt_and_seed_alone_and_equal_the_pipelines(pipeline, stable_diffusion):
    model = models.load_model(str(stable_diffusion))
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "eta": 1.0}
    given = {"model": str(stable_diffusion), "prompt": PROMPTS} | options
    policy, larger = (Policy(model, resolve_sample(SampleOptions(**given, resolution=size))) for size in (None, 48))
    ids = tokenization.tokenize(model.tokenizer, PROMPTS)
    whole = evaluation.draw(policy, ids, [5, 6, 7], batch_size=3)
    assert whole.shape == (3, 3, 32, 32)
    parted = evaluation.draw(policy, ids.flip(0), [7, 6, 5], batch_size=2)
    torch.testing.assert_close(parted.flip(0), whole, rtol=1e-4, atol=1e-4)
    expected = pipeline(PROMPTS, generator=seeded(5, 6, 7), output_type="pt", **options).images
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
    assert evaluation.draw(larger, ids[:1], [5], 1).shape == (1, 3, 48, 48)


# --- trajectories ---


def a_trajectory(num_samples: int = 2, null: bool = True, seed: int = 0) -> Trajectory:
    torch.manual_seed(seed)
    return Trajectory(
        prompt_ids=torch.randint(9, (num_samples, 5)),
        timesteps=torch.tensor([901, 801, 701]).expand(num_samples, -1),
        latents=torch.randn(num_samples, 4, 4, 2, 2),
        log_probs=torch.randn(num_samples, 3),
        null_outputs=torch.randn(num_samples, 3, 4, 2, 2) if null else None,
    )


@pytest.mark.parametrize(("name", "shape"), [
    ("prompt_ids", (3, 5)),
    ("latents", (2, 3, 4, 2, 2)),
    ("latents", (3, 4, 4, 2, 2)),
    ("log_probs", (2, 4)),
    ("log_probs", (2,)),
    ("null_outputs", (2, 4, 4, 2, 2)),
    ("null_outputs", (2, 3, 4, 2, 3)),
])  # fmt: skip
def test_trajectory_refuses_wrong_shapes_by_name(name, shape):
    with pytest.raises(ValueError, match=rf"{name}: must have shape .* not {str(shape)[:-1]}".replace("(", r"\(")) as caught:
        replace(a_trajectory(), **{name: torch.zeros(shape)})
    assert expected(caught.value) is None  # a bug, and no fault of the user's


@pytest.mark.parametrize("null", [True, False])
def test_concatenate_joins_trajectories_in_their_order(null):
    parts = [a_trajectory(num_samples, null, seed) for seed, num_samples in enumerate((2, 1, 2))]
    joined = sampler.concatenate(parts)
    for name in ("prompt_ids", "timesteps", "latents", "log_probs", *(["null_outputs"] if null else [])):
        assert torch.equal(getattr(joined, name), torch.cat([getattr(part, name) for part in parts]))
    assert (joined.null_outputs is None) == (not null)
