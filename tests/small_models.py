"""Pipelines with every block of the published ones, of narrow layers and random weights, and random LoRA for them."""

import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from texforce import models
from texforce.lora_files import Layer


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


# --- the newer families ---


def words_tokenizer(kind: str):
    """A T5Tokenizer or a GemmaTokenizer that knows letters, and the words of a few prompts."""
    import transformers

    words = ["red", "blue", "circle", "square", "two", "a", "and", "blurry"]
    letters = [chr(code) for code in range(33, 127)]
    if kind == "T5Tokenizer":
        pieces = ["<pad>", "</s>", "<unk>", "▁", *("▁" + word for word in words), *letters]
        return transformers.T5Tokenizer(vocab=[(piece, -0.1 * i) for i, piece in enumerate(pieces)], extra_ids=0)
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *letters]
    return transformers.GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])


def t5_of_shape(width: int):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=128, d_model=width, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
            pad_token_id=0,
        )
    )  # fmt: skip


def clip_of_shape(projected: bool, width: int = 32):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return text_encoder_of_shape(CLIPTextModelWithProjection if projected else CLIPTextModel, "quick_gelu", 3, width)


def flow_vae():
    """With a shift, and 16 channels, as SD 3's and FLUX.1's."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=16,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16, scaling_factor=1.5, shift_factor=0.06,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def sd3_pipeline(with_t5: bool = True):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=80, caption_projection_dim=32, pooled_projection_dim=64, out_channels=16, pos_embed_max_size=16,
        dual_attention_layers=(0,), qk_norm="rms_norm",  # as in 3.5 medium
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=flow_vae(),
        text_encoder=clip_of_shape(True), tokenizer=tiny_tokenizer(),
        text_encoder_2=clip_of_shape(True), tokenizer_2=tiny_tokenizer(),
        text_encoder_3=t5_of_shape(80) if with_t5 else None, tokenizer_3=words_tokenizer("T5Tokenizer") if with_t5 else None,
    )  # fmt: skip


def flux_pipeline(guidance_embeds: bool = True):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    return FluxPipeline(
        transformer=transformer, vae=flow_vae(), scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=clip_of_shape(False), tokenizer=tiny_tokenizer(),
        text_encoder_2=t5_of_shape(32), tokenizer_2=words_tokenizer("T5Tokenizer"),
    )  # fmt: skip


def pixart_pipeline(kind: str):
    import diffusers

    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
        cross_attention_dim=32, out_channels=8, caption_channels=24, norm_type="ada_norm_single",
        use_additional_conditions=False,
    )  # fmt: skip
    return getattr(diffusers, f"PixArt{kind}Pipeline")(
        transformer=transformer, vae=vae_of_shape(), text_encoder=t5_of_shape(24), tokenizer=words_tokenizer("T5Tokenizer"),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip


def sana_pipeline():
    import diffusers
    from transformers import Gemma2Config, Gemma2Model

    transformer = diffusers.SanaTransformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32,
        caption_channels=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, pad_token_id=0,
        )
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++",
    )  # fmt: skip
    return diffusers.SanaPipeline(
        transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=words_tokenizer("GemmaTokenizer"),
        scheduler=scheduler,
    )  # fmt: skip


PIPELINES = {
    "sd3": sd3_pipeline,
    "sd3-without-t5": lambda: sd3_pipeline(with_t5=False),
    "flux": flux_pipeline,
    "pixart-alpha": lambda: pixart_pipeline("Alpha"),
    "pixart-sigma": lambda: pixart_pipeline("Sigma"),
    "sana": sana_pipeline,
}


def save_family(name: str, folder: Path) -> Path:
    """A pipeline of a newer family, of narrow layers and random weights."""
    torch.manual_seed(0)
    pipeline = PIPELINES[name]()
    pipeline.save_pretrained(folder)
    for tokenizer in folder.glob("tokenizer*"):
        if not (tokenizer / "vocab.json").exists():
            (tokenizer / "spiece.model").write_bytes(b"\xff not read where there is a tokenizer.json")
    return folder


def all_tensors(model: models.Model) -> dict[str, Tensor]:
    """The parameters and buffers of a model's networks, by part and name."""
    modules = {part: getattr(model, part) for part in ("text_encoder", "unet", "vae")}
    return {
        f"{part}/{name}": tensor.detach()
        for part, module in modules.items()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
