"""Pipelines with every block of the published ones, of narrow layers and random weights, and random LoRA for them."""

import math
import re
from pathlib import Path

import torch
from torch import nn

from texforce import models
from texforce.adapters import Layer


def attention_names(module: nn.Module) -> list[str]:
    names = re.compile(r"(.*\.)?(q_proj|k_proj|v_proj|out_proj|to_q|to_k|to_v|to_out\.0)")
    return [name for name, layer in module.named_modules() if names.fullmatch(name) and hasattr(layer, "weight")]


def random_layers(module: nn.Module, seed: int, rank: int = 3, alpha: float = 6.0, size: float = 0.3) -> dict[str, Layer]:
    """LoRA that shows in the images, of another alpha than its rank, by our names."""
    generator, layers = torch.Generator().manual_seed(seed), {}
    for name in attention_names(module):
        weight = module.get_submodule(name).weight
        down = torch.randn(rank, weight.shape[1], generator=generator) * size / math.sqrt(weight.shape[1])
        up = torch.randn(weight.shape[0], rank, generator=generator) * size / math.sqrt(rank)
        layers[name.removeprefix("text_model.")] = Layer(down, up, alpha)
    return layers


def unet_of_shape(**options):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32, "attention_head_dim": 4}
    return UNet2DConditionModel(**sizes | options)


def vae_of_shape():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=64, scaling_factor=0.18215,
    )  # fmt: skip


def text_encoder_of_shape(cls, act: str, layers: int, width: int = 32):
    from transformers import CLIPTextConfig

    tokenizer = tiny_tokenizer()
    return cls(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=layers,
            num_attention_heads=4, max_position_embeddings=77, hidden_act=act, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=0, pad_token_id=1,
            projection_dim=width,
        )
    )  # fmt: skip


def tiny_tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(models.TINY / "tokenizer", model_max_length=77)


def save_stable_diffusion(folder: Path, version: int) -> Path:
    """A pipeline with every block of Stable Diffusion 1.5 or 2.1, of narrow layers and random weights."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    options = {} if version == 1 else {"use_linear_projection": True, "attention_head_dim": (2, 4, 4, 8)}
    StableDiffusionPipeline(
        vae=vae_of_shape(), unet=unet_of_shape(**options), tokenizer=tiny_tokenizer(), safety_checker=None,
        text_encoder=text_encoder_of_shape(CLIPTextModel, *(("quick_gelu", 4) if version == 1 else ("gelu", 5))),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_stable_diffusion_xl(folder: Path) -> Path:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet = unet_of_shape(
        block_out_channels=(32, 32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=96,
        transformer_layers_per_block=(1, 2, 2), attention_head_dim=(2, 4, 8), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=112,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae_of_shape(), unet=unet, tokenizer=tiny_tokenizer(), tokenizer_2=tiny_tokenizer(),
        text_encoder=text_encoder_of_shape(CLIPTextModel, "quick_gelu", 3),
        text_encoder_2=text_encoder_of_shape(CLIPTextModelWithProjection, "gelu", 4, width=64),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
    ).save_pretrained(folder)  # fmt: skip
    return folder
