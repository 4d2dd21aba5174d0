"""The losses between features, sample by sample, against plain NumPy formulas, and their minima."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import Tensor
from torch.nn.functional import normalize

from training.losses import cos_loss, fd_loss, kl_loss, l1_loss

ROWS, WIDTH = 6, 8


def unit(seed: int, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(ROWS, width, generator=generator, dtype=torch.float64), dim=-1)


def numpy_kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    p, q = softmax(teacher / temperature, axis=1), softmax(student / temperature, axis=1)
    return temperature**2 * np.sum(p * np.log(p / q), axis=1)


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "fd": (fd_loss, lambda s, t: np.linalg.norm(s - t, axis=1) ** 2),
    "l1": (l1_loss, lambda s, t: np.linalg.norm(s - t, ord=1, axis=1)),
    "cos": (cos_loss, lambda s, t: 1 - np.einsum("gd,gd->g", s, t)),
    "kl": (kl_loss, lambda s, t: numpy_kl(s, t, 1.0)),
    "kl sharp": (lambda s, t: kl_loss(s, t, 0.05), lambda s, t: numpy_kl(s, t, 0.05)),
}
each_loss = pytest.mark.parametrize(("loss", "formula"), LOSSES.values(), ids=LOSSES)


@each_loss
def test_loss_is_the_mean_of_the_formula_over_samples(
    loss: Callable[..., Tensor], formula: Callable[..., np.ndarray]
) -> None:
    student, teacher = unit(0), unit(1)
    expected = np.mean(formula(student.numpy(), teacher.numpy()))
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@each_loss
def test_the_teacher_itself_is_the_minimum(loss: Callable[..., Tensor], formula: Callable[..., np.ndarray]) -> None:
    teacher = unit(0)
    student = teacher.clone().requires_grad_()
    least = loss(student, teacher)
    least.backward()
    assert least.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-10
    for seed in range(1, 6):
        assert loss(normalize(teacher + 0.1 * unit(seed), dim=1), teacher).item() > 1e-5


def test_cos_loss_is_half_of_fd_loss_and_heeds_no_norm() -> None:
    student, teacher = unit(0), unit(1)
    assert cos_loss(student, teacher).item() == pytest.approx(fd_loss(student, teacher).item() / 2, rel=1e-12)
    assert cos_loss(3 * student, 0.2 * teacher).item() == pytest.approx(cos_loss(student, teacher).item(), rel=1e-12)


def test_kl_loss_of_wide_features_is_their_squared_distance_over_twice_the_width() -> None:
    """The limit that its docstring names, at temperature 1 and above; the squared temperature keeps it."""
    student, teacher = unit(0, width=512), unit(1, width=512)
    expected = fd_loss(student, teacher).item() / (2 * 512)
    for temperature in (1.0, 10.0, 100.0):
        assert kl_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=0.05)
