"""Contrastive loss and KL to the teacher of one pair of sides, in tiles: no G x G matrix is ever in memory.

Both losses depend on the logits through softmaxes over rows and over columns, so two passes over tiles of logits
suffice: the first sums exponentials, the second adds up values and gradient. Let p and c be the student's row and
column softmax, q_k and r_k those of teacher k of K, and T the contrastive target (symmetric, with rows that sum to
one):

    clip = mean of row and column log-sum-exps - <T, logits> / G
    crd  = 1/K sum_k [<q_k + r_k, teacher logits - logits> / 2G + difference of the mean log-sum-exps]
    d / d logits = (w_clip + w_crd) / 2G (p + c) - w_crd / 2GK sum_k (q_k + r_k) - w_clip / G T

Both losses share the logits and the two gradient products, so the weights are arguments. T needs no tiles: it is a mean
over equal captions plus a constant, and products with it cost O(G D).

Shapes: G global batch, D student width, Dt width of the teachers side by side, R rank of PCA'd images, K teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from training.losses.contrastive import clip_loss
from training.losses.precision import widened
from training.losses.relational import crd_loss, split_teachers
from training.losses.tiles import Factors, TiledLogits, Tiles

__all__ = ["PairedLosses", "full_matrix_losses", "paired_losses"]


class PairedLosses(NamedTuple):
    """Losses of one pair of sides."""

    total: Float[Tensor, ""]
    """clip_weight * clip + crd_weight * crd; only this value carries a gradient."""
    clip: Float[Tensor, ""] | None
    """Unweighted contrastive loss, detached; None at weight 0."""
    crd: Float[Tensor, ""] | None
    """Unweighted KL to the teacher, detached; None at weight 0."""


def full_matrix_losses(
    student_image: Float[Tensor, "G D"],
    student_text: Float[Tensor, "G D"],
    student_scale: Tensor | float,
    teacher_image: Float[Tensor, "G Dt"] | None = None,
    teacher_text: Float[Tensor, "G Dt"] | None = None,
    teacher_scale: float | Sequence[float] = 1.0,
    *,
    clip_weight: float,
    crd_weight: float,
    label_smoothing: float = 0.0,
    caption_groups: Int[Tensor, " G"] | None = None,
    teacher_widths: Sequence[int] | None = None,
) -> PairedLosses:
    """The result of `paired_losses`, computed by `clip_loss` and `crd_loss` on full matrices: its reference."""
    clip = crd = None
    total = student_image.new_zeros(())
    if clip_weight:
        clip = clip_loss(
            student_image,
            student_text,
            student_scale,
            label_smoothing=label_smoothing,
            caption_groups=caption_groups,
        )
        total = total + clip_weight * clip
    if crd_weight:
        if teacher_image is None or teacher_text is None:
            raise ValueError("the KL to the teacher needs the teacher's features")
        crd = crd_loss(
            student_image,
            student_text,
            teacher_image,
            teacher_text,
            student_scale,
            teacher_scale,
            teacher_widths=teacher_widths,
        )
        total = total + crd_weight * crd
    return PairedLosses(total, clip, crd)


def paired_losses(
    student_image: Float[Tensor, "G D"],
    student_text: Float[Tensor, "G D"],
    student_scale: Tensor | float,
    teacher_image: Float[Tensor, "G Dt"] | None = None,
    teacher_text: Float[Tensor, "G Dt"] | None = None,
    teacher_scale: float | Sequence[float] = 1.0,
    *,
    clip_weight: float,
    crd_weight: float,
    label_smoothing: float = 0.0,
    caption_groups: Int[Tensor, " G"] | None = None,
    teacher_widths: Sequence[int] | None = None,
    student_factors: Factors | None = None,
    teacher_factors: Sequence[Factors] | None = None,
    share: tuple[int, int] = (0, 1),
    tile: tuple[int, int] | None = None,
) -> PairedLosses:
    """The values of `clip_loss` and `crd_loss` and the gradient of their weighted sum, in O(G D) memory.

    Computed in float32 (float64 for float64 input) with autocast off. The gradient with respect to the student's
    features and scale is computed here; `total.backward()` only multiplies it.

    `teacher_widths` and `teacher_scale` are as in `crd_loss`. Factors, whose product is the given images (one pair per
    teacher), only save time: logits are then products of width R. `tile`: rows and columns of a tile.

    `share` = (rank, number of processes): every process passes the same features and the same factors, computes its
    share of the rows, and returns the complete losses and gradient. The backward pass does not communicate.

    Raises ValueError if a weight is negative, if both are 0, or if the KL has no teacher.
    """
    _check_weights(clip_weight, crd_weight, has_teacher=teacher_image is not None and teacher_text is not None)
    with torch.autocast(student_image.device.type, enabled=False):
        image, text = widened(student_image), widened(student_text, student_image)
        scale = widened(torch.as_tensor(student_scale, device=image.device), image)
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (image, text, scale))
        with torch.no_grad():
            tiles = Tiles(image, share, tile)
            student = TiledLogits(image, text, scale, student_factors, tiles)
            teachers = []
            if crd_weight and teacher_image is not None and teacher_text is not None:
                theirs = widened(teacher_image, image), widened(teacher_text, image)
                sides = split_teachers(*theirs, teacher_scale, teacher_widths)
                teachers = _tiled_teachers(sides, teacher_factors, tiles)
            target = _Target(image, text, label_smoothing, caption_groups) if clip_weight else None
            share_of_crd = crd_weight / (clip_weight + crd_weight)
            gap, products = _second_pass(tiles, student, teachers, text if learns else None, share_of_crd)
            clip = None if target is None else widened(student.mean_log_sum - scale * target.similarity, image)
            crd = None if gap is None else widened(student.mean_log_sum + gap, image)
            weighted = [(clip_weight, clip), (crd_weight, crd)]
            total = torch.stack([weight * value for weight, value in weighted if value is not None]).sum()
            gradient = None
            if products is not None:
                basis = None if student_factors is None else widened(student_factors[1], image)
                gradient = _gradient(products, image, scale, basis, (clip_weight + crd_weight) / 2)
                if target is not None:
                    target.add_gradient(gradient, scale, clip_weight)
        if gradient is not None:
            total = _WithGradient.apply(total, gradient, image, text, scale)
    return PairedLosses(total, clip, crd)


def _check_weights(clip_weight: float, crd_weight: float, *, has_teacher: bool) -> None:
    if min(clip_weight, crd_weight) < 0 or max(clip_weight, crd_weight) == 0:
        raise ValueError(f"loss weights must not be negative nor both 0, got {clip_weight} and {crd_weight}")
    if crd_weight and not has_teacher:
        raise ValueError("the KL to the teacher needs the teacher's features")


def _tiled_teachers(
    sides: Sequence[tuple[Tensor, Tensor, Tensor | float]], factors: Sequence[Factors] | None, tiles: Tiles
) -> list[TiledLogits]:
    known = [None] * len(sides) if factors is None else factors
    return [TiledLogits(*side, f, tiles) for side, f in zip(sides, known, strict=True)]


class _Target:
    """The part of the contrastive loss that is linear in the logits: their similarity to the target T."""

    def __init__(self, image: Tensor, text: Tensor, smoothing: float, groups: Tensor | None) -> None:
        self._texts, self._images = (_smoothed_means(side, smoothing, groups) for side in (text, image))
        self.similarity = (image * self._texts).sum(dim=1).mean(dtype=torch.float64)  # <T, image @ text.T> / G

    def add_gradient(self, gradient: tuple[Tensor, Tensor, Tensor], scale: Tensor, weight: float) -> None:
        """Add the gradient of -weight * scale * similarity to that of images, texts and scale, in place."""
        of_image, of_text, of_scale = gradient
        step = -weight / len(of_image) * scale
        of_image.addcmul_(self._texts, step)
        of_text.addcmul_(self._images, step)
        of_scale.sub_(weight * self.similarity)


def _smoothed_means(features: Tensor, smoothing: float, groups: Tensor | None) -> Tensor:
    """T @ features [G, D]: the mean over rows of the same group, mixed with the mean of all rows."""
    means = features if groups is None else _means_of_groups(features, groups)
    return torch.lerp(means, features.mean(dim=0), smoothing)


def _means_of_groups(features: Tensor, groups: Tensor) -> Tensor:
    """For each row [G, D] the mean of the rows of its group. It sorts the groups, because their number, which `unique`
    returns, would have to come from the device first."""
    in_order, order = groups.sort()
    index = torch.zeros_like(order)  # each row's group, counted from 0
    index[order[1:]] = (in_order[1:] != in_order[:-1]).cumsum(0)
    count = torch.zeros_like(index).index_add_(0, index, torch.ones_like(index)).clamp_min(1)
    sums = torch.zeros_like(features).index_add_(0, index, features)
    return (sums / count[:, None])[index]


def _second_pass(
    tiles: Tiles, student: TiledLogits, teachers: list[TiledLogits], text: Tensor | None, share_of_crd: float
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """Two sums over the tiles; each is None if it is not needed.

    With teachers: the difference of the KL and the student's mean log-sum-exp. With `text`: M @ text [G, D] and
    M.T @ student.left [G, D or R], where M = p + c - share_of_crd * mean_k (q_k + r_k).
    """
    gap = student.left.new_zeros((), dtype=torch.float64)
    products = None if text is None else (torch.zeros_like(text), torch.zeros_like(student.left))
    for rows, columns in tiles if teachers or products else ():
        logits = student.tile(rows, columns, "logits")
        difference, scratch = (tiles.memory(name, rows, columns) for name in ("difference", "scratch"))
        target = None
        for number, teacher in enumerate(teachers):
            similar = teacher.tile(rows, columns, "teacher" if number else "target")
            torch.sub(similar, logits, out=difference)
            teacher.to_softmaxes(similar, rows, columns, scratch)
            gap += difference.mul_(similar).sum()  # not torch.dot: its float32 sum is off by 5e-6
            target = similar if target is None else target.add_(similar)
        if products is not None and text is not None:
            student.to_softmaxes(logits, rows, columns, scratch)
            if target is not None:
                logits.sub_(target, alpha=share_of_crd / len(teachers))
            products[0][rows].addmm_(logits, text[columns])
            products[1][columns].addmm_(logits.T, student.left[rows])
    for product in products or ():
        tiles.sum_over_processes(product)
    if not teachers:
        return None, products
    gap = tiles.sum_over_processes(gap) / (2 * len(student.left) * len(teachers))
    return gap - torch.stack([teacher.mean_log_sum for teacher in teachers]).mean(), products


def _gradient(
    products: tuple[Tensor, Tensor], image: Tensor, scale: Tensor, basis: Tensor | None, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of images, texts and scale from the products of the second pass. Overwrites the products."""
    of_image, of_text = (product.mul_(weight / len(image)) for product in products)
    of_scale = (image * of_image).sum(dim=1).sum(dtype=torch.float64)
    return of_image.mul_(scale), of_text if basis is None else of_text @ basis, of_scale


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to the inputs is known."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, gradient: tuple[Tensor, ...], *_inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]  # type: ignore[attr-defined]
        gradient = ctx.saved_tensors  # type: ignore[attr-defined]
        return None, None, *(part * upstream if need else None for part, need in zip(gradient, needed, strict=True))
