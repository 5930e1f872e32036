"""Base and tuned from the same noise: images of any prompts, and benchmarks with what is measured on them.

`texforce eval` reads top to bottom: images, scores, statistics, results. Whatever is finished lies in the output folder, and
an evaluation that is started there again goes on from it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import texforce
from texforce import adapters, evaluation, experience, measures, pipelines, record, report, rewards, sampler, scorers
from texforce.config import default_device
from texforce.config_inference import BASE, DrawConfig, EvalConfig, SampleConfig, System
from texforce.evaluation import Evaluation, ScoreFile
from texforce.prompt_sets import read_benchmark

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much
Scores = dict[str, dict[str, np.ndarray]]  # (P, K) by system and measure; of the diversity (P, 1)
DIVERSITY = "diversity"


# --- images ---


def sample(config: SampleConfig, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Tensor]:
    """Images (N, 3, H, W) in [0, 1] of N prompts and seeds by a resolved configuration: `tuned`, and `base` for comparison.

    Raises:
        FileNotFoundError, ValueError: bad input. ArtifactError: a refused adapter. DivergedError: no image is finite.
    """
    for system in config.systems:
        adapters.check_inputs(system)  # a mistyped folder must not wait for the model
    models = load_models(config)
    prompt_ids = pipelines.tokenize_for(models, prompts)
    systems = {system.name: adapters.put_on(models, system) for system in config.systems}
    if config.compare or not systems:
        systems = {BASE: models} | systems
    return {name: experience.check_finite(painter(put, config)(prompt_ids, seeds)) for name, put in systems.items()}


def load_models(config: DrawConfig) -> pipelines.Models:
    """The models of a resolved configuration, on its device and in its precision; raises as `pipelines.load_models`."""
    return pipelines.load_models(config.model, default_device(), getattr(torch, pipelines.DTYPES[config.mixed_precision]))


def painter(models: pipelines.Models, config: DrawConfig) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """A function that draws images (N, 3, H, W) of prompt ids (N, L) and N seeds.

    Raises:
        ValueError: the model's scheduler cannot take such steps.
    """
    policy = texforce.Policy(models, config.null_prompt)
    schedule = sampler.ddim_schedule(models.scheduler, config.num_inference_steps, config.eta).to(models.device)
    pooled = pipelines.pooled_text(models)
    denoiser = sampler.Denoiser(models.unet, schedule, config.guidance_scale, config.compile, pooled)
    return lambda prompt_ids, seeds: sampler.sample_images(
        models, denoiser, prompt_ids, seeds, config.batch_size, config.resolution, policy.null_embeds
    )


# --- evaluation ---


def evaluate(config: EvalConfig, progress: Progress = lambda stage, done, total: None) -> dict[str, Any]:
    """Draw a benchmark with the base model and others by a resolved configuration, measure it, and write what was found.

    Returns the results, which `results.json` holds; `report.html` shows them.

    Raises:
        FileNotFoundError, ValueError: bad input. ArtifactError: a refused file. RewardError: a scorer failed.
        OSError: storage.
    """
    start = time.perf_counter()
    benchmark = read_benchmark(config.benchmark).limited(config.limit)
    run = Evaluation(config, benchmark, [System(BASE), *evaluation.at_strengths(config)])
    sources = check(run)
    with record.held(run.folder, lambda: evaluation.check_folder(run.folder)):
        settings = evaluation.write_settings(run)
        speeds = draw(run, progress)
        scores = score(run, sources, progress)
        results = settings | {"commit": record.commit(), "rewards": sources} | summarise(run, scores, settings["systems"])
        results["timings"] = {"images_per_s": speeds, "seconds": time.perf_counter() - start}
        record.write_json(run.folder / "results.json", results)
        write_csv(run, scores)
        report.write(run.folder, results)
    return results


def check(run: Evaluation) -> dict[str, Any]:
    """Find bad input before anything is drawn; returns which weights each reward takes.

    Raises:
        FileNotFoundError, ValueError: what is there to find.
    """
    config = run.config
    for spec in config.measures:
        rewards.check_reward(spec)
    rewards.check_prompts(config.measures, run.benchmark.prompts)
    for system in config.systems:
        adapters.check_inputs(system)
    if config.strengths and len(run.benchmark.prompts) < 2:
        raise ValueError("strength: the best is told on another half of the prompts, so there must be two at least")
    evaluation.check_folder(run.folder)
    record.check_writable(run.folder)
    given = rewards.parse_checkpoints(config.reward_checkpoint or (), config.measures)
    pipelines.find_model(config.model)
    return {spec: rewards.locate(spec, given, config.model == "tiny") for spec in config.measures}


# --- drawing ---


def draw(run: Evaluation, progress: Progress) -> dict[str, float | None]:
    """Draw what is not there yet; images a second of each system, writing included, over all that the folder saw drawn."""
    path, models = run.folder / evaluation.SPEED, None
    spent = evaluation.read_lines(path)
    for system in run.systems:
        missing = [chunk for chunk in run.chunks if not run.is_drawn(system, chunk)]
        if missing:
            models = models or load_models(run.config)
            paint = painter(adapters.put_on(models, system), run.config)
            for n, chunk in enumerate(missing):
                progress(f"drawing {system.name}", len(run.chunks) - len(missing) + n, len(run.chunks))
                start = time.perf_counter()
                _draw_chunk(run, system, chunk, models, paint)
                line = {"system": system.name, "images": len(chunk) * run.config.num_images}
                spent.append(line | {"seconds": time.perf_counter() - start})
                evaluation.append_line(path, spent[-1])
        progress(f"drawing {system.name}", len(run.chunks), len(run.chunks))
    speeds: dict[str, float | None] = {}
    for system in run.systems:
        own = [line for line in spent if line["system"] == system.name]
        speeds[system.name] = sum(line["images"] for line in own) / sum(line["seconds"] for line in own) if own else None
    return speeds


def _draw_chunk(
    run: Evaluation, system: System, chunk: range, models: pipelines.Models, paint: Callable[..., Tensor]
) -> None:
    """Draw the images of some prompts, always the same ones at once, since their number decides how sums are rounded."""
    prompts, seeds = run.repeated_prompts(chunk), [run.seed(i, k) for i, k in run.images(chunk)]
    drawn = paint(pipelines.tokenize_for(models, prompts, truncation=True), seeds)
    for image, prompt, seed, (i, k) in zip(drawn, prompts, seeds, run.images(chunk), strict=True):
        path = run.folder / run.image(system, i, k)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            broken = {} if image.isfinite().all() else {evaluation.BROKEN: "yes"}
            record.write_image(path, image, {"system": system.name, "prompt": prompt, "seed": seed} | broken)


# --- scoring ---


def score(run: Evaluation, sources: dict[str, Any], progress: Progress) -> Scores:
    """The scores of every system by measure; where a prompt has several images, their diversity as well.

    The diversity is that of the image features of the first reward that has such.

    Raises:
        RewardError: a scorer failed, or gave no finite score.
    """
    kept = ScoreFile(run.folder / evaluation.SCORES)
    scores: Scores = {system.name: {} for system in run.systems}
    featured = [spec for spec in sources if rewards.has_features(spec)] if run.config.num_images > 1 else []
    keys = {spec: _key(spec, source) for spec, source in sources.items()}
    for spec in sources:
        reward = None
        for system in run.systems:
            for n, chunk in enumerate(run.chunks):
                progress(f"{spec} of {system.name}", n, len(run.chunks))
                wanted = [keys[spec], *([f"{DIVERSITY} {keys[spec]}"] if spec in featured[:1] else [])]
                missing = [key for key in wanted if (system.name, key, chunk.start) not in kept]
                if missing:
                    reward = reward or _load_reward(run.config, spec)
                    images = run.read_images(system, chunk).to(default_device())
                    for key in missing:
                        values = _diversity if key.startswith(DIVERSITY) else scorers.score
                        kept.add(system.name, key, chunk.start, values(reward, images, run.repeated_prompts(chunk)))
            progress(f"{spec} of {system.name}", len(run.chunks), len(run.chunks))
            scores[system.name][spec] = kept.table(system.name, keys[spec], run.chunks)
            if not np.isfinite(scores[system.name][spec]).any():
                raise scorers.RewardError(f"reward: {spec} gave no finite score for any image of {system.name}")
    for spec in featured[:1]:
        for name in scores:
            scores[name][DIVERSITY] = kept.table(name, f"{DIVERSITY} {keys[spec]}", run.chunks)
    return scores


def _key(spec: str, source: dict[str, Any]) -> str:
    """What a reward's scores are called in the file, so that those of other weights are not taken."""
    text = json.dumps([source, texforce.__version__])
    return f"{spec} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _load_reward(config: EvalConfig, spec: str) -> rewards.Mixture:
    given = rewards.parse_checkpoints(config.reward_checkpoint or (), config.measures)
    return rewards.load_reward(spec, default_device(), given, config.model == "tiny", timeout=config.reward_timeout)


