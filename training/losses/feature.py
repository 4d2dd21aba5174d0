"""Losses that compare the student's features with the teacher's, sample by sample. G global batch, D embedding
width.

Features are unit-norm. Where the widths differ, the student's are mapped by a learned linear layer before they are
normalised. All are means over samples, of what is summed over the D channels; the teacher carries no gradient.
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
    al. 2024), D times the mean squared error that the paper weighs with 2000."""
    return _difference(student, teacher).square().sum(dim=-1).mean()


def l1_loss(student: Float[Tensor, "G D"], teacher: Float[Tensor, "G D"]) -> Float[Tensor, ""]:
    """Mean over samples of the L1 distance, the sum over channels of the absolute differences: D times the mean
    absolute error."""
    return _difference(student, teacher).abs().sum(dim=-1).mean()


def cos_loss(student: Float[Tensor, "G D"], teacher: Float[Tensor, "G D"]) -> Float[Tensor, ""]:
    """Mean over samples of 1 - cosine, whatever the norms: half of `fd_loss` on unit-norm features."""
    teacher = widened(teacher.detach(), student)
    return (1 - cosine_similarity(widened(student), teacher, dim=-1)).mean()


def kl_loss(
    student: Float[Tensor, "G D"], teacher: Float[Tensor, "G D"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Mean over samples of `temperature`^2 * KL(softmax(teacher / temperature) || softmax(student / temperature)), the
    softmaxes being over the channels.

    Components of unit-norm features are of order D^-1/2: at temperature 1 the softmaxes are almost flat and the value
    is about 1 / 2D of the squared distance. The square of the temperature keeps that limit for all larger ones. A
    constant added to all channels of a sample is not seen.
    """
    return softmax_kl(student, teacher, temperature=temperature)


def _difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Return student - teacher in the losses' precision. The teacher carries no gradient."""
    return widened(student) - widened(teacher.detach(), student)
