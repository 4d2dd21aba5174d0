"""Tensors on their way from the host to a device, which the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sent"]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`. A GPU copies it from page-locked memory, behind the work that it has been given."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
