"""Losses that compare the student's features with the teacher's, sample by sample. G global batch, D embedding
width."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["fd_loss"]


def fd_loss(student: Float[Tensor, "G D"], teacher: Float[Tensor, "G D"]) -> Float[Tensor, ""]:
    """Feature distillation: mean over samples of the squared distance between unit-norm features (CLIP-KD, Yang et
    al. 2024).

    Where the widths differ, the student's features are mapped by a learned linear layer before they are normalised.
    """
    with torch.autocast(student.device.type, enabled=False):
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        return (student.to(wide) - teacher.detach().to(wide)).square().sum(dim=-1).mean()
