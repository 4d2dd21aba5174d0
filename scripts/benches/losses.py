"""loss: contrastive and KL losses in tiles against full matrices. pca: the PCA branch against SVD autograd.

Shapes: G global batch, B batch, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from benches.measure import BenchOptions, Row, in_own_process, medians, peak_memory_gb
from training.losses import clip_loss, crd_loss, paired_losses
from training.losses.contrastive import similarity_logits
from training.pca import pca_factors, pca_project

__all__ = ["bench_loss", "bench_pca"]

BATCH, FULL_BATCH, WIDTH, RANK = 2048, 8192, 512, 32
PCA_BATCHES = (128, 1024, 4096)
SCALE, SMOOTHING = 100.0, 0.1
WEIGHTS = ((0.8, 1.5), (0.4, 0.5))  # (contrastive, KL) for the long captions, then for the short ones


def bench_loss(options: BenchOptions) -> Iterator[Row]:
    """Measure ITC and KL, forward and backward, for long captions and for short ones with PCA'd images: time and
    memory."""
    batch = FULL_BATCH if options.full else BATCH
    for baseline in BASELINES:
        yield in_own_process(time_case, batch, baseline, options)
    for baseline in BASELINES:
        ours, theirs = (in_own_process(memory_case, batch, name, options) for name in ("in tiles", baseline))
        yield Row(
            case=f"memory above the inputs, G={batch}, D={WIDTH}, {baseline}",
            unit="GB",
            ours=ours,
            baseline=theirs,
            ratio=theirs / ours,
            max_abs_diff=None,
            peak_gb=theirs,
        )


@dataclass
class Sides:
    """Detached features of both sides, with the long captions or with the short ones."""

    image: Tensor
    text: Tensor
    teacher_image: Tensor
    teacher_text: Tensor
    factors: tuple[Tensor, Tensor] | None = None
    teacher_factors: tuple[Tensor, Tensor] | None = None


class Problem:
    """A batch of random features and the learned scale. Features of a pair, and of student and teacher, are similar."""

    def __init__(self, batch: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        common = torch.randn(batch, WIDTH, generator=generator)

        def features(noise: float) -> Tensor:  # in place: memory freed here would hide what the losses need
            x = torch.randn(batch, WIDTH, generator=generator).mul_(noise).add_(common)
            return x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True)).to(device)

        image, teacher_image = features(2.0), features(1.0)
        main_image, factors = pca_factors(image, RANK)
        main_teacher, teacher_factors = pca_factors(teacher_image, RANK)
        self.scale = torch.tensor(SCALE, device=device, requires_grad=True)
        self.sides = (
            Sides(image, features(2.0), teacher_image, features(1.0)),
            Sides(main_image, features(3.0), main_teacher, features(2.0), factors, teacher_factors),
        )
        self.leaves = [x.requires_grad_() for side in self.sides for x in (side.image, side.text)] + [self.scale]

    def gradient(self, loss: Callable[[Sides, Tensor, float, float], Tensor]) -> tuple[Tensor, ...]:
        """Return the gradient of the weighted sum of all losses with respect to the student's features and scale."""
        total = sum(loss(side, self.scale, *weights) for side, weights in zip(self.sides, WEIGHTS, strict=True))
        assert isinstance(total, Tensor)
        return torch.autograd.grad(total, self.leaves)

    def exact_gradient(self) -> tuple[Tensor, ...]:
        """Return the gradient by full matrices in float64, one pair of sides at a time to save memory."""
        scale = self.scale.detach().double().requires_grad_()
        parts, of_scale = [], torch.zeros_like(scale)
        for side, weights in zip(self.sides, WEIGHTS, strict=True):
            image, text = (x.detach().double().requires_grad_() for x in (side.image, side.text))
            exact = Sides(image, text, side.teacher_image.double(), side.teacher_text.double())
            *of_sides, of_this_scale = torch.autograd.grad(logits_once(exact, scale, *weights), (image, text, scale))
            parts += of_sides
            of_scale += of_this_scale
        return *parts, of_scale


def in_tiles(side: Sides, scale: Tensor, clip_weight: float, crd_weight: float) -> Tensor:
    """Compute the losses in tiles, as training does."""
    return paired_losses(
        side.image,
        side.text,
        scale,
        side.teacher_image,
        side.teacher_text,
        SCALE,
        clip_weight=clip_weight,
        crd_weight=crd_weight,
        label_smoothing=SMOOTHING,
        student_factors=side.factors,
        teacher_factors=None if side.teacher_factors is None else [side.teacher_factors],
    ).total


