"""Checkpoints of one file, as A1111's and ComfyUI's users have them: read by diffusers, with nothing asked of the hub.

Such a file holds tensors and no configuration. One that `texforce merge` wrote names its base model, whose configuration it
has; else it must be one of the published architectures below.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ldm
from .errors import InputError, reading
from .families import Family
from .files import check_content
from .weights import quiet_libraries, read_header, read_shapes, read_tensors, refused

ENDINGS = (".safetensors", ".ckpt")
KIND = "a checkpoint of a model"
DIFFUSION: dict[str, Any] = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280], "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
XL_UNET = {
    "block_out_channels": [320, 640, 1280], "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
    "sample_size": 128,
}  # fmt: skip
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "scaling_factor": 0.18215,
}  # fmt: skip
CLIP: dict[str, Any] = {
    "model_type": "clip_text_model", "vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406,
    "eos_token_id": 49407,
}  # fmt: skip
CLIP_L = CLIP | {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768,
    "hidden_act": "quick_gelu", "pad_token_id": 49407,
}  # fmt: skip
OPEN_CLIP_H = CLIP | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 512, "hidden_act": "gelu", "pad_token_id": 0,
}  # fmt: skip
OPEN_CLIP_G = CLIP | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu", "pad_token_id": 0,
}  # fmt: skip
END, FILLER = "<|endoftext|>", "!"  # what the tokenizers pad with: OpenAI's with the end, open_clip's with this
# By the width of the text that the U-Net takes: U-Net, size of its latents, VAE, text encoders with what they pad with.
ARCHITECTURES: dict[int, dict[str, Any]] = {
    768: {
        "pipeline": "StableDiffusionPipeline",
        "unet": UNET | {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
        "vae": VAE | {"sample_size": 512},
        "text": {"text_encoder": ("CLIPTextModel", CLIP_L, END)},
    },
    1024: {
        "pipeline": "StableDiffusionPipeline",
        "unet": UNET
        | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
        | {"sample_size": 64},
        "vae": VAE | {"sample_size": 768},
        "text": {"text_encoder": ("CLIPTextModel", OPEN_CLIP_H, FILLER)},
    },
    2048: {
        "pipeline": "StableDiffusionXLPipeline",
        "unet": UNET | XL_UNET,
        "vae": VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
        "text": {
            "text_encoder": ("CLIPTextModel", CLIP_L, END),
            "text_encoder_2": ("CLIPTextModelWithProjection", OPEN_CLIP_G, FILLER),
        },
    },
}
# What the names of published models on the hub hold, with their architecture; those of variants hold more.
PUBLISHED = {r"stable-diffusion-xl-base-1": 2048, r"stable-diffusion-2|sd-turbo": 1024, r"stable-diffusion-v1-[1-5]": 768}
VARIANTS = re.compile("inpaint|depth|unclip|refiner")
CROSS_ATTENTIONS = ".transformer_blocks.0.attn2.to_k.weight"  # ends of names of what takes the text, in U-Nets


def header_of(file: Path) -> dict[str, str]:
    """The metadata in a file's header; empty for .ckpt."""
    with reading(f"model: {str(file)!r} could not be read", InputError):
        return read_header(file)


def base_model(header: Mapping[str, str]) -> str | None:
    """The model that `texforce merge` merged into, as the header says it."""
    try:
        said = json.loads(header.get("texforce", "null"))
    except ValueError:
        return None
    return said.get("model") if isinstance(said, dict) and isinstance(said.get("model"), str) else None


def architecture_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any] | None:
    """The published architecture of tensors' shapes by name, by the width of the text that the U-Net takes."""
    widths = {shape[1] for name, shape in shapes.items() if name.endswith(CROSS_ATTENTIONS)}
    is_whole = len(widths) == 1 and any(name.startswith(ldm.UNET) for name in shapes)
    return ARCHITECTURES.get(widths.pop()) if is_whole else None


@functools.cache
def configuration(file: Path) -> str:
    """A folder with the configuration of a published architecture that a file's tensors are of, without weights.

    It is there as long as the process.

    Raises:
        InputError: the file is of no such architecture, or does not say what its U-Net predicts.
    """
    shapes = shapes_of(file)
    architecture = architecture_of(shapes)
    if architecture is None:
        raise InputError(
            f"model: {str(file)!r} is no checkpoint of Stable Diffusion 1.x, 2.x or XL; give other models as folders in "
            "diffusers' format"
        )
    return _write_architecture(architecture, _noise(file, shapes, architecture))


@functools.cache
def published(name: str) -> str | None:
    """A folder with the configuration of a published Stable Diffusion, by its name on the hub; None for other names.

    It holds no weights, and is there as long as the process.
    """
    widths = [width for pattern, width in PUBLISHED.items() if re.search(pattern, name)]
    if not widths or name.count("/") != 1 or VARIANTS.search(name):
        return None
    predicts_v = widths[0] == 1024 and not re.search("base|turbo", name)  # as 2.x of 768 pixels does
    noise = {"prediction_type": "v_prediction" if predicts_v else "epsilon", "rescale_betas_zero_snr": False}
    return _write_architecture(ARCHITECTURES[widths[0]], noise)


