"""Losses that compare how the student and the teacher relate images to texts.

Row i of the images and row i of the texts are a pair. G global batch, Ds and Dt embedding widths of student and
teacher. D stands for a width that both share: if theirs differ, a learned linear layer has mapped the student's
features to the teacher's width, and they were normalised again."""

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

    Mean over image-to-text and text-to-image of `temperature`^2 * KL(teacher || student). The distributions are
    softmaxes over the batch of each model's scaled similarities divided by `temperature`. `direction` can reverse the
    KL. The teacher carries no gradient.

    Several teachers stand side by side in the rows; `teacher_widths` gives their widths, and `teacher_scale` one scale
    for all or one for each. Their KLs are averaged, as in MobileCLIP: the forward KL has the gradient of the KL to
    their mean distribution, and its value is larger by how much the teachers disagree.

    Affinity mimicking (TinyCLIP, Wu et al. 2023) is the cross-entropy with the same targets. It differs from the
    forward KL only by the teacher's entropy, so it has the same gradient.
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

    `logit_scale` is learned by this loss alone. Rows of the same group in `caption_groups` share the target, as in
    `clip_loss`. The teacher carries no gradient.
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
    """Gradient distillation (CLIP-KD, Yang et al. 2024): mean squared error between the gradients of the contrastive
    loss with respect to the student's and to the teacher's features, summed over images and texts.

    The gradients are those of `clip_loss`, which is a mean over the batch, and the error is a mean over the G x D
    elements. The value is therefore of order (scale / G)^2 / D and needs a large weight that grows with the square of
    the batch. CLIP-KD's weight of 1e8 does not carry over, because its implementation divides similarities by the logit
    scale where the loss multiplies them. The teacher carries no gradient.
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
    """Augmented feature distillation (CLIP-KD, Yang et al. 2024): `clip_loss` of fused features. A learned linear map
    for each modality fuses student and teacher features side by side, and the result is normalised.

    `logit_scale` is learned by this loss alone. The teacher carries no gradient.
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
    """Vertical relational distillation (CLIP-RD, Chung et al. 2026): within each modality, student and teacher features
    of the same sample match, with equal confidence for images and for texts.

    A relation is the softmax over the batch of the scaled similarities between the teacher's and the student's features
    of one modality. The loss is the mean over teacher-to-student and student-to-teacher of KL(relation of texts ||
    relation of images), where the relation of texts carries no gradient, plus for each modality the cross-entropy with
    the true pairs (the contrastive loss of teacher and student). `logit_scale` is learned by this loss alone, one for
    both modalities; the published code has two. The teacher carries no gradient.
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

    Mean of four KLs between softmaxes over the batch of scaled similarities: each relation of a couple is the target
    once, without gradient, and the follower once. The loss is also zero if all relations are flat, so combine it with a
    loss that tells pairs apart. `logit_scale` is linear; CLIP-RD uses that of `icl_loss`. The teacher carries no
    gradient.
    """
    teacher_image, teacher_text = teacher_image.detach(), teacher_text.detach()
    image = similarity_logits(teacher_image, student_text, logit_scale)  # [G, G], teacher images to student texts
    text = similarity_logits(teacher_text, student_image, logit_scale)
    couples = ((image, text), (text, image), (image.T, text.T), (text.T, image.T))
    return torch.stack([softmax_kl(follower, target) for follower, target in couples]).mean()


def _contrastive_gradients(
    image: Float[Tensor, "G D"], text: Float[Tensor, "G D"], logit_scale: Tensor | float
) -> tuple[Float[Tensor, "G D"], Float[Tensor, "G D"]]:
    """Gradients of `clip_loss` with respect to image and text features, in closed form. They are differentiable."""
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

    Raises ValueError if the widths do not add up to that of a row, or if there are more or fewer scales than teachers.
    """
    widths = [image.shape[1]] if widths is None else list(widths)
    if sum(widths) != image.shape[1]:
        raise ValueError(f"teachers of widths {widths} do not fill features of width {image.shape[1]}")
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(widths)
    if len(scales) != len(widths):
        raise ValueError(f"{len(widths)} teachers need as many logit scales or one, got {len(scales)}")
    return list(zip(image.split(widths, dim=1), text.split(widths, dim=1), scales, strict=True))
