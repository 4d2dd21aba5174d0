"""The contrastive loss and the KL to the teacher against plain NumPy formulas; and of all losses the gradient, the
teacher's freedom from it, the precision under autocast, and finite values where softmaxes are sharp.

The other formulas and minima are in test_relational.py, test_logit_losses.py and test_feature_losses.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor
from torch.nn.functional import normalize

from training.losses import (
    afd_loss,
    clip_loss,
    contrastive_targets,
    cos_loss,
    crd_loss,
    deit_hard_loss,
    deit_soft_loss,
    fd_loss,
    gd_loss,
    icl_loss,
    kd_loss,
    kl_loss,
    l1_loss,
    similarity_logits,
    vrd_loss,
    xrd_loss,
)

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of student images and texts, teacher images and texts [G, D], and the student's or the loss's own scale."""
TEACHER_SCALE = 20.0


def of_logits(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """A loss of student's and teacher's logits and targets as a loss of features."""

    def of_features(si: Tensor, st: Tensor, ti: Tensor, tt: Tensor, scale: Tensor) -> Tensor:
        student, teacher = similarity_logits(si, st, scale), similarity_logits(ti, tt, TEACHER_SCALE)
        return loss(student, teacher, contrastive_targets(student))

    return of_features


def fused(si: Tensor, st: Tensor, ti: Tensor, tt: Tensor, scale: Tensor) -> Tensor:
    weights = [torch.randn(6, 10, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    return afd_loss(si, st, ti, tt, *weights, scale)


LOSSES: dict[str, Loss] = {
    "clip": lambda si, st, ti, tt, s: clip_loss(si, st, s, label_smoothing=0.1),
    "crd": lambda si, st, ti, tt, s: crd_loss(si, st, ti, tt, s, TEACHER_SCALE),
    "crd reverse": lambda *x: crd_loss(*x, TEACHER_SCALE, temperature=2.0, direction="reverse"),
    "crd symmetric": lambda *x: crd_loss(*x, TEACHER_SCALE, temperature=0.5, direction="symmetric"),
    "icl": lambda *x: icl_loss(*x, label_smoothing=0.1),
    "gd": lambda *x: gd_loss(*x, TEACHER_SCALE),
    "afd": fused,
    "vrd": vrd_loss,
    "xrd": xrd_loss,
    "kd": of_logits(kd_loss),
    "kd reverse": of_logits(lambda s, t, y: kd_loss(s, t, y, direction="reverse", label_smoothing=0.1)),
    "deit_soft": of_logits(lambda s, t, y: deit_soft_loss(s, s.T, t, y)),
    "deit_hard": of_logits(lambda s, t, y: deit_hard_loss(s, s.T, t, y)),
    "fd": lambda si, st, ti, tt, s: fd_loss(si, ti),
    "l1": lambda si, st, ti, tt, s: l1_loss(si, ti),
    "cos": lambda si, st, ti, tt, s: cos_loss(si, ti),
    "kl": lambda si, st, ti, tt, s: kl_loss(si, ti, 0.1),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def unit(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1)


def numpy_cross_entropy(logits: np.ndarray, target: np.ndarray) -> float:
    return float(-(target * log_softmax(logits, axis=1)).sum(axis=1).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_clip_loss_is_the_formula(smoothing: float) -> None:
    image, text, scale, n = unit(6, 8, 0), unit(6, 8, 1), 13.0, 6
    logits = scale * image.numpy() @ text.numpy().T
    target = (1 - smoothing) * np.eye(n) + smoothing / n
    expected = (numpy_cross_entropy(logits, target) + numpy_cross_entropy(logits.T, target)) / 2
    assert clip_loss(image, text, scale, label_smoothing=smoothing).item() == pytest.approx(expected, rel=1e-12)


def test_clip_loss_shares_the_target_between_identical_captions() -> None:
    image, text = unit(5, 8, 0), unit(5, 8, 1)
    groups = torch.tensor([4, 9, 4, 4, 2])
    text = text[torch.tensor([0, 1, 0, 0, 4])]
    target = np.array(
        [
            [1 / 3, 0, 1 / 3, 1 / 3, 0],
            [0, 1, 0, 0, 0],
            [1 / 3, 0, 1 / 3, 1 / 3, 0],
            [1 / 3, 0, 1 / 3, 1 / 3, 0],
            [0, 0, 0, 0, 1],
        ]
    )
    target = 0.9 * target + 0.1 / 5
    logits = 20 * image.numpy() @ text.numpy().T
    expected = (numpy_cross_entropy(logits, target) + numpy_cross_entropy(logits.T, target)) / 2
    ours = clip_loss(image, text, 20.0, label_smoothing=0.1, caption_groups=groups)
    assert ours.item() == pytest.approx(expected, rel=1e-12)
    distinct = clip_loss(image, text, 20.0, caption_groups=torch.arange(5))
    assert distinct.item() == pytest.approx(clip_loss(image, text, 20.0).item(), rel=1e-12)


def test_clip_loss_falls_to_zero_for_aligned_distinct_features() -> None:
    features = torch.eye(8, dtype=torch.float64)
    assert clip_loss(features, features, 100.0).item() < 1e-12
    assert clip_loss(features, features.roll(1, 0), 100.0).item() > 50


def test_crd_loss_is_the_formula() -> None:
    s_image, s_text, t_image, t_text = unit(6, 8, 0), unit(6, 8, 1), unit(6, 12, 2), unit(6, 12, 3)
    student, teacher = 9.0 * s_image.numpy() @ s_text.numpy().T, 30.0 * t_image.numpy() @ t_text.numpy().T
    expected = 0.0
    for s, t in ((student, teacher), (student.T, teacher.T)):
        log_p, log_q = log_softmax(t, axis=1), log_softmax(s, axis=1)
        expected += (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean() / 2
    assert crd_loss(s_image, s_text, t_image, t_text, 9.0, 30.0).item() == pytest.approx(expected, rel=1e-12)


def test_crd_loss_is_zero_and_stationary_at_the_teacher_alone() -> None:
    image, text = unit(6, 8, 0).requires_grad_(), unit(6, 8, 1).requires_grad_()
    loss = crd_loss(image, text, image.detach(), text.detach(), 30.0, 30.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert image.grad.abs().max() < 1e-10
    assert crd_loss(image, text, image.detach(), text.detach(), 10.0, 30.0).item() > 0.1


def test_crd_loss_of_two_teachers_is_their_mean() -> None:
    """And has the gradient of the cross-entropy to the mean of their distributions, MobileCLIP's form."""
    s_image, s_text = unit(6, 8, 0).requires_grad_(), unit(6, 8, 1)
    teachers = [(unit(6, width, seed), unit(6, width, seed + 1)) for seed, width in ((2, 4), (4, 10))]
    image, text = (torch.cat(sides, dim=1) for sides in zip(*teachers, strict=True))
    both = crd_loss(s_image, s_text, image, text, 9.0, (30.0, 20.0), teacher_widths=(4, 10))
    alone = [crd_loss(s_image, s_text, i, t, 9.0, c) for (i, t), c in zip(teachers, (30.0, 20.0), strict=True)]
    assert both.item() == pytest.approx((alone[0] + alone[1]).item() / 2, rel=1e-12)
    assert abs(alone[0].item() - alone[1].item()) > 0.1
    one_scale = crd_loss(s_image, s_text, image, text, 9.0, 30.0, teacher_widths=(4, 10))
    assert one_scale.item() == pytest.approx(
        crd_loss(s_image, s_text, image, text, 9.0, (30.0, 30.0), teacher_widths=(4, 10)).item(), rel=1e-12
    )
    logits = 9.0 * s_image @ s_text.T
    first, second = (c * i @ t.T for (i, t), c in zip(teachers, (30.0, 20.0), strict=True))
    mixed = logits.new_zeros(())
    for dim in (0, 1):
        target = (first.softmax(dim) + second.softmax(dim)) / 2
        mixed = mixed - (target * logits.log_softmax(dim)).sum() / 6 / 2
    gradients = [torch.autograd.grad(loss, s_image)[0] for loss in (both, mixed)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_teachers_that_do_not_fill_their_features_are_refused() -> None:
    image = unit(4, 6, 0)
    with pytest.raises(ValueError, match=r"widths \[4, 4\] do not fill features of width 6"):
        crd_loss(image, image, image, image, 1.0, 1.0, teacher_widths=(4, 4))
    with pytest.raises(ValueError, match="2 teachers need as many logit scales or one, got 3"):
        crd_loss(image, image, image, image, 1.0, (1.0, 2.0, 3.0), teacher_widths=(2, 4))


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("vrd", "xrd")])  # see test_relational.py
def test_gradients_equal_finite_differences(name: str) -> None:
    student = [unit(4, 5, seed).requires_grad_() for seed in (0, 1)]
    teacher = [unit(4, 5, seed) for seed in (2, 3)]
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda i, t, s: LOSSES[name](i, t, *teacher, s), (*student, scale))


@each_loss
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    features = [unit(4, 5, seed).requires_grad_() for seed in range(4)]
    LOSSES[name](*features, torch.tensor(10.0)).backward()
    assert features[0].grad.abs().max() > 0
    assert features[2].grad is None
    assert features[3].grad is None


@each_loss
@pytest.mark.parametrize("copies", ["none", "duplicates", "all equal"])
def test_values_and_gradients_are_finite_at_sharp_softmaxes(name: str, copies: str) -> None:
    rows = {"none": range(16), "duplicates": [0, 0, 1, 1] * 4, "all equal": [0] * 16}[copies]
    features = [unit(16, 5, seed).float()[list(rows)] for seed in range(4)]
    student = [x.requires_grad_() for x in features[:2]]
    scale = torch.tensor(100.0, requires_grad=True)
    loss = LOSSES[name](*features, scale)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in (*student, scale) if x.grad is not None)


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_lower_the_precision(name: str, dtype: torch.dtype) -> None:
    features = [unit(16, 5, seed).float() for seed in range(4)]
    plain = LOSSES[name](*features, torch.tensor(100.0))
    with torch.autocast("cpu", dtype=dtype):
        cast = LOSSES[name](*features, torch.tensor(100.0))
    assert cast.dtype == torch.float32
    assert cast.item() == plain.item()


@each_loss
def test_half_precision_features_are_widened(name: str) -> None:
    features = [unit(16, 5, seed).to(torch.bfloat16) for seed in range(4)]
    widened = LOSSES[name](*(x.float() for x in features), torch.tensor(100.0))
    loss = LOSSES[name](*features, torch.tensor(100.0))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(widened.item(), rel=1e-6)
