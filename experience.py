"""Experience: prompts in their order, the images that a policy samples for them, and their scores and advantages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

import texforce
from texforce import interrupts, pipelines, processes, rewards, sampler, scorers
from texforce.advantages import PromptStatistics, normalised_advantages
from texforce.batches import Batch
from texforce.config import TrainConfig

T = TypeVar("T")


class PromptOrder:
    """The prompts over and over, shuffled anew each time."""

    def __init__(self, prompts: list[str], generator: torch.Generator) -> None:
        self.prompts, self.generator = prompts, generator
        self.waiting: list[int] = []  # indices of the prompts that are still to come before the next shuffle

    def take(self, number: int) -> list[str]:
        """The next prompts."""
        taken = []
        for _ in range(number):
            if not self.waiting:
                self.waiting = torch.randperm(len(self.prompts), generator=self.generator).tolist()
            taken.append(self.prompts[self.waiting.pop(0)])
        return taken


def collect(
    policy: texforce.Policy,
    denoiser: sampler.Denoiser,
    reward: rewards.Mixture,
    prompts: Sequence[str],
    config: TrainConfig,
    generator: torch.Generator,
    statistics: PromptStatistics,
) -> Batch:
    """Sample num_samples_per_prompt images for each prompt, score them, and compute their advantages.

    Raises:
        DivergedError: no image is finite. RewardError: a scorer failed, or no image has a finite reward. An error in one
            process is every process's.
    """
    repeated = [prompt for prompt in prompts for _ in range(config.num_samples_per_prompt)]
    trajectories, scored = processes.agreed(_sample_and_score, policy, denoiser, reward, repeated, config, generator)
    parts = everyones_scores(scored)
    reward.observe(parts)  # before they are combined, so that one unit holds for all images that are compared
    values = reward.combine(parts)
    values = values.where(values.isfinite(), torch.nan)
    if values.isnan().all():
        raise scorers.RewardError(f"reward: {config.reward} gave no finite score for any image of an epoch")
    advantages = normalised_advantages(values, repeated, config, statistics).to(policy.models.device)
    indices = torch.arange(len(repeated)).split(config.sample_batch_size)
    here = torch.cat([indices[number] for number in trajectories])
    return Batch(sampler.concatenate(list(trajectories.values())), advantages, values, parts, here)


@dataclass(frozen=True)
class Scored:
    """What was said of a batch of N images."""

    finite: Tensor  # (N,) bool
    scores: dict[str, Tensor]  # (N,) float32 of each part; NaN where the image is not finite


def everyones_scores(scored: Mapping[int, Scored]) -> dict[str, Tensor]:
    """The scores (N,) of all images by each part, of this process's batches and the others', by the batches' numbers.

    Raises:
        DivergedError: no image is finite.
    """
    batches = list(processes.merged(scored).values())
    check_some_finite(torch.cat([batch.finite for batch in batches]))
    return {name: torch.cat([batch.scores[name] for batch in batches]) for name in batches[0].scores}


def num_unet_calls(denoiser: sampler.Denoiser, config: TrainConfig) -> int:
    """Of an epoch's rollouts, an image and a branch of guidance each; a step that a group shares is one."""
    num_own = config.num_samples_per_prompt * (config.num_inference_steps - config.num_shared_steps)
    return config.num_prompts_per_epoch * (num_own + config.num_shared_steps) * (2 if denoiser.guided else 1)


def _sample_and_score(
    policy: texforce.Policy,
    denoiser: sampler.Denoiser,
    reward: rewards.Mixture,
    prompts: Sequence[str],
    config: TrainConfig,
    generator: torch.Generator,
) -> tuple[dict[int, sampler.Trajectory], dict[int, Scored]]:
    """The trajectories of this process's batches of prompts and what was said of their images, by the batches' numbers.

    While a batch is decoded and scored, the next one is sampled. A batch of another process draws its noise here too.
    """
    shape = pipelines.latent_shape(policy.models, config.resolution)
    shared = sampler.SharedSteps(config.num_shared_steps, config.num_samples_per_prompt if config.num_shared_steps else 1)
    trajectories: dict[int, sampler.Trajectory] = {}
    scored: dict[int, Scored] = {}
    waiting: dict[int, Future[Scored]] = {}
    try:
        for number, chunk in enumerate(_chunks(prompts, config.sample_batch_size)):
            interrupts.check()
            if not processes.share(number):
                sampler.skip_rollout(denoiser, len(chunk), shape, generator, shared)
                continue
            prompt_ids = pipelines.tokenize_for(policy.models, chunk).to(policy.models.device)
            conditioning = policy.conditioning(prompt_ids)  # with gradients, though none is used: it rounds as in updates
            keep = policy.null_embeds is not None
            trajectory = sampler.rollout(denoiser, prompt_ids, conditioning, shape, generator, keep, shared)
            trajectories[number] = trajectory
            scored |= {number: future.result() for number, future in waiting.items()}
            waiting = {number: _in_background(_decode_and_score, policy, reward, trajectory, chunk)}
        scored |= {number: future.result() for number, future in waiting.items()}
    finally:
        wait(waiting.values(), timeout=2)  # a thread that is at work when the process ends can bring it down
    return trajectories, scored


def _decode_and_score(
    policy: texforce.Policy, reward: rewards.Mixture, trajectory: sampler.Trajectory, prompts: Sequence[str]
) -> Scored:
    if policy.models.device.type == "cuda":
        torch.cuda.set_device(policy.models.device)  # a thread inherits neither this nor the grad mode
    with torch.no_grad():
        images = sampler.decode(policy.models.vae, trajectory.latents[:, -1])
        return Scored(scorers.are_finite(images), reward.score(images, prompts))


def _in_background(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call a function in a thread of its own, for which no process waits at its end."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _chunks(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))


def check_finite(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) as they are.

    Raises:
        DivergedError: not one of them is finite, so that it is not for the scorer to judge them.
    """
    check_some_finite(scorers.are_finite(images))
    return images


def check_some_finite(finite: Tensor) -> None:
    """See that at least one of images is finite, by (N,) bool.

    Raises:
        DivergedError: none is.
    """
    if not finite.any():
        raise texforce.DivergedError(
            "the images are not finite; lower --learning-rate (or --scale, in sampling), or try --mixed-precision no"
        )


def finite_mean(scores: Tensor) -> float:
    """Mean of those of scores (N,) that are finite."""
    return scores[scores.isfinite()].mean().item()
