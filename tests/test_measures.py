"""Statistics: against scipy's, by hand, and as properties."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from texforce import measures

RANDOM = np.random.default_rng(7)


def summarise(scores, categories=None):
    categories = categories or [""] * len(next(iter(scores["base"].values())))
    return measures.summarise(scores, "base", categories, 3)


@pytest.mark.parametrize("num_prompts", [2, 7, 200])
def test_intervals_are_scipys_percentile_bootstrap_to_the_rounding(num_prompts):
    values = RANDOM.normal(size=(num_prompts, 3)) * [1, 10, 0.1] + [0, 5, 0]
    low, high = measures.bootstrap(values, 5)
    for k in range(3):
        expected = stats.bootstrap(
            (values[:, k],), np.mean, n_resamples=measures.NUM_RESAMPLES, method="percentile",
            batch=measures.RESAMPLES_AT_ONCE, rng=np.random.default_rng(5),
        ).confidence_interval  # fmt: skip
        assert low[k] == pytest.approx(expected.low, rel=1e-12, abs=1e-14)
        assert high[k] == pytest.approx(expected.high, rel=1e-12, abs=1e-14)


def test_paired_differences_and_outcomes_have_scipys_intervals_too():
    base, tuned = RANDOM.normal(size=(40, 3)), RANDOM.normal(0.3, 1, size=(40, 3))
    told = summarise({"base": {"m": base}, "tuned": {"m": tuned}})["tuned"]["m"]
    differences = (tuned - base).mean(axis=1)
    better = (differences > measures.NEGLIGIBLE * base.mean(axis=1).std()).astype(float)
    for name, values in (("paired", differences), ("better", better)):
        expected = stats.bootstrap(
            (values,), np.mean, n_resamples=10_000, method="percentile", batch=500, rng=np.random.default_rng(3)
        ).confidence_interval
        assert told[name]["mean"] == pytest.approx(values.mean())
        assert (told[name]["low"], told[name]["high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    values = np.random.default_rng(0).exponential(size=(60, 400))  # 400 experiments at once, of a skewed law with mean 1
    low, high = measures.bootstrap(values, 1, 2000)
    assert 0.90 < ((low <= 1) & (high >= 1)).mean() < 0.97


def test_two_systems_of_the_same_law_show_no_difference():
    """And the very same scores exactly none."""
    base, other = (np.random.default_rng(seed).normal(size=(200, 4)) for seed in (1, 2))
    told = summarise({"base": {"m": base}, "other": {"m": other}, "same": {"m": base.copy()}})
    assert told["other"]["m"]["paired"]["low"] < 0 < told["other"]["m"]["paired"]["high"]
    assert told["same"]["m"]["paired"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert told["same"]["m"]["same"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_a_known_shift_is_found_though_the_means_intervals_overlap():
    """Prompts differ by 1, the systems by 0.05: only the comparison prompt by prompt can tell."""
    base = RANDOM.normal(size=(200, 1)) + RANDOM.normal(0, 0.1, size=(200, 4))
    tuned = base + 0.05 + RANDOM.normal(0, 0.02, size=(200, 4))
    told = summarise({"base": {"m": base}, "tuned": {"m": tuned}})
    assert told["base"]["m"]["high"] > told["tuned"]["m"]["low"]
    paired = told["tuned"]["m"]["paired"]
    assert 0 < paired["low"] < 0.05 < paired["high"]
    assert told["tuned"]["m"]["worse"]["mean"] == 0 < told["tuned"]["m"]["better"]["low"]


def test_categories_are_told_apart_and_are_those_prompts_alone():
    categories = 3 * ["a"] + 5 * ["b"]
    base, tuned = RANDOM.normal(size=(8, 2)), RANDOM.normal(size=(8, 2))
    told = summarise({"base": {"m": base}, "tuned": {"m": tuned}}, categories)
    alone = summarise({"base": {"m": base[3:]}, "tuned": {"m": tuned[3:]}})
    part = told["tuned"]["m"]["categories"]["b"]
    assert part == {name: alone["tuned"]["m"][name] for name in part}
    assert set(told["base"]["m"]["categories"]) == {"a", "b"}
    assert "categories" not in alone["base"]["m"]


def test_what_is_missing_is_left_out_of_both_systems_and_counted():
    base = np.array([[1.0, 2.0], [3.0, np.nan], [5.0, 5.0]])
    tuned = np.array([[2.0, np.nan], [np.nan, 9.0], [4.0, 5.0]])
    told = summarise({"base": {"m": base}, "tuned": {"m": tuned}})
    assert told["base"]["m"]["mean"] == pytest.approx((1.5 + 3 + 5) / 3)
    assert told["base"]["m"]["num_images_dropped"] == 1
    assert told["tuned"]["m"]["num_images_dropped"] == 2
    assert told["tuned"]["m"]["paired"]["mean"] == pytest.approx((1 - 0.5) / 2)  # prompts 0 and 2


def test_of_one_prompt_there_is_a_mean_and_no_interval():
    told = summarise({"base": {"m": np.array([[1.0, 2.0]])}})
    assert told["base"]["m"] == {
        "mean": 1.5, "low": None, "high": None, "num_prompts": 1, "num_images_dropped": 0, "spread": 0.0
    }  # fmt: skip
    assert summarise({"base": {"m": np.array([[np.nan]])}})["base"]["m"]["mean"] is None


def test_the_same_seed_gives_the_same_interval_and_another_one_another():
    values = RANDOM.normal(size=(20, 1))
    first, again, other = (measures.bootstrap(values, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_diversity_is_the_mean_distance_of_all_pairs():
    features = torch.nn.functional.normalize(torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    expected = [np.mean([1 - float(one @ other) for one, other in itertools.combinations(prompt, 2)]) for prompt in features]
    assert measures.diversity(features).tolist() == pytest.approx(expected, abs=1e-6)
    assert measures.diversity(features[:, :1].expand(3, 4, 8)).tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_halves_share_every_category_between_them():
    categories = ["a", "b", "a", "a", "b", "c", "a", "b"]
    halves = measures.split_halves(categories)
    assert sum(halves) == 4
    for name in "abc":
        own = [half for half, category in zip(halves, categories, strict=True) if category == name]
        assert abs(sum(own) - (len(own) - sum(own))) <= 1
    assert sorted(measures.split_halves(["a", "b"])) == [False, True]  # neither half is ever empty
    assert sum(measures.split_halves(list("abcdefg"))) == 4


def test_a_prompt_is_better_or_worse_if_it_changes_by_more_than_a_twentieth_of_the_bases_deviation():
    base = np.array([[0.0, 0.0], [2.0, 2.0], [0.0, 0.0], [2.0, 2.0], [1.0, 1.0]])  # deviation over prompts 0.894
    changes = np.array([[0.1, 0.0], [0.02, 0.04], [-0.5, 0.3], [0.05, 0.04], [np.nan, np.nan]])
    told = measures.summarise({"base": {"m": base}, "tuned": {"m": base + changes}}, "base", [""] * 5, 0)
    assert told["base"]["m"]["spread"] == pytest.approx(np.std([0, 2, 0, 2, 1]))
    shares = {name: told["tuned"]["m"][name]["mean"] for name in measures.OUTCOMES}
    assert shares == {"better": 0.5, "same": 0.25, "worse": 0.25}
    assert set(told["tuned"]["m"]["better"]) == {"mean", "low", "high"}


def test_where_the_bases_scores_are_all_alike_only_equal_ones_are_the_same():
    base, tuned = np.ones((4, 1)), np.array([[1.0], [1.0], [1.000001], [0.9]])
    told = measures.summarise({"base": {"m": base}, "tuned": {"m": tuned}}, "base", [""] * 4, 0)["tuned"]["m"]
    assert [told[name]["mean"] for name in measures.OUTCOMES] == [0.25, 0.5, 0.25]
