"""Base model: Stable Diffusion pipelines, their parts loaded strictly, and prompts encoded by their text encoders."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, NotFoundError, reading
from .files import describe_files, quiet_hub, read_json
from .weights import check_content, quiet_libraries

TINY = Path(__file__).parent / "tiny"
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by --mixed-precision
NUM_TIME_IDS = 6  # of SDXL's base U-Net: original size, crop's corner and target size, each as height and width
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")  # one of them holds the words
SCHEDULER_FILE = "scheduler_config.json"
JSON_FILES = (
    "config.json", "preprocessor_config.json", "special_tokens_map.json", "tokenizer_config.json", SCHEDULER_FILE,
    *TOKENIZER_FILES,
)  # fmt: skip
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?\."
    r"(?P<kind>safetensors|bin)"
)
# diffusers' schedulers of the noise process that DDIM has too: alphas from betas, by numbered training timesteps.
SCHEDULERS = (
    "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep",
    "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete",
    "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD",
    "UniPCMultistep",
)  # fmt: skip
# Options of a U-Net that takes more than latents, a timestep and text: class labels, images, or (LCM's) guidance.
MORE_CONDITIONING = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")


# --- loading ---


@dataclass(frozen=True)
class Model:
    """The parts of a Stable Diffusion 1.x, 2.x or XL pipeline, frozen and in inference precision."""

    name: str
    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any
    scheduler: Any
    tokenizer_2: Any = None  # only SDXL (arXiv:2307.01952) has these two
    text_encoder_2: Any = None
    zero_null: bool = False  # the null prompt's embedding is zeros and not an empty prompt's, as in the plain SDXL pipeline

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def tokenizers(self) -> list[Any]:
        """The tokenizer, or SDXL's two."""
        return [self.tokenizer] if self.tokenizer_2 is None else [self.tokenizer, self.tokenizer_2]

    @property
    def text_encoders(self) -> dict[str, Any]:
        """The text encoder, or SDXL's two, by name."""
        second = {} if self.text_encoder_2 is None else {"text_encoder_2": self.text_encoder_2}
        return {"text_encoder": self.text_encoder} | second

    @property
    def policy_parts(self) -> dict[str, Any]:
        """The parts that may carry LoRA, by name."""
        return self.text_encoders | {"unet": self.unet}


