"""What an update of each family takes at its published size: `python benchmarks/foresee.py`.

Everything is computed on the meta device, from the published configurations, without weights and without a GPU: parameters,
bytes of the frozen weights, what autograd keeps of the denoiser for one image and of the trained text encoders for one
prompt. Attention counts as fused (plan.FusedAttention).
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from architectures import SD35, T5_XXL
from torch import nn

from texforce import families, models, single_file
from texforce.config import TrainOptions, resolve
from texforce.families import Inputs, Text
from texforce.plan import saved_bytes
from texforce.weights import quiet_libraries

CLIP_L, CLIP_G = single_file.CLIP_L, single_file.OPEN_CLIP_G
GEMMA_2B = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256,
}  # fmt: skip
NOTHING: dict[str, Any] = {"name": "meta", "tokenizer": None, "text_encoder": None}
PIXART = {"sample_size": 128, "use_additional_conditions": False, "caption_channels": 4096}
# Name on the hub, family, the denoiser's and the text encoders' configurations, latents along a side.
SIZES: list[tuple[str, families.Family, dict[str, Any], list[dict[str, Any]], int]] = [
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", families.SD, single_file.ARCHITECTURES[768]["unet"], [CLIP_L], 64),
    (
        "stabilityai/stable-diffusion-xl-base-1.0",
        families.SDXL,
        single_file.ARCHITECTURES[2048]["unet"],
        [CLIP_L, CLIP_G],
        128,
    ),
    ("stabilityai/stable-diffusion-3.5-medium", families.SD3, SD35, [CLIP_L, CLIP_G, T5_XXL], 128),
    ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", families.PIXART_SIGMA, PIXART, [T5_XXL], 128),
    ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", families.SANA, {}, [GEMMA_2B], 32),
    ("black-forest-labs/FLUX.1-dev", families.FLUX, {"guidance_embeds": True}, [CLIP_L, T5_XXL], 128),
]


def build(make: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return make().to(torch.bfloat16).requires_grad_(False)


def num_rows(part: families.TextPart) -> int:
    """Rows of embeddings of a prompt."""
    return part.num_tokens or 77


def kept_by_denoiser(family: families.Family, denoiser: Any, side: int, checkpointing: bool) -> int:
    """Bytes that autograd keeps of the denoiser for one image, where the gradient goes to its text."""
    width, pooled_width = family.wanted_widths(denoiser.config)
    parts = {
        name: Text(torch.empty(1, num_rows(part), 1 if part.is_clip else width), torch.empty(1, 1))
        for name, part in family.text.items()
    }
    tokens = family.join(parts, denoiser).embeds.shape[1]
    channels = denoiser.config.in_channels // family.packed**2
    options = {"device": "meta", "dtype": torch.bfloat16}
    text = Text(
        torch.empty(1, tokens, width, **options).requires_grad_(),
        torch.empty(1, pooled_width, **options).requires_grad_() if family.pooled else None,
        torch.ones(1, tokens, **options) if family.masked else None,
    )
    inputs = Inputs(torch.empty(1, channels, side, side, **options), torch.full((1,), 500.0, device="meta"), text)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
        denoiser.train()
    model = models.Model(**NOTHING | {"family": family, family.part: denoiser})
    return saved_bytes(model, lambda: family.call(denoiser, inputs))


def kept_by_text_encoder(family: families.Family, name: str, encoder: Any) -> int:
    """Bytes that autograd keeps of a text encoder with LoRA for one prompt, its activations not recomputed."""
    from peft import LoraConfig, get_peft_model

    part = family.text[name]
    with torch.device("meta"):
        adapted: Any = get_peft_model(encoder, LoraConfig(r=16, lora_alpha=16, target_modules=list(part.lora_layers)))
    # Sana's instruction is about a quarter of its letters in tokens; only the published tokenizer counts them.
    instruction = len(part.instruction()) // 4 if part.instruction else 0
    ids = torch.ones(1, num_rows(part) + instruction, dtype=torch.long, device="meta")
    model = models.Model(**NOTHING | {"family": family, name: adapted, family.part: adapted})
    return saved_bytes(model, lambda: adapted(input_ids=ids))


def row(name: str, family: families.Family, size: dict[str, Any], texts: list[dict[str, Any]], side: int) -> list[str]:
    import diffusers
    import transformers

    sizes = {key: value for key, value in size.items() if not key.startswith("_")}
    denoiser = build(lambda: getattr(diffusers, family.denoiser)(**sizes))
    encoders = {}
    for (part, record), config in zip(family.text.items(), texts, strict=True):
        cls = getattr(transformers, record.encoder)
        encoders[part] = build(lambda cls=cls, config=config: cls(cls.config_class(**config)))
    counts = {part: sum(p.numel() for p in network.parameters()) for part, network in encoders.items()}
    num_denoiser = sum(p.numel() for p in denoiser.parameters())
    plain, recomputed = (kept_by_denoiser(family, denoiser, side, each) for each in (False, True))
    text = sum(kept_by_text_encoder(family, part, encoders[part]) for part in family.text_encoders)
    config = resolve(TrainOptions(model=name, algorithm="matching", mixed_precision="bf16"))
    num_images = config.num_prompts_per_epoch * config.num_samples_per_prompt
    rollout = num_images * config.num_inference_steps * (1 if family.guidance_input else 2)
    update = num_images * config.num_noise_levels * config.num_inner_epochs * 2  # with the base model's prediction
    trained = sum(counts[part] for part in family.text_encoders)
    return [
        name.split("/")[1], ", ".join(family.text_encoders), f"{trained / 1e9:.2f}",
        f"{(sum(counts.values()) - trained) / 1e9:.2f}", f"{num_denoiser / 1e9:.2f}",
        f"{2 * (num_denoiser + sum(counts.values())) / 1e9:.1f}",
        f"{plain / 1e9:.2f}", f"{recomputed / 1e9:.2f}", f"{text / 1e9:.3f}", f"{rollout} + {update}",
    ]  # fmt: skip


COLUMNS = (
    "model", "trained by default", "their parameters, 1e9", "other text encoders, 1e9", "denoiser, 1e9",
    "weights in bfloat16, GB", "kept of an image, GB", "with --gradient-checkpointing", "kept of a prompt, GB",
    "denoiser calls of an epoch: sampling + update",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=[name for name, *_ in SIZES], default=[name for name, *_ in SIZES])
    chosen = parser.parse_args().models
    quiet_libraries()
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for size in (size for size in SIZES if size[0] in chosen):
        print("| " + " | ".join(row(*size)) + " |", flush=True)


if __name__ == "__main__":
    main()
