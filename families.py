"""The families of pipelines, a record each: how text is encoded (clip skip too), how the denoiser is called, its latents.

The table at the end names them; docs/models.md says how to add one, and what differs from diffusers' pipelines.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")
T5_LAYERS = ("q", "k", "v", "o")
GEMMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
NUM_TIME_IDS = 6  # of SDXL's base U-Net: original size, crop's corner and target size, each as height and width
SD3_T5_TOKENS = 256
NO_TOKEN = -1  # fills up the rows of prompt ids that are shorter than others; no tokenizer has it


# --- text ---


@dataclass(frozen=True)
class Text:
    """What text encoders make of N prompts."""

    embeds: Tensor | None = None  # (N, L, D)
    pooled: Tensor | None = None  # (N, P), one vector a prompt
    mask: Tensor | None = None  # (N, L), 1 at tokens and 0 at padding


@dataclass(frozen=True)
class Packing:
    """Text as one tensor, so that code which gathers or differentiates embeddings handles one tensor.

    The pooled text takes more rows, the last one filled up with zeros, and the mask one more column.
    """

    pooled_width: int = 0  # P
    masked: bool = False

    def pack(self, text: Text) -> Tensor:
        """Packed embeddings (N, L + rows of pooled text, D + 1 if masked), float32."""
        embeds: Any = text.embeds
        embeds = embeds.float()
        if self.masked and text.mask is not None:
            embeds = torch.cat([embeds, text.mask[..., None].to(embeds)], dim=-1)
        if self.pooled_width and text.pooled is not None:
            width = embeds.shape[-1]
            pooled = F.pad(text.pooled.float(), (0, -self.pooled_width % width)).unflatten(1, (-1, width))
            embeds = torch.cat([embeds, pooled], dim=1)
        return embeds

    def unpack(self, packed: Tensor) -> Text:
        """The text of packed embeddings."""
        pooled = mask = None
        if self.pooled_width:
            num_rows = -(-self.pooled_width // packed.shape[-1])
            pooled = packed[:, -num_rows:].flatten(1)[:, : self.pooled_width]
            packed = packed[:, :-num_rows]
        if self.masked:
            packed, mask = packed[..., :-1], packed[..., -1].detach()
        return Text(packed, pooled, mask)


def clip_last(encoder: Any, ids: Tensor, clip_skip: int = 0) -> Text:
    if not clip_skip:
        return Text(encoder(input_ids=ids).last_hidden_state)
    states = encoder(input_ids=ids, output_hidden_states=True).hidden_states
    return Text(getattr(encoder, "text_model", encoder).final_layer_norm(states[-1 - clip_skip]))


def clip_penultimate(encoder: Any, ids: Tensor, clip_skip: int = 0) -> Text:
    output = encoder(input_ids=ids, output_hidden_states=True)
    return Text(output.hidden_states[-2 - clip_skip], getattr(output, "text_embeds", None))


def clip_pooled(encoder: Any, ids: Tensor) -> Text:
    return Text(pooled=encoder(input_ids=ids).pooler_output)


def t5(encoder: Any, ids: Tensor) -> Text:
    return Text(encoder(input_ids=ids).last_hidden_state)


def t5_masked(encoder: Any, ids: Tensor) -> Text:
    mask = (ids != encoder.config.pad_token_id).long()
    return Text(encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask=mask)


def gemma(encoder: Any, ids: Tensor) -> Text:
    """The start token and the last tokens of Gemma's states, so that the instruction before the prompt is left out.

    Negative prompts have no instruction; their rows end in NO_TOKEN, and are encoded by themselves.
    """
    num_read, lengths = sana_tokens(), (ids != NO_TOKEN).sum(dim=1)
    chosen = [0, *range(1 - num_read, 0)]
    states: Any = [None] * len(ids)
    masks: Any = [None] * len(ids)
    for length in lengths.unique().tolist():
        rows = torch.nonzero(lengths == length).flatten()
        alike = ids[rows, :length]
        mask = (alike != encoder.config.pad_token_id).long()
        found = encoder(input_ids=alike, attention_mask=mask).last_hidden_state
        for row, state, kept in zip(rows.tolist(), found[:, chosen], mask[:, chosen], strict=True):
            states[row], masks[row] = state, kept
    return Text(torch.stack(states), mask=torch.stack(masks))


def sana_tokens() -> int:
    from diffusers import SanaPipeline

    return inspect.signature(SanaPipeline.__call__).parameters["max_sequence_length"].default


def sana_instruction() -> str:
    """What diffusers puts before every prompt that Sana reads."""
    from diffusers import SanaPipeline

    return "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


def first(texts: Mapping[str, Text], denoiser: Any) -> Text:
    return texts["text_encoder"]


def side_by_side(texts: Mapping[str, Text], denoiser: Any) -> Text:
    """SDXL's: the states of both encoders joined along D, and the second one's pooled text."""
    one, two = texts["text_encoder"], texts["text_encoder_2"]
    return Text(_joined(one, two), two.pooled)


def _joined(one: Text, two: Text) -> Tensor:
    pair: Any = [one.embeds, two.embeds]
    return torch.cat(pair, dim=-1)


def sd3_text(texts: Mapping[str, Text], denoiser: Any) -> Text:
    """SD 3's: both CLIPs' states joined and widened, T5's after them (zeros without a T5), both pooled texts joined."""
    one, two, three = texts["text_encoder"], texts["text_encoder_2"], texts.get("text_encoder_3")
    clips, width = _joined(one, two), denoiser.config.joint_attention_dim
    long = clips.new_zeros(len(clips), SD3_T5_TOKENS, width) if three is None else three.embeds
    pair: Any = [F.pad(clips, (0, width - clips.shape[-1])), long]
    pooled: Any = [one.pooled, two.pooled]
    return Text(torch.cat(pair, dim=1), torch.cat(pooled, dim=1))


