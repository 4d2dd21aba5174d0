"""The losses between relations of images and texts against plain NumPy formulas, and where their minima are."""

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
    crd_loss,
    gd_loss,
    icl_loss,
    vrd_loss,
    xrd_loss,
)

G, STUDENT, TEACHER = 6, 9.0, 30.0  # pairs, logit scales


def unit(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1)


def features(*widths: int) -> list[Tensor]:
    """Student images and texts, teacher images and texts."""
    return [unit(G, width, seed) for seed, width in enumerate(widths or (8, 8, 8, 8))]


def arrays(tensors: list[Tensor]) -> list[np.ndarray]:
    return [x.numpy() for x in tensors]


def kl(target: np.ndarray, follower: np.ndarray) -> float:
    """Mean over rows of the KL from the softmax of `follower` to that of `target`."""
    p, q = log_softmax(target, axis=1), log_softmax(follower, axis=1)
    return float(np.sum(np.exp(p) * (p - q)) / len(p))


def cross_entropy(target: np.ndarray, logits: np.ndarray) -> float:
    return float(-np.sum(target * log_softmax(logits, axis=1)) / len(logits))


def both_ways(loss: Callable[[np.ndarray, np.ndarray], float], student: np.ndarray, teacher: np.ndarray) -> float:
    return (loss(student, teacher) + loss(student.T, teacher.T)) / 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
