"""The published architectures with random weights, so that benchmarks download nothing."""

from typing import Any

import torch
from torch import nn

from texforce import families, models

DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SCHEDULER = DIFFUSION | {"set_alpha_to_one": False, "steps_offset": 1}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
SD15_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "layers_per_block": 2,
}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
    "layers_per_block": 2,
}


def build(model: str, device: str, precision: str) -> models.Model:
    """The tiny model, or a published architecture with random weights; its prompts are read by the tiny one's tokenizer."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    dtype = models.DTYPES[precision]
    if model == "tiny":
        return models.load_model("tiny", device, dtype)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(models.TINY / "tokenizer", model_max_length=77)
    ends = {"eos_token_id": tokenizer.eos_token_id}
    more: dict[str, Any] = {}
    with torch.device(device):
        parts: dict[str, nn.Module] = {"text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L, **ends))}
        parts["unet"] = UNet2DConditionModel(**(SDXL_UNET if model == "sdxl" else SD15_UNET))
        scaling, size = (0.13025, 1024) if model == "sdxl" else (0.18215, 512)
        parts["vae"] = AutoencoderKL(**VAE, scaling_factor=scaling, sample_size=size)
        if model == "sdxl":
            second = CLIPTextConfig(**BIG_G, **ends, projection_dim=1280, hidden_act="gelu")
            parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
            more = {"tokenizer_2": tokenizer, "zero_null": True, "family": families.SDXL}
    for name, part in parts.items():
        full = model == "sdxl" and name == "vae"  # as in a training: its numbers overflow in float16
        part.requires_grad_(False).eval().to(torch.float32 if full else dtype)
        if device == "cuda" and name in ("unet", "vae"):
            part.to(memory_format=torch.channels_last)
    return models.Model(model, tokenizer, scheduler=DDIMScheduler(**SCHEDULER), **parts, **more)
