"""The activations inside a transformer tower, for losses that compare two towers layer by layer.

Shapes: B samples, L tokens (for a picture: class tokens, then patches), C tower width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Trace"]


@dataclass
class Trace:
    """The activations of one batch in one tower; each list has one entry per attention block, first block first."""

    embedding: Float[Tensor, "B L C"]
    """Embedded tokens, positions added, before any block and any norm."""
    tokens: Float[Tensor, "B L C"]
    """The same without positions."""
    hidden: list[Float[Tensor, "B L C"]]
    """The output of each attention block: the residual stream after its feed-forward network."""
    query: list[Float[Tensor, "B H L C/H"]]
    """Queries of each head, not yet divided by sqrt(C / H)."""
    key: list[Float[Tensor, "B H L C/H"]]
    """Keys of each head."""
    value: list[Float[Tensor, "B H L C/H"]]
    """Values of each head."""
    valid: Bool[Tensor, "B L"]
    """Which tokens are real; the values at the others are meaningless."""
    causal: bool
    """Each token attends only to itself and to those before it."""
    num_prefix_tokens: int = 0
    """Number of class and distillation tokens of a picture, which stand before the patches."""

    def tensors(self) -> list[Tensor]:
        """The activations, without `valid`, in a fixed order."""
        return [self.embedding, self.tokens, *self.hidden, *self.query, *self.key, *self.value]

    def map(self, function: Callable[[Tensor], Tensor]) -> Trace:
        """`function` applied to each activation."""
        hidden, query, key, value = (
            [function(x) for x in layers] for layers in (self.hidden, self.query, self.key, self.value)
        )
        embedding, tokens = function(self.embedding), function(self.tokens)
        return replace(self, embedding=embedding, tokens=tokens, hidden=hidden, query=query, key=key, value=value)
