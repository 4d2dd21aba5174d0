"""Losses that compare how the student and the teacher relate images to texts. G global batch, D embedding widths."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from training.losses.contrastive import similarity_logits

__all__ = ["crd_loss"]


def crd_loss(
    student_image: Float[Tensor, "G Ds"],
    student_text: Float[Tensor, "G Ds"],
    teacher_image: Float[Tensor, "G Dt"],
    teacher_text: Float[Tensor, "G Dt"],
    student_scale: Tensor | float,
    teacher_scale: Tensor | float,
) -> Float[Tensor, ""]:
    """Contrastive relational distillation (CLIP-KD, Yang et al. 2024; the KL term of MobileCLIP, Vasu et al. 2024).

    Mean over the two directions of KL(teacher || student), the distributions being the softmax over the batch of each
    model's scaled similarities. The teacher carries no gradient.
    """
    student = similarity_logits(student_image, student_text, student_scale)  # [G, G]
    teacher = similarity_logits(teacher_image, teacher_text, teacher_scale).detach()
    per_image, per_text = (
        kl_div(log_softmax(s, dim=1), log_softmax(t, dim=1), reduction="batchmean", log_target=True)
        for s, t in ((student, teacher), (student.T, teacher.T))
    )
    return (per_image + per_text) / 2
