"""Each loss against a plain NumPy formula, its minimum, its gradient, and its behaviour under autocast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor
from torch.nn.functional import normalize

from training.losses import clip_loss, crd_loss, fd_loss


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


def test_fd_loss_is_the_formula_and_zero_at_the_teacher() -> None:
    student, teacher = unit(6, 8, 0), unit(6, 8, 1)
    expected = np.mean(np.sum((student.numpy() - teacher.numpy()) ** 2, axis=1))
    assert fd_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert fd_loss(student, student).item() == 0


def test_gradients_equal_finite_differences() -> None:
    image, text, scale = (
        unit(4, 5, 0).requires_grad_(),
        unit(4, 5, 1).requires_grad_(),
        torch.tensor(7.0, dtype=torch.float64),
    )
    scale.requires_grad_()
    teacher = unit(4, 5, 2), unit(4, 5, 3)
    assert torch.autograd.gradcheck(lambda i, t, s: clip_loss(i, t, s, label_smoothing=0.1), (image, text, scale))
    assert torch.autograd.gradcheck(lambda i, t, s: crd_loss(i, t, *teacher, s, 20.0), (image, text, scale))
    assert torch.autograd.gradcheck(lambda i: fd_loss(i, teacher[0]), (image,))


def test_no_gradient_reaches_the_teacher() -> None:
    student = unit(4, 5, 0).requires_grad_()
    teacher = unit(4, 5, 1).requires_grad_()
    (crd_loss(student, student, teacher, teacher, 10.0, 10.0) + fd_loss(student, teacher)).backward()
    assert teacher.grad is None


def test_autocast_does_not_lower_the_precision() -> None:
    image, text, teacher = unit(16, 64, 0).float(), unit(16, 64, 1).float(), unit(16, 64, 2).float()

    def losses() -> list[Tensor]:
        return [
            clip_loss(image, text, 100.0),
            crd_loss(image, text, teacher, text, 100.0, 100.0),
            fd_loss(image, teacher),
        ]

    plain = losses()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = losses()
    for a, b in zip(plain, cast, strict=True):
        assert b.dtype == torch.float32
        assert a.item() == b.item()
