"""An epoch's experience: the prompts in their order, images sampled for them, their scores, and their advantages."""

from __future__ import annotations

import math
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from . import interrupts, models, processes, rewards, sampler, scorers, stages
from .config import TrainConfig
from .errors import DivergedError, RewardError
from .reward_specs import NO_REWARD

if TYPE_CHECKING:
    from texforce import Batch, Policy, UpdateStatistics

T = TypeVar("T")


# --- prompts, images and scores ---


class PromptOrder:
    """The training prompts over and over, shuffled anew each time."""

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

    def state_dict(self) -> dict[str, Any]:
        return {"waiting": list(self.waiting)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for an index of no prompt."""
        self.waiting = list(state["waiting"])
        if not all(type(index) is int and 0 <= index < len(self.prompts) for index in self.waiting):
            raise ValueError(f"order: must hold indices of the {len(self.prompts)} prompts")


@dataclass(frozen=True)
class Samples:
    """One epoch's N images with their scores: num_samples_per_prompt of each prompt, side by side."""

    prompts: list[str]  # (N,)
    trajectory: Any  # a sampler.Trajectory of this process's images
    rewards: Tensor  # (N,) float32, NaN where the sample was dropped
    parts: dict[str, Tensor]  # (N,) float32, the score of each part of the reward
    local_indices: Tensor  # (n,) int64, which of the N images the trajectory holds
    captions: Sequence[str | None] = ()  # (N,) with --relabel: what images show that failed their prompt
    caption_ids: Any = None  # (n, L) int64 of the captions of this process's images; anything where there is none


def collect(
    policy: Policy, reward: rewards.Mixture, prompts: Sequence[str], config: TrainConfig, generator: torch.Generator
) -> Samples:
    """Sample num_samples_per_prompt images for each prompt, and score them.

    Raises:
        DivergedError: no image is finite. RewardError: a scorer failed, or no image has a finite reward. An error in one
            process is every process's.
    """
    repeated = [prompt for prompt in prompts for _ in range(config.num_samples_per_prompt)]
    trajectories, scored = processes.agreed(_sample_and_score, policy, reward, repeated, config, generator)
    judged = gather_scores(scored)
    parts = judged.scores
    reward.observe(parts)  # before they are combined, so that one unit holds for all images that are compared
    values = torch.zeros(len(repeated)) if config.reward == NO_REWARD else reward.combine(parts)
    values = values.where(values.isfinite() & judged.finite, torch.nan)
    if values.isnan().all():
        raise RewardError(f"reward: {config.reward} gave no finite score for any image of an epoch")
    indices = torch.arange(len(repeated)).split(config.sample_batch_size)
    local_indices = torch.cat([indices[number] for number in trajectories])
    samples = Samples(repeated, sampler.concatenate(list(trajectories.values())), values, parts, local_indices)
    return samples if reward.captioner is None else _with_captions(policy, samples, judged.captions)


def _with_captions(policy: Policy, samples: Samples, captions: Sequence[str | None]) -> Samples:
    """Samples with the captions of those that are not dropped."""
    finite = samples.rewards.isfinite().tolist()
    captions = [caption if kept else None for caption, kept in zip(captions, finite, strict=True)]
    ids = models.tokenize_for(policy.model, [captions[i] or "" for i in samples.local_indices.tolist()])
    return replace(samples, captions=captions, caption_ids=ids.to(policy.model.device))


@dataclass(frozen=True)
class Scored:
    """Scores of a batch of N images."""

    finite: Tensor  # (N,) bool, whether the image is
    scores: dict[str, Tensor]  # (N,) float32 of each part; NaN where the image is not finite
    captions: Sequence[str | None] = ()  # (N,) where there is a captioner


def gather_scores(scored: Mapping[int, Scored]) -> Scored:
    """The scores of all processes' images, from the batches of this process by their numbers.

    Raises:
        DivergedError: no image is finite.
    """
    batches = list(processes.merged(scored).values())
    finite = torch.cat([batch.finite for batch in batches])
    check_some_finite(finite)
    scores = {name: torch.cat([batch.scores[name] for batch in batches]) for name in batches[0].scores}
    return Scored(finite, scores, [caption for batch in batches for caption in batch.captions])


def num_rollout_calls(policy: Policy, config: TrainConfig) -> int:
    """U-Net calls of an epoch's rollouts before the update, one for each image, step and branch of guidance."""
    if config.algorithm == "gradient":
        return 0  # the update samples
    num_images = config.num_prompts_per_epoch * config.num_samples_per_prompt
    return num_images * config.num_inference_steps * (2 if policy.denoiser.guided else 1)


def _sample_and_score(
    policy: Policy, reward: rewards.Mixture, prompts: Sequence[str], config: TrainConfig, generator: torch.Generator
) -> tuple[dict[int, sampler.Trajectory], dict[int, Scored]]:
    """Trajectories and scores of this process's batches of prompts, by the batches' numbers.

    While a batch is decoded and scored, the next one is sampled. A batch of another process draws its noise here too.
    """
    trajectories: dict[int, sampler.Trajectory] = {}
    scored: dict[int, Scored] = {}
    waiting: dict[int, Future[Scored]] = {}
    try:
        for number, start in enumerate(range(0, len(prompts), config.sample_batch_size)):
            interrupts.check()
            stages.report("sampling", start, len(prompts))
            chunk = prompts[start : start + config.sample_batch_size]
            if not processes.is_mine(number):
                sampler.skip_rollout(policy.denoiser, len(chunk), policy.latent_shape, generator)
                continue
            trajectory = trajectories[number] = _rollout(policy, chunk, generator)
            scored |= {number: future.result() for number, future in waiting.items()}
            waiting = {number: _in_background(_decode_and_score, policy, reward, trajectory, chunk)}
        stages.report("scoring", len(prompts), len(prompts))
        scored |= {number: future.result() for number, future in waiting.items()}
    finally:
        wait(waiting.values(), timeout=2)  # a thread that is at work when the process ends can bring it down
    return trajectories, scored


def _rollout(policy: Policy, prompts: Sequence[str], generator: torch.Generator) -> sampler.Trajectory:
    prompt_ids = models.tokenize_for(policy.model, prompts).to(policy.model.device)
    conditionings = policy.conditionings(prompt_ids)  # with gradients, though none is used: it rounds as in updates
    return sampler.rollout(policy.denoiser, prompt_ids, conditionings, policy.latent_shape, generator)


def _decode_and_score(
    policy: Policy, reward: rewards.Mixture, trajectory: sampler.Trajectory, prompts: Sequence[str]
) -> Scored:
    if policy.model.device.type == "cuda":
        torch.cuda.set_device(policy.model.device)  # a thread inherits neither this nor the grad mode
    with torch.no_grad():
        images = sampler.decode(policy.model.vae, trajectory.latents[:, -1])
        finite, scores = scorers.are_finite(images), reward.score(images, prompts)
        if reward.captioner is None or not finite.any():
            return Scored(finite, scores, [None] * len(images) if reward.captioner else ())
        return Scored(finite, scores, reward.captioner(images, prompts))


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


def check_finite(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) as they are.

    Raises:
        DivergedError: none of them is finite, so that it is not for the scorer to judge them.
    """
    check_some_finite(scorers.are_finite(images))
    return images


def check_some_finite(finite: Tensor) -> None:
    """Check that at least one image is finite, given which are, (N,) bool.

    Raises:
        DivergedError: none is.
    """
    if not finite.any():
        raise DivergedError(
            "the images are not finite; lower --learning-rate (or --strength, in sampling), or try --mixed-precision no"
        )


def finite_mean(scores: Tensor) -> float:
    """Mean of the finite ones among scores (N,)."""
    return scores[scores.isfinite()].mean().item()


def scored_by_update(batch: Batch, reward: rewards.Mixture, updated: UpdateStatistics) -> Samples:
    """The samples of `gradient_update` with their scores, without trajectories."""
    parts = {name: torch.tensor([updated.scores[i][name] for i in range(len(batch.prompts))]) for name in reward.parts}
    reward.observe(parts)
    values = reward.combine(parts)
    values = values.where(values.isfinite(), torch.nan)
    return Samples(batch.prompts, None, values, parts, batch.local_indices)


# --- advantages ---


def leave_one_out(rewards: Tensor) -> Tensor:
    """Advantage of each sample over the mean of its group's others (arXiv:2402.14740); rewards (P, K), NaN where dropped.

    A dropped sample gets 0, and so does a group that is all equal or has one sample left.
    """
    valid = rewards.isfinite()
    values = rewards.where(valid, rewards.new_zeros(()))
    num_others = valid.sum(dim=1, keepdim=True) - 1
    others = (values.sum(dim=1, keepdim=True) - values) / num_others.clamp(min=1)
    # The sum of equal rewards is rounded, and what that leaves would be made large by the normalisation.
    differ = rewards.where(valid, -math.inf).amax(dim=1) > rewards.where(valid, math.inf).amin(dim=1)
    return torch.where(valid & differ[:, None], values - others, 0)


class PromptStatistics:
    """Advantages by running statistics for each prompt (DDPO, arXiv:2305.13301 section 4.3).

    A prompt seen fewer than min_count times uses the mean and deviation of the whole batch.
    """

    def __init__(self, buffer_size: int = 16, min_count: int = 16) -> None:
        self.min_count = min_count
        self.history: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=buffer_size))

    def advantages(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Normalised rewards (N,); 0 where the reward is not finite."""
        valid = rewards.isfinite()
        keys = [prompt.lower() for prompt in prompts]  # CLIP reads no capitals
        for key, reward in zip(keys, rewards.tolist(), strict=True):
            if math.isfinite(reward):
                self.history[key].append(reward)
        advantages = torch.zeros_like(rewards)
        for i in torch.nonzero(valid).flatten().tolist():
            history = self.history[keys[i]]
            seen = torch.tensor(history) if len(history) >= self.min_count else rewards[valid]
            if seen.amax() > seen.amin():  # the mean of equal rewards is rounded: what that leaves is no advantage
                advantages[i] = (rewards[i] - seen.mean()) / (seen.std(correction=0) + 1e-6)
        return advantages

    def state_dict(self) -> dict[str, Any]:
        return {prompt: list(rewards) for prompt, rewards in self.history.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history.clear()
        for prompt, seen in state.items():
            self.history[prompt].extend(map(float, seen))


def above_mean(rewards: Tensor) -> Tensor:
    """How far rewards (N,) are above the epoch's mean, in standard deviations; 0 below it and for dropped samples.

    Self-imitation (arXiv:1806.05635) with that mean as the value. A group's own baseline says nothing about a prompt that
    comes out right each time; this holds such prompts where they are, while others move.
    """
    finite = rewards[rewards.isfinite()]
    if finite.amax() == finite.amin():  # the mean of equal rewards is rounded: what that leaves is no advantage
        return torch.zeros_like(rewards)
    scaled = (rewards - finite.mean()) / (finite.std(correction=0) + 1e-8)
    return scaled.clamp(min=0).nan_to_num(nan=0.0)


def compute_advantages(samples: Samples, config: TrainConfig, statistics: PromptStatistics) -> Tensor:
    """Advantages (N,) of an epoch's images, in standard deviations and clipped; 0 for dropped samples."""
    rewards = samples.rewards
    if config.advantages == "per-prompt":
        advantages = statistics.advantages(samples.prompts, rewards)
    else:
        advantages = leave_one_out(rewards.reshape(-1, config.num_samples_per_prompt)).flatten()
        advantages = advantages / (advantages[rewards.isfinite()].std(correction=0) + 1e-8)
    if config.algorithm == "matching" and config.imitation_weight:
        advantages = advantages + config.imitation_weight * above_mean(rewards)
    return advantages.clamp(-config.advantage_clip, config.advantage_clip)
