"""Rank-k PCA of a feature batch with a gradient that stays finite.

Long-CLIP compares short captions with the image features that PCA has reduced to their main components (Zhang et al.
2024, section 3.2). Differentiating through an SVD divides by every gap between singular values and is NaN as soon as
two agree, which duplicate rows guarantee. The projector onto the kept subspace depends on the gaps between *kept* and
*dropped* eigenvalues alone, so its gradient is written here in closed form:

    dP = sum over kept i, dropped j of (u_i u_i^T dS u_j u_j^T + transpose) / (l_i - l_j)

Processes that share the work on one loss need one basis: eigenvectors are unique only up to their signs, and those of
equal eigenvalues up to a rotation, so that two devices may return different ones for the same matrix. All processes
therefore take the decomposition of rank 0.

Shapes: B samples, D features, K kept components, N = min(B, D).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

__all__ = ["pca_factors", "pca_project"]


def pca_project(features: Float[Tensor, "B D"], rank: int = 32) -> Float[Tensor, "B D"]:
    """Centre `features`, keep the `rank` directions of largest variance, add the mean back. Not renormalised.

    Computed in float32 (float64 for float64 input) with autocast off. The gradient equals SVD autograd's wherever
    that is finite, and is finite everywhere: a gap across the cut within ten times the rounding error of the
    eigenvalues counts as a tie, which contributes nothing. A batch of equal rows gives its mean.

    Raises ValueError when `rank` is not in 1 .. B - 1: B centred rows span at most B - 1 directions, so PCA would do
    nothing.
    """
    return pca_factors(features, rank)[0]


def pca_factors(
    features: Float[Tensor, "B D"], rank: int = 32, *, same_on_every_process: bool = False
) -> tuple[Float[Tensor, "B D"], tuple[Float[Tensor, "B K1"], Float[Tensor, "K1 D"]] | None]:
    """`pca_project(features, rank)` and what it is the product of: coordinates and basis, K1 = `rank` + 1.

    The factors carry no gradient. They are None if `rank` >= D, which leaves the features as they are.
    `same_on_every_process`: every process passes the same features, and gets the same factors, bit for bit.
    """
    batch, width = features.shape
    if not 1 <= rank < batch:
        raise ValueError(f"PCA of rank {rank} needs a batch of at least {rank + 1} samples, got {batch}")
    with torch.autocast(features.device.type, enabled=False):
        features = features if features.dtype == torch.float64 else features.float()
        if rank >= width:
            return features.clone(), None
        projected, coordinates, basis = _Projection.apply(features, rank, same_on_every_process)
        return projected, (coordinates, basis)


class _Projection(torch.autograd.Function):
    """Rows [B, D] projected onto their mean and their own leading `rank` principal directions.

    The smaller of the B x B Gram matrix and the D x D covariance is decomposed. "rows" are the centred features with
    that side first [N, M].
    """

    @staticmethod
    def forward(ctx: FunctionCtx, features: Tensor, rank: int, is_shared: bool) -> tuple[Tensor, Tensor, Tensor]:
        mean = features.mean(dim=0, keepdim=True)
        centred = features - mean
        wide = centred.shape[0] < centred.shape[1]
        rows = centred if wide else centred.T
        gram = rows @ rows.T
        scale = gram.diagonal().sum().clamp_min(torch.finfo(gram.dtype).tiny)
        values, vectors = _eigh(gram / scale)  # ascending; eigenvalues are shares of the variance
        if is_shared:
            values, vectors = _of_rank_zero(values, vectors)
        kept = vectors[:, -rank:]  # [N, K]
        kept_rows = kept.T @ rows  # [K, M]
        coordinates, basis = (kept, kept_rows) if wide else (kept_rows.T, kept.T)
        coordinates = torch.cat([coordinates, torch.ones_like(coordinates[:, :1])], dim=1)
        basis = torch.cat([basis, mean])
        ctx.save_for_backward(rows, kept_rows, values, vectors, scale)
        ctx.wide = wide  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(coordinates, basis)
        return coordinates @ basis, coordinates, basis

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        rows, kept_rows, values, vectors, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_rows = grad if ctx.wide else grad.T  # type: ignore[attr-defined]
        cut = len(values) - len(kept_rows)
        dropped, kept = vectors[:, :cut], vectors[:, cut:]
        # d loss / d gram for kept x dropped pairs: u_i^T (M + M^T) u_j / (l_i - l_j), with M = grad rows^T. Only K rows
        # of it are needed, so that no product is larger than K N M.
        kept_grad = kept.T @ grad_rows
        numerator = (kept_grad @ rows.T + kept_rows @ grad_rows.T) @ dropped  # [K, N - K]
        weight = (numerator * _inverse_gaps(values, cut) / scale) @ dropped.T  # [K, N]
        # <Q, dG> with Q = kept weight and dG = d(rows rows^T) gives (Q + Q^T) rows
        left = torch.cat([kept, weight.T], dim=1)  # [N, 2 K]
        right = torch.cat([kept_grad + weight @ rows, kept_rows])  # [2 K, M]
        grad_in = left @ right if ctx.wide else right.T @ left.T  # type: ignore[attr-defined]
        return grad_in.add_(grad.mean(dim=0) - grad_in.mean(dim=0)), None, None


def _inverse_gaps(values: Tensor, cut: int) -> Tensor:
    """1 / (l_i - l_j) for kept i, dropped j [K, N - K]; zero at a tie, a gap within ten times the rounding error."""
    limits = torch.finfo(values.dtype)
    gap = values[cut:, None] - values[None, :cut]
    tie = gap <= (10 * limits.eps * values[-1]).clamp_min(limits.tiny**0.5)
    return gap.reciprocal_().masked_fill_(tie, 0)


def _of_rank_zero(values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The decomposition that rank 0 has found, on every process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values, vectors
    columns = vectors.mT.contiguous()  # eigh's matrices lie column by column; broadcast needs rows
    for tensor in (values, columns):
        dist.broadcast(tensor, src=0)
    return values, columns.mT


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`, in float64 if float32 does not converge. Non-finite input gives NaN, so that the loss shows
    it."""
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        if not matrix.isfinite().all():
            return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)
        values, vectors = torch.linalg.eigh(matrix.double())
        return values.to(matrix.dtype), vectors.to(matrix.dtype)
