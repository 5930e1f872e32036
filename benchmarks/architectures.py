"""The published architectures with random weights, so that benchmarks download nothing."""

from typing import Any

import torch
from torch import nn

from texforce import families, models, single_file

T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
SD35 = {  # medium
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "out_channels": 16, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
SD3_VAE = single_file.VAE | {
    "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
    "use_post_quant_conv": False, "sample_size": 1024,
}  # fmt: skip
WIDTHS = {"sd15": 768, "sdxl": 2048}  # numbers D in each text embedding that the U-Net reads


def build(model: str, device: str, precision: str) -> models.Model:
    """The tiny model, or a published architecture with random weights; its prompts are read by the tiny ones' tokenizers."""
    dtype = models.DTYPES[precision]
    if model == "tiny":
        return models.load_model("tiny", device, dtype)
    torch.manual_seed(0)
    with torch.device(device):
        parts = sd35() if model == "sd35" else stable_diffusion(WIDTHS[model])
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            full = model == "sdxl" and name == "vae"  # as in a training: its numbers overflow in float16
            part.requires_grad_(False).eval().to(torch.float32 if full else dtype)
            if device == "cuda" and name in ("unet", "vae"):
                part.to(memory_format=torch.channels_last)
    return models.Model(name=model, **parts)


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(models.TINY / "tokenizer", model_max_length=77)


def clip(config: dict[str, Any], projected: bool = False) -> nn.Module:
    """A CLIP text encoder that looks for the end that the tiny model's tokenizer gives."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    cls = CLIPTextModelWithProjection if projected else CLIPTextModel
    return cls(CLIPTextConfig(**config | {"eos_token_id": clip_tokenizer().eos_token_id}))


def stable_diffusion(width: int) -> dict[str, Any]:
    """The parts of Stable Diffusion 1.5 or XL."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    architecture = single_file.ARCHITECTURES[width]
    parts = {name: clip(config, name == "text_encoder_2") for name, (_, config, _) in architecture["text"].items()}
    second = {"tokenizer_2": clip_tokenizer(), "zero_null": True, "family": families.SDXL} if len(parts) == 2 else {}
    unet, vae = (
        cls(**{name: value for name, value in architecture[part].items() if name != "_class_name"})
        for cls, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    )
    scheduler = DDIMScheduler.from_config(single_file.DIFFUSION)
    return parts | second | {"unet": unet, "vae": vae, "tokenizer": clip_tokenizer(), "scheduler": scheduler}


def sd35() -> dict[str, Any]:
    """The parts of Stable Diffusion 3.5 medium."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vae = {name: value for name, value in SD3_VAE.items() if name != "_class_name"}
    return {
        "family": families.SD3,
        "transformer": SD3Transformer2DModel(**SD35),
        "vae": AutoencoderKL(**vae),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": clip(single_file.CLIP_L, projected=True),
        "text_encoder_2": clip(single_file.OPEN_CLIP_G, projected=True),
        "text_encoder_3": T5EncoderModel(T5Config(**T5_XXL)),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "tokenizer_3": T5Tokenizer.from_pretrained(models.TINY_FLOW / "tokenizer_3", model_max_length=512),
    }
