"""TexForce (arXiv:2311.15657): reinforcement learning of the text encoder of a text-to-image diffusion model.

The policy is LoRA on the text encoder (and, if wanted, on the U-Net); the update is PPO over denoising steps, or one of two
others: matching, or the reward's own gradient. Read top to bottom: the policy, what a step learns from, a loss for each
algorithm, the updates. experience.py makes the images, scores and advantages; training.py repeats the two epoch by epoch.
This file is also the package `texforce`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "ArtifactError", "DivergedError", "EvaluationResult", "InputError", "Measured", "MergeResult", "NotFoundError",
    "OutOfMemory", "ProcessLost", "RewardError", "SampleResult", "SampledImage", "StorageError", "TexforceError",
    "TrainResult", "evaluate", "merge", "sample", "train",
]  # fmt: skip

if __name__ == "__main__":
    raise SystemExit("texforce.py is the package texforce; run `texforce train --reward hps` or `python -m texforce.cli`")

# This file is a package: its modules lie beside it. Editors and type checkers go by the spec and by __package__.
__path__ = [str(Path(__file__).resolve().parent)]
__package__ = __name__
if __spec__ is not None:
    __spec__.submodule_search_locations = __path__

from . import files, interrupts, model_files, stages
from .api import (
    EvaluationResult,
    Measured,
    MergeResult,
    SampledImage,
    SampleResult,
    TrainResult,
    evaluate,
    merge,
    sample,
    train,
)
from .config import TrainConfig, rounds_by_batch, window_end
from .draw_config import DrawConfig
from .errors import (
    ArtifactError,
    DivergedError,
    InputError,
    NotFoundError,
    OutOfMemory,
    ProcessLost,
    RewardError,
    StorageError,
    TexforceError,
    is_out_of_memory,
)
from .options import FLOW_SAMPLERS, is_inside, steps_inside
from .prompt_sets import read_prompts
from .reward_specs import NO_REWARD

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from . import models, processes, rewards, sampler, tokenization
    from .experience import Samples
    from .learner import Learner
else:

    class _Lazy:
        """A module that is imported when it is first used: `texforce --help` must not wait for torch.

        Not by importlib's LazyLoader: torch looks at all modules while it loads, and wakes those that wait too early.
        """

        __slots__ = ("_name",)

        def __init__(self, name: str) -> None:
            object.__setattr__(self, "_name", name)

        @property
        def __dict__(self) -> dict[str, Any]:  # pytest's monkeypatch looks there for what it has to put back
            return self._module().__dict__

        def _module(self) -> Any:
            return importlib.import_module(self._name, __package__)

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self._module(), attribute)

        def __setattr__(self, attribute: str, value: Any) -> None:
            setattr(self._module(), attribute, value)

        def __delattr__(self, attribute: str) -> None:
            delattr(self._module(), attribute)

    torch = _Lazy("torch")
    models, processes, rewards = (_Lazy(f".{name}") for name in ("models", "processes", "rewards"))
    sampler, tokenization = (_Lazy(f".{name}") for name in ("sampler", "tokenization"))

UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
# Largest |ratio - 1| tolerated before the first update: equal batch sizes give 0 to 1e-6, unequal ones reached 2e-6.
FLOAT32_TOLERANCE = 5e-6
# The same in half precision and on a GPU, where, with unequal batch sizes, it depends on the number of steps, the guidance
# and the kernels. It enters no loss (see `ppo_update`); above this the samples are too far from what is trained.
COARSE_TOLERANCE = 0.1


def __dir__() -> list[str]:
    """What an interpreter offers: the interface of `__all__`, and modules that the README names."""
    return [*__all__, "errors", "models"]


# --- the policy ---


def add_lora(base: models.Model, config: TrainConfig) -> models.Model:
    """Put fresh LoRA (arXiv:2106.09685), which changes nothing yet, on text encoders, the U-Net or both.

    Raises:
        InputError: the model has no such text encoder, no U-Net, or no such layers.
    """
    from peft import LoraConfig, get_peft_model

    text = trained_text_encoders(base, config)
    model_files.check_has_unet(config.target, base.unet is not None, base.name)
    targets = {"text-encoder": text, "unet": ("unet",), "both": (*text, "unet")}[config.target]
    adapted = {}
    with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        for part in targets:
            where = {"target_modules": UNET_LAYERS} if part == "unet" else text_layers(base, part, config)
            lora = LoraConfig(r=config.rank, lora_alpha=config.lora_alpha, init_lora_weights="gaussian", **where)
            adapted[part] = get_peft_model(getattr(base, part), lora)
    return replace(base, **adapted)


def add_tokens(base: models.Model, config: TrainConfig) -> models.Model:
    """Give every CLIP of a model num_tokens learned tokens (textual inversion, arXiv:2208.01618), read at a prompt's end.

    They begin as end tokens, which end tokens follow in Stable Diffusion, as padding: so the policy begins as the base
    model, as with fresh LoRA. Their places tell them apart.

    Raises:
        InputError: the model has no CLIP, or no room for so many.
    """
    clips = {name: encoder for name, encoder in base.text_encoders.items() if base.family.text[name].is_clip}
    read = [base.readers[name].num_read for name in clips]
    model_files.check_num_tokens(config.num_tokens, read, base.name)
    for name, encoder in clips.items():
        words = encoder.get_input_embeddings()
        end = words.weight[base.tokenizers[name].eos_token_id]
        encoder.set_input_embeddings(tokenization.LearnedTokens(words, end.repeat(config.num_tokens, 1)))
    return replace(base)  # anew, with readers that append the tokens


def text_layers(model: models.Model, part: str, config: TrainConfig) -> dict[str, Any]:
    """The layers of a text encoder that get LoRA, as the fields of peft's LoraConfig that choose them.

    Raises:
        InputError: it has fewer blocks that are read, or no such projection in them.
    """
    text, asked = model.family.text[part], dict.fromkeys(config.lora_modules or ())
    inside = re.compile(rf"(?:.*\.)?{text.blocks}\.(\d+)\.(?:.*\.)?(\w+)")
    layers = model.text_encoders[part].named_modules()
    found = [inside.fullmatch(name) for name, layer in layers if isinstance(layer, torch.nn.Linear)]
    blocks, projections = (dict.fromkeys(match[group] for match in found if match) for group in (1, 2))
    model_files.check_projections(asked, projections, part, model.name)
    where: dict[str, Any] = {"target_modules": list(asked) or list(text.lora_layers)}
    if config.lora_layers == "all":
        return where
    end, _, number = config.lora_layers.partition(":")
    num_read = len(blocks) - text.num_unread
    model_files.check_blocks(config.lora_layers, num_read, part, model.name)
    chosen = range(int(number)) if end == "first" else range(num_read - int(number), num_read)
    return where | {"layers_to_transform": list(chosen), "layers_pattern": text.blocks}


def trained_text_encoders(model: models.Model, config: TrainConfig) -> tuple[str, ...]:
    """The names of the text encoders that are trained: those chosen, or else the family's usual ones.

    Raises:
        InputError: the model has no such text encoder.
    """
    chosen = config.text_encoders or [name for name in model.family.text_encoders if name in model.text_encoders]
    model_files.check_text_encoders(chosen, model.text_encoders, model.name)
    return tuple(name for name in model.text_encoders if name in chosen)


@dataclass(frozen=True)
class Anchors:
    """A prompts whose embeddings a training holds where the base text encoder has them."""

    prompt_ids: Tensor  # (A, L) int64
    embeds: Tensor  # (A, L, D), the base text encoder's
    moved: Tensor | None  # (A, L, D): 1 for the numbers that the trained text encoders move, else 0; None if they move all

    def drift(self, model: models.Model) -> Tensor:
        """Mean squared distance of the embeddings to the base text encoder's, with gradients."""
        distances = (models.encode(model, self.prompt_ids) - self.embeds).square()
        if self.moved is None:
            return distances.mean()
        return (distances * self.moved).sum() / self.moved.sum()


