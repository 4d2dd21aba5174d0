"""The benches compare like with like: both sides compute the same gradients, and each row says so."""

from __future__ import annotations

import pytest
import torch

from benches.losses import BASELINES, LOSSES, Problem, memory_case, pca_case, time_case
from benches.measure import BenchOptions, in_own_process

OPTIONS = BenchOptions(full=False, rounds=1, device=torch.device("cpu"), precision="fp32")


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_losses_compared_have_the_same_gradients(baseline: str) -> None:
    problem = Problem(96, OPTIONS.device)
    ours, theirs = problem.gradient(LOSSES["in tiles"]), problem.gradient(LOSSES[baseline])
    assert len(ours) == 5  # images and texts, long and short, and the scale
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-5
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())
    row = time_case(96, baseline, OPTIONS)
    assert row.max_abs_diff is not None
    assert 0 < row.max_abs_diff < 1e-5
    assert row.ratio == row.baseline / row.ours


def test_full_matrices_need_more_memory_than_tiles() -> None:
    full, tiles = (in_own_process(memory_case, 1536, name, OPTIONS) for name in ("against full matrices", "in tiles"))
    assert full > 0.08  # of 17 matrices of 9.4 MB
    assert 0 < tiles < full / 2


@pytest.mark.parametrize("batch", [64, 600])
def test_the_pcas_compared_have_the_same_gradient(batch: int) -> None:
    row = pca_case(batch, OPTIONS)
    assert row.max_abs_diff is not None
    assert row.max_abs_diff < 1e-5
