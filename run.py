"""What a run leaves: its folder, its state in checkpoints, metrics (also for wandb and others), figures, the model card.

A checkpoint is a folder of safetensors and JSON, no pickle. It is written beside its place, with the SHA-256 of every file
in a manifest, and moved there whole; so one that was cut off, or has changed since, is recognised and passed over.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import platform
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from texforce import Policy, __version__

from . import detector, files, report, stages, world
from .config import TrainConfig
from .errors import InputError, reading
from .experience import PromptOrder, PromptStatistics
from .learner import Learner
from .measures import to_json
from .presets import EMBEDDED, is_flow
from .prompt_sets import MEASURED_ON, find_measured
from .reward_specs import NO_REWARD, caption_files, explain, functions_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .rewards import Mixture

RESULT, FRAMES = "result.json", "heldout.jsonl"
CHECKPOINTS = "checkpoints"  # their folder in that of a run
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
STATE_FORMAT = 3  # written into checkpoints; a state of another format comes from another version
# All that a training writes into its folder.
WRITTEN = (
    "config.json", "metrics.jsonl", RESULT, FRAMES, "README.md", "curve.png", "report.html", "grids/*.png",
    f"{CHECKPOINTS}/epoch_*/*", "texforce/*", "adapter_config.json", "adapter_model.safetensors",
    "learned_embeds.safetensors", "text_encoder_[23]/adapter_*", "unet/adapter_*",
)  # fmt: skip
# Options that a run may go on with though they have changed: none of them decides the adapter.
FREE_OPTIONS = (
    "output_dir", "overwrite", "report_to", "checkpoint_every", "checkpoints_to_keep", "reward_timeout", "max_kl",
    "max_reward_drop",
    "micro_batch", "micro_batch_size", "gradient_checkpointing",  # these change only how sums are rounded
)  # fmt: skip
# Options that cannot change in the middle: earlier epochs were measured by them.
LASTING_OPTIONS = ("reward", "normalise_rewards", "eval_reward")


# --- the folder ---


def check_folder(name: str, resume: bool = False) -> None:
    """Check that a training can make its output folder, or go on in it, without making it.

    Raises:
        InputError: it is not empty and holds no run to go on with. OSError: it cannot be made or written to.
    """
    folder = Path(name)
    if resume and is_run(folder):
        files.check_writable(folder)
    else:
        files.check_new_folder(folder)


def is_run(folder: Path) -> bool:
    """Whether a training has begun in a folder: its options are there, or a valid checkpoint, which holds them too."""
    return (folder / "config.json").is_file() or newest_checkpoint(folder / CHECKPOINTS) is not None


def check_overwritable(folder: Path) -> None:
    """Check that a folder holds a training and nothing else.

    Raises:
        InputError: there is something else in it, or an adapter that no training left.
    """
    files.check_written(folder, WRITTEN)
    if (folder / "adapter_config.json").is_file() and not (folder / "metrics.jsonl").is_file():
        raise InputError(f"output_dir: {str(folder)!r} holds an adapter, and no metrics.jsonl of its training; move it away")


def saved_options(folder: Path) -> dict[str, Any]:
    """The options of the run in a folder: of its config.json, and where that is gone of the newest valid checkpoint.

    Raises:
        InputError: config.json is no JSON object. ArtifactError: the checkpoint holds no state of a training.
    """
    if (folder / "config.json").exists() or (newest := newest_checkpoint(folder / CHECKPOINTS)) is None:
        return files.read_json(folder / "config.json")
    return read_checkpoint(newest).state["config"]


def describe_training(folder: Path) -> str:
    """A line on the training of the run in a folder.

    Raises:
        InputError, ArtifactError: config.json, result.json or the checkpoint is damaged.
    """
    config = saved_options(folder)
    result = read_result(folder) if (folder / RESULT).is_file() else {}
    images = f"{result['num_images']:,} images" if result else "not finished"
    return f"{report.describe_method(config)}: {images}"


def check_room(folder: Path, config: TrainConfig) -> None:
    """Check that there is room for a checkpoint, before any model is loaded.

    Raises:
        OSError: there is not.
    """
    with tempfile.TemporaryFile(dir=folder) as probe:  # without a name that a link could have
        probe.write(bytes(checkpoint_size(config)))
        probe.flush()


def checkpoint_size(config: TrainConfig) -> int:
    """Estimated bytes of a checkpoint, without knowing the model: at rank 16 one MiB for tiny, else 16 or 64."""
    return config.rank * 2**16 * (1 if config.model in EMBEDDED else 64 if config.target in ("unet", "both") else 16)


# --- the state ---


@dataclass(frozen=True)
class Snapshot:
    """A run between two epochs: tensors on the CPU by dotted names, and everything else as JSON."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def epoch(self) -> int:
        """The number of the last epoch."""
        return self.state["epochs"][-1]["epoch"]


