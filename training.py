"""The run: what it works with, its epochs, the checkpoints and the adapter that it writes, and when it is stopped.

What an epoch does is elsewhere: it collects (experience.py) and updates (texforce.py).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import texforce
from texforce import experience, heldout, interrupts, pipelines, processes, record, resume, rewards, sampler
from texforce.advantages import PromptStatistics
from texforce.config import TrainConfig, default_device, read_json, resolve
from texforce.learner import Learner
from texforce.prompt_sets import split_prompts

Report = Callable[[dict[str, Any]], None]


# --- what a run works with ---


@dataclass(frozen=True)
class Setup:
    """What a training works with."""

    policy: texforce.Policy
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
    models = pipelines.load_models(config.model, device, getattr(torch, pipelines.DTYPES[config.mixed_precision]))

    def load(name: str, normalise: bool = False) -> rewards.Mixture:
        embedded = config.model == "tiny"
        return rewards.load_reward(name, device, checkpoints, embedded, normalise, config.reward_timeout)

    reward = load(config.reward, config.normalise_rewards)
    eval_rewards = {name: load(name) for name in names[1:] if name != config.reward and name not in reward.parts}
    return Setup(*texforce.make_policy(models, config), reward, eval_rewards)


def check_prompts(policy: texforce.Policy, config: TrainConfig, prompts: Sequence[str]) -> None:
    """Find a prompt that cannot be used before the training, and not in its fortieth epoch.

    Raises:
        ValueError: a prompt is too long, or a scorer cannot judge it.
    """
    pipelines.tokenize_for(policy.models, prompts)
    rewards.check_prompts([config.reward, *(config.eval_reward or ())], prompts)


# --- the run ---


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
        setup = processes.agreed(prepare, config)
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
        output_dir / resume.CHECKPOINTS, lambda path: warn(f"{path} is damaged or incomplete, and is passed over")
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
        order=experience.PromptOrder(prompts, choice),
        generators={"noise": noise, "choice": choice},
        epochs=[],
    )


def _finish(run: resume.Run, setup: Setup, config: TrainConfig, output_dir: Path) -> dict[str, Any]:
    """Write the figures and the result of a run that is over."""
    models, num_parameters = setup.policy.models, sum(parameter.numel() for parameter in setup.policy.parameters)
    epochs = [_in_final_units(measures, config.reward, setup.reward) for measures in run.epochs]
    provenance = record.describe_run(config, str(models.device), num_parameters)
    result = provenance | _summary(epochs) | {"seconds": run.epochs[-1]["seconds"]}
    if processes.is_first():
        record.write_result(output_dir, config, epochs, result)
    return result


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


# --- epochs ---


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
    start = time.perf_counter() - run.epochs[-1]["seconds"]
    report(run.epochs[-1])
    snapshot = run.snapshot()
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
                    _save_adapter(run, config)
                run.epochs.append(measures)
                log(measures)
                snapshot = run.snapshot()
                if epoch % config.checkpoint_every == 0 or epoch == config.num_epochs:
                    _save_checkpoint(snapshot, config, prompts)
            report(measures)
        interrupts.check()
    except texforce.DivergedError as error:
        raise texforce.DivergedError(f"{error}; {_last_good(run.epochs, config)}") from error
    except BaseException:
        # A launcher that has lost a process terminates the others: that must not take the place of what is told of it.
        with interrupts.deferred():
            try:
                # First, as it needs nothing of the device: what stopped in the middle of an epoch begins it anew.
                _save_checkpoint(snapshot, config, prompts)
                warn(f"saved as it was after epoch {snapshot.epoch}")
                if not _measured_epochs(run.epochs):  # else the adapter that was last measured stays
                    run.restore(snapshot)
                    _save_adapter(run, config)
            except OSError as failure:  # what stopped the run is still what is told of it
                warn(f"what was reached after epoch {snapshot.epoch} could not be saved: {failure}")
            raise


def _save_checkpoint(snapshot: resume.Snapshot, config: TrainConfig, prompts: Sequence[str]) -> None:
    if processes.is_first():
        folder = Path(config.output_dir, resume.CHECKPOINTS)
        resume.write(folder, snapshot, config, prompts, config.checkpoints_to_keep)


def _save_adapter(run: resume.Run, config: TrainConfig) -> None:
    if processes.is_first():
        with run.learner.averaged(run.policy.parameters):
            run.policy.save(Path(config.output_dir))


def _train_epoch(run: resume.Run, setup: Setup, config: TrainConfig) -> dict[str, Any]:
    """Sample, score and update once; the measures of the epoch."""
    begin, denoiser = time.perf_counter(), setup.denoiser
    prompts = run.order.take(config.num_prompts_per_epoch)
    batch = experience.collect(
        setup.policy, denoiser, setup.reward, prompts, config, run.generators["noise"], run.statistics
    )
    sampled = time.perf_counter()
    update_statistics = texforce.update(setup.policy, denoiser, batch, run.learner, config, run.generators["choice"])
    dropped = torch.nonzero(batch.rewards.isnan()).flatten().tolist()
    num_images = len(batch.rewards)
    num_pairs = max(1, update_statistics.num_pairs)
    measures: dict[str, Any] = {
        "reward_mean": experience.finite_mean(batch.rewards),
        "reward_std": batch.rewards[batch.rewards.isfinite()].std(correction=0).item(),
        "num_images": num_images,
        "num_unet_calls": experience.num_unet_calls(denoiser, config) + update_statistics.num_unet_calls,
        "max_ratio_deviation": update_statistics.first_ratio_deviation,
        "ratio_deviation": update_statistics.ratio_deviation,
        "clip_fraction": update_statistics.num_clipped / num_pairs,
        "images_per_s": num_images / (time.perf_counter() - begin),
        "sampling_share": (sampled - begin) / (time.perf_counter() - begin),
    }
    if math.isfinite(update_statistics.grad_norm):  # else fp16 skipped the step
        measures["grad_norm"] = update_statistics.grad_norm
    if texforce.wants_kl(config):
        measures["kl"] = update_statistics.last_kl
    if len(batch.parts) > 1:
        measures["parts"] = {name: experience.finite_mean(scores) for name, scores in batch.parts.items()}
    if dropped:
        measures["dropped"] = [
            {"prompt": prompts[i // config.num_samples_per_prompt], "seed": config.seed, "image": i} for i in dropped
        ]
    return measures


def _totals(last: dict[str, Any], measures: dict[str, Any], seconds: float) -> dict[str, Any]:
    """An epoch's measures with its counts running on from the last one's."""
    counts = {name: last[name] + measures[name] for name in ("num_images", "num_unet_calls")}
    return measures | counts | {"seconds": seconds}


def check_guards(epochs: Sequence[dict[str, Any]], config: TrainConfig, reward: rewards.Mixture) -> None:
    """See that the last epoch is one to go on from.

    Raises:
        DivergedError: the policy is too far from the base one, or the held-out reward has collapsed.
    """
    last = epochs[-1]
    if broken := [name for name, value in last.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise texforce.DivergedError(f"{', '.join(broken)} of epoch {last['epoch']} is not finite; lower --learning-rate")
    if config.max_kl is not None and last["kl"] > config.max_kl:
        raise texforce.DivergedError(
            f"the KL divergence from the base policy is {last['kl']:.2e}, above --max-kl {config.max_kl:g}; lower "
            "--learning-rate or raise --kl-weight"
        )
    if config.max_reward_drop and "heldout" in last:
        measured = (_in_final_units(record, config.reward, reward) for record in (epochs[0], last))
        base, tuned = (record["heldout"][config.reward] for record in measured)
        spread = epochs[1]["reward_std"]  # of images of the base model, but for the epoch's own updates
        if spread > 0 and base - tuned > config.max_reward_drop * spread:
            raise texforce.DivergedError(
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
