"""Sampling: the DDIM transition with per-step log-probabilities, rollouts, and the fused inference path."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from texforce.checkpoints import describe_files

TINY = Path(__file__).parent / "tiny"
MIN_STD = 1e-4  # below it a step counts as deterministic: it has no usable density


# --- the models ---


@dataclass(frozen=True)
class Models:
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
    def text_encoders(self) -> dict[str, Any]:
        """One, or SDXL's two, by name."""
        second = {} if self.text_encoder_2 is None else {"text_encoder_2": self.text_encoder_2}
        return {"text_encoder": self.text_encoder} | second

    @property
    def policy_parts(self) -> dict[str, Any]:
        """The parts that may carry LoRA, by name."""
        return self.text_encoders | {"unet": self.unet}


def load_models(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Models:
    """Load a pipeline's parts: `tiny`, a folder in diffusers' format, or a name on the hub.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is not a Stable Diffusion 1.x, 2.x or XL pipeline, or tensors are missing from its files.
    """
    from transformers import CLIPTokenizer

    source = find_model(name)
    with named(name):
        second, zero_null = pipeline_kind(source)
        parts = {"scheduler": load_scheduler(source)}
        for part in ("tokenizer", "tokenizer_2") if second else ("tokenizer",):
            parts[part] = CLIPTokenizer.from_pretrained(source, subfolder=part)
        parts |= load_parts(source, dtype, second)
    models = Models(name, zero_null=zero_null, **parts)
    _check_kind(models)
    for part in (*models.policy_parts.values(), models.vae):
        part.to(device)
    if torch.device(device).type == "cuda":
        models.unet.to(memory_format=torch.channels_last)
        models.vae.to(memory_format=torch.channels_last)
    return models


def pipeline_kind(source: str) -> tuple[bool, bool]:
    """Of a pipeline's folder or hub name: whether it has SDXL's second text encoder, and takes zeros for the null prompt.

    Raises:
        ValueError: it has the second text encoder alone, as SDXL's refiner.
    """
    from diffusers import DiffusionPipeline

    index: Any = DiffusionPipeline.load_config(source)
    second, first = ((index.get(part) or [None])[-1] is not None for part in ("text_encoder_2", "text_encoder"))
    if second and not first:
        raise ValueError(f"model: {source!r} has only the second text encoder, as SDXL's refiner; give the base pipeline")
    return second, second and index.get("force_zeros_for_empty_prompt", True)


def load_scheduler(source: str) -> Any:
    """A pipeline's noise schedule, of whatever sampler it comes with, for DDIM.

    Euler's and others' configurations may lack what only DDIM has; its defaults are not Stable Diffusion's, which neither
    clips nor ends in a step without noise.
    """
    from diffusers import DDIMScheduler

    config: Any = DDIMScheduler.load_config(source, subfolder="scheduler")
    if not str(config.get("_class_name", "DDIM")).startswith(("DDIM", "DDPM", "PNDM")):
        config = {"clip_sample": False, "set_alpha_to_one": False} | config
    return DDIMScheduler.from_config(config)


def find_model(name: str) -> str:
    """The folder or hub name of a model.

    Raises:
        FileNotFoundError: there is no such model.
    """
    from huggingface_hub import hf_hub_download

    source = str(TINY) if name == "tiny" else name
    if not Path(source).is_dir():
        if source.count("/") != 1 or source.startswith((".", "/", "~")):
            raise FileNotFoundError(
                f"model: there is no folder {name!r}; give 'tiny', a diffusers folder or a name on the hub"
            )
        with named(name):  # one question to the hub before dozens, each tried again for a while
            hf_hub_download(source, "model_index.json")
    return source


def revision(name: str) -> Any:
    """Which model it is: the commit that the hub's cache has of it, the SHA-256 of a folder's files; None for tiny."""
    from huggingface_hub import try_to_load_from_cache

    if name == "tiny":
        return None
    if Path(name).is_dir():
        return describe_files(Path(name))["sha256"]
    cached = try_to_load_from_cache(name, "model_index.json")
    return Path(cached).parent.name if isinstance(cached, str) else None  # .../snapshots/REVISION/model_index.json


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Within it, what goes wrong with a model's files is told with its name."""
    from safetensors import SafetensorError

    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"model: the files of {name!r} are damaged or of another model: {str(error).splitlines()[0]}"
        ) from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"model: {name!r} could not be loaded as a diffusers pipeline: {reason[:200]}") from error


