"""Advantages: how much better an image is than others of its prompt, or than its prompt's have been."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from texforce.config import TrainConfig


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

    def __init__(self, buffer_size: int = 32, min_count: int = 16) -> None:
        self.min_count = min_count
        self.history: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=buffer_size))

    def advantages(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Normalised rewards (N,); 0 where the reward is not finite."""
        valid = rewards.isfinite()
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            if math.isfinite(reward):
                self.history[prompt].append(reward)
        advantages = torch.zeros_like(rewards)
        for i in torch.nonzero(valid).flatten().tolist():
            history = self.history[prompts[i]]
            seen = torch.tensor(history) if len(history) >= self.min_count else rewards[valid]
            if seen.amax() > seen.amin():  # the mean of equal rewards is rounded: what that leaves is no advantage
                advantages[i] = (rewards[i] - seen.mean()) / (seen.std(correction=0) + 1e-6)
        return advantages


def normalised_advantages(
    values: Tensor, prompts: Sequence[str], config: TrainConfig, statistics: PromptStatistics
) -> Tensor:
    """Advantages (N,) of rewards (N,), in standard deviations and clipped; 0 for dropped samples."""
    if config.advantages == "per-prompt":
        advantages = statistics.advantages(prompts, values)
    else:
        advantages = leave_one_out(values.reshape(-1, config.num_samples_per_prompt)).flatten()
        advantages = advantages / (advantages[values.isfinite()].std(correction=0) + 1e-8)
    return advantages.clamp(-config.advantage_clip, config.advantage_clip)
