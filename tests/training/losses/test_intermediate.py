"""Losses between what two transformers compute on the way: plain formulas, gradients, and what must not matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from plain_layers import (
    LENGTHS,
    STUDENT,
    TEACHER,
    plain_score_kl,
    plain_score_mse,
    plain_scores,
    plain_token_mse,
    random_trace,
)
from training.losses.intermediate import LossSum, attention_cells, relation_scores, score_kl, score_mse, token_mse


def mean_of(part: LossSum) -> float:
    return float(part.total / part.terms)


@pytest.mark.parametrize("causal", [False, True])
def test_pure_losses_are_the_plain_formulas(causal: bool) -> None:
    student, teacher = random_trace(STUDENT, 0), random_trace(replace(TEACHER, width=8), 1)
    cells = attention_cells(student.valid, causal=causal)
    ours, theirs = student.hidden[0], teacher.hidden[0]
    value = mean_of(token_mse(ours, theirs, student.valid))
    assert value == pytest.approx(plain_token_mse(ours.numpy(), theirs.numpy(), LENGTHS), rel=1e-12)
    ours, theirs = (relation_scores(trace.query[0], trace.key[0]) for trace in (student, teacher))
    for scores, trace in ((ours, student), (theirs, teacher)):
        plain = plain_scores(trace.query[0].numpy(), trace.key[0].numpy())
        np.testing.assert_allclose(scores.numpy(), plain, rtol=1e-12)
    mse, kl = mean_of(score_mse(ours, theirs, cells)), mean_of(score_kl(ours, theirs, cells))
    assert mse == pytest.approx(plain_score_mse(ours.numpy(), theirs.numpy(), LENGTHS, causal), rel=1e-12)
    assert kl == pytest.approx(plain_score_kl(ours.numpy(), theirs.numpy(), LENGTHS, causal), rel=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_means_over_heads_compare_any_numbers_of_them(causal: bool) -> None:
    student, teacher = random_trace(replace(STUDENT, heads=2), 0), random_trace(TEACHER, 1)
    cells = attention_cells(student.valid, causal=causal)
    ours, theirs = (relation_scores(trace.query[0], trace.key[0]) for trace in (student, teacher))
    mean = [scores.numpy().mean(axis=1, keepdims=True) for scores in (ours, theirs)]
    mse = mean_of(score_mse(ours, theirs, cells, head_match="mean"))
    assert mse == pytest.approx(plain_score_mse(mean[0], mean[1], LENGTHS, causal), rel=1e-12)
    kl = mean_of(score_kl(ours, theirs, cells, head_match="mean"))
    assert kl == pytest.approx(plain_score_kl(ours.numpy(), theirs.numpy(), LENGTHS, causal, mean=True), rel=1e-12)
    for loss in (score_mse, score_kl):
        with pytest.raises(ValueError, match="cannot be compared"):
            loss(ours, theirs, cells)
        with pytest.raises(ValueError, match="cannot be compared"):
            loss(ours[:, :1], theirs, cells)  # would broadcast


PURE: dict[str, Callable[[Tensor, Tensor, Tensor], LossSum]] = {
    "tokens": lambda s, t, valid: token_mse(s.flatten(2), t.flatten(2), valid),
    "scores": lambda s, t, valid: score_mse(_square(s), _square(t), attention_cells(valid, causal=True)),
    "probs": lambda s, t, valid: score_kl(_square(s), _square(t), attention_cells(valid, causal=True)),
    "mean scores": lambda s, t, valid: score_mse(
        _square(s), _square(t), attention_cells(valid, causal=False), head_match="mean"
    ),
    "mean probs": lambda s, t, valid: score_kl(
        _square(s), _square(t), attention_cells(valid, causal=False), head_match="mean"
    ),
}
VALID = torch.arange(3) < torch.tensor([3, 1])[:, None]


def _square(x: Tensor) -> Tensor:
    """[B, L, H, D] to scores [B, H, L, L] of heads with themselves and, as they lie, the next."""
    heads = x.transpose(1, 2)
    return relation_scores(heads, heads.roll(1, dims=3))


@pytest.mark.parametrize("name", PURE)
def test_gradient_is_that_of_finite_differences_and_least_at_the_teacher(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher, step = (torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    loss = PURE[name]
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, VALID).total, student.requires_grad_())
    same = teacher.clone().requires_grad_()
    value = loss(same, teacher, VALID).total
    value.backward()
    assert value.abs() < 1e-14 and same.grad is not None and same.grad.abs().max() < 1e-14
    near, far = (loss(teacher + size * step, teacher, VALID).total for size in (0.01, 0.1))
    assert 0 < near < far


@pytest.mark.parametrize("name", PURE)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_finite_in_float32_with_short_captions_and_pads_without_a_part(name: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(3, 3, 2, 4, generator=generator) for _ in range(2))
    valid = torch.arange(3) < torch.tensor([2, 1, 0])[:, None]
    leaf = student.clone().requires_grad_()
    total, terms = PURE[name](leaf, teacher, valid)
    total.backward()
    assert terms > 0 and total.isfinite() and leaf.grad is not None and leaf.grad.isfinite().all()
    assert leaf.grad[0].abs().max() > 0 and (leaf.grad.flatten(2)[~valid] == 0).all()
    other = torch.where(valid[:, :, None, None], student, 7.0), torch.where(valid[:, :, None, None], teacher, -3.0)
    torch.testing.assert_close(PURE[name](*other, valid), (total.detach(), terms), rtol=1e-6, atol=0)


def test_float32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 2, 4, generator=generator).bfloat16() for _ in range(2))
    for loss in PURE.values():
        expected = loss(student.float(), teacher.float(), VALID)
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(student, teacher, VALID)
        assert found.total.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
