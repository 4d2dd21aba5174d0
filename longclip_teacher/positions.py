"""Stretch a learned table of text positions from 77 to 248 without disturbing those that CLIP trained well.

Shapes: T old positions, L new positions, D embedding width.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from longclip_teacher.errors import InputError

__all__ = ["NUM_KEPT_POSITIONS", "stretch_positions", "stretched_length"]

NUM_KEPT_POSITIONS = 20  # CLIP's effective caption length (Long-CLIP, section 3.1): these rows stay as they are
_RATIO = 4  # new positions per old one beyond the kept rows


def stretched_length(num_positions: int) -> int:
    """Number of positions after stretching `num_positions`: 77 -> 248."""
    return NUM_KEPT_POSITIONS + _RATIO * (num_positions - NUM_KEPT_POSITIONS)


def stretch_positions(
    table: Float[Tensor, "T D"], context_length: int = 248, *, method: Literal["published", "paper"] = "published"
) -> Float[Tensor, "L D"]:
    """Knowledge-preserved stretching (Long-CLIP, section 3.2): keep the first 20 rows, interpolate the others by 4.

    `published` is the table of the released Long-CLIP weights: row 20 + 4i + j lies j/4 of the way from old row 20 + i
    to the next, and the last four rows, which have no next, continue the last step. `paper` spreads the old rows evenly
    instead, so that the last new row is the last old row and nothing is extrapolated.

    A `context_length` of at most T gives the table's first rows. Beyond T, `published` gives any prefix of the
    stretched table (up to 248 for T = 77) and `paper` any length. Other lengths raise InputError.
    """
    num_positions = len(table)
    if context_length <= num_positions:
        return table[:context_length].clone()
    if num_positions <= NUM_KEPT_POSITIONS + 1:
        raise InputError(
            f"a table of {num_positions} positions is too short to stretch: {NUM_KEPT_POSITIONS + 2} are needed"
        )
    if method == "paper":
        last = num_positions - 1 - NUM_KEPT_POSITIONS
        return _rows_between(table, torch.linspace(0, last, context_length - NUM_KEPT_POSITIONS, dtype=torch.float64))
    if context_length > stretched_length(num_positions):
        raise InputError(
            f"{num_positions} positions stretch to at most {stretched_length(num_positions)}, not {context_length}: "
            "ask for a shorter context or use method='paper'"
        )
    return _rows_between(table, torch.arange(context_length - NUM_KEPT_POSITIONS, dtype=torch.float64) / _RATIO)


def _rows_between(table: Tensor, offset: Float[Tensor, " N"]) -> Float[Tensor, "20+N D"]:
    """The kept rows, then the table at fractional rows 20 + `offset`; past the end, the last step continues."""
    lower = offset.floor().long().clamp(max=len(table) - NUM_KEPT_POSITIONS - 2)
    weight = (offset - lower).unsqueeze(1).to(table)  # above 1 past the end
    rest = table[NUM_KEPT_POSITIONS:]
    lower = lower.to(table.device)
    return torch.cat([table[:NUM_KEPT_POSITIONS], torch.lerp(rest[lower], rest[lower + 1], weight)])
