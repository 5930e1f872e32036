"""The plan of a training, by `texforce train --dry-run`: its counts and its memory, with nothing trained.

Read top to bottom: the plan, counts of calls, bytes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from texforce import Policy, learns_from_captions_alone, trainable_steps, wants_kl

from . import models, rewards, run, tokenization
from .config import TrainConfig, TrainOptions, default_device, resolve, specs_of
from .experience import num_rollout_calls
from .learner import finds_micro_batch
from .options import FLOW_SAMPLERS
from .prompt_sets import check_judged, read_run_prompts
from .reward_specs import checkpoints_for, functions_of, missing_weights, parse_mixture
from .training import check_prompts, load_policy

ITEMS = {"ppo": "step", "matching": "noise level", "gradient": "sample"}  # what an image is trained on, by algorithm


def plan(config: TrainConfig) -> dict[str, Any]:
    """Counts and memory (in MB, 1e6 bytes) of a run of a resolved configuration, by `texforce train --dry-run`; no training.

    The file of a reward function is not executed, the output folder is not looked at, and neither the weights of Stable
    Diffusion nor those of a scorer are fetched.

    Raises:
        What `train` raises before it samples, but for what the output folder or the file of a reward function would.
    """
    prompts = read_run_prompts(config)
    check_judged(config, prompts)
    policy = load_policy(config, may_outline=True)
    fetched = [config.model] if policy.model.device.type == "meta" else []
    fetched += _load_scorers(config)
    device = default_device() if fetched and fetched[0] == config.model else str(policy.model.device)
    cut = check_prompts(policy, prompts)
    num_images = config.num_prompts_per_epoch * config.num_samples_per_prompt
    num_items, num_images_a_step = _items_per_image(policy, config), num_images / config.num_updates_per_epoch
    num_distinct = min(config.num_prompts_per_epoch, num_images // config.num_updates_per_epoch, len(prompts.train))
    if config.relabel:
        num_distinct = max(num_distinct, math.ceil(num_images_a_step))  # captions, which are encoded after the prompts
    if finds_micro_batch(config, torch.device(device)):
        config = replace(config, micro_batch_size=config.sample_batch_size)
    update_calls = _calls_per_update(policy, config)
    network = "U-Net" if policy.model.unet is not None else "transformer"
    return {
        "model": config.model,
        "device": device,
        **({"to be fetched": ", ".join(fetched)} if fetched else {}),
        **_trained_parts(policy, config),
        "trained parameters": sum(parameter.numel() for parameter in policy.parameters),
        "prompts": f"{len(prompts.train)} for training, {len(prompts.heldout) or 'none'} held out"
        + (f", {len(cut.prompts)} cut to {cut.num_tokens} tokens" if cut.prompts else "")
        + (f", read in {policy.model.num_chunks} chunks" if policy.model.num_chunks > 1 else ""),
        "images an epoch": f"{num_images} ({config.num_prompts_per_epoch} prompts x {config.num_samples_per_prompt})",
        "images in all": num_images * config.num_epochs,
        "images an optimizer step": f"{num_images_a_step:g}",
        f"(image, {ITEMS[config.algorithm]}) pairs an optimizer step": f"{num_images_a_step * num_items:g}",
        f"{network} calls an epoch": _calls_per_epoch(policy, config),
        f"{network} calls in all": _calls_per_epoch(policy, config) * config.num_epochs,
        **({f"{network} calls for captions an epoch, at most": update_calls} if config.relabel else {}),
        **_ppo_beside(policy, config, network),
        "precision": config.mixed_precision,
        "batch of sampling, and micro-batch": f"{config.sample_batch_size}, {config.micro_batch_size}",
        **_memory(policy, config, num_images, num_distinct, network),
    }


def _trained_parts(policy: Policy, config: TrainConfig) -> dict[str, str]:
    """Where LoRA is, or which text encoders read learned tokens."""
    parts = ", ".join(name for name, part in policy.model.policy_parts.items() if tokenization.is_adapted(part))
    if config.target == "tokens":
        return {"learned tokens": f"{config.num_tokens}, read by {parts}"}
    return {"LoRA on": parts + run.lora_places(config)}


def _load_scorers(config: TrainConfig) -> list[str]:
    """Load the parts of the rewards but for functions, so that a damaged checkpoint is found in a dry run too.

    Parts whose weights would have to be fetched from the hub are left out; returns the repositories of these weights.
    """
    specs = specs_of(config)
    checkpoints = checkpoints_for(config.model, config.reward_checkpoint, specs)
    names = {name for spec in specs for name in parse_mixture(spec) if name not in functions_of(spec)}
    repositories = []
    for name in sorted(names):
        if missing := missing_weights(name, checkpoints):
            repositories += missing
        else:
            rewards.load_reward(name, default_device(), checkpoints)
    return repositories


def _memory(policy: Policy, config: TrainConfig, num_images: int, num_distinct: int, network: str) -> dict[str, float]:
    """What an epoch keeps, in MB, and the sum."""
    denoiser, text_encoder = activation_bytes(policy, config, num_distinct)
    parts = {
        "weights": _weight_bytes(policy.model),
        "trajectories": num_images * _trajectory_bytes(policy, config),
        f"{network} activations of a micro-batch": denoiser,
        "text encoder activations": text_encoder,
    }
    parts["together, without decoding and scorer"] = sum(parts.values())
    return {f"{name}, MB": megabytes(num_bytes) for name, num_bytes in parts.items()}


def megabytes(num_bytes: int) -> float:
    """Bytes in MB of 1e6 bytes, with one decimal."""
    return round(num_bytes / 1e6, 1)


def _calls_per_epoch(policy: Policy, config: TrainConfig) -> int:
    """U-Net calls of an epoch's sampling and update; with --relabel at most, as if every image had a caption."""
    num_terms = (0 if learns_from_captions_alone(config) else 1) + (1 if config.relabel else 0)
    return num_rollout_calls(policy, config) + num_terms * _calls_per_update(policy, config)


