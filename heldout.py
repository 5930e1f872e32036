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


def draw_share(
    policy: texforce.Policy, denoiser: sampler.Denoiser, prompts: Sequence[str], config: TrainConfig
) -> dict[int, Tensor]:
    """One image (n, 3, H, W) in [0, 1] for each prompt of this process's batches, by the number of a batch's first prompt.

    They come from the same noise for every policy.
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
    return images


def heldout_images(
    policy: texforce.Policy, denoiser: sampler.Denoiser, prompts: Sequence[str], config: TrainConfig
) -> Tensor:
    """The images (N, 3, H, W) of `draw_share` for all prompts, of every process.

    Raises:
        DivergedError: no image is finite.
    """
    images = processes.merged(processes.agreed(draw_share, policy, denoiser, prompts, config))
    return experience.check_finite(torch.cat(list(images.values())))


def score_share(
    images: Mapping[int, Tensor],
    prompts: Sequence[str],
    measured_by: Mapping[str, Scorer],
    device: torch.device | str = "cpu",
) -> dict[int, experience.Scored]:
    """Scores of batches of images (n, 3, H, W), by the number of a batch's first prompt, on a device as in training."""
    if world.is_world(prompts):
        measured_by = {**measured_by, "alignment": world.alignment}
    scored = {}
    for start, batch in images.items():
        chunk, finite = prompts[start : start + len(batch)], scorers.are_finite(batch)
        scores = {name: scorers.score(scorer, batch.to(device), chunk) for name, scorer in measured_by.items()}
        scored[start] = experience.Scored(finite, scores)
    return scored


def measure(
    images: Tensor,
    prompts: Sequence[str],
    measured_by: Mapping[str, Scorer],
    batch_size: int = 128,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """The `means` of the scores of images (N, 3, H, W) by each of some scorers.

    Raises:
        RewardError: one failed or gave no finite score. DivergedError: no image is finite.
    """
    batches = dict(zip(range(0, len(images), batch_size), images.split(batch_size), strict=True))
    return means(experience.everyones_scores(score_share(batches, prompts, measured_by, device)), prompts)


def means(scores: Mapping[str, Tensor], prompts: Sequence[str]) -> dict[str, float]:
    """Mean of each of some scores (N,) for prompts, over the finite ones.

    For prompts of the tiny world also `alignment_exact`, the share of prompts that are fully right by `alignment`, over all
    and over those with common words only and with rare ones.

    Raises:
        RewardError: one is nowhere finite.
    """
    measures = {}
    for name, values in scores.items():
        if not values.isfinite().any():
            raise scorers.RewardError(f"reward: {name} gave no finite score for any of the held-out prompts")
        measures[name] = experience.finite_mean(values)
    if world.is_world(prompts):
        finite, exact = scores["alignment"].isfinite(), (scores["alignment"] == 1).float()
        rare = torch.tensor([world.has_rare_word(prompt) for prompt in prompts])
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
        self.shown = torch.linspace(0, len(prompts) - 1, min(16, len(prompts))).long().tolist()
        self.folder = output_dir / "grids"
        if processes.is_first():
            self.folder.mkdir(exist_ok=True)
        with setup.policy.base():
            self.base, self.base_images = self._draw_and_score()

    def measure(self, epoch: int) -> dict[str, float]:
        """Scores of the policy as it is now, the same in every process; writes the grid of base and tuned images."""
        measures, images = self._draw_and_score()
        if processes.is_first():
            columns = {"base": self._column(self.base_images), "tuned": self._column(images)}
            record.write_grid(self.folder / f"epoch_{epoch:04d}.png", [self.prompts[i] for i in self.shown], columns)
        return measures

    def _draw_and_score(self) -> tuple[dict[str, float], dict[int, Tensor]]:
        """Means of the reward, its parts and what is only measured; the shown images (3, H, W), in the first process only.

        Each process scores the images that it draws; what a guard decides by the means it decides in all of them.
        """
        reward = self.setup.reward
        scored, drawn = processes.agreed(self._draw_and_score_share)
        measures = means(experience.everyones_scores(scored), self.prompts)
        if self.config.reward not in reward.parts:
            measures = {self.config.reward: reward.combine_means(measures)} | measures
        return measures, {i: image for images in processes.to_first(drawn) for i, image in images.items()}

    def _draw_and_score_share(self) -> tuple[dict[int, experience.Scored], dict[int, Tensor]]:
        setup, prompts = self.setup, self.prompts
        images = draw_share(setup.policy, self.denoiser, prompts, self.config)
        scored = score_share(images, prompts, {**setup.reward.parts, **setup.eval_rewards}, setup.policy.models.device)
        rows = {start + i: image for start, batch in images.items() for i, image in enumerate(batch)}
        return scored, {i: rows[i].clone() for i in self.shown if i in rows}  # a row alone would be sent with its batch

    def _column(self, images: Mapping[int, Tensor]) -> Tensor:
        """The shown images (n, 3, H, W) of a grid."""
        return torch.stack([images[i] for i in self.shown])
