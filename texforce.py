"""TexForce (arXiv:2311.15657): reinforcement learning of the text encoder of a text-to-image diffusion model.

The policy is LoRA on the text encoder (and, if wanted, on the U-Net); the update is PPO over denoising steps. Read top to
bottom: policy, advantages, loss, update, training loop. This file is also the package `texforce`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
import tempfile
import threading
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

__version__ = "0.1.0"
__path__ = [str(Path(__file__).parent)]

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from texforce import heldout, interrupts, pipelines, processes, record, resume, rewards, sampler, scorers
else:

    def _lazy_import(name: str) -> Any:
        """Import a module when it is first used: `texforce --help` must not wait for torch."""
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.find_spec(name)
        spec.loader = importlib.util.LazyLoader(spec.loader)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    # `python -m texforce.rewards` finds the lazy module there; it is not the one that is run, and nothing of it is shared.
    warnings.filterwarnings("ignore", "'texforce.rewards' found in sys.modules", RuntimeWarning)
    torch = _lazy_import("torch")
    names = ("heldout", "interrupts", "pipelines", "processes", "record", "resume", "rewards", "sampler", "scorers")
    heldout, interrupts, pipelines, processes, record, resume, rewards, sampler, scorers = (
        _lazy_import(f"texforce.{name}") for name in names
    )

from texforce.config import TrainConfig, default_device, read_json, resolve
from texforce.prompt_sets import split_prompts

TEXT_ENCODER_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Of the ratio before the first update. Sampling and training in batches of one size leave 0 to 1e-6; kernels round
# differently for batches of other sizes, which came to 2e-6 (tests), and must not stop a run.
FLOAT32_TOLERANCE = 5e-6
T = TypeVar("T")
CHECKPOINTS = "checkpoints"  # their folder in that of a run
MAX_SKIPPED_STEPS = 20  # in a row in fp16: by then the loss scale has fallen a millionfold


class DivergedError(Exception):
    """Training went wrong numerically and was stopped."""


# --- the policy ---


def add_lora(models: pipelines.Models, config: TrainConfig) -> pipelines.Models:
    """Put fresh LoRA (arXiv:2106.09685), which changes nothing yet, on the text encoder (SDXL's two), the U-Net or both."""
    from peft import LoraConfig, get_peft_model

    text = tuple(models.text_encoders)
    wanted = {"text-encoder": text, "unet": ("unet",), "both": (*text, "unet")}[config.target]
    adapted = {}
    with torch.random.fork_rng():
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
        self.models = models
        parts = models.policy_parts.values()
        # Listed once: peft freezes and thaws them as adapters are switched off and on.
        self.parameters = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
        self.null_embeds = None  # of the base text encoder, if the null prompt is to stay there
        if null_prompt == "base":
            with self.base(), torch.no_grad():
                self.null_embeds = pipelines.encode_null(models)

    def encode_distinct(self, prompt_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The null prompt and every distinct prompt of ids (N, L), encoded once (1+U, L, D); the row of each id (N,)."""
        return pipelines.encode_distinct(self.models, prompt_ids, self.null_embeds)

    def conditioning(self, prompt_ids: Tensor) -> pipelines.Conditioning:
        """What the U-Net is told of prompt ids (N, L)."""
        embeds, rows = self.encode_distinct(prompt_ids)
        return pipelines.Conditioning(embeds[rows], embeds[:1])

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """Within it, the policy is the base model."""
        with pipelines.adapters_disabled(self.models):
            yield

    def save(self, output_dir: Path) -> None:
        """Write peft adapters: the text encoder's into the folder itself, others into subfolders of the part's name."""
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


# --- advantages and loss ---


def leave_one_out(rewards: Tensor) -> Tensor:
    """Advantage of each sample over the mean of its group's others (arXiv:2402.14740); rewards (P, K), NaN where dropped.

    A dropped sample gets 0, and so does a group that is all equal or has one sample left.
    """
    valid = rewards.isfinite()
    values = rewards.where(valid, rewards.new_zeros(()))
    num_others = valid.sum(dim=1, keepdim=True) - 1
    others = (values.sum(dim=1, keepdim=True) - values) / num_others.clamp(min=1)
    # The sum of equal rewards is rounded, and what that leaves would be made large by the normalisation.
    differ = rewards.where(valid, -math.inf).amax(dim=1) > rewards.where(valid, math.inf).amin(dim=1)
    return torch.where(valid & differ[:, None], values - others, 0)


class PromptStatistics:
    """Advantages by running statistics for each prompt (DDPO, arXiv:2305.13301 section 4.3).

    A prompt seen fewer than min_count times uses the mean and deviation of the whole batch.
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16) -> None:
        self.min_count = min_count
        self.history: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=buffer_size))

    def advantages(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Normalised rewards (N,); 0 where the reward is not finite."""
        valid = rewards.isfinite()
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            if math.isfinite(reward):
                self.history[prompt].append(reward)
        advantages = torch.zeros_like(rewards)
        for i in torch.nonzero(valid).flatten().tolist():
            history = self.history[prompts[i]]
            seen = torch.tensor(history) if len(history) >= self.min_count else rewards[valid]
            if seen.amax() > seen.amin():  # the mean of equal rewards is rounded: what that leaves is no advantage
                advantages[i] = (rewards[i] - seen.mean()) / (seen.std(correction=0) + 1e-6)
        return advantages


def ppo_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Clipped surrogate (arXiv:1707.06347 eq. 7), to minimise; all inputs (N,)."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


# --- sampling and the update ---


@dataclass(frozen=True)
class Batch:
    """One epoch's N images, as the update needs them: trajectories, advantages, and what was measured."""

    trajectory: sampler.Trajectory
    advantages: Tensor  # (N,) float32, 0 where nothing is to be learned
    rewards: Tensor  # (N,) float32, NaN where the sample was dropped
    parts: dict[str, Tensor]  # (N,) float32, the score of each part of the reward
    here: Tensor  # (n,) int64, which of the N images the trajectory holds: all of them, unless there are other processes

    @property
    def local_advantages(self) -> Tensor:
        """Of the trajectory's images (n,)."""
        return self.advantages[self.here.to(self.advantages.device)]

    def local_pairs(self, pairs: Tensor) -> Tensor:
        """Those of (image, step) pairs (M, 2) whose image is here, by its row in the trajectory."""
        rows = torch.full((len(self.advantages),), -1).scatter(0, self.here, torch.arange(len(self.here)))
        mine = torch.stack([rows[pairs[:, 0]], pairs[:, 1]], dim=1)
        return mine[mine[:, 0] >= 0].to(self.advantages.device)


def collect(
    policy: Policy,
    denoiser: sampler.Denoiser,
    reward: rewards.Mixture,
    prompts: Sequence[str],
    config: TrainConfig,
    generator: torch.Generator,
    statistics: PromptStatistics,
) -> Batch:
    """Sample num_samples_per_prompt images for each prompt, score them, and compute their advantages.

    Raises:
        DivergedError: no image is finite. RewardError: a scorer failed, or no image has a finite reward.
    """
    repeated = [prompt for prompt in prompts for _ in range(config.num_samples_per_prompt)]
    trajectory, here, parts = _sample_and_score(policy, denoiser, reward, repeated, config, generator)
    reward.observe(parts)  # before they are combined, so that one unit holds for all images that are compared
    values = reward.combine(parts)
    values = values.where(values.isfinite(), torch.nan)
    if values.isnan().all():
        raise scorers.RewardError(f"reward: {config.reward} gave no finite score for any image of an epoch")
    advantages = normalised_advantages(values, repeated, config, statistics)
    return Batch(trajectory, advantages.to(policy.models.device), values, parts, here)


def _sample_and_score(
    policy: Policy,
    denoiser: sampler.Denoiser,
    reward: rewards.Mixture,
    prompts: Sequence[str],
    config: TrainConfig,
    generator: torch.Generator,
) -> tuple[sampler.Trajectory, Tensor, dict[str, Tensor]]:
    """This process's n trajectories of those of N prompts, which they are (n,), and the scores (N,) of each part.

    While a batch is decoded and scored, the next one is sampled. A batch of another process draws its noise here too.
    """
    shape = pipelines.latent_shape(policy.models, config.resolution)
    shared = sampler.SharedSteps(config.num_shared_steps, config.num_samples_per_prompt if config.num_shared_steps else 1)
    indices = torch.arange(len(prompts)).split(config.sample_batch_size)
    trajectories: dict[int, sampler.Trajectory] = {}
    scores: dict[int, dict[str, Tensor]] = {}
    waiting: dict[int, Future[dict[str, Tensor]]] = {}
    try:
        for number, chunk in enumerate(_chunks(prompts, config.sample_batch_size)):
            interrupts.check()
            if not processes.share(number):
                sampler.skip_rollout(denoiser, len(chunk), shape, generator, shared)
                continue
            prompt_ids = pipelines.tokenize_for(policy.models, chunk).to(policy.models.device)
            with torch.no_grad():
                conditioning = policy.conditioning(prompt_ids)
            keep = config.null_prompt == "base"
            trajectory = sampler.rollout(denoiser, prompt_ids, conditioning, shape, generator, keep, shared)
            trajectories[number] = trajectory
            scores |= {number: future.result() for number, future in waiting.items()}
            waiting = {number: _in_background(_decode_and_score, policy, reward, trajectory, chunk)}
        scores |= {number: future.result() for number, future in waiting.items()}
    finally:
        wait(waiting.values(), timeout=2)  # a thread that is at work when the process ends can bring it down
    for others in processes.gather(scores):
        scores |= others
    here = torch.cat([indices[number] for number in trajectories])
    parts = {name: torch.cat([scores[number][name] for number in range(len(indices))]) for name in scores[0]}
    return sampler.concatenate(list(trajectories.values())), here, parts


def _decode_and_score(
    policy: Policy, reward: rewards.Mixture, trajectory: sampler.Trajectory, prompts: Sequence[str]
) -> dict[str, Tensor]:
    if policy.models.device.type == "cuda":
        torch.cuda.set_device(policy.models.device)  # a thread inherits neither this nor the grad mode
    with torch.no_grad():
        return reward.score(check_finite(sampler.decode(policy.models.vae, trajectory.latents[:, -1])), prompts)


def _in_background(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call a function in a thread of its own, for which no process waits at its end."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def check_finite(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) as they are.

    Raises:
        DivergedError: not one of them is finite, so that it is not for the scorer to judge them.
    """
    if not images.isfinite().flatten(1).all(dim=1).any():
        raise DivergedError(
            "the images are not finite; lower --learning-rate (or --scale, in sampling), or try --mixed-precision no"
        )
    return images


def normalised_advantages(
    values: Tensor, prompts: Sequence[str], config: TrainConfig, statistics: PromptStatistics
) -> Tensor:
    """Advantages (N,) of rewards (N,), in standard deviations and clipped; 0 for dropped samples."""
    if config.advantages == "per-prompt":
        advantages = statistics.advantages(prompts, values)
    else:
        advantages = leave_one_out(values.reshape(-1, config.num_samples_per_prompt)).flatten()
        advantages = advantages / (advantages[values.isfinite()].std(correction=0) + 1e-8)
    return advantages.clamp(-config.advantage_clip, config.advantage_clip)


@dataclass
class UpdateStatistics:
    """Sums over the (image, step) pairs of an epoch."""

    num_pairs: int = 0
    num_unet_calls: int = 0
    num_clipped: int = 0
    kl: float = 0.0
    ratio_deviation: float = 0.0  # largest, over all
    first_ratio_deviation: float = 0.0  # largest, before the epoch's first optimizer step
    grad_norm: float = 0.0  # of the last step

    def add(self, other: UpdateStatistics, first: bool = False) -> None:
        for name in ("num_pairs", "num_unet_calls", "num_clipped", "kl"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.ratio_deviation = max(self.ratio_deviation, other.ratio_deviation)
        if first:
            self.first_ratio_deviation = other.ratio_deviation


class Learner:
    """Optimizer with its learning rate schedule, loss scaling for fp16, and the running average of the adapter."""

    def __init__(self, parameters: list[nn.Parameter], config: TrainConfig) -> None:
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        name = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
        num_updates = config.num_epochs * config.num_updates_per_epoch
        self.lr_scheduler = get_scheduler(
            name, self.optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=num_updates
        )
        self.scaler = torch.amp.GradScaler("cuda", enabled=config.mixed_precision == "fp16")
        self.num_skipped = 0  # steps in a row
        everything = config.micro_batch == "auto" and parameters[0].is_cuda  # the CPU's lack of memory ends the process
        self.micro_batch_size = sys.maxsize if everything else config.micro_batch_size  # halved when memory runs out
        self.ema = EMAModel(parameters, decay=config.ema_decay) if config.ema_decay else None

    def step(self, parameters: list[nn.Parameter], max_grad_norm: float) -> float:
        """One optimizer step from the gradients accumulated; returns their norm.

        Raises:
            DivergedError: the gradient is not finite. In fp16 the step is skipped instead, and the loss scale lowered, so
                often as lowering it can help.
        """
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        self.num_skipped = 0 if norm.isfinite() else self.num_skipped + 1
        if self.num_skipped > (MAX_SKIPPED_STEPS if self.scaler.is_enabled() else 0):
            raise DivergedError("the gradient is not finite; lower --learning-rate")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if not self.num_skipped:
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(parameters)
        return norm.item()

    def set_num_steps(self, number: int) -> None:
        """Go on with the learning rate as it is after so many optimizer steps."""
        self.lr_scheduler.last_epoch = number
        rates = zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas, strict=True)
        self.lr_scheduler._last_lr = [base * factor(number) for base, factor in rates]
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler._last_lr, strict=True):
            group["lr"] = rate

    @contextlib.contextmanager
    def averaged(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Within it, the parameters hold their running average, if one is kept."""
        if self.ema is None:
            yield
            return
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)


def window(schedule: sampler.Schedule, config: TrainConfig) -> Tensor:
    """Indices of the steps that may be trained on: of the first timestep_window, those with a density and not shared.

    The last steps of a short schedule have a small deviation, so that their log-probability has a steep gradient, though
    they decide little of what an image shows: in a plain sum they drown the others in noise. On steps that a group shares,
    the advantages within it cancel out.
    """
    steps = schedule.trainable_steps
    return steps[(steps >= config.num_shared_steps) & (steps < window_end(config))]


def window_end(config: TrainConfig) -> int:
    """The number of steps up to the end of the window."""
    return math.ceil(config.timestep_window * config.num_inference_steps)


def draw_pairs(advantages: Tensor, steps: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """(image, step) pairs (M, 2): of each image a fraction of the trainable steps, drawn without replacement.

    Images without advantage have no gradient and are left out, unless the KL term wants them.
    """
    num_steps = max(1, round(config.timestep_fraction * len(steps)))
    order = torch.rand(len(advantages), len(steps), generator=generator).argsort(dim=1)[:, :num_steps]
    wanted = torch.nonzero((advantages != 0).cpu() | (config.kl_weight > 0)).flatten()
    return torch.stack([wanted.repeat_interleave(num_steps), steps.cpu()[order[wanted]].flatten()], dim=1)


def accumulate_gradients(
    policy: Policy, denoiser: sampler.Denoiser, batch: Batch, pairs: Tensor, config: TrainConfig, learner: Learner
) -> UpdateStatistics:
    """Add the gradient of the PPO loss, averaged over (image, step) pairs (M, 2), to LoRA's parameters.

    The text encoder runs once, over the distinct prompts and the null prompt. The gradient of every micro-batch is
    gathered on its embeddings, and one backward pass takes it through the text encoder. So the U-Net's activations
    grow with the micro-batch alone, and neither with the images nor with the steps; the text encoder's grow with the
    distinct prompts. Of several processes each adds the part of its own images.

    Raises:
        DivergedError: the loss is not finite.
    """
    statistics, mine = UpdateStatistics(), batch.local_pairs(pairs)
    if len(mine) == 0:
        return statistics
    prompt_ids = batch.trajectory.prompt_ids[mine[:, 0]]
    embeds, rows = policy.encode_distinct(prompt_ids)
    leaf = embeds.detach().requires_grad_(embeds.requires_grad)
    base_embeds = None
    if config.kl_weight > 0 or config.max_kl is not None:
        with policy.base(), torch.no_grad():
            base_embeds, _ = policy.encode_distinct(prompt_ids)
    inputs = [tensor for tensor in (leaf, *policy.models.unet.parameters()) if tensor.requires_grad]
    while statistics.num_pairs < len(mine):
        interrupts.check()
        chunk = slice(statistics.num_pairs, statistics.num_pairs + learner.micro_batch_size)
        try:
            loss, measured = _pair_losses(policy, denoiser, batch, mine[chunk], rows[chunk], leaf, base_embeds, config)
            weighted = learner.scaler.scale(loss * (len(mine[chunk]) / len(pairs)))
            gradients = torch.autograd.grad(weighted, inputs)  # all of them or, when memory runs out, none
        except (RuntimeError, MemoryError) as error:
            if config.micro_batch != "auto" or len(mine[chunk]) == 1 or not is_out_of_memory(error):
                raise
            learner.micro_batch_size = len(mine[chunk]) // 2
            continue
        for tensor, gradient in zip(inputs, gradients, strict=True):
            tensor.grad = gradient if tensor.grad is None else tensor.grad.add_(gradient)
        statistics.add(measured)
    if leaf.grad is not None:
        embeds.backward(leaf.grad)
    return statistics


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on the CPU torch has no class for that."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _pair_losses(
    policy: Policy,
    denoiser: sampler.Denoiser,
    batch: Batch,
    pairs: Tensor,
    rows: Tensor,
    embeds: Tensor,
    base_embeds: Tensor | None,
    config: TrainConfig,
) -> tuple[Tensor, UpdateStatistics]:
    """The mean loss of one micro-batch of local pairs (M, 2), whose prompts are the rows (M,) of embeds (1+U, L, D)."""
    trajectory, (samples, steps) = batch.trajectory, pairs.unbind(1)
    latents, next_latents = trajectory.latents[samples, steps], trajectory.latents[samples, steps + 1]
    null_outputs = None if trajectory.null_outputs is None else trajectory.null_outputs[samples, steps]
    old_log_probs = trajectory.log_probs[samples, steps]
    std = denoiser.std(steps)
    mean, _ = denoiser.mean(latents, steps, pipelines.Conditioning(embeds[rows], embeds[:1]), null_outputs)
    log_probs = sampler.gaussian_log_prob(next_latents, mean, std)
    loss = ppo_loss(log_probs, old_log_probs, batch.local_advantages[samples], config.clip_range)
    calls = len(pairs) * (2 if denoiser.guided and null_outputs is None else 1)
    measured = UpdateStatistics(len(pairs), calls if base_embeds is None else 2 * calls)
    if base_embeds is not None:
        with policy.base(), torch.no_grad():
            base = pipelines.Conditioning(base_embeds[rows], base_embeds[:1])
            base_mean, _ = denoiser.mean(latents, steps, base, null_outputs)
        # KL of two Gaussians of equal deviation, averaged over the latents like the log-probability.
        kl = (0.5 * ((mean - base_mean) / std).square()).flatten(1).mean(dim=1)
        loss = loss + config.kl_weight * kl.mean()
        measured.kl = kl.sum().item()
    if not loss.isfinite():
        raise DivergedError("the loss is not finite; lower --learning-rate, or look at the rewards in metrics.jsonl")
    deviation = ((log_probs.detach() - old_log_probs).exp() - 1).abs()
    measured.ratio_deviation = deviation.max().item()
    measured.num_clipped = int((deviation > config.clip_range).sum())
    return loss, measured


def update(
    policy: Policy,
    denoiser: sampler.Denoiser,
    batch: Batch,
    learner: Learner,
    config: TrainConfig,
    generator: torch.Generator,
) -> UpdateStatistics:
    """num_updates_per_epoch optimizer steps, each on its share of the images.

    Raises:
        DivergedError: loss or gradient is not finite, or the ratio is not 1 before the first step.
    """
    total = UpdateStatistics()
    pairs = draw_pairs(batch.advantages, window(denoiser.schedule, config), config, generator)
    shares = torch.randperm(len(batch.advantages), generator=generator).tensor_split(config.num_updates_per_epoch)
    exact = config.mixed_precision == "no"
    tolerance = max(FLOAT32_TOLERANCE, config.clip_range / 1000) if exact else config.clip_range / 10
    for share in shares:
        wanted = pairs[torch.isin(pairs[:, 0], share)]
        if len(wanted) == 0:
            continue
        first = total.num_pairs == 0
        statistics = UpdateStatistics()
        for part in processes.gather(accumulate_gradients(policy, denoiser, batch, wanted, config, learner)):
            statistics.add(part)
        processes.sum_gradients(policy.parameters)
        if first and statistics.ratio_deviation > tolerance:
            raise DivergedError(
                f"the ratio deviates from 1 by {statistics.ratio_deviation:.2e} before the first update, which is more than "
                f"{tolerance:.0e}: sampling and training do not compute the same; try --no-compile or --mixed-precision no"
            )
        total.add(statistics, first)
        total.grad_norm = learner.step(policy.parameters, config.max_grad_norm)
    return total


# --- the run ---


class PromptOrder:
    """The prompts over and over, shuffled anew each time."""

    def __init__(self, prompts: list[str], generator: torch.Generator) -> None:
        self.prompts, self.generator = prompts, generator
        self.waiting: list[int] = []  # indices of the prompts that are still to come before the next shuffle

    def take(self, number: int) -> list[str]:
        """The next prompts."""
        taken = []
        for _ in range(number):
            if not self.waiting:
                self.waiting = torch.randperm(len(self.prompts), generator=self.generator).tolist()
            taken.append(self.prompts[self.waiting.pop(0)])
        return taken


Report = Callable[[dict[str, Any]], None]


def train(
    config: TrainConfig,
    report: Report = lambda measures: None,
    warn: Callable[[str], None] = lambda message: None,
    go_on: bool = False,
    changed: bool = False,
) -> dict[str, Any]:
    """Train LoRA by PPO; writes the adapter, metrics, figures and result.json, and returns the result.

    `report` gets one record an epoch, the same that metrics.jsonl holds; the first is epoch 0, before training. With `go_on`
    a run that lies in the output folder is continued from its newest checkpoint, exactly as if it had never stopped, and
    a finished one gives its result; with `changed` though options or prompts differ from it.

    Raises:
        ValueError, FileNotFoundError: bad input. OSError: storage. ArtifactError: a refused checkpoint.
        RewardError: the scorer failed. DivergedError: training went wrong; the adapter of the last measurement is kept.
        Anything else that comes in the middle of the training is passed on after the last epoch's end was saved.
    """
    config = resolve(config)
    train_prompts, heldout_prompts = split_prompts(config)
    prompts, output_dir = [*train_prompts, *heldout_prompts], Path(config.output_dir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.joined())
        check_shares(config)
        finished, kept = processes.from_first(lambda: _open(stack, config, prompts, warn, go_on, changed))
        if finished:
            return finished
        if not processes.is_first():
            report, warn = (lambda measures: None), (lambda message: None)
        setup = prepare(config)
        check_prompts(setup.policy, config, prompts)
        run = _begin(setup, config, train_prompts)
        if kept:
            run.restore(kept)
        if processes.is_first():
            record.write_json(output_dir / "config.json", asdict(config))
            for name in (record.RESULT, "README.md", "curve.png"):  # of an end that is not this run's any more
                (output_dir / name).unlink(missing_ok=True)
        start = time.perf_counter()
        measured = heldout.Heldout(setup, heldout_prompts, config, output_dir)
        if not run.epochs:
            spent = {"num_images": 0, "num_unet_calls": 0, "seconds": time.perf_counter() - start}
            run.epochs.append({"epoch": 0, "heldout": measured.base} | spent)
        if changed:  # perhaps of other held-out prompts than those that it began with
            run.epochs[0] = run.epochs[0] | {"heldout": measured.base}
        log = stack.enter_context(record.metrics(config, output_dir, run.epochs)) if processes.is_first() else report
        _train_epochs(run, setup, config, prompts, measured, log, report, warn)
        return _finish(run, setup, config, output_dir)


def check_shares(config: TrainConfig) -> None:
    """See that every process has a batch of an epoch's images to sample.

    Raises:
        ValueError: there are fewer batches than processes.
    """
    num_images = config.num_prompts_per_epoch * config.num_samples_per_prompt
    num_batches = math.ceil(num_images / config.sample_batch_size)
    if num_batches < processes.count():
        raise ValueError(
            f"sample_batch_size: {num_images} images an epoch in batches of {config.sample_batch_size} are too few batches "
            f"({num_batches}) for {processes.count()} processes; lower it"
        )


def _open(
    stack: contextlib.ExitStack,
    config: TrainConfig,
    prompts: Sequence[str],
    warn: Callable[[str], None],
    go_on: bool,
    changed: bool,
) -> tuple[dict[str, Any] | None, resume.Snapshot | None]:
    """Hold the output folder for as long as a stack is open; the result of a finished run, or where to go on from."""
    output_dir = Path(config.output_dir)
    stack.enter_context(record.held(output_dir, lambda: record.check_folder(config.output_dir, go_on)))
    kept = None
    if go_on and (output_dir / "config.json").is_file():
        saved = read_json(output_dir / "config.json")
        kept = _newest(output_dir, warn)
        resume.check_same(saved, config, kept, prompts, changed)
        if (output_dir / record.RESULT).is_file() and not resume.differences(saved, asdict(config)):
            warn(f"the run in {config.output_dir} is finished; nothing is left to do")
            return read_json(output_dir / record.RESULT), None
    record.check_room(output_dir, config)
    return None, kept


def _newest(output_dir: Path, warn: Callable[[str], None]) -> resume.Snapshot | None:
    """The newest valid checkpoint of a run; each that is broken is told, and if there is none."""
    resume.remove_orphans(output_dir)
    checkpoint = resume.newest(
        output_dir / CHECKPOINTS, lambda path: warn(f"{path} is damaged or incomplete, and is passed over")
    )
    if checkpoint is None and not (output_dir / record.RESULT).is_file():
        warn(f"the run in {output_dir} has no checkpoint to go on from, and starts over")
    return resume.read(checkpoint) if checkpoint else None


def _begin(setup: Setup, config: TrainConfig, prompts: list[str]) -> resume.Run:
    """A run before its first epoch."""
    noise = torch.Generator(setup.policy.models.device).manual_seed(config.seed)
    choice = torch.Generator().manual_seed(config.seed)
    return resume.Run(
        policy=setup.policy,
        learner=Learner(setup.policy.parameters, config),
        reward=setup.reward,
        statistics=PromptStatistics(),
        order=PromptOrder(prompts, choice),
        generators={"noise": noise, "choice": choice},
        epochs=[],
    )


def _train_epochs(
    run: resume.Run,
    setup: Setup,
    config: TrainConfig,
    prompts: Sequence[str],
    measured: heldout.Heldout,
    log: Report,
    report: Report,
    warn: Callable[[str], None],
) -> None:
    """Train the epochs that are left; writes checkpoints, and the adapter whenever it is measured."""
    output_dir = Path(config.output_dir)
    start = time.perf_counter() - run.epochs[-1]["seconds"]
    report(run.epochs[-1])
    snapshot = run.snapshot()

    def save() -> None:
        if not processes.is_first():
            return
        with interrupts.deferred():
            resume.write(output_dir / CHECKPOINTS, snapshot, config, prompts, config.checkpoints_to_keep)

    def save_adapter() -> None:
        if not processes.is_first():
            return
        with interrupts.deferred(), run.learner.averaged(run.policy.parameters):
            run.policy.save(output_dir)

    try:
        for epoch in range(run.epochs[-1]["epoch"] + 1, config.num_epochs + 1):
            measures = {"epoch": epoch} | _train_epoch(run, setup, config)
            if epoch % config.eval_every == 0 or epoch == config.num_epochs:
                with run.learner.averaged(run.policy.parameters):
                    measures["heldout"] = measured.measure(epoch)
            measures = _totals(run.epochs[-1], measures, time.perf_counter() - start)
            check_guards([*run.epochs, measures], config, setup.reward)
            with interrupts.deferred():  # an epoch is over when all of this is done
                if "heldout" in measures:
                    save_adapter()
                run.epochs.append(measures)
                log(measures)
                snapshot = run.snapshot()
                if epoch % config.checkpoint_every == 0 or epoch == config.num_epochs:
                    save()
            report(measures)
        interrupts.check()
    except DivergedError as error:
        raise DivergedError(f"{error}; {_last_good(run.epochs, config)}") from error
    except BaseException:
        save()  # first, as it needs nothing of the device: what stopped in the middle of an epoch begins it anew
        warn(f"saved as it was after epoch {snapshot.epoch}")
        if not _measured_epochs(run.epochs):  # else the adapter that was last measured stays
            run.restore(snapshot)
            save_adapter()
        raise


def check_guards(epochs: Sequence[dict[str, Any]], config: TrainConfig, reward: rewards.Mixture) -> None:
    """See that the last epoch is one to go on from.

    Raises:
        DivergedError: the policy is too far from the base one, or the held-out reward has collapsed.
    """
    last = epochs[-1]
    if broken := [name for name, value in last.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise DivergedError(f"{', '.join(broken)} of epoch {last['epoch']} is not finite; lower --learning-rate")
    if config.max_kl is not None and last["kl"] > config.max_kl:
        raise DivergedError(
            f"the KL divergence from the base policy is {last['kl']:.2e}, above --max-kl {config.max_kl:g}; lower "
            "--learning-rate or raise --kl-weight"
        )
    if config.max_reward_drop and "heldout" in last:
        measured = (_in_final_units(record, config.reward, reward) for record in (epochs[0], last))
        base, tuned = (record["heldout"][config.reward] for record in measured)
        spread = epochs[1]["reward_std"]  # of images of the base model, but for the epoch's own updates
        if spread > 0 and base - tuned > config.max_reward_drop * spread:
            raise DivergedError(
                f"the held-out {config.reward} has collapsed from {base:.4f} to {tuned:.4f} (--max-reward-drop); lower "
                "--learning-rate"
            )


def _last_good(epochs: Sequence[dict[str, Any]], config: TrainConfig) -> str:
    """Which adapter lies in the output folder."""
    measured = _measured_epochs(epochs)
    return (
        f"the adapter of epoch {measured[-1]} is kept in {config.output_dir}" if measured else "no adapter was measured yet"
    )


def _measured_epochs(epochs: Sequence[dict[str, Any]]) -> list[int]:
    """Those after which the adapter was measured, and saved."""
    return [record["epoch"] for record in epochs[1:] if "heldout" in record]


def _finish(run: resume.Run, setup: Setup, config: TrainConfig, output_dir: Path) -> dict[str, Any]:
    """Write the figures and the result of a run that is over."""
    models, num_parameters = setup.policy.models, sum(parameter.numel() for parameter in setup.policy.parameters)
    epochs = [_in_final_units(measures, config.reward, setup.reward) for measures in run.epochs]
    provenance = record.describe_run(config, str(models.device), num_parameters)
    result = provenance | _summary(epochs) | {"seconds": run.epochs[-1]["seconds"]}
    if processes.is_first():
        record.write_result(output_dir, config, epochs, result)
    return result


@dataclass(frozen=True)
class Setup:
    """What a training works with."""

    policy: Policy
    denoiser: sampler.Denoiser
    reward: rewards.Mixture
    eval_rewards: dict[str, rewards.Mixture]  # only measured


def prepare(config: TrainConfig) -> Setup:
    """Load the models and the rewards of a resolved configuration, and put LoRA on the models."""
    device, names = default_device(), [config.reward, *(config.eval_reward or ())]
    for name in names:
        rewards.check_reward(name)  # a typing error must not wait for a model
    checkpoints = rewards.parse_checkpoints(config.reward_checkpoint or (), names)
    # The model first: a mistyped folder must not wait for the download of a scorer.
    models = pipelines.load_models(config.model, device, getattr(torch, DTYPES[config.mixed_precision]))

    def load(name: str, normalise: bool = False) -> rewards.Mixture:
        embedded = config.model == "tiny"
        return rewards.load_reward(name, device, checkpoints, embedded, normalise, config.reward_timeout)

    reward = load(config.reward, config.normalise_rewards)
    eval_rewards = {name: load(name) for name in names[1:] if name != config.reward and name not in reward.parts}
    return Setup(*make_policy(models, config), reward, eval_rewards)


def check_prompts(policy: Policy, config: TrainConfig, prompts: Sequence[str]) -> None:
    """Find a prompt that cannot be used before the training, and not in its fortieth epoch.

    Raises:
        ValueError: a prompt is too long, or a scorer cannot judge it.
    """
    pipelines.tokenize_for(policy.models, prompts)
    rewards.check_prompts([config.reward, *(config.eval_reward or ())], prompts)


def make_policy(models: pipelines.Models, config: TrainConfig) -> tuple[Policy, sampler.Denoiser]:
    """Put LoRA on models, and set up the denoiser that samples and trains with them."""
    schedule = sampler.ddim_schedule(
        models.scheduler,
        config.num_inference_steps,
        config.eta,
        window_end(config) if config.deterministic_elsewhere else None,
    ).to(models.device)
    if len(window(schedule, config)) == 0:
        raise ValueError(
            f"eta, timestep_window: at eta {config.eta} none of the first {config.timestep_window:.0%} of the steps, but "
            f"for {config.num_shared_steps} shared ones, is random enough to have a density to train on; raise one of them"
        )
    models = add_lora(models, config)
    if config.gradient_checkpointing:
        models.unet.enable_gradient_checkpointing()
        models.unet.train()  # diffusers recomputes in training mode only; these U-Nets have neither dropout nor batch norm
    pooled = pipelines.pooled_text(models)
    denoiser = sampler.Denoiser(models.unet, schedule, config.guidance_scale, config.compile, pooled)
    return Policy(models, config.null_prompt), denoiser


def _train_epoch(run: resume.Run, setup: Setup, config: TrainConfig) -> dict[str, Any]:
    """Sample, score and update once; the measures of the epoch."""
    begin, denoiser = time.perf_counter(), setup.denoiser
    prompts = run.order.take(config.num_prompts_per_epoch)
    batch = collect(setup.policy, denoiser, setup.reward, prompts, config, run.generators["noise"], run.statistics)
    sampled = time.perf_counter()
    update_statistics = update(setup.policy, denoiser, batch, run.learner, config, run.generators["choice"])
    dropped = torch.nonzero(batch.rewards.isnan()).flatten().tolist()
    num_images = len(batch.rewards)
    num_pairs = max(1, update_statistics.num_pairs)
    steps, shared = len(denoiser.schedule.timesteps), config.num_shared_steps
    num_drawn = num_images * (steps - shared) + num_images // config.num_samples_per_prompt * shared
    measures: dict[str, Any] = {
        "reward_mean": finite_mean(batch.rewards),
        "reward_std": batch.rewards[batch.rewards.isfinite()].std(correction=0).item(),
        "num_images": num_images,
        "num_unet_calls": num_drawn * (2 if denoiser.guided else 1) + update_statistics.num_unet_calls,
        "max_ratio_deviation": update_statistics.first_ratio_deviation,
        "ratio_deviation": update_statistics.ratio_deviation,
        "clip_fraction": update_statistics.num_clipped / num_pairs,
        "images_per_s": num_images / (time.perf_counter() - begin),
        "sampling_share": (sampled - begin) / (time.perf_counter() - begin),
    }
    if math.isfinite(update_statistics.grad_norm):  # else fp16 skipped the step
        measures["grad_norm"] = update_statistics.grad_norm
    if config.kl_weight > 0 or config.max_kl is not None:
        measures["kl"] = update_statistics.kl / num_pairs
    if len(batch.parts) > 1:
        measures["parts"] = {name: finite_mean(scores) for name, scores in batch.parts.items()}
    if dropped:
        measures["dropped"] = [
            {"prompt": prompts[i // config.num_samples_per_prompt], "seed": config.seed, "image": i} for i in dropped
        ]
    return measures


def finite_mean(scores: Tensor) -> float:
    """Mean of those of scores (N,) that are finite."""
    return scores[scores.isfinite()].mean().item()


def _totals(last: dict[str, Any], measures: dict[str, Any], seconds: float) -> dict[str, Any]:
    """An epoch's measures with its counts running on from the last one's."""
    counts = {name: last[name] + measures[name] for name in ("num_images", "num_unet_calls")}
    return measures | counts | {"seconds": seconds}


def _chunks(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))


def _in_final_units(measures: dict[str, Any], name: str, reward: rewards.Mixture) -> dict[str, Any]:
    """An epoch's measures with a normalised reward in the units of the end, so that epochs compare."""
    if not reward.normalise:
        return measures
    measures = dict(measures)
    if "parts" in measures:
        measures["reward_mean"] = reward.combine_means(measures["parts"])
    if "heldout" in measures:
        measures["heldout"] = measures["heldout"] | {name: reward.combine_means(measures["heldout"])}
    return measures


def _summary(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    measured = [record["heldout"] for record in epochs if "heldout" in record]
    base, tuned = measured[0], measured[-1]
    return {
        "num_images": epochs[-1]["num_images"],
        "num_unet_calls": epochs[-1]["num_unet_calls"],
        "max_ratio_deviation": max(record["max_ratio_deviation"] for record in epochs[1:]),
        "num_dropped": sum(len(record.get("dropped", ())) for record in epochs),
        "heldout": {name: {"base": base[name], "tuned": tuned[name]} for name in base},
    }
