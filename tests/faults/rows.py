"""All rows of the battery, in the order of the table."""

from __future__ import annotations

from faults import checkpoints, code, mutations, not_finite, runs, stored, transfers

__all__ = ["ROWS"]

ROWS = [
    *runs.ROWS,
    *checkpoints.ROWS,
    *not_finite.ROWS,
    *stored.ROWS,
    *mutations.ROWS,
    *code.ROWS,
    *transfers.ROWS,
]