def flux_text(texts: Mapping[str, Text], denoiser: Any) -> Text:
    return Text(texts["text_encoder_2"].embeds, texts["text_encoder"].pooled)


# --- the denoiser ---


@dataclass(frozen=True)
class Inputs:
    """What a denoiser predicts from."""

    latents: Tensor  # (N, C, H, W)
    timesteps: Tensor  # (N,)
    text: Text
    pixels_per_latent: int = 8
    guidance_scale: float = 1.0  # for a denoiser that takes it as an input


def call_unet(unet: Any, inputs: Inputs) -> Tensor:
    return unet(inputs.latents, inputs.timesteps, inputs.text.embeds, return_dict=False)[0]


def call_sdxl(unet: Any, inputs: Inputs) -> Tensor:
    """With the image's size, as uncropped and of its own resolution (arXiv:2307.01952, section 2.2)."""
    embeds: Any = inputs.text.embeds
    height, width = (inputs.pixels_per_latent * size for size in inputs.latents.shape[2:])
    time_ids = embeds.new_tensor([height, width, 0, 0, height, width]).expand(len(embeds), -1)
    options = {"text_embeds": inputs.text.pooled, "time_ids": time_ids}
    return unet(inputs.latents, inputs.timesteps, embeds, added_cond_kwargs=options, return_dict=False)[0]


def call_sd3(transformer: Any, inputs: Inputs) -> Tensor:
    return transformer(
        hidden_states=inputs.latents,
        timestep=inputs.timesteps,
        encoder_hidden_states=inputs.text.embeds,
        pooled_projections=inputs.text.pooled,
        return_dict=False,
    )[0]


def call_pixart(transformer: Any, inputs: Inputs) -> Tensor:
    """PixArt-alpha of 1024 pixels also takes the image's size. The second half of the channels is a variance: not used."""
    latents = inputs.latents
    options: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if transformer.config.sample_size == 128:
        height, width = (inputs.pixels_per_latent * size for size in latents.shape[2:])
        options["resolution"] = latents.new_tensor([[height, width]]).expand(len(latents), -1)
        options["aspect_ratio"] = latents.new_tensor([[height / width]]).expand(len(latents), -1)
    outputs = transformer(
        latents,
        encoder_hidden_states=inputs.text.embeds,
        encoder_attention_mask=inputs.text.mask,
        timestep=inputs.timesteps,
        added_cond_kwargs=options,
        return_dict=False,
    )[0]
    return outputs[:, : latents.shape[1]]


def call_sana(transformer: Any, inputs: Inputs) -> Tensor:
    outputs = transformer(
        inputs.latents,
        encoder_hidden_states=inputs.text.embeds,
        encoder_attention_mask=inputs.text.mask,
        timestep=inputs.timesteps * transformer.config.timestep_scale,
        return_dict=False,
    )[0]
    return outputs[:, : inputs.latents.shape[1]]


def call_flux(transformer: Any, inputs: Inputs) -> Tensor:
    """With 2x2 latents as one token, their places, and the guidance as an input."""
    latents, embeds = inputs.latents, inputs.text.embeds
    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    tokens = F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
    places = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width)).to(tokens)
    guided = transformer.config.guidance_embeds
    outputs = transformer(
        hidden_states=tokens,
        timestep=inputs.timesteps / 1000,
        guidance=tokens.new_full((len(tokens),), inputs.guidance_scale) if guided else None,
        pooled_projections=inputs.text.pooled,
        encoder_hidden_states=embeds,
        txt_ids=tokens.new_zeros(embeds.shape[1], 3) if embeds is not None else None,
        img_ids=places,
        return_dict=False,
    )[0]
    return F.pixel_shuffle(outputs.transpose(1, 2).unflatten(2, (height, width)), 2)


