"""texforce sample and texforce eval: base and tuned from the same noise, and benchmarks with what is measured on them.

`texforce eval` reads top to bottom: the evaluation and its folder, images, scores, statistics, results. Whatever is finished
lies in the output folder, and an evaluation that is started there again goes on from it.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from texforce import Policy, __version__, tokenization

from . import adapters, files, measures, models, report, reward_specs, rewards, run, scorers, stages, world
from .config import default_device
from .draw_config import (
    BASE,
    DrawConfig,
    EvalConfig,
    EvalOptions,
    SampleConfig,
    System,
    changed_later_options,
    resolve_eval,
)
from .errors import ArtifactError, InputError, RewardError, reading
from .eval_checks import SETTINGS, check_folder, check_inputs, check_same, describe_drawing
from .experience import check_finite
from .files import read_json
from .options import option_fields
from .prompt_sets import Benchmark, read_benchmark, read_prompts

SCORES = "scores.jsonl"
BROKEN = "not finite"  # in a PNG's metadata: the image holds no numbers to be scored
DIVERSITY = "diversity"
WRITTEN = (SETTINGS, SCORES, "images/*/*.png", "results.json", "results.csv", "report.html")  # all that an evaluation writes
Scores = dict[str, dict[str, np.ndarray]]  # (P, K) by system and measure; of the diversity (P, 1)


# --- images ---


def sample(config: SampleConfig, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Tensor]:
    """Images (N, 3, H, W) in [0, 1] of N prompts and seeds by a resolved configuration: `tuned`, and `base` for comparison.

    Raises:
        NotFoundError, InputError: bad input. ArtifactError: a refused adapter. DivergedError: no image is finite.
    """
    for system in config.systems:
        adapters.check_inputs(system)  # a mistyped folder must not wait for the model
    model = load_model(config, prompts)
    systems = [*([System(BASE)] if config.compare or not config.systems else []), *config.systems]
    policies = {system.name: make_policy(model, system, config) for system in systems}
    return {
        name: check_finite(draw(policy, tokenize(policy, prompts), seeds, config.batch_size, f"drawing {name}"))
        for name, policy in policies.items()
    }


def sample_to_folder(
    config: SampleConfig, warn: Callable[[str], None] = lambda message: None
) -> tuple[list[files.SampledImage], Path]:
    """Draw `num_images` of each prompt of a resolved configuration into its folder; returns the images, and the grid's path.

    Raises:
        NotFoundError, InputError, ArtifactError, DivergedError: as `sample`. OSError: storage.
    """
    prompts = [*(config.prompt or ()), *(read_prompts(config.prompts) if config.prompts else ())]
    folder = Path(config.output_dir)
    files.check_writable(folder)
    repeated = [prompt for prompt in prompts for _ in range(config.num_images)]
    seeds = [config.seed + i for i in range(len(repeated))]
    num_chunks, cut, negative_cut = read_notes(config, prompts, "prompt", warn)
    whole = find_cut(config, prompts, num_chunks)  # without learned tokens, which take room of the tuned model's prompts
    of_all: dict[str, Any] = {"num_chunks": num_chunks} if num_chunks > 1 else {}
    of_all |= {"negative_prompt_cut_to": f"{negative_cut.num_tokens} tokens"} if negative_cut.prompts else {}
    images, written = sample(config, repeated, seeds), list[files.SampledImage]()
    first = files.next_number(folder)
    for name, drawn in images.items():
        labels = [
            {"system": name, "prompt": prompt, "seed": seed}
            | _cut_to(prompt, whole if name == BASE else cut)
            | of_all
            | _shown(config)
            for prompt, seed in zip(repeated, seeds, strict=True)
        ]
        paths = files.write_images(folder, drawn, labels, first, f"_{name}" if len(images) > 1 else "")
        written += [files.SampledImage(name, *item) for item in zip(repeated, seeds, paths, strict=True)]
    grid = folder / f"grid_{first + len(repeated) - 1:05d}.png"
    run.write_grid(grid, repeated, images)
    return written, grid


def _cut_to(prompt: str, cut: tokenization.Cut) -> dict[str, str]:
    """What an image's metadata says of a prompt whose end was not read."""
    return {"prompt_cut_to": f"{cut.num_tokens} tokens"} if prompt in cut.prompts else {}


