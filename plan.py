"""What a run will do and need, without training: `texforce train --dry-run`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import texforce
from texforce import batches, experience, pipelines, record, sampler, training
from texforce.config import TrainConfig
from texforce.learner import finds_micro_batch
from texforce.prompt_sets import split_prompts


def plan(config: TrainConfig, go_on: bool = False) -> dict[str, Any]:
    """Counts and memory (MiB) of a run of a resolved configuration, which `go_on` may find in its output folder.

    Raises:
        What `training.train` raises before it samples.
    """
    record.check_folder(config.output_dir, go_on)
    train_prompts, heldout_prompts = split_prompts(config)
    setup = training.prepare(config)
    policy, denoiser = setup.policy, setup.denoiser
    models, num_images = policy.models, config.num_prompts_per_epoch * config.num_samples_per_prompt
    training.check_prompts(policy, config, train_prompts + heldout_prompts)
    branches = 2 if denoiser.guided else 1
    num_steps = max(1, round(config.timestep_fraction * len(batches.window(denoiser.schedule, config))))
    update_branches = (branches if policy.null_embeds is None else 1) * (2 if texforce.wants_kl(config) else 1)
    num_update_calls = config.num_inner_epochs * num_images * num_steps * update_branches
    weights = sum(
        tensor.numel() * tensor.element_size()
        for part in (*models.policy_parts.values(), models.vae)
        for tensor in part.parameters()
    )
    latents = math.prod(pipelines.latent_shape(models, config.resolution)) * 4
    kept = config.num_inference_steps * (2 if policy.null_embeds is not None and denoiser.guided else 1) + 1
    num_distinct = min(config.num_prompts_per_epoch, num_images // config.num_updates_per_epoch, len(train_prompts))
    num_pairs = num_images * num_steps / config.num_updates_per_epoch
    if finds_micro_batch(config, models.device):
        config = replace(config, micro_batch_size=config.sample_batch_size)
    unet, text_encoder = activation_bytes(policy, denoiser, config, num_distinct)
    return {
        "model": config.model,
        "device": str(models.device),
        "trained parameters": sum(parameter.numel() for parameter in policy.parameters),
        "prompts": f"{len(train_prompts)} for training, {len(heldout_prompts)} held out",
        "images an epoch": f"{num_images} ({config.num_prompts_per_epoch} prompts x {config.num_samples_per_prompt})",
        "images in all": num_images * config.num_epochs,
        "images an optimizer step": num_images / config.num_updates_per_epoch,
        "(image, step) pairs an optimizer step": num_pairs,
        "U-Net calls an epoch": experience.num_unet_calls(denoiser, config) + num_update_calls,
        "weights, MiB": mebibytes(weights),
        "trajectories, MiB": mebibytes(num_images * latents * kept),
        "U-Net activations of a micro-batch, MiB": mebibytes(unet),
        "text encoder activations, MiB": mebibytes(text_encoder),
    }


def mebibytes(num_bytes: int) -> float:
    return round(num_bytes / 2**20, 1)


def activation_bytes(
    policy: texforce.Policy, denoiser: sampler.Denoiser, config: TrainConfig, num_prompts: int
) -> tuple[int, int]:
    """Bytes that autograd keeps in an update: of the U-Net for a micro-batch, of the text encoder for distinct prompts.

    Both are measured on one row and multiplied.
    """
    models = policy.models
    latents = torch.zeros(1, *pipelines.latent_shape(models, config.resolution), device=models.device)
    prompt_ids = pipelines.tokenize_for(models, [""]).to(models.device)
    embeds = pipelines.encode(models, prompt_ids).detach().requires_grad_()
    conditioning = pipelines.Conditioning(embeds, embeds)
    null_outputs = latents if policy.null_embeds is not None and denoiser.guided else None
    steps = torch.zeros(1, dtype=torch.long, device=models.device)
    denoiser = replace(denoiser, compile=False)  # what a compiled one keeps is less
    unet = saved_bytes(models, lambda: denoiser.mean(latents, steps, conditioning, null_outputs))
    text_encoder = saved_bytes(models, lambda: pipelines.encode(models, prompt_ids))
    num_null = int(policy.null_embeds is None and not models.zero_null)
    return config.micro_batch_size * unet, (num_prompts + num_null) * text_encoder


def saved_bytes(models: pipelines.Models, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of a forward pass for the backward one; weights do not count."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    for part in models.policy_parts.values():
        for tensor in part.parameters():
            kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())
