"""TexForce (arXiv:2311.15657): reinforcement learning of the text encoder of a text-to-image diffusion model.

The policy is LoRA on the text encoder (and, if wanted, on the U-Net); the update is PPO over denoising steps. Read top to
bottom: policy, loss, update. The images come from experience.py, their advantages from advantages.py, and training.py
repeats it all for a run. This file is also the package `texforce`.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__path__ = [str(Path(__file__).parent)]

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from texforce import pipelines, sampler
    from texforce.batches import Batch, MicroBatch
    from texforce.learner import Learner
else:

    class _Torch:
        """torch, imported when it is first used: `texforce --help` must not wait for it.

        Not by importlib's LazyLoader: torch looks at all modules while it loads, and wakes those that wait too early.
        """

        def __getattr__(self, attribute: str) -> Any:
            globals()["torch"] = importlib.import_module("torch")
            return getattr(torch, attribute)

    torch = _Torch()

from texforce import interrupts
from texforce.config import TrainConfig, rounds_by_batch, window_end

TEXT_ENCODER_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
# Of the ratio before the first update. Sampling and training in batches of one size leave 0 to 1e-6; kernels round
# differently for batches of other sizes, which came to 2e-6 (tests), and must not stop a run.
FLOAT32_TOLERANCE = 5e-6
# In half precision and on a GPU batches of one size leave 0, others what depends on the number of steps, the guidance and
# the kernels. It is no part of a loss (see `update`); above this what was sampled is too far from what is trained.
COARSE_TOLERANCE = 0.1


class DivergedError(Exception):
    """Training went wrong numerically and was stopped."""


# --- the policy ---


def add_lora(models: pipelines.Models, config: TrainConfig) -> pipelines.Models:
    """Put fresh LoRA (arXiv:2106.09685), which changes nothing yet, on the text encoder (SDXL's two), the U-Net or both."""
    from peft import LoraConfig, get_peft_model

    text = tuple(models.text_encoders)
    wanted = {"text-encoder": text, "unet": ("unet",), "both": (*text, "unet")}[config.target]
    adapted = {}
    with torch.random.fork_rng([models.device] if models.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        for part in wanted:
            layers = UNET_LAYERS if part == "unet" else TEXT_ENCODER_LAYERS
            lora = LoraConfig(
                r=config.rank, lora_alpha=config.lora_alpha, target_modules=layers, init_lora_weights="gaussian"
            )
            adapted[part] = get_peft_model(getattr(models, part), lora)
    return replace(models, **adapted)


class Policy:
    """A pipeline whose text encoders, U-Net or both carry LoRA; only LoRA is trained, in float32."""

    def __init__(self, models: pipelines.Models, null_prompt: str = "adapted") -> None:
        from texforce import pipelines

        self.models = models
        parts = models.policy_parts.values()
        # Listed once: peft freezes and thaws them as adapters are switched off and on.
        self.parameters = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
        self.null_embeds = None  # of the base text encoder, if the null prompt stays there: its branch learns nothing
        if null_prompt == "base" or (models.zero_null and not hasattr(models.unet, "peft_config")):
            with self.base(), torch.no_grad():
                self.null_embeds = pipelines.encode_null(models)

    def encode_distinct(self, prompt_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The null prompt and every distinct prompt of ids (N, L), encoded once (1+U, L, D); the row of each id (N,)."""
        from texforce import pipelines

        return pipelines.encode_distinct(self.models, prompt_ids, self.null_embeds)

    def conditioning(self, prompt_ids: Tensor) -> pipelines.Conditioning:
        """What the U-Net is told of prompt ids (N, L)."""
        from texforce import pipelines

        embeds, rows = self.encode_distinct(prompt_ids)
        return pipelines.Conditioning(embeds[rows], embeds[:1])

    def base_embeds(self, prompt_ids: Tensor) -> Tensor:
        """Of the base model, what `encode_distinct` gives (1+U, L, D)."""
        with self.base(), torch.no_grad():
            return self.encode_distinct(prompt_ids)[0]

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """Within it, the policy is the base model."""
        from texforce import pipelines

        with pipelines.adapters_disabled(self.models):
            yield

    def save(self, output_dir: Path) -> None:
        """Write peft adapters: the text encoder's into the folder itself, others into subfolders of the part's name."""
        from texforce import record

        for name, part in self.models.policy_parts.items():
            folder = output_dir if name == "text_encoder" else output_dir / name
            if hasattr(part, "peft_config"):
                with tempfile.TemporaryDirectory(dir=output_dir, prefix=record.ADAPTER, suffix=".tmp") as written:
                    with record.storage_errors(folder):
                        part.save_pretrained(
                            written, save_embedding_layers=False
                        )  # "auto" asks the hub about the base model
                    folder.mkdir(exist_ok=True)
                    for file in ("adapter_config.json", "adapter_model.safetensors"):  # not peft's template of a model card
                        record.open_to_umask(Path(written, file))
                        record.sync(Path(written, file))
                        Path(written, file).replace(folder / file)


def make_policy(models: pipelines.Models, config: TrainConfig) -> tuple[Policy, sampler.Denoiser]:
    """Put LoRA on models, and set up the denoiser that samples and trains with them."""
    from texforce import batches, pipelines, sampler

    schedule = sampler.ddim_schedule(
        models.scheduler,
        config.num_inference_steps,
        config.eta,
        window_end(config) if config.deterministic_elsewhere else None,
    ).to(models.device)
    if len(batches.window(schedule, config)) == 0:
        raise ValueError(
            f"eta, timestep_window: at eta {config.eta:g} none of the first {window_end(config)} steps that are not shared "
            "is random enough to have a density to train on; raise one of them"
        )
    models = add_lora(models, config)
    if config.gradient_checkpointing:
        models.unet.enable_gradient_checkpointing()
        models.unet.train()  # diffusers recomputes in training mode only; these U-Nets have neither dropout nor batch norm
    policy, pooled = Policy(models, config.null_prompt), pipelines.pooled_text(models)
    apart = policy.null_embeds is not None and rounds_by_batch(config.mixed_precision, models.device.type)
    text_trained = config.target != "unet"
    denoiser = sampler.Denoiser(models.unet, schedule, config.guidance_scale, config.compile, pooled, apart, text_trained)
    return policy, denoiser


# --- the update ---


def ppo_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Clipped surrogate (arXiv:1707.06347 eq. 7), to minimise; all inputs (N,)."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


@dataclass
class UpdateStatistics:
    """Sums over the (image, step) pairs of an epoch."""

    num_pairs: int = 0
    num_unet_calls: int = 0
    num_clipped: int = 0
    kl: float = 0.0
    last_kl: float = 0.0  # mean, before the last step
    ratio_deviation: float = 0.0  # largest, over all
    first_ratio_deviation: float = 0.0  # largest, before the epoch's first optimizer step
    grad_norm: float = 0.0  # of the last step

    def add(self, other: UpdateStatistics, first: bool = False) -> None:
        """Add another's sums, which may be those of the epoch's first step, and keep the larger deviation."""
        for name in ("num_pairs", "num_unet_calls", "num_clipped", "kl"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.ratio_deviation = max(self.ratio_deviation, other.ratio_deviation)
        if first:
            self.first_ratio_deviation = other.ratio_deviation


def wants_kl(config: TrainConfig) -> bool:
    """Whether the divergence from the base policy is computed, which takes its predictions too."""
    return config.kl_weight > 0 or config.max_kl is not None


def accumulate_gradients(
    policy: Policy,
    denoiser: sampler.Denoiser,
    batch: Batch,
    pairs: Tensor,
    config: TrainConfig,
    learner: Learner,
    on_policy: bool = False,
) -> UpdateStatistics:
    """Add the gradient of the PPO loss, averaged over (image, step) pairs (M, 2), to LoRA's parameters.

    With `on_policy` nothing was learned since the sampling, and the loss takes the ratio for 1; what rounding makes of it is
    measured. The text encoder runs once, over the distinct prompts and the null prompt. The gradient of every micro-batch is
    gathered on its embeddings, and one backward pass takes it through the text encoder: the U-Net's activations grow with
    the micro-batch alone, the text encoder's with the distinct prompts. Of several processes each adds its images' part.

    Raises:
        DivergedError: the loss is not finite.
    """
    from texforce import batches

    total, mine = UpdateStatistics(), batch.local_pairs(pairs)
    if len(mine) == 0:
        return total
    prompt_ids = batch.trajectory.prompt_ids[mine[:, 0]]
    embeds, rows = policy.encode_distinct(prompt_ids)
    leaf = embeds.detach().requires_grad_(embeds.requires_grad)
    base_embeds = policy.base_embeds(prompt_ids) if wants_kl(config) else None
    inputs = [tensor for tensor in (leaf, *policy.models.unet.parameters()) if tensor.requires_grad]

    def gradients_of(micro_batch: MicroBatch) -> tuple[tuple[Tensor, ...], UpdateStatistics]:
        """In a frame of its own, which keeps no activations for the retry when memory runs out."""
        loss, measured = _pair_losses(policy, micro_batch, leaf, base_embeds, config, on_policy)
        loss = learner.scaler.scale(loss * (micro_batch.number / len(pairs)))
        return torch.autograd.grad(loss, inputs), measured  # all of them or, when memory runs out, none

    while total.num_pairs < len(mine):
        interrupts.check()
        micro_batch = batches.micro_batch(denoiser, batch, mine, rows, total.num_pairs, learner.micro_batch_size, config)
        try:
            gradients, measured = gradients_of(micro_batch)
        except (RuntimeError, MemoryError) as error:
            learner.micro_batch_size = _halved(len(micro_batch.pairs), error, config)
            continue
        for tensor, gradient in zip(inputs, gradients, strict=True):
            tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)
        total.add(measured)
    if leaf.grad is not None:
        embeds.backward(leaf.grad)
    return total


def _halved(size: int, error: BaseException, config: TrainConfig) -> int:
    """What to try after a micro-batch of a size raised an error; the error again, if it is none that less would help."""
    if config.micro_batch != "auto" or size == 1 or not is_out_of_memory(error):
        raise error
    return size // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on the CPU, and in a GPU's libraries, torch has no class for that."""
    texts = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


def _pair_losses(
    policy: Policy,
    micro_batch: MicroBatch,
    embeds: Tensor,
    base_embeds: Tensor | None,
    config: TrainConfig,
    on_policy: bool,
) -> tuple[Tensor, UpdateStatistics]:
    """The mean loss of a micro-batch's own pairs, and what was measured."""
    samples, steps = micro_batch.own.unbind(1)
    base_means = None
    if base_embeds is not None:
        with policy.base(), torch.no_grad():
            base_means = micro_batch.means(base_embeds)  # first, while there are no activations to keep
    means = micro_batch.means(embeds)
    log_probs, old_log_probs = micro_batch.log_probs(means), micro_batch.batch.trajectory.log_probs[samples, steps]
    old = log_probs.detach() if on_policy else old_log_probs
    loss = ppo_loss(log_probs, old, micro_batch.batch.local_advantages[samples], config.clip_range)
    calls = micro_batch.num_unet_calls
    measured = UpdateStatistics(micro_batch.number, calls if base_means is None else 2 * calls)
    if base_means is not None:
        # KL of two Gaussians of equal deviation, averaged over the latents like the log-probability.
        kl = (0.5 * ((means - base_means) / micro_batch.denoiser.std(steps)).square()).flatten(1).mean(dim=1)
        loss = loss + config.kl_weight * kl.mean()
        measured.kl = kl.sum().item()
    deviation = ((log_probs.detach() - old_log_probs).exp() - 1).abs()
    if not (loss.isfinite() and deviation.isfinite().all()):
        raise DivergedError("the loss is not finite; lower --learning-rate, or look at the rewards in metrics.jsonl")
    measured.ratio_deviation = deviation.max().item()
    measured.num_clipped = 0 if on_policy else int((deviation > config.clip_range).sum())
    return loss, measured


def with_log_probs_anew(
    policy: Policy, denoiser: sampler.Denoiser, batch: Batch, pairs: Tensor, config: TrainConfig, learner: Learner
) -> tuple[Batch, int]:
    """The batch with the log-probabilities of (image, step) pairs (M, 2) that an update would compute now; U-Net calls."""
    from texforce import batches

    mine, log_probs, num_calls = batch.local_pairs(pairs), batch.trajectory.log_probs.clone(), 0
    if len(mine) == 0:
        return batch, 0
    embeds, rows = policy.encode_distinct(batch.trajectory.prompt_ids[mine[:, 0]])  # with gradients: it rounds as in updates
    embeds = embeds.detach()
    for start in range(0, len(mine), learner.micro_batch_size):
        interrupts.check()
        micro_batch = batches.micro_batch(denoiser, batch, mine, rows, start, learner.micro_batch_size, config)
        with torch.no_grad():
            samples, steps = micro_batch.own.unbind(1)
            log_probs[samples, steps] = micro_batch.log_probs(micro_batch.means(embeds))
        num_calls += micro_batch.num_unet_calls
    return replace(batch, trajectory=replace(batch.trajectory, log_probs=log_probs)), num_calls


def _draw_shares(denoiser: sampler.Denoiser, batch: Batch, config: TrainConfig, generator: torch.Generator) -> list[Tensor]:
    """The (image, step) pairs (M, 2) of each of an epoch's optimizer steps."""
    from texforce import batches

    pairs = batches.draw_pairs(batch.advantages, batches.window(denoiser.schedule, config), config, generator)
    pairs = pairs[batch.rewards[pairs[:, 0]].isfinite()]  # the KL term wants all images but those that were dropped
    shares = []
    for _ in range(config.num_inner_epochs):
        images = torch.randperm(len(batch.advantages), generator=generator).tensor_split(config.num_updates_per_epoch)
        shares += [share for share in (pairs[torch.isin(pairs[:, 0], chosen)] for chosen in images) if len(share)]
    return shares


def update(
    policy: Policy,
    denoiser: sampler.Denoiser,
    batch: Batch,
    learner: Learner,
    config: TrainConfig,
    generator: torch.Generator,
) -> UpdateStatistics:
    """num_updates_per_epoch optimizer steps, each on its share of the images, in each of num_inner_epochs passes over them.

    Where rounding sets sampling and updates apart by more than a tenth of the clip range, or batches were not filled, the
    log-probabilities that the later steps compare with are computed anew before the first one.

    Raises:
        DivergedError: loss or gradient is not finite, or the ratio is not 1 before the first step.
    """
    from texforce import processes

    total, shares = UpdateStatistics(), _draw_shares(denoiser, batch, config, generator)
    rounds = rounds_by_batch(config.mixed_precision, policy.models.device.type)
    tolerance = COARSE_TOLERANCE if rounds else max(FLOAT32_TOLERANCE, config.clip_range / 1000)
    filled = len(batch.advantages) % config.sample_batch_size == 0  # else the last batch may round on its own
    for number, share in enumerate(shares):
        first = number == 0
        statistics = UpdateStatistics()
        done = processes.agreed(accumulate_gradients, policy, denoiser, batch, share, config, learner, first and rounds)
        for part in processes.gather(done):
            statistics.add(part)
        processes.sum_gradients(policy.parameters)
        if first and statistics.ratio_deviation > tolerance:
            raise DivergedError(
                f"the ratio deviates from 1 by {statistics.ratio_deviation:.2e} before the first update, which is more than "
                f"{tolerance:.0e}: sampling and training do not compute the same; try --no-compile, --mixed-precision no, "
                f"or a --micro-batch-size equal to --sample-batch-size ({config.sample_batch_size}) and images that fill "
                "such batches"
            )
        apart = statistics.ratio_deviation > config.clip_range / 10 or not filled
        if first and rounds and apart and len(shares) > 1:
            later = torch.cat(shares[1:]).unique(dim=0)
            batch, calls = processes.agreed(with_log_probs_anew, policy, denoiser, batch, later, config, learner)
            statistics.num_unet_calls += sum(processes.gather(calls))
        total.add(statistics, first)
        total.last_kl = statistics.kl / max(1, statistics.num_pairs)
        total.grad_norm = learner.step(policy.parameters, config.max_grad_norm)
    return total