def _shown(config: SampleConfig) -> dict[str, Any]:
    """What an image's metadata says of how it was drawn."""
    steps = next((system.adapter_steps for system in config.systems), None)
    names = ("model", "strength", "guidance_scale", "eta", "sampler", "num_inference_steps", "null_prompt")
    return {
        **{name: getattr(config, name) for name in names},
        **({"resolution": config.resolution} if config.resolution else {}),
        "adapter": ", ".join(config.adapter or ()), "unet": config.unet or "",
        "negative_prompt": config.negative_prompt or "",
        **changed_later_options(config),
        **({"adapter_steps": steps} if steps else {}),
    }  # fmt: skip


def tokenize(policy: Policy, prompts: Sequence[str]) -> Tensor:
    """Prompt ids (N, L) as `draw` takes them; (N, T, 2L) with their weights if the policy reads weights."""
    return models.tokenize_for(policy.model, prompts) if policy.null_ids is None else policy.tokenize_weighted(prompts)


def plain_texts(config: DrawConfig, prompts: Sequence[str]) -> list[str]:
    """Prompts without weights, if there may be weights; raises InputError for one that cannot be read."""
    return [tokenization.plain_text(prompt) for prompt in prompts] if config.prompt_weights else list(prompts)


def make_policy(model: models.Model, system: System, config: DrawConfig) -> Policy:
    """The policy that draws a system's images, in the steps that are its adapters' own; raises as `adapters.put_on`."""
    steps = system.adapter_steps if any(weight for _, weight in system.adapters) else None
    return Policy(adapters.put_on(model, system), replace(config, adapter_steps=steps))


def read_notes(
    config: DrawConfig, prompts: Sequence[str], option: str, warn: Callable[[str], None]
) -> tuple[int, tokenization.Cut, tokenization.Cut]:
    """Say what a user would not expect of prompts, by their option.

    Returns in how many chunks they are read, and what is cut of them and of the negative prompt.

    Raises:
        What `find_chunks` raises.
    """
    num_chunks = find_chunks(config, prompts)
    cut = find_cut(config, prompts, num_chunks, num_learned(config))
    negative_cut = find_cut(config, negative_prompts(config), num_chunks)  # learned tokens take no room in it
    notes = [(option, str(cut))] if cut.prompts else []
    if negative_cut.prompts:
        notes.append(("negative_prompt", f"it is cut to the {negative_cut.num_tokens} tokens that the text encoder reads"))
    notes += [(option, tokenization.chunks_note(num_chunks))] if num_chunks > 1 else []
    if foreign := world.foreign_note(config.model, plain_texts(config, prompts)):
        notes.append((option, foreign))
    for name, note in notes:
        warn(f"{name}: {note}")
    return num_chunks, cut, negative_cut


def find_cut(config: DrawConfig, prompts: Sequence[str], num_chunks: int = 1, num_learned: int = 0) -> tokenization.Cut:
    """The prompts whose end the text encoder does not read; raises as `find_chunks`."""
    readers = [replace(reader, num_chunks=num_chunks) for reader in models.open_readers(config.model, num_learned)]
    texts = counted_texts(config, prompts)
    cut = tokenization.find_cut(readers, list(itertools.chain(*texts.values())))
    found = [prompt for prompt, own in texts.items() if not set(own).isdisjoint(cut.prompts)]
    return replace(cut, prompts=found, num_prompts=len(texts))


def negative_prompts(config: DrawConfig) -> list[str]:
    """The negative prompt, if there is one."""
    return [config.negative_prompt] if config.negative_prompt else []


