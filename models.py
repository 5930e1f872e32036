"""Base models: pipelines of the families in families.py, loaded strictly, and prompts encoded by their text encoders."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import model_files, single_file
from .config import check_model
from .errors import InputError, NotFoundError, reading
from .families import FAMILIES, NUM_TIME_IDS, SD, SDXL, Family, Inputs, Packing, Text, TextPart
from .files import check_content, describe_files, quiet_hub, read_json, sha256
from .presets import DISTILLED, EMBEDDED
from .tokenization import (
    EncodeOnce,
    Reader,
    check_weighable,
    find_cut,
    learned_tokens,
    num_learned,
    read_weights,
    shares_of,
    texts_at,
    weigh,
    weighted_ids,
    without_learned,
)
from .weights import quiet_libraries

TINY, TINY_FLOW = (Path(__file__).parent / name for name in EMBEDDED)
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by --mixed-precision
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")  # one of them holds the words
SCHEDULER_FILE = "scheduler_config.json"
JSON_FILES = (
    "config.json", "preprocessor_config.json", "special_tokens_map.json", "tokenizer_config.json", SCHEDULER_FILE,
    "tokenizer.json", "vocab.json",
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
    """The parts of a pipeline, frozen and in inference precision; those that its family has not are None."""

    name: str
    tokenizer: Any
    text_encoder: Any
    unet: Any = None
    vae: Any = None
    scheduler: Any = None
    tokenizer_2: Any = None
    text_encoder_2: Any = None
    tokenizer_3: Any = None
    text_encoder_3: Any = None
    transformer: Any = None
    family: Family = SD
    zero_null: bool = False  # the null prompt's embedding is zeros, as in SDXL's plain pipeline, or there is no null prompt
    encode_once: dict[str, EncodeOnce] = field(default_factory=dict)  # text encoders that are off the device
    num_chunks: int = 1  # in which each CLIP reads a prompt, as `find_chunks` counts them
    clip_skip: int = 0  # last layers of the CLIPs that are skipped, but not for negative and null prompts, as in diffusers

    @property
    def denoiser(self) -> Any:
        """The U-Net, or the transformer."""
        return getattr(self, self.family.part)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def schedule_device(self) -> torch.device:
        """Where noise schedules lie: on the device, or on the CPU where the networks are an outline."""
        return torch.device("cpu") if self.device.type == "meta" else self.device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's."""
        return next(self.denoiser.parameters()).dtype

    @property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizers, by their text encoders' names."""
        found = {name: getattr(self, name.replace("text_encoder", "tokenizer")) for name in self.family.text}
        return {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}

    @property
    def text_encoders(self) -> dict[str, Any]:
        """The text encoders by name."""
        found = {name: getattr(self, name) for name in self.family.text}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    @property
    def policy_parts(self) -> dict[str, Any]:
        """The parts that may carry LoRA, by name."""
        return self.text_encoders | {self.family.part: self.denoiser}

    @functools.cached_property
    def readers(self) -> dict[str, Reader]:
        """How prompts become ids, by their text encoders' names."""
        parts = {name: (tokenizer, self.family.text[name]) for name, tokenizer in self.tokenizers.items()}
        chunks = {name: self.num_chunks if part.is_clip else 1 for name, (_, part) in parts.items()}
        return {name: Reader(*pair, chunks[name], num_learned(getattr(self, name))) for name, pair in parts.items()}

    @property
    def packing(self) -> Packing:
        """How the text is one tensor."""
        pooled_width = self.family.wanted_widths(self.denoiser.config)[1]
        return Packing(pooled_width, self.family.masked)


