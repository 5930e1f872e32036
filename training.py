"""A training, top to bottom: prepare, the run, its epochs and guards.

One epoch collects, computes advantages and updates (texforce.py); heldout.py measures the held-out prompts, run.py holds
what the run leaves in its folder.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from texforce import (
    Policy,
    UpdateStatistics,
    draw_noise_batch,
    gradient_update,
    make_batch,
    make_policy,
    matching_update,
    ppo_update,
    wants_kl,
)

from . import files, interrupts, models, processes, report, rewards, run, single_file, stages, tokenization, world
from .config import TrainConfig, default_device, specs_of
from .errors import DivergedError, InputError, reading
from .experience import (
    PromptOrder,
    PromptStatistics,
    Samples,
    collect,
    compute_advantages,
    finite_mean,
    num_rollout_calls,
    scored_by_update,
)
from .files import describe_files, read_json
from .heldout import Heldout
from .learner import Learner
from .prompt_sets import MEASURED_ON, Prompts, check_judged, find_measured, read_run_prompts
from .reward_specs import NO_REWARD, caption_files, checkpoints_for, without_passwords
from .run import Run, Snapshot

Report = Callable[[dict[str, Any]], None]  # of an epoch's measures


# --- prepare ---


@dataclass(frozen=True)
class Setup:
    """The policy and the rewards of a training."""

    policy: Policy
    reward: rewards.Mixture
    eval_rewards: dict[str, rewards.Mixture]  # only measured


def prepare(config: TrainConfig) -> Setup:
    """Load the model and the rewards of a resolved configuration, and put LoRA on the model."""
    for spec in specs_of(config):
        rewards.check_servers(spec)
    stages.report("loading the model")
    policy = load_policy(config)  # first: a mistyped folder must not wait for the download of a scorer
    device, specs = default_device(), specs_of(config)
    checkpoints = checkpoints_for(config.model, config.reward_checkpoint, specs)

    def load(spec: str, normalise: bool = False) -> rewards.Mixture:
        stages.report(f"loading {without_passwords(spec)}")
        return rewards.load_reward(spec, device, checkpoints, normalise, config.reward_timeout)

    reward = load(config.reward, config.normalise_rewards) if config.reward != NO_REWARD else rewards.Mixture({}, {})
    if config.relabel:
        reward.captioner = rewards.load_captioner(config.relabel, config.reward_timeout)
    if config.algorithm == "gradient":
        for name, part in reward.parts.items():
            rewards.gradient_function(part, name)
    measured = config.eval_reward or ()
    eval_rewards = {spec: load(spec) for spec in measured if spec != config.reward and spec not in reward.parts}
    return Setup(policy, reward, eval_rewards)


def load_policy(config: TrainConfig, may_outline: bool = False) -> Policy:
    """Load the model of a resolved configuration, and put LoRA on it.

    With `may_outline` the weights of a Stable Diffusion that would have to be fetched are left out.
    """
    dtype, device, num_chunks = models.DTYPES[config.mixed_precision], default_device(), 1
    outline = models.outline_model(config.model, dtype) if may_outline else None
    if config.long_prompt != "cut":
        source = single_file.published(config.model) if outline else config.model
        num_chunks = models.find_chunks(source or config.model, config.long_prompt, read_run_prompts(config).all)
    if outline:
        config = replace(config, null_anchor=0.0, offload_text_encoders=False)  # both need weights
        return make_policy(replace(outline, num_chunks=num_chunks), config)
    model = models.load_model(config.model, device, dtype, text_on_cpu=config.offload_text_encoders)
    return make_policy(replace(model, num_chunks=num_chunks), config)


def check_prompts(policy: Policy, prompts: Prompts) -> tokenization.Cut:
    """Find a prompt that cannot be used before the training, and not in its fortieth epoch; returns those that are cut.

    Raises:
        InputError: a prompt is not text.
    """
    models.tokenize_for(policy.model, prompts.all)
    return tokenization.find_cut(list(policy.model.readers.values()), prompts.all)


def find_sources(config: TrainConfig, prompts: Prompts) -> dict[str, Any]:
    """What decides a run beside its options, by a description: SHA-256 of files, and revisions on the hub.

    Raises:
        NotFoundError, InputError: a model or a file is not there.
    """
    models.find_model(config.model)  # a name on the hub may have another revision now
    specs = specs_of(config)
    checkpoints = checkpoints_for(config.model, config.reward_checkpoint, specs)
    found = {name: source for spec in specs for name, source in rewards.locate(spec, checkpoints).items()}
    return {
        "the training prompts": run.digest(prompts.train),
        "the held-out prompts": run.digest(prompts.heldout),
        "the anchor prompts": run.digest(prompts.anchors),
        "the files of the model": models.revision(config.model),
    } | {
        **{f"the content of the reward {name}": source for name, source in found.items()},
        **{f"the content of relabel's {path}": describe_files(path) for path in caption_files(config.relabel)},
    }


# --- the run ---


def train(
    config: TrainConfig,
    report: Report = lambda measures: None,
    warn: Callable[[str], None] = lambda message: None,
    resume: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Train LoRA; writes the adapter, metrics, figures and result.json, and returns the result.

    `report` gets one record an epoch, the same that metrics.jsonl holds; the first is epoch 0, before training. With
    `resume` a run in the output folder goes on from its newest checkpoint, exactly as if it had never stopped, and a
    finished one returns its result; the first record is then that of the checkpoint, with those before it as `earlier`.
    `force` resumes even if options or prompts have changed.

    Raises:
        InputError: bad input. OSError: storage. ArtifactError: a refused checkpoint. RewardError: the scorer failed.
        DivergedError: training went wrong; the adapter of the last measurement is kept.
        Anything else that comes in the middle of the training is passed on after the last epoch's end was saved.
    """
    prompts, output_dir = read_run_prompts(config), Path(config.output_dir)
    check_judged(config, prompts)
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.joined())
        check_shares(config)
        if not processes.is_first():
            report, warn = (lambda measures: None), (lambda message: None)
        opening = _Opening(config, prompts, warn, resume, force)
        opened = processes.from_first(lambda: opening.open(stack))
        if opened.result:
            return opened.result
        setup = processes.agreed(prepare, config)
        cut = check_prompts(setup.policy, prompts)
        for note in _notes(setup.policy.model, config, prompts, cut):
            warn(note)
        current = begin(setup, config, prompts.train)
        if opened.snapshot:
            _go_on(current, opened, output_dir)
        if processes.is_first():
            if config.overwrite and not resume:
                files.remove_written(output_dir, run.WRITTEN)
            files.write_json(output_dir / "config.json", asdict(config) | {"overwrite": False})  # for --config
            for name in (run.RESULT, "README.md", "curve.png"):  # of an end that is not this run's any more
                (output_dir / name).unlink(missing_ok=True)
        heldout = _measure_base(current, setup, prompts, config, force)
        if processes.is_first():
            heldout.take_up(opening.frames, current.epochs[-1]["epoch"])
        log = opening.metrics(stack, current.epochs) if processes.is_first() else report
        work = _Training(current, setup, config, heldout, opened.sources)
        work.train(log, report, warn)
        return _finish(current, config, {"num_prompts_cut": len(cut.prompts)} | work.verdict())


