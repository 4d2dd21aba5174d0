"""All rows of the battery, in the order of the table."""

from __future__ import annotations

from faults import (
    at_once,
    bombs,
    checkpoints,
    code,
    commands,
    flat_memory,
    mutations,
    not_finite,
    remote_shards,
    runs,
    stored,
    teacher_pass,
    transfers,
)

__all__ = ["ROWS"]

ROWS = [
    *runs.ROWS,
    *checkpoints.ROWS,
    *not_finite.ROWS,
    *stored.ROWS,
    *teacher_pass.ROWS,
    *mutations.ROWS,
    *code.ROWS,
    *transfers.ROWS,
    *remote_shards.ROWS,
    *bombs.ROWS,
    *at_once.ROWS,
    *commands.ROWS,
    *flat_memory.ROWS,
]
