"""Intervals cover what they should, keep a picture's captions together, and pair the models."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from eval.measures.bootstrap import bootstrap_recalls
from longclip_teacher.errors import InputError


def test_intervals_cover_the_true_recall_in_95_of_100_tests() -> None:
    rng = np.random.default_rng(0)
    truth, num_tests, num_queries = 0.7, 1000, 200
    hits = {str(test): row for test, row in enumerate((rng.random((num_tests, num_queries)) < truth).astype(float))}
    # all tests share one set of draws, but each test's own hits are independent of the others', as they must be
    estimates = bootstrap_recalls(hits, np.arange(num_queries), num_resamples=1000).recalls
    covered = sum(found.low <= 100 * truth <= found.high for found in estimates.values())
    assert 925 <= covered <= 970  # 950 plus or minus 3.6 standard deviations; percentile intervals are a little narrow


def test_intervals_are_scipys_percentile_intervals() -> None:
    rng = np.random.default_rng(1)
    hits = (rng.random(300) < 0.6).astype(float)
    found = bootstrap_recalls({"a": hits}, np.arange(300), num_resamples=10_000).recalls["a"]
    reference = stats.bootstrap(
        (hits,), np.mean, n_resamples=10_000, method="percentile", random_state=2
    ).confidence_interval
    assert found.value == pytest.approx(100 * hits.mean())
    # both ends are quantiles of sums of 300 hits, in steps of 1/3 percent: allow two steps
    assert found.low == pytest.approx(100 * reference.low, abs=0.67)
    assert found.high == pytest.approx(100 * reference.high, abs=0.67)


def test_captions_of_a_picture_are_drawn_together() -> None:
    rng = np.random.default_rng(2)
    hits = np.repeat((rng.random(400) < 0.5).astype(float), 5)  # all five captions of a picture hit or miss
    picture = np.repeat(np.arange(400), 5)
    together = bootstrap_recalls({"a": hits}, picture).recalls["a"]
    naive = bootstrap_recalls({"a": hits}, np.arange(2000)).recalls["a"]
    assert together.value == naive.value
    # five equal captions carry as much information as one: the interval is sqrt(5) times as wide
    assert (together.high - together.low) / (naive.high - naive.low) == pytest.approx(5**0.5, rel=0.1)


def test_pictures_with_unequal_numbers_of_captions_weigh_by_their_captions() -> None:
    hits, picture = np.array([1.0, 1, 1, 0]), np.array([7, 7, 7, 3])
    found = bootstrap_recalls({"a": hits}, picture).recalls["a"]
    assert (found.value, found.low, found.high) == (75.0, 0.0, 100.0)  # either picture may be drawn twice


def test_a_model_does_not_differ_from_its_copy_and_pairs_are_sharper() -> None:
    rng = np.random.default_rng(3)
    hits = (rng.random(500) < 0.5).astype(float)
    better = hits.copy()
    better[np.flatnonzero(hits == 0)[:15]] = 1.0  # the same except for 15 queries
    estimates = bootstrap_recalls({"a": hits, "copy": hits.copy(), "better": better}, np.arange(500))
    copy, gain = estimates.differences["copy"], estimates.differences["better"]
    assert (copy.value, copy.low, copy.high) == (0.0, 0.0, 0.0)
    assert gain.value == pytest.approx(3.0) and 1 < gain.low < gain.high < 5
    # each single recall is much less certain than the difference
    assert estimates.recalls["better"].low < estimates.recalls["a"].high
    against = bootstrap_recalls({"a": hits, "better": better}, np.arange(500), baseline="better").differences["a"]
    assert (against.low, against.high) == pytest.approx((-gain.high, -gain.low))


def test_the_same_seed_gives_the_same_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    hits = {"a": rng.random(50)}
    whole = bootstrap_recalls(hits, np.arange(50), num_resamples=300)
    assert whole == bootstrap_recalls(hits, np.arange(50), num_resamples=300)
    assert whole != bootstrap_recalls(hits, np.arange(50), num_resamples=300, seed=1)
    monkeypatch.setattr("eval.measures.bootstrap._BLOCK_ELEMENTS", 700)
    assert whole == bootstrap_recalls(hits, np.arange(50), num_resamples=300)


def test_hits_of_different_queries_are_refused() -> None:
    with pytest.raises(InputError, match="all models need the same"):
        bootstrap_recalls({"a": np.ones(3), "b": np.ones(4)}, np.arange(3))
    with pytest.raises(InputError):
        bootstrap_recalls({}, np.arange(3))
