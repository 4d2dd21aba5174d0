"""The precision in which losses are computed: float32, or float64 for float64 input."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["widened"]


def widened(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return `tensor` in float64 if `like` (by default the tensor itself) is float64, else in float32."""
    source = tensor if like is None else like
    return tensor.to(torch.float64 if source.dtype == torch.float64 else torch.float32)