def load_parts(source: str, dtype: torch.dtype = torch.float32, second: bool = False) -> dict[str, Any]:
    """The networks of a pipeline, frozen; with `second` also the second text encoder that Stable Diffusion XL has."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    classes = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
    dtypes = dict.fromkeys(classes, dtype)
    if second:
        classes["text_encoder_2"], dtypes["text_encoder_2"] = CLIPTextModelWithProjection, dtype
        config: Any = AutoencoderKL.load_config(source, subfolder="vae")
        if dtype == torch.float16 and config.get("force_upcast", True):  # SDXL's overflows; others say so for no reason
            dtypes["vae"] = torch.float32
    parts = {part: _load_strictly(cls, source, part, dtypes[part]) for part, cls in classes.items()}
    for part in parts.values():
        part.requires_grad_(False).eval()
    return parts


def _check_kind(models: Models) -> None:
    """Refuse what Stable Diffusion 1.x, 2.x and XL are not: refiners, inpainting, parts of different models."""
    name, unet, vae, second = models.name, models.unet.config, models.vae.config, models.text_encoder_2
    pairs = [(models.tokenizer, models.text_encoder)] + ([] if second is None else [(models.tokenizer_2, second)])
    for tokenizer, text_encoder in pairs:
        # transformers makes an empty tokenizer, of no length limit, where its files are missing.
        if tokenizer.model_max_length > text_encoder.config.max_position_embeddings:
            raise ValueError(
                f"model: a tokenizer of {name!r} is missing, or allows longer prompts than the text encoder reads"
            )
    if len({tokenizer.model_max_length for tokenizer, _ in pairs}) > 1:
        raise ValueError(f"model: the two tokenizers of {name!r} differ in length")
    width = sum(text_encoder.config.hidden_size for _, text_encoder in pairs)
    if unet.addition_embed_type != (None if second is None else "text_time"):
        raise ValueError(
            f"model: the U-Net of {name!r} wants {unet.addition_embed_type} conditioning beside the prompt's embeddings, "
            f"which {len(pairs)} text encoder(s) do not go with"
        )
    if second is not None:
        wanted = unet.projection_class_embeddings_input_dim
        given = second.config.projection_dim + NUM_TIME_IDS * unet.addition_time_embed_dim
        if wanted != given:
            raise ValueError(
                f"model: the U-Net of {name!r} takes {wanted} numbers of pooled text and sizes, as SDXL's refiner does or "
                f"with another text encoder; here there are {given}"
            )
        if second.config.projection_dim > width:
            raise ValueError(f"model: the pooled text of {name!r} is wider than its embeddings")
    if unet.in_channels != vae.latent_channels:
        raise ValueError(
            f"model: the U-Net of {name!r} takes {unet.in_channels} channels, its VAE makes {vae.latent_channels}"
        )
    if vae.latents_mean is not None:
        raise ValueError(f"model: the VAE of {name!r} shifts its latents, which is not supported")
    if unet.cross_attention_dim != width:
        raise ValueError(
            f"model: the U-Net of {name!r} takes embeddings of {unet.cross_attention_dim}, its text encoder makes {width}"
        )


def _load_strictly(cls: Any, source: str, subfolder: str, dtype: torch.dtype) -> nn.Module:
    """Load one part; diffusers and transformers fill missing tensors at random with only a warning, here it is an error."""
    model, info = cls.from_pretrained(source, subfolder=subfolder, torch_dtype=dtype, output_loading_info=True)
    missing = [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())]
    if missing:
        raise ValueError(f"model: {source}/{subfolder} lacks {len(missing)} tensors or has wrong shapes, as {missing[0]}")
    return model


def tokenize(tokenizer: Any, prompts: Sequence[str], truncation: bool = False) -> Tensor:
    """Token ids (N, L) int64, padded, or with `truncation` cut, to the text encoder's length L.

    Raises:
        ValueError: a prompt is longer than the text encoder reads (77 tokens for Stable Diffusion) and may not be cut.
    """
    length = tokenizer.model_max_length
    if any("\ud800" <= letter <= "\udfff" for prompt in prompts for letter in prompt):
        raise ValueError("prompt: it holds a lone surrogate, which is not text")
    ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=truncation).input_ids
    for prompt, row in zip(prompts, ids, strict=True):
        if len(row) > length:
            raise ValueError(
                f"prompt {prompt[:60]!r}... has {len(row)} tokens with its start and end, but the text encoder reads "
                f"{length}; shorten it"
            )
    return torch.tensor(ids)


def tokenize_for(models: Models, prompts: Sequence[str], truncation: bool = False) -> Tensor:
    """Prompt ids (N, L) for `encode`, as of `tokenize`; for SDXL (N, 2L), those of both tokenizers side by side.

    The two differ in how they pad.
    """
    tokenizers = [models.tokenizer] if models.tokenizer_2 is None else [models.tokenizer, models.tokenizer_2]
    return torch.cat([tokenize(tokenizer, prompts, truncation) for tokenizer in tokenizers], dim=1)


def encode(models: Models, prompt_ids: Tensor) -> Tensor:
    """Prompt embeddings (N, L, D) float32 of ids (N, L); for SDXL (N, L+1, D) of ids (N, 2L).

    SDXL's U-Net reads what the last but one layers of both text encoders say, joined along D, and apart from that the
    second one's pooled embedding (N, P). That is the last row here, filled up with zeros to D, and `PooledText` takes it out
    again: so whatever is gathered, chosen or differentiated by prompt stays one tensor.
    """
    if models.text_encoder_2 is None:
        return models.text_encoder(input_ids=prompt_ids).last_hidden_state.float()
    ids, ids_2 = prompt_ids.chunk(2, dim=1)
    first = models.text_encoder(input_ids=ids, output_hidden_states=True)
    second = models.text_encoder_2(input_ids=ids_2, output_hidden_states=True)
    embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    pooled = nn.functional.pad(second.text_embeds, (0, embeds.shape[-1] - second.text_embeds.shape[-1]))
    return torch.cat([embeds, pooled[:, None]], dim=1).float()


def encode_null(models: Models) -> Tensor:
    """The null prompt's embedding (1, L, D)."""
    embeds = encode(models, tokenize_for(models, [""]).to(models.device))
    return torch.zeros_like(embeds) if models.zero_null else embeds


