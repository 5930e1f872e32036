"""Statistics of an evaluation: means over prompts with bootstrap intervals, differences, shares of prompts, diversity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 500  # what fits into memory for some thousand prompts
# A prompt counts as the same if its score changes by less than this share of the base scores' deviation over prompts.
NEGLIGIBLE = 0.05
OUTCOMES = ("better", "same", "worse")


def bootstrap(values: np.ndarray, seed: int, num_resamples: int = NUM_RESAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Percentile intervals (Efron 1979) of the means of values (P, M): lower and upper ends, (M,) each.

    Prompts are resampled, the same ones for every column, so that a column of differences is a paired comparison. NaN is a
    missing value. An interval is NaN where there are fewer than two values.
    """
    generator = np.random.default_rng(seed)
    there = np.isfinite(values)
    filled, num_prompts = np.where(there, values, 0.0), len(values)
    means = []
    for start in range(0, num_resamples, RESAMPLES_AT_ONCE):
        size = min(RESAMPLES_AT_ONCE, num_resamples - start)
        rows = generator.integers(0, num_prompts, (size, num_prompts))
        rows += num_prompts * np.arange(size)[:, None]
        counts = np.bincount(rows.ravel(), minlength=size * num_prompts).reshape(size, num_prompts).astype(float)
        with np.errstate(invalid="ignore"):  # 0 / 0 where a resample has no value of a column
            means.append((counts @ filled) / (counts @ there))
    tail = (1 - CONFIDENCE) / 2
    ends = np.full((2, values.shape[1]), np.nan)
    known = there.sum(axis=0) > 1
    if known.any():
        ends[:, known] = np.nanquantile(np.concatenate(means)[:, known], [tail, 1 - tail], axis=0)
    return ends[0], ends[1]


def outcomes(changes: np.ndarray, spread: float) -> dict[str, np.ndarray]:
    """Which prompts became better, stayed the same and became worse, (P,) each: 1 if so, 0 if not, NaN if unknown.

    A change (P,) of at most NEGLIGIBLE of `spread`, the deviation of the base's scores, counts as none: nobody sees a score
    move in its fourth digit.
    """
    limit, known = NEGLIGIBLE * spread, np.isfinite(changes)
    found = {"better": changes > limit, "same": np.abs(changes) <= limit, "worse": changes < -limit}
    return {name: np.where(known, rows, np.nan) for name, rows in found.items()}


def deviation(values: np.ndarray) -> float:
    """The standard deviation of the finite ones among values (P,); 0 where there are none."""
    known = values[np.isfinite(values)]
    return float(known.std()) if len(known) else 0.0


def mean_over_images(scores: np.ndarray) -> np.ndarray:
    """Means (P,) of the finite ones among scores (P, K); NaN where there are none."""
    there = np.isfinite(scores)
    with np.errstate(invalid="ignore"):
        return np.where(there, scores, 0.0).sum(axis=1) / there.sum(axis=1)


def diversity(features: Tensor) -> Tensor:
    """Mean cosine distance (P,) of the pairs among each prompt's K > 1 image features (P, K, D) of length 1."""
    num_images = features.shape[1]
    cosines = features @ features.transpose(1, 2)
    off_diagonal = cosines.sum(dim=(1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(dim=1)
    return 1 - off_diagonal / (num_images * (num_images - 1))


def summarise(
    scores: Mapping[str, Mapping[str, np.ndarray]], base: str, categories: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    """Summary of each system's scores (P, K) by measure: `mean`, `low` and `high` over prompts, each prompt counting once.

    All but the base also have `paired` (the mean difference to the base) and the shares of prompts that are `better`, `same`
    and `worse` by `outcomes`, each with its own interval. The base has `spread`, the deviation of its scores over prompts.
    With several categories, each measure has the same means and shares for every category in `categories`.
    """
    columns: dict[tuple[str, ...], np.ndarray] = {}
    spreads = {measure: deviation(mean_over_images(values)) for measure, values in scores[base].items()}
    for system, measures in scores.items():
        for measure, values in measures.items():
            means = mean_over_images(values)
            columns[system, measure] = means
            if system != base:
                changes = columns[system, measure, "paired"] = mean_over_images(values - scores[base][measure])
                for outcome, rows in outcomes(changes, spreads[measure]).items():
                    columns[system, measure, outcome] = rows
    table = np.stack(list(columns.values()), axis=1)
    groups = {name: np.array([category == name for category in categories]) for name in dict.fromkeys(categories)}
    whole = _describe(columns, table, seed)
    if len(groups) > 1:
        parts = {name: _describe(columns, table[rows], seed) for name, rows in groups.items()}
        for system, measures in whole.items():
            for measure, summary in measures.items():
                summary["categories"] = {name: part[system][measure] for name, part in parts.items()}
    for system, measures in whole.items():
        for measure, summary in measures.items():
            summary["num_images_dropped"] = int((~np.isfinite(scores[system][measure])).sum())
    for measure, spread in spreads.items():
        whole[base][measure]["spread"] = spread
    return whole


def _describe(columns: Mapping[tuple[str, ...], Any], table: np.ndarray, seed: int) -> dict[str, dict[str, Any]]:
    """Mean and interval of each column of a table (P, M), by system and measure."""
    lows, highs = bootstrap(table, seed)
    summary: dict[str, dict[str, Any]] = {}
    for k, (system, measure, *kind) in enumerate(columns):
        there = table[np.isfinite(table[:, k]), k]
        mean = there.mean() if len(there) else np.nan
        numbers = {
            name: float(number) if np.isfinite(number) else None  # JSON knows no NaN
            for name, number in (("mean", mean), ("low", lows[k]), ("high", highs[k]))
        }
        if kind:
            summary[system][measure][kind[0]] = numbers
        else:
            summary.setdefault(system, {})[measure] = {**numbers, "num_prompts": len(there)}
    return summary


def split_halves(categories: Sequence[str]) -> np.ndarray:
    """Which prompts (P,) are in the validation half: every other one of each category, so that both halves are alike."""
    halves = np.zeros(len(categories), bool)
    halves[np.argsort(np.array(categories), kind="stable")[::2]] = True
    return halves


def to_numpy(scores: Sequence[float | None]) -> np.ndarray:
    """Scores (N,) read from JSON; None becomes NaN."""
    return np.array([np.nan if score is None else score for score in scores], dtype=np.float64)


def to_json(scores: Tensor | np.ndarray) -> list[float | None]:
    """Scores (N,) for JSON, which has no NaN: None."""
    values = torch.as_tensor(scores).double()
    return [value if np.isfinite(value) else None for value in values.tolist()]