def _notes(model: models.Model, config: TrainConfig, prompts: Prompts, cut: tokenization.Cut) -> Iterator[str]:
    """What is to be said before a training begins: of prompts that the model reads or draws badly, and of the model."""
    if cut.prompts:
        yield f"prompts: {cut}"
    if model.num_chunks > 1:
        yield f"prompts: {tokenization.chunks_note(model.num_chunks)}"
    if note := world.foreign_note(config.model, prompts.all):
        yield f"prompts: {note}"
    if note := models.distillation_note(model, config.algorithm):
        yield f"model: {note}"
    if not prompts.heldout:
        yield "prompts: a single one cannot be held out, so base and tuned are measured on the training prompts"


def _measure_base(current: Run, setup: Setup, prompts: Prompts, config: TrainConfig, force: bool) -> Heldout:
    """Measure the base model, as epoch 0 of a run that begins, or that goes on by force."""
    start = time.perf_counter()
    heldout = Heldout(setup, prompts.measured, config, "heldout" if prompts.heldout else "training_prompts")
    if not current.epochs:
        spent = {"num_images": 0, "num_unet_calls": 0, "seconds": time.perf_counter() - start}
        current.epochs.append({"epoch": 0, heldout.name: heldout.base.means} | spent)
    if force:  # perhaps with other held-out prompts, or another reward, than those that it began with
        first = {name: value for name, value in current.epochs[0].items() if name not in MEASURED_ON}
        current.epochs[0] = first | {heldout.name: heldout.base.means}
    return heldout


