"""Which steps and which prompts teach: `python benchmarks/gradient_agreement.py` (tiny model, reward hps, three minutes).

How far the gradients on LoRA agree that two halves of many images give, before the first update: the cosine between them.
Where it is about 0, the gradient is noise. First for one prompt at every denoising step, then for the first 64 training
prompts of each kind, 8 images each, at the steps that the default trains on.
"""

import argparse
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import texforce
from texforce import Batch, Share, experience, prompt_sets, training
from texforce.config import TrainOptions, resolve
from texforce.learner import Learner


class Probe:
    """The tiny model's default training before its first update."""

    def __init__(self, seed: int) -> None:
        self.config = resolve(TrainOptions(model="tiny", algorithm="ppo", seed=seed))
        setup = training.prepare(self.config)
        self.policy, self.reward = setup.policy, setup.reward
        self.noise = torch.Generator().manual_seed(seed)
        self.learner = Learner(self.policy.parameters, self.config)

    def collect(self, prompts: list[str], num_samples_per_prompt: int) -> Batch:
        config = replace(self.config, num_samples_per_prompt=num_samples_per_prompt)
        samples = experience.collect(self.policy, self.reward, prompts, config, self.noise)
        advantages = experience.compute_advantages(samples, config, experience.PromptStatistics())
        return texforce.make_batch(samples, advantages, self.config, self.policy.model.device)

    def gradient(self, batch: Batch, steps: list[int]) -> Tensor:
        """The gradient on LoRA of the loss of all images at the given steps."""
        pairs = torch.cartesian_prod(torch.arange(len(batch.rewards)), torch.tensor(steps))
        texforce.accumulate_gradients(self.policy, Share(batch, pairs, texforce.ppo_micro_batch), self.learner, self.config)
        gradient = torch.cat(
            [parameter.grad.flatten() for parameter in self.policy.parameters if parameter.grad is not None]
        )
        for parameter in self.policy.parameters:
            parameter.grad = None
        return gradient


def cosine(one: Tensor, other: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one, other, dim=0).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompt", default="a golden circle")
    parser.add_argument("--num-images", type=int, default=512, help="images of each half")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    probe = Probe(options.seed)
    num_steps = probe.config.num_inference_steps

    halves = [probe.collect([options.prompt], options.num_images) for _ in range(2)]
    table = Table("step", "cosine of the halves", "size", title=f"{options.prompt!r}, 2 x {options.num_images} images")
    for step in range(num_steps):
        one, other = (probe.gradient(half, [step]) for half in halves)
        table.add_row(f"{step + 1}", f"{cosine(one, other):.2f}", f"{(one + other).norm().item() / 2:.1e}")
    Console().print(table)

    steps = texforce.trainable_steps(probe.policy.denoiser.schedule, probe.config).tolist()
    table = Table("prompts", "cosine of the halves", title=f"each kind, 2 x {options.num_images} images, steps {steps}")
    for kind in prompt_sets.KINDS:
        prompts = prompt_sets.read_prompts(kind)[: options.num_images // 8]
        one, other = (probe.gradient(probe.collect(prompts, 8), steps) for _ in range(2))
        table.add_row(kind, f"{cosine(one, other):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