@dataclass
class Run:
    """All that changes while a training runs."""

    policy: Policy
    learner: Learner
    reward: Mixture
    statistics: PromptStatistics
    order: PromptOrder
    generators: dict[str, torch.Generator]
    epochs: list[dict[str, Any]]  # the measures of each, the first before training

    def snapshot(self) -> Snapshot:
        """A copy of all of it."""
        parts = {name: getattr(self, name).state_dict() for name in ("policy", "learner", "reward", "statistics", "order")}
        generators = {name: generator.get_state() for name, generator in self.generators.items()}
        state = parts | {"generator": generators, "epochs": list(self.epochs), "device": self.policy.model.device.type}
        tensors: dict[str, Tensor] = {}
        return Snapshot(tensors, {"format": STATE_FORMAT} | _without_tensors(state, "", tensors))

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Put everything as it was.

        Raises:
            InputError: the snapshot is of other parameters, or of another kind of device, whose random numbers differ.
        """
        state = _with_tensors(snapshot)
        if state["device"] != self.policy.model.device.type:
            raise InputError(f"resume: the run used {state['device']} and can only be resumed on {state['device']}")
        for name in ("policy", "learner", "reward", "statistics", "order"):
            getattr(self, name).load_state_dict(state[name])
        for name, generator in self.generators.items():
            generator.set_state(state["generator"][name])
        self.epochs[:] = state["epochs"]


def _without_tensors(state: Mapping[str, Any], prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A nested state with copies of its tensors moved to `tensors`, by dotted names."""
    rest: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{name}"] = value.detach().cpu().clone()
        else:
            rest[name] = _without_tensors(value, f"{prefix}{name}.", tensors) if isinstance(value, dict) else value
    return rest


def _with_tensors(snapshot: Snapshot) -> dict[str, Any]:
    """The nested state that a snapshot was made of; names of LoRA's parameters hold dots themselves."""
    state = json.loads(json.dumps(snapshot.state))
    for name, tensor in snapshot.tensors.items():
        *path, last = name.split(".", 1) if name.startswith("policy.") else name.split(".")
        place = state
        for part in path:
            place = place.setdefault(part, {})
        place[last] = tensor
    return state


# --- checkpoints ---


def write_checkpoint(folder: Path, snapshot: Snapshot, config: TrainConfig, sources: Mapping[str, Any]) -> Path:
    """Write a checkpoint into a run's folder of them, and remove all but the newest checkpoints_to_keep; returns its place.

    `sources` is what `check_same` compares beside the options.

    Raises:
        OSError: storage. What was there before is as it was.
    """
    from safetensors.torch import save_file

    place = checkpoint_place(folder, snapshot)
    content = {"config": asdict(config), "sources": dict(sources), **snapshot.state}
    if place.is_dir() and is_valid(place):
        kept = read_checkpoint(place).state
        if all(kept[name] == content[name] for name in ("config", "sources")):
            return place
    if not folder.exists():
        folder.mkdir()
        files.sync(folder.parent)
    files.remove_temporaries(folder)
    with files.replacing(place) as temporary:  # instead of one that is broken, or of a run that was changed by force
        temporary.mkdir()
        save_file(snapshot.tensors, temporary / TENSORS)
        (temporary / STATE).write_text(json.dumps(content, allow_nan=False))
        (temporary / MANIFEST).write_text(manifest(temporary))
    later = [other for other in checkpoints(folder) if other.name > place.name]  # broken: the run goes on from before them
    for other in (*later, *checkpoints(folder)[len(later) + config.checkpoints_to_keep :]):
        files.remove(other)
    return place


