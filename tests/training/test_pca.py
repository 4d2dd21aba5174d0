"""PCA against SVD autograd, finite differences and every degenerate batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.pca import _inverse_gaps, pca_factors, pca_project


def svd_pca(features: Tensor, rank: int) -> Tensor:
    mean = features.mean(dim=0, keepdim=True)
    _, _, vt = torch.linalg.svd(features - mean, full_matrices=False)
    return (features - mean) @ vt[:rank].T @ vt[:rank] + mean


def features(batch: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(batch, width, generator=generator, dtype=dtype), dim=-1)


def value_and_gradient(function, x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)
    y = function(x, rank)
    (y * weight).sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize(("batch", "width"), [(48, 96), (96, 48), (64, 64), (40, 33)])
def test_equals_svd_autograd_where_that_is_finite(batch: int, width: int) -> None:
    x = features(batch, width)
    ours, our_gradient = value_and_gradient(pca_project, x, 32)
    reference, reference_gradient = value_and_gradient(svd_pca, x, 32)
    torch.testing.assert_close(ours, reference, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(our_gradient, reference_gradient, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(("batch", "width"), [(9, 5), (5, 9)])
def test_gradient_equals_finite_differences(batch: int, width: int) -> None:
    x = features(batch, width).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: pca_project(y, 3), (x,), eps=1e-6, atol=1e-5)


def degenerate_batches() -> dict[str, Tensor]:
    distinct = features(128, 64, dtype=torch.float32)
    symmetric = torch.cat([torch.eye(64), -torch.eye(64)])  # all eigenvalues agree, also across the cut
    batches = {
        "64 duplicates": distinct[torch.arange(128) % 64],
        "8 distinct rows": distinct[torch.arange(128) % 8],
        "two distinct rows": distinct[torch.arange(128) % 2],
        "one row differs": distinct[(torch.arange(128) == 77).long()],
        "all equal": distinct[:1].expand(128, -1).contiguous(),
        "zeros": torch.zeros(128, 64),
        "a plane": distinct @ distinct[:2].T @ distinct[:2],
        "nearly equal": distinct[:1] + 1e-7 * distinct,
        "equal eigenvalues across the cut": symmetric,
        "huge": 1e15 * distinct,
        "small": 1e-15 * distinct,
        "one direction dwarfs the rest": distinct * torch.tensor([1e6] + [1.0] * 63),
    }
    few = {f"{name}, fewer rows than columns": batch[:48] for name, batch in batches.items()}
    return batches | few


@pytest.mark.parametrize("name", degenerate_batches())
def test_finite_on_degenerate_batches(name: str) -> None:
    x = degenerate_batches()[name]
    y, gradient = value_and_gradient(pca_project, x, 32)
    assert y.isfinite().all()
    assert gradient.isfinite().all()
    # 48 orthogonal rows: rounding separates tied eigenvalues by more than the tolerance for ties
    assert gradient.abs().max() < (1e7 if name.startswith("equal eigenvalues") and len(x) == 48 else 100)


@pytest.mark.parametrize("scale", [1e15, 1e-15])
@pytest.mark.parametrize("batch", [48, 128])
def test_the_unit_of_the_features_does_not_matter(batch: int, scale: float) -> None:
    x = features(batch, 64, dtype=torch.float32)
    y, gradient = value_and_gradient(pca_project, x, 32)
    scaled, same_gradient = value_and_gradient(pca_project, scale * x, 32)
    torch.testing.assert_close(scaled / scale, y, atol=1e-5, rtol=0)
    torch.testing.assert_close(same_gradient, gradient, atol=1e-4 * gradient.abs().max().item(), rtol=0)


def test_a_gap_above_rounding_is_divided_by_and_a_tie_is_not() -> None:
    eps = torch.finfo(torch.float64).eps
    values = torch.tensor([0.0, 0.5 - 64 * eps, 0.5, 0.5 + 2 * eps, 1.0], dtype=torch.float64)
    gaps = values[3:, None] - values[None, :3]
    expected = 1 / gaps
    expected[0, 2] = 0  # 2 eps is rounding
    assert _inverse_gaps(values, 3).tolist() == expected.tolist()


@pytest.mark.parametrize(("batch", "width"), [(48, 96), (96, 48)])
def test_factors_multiply_to_the_projection(batch: int, width: int) -> None:
    x = features(batch, width).requires_grad_()
    y, factors = pca_factors(x, 32)
    assert factors is not None
    coordinates, basis = factors
    assert coordinates.shape == (batch, 33)
    assert basis.shape == (33, width)
    assert not coordinates.requires_grad and not basis.requires_grad
    torch.testing.assert_close(coordinates @ basis, y.detach(), atol=1e-14, rtol=0)
    torch.testing.assert_close(y.detach(), svd_pca(x.detach(), 32), atol=1e-12, rtol=0)
    assert pca_factors(x[:, :32], 32)[1] is None


def test_rank_deficient_batch_is_kept_and_passes_its_gradient() -> None:
    """8 distinct rows span 7 directions: PCA of rank 32 keeps them, and within their span the gradient is the
    identity's."""
    x = features(8, 64)[torch.arange(128) % 8]
    y, _ = value_and_gradient(pca_project, x, 32)
    torch.testing.assert_close(y, x, atol=1e-12, rtol=0)
    generator = torch.Generator().manual_seed(3)
    span = x[:8] - x[:8].mean(dim=0)
    direction = torch.randn(128, 8, generator=generator, dtype=x.dtype) @ span
    weight = torch.randn(128, 64, generator=generator, dtype=x.dtype)
    leaf = x.clone().requires_grad_()
    (pca_project(leaf, 32) * weight).sum().backward()
    torch.testing.assert_close((leaf.grad * direction).sum(), (weight * direction).sum(), rtol=1e-9, atol=0)


def test_all_equal_rows_give_their_mean() -> None:
    x = features(1, 64).expand(40, -1)
    torch.testing.assert_close(pca_project(x, 32), x, atol=1e-12, rtol=0)


def test_autocast_does_not_lower_the_precision() -> None:
    x = features(64, 96, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = pca_project(x, 32)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, pca_project(x, 32), atol=0, rtol=0)


def test_non_finite_input_gives_non_finite_output() -> None:
    x = features(64, 96)
    x[3, 5] = torch.nan
    assert not pca_project(x, 32).isfinite().all()


@pytest.mark.parametrize("batch", [2, 32])
def test_batch_not_larger_than_the_rank_is_refused(batch: int) -> None:
    with pytest.raises(ValueError, match="at least 33 samples"):
        pca_project(features(batch, 64), 32)