def load_model(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, text_on_cpu: bool = False
) -> Model:
    """Load a pipeline's parts: `tiny`, a folder in diffusers' format, a checkpoint of one file, or a name on the hub.

    With `text_on_cpu` the text encoders stay off the device, until `offload_text_encoders` has sorted them.

    Raises:
        NotFoundError: there is no such model.
        InputError: it is of no family here, or tensors are missing from its files.
    """
    source = find_model(name)
    with reading_model(name):
        kind = pipeline_kind(source)
        parts = {"scheduler": load_scheduler(source)} | load_tokenizers(source, kind)
        parts |= load_parts(source, kind, dtype, checkpoint_file(name))
        model = Model(name, family=kind.family, zero_null=kind.zero_null, **parts)
        check_text(model, source)
        _check_kind(model)
    for part in (model.denoiser, model.vae, *(() if text_on_cpu else model.text_encoders.values())):
        part.to(device)
    if torch.device(device).type == "cuda":
        if model.unet is not None:
            model.unet.to(memory_format=torch.channels_last)
        model.vae.to(memory_format=torch.channels_last)
    return model


def outline_model(name: str, dtype: torch.dtype = torch.float32) -> Model | None:
    """A published Stable Diffusion that is not in the hub's cache, its networks on the meta device: sizes without weights.

    Nothing is asked of the hub. None where the model is here, or is no Stable Diffusion by its name.
    """
    import diffusers
    import transformers
    from huggingface_hub import try_to_load_from_cache

    source = None if Path(name).exists() else single_file.published(name)
    if source is None:
        return None
    begun = (try_to_load_from_cache(name, file) for file in ("model_index.json", "unet/config.json"))
    if all(isinstance(path, str) for path in begun):  # the first alone is asked for before a download
        return None
    kind = pipeline_kind(source)
    with torch.device("meta"):
        parts = {
            part: getattr(diffusers, cls)
            for part, cls in ((kind.family.part, kind.family.denoiser), ("vae", kind.family.vae))
        }
        parts = {part: cls.from_config(cls.load_config(source, subfolder=part)) for part, cls in parts.items()}
        for part, record in kind.text_parts.items():
            cls = getattr(transformers, record.encoder)
            parts[part] = cls(cls.config_class.from_pretrained(source, subfolder=part))
    # Not the networks' own `to`, which warns of what it does to loaded weights.
    parts = {part: torch.nn.Module.to(network, dtype).requires_grad_(False).eval() for part, network in parts.items()}
    parts |= {"scheduler": load_scheduler(source)} | load_tokenizers(source, kind)
    return Model(name, family=kind.family, zero_null=kind.zero_null, **parts)


@dataclass(frozen=True)
class Kind:
    """What a pipeline's model_index.json says."""

    family: Family
    text_parts: dict[str, TextPart]  # those that are there, by name
    zero_null: bool = False  # as of Model


def pipeline_kind(source: str) -> Kind:
    """The family of a pipeline and the text encoders that it has, by its folder or hub name.

    Raises:
        InputError: it is of no family here, or lacks a part, as SDXL's refiner does.
    """
    from diffusers import DiffusionPipeline

    path = Path(source, "model_index.json")
    if path.parent.is_dir() and not path.is_file():
        raise NotFoundError(f"model: {source!r} could not be loaded: there is no model_index.json in it")
    index: Any = read_json(path) if path.is_file() else DiffusionPipeline.load_config(source)
    there = {name for name, value in index.items() if isinstance(value, list) and value[-1:] != [None]}
    family = _family_of(index.get("_class_name"), there, source)
    missing = [name for name, part in family.text.items() if name not in there and not part.optional]
    if missing == ["text_encoder"] and family is SDXL:
        raise InputError(f"model: {source!r} has only the second text encoder, as SDXL's refiner; give the base pipeline")
    if missing or family.part not in there:
        raise InputError(f"model: the model_index.json of {source!r} names no {', '.join(missing) or family.part}")
    text_parts = {name: part for name, part in family.text.items() if name in there}
    zero_null = family is SDXL and index.get("force_zeros_for_empty_prompt", True)
    return Kind(family, text_parts, zero_null or family.guidance_input)


def family_of(pipeline: Any) -> Family:
    """The family of a Model, or of one of diffusers' pipelines."""
    if isinstance(pipeline, Model):
        return pipeline.family
    there = {name for name in ("unet", "transformer", "text_encoder_2") if getattr(pipeline, name, None) is not None}
    return _family_of(type(pipeline).__name__, there, type(pipeline).__name__)


