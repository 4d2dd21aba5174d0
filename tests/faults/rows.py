"""All rows of the battery, in the order of the table."""

from __future__ import annotations

from faults import checkpoints, code, mutations, runs, stored

__all__ = ["ROWS"]

ROWS = [
    *runs.ROWS,
    *checkpoints.ROWS,
    *stored.ROWS,
    *mutations.ROWS,
    *code.ROWS,
]