def _go_on(current: Run, opened: _Opened, output_dir: Path) -> None:
    """Put a run as it was in a checkpoint.

    Raises:
        InputError: the checkpoint is of another device or other layers. ArtifactError: its content is none of a training's.
    """
    snapshot: Any = opened.snapshot
    if snapshot.state["sources"].get("the training prompts") != opened.sources["the training prompts"]:  # forced
        snapshot.state["order"] = current.order.state_dict()  # the old one's indices are of other prompts
    with reading(f"{run.checkpoint_place(output_dir / run.CHECKPOINTS, snapshot)}: {run.NO_STATE}"):
        current.restore(snapshot)


def check_shares(config: TrainConfig) -> None:
    """Check that every process has a batch of an epoch's images to sample.

    Raises:
        InputError: there are fewer batches than processes.
    """
    num_images = config.num_prompts_per_epoch * config.num_samples_per_prompt
    num_batches = math.ceil(num_images / config.sample_batch_size)
    if num_batches < processes.count():
        raise InputError(
            f"sample_batch_size: {num_images} images an epoch in batches of {config.sample_batch_size} are too few batches "
            f"({num_batches}) for {processes.count()} processes; lower it"
        )


@dataclass(frozen=True)
class _Opened:
    """What an output folder gives a run to begin with: the result of a finished run, or else where to go on from."""

    result: dict[str, Any] | None = None
    snapshot: Snapshot | None = None
    sources: dict[str, Any] = field(default_factory=dict)  # as of `find_sources`


@dataclass
class _Opening:
    """The opening of an output folder and of the tracker, for a run that begins or goes on."""

    config: TrainConfig
    prompts: Prompts
    warn: Callable[[str], None]
    resume: bool
    force: bool
    track: run.Track | None = None
    frames: list[dict[str, Any]] = field(default_factory=list)  # that the run has left

    def open(self, stack: contextlib.ExitStack) -> _Opened:
        """Lock the folder for as long as a stack is open, and look what is there."""
        config, output_dir = self.config, Path(self.config.output_dir)
        goes_on = self.resume or config.overwrite
        stack.enter_context(files.locked(output_dir, lambda: run.check_folder(config.output_dir, goes_on)))
        snapshot, saved = None, None
        if self.resume and run.is_run(output_dir):
            snapshot = self._newest(output_dir)
            # What is verified has precedence: config.json, which anybody may edit, gave the options of this call.
            saved = snapshot.state if snapshot else {"config": read_json(output_dir / "config.json")}
            if (output_dir / run.RESULT).is_file() and not run.differences(saved["config"], asdict(config)):
                self.warn(f"the run in {config.output_dir} is finished; nothing is left to do")
                return _Opened(run.read_result(output_dir))
        sources = find_sources(config, self.prompts)
        if snapshot:
            run.check_lasting(snapshot.state["config"], config)
        if saved and not self.force:
            run.check_same(saved, config, sources)
        self.frames = run.read_frames(output_dir) if snapshot else []
        if config.overwrite:
            run.check_overwritable(output_dir)
        run.check_room(output_dir, config)
        if run.needs_account(config):
            self.track = stack.enter_context(run.tracker(config, output_dir))
        return _Opened(snapshot=snapshot, sources=sources)

    def metrics(self, stack: contextlib.ExitStack, epochs: list[dict[str, Any]]) -> Report:
        """What takes the measures of each epoch: a file, and the tracker that --report-to names."""
        output_dir = Path(self.config.output_dir)
        track = self.track or stack.enter_context(run.tracker(self.config, output_dir))
        return run.metrics(output_dir, epochs, track)

    def _newest(self, output_dir: Path) -> Snapshot | None:
        """The newest valid checkpoint of a run; warns of each that is broken, and if there is none."""
        files.remove_temporaries(output_dir, "*/")  # adapters of other parts lie in folders of their own
        checkpoint = run.newest_checkpoint(
            output_dir / run.CHECKPOINTS, lambda path: self.warn(f"{path} is damaged or incomplete, and is passed over")
        )
        if checkpoint is None and not (output_dir / run.RESULT).is_file():
            self.warn(f"the run in {output_dir} has no checkpoint to go on from, and starts over")
        return run.read_checkpoint(checkpoint) if checkpoint else None