def _family_of(pipeline: Any, there: set[str], source: str) -> Family:
    """The family of a pipeline's class; those of Stable Diffusion's U-Nets have many, and are known by their parts."""
    for family in FAMILIES:
        if family.part == "transformer" and pipeline in family.pipelines:
            return family
    if "unet" in there:
        return SDXL if "text_encoder_2" in there else SD
    known = ", ".join(name for family in FAMILIES for name in family.pipelines)
    if "transformer" in there:
        raise InputError(f"model: {source!r} is a {pipeline}, which is not supported; known are {known}")
    raise InputError(f"model: the model_index.json of {source!r} names no U-Net and no transformer")


def load_scheduler(source: str) -> Any:
    """A pipeline's noise schedule, of whatever sampler it comes with: for DDIM, or for Euler's method in flow matching.

    What the file of a known scheduler leaves out of the noise is that scheduler's default, and not DDIM's.

    Raises:
        InputError: the scheduler has another noise process, or its file does not say which.
    """
    from diffusers import DDIMScheduler

    config: Any = scheduler_config(source)
    family = pipeline_kind(source).family
    if family.flow:
        return _flow_scheduler(config, source)
    with reading_part(source, "scheduler", (SCHEDULER_FILE,)):
        config = _noise_defaults(config, source) | config
        # Schedulers that know neither option do not clip, and end in a step with noise.
        if not config["_class_name"].startswith(("DDIM", "DDPM")):
            config = {"clip_sample": False, "set_alpha_to_one": False} | config
        if family is SD:  # as its plain pipeline does
            config["clip_sample"] = False
            config["steps_offset"] = 1 if isinstance(config.get("steps_offset", 0), int) else config["steps_offset"]
        return DDIMScheduler.from_config(config)


def _flow_scheduler(config: dict[str, Any], source: str) -> Any:
    """The scheduler of a flow matching pipeline; Sana's comes as a DPM-Solver of such noise.

    Raises:
        InputError: it is another scheduler.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    name = config["_class_name"]
    with reading_part(source, "scheduler", (SCHEDULER_FILE,)):
        if name == "DPMSolverMultistepScheduler" and config.get("use_flow_sigmas"):
            config = {"num_train_timesteps": config.get("num_train_timesteps", 1000), "shift": config.get("flow_shift", 1.0)}
        elif name != "FlowMatchEulerDiscreteScheduler" or config.get("invert_sigmas") or config.get("stochastic_sampling"):
            raise InputError(
                f"model: the {SCHEDULER_FILE} of {source!r} is of a {name} whose noise is not that of flow matching as "
                "FlowMatchEulerDiscrete has it, which is not supported"
            )
        return FlowMatchEulerDiscreteScheduler.from_config(config)


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
    """The folder or hub name of a model; of a checkpoint of one file, that of its configuration.

    Raises:
        NotFoundError: there is no such folder. InputError: the hub does not give the model, or a file is no checkpoint.
    """
    from huggingface_hub import hf_hub_download

    quiet_hub()
    source = str(Path(__file__).parent / name) if name in EMBEDDED else name
    if file := checkpoint_file(source):
        base = single_file.base_model(single_file.header_of(file)) or ""
        is_here = base in EMBEDDED or bool(
            base and Path(base, "model_index.json").is_file()
        )  # a foreign file asks nothing of the hub
        return find_model(base) if is_here else single_file.configuration(file)
    if not Path(source).is_dir():
        check_model(name)
        with reading_model(name):  # one question to the hub before dozens, each tried again for a while
            hf_hub_download(source, "model_index.json")
    return source


def distillation_note(model: Model, algorithm: str) -> str | None:
    """Why an algorithm is known to do badly on a model that was distilled to few steps; None where nothing is known.

    A model's name says that it was, or, of FLUX.1's, that its transformer takes no guidance (schnell).
    """
    schnell = model.family.guidance_input and not model.denoiser.config.guidance_embeds
    if algorithm == "gradient" or not (schnell or DISTILLED.search(Path(model.name).name)):
        return None
    if algorithm == "ppo" and not model.family.flow:
        return None  # its few steps are DDIM's
    return (
        "it was distilled to few steps, and no longer predicts the mean at every level of noise, on which "
        f"{algorithm} rests (Flow-Factory's issue 158: it worked a little); --algorithm gradient needs no such thing"
    )


def checkpoint_file(name: str) -> Path | None:
    """The file of a model that is a checkpoint of one file; None for another model.

    Raises:
        InputError: it is another file.
    """
    if not Path(name).is_file():
        return None
    if Path(name).suffix not in single_file.ENDINGS:
        endings = " or ".join(single_file.ENDINGS)
        raise InputError(f"model: {name!r} is no {endings}; give 'tiny', a folder in diffusers' format or a name on the hub")
    return Path(name).resolve()


def revision(name: str) -> Any:
    """The version of a model: its commit in the hub's cache, or the SHA-256 of the files read; None if it is embedded."""
    from huggingface_hub import try_to_load_from_cache

    if name in EMBEDDED:
        return None
    if file := checkpoint_file(name):
        return sha256(file)
    if Path(name).is_dir():
        texts = [f"{part}{number}" for part in ("tokenizer", "text_encoder") for number in ("", "_2", "_3")]
        read = ("model_index.json", "scheduler", *texts, "unet", "transformer", "vae")
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