# --- what must fit ---

Widths = tuple[int, int]  # D of the embeddings and P of the pooled text


def _sum(widths: Sequence[Widths]) -> Widths:
    return sum(width for width, _ in widths), sum(pooled for _, pooled in widths)


def _first_width(widths: Mapping[str, Widths], denoiser: Any) -> Widths:
    return widths["text_encoder"][0], 0


def _sd3_widths(widths: Mapping[str, Widths], denoiser: Any) -> Widths:
    clips = _sum([widths["text_encoder"], widths["text_encoder_2"]])
    wanted = denoiser.config.joint_attention_dim
    fits = clips[0] <= wanted and widths.get("text_encoder_3", (wanted, 0))[0] == wanted
    return (wanted if fits else clips[0]), clips[1]


# --- the records ---


@dataclass(frozen=True)
class TextPart:
    """A text encoder of a pipeline with its tokenizer: their classes in transformers, and how they are used."""

    encoder: str
    tokenizer: str
    read: Callable[..., Text]  # called with the text encoder and prompt ids (N, L)
    lora_layers: tuple[str, ...]
    num_tokens: int | None = None  # L; None: the tokenizer's own
    optional: bool = False
    masked: bool = False  # the denoiser takes a mask of the tokens
    lowercase: bool = False  # prompts are read in small letters, without space around them
    instruction: Callable[[], str] | None = None  # what comes before prompts, but not before negative ones
    blocks: str = "layers"  # the name of the list of transformer blocks in the encoder
    num_unread: int = 0  # last blocks whose output nothing reads
    layer: int = 0  # the CLIP layer that is read, counted from the end; 0 if `read` takes no `clip_skip`

    @property
    def is_clip(self) -> bool:
        return self.encoder.startswith("CLIP")


@dataclass(frozen=True)
class Family:
    """Pipelines of one kind. A callable takes the denoiser last, where it needs its configuration."""

    name: str
    pipelines: tuple[str, ...]  # their classes in model_index.json
    text: Mapping[str, TextPart]  # by the name of the text encoder's folder
    join: Callable[[Mapping[str, Text], Any], Text]  # the parts' text as the denoiser reads it
    denoiser: str  # its class in diffusers
    call: Callable[[Any, Inputs], Tensor]  # called with the denoiser and its inputs; returns its outputs (N, C, H, W)
    wanted_widths: Callable[[Any], Widths]  # by the denoiser's configuration
    given_widths: Callable[[Mapping[str, Widths], Any], Widths]  # by the text encoders' own
    pooled: bool = False  # the denoiser takes pooled text too
    flow: bool = False  # flow matching, and not DDIM's noise
    vae: str = "AutoencoderKL"
    vae_instead_of_half: torch.dtype | None = None  # the type of a VAE that overflows in float16
    packed: int = 1  # latents along a side that the denoiser takes as one
    gives_variance: bool = False  # the denoiser may give a variance too, in the second half of its channels
    guidance_input: bool = False  # the denoiser takes the guidance as an input, and no null prompt
    linear_sigmas: bool = False  # the pipeline gives the scheduler evenly spaced noise levels
    kohya: Mapping[str, str] = field(default_factory=dict)  # starts of names in sd-scripts' and ComfyUI's LoRA, by part
    kohya_base: str = ""  # sd-scripts' name of the base model, where the family is enough to know it
    diffusers_lora: tuple[str, ...] = ()  # text encoders whose LoRA diffusers' `load_lora_weights` takes
    architecture: str = ""  # of Stability's Model Spec, where it has one
    default_size: int | None = None  # latents along a side, where the denoiser's configuration does not say it

    @property
    def part(self) -> str:
        """The name of the denoiser's folder."""
        return "unet" if self.denoiser == "UNet2DConditionModel" else "transformer"

    @property
    def masked(self) -> bool:
        """Whether the denoiser takes a mask of the tokens."""
        return any(part.masked for part in self.text.values())

    @property
    def text_encoders(self) -> list[str]:
        """The text encoders that are trained unless others are chosen: the CLIPs, or else the one there is."""
        return [name for name, part in self.text.items() if part.is_clip] or list(self.text)


def _clip(read: Callable[..., Text], projected: bool = False) -> TextPart:
    encoder = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    layer = {clip_last: 1, clip_penultimate: 2}.get(read, 0)
    # The last block of a projected one is read too, through the pooled text.
    return TextPart(
        encoder, "CLIPTokenizer", read, CLIP_LAYERS, num_unread=1 if layer == 2 and not projected else 0, layer=layer
    )


