"""Losses that compare the student's logits with the teacher's, and with the true classes if they are known.

Shapes: N rows to classify (images or captions), C classes (captions or images of the batch, or prompts).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from training.losses.precision import widened

__all__ = ["Direction", "deit_hard_loss", "deit_soft_loss", "kd_loss", "softmax_kl"]

Direction = Literal["forward", "reverse", "symmetric"]
"""forward: KL(teacher || student). reverse: KL(student || teacher). symmetric: their mean."""


def softmax_kl(
    student_logits: Float[Tensor, "N C"],
    teacher_logits: Float[Tensor, "N C"],
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
) -> Float[Tensor, ""]:
    """`temperature`^2 times the KL between softmax(logits / temperature) of teacher and student, mean over rows.

    Computed in float32 (float64 for float64 input). The factor `temperature`^2 keeps the size of the gradient as the
    temperature grows (Hinton et al. 2015). The teacher carries no gradient in any direction.
    """
    student, teacher = (log_softmax(widened(x) / temperature, dim=1) for x in (student_logits, teacher_logits.detach()))
    sides = {
        "forward": [(teacher, student)],
        "reverse": [(student, teacher)],
        "symmetric": [(teacher, student), (student, teacher)],
    }[direction]
    kls = [kl_div(q, p, reduction="batchmean", log_target=True) for p, q in sides]  # KL(p || q)
    return temperature**2 * torch.stack(kls).mean()


def kd_loss(
    student_logits: Float[Tensor, "N C"],
    teacher_logits: Float[Tensor, "N C"],
    targets: Int[Tensor, " N"] | Float[Tensor, "N C"] | None = None,
    *,
    temperature: float = 2.0,
    kd_lambda: float = 1.0,
    direction: Direction = "forward",
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Logit distillation (Hinton et al. 2015): cross-entropy + `kd_lambda` * 2 * `temperature`^2 * KL.

    `targets` are true classes or their probabilities; without them there is no cross-entropy. `softmax_kl` gives the
    KL at `temperature`, as a mean over rows. The cross-entropy is at temperature 1.
    """
    soft = 2 * kd_lambda * softmax_kl(student_logits, teacher_logits, temperature=temperature, direction=direction)
    if targets is None:
        return soft
    return cross_entropy(widened(student_logits), targets, label_smoothing=label_smoothing) + soft


def deit_soft_loss(
    class_logits: Float[Tensor, "N C"],
    distillation_logits: Float[Tensor, "N C"],
    teacher_logits: Float[Tensor, "N C"],
    targets: Int[Tensor, " N"] | Float[Tensor, "N C"] | None = None,
    *,
    alpha: float = 0.5,
    temperature: float = 3.0,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Soft distillation of DeiT (Touvron et al. 2021, eq. 2): (1 - `alpha`) cross-entropy + `alpha` * T^2 KL(teacher
    || student).

    The cross-entropy uses the class head and the KL uses the distillation head. A student with one head passes its
    logits twice. `targets` are true classes or their probabilities; without them only the KL remains, still times
    `alpha`. The KL is a mean over rows, as in the paper; the published code also divides it by the number of classes.
    """
    soft = alpha * softmax_kl(distillation_logits, teacher_logits, temperature=temperature)
    if targets is None:
        return soft
    return (1 - alpha) * cross_entropy(widened(class_logits), targets, label_smoothing=label_smoothing) + soft


def deit_hard_loss(
    class_logits: Float[Tensor, "N C"],
    distillation_logits: Float[Tensor, "N C"],
    teacher_logits: Float[Tensor, "N C"],
    targets: Int[Tensor, " N"] | Float[Tensor, "N C"] | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Hard-label distillation of DeiT (Touvron et al. 2021, eq. 3): mean of the class head's cross-entropy with
    `targets` and the distillation head's with the teacher's best class.

    A student with one head passes its logits twice. `targets` are true classes or their probabilities; without them the
    second cross-entropy is the loss. Label smoothing applies to `targets` only, as published.
    """
    hard = cross_entropy(widened(distillation_logits), teacher_logits.argmax(dim=1))
    if targets is None:
        return hard
    return (cross_entropy(widened(class_logits), targets, label_smoothing=label_smoothing) + hard) / 2