def load_tokenizers(source: str, kind: Kind) -> dict[str, Any]:
    """The tokenizers of a pipeline, by their folders' names."""
    import transformers

    parts = {}
    for text_encoder, part in kind.text_parts.items():
        name = text_encoder.replace("text_encoder", "tokenizer")
        with reading_part(source, name, TOKENIZER_FILES):
            parts[name] = getattr(transformers, part.tokenizer).from_pretrained(source, subfolder=name)
    return parts


def load_parts(
    source: str, kind: Kind, dtype: torch.dtype = torch.float32, file: Path | None = None, without: Collection[str] = ()
) -> dict[str, Any]:
    """The networks of a pipeline, frozen; those of a checkpoint of one file by the configuration in a folder.

    Parts in `without` have no weights: they are on the meta device.
    What overflows in float16 is in another type then: T5 and Gemma in bfloat16, and VAEs as their families say.
    """
    import diffusers
    import transformers

    family, half = kind.family, dtype == torch.float16
    classes = {name: getattr(transformers, part.encoder) for name, part in kind.text_parts.items()}
    classes |= {family.part: getattr(diffusers, family.denoiser), "vae": getattr(diffusers, family.vae)}
    dtypes = dict.fromkeys(classes, dtype)
    dtypes |= {name: torch.bfloat16 for name, part in kind.text_parts.items() if half and not part.is_clip}
    if half and family.vae_instead_of_half is not None:
        with reading_part(source, "vae"):
            config: Any = classes["vae"].load_config(source, subfolder="vae")
            dtypes["vae"] = family.vae_instead_of_half if config.get("force_upcast", True) else dtype
    if file is not None:
        return {name: part.to(dtypes[name]) for name, part in single_file.load_parts(file, source, family).items()}
    with torch.device("meta"):
        hollow = {name: classes[name].from_config(classes[name].load_config(source, subfolder=name)) for name in without}
    return hollow | {
        name: load_network(cls, source, name, dtypes[name]) for name, cls in classes.items() if name not in without
    }


def check_text(model: Any, source: str) -> None:
    """Check that the tokenizers of a pipeline, or a Model, fit its text encoders.

    Raises:
        InputError: one does not.
    """
    for part, (tokenizer, text_encoder) in _text_pairs(model).items():
        config = text_encoder.config
        with reading(f"model: the {part} in {str(Path(source, part))!r} does not fit its text encoder", InputError):
            check_tokenizer(tokenizer, config.vocab_size)
            if config.model_type != "clip_text_model":
                continue
            # transformers makes a tokenizer of no length limit where its configuration is missing.
            if tokenizer.model_max_length > config.max_position_embeddings:
                length = tokenizer.model_max_length
                raise ValueError(f"it allows prompts of {length} tokens, and {config.max_position_embeddings} are read")
            # 2 stands for any in transformers; where no token has the number, the start token's embedding would be pooled.
            if config.eos_token_id not in (2, tokenizer.eos_token_id):
                raise ValueError(f"it ends prompts with {tokenizer.eos_token_id}, and {config.eos_token_id} is looked for")


