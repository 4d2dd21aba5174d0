"""All rows of the battery, in the order of the table."""

from __future__ import annotations

from faults import checkpoints, code, mutations, stored

__all__ = ["ROWS"]

ROWS = [
    *checkpoints.ROWS,
    *stored.ROWS,
    *mutations.ROWS,
    *code.ROWS,
]