def _write_architecture(architecture: Mapping[str, Any], noise: Mapping[str, Any]) -> str:
    """Write the configuration of an architecture into a folder of its own; returns the folder."""
    folder = Path(_folders().name, f"{len(list(Path(_folders().name).iterdir()))}")
    size = {"sample_size": 96} if architecture is ARCHITECTURES[1024] and noise["prediction_type"] == "v_prediction" else {}
    _write(folder / "unet" / "config.json", architecture["unet"] | size)
    _write(folder / "vae" / "config.json", architecture["vae"])
    _write(folder / "scheduler" / "scheduler_config.json", DIFFUSION | dict(noise))
    index: dict[str, Any] = {"_class_name": architecture["pipeline"], "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"]}
    for part, (cls, config, padding) in architecture["text"].items():
        _write(folder / part / "config.json", config | {"architectures": [cls]})
        tokenizer = part.replace("text_encoder", "tokenizer")
        clip_tokenizer(padding).save_pretrained(folder / tokenizer)
        index |= {part: ["transformers", cls], tokenizer: ["transformers", "CLIPTokenizer"]}
    if architecture["pipeline"] == "StableDiffusionPipeline":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    _write(folder / "model_index.json", index)
    return str(folder)


@functools.cache
def _folders() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="texforce-")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _noise(file: Path, names: Collection[str], architecture: Mapping[str, Any]) -> dict[str, Any]:
    """What the U-Net predicts, and whether the noise ends at zero SNR, by the header or by tensors that only mark it.

    Of Stable Diffusion 2.x there are both kinds of predictions, so that one of them must say it.
    """
    said = header_of(file).get("modelspec.prediction_type") or ("v" if "v_pred" in names else None)
    if said not in (None, "epsilon", "v", "v_prediction") or any(name.startswith("edm_") for name in names):
        raise InputError(f"model: the U-Net of {str(file)!r} predicts neither noise nor v, but {said or 'as EDM does'}")
    if said is None and architecture is ARCHITECTURES[1024]:
        raise InputError(
            f"model: {str(file)!r} is of Stable Diffusion 2.x and does not say whether its U-Net predicts noise or v; "
            "convert it into a folder with diffusers' convert_original_stable_diffusion_to_diffusers.py"
        )
    prediction_type = "v_prediction" if said in ("v", "v_prediction") else "epsilon"
    return {"prediction_type": prediction_type, "rescale_betas_zero_snr": "ztsnr" in names}


def clip_tokenizer(padding: str) -> Any:
    """CLIP's tokenizer, of the vocabulary that open_clip comes with."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    simple = SimpleTokenizer()
    specials = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": END}
    vocabulary = {specials.get(token, token): number for token, number in simple.encoder.items()}
    merges = [pair for pair, _ in sorted(simple.bpe_ranks.items(), key=lambda item: item[1])]
    return CLIPTokenizer(vocabulary, merges, model_max_length=77, pad_token=padding)


def shapes_of(file: Path) -> Mapping[str, Sequence[int]]:
    """The shapes of a checkpoint's tensors by name; raises as `read`."""
    if file.suffix != ".safetensors":
        return {name: tensor.shape for name, tensor in read(file).items()}
    with refused(file, KIND):
        check_content(file)
        return read_shapes(file)


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint.

    Raises:
        ArtifactError: it is damaged, or would run code.
    """
    return read_tensors(file, KIND)


def load_parts(file: Path, folder: str, family: Family) -> dict[str, Any]:
    """The networks of a file by the configuration in a folder, frozen, in float32; compared with the file.

    Raises:
        InputError: the file lacks a tensor, or holds others than the configuration says. ArtifactError: as `read`.
    """
    import diffusers

    tensors = read(file)
    quiet_libraries()
    with reading(f"model: {str(file)!r} could not be loaded", InputError):
        pipeline = getattr(diffusers, family.pipelines[0]).from_single_file(
            str(file), config=folder, local_files_only=True, torch_dtype=torch.float32, safety_checker=None
        )
    written = ldm.checkpoint_tensors(pipeline)
    if lacking := [name for name in written if name not in tensors]:
        raise InputError(f"model: {str(file)!r} lacks {len(lacking)} tensors, as {min(lacking)}")
    for name, tensor in written.items():
        if not torch.equal(tensors[name].float().reshape(tensor.shape), tensor.float()):
            raise InputError(f"model: {str(file)!r} was not read as it is written, as {name}")
    parts = {name: getattr(pipeline, name) for name in (*family.text, family.part, "vae")}
    return {name: part.requires_grad_(False).eval() for name, part in parts.items()}