def _text_pairs(model: Any) -> dict[str, tuple[Any, Any]]:
    """The tokenizers of a model by their names, each with its text encoder."""
    names = {f"tokenizer{number}": f"text_encoder{number}" for number in ("", "_2", "_3")}
    pairs = {name: (getattr(model, name, None), getattr(model, encoder, None)) for name, encoder in names.items()}
    return {name: pair for name, pair in pairs.items() if None not in pair}


def _check_kind(model: Model) -> None:
    """Refuse refiners, inpainting models and parts that do not fit each other."""
    name, family, config, vae = model.name, model.family, model.denoiser.config, model.vae.config
    what = "U-Net" if family.part == "unet" else family.part
    lengths = {reader.tokenizer.model_max_length for reader in model.readers.values() if reader.part.is_clip}
    if len(lengths) > 1:
        raise InputError(f"model: the two tokenizers of {name!r} differ in length")
    if family.part == "unet":
        _check_unet(model)
    _check_widths(model, what)
    size_of(family, model.denoiser)
    channels, packed = vae.latent_channels, family.packed**2
    given = config.get("out_channels") or config.in_channels
    wanted = {channels * packed} | ({2 * channels * packed} if family.gives_variance else set())
    if config.in_channels != channels * packed or given not in wanted:
        raise InputError(
            f"model: the {what} of {name!r} takes {config.in_channels} channels and gives {given}, its VAE makes {channels}"
        )
    if vae.get("out_channels", vae.in_channels) != 3:
        raise InputError(f"model: the VAE of {name!r} makes images of {vae.out_channels} channels, not 3")
    if vae.get("latents_mean") is not None:
        raise InputError(f"model: the VAE of {name!r} shifts its latents, which is not supported")


def _check_unet(model: Model) -> None:
    """Refuse U-Nets that take more than a prompt, and SDXL's refiner."""
    name, unet, pooled = model.name, model.unet.config, model.family.pooled
    if unet.addition_embed_type != ("text_time" if pooled else None):
        raise InputError(
            f"model: the U-Net of {name!r} wants {unet.addition_embed_type} conditioning beside the prompt's embeddings, "
            f"which {len(model.text_encoders)} text encoder(s) do not give"
        )
    if pooled:
        wanted, second = unet.projection_class_embeddings_input_dim, model.text_encoder_2.config.projection_dim
        given = second + NUM_TIME_IDS * unet.addition_time_embed_dim
        if wanted != given:
            raise InputError(
                f"model: the U-Net of {name!r} takes {wanted} numbers of pooled text and sizes, as SDXL's refiner does or "
                f"with another text encoder; here there are {given}"
            )
    for option in MORE_CONDITIONING:
        if unet.get(option) is not None:
            raise InputError(
                f"model: the U-Net of {name!r} has {option}, so that it takes more than a prompt: not supported"
            )


def _check_widths(model: Model, what: str) -> None:
    """Refuse text encoders whose embeddings the denoiser does not take."""
    configs = {part: encoder.config for part, encoder in model.text_encoders.items()}
    widths = {part: (config.hidden_size, getattr(config, "projection_dim", 0)) for part, config in configs.items()}
    wanted = model.family.wanted_widths(model.denoiser.config)
    given = model.family.given_widths(widths, model.denoiser)
    if wanted != given:
        kinds = ("embeddings", "pooled text")
        kind, takes, makes = next(each for each in zip(kinds, wanted, given, strict=True) if each[1] != each[2])
        raise InputError(f"model: the {what} of {model.name!r} takes {kind} of {takes}, its text encoder makes {makes}")


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