def load_model(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Load a pipeline's parts: `tiny`, a folder in diffusers' format, or a name on the hub.

    Raises:
        NotFoundError: there is no such model.
        InputError: it is not a Stable Diffusion 1.x, 2.x or XL pipeline, or tensors are missing from its files.
    """
    source = find_model(name)
    with reading_model(name):
        second, zero_null = pipeline_kind(source)
        parts = {"scheduler": load_scheduler(source)} | load_tokenizers(source, second)
        parts |= load_parts(source, dtype, second)
        model = Model(name, zero_null=zero_null, **parts)
        check_text(model, source)
        _check_kind(model)
    for part in (*model.policy_parts.values(), model.vae):
        part.to(device)
    if torch.device(device).type == "cuda":
        model.unet.to(memory_format=torch.channels_last)
        model.vae.to(memory_format=torch.channels_last)
    return model


def pipeline_kind(source: str) -> tuple[bool, bool]:
    """Whether a pipeline has SDXL's second text encoder, and whether its null prompt is zeros, by its folder or hub name.

    Raises:
        InputError: it has the second text encoder alone, as SDXL's refiner.
    """
    from diffusers import DiffusionPipeline

    path = Path(source, "model_index.json")
    if path.parent.is_dir() and not path.is_file():
        raise NotFoundError(f"model: {source!r} could not be loaded: there is no model_index.json in it")
    index: Any = read_json(path) if path.is_file() else DiffusionPipeline.load_config(source)
    if "unet" not in index:
        raise InputError(f"model: the model_index.json of {source!r} names no U-Net")
    second, first = ((index.get(part) or [None])[-1] is not None for part in ("text_encoder_2", "text_encoder"))
    if second and not first:
        raise InputError(f"model: {source!r} has only the second text encoder, as SDXL's refiner; give the base pipeline")
    return second, second and index.get("force_zeros_for_empty_prompt", True)


def load_scheduler(source: str) -> Any:
    """A pipeline's noise schedule, of whatever sampler it comes with, for DDIM.

    What the file of a known scheduler leaves out of the noise is that scheduler's default, and not DDIM's.

    Raises:
        InputError: the scheduler has another noise process, or its file does not say which.
    """
    from diffusers import DDIMScheduler

    config: Any = scheduler_config(source)
    with reading_part(source, "scheduler", (SCHEDULER_FILE,)):
        config = _noise_defaults(config, source) | config
        # Schedulers that know neither option do not clip, and end in a step with noise.
        if not config["_class_name"].startswith(("DDIM", "DDPM")):
            config = {"clip_sample": False, "set_alpha_to_one": False} | config
        if not pipeline_kind(source)[0]:  # as the plain pipeline does for all but SDXL
            config["clip_sample"] = False
            config["steps_offset"] = 1 if isinstance(config.get("steps_offset", 0), int) else config["steps_offset"]
        return DDIMScheduler.from_config(config)


def scheduler_config(source: str) -> dict[str, Any]:
    """The configuration of a pipeline's scheduler, which names its class; raises InputError."""
    from diffusers import DDIMScheduler

    with reading_part(source, "scheduler", (SCHEDULER_FILE,)):
        config: Any = dict(DDIMScheduler.load_config(source, subfolder="scheduler"))
    if not isinstance(config.get("_class_name"), str):
        raise InputError(f"model: {Path(source, 'scheduler', SCHEDULER_FILE)} names no scheduler as its _class_name")
    return config


def _noise_defaults(config: dict[str, Any], source: str) -> dict[str, Any]:
    """What a scheduler's class takes for what its configuration does not say of the noise.

    Raises:
        InputError: it is not DDIM's kind of noise, or neither the class nor the configuration says what DDIM needs.
    """
    import diffusers

    where, name = f"the {SCHEDULER_FILE} of {source!r}", config["_class_name"]
    cls, known = getattr(diffusers, name, None), name.removesuffix("Scheduler") in SCHEDULERS
    flow = config.get("use_flow_sigmas") or "flow" in str(config.get("prediction_type"))
    if flow or config.get("timestep_type") == "continuous" or (cls is not None and not known):
        raise InputError(
            f"model: {where} is of a {name} whose noise is not DDIM's (as in flow matching or EDM), which is not supported; "
            "give a model with a scheduler such as DDIM, PNDM or EulerDiscrete"
        )
    parameters = inspect.signature(cls).parameters if cls is not None else {}
    fields = (*NOISE, "trained_betas", "set_alpha_to_one", "rescale_betas_zero_snr")
    defaults = {field: parameters[field].default for field in fields if field in parameters}
    wanted = {"num_train_timesteps", "prediction_type"} if config.get("trained_betas") else NOISE
    if missing := sorted(field for field in wanted if (defaults | config).get(field) is None):
        raise InputError(f"model: {where} is of a {name}, which texforce does not know, and lacks {', '.join(missing)}")
    return defaults


def find_model(name: str) -> str:
    """The folder or hub name of a model.

    Raises:
        NotFoundError: there is no such folder. InputError: the hub does not give the model.
    """
    from huggingface_hub import hf_hub_download

    quiet_hub()
    source = str(TINY) if name == "tiny" else name
    if Path(source).is_file():
        raise InputError(f"model: {name!r} is a file; give 'tiny', a folder in diffusers' format or a name on the hub")
    if not Path(source).is_dir():
        if source.count("/") != 1 or source.startswith((".", "/", "~")):
            raise NotFoundError(f"model: there is no folder {name!r}; give 'tiny', a diffusers folder or a name on the hub")
        with reading_model(name):  # one question to the hub before dozens, each tried again for a while
            hf_hub_download(source, "model_index.json")
    return source


def revision(name: str) -> Any:
    """The version of a model: the commit in the hub's cache, or the SHA-256 of the files read of a folder; None for tiny."""
    from huggingface_hub import try_to_load_from_cache

    if name == "tiny":
        return None
    if Path(name).is_dir():
        read = ("model_index.json", "scheduler", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet", "vae")
        return {part: describe_files(Path(name, part))["sha256"] for part in read if Path(name, part).exists()}
    cached = try_to_load_from_cache(name, "model_index.json")
    return Path(cached).parent.name if isinstance(cached, str) else None  # .../snapshots/REVISION/model_index.json


def reading_model(name: str) -> contextlib.AbstractContextManager[None]:
    """Raise InputError, with the model's name, for whatever goes wrong while its files are read."""
    return reading(f"model: {name!r} could not be loaded as a diffusers pipeline", InputError)


@contextlib.contextmanager
def reading_part(source: str, part: str, needed: Sequence[str] = ("config.json",)) -> Iterator[None]:
    """Raise InputError, with the part's folder, for whatever goes wrong while it is read, and name a file that is no JSON.

    One of the files `needed` must be there: where the part's folder lacks it, diffusers reads the pipeline's.
    """
    quiet_libraries()
    folder = Path(source, part)
    if Path(source).is_dir():
        if not any((folder / name).is_file() for name in needed):
            files = " or ".join(needed)
            raise NotFoundError(f"model: the {part} could not be loaded: there is no {files} in {str(folder)!r}")
        for name in JSON_FILES:
            if (folder / name).is_file():
                read_json(folder / name)
    with reading(f"model: the {part} in {str(folder)!r} could not be loaded", InputError):
        yield


def weight_arguments(folder: Path) -> dict[str, Any]:
    """Arguments by which `from_pretrained` finds the weights in a part's folder: plain ones, or else the only variant.

    Raises:
        NotFoundError: there are none. InputError: there are several variants, or a file holds no weights.
    """
    matches = [match for match in (WEIGHTS.fullmatch(file.name) for file in sorted(folder.glob("*"))) if match]
    if not matches:
        raise NotFoundError(f"model: there are no weights in {str(folder)!r}, as model.safetensors")
    plain = [match for match in matches if match["variant"] is None]
    if len(variants := {match["variant"] for match in plain or matches}) > 1:
        raise InputError(f"model: {str(folder)!r} holds weights of the variants {', '.join(sorted(variants))}; keep one")
    kind = max(match["kind"] for match in plain or matches)  # safetensors rather than bin
    for match in plain or matches:
        if match["kind"] == kind:
            with reading(f"model: {str(folder / match[0])!r} holds no weights", InputError):
                check_content(folder / match[0])
    return {"variant": variants.pop(), "use_safetensors": kind == "safetensors"}


def load_tokenizers(source: str, second: bool = False) -> dict[str, Any]:
    """The tokenizer of a pipeline; with `second` also the one that Stable Diffusion XL has for its second text encoder."""
    from transformers import CLIPTokenizer

    parts = {}
    for part in ("tokenizer", "tokenizer_2") if second else ("tokenizer",):
        with reading_part(source, part, TOKENIZER_FILES):
            parts[part] = CLIPTokenizer.from_pretrained(source, subfolder=part)
    return parts


def load_parts(source: str, dtype: torch.dtype = torch.float32, second: bool = False) -> dict[str, Any]:
    """The networks of a pipeline, frozen; with `second` also the second text encoder that Stable Diffusion XL has."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    classes = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
    dtypes = dict.fromkeys(classes, dtype)
    if second:
        classes["text_encoder_2"], dtypes["text_encoder_2"] = CLIPTextModelWithProjection, dtype
        with reading_part(source, "vae"):
            config: Any = AutoencoderKL.load_config(source, subfolder="vae")
            if dtype == torch.float16 and config.get("force_upcast", True):  # SDXL's overflows; others say so for no reason
                dtypes["vae"] = torch.float32
    return {part: load_network(cls, source, part, dtypes[part]) for part, cls in classes.items()}


def check_text(model: Any, source: str) -> None:
    """Check that the tokenizers of a pipeline, or a Model, fit its text encoders.

    Raises:
        InputError: one does not.
    """
    for part, (tokenizer, text_encoder) in _text_pairs(model).items():
        config = text_encoder.config
        with reading(f"model: the {part} in {str(Path(source, part))!r} does not fit its text encoder", InputError):
            check_tokenizer(tokenizer, config.vocab_size)
            # transformers makes a tokenizer of no length limit where its configuration is missing.
            if tokenizer.model_max_length > config.max_position_embeddings:
                length = tokenizer.model_max_length
                raise ValueError(f"it allows prompts of {length} tokens, and {config.max_position_embeddings} are read")
            # 2 stands for any in transformers; where no token has the number, the start token's embedding would be pooled.
            if config.eos_token_id not in (2, tokenizer.eos_token_id):
                raise ValueError(f"it ends prompts with {tokenizer.eos_token_id}, and {config.eos_token_id} is looked for")


def _text_pairs(model: Any) -> dict[str, tuple[Any, Any]]:
    """The tokenizers of a model by their names, each with its text encoder."""
    names = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
    pairs = {name: (getattr(model, name, None), getattr(model, encoder, None)) for name, encoder in names.items()}
    return {name: pair for name, pair in pairs.items() if None not in pair}


def _check_kind(model: Model) -> None:
    """Refuse refiners, inpainting models and parts that do not fit each other."""
    name, unet, vae, second = model.name, model.unet.config, model.vae.config, model.text_encoder_2
    pairs = _text_pairs(model).values()
    if len({tokenizer.model_max_length for tokenizer, _ in pairs}) > 1:
        raise InputError(f"model: the two tokenizers of {name!r} differ in length")
    width = sum(text_encoder.config.hidden_size for _, text_encoder in pairs)
    if unet.addition_embed_type != (None if second is None else "text_time"):
        raise InputError(
            f"model: the U-Net of {name!r} wants {unet.addition_embed_type} conditioning beside the prompt's embeddings, "
            f"which {len(pairs)} text encoder(s) do not go with"
        )
    if second is not None:
        wanted = unet.projection_class_embeddings_input_dim
        given = second.config.projection_dim + NUM_TIME_IDS * unet.addition_time_embed_dim
        if wanted != given:
            raise InputError(
                f"model: the U-Net of {name!r} takes {wanted} numbers of pooled text and sizes, as SDXL's refiner does or "
                f"with another text encoder; here there are {given}"
            )
        if second.config.projection_dim > width:
            raise InputError(f"model: the pooled text of {name!r} is wider than its embeddings")
    unet_size(model.unet)
    for option in MORE_CONDITIONING:
        if unet.get(option) is not None:
            raise InputError(
                f"model: the U-Net of {name!r} has {option}, so that it takes more than a prompt: not supported"
            )
    if unet.in_channels != vae.latent_channels or unet.out_channels != vae.latent_channels:
        raise InputError(
            f"model: the U-Net of {name!r} takes {unet.in_channels} channels and gives {unet.out_channels}, its VAE makes "
            f"{vae.latent_channels}"
        )
    if vae.out_channels != 3:
        raise InputError(f"model: the VAE of {name!r} makes images of {vae.out_channels} channels, not 3")
    if vae.latents_mean is not None:
        raise InputError(f"model: the VAE of {name!r} shifts its latents, which is not supported")
    if unet.cross_attention_dim != width:
        raise InputError(
            f"model: the U-Net of {name!r} takes embeddings of {unet.cross_attention_dim}, its text encoder makes {width}"
        )


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Check that a tokenizer fits a text encoder; raises ValueError.

    Where files are missing transformers makes a tokenizer that knows no word.
    """
    size = 1 + max(tokenizer.get_vocab().values(), default=-1)  # numbers may be left out
    if not len(tokenizer.all_special_ids) < len(tokenizer) <= size <= vocab_size:
        raise ValueError(
            f"a tokenizer is missing, or of another model: it knows {size} tokens, its text encoder {vocab_size}"
        )


def load_network(cls: Any, source: str, part: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a network of a pipeline, frozen.

    diffusers and transformers fill missing tensors at random with only a warning, here it is an error.

    Raises:
        InputError: files are missing or damaged, or tensors missing or of other shapes.
    """
    with reading_part(source, part):
        place, options = source, {"subfolder": part}
        if Path(source).is_dir():  # not as a subfolder: diffusers looks for weights in the pipeline's folder first
            place, options = str(Path(source, part)), weight_arguments(Path(source, part))
        model, info = cls.from_pretrained(place, torch_dtype=dtype, output_loading_info=True, **options)
        missing = [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())]
        if missing:
            raise InputError(f"model: {source}/{part} lacks {len(missing)} tensors or has wrong shapes, as {missing[0]}")
    return model.requires_grad_(False).eval()


# --- prompts ---


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Token ids (N, L) int64, padded or cut to the L tokens that the text encoder reads (77 of Stable Diffusion).

    Raises:
        InputError: a prompt is not text.
    """
    length, texts = tokenizer.model_max_length, convert_prompts(tokenizer, prompts)
    return torch.tensor(tokenizer(texts, padding="max_length", max_length=length, truncation=True).input_ids)


def convert_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts with every token of a textual inversion of several vectors, which diffusers saves as `<cat> <cat>_1 ...`.

    The pipeline converts them so before it tokenizes them. Raises InputError for a prompt that is not text.
    """
    from diffusers.loaders import TextualInversionLoaderMixin

    _check_text(prompts)
    if not any(token.endswith("_1") for token in tokenizer.added_tokens_encoder):
        return list(prompts)
    return TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)


def _check_text(prompts: Sequence[str]) -> None:
    if any("\ud800" <= letter <= "\udfff" for prompt in prompts for letter in prompt):
        raise InputError("prompt: it holds a lone surrogate, which is not text")


def tokenize_for(model: Model, prompts: Sequence[str]) -> Tensor:
    """Prompt ids (N, L) for `encode`, as of `tokenize`; for SDXL (N, 2L), those of both tokenizers side by side.

    The two differ in how they pad.
    """
    return torch.cat([tokenize(tokenizer, prompts) for tokenizer in model.tokenizers], dim=1)


@dataclass(frozen=True)
class Cut:
    """The prompts among others whose end is not read: `tokenize` cuts it off, as diffusers' pipelines do."""

    prompts: list[str]
    num_prompts: int  # with those that are read whole
    num_tokens: int  # that the text encoder reads

    def __str__(self) -> str:
        first = f", as {self.prompts[0][:60]!r}..." if self.prompts else ""
        number = f"{len(self.prompts)} of {self.num_prompts} prompts"
        return f"{number} are cut to the {self.num_tokens} tokens that the text encoder reads{first}"


def find_cut(tokenizers: Sequence[Any], prompts: Sequence[str]) -> Cut:
    """The prompts that are longer than the text encoders read, by their tokenizers.

    Raises:
        InputError: a prompt is not text.
    """
    distinct = dict.fromkeys(prompts)
    for tokenizer in tokenizers if distinct else ():
        texts = convert_prompts(tokenizer, list(distinct))
        for prompt, ids in zip(distinct, tokenizer(texts, verbose=False).input_ids, strict=True):
            distinct[prompt] = distinct[prompt] or len(ids) > tokenizer.model_max_length
    return Cut([prompt for prompt, is_cut in distinct.items() if is_cut], len(distinct), tokenizers[0].model_max_length)


def open_tokenizers(name: str) -> list[Any]:
    """The tokenizers of a model, without its networks; raises as `load_model`."""
    source = find_model(name)
    with reading_model(name):
        return list(load_tokenizers(source, pipeline_kind(source)[0]).values())


def encode(model: Model, prompt_ids: Tensor) -> Tensor:
    """Prompt embeddings (N, L, D) float32 of ids (N, L); for SDXL (N, L+1, D) of ids (N, 2L).

    SDXL's U-Net reads the last but one hidden states of both text encoders, joined along D, and separately the
    second one's pooled embedding (N, P). That is the last row here, padded with zeros to D, and `PooledText` takes it out
    again, so that code which gathers or differentiates embeddings handles one tensor.

    In half precision and on a GPU each prompt is encoded by itself: rounding depends on the size of a batch there, and
    sampling and training, whose batches differ, must read the same.
    """
    alone = next(model.unet.parameters()).dtype != torch.float32 or prompt_ids.device.type != "cpu"
    return torch.cat([_encode(model, ids) for ids in prompt_ids.split(1 if alone else len(prompt_ids))])


def _encode(model: Model, prompt_ids: Tensor) -> Tensor:
    if model.text_encoder_2 is None:
        return model.text_encoder(input_ids=prompt_ids).last_hidden_state.float()
    ids, ids_2 = prompt_ids.chunk(2, dim=1)
    first = model.text_encoder(input_ids=ids, output_hidden_states=True)
    second = model.text_encoder_2(input_ids=ids_2, output_hidden_states=True)
    embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    pooled = nn.functional.pad(second.text_embeds, (0, embeds.shape[-1] - second.text_embeds.shape[-1]))
    return torch.cat([embeds, pooled[:, None]], dim=1).float()


def encode_null(model: Model) -> Tensor:
    """The null prompt's embedding (1, L, D)."""
    embeds = encode(model, tokenize_for(model, [""]).to(model.device))
    return torch.zeros_like(embeds) if model.zero_null else embeds


def encode_distinct(model: Model, prompt_ids: Tensor, null_embeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Embeddings (1+U, L, D) of the null prompt and every distinct prompt of ids (N, L); the row of each id (N,).

    The null prompt is encoded too unless its embedding (1, L, D) is given or zeros.
    """
    distinct, rows = prompt_ids.unique(dim=0, return_inverse=True)
    if null_embeds is None and not model.zero_null:
        null_ids = tokenize_for(model, [""]).to(prompt_ids.device)
        return encode(model, torch.cat([null_ids, distinct])), 1 + rows
    embeds = encode(model, distinct)
    return torch.cat([torch.zeros_like(embeds[:1]) if null_embeds is None else null_embeds, embeds]), 1 + rows


@contextlib.contextmanager
def adapters_disabled(model: Model) -> Iterator[None]:
    """Switch the model's peft adapters off."""
    with contextlib.ExitStack() as stack:
        for part in model.policy_parts.values():
            if hasattr(part, "disable_adapter"):
                stack.enter_context(part.disable_adapter())
        yield


@dataclass(frozen=True)
class Conditioning:
    """Embeddings of N prompts, and of the null prompt for guidance, as `encode` gives them."""

    prompt_embeds: Tensor  # (N, L, D)
    null_embeds: Tensor  # (1, L, D)


@dataclass(frozen=True)
class PooledText:
    """SDXL's conditioning beside the prompt embeddings: pooled text and image sizes (arXiv:2307.01952, section 2.2)."""

    width: int  # P
    pixels_per_latent: int

    def take_apart(self, embeds: Tensor, latents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeddings (N, L, D) and diffusers' added_cond_kwargs of embeddings (N, L+1, D) for latents (N, C, H, W).

        The sizes are the plain pipeline's defaults: the image is of its own size, and not cropped.
        """
        height, width = (self.pixels_per_latent * size for size in latents.shape[2:])
        time_ids = embeds.new_tensor([height, width, 0, 0, height, width]).expand(len(embeds), -1)
        return embeds[:, :-1], {"text_embeds": embeds[:, -1, : self.width], "time_ids": time_ids}


def pooled_text(model: Model) -> PooledText | None:
    """The pooled text of SDXL; None for other models."""
    if model.text_encoder_2 is None:
        return None
    return PooledText(model.text_encoder_2.config.projection_dim, pixels_per_latent(model.vae))


def pixels_per_latent(vae: Any) -> int:
    """Pixels per latent along a side; 8 for all published models."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def unet_size(unet: Any) -> int | None:
    """Latents along a side that a U-Net was made for; None if its configuration names no size. Raises ValueError."""
    size = unet.config.sample_size
    if size is None:
        return None
    sizes = size if isinstance(size, list | tuple) else [size]
    if not all(isinstance(side, int) and side > 0 for side in sizes) or len(set(sizes)) != 1:
        raise ValueError(f"the U-Net's sample_size must be a number of latents, or two equal ones, not {size!r}")
    return sizes[0]


def latent_shape(model: Model, resolution: int | None = None) -> tuple[int, int, int]:
    """Channels, height and width of the latents of a square image; by default of the size that the U-Net was made for.

    Raises:
        InputError: the resolution is not a multiple of what the models need, or neither it nor the U-Net's size is given.
    """
    factor = pixels_per_latent(model.vae)
    levels = 2 ** (len(model.unet.config.block_out_channels) - 1)
    size = unet_size(model.unet) if resolution is None else resolution / factor
    if size is None:
        raise InputError("resolution: the U-Net of this model does not say for which size it was made; give --resolution")
    if size < levels or size % levels:
        raise InputError(f"resolution: must be a multiple of {factor * levels} pixels for this model, not {resolution}")
    return model.unet.config.in_channels, int(size), int(size)
