"""Queries grouped by a number, such as the length of their caption.

Shapes: Q queries, B of them in one group.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

__all__ = ["query_bins"]

_MOST_BINS, _QUERIES_PER_BIN = 8, 40  # fewer queries per bin say little: the interval is 30 points wide


def query_bins(numbers: Float[np.ndarray, " Q"]) -> list[Int[np.ndarray, " B"]]:
    """Group queries by their number: groups of about equal size, at most 8, each of 40 queries or more, numbers rising.
    Equal numbers stay together. Return one group, or none, if there are too few queries."""
    order = np.argsort(numbers, kind="stable")
    size = max(_QUERIES_PER_BIN, -(-len(order) // _MOST_BINS))
    bins: list[Int[np.ndarray, " B"]] = []
    start = 0
    while len(order) - start >= _QUERIES_PER_BIN:
        end = min(start + size, len(order))
        while end < len(order) and numbers[order[end]] == numbers[order[end - 1]]:
            end += 1
        if len(order) - end < _QUERIES_PER_BIN:
            end = len(order)
        bins.append(order[start:end])
        start = end
    return bins