def tokenize_for(model: Model, prompts: Sequence[str], negative: bool = False) -> Tensor:
    """Prompt ids (N, L) for `encode`: those of every tokenizer side by side; `negative` for null prompts."""
    return torch.cat([reader.ids(prompts, negative) for reader in model.readers.values()], dim=1)


def find_chunks(name: str, long_prompt: str, prompts: Sequence[str], num_learned: int = 0) -> int:
    """In how many chunks each of a model's CLIPs reads prompts: 1, but with `chunk` as many as the longest one has.

    Raises:
        InputError: with `refuse` no text encoder reads a prompt whole; with `chunk` the model has others than CLIPs; or
            as `find_cut`. What `load_model` raises.
    """
    if long_prompt == "cut":
        return 1
    readers = open_readers(name, num_learned)
    if long_prompt == "refuse":
        if (cut := find_cut(readers, prompts)).prompts:
            raise InputError(
                f"long_prompt: {len(cut.prompts)} of {cut.num_prompts} prompts are longer than the {cut.num_tokens} tokens "
                f"that the text encoder reads, the first is {cut.prompts[0][:60]!r}...; shorten them, or take cut or chunk"
            )
        return 1
    if not all(reader.part.is_clip for reader in readers):
        raise InputError(
            f"long_prompt: chunk is for models whose text encoders are CLIPs alone; {name!r} reads "
            f"{max(reader.num_read for reader in readers)} tokens with another one, so take cut or refuse"
        )
    return max((len(chunks) for reader in readers for chunks in reader.chunks(prompts)), default=1) if prompts else 1


def check_clip_skip(name: str, clip_skip: int) -> None:
    """Check that a model's CLIPs have so many layers to skip, without their weights.

    Raises:
        InputError: they have not, or none of them is read at a layer. What `load_model` raises.
    """
    import transformers

    if not clip_skip:
        return
    source = find_model(name)
    with reading_model(name):
        kind = pipeline_kind(source)
        parts, most = {part: text for part, text in kind.text_parts.items() if text.layer}, []
        for part, text in parts.items():
            config: Any = getattr(transformers, text.encoder).config_class.from_pretrained(source, subfolder=part)
            most.append(config.num_hidden_layers - text.layer)
    model_files.check_clip_skip(clip_skip, most, name)


def open_readers(name: str, num_learned: int = 0) -> list[Reader]:
    """How a model reads prompts, its CLIPs with learned tokens, without its networks; raises as `load_model`."""
    source = find_model(name)
    with reading_model(name):
        kind = pipeline_kind(source)
        tokenizers = load_tokenizers(source, kind).values()
        pairs = zip(tokenizers, kind.text_parts.values(), strict=True)
        return [Reader(each, part, num_learned=num_learned if part.is_clip else 0) for each, part in pairs]


def encode(model: Model, prompt_ids: Tensor) -> Tensor:
    """Prompt embeddings (N, L, D) float32 of ids (N, L), packed where a family reads more than embeddings (`Packing`).

    Ids may have weights beside them, (N, 2L), as `tokenize_weighted` gives them at a step.
    In half precision and on a GPU each prompt is encoded by itself: rounding depends on the size of a batch there, and
    sampling and training, whose batches differ, must read the same.
    """
    weights = None
    if prompt_ids.is_floating_point():
        ids, weights = prompt_ids.chunk(2, dim=1)
        prompt_ids = ids.long()
    for name, ids in split_ids(model, prompt_ids).items():
        if name in model.encode_once:
            model.encode_once[name].learn(ids)  # all at once, since it moves to the device for it
    alone = model.dtype != torch.float32 or prompt_ids.device.type != "cpu"
    chunks = prompt_ids.split(1 if alone else len(prompt_ids))
    own = [None] * len(chunks) if weights is None else weights.split(len(chunks[0]))
    return torch.cat([_encode(model, ids, part) for ids, part in zip(chunks, own, strict=True)])


