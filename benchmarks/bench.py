"""Speed, memory and exactness against the textbook loop: `python benchmarks/bench.py --model tiny|sd15|sdxl --json FILE`.

`sd15` and `sdxl` are the published architectures with random weights, so nothing is downloaded. The textbook loop is that of
the released code (textbook.py). Before anything is timed, both must give the same images, log-probabilities and gradient for
the same noise. Ours and the textbook loop take turns; a ratio is the median over the turns, above 1 where ours is faster.
"""

import argparse
import copy
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

START = time.perf_counter()

import architectures  # noqa: E402
import meters  # noqa: E402
import textbook  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

import texforce  # noqa: E402
from texforce import Batch, Policy, Share, experience, models, run, sampler  # noqa: E402
from texforce.config import (  # noqa: E402
    STABLE_DIFFUSION,
    TrainConfig,
    TrainOptions,
    default_device,
    default_precision,
    resolve,
)
from texforce.learner import Learner  # noqa: E402

# Float32's rounding: the mean over the images, the largest over the log-probabilities, the gradient's relative norm.
DEVIATIONS = ("textbook_image_deviation", "textbook_log_prob_deviation", "textbook_gradient_deviation")
# Two steps with guidance enlarge the rounding of Stable Diffusion's U-Net: its gradient deviates by 1e-4.
TOLERANCES = {"cpu": (1e-4, 1e-3, 1e-3), "cuda": (1e-3, 1e-3, 1e-3)}
HALF_IMAGE_TOLERANCE = {"cpu": 0.01, "cuda": 0.002}  # mean; the gradients of random weights are lost in the rounding
CHECK_RESOLUTION, CHECK_STEPS = 256, 10
SWEEP = (4, 8, 16, 32, 64, 128, 256)  # sample batches
NO_LEARNING = 1e-30  # a learning rate that leaves the policy as it is, so that every turn does the same work


