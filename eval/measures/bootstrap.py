"""Confidence of recalls: 95% intervals, and intervals of the difference between two models, by bootstrap.

Shapes: Q queries, P pictures, K series of hits (a model's R@1, its R@5, another's R@1, ...), B resamples.

Pictures are drawn anew, with replacement, each with all its queries. The five captions of a picture are found or missed
together, and intervals that treat them as independent are too narrow. All K series see the same resamples, so
differences between models are paired: a picture that is hard for both does not count as a difference. The interval is
the percentile interval (Efron and Tibshirani 1993, chapter 13): the middle 95% of the resampled figures. At exactly 0
or 100% no resample differs and the interval has no width, which says nothing about the next thousand pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

from longclip_teacher.errors import InputError

__all__ = ["INTERVAL_METHOD", "Estimate", "Estimates", "bootstrap_recalls"]

NUM_RESAMPLES = 2000
INTERVAL_METHOD = (
    f"95% confidence intervals by bootstrap: the pictures are drawn {NUM_RESAMPLES} times with replacement, each with "
    "all its captions, and the interval is the middle 95% of the results. It covers other pictures of the same kind. "
    "If a model has several seeds, the interval is that of their mean, and ± is the standard deviation between seeds: "
    "only ± shows what another training run would change."
)
_BLOCK_ELEMENTS = 4_000_000  # weights of resampled pictures held at a time


@dataclass(frozen=True)
class Estimate:
    """A figure in percent (or a difference in points), and the ends of its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimates:
    """`recalls` by series, and the `differences` of every series from the baseline."""

    recalls: dict[str, Estimate]
    differences: dict[str, Estimate]


def bootstrap_recalls(
    hits: Mapping[str, Float[np.ndarray, " Q"]],
    query_picture: Int[np.ndarray, " Q"],
    *,
    baseline: str | None = None,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimates:
    """Return each series' share of hits with its interval, and its difference from `baseline` (default: the first).

    A hit is 1 or 0 or, for a model trained with several seeds, the share of its seeds that hit. The interval is then
    that of their mean, and covers other pictures, not other seeds. `query_picture` is each query's picture. The same
    seed gives the same intervals. Raise InputError if the numbers of queries differ.
    """
    if not hits or any(len(series) != len(query_picture) for series in hits.values()) or not len(query_picture):
        lengths = {name: len(series) for name, series in hits.items()}
        raise InputError(f"hits of {lengths} queries do not fit {len(query_picture)} queries: all models need the same")
    series = np.stack([np.asarray(values, dtype=np.float64) for values in hits.values()], axis=1)  # [Q,K]
    sums, counts = _per_picture(series, query_picture)
    values = 100 * sums.sum(axis=0) / counts.sum()
    resampled = 100 * _resampled(sums, counts, num_resamples, seed)
    first = list(hits).index(baseline) if baseline is not None else 0
    return Estimates(
        _estimates(hits, values, resampled, confidence),
        _estimates(hits, values - values[first], resampled - resampled[:, first : first + 1], confidence),
    )


def _per_picture(
    series: Float[np.ndarray, "Q K"], query_picture: Int[np.ndarray, " Q"]
) -> tuple[Float[np.ndarray, "P K"], Float[np.ndarray, " P"]]:
    """Return hits and number of queries of each picture."""
    pictures, position = np.unique(query_picture, return_inverse=True)
    sums = np.zeros((len(pictures), series.shape[1]))
    np.add.at(sums, position, series)
    return sums, np.bincount(position).astype(np.float64)


def _resampled(
    sums: Float[np.ndarray, "P K"], counts: Float[np.ndarray, " P"], num_resamples: int, seed: int
) -> Float[np.ndarray, "B K"]:
    """Return the shares of hits when as many pictures are drawn with replacement."""
    if num_resamples * len(counts) <= _BLOCK_ELEMENTS:
        blocks: Iterable[np.ndarray] = [_one_block(len(counts), num_resamples, seed)]
    else:
        blocks = _weights(len(counts), num_resamples, seed)
    return np.concatenate([(weights @ sums) / (weights @ counts)[:, None] for weights in blocks])


def _weights(num_pictures: int, num_resamples: int, seed: int) -> Iterator[Float[np.ndarray, "b P"]]:
    """Yield how often each picture is drawn, in blocks of resamples."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_ELEMENTS // num_pictures)
    for start in range(0, num_resamples, block):
        drawn = rng.integers(num_pictures, size=(min(block, num_resamples - start), num_pictures))
        yield np.stack([np.bincount(row, minlength=num_pictures) for row in drawn]).astype(np.float64)


@lru_cache(maxsize=2)
def _one_block(num_pictures: int, num_resamples: int, seed: int) -> Float[np.ndarray, "B P"]:
    """Return `_weights` of one block. A report asks for hundreds of intervals over the same pictures."""
    return next(_weights(num_pictures, num_resamples, seed))


def _estimates(
    names: Mapping[str, object],
    values: Float[np.ndarray, " K"],
    resampled: Float[np.ndarray, "B K"],
    confidence: float,
) -> dict[str, Estimate]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    return {
        name: Estimate(float(value), float(start), float(end))
        for name, value, start, end in zip(names, values, low, high, strict=True)
    }
