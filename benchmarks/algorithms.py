"""What an image costs in each algorithm: `python benchmarks/algorithms.py --model tiny|sd15|sdxl|sd35 --json FILE`.

Every algorithm runs the epochs of `texforce train`, with its own defaults for the model where no option is given.
A compiled U-Net is compiled in a first epoch. The next epoch measures the memory of its update. The others are timed, and
each figure is their median. The sampling includes decoding and scoring; `gradient` samples in its update. The tiny model's
reward is `hps`. The others have random weights, so nothing is downloaded, and a reward that costs nothing.
"""

import argparse
import contextlib
import math
import operator
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import bench
import meters
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from texforce import files, models, prompt_sets, reward_specs, rewards, training
from texforce.config import (
    TrainConfig,
    TrainOptions,
    default_device,
    default_precision,
    resolve,
)
from texforce.run import Run

ALGORITHMS = ("ppo", "matching", "gradient")


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """The mean of each image (N, 3, H, W)."""
    return images.mean(dim=(1, 2, 3))


brightness.with_gradients = True
BRIGHTNESS = "benchmarks/algorithms.py:brightness"


def configure(algorithm: str, options: argparse.Namespace) -> TrainConfig:
    """The algorithm's training of the model, with what the options change.

    A prompt's group of images is smaller where its usual size does not divide the number of images.
    """
    named = {"model": bench.model_name(options.model), "algorithm": algorithm}
    usual = resolve(TrainOptions(**named))
    num_images = options.num_images or usual.num_prompts_per_epoch * usual.num_samples_per_prompt
    num_samples_per_prompt = math.gcd(num_images, usual.num_samples_per_prompt)
    num_steps = options.num_inference_steps or usual.num_inference_steps
    changes = ("resolution", "sample_batch_size", "micro_batch_size", "mixed_precision", "gradient_checkpointing", "compile")
    given = TrainOptions(
        **named,
        reward="hps" if options.model == "tiny" else BRIGHTNESS,
        num_prompts_per_epoch=num_images // num_samples_per_prompt,
        num_samples_per_prompt=num_samples_per_prompt,
        num_inference_steps=num_steps,
        backprop_steps=min(usual.backprop_steps, num_steps),
        **{name: getattr(options, name) for name in changes},
    )
    return resolve(given)


def begin(config: TrainConfig, options: argparse.Namespace) -> Run:
    """A run before its first epoch, with the bench's networks."""
    if config.reward == BRIGHTNESS:
        reward = rewards.Mixture({BRIGHTNESS: brightness}, {BRIGHTNESS: 1.0})
    else:
        reward = rewards.load_reward(config.reward, options.device, reward_specs.EMBEDDED_CHECKPOINTS)
    policy = bench.make_policy(options.model, options.device, config)
    return training.begin(training.Setup(policy, reward, {}), config, prompt_sets.read_prompts("world"))


@contextlib.contextmanager
def metered(algorithm: str, device: str) -> Iterator[dict[str, int]]:
    """Measure the memory of the update of train_epoch."""
    update = getattr(training, f"{algorithm}_update")
    peaks: dict[str, int] = {}

    def work(*arguments: Any) -> Any:
        updated: list[Any] = []
        torch.cuda.empty_cache()
        peaks["peak_memory_bytes"] = meters.peak_bytes(lambda: updated.append(update(*arguments)), device)
        peaks["held_memory_bytes"] = meters.held_bytes(device)
        return updated[0]

    with mock.patch.object(training, f"{algorithm}_update", work):
        yield peaks


def measure(algorithm: str, options: argparse.Namespace) -> dict[str, Any]:
    """The costs of an algorithm, as they go into the JSON file."""
    torch._dynamo.reset()  # so many graphs of one function are kept, and no more
    config = configure(algorithm, options)
    current = begin(config, options)
    epochs = (
        [training.train_epoch(current, config)] if current.policy.denoiser.compiled else []
    )  # compiling takes memory too
    with metered(algorithm, options.device) as memory:
        epochs.append(training.train_epoch(current, config))
    timed = [training.train_epoch(current, config) for _ in range(options.repeats)]
    seconds = [1 / epoch["images_per_s"] for epoch in timed]
    sampling = [each * epoch["sampling_share"] for each, epoch in zip(seconds, timed, strict=True)]
    results: dict[str, Any] = {
        "num_images": timed[0]["num_images"],
        "num_inference_steps": config.num_inference_steps,
        "seconds_per_image": statistics.median(seconds),
        "sampling_seconds_per_image": statistics.median(sampling),
        "update_seconds_per_image": statistics.median(map(operator.sub, seconds, sampling)),
        "images_per_s": 1 / statistics.median(seconds),
        "unet_calls_per_image": statistics.median(epoch["num_unet_calls"] / epoch["num_images"] for epoch in timed),
    }
    if algorithm == "ppo":
        results["ratio_deviation"] = max(epoch["max_ratio_deviation"] for epoch in [*epochs, *timed])
        results["clip_range"] = config.clip_range
    return results | memory | {"seconds": {"image": seconds, "sampling": sampling}, "config": asdict(config)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    epilog = "Options that are not given are the algorithm's defaults for the model."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None, epilog=epilog)
    parser.add_argument("--model", choices=("tiny", "sd15", "sdxl", "sd35"), default="tiny")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--num-images", type=int, help="of an epoch, an even number")
    parser.add_argument("--num-inference-steps", type=int)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--sample-batch-size", type=int)
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--mixed-precision", choices=tuple(models.DTYPES))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the U-Net (default: on CUDA)")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=3, help="epochs that are timed")
    options = parser.parse_args(arguments)
    if options.num_images and options.num_images % 2:  # ppo and matching learn nothing from groups of one image
        parser.error(f"--num-images must be even, not {options.num_images}")
    options.mixed_precision = options.mixed_precision or default_precision(bench.model_name(options.model), options.device)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    results: dict[str, Any] = bench.provenance(options) | {"algorithms": {}}
    for algorithm in options.algorithms:
        results["algorithms"][algorithm] = measure(algorithm, options)
        if options.json:  # before the next one can fail
            files.write_json(options.json, results)
    measured = results["algorithms"]
    table = Table("measure", *measured, title=f"{options.model} on {options.device}")
    for name, value in measured[options.algorithms[0]].items():
        if not isinstance(value, dict):
            table.add_row(name, *(f"{costs[name]:.4g}" if name in costs else "" for costs in measured.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