def begin(setup: Setup, config: TrainConfig, prompts: list[str]) -> Run:
    """A run before its first epoch."""
    noise = torch.Generator(setup.policy.model.device).manual_seed(config.seed)
    choice = torch.Generator().manual_seed(config.seed)
    return Run(
        policy=setup.policy,
        learner=Learner(setup.policy.parameters, config),
        reward=setup.reward,
        statistics=PromptStatistics(),
        order=PromptOrder(prompts, choice),
        generators={"noise": noise, "choice": choice},
        epochs=[],
    )


def _finish(current: Run, config: TrainConfig, about: dict[str, Any]) -> dict[str, Any]:
    """Write the figures and the result of a run that is over; the result holds `about` too."""
    num_parameters = sum(parameter.numel() for parameter in current.policy.parameters)
    epochs = [_in_final_units(measures, config.reward, current.reward) for measures in current.epochs]
    provenance = run.describe_run(config, str(current.policy.model.device), num_parameters)
    about = about | {"seconds": current.epochs[-1]["seconds"]}
    if config.long_prompt != "cut":
        about |= {"long_prompt": config.long_prompt, "num_chunks": current.policy.model.num_chunks}
    result = provenance | _summary(epochs) | about
    if processes.is_first():
        run.write_result(Path(config.output_dir), config, epochs, result)
    return result