def encode_distinct(models: Models, prompt_ids: Tensor, null_embeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The null prompt and every distinct prompt of ids (N, L), encoded once (1+U, L, D); the row of each id (N,).

    The null prompt is encoded too unless its embedding (1, L, D) is given or zeros.
    """
    distinct, rows = prompt_ids.unique(dim=0, return_inverse=True)
    if null_embeds is None and not models.zero_null:
        null_ids = tokenize_for(models, [""]).to(prompt_ids.device)
        return encode(models, torch.cat([null_ids, distinct])), 1 + rows
    embeds = encode(models, distinct)
    return torch.cat([torch.zeros_like(embeds[:1]) if null_embeds is None else null_embeds, embeds]), 1 + rows


@contextlib.contextmanager
def adapters_disabled(models: Models) -> Iterator[None]:
    """Within it, the models are the base ones: the peft adapters that they carry are switched off."""
    with contextlib.ExitStack() as stack:
        for part in models.policy_parts.values():
            if hasattr(part, "disable_adapter"):
                stack.enter_context(part.disable_adapter())
        yield


@dataclass(frozen=True)
class Conditioning:
    """What the U-Net is told of N prompts, and of the null prompt for guidance, as `encode` gives it."""

    prompt_embeds: Tensor  # (N, L, D)
    null_embeds: Tensor  # (1, L, D)


NUM_TIME_IDS = 6  # of SDXL's base U-Net: original size, crop's corner and target size, each as height and width


@dataclass(frozen=True)
class PooledText:
    """What SDXL's U-Net is told beside the embeddings of a prompt: the pooled one, and sizes (arXiv:2307.01952, 2.2)."""

    width: int  # P
    pixels_per_latent: int

    def take_apart(self, embeds: Tensor, latents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeddings (N, L, D) and diffusers' added_cond_kwargs of embeddings (N, L+1, D) for latents (N, C, H, W).

        The sizes are the plain pipeline's defaults: the image is of its own size, and not cropped.
        """
        height, width = (self.pixels_per_latent * size for size in latents.shape[2:])
        time_ids = embeds.new_tensor([height, width, 0, 0, height, width]).expand(len(embeds), -1)
        return embeds[:, :-1], {"text_embeds": embeds[:, -1, : self.width], "time_ids": time_ids}


def pooled_text(models: Models) -> PooledText | None:
    """How the U-Net takes the pooled embedding; None for all but SDXL, which have none."""
    if models.text_encoder_2 is None:
        return None
    return PooledText(models.text_encoder_2.config.projection_dim, pixels_per_latent(models.vae))


def pixels_per_latent(vae: Any) -> int:
    """Along a side; 8 for all published models."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


# --- the transition ---


@dataclass(frozen=True)
class Schedule:
    """T steps of DDIM (arXiv:2010.02502 eq. 12 and 16) as Gaussian transitions, affine in what the U-Net says.

    next_latents ~ Normal(latents_weight * latents + output_weight * model_output, std); every tensor (T,).
    """

    timesteps: Tensor  # int64, descending
    latents_weight: Tensor
    output_weight: Tensor
    std: Tensor

    @property
    def trainable_steps(self) -> Tensor:
        """Indices of the steps that have a density; the others cannot carry a policy gradient."""
        return torch.nonzero(self.std > MIN_STD).flatten()

    def to(self, device: torch.device) -> Schedule:
        return Schedule(
            *(getattr(self, name).to(device) for name in ("timesteps", "latents_weight", "output_weight", "std"))
        )


def ddim_schedule(scheduler: Any, num_inference_steps: int, eta: float, num_stochastic: int | None = None) -> Schedule:
    """The transitions that diffusers' DDIMScheduler.step makes, for epsilon, v and sample prediction.

    After the first num_stochastic steps, if that is given, they are those of an eta of 0 (as in MixGRPO, arXiv:2507.21802).

    Raises:
        ValueError: too many steps, eta outside 0 to 1, or a scheduler that clips its predictions: then the mean is not
            affine, and the log-probability of this file would be wrong.
    """
    config = scheduler.config
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: must be from 0 to 1, not {eta}")
    if not 1 <= num_inference_steps <= config.num_train_timesteps:
        raise ValueError(f"num_inference_steps: must be 1 to {config.num_train_timesteps}, not {num_inference_steps}")
    if config.prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(f"model: the scheduler's prediction_type {config.prediction_type!r} is not supported")
    if config.clip_sample or config.thresholding:
        raise ValueError("model: schedulers with clip_sample or thresholding are not supported")
    scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps.long().cpu()
    if len(timesteps) != num_inference_steps or timesteps.min() < 0:  # diffusers' rounding of the trailing spacing, as of 61
        raise ValueError(f"num_inference_steps: {num_inference_steps} do not fit the scheduler's spacing; take one less")
    if timesteps.max() >= config.num_train_timesteps:
        raise ValueError(
            f"num_inference_steps: with the scheduler's steps_offset of {config.steps_offset}, {num_inference_steps} lead "
            f"past its {config.num_train_timesteps} training timesteps; take fewer"
        )
    previous = timesteps - config.num_train_timesteps // num_inference_steps
    alphas = scheduler.alphas_cumprod.double().cpu()
    alpha = alphas[timesteps]
    next_alpha = torch.where(previous >= 0, alphas[previous.clamp(min=0)], scheduler.final_alpha_cumprod.double().cpu())
    variance = (1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)
    std = eta * variance.clamp(min=0).sqrt()
    if num_stochastic is not None:
        std[num_stochastic:] = 0
    a, b = alpha.sqrt(), (1 - alpha).sqrt()
    # Each prediction type gives the clean sample and the noise as x * latents + y * model_output: (x, y) of both.
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    sample, noise = {
        "epsilon": ((1 / a, -b / a), (zero, one)),
        "sample": ((zero, one), (1 / b, -a / b)),
        "v_prediction": ((a, -b), (b, a)),
    }[config.prediction_type]
    to_sample, to_noise = next_alpha.sqrt(), (1 - next_alpha - std.square()).clamp(min=0).sqrt()
    latents_weight = to_sample * sample[0] + to_noise * noise[0]
    output_weight = to_sample * sample[1] + to_noise * noise[1]
    return Schedule(timesteps, latents_weight.float(), output_weight.float(), std.float())


def gaussian_log_prob(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of values (N, ...) under Normal(mean, std), averaged over all but the first axis: (N,) float32."""
    z = (values.float() - mean.float()) / std
    log_prob = -0.5 * z.square() - std.log() - 0.9189385332046727  # log(sqrt(2 pi))
    return log_prob.flatten(1).mean(dim=1)


@dataclass(frozen=True)
class Denoiser:
    """The policy's actor: U-Net, classifier-free guidance (arXiv:2207.12598) and the DDIM transition.

    Guidance is off at a scale of 1 or less, as in diffusers.
    """

    unet: nn.Module
    schedule: Schedule
    guidance_scale: float
    compile: bool | None = None  # whether fused_step is one compiled graph; None: on CUDA
    pooled: PooledText | None = None  # of SDXL, whose embeddings have it as their last row

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    def mean(
        self, latents: Tensor, steps: Tensor, conditioning: Conditioning, null_outputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Means of the transitions of latents (N, C, H, W) at steps (N,), float32, and the null prompt's predictions.

        Both branches of guidance go through the U-Net as one batch, unless the null prompt's predictions are given.
        """
        timesteps, embeds = self.schedule.timesteps[steps], conditioning.prompt_embeds
        if not self.guided:
            output = self._predict(latents, timesteps, embeds)
        elif null_outputs is not None:
            output = null_outputs + self.guidance_scale * (self._predict(latents, timesteps, embeds) - null_outputs)
        else:
            embeds = torch.cat([conditioning.null_embeds.expand_as(embeds), embeds])
            null_outputs, text_outputs = self._predict(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), embeds).chunk(2)
            output = null_outputs + self.guidance_scale * (text_outputs - null_outputs)
        latents_weight, output_weight = (
            weight[steps][:, None, None, None] for weight in (self.schedule.latents_weight, self.schedule.output_weight)
        )
        return latents_weight * latents + output_weight * output, null_outputs

    def _predict(self, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        dtype = next(self.unet.parameters()).dtype
        latents, embeds = latents.to(dtype), embeds.to(dtype)
        if latents.is_cuda:
            latents = latents.contiguous(memory_format=torch.channels_last)
        if self.pooled is None:
            return self.unet(latents, timesteps, embeds, return_dict=False)[0].float()
        embeds, added = self.pooled.take_apart(embeds, latents)
        return self.unet(latents, timesteps, embeds, added_cond_kwargs=added, return_dict=False)[0].float()

    def std(self, steps: Tensor) -> Tensor:
        return self.schedule.std[steps][:, None, None, None]

    def step(
        self, latents: Tensor, steps: Tensor, conditioning: Conditioning, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sample the next latents (N, C, H, W), their log-probabilities (N,), and the null prompt's predictions."""
        mean, null_outputs = self.mean(latents, steps, conditioning)
        std = self.std(steps)
        next_latents = mean + std * noise
        log_probs = gaussian_log_prob(next_latents, mean, std.clamp(min=MIN_STD))
        return next_latents, log_probs, null_outputs

    @property
    def compiled(self) -> bool:
        return next(self.unet.parameters()).is_cuda if self.compile is None else self.compile

    @functools.cached_property
    def fused_step(self) -> Callable[[Tensor, Tensor, Conditioning, Tensor], tuple[Tensor, Tensor, Tensor | None]]:
        """`step` as one compiled graph, if `compile` says so, else `step` itself, which is equal; made once."""
        if not self.compiled:
            return self.step

        # Plain tensors as arguments: what a graph is specialised on is then their shapes and nothing else.
        @torch.compile
        def graph(latents: Tensor, steps: Tensor, prompt_embeds: Tensor, null_embeds: Tensor, noise: Tensor) -> Any:
            return self.step(latents, steps, Conditioning(prompt_embeds, null_embeds), noise)

        return lambda latents, steps, conditioning, noise: graph(
            latents, steps, conditioning.prompt_embeds, conditioning.null_embeds, noise
        )


# --- rollouts ---


@dataclass(frozen=True)
class Trajectory:
    """N denoising paths of T steps, as sampled; every tensor detached."""

    prompt_ids: Tensor  # (N, L) int64, for SDXL (N, 2L); the text encoder is the policy, so embeddings are not stored
    timesteps: Tensor  # (N, T) int64, descending
    latents: Tensor  # (N, T+1, C, H, W), initial noise first
    log_probs: Tensor  # (N, T) float32, under the sampling policy
    null_outputs: Tensor | None = None  # (N, T, C, H, W), kept only if the null prompt is not trained

    def __post_init__(self) -> None:
        num_samples, num_steps = self.timesteps.shape
        shapes = {
            "prompt_ids": (num_samples, self.prompt_ids.shape[-1]),
            "latents": (num_samples, num_steps + 1, *self.latents.shape[2:]),
            "log_probs": (num_samples, num_steps),
        }
        if self.null_outputs is not None:
            shapes["null_outputs"] = (num_samples, num_steps, *self.latents.shape[2:])
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name}: must have shape {shape}, not {tuple(getattr(self, name).shape)}")


def concatenate(trajectories: Sequence[Trajectory]) -> Trajectory:
    """Join trajectories along their first axis."""

    def join(name: str) -> Any:
        parts = [getattr(trajectory, name) for trajectory in trajectories]
        return None if parts[0] is None else torch.cat(parts)

    return Trajectory(*(join(item.name) for item in fields(Trajectory)))


def latent_shape(models: Models, resolution: int | None = None) -> tuple[int, int, int]:
    """Channels, height and width of the latents of a square image; by default of the size that the U-Net was made for.

    Raises:
        ValueError: the resolution is not a multiple of what the models need.
    """
    factor = pixels_per_latent(models.vae)
    levels = 2 ** (len(models.unet.config.block_out_channels) - 1)
    size = models.unet.config.sample_size if resolution is None else resolution / factor
    if size < levels or size % levels:
        raise ValueError(f"resolution: must be a multiple of {factor * levels} pixels for this model, not {resolution}")
    return models.unet.config.in_channels, int(size), int(size)


Generators = torch.Generator | list[torch.Generator]  # one for all samples, or one a sample


@dataclass(frozen=True)
class SharedSteps:
    """The noise and the first num_steps steps are the same for each num_samples samples of a prompt, in a row.

    Their trajectories branch after that (BranchGRPO, arXiv:2509.06040). By default every sample is on its own.
    """

    num_steps: int = 0
    num_samples: int = 1


NOTHING_SHARED = SharedSteps()


def draw_noise(
    num_steps: int,
    num_samples: int,
    shape: tuple[int, int, int],
    generator: Generators,
    device: torch.device,
    shared: SharedSteps = NOTHING_SHARED,
) -> Iterator[Tensor]:
    """The initial latents (N, C, H, W) and then the noise of every step, as diffusers' pipeline draws them.

    While steps are shared, there is one of a group.
    """
    from diffusers.utils.torch_utils import randn_tensor

    for k in range(-1, num_steps):
        number = num_samples // shared.num_samples if max(k, 0) < shared.num_steps else num_samples
        yield randn_tensor((number, *shape), generator=generator, device=device)


def skip_rollout(
    denoiser: Denoiser,
    num_samples: int,
    shape: tuple[int, int, int],
    generator: torch.Generator,
    shared: SharedSteps = NOTHING_SHARED,
) -> None:
    """Leave a generator as a rollout of N prompts, which another process makes, leaves it."""
    for _ in draw_noise(len(denoiser.schedule.timesteps), num_samples, shape, generator, generator.device, shared):
        pass


@contextlib.contextmanager
def text_projected_once(denoiser: Denoiser) -> Iterator[None]:
    """Within it, the cross-attentions' keys and values are computed at the first step and kept: the text stays the same.

    A compiled step has them inside, and computes them each time.
    """
    attentions = [module for name, module in denoiser.unet.named_modules() if name.endswith(".attn2")]
    layers = [] if denoiser.compiled else [layer for module in attentions for layer in (module.to_k, module.to_v)]

    def kept(project: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        results: dict[int, Tensor] = {}  # by the number of rows, which is another one while steps are shared

        def forward(embeds: Tensor) -> Tensor:
            if len(embeds) not in results:
                results[len(embeds)] = project(embeds)
            return results[len(embeds)]

        return forward

    for layer in layers:
        layer.forward = kept(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@torch.no_grad()
def rollout(
    denoiser: Denoiser,
    prompt_ids: Tensor,
    conditioning: Conditioning,
    shape: tuple[int, int, int],
    generator: Generators,
    keep_null_outputs: bool = False,
    shared: SharedSteps = NOTHING_SHARED,
) -> Trajectory:
    """Denoise N prompts from noise, all at once; with one generator, or with one a sample."""
    num_samples, device = len(prompt_ids), conditioning.prompt_embeds.device
    timesteps = denoiser.schedule.timesteps
    noises = draw_noise(len(timesteps), num_samples, shape, generator, device, shared)
    group = Conditioning(conditioning.prompt_embeds[:: shared.num_samples], conditioning.null_embeds)

    def each(tensor: Tensor) -> Tensor:
        """A row of each sample, of one of each sample or group."""
        return tensor if len(tensor) == num_samples else tensor.repeat_interleave(shared.num_samples, dim=0)

    current = next(noises)
    latents, log_probs, null_outputs = [each(current)], [], []
    with text_projected_once(denoiser):
        for k, noise in enumerate(noises):
            told = group
            if len(noise) == num_samples:
                current, told = each(current), conditioning
            steps = torch.full((len(noise),), k, device=device)
            current, log_prob, null_output = denoiser.fused_step(current, steps, told, noise)
            latents.append(each(current))
            log_probs.append(each(log_prob))
            if keep_null_outputs and null_output is not None:
                null_outputs.append(each(null_output))
    return Trajectory(
        prompt_ids=prompt_ids,
        timesteps=timesteps.expand(num_samples, -1),
        latents=torch.stack(latents, dim=1),
        log_probs=torch.stack(log_probs, dim=1),
        null_outputs=torch.stack(null_outputs, dim=1) if null_outputs else None,
    )


@torch.no_grad()
def decode(vae: Any, latents: Tensor, batch_size: int = 16) -> Tensor:
    """Images (N, 3, H, W) float32 in [0, 1] of final latents (N, C, h, w)."""
    dtype = next(vae.parameters()).dtype
    chunks = [vae.decode((chunk / vae.config.scaling_factor).to(dtype)).sample for chunk in latents.split(batch_size)]
    return (torch.cat(chunks).float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def sample_images(
    models: Models,
    denoiser: Denoiser,
    prompt_ids: Tensor,
    seeds: Sequence[int],
    batch_size: int = 16,
    resolution: int | None = None,
    null_embeds: Tensor | None = None,
) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] of prompt ids (N, L) and N seeds; each depends on its own prompt and seed alone.

    The null prompt goes through the models' text encoder unless its embedding (1, L, D) is given.
    """
    shape = latent_shape(models, resolution)
    images = []
    for start in range(0, len(seeds), batch_size):
        chunk = prompt_ids[start : start + batch_size].to(models.device)
        embeds, rows = encode_distinct(models, chunk, null_embeds)
        generators = [torch.Generator(models.device).manual_seed(seed) for seed in seeds[start : start + batch_size]]
        conditioning = Conditioning(embeds[rows], embeds[:1])
        trajectory = rollout(denoiser, chunk, conditioning, shape, generators)
        images.append(decode(models.vae, trajectory.latents[:, -1]).cpu())
    return torch.cat(images)