class Policy:
    """A pipeline with its denoiser, whose text encoders, U-Net or both may carry LoRA; only LoRA is trained, in float32.

    In place of LoRA the text encoders may read learned tokens, which are trained then.

    One class serves training, sampling, evaluation and benchmarks. `null_embeds` (1, L, D) is the null prompt's embedding
    if it stays that of the base text encoder, and None if the null prompt goes through the adapted one.

    Raises:
        InputError: the model's scheduler or resolution does not fit the configuration.
    """

    def __init__(self, model: models.Model, config: TrainConfig | DrawConfig) -> None:
        self.model = model
        channels_last = isinstance(config, TrainConfig) and config.algorithm != "ppo" and model.device.type == "cpu"
        if channels_last and model.unet is not None:
            model.unet.to(memory_format=torch.channels_last)  # faster there, but rounds differently: ppo stays as it was
        # Listed once: peft freezes and thaws them as adapters are switched off and on.
        self.named_parameters = {
            f"{part}.{name}": parameter
            for part, module in model.policy_parts.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.parameters = list(self.named_parameters.values())
        sides = (None, None) if isinstance(config, TrainConfig) else (config.width, config.height)
        self.latent_shape = models.latent_shape(model, config.resolution, *sides)
        self.adapted_steps = _adapted_steps(model, config)
        self.rounds_by_batch = rounds_by_batch(config.mixed_precision, model.device.type)
        self.negative_prompt = _negative_prompt(model, config)
        self.null_embeds: Tensor | None = None
        self.null_ids: Tensor | None = None  # (T, 2L), with weights, where prompts may have them
        if isinstance(config, DrawConfig) and config.prompt_weights:
            self.null_ids = self.tokenize_weighted([self.negative_prompt])[0]
        zero_null = model.zero_null and not self.negative_prompt
        if config.null_prompt == "base" or (zero_null and not hasattr(model.denoiser, "peft_config")):
            with self.base(), torch.no_grad():
                self.null_embeds = models.encode_null(model, self.negative_prompt)
        self.denoiser = self._make_denoiser(config)
        self.noise_process = _noise_process(model, self.latent_shape).to(model.schedule_device)
        self.anchors = self._find_anchors(config)
        # Users sample every step with the same eta, in flow matching 0, so held-out images do too, whatever training does.
        drawing = _schedule(model, config, self.latent_shape)
        self.drawing_denoiser = replace(self.denoiser, schedule=drawing, keep_null_outputs=False)

    def _make_denoiser(self, config: TrainConfig | DrawConfig) -> sampler.Denoiser:
        trained, guidance_input = isinstance(config, TrainConfig), self.model.family.guidance_input
        return sampler.Denoiser(
            network=self.model.denoiser,
            schedule=_schedule(self.model, config, self.latent_shape, training_schedule=trained),
            guidance_scale=1.0 if guidance_input else config.guidance_scale,
            compile=config.compile,
            call=models.denoiser_call(self.model, config.guidance_scale),
            branches_apart=trained and self.null_embeds is not None and self.rounds_by_batch,
            keep_null_outputs=trained and self.null_embeds is not None,
            text_trained=config.target != "unet" if isinstance(config, TrainConfig) else None,
        )

    def _find_anchors(self, config: TrainConfig | DrawConfig) -> Anchors | None:
        """The prompts whose embeddings a training holds, if it holds any."""
        if not isinstance(config, TrainConfig) or not config.null_anchor or config.target == "unet":
            return None
        prompts = [
            *([] if self.model.zero_null else [""]),
            *(read_prompts(config.anchor_prompts, "anchor_prompts") if config.anchor_prompts else ()),
        ]
        if not prompts:
            return None
        prompt_ids = models.tokenize_for(self.model, prompts, negative=True).to(self.model.device)
        trained = [name for name, encoder in self.model.text_encoders.items() if tokenization.is_adapted(encoder)]
        with torch.no_grad():
            with self.base():
                embeds = models.encode(self.model, prompt_ids)
            moved = models.moved_by(self.model, trained, prompt_ids)
        return Anchors(prompt_ids, embeds, None if moved.all() else moved)

    def tokenize_weighted(self, prompts: Sequence[str]) -> Tensor:
        """Ids and weights (N, T, 2L) of prompts at each step, for `draw`; raises as `models.tokenize_weighted`."""
        return models.tokenize_weighted(self.model, prompts, len(self.adapted_steps)).to(self.model.device)

    def encode_distinct(self, prompt_ids: Tensor, null_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings (1+U, L, D) of the null prompt and each distinct prompt of ids (N, L); the row of each id (N,).

        `null_ids` (1, L) are those of a negative prompt with weights.
        """
        null_embeds = self.null_embeds
        if null_embeds is not None and null_ids is not None and self.negative_prompt:
            with self.base(), torch.no_grad():
                null_embeds = models.encode_null(self.model, self.negative_prompt, null_ids)
        return models.encode_distinct(self.model, prompt_ids, null_embeds, self.negative_prompt, null_ids)

    def conditioning(self, prompt_ids: Tensor, null_ids: Tensor | None = None) -> models.Conditioning:
        """The denoiser's conditioning for prompt ids (N, L)."""
        embeds, rows = self.encode_distinct(prompt_ids, null_ids)
        return models.Conditioning(embeds[rows], embeds[:1])

    def conditionings(self, prompt_ids: Tensor) -> list[models.Conditioning]:
        """The conditioning of each of T steps for prompt ids (N, L), or (N, T, 2L) with weights; equal ones are one object.

        Outside adapter_steps it is the base model's, without gradients.
        """
        made: dict[Any, models.Conditioning] = {}
        keys = []
        for k, is_adapted in enumerate(self.adapted_steps):
            ids, null_ids = prompt_ids, None
            if self.null_ids is not None and prompt_ids.ndim == 3:
                ids, null_ids = prompt_ids[:, k], self.null_ids[k : k + 1]
            read = None if null_ids is None else tuple(torch.cat([null_ids, ids]).flatten().tolist())
            keys.append((is_adapted, read))
            if keys[-1] in made:
                continue
            with contextlib.ExitStack() as stack:
                if not is_adapted:
                    stack.enter_context(self.base())
                    stack.enter_context(torch.no_grad())
                made[keys[-1]] = self.conditioning(ids, null_ids)
        return [made[key] for key in keys]

    def base_embeds(self, prompt_ids: Tensor) -> Tensor:
        """What `encode_distinct` gives with the base model, (1+U, L, D)."""
        with self.base(), torch.no_grad():
            return self.encode_distinct(prompt_ids)[0]

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """Switch the adapters off, so that the policy is the base model."""
        with models.adapters_disabled(self.model):
            yield

    def draw(self, prompt_ids: Tensor, generator: sampler.Generators) -> Tensor:
        """Images (N, 3, H, W) float32 in [0, 1] of prompt ids (N, L), or (N, T, 2L) with weights.

        With one generator, or with one a sample.
        """
        with torch.no_grad():
            conditionings = self.conditionings(prompt_ids)
        rows = prompt_ids.flatten(1)
        trajectory = sampler.rollout(self.drawing_denoiser, rows, conditionings, self.latent_shape, generator)
        return sampler.decode(self.model.vae, trajectory.latents[:, -1])

    def state_dict(self) -> dict[str, Tensor]:
        """LoRA's parameters by name."""
        return dict(self.named_parameters)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over LoRA's parameters.

        Raises:
            InputError: they are of other layers or of another rank.
        """
        shapes = {name: parameter.shape for name, parameter in self.named_parameters.items()}
        if shapes != {name: tensor.shape for name, tensor in state.items()}:
            raise InputError("resume: the checkpoint's adapter has other layers or another rank than this run's")
        with torch.no_grad():
            for name, parameter in self.named_parameters.items():
                parameter.copy_(state[name])

    def save(self, output_dir: Path) -> None:
        """Write peft adapters: the text encoder's into the folder itself, others into subfolders of the part's name.

        Learned tokens are a file in the folder.
        """
        from . import adapters

        adapters.save_tokens(self.model, output_dir)
        for name, part in self.model.policy_parts.items():
            folder = output_dir if name == "text_encoder" else output_dir / name
            if not hasattr(part, "peft_config"):
                continue
            part.peft_config["default"].base_model_name_or_path = self.model.name  # and no folder of this machine's cache
            with tempfile.TemporaryDirectory(dir=output_dir, prefix=".adapter.", suffix=files.TEMPORARY) as written:
                with files.storage_errors(folder):
                    part.save_pretrained(written, save_embedding_layers=False)  # "auto" asks the hub about the base model
                folder.mkdir(exist_ok=True)
                for file in ("adapter_config.json", "adapter_model.safetensors"):  # not peft's template of a model card
                    with files.replacing(folder / file) as temporary:
                        Path(written, file).rename(temporary)


def _negative_prompt(model: models.Model, config: TrainConfig | DrawConfig) -> str:
    """What guidance leads away from; nothing but the null prompt in a training.

    Raises:
        InputError: the model takes none.
    """
    negative_prompt = "" if isinstance(config, TrainConfig) else config.negative_prompt or ""
    if negative_prompt and model.family.guidance_input:
        raise InputError(f"negative_prompt: {model.family.name} takes none: its guidance is an input of the transformer")
    return negative_prompt


def _adapted_steps(model: models.Model, config: TrainConfig | DrawConfig) -> list[bool]:
    """At which of T steps the text encoders' adapters are on; where there is none they change nothing at any step.

    Raises:
        InputError: a range of steps is given, and the adapters are the U-Net's alone.
    """
    adapted = [name for name, part in model.policy_parts.items() if tokenization.is_adapted(part)]
    if config.adapter_steps and adapted == ["unet"]:
        raise InputError("adapter_steps: is of the text encoder's adapter, and this one is the U-Net's")
    return steps_inside(config.adapter_steps if adapted else None, config.num_inference_steps)


def _noise_process(model: models.Model, latent_shape: tuple[int, int, int]) -> sampler.NoiseProcess:
    if model.family.flow:
        return sampler.flow_noise_process(model.scheduler, models.num_image_tokens(model, latent_shape))
    return sampler.noise_process(model.scheduler)


def _schedule(
    model: models.Model, config: TrainConfig | DrawConfig, shape: tuple[int, int, int], training_schedule: bool = False
) -> sampler.Schedule:
    """The transitions of a configuration; those of a training may be deterministic outside the window.

    Flow matching is drawn without randomness, which is for training on alone.

    Raises:
        InputError: the sampler is not for the model's kind of noise.
    """
    flow, name, num_steps = model.family.flow, config.sampler, config.num_inference_steps
    if name != "dpm-solver" and flow != (name in FLOW_SAMPLERS):
        right, noise = (" or ".join(FLOW_SAMPLERS), "flow matching") if flow else ("ddim", "DDIM's noise")
        raise InputError(f"sampler: must be {right} or dpm-solver for {model.name!r}, which has {noise}, not {name}")
    if name == "dpm-solver":
        return sampler.dpm_solver_schedule(model.scheduler, num_steps).to(model.schedule_device)
    num_random = 0 if flow and not training_schedule else None
    if training_schedule and isinstance(config, TrainConfig) and config.deterministic_elsewhere:
        num_random = window_end(config)
    if flow:
        num_tokens = models.num_image_tokens(model, shape)
        levels = sampler.flow_levels(model.scheduler, num_steps, num_tokens, model.family.linear_sigmas)
        random, deterministic = sampler.flow_schedule(*levels, config.eta, name), sampler.flow_schedule(*levels)
    else:
        random, deterministic = (sampler.ddim_schedule(model.scheduler, num_steps, eta) for eta in (config.eta, 0.0))
    return sampler.random_until(random, deterministic, num_random).to(model.schedule_device)


def make_policy(model: models.Model, config: TrainConfig) -> Policy:
    """Put LoRA or learned tokens on the models of a resolved configuration, and make the policy that is trained.

    Raises:
        InputError: no step or noise level of the schedule can be trained on, or as `Policy`.
    """
    model = (add_tokens if config.target == "tokens" else add_lora)(model, config)
    if config.offload_text_encoders:
        offload_text_encoders(model)
    policy = Policy(model, config)
    if config.algorithm == "ppo" and len(trainable_steps(policy.denoiser.schedule, config)) == 0:
        chosen = f" in adapter_steps {config.adapter_steps}" if config.adapter_steps else ""
        raise InputError(
            f"eta, timestep_window: at eta {config.eta:g} none of the first {window_end(config)} steps{chosen} is random "
            "enough to have a density to train on; raise one of them"
        )
    if config.algorithm == "matching" and len(trainable_levels(policy, config)) == 0:
        raise InputError(f"adapter_steps: holds none of the model's noise levels: {config.adapter_steps}; widen it")
    if config.gradient_checkpointing:
        recompute_activations(policy)
    return policy


def recompute_activations(policy: Policy) -> None:
    """Let the denoiser and the text encoders that are trained recompute activations in the backward pass.

    Both do so in training mode only, which may differ by dropout alone: it is off.
    """
    policy.model.denoiser.enable_gradient_checkpointing()
    trained = [encoder for encoder in policy.model.text_encoders.values() if tokenization.is_adapted(encoder)]
    for encoder in trained:
        network = encoder.get_base_model() if hasattr(encoder, "peft_config") else encoder
        network.gradient_checkpointing_enable({"use_reentrant": False})
    for module in (module for network in (policy.model.denoiser, *trained) for module in network.train().modules()):
        for name in ("p", "dropout", "attention_dropout", "dropout_rate"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)


def offload_text_encoders(model: models.Model) -> None:
    """Keep the text encoders that are not trained off the device; they encode each prompt once."""
    for name, encoder in model.text_encoders.items():
        if tokenization.is_adapted(encoder):
            encoder.to(model.device)
        else:
            model.encode_once[name] = tokenization.EncodeOnce(encoder, model.readers[name])


def trainable_steps(schedule: sampler.Schedule, config: TrainConfig) -> Tensor:
    """Indices of the steps that may be trained on: those of the first timestep_window, in adapter_steps, with a density.

    The last steps of a short schedule have a small deviation, so that their log-probability has a steep gradient, though
    they decide little of what an image shows: in a plain sum they drown the others in noise.
    """
    steps = schedule.trainable_steps
    adapted = torch.tensor(steps_inside(config.adapter_steps, len(schedule.std)), device=steps.device)
    return steps[(steps < window_end(config)) & adapted[steps]]


def trainable_levels(policy: Policy, config: TrainConfig) -> Tensor:
    """The noise levels that matching trains: of the noisiest noise_window those that adapter_steps stands for.

    Level l of L stands for the share 1 - l/L of the denoising.
    """
    number = len(policy.noise_process.sample_weight)
    lowest = int((1 - config.noise_window) * (number - 1))
    levels = [level for level in range(lowest, number) if is_inside(config.adapter_steps, 1 - level / number)]
    return torch.tensor(levels, dtype=torch.long)


# --- what an optimizer step learns from ---


@dataclass(frozen=True)
class Batch:
    """An epoch's N images as the update needs them; n of them are this process's, all unless there are other processes.

    Each algorithm learns from its own tensor: `trajectory` of ppo, `latents` of matching, `noise` of gradient.
    """

    prompts: list[str]  # (N,), num_samples_per_prompt of each, side by side
    prompt_ids: Tensor  # (n, L) int64
    local_indices: Tensor  # (n,) int64, which of the N images are this process's
    advantages: Tensor  # (N,) float32 on the device, 0 where nothing is to be learned
    rewards: Tensor  # (N,) float32, NaN where the sample was dropped
    trajectory: Any = None  # a sampler.Trajectory of the n images
    latents: Any = None  # (n, C, H, W), the final ones
    noise: Any = None  # (n, T+1, C, H, W): the initial latents, and each step's noise
    is_captioned: Any = None  # (N,) bool, of matching with --relabel: which images have a caption
    caption_ids: Any = None  # (n, L) int64, its ids

    @property
    def local_advantages(self) -> Tensor:
        """Advantages (n,) of this process's images."""
        return self.advantages[self.local_indices.to(self.advantages.device)]

    def local_pairs(self, pairs: Tensor) -> Tensor:
        """The (image, step) pairs (M, 2) whose image is this process's, by its row among the n."""
        rows = torch.full((len(self.advantages),), -1).scatter(0, self.local_indices, torch.arange(len(self.local_indices)))
        local = torch.stack([rows[pairs[:, 0]], pairs[:, 1]], dim=1)
        return local[local[:, 0] >= 0].to(self.advantages.device)


def make_batch(samples: Samples, advantages: Tensor, config: TrainConfig, device: torch.device) -> Batch:
    """Samples and their advantages (N,), with the advantages on a device."""
    trajectory = samples.trajectory
    own = {"trajectory": trajectory} if config.algorithm == "ppo" else {"latents": trajectory.latents[:, -1]}
    if config.relabel:
        own["is_captioned"] = torch.tensor([caption is not None for caption in samples.captions])
        own["caption_ids"] = samples.caption_ids
    return Batch(
        samples.prompts, trajectory.prompt_ids, samples.local_indices, advantages.to(device), samples.rewards, **own
    )


def draw_pairs(num_images: int, steps: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """(image, step) pairs (M, 2): of each image a fraction of the trainable steps, drawn without replacement."""
    num_steps = max(1, round(config.timestep_fraction * len(steps)))
    order = torch.rand(num_images, len(steps), generator=generator).argsort(dim=1)[:, :num_steps]
    return torch.stack([torch.arange(num_images).repeat_interleave(num_steps), steps.cpu()[order].flatten()], dim=1)


@dataclass(frozen=True)
class Share:
    """The part of a batch that one optimizer step learns from."""

    batch: Batch
    pairs: Tensor  # (M, 2): of image and step, or of image and number of a noising
    loss: LossFunction
    on_policy: bool = False  # nothing was learned since the sampling: the loss takes the ratio for 1
    num_silent: int = 0  # further pairs, whose loss has no gradient: the mean counts them, and the U-Net need not run


@dataclass(frozen=True)
class MicroBatch:
    """(image, step) pairs (M, 2) of this process that go through the U-Net at once; the first `number` count."""

    denoiser: sampler.Denoiser
    share: Share
    pairs: Tensor
    rows: Tensor  # (M,) of the prompts' embeddings
    number: int

    @property
    def own(self) -> Tensor:
        """The pairs (number, 2) that are learned from; the others fill the micro-batch up."""
        return self.pairs[: self.number]

    @property
    def num_unet_calls(self) -> int:
        """U-Net calls of one forward pass, one for each pair and branch of guidance."""
        both = self.denoiser.guided and self.share.batch.trajectory.null_outputs is None
        return len(self.pairs) * (2 if both else 1)

    def means(self, embeds: Tensor) -> Tensor:
        """Means (number, C, H, W) of the transitions, with the update's embeddings (1+U, L, D)."""
        samples, steps = self.pairs.unbind(1)
        trajectory = self.share.batch.trajectory
        null_outputs = None if trajectory.null_outputs is None else trajectory.null_outputs[samples, steps]
        conditioning = models.Conditioning(embeds[self.rows], embeds[:1])
        return self.denoiser.mean(trajectory.latents[samples, steps], steps, conditioning, null_outputs)[0][: self.number]

    def log_probs(self, means: Tensor) -> Tensor:
        """Log-probabilities (number,) of the sampled transitions under these means."""
        samples, steps = self.own.unbind(1)
        latents = self.share.batch.trajectory.latents
        return sampler.gaussian_log_prob(latents[samples, steps + 1], means, self.denoiser.std(steps))


def micro_batch(policy: Policy, share: Share, rows: Tensor, start: int, size: int) -> MicroBatch:
    """The micro-batch of up to `size` pairs that starts at `start` of a share's local pairs, with prompts in rows (M,).

    Where rounding depends on a batch's size the last one is filled up with its own pairs, so that all are of one size. A
    compiled U-Net would be compiled anew for a smaller one.
    """
    number = min(size, len(share.pairs) - start)
    filled = policy.denoiser.compiled or policy.rounds_by_batch
    chunk = start + torch.arange(size if filled else number, device=share.pairs.device) % number
    return MicroBatch(policy.denoiser, share, share.pairs[chunk], rows[chunk], number)


# --- the losses ---


def ppo_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Clipped surrogate (arXiv:1707.06347 eq. 7), to minimise; all inputs (N,)."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


@dataclass
class UpdateStatistics:
    """Sums over the (image, step) or (image, noising) pairs of an epoch."""

    num_pairs: int = 0
    num_unet_calls: int = 0
    num_clipped: int = 0
    loss: float = 0.0  # without the KL term
    kl: float = 0.0
    ratio_deviation: float = 0.0  # largest, over all
    first_ratio_deviation: float = 0.0  # largest, before the epoch's first optimizer step
    scores: dict[int, dict[str, float]] = field(default_factory=dict)  # of gradient: each image's, by part of the reward
    last_kl: float = 0.0  # mean, before the last step
    anchor_drift: float = 0.0  # before the last step
    grad_norm: float = 0.0  # of the last step

    def add(self, other: UpdateStatistics) -> None:
        """Add another's sums and scores, and keep the larger deviation."""
        for name in ("num_pairs", "num_unet_calls", "num_clipped", "loss", "kl"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.ratio_deviation = max(self.ratio_deviation, other.ratio_deviation)
        self.scores |= other.scores

    def add_step(self, step: UpdateStatistics, grad_norm: float) -> None:
        """Add the sums of an optimizer step, and take its means as those of the last step."""
        self.add(step)
        self.last_kl, self.anchor_drift, self.grad_norm = step.kl / max(1, step.num_pairs), step.anchor_drift, grad_norm


@dataclass(frozen=True)
class Embeddings:
    """Embeddings (1+U, L, D) of the null prompt and an update's distinct prompts."""

    policy: Tensor  # detached from the text encoder: micro-batches gather their gradients here
    base: Tensor | None  # those of the base model, if the loss compares with it, or steps read them


def wants_kl(config: TrainConfig) -> bool:
    """Whether the divergence from the base policy is computed, which takes its predictions too."""
    return config.kl_weight > 0 or config.max_kl is not None


def ppo_micro_batch(
    policy: Policy, micro_batch: MicroBatch, embeds: Embeddings, config: TrainConfig
) -> tuple[Tensor, UpdateStatistics]:
    """The mean PPO loss of a micro-batch's own pairs, and what was measured."""
    share, (samples, steps) = micro_batch.share, micro_batch.own.unbind(1)
    base_means = None
    if embeds.base is not None:
        with policy.base(), torch.no_grad():
            base_means = micro_batch.means(embeds.base)  # first, while there are no activations to keep
    means = micro_batch.means(embeds.policy)
    log_probs, old_log_probs = micro_batch.log_probs(means), share.batch.trajectory.log_probs[samples, steps]
    old = log_probs.detach() if share.on_policy else old_log_probs
    loss = ppo_loss(log_probs, old, share.batch.local_advantages[samples], config.clip_range)
    calls = micro_batch.num_unet_calls
    measured = UpdateStatistics(micro_batch.number, calls if base_means is None else 2 * calls)
    if base_means is not None:
        # KL of two Gaussians of equal deviation, averaged over the latents like the log-probability.
        kl = (0.5 * ((means - base_means) / micro_batch.denoiser.std(steps)).square()).flatten(1).mean(dim=1)
        loss = loss + config.kl_weight * kl.mean()
        measured.kl = kl.sum().item()
    deviation = ((log_probs.detach() - old_log_probs).exp() - 1).abs()
    measured.ratio_deviation = deviation.max().item()
    measured.num_clipped = 0 if share.on_policy else int((deviation > config.clip_range).sum())
    return loss, measured


def matching_loss(predictions: Tensor, samples: Tensor, advantages: Tensor) -> Tensor:
    """Advantage-weighted matching (arXiv:2509.25050) of predicted clean samples (N, C, H, W), to minimise; advantages (N,).

    Each squared error is divided by its own mean absolute error, detached, so that noise levels count alike
    (arXiv:2311.18828 eq. 8, as in arXiv:2509.16117).
    """
    errors = predictions - samples
    scale = errors.detach().abs().flatten(1).mean(dim=1).clamp(min=1e-5)
    return (advantages * errors.square().flatten(1).mean(dim=1) / scale).mean()


@dataclass(frozen=True)
class Noising:
    """M noise levels and noises for each of P prompts, the same for all images of a prompt (arXiv:2510.08425)."""

    levels: Tensor  # (P, M) int64, of the noise process
    noise: Tensor  # (P, M, C, H, W)


def matching_micro_batch(
    policy: Policy, micro_batch: MicroBatch, embeds: Embeddings, config: TrainConfig, noising: Noising
) -> tuple[Tensor, UpdateStatistics]:
    """The mean matching loss of a micro-batch's own (image, noising) pairs, and what was measured.

    The final images are noised anew, and the conditional branch alone predicts them: guidance is for sampling.
    """
    share, (images, draws) = micro_batch.share, micro_batch.pairs.unbind(1)
    samples = share.batch.latents[images]
    groups = (share.batch.local_indices.to(images.device) // config.num_samples_per_prompt)[images]
    levels, noise = noising.levels[groups, draws], noising.noise[groups, draws]
    noised = policy.noise_process.add_noise(samples, noise, levels)

    def predict(embeds: Tensor) -> Tensor:
        outputs = micro_batch.denoiser.predict(noised, policy.noise_process.timesteps[levels], embeds[micro_batch.rows])
        return policy.noise_process.predict_sample(noised, outputs, levels)[: micro_batch.number]

    base_predictions = None
    if embeds.base is not None:
        with policy.base(), torch.no_grad():
            base_predictions = predict(embeds.base)
    predictions, own = predict(embeds.policy), slice(micro_batch.number)
    loss = matching_loss(predictions, samples[own], share.batch.local_advantages[images[own]])
    measured = UpdateStatistics(micro_batch.number, len(images) * (1 if base_predictions is None else 2))
    measured.loss = loss.item() * micro_batch.number
    if base_predictions is not None:
        distance = (predictions - base_predictions).square().mean()
        loss = loss + config.kl_weight * distance
        measured.kl = distance.item() * micro_batch.number
    return loss, measured


def gradient_micro_batch(
    policy: Policy, micro_batch: MicroBatch, embeds: Embeddings, config: TrainConfig, reward: rewards.Mixture
) -> tuple[Tensor, UpdateStatistics]:
    """Minus the mean reward of a micro-batch's own images, sampled with gradients in the last backprop_steps.

    An image whose score is not finite counts as 0.
    """
    batch, images = micro_batch.share.batch, micro_batch.own[:, 0]
    noise = batch.noise[images].unbind(1)
    rows = micro_batch.rows[: micro_batch.number]
    by_step: Any = [embeds.policy if is_adapted else embeds.base for is_adapted in policy.adapted_steps]
    latents = sampler.sample_with_gradients(policy.denoiser, by_step, rows, noise, config.backprop_steps)
    drawn = sampler.decode_with_gradients(policy.model.vae, latents)
    numbers = batch.local_indices[images.cpu()].tolist()
    parts = reward.with_gradients(drawn, [batch.prompts[i] for i in numbers])
    scores = reward.combine(parts)
    finite = scores.isfinite()
    loss = -scores.where(finite, torch.zeros_like(scores)).mean()
    num_steps, branches = len(policy.denoiser.schedule.timesteps), 2 if policy.denoiser.guided else 1
    measured = UpdateStatistics(len(images), len(images) * branches * (num_steps + config.backprop_steps))
    measured.loss = loss.item() * len(images)
    measured.scores = {i: {name: part[k].item() for name, part in parts.items()} for k, i in enumerate(numbers)}
    return loss, measured


LossFunction = Callable[[Policy, MicroBatch, Embeddings, TrainConfig], tuple[Any, UpdateStatistics]]


# --- the update ---


def ppo_update(
    policy: Policy, batch: Batch, learner: Learner, config: TrainConfig, generator: torch.Generator
) -> UpdateStatistics:
    """num_updates_per_epoch optimizer steps, each on its share of the images, in each of num_inner_epochs passes over them.

    Where results round by batch, the old log-probabilities of the later steps are recomputed before the first one if its
    ratios differ from 1 by more than a tenth of the clip range, or if the last sampling batch was not full.

    Raises:
        DivergedError: loss or gradient is not finite, or the ratio is not 1 before the first step.
    """
    total, shares = UpdateStatistics(), _draw_shares(policy, batch, config, generator)
    filled = len(batch.advantages) % config.sample_batch_size == 0  # else the last batch may round on its own
    for number, (pairs, num_silent) in enumerate(shares):
        share = Share(batch, pairs, ppo_micro_batch, number == 0 and policy.rounds_by_batch, num_silent)
        statistics = gather_gradients(policy, [share], learner, config)
        if number == 0:
            total.first_ratio_deviation = statistics.ratio_deviation
            _check_ratio(statistics.ratio_deviation, policy, config)
        apart = statistics.ratio_deviation > config.clip_range / 10 or not filled
        if share.on_policy and apart and len(shares) > 1:
            later = Share(batch, torch.cat([pairs for pairs, _ in shares[1:]]).unique(dim=0), ppo_micro_batch)
            batch, calls = processes.agreed(recompute_log_probs, policy, later, learner)
            statistics.num_unet_calls += sum(processes.gather(calls))
        total.add_step(statistics, learner.step())
    return total


def matching_update(
    policy: Policy, batch: Batch, learner: Learner, config: TrainConfig, generator: torch.Generator
) -> UpdateStatistics:
    """num_updates_per_epoch optimizer steps in each of num_inner_epochs passes over the images, which are noised anew.

    Raises:
        DivergedError: loss or gradient is not finite.
    """
    total, num_prompts = UpdateStatistics(), len(batch.prompts) // config.num_samples_per_prompt
    for _ in range(config.num_inner_epochs):
        order = torch.randperm(num_prompts, generator=generator)
        noising = draw_noising(policy, num_prompts, config, generator)
        loss = functools.partial(matching_micro_batch, noising=noising)
        for prompts in order.tensor_split(config.num_updates_per_epoch):
            images = _images_of(prompts, config)
            images = images[batch.rewards[images].isfinite()]
            pairs = torch.cartesian_prod(images, torch.arange(config.num_noise_levels)).reshape(-1, 2)
            share = Share(batch, pairs, loss)
            shares = [share, relabelled_share(share, config)] if config.relabel else [share]
            if learns_from_captions_alone(config):
                shares[0] = replace(share, pairs=pairs[:0], num_silent=len(pairs))
            if config.relabel and not any(len(each.pairs) for each in shares):
                continue
            total.add_step(gather_gradients(policy, shares, learner, config), learner.step())
    return total


def relabelled_share(share: Share, config: TrainConfig) -> Share:
    """The pairs of a share whose image has a caption: examples of the caption, each with the weight relabel_weight.

    Hindsight relabelling, as IPR does it (arXiv:2312.16204): an image that failed its prompt is a right one of its caption.
    It is added to the reward's term as it is, which stays the mean over all images; images without a caption count as 0
    here. Both terms take an image at the same noise levels with the same noises, so that they differ in the conditioning
    alone, and what a caption gains over the prompt is no luck of the noise.
    """
    captioned = share.pairs[share.batch.is_captioned[share.pairs[:, 0]]]
    weights = torch.full_like(share.batch.advantages, config.relabel_weight)
    batch = replace(share.batch, prompt_ids=share.batch.caption_ids, advantages=weights)
    return replace(share, batch=batch, pairs=captioned, num_silent=len(share.pairs) - len(captioned))


def learns_from_captions_alone(config: TrainConfig) -> bool:
    """Whether images teach nothing under their own prompts, so that the U-Net need not run for them."""
    return config.reward == NO_REWARD and not wants_kl(config)


def _images_of(prompts: Tensor, config: TrainConfig) -> Tensor:
    """The numbers of all images of prompts, by the prompts' numbers."""
    samples = torch.arange(config.num_samples_per_prompt)
    return (prompts[:, None] * config.num_samples_per_prompt + samples).flatten()


def gather_gradients(policy: Policy, shares: Sequence[Share], learner: Learner, config: TrainConfig) -> UpdateStatistics:
    """The sum of the gradients of shares and of the anchors in every process; what was measured, over all processes."""
    statistics = UpdateStatistics()
    for share in shares:
        for part in processes.gather(processes.agreed(accumulate_gradients, policy, share, learner, config)):
            statistics.add(part)
    if policy.anchors:
        drift = policy.anchors.drift(policy.model)
        statistics.anchor_drift = drift.item()
        if processes.is_first():  # gradients are summed over the processes
            learner.scaler.scale(config.null_anchor * drift).backward()
    processes.sum_gradients(policy.parameters)
    return statistics


def draw_noise_batch(policy: Policy, prompts: Sequence[str], config: TrainConfig, generator: torch.Generator) -> Batch:
    """The noise of an epoch's images, which `gradient_update` samples itself."""
    repeated = [prompt for prompt in prompts for _ in range(config.num_samples_per_prompt)]
    noise, local_indices = [], []
    indices, device = torch.arange(len(repeated)).split(config.sample_batch_size), policy.model.device
    for number, chunk in enumerate(indices):
        draws = sampler.draw_noise(config.num_inference_steps, len(chunk), policy.latent_shape, generator, device)
        if processes.is_mine(number):
            noise.append(torch.stack(list(draws), dim=1))
            local_indices.append(chunk)
        else:
            for _ in draws:  # leaves the generator as the process that keeps them does
                pass
    local = torch.cat(local_indices)
    prompt_ids = models.tokenize_for(policy.model, [repeated[i] for i in local.tolist()]).to(device)
    zeros = torch.zeros(len(repeated))
    return Batch(repeated, prompt_ids, local, zeros.to(device), zeros, noise=torch.cat(noise))


def gradient_update(
    policy: Policy, batch: Batch, reward: rewards.Mixture, learner: Learner, config: TrainConfig
) -> UpdateStatistics:
    """num_updates_per_epoch optimizer steps along the reward's own gradient, each on its share of the prompts.

    Raises:
        DivergedError: loss or gradient is not finite. InputError: a scorer has no gradients.
    """
    total, loss = UpdateStatistics(), functools.partial(gradient_micro_batch, reward=reward)
    order = torch.arange(len(batch.prompts) // config.num_samples_per_prompt)
    for prompts in order.tensor_split(config.num_updates_per_epoch):
        images = _images_of(prompts, config)
        pairs = torch.stack([images, torch.zeros_like(images)], dim=1)
        total.add_step(gather_gradients(policy, [Share(batch, pairs, loss)], learner, config), learner.step())
    return total


def draw_noising(policy: Policy, num_prompts: int, config: TrainConfig, generator: torch.Generator) -> Noising:
    """num_noise_levels noise levels, stratified over those that are trained, and a noise for each."""
    number, last = config.num_noise_levels, len(policy.noise_process.sample_weight) - 1
    strata = (torch.arange(number) + torch.rand(num_prompts, number, generator=generator)) / number
    levels = ((1 - config.noise_window + config.noise_window * strata) * last).long()
    if config.adapter_steps:
        trained = trainable_levels(policy, config)
        levels = trained[(strata * len(trained)).long().clamp(max=len(trained) - 1)]  # a sum of floats may round up to 1
    noise = torch.randn(num_prompts, number, *policy.latent_shape, generator=generator)
    return Noising(levels.to(policy.model.device), noise.to(policy.model.device))


def _draw_shares(policy: Policy, batch: Batch, config: TrainConfig, generator: torch.Generator) -> list[tuple[Tensor, int]]:
    """The (image, step) pairs (M, 2) of each optimizer step, drawn anew in each pass; the number of silent ones.

    Pairs of images without advantage are silent, unless the KL term wants them. Dropped images have no pairs.
    """
    steps, num_images = trainable_steps(policy.denoiser.schedule, config), len(batch.advantages)
    wanted, shares = (batch.advantages != 0).cpu() | (config.kl_weight > 0), []
    for _ in range(config.num_inner_epochs):
        pairs = draw_pairs(num_images, steps, config, generator)
        pairs = pairs[batch.rewards[pairs[:, 0]].isfinite()]
        for images in torch.randperm(num_images, generator=generator).tensor_split(config.num_updates_per_epoch):
            drawn = pairs[torch.isin(pairs[:, 0], images)]
            chosen = drawn[wanted[drawn[:, 0]]]
            if len(chosen):
                shares.append((chosen, len(drawn) - len(chosen)))
    return shares


def _check_ratio(deviation: float, policy: Policy, config: TrainConfig) -> None:
    """Check that sampling and training compute the same, by the largest |ratio - 1| before the first update."""
    tolerance = COARSE_TOLERANCE if policy.rounds_by_batch else max(FLOAT32_TOLERANCE, config.clip_range / 1000)
    if deviation > tolerance:
        raise DivergedError(
            f"the ratio deviates from 1 by {deviation:.2e} before the first update, which is more than {tolerance:.0e}: "
            "sampling and training do not compute the same; try --no-compile, --mixed-precision no, or a "
            f"--micro-batch-size equal to --sample-batch-size ({config.sample_batch_size}) and images that fill such batches"
        )


def accumulate_gradients(policy: Policy, share: Share, learner: Learner, config: TrainConfig) -> UpdateStatistics:
    """Add the gradient of the loss, averaged over the share's pairs and its silent ones, to LoRA's parameters.

    The text encoder runs once, over the distinct prompts and the null prompt. The gradient of every micro-batch is gathered
    on the embeddings, and one backward pass takes it through the text encoder: the U-Net's activations grow with the
    micro-batch alone, the text encoder's with the distinct prompts. Of several processes each adds its images' part.

    Raises:
        DivergedError: the loss is not finite.
    """
    total, local = UpdateStatistics(), replace(share, pairs=share.batch.local_pairs(share.pairs))
    if len(local.pairs) == 0:
        return total
    prompt_ids = share.batch.prompt_ids[local.pairs[:, 0]]
    encoded, rows = policy.encode_distinct(prompt_ids)
    leaf = encoded.detach().requires_grad_(encoded.requires_grad)
    reads_base = wants_kl(config) or (config.algorithm == "gradient" and not all(policy.adapted_steps))
    embeds = Embeddings(leaf, policy.base_embeds(prompt_ids) if reads_base else None)
    inputs = [tensor for tensor in (leaf, *policy.model.denoiser.parameters()) if tensor.requires_grad]

    def gradients_of(micro_batch: MicroBatch) -> tuple[tuple[Tensor, ...], UpdateStatistics]:
        """In a frame of its own, which keeps no activations for the retry when memory runs out."""
        loss, measured = share.loss(policy, micro_batch, embeds, config)
        if not (loss.isfinite() and math.isfinite(measured.ratio_deviation)):
            raise DivergedError("the loss is not finite; lower --learning-rate, or look at the rewards in metrics.jsonl")
        loss = learner.scaler.scale(loss * (micro_batch.number / (len(share.pairs) + share.num_silent)))
        return torch.autograd.grad(loss, inputs), measured  # all of them or, when memory runs out, none

    while total.num_pairs < len(local.pairs):
        interrupts.check()
        stages.report("updating", total.num_pairs, len(local.pairs))
        chunk = micro_batch(policy, local, rows, total.num_pairs, learner.micro_batch_size)
        try:
            gradients, measured = gradients_of(chunk)
        except Exception as error:
            if config.micro_batch != "auto" or len(chunk.pairs) == 1 or not is_out_of_memory(error):
                raise  # a smaller micro-batch would not help
            learner.micro_batch_size = len(chunk.pairs) // 2
            continue
        for tensor, gradient in zip(inputs, gradients, strict=True):
            tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)
        total.add(measured)
    if leaf.grad is not None:
        encoded.backward(leaf.grad)
    return total


def recompute_log_probs(policy: Policy, share: Share, learner: Learner) -> tuple[Batch, int]:
    """The share's batch with the log-probabilities that an update would compute now for its pairs; U-Net calls."""
    batch = share.batch
    local, log_probs, num_calls = replace(share, pairs=batch.local_pairs(share.pairs)), batch.trajectory.log_probs.clone(), 0
    if len(local.pairs) == 0:
        return batch, 0
    prompt_ids = batch.prompt_ids[local.pairs[:, 0]]
    embeds, rows = policy.encode_distinct(prompt_ids)  # with gradients: it rounds as in updates
    embeds = embeds.detach()
    for start in range(0, len(local.pairs), learner.micro_batch_size):
        interrupts.check()
        chunk = micro_batch(policy, local, rows, start, learner.micro_batch_size)
        with torch.no_grad():
            samples, steps = chunk.own.unbind(1)
            log_probs[samples, steps] = chunk.log_probs(chunk.means(embeds))
        num_calls += chunk.num_unet_calls
    return replace(batch, trajectory=replace(batch.trajectory, log_probs=log_probs)), num_calls