def _diversity(reward: rewards.Mixture, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Of the images (N, 3, H, W) of some prompts, each prompt's in a row: (P,)."""
    num_prompts = len(dict.fromkeys(prompts))
    return measures.diversity(reward.image_features(images).reshape(num_prompts, len(prompts) // num_prompts, -1))


# --- results ---


def summarise(run: Evaluation, scores: Scores, described: dict[str, Any]) -> dict[str, Any]:
    """What is told of each system; of a sweep at its best strength, on the half of the prompts that did not choose it."""
    config, categories = run.config, run.benchmark.categories
    validation = measures.split_halves(categories) if config.strengths else np.zeros(len(categories), bool)
    sweeps = _sweep(run, scores, validation) if config.strengths else {}
    strengths = {BASE: 1.0} | {system.name: sweeps[system.name]["best"] if sweeps else 1.0 for system in config.systems}
    drawn = {BASE: BASE} | {
        system.name: evaluation.scaled(system, strengths[system.name]).name if sweeps else system.name
        for system in config.systems
    }
    told = _on_prompts({name: scores[drawn[name]] for name in drawn}, ~validation, categories, config.seed)
    systems = {
        name: described[drawn[name]]
        | {"strength": strengths[name], "images": f"images/{drawn[name]}", "measures": told[name]}
        | {"scores": scores_to_json(scores[drawn[name]])}
        for name in drawn
    }
    return {
        "confidence": measures.CONFIDENCE,
        "num_resamples": measures.NUM_RESAMPLES,
        "num_prompts_told": int((~validation).sum()),
        "systems": systems,
        "strengths": sweeps,
        "prompts": [
            {"prompt": run.benchmark.prompts[i], "category": categories[i], "validation": bool(validation[i])}
            | {"seeds": [run.seed(i, k) for k in range(config.num_images)]}
            for i in range(len(categories))
        ],
    }


def scores_to_json(scores: dict[str, np.ndarray]) -> dict[str, list[list[float | None]]]:
    return {measure: [measures.to_json(row) for row in table] for measure, table in scores.items()}


def _on_prompts(scores: Scores, rows: np.ndarray, categories: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """`measures.summarise` of some of the prompts."""
    chosen = {name: {measure: table[rows] for measure, table in tables.items()} for name, tables in scores.items()}
    return measures.summarise(chosen, BASE, [category for category, row in zip(categories, rows, strict=True) if row], seed)


def _sweep(run: Evaluation, scores: Scores, validation: np.ndarray) -> dict[str, Any]:
    """Every strength's figures on the validation half, and the best by the first reward, for each system."""
    config, first = run.config, run.config.measures[0]
    told = _on_prompts(scores, validation, [""] * len(validation), config.seed)
    sweeps: dict[str, Any] = {}
    for system in config.systems:
        names = [evaluation.scaled(system, strength).name for strength in config.strengths]
        curve = [
            {"strength": strength, "measures": told[name], "scores": scores_to_json(scores[name])}
            for strength, name in zip(config.strengths, names, strict=True)
        ]
        means = [told[name][first]["mean"] for name in names]
        best = max(range(len(curve)), key=lambda n: -np.inf if means[n] is None else means[n])
        sweeps[system.name] = {"chosen_by": first, "best": config.strengths[best], "curve": curve}
    return sweeps


def write_csv(run: Evaluation, scores: Scores) -> None:
    """`results.csv`: a row for every image, with its scores."""
    text = io.StringIO()
    names = list(scores[BASE])
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["system", "prompt", "category", "seed", "image", *names])
    for system in run.systems:
        for i, k in run.images(range(len(run.benchmark.prompts))):
            own = [scores[system.name][name] for name in names]
            cells = [values[i, min(k, values.shape[1] - 1)] for values in own]  # diversity has one number a prompt
            about = [system.name, run.benchmark.prompts[i], run.benchmark.categories[i], run.seed(i, k)]
            image = run.image(system, i, k).as_posix()
            table.writerow([*about, image, *("" if np.isnan(cell) else repr(float(cell)) for cell in cells)])
    record.write_text(run.folder / "results.csv", text.getvalue())
