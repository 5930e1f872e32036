"""Sampling: steps of DDIM and flow matching, with log-probabilities, and of DPM-Solver++; rollouts; the fused denoiser."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import InputError, reading
from .families import Inputs, Text, call_unet
from .models import Conditioning, pixels_per_latent

MAX_DECODED = 16  # images at a time, of at most 512x512 pixels; fewer if they are larger
MIN_STD = 1e-4  # a step with a smaller deviation counts as deterministic: it has no usable density


# --- the transition ---


@dataclass(frozen=True)
class Schedule:
    """T steps of a sampler as Gaussian transitions, affine in the denoiser's output; every tensor (T,).

    next_latents ~ Normal(latents_weight * latents + output_weight * model_output + history, std). A multistep sampler's
    history is history_latents_weight * latents + history_output_weight * model_output of the step before; DDIM has none.
    """

    timesteps: Tensor  # descending; int64, in flow matching float32
    latents_weight: Tensor
    output_weight: Tensor
    std: Tensor
    history_latents_weight: Tensor | None = None
    history_output_weight: Tensor | None = None

    @property
    def trainable_steps(self) -> Tensor:
        """Indices of the steps that have a density, without which there is no policy gradient."""
        return torch.nonzero(self.std > MIN_STD).flatten()

    def mean(self, latents: Tensor, outputs: Tensor, steps: Tensor) -> Tensor:
        """Means (N, C, H, W) of the transitions of latents and model outputs (N, C, H, W) at steps (N,), without history."""
        return _at(self.latents_weight, steps) * latents + _at(self.output_weight, steps) * outputs

    def history(self, latents: Tensor, outputs: Tensor, steps: Tensor) -> Tensor | None:
        """What steps (N,) of latents and model outputs (N, C, H, W) add to the next steps' means, (N, C, H, W)."""
        if self.history_latents_weight is None or self.history_output_weight is None:
            return None
        return _at(self.history_latents_weight, steps) * latents + _at(self.history_output_weight, steps) * outputs

    def to(self, device: torch.device) -> Schedule:
        """A copy on a device."""
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}
        return Schedule(**{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


def ddim_schedule(scheduler: Any, num_inference_steps: int, eta: float) -> Schedule:
    """The transitions of DDIM (arXiv:2010.02502 eq. 12 and 16) that diffusers' DDIMScheduler.step makes.

    Raises:
        InputError: too many steps, eta outside 0 to 1, or a scheduler that clips its predictions: then the mean is not
            affine, and the log-probability of this file would be wrong.
    """
    config = scheduler.config
    if not 0 <= eta <= 1:
        raise InputError(f"eta: must be from 0 to 1, not {eta}")
    _check_scheduler(config, num_inference_steps)
    timesteps = _spaced_timesteps(scheduler, num_inference_steps)
    previous = timesteps - config.num_train_timesteps // num_inference_steps
    alphas = scheduler.alphas_cumprod.double().cpu()
    alpha = alphas[timesteps]
    next_alpha = torch.where(previous >= 0, alphas[previous.clamp(min=0)], scheduler.final_alpha_cumprod.double().cpu())
    variance = (1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)
    std = eta * variance.clamp(min=0).sqrt()
    sample, noise = _prediction_weights(config.prediction_type, alpha)
    to_sample, to_noise = next_alpha.sqrt(), (1 - next_alpha - std.square()).clamp(min=0).sqrt()
    latents_weight = to_sample * sample[0] + to_noise * noise[0]
    output_weight = to_sample * sample[1] + to_noise * noise[1]
    _check_weights(config, timesteps, latents_weight + output_weight + std)
    return Schedule(timesteps, latents_weight.float(), output_weight.float(), std.float())


def flow_schedule(sigmas: Tensor, timesteps: Tensor, eta: float = 0.0, kind: str = "euler") -> Schedule:
    """The transitions of flow matching between noise levels sigmas (T+1,), which end in 0, at timesteps (T,).

    At an eta of 0 they are Euler's steps, as diffusers' FlowMatchEulerDiscreteScheduler.step makes them. Above, "euler" is
    the SDE of Flow-GRPO (arXiv:2505.05470, eq. 9), whose deviation at the pure noise takes the next level, and "cps" the
    coefficients-preserving sampling of arXiv:2509.05952, which leaves the noise that each level should have.
    """
    levels = sigmas.double()
    sigma, after = levels[:-1], levels[1:]
    if kind == "cps":
        std = after * math.sin(eta * math.pi / 2)
        noise = (after.square() - std.square()).clamp(min=0).sqrt()
        return Schedule(timesteps, *_floats((1 - after) + noise, noise * (1 - sigma) - (1 - after) * sigma, std))
    step = after - sigma
    rate = eta * (sigma / (1 - torch.where(sigma < 1, sigma, after))).sqrt()
    drift = rate.square() / 2
    latents_weight = 1 + drift / sigma * step
    output_weight = (1 + drift * (1 - sigma) / sigma) * step
    return Schedule(timesteps, *_floats(latents_weight, output_weight, rate * (-step).sqrt()))


def random_until(schedule: Schedule, deterministic: Schedule, num_stochastic: int | None) -> Schedule:
    """The first num_stochastic steps of a schedule, all if None, and then those of a deterministic one.

    As in MixGRPO (arXiv:2507.21802).
    """
    if num_stochastic is None:
        return schedule
    pairs = {
        name: (getattr(schedule, name), getattr(deterministic, name)) for name in ("latents_weight", "output_weight", "std")
    }
    joined = {name: torch.cat([one[:num_stochastic], two[num_stochastic:]]) for name, (one, two) in pairs.items()}
    return replace(schedule, **joined)


def _floats(*tensors: Tensor) -> list[Tensor]:
    return [tensor.float() for tensor in tensors]


def flow_levels(scheduler: Any, num_inference_steps: int, num_tokens: int, linear: bool) -> tuple[Tensor, Tensor]:
    """Noise levels (T+1,) and timesteps (T,) of a flow matching scheduler for an image of so many tokens.

    The scheduler shifts the levels, by the number of tokens if it says so; `linear` ones are evenly spaced before that,
    and not as the scheduler spaces them.

    Raises:
        InputError: the scheduler cannot be used, or does not give that many different levels.
    """
    with reading("model: its scheduler_config.json cannot be used", InputError):
        options: dict[str, Any] = {}
        if scheduler.config.use_dynamic_shifting:
            from diffusers.pipelines.flux.pipeline_flux import calculate_shift

            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            options["mu"] = calculate_shift(num_tokens, *(scheduler.config[name] for name in names))
        if linear:
            options["sigmas"] = torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        scheduler.set_timesteps(num_inference_steps, **options)
    sigmas = scheduler.sigmas.float().cpu()
    if not (sigmas.isfinite().all() and (sigmas[1:] < sigmas[:-1]).all() and 0 < sigmas[0] <= 1 and sigmas[-1] == 0):
        raise InputError(
            f"num_inference_steps: the scheduler's levels of noise do not fall to 0 in {num_inference_steps} steps"
        )
    return sigmas, scheduler.timesteps.float().cpu()


def dpm_solver_schedule(scheduler: Any, num_inference_steps: int) -> Schedule:
    """The steps of DPM-Solver++(2M) (arXiv:2211.01095 algorithm 2) that diffusers' DPMSolverMultistepScheduler.step makes.

    A step is linear in the latents, the denoiser's output and the clean sample that the step before predicted, so its
    weights are what diffusers makes of unit vectors.

    Raises:
        InputError: too many steps, or a scheduler that clips its predictions, so that the steps are not linear.
    """
    from diffusers import DPMSolverMultistepScheduler

    config, options = scheduler.config, {"algorithm_type": "dpmsolver++", "solver_order": 2}
    if "prediction_type" not in config:  # it is of flow matching
        if config.use_dynamic_shifting:
            raise InputError("sampler: the scheduler shifts its noise levels by the image's size, which dpm-solver does not")
        config = {"num_train_timesteps": config.num_train_timesteps, "flow_shift": scheduler.shift, "use_flow_sigmas": True}
        options["prediction_type"] = "flow_prediction"
    else:
        _check_scheduler(config, num_inference_steps)
    with reading("model: its scheduler_config.json cannot be used", InputError):
        solver: Any = DPMSolverMultistepScheduler.from_config(config, **options)
    timesteps = _spaced_timesteps(solver, num_inference_steps)
    solver.set_begin_index(0)  # else it looks the first timestep up, which a spacing of too many steps repeats
    latents, output, previous_sample = torch.eye(3)
    weights, samples = torch.empty(2, len(timesteps), 3)
    for k, timestep in enumerate(timesteps):
        solver.model_outputs[-1] = previous_sample
        weights[k] = solver.step(output, timestep, latents).prev_sample
        samples[k] = solver.model_outputs[-1]
    if not weights.isfinite().all():
        raise InputError(f"num_inference_steps: {num_inference_steps} repeat a timestep of the scheduler; take fewer")
    latents_weight, output_weight, sample_weight = weights.unbind(1)
    # The first step takes no step before, so that the last one, which gets its weight, leaves nothing.
    history = (sample_weight.roll(-1)[:, None] * samples).unbind(1)
    return Schedule(timesteps, latents_weight, output_weight, torch.zeros(len(timesteps)), history[0], history[1])


def _check_scheduler(config: Any, num_inference_steps: int) -> None:
    if not 1 <= num_inference_steps <= config.num_train_timesteps:
        raise InputError(f"num_inference_steps: must be 1 to {config.num_train_timesteps}, not {num_inference_steps}")
    if config.prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise InputError(f"model: the scheduler's prediction_type {config.prediction_type!r} is not supported")
    if config.clip_sample or config.thresholding:
        raise InputError("model: schedulers with clip_sample or thresholding are not supported")


def _check_weights(config: Any, timesteps: Tensor, weights: Tensor) -> None:
    """Check that the steps at timesteps (T,) have finite weights (T,).

    They have not where the schedule ends in pure noise (arXiv:2305.08891) and the U-Net predicts the noise.
    """
    if wrong := timesteps[~weights.isfinite()].tolist():
        raise InputError(
            f"model: the prediction_type {config.prediction_type!r} in its scheduler_config.json says nothing of the image "
            f"at timestep {wrong[0]}: a schedule of zero terminal SNR (rescale_betas_zero_snr) goes with v_prediction; "
            "correct one of the two there"
        )


def _spaced_timesteps(scheduler: Any, num_inference_steps: int) -> Tensor:
    """The timesteps (T,) of a scheduler's own spacing, which are set in it too."""
    config = scheduler.config
    with reading("model: its scheduler_config.json cannot be used", InputError):
        scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps.cpu()
    timesteps = timesteps.float() if config.get("use_flow_sigmas") else timesteps.long()
    if len(timesteps) != num_inference_steps or timesteps.min() < 0:  # diffusers' rounding of the trailing spacing, as of 61
        raise InputError(f"num_inference_steps: {num_inference_steps} do not fit the scheduler's spacing; take one less")
    if not timesteps.is_floating_point() and timesteps.max() >= config.num_train_timesteps:
        raise InputError(
            f"num_inference_steps: with the scheduler's steps_offset of {config.steps_offset}, {num_inference_steps} lead "
            f"past its {config.num_train_timesteps} training timesteps; take fewer"
        )
    return timesteps


def _prediction_weights(prediction_type: str, alphas: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, y) of the clean sample and of the noise, each x * noised + y * model_output, at cumulated alphas (T,)."""
    a, b = alphas.sqrt(), (1 - alphas).sqrt()
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    return {
        "epsilon": ((1 / a, -b / a), (zero, one)),
        "sample": ((zero, one), (1 / b, -a / b)),
        "v_prediction": ((a, -b), (b, a)),
    }[prediction_type]


@dataclass(frozen=True)
class NoiseProcess:
    """The forward process (arXiv:2006.11239 eq. 4): noised = sample_weight * sample + noise_weight * noise.

    The clean sample is predicted from it as noised_weight * noised + output_weight * model_output. Every tensor (T,), by
    level of noise, the noisiest last.
    """

    timesteps: Tensor  # what the denoiser gets at each level; int64, in flow matching float32
    sample_weight: Tensor
    noise_weight: Tensor
    noised_weight: Tensor
    output_weight: Tensor

    def add_noise(self, samples: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Noised latents (N, C, H, W) of clean samples and noise (N, C, H, W) at levels (N,)."""
        return _at(self.sample_weight, levels) * samples + _at(self.noise_weight, levels) * noise

    def predict_sample(self, noised: Tensor, outputs: Tensor, levels: Tensor) -> Tensor:
        """Clean samples (N, C, H, W) that a model's outputs (N, C, H, W) for noised latents stand for."""
        return _at(self.noised_weight, levels) * noised + _at(self.output_weight, levels) * outputs

    def to(self, device: torch.device) -> NoiseProcess:
        """A copy on a device."""
        return NoiseProcess(*(getattr(self, item.name).to(device) for item in fields(self)))


def _at(weights: Tensor, timesteps: Tensor) -> Tensor:
    """Weights (T,) at timesteps (N,), as (N, 1, 1, 1)."""
    return weights[timesteps][:, None, None, None]


def noise_process(scheduler: Any) -> NoiseProcess:
    """The forward process of a scheduler's training timesteps."""
    alphas = scheduler.alphas_cumprod.double().cpu()
    sample, _ = _prediction_weights(scheduler.config.prediction_type, alphas)
    return NoiseProcess(torch.arange(len(alphas)), *_floats(alphas.sqrt(), (1 - alphas).sqrt(), *sample))


def flow_noise_process(scheduler: Any, num_tokens: int) -> NoiseProcess:
    """The forward process of flow matching: noised = (1 - sigma) * sample + sigma * noise, and the output their difference.

    Its levels are as many as the scheduler's training timesteps, shifted as in sampling.
    """
    sigmas, timesteps = flow_levels(scheduler, scheduler.config.num_train_timesteps, num_tokens, linear=True)
    sigma, timesteps = sigmas[:-1].flip(0), timesteps.flip(0)
    return NoiseProcess(timesteps, 1 - sigma, sigma, torch.ones_like(sigma), -sigma)


def gaussian_log_prob(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of values (N, ...) under Normal(mean, std), averaged over all but the first axis: (N,) float32."""
    z = (values.float() - mean.float()) / std
    log_prob = -0.5 * z.square() - std.log() - 0.9189385332046727  # log(sqrt(2 pi))
    return log_prob.flatten(1).mean(dim=1)


@dataclass(frozen=True)
class Step:
    """A transition of N latents, as sampled."""

    next_latents: Tensor  # (N, C, H, W)
    log_probs: Tensor  # (N,) float32; of no use where the step has no density
    null_outputs: Tensor | None  # (N, C, H, W), the null prompt's predictions with guidance
    history: Tensor | None  # (N, C, H, W), of a multistep sampler, for the next step


def _call_unet(unet: Any, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
    return call_unet(unet, Inputs(latents, timesteps, Text(embeds)))


@dataclass(frozen=True)
class Denoiser:
    """The policy's actor: U-Net or transformer, classifier-free guidance (arXiv:2207.12598) and the sampler's transition.

    Guidance is off at a scale of 1 or less, as in diffusers.
    """

    network: nn.Module
    schedule: Schedule
    guidance_scale: float
    compile: bool | None = None  # whether the network is fused into one compiled graph; None: on CUDA
    call: Callable[[Any, Tensor, Tensor, Tensor], Tensor] = _call_unet  # called with network, latents, timesteps, embeddings
    branches_apart: bool = False  # the null and the prompt branch run as separate batches, as the update runs only one
    keep_null_outputs: bool = False  # in trajectories: the null prompt is not trained, so that updates need its outputs only
    text_trained: bool | None = None  # in training, whether embeddings have gradients in updates; None: no training

    @property
    def guided(self) -> bool:
        """Whether the null prompt's branch runs too."""
        return self.guidance_scale > 1

    def mean(
        self, latents: Tensor, steps: Tensor, conditioning: Conditioning, null_outputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Means of the transitions of latents (N, C, H, W) at steps (N,), float32, and the null prompt's predictions."""
        outputs, null_outputs = self.guided_outputs(latents, steps, conditioning, null_outputs)
        return self.schedule.mean(latents, outputs, steps), null_outputs

    def guided_outputs(
        self, latents: Tensor, steps: Tensor, conditioning: Conditioning, null_outputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The network's outputs (N, C, H, W) float32 with guidance, and the null prompt's.

        Both branches of guidance go through it as one batch, unless the null prompt's predictions are given or
        `branches_apart` is set.
        """
        timesteps, embeds = self.schedule.timesteps[steps], conditioning.prompt_embeds
        if not self.guided:
            output = self.predict(latents, timesteps, embeds)
        elif null_outputs is not None or self.branches_apart:
            if null_outputs is None:
                null_outputs = self.predict(latents, timesteps, conditioning.null_embeds.expand_as(embeds))
            output = null_outputs + self.guidance_scale * (self.predict(latents, timesteps, embeds) - null_outputs)
        else:
            embeds = torch.cat([conditioning.null_embeds.expand_as(embeds), embeds])
            null_outputs, text_outputs = self.predict(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), embeds).chunk(2)
            output = null_outputs + self.guidance_scale * (text_outputs - null_outputs)
        return output, null_outputs

    def predict(self, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        """The network's outputs (N, C, H, W) float32 for latents (N, C, H, W) at timesteps (N,), without guidance."""
        training = self.text_trained is not None
        if training and (self.compiled or latents.is_cuda) and not torch.is_grad_enabled():
            # With gradients other kernels are chosen, which round otherwise: sampling uses those of the update.
            with torch.enable_grad():
                return self.predict(latents, timesteps, embeds.detach().requires_grad_(bool(self.text_trained))).detach()
        dtype = next(self.network.parameters()).dtype
        latents, embeds = latents.to(dtype), embeds.to(dtype)
        if latents.is_cuda:
            latents = latents.contiguous(memory_format=torch.channels_last)
        return self._fused(latents, timesteps, embeds).float()

    @property
    def compiled(self) -> bool:
        """Whether the network is compiled into one graph for each shape."""
        return next(self.network.parameters()).is_cuda if self.compile is None else self.compile

    @functools.cached_property
    def _fused(self) -> Callable[..., Tensor]:
        """The call of the network, made once; a compiled graph for each shape if `compiled`."""

        def forward(latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
            return self.call(self.network, latents, timesteps, embeds)

        return torch.compile(forward, dynamic=False) if self.compiled else forward

    def std(self, steps: Tensor) -> Tensor:
        """Standard deviations (N, 1, 1, 1) of the transitions at steps (N,)."""
        return _at(self.schedule.std, steps)

    def step(
        self, latents: Tensor, steps: Tensor, conditioning: Conditioning, noise: Tensor, history: Tensor | None = None
    ) -> Step:
        """Sample the next latents of latents (N, C, H, W) at steps (N,), with the history that the step before left."""
        outputs, null_outputs = self.guided_outputs(latents, steps, conditioning)
        mean = self.schedule.mean(latents, outputs, steps)
        if history is not None:
            mean = mean + history
        std = self.std(steps)
        next_latents = mean + std * noise
        log_probs = gaussian_log_prob(next_latents, mean, std.clamp(min=MIN_STD))
        return Step(next_latents, log_probs, null_outputs, self.schedule.history(latents, outputs, steps))


# --- rollouts ---


@dataclass(frozen=True)
class Trajectory:
    """N denoising paths of T steps, as sampled; every tensor detached."""

    prompt_ids: Tensor  # (N, L) int64, of all tokenizers; the text encoder is the policy, so embeddings are not stored
    timesteps: Tensor  # (N, T), descending
    latents: Tensor  # (N, T+1, C, H, W), initial noise first
    log_probs: Tensor  # (N, T) float32, under the sampling policy
    null_outputs: Tensor | None = None  # (N, T, C, H, W), kept only if the null prompt is not trained

    def __post_init__(self) -> None:
        num_samples, num_steps = self.timesteps.shape
        shapes = {
            "prompt_ids": (num_samples, self.prompt_ids.shape[-1]),
            "latents": (num_samples, num_steps + 1, *self.latents.shape[2:]),
            "log_probs": (num_samples, num_steps),
        }
        if self.null_outputs is not None:
            shapes["null_outputs"] = (num_samples, num_steps, *self.latents.shape[2:])
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name}: must have shape {shape}, not {tuple(getattr(self, name).shape)}")


def concatenate(trajectories: Sequence[Trajectory]) -> Trajectory:
    """Join trajectories along their first axis."""

    def join(name: str) -> Any:
        parts = [getattr(trajectory, name) for trajectory in trajectories]
        return None if parts[0] is None else torch.cat(parts)

    return Trajectory(*(join(item.name) for item in fields(Trajectory)))


Generators = torch.Generator | list[torch.Generator]  # one for all samples, or one a sample


def draw_noise(
    num_steps: int, num_samples: int, shape: tuple[int, int, int], generator: Generators, device: torch.device
) -> Iterator[Tensor]:
    """The initial latents (N, C, H, W) and then the noise of every step, as diffusers' pipeline draws them."""
    from diffusers.utils.torch_utils import randn_tensor

    for _ in range(1 + num_steps):
        yield randn_tensor((num_samples, *shape), generator=generator, device=device)


def skip_rollout(denoiser: Denoiser, num_samples: int, shape: tuple[int, int, int], generator: torch.Generator) -> None:
    """Leave a generator as a rollout of N prompts, which another process makes, leaves it."""
    for _ in draw_noise(len(denoiser.schedule.timesteps), num_samples, shape, generator, generator.device):
        pass


@contextlib.contextmanager
def text_projected_once(denoiser: Denoiser) -> Iterator[None]:
    """Compute the cross-attentions' keys and values at the first step only: for steps that all read the same text.

    A compiled network computes them each time; so do separate branches, which differ in their text.
    """
    modules = [module for name, module in denoiser.network.named_modules() if name.endswith(".attn2")]
    attentions = [module for module in modules if getattr(module, "is_cross_attention", True)]  # SD 3.5's are of the image
    if denoiser.compiled or denoiser.branches_apart:
        attentions = []
    layers = [layer for module in attentions for layer in (module.to_k, module.to_v)]

    def kept(project: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        results: list[Tensor] = []

        def forward(embeds: Tensor) -> Tensor:
            if not results:
                results.append(project(embeds))
            return results[0]

        return forward

    for layer in layers:
        layer.forward = kept(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@torch.no_grad()
def rollout(
    denoiser: Denoiser,
    prompt_ids: Tensor,
    conditioning: Conditioning | Sequence[Conditioning],
    shape: tuple[int, int, int],
    generator: Generators,
) -> Trajectory:
    """Denoise N prompts from noise, all at once; with one generator, or with one a sample.

    The conditioning is one for all steps, or a sequence with that of each step, in which equal ones are one object.
    """
    timesteps = denoiser.schedule.timesteps
    by_step = [conditioning] * len(timesteps) if isinstance(conditioning, Conditioning) else conditioning
    num_samples, device = len(prompt_ids), by_step[0].prompt_embeds.device
    noises = draw_noise(len(timesteps), num_samples, shape, generator, device)
    latents, log_probs, null_outputs, history = [next(noises)], [], [], None
    for _, alike in itertools.groupby(zip(by_step, enumerate(noises), strict=True), key=lambda turn: id(turn[0])):
        with text_projected_once(denoiser):
            for text, (k, noise) in alike:
                step = denoiser.step(latents[-1], _steps(k, latents[-1]), text, noise, history)
                history = step.history
                latents.append(step.next_latents)
                log_probs.append(step.log_probs)
                if denoiser.keep_null_outputs and step.null_outputs is not None:
                    null_outputs.append(step.null_outputs)
    return Trajectory(
        prompt_ids=prompt_ids,
        timesteps=timesteps.expand(num_samples, -1),
        latents=torch.stack(latents, dim=1),
        log_probs=torch.stack(log_probs, dim=1),
        null_outputs=torch.stack(null_outputs, dim=1) if null_outputs else None,
    )


def sample_with_gradients(
    denoiser: Denoiser, embeds: Sequence[Tensor], rows: Tensor, noises: Sequence[Tensor], num_gradient_steps: int
) -> Tensor:
    """Final latents (N, C, H, W) whose gradients reach the embeddings through the last steps (DRaFT-K, arXiv:2309.17400).

    Each step's embeddings (1+U, L, D) are the null prompt's and the prompts', rows (N,) the prompt of each sample, and
    `noises` the initial latents and each step's noise, (N, C, H, W) each. Steps are recomputed in the backward pass, so
    that memory grows with the latents alone.
    """
    latents, history, num_steps = noises[0], None, len(denoiser.schedule.timesteps)
    first = num_steps - num_gradient_steps

    def step(k: int, latents: Tensor, history: Tensor | None, *embeds: Tensor) -> tuple[Tensor, Tensor | None]:
        taken = denoiser.step(latents, _steps(k, latents), Conditioning(*embeds), noises[1 + k], history)
        return taken.next_latents, taken.history

    with torch.no_grad():
        for k in range(first):
            latents, history = step(k, latents, history, embeds[k][rows], embeds[k][:1])
    for k in range(first, num_steps):
        latents, history = checkpoint(step, k, latents, history, embeds[k][rows], embeds[k][:1], use_reentrant=False)
    return latents


def _steps(k: int, latents: Tensor) -> Tensor:
    """The index of step k for each of N latents (N,)."""
    return torch.full((len(latents),), k, device=latents.device)


def decode_with_gradients(vae: Any, latents: Tensor) -> Tensor:
    """The images of `decode`, whose gradients reach the latents; activations are recomputed in the backward pass."""

    def images(chunk: Tensor) -> Tensor:
        return _decoded(vae, chunk).float()

    decoded = [checkpoint(images, chunk, use_reentrant=False) for chunk in latents.split(_decoded_at_once(vae, latents))]
    return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    """What the VAE makes of latents, in its precision."""
    latents, shift = latents / vae.config.scaling_factor, getattr(vae.config, "shift_factor", None)
    return vae.decode((latents + shift if shift else latents).to(next(vae.parameters()).dtype)).sample


def _decoded_at_once(vae: Any, latents: Tensor) -> int:
    pixels = latents[0, 0].numel() * pixels_per_latent(vae) ** 2
    return min(MAX_DECODED, max(1, MAX_DECODED * 512 * 512 // pixels))


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images (N, 3, H, W) float32 in [0, 1] of final latents (N, C, h, w), decoded 16 at a time, or 4 of 1024x1024."""
    chunks = [_decoded(vae, chunk) for chunk in latents.split(_decoded_at_once(vae, latents))]
    return (torch.cat(chunks).float() / 2 + 0.5).clamp(0, 1)
