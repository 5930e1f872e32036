"""Base and tuned from the same noise: images of any prompts, and benchmarks with what is measured on them.

`texforce eval` reads top to bottom: images, scores, statistics, results. Whatever is finished lies in the output folder, and
an evaluation that is started there again goes on from it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import texforce
from texforce import adapters, checkpoints, lora, measures, record, report, rewards, sampler, scorers
from texforce.config import default_device, read_json
from texforce.config_inference import BASE, DrawConfig, EvalConfig, SampleConfig, System
from texforce.prompt_sets import Benchmark, read_benchmark

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much
DIVERSITY = "diversity"
SETTINGS, SCORES = "settings.json", "scores.jsonl"


# --- images ---


def sample(config: SampleConfig, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Tensor]:
    """Images (N, 3, H, W) in [0, 1] of N prompts and seeds by a resolved configuration: `tuned`, and `base` for comparison.

    Raises:
        FileNotFoundError, ValueError: bad input. ArtifactError: a refused adapter. DivergedError: no image is finite.
    """
    for system in config.systems:
        adapters.check_inputs(system)  # a mistyped folder must not wait for the model
    models = load_models(config)
    prompt_ids = sampler.tokenize(models.tokenizer, prompts)
    systems = {system.name: adapters.put_on(models, system) for system in config.systems}
    if config.compare or not systems:
        systems = {BASE: models} | systems
    return {name: texforce.check_finite(painter(put, config)(prompt_ids, seeds)) for name, put in systems.items()}


def load_models(config: DrawConfig) -> sampler.Models:
    return sampler.load_models(config.model, default_device(), getattr(torch, texforce.DTYPES[config.mixed_precision]))


def painter(models: sampler.Models, config: DrawConfig) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """A function that draws images (N, 3, H, W) of prompt ids (N, L) and N seeds."""
    policy = texforce.Policy(models, config.null_prompt)
    schedule = sampler.ddim_schedule(models.scheduler, config.num_inference_steps, config.eta).to(models.device)
    denoiser = sampler.Denoiser(models.unet, schedule, config.guidance_scale, config.compile)
    return lambda prompt_ids, seeds: sampler.sample_images(
        models, denoiser, prompt_ids, seeds, config.batch_size, config.resolution, policy.null_embeds
    )


# --- evaluation ---


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
        """Of the noise of prompt i's image k, for every system; other prompts and --limit have no say in it."""
        text = f"{self.config.seed} {k} {self.benchmark.prompts[i]}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])  # JavaScript's numbers hold 53 bits

    def image(self, system: System, i: int, k: int) -> Path:
        """Where an image lies in the folder."""
        return Path("images", system.name, f"{i:05d}_{k}.png")

    def images(self, chunk: range) -> Iterator[tuple[int, int]]:
        return itertools.product(chunk, range(self.config.num_images))


def evaluate(config: EvalConfig, progress: Progress = lambda stage, done, total: None) -> dict[str, Any]:
    """Draw a benchmark with the base model and others by a resolved configuration, measure it, and write what was found.

    Returns the results, which `results.json` holds; `report.html` shows them.

    Raises:
        FileNotFoundError, ValueError: bad input. ArtifactError: a refused file. RewardError: a scorer failed.
        OSError: storage.
    """
    start = time.perf_counter()
    benchmark = read_benchmark(config.benchmark).limited(config.limit)
    for spec in config.measures:
        rewards.check_reward(spec)
    rewards.check_prompts(config.measures, benchmark.prompts)
    for system in config.systems:
        adapters.check_inputs(system)
    if config.strengths and len(benchmark.prompts) < 2:
        raise ValueError("strength: the best is told on another half of the prompts, so there must be two at least")
    evaluation = Evaluation(config, benchmark, [System(BASE), *_at_strengths(config)])
    record.check_writable(evaluation.folder)
    sources = _sources(config)
    settings = _claim_folder(evaluation)
    drawing = _draw(evaluation, progress)
    scores = _score(evaluation, sources, progress)
    results = {**settings, "versions": record.versions(), "commit": record.commit(), "rewards": sources}
    results |= _summary(evaluation, scores, settings["systems"])
    results["timings"] = {"images_per_s": drawing, "seconds": time.perf_counter() - start}
    record.write_json(evaluation.folder / "results.json", results)
    _write_csv(evaluation, scores)
    report.write(evaluation.folder, results)
    return results


def _at_strengths(config: EvalConfig) -> list[System]:
    """The systems, or each of them at each strength that is tried."""
    if not config.strengths:
        return config.systems
    return [_scaled(system, strength) for system in config.systems for strength in config.strengths]


