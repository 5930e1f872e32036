"""Base and tuned from the same noise: images of any prompts, and the measures on the held-out ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import texforce
from texforce import adapters, sampler
from texforce.config import default_device
from texforce.config_inference import SampleConfig

# One noise for every run, so that figures of different seeds and settings compare; it depends on --sample-batch-size.
HELDOUT_SEED = 20_231_115


def sample(config: SampleConfig, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Tensor]:
    """Images (N, 3, H, W) in [0, 1] of N prompts and seeds by a resolved configuration: `tuned`, and `base` for comparison.

    Raises:
        FileNotFoundError, ValueError: bad input. ArtifactError: a refused adapter. DivergedError: no image is finite.
    """
    adapters.check_inputs(config.adapter, config.unet)  # a mistyped folder must not wait for the model
    models = sampler.load_models(config.model, default_device(), getattr(torch, texforce.DTYPES[config.mixed_precision]))
    sampler.tokenize(models.tokenizer, prompts)
    terms = adapters.read_terms(config.adapter or (), models, config.scale)
    unet = adapters.read_unet(config.unet, models) if config.unet else adapters.TunedUNet({}, {})

    def draw(models: sampler.Models) -> Tensor:
        policy = texforce.Policy(models, config.null_prompt)
        schedule = sampler.ddim_schedule(models.scheduler, config.num_inference_steps, config.eta).to(models.device)
        denoiser = sampler.Denoiser(models.unet, schedule, config.guidance_scale, config.compile)
        return texforce.check_finite(
            sampler.sample_images(models, denoiser, prompts, seeds, config.batch_size, config.resolution, policy.null_embeds)
        )

    images = {}
    if config.compare or not (config.adapter or config.unet):
        images["base"] = draw(models)
    if config.adapter or config.unet:
        if unet.tensors:
            adapters.move_towards(models.unet, unet.tensors, config.unet_scale)
        images["tuned"] = draw(adapters.apply(models, adapters.fuse([*terms, (unet.adapter, config.unet_scale)])))
    return images
