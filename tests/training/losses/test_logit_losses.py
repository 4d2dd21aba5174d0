"""The losses between logits against plain NumPy formulas, their minima, and what is left without true classes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor

from training.losses import deit_hard_loss, deit_soft_loss, kd_loss, softmax_kl

N, C = 6, 9  # rows, classes: not as many, as with class prompts
SHARES = torch.randn(N, C, generator=torch.Generator().manual_seed(7), dtype=torch.float64).softmax(dim=1)
TARGETS = {"none": None, "classes": torch.tensor([3, 0, 8, 8, 1, 5]), "probabilities": SHARES}


def logits(seed: int) -> Tensor:
    return 4 * torch.randn(N, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(target: Tensor, follower: Tensor, temperature: float) -> float:
    p, q = (log_softmax(x.numpy() / temperature, axis=1) for x in (target, follower))
    return float(np.sum(np.exp(p) * (p - q)) / N)


def cross_entropy(target: Tensor | None, student: Tensor, smoothing: float = 0.0) -> float:
    if target is None:
        return 0.0
    wanted = np.eye(C)[target.numpy()] if target.ndim == 1 else target.numpy()
    wanted = (1 - smoothing) * wanted + smoothing / C
    return float(-np.sum(wanted * log_softmax(student.numpy(), axis=1)) / N)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.0), (2.0, 0.1), (5.0, 0.0)])
def test_kd_loss_is_the_formula(name: str, direction: str, temperature: float, smoothing: float) -> None:
    student, teacher, targets = logits(0), logits(1), TARGETS[name]
    told = kl(teacher, student, temperature) if direction == "forward" else kl(student, teacher, temperature)
    expected = cross_entropy(targets, student, smoothing) + 0.7 * 2 * temperature**2 * told
    settings = {"temperature": temperature, "kd_lambda": 0.7, "direction": direction, "label_smoothing": smoothing}
    assert kd_loss(student, teacher, targets, **settings).item() == pytest.approx(expected, rel=1e-12)


def test_softmax_kl_refuses_another_direction_and_its_symmetric_form_is_the_mean() -> None:
    student, teacher = logits(0), logits(1)
    expected = (kl(teacher, student, 3.0) + kl(student, teacher, 3.0)) / 2 * 9
    assert softmax_kl(student, teacher, temperature=3.0, direction="symmetric").item() == pytest.approx(expected)
    with pytest.raises(KeyError, match="backward"):
        softmax_kl(student, teacher, direction="backward")


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_deit_losses_are_the_formulas(name: str, smoothing: float) -> None:
    own, distilled, teacher, targets = logits(0), logits(1), logits(2), TARGETS[name]
    hard = cross_entropy(targets, own, smoothing)
    soft = deit_soft_loss(own, distilled, teacher, targets, alpha=0.3, temperature=3.0, label_smoothing=smoothing)
    expected = 0.7 * hard + 0.3 * 9 * kl(teacher, distilled, 3.0)
    assert soft.item() == pytest.approx(expected, rel=1e-12)
    told = cross_entropy(teacher.argmax(dim=1), distilled)
    expected = told if targets is None else (hard + told) / 2
    loss = deit_hard_loss(own, distilled, teacher, targets, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_defaults_are_the_sources() -> None:
    own, distilled, teacher, targets = logits(0), logits(1), logits(2), TARGETS["classes"]
    expected = cross_entropy(targets, own) + 2 * 4 * kl(teacher, own, 2.0)
    assert kd_loss(own, teacher, targets).item() == pytest.approx(expected, rel=1e-12)
    expected = (cross_entropy(targets, own) + 9 * kl(teacher, distilled, 3.0)) / 2
    assert deit_soft_loss(own, distilled, teacher, targets).item() == pytest.approx(expected, rel=1e-12)


SOFT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kd": kd_loss,
    "kd reverse": lambda s, t: kd_loss(s, t, direction="reverse"),
    "symmetric": lambda s, t: softmax_kl(s, t, direction="symmetric"),
    "deit_soft": lambda s, t: deit_soft_loss(s, s, t),
}


@pytest.mark.parametrize("name", SOFT)
def test_the_teachers_logits_are_a_stationary_minimum_up_to_a_constant_a_row(name: str) -> None:
    teacher = logits(0)
    student = (teacher + torch.arange(N)[:, None]).requires_grad_()
    loss = SOFT[name](student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-10
    assert all(SOFT[name](teacher + 0.1 * logits(seed), teacher).item() > 1e-3 for seed in range(1, 6))


def test_deit_hard_asks_for_the_teachers_class_alone() -> None:
    """Another teacher with the same best classes changes nothing; one with other classes does."""
    own, teacher = logits(0), logits(1)
    loss = deit_hard_loss(own, own, teacher)
    assert deit_hard_loss(own, own, 3 * teacher - 1).item() == loss.item()
    assert deit_hard_loss(own, own, teacher.roll(1, 1)).item() != pytest.approx(loss.item(), rel=1e-3)
    assert deit_hard_loss(100 * teacher, 100 * teacher, teacher, teacher.argmax(dim=1)).item() < 1e-6
