"""Names of the single-file checkpoints of Stable Diffusion (CompVis' latent diffusion), as A1111 and ComfyUI load them.

Sources: the checkpoints of Stable Diffusion 1.5, 2.1 and XL, and diffusers' reading of them (loaders/single_file_utils.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError

UNET = "model.diffusion_model."
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


# --- U-Net ---


def unet_name(name: str, config: Any) -> str:
    """The name in a checkpoint, without its prefix, of a layer or tensor of a UNet2DConditionModel."""
    for ours, theirs in _UNET_ENDS.items():
        if name == ours or name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    if not isinstance(config.layers_per_block, int):
        raise InputError("a U-Net whose blocks differ in length has no single-file layout")
    step = config.layers_per_block + 1  # of numbers a block
    match = re.match(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", name)
    if match is None or (match[3] == "resnets" and match[5].partition(".")[0] not in _RESNET):
        raise InputError(f"a U-Net with {name} has no single-file layout")
    side, block, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        first, _, last = rest.partition(".")
        rest = _RESNET[first] + ("." + last if last else "")
    if side == "mid":
        return f"middle_block.{2 * index if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{step * (block + 1)}.0.op" + rest.removeprefix("conv")
    if kind == "upsamplers":
        place = 2 if "CrossAttn" in config.up_block_types[block] else 1
        return f"output_blocks.{step * block + config.layers_per_block}.{place}.{rest}"
    number = 1 + step * block + index if side == "down" else step * block + index
    return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{0 if kind == 'resnets' else 1}.{rest}"


def unet_tensors(tensors: Mapping[str, Tensor], unet: Any) -> dict[str, Tensor]:
    """The U-Net's tensors of a single-file checkpoint by diffusers' names; what has none keeps its own."""
    names = {unet_name(name, unet.config): name for name in unet.state_dict()}
    found = {key.removeprefix(UNET): tensor for key, tensor in tensors.items() if key.startswith(UNET)}
    return {names.get(key, key): tensor for key, tensor in found.items()}


# --- VAE ---


def vae_name(name: str, num_blocks: int) -> str:
    """The name in a checkpoint, without its prefix, of a tensor of an AutoencoderKL."""
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2", name)
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
    if match := re.match(r"decoder\.up_blocks\.(\d+)\.(.+)", name):
        rest = re.sub(r"^resnets\.", "block.", match[2]).replace("upsamplers.0", "upsample")
        name = f"decoder.up.{num_blocks - 1 - int(match[1])}.{rest}"
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        for ours, theirs in (("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v")):
            name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    if "mid_block" in name or "_blocks." in name:
        raise InputError(f"a VAE with {name} has no single-file layout")
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


# --- text encoders ---


def open_clip_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder's tensors (without `text_model.`) in open_clip's layout, as in Stable Diffusion 2.x and XL."""
    fixed = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
    }  # fmt: skip
    layers = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    layers |= {"self_attn.out_proj": "attn.out_proj"}
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in fixed:
            named[fixed[name]] = tensor
        elif name == "text_projection.weight":
            named["text_projection"] = tensor.T.contiguous()
        elif match := re.match(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            number, layer, kind = match.groups()
            block = f"transformer.resblocks.{number}."
            if layer in layers:
                named[f"{block}{layers[layer]}.{kind}"] = tensor
            elif layer == "self_attn.q_proj":
                parts = [tensors[f"encoder.layers.{number}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                named[f"{block}attn.in_proj_{kind}"] = torch.cat(parts)
            elif layer not in ("self_attn.k_proj", "self_attn.v_proj"):  # they are joined with q_proj
                raise InputError(f"a text encoder with {name} has no single-file layout")
        else:
            raise InputError(f"a text encoder with {name} has no single-file layout")
    return named


def text_tensors(text_encoder: nn.Module) -> dict[str, Tensor]:
    """A text encoder's tensors, without the level `text_model.` that transformers 5.6 took from some."""
    state = text_encoder.state_dict()
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items() if not name.endswith("position_ids")}


# --- the whole file ---


def checkpoint_tensors(model: Any) -> dict[str, Tensor]:
    """All tensors of a pipeline's U-Net, VAE and text encoders by the names of a single-file checkpoint."""
    named = {UNET + unet_name(name, model.unet.config): tensor for name, tensor in model.unet.state_dict().items()}
    num_blocks = len(model.vae.config.up_block_types)
    for name, tensor in model.vae.state_dict().items():
        theirs = vae_name(name, num_blocks)
        if ".attn_1." in theirs and tensor.ndim == 2:  # convolutions of 1 x 1 there
            tensor = tensor[:, :, None, None]
        named["first_stage_model." + theirs] = tensor
    second = getattr(model, "text_encoder_2", None)
    first = text_tensors(model.text_encoder)
    if second is not None:
        prefix = "conditioner.embedders."
        named |= {f"{prefix}0.transformer.text_model.{name}": tensor for name, tensor in first.items()}
        named |= {f"{prefix}1.model.{name}": tensor for name, tensor in open_clip_tensors(text_tensors(second)).items()}
    elif model.text_encoder.config.hidden_act == "gelu":  # Stable Diffusion 2.x has open_clip's encoder, 1.x OpenAI's
        named |= {f"cond_stage_model.model.{name}": tensor for name, tensor in open_clip_tensors(first).items()}
    else:
        named |= {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in first.items()}
    return named