def checkpoint_place(folder: Path, snapshot: Snapshot) -> Path:
    """The checkpoint of a snapshot, in a run's folder of them."""
    return folder / f"epoch_{snapshot.epoch:06d}"


def manifest(folder: Path) -> str:
    """The SHA-256 of each of a checkpoint's files, as the exact text of a valid manifest."""
    sums = {path.name: files.sha256(path) for path in folder.iterdir() if path.name != MANIFEST}
    return json.dumps(dict(sorted(sums.items())), indent=2) + "\n"


def digest(prompts: Sequence[str]) -> str:
    """SHA-256 of prompts in their order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest first, valid or not."""
    return sorted(folder.glob("epoch_" + 6 * "[0-9]"), reverse=True)


def is_valid(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is the one that was written, and none is missing; raises OSError."""
    try:
        names = {path.name for path in checkpoint.iterdir()}
        return names == {TENSORS, STATE, MANIFEST} and (checkpoint / MANIFEST).read_bytes() == manifest(checkpoint).encode()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False


def newest_checkpoint(folder: Path, passed_over: Callable[[Path], None] = lambda checkpoint: None) -> Path | None:
    """The newest valid checkpoint, if there is one; `passed_over` gets each broken one before it. Raises OSError."""
    for checkpoint in checkpoints(folder):
        if is_valid(checkpoint):
            return checkpoint
        passed_over(checkpoint)
    return None


def read_checkpoint(checkpoint: Path) -> Snapshot:
    """The content of a valid checkpoint.

    Raises:
        InputError: another version wrote it. ArtifactError: it holds no state of a training.
    """
    from safetensors.torch import load_file

    with reading(f"{checkpoint}: {NO_STATE}"):
        state = json.loads((checkpoint / STATE).read_text())
        if state.get("format") != STATE_FORMAT:
            raise InputError(
                f"resume: {checkpoint} was written by another version of texforce; resume with that version, or start a new "
                "run"
            )
        if not isinstance(state["config"], dict) or not isinstance(state["sources"], dict):
            raise ValueError("config and sources must be objects")
        _check_epochs(state["epochs"], state["config"].get("reward") != NO_REWARD)
        return Snapshot(load_file(checkpoint / TENSORS), state)


def _check_epochs(epochs: Sequence[Mapping[str, Any]], has_reward: bool) -> None:
    """Raise whatever epochs of other fields than a training's measures make Python raise."""
    for number, measures in enumerate(epochs):
        names = (
            "num_images",
            "num_unet_calls",
            "seconds",
            *(("reward_mean", "reward_std") if number and has_reward else ()),
        )
        numbers = [measures[name] for name in names] + list(measures.get(find_measured(measures) or "", {}).values())
        if measures["epoch"] != number or not all(map(math.isfinite, numbers)):
            raise ValueError(f"epochs: {number} does not hold the measures of that epoch")
    if find_measured(epochs[0]) is None:
        raise ValueError("epochs: the base model was not measured")


NO_STATE = "refused as a training's checkpoint; remove it to go on from the one before"


def check_same(saved: Mapping[str, Any], config: TrainConfig, sources: Mapping[str, Any]) -> None:
    """Check that a run goes on as it began.

    `saved` holds its `config` and, if it has a checkpoint, its `sources`: by a description, the revision or SHA-256 of each
    file that decides a run.

    Raises:
        InputError: an option or a source has changed; names them, with the options' old and new values.
    """
    changes = differences(saved["config"], asdict(config))
    changes += [name for name, source in saved.get("sources", {}).items() if sources.get(name, source) != source]
    if changes:
        raise InputError(f"resume: changed since the checkpoint: {'; '.join(changes)}; --force-resume goes on all the same")


def check_lasting(saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Check that what measures a run stays the same, which --force-resume cannot change either.

    Raises:
        InputError: a reward has changed.
    """
    lasting = [change for change in differences(saved, asdict(config)) if change.partition(":")[0] in LASTING_OPTIONS]
    if lasting:
        raise InputError(f"resume: what measures a run cannot change in it: {'; '.join(lasting)}; begin another")


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Options that decide a run and differ, as `name: old -> new`; a missing option had its default."""
    saved = {item.name: item.default for item in fields(TrainConfig) if item.default is not MISSING} | dict(saved)
    names = [name for name in given if name not in FREE_OPTIONS and saved.get(name) != given[name]]
    return [f"{name}: {saved.get(name)} -> {given[name]}" for name in names]


# --- held-out images ---


def frame(epoch: int, scores: Mapping[str, Tensor], images: Mapping[int, Tensor]) -> dict[str, Any]:
    """A line of heldout.jsonl: the scores (N,) of the prompts that are measured, and small images (3, H, W) of some."""
    if "alignment" in scores:
        exact = torch.where(scores["alignment"].isfinite(), (scores["alignment"] == 1).float(), torch.nan)
        scores = {**scores, report.EXACT: exact}
    return {
        "epoch": epoch,
        "scores": {name: to_json(part) for name, part in scores.items()},
        "images": {str(i): report.embed(files.to_image(image)) for i, image in images.items()},
    }


def read_frames(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's heldout.jsonl; none if it is not there.

    Raises:
        InputError: it is damaged.
    """
    path = output_dir / FRAMES
    with reading(f"{path} is damaged; remove it to go on without the images of earlier epochs", InputError):
        try:
            frames = files.read_lines(path)
        except InputError as error:  # which says nothing about removing it
            raise ValueError(str(error)) from error
        for kept in frames:
            _check_frame(kept)
    return frames


def _check_frame(kept: dict[str, Any]) -> None:
    """Raise whatever a line of heldout.jsonl that `frame` did not make makes Python raise."""
    epoch, scores, images = kept["epoch"], kept["scores"].values(), kept["images"]
    (num_prompts,) = {len(values) for values in scores}
    if not all(value is None or math.isfinite(value) for values in scores for value in values):
        raise ValueError("a score is not finite")
    if type(epoch) is not int or not images.keys() <= set(map(str, range(num_prompts))):
        raise ValueError("a line holds no measurement")
    if not all(address.startswith("data:image/") for address in images.values()):
        raise ValueError("a line holds something else than images")


def resume_command(config: TrainConfig) -> str:
    """The command that goes on with a run."""
    code = any(map(functions_of, [config.reward, *(config.eval_reward or ())])) or caption_files(config.relabel)
    return f"texforce train --resume {shlex.quote(config.output_dir)}{' --trust-reward-code' if code else ''}"


# --- metrics and figures ---


def write_result(output_dir: Path, config: TrainConfig, epochs: Sequence[Mapping[str, Any]], result: dict[str, Any]) -> None:
    """The reward curve, the model card and the result of a finished run; the last one says that it is."""
    write_curve(output_dir / "curve.png", epochs, main_measure(config))
    files.write_text(output_dir / "README.md", model_card(config, result, output_dir))
    files.write_json(output_dir / RESULT, result)


def main_measure(config: TrainConfig) -> str:
    """The reward, or where there is none the first that is only measured."""
    return config.eval_reward[0] if config.reward == NO_REWARD and config.eval_reward else config.reward


def read_result(output_dir: Path) -> dict[str, Any]:
    """The result of a finished run.

    Raises:
        InputError: the file is damaged.
    """
    path = output_dir / RESULT
    with reading(f"{path} is no result of a training; delete it, and the run writes it anew", InputError):
        result = files.read_json(path)
        measures = result[find_measured(result) or "heldout"].values()
        numbers = [measure[kind] for measure in measures for kind in ("base", "tuned")]
        if not all(map(math.isfinite, [result["num_images"], result["seconds"], *numbers])):
            raise ValueError("a figure in it is not finite")
    return result


def metrics(output_dir: Path, epochs: Sequence[Mapping[str, Any]], track: Track) -> Callable[[dict[str, Any]], None]:
    """A function that appends an epoch's measures to metrics.jsonl and to the tracker.

    The file begins with the epochs that there are: what a run that was killed wrote after its checkpoint is gone.
    """
    path = output_dir / "metrics.jsonl"
    files.write_lines(path, epochs)

    def log(measures: dict[str, Any]) -> None:
        files.append_line(path, measures)
        track(measures)

    return log


Track = Callable[[dict[str, Any]], None]  # takes the measures of an epoch


def needs_account(config: TrainConfig) -> bool:
    """Whether the tracker may ask for an account, so that it starts before any work, and writes elsewhere than the run."""
    return config.report_to in ("wandb", "trackio")


@contextlib.contextmanager
def tracker(config: TrainConfig, output_dir: Path) -> Iterator[Track]:
    """accelerate's tracker, as a function of an epoch's measures.

    Raises:
        InputError: the tracker failed, as wandb does without a key.
    """
    if config.report_to == "none":
        yield lambda measures: None
        return
    from accelerate import PartialState, tracking

    name = {"tensorboard": "TensorBoardTracker", "wandb": "WandBTracker", "trackio": "TrackioTracker"}[config.report_to]
    arguments = {"logging_dir": output_dir} if config.report_to == "tensorboard" else {}
    failed = f"report_to: {config.report_to} failed; fix it, or choose another tracker or none"
    with reading(failed, InputError):
        PartialState()  # the trackers' own logging asks for it
        kept = getattr(tracking, name)("texforce", **arguments)
        kept.start()

    def track(measures: dict[str, Any]) -> None:
        flat = {name: value for name, value in measures.items() if isinstance(value, int | float)}
        for group in (*MEASURED_ON, "parts"):
            flat |= {f"{group}/{name}": value for name, value in measures.get(group, {}).items()}
        with reading(failed, InputError):
            kept.log(flat, step=measures["epoch"])

    try:
        yield track
    except BaseException:
        with contextlib.suppress(Exception):  # it must not hide the error that ended the run
            kept.finish()
        raise
    with reading(failed, InputError):
        kept.finish()


def describe_run(config: TrainConfig, device: str, num_parameters: int) -> dict[str, Any]:
    """Facts that one needs to repeat a run."""
    return {
        "seed": config.seed,
        "model": config.model,
        "reward": config.reward,
        "algorithm": config.algorithm,
        "target": config.target,
        "preset": config.preset,
        "device": device,
        "num_parameters": num_parameters,
        "versions": versions(),
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    """Versions of this project and of the packages that decide its numbers."""
    packages = ("torch", "diffusers", "transformers", "peft", "open_clip_torch")
    own = {"texforce": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}


def commit() -> str | None:
    """The commit of this checkout; None where the package is installed from a wheel."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


METHODS = {
    "ppo": "PPO (arXiv:2311.15657)", "matching": "advantage-weighted matching (arXiv:2509.25050)",
    "gradient": "the reward's own gradient (arXiv:2309.17400)",
}  # fmt: skip


def lora_places(config: TrainConfig) -> str:
    """Which layers of the text encoders have LoRA, if they are not the usual ones."""
    blocks = "" if config.lora_layers == "all" else f", blocks {config.lora_layers}"
    return blocks + (f", projections {', '.join(config.lora_modules)}" if config.lora_modules else "")


def model_card(config: TrainConfig, result: dict[str, Any], folder: Path) -> str:
    """README.md of the adapter in a folder, in the hub's format."""
    measured = find_measured(result) or "heldout"
    rows = [
        f"| {name} | {value['base']:z.4f} | {value['tuned']:z.4f} | {value['tuned'] - value['base']:+z.4f} |"
        for name, value in result[measured].items()
    ]
    about = "Held-out prompts" if measured == "heldout" else "Training prompts, since a single prompt cannot be held out"
    num_cut, taught_by = result["num_prompts_cut"], " and ".join(report.taught_by(asdict(config), "`"))
    taught_by += " (arXiv:2312.16204)" if config.relabel else ""
    meanings = explain(result[measured], report.takes_own_hps(config))
    ranged = [] if config.adapter_steps is None else [
        f"It is for the share {config.adapter_steps} of the denoising steps alone: in the others the base text encoder "
        "conditions the denoiser. `texforce sample` and `texforce eval` do so; other tools leave it on in all steps."
    ]  # fmt: skip
    cut = [f"Prompts that were cut to what the text encoder reads: {num_cut}."] if num_cut else []
    if result.get("num_chunks", 1) > 1:
        cut = [f"Prompts were read in {result['num_chunks']} chunks (`--long-prompt chunk`)."]
    grids = sorted((folder / "grids").glob("epoch_*.png"), key=lambda path: (len(path.name), path.name))
    what = f"LoRA (rank {config.rank}) on the {config.target}{lora_places(config)}"
    if config.target == "tokens":
        what = f"Learned tokens ({config.num_tokens}) at the end of every prompt, a textual inversion"
    return "\n".join(
        [
            *_card_metadata(config),
            f"# TexForce adapter for {config.model}", "",
            f"{what}, trained by "
            f"{METHODS[config.algorithm]} on {taught_by}: {result['num_images']:,} images, seed {config.seed}, "
            f"{stages.duration(result['seconds'])} on {result['device']}.",
            *ranged, *cut, "", f"{about}, base and tuned from the same noise:", "",
            "| measure | base | tuned | change |", "|---|---|---|---|", *rows, "",
            *([f"{meanings}.", ""] if meanings else []),
            *([f"{result['verdict']}.", ""] if result["verdict"] else []),
            *(f"![Base and tuned images from the same noise](grids/{path.name})\n" for path in grids[-1:]),
            "![The reward over the images of the training](curve.png)", "",
            "## Usage", "", *_card_usage(config, folder), "",
            "Every setting is in `config.json`, every figure in `result.json` and `metrics.jsonl`.", "",
        ]
    )  # fmt: skip


def _card_metadata(config: TrainConfig) -> list[str]:
    """The head of a model card for the hub. The base model decides the licence, since the adapter derives from it."""
    model = config.model
    library, kind = ("diffusers", "textual-inversion") if config.target == "tokens" else ("peft", "lora")
    licence = ["license: apache-2.0"] if model in EMBEDDED else ["license: other", "license_name: license-of-the-base-model"]
    base: list[str] = []
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model, flags=re.ASCII) and not Path(model).exists():  # a name on the hub
        base = [f"base_model: {json.dumps(model)}", "base_model_relation: adapter"]
        licence.append(f"license_link: https://huggingface.co/{model}")
    tags = f"tags: [texforce, text-to-image, {kind}, reinforcement-learning]"
    return ["---", f"library_name: {library}", "pipeline_tag: text-to-image", *base, *licence, tags, "---"]


def _card_usage(config: TrainConfig, folder: Path) -> list[str]:
    """How to draw with the adapter in a folder: in diffusers and peft, and by texforce."""
    prompt = report.example_prompt(config.model)
    adapter = folder.absolute().name
    command = [report.sample_command(adapter, prompt)]
    by_texforce = ["```sh", *command, "```"]
    if config.target == "tokens":
        return [
            *by_texforce,
            "",
            "Others load `learned_embeds.safetensors` as a textual inversion, named at a prompt's end.",
        ]
    if Path(config.model).is_file():  # whose pipeline only its tensors name
        return by_texforce
    own = config.model in EMBEDDED
    model = f"models.{config.model.upper().replace('-', '_')}" if own else json.dumps(config.model)
    imports = ["from texforce import models"] if own else []
    subfolders = {"text_encoder": ""} | {
        name: f', subfolder="{name}"' for name in ("text_encoder_2", "text_encoder_3", "unet")
    }
    loading = [
        f"pipeline.{name} = PeftModel.from_pretrained(pipeline.{name}, {json.dumps(adapter)}{subfolder})"
        for name, subfolder in subfolders.items()
        if (folder / (name if subfolder else "") / "adapter_config.json").is_file()
    ]
    schedulers = {"ddim": "DDIMScheduler", "dpm-solver": "DPMSolverMultistepScheduler"}
    scheduler = "" if is_flow(config.model) else schedulers.get(config.sampler, "")
    sampling = f"num_inference_steps={config.num_inference_steps}, guidance_scale={config.guidance_scale:g}"
    sampling += f", eta={config.eta:g}" if scheduler == "DDIMScheduler" else ""
    sampling += f", height={config.resolution}, width={config.resolution}" if config.resolution else ""
    relies = "the base text encoder for the null prompt" if config.null_prompt == "base" else ""
    relies = f"the base text encoder outside of {config.adapter_steps} of the steps" if config.adapter_steps else relies
    return [
        "```python",
        f"from diffusers import {', '.join(filter(None, [scheduler, 'DiffusionPipeline']))}",
        "from peft import PeftModel", *imports, "",
        f"pipeline = DiffusionPipeline.from_pretrained({model})",
        *([f"pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config)"] if scheduler else []),
        *loading,
        f'image = pipeline("{prompt}", {sampling}).images[0]',
        "```", "",
        f"It relies on {relies}, so only texforce draws what was measured:" if relies else "or", "", *by_texforce,
    ]  # fmt: skip


def write_grid(
    path: Path,
    prompts: Sequence[str],
    columns: Mapping[str, Tensor],
    scores: Mapping[str, Sequence[float]] | None = None,
    title: str = "",
) -> None:
    """A PNG with a block for each of N prompts, in which each system has an image of (N, 3, H, W) in [0, 1].

    Under each image stand its score (N,), if there are scores, and for prompts of the tiny world a mark that says whether it
    is right. Rare words of that world are underlined.
    """
    from PIL import Image, ImageDraw

    rows = [_wrapped(prompt, len(columns) * (CELL + GAP)) for prompt in prompts]
    in_world = world.is_world(prompts)
    judges = in_world and all(images.shape[-1] == images.shape[-2] for images in columns.values())
    marks = {name: detector.alignment_exact(images, prompts) for name, images in columns.items()} if judges else {}
    under = LINE + 4 if scores or marks else 6
    width, height = len(columns) * (CELL + GAP) + 12, max(map(len, rows)) * LINE + 4 + CELL + under + 6
    across, top = _num_across(len(prompts)), (2 if title else 1) * LINE + 8
    canvas = Image.new("RGB", (across * width + 12, top + math.ceil(len(prompts) / across) * height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((12, 4), title, fill="black", font=_font())
    for i, lines in enumerate(rows):
        left, y = 12 + i % across * width, top + i // across * height
        for n, line in enumerate(lines):
            _write_prompt(draw, (left, y + (max(map(len, rows)) - len(lines) + n) * LINE), line, in_world)
        y += max(map(len, rows)) * LINE + 4
        for k, (name, images) in enumerate(columns.items()):
            image, x = files.to_image(images[i]), left + k * (CELL + GAP)
            method = Image.Resampling.NEAREST if image.height < CELL else Image.Resampling.LANCZOS
            longest = max(image.size)
            size = (CELL * image.width // longest, CELL * image.height // longest)
            canvas.paste(image.resize(size, method), (x, y))
            if i < across:
                draw.text((x, top - LINE - 4), name, fill="grey", font=_font())
            if marks:
                _draw_mark(draw, (x + CELL - 13, y + CELL + 6), bool(marks[name][i]))
            if scores:
                draw.text((x, y + CELL + 2), f"{scores[name][i]:z.3f}", "black", _font())
    with files.replacing(path) as temporary:
        canvas.save(temporary, "png")


CELL, GAP, LINE = 128, 4, 18  # pixels of an image's side, between images, and of a line of text


@functools.cache
def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(13)


def _num_across(count: int) -> int:
    """Blocks side by side, at most four: so many that the last row has as few gaps as can be."""
    return min(range(min(count, 4), 0, -1), key=lambda across: -count % across if across > 1 else count)


def _wrapped(text: str, width: int) -> list[str]:
    """A text in at most two lines of a width, without control characters; its end is cut off if it is longer."""
    letters = "".join(
        letter if letter.isprintable() else " " for letter in text[: 2 * width]
    )  # a letter takes a pixel at least
    lines = [""]
    for word in letters.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font().getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return [_cut(line, width) for line in lines[:1]] + [_cut(" ".join(lines[1:]), width)] * (len(lines) > 1)


def _cut(text: str, width: int) -> str:
    """The beginning of a text that fits into a width, with dots where its end is missing."""
    if _font().getlength(text) <= width:
        return text
    return next(part for n in range(len(text), -1, -1) if _font().getlength(part := text[:n] + "\u2026") <= width or not n)


def _write_prompt(draw: Any, place: tuple[float, float], text: str, in_world: bool) -> None:
    """Write a line of a prompt, its rare words underlined if it is of the tiny world."""
    draw.text(place, text, fill="black", font=_font())
    x, y = place
    for word in text.split() if in_world else ():
        end = x + _font().getlength(word)
        if world.has_rare_word(word):
            draw.line((x, y + 15, end, y + 15), fill="#0969da", width=2)
        x = end + _font().getlength(" ")


def _draw_mark(draw: Any, place: tuple[float, float], is_right: bool) -> None:
    """Draw a tick or a cross of 10 pixels."""
    x, y = place
    if is_right:
        draw.line([(x, y + 5), (x + 4, y + 9), (x + 10, y)], fill="#1a7f37", width=3)
    else:
        for line in ((x, y, x + 9, y + 9), (x, y + 9, x + 9, y)):
            draw.line(line, fill="#cf222e", width=3)


def write_curve(path: Path, epochs: Sequence[Mapping[str, Any]], reward: str) -> None:
    """A PNG of `draw_curve`."""
    with files.replacing(path) as temporary:
        draw_curve(epochs, reward).savefig(temporary, dpi=120, format="png")


def draw_curve(epochs: Sequence[Mapping[str, Any]], reward: str) -> Figure:
    """The reward over images, on training prompts and where it was measured, with the base model's as a line.

    For the tiny world the share of prompts that are fully right stands below, on a scale of its own.
    """
    from matplotlib.figure import Figure

    measured = [(measures["num_images"], measures[name]) for measures in epochs if (name := find_measured(measures))]
    places, about = [place for place, _ in measured], report.measured_on(epochs)
    shown = {reward: "reward", report.EXACT: "share fully right"}
    shown = {name: label for name, label in shown.items() if all(name in found for _, found in measured)}
    figure = Figure(figsize=(7, 1.2 + 2.3 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    trained = [(measures["num_images"], measures["reward_mean"]) for measures in epochs[1:] if "reward_mean" in measures]
    if trained:
        panels[0].plot(*zip(*trained, strict=True), color="#9ea7b3", linewidth=1.2, label="training prompts")
    for axes, (name, label) in zip(panels, shown.items(), strict=True):
        values = [found[name] for _, found in measured]
        axes.axhline(values[0], color="#656d76", linestyle="--", linewidth=1.2, label="base model")
        axes.plot(places, values, "o-", color="#0969da", label=about)
        axes.set_ylabel(label)
        axes.set_title(f"{name} on {about}: {values[0]:z.3f} to {values[-1]:z.3f}", loc="left", fontsize=11)
        axes.grid(color="#d8dee4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("images")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure
