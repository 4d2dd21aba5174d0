"""Rank-k PCA of a feature batch with a gradient that stays finite.

Long-CLIP compares short captions with the image features that PCA has reduced to their main components (Zhang et al.
2024, section 3.2). Differentiating through an SVD divides by every gap between singular values and is NaN as soon as
two agree, which duplicate rows guarantee. The projector onto the kept subspace depends on the gaps between *kept* and
*dropped* eigenvalues alone, so its gradient is written here in closed form:

    dP = sum over kept i, dropped j of (u_i u_i^T dS u_j u_j^T + transpose) / (l_i - l_j)

Shapes: B samples, D features, K kept components, N = min(B, D).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

__all__ = ["pca_project"]


def pca_project(features: Float[Tensor, "B D"], rank: int = 32) -> Float[Tensor, "B D"]:
    """Centre `features`, keep the `rank` directions of largest variance, add the mean back. Not renormalised.

    Computed in float32 (float64 for float64 input) with autocast off. The gradient equals SVD autograd's wherever
    that is finite, and is finite everywhere: the inverse of a gap across the cut is bounded (at ten times the
    rounding error of the eigenvalues) and zero at an exact tie. A batch of equal rows gives its mean.

    Raises ValueError when `rank` is not in 1 .. B - 1: B centred rows span at most B - 1 directions, so PCA would do
    nothing.
    """
    batch, _ = features.shape
    if not 1 <= rank < batch:
        raise ValueError(f"PCA of rank {rank} needs a batch of at least {rank + 1} samples, got {batch}")
    with torch.autocast(features.device.type, enabled=False):
        features = features if features.dtype == torch.float64 else features.float()
        mean = features.mean(dim=0, keepdim=True)
        if rank >= features.shape[1]:
            return features.clone()
        return _TopComponents.apply(features - mean, rank) + mean


class _TopComponents(torch.autograd.Function):
    """Projection of centred rows [B, D] onto their own leading `rank` principal directions."""

    @staticmethod
    def forward(ctx: FunctionCtx, centred: Tensor, rank: int) -> Tensor:
        wide = centred.shape[0] < centred.shape[1]
        rows = centred if wide else centred.T  # [N, M]: the smaller side first, so the eigenproblem is N x N
        gram = rows @ rows.T
        scale = gram.diagonal().sum().clamp_min(torch.finfo(gram.dtype).tiny)
        values, vectors = _eigh(gram / scale)  # ascending; eigenvalues are shares of the variance
        kept = vectors[:, -rank:]  # [N, K]
        projected = kept @ (kept.T @ rows)
        ctx.save_for_backward(rows, values, vectors, scale)
        ctx.rank, ctx.wide = rank, wide  # type: ignore[attr-defined]
        return projected if wide else projected.T

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        rows, values, vectors, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_rows = grad if ctx.wide else grad.T  # type: ignore[attr-defined]
        cut = values.shape[0] - ctx.rank  # type: ignore[attr-defined]
        dropped, kept = vectors[:, :cut], vectors[:, cut:]
        # d loss / d gram for kept x dropped pairs: u_i^T (M + M^T) u_j / (l_i - l_j), with M = grad rows^T
        kept_rows, dropped_rows = kept.T @ rows, dropped.T @ rows
        kept_grad, dropped_grad = kept.T @ grad_rows, dropped.T @ grad_rows
        numerator = kept_grad @ dropped_rows.T + kept_rows @ dropped_grad.T  # [K, N - K]
        weight = numerator * _inverse_gaps(values, cut) / scale
        # <Q, dG> with Q = kept weight dropped^T and dG = d(rows rows^T) gives (Q + Q^T) rows
        grad_in = kept @ (kept_grad + weight @ dropped_rows) + dropped @ (weight.T @ kept_rows)
        return (grad_in if ctx.wide else grad_in.T), None  # type: ignore[attr-defined]


def _inverse_gaps(values: Tensor, cut: int) -> Tensor:
    """1 / (l_i - l_j) for kept i, dropped j [K, N - K], as gap / (gap^2 + t^2): zero at a tie, at most 1 / (2 t)."""
    tiny = torch.finfo(values.dtype).tiny
    tolerance = (10 * torch.finfo(values.dtype).eps * values[-1]).clamp_min(tiny**0.5)
    gap = values[cut:, None] - values[None, :cut]
    return gap / (gap.square() + tolerance.square())


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`, in float64 where float32 does not converge; NaN for non-finite input, so that the loss
    shows it."""
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        if not matrix.isfinite().all():
            return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)
        values, vectors = torch.linalg.eigh(matrix.double())
        return values.to(matrix.dtype), vectors.to(matrix.dtype)