def _encode(model: Model, prompt_ids: Tensor, weights: Tensor | None) -> Tensor:
    texts = _read(model, prompt_ids)
    if weights is not None:
        texts = {name: weigh(texts[name], own, model.num_chunks) for name, own in split_ids(model, weights).items()}
    return model.packing.pack(model.family.join(texts, model.denoiser))


def _read(model: Model, prompt_ids: Tensor) -> dict[str, Text]:
    """What each text encoder makes of prompt ids (N, L)."""
    texts = {}
    for name, ids in split_ids(model, prompt_ids).items():
        once, tokens = model.encode_once.get(name), learned_tokens(model.text_encoders[name])
        if tokens is not None and not tokens.enabled:
            ids = without_learned(ids, model.tokenizers[name].pad_token_id)
        reader, encoder = model.readers[name], model.text_encoders[name]
        texts[name] = reader.read(encoder, ids, model.clip_skip) if once is None else once(ids)
    return texts


def split_ids(model: Model, prompt_ids: Tensor) -> dict[str, Tensor]:
    """The ids of each text encoder among prompt ids (N, L)."""
    parts = prompt_ids.split([reader.num_tokens for reader in model.readers.values()], dim=1)
    return dict(zip(model.readers, parts, strict=True))


def moved_by(model: Model, names: Collection[str], prompt_ids: Tensor) -> Tensor:
    """Which of the packed embeddings' numbers (N, L, D) these text encoders decide, as 1 and 0."""
    texts = {}
    for name, text in _read(model, prompt_ids).items():
        fill = float(name in names)
        embeds, pooled = (None if each is None else torch.full_like(each, fill) for each in (text.embeds, text.pooled))
        texts[name] = Text(embeds, pooled, None if text.mask is None else torch.zeros_like(text.mask))
    return model.packing.pack(model.family.join(texts, model.denoiser))


def encode_null(model: Model, negative_prompt: str = "", null_ids: Tensor | None = None) -> Tensor:
    """The embedding (1, L, D) of what guidance leads away from: the null prompt, or a negative one, which may have ids."""
    model = replace(model, clip_skip=0) if model.clip_skip else model
    if null_ids is None:
        null_ids = tokenize_for(model, [negative_prompt], negative=True).to(model.device)
    embeds = encode(model, null_ids)
    return torch.zeros_like(embeds) if model.zero_null and not negative_prompt else embeds


