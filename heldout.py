"""Held-out prompts: the base model's images and scores, kept, and the tuned ones' against them.

Every policy draws them from the same noise. Read top to bottom: the images and scores of a run, drawing, scoring, means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from texforce import Policy

from . import detector, files, interrupts, models, processes, rewards, run, scorers, stages, world
from .config import TrainConfig
from .errors import RewardError
from .experience import Scored, finite_mean, gather_scores
from .measures import to_json, to_numpy
from .reward_specs import NO_REWARD
from .scorers import Scorer

if TYPE_CHECKING:
    from .training import Setup

# One noise for every run, so that figures of different seeds and settings compare; it depends on --sample-batch-size.
HELDOUT_SEED = 20_231_115


@dataclass(frozen=True)
class _Drawn:
    """What was drawn of N prompts, and measured."""

    means: dict[str, float]  # by measure: the reward, its parts, and the rewards that are only measured
    scores: dict[str, Tensor]  # (N,) each; of a mixture its parts
    images: dict[int, Tensor]  # that are shown, (3, H, W) each, in the first process only


class Heldout:
    """The held-out prompts: the base model's images and scores, kept, and the tuned ones' against them."""

    def __init__(self, setup: Setup, prompts: list[str], config: TrainConfig, name: str = "heldout") -> None:
        self.setup, self.prompts, self.config = setup, prompts, config
        self.name = name  # the key in MEASURED_ON that says which prompts are measured
        self.shown = torch.linspace(0, len(prompts) - 1, min(16, len(prompts))).long().tolist()
        self.folder = Path(config.output_dir, "grids")
        if processes.is_first():
            self.folder.mkdir(exist_ok=True)
        with setup.policy.base():
            drawn = self._draw_and_score()
        self.base = drawn
        self.frames = [run.frame(0, drawn.scores, drawn.images) | {"prompts": prompts}]  # lines of heldout.jsonl

    def take_up(self, frames: Sequence[dict[str, Any]], epoch: int) -> None:
        """Write heldout.jsonl, with what is there of a run up to an epoch, if that was measured like this one."""
        base = self.frames[0]

        def is_alike(old: dict[str, Any]) -> bool:
            same_names = all(old[name].keys() == base[name].keys() for name in ("scores", "images"))
            return same_names and all(len(values) == len(self.prompts) for values in old["scores"].values())

        if frames and frames[0].get("prompts") == self.prompts:
            self.frames += [old for old in frames[1:] if old["epoch"] <= epoch and is_alike(old)]
        files.write_lines(self.folder.parent / run.FRAMES, self.frames)

    def frames_until(self, epochs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The frames of epochs that are over, with the scores of a mixture in the units of now."""
        return [self._with_mixture(frame) for frame in self.frames if frame["epoch"] <= epochs[-1]["epoch"]]

    def _with_mixture(self, frame: dict[str, Any]) -> dict[str, Any]:
        scores = {name: torch.from_numpy(to_numpy(values)) for name, values in frame["scores"].items()}
        mixed = _with_mixture(scores, run.main_measure(self.config), self.setup.reward)
        return frame | {"scores": {name: to_json(values) for name, values in mixed.items()}}

    def measure(self, epoch: int) -> dict[str, float]:
        """Scores of the policy as it is now, the same in every process; writes the grid of base and tuned images."""
        drawn = self._draw_and_score()
        if processes.is_first():
            self._write_grid(epoch, drawn)
            self.frames.append(run.frame(epoch, drawn.scores, drawn.images))
            files.append_line(self.folder.parent / run.FRAMES, self.frames[-1])
        return drawn.means

    def _draw_and_score(self) -> _Drawn:
        """Draw and score the prompts with the policy as it is.

        Each process scores the images that it draws; what a guard decides by the means it decides in all of them.
        """
        reward = self.setup.reward
        scored, drawn = processes.agreed(self._draw_and_score_share)
        scores = gather_scores(scored).scores
        measures = means(scores, self.prompts)
        if self.config.reward not in (NO_REWARD, *reward.parts):
            measures = {self.config.reward: reward.combine_means(measures)} | measures
        return _Drawn(measures, scores, {i: image for images in processes.to_first(drawn) for i, image in images.items()})

    def _draw_and_score_share(self) -> tuple[dict[int, Scored], dict[int, Tensor]]:
        setup, prompts = self.setup, self.prompts
        images = draw_share(setup.policy, prompts, self.config.sample_batch_size)
        scored = score_share(images, prompts, {**setup.reward.parts, **setup.eval_rewards}, setup.policy.model.device)
        rows = {start + i: image for start, batch in images.items() for i, image in enumerate(batch)}
        return scored, {i: rows[i].clone() for i in self.shown if i in rows}  # a row alone would be sent with its batch

    def _write_grid(self, epoch: int, drawn: _Drawn) -> None:
        """The grid of base and tuned images, sorted by the change of the reward, the largest gain first."""
        both = {"base": self.base, "tuned": drawn}
        name, reward = run.main_measure(self.config), self.setup.reward
        scores = {system: _with_mixture(one.scores, name, reward)[name].tolist() for system, one in both.items()}
        changes = [tuned - base for base, tuned in zip(*scores.values(), strict=True)]
        order = sorted(self.shown, key=lambda i: -changes[i] if math.isfinite(changes[i]) else math.inf)
        run.write_grid(
            self.folder / f"epoch_{epoch:04d}.png",
            [self.prompts[i] for i in order],
            {system: torch.stack([one.images[i] for i in order]) for system, one in both.items()},
            {system: [values[i] for i in order] for system, values in scores.items()},
            f"{name} after epoch {epoch}, largest gain first",
        )