def full_matrices(side: Sides, scale: Tensor, clip_weight: float, crd_weight: float) -> Tensor:
    """Compute the losses by one function each, with separate logits."""
    clip = clip_loss(side.image, side.text, scale, label_smoothing=SMOOTHING)
    crd = crd_loss(side.image, side.text, side.teacher_image, side.teacher_text, scale, SCALE)
    return clip_weight * clip + crd_weight * crd


def logits_once(side: Sides, scale: Tensor, clip_weight: float, crd_weight: float) -> Tensor:
    """Compute the losses on full matrices, with the student's logits computed once for both."""
    student = similarity_logits(side.image, side.text, scale)
    teacher = similarity_logits(side.teacher_image, side.teacher_text, SCALE)
    target = torch.arange(len(student), device=student.device)
    total = student.new_zeros(())
    for s, t in ((student, teacher), (student.T, teacher.T)):
        clip = cross_entropy(s, target, label_smoothing=SMOOTHING)
        crd = kl_div(log_softmax(s, dim=1), log_softmax(t, dim=1), reduction="batchmean", log_target=True)
        total = total + (clip_weight * clip + crd_weight * crd) / 2
    return total


BASELINES = {"against full matrices": full_matrices, "against full matrices, logits once": logits_once}
LOSSES = {"in tiles": in_tiles, **BASELINES}


def time_case(batch: int, baseline: str, options: BenchOptions) -> Row:
    """Measure the seconds of one forward and backward pass.

    The difference compares ours with full matrices in float64, relative to the largest entry of each gradient. In
    float32, full matrices are further from that reference than ours.
    """
    problem = Problem(batch, options.device)
    pair = [lambda name=name: problem.gradient(LOSSES[name]) for name in ("in tiles", baseline)]
    ours, theirs = medians(pair, options.rounds, options.device)
    peak_gb = peak_memory_gb()
    return Row(
        case=f"ITC + KL, long + short, G={batch}, D={WIDTH}, {baseline}",
        unit="s",
        ours=ours,
        baseline=theirs,
        ratio=theirs / ours,
        max_abs_diff=max(
            float((a.double() - b).abs().max() / b.abs().max())
            for a, b in zip(problem.gradient(in_tiles), problem.exact_gradient(), strict=True)
        ),
        peak_gb=peak_gb,
    )


def memory_case(batch: int, name: str, options: BenchOptions) -> float:
    """Return the peak GB of one forward and backward pass above the inputs."""
    Problem(64, options.device).gradient(LOSSES[name])  # loads libraries and starts threads
    problem = Problem(batch, options.device)
    if options.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(options.device)
        before = torch.cuda.memory_allocated(options.device)
        problem.gradient(LOSSES[name])
        return (torch.cuda.max_memory_allocated(options.device) - before) / 1e9
    before_gb = peak_memory_gb()
    problem.gradient(LOSSES[name])
    return peak_memory_gb() - before_gb


def bench_pca(options: BenchOptions) -> Iterator[Row]:
    """Measure the PCA branch, forward and backward, against autograd through torch.linalg.svd."""
    for batch in PCA_BATCHES:
        yield in_own_process(pca_case, batch, options)


def svd_project(features: Tensor, rank: int) -> Tensor:
    """Project as published with Long-CLIP: centre, project on the leading right singular vectors and back, add the
    mean."""
    mean = features.mean(dim=0, keepdim=True)
    _, _, vt = torch.linalg.svd(features - mean, full_matrices=False)
    return (features - mean) @ vt[:rank].T @ vt[:rank] + mean


def pca_case(batch: int, options: BenchOptions) -> Row:
    """Measure one size: random unit vectors about a common mean, with an upstream gradient of norm 1."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, WIDTH, generator=generator) + torch.randn(WIDTH, generator=generator) / 2
    features = torch.nn.functional.normalize(features, dim=1).to(options.device).requires_grad_()
    upstream = torch.randn(batch, WIDTH, generator=generator)
    upstream = (upstream / upstream.norm()).to(options.device)

    def gradient(project: Callable[[Tensor, int], Tensor]) -> Tensor:
        return torch.autograd.grad(project(features, RANK), features, upstream)[0]

    ours, baseline = medians(
        [lambda: gradient(pca_project), lambda: gradient(svd_project)], 4 * options.rounds, options.device
    )
    return Row(
        case=f"rank {RANK}, B={batch}, D={WIDTH}",
        unit="s",
        ours=ours,
        baseline=baseline,
        ratio=baseline / ours,
        max_abs_diff=float((gradient(pca_project) - gradient(svd_project)).abs().max()),
        peak_gb=peak_memory_gb(),
    )