def encode_distinct(
    model: Model,
    prompt_ids: Tensor,
    null_embeds: Tensor | None = None,
    negative_prompt: str = "",
    null_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeddings (1+U, L, D) of the null prompt and every distinct prompt of ids (N, L); the row of each id (N,).

    The null prompt is encoded too unless its embedding (1, L, D) is given or zeros; a negative prompt takes its place, with
    the `null_ids` (1, L) if they are given.
    """
    distinct, rows = prompt_ids.unique(dim=0, return_inverse=True)
    if null_embeds is None and model.clip_skip:
        null_embeds = encode_null(model, negative_prompt, null_ids)
    if null_embeds is None and not (model.zero_null and not negative_prompt):
        if null_ids is None:
            null_ids = tokenize_for(model, [negative_prompt], negative=True).to(prompt_ids.device)
        return encode(model, torch.cat([null_ids, distinct])), 1 + rows
    embeds = encode(model, distinct)
    return torch.cat([torch.zeros_like(embeds[:1]) if null_embeds is None else null_embeds, embeds]), 1 + rows


@contextlib.contextmanager
def adapters_disabled(model: Model) -> Iterator[None]:
    """Switch the model's peft adapters and learned tokens off."""
    with contextlib.ExitStack() as stack:
        for part in model.policy_parts.values():
            if (tokens := learned_tokens(part)) is not None:
                stack.callback(setattr, tokens, "enabled", tokens.enabled)
                tokens.enabled = False
            if hasattr(part, "disable_adapter"):
                stack.enter_context(part.disable_adapter())
        yield


@dataclass(frozen=True)
class Conditioning:
    """Embeddings of N prompts, and of the null prompt for guidance, as `encode` gives them."""

    prompt_embeds: Tensor  # (N, L, D)
    null_embeds: Tensor  # (1, L, D)


def tokenize_weighted(model: Model, prompts: Sequence[str], num_steps: int) -> Tensor:
    """Ids and weights (N, T, 2L) float64 of prompts with weights at each of T steps: the L ids, and then the L weights.

    Raises:
        InputError: as `read_weights` and `check_weighable`, or a prompt is not text.
    """
    check_weighable(list(model.readers.values()))

    @functools.cache
    def row(texts: tuple[tuple[str, float], ...]) -> Tensor:
        return torch.cat([weighted_ids(reader, texts) for reader in model.readers.values()], dim=1).flatten()

    def rows(prompt: str) -> Tensor:
        pieces = read_weights(prompt, num_steps)
        return torch.stack([row(texts_at(pieces, share)) for share in shares_of(num_steps)])

    return torch.stack([rows(prompt) for prompt in prompts])


# --- the denoiser and its latents ---


def denoiser_call(model: Model, guidance_scale: float) -> Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]:
    """How the denoiser is called with latents (N, C, H, W), timesteps (N,) and packed embeddings (N, L, D)."""
    packing, family, pixels = model.packing, model.family, pixels_per_latent(model.vae)

    def call(denoiser: nn.Module, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        return family.call(denoiser, Inputs(latents, timesteps, packing.unpack(embeds), pixels, guidance_scale))

    return call


def pixels_per_latent(vae: Any) -> int:
    """Pixels per latent along a side; 8 for all published models but Sana, which has 32."""
    blocks = getattr(vae.config, "block_out_channels", None) or vae.config.encoder_block_out_channels
    return 2 ** (len(blocks) - 1)


def size_of(family: Family, denoiser: Any) -> int | None:
    """Latents along a side that a family's denoiser was made for; None if neither it nor its configuration names a size.

    Raises:
        ValueError: the configuration names no square size.
    """
    size = family.default_size or denoiser.config.sample_size
    if size is None:
        return None
    sizes = size if isinstance(size, list | tuple) else [size]
    if not all(isinstance(side, int) and side > 0 for side in sizes) or len(set(sizes)) != 1:
        raise ValueError(f"the denoiser's sample_size must be a number of latents, or two equal ones, not {size!r}")
    return sizes[0]


def latent_multiple(model: Model) -> int:
    """What the latents along a side must be a multiple of: as often as a U-Net halves them, or a transformer's patches."""
    config = model.denoiser.config
    if model.family.part == "unet":
        return 2 ** (len(config.block_out_channels) - 1)
    return config.patch_size * model.family.packed


def num_image_tokens(model: Model, latent_shape: tuple[int, int, int]) -> int:
    """Tokens that a transformer makes of latents."""
    _, height, width = latent_shape
    return height * width // latent_multiple(model) ** 2


def latent_shape(
    model: Model, resolution: int | None = None, width: int | None = None, height: int | None = None
) -> tuple[int, int, int]:
    """Channels, height and width of the latents of an image; by default of the size that the denoiser was made for.

    The resolution, in pixels, is that of the sides that are not given.

    Raises:
        InputError: a side is not a multiple of what the models need or too large for them, or neither it nor the
            denoiser's size is given.
    """
    sides = [
        _latents_along(model, "resolution", resolution) if pixels is None else _latents_along(model, name, pixels)
        for name, pixels in (("height", height), ("width", width))
    ]
    return model.vae.config.latent_channels, sides[0], sides[1]


def _latents_along(model: Model, option: str, pixels: int | None) -> int:
    """The latents along a side of so many pixels, by an option; raises as `latent_shape`."""
    factor, multiple = pixels_per_latent(model.vae), latent_multiple(model)
    size = size_of(model.family, model.denoiser) if pixels is None else pixels / factor
    if size is None:
        raise InputError("resolution: the denoiser of this model does not say for which size it was made; give --resolution")
    largest = getattr(model.denoiser.config, "pos_embed_max_size", None)
    step = factor * multiple
    model_files.check_side(option, int(size * factor), step, largest and largest * step)
    return int(size)