def _scaled(system: System, strength: float) -> System:
    adapters, unets = (
        tuple((path, weight * strength) for path, weight in terms) for terms in (system.adapters, system.unets)
    )
    return System(f"{system.name}@{strength:g}", adapters, unets)


def _sources(config: EvalConfig) -> dict[str, Any]:
    """Which weights each reward takes."""
    given = rewards.parse_checkpoints(config.reward_checkpoint or (), config.measures)
    embedded = config.model == "tiny"
    return {spec: rewards.describe_weights(spec, given, embedded) for spec in config.measures}


# --- the folder ---


def _claim_folder(evaluation: Evaluation) -> dict[str, Any]:
    """Write down what is drawn, or see that what lies in the folder is of the same.

    Raises:
        ValueError: the folder holds something else. OSError: it cannot be written to.
    """
    folder, path = evaluation.folder, evaluation.folder / SETTINGS
    settings = _describe(evaluation)
    if path.is_file():
        kept = read_json(path)
        for name, value in settings.items():
            if name != "systems" and kept.get(name) != value:
                raise ValueError(
                    f"output_dir: {str(folder)!r} holds another evaluation, of {name} {_short(kept.get(name))} and not "
                    f"{_short(value)}; choose another folder"
                )
        for name, system in settings["systems"].items():
            if kept["systems"].setdefault(name, system) != system:
                raise ValueError(f"output_dir: {name} in {str(folder)!r} is another one; choose another name or folder")
        record.write_json(path, kept)
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"output_dir: {str(folder)!r} is not empty and holds no evaluation; choose another folder")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        record.write_json(path, settings)
    for orphan in folder.rglob("*.tmp"):  # of a writing that was cut off
        orphan.unlink()
    return settings


def _short(value: Any) -> str:
    return json.dumps(value)[:60]


