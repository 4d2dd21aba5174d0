"""Losses that compare the student's features with the teacher's, sample by sample. G global batch, D embedding
width.

Features are unit-norm. If the widths differ, a learned linear layer maps the student's before they are normalised.
Each loss sums over the D channels and averages over the samples. The teacher carries no gradient.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from training.losses.logits import softmax_kl
from training.losses.precision import widened

__all__ = ["cos_loss", "fd_loss", "kl_loss", "l1_loss"]


def fd_loss(student: Float[Tensor, "G D"], teacher: Float[Tensor, "G D"]) -> Float[Tensor, ""]:
    """Feature distillation: mean over samples of the squared distance between unit-norm features (CLIP-KD, Yang et
    al. 2024). It is D times the mean squared error that the paper gives a weight of 2000."""
    return _difference(student, teacher).square().sum(dim=-1).mean()


def l1_loss(student: Float[Tensor, "G D"], teacher: Float[Tensor, "G D"]) -> Float[Tensor, ""]:
    """Mean over samples of the L1 distance, which sums the absolute differences over channels: D times the mean
    absolute error."""
    return _difference(student, teacher).abs().sum(dim=-1).mean()


def cos_loss(student: Float[Tensor, "G D"], teacher: Float[Tensor, "G D"]) -> Float[Tensor, ""]:
    """Mean over samples of 1 - cosine, for rows of any norm. On unit-norm features it is half of `fd_loss`."""
    teacher = widened(teacher.detach(), student)
    return (1 - cosine_similarity(widened(student), teacher, dim=-1)).mean()


def kl_loss(
    student: Float[Tensor, "G D"], teacher: Float[Tensor, "G D"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Mean over samples of `temperature`^2 * KL(softmax(teacher / temperature) || softmax(student / temperature)), with
    softmaxes over the channels.

    Components of unit-norm features are of order D^-1/2, so at temperature 1 the softmaxes are almost flat and the
    value is about 1 / 2D of the squared distance. The factor `temperature`^2 keeps that limit at higher temperatures.
    Adding a constant to all channels of a sample does not change the loss.
    """
    return softmax_kl(student, teacher, temperature=temperature)


def _difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Return student - teacher in the losses' precision. The teacher carries no gradient."""
    return widened(student) - widened(teacher.detach(), student)