class KeptImages:
    """A reward that costs nothing and keeps the images that it is given."""

    captioner = None

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def score(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        self.images.append(images)
        return {"none": torch.arange(len(images), dtype=torch.float32)}

    def observe(self, parts: dict[str, Tensor]) -> None: ...

    def combine(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["none"]


class Bench:
    """A policy that samples and learns as a training's does, and the textbook loop over the same networks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.num_images = options.device, options.num_images
        self.preset_clip_range, self.config = configure(options)
        # Several prompts, even of few images: an update encodes other prompts at once than a batch of sampling does.
        self.group = min(math.gcd(self.num_images, self.config.num_samples_per_prompt), max(1, self.num_images // 4))
        self.prompts = [f"a red circle and {i // self.group} blue squares" for i in range(self.num_images)]
        self.policy = make_policy(options.model, self.device, self.config)
        self.learner = Learner(self.policy.parameters, self.config)
        policy, learner, config = self.policy, self.learner, self.config
        if options.textbook_precision not in (None, config.mixed_precision):
            config = replace(config, mixed_precision=options.textbook_precision, gradient_checkpointing=False)
            policy = make_policy(options.model, self.device, config)
            learner = Learner(policy.parameters, config)
        self.textbook, self.textbook_learner = textbook.Textbook(policy, config), learner

    def rollout(self, prompts: list[str], generator: Any, policy: Policy | None = None) -> tuple[Batch, Tensor]:
        """A batch as a training has it, with advantages of 1 and -1, and the images."""
        reward: Any = KeptImages()
        config = replace(self.config, num_samples_per_prompt=1)
        samples = experience.collect(policy or self.policy, reward, prompts, config, generator)
        advantages = 1.0 - 2.0 * (torch.arange(len(prompts)) % 2)
        return texforce.make_batch(samples, advantages, self.config, torch.device(self.device)), torch.cat(reward.images)

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)

    def our_rollout(self) -> Batch:
        return self.rollout(self.prompts, self.generator())[0]

    def our_update(self, batch: Batch) -> texforce.UpdateStatistics:
        done = texforce.ppo_update(self.policy, batch, self.learner, self.config, torch.Generator().manual_seed(0))
        if done.num_pairs != batch.trajectory.timesteps.numel():
            raise RuntimeError(f"the update took {done.num_pairs} pairs, not all {batch.trajectory.timesteps.numel()}")
        return done

    def our_gradients(
        self,
        batch: Batch,
        pairs: Tensor,
        scaler: Any,
        micro_batch_size: int | None = None,
        policy: Policy | None = None,
    ) -> None:
        learner: Any = SimpleNamespace(scaler=scaler, micro_batch_size=micro_batch_size or self.config.micro_batch_size)
        texforce.accumulate_gradients(
            policy or self.policy, Share(batch, pairs, texforce.ppo_micro_batch), learner, self.config
        )

    def textbook_update(self, batch: Batch, num_images: int | None = None) -> None:
        learner, prompts = self.textbook_learner, self.prompts[:num_images]
        self.textbook.accumulate_gradients(batch, prompts, learner.scaler)
        learner.step()

    def first_step(self) -> None:
        """One step of sampling, of one sample batch; the first one compiles."""
        prompts = self.prompts[: self.config.sample_batch_size]
        prompt_ids = models.tokenize_for(self.policy.model, prompts).to(self.device)
        shape = (len(prompts), *self.policy.latent_shape)
        steps = torch.zeros(len(prompts), dtype=torch.int64, device=self.device)
        with torch.no_grad():
            conditioning, noise = self.policy.conditioning(prompt_ids), torch.randn(shape, device=self.device)
            self.policy.denoiser.step(noise, steps, conditioning, noise)


def model_name(model: str) -> str:
    """The name of the model whose defaults are taken."""
    large = {"sdxl": "stabilityai/stable-diffusion-xl-base-1.0", "sd35": "stabilityai/stable-diffusion-3.5-medium"}
    return ({"tiny": "tiny", "sd15": STABLE_DIFFUSION} | large)[model]


def configure(options: argparse.Namespace) -> tuple[float, TrainConfig]:
    """The preset's clip range, and its training with what the options change: on all steps, in one optimizer step.

    That step changes nothing, and the clip range of the training clips nothing.
    """
    changes = ("num_inference_steps", "resolution", "micro_batch_size", "sample_batch_size", "null_prompt", "compile")
    given = TrainOptions(
        model=model_name(options.model),
        algorithm="ppo",
        mixed_precision=options.mixed_precision,
        gradient_checkpointing=options.gradient_checkpointing,
        timestep_window=1.0,
        timestep_fraction=1.0,
        num_updates_per_epoch=1,
        lr_warmup_steps=0,
        lr_scheduler="constant",
        learning_rate=NO_LEARNING,
        **{name: getattr(options, name) for name in changes},
    )
    config = resolve(given)
    return config.clip_range, replace(config, clip_range=textbook.CLIP_RANGE)


def make_policy(model: str, device: str, config: TrainConfig) -> Policy:
    """A policy with LoRA that is not zero any more, so that all of it has a gradient."""
    policy = texforce.make_policy(architectures.build(model, device, config.mixed_precision), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters:
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy


def with_denoiser(policy: Policy, **changes: Any) -> Policy:
    """The same policy with another denoiser: a copy with some changes, that compiles its U-Net anew."""
    other = copy.copy(policy)
    other.denoiser = replace(policy.denoiser, **changes)
    return other


# --- what is measured ---


def verify(options: argparse.Namespace, bench: Bench) -> dict[str, float]:
    """Check that both loops do the same work: the same images, log-probabilities and gradient from the same noise.

    Where rounding would hide a difference, a float32 copy that is not compiled is checked, on few and small images; of the
    loops that are timed only the images are checked then.

    Raises:
        RuntimeError: they differ by more than rounding does.
    """
    if options.device == "cpu" and options.mixed_precision == options.textbook_precision == "no":
        return check(deviations(bench), TOLERANCES["cpu"])
    exact = {"mixed_precision": "no", "textbook_precision": "no", "compile": False}
    exact |= {"num_images": min(options.num_images, 2 * textbook.BATCH)}
    if options.model != "tiny":
        exact |= {"resolution": min(options.resolution or CHECK_RESOLUTION, CHECK_RESOLUTION)}
        exact |= {"num_inference_steps": min(options.num_inference_steps, CHECK_STEPS)}
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    results = check(deviations(Bench(argparse.Namespace(**vars(options) | exact))), TOLERANCES[options.device])
    torch.backends.cudnn.allow_tf32 = tf32
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    timed = check(deviations(bench, gradient=False), (HALF_IMAGE_TOLERANCE[options.device], math.inf))
    return results | {f"timed_{name}": value for name, value in timed.items()}


def deviations(bench: Bench, gradient: bool = True) -> dict[str, float]:
    """How far the textbook loop and ours are apart, on the first images: a few, or a batch where others must be compiled."""
    few = bench.config.sample_batch_size if bench.policy.denoiser.compiled else 2 * textbook.BATCH
    num_images = min(bench.num_images, bench.config.sample_batch_size, few)
    prompts = bench.prompts[:num_images]
    ours, theirs = ([torch.Generator(bench.device).manual_seed(i) for i in range(num_images)] for _ in range(2))
    batch, images = bench.rollout(prompts, ours)
    their_images, _ = bench.textbook.rollout(prompts, theirs)
    their_log_probs = bench.textbook.log_probs(batch, prompts)  # of our latents: each loop's own depend on its noise only
    values = [(images - their_images).abs().mean(), (batch.trajectory.log_probs - their_log_probs).abs().max()]
    if gradient:
        our_gradient = scaled_gradient(bench.policy, lambda scaler: bench.our_gradients(batch, all_pairs(batch), scaler))
        their_gradient = scaled_gradient(
            bench.textbook.policy, lambda scaler: bench.textbook.accumulate_gradients(batch, prompts, scaler)
        )
        values.append((our_gradient - their_gradient).norm() / their_gradient.norm())
    return {name: value.item() for name, value in zip(DEVIATIONS, values, strict=False)}


def check(found: dict[str, float], limits: tuple[float, ...]) -> dict[str, float]:
    """The deviations found, if they are within the limits."""
    if not all(math.isfinite(value) and value <= limit for value, limit in zip(found.values(), limits, strict=True)):
        raise RuntimeError(f"the textbook loop and ours are not the same: {found}; at most {limits} is allowed")
    return found


def all_pairs(batch: Batch) -> Tensor:
    num_images, num_steps = batch.trajectory.timesteps.shape
    return torch.cartesian_prod(torch.arange(num_images), torch.arange(num_steps))


def scaled_gradient(policy: Policy, work: Callable[[torch.amp.GradScaler], None]) -> Tensor:
    """The gradient on LoRA that the work leaves; in float16 at the largest of some loss scales that it does not overflow."""
    half = policy.model.dtype == torch.float16
    for scale in (2.0**16, 2.0**12, 2.0**8):
        work(torch.amp.GradScaler("cuda", init_scale=scale, enabled=half))
        gradient = torch.cat([parameter.grad.flatten() for parameter in policy.parameters if parameter.grad is not None])
        for parameter in policy.parameters:
            parameter.grad = None
        if not half or gradient.isfinite().all():
            break
    return gradient / scale if half else gradient


def take_turns(bench: Bench, repeats: int) -> dict[str, list[float]]:
    """Seconds of each loop's rollout and update, in turns; with several repeats after one that does not count."""
    batch = bench.our_rollout()
    bench.our_update(batch)  # an update's first backward pass may compile too
    works = {
        "rollout": bench.our_rollout,
        "textbook_rollout": lambda: bench.textbook.rollout(bench.prompts, bench.generator()),
        "update": lambda: bench.our_update(batch),
        "textbook_update": lambda: bench.textbook_update(batch),
    }
    turns = [
        {name: meters.seconds(work, bench.device) for name, work in works.items()} for _ in range(repeats + (repeats > 1))
    ]
    return {name: [turn[name] for turn in turns[-repeats:]] for name in works}


def memory(bench: Bench, ours_alone: bool = False) -> dict[str, float]:
    """Peaks of the update as it is timed, with the textbook loop's micro-batch, and of the textbook loop.

    Every image with one of its steps is enough: no loop holds more than one micro-batch, and ours every distinct prompt.
    On a GPU also what the process holds in all, weights included, as an update and as a rollout runs.
    """
    batch = bench.our_rollout()
    pairs = torch.stack(
        [torch.arange(bench.num_images), torch.arange(bench.num_images) % bench.config.num_inference_steps], 1
    )
    scalers = [torch.amp.GradScaler("cuda", enabled=bench.config.mixed_precision == "fp16") for _ in range(2)]
    prompts = bench.prompts[: textbook.BATCH]
    works = {
        "peak_memory_bytes": lambda: bench.our_gradients(batch, pairs, scalers[0]),
        "rollout_peak_memory_bytes": bench.our_rollout,
    }
    if not ours_alone:
        works["textbook_peak_memory_bytes"] = lambda: bench.textbook.accumulate_gradients(batch, prompts, scalers[1])
    if not bench.policy.denoiser.compiled:  # else another graph would have to be made
        works["equal_micro_batch_peak_memory_bytes"] = lambda: bench.our_gradients(batch, pairs, scalers[0], textbook.BATCH)
    peaks: dict[str, float] = {}
    for name, work in works.items():
        for policy in (bench.policy, bench.textbook.policy):
            for parameter in policy.parameters:
                parameter.grad = None
        if bench.device == "cuda":
            torch.cuda.empty_cache()
        peaks[name] = meters.peak_bytes(work, bench.device)
        peaks[name.replace("peak_memory", "held_memory")] = meters.held_bytes(bench.device)
    if not ours_alone:
        peaks["peak_memory_ratio"] = peaks["peak_memory_bytes"] / peaks["textbook_peak_memory_bytes"]
    return peaks


def measure_ours(bench: Bench) -> dict[str, Any]:
    """Exactness, memory and speed without the textbook loop, after one rollout and update that do not count."""
    bench.our_update(bench.our_rollout())
    batches: list[Batch] = []
    rollout = meters.seconds(lambda: batches.append(bench.our_rollout()), bench.device)
    update = meters.seconds(lambda: bench.our_update(batches[0]), bench.device)
    rates = {"images_per_s": bench.num_images / rollout, "pairs_per_s": batches[0].trajectory.timesteps.numel() / update}
    return rates | exactness(bench) | memory(bench, ours_alone=True) | {"config": asdict(bench.config)}


def exactness(bench: Bench) -> dict[str, Any]:
    """How far the ratio is from 1 before an update, and the clip range that the preset would hold it to."""
    deviation = bench.our_update(bench.our_rollout()).first_ratio_deviation
    return {"ratio_deviation": deviation, "clip_range": bench.preset_clip_range}


def count_flops(bench: Bench) -> tuple[float, float]:
    """FLOPs of one rollout and of one update; counted on some images, as written-out attention is large."""
    prompts = bench.prompts[: min(bench.num_images, 2 * textbook.BATCH)]
    eager = with_denoiser(bench.policy, compile=False, text_trained=None)  # its rollouts keep no activations
    some = bench.rollout(prompts, bench.generator(), eager)[0]
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    share = bench.num_images / len(prompts)
    rollout = meters.flops(lambda: bench.rollout(prompts, bench.generator(), eager))
    # Decoding runs in a thread, where FLOPs are not counted.
    rollout += meters.flops(lambda: sampler.decode(bench.policy.model.vae, some.trajectory.latents[:, -1]))
    update = meters.flops(lambda: bench.our_gradients(some, all_pairs(some), scaler, 1, eager))
    for parameter in bench.policy.parameters:
        parameter.grad = None
    return share * rollout, share * update


def fresh_start(device: str) -> float:
    """Seconds of a new process that imports everything and loads the tiny model."""
    code = f"from texforce import models; import diffusers, transformers, peft; models.load_model('tiny', {device!r})"
    command = [sys.executable, "-c", f"import texforce; {code}"]
    return meters.seconds(lambda: subprocess.run(command, check=True, cwd=Path(__file__).parents[1]), "cpu")  # noqa: S603


def sweep(bench: Bench, repeats: int) -> dict[str, float | None]:
    """Images/s of rollouts by sample batch; None where memory ends."""
    rates: dict[str, float | None] = {}
    for size in SWEEP:
        torch._dynamo.reset()  # so many graphs of one function are kept, and no more
        policy, prompts = with_denoiser(bench.policy), [bench.prompts[i % bench.num_images] for i in range(size)]
        bench.config = replace(bench.config, sample_batch_size=size)
        try:
            work = lambda: bench.rollout(prompts, bench.generator(), policy)  # noqa: B023, E731
            work()
            rates[str(size)] = size / min(meters.seconds(work, bench.device) for _ in range(repeats))
        except torch.OutOfMemoryError:
            rates[str(size)] = None
            break
    return rates


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as it goes into the JSON file."""
    bench = Bench(options)
    bench.first_step()
    meters.synchronize(options.device)
    startup = fresh_start(options.device) if options.model == "tiny" else time.perf_counter() - START
    if options.sweep:
        return {"startup_seconds": startup, "sweep_images_per_s": sweep(bench, options.repeats)}
    if options.ours_alone:
        return {"startup_seconds": startup} | measure_ours(bench)
    results: dict[str, Any] = {"startup_seconds": startup} | verify(options, bench)
    turns = take_turns(bench, options.repeats)
    middle = {name: statistics.median(values) for name, values in turns.items()}
    num_images, num_steps = bench.num_images, bench.config.num_inference_steps
    rate = meters.matrix_rate(options.device, options.mixed_precision)
    rollout_flops, update_flops = count_flops(bench)
    results |= {
        "rollout_ratio": median_ratio(turns["textbook_rollout"], turns["rollout"]),
        "update_ratio": median_ratio(turns["textbook_update"], turns["update"]),
        "images_per_s": num_images / middle["rollout"],
        "textbook_images_per_s": num_images / middle["textbook_rollout"],
        "unet_calls_per_s": 2 * num_images * num_steps / middle["rollout"],
        "textbook_unet_calls_per_s": 2 * num_images * num_steps / middle["textbook_rollout"],
        "update_images_per_s": num_images / middle["update"],
        "textbook_update_images_per_s": num_images / middle["textbook_update"],
        "pairs_per_s": num_images * num_steps / middle["update"],
        "textbook_pairs_per_s": num_images * num_steps / middle["textbook_update"],
        "matrix_rate": rate,
        "matrix_rate_share": rollout_flops / middle["rollout"] / rate,
        "update_matrix_rate_share": update_flops / middle["update"] / rate,
        "rollout_flops": rollout_flops,
        "update_flops": update_flops,
    }
    return results | exactness(bench) | memory(bench) | {"seconds": turns, "config": asdict(bench.config)}


def median_ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(slow, fast, strict=True))


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    machine = torch.cuda.get_device_name() if options.device == "cuda" else meters.processor()
    return {
        "command": " ".join(sys.argv),
        "commit": run.commit(),
        "torch": torch.__version__,
        "machine": machine,
        "num_threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--model", choices=("tiny", "sd15", "sdxl"), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--num-images", type=int, help="default: 128 for tiny, 4 on a CPU, else 16")
    parser.add_argument("--num-inference-steps", type=int, help="default: 8 for tiny, 2 on a CPU, else 10")
    parser.add_argument("--sample-batch-size", type=int)
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--mixed-precision", choices=tuple(models.DTYPES), help="default: the training's")
    parser.add_argument(
        "--textbook-precision", choices=tuple(models.DTYPES), help="default: the same, but no for sd15 on a CPU"
    )
    parser.add_argument("--compile", action=switch, help="our U-Net (default: on CUDA)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in our update")
    parser.add_argument("--null-prompt", choices=("adapted", "base"), help="default: the preset's")
    parser.add_argument("--repeats", type=int, help="default: 3, but 1 for the large models on a CPU")
    parser.add_argument("--ours-alone", action="store_true", help="exactness, memory and speed without the textbook loop")
    parser.add_argument("--sweep", action="store_true", help="only images/s of rollouts by sample batch")
    options = parser.parse_args(arguments)
    small, cpu = options.model == "tiny", options.device == "cpu"
    options.num_images = options.num_images or (128 if small else 4 if cpu else 16)
    options.num_inference_steps = options.num_inference_steps or (8 if small else 2 if cpu else 10)
    options.resolution = options.resolution or (None if small or not cpu else 256)
    options.mixed_precision = options.mixed_precision or default_precision(model_name(options.model), options.device)
    options.textbook_precision = options.textbook_precision or (
        "no" if cpu and options.model == "sd15" else options.mixed_precision
    )
    options.repeats = options.repeats or (1 if cpu and not small else 3)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    results = measure(options) | provenance(options)
    table = Table("measure", "value", title=f"{options.model} on {options.device}")
    for name, value in results.items():
        if not isinstance(value, dict):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    for size, rate in results.get("sweep_images_per_s", {}).items():
        table.add_row(f"images/s, sample batch {size}", "out of memory" if rate is None else f"{rate:.4g}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