def _describe(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that decides the images."""
    config, benchmark = evaluation.config, evaluation.benchmark
    names = (
        "model", "num_inference_steps", "eta", "guidance_scale", "null_prompt", "resolution", "mixed_precision",
        "num_images", "batch_size", "seed",
    )  # fmt: skip
    about = {"name": benchmark.name, "num_prompts": len(benchmark.prompts), "sha256": benchmark.sha256}
    return {
        "benchmark": about | benchmark.source,
        **{name: getattr(config, name) for name in names},
        "model_revision": sampler.revision(config.model),
        "device": default_device(),
        "systems": {system.name: _describe_system(system) for system in evaluation.systems},
    }


def _describe_system(system: System) -> dict[str, Any]:
    def files(kind: str, path: str) -> list[Path]:
        whole = [file for file in (adapters.unet_file(Path(path)), adapters.unet_file(Path(path) / "unet")) if file]
        return whole[:1] if kind == "unets" and whole else [found.path for found in lora.find_files(Path(path))]

    return {
        kind: [
            {"path": path, "weight": weight, "sha256": [checkpoints.sha256(file) for file in files(kind, path)]}
            for path, weight in terms
        ]
        for kind, terms in (("adapters", system.adapters), ("unets", system.unets))
    }


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; what a writing that was cut off left of its last one is taken away."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    if whole.encode() != path.read_bytes():
        record.write_text(path, whole)
    return lines


# --- drawing ---


def _draw(evaluation: Evaluation, progress: Progress) -> dict[str, float | None]:
    """Draw what is not there yet; images a second of each system, over all that this folder has seen drawn."""
    path = evaluation.folder / "speed.jsonl"
    models = None
    for system in evaluation.systems:
        missing = [chunk for chunk in evaluation.chunks if not _is_drawn(evaluation, system, chunk)]
        if missing:
            models = models or load_models(evaluation.config)
            paint = painter(adapters.put_on(models, system), evaluation.config)
            for n, chunk in enumerate(missing):
                progress(f"drawing {system.name}", len(evaluation.chunks) - len(missing) + n, len(evaluation.chunks))
                start = time.perf_counter()
                _draw_chunk(evaluation, system, chunk, models.tokenizer, paint)
                spent = {"system": system.name, "images": len(chunk) * evaluation.config.num_images}
                with path.open("a") as file:
                    file.write(json.dumps(spent | {"seconds": time.perf_counter() - start}) + "\n")
        progress(f"drawing {system.name}", len(evaluation.chunks), len(evaluation.chunks))
    drawn = _read_lines(path)
    speeds: dict[str, float | None] = {}
    for system in evaluation.systems:
        own = [line for line in drawn if line["system"] == system.name]
        speeds[system.name] = sum(line["images"] for line in own) / sum(line["seconds"] for line in own) if own else None
    return speeds


def _is_drawn(evaluation: Evaluation, system: System, chunk: range) -> bool:
    return all((evaluation.folder / evaluation.image(system, i, k)).is_file() for i, k in evaluation.images(chunk))


def _draw_chunk(evaluation: Evaluation, system: System, chunk: range, tokenizer: Any, paint: Callable[..., Tensor]) -> None:
    """Draw the images of some prompts, always the same ones at once, since their number decides how sums are rounded."""
    prompts = [evaluation.benchmark.prompts[i] for i, _ in evaluation.images(chunk)]
    seeds = [evaluation.seed(i, k) for i, k in evaluation.images(chunk)]
    drawn = paint(sampler.tokenize(tokenizer, prompts, truncation=True), seeds)
    for image, prompt, seed, (i, k) in zip(drawn, prompts, seeds, evaluation.images(chunk), strict=True):
        path = evaluation.folder / evaluation.image(system, i, k)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            broken = {} if image.isfinite().all() else {BROKEN: "yes"}
            record.write_image(path, image, {"system": system.name, "prompt": prompt, "seed": seed} | broken)


BROKEN = "not finite"  # in a PNG's metadata: the image holds no numbers to be scored


def _read_chunk(evaluation: Evaluation, system: System, chunk: range) -> Tensor:
    """Images (N, 3, H, W) of some prompts, as they lie in the folder: NaN where what was drawn is not finite.

    Raises:
        ArtifactError: one is damaged.
    """
    images = []
    for i, k in evaluation.images(chunk):
        pixels, labels = record.read_image(evaluation.folder / evaluation.image(system, i, k))
        images.append(torch.full_like(pixels, torch.nan) if BROKEN in labels else pixels)
    return torch.stack(images)


# --- scoring ---


class ScoreFile:
    """The scores there are, by system, measure and first prompt of a chunk: a line of the file for each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scores = {(line["system"], line["measure"], line["start"]): line["scores"] for line in _read_lines(path)}

    def add(self, system: str, measure: str, start: int, scores: Tensor) -> None:
        values = self.scores[system, measure, start] = measures.to_json(scores)
        with self.path.open("a") as file:
            file.write(json.dumps({"system": system, "measure": measure, "start": start, "scores": values}) + "\n")

    def table(self, system: str, measure: str, chunks: Sequence[range]) -> np.ndarray:
        """All scores (P, K) of a system by a measure."""
        scores = itertools.chain.from_iterable(self.scores[system, measure, chunk.start] for chunk in chunks)
        return measures.to_numpy(list(scores)).reshape(chunks[-1].stop, -1)


def _score(evaluation: Evaluation, sources: dict[str, Any], progress: Progress) -> dict[str, dict[str, np.ndarray]]:
    """Scores (P, K) of every system by measure, and where a prompt has several images their diversity (P, 1).

    The diversity is that of the image features of the first reward that has such.

    Raises:
        RewardError: a scorer failed, or gave no finite score.
    """
    kept, chunks = ScoreFile(evaluation.folder / SCORES), evaluation.chunks
    scores: dict[str, dict[str, np.ndarray]] = {system.name: {} for system in evaluation.systems}
    distances: dict[str, np.ndarray] = {}
    for spec, source in sources.items():
        # What a score is called in the file tells its weights, so that those of other ones are not taken for it.
        key = f"{spec} {hashlib.sha256(json.dumps(source).encode()).hexdigest()[:16]}"
        reward, wants_diversity = None, evaluation.config.num_images > 1 and not distances
        for system in evaluation.systems:
            for n, chunk in enumerate(chunks):
                progress(f"{spec} of {system.name}", n, len(chunks))
                if (system.name, key, chunk.start) not in kept.scores:
                    reward = reward or _load_reward(evaluation.config, spec)
                    _score_chunk(evaluation, system, chunk, reward, key, wants_diversity, kept)
            progress(f"{spec} of {system.name}", len(chunks), len(chunks))
            scores[system.name][spec] = kept.table(system.name, key, chunks)
            if not np.isfinite(scores[system.name][spec]).any():
                raise scorers.RewardError(f"reward: {spec} gave no finite score for any image of {system.name}")
        if wants_diversity and (BASE, f"{DIVERSITY} {key}", 0) in kept.scores:
            distances = {name: kept.table(name, f"{DIVERSITY} {key}", chunks) for name in scores}
    for name, table in distances.items():
        scores[name][DIVERSITY] = table
    return scores


def _load_reward(config: EvalConfig, spec: str) -> rewards.Mixture:
    given = rewards.parse_checkpoints(config.reward_checkpoint or (), config.measures)
    own = {name: path for name, path in given.items() if name in rewards.weights_of(spec)}
    return rewards.load_reward(spec, default_device(), own, config.model == "tiny", timeout=config.reward_timeout)


def _score_chunk(
    evaluation: Evaluation,
    system: System,
    chunk: range,
    reward: rewards.Mixture,
    key: str,
    wants_diversity: bool,
    kept: ScoreFile,
) -> None:
    images = _read_chunk(evaluation, system, chunk).to(default_device())
    prompts = [evaluation.benchmark.prompts[i] for i, _ in evaluation.images(chunk)]
    if wants_diversity and (features := reward.image_features(images)) is not None:
        distances = measures.diversity(features.reshape(len(chunk), evaluation.config.num_images, -1))
        kept.add(system.name, f"{DIVERSITY} {key}", chunk.start, distances)
    kept.add(system.name, key, chunk.start, scorers.score(reward, images, prompts))


# --- results ---


def _summary(evaluation: Evaluation, scores: dict[str, dict[str, np.ndarray]], described: dict[str, Any]) -> dict[str, Any]:
    """What is told of each system; of a sweep at its best strength, on the half of the prompts that did not choose it."""
    config, benchmark = evaluation.config, evaluation.benchmark
    validation = measures.split_halves(benchmark.categories) if config.strengths else np.zeros(len(benchmark.prompts), bool)
    sweeps = _sweep(evaluation, scores, validation) if config.strengths else {}
    variants = {BASE: System(BASE)} | {system.name: system for system in config.systems}
    strengths = {name: sweeps[name]["best"] if name in sweeps else 1.0 for name in variants}
    drawn = {name: _scaled(system, strengths[name]).name if name in sweeps else name for name, system in variants.items()}
    told = _summarise({name: scores[drawn[name]] for name in variants}, ~validation, benchmark.categories, config.seed)
    prompts = [
        {"prompt": prompt, "category": category, "seeds": [evaluation.seed(i, k) for k in range(config.num_images)]}
        for i, (prompt, category) in enumerate(zip(benchmark.prompts, benchmark.categories, strict=True))
    ]
    for prompt, chooses in zip(prompts, validation.tolist(), strict=True):
        prompt["validation"] = chooses
    systems = {
        name: described[drawn[name]]
        | {"strength": strengths[name], "images": f"images/{drawn[name]}", "measures": told[name]}
        | {"scores": {measure: [measures.to_json(row) for row in table] for measure, table in scores[drawn[name]].items()}}
        for name in variants
    }
    return {
        "confidence": measures.CONFIDENCE,
        "num_resamples": measures.NUM_RESAMPLES,
        "num_prompts_told": int((~validation).sum()),
        "systems": systems,
        "strengths": sweeps,
        "prompts": prompts,
    }


def _summarise(
    scores: dict[str, dict[str, np.ndarray]], rows: np.ndarray, categories: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    """`measures.summarise` of some of the prompts."""
    chosen = {name: {measure: table[rows] for measure, table in tables.items()} for name, tables in scores.items()}
    return measures.summarise(chosen, BASE, [category for category, row in zip(categories, rows, strict=True) if row], seed)


def _sweep(evaluation: Evaluation, scores: dict[str, dict[str, np.ndarray]], validation: np.ndarray) -> dict[str, Any]:
    """Every strength's figures on the validation half, and the best by the first reward, for each system."""
    config, first = evaluation.config, evaluation.config.measures[0]
    told = _summarise(scores, validation, [""] * len(validation), config.seed)
    sweeps: dict[str, Any] = {}
    for system in config.systems:
        variants = [told[_scaled(system, strength).name] for strength in config.strengths]
        curve = [{"strength": s, "measures": variant} for s, variant in zip(config.strengths, variants, strict=True)]
        means = [variant[first]["mean"] for variant in variants]
        best = max(range(len(curve)), key=lambda n: -np.inf if means[n] is None else means[n])
        sweeps[system.name] = {"chosen_by": first, "best": config.strengths[best], "curve": curve}
    return sweeps


def _write_csv(evaluation: Evaluation, scores: dict[str, dict[str, np.ndarray]]) -> None:
    """A row for every image, with its scores."""
    text = io.StringIO()
    names = list(scores[BASE])
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["system", "prompt", "category", "seed", "image", *names])
    for system in evaluation.systems:
        for i, k in evaluation.images(range(len(evaluation.benchmark.prompts))):
            own = [scores[system.name][name] for name in names]
            cells = [values[i, min(k, values.shape[1] - 1)] for values in own]  # diversity has one number a prompt
            prompt, category = evaluation.benchmark.prompts[i], evaluation.benchmark.categories[i]
            about = [system.name, prompt, category, evaluation.seed(i, k), evaluation.image(system, i, k).as_posix()]
            table.writerow([*about, *("" if np.isnan(cell) else repr(float(cell)) for cell in cells)])
    record.write_text(evaluation.folder / "results.csv", text.getvalue())
