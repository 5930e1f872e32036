"""What an update learns from: an epoch's images, (image, step) pairs of them, and micro-batches of pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from texforce import sampler
from texforce.config import TrainConfig, rounds_by_batch, window_end
from texforce.pipelines import Conditioning


@dataclass(frozen=True)
class Batch:
    """One epoch's N images, as the update needs them: trajectories, advantages, and what was measured."""

    trajectory: sampler.Trajectory
    advantages: Tensor  # (N,) float32, 0 where nothing is to be learned
    rewards: Tensor  # (N,) float32, NaN where the sample was dropped
    parts: dict[str, Tensor]  # (N,) float32, the score of each part of the reward
    here: Tensor  # (n,) int64, which of the N images the trajectory holds: all of them, unless there are other processes

    @property
    def local_advantages(self) -> Tensor:
        """Of the trajectory's images (n,)."""
        return self.advantages[self.here.to(self.advantages.device)]

    def local_pairs(self, pairs: Tensor) -> Tensor:
        """Those of (image, step) pairs (M, 2) whose image is here, by its row in the trajectory."""
        rows = torch.full((len(self.advantages),), -1).scatter(0, self.here, torch.arange(len(self.here)))
        mine = torch.stack([rows[pairs[:, 0]], pairs[:, 1]], dim=1)
        return mine[mine[:, 0] >= 0].to(self.advantages.device)


def window(schedule: sampler.Schedule, config: TrainConfig) -> Tensor:
    """Indices of the steps that may be trained on: of the first timestep_window, those with a density and not shared.

    The last steps of a short schedule have a small deviation, so that their log-probability has a steep gradient, though
    they decide little of what an image shows: in a plain sum they drown the others in noise. On steps that a group shares,
    the advantages within it cancel out.
    """
    steps = schedule.trainable_steps
    return steps[(steps >= config.num_shared_steps) & (steps < window_end(config))]


def draw_pairs(advantages: Tensor, steps: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """(image, step) pairs (M, 2): of each image a fraction of the trainable steps, drawn without replacement.

    Images without advantage have no gradient and are left out, unless the KL term wants them.
    """
    num_steps = max(1, round(config.timestep_fraction * len(steps)))
    order = torch.rand(len(advantages), len(steps), generator=generator).argsort(dim=1)[:, :num_steps]
    wanted = torch.nonzero((advantages != 0).cpu() | (config.kl_weight > 0)).flatten()
    return torch.stack([wanted.repeat_interleave(num_steps), steps.cpu()[order[wanted]].flatten()], dim=1)


@dataclass(frozen=True)
class MicroBatch:
    """This process's (image, step) pairs (M, 2) that go through the U-Net at once; the first `number` are its own."""

    denoiser: sampler.Denoiser
    batch: Batch
    pairs: Tensor
    rows: Tensor  # (M,) of the prompts' embeddings
    number: int

    def means(self, embeds: Tensor) -> Tensor:
        """Of its own pairs' transitions (number, C, H, W)."""
        samples, steps = self.pairs.unbind(1)
        trajectory = self.batch.trajectory
        null_outputs = None if trajectory.null_outputs is None else trajectory.null_outputs[samples, steps]
        conditioning = Conditioning(embeds[self.rows], embeds[:1])
        return self.denoiser.mean(trajectory.latents[samples, steps], steps, conditioning, null_outputs)[0][: self.number]

    def log_probs(self, means: Tensor) -> Tensor:
        """Of what was sampled (number,), under transitions with these means."""
        samples, steps = self.own.unbind(1)
        return sampler.gaussian_log_prob(self.batch.trajectory.latents[samples, steps + 1], means, self.denoiser.std(steps))

    @property
    def own(self) -> Tensor:
        """The pairs (number, 2) that are learned from."""
        return self.pairs[: self.number]

    @property
    def num_unet_calls(self) -> int:
        """Of one pass; a branch of guidance each."""
        both = self.denoiser.guided and self.batch.trajectory.null_outputs is None
        return len(self.pairs) * (2 if both else 1)


def micro_batch(
    denoiser: sampler.Denoiser, batch: Batch, pairs: Tensor, rows: Tensor, start: int, size: int, config: TrainConfig
) -> MicroBatch:
    """The one of a size that begins at a place of local pairs (M, 2), whose prompts are rows (M,) of the embeddings.

    Where the rounding depends on a batch's size none is smaller: the last one is filled up with its own pairs. A compiled
    U-Net would be compiled anew for each smaller one.
    """
    number = min(size, len(pairs) - start)
    filled = denoiser.compiled or rounds_by_batch(config.mixed_precision, pairs.device.type)
    chunk = start + torch.arange(size if filled else number, device=pairs.device) % number
    return MicroBatch(denoiser, batch, pairs[chunk], rows[chunk], number)
