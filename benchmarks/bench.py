"""Speed, memory and exactness of sampling and updating: `python benchmarks/bench.py --model tiny|sd15 --device cpu|cuda`.

`sd15` is Stable Diffusion 1.5's architecture with random weights, so nothing is downloaded. Prints a table; --json FILE
writes it. What is measured: rollouts (images/s, U-Net calls/s), the update ((image, step) pairs/s), what autograd keeps at
most, for more and more images and steps, the ratio's deviation before the first update, and how far the compiled step is
from the plain one.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import texforce
from texforce import sampler

SD15_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "layers_per_block": 2,
}
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
SD15_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SD15_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def sd15(device: str, dtype: torch.dtype) -> sampler.Models:
    """Stable Diffusion 1.5 with random weights; prompts are read by the tiny model's tokenizer."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(sampler.TINY / "tokenizer", model_max_length=77)
    text_config = CLIPTextConfig(**SD15_TEXT, eos_token_id=tokenizer.eos_token_id)
    parts = {
        "text_encoder": CLIPTextModel(text_config),
        "unet": UNet2DConditionModel(**SD15_UNET),
        "vae": AutoencoderKL(**SD15_VAE),
    }
    for part in parts.values():
        part.requires_grad_(False).eval().to(device, dtype)
    if device == "cuda":
        parts["unet"].to(memory_format=torch.channels_last)
    return sampler.Models("sd15", tokenizer, scheduler=DDIMScheduler(**SD15_SCHEDULER), **parts)


def timed(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Seconds of one call, the best of some after a warm-up."""
    work()
    best = math.inf
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


class Bench:
    """A policy, its denoiser, and batches to measure with."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = options.device
        precision = options.mixed_precision or ("fp16" if self.device == "cuda" else "no")
        dtype = getattr(torch, texforce.DTYPES[precision])
        models = sd15(self.device, dtype) if options.model == "sd15" else sampler.load_models("tiny", self.device, dtype)
        self.config = texforce.resolve(
            texforce.TrainConfig(
                model="tiny" if options.model == "tiny" else texforce.config.STABLE_DIFFUSION,
                num_inference_steps=options.num_inference_steps,
                resolution=options.resolution,
                micro_batch_size=options.micro_batch_size,
                mixed_precision=precision,
                gradient_checkpointing=options.gradient_checkpointing,
                timestep_fraction=1.0,
                compile=False,
            )
        )
        self.policy, self.denoiser = texforce.make_policy(models, self.config)
        self.learner = texforce.Learner(self.policy.parameters, self.config)

    def with_steps(self, num_steps: int) -> sampler.Denoiser:
        schedule = sampler.ddim_schedule(self.policy.models.scheduler, num_steps, 1.0).to(self.policy.models.device)
        return replace(self.denoiser, schedule=schedule)

    def rollout(self, num_images: int, denoiser: sampler.Denoiser) -> sampler.Trajectory:
        models = self.policy.models
        prompts = [f"a red circle and {i % 4} blue squares" for i in range(num_images)]  # groups of a few prompts
        prompt_ids = sampler.tokenize(models.tokenizer, prompts).to(models.device)
        with torch.no_grad():
            conditioning = self.policy.conditioning(prompt_ids)
        generator = torch.Generator(models.device).manual_seed(0)
        shape = sampler.latent_shape(models, self.config.resolution)
        keep = self.config.null_prompt == "base"
        return sampler.rollout(denoiser, prompt_ids, conditioning, shape, generator, keep)

    def gradients(self, trajectory: sampler.Trajectory, micro_batch_size: int | None = None) -> texforce.UpdateStatistics:
        num_images, num_steps = trajectory.timesteps.shape
        advantages = torch.linspace(-1, 1, num_images, device=trajectory.latents.device)
        batch = texforce.Batch(trajectory, advantages, advantages)
        pairs = torch.cartesian_prod(torch.arange(num_images), torch.arange(num_steps))
        denoiser = self.with_steps(num_steps)
        config = replace(self.config, micro_batch_size=micro_batch_size or self.config.micro_batch_size)
        statistics = texforce.accumulate_gradients(self.policy, denoiser, batch, pairs, config, self.learner.scaler)
        self.learner.optimizer.zero_grad()
        return statistics

    def peak_bytes(self, num_images: int, num_steps: int, micro_batch_size: int) -> int:
        """What the update holds at most, beyond what is there before it: memory on CUDA, tensors kept by autograd else."""
        trajectory = self.rollout(num_images, self.with_steps(num_steps))
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.gradients(trajectory, micro_batch_size)
            return torch.cuda.max_memory_allocated() - before
        live: dict[int, int] = {}
        peak = 0

        class Kept:
            def __init__(self, tensor: torch.Tensor) -> None:
                nonlocal peak
                self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
                live[id(self)] = self.size
                peak = max(peak, sum(live.values()))

            def __del__(self) -> None:
                live.pop(id(self), None)

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            self.gradients(trajectory, micro_batch_size)
        return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=("tiny", "sd15"), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=texforce.default_device())
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--num-inference-steps", type=int, default=10)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--mixed-precision", choices=tuple(texforce.DTYPES))
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="also measure the compiled step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench = Bench(options)
    num_images, num_steps = options.num_images, options.num_inference_steps
    calls = num_images * num_steps * (2 if bench.denoiser.guided else 1)

    seconds = timed(lambda: bench.rollout(num_images, bench.denoiser), options.device, options.repeats)
    trajectory = bench.rollout(num_images, bench.denoiser)
    deviation = bench.gradients(trajectory).ratio_deviation
    update_seconds = timed(lambda: bench.gradients(trajectory), options.device, options.repeats)
    sizes = [(4, 2), (8, 2), (8, 4), (16, 4)] if options.model == "tiny" else [(1, 2), (2, 2), (2, 4)]
    smallest = math.prod(sizes[0])  # as the micro-batch, so that each size fills it
    results: dict[str, Any] = {
        "rollout_images_per_s": num_images / seconds,
        "rollout_unet_calls_per_s": calls / seconds,
        "update_pairs_per_s": num_images * num_steps / update_seconds,
        "ratio_deviation_before_first_update": deviation,
        "peak_bytes_of_update": {f"{n} images x {t} steps": bench.peak_bytes(n, t, smallest) for n, t in sizes},
    }
    if options.compile if options.compile is not None else options.device == "cuda":
        compiled = replace(bench.denoiser, compile=True)
        fused = bench.rollout(num_images, compiled)
        results["compiled_images_per_s"] = num_images / timed(
            lambda: bench.rollout(num_images, compiled), options.device, options.repeats
        )
        results["compiled_deviation"] = (fused.latents - trajectory.latents).abs().max().item()
    processor = platform.processor() or platform.machine()
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{processor} x{torch.get_num_threads()}"
    results |= {"machine": where, "torch": torch.__version__, "options": {k: str(v) for k, v in vars(options).items()}}
    table = Table("measure", "value", title=f"{options.model} on {options.device}")
    for name, value in results.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