def test_crd_loss_is_the_formula(temperature: float, direction: str) -> None:
    si, st, ti, tt = arrays(tensors := features(8, 8, 12, 12))
    s, t = STUDENT / temperature * si @ st.T, TEACHER / temperature * ti @ tt.T
    forward, reverse = both_ways(lambda s, t: kl(t, s), s, t), both_ways(kl, s, t)
    expected = {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[direction]
    loss = crd_loss(*tensors, STUDENT, TEACHER, temperature=temperature, direction=direction)
    assert loss.item() == pytest.approx(temperature**2 * expected, rel=1e-12)
    assert forward != pytest.approx(reverse, rel=0.05)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_affinity_mimicking_has_the_gradient_of_crd(temperature: float) -> None:
    """TinyCLIP's soft cross-entropy differs from crd by the teacher's entropy: it needs no loss of its own."""
    tensors = features(8, 8, 12, 12)
    image, text = (x.requires_grad_() for x in tensors[:2])
    student, teacher = STUDENT / temperature * image @ text.T, TEACHER / temperature * tensors[2] @ tensors[3].T
    affinity = (
        temperature**2
        / 2
        * sum(
            torch.nn.functional.cross_entropy(s, t.softmax(dim=1))
            for s, t in ((student, teacher), (student.T, teacher.T))
        )
    )
    crd = crd_loss(*tensors, STUDENT, TEACHER, temperature=temperature)
    assert affinity.item() > crd.item() + 0.01
    for ours, theirs in zip(*(torch.autograd.grad(x, (image, text)) for x in (crd, affinity)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("groups", [None, [3, 0, 3, 1, 2, 3]])
def test_icl_loss_is_the_formula(smoothing: float, groups: list[int] | None) -> None:
    si, st, ti, tt = arrays(tensors := features())
    same = np.eye(G) if groups is None else np.equal.outer(groups, groups)
    target = (1 - smoothing) * same / same.sum(axis=1, keepdims=True) + smoothing / G
    expected = (cross_entropy(target, 13.0 * si @ tt.T) + cross_entropy(target, 13.0 * st @ ti.T)) / 2
    named = None if groups is None else torch.tensor(groups)
    loss = icl_loss(*tensors, 13.0, label_smoothing=smoothing, caption_groups=named)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def clip_gradients(image: Tensor, text: Tensor, scale: float) -> list[np.ndarray]:
    """Gradients of clip_loss by central differences."""
    gradients = []
    for moved in (image, text):
        gradient = np.zeros(moved.shape)
        for index in np.ndindex(*moved.shape):
            kept = moved[index].item()
            ends = []
            for step in (1e-5, -1e-5):
                moved[index] = kept + step
                ends.append(clip_loss(image, text, scale).item())
            moved[index] = kept
            gradient[index] = (ends[0] - ends[1]) / 2e-5
        gradients.append(gradient)
    return gradients


def test_gd_loss_is_the_distance_of_the_contrastive_gradients() -> None:
    si, st, ti, tt = features()
    pairs = zip(clip_gradients(si, st, STUDENT), clip_gradients(ti, tt, TEACHER), strict=True)
    expected = sum(np.mean((s - t) ** 2) for s, t in pairs)
    assert gd_loss(si, st, ti, tt, STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-7)


def test_gd_loss_has_the_gradient_of_autograds_second_order() -> None:
    tensors = features()
    student = [x.requires_grad_() for x in tensors[:2]]
    scale = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    leaves = (*student, scale)
    teacher = [x.requires_grad_() for x in tensors[2:]]
    ours = torch.autograd.grad(clip_loss(*student, scale), student, create_graph=True)
    theirs = torch.autograd.grad(clip_loss(*teacher, TEACHER), teacher)
    expected = torch.stack([(s - t).square().mean() for s, t in zip(ours, theirs, strict=True)]).sum()
    loss = gd_loss(*student, *teacher, scale, TEACHER)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for got, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("groups", [None, [3, 0, 3, 1, 2, 3]])
def test_afd_loss_is_the_formula(smoothing: float, groups: list[int] | None) -> None:
    si, st, ti, tt = arrays(tensors := features(8, 8, 12, 12))
    weights = [torch.randn(7, 20, generator=torch.Generator().manual_seed(k)).double() for k in (0, 1)]
    fused = []
    for student, teacher, weight in ((si, ti, weights[0]), (st, tt, weights[1])):
        mixed = student @ weight.numpy()[:, :8].T + teacher @ weight.numpy()[:, 8:].T
        fused.append(mixed / np.linalg.norm(mixed, axis=1, keepdims=True))
    same = np.eye(G) if groups is None else np.equal.outer(groups, groups)
    target = (1 - smoothing) * same / same.sum(axis=1, keepdims=True) + smoothing / G
    logits = 13.0 * fused[0] @ fused[1].T
    expected = (cross_entropy(target, logits) + cross_entropy(target, logits.T)) / 2
    named = None if groups is None else torch.tensor(groups)
    loss = afd_loss(*tensors, *weights, 13.0, label_smoothing=smoothing, caption_groups=named)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_afd_loss_trains_its_maps() -> None:
    weights = [torch.ones(7, 20, dtype=torch.float64).tril().requires_grad_() for _ in range(2)]
    tensors = features(8, 8, 12, 12)
    assert torch.autograd.gradcheck(lambda i, t: afd_loss(*tensors, i, t, 5.0), weights)


def numpy_vrd(followers: list[np.ndarray], targets: list[np.ndarray], teachers: list[np.ndarray], c: float) -> float:
    """`targets` are the student's features and scale where they carry no gradient."""
    (si, st), (ti, tt) = followers, teachers
    image, text, true = c * ti @ si.T, c * tt @ st.T, np.eye(len(si))
    told = c * tt @ targets[1].T
    follow = (kl(told, image) + kl(told.T, image.T)) / 2
    found = sum((cross_entropy(true, x) + cross_entropy(true, x.T)) / 2 for x in (image, text))
    return follow + found


def numpy_xrd(followers: list[np.ndarray], targets: list[np.ndarray], teachers: list[np.ndarray], c: float) -> float:
    (si, st), (ti, tt) = followers, teachers
    image, text = c * ti @ st.T, c * tt @ si.T
    told_image, told_text = c * ti @ targets[1].T, c * tt @ targets[0].T
    return (kl(told_text, image) + kl(told_image, text) + kl(told_text.T, image.T) + kl(told_image.T, text.T)) / 4


@pytest.mark.parametrize(("loss", "formula"), [(vrd_loss, numpy_vrd), (xrd_loss, numpy_xrd)])
def test_vrd_and_xrd_are_the_formulas_with_targets_held(
    loss: Callable[..., Tensor], formula: Callable[..., float]
) -> None:
    """Value, and gradient against central differences of the formula in which the targets do not move."""
    tensors = features()
    held, teachers = [x.numpy().copy() for x in tensors[:2]], arrays(tensors[2:])
    moved = [x.copy() for x in held]
    for student in tensors[:2]:
        student.requires_grad_()
    value = loss(*tensors, 13.0)
    assert value.item() == pytest.approx(formula(moved, held, teachers, 13.0), rel=1e-12)
    value.backward()
    for side, student in zip(moved, tensors[:2], strict=True):
        numeric = np.zeros_like(side)
        for index in np.ndindex(*side.shape):
            kept = side[index]
            ends = []
            for step in (1e-5, -1e-5):
                side[index] = kept + step
                ends.append(formula(moved, held, teachers, 13.0))
            side[index] = kept
            numeric[index] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(student.grad.numpy(), numeric, rtol=1e-6, atol=1e-8)


EQUAL_AT_TEACHER: dict[str, Callable[..., Tensor]] = {
    "crd": lambda *x: crd_loss(*x, TEACHER, TEACHER),
    "crd reverse": lambda *x: crd_loss(*x, TEACHER, TEACHER, temperature=3.0, direction="reverse"),
    "crd symmetric": lambda *x: crd_loss(*x, TEACHER, TEACHER, direction="symmetric"),
    "gd": lambda *x: gd_loss(*x, TEACHER, TEACHER),
}


@pytest.mark.parametrize("name", EQUAL_AT_TEACHER)
def test_the_teacher_itself_is_a_stationary_minimum(name: str) -> None:
    loss = EQUAL_AT_TEACHER[name]
    image, text = unit(G, 8, 0), unit(G, 8, 1)
    student = image.clone().requires_grad_(), text.clone().requires_grad_()
    least = loss(*student, image, text)
    least.backward()
    assert max(x.grad.abs().max() for x in student) < 1e-10
    assert least.item() == pytest.approx(0, abs=1e-12)
    for seed in range(5):
        near = normalize(image + 0.05 * unit(G, 8, 10 + seed), dim=1)
        assert loss(near, text, image, text).item() > least.item() + 1e-7
        assert loss(image, near.roll(1, 0), image, text).item() > least.item() + 1e-4


@pytest.mark.parametrize("loss", [icl_loss, vrd_loss])
def test_orthogonal_features_of_the_teacher_leave_nothing_of_icl_and_vrd(loss: Callable[..., Tensor]) -> None:
    found = torch.eye(8, dtype=torch.float64)
    assert loss(found, found, found, found, 100.0).item() < 1e-12
    assert loss(found.roll(1, 0), found, found, found, 100.0).item() > 40


def test_xrd_is_zero_where_the_student_is_the_teacher_with_equal_modalities() -> None:
    one, other = unit(G, 8, 0), unit(G, 8, 1)
    student = [one.clone().requires_grad_() for _ in range(2)]
    loss = xrd_loss(*student, one, one, 30.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert max(x.grad.abs().max() for x in student) < 1e-10
    assert xrd_loss(one, other, one, one, 30.0).item() > 1