def _calls_per_update(policy: Policy, config: TrainConfig) -> int:
    """U-Net calls of an epoch's update on all images under their prompts, or under their captions."""
    num_pairs = config.num_prompts_per_epoch * config.num_samples_per_prompt * _items_per_image(policy, config)
    return num_pairs * _calls_per_item(policy, config)


def _ppo_beside(policy: Policy, config: TrainConfig, network: str) -> dict[str, Any]:
    """What ppo costs with its defaults for the model, beside another algorithm."""
    if config.algorithm == "ppo":
        return {}
    sampler = {"sampler": config.sampler} if config.sampler in FLOW_SAMPLERS else {}
    ppo = resolve(TrainOptions(model=config.model, algorithm="ppo", target=config.target, **sampler))
    num_images = ppo.num_epochs * ppo.num_prompts_per_epoch * ppo.num_samples_per_prompt
    num_calls = _calls_per_epoch(Policy(policy.model, ppo), ppo) * ppo.num_epochs
    return {f"{network} calls in all of ppo with its defaults": f"{num_calls:,} for {num_images:,} images"}


def _items_per_image(policy: Policy, config: TrainConfig) -> int:
    """The steps, noise levels or samples that each image is trained on in a pass."""
    if config.algorithm == "ppo":
        return max(1, round(config.timestep_fraction * len(trainable_steps(policy.denoiser.schedule, config))))
    return config.num_noise_levels if config.algorithm == "matching" else 1


def _calls_per_item(policy: Policy, config: TrainConfig) -> int:
    """U-Net calls of all passes over an image and one of its steps, noise levels or samples."""
    branches = 2 if policy.denoiser.guided else 1
    if config.algorithm == "gradient":
        return branches * (config.num_inference_steps + config.backprop_steps)
    if config.algorithm == "matching" or policy.null_embeds is not None:
        branches = 1
    return config.num_inner_epochs * branches * (2 if wants_kl(config) else 1)


def _weight_bytes(model: models.Model) -> int:
    parts = (*model.policy_parts.values(), model.vae)
    return sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part.parameters())


def _trajectory_bytes(policy: Policy, config: TrainConfig) -> int:
    """Bytes of an image's latents, and of the null prompt's predictions if they are kept."""
    keeps_null_outputs = policy.null_embeds is not None and policy.denoiser.guided
    num_kept = config.num_inference_steps * (2 if keeps_null_outputs else 1) + 1
    return num_kept * math.prod(policy.latent_shape) * 4


def activation_bytes(policy: Policy, config: TrainConfig, num_prompts: int) -> tuple[int, int]:
    """Bytes that autograd keeps in an update: of the U-Net for a micro-batch, of the text encoder for distinct prompts.

    Both are measured on one row and multiplied.
    """
    model = policy.model
    latents = torch.zeros(1, *policy.latent_shape, device=model.device)
    prompt_ids = models.tokenize_for(model, [""]).to(model.device)
    embeds = models.encode(model, prompt_ids).detach().requires_grad_()
    conditioning = models.Conditioning(embeds, embeds)
    null_outputs = latents if policy.null_embeds is not None and policy.denoiser.guided else None
    steps = torch.zeros(1, dtype=torch.long, device=model.device)
    schedule = policy.denoiser.schedule.to(model.device)
    denoiser = replace(policy.denoiser, compile=False, schedule=schedule)  # what a compiled one keeps is less
    network = saved_bytes(model, lambda: denoiser.mean(latents, steps, conditioning, null_outputs))
    text_encoder = saved_bytes(model, lambda: models.encode(model, prompt_ids))
    num_null = int(policy.null_embeds is None and not model.zero_null)
    return config.micro_batch_size * network, (num_prompts + num_null) * text_encoder


class FusedAttention(torch.overrides.TorchFunctionMode):
    """Lets attention on the meta device keep what a fused kernel keeps, its inputs and its output.

    PyTorch takes the plain formula there, which keeps the large matrices of weights.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the one function."""
        if function is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _Attention.apply(named["query"], named["key"], named["value"])
        return function(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Keeps tensors for a backward pass that is never run."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Save the inputs (..., L, D) and the output."""
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        context.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        """Refuse: there are no numbers."""
        raise NotImplementedError


def saved_bytes(model: models.Model, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of a forward pass for the backward one; weights do not count."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()  # a number also on the meta device
        return tensor

    attention = FusedAttention() if model.device.type == "meta" else contextlib.nullcontext()
    with attention, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    for part in model.policy_parts.values():
        for tensor in part.parameters():
            kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(kept.values())