def _summary(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    measured = [(name, measures[name]) for measures in epochs if (name := find_measured(measures))]
    (_, base), (measured_on, tuned) = measured[0], measured[-1]
    return {
        "num_images": epochs[-1]["num_images"],
        "num_unet_calls": epochs[-1]["num_unet_calls"],
        "max_ratio_deviation": max((measures.get("max_ratio_deviation", 0.0) for measures in epochs[1:]), default=0.0),
        "num_dropped": sum(len(measures.get("dropped", ())) for measures in epochs),
        measured_on: {name: {"base": base[name], "tuned": tuned[name]} for name in base},
    }


def _in_final_units(measures: dict[str, Any], name: str, reward: rewards.Mixture) -> dict[str, Any]:
    """An epoch's measures with a normalised reward in the units of the end, so that epochs compare."""
    if not reward.normalise:
        return measures
    measures = dict(measures)
    if "parts" in measures:
        measures["reward_mean"] = reward.combine_means(measures["parts"])
    if measured_on := find_measured(measures):
        measures[measured_on] = measures[measured_on] | {name: reward.combine_means(measures[measured_on])}
    return measures


# --- epochs ---


@dataclass(frozen=True)
class _Training:
    """The epochs of a run, and how it ends."""

    run: Run
    setup: Setup
    config: TrainConfig
    heldout: Heldout
    sources: Mapping[str, Any]  # as of `find_sources`

    def train(self, log: Report, tell: Report, warn: Callable[[str], None]) -> None:
        """Train the epochs that are left; writes checkpoints, and the adapter whenever it is measured."""
        epochs, config = self.run.epochs, self.config
        start = time.perf_counter() - epochs[-1]["seconds"]
        tell(epochs[-1] | ({"earlier": epochs[:-1]} if len(epochs) > 1 else {}))
        snapshot = self.run.snapshot()
        try:
            self._write_page(report.RUNNING)
            for epoch in range(epochs[-1]["epoch"] + 1, config.num_epochs + 1):
                measures = _totals(epochs[-1], self._train_and_measure(epoch), time.perf_counter() - start)
                check_guards([*epochs, measures], config, self.setup.reward)
                with interrupts.deferred():  # an epoch is over when all of this is done
                    if find_measured(measures):
                        self._save_adapter()
                    epochs.append(measures)
                    log(measures)
                    snapshot = self.run.snapshot()
                    if epoch % config.checkpoint_every == 0 or epoch == config.num_epochs:
                        self._save_checkpoint(snapshot)
                    if find_measured(measures):
                        self._write_page(report.RUNNING)
                tell(measures)
            interrupts.check()
            self._write_page(report.FINISHED)
        except DivergedError as error:
            with contextlib.suppress(OSError):  # it must not hide the divergence
                self._write_page(f"diverged: {error}")
            raise DivergedError(f"{error}; {_last_good(epochs, config)}") from error
        except BaseException:
            # A launcher that has lost a process terminates the others: that must not hide the error that stopped this one,
            # which is raised before the signal is.
            with interrupts.deferred():
                self._save_before_the_end(snapshot, warn)
                raise

    def _train_and_measure(self, epoch: int) -> dict[str, Any]:
        config = self.config
        measures = {"epoch": epoch} | train_epoch(self.run, config)
        if epoch % config.eval_every == 0 or epoch == config.num_epochs:
            with self.run.learner.averaged():
                measures[self.heldout.name] = self.heldout.measure(epoch)
        return measures

    def _save_before_the_end(self, snapshot: Snapshot, warn: Callable[[str], None]) -> None:
        """Save a run that something stops in the middle of an epoch, which will begin anew."""
        with contextlib.suppress(OSError):  # it must not hide what stopped the run
            self._write_page(f"stopped after epoch {snapshot.epoch}")
        try:
            self._save_checkpoint(snapshot)  # first, as it needs nothing of the device
            warn(f"saved as it was after epoch {snapshot.epoch}")
            if not _measured_epochs(self.run.epochs):  # else the adapter that was last measured stays
                self.run.restore(snapshot)
                self._save_adapter()
        except OSError as failure:  # the error that stopped the run is raised all the same
            warn(f"what was reached after epoch {snapshot.epoch} could not be saved: {failure}")

    def _write_page(self, state: str) -> None:
        """Write report.html, in the first process."""
        if processes.is_first():
            report.write_training(self._so_far(state))

    def verdict(self) -> dict[str, str]:
        """What the training reached, for its result: in the first process, which has the scores of all images."""
        return {"verdict": report.verdict_of(self._so_far(report.FINISHED))} if processes.is_first() else {}

    def _so_far(self, state: str) -> report.Training:
        config, epochs = self.config, self.run.epochs
        in_units = [_in_final_units(measures, config.reward, self.setup.reward) for measures in epochs]
        frames, command = self.heldout.frames_until(epochs), run.resume_command(config)
        return report.Training(config, self.heldout.prompts, in_units, frames, command, state)

    def _save_checkpoint(self, snapshot: Snapshot) -> None:
        if processes.is_first():
            run.write_checkpoint(Path(self.config.output_dir, run.CHECKPOINTS), snapshot, self.config, self.sources)

    def _save_adapter(self) -> None:
        if processes.is_first():
            with self.run.learner.averaged():
                self.run.policy.save(Path(self.config.output_dir))


def train_epoch(current: Run, config: TrainConfig) -> dict[str, Any]:
    """Sample, score and update once; the measures of the epoch."""
    begin, policy = time.perf_counter(), current.policy
    noise, choice = current.generators["noise"], current.generators["choice"]
    prompts = current.order.take(config.num_prompts_per_epoch)
    if config.algorithm == "gradient":
        batch, sampled = draw_noise_batch(policy, prompts, config, noise), begin
        updated = gradient_update(policy, batch, current.reward, current.learner, config)
        samples = scored_by_update(batch, current.reward, updated)
    else:
        samples = collect(policy, current.reward, prompts, config, noise)
        batch = make_batch(samples, compute_advantages(samples, config, current.statistics), config, policy.model.device)
        sampled = time.perf_counter()
        update = matching_update if config.algorithm == "matching" else ppo_update
        updated = update(policy, batch, current.learner, config, choice)
    seconds = time.perf_counter() - begin
    timings = {"images_per_s": len(batch.prompts) / seconds, "sampling_share": (sampled - begin) / seconds}
    return _epoch_measures(samples, updated, policy, config) | timings


def _epoch_measures(samples: Samples, updated: UpdateStatistics, policy: Policy, config: TrainConfig) -> dict[str, Any]:
    """The measures of an epoch, in the algorithm's own terms."""
    dropped = torch.nonzero(samples.rewards.isnan()).flatten().tolist()
    num_images, num_pairs = len(samples.rewards), max(1, updated.num_pairs)
    finite = samples.rewards[samples.rewards.isfinite()]
    rewarded = {"reward_mean": finite.mean().item(), "reward_std": finite.std(correction=0).item()}
    measures: dict[str, Any] = ({} if config.reward == NO_REWARD else rewarded) | {
        "num_images": num_images,
        "num_unet_calls": num_rollout_calls(policy, config) + updated.num_unet_calls,
    }
    if config.algorithm == "ppo":
        measures["max_ratio_deviation"] = updated.first_ratio_deviation  # before the first step, where it must be 0
        measures["ratio_deviation"] = updated.ratio_deviation
        measures["clip_fraction"] = updated.num_clipped / num_pairs
    if config.algorithm == "matching":
        measures["loss"] = updated.loss / num_pairs
    if config.relabel:
        measures["num_relabelled"] = sum(caption is not None for caption in samples.captions)
    if policy.anchors:
        measures["anchor_drift"] = updated.anchor_drift
    if math.isfinite(updated.grad_norm):  # else fp16 skipped the step
        measures["grad_norm"] = updated.grad_norm
    if wants_kl(config):
        measures["kl"] = updated.last_kl
    if len(samples.parts) > 1:
        measures["parts"] = {name: finite_mean(scores) for name, scores in samples.parts.items()}
    if dropped:
        measures["dropped"] = [{"prompt": samples.prompts[i], "seed": config.seed, "image": i} for i in dropped]
    return measures


def _totals(last: dict[str, Any], measures: dict[str, Any], seconds: float) -> dict[str, Any]:
    """An epoch's measures with the counts of the whole run up to its end, given the last epoch's."""
    counts = {name: last[name] + measures[name] for name in ("num_images", "num_unet_calls")}
    return measures | counts | {"seconds": seconds}


# --- guards ---


def check_guards(epochs: Sequence[dict[str, Any]], config: TrainConfig, reward: rewards.Mixture) -> None:
    """Check that the last epoch is one to go on from.

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
    if config.reward != NO_REWARD and config.max_reward_drop and (measured_on := find_measured(last)):
        measured = (_in_final_units(measures, config.reward, reward) for measures in (epochs[0], last))
        base, tuned = (measures[measured_on][config.reward] for measures in measured)
        spread = epochs[1]["reward_std"]  # of the base model's images: epoch 1 samples before its first update
        if spread > 0 and base - tuned > config.max_reward_drop * spread:
            raise DivergedError(
                f"the {MEASURED_ON[measured_on]} {config.reward} has collapsed from {base:z.4f} to {tuned:z.4f} "
                "(--max-reward-drop); lower --learning-rate"
            )


def _last_good(epochs: Sequence[dict[str, Any]], config: TrainConfig) -> str:
    """Which adapter lies in the output folder."""
    measured = _measured_epochs(epochs)
    return (
        f"the adapter of epoch {measured[-1]} is kept in {config.output_dir}" if measured else "no adapter was measured yet"
    )


def _measured_epochs(epochs: Sequence[dict[str, Any]]) -> list[int]:
    """Those after which the adapter was measured, and saved."""
    return [measures["epoch"] for measures in epochs[1:] if find_measured(measures)]
