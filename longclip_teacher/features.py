"""Features as they are compared: rows of unit norm."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["unit_features"]


def unit_features(features: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
    """Divide each row by its norm, in float32 at least: half precision would leave norms off by 1e-3."""
    return normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)