def _t5(num_tokens: int, masked: bool = False, optional: bool = False) -> TextPart:
    read = t5_masked if masked else t5
    options: Any = {"num_tokens": num_tokens, "optional": optional, "masked": masked, "lowercase": masked, "blocks": "block"}
    return TextPart("T5EncoderModel", "T5Tokenizer", read, T5_LAYERS, **options)


def _pixart(name: str, pipeline: str, num_tokens: int) -> Family:
    return Family(
        name,
        (pipeline,),
        {"text_encoder": _t5(num_tokens, masked=True)},
        join=first,
        denoiser="PixArtTransformer2DModel",
        call=call_pixart,
        wanted_widths=lambda config: (config.caption_channels, 0),
        given_widths=_first_width,
        gives_variance=True,
    )


SD = Family(
    "Stable Diffusion 1.x or 2.x",
    ("StableDiffusionPipeline",),
    {"text_encoder": _clip(clip_last)},
    join=first,
    denoiser="UNet2DConditionModel",
    call=call_unet,
    wanted_widths=lambda config: (config.cross_attention_dim, 0),
    given_widths=_first_width,
    kohya={"text_encoder": "lora_te_"},
    diffusers_lora=("text_encoder",),
)
SDXL = Family(
    "Stable Diffusion XL",
    ("StableDiffusionXLPipeline",),
    {"text_encoder": _clip(clip_penultimate), "text_encoder_2": _clip(clip_penultimate, projected=True)},
    join=side_by_side,
    denoiser="UNet2DConditionModel",
    call=call_sdxl,
    wanted_widths=lambda config: (
        config.cross_attention_dim,
        config.projection_class_embeddings_input_dim - NUM_TIME_IDS * config.addition_time_embed_dim,
    ),
    given_widths=lambda widths, _: (_sum(list(widths.values()))[0], widths["text_encoder_2"][1]),
    pooled=True,
    vae_instead_of_half=torch.float32,
    kohya={"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
    diffusers_lora=("text_encoder", "text_encoder_2"),
)
SD3 = Family(
    "Stable Diffusion 3 or 3.5",
    ("StableDiffusion3Pipeline",),
    {
        "text_encoder": _clip(clip_penultimate, projected=True),
        "text_encoder_2": _clip(clip_penultimate, projected=True),
        "text_encoder_3": _t5(SD3_T5_TOKENS, optional=True),
    },
    join=sd3_text,
    denoiser="SD3Transformer2DModel",
    call=call_sd3,
    wanted_widths=lambda config: (config.joint_attention_dim, config.pooled_projection_dim),
    given_widths=_sd3_widths,
    pooled=True,
    flow=True,
    kohya={"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"},
    diffusers_lora=("text_encoder", "text_encoder_2"),
    kohya_base="sd3_v1",
    architecture="stable-diffusion-3",
)
PIXART_ALPHA = _pixart("PixArt-alpha", "PixArtAlphaPipeline", 120)
PIXART_SIGMA = _pixart("PixArt-Sigma", "PixArtSigmaPipeline", 300)
SANA = Family(
    "Sana",
    ("SanaPipeline",),
    {
        "text_encoder": TextPart(
            "Gemma2Model",
            "GemmaTokenizer",
            gemma,
            GEMMA_LAYERS,
            300,
            masked=True,
            lowercase=True,
            instruction=sana_instruction,
        )
    },
    join=first,
    denoiser="SanaTransformer2DModel",
    call=call_sana,
    wanted_widths=lambda config: (config.caption_channels, 0),
    given_widths=_first_width,
    flow=True,
    vae="AutoencoderDC",
    vae_instead_of_half=torch.bfloat16,
    gives_variance=True,
)
FLUX = Family(
    "FLUX.1",
    ("FluxPipeline",),
    {"text_encoder": _clip(clip_pooled), "text_encoder_2": _t5(512)},
    join=flux_text,
    denoiser="FluxTransformer2DModel",
    call=call_flux,
    wanted_widths=lambda config: (config.joint_attention_dim, config.pooled_projection_dim),
    given_widths=lambda widths, _: (widths["text_encoder_2"][0], widths["text_encoder"][0]),
    pooled=True,
    flow=True,
    packed=2,
    guidance_input=True,
    linear_sigmas=True,
    default_size=128,
    kohya={"text_encoder": "lora_te1_", "text_encoder_2": "lora_te3_"},
    diffusers_lora=("text_encoder",),
    kohya_base="flux1",
    architecture="flux-1-dev",
)
FAMILIES = (SD, SDXL, SD3, PIXART_ALPHA, PIXART_SIGMA, SANA, FLUX)
