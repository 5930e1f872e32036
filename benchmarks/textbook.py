"""The textbook loop that bench.py compares with: sampling and PPO updates as in the released TexForce and DDPO code.

diffusers' pipeline in eager mode, 4 images at a time; in an update the text encoder and both branches of guidance anew for
each image-batch and step, with a backward pass at once. With --null-prompt base the null prompt's embedding is made once, as
in DDPO's code, and its branch of the U-Net runs each time all the same.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import texforce
from texforce import Batch

BATCH = 4
CLIP_RANGE = 10.0  # of both loops: rounding is not to be clipped away


class RememberedTokens:
    """A tokenizer that reads a text once: the released loops keep the ids, where diffusers' pipeline reads it anew."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.known = tokenizer, {}

    def __call__(self, texts: list[str], **options: Any) -> Any:
        key = (tuple(texts), *options.values())
        if key not in self.known:
            self.known[key] = self.tokenizer(texts, **options)
        return self.known[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


class Textbook:
    """The released code's loops, over the networks and the LoRA of a policy."""

    def __init__(self, policy: texforce.Policy, config: texforce.TrainConfig) -> None:
        from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

        model = policy.model
        self.policy, self.config, self.device = policy, config, model.device
        # Double: in float32 the variance of the last step, a difference of almost equal numbers, is off by 1e-4.
        self.scheduler = DDIMScheduler.from_config(model.scheduler.config)
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.double()
        self.scheduler.final_alpha_cumprod = self.scheduler.final_alpha_cumprod.double()
        self.scheduler.set_timesteps(config.num_inference_steps, device=self.device)
        shared = {name: getattr(model, name) for name in ("vae", "text_encoder", "unet", "tokenizer")}
        self.second = model.text_encoder_2
        if self.second is not None:
            shared |= {"text_encoder_2": self.second, "tokenizer_2": model.tokenizer_2, "add_watermarker": False}
            shared |= {"force_zeros_for_empty_prompt": model.zero_null}
            self.pipeline = StableDiffusionXLPipeline(**shared, scheduler=self.scheduler)
            self.pipeline.tokenizer_2 = RememberedTokens(model.tokenizer_2)
        else:
            shared |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            self.pipeline = StableDiffusionPipeline(**shared, scheduler=self.scheduler)
        self.pipeline.tokenizer = RememberedTokens(model.tokenizer)

    def encode(self, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Embeddings (2N, L, D) of the null prompt and the prompts, and the other conditioning of SDXL's U-Net."""
        count = len(prompts)
        if self.second is None:
            null = self.policy.null_embeds
            null = None if null is None else null.expand(count, -1, -1).to(self.pipeline.unet.dtype)
            text, null = self.pipeline.encode_prompt(prompts, self.device, 1, True, negative_prompt_embeds=null)
            return torch.cat([null, text]), None
        text, null, pooled, null_pooled = self.pipeline.encode_prompt(prompts, None, self.device, 1, True)
        size = (self.resolution, self.resolution)
        width = self.second.config.projection_dim
        time_ids = self.pipeline._get_add_time_ids(size, (0, 0), size, text.dtype, width).to(self.device)
        more = {"text_embeds": torch.cat([null_pooled, pooled]), "time_ids": time_ids.repeat(2 * count, 1)}
        return torch.cat([null, text]), more

    @property
    def resolution(self) -> int:
        return self.config.resolution or self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    def predict(self, latents: Tensor, timestep: Tensor, embeds: Tensor, more: dict[str, Tensor] | None) -> Tensor:
        """The guided prediction, of both branches in one batch."""
        inputs = self.scheduler.scale_model_input(torch.cat([latents] * 2), timestep).to(self.pipeline.unet.dtype)
        null, text = self.pipeline.unet(
            inputs, timestep, encoder_hidden_states=embeds, added_cond_kwargs=more, return_dict=False
        )[0].chunk(2)
        return null.float() + self.config.guidance_scale * (text.float() - null.float())

    def ddim_step(
        self, output: Tensor, timestep: Tensor, latents: Tensor, noise: Tensor | None = None, after: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The next latents, drawn unless given, and their log-probability."""
        mean = self.scheduler.step(
            output, timestep, latents, eta=self.config.eta, variance_noise=torch.zeros_like(latents), return_dict=False
        )[0]
        previous = timestep - self.scheduler.config.num_train_timesteps // self.config.num_inference_steps
        std = self.config.eta * self.scheduler._get_variance(timestep, previous).sqrt().to(mean.device, mean.dtype)
        if after is None:
            after = mean + std * noise
        normal = torch.distributions.Normal(mean, std, validate_args=False)
        return after, normal.log_prob(after.detach()).mean(dim=(1, 2, 3))

    @torch.no_grad()
    def rollout(self, prompts: list[str], generators: list[torch.Generator] | torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) in [0, 1] and log-probabilities (N, T) of their steps."""
        from diffusers.utils.torch_utils import randn_tensor

        shape, images, log_probs = self.policy.latent_shape, [], []
        for start in range(0, len(prompts), BATCH):
            chunk = prompts[start : start + BATCH]
            draw = generators[start : start + BATCH] if isinstance(generators, list) else generators
            embeds, more = self.encode(chunk)
            latents = randn_tensor((len(chunk), *shape), generator=draw, device=self.device)
            for timestep in self.scheduler.timesteps:
                noise = randn_tensor(latents.shape, generator=draw, device=self.device)
                output = self.predict(latents, timestep, embeds, more)
                latents, log_prob = self.ddim_step(output, timestep, latents, noise)
                log_probs.append(log_prob)
            vae = self.pipeline.vae
            decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
            images.append(self.pipeline.image_processor.postprocess(decoded, output_type="pt").float())
        num_steps = len(self.scheduler.timesteps)
        rows = [torch.stack(log_probs[k : k + num_steps], dim=1) for k in range(0, len(log_probs), num_steps)]
        return torch.cat(images), torch.cat(rows)

    @torch.no_grad()
    def log_probs(self, batch: Batch, prompts: list[str]) -> Tensor:
        """Log-probabilities (N, T) of what was sampled, one image-batch and one step at a time."""
        result = torch.empty_like(batch.trajectory.log_probs)
        for mine, k, log_probs in self.judged(batch, prompts):
            result[mine, k] = log_probs.to(result.dtype)
        return result

    def accumulate_gradients(self, batch: Batch, prompts: list[str], scaler: torch.amp.GradScaler) -> None:
        """Add the gradient of the PPO loss over all images and steps, one image-batch and one step at a time."""
        num_pairs = batch.trajectory.timesteps.numel()
        with without_checkpointing(self.pipeline.unet):
            for mine, k, log_probs in self.judged(batch, prompts):
                old, advantages = batch.trajectory.log_probs[mine, k], batch.advantages[mine]
                loss = texforce.ppo_loss(log_probs, old, advantages, CLIP_RANGE)
                scaler.scale(loss * (len(log_probs) / num_pairs)).backward()

    def judged(self, batch: Batch, prompts: list[str]) -> Iterator[tuple[slice, int, Tensor]]:
        """Images, a step of theirs, and its log-probabilities (n,)."""
        latents = batch.trajectory.latents
        for start in range(0, len(prompts), BATCH):
            mine = slice(start, start + BATCH)
            for k, timestep in enumerate(self.scheduler.timesteps):
                embeds, more = self.encode(prompts[mine])
                output = self.predict(latents[mine, k], timestep, embeds, more)
                yield mine, k, self.ddim_step(output, timestep, latents[mine, k], after=latents[mine, k + 1])[1]


@contextlib.contextmanager
def without_checkpointing(unet: Any) -> Iterator[None]:
    """Keep activations for a while: only our loop recomputes them."""
    active = any(getattr(module, "gradient_checkpointing", False) for module in unet.modules())
    unet.disable_gradient_checkpointing()
    try:
        yield
    finally:
        if active:
            unet.enable_gradient_checkpointing()