def num_learned(config: DrawConfig) -> int:
    """The most learned tokens that a system's prompts end in.

    Raises:
        InputError: prompts with them would be read in chunks, or with weights. What `lora_files.find_files` raises.
    """
    number = max((adapters.num_learned(system) for system in getattr(config, "systems", ())), default=0)
    for name, is_given in (("long_prompt", config.long_prompt == "chunk"), ("prompt_weights", config.prompt_weights)):
        if number and is_given:
            instead = "give --long-prompt cut" if name == "long_prompt" else "leave it out"
            raise InputError(f"{name}: prompts that end in learned tokens have neither chunks nor weights; {instead}")
    return number


def counted_texts(config: DrawConfig, prompts: Sequence[str]) -> dict[str, list[str]]:
    """The texts whose tokens are counted of each prompt: the prompt, or with weights what the steps read of it.

    Raises:
        InputError: weights in a prompt cannot be read, or not by this model. What `models.load_model` raises.
    """
    if not config.prompt_weights:
        return {prompt: [prompt] for prompt in prompts}
    tokenization.check_weighable(models.open_readers(config.model))
    return {prompt: tokenization.counted_texts(prompt, config.num_inference_steps) for prompt in prompts}


def find_chunks(config: DrawConfig, prompts: Sequence[str]) -> int:
    """In how many chunks prompts and the negative one are read; raises as `models.find_chunks` and `counted_texts`."""

    def chunks(asked: Sequence[str], num_learned: int) -> int:
        texts = list(itertools.chain(*counted_texts(config, asked).values()))
        return models.find_chunks(config.model, config.long_prompt, texts, num_learned)

    return max(chunks(prompts, num_learned(config)), chunks(negative_prompts(config), 0))


def load_model(config: DrawConfig, prompts: Sequence[str]) -> models.Model:
    """The model of a resolved configuration, on its device and in its precision, to draw prompts.

    Raises:
        What `models.load_model` and `models.find_chunks` raise.
    """
    models.check_clip_skip(config.model, config.clip_skip)
    num_chunks = find_chunks(config, prompts)
    stages.report("loading the model")
    model = models.load_model(config.model, default_device(), models.DTYPES[config.mixed_precision])
    return replace(model, num_chunks=num_chunks, clip_skip=config.clip_skip)


def draw(policy: Policy, prompt_ids: Tensor, seeds: Sequence[int], batch_size: int, stage: str = "") -> Tensor:
    """Images (N, 3, H, W) in [0, 1] of N prompts and seeds; each depends on its own prompt and seed alone.

    The ids are (N, L), or (N, T, 2L) with weights. Progress is reported under the name `stage`, if it has one.
    """
    images, device = [], policy.model.device
    for start in range(0, len(seeds), batch_size):
        if stage:
            stages.report(stage, start, len(seeds))
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds[start : start + batch_size]]
        images.append(policy.draw(prompt_ids[start : start + batch_size].to(device), generators).cpu())
    if stage:
        stages.report(stage, len(seeds), len(seeds))
    return torch.cat(images)


# --- an evaluation and its folder ---


