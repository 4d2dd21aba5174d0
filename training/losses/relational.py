"""Losses that compare how the student and the teacher relate images to texts.

Row i of images and texts is a pair. G global batch, Ds and Dt embedding widths, D one width of both: where they differ,
the student's features have been mapped to the teacher's by a learned linear layer and normalised again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, mse_loss, normalize

from training.losses.contrastive import clip_loss, contrastive_targets, similarity_logits
from training.losses.logits import Direction, softmax_kl
from training.losses.precision import widened

__all__ = [
    "afd_loss",
    "crd_loss",
    "gd_loss",
    "icl_loss",
    "split_teachers",
    "vrd_loss",
    "xrd_loss",
]


def crd_loss(
    student_image: Float[Tensor, "G Ds"],
    student_text: Float[Tensor, "G Ds"],
    teacher_image: Float[Tensor, "G Dt"],
    teacher_text: Float[Tensor, "G Dt"],
    student_scale: Tensor | float,
    teacher_scale: Tensor | float | Sequence[float],
    *,
    teacher_widths: Sequence[int] | None = None,
    temperature: float = 1.0,
    direction: Direction = "forward",
) -> Float[Tensor, ""]:
    """Contrastive relational distillation (CLIP-KD, Yang et al. 2024; the KL term of MobileCLIP, Vasu et al. 2024).

    Mean over image-to-text and text-to-image of `temperature`^2 * KL(teacher || student), the distributions being the
    softmax over the batch of each model's scaled similarities divided by `temperature`. `direction` may turn the KL
    round. The teacher carries no gradient.

    Several teachers lie side by side in the rows, as wide as `teacher_widths` says; `teacher_scale` is theirs all or
    one for each. Their KLs are averaged, as in MobileCLIP: the gradient of the forward KL is that of the KL to their
    mean distribution, the value is larger by how much they disagree among themselves.

    Affinity mimicking (TinyCLIP, Wu et al. 2023) is the cross-entropy with the same targets. It differs from the
    forward KL by the teacher's entropy alone, so it has this gradient.
    """
    student = similarity_logits(student_image, student_text, student_scale)  # [G, G]
    losses = []
    for image, text, scale in split_teachers(teacher_image, teacher_text, teacher_scale, teacher_widths):
        teacher = similarity_logits(image, text, scale)
        losses += [
            softmax_kl(s, t, temperature=temperature, direction=direction)
            for s, t in ((student, teacher), (student.T, teacher.T))
        ]
    return torch.stack(losses).mean()


def icl_loss(
    student_image: Float[Tensor, "G D"],
    student_text: Float[Tensor, "G D"],
    teacher_image: Float[Tensor, "G D"],
    teacher_text: Float[Tensor, "G D"],
    logit_scale: Tensor | float,
    *,
    label_smoothing: float = 0.0,
    caption_groups: Int[Tensor, " G"] | None = None,
) -> Float[Tensor, ""]:
    """Interactive contrastive learning (CLIP-KD, Yang et al. 2024): mean of the cross-entropies of student images
    against teacher texts and of student texts against teacher images.

    `logit_scale` is this loss's own, learned. Rows of equal `caption_groups` share the target, as in `clip_loss`. The
    teacher carries no gradient.
    """
    per_image = similarity_logits(student_image, teacher_text.detach(), logit_scale)  # [G, G]
    per_text = similarity_logits(student_text, teacher_image.detach(), logit_scale)
    target = contrastive_targets(per_image, caption_groups)
    losses = [cross_entropy(logits, target, label_smoothing=label_smoothing) for logits in (per_image, per_text)]
    return torch.stack(losses).mean()


def gd_loss(
    student_image: Float[Tensor, "G D"],
    student_text: Float[Tensor, "G D"],
    teacher_image: Float[Tensor, "G D"],
    teacher_text: Float[Tensor, "G D"],
    student_scale: Tensor | float,
    teacher_scale: Tensor | float,
) -> Float[Tensor, ""]:
    """Gradient distillation (CLIP-KD, Yang et al. 2024): mean squared error between the gradients that the contrastive
    loss has at the student's and at the teacher's features, summed over images and texts.

    The gradients are those of `clip_loss`, itself a mean over the batch, and the error is a mean over the G x D
    elements: the value goes as (scale / G)^2 / D and needs a large weight that grows with the square of the batch.
    CLIP-KD's is 1e8, with an implementation that divides similarities by the logit scale where the loss multiplies:
    it does not carry over. The teacher carries no gradient.
    """
    student = _contrastive_gradients(student_image, student_text, student_scale)
    with torch.no_grad():
        teacher = _contrastive_gradients(teacher_image, teacher_text, teacher_scale)
    return torch.stack([mse_loss(s, t) for s, t in zip(student, teacher, strict=True)]).sum()


def afd_loss(
    student_image: Float[Tensor, "G Ds"],
    student_text: Float[Tensor, "G Ds"],
    teacher_image: Float[Tensor, "G Dt"],
    teacher_text: Float[Tensor, "G Dt"],
    image_weight: Float[Tensor, "Do Ds+Dt"],
    text_weight: Float[Tensor, "Do Ds+Dt"],
    logit_scale: Tensor | float,
    *,
    label_smoothing: float = 0.0,
    caption_groups: Int[Tensor, " G"] | None = None,
) -> Float[Tensor, ""]:
    """Augmented feature distillation (CLIP-KD, Yang et al. 2024): `clip_loss` of fused features, which are the
    unit-norm image of student and teacher features side by side under a learned linear map for each modality.

    `logit_scale` is this loss's own, learned. The teacher carries no gradient.
    """
    image = _fused(student_image, teacher_image, image_weight)
    text = _fused(student_text, teacher_text, text_weight)
    return clip_loss(image, text, logit_scale, label_smoothing=label_smoothing, caption_groups=caption_groups)


def vrd_loss(
    student_image: Float[Tensor, "G D"],
    student_text: Float[Tensor, "G D"],
    teacher_image: Float[Tensor, "G D"],
    teacher_text: Float[Tensor, "G D"],
    logit_scale: Tensor | float,
) -> Float[Tensor, ""]:
    """Vertical relational distillation (CLIP-RD, Chung et al. 2026): within each modality the student's features find
    their teacher's, and as surely among images as among texts.

    The relations are softmaxes over the batch of scaled similarities between the teacher's and the student's features
    of one modality. The loss is the mean over teacher-to-student and student-to-teacher of KL(relation of texts ||
    relation of images), the texts' carrying no gradient, plus for each modality the cross-entropy with the true pairs
    (the contrastive loss of teacher and student). `logit_scale` is this loss's own, learned, one for both modalities
    where the published code has two. The teacher carries no gradient.
    """
    image = similarity_logits(teacher_image.detach(), student_image, logit_scale)  # [G, G], teacher to student
    text = similarity_logits(teacher_text.detach(), student_text, logit_scale)
    target = contrastive_targets(image)
    images_follow = [softmax_kl(image, text), softmax_kl(image.T, text.T)]
    found = [cross_entropy(logits, target) for logits in (image, image.T, text, text.T)]
    return torch.stack(images_follow).mean() + 2 * torch.stack(found).mean()  # a mean for each modality


def xrd_loss(
    student_image: Float[Tensor, "G D"],
    student_text: Float[Tensor, "G D"],
    teacher_image: Float[Tensor, "G D"],
    teacher_text: Float[Tensor, "G D"],
    logit_scale: Tensor | float,
) -> Float[Tensor, ""]:
    """Cross relational distillation (CLIP-RD, Chung et al. 2026): relations of teacher images to student texts and of
    teacher texts to student images follow each other, and likewise those of student to teacher.

    Mean of four KLs between softmaxes over the batch of scaled similarities: either relation of a couple is once the
    target, without gradient, and once the follower. Zero also where all relations are flat: it is meant beside a loss
    that tells pairs apart. `logit_scale` is linear, CLIP-RD's that of `icl_loss`. The teacher carries no gradient.
    """
    teacher_image, teacher_text = teacher_image.detach(), teacher_text.detach()
    image = similarity_logits(teacher_image, student_text, logit_scale)  # [G, G], teacher images to student texts
    text = similarity_logits(teacher_text, student_image, logit_scale)
    couples = ((image, text), (text, image), (image.T, text.T), (text.T, image.T))
    return torch.stack([softmax_kl(follower, target) for follower, target in couples]).mean()


def _contrastive_gradients(
    image: Float[Tensor, "G D"], text: Float[Tensor, "G D"], logit_scale: Tensor | float
) -> tuple[Float[Tensor, "G D"], Float[Tensor, "G D"]]:
    """Gradients of `clip_loss` with respect to image and text features, in closed form, themselves differentiable."""
    logits = similarity_logits(image, text, logit_scale)  # [G, G]
    count = len(logits)
    own = torch.eye(count, dtype=logits.dtype, device=logits.device)
    slope = (logits.softmax(dim=1) + logits.softmax(dim=0) - 2 * own) / (2 * count)  # d clip_loss / d logits
    with torch.autocast(logits.device.type, enabled=False):
        return logit_scale * (slope @ text.to(slope.dtype)), logit_scale * (slope.T @ image.to(slope.dtype))


def _fused(
    student: Float[Tensor, "G Ds"], teacher: Float[Tensor, "G Dt"], weight: Float[Tensor, "Do Ds+Dt"]
) -> Float[Tensor, "G Do"]:
    """Unit-norm rows of weight @ [student; teacher]."""
    with torch.autocast(student.device.type, enabled=False):
        both = torch.cat([widened(student), widened(teacher.detach(), student)], dim=1)
        return normalize(linear(both, widened(weight, student)), dim=1)


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