def _with_mixture(scores: Mapping[str, Tensor], name: str, reward: rewards.Mixture) -> dict[str, Tensor]:
    """Scores (N,) with those of a mixture, in the units of now, before those of its parts."""
    mixed = {} if name in scores else {name: reward.combine({part: scores[part] for part in reward.parts})}
    return {**mixed, **scores}


def draw_share(policy: Policy, prompts: Sequence[str], batch_size: int) -> dict[int, Tensor]:
    """One image (n, 3, H, W) in [0, 1] for each prompt of this process's batches, by the number of a batch's first prompt.

    They come from the same noise for every policy.
    """
    images = {}
    for start in range(0, len(prompts), batch_size):
        interrupts.check()
        stages.report("measuring", start, len(prompts))
        if processes.is_mine(start // batch_size):
            prompt_ids = models.tokenize_for(policy.model, prompts[start : start + batch_size]).to(policy.model.device)
            generator = torch.Generator(policy.model.device).manual_seed(HELDOUT_SEED + start)
            images[start] = policy.draw(prompt_ids, generator).cpu()
    stages.report("measuring", len(prompts), len(prompts))
    return images


def score_share(
    images: Mapping[int, Tensor],
    prompts: Sequence[str],
    measured_by: Mapping[str, Scorer],
    device: torch.device | str = "cpu",
) -> dict[int, Scored]:
    """Scores of batches of images (n, 3, H, W), by the number of a batch's first prompt, on a device as in training."""
    if world.is_world(prompts):
        measured_by = {**measured_by, "alignment": detector.alignment}
    scored, done, total = {}, 0, sum(map(len, images.values()))
    for start, batch in images.items():
        stages.report("scoring", done, total)
        chunk, finite = prompts[start : start + len(batch)], scorers.are_finite(batch)
        scores = {name: scorers.score(scorer, batch.to(device), chunk, name) for name, scorer in measured_by.items()}
        scored[start] = Scored(finite, scores)
        done += len(batch)
    stages.report("scoring", total, total)
    return scored


def means(scores: Mapping[str, Tensor], prompts: Sequence[str]) -> dict[str, float]:
    """Mean of each measure's scores (N,) for prompts, over the finite ones.

    For prompts of the tiny world also `alignment_exact`, the share of prompts that are fully right by `alignment`, over all
    and over those with common words only and with rare ones.

    Raises:
        RewardError: a measure is nowhere finite.
    """
    measures = {}
    for name, values in scores.items():
        if not values.isfinite().any():
            raise RewardError(f"reward: {name} gave no finite score for any of the prompts that are measured")
        measures[name] = finite_mean(values)
    if world.is_world(prompts):
        finite, exact = scores["alignment"].isfinite(), (scores["alignment"] == 1).float()
        rare = torch.tensor([world.has_rare_word(prompt) for prompt in prompts])
        for name, rows in (("", finite), ("_common", finite & ~rare), ("_rare", finite & rare)):
            if rows.any():
                measures[f"alignment_exact{name}"] = exact[rows].mean().item()
    return measures
