"""Losses that compare how the student and the teacher relate images to texts. G global batch, D embedding widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from training.losses.contrastive import similarity_logits

__all__ = ["crd_loss", "split_teachers"]


def crd_loss(
    student_image: Float[Tensor, "G Ds"],
    student_text: Float[Tensor, "G Ds"],
    teacher_image: Float[Tensor, "G Dt"],
    teacher_text: Float[Tensor, "G Dt"],
    student_scale: Tensor | float,
    teacher_scale: Tensor | float | Sequence[float],
    *,
    teacher_widths: Sequence[int] | None = None,
) -> Float[Tensor, ""]:
    """Contrastive relational distillation (CLIP-KD, Yang et al. 2024; the KL term of MobileCLIP, Vasu et al. 2024).

    Mean over the two directions of KL(teacher || student), the distributions being the softmax over the batch of each
    model's scaled similarities. The teacher carries no gradient.

    Several teachers lie side by side in the rows, as wide as `teacher_widths` says; `teacher_scale` is theirs all or
    one for each. Their KLs are averaged, as in MobileCLIP: the gradient is that of the KL to their mean distribution,
    the value is larger by how much they disagree among themselves.
    """
    student = similarity_logits(student_image, student_text, student_scale)  # [G, G]
    losses = []
    for image, text, scale in split_teachers(teacher_image, teacher_text, teacher_scale, teacher_widths):
        teacher = similarity_logits(image, text, scale).detach()
        losses += [
            kl_div(log_softmax(s, dim=1), log_softmax(t, dim=1), reduction="batchmean", log_target=True)
            for s, t in ((student, teacher), (student.T, teacher.T))
        ]
    return torch.stack(losses).mean()


def split_teachers(
    image: Float[Tensor, "G Dt"],
    text: Float[Tensor, "G Dt"],
    scale: Tensor | float | Sequence[float],
    widths: Sequence[int] | None,
) -> list[tuple[Tensor, Tensor, Tensor | float]]:
    """Image features, text features and logit scale of each of the teachers side by side.

    Raises ValueError where the widths do not add up to the rows', or the scales are not as many as the teachers.
    """
    widths = [image.shape[1]] if widths is None else list(widths)
    if sum(widths) != image.shape[1]:
        raise ValueError(f"teachers of widths {widths} do not fill features of width {image.shape[1]}")
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(widths)
    if len(scales) != len(widths):
        raise ValueError(f"{len(widths)} teachers need as many logit scales or one, got {len(scales)}")
    return list(zip(image.split(widths, dim=1), text.split(widths, dim=1), scales, strict=True))
