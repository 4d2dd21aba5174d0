"""What a transformer tower computes on the way to its features, for losses that compare two towers layer by layer.

Shapes: B samples, L tokens (of a picture: class tokens, then patches), C tower width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Trace"]


@dataclass
class Trace:
    """One batch's way through the attention blocks of one tower; the lists have an entry a block, first block first."""

    embedding: Float[Tensor, "B L C"]
    """Embedded tokens, positions added, before any block and any norm."""
    tokens: Float[Tensor, "B L C"]
    """The same without positions."""
    hidden: list[Float[Tensor, "B L C"]]
    """What each attention block puts out: the residual stream after its feed-forward."""
    query: list[Float[Tensor, "B H L C/H"]]
    """Queries of each head, not yet divided by sqrt(C / H)."""
    key: list[Float[Tensor, "B H L C/H"]]
    """Keys of each head."""
    value: list[Float[Tensor, "B H L C/H"]]
    """Values of each head."""
    valid: Bool[Tensor, "B L"]
    """Which tokens are real; what stands at the others means nothing."""
    causal: bool
    """Each token attends to itself and to those before it alone."""
    num_prefix_tokens: int = 0
    """Class and distillation tokens of a picture, which stand before the patches."""