@dataclass(frozen=True)
class Evaluation:
    """What is drawn and measured, and where it lies."""

    config: EvalConfig
    benchmark: Benchmark
    systems: list[System]  # the base first; of a sweep, every system at every strength

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def chunks(self) -> list[range]:
        """Prompts, by index, that are drawn and scored together."""
        num_prompts, size = len(self.benchmark.prompts), max(1, self.config.batch_size // self.config.num_images)
        return [range(start, min(start + size, num_prompts)) for start in range(0, num_prompts, size)]

    def seed(self, i: int, k: int) -> int:
        """Seed of the noise of prompt i's image k, the same for every system, whatever the other prompts and --limit."""
        text = f"{self.config.seed} {k} {self.benchmark.prompts[i]}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])  # JavaScript's numbers hold 53 bits

    def images(self, chunk: range) -> Iterator[tuple[int, int]]:
        """Prompt and number of each image of a chunk."""
        return itertools.product(chunk, range(self.config.num_images))

    def repeated_prompts(self, chunk: range) -> list[str]:
        """The prompt of each image of a chunk."""
        return [self.benchmark.prompts[i] for i, _ in self.images(chunk)]

    def image(self, system: System, i: int, k: int) -> Path:
        """Where an image lies in the folder."""
        return Path("images", system.name, f"{i:05d}_{k}.png")

    def is_drawn(self, system: System, chunk: range) -> bool:
        return all((self.folder / self.image(system, i, k)).is_file() for i, k in self.images(chunk))

    def read_images(self, system: System, chunk: range) -> Tensor:
        """Images (N, 3, H, W) of a chunk, as they lie in the folder: NaN where what was drawn is not finite.

        Raises:
            ArtifactError: one is damaged, or of another size than the others.
        """
        images: list[Tensor] = []
        for i, k in self.images(chunk):
            path = self.folder / self.image(system, i, k)
            pixels, labels = files.read_image(path)
            if images and pixels.shape != images[0].shape:
                raise ArtifactError(f"{path}: another size than the image before it; delete both to draw them anew")
            images.append(torch.full_like(pixels, torch.nan) if BROKEN in labels else pixels)
        return torch.stack(images)


def at_strengths(config: EvalConfig) -> Sequence[System]:
    """The systems, or each of them at each strength that is tried."""
    if not config.strengths:
        return config.systems
    return [scaled(system, strength) for system in config.systems for strength in config.strengths]


def scaled(system: System, strength: float) -> System:
    """A system with all its weights times a strength, and a name that says so."""
    adapters, unets = (
        tuple((path, weight * strength) for path, weight in terms) for terms in (system.adapters, system.unets)
    )
    return replace(system, name=f"{system.name}@{strength:g}", adapters=adapters, unets=unets)


# --- the folder ---


def write_settings(evaluation: Evaluation) -> dict[str, Any]:
    """Write down what decides the images, or check that the folder's images were made the same way; returns it.

    Raises:
        InputError: the folder holds images of something else. OSError: storage.
    """
    path, settings = evaluation.folder / SETTINGS, describe(evaluation)
    kept = read_json(path) if path.is_file() else settings
    check_same(evaluation.folder, kept, settings)
    with reading(f"{path}: not the settings of an evaluation", InputError):
        systems = dict(kept.get("systems", {}))
        for name, system in settings["systems"].items():
            if _without_paths(systems.setdefault(name, system)) != _without_paths(system):
                raise InputError(
                    f"output_dir: {str(evaluation.folder)!r} holds another system called {name}; choose another of them"
                )
    files.write_json(path, settings | {"systems": systems})
    files.remove_temporaries(evaluation.folder, "images/*/")
    return settings


def describe(evaluation: Evaluation) -> dict[str, Any]:
    """All settings that decide the images."""
    config = evaluation.config
    return {
        **describe_drawing(config, evaluation.benchmark),
        "model_revision": models.revision(config.model),
        "device": default_device(),
        "versions": run.versions(),
        "systems": describe_systems(evaluation.systems),
    }


def describe_systems(systems: Sequence[System]) -> dict[str, Any]:
    """Adapters and U-Nets of each system by name: paths as they were given, weights, and SHA-256 of the files.

    The steps in which the adapters are on are there if those are not all.
    """
    sums: dict[tuple[str, str], list[str]] = {}  # a sweep has the same files in every system
    readers = {"adapters": adapters.adapter_files, "unets": adapters.unet_files}

    def terms(kind: str, given: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
        for path, _ in given:
            if (kind, path) not in sums:
                sums[kind, path] = [files.sha256(file) for file in readers[kind](Path(path))]
        return [{"path": path, "weight": weight, "sha256": sums[kind, path]} for path, weight in given]

    return {
        system.name: {"adapters": terms("adapters", system.adapters), "unets": terms("unets", system.unets)}
        | ({"adapter_steps": system.adapter_steps} if system.adapter_steps else {})
        for system in systems
    }


def _overwrite(evaluation: Evaluation) -> models.Model:
    """Remove the evaluation in the folder, once it is clear that its systems can be drawn anew; returns the model for that.

    Raises:
        InputError: there is something else in the folder. What `load_model` and `adapters.put_on` raise.
    """
    files.check_written(evaluation.folder, WRITTEN)
    model = load_model(evaluation.config, evaluation.benchmark.prompts)
    for system in evaluation.config.systems:  # once each: a sweep's strengths use the same files
        make_policy(model, system, evaluation.config)
    files.remove_written(evaluation.folder, WRITTEN)
    return model


def describe_trainings(systems: Sequence[System]) -> dict[str, str]:
    """How the adapters of systems were trained, by their paths, where their folders are those of trainings.

    Raises:
        InputError: a file in such a folder is damaged.
    """
    folders = {path for system in systems for path, _ in system.adapters if run.is_run(Path(path))}
    return {folder: run.describe_training(Path(folder)) for folder in sorted(folders)}


def shortest_command(config: EvalConfig) -> str:
    """The command of an evaluation, without the options that follow from the others."""
    config = replace(config, overwrite=False)  # typed again, it is to go on
    given = {item.name: getattr(config, item.name) for item in option_fields(EvalConfig)}
    for name in list(given):
        fewer = {other: value for other, value in given.items() if other != name}
        with contextlib.suppress(InputError):
            if replace(resolve_eval(EvalOptions(**fewer)), origins=config.origins) == config:
                given = fewer
    words = ["texforce", "eval"]
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        elif value is not None:
            texts = value if isinstance(value, list | tuple) else [value]
            words += [word for text in texts for word in (f"--{flag}", str(text))]
    return shlex.join(words)


def _without_paths(described: dict[str, Any]) -> Any:
    """A description without its paths: a folder may have moved."""
    pathless = {kind: [term | {"path": ""} for term in described[kind]] for kind in ("adapters", "unets")}
    return described | pathless


class ScoreFile:
    """The scores there are, by system, measure and first prompt of a chunk: a line of the file for each."""

    def __init__(self, path: Path) -> None:
        self.path, lines = path, files.read_lines(path)
        with reading(f"{path}: not the scores of an evaluation", InputError):
            self.scores = {(line["system"], line["measure"], line["start"]): line["scores"] for line in lines}

    def __contains__(self, key: tuple[str, str, int]) -> bool:
        return key in self.scores

    def add(self, system: str, measure: str, start: int, scores: Tensor) -> None:
        values = self.scores[system, measure, start] = measures.to_json(scores)
        files.append_line(self.path, {"system": system, "measure": measure, "start": start, "scores": values})

    def table(self, system: str, measure: str, chunks: Sequence[range], per_prompt: int) -> np.ndarray:
        """All scores (P, K) of a system by a measure, K = `per_prompt`.

        Raises:
            InputError: the file holds something else for a chunk than its scores; names the file and what to remove.
        """
        scores: list[float | None] = []
        for chunk in chunks:
            found = self.scores[system, measure, chunk.start]
            numbers = isinstance(found, list) and all(type(value) in (int, float, type(None)) for value in found)
            if not numbers or len(found) != len(chunk) * per_prompt:
                raise InputError(
                    f"{self.path}: the line of system {system!r}, measure {measure!r} and start {chunk.start} must hold "
                    f"{len(chunk) * per_prompt} scores; remove the line, and they are measured again"
                )
            scores += found
        with reading(f"{self.path}: the scores of system {system!r} by {measure!r}", InputError):
            return measures.to_numpy(scores).reshape(-1, per_prompt)


# --- evaluation ---


def evaluate(config: EvalConfig, warn: Callable[[str], None] = lambda message: None) -> dict[str, Any]:
    """Draw a benchmark with the base model and others by a resolved configuration, measure it, and write what was found.

    Returns the results, which `results.json` holds; `report.html` shows them.

    Raises:
        NotFoundError, InputError: bad input. ArtifactError: a refused file. RewardError: a scorer failed.
        OSError: storage.
    """
    start = time.perf_counter()
    if not config.systems:
        warn("adapter: none is given, so the base model alone is measured")
    benchmark = read_benchmark(config.benchmark).limited(config.limit)
    evaluation = Evaluation(config, benchmark, [System(BASE), *at_strengths(config)])
    sources = check(evaluation)
    trainings = describe_trainings(evaluation.systems)
    num_chunks, cut, negative_cut = read_notes(config, benchmark.prompts, "benchmark", warn)
    with files.locked(evaluation.folder, lambda: check_folder(evaluation.folder)):
        model = _overwrite(evaluation) if config.overwrite else None
        settings = write_settings(evaluation)
        draw_missing(evaluation, model)
        scores = score(evaluation, sources)
        about = {"commit": run.commit(), "rewards": sources, "num_tokens": cut.num_tokens, "prompts_cut": cut.prompts}
        about |= {"negative_prompt_cut_to": negative_cut.num_tokens} if negative_cut.prompts else {}
        about |= {"num_chunks": num_chunks} if config.long_prompt != "cut" else {}
        results = settings | about | summarise(evaluation, scores, settings["systems"])
        results |= {"command": shortest_command(config), "trainings": trainings}
        results["timings"] = {"seconds": time.perf_counter() - start, "date": report.now()}
        files.write_json(evaluation.folder / "results.json", results)
        write_csv(evaluation, scores)
        report.write(evaluation.folder, results)
    return results


def check(evaluation: Evaluation) -> dict[str, Any]:
    """Find bad input before anything is drawn; returns what each reward measures by: its weights, and how it is fed.

    Raises:
        NotFoundError, InputError: a reward, adapter, model or folder cannot be used.
    """
    config = evaluation.config
    check_inputs(config, evaluation.benchmark)
    reward_specs.check_prompts(config.measures, plain_texts(config, evaluation.benchmark.prompts))
    if config.overwrite or not (evaluation.folder / SCORES).is_file():  # else its scores may be there
        for spec in config.measures:
            rewards.check_servers(spec)
    for system in evaluation.systems:
        adapters.check_inputs(system)
    checkpoints = _checkpoints(config)
    models.check_clip_skip(config.model, config.clip_skip)
    models.find_model(config.model)
    for spec in config.measures:
        rewards.check_loadable(spec, checkpoints)
    exact = [spec for spec in config.measures if config.exact_preprocessing and reward_specs.resizes(spec)]
    how = {spec: {"preprocessing": "exact"} if spec in exact else {} for spec in config.measures}
    return {spec: rewards.locate(spec, checkpoints) | how[spec] for spec in config.measures}


# --- drawing ---


def draw_missing(evaluation: Evaluation, model: models.Model | None = None) -> None:
    """Draw the images that are not there yet; the model is loaded if it is not given and there are any."""
    for system in evaluation.systems:
        missing = [chunk for chunk in evaluation.chunks if not evaluation.is_drawn(system, chunk)]
        if missing:
            model = model or load_model(evaluation.config, evaluation.benchmark.prompts)
            policy = make_policy(model, system, evaluation.config)
            for n, chunk in enumerate(missing):
                done = len(evaluation.chunks) - len(missing) + n
                stages.report(f"drawing {system.name}", done, len(evaluation.chunks))
                _draw_chunk(evaluation, system, chunk, policy)
        stages.report(f"drawing {system.name}", len(evaluation.chunks), len(evaluation.chunks))


def _draw_chunk(evaluation: Evaluation, system: System, chunk: range, policy: Policy) -> None:
    """Draw the images of some prompts, always the same ones at once, since their number decides how sums are rounded."""
    prompts = evaluation.repeated_prompts(chunk)
    seeds = [evaluation.seed(i, k) for i, k in evaluation.images(chunk)]
    drawn = draw(policy, tokenize(policy, prompts), seeds, evaluation.config.batch_size)
    for image, prompt, seed, (i, k) in zip(drawn, prompts, seeds, evaluation.images(chunk), strict=True):
        path = evaluation.folder / evaluation.image(system, i, k)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            broken = {} if image.isfinite().all() else {BROKEN: "yes"}
            files.write_image(path, image, {"system": system.name, "prompt": prompt, "seed": seed} | broken)


# --- scoring ---


def score(evaluation: Evaluation, sources: dict[str, Any]) -> Scores:
    """The scores of every system by measure; where a prompt has several images, their diversity as well.

    The diversity is measured on the image features of the first reward that has features.

    Raises:
        RewardError: a scorer failed, or gave no finite score.
    """
    config, kept, chunks = evaluation.config, ScoreFile(evaluation.folder / SCORES), evaluation.chunks
    scores: Scores = {system.name: {} for system in evaluation.systems}
    featured = next((spec for spec in sources if reward_specs.has_features(spec)), None) if config.num_images > 1 else None
    keys = {spec: _key(spec, source) for spec, source in sources.items()}
    for spec in sources:
        wanted = [keys[spec], *([f"{DIVERSITY} {keys[spec]}"] if spec == featured else [])]
        load = functools.cache(functools.partial(_load_reward, config, spec))  # only if a score is missing
        for system in evaluation.systems:
            for n, chunk in enumerate(chunks):
                stages.report(f"{spec} of {system.name}", n, len(chunks))
                missing = [key for key in wanted if (system.name, key, chunk.start) not in kept]
                for key, values in _measure(evaluation, system, chunk, missing, load):
                    kept.add(system.name, key, chunk.start, values)
            stages.report(f"{spec} of {system.name}", len(chunks), len(chunks))
            scores[system.name][spec] = kept.table(system.name, keys[spec], chunks, config.num_images)
            if not np.isfinite(scores[system.name][spec]).any():
                raise RewardError(f"reward: {spec} gave no finite score for any image of {system.name}")
    if featured is not None:
        for name in scores:
            scores[name][DIVERSITY] = kept.table(name, f"{DIVERSITY} {keys[featured]}", chunks, per_prompt=1)
    return scores


def _measure(
    evaluation: Evaluation, system: System, chunk: range, keys: Sequence[str], load: Callable[[], rewards.Mixture]
) -> Iterator[tuple[str, Tensor]]:
    """The scores by each key of a system's images of a chunk; the reward is loaded only if there is a key."""
    if keys:
        reward, images = load(), evaluation.read_images(system, chunk).to(default_device())
        prompts = evaluation.repeated_prompts(chunk)
        for key in keys:
            if key.startswith(DIVERSITY):
                yield key, _diversity(reward, images, prompts)
            else:
                yield key, scorers.score(reward, images, plain_texts(evaluation.config, prompts))


def _key(spec: str, source: dict[str, Any]) -> str:
    """The name of a reward's scores in the file, which changes with its weights."""
    text = json.dumps([source, __version__])
    return f"{spec} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _checkpoints(config: EvalConfig) -> dict[str, str | Path]:
    """The rewards' weights that do not come from the hub."""
    return reward_specs.checkpoints_for(config.model, config.reward_checkpoint, config.measures)


def _load_reward(config: EvalConfig, spec: str) -> rewards.Mixture:
    reward = rewards.load_reward(spec, default_device(), _checkpoints(config), timeout=config.reward_timeout)
    if config.exact_preprocessing:
        reward.preprocess_exactly()
    return reward


def _diversity(reward: rewards.Mixture, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Diversity (P,) of the images (N, 3, H, W) of P prompts, those of a prompt side by side."""
    num_prompts = len(dict.fromkeys(prompts))
    return measures.diversity(reward.image_features(images).reshape(num_prompts, len(prompts) // num_prompts, -1))


# --- results ---


def summarise(evaluation: Evaluation, scores: Scores, described: dict[str, Any]) -> dict[str, Any]:
    """The results of each system; in a sweep at its best strength, on the half of the prompts that did not choose it."""
    config, categories = evaluation.config, evaluation.benchmark.categories
    validation = measures.split_halves(categories) if config.strengths else np.zeros(len(categories), bool)
    sweeps = _sweep(evaluation, scores, validation) if config.strengths else {}
    strengths = {BASE: 1.0} | {system.name: sweeps[system.name]["best"] if sweeps else 1.0 for system in config.systems}
    drawn = {BASE: BASE} | {
        system.name: scaled(system, strengths[system.name]).name if sweeps else system.name for system in config.systems
    }
    summaries = _on_prompts({name: scores[drawn[name]] for name in drawn}, ~validation, categories, config.seed)
    systems = {
        name: described[drawn[name]]
        | {"strength": strengths[name], "images": f"images/{drawn[name]}", "measures": summaries[name]}
        | {"scores": scores_to_json(scores[drawn[name]])}
        for name in drawn
    }
    return {
        "confidence": measures.CONFIDENCE,
        "num_resamples": measures.NUM_RESAMPLES,
        "num_prompts_measured": int((~validation).sum()),
        "systems": systems,
        "strengths": sweeps,
        "prompts": [
            {"prompt": evaluation.benchmark.prompts[i], "category": categories[i], "validation": bool(validation[i])}
            | {"seeds": [evaluation.seed(i, k) for k in range(config.num_images)]}
            for i in range(len(categories))
        ],
    }


def scores_to_json(scores: dict[str, np.ndarray]) -> dict[str, list[list[float | None]]]:
    return {measure: [measures.to_json(row) for row in table] for measure, table in scores.items()}


def _on_prompts(scores: Scores, rows: np.ndarray, categories: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """`measures.summarise` of some of the prompts."""
    chosen = {name: {measure: table[rows] for measure, table in tables.items()} for name, tables in scores.items()}
    return measures.summarise(chosen, BASE, [category for category, row in zip(categories, rows, strict=True) if row], seed)


def _sweep(evaluation: Evaluation, scores: Scores, validation: np.ndarray) -> dict[str, Any]:
    """Every strength's figures on the validation half, and the best by the first reward, for each system."""
    config, first = evaluation.config, evaluation.config.measures[0]
    summaries = _on_prompts(scores, validation, [""] * len(validation), config.seed)
    sweeps: dict[str, Any] = {}
    for system in config.systems:
        names = [scaled(system, strength).name for strength in config.strengths]
        curve = [
            {"strength": strength, "measures": summaries[name], "scores": scores_to_json(scores[name])}
            for strength, name in zip(config.strengths, names, strict=True)
        ]
        means = [summaries[name][first]["mean"] for name in names]
        best = max(range(len(curve)), key=lambda n: -np.inf if means[n] is None else means[n])
        sweeps[system.name] = {"chosen_by": first, "best": config.strengths[best], "curve": curve}
    return sweeps


def as_text(cell: str) -> str:
    """A cell that spreadsheets show as it is: with an apostrophe before what they would compute."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell


def write_csv(evaluation: Evaluation, scores: Scores) -> None:
    """`results.csv`: a row for every image, with its scores."""
    text = io.StringIO()
    names = list(scores[BASE])
    table = csv.writer(text)  # its line ends are RFC 4180's; with others a lone carriage return would end a row
    table.writerow(["system", "prompt", "category", "seed", "image", *map(as_text, names)])
    for system in evaluation.systems:
        for i, k in evaluation.images(range(len(evaluation.benchmark.prompts))):
            own = [scores[system.name][name] for name in names]
            cells = [values[i, min(k, values.shape[1] - 1)] for values in own]  # diversity has one number a prompt
            texts = (system.name, evaluation.benchmark.prompts[i], evaluation.benchmark.categories[i])
            about = [*map(as_text, texts), evaluation.seed(i, k)]
            image = evaluation.image(system, i, k).as_posix()
            table.writerow([*about, image, *("" if np.isnan(cell) else repr(float(cell)) for cell in cells)])
    files.write_text(evaluation.folder / "results.csv", text.getvalue())
