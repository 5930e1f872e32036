"""The held-out prompts of a training: base and tuned from the same noise, and what is measured on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import texforce
from texforce import experience, interrupts, pipelines, processes, record, sampler, scorers, world
from texforce.config import TrainConfig
from texforce.scorers import Scorer

if TYPE_CHECKING:
    from texforce.training import Setup

# One noise for every run, so that figures of different seeds and settings compare; it depends on --sample-batch-size.
HELDOUT_SEED = 20_231_115


def heldout_images(
    policy: texforce.Policy, denoiser: sampler.Denoiser, prompts: Sequence[str], config: TrainConfig
) -> Tensor:
    """One image (N, 3, H, W) in [0, 1] for each prompt, from the same noise for every policy; each process draws a share.

    Raises:
        DivergedError: no image is finite.
    """
    images = {}
    shape = pipelines.latent_shape(policy.models, config.resolution)
    for start in range(0, len(prompts), config.sample_batch_size):
        interrupts.check()
        if not processes.share(start // config.sample_batch_size):
            continue
        chunk = prompts[start : start + config.sample_batch_size]
        prompt_ids = pipelines.tokenize_for(policy.models, chunk).to(policy.models.device)
        generator = torch.Generator(policy.models.device).manual_seed(HELDOUT_SEED + start)
        with torch.no_grad():
            conditioning = policy.conditioning(prompt_ids)
        trajectory = sampler.rollout(denoiser, prompt_ids, conditioning, shape, generator)
        images[start] = sampler.decode(policy.models.vae, trajectory.latents[:, -1]).cpu()
    for others in processes.gather(images):
        images |= others
    return experience.check_finite(torch.cat([images[start] for start in sorted(images)]))


def score_all(scorer: Scorer, images: Tensor, prompts: Sequence[str], batch_size: int, device: torch.device) -> Tensor:
    """Scores (N,) of images (N, 3, H, W), in batches and on a device as in training."""
    chunks = zip(images.split(batch_size), range(0, len(images), batch_size), strict=True)
    return torch.cat([scorers.score(scorer, chunk.to(device), prompts[i : i + batch_size]) for chunk, i in chunks])


def measure(
    images: Tensor,
    prompts: Sequence[str],
    measured_by: Mapping[str, Scorer],
    batch_size: int = 128,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Mean score of images (N, 3, H, W) by each of some scorers, over the finite ones.

    For prompts of the tiny world also `alignment`, and `alignment_exact`, the share of prompts that are fully right, over
    all and over those with common words only and with rare ones.

    Raises:
        RewardError: one failed or gave no finite score.
    """
    measures = {}
    for name, scorer in measured_by.items():
        scores = score_all(scorer, images, prompts, batch_size, torch.device(device))
        if not scores.isfinite().any():
            raise scorers.RewardError(f"reward: {name} gave no finite score on the held-out prompts")
        measures[name] = experience.finite_mean(scores)
    if world.is_world(prompts):
        scores = scorers.score(world.alignment, images, prompts)
        finite = scores.isfinite()
        exact = (scores == 1).float()
        rare = torch.tensor([world.has_rare_word(prompt) for prompt in prompts])
        measures["alignment"] = scores[finite].mean().item()
        for name, rows in (("", finite), ("_common", finite & ~rare), ("_rare", finite & rare)):
            if rows.any():
                measures[f"alignment_exact{name}"] = exact[rows].mean().item()
    return measures


class Heldout:
    """The held-out prompts: the base model's images and scores, kept, and the tuned ones' against them."""

    def __init__(self, setup: Setup, prompts: list[str], config: TrainConfig, output_dir: Path) -> None:
        self.setup, self.prompts, self.config = setup, prompts, config
        self.denoiser = setup.denoiser
        if config.deterministic_elsewhere:  # those of the one who uses the adapter are not
            scheduler, device = setup.policy.models.scheduler, setup.policy.models.device
            schedule = sampler.ddim_schedule(scheduler, config.num_inference_steps, config.eta).to(device)
            self.denoiser = replace(setup.denoiser, schedule=schedule)
        self.folder = output_dir / "grids"
        if processes.is_first():
            self.folder.mkdir(exist_ok=True)
        with setup.policy.base():
            self.base_images = heldout_images(setup.policy, self.denoiser, prompts, config)
        self.base = self._scores(self.base_images)

    def _scores(self, images: Tensor) -> dict[str, float]:
        """Means of the reward, its parts, and what is only measured."""
        reward = self.setup.reward
        parts = {**reward.parts, **self.setup.eval_rewards}
        device = self.setup.policy.models.device
        measures = measure(images, self.prompts, parts, self.config.sample_batch_size, device)
        if self.config.reward in reward.parts:
            return measures
        return {self.config.reward: reward.combine_means(measures)} | measures

    def measure(self, epoch: int) -> dict[str, float]:
        """Scores of the policy as it is now; writes the grid of base and tuned images."""
        images = heldout_images(self.setup.policy, self.denoiser, self.prompts, self.config)
        shown = torch.linspace(0, len(self.prompts) - 1, min(16, len(self.prompts))).long().tolist()
        columns = {"base": self.base_images[shown], "tuned": images[shown]}
        if processes.is_first():
            record.write_grid(self.folder / f"epoch_{epoch:04d}.png", [self.prompts[i] for i in shown], columns)
        return self._scores(images)
