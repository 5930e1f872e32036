"""What a model's configuration files say of it, read before PyTorch is loaded: its text encoders, and its sizes.

Nothing is fetched. Of a model that is not here yet, or is a checkpoint of one file, nothing is known before it is loaded;
texforce.py and models.py check these too, by the functions here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError, near
from .files import read_json
from .presets import EMBEDDED, model_file

# The projections in the blocks of text encoders, in their order there, by their `model_type`.
PROJECTIONS: dict[str, Callable[[Mapping[str, Any]], tuple[str, ...]]] = {
    "clip_text_model": lambda config: ("k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"),
    "t5": lambda config: (
        *("q", "k", "v", "o"),
        *(("wi_0", "wi_1") if str(config["feed_forward_proj"]).startswith("gated-") else ("wi",)),
        "wo",
    ),
    "gemma2": lambda config: ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a model."""

    num_read: int  # blocks whose output something reads
    projections: tuple[str, ...]  # in each block
    most_skipped: int | None  # the largest --clip-skip; None where no layer is chosen
    num_positions: int | None  # tokens of a prompt that a CLIP reads


@dataclass(frozen=True)
class Facts:
    """What is known of a model."""

    text_encoders: dict[str, TextEncoder]
    has_unet: bool
    multiple: int  # of so many pixels a side must be
    largest: int | None  # pixels along a side


def find_facts(model: str) -> Facts | None:
    """What a model's files say of it; None where they are not here or unusable, which loading the model says."""
    folder = str(Path(__file__).parent / model) if model in EMBEDDED else model
    try:
        return _read_facts(folder)
    except (InputError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _read_facts(model: str) -> Facts | None:
    def config(part: str) -> dict[str, Any]:
        return read_json(model_file(model, f"{part}/config.json"))

    index = read_json(model_file(model, "model_index.json"))
    there = [name for name, value in index.items() if isinstance(value, list) and value[-1:] != [None]]
    part, pipeline = "unet" if "unet" in there else "transformer", str(index["_class_name"])
    denoiser, vae = config(part), config("vae")
    blocks = denoiser["block_out_channels"] if part == "unet" else ()
    latents = 2 ** (len(blocks) - 1) if part == "unet" else denoiser["patch_size"] * (2 if pipeline == "FluxPipeline" else 1)
    multiple = latents * 2 ** (len(vae.get("block_out_channels") or vae["encoder_block_out_channels"]) - 1)
    largest = denoiser.get("pos_embed_max_size")
    layer = {"StableDiffusion3Pipeline": 2}.get(pipeline, 0) if part == "transformer" else 1 + ("text_encoder_2" in there)
    text = {
        name: _text_encoder(config(name), layer, index[name][-1])
        for name in there
        if name.startswith("text_encoder") and isinstance(index[name][-1], str)
    }
    return Facts(text, part == "unet", multiple, largest and largest * multiple)


def _text_encoder(config: Mapping[str, Any], layer: int, cls: str) -> TextEncoder:
    """A text encoder by its configuration, the CLIP layer that is read, counted from the end, and its class."""
    kind = config["model_type"]
    is_clip, num_blocks = kind.startswith("clip"), config["num_layers" if kind == "t5" else "num_hidden_layers"]
    unread = 1 if layer == 2 and cls == "CLIPTextModel" else 0  # a projected one's last block gives the pooled text
    return TextEncoder(
        num_blocks - unread,
        PROJECTIONS[kind](config),
        num_blocks - layer if is_clip and layer else None,
        config["max_position_embeddings"] if is_clip else None,
    )


# --- what options ask of a model ---


def check_text_encoders(asked: Collection[str], there: Collection[str], model: str) -> None:
    """Raise InputError for a text encoder that a model has not."""
    if unknown := [name for name in asked if name not in there]:
        guess = near(unknown[0], there)
        raise InputError(f"text_encoders: {model!r} has no {unknown[0]!r}, it has {', '.join(there)}{guess}")


def check_projections(asked: Collection[str], there: Collection[str], part: str, model: str) -> None:
    """Raise InputError for a projection that the blocks of a text encoder have not."""
    if unknown := [name for name in asked if name not in there]:
        guess = near(unknown[0], there)
        raise InputError(f"lora_modules: the {part} of {model!r} has no {unknown[0]!r}, it has {', '.join(there)}{guess}")


def check_blocks(lora_layers: str, num_read: int, part: str, model: str) -> None:
    """Raise InputError for more blocks than a text encoder has that are read."""
    number = lora_layers.partition(":")[2]
    if number and int(number) > num_read:
        raise InputError(
            f"lora_layers: the {part} of {model!r} has {num_read} blocks that are read, so N must be at most that, not "
            + number
        )


def check_has_unet(target: str, has_unet: bool, model: str) -> None:
    """Raise InputError for a training of the U-Net of a model that has none."""
    if target in ("unet", "both") and not has_unet:
        raise InputError(f"target: {model!r} has no U-Net; its transformer is not trained, so take text-encoder")


def most_learned(num_positions: Collection[int]) -> int:
    """The most learned tokens that CLIPs, which read so many tokens, have room for beside start, end and a token."""
    return min(num_positions, default=0) - 3


def check_num_tokens(number: int, num_positions: Collection[int], model: str) -> None:
    """Raise InputError for more learned tokens than CLIPs that read so many tokens have room for."""
    if not num_positions:
        raise InputError(f"target: tokens are learned by CLIP, which {model!r} has not; take text-encoder")
    if number > (most := most_learned(num_positions)):
        raise InputError(f"num_tokens: must be at most {most} for {model!r}, to leave room for prompts, not {number}")


def check_clip_skip(number: int, most: Collection[int], model: str) -> None:
    """Raise InputError for more skipped layers than each CLIP of a model that is read at a layer has."""
    if number and not most:
        raise InputError(f"clip_skip: {model!r} reads no layer of a CLIP, so that none can be skipped")
    if number and number > min(most):
        raise InputError(f"clip_skip: must be at most {min(most)} for {model!r}, by the layers of its CLIP, not {number}")


def check_side(option: str, pixels: int, multiple: int, largest: int | None) -> None:
    """Raise InputError for a side of an image, in pixels, that a model does not draw."""
    if pixels % multiple or pixels < multiple:
        raise InputError(f"{option}: must be a multiple of {multiple} pixels for this model, not {pixels}")
    if largest and pixels > largest:
        raise InputError(f"{option}: must be at most {largest} pixels for this model, not {pixels}")


def check_sides(model: str, sides: Mapping[str, int | None]) -> None:
    """Check the sides of images, by option, as far as a model's files say what it draws; raises as `check_side`."""
    if any(sides.values()) and (facts := find_facts(model)):
        for option, pixels in sides.items():
            if pixels:
                check_side(option, pixels, facts.multiple, facts.largest)
