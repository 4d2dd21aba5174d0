"""The weighted mix: each term is its pure function on the right sides, in tiles as in full matrices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from training.data.store import TeacherInfo
from training.features import Features, LossParameters, Outputs, TeacherOutputs
from training.losses import clip_loss, crd_loss, fd_loss, icl_loss, kl_loss, vrd_loss
from training.objective import Objective, caption_groups
from training.pca import pca_project
from training.settings.losses import LossOptions
from training.settings.needs import needs_of

ROWS = 12
SCALE, TEACHER_SCALE = torch.tensor(11.0, dtype=torch.float64), 23.0
OFF = LossOptions(clip_long=1.0, clip_short=0.0, crd_long=0.0, crd_short=0.0, pca_rank=4)
TEACHER_INFO = {length: TeacherInfo((9,), TEACHER_SCALE, 248) for length in ("long", "short")}


def rows(seed: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(ROWS, width, generator=generator, dtype=torch.float64), dim=1)


STUDENT = Features(image=rows(0, 6), long=rows(1, 6), short=rows(2, 6))
TEACHER = Features(image=rows(3, 9), long=rows(4, 9), short=rows(5, 9))
TOKENS = torch.zeros(ROWS, 2, dtype=torch.long)


NOT_MAPPED = Features()


SUB = normalize(torch.stack([rows(20, 9), rows(21, 9), rows(22, 9)], dim=1), dim=2)  # [G, K, D]
THEIR_SUB = normalize(torch.stack([rows(23, 9), rows(24, 9), rows(25, 9)], dim=1), dim=2)


def losses(
    options: LossOptions, student: Features = STUDENT, mapped: Features = NOT_MAPPED, *, streaming: bool = True
) -> dict[str, torch.Tensor]:
    """The losses and, as grad_NAME, their gradients."""
    leaves = student.map(lambda value: value.clone().requires_grad_())
    scale = SCALE.clone().requires_grad_()
    objective = Objective(options, needs_of(options), TEACHER_INFO, streaming=streaming)
    outputs = Outputs(leaves, mapped, LossParameters(scale))
    found = objective(outputs, TeacherOutputs(TEACHER), TOKENS, TOKENS)
    found["loss"].backward()
    named = {**leaves.tensors(), "scale": scale}
    grads = {f"grad_{name}": leaf.grad for name, leaf in named.items() if leaf.grad is not None}
    return {**found, **grads}


@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("pca_side", ["image", "text"])
@pytest.mark.parametrize("has_token", [False, True])
def test_terms_are_their_pure_functions(direction: str, temperature: float, pca_side: str, has_token: bool) -> None:
    """Contrast and relations, tiled and not: at any temperature, in any direction, with PCA on either side, and with an
    image head of its own for the teacher."""
    options = LossOptions(
        crd_temperature=temperature, crd_direction=direction, pca_side=pca_side, pca_rank=4, label_smoothing=0.05
    )
    student = replace(STUDENT, distilled_image=rows(7, 6)) if has_token else STUDENT
    found = losses(options, student)

    def reduced(features: torch.Tensor, side: str) -> torch.Tensor:
        return pca_project(features, 4) if side == pca_side else features

    expected = {}
    for length in ("long", "short"):
        change = reduced if length == "short" else lambda features, _: features
        text, teacher = change(student[length], "text"), change(TEACHER[length], "text")
        pairs = change(student["image"], "image"), text
        answers = change(student[student.answering], "image"), text
        theirs = change(TEACHER["image"], "image"), teacher
        expected[f"clip_{length}"] = clip_loss(*pairs, SCALE, label_smoothing=0.05)
        kinds = {"temperature": temperature, "direction": direction}
        expected[f"crd_{length}"] = crd_loss(*answers, *theirs, SCALE, TEACHER_SCALE, **kinds)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=1e-9, atol=0)
    total = sum(getattr(options, name) * value for name, value in expected.items())
    torch.testing.assert_close(found["loss"].detach(), total, rtol=1e-9, atol=0)

    full = losses(options, student, streaming=False)
    for name, value in full.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert found["grad_scale"].abs() > 1e-4
    assert ("grad_distilled_image" in found) == has_token


def test_text_terms_are_means_over_long_and_short_captions() -> None:
    ours = Features(image=rows(10, 9), long=rows(11, 9), short=rows(12, 9))
    options = replace(OFF, fd_text=1.0, kl_text=1.0, kl_temperature=2.0, kl_scale=7.0, fd_image=0.5, crd_short=1e-9)
    found = losses(options, mapped=ours)
    fd = (fd_loss(ours["long"], TEACHER["long"]) + fd_loss(ours["short"], TEACHER["short"])) / 2
    kl = sum(kl_loss(ours[name], TEACHER[name], temperature=2.0) for name in ("long", "short")) / 2
    torch.testing.assert_close(found["fd_text"].detach(), fd)
    torch.testing.assert_close(found["kl_text"].detach(), 7.0 * kl)
    torch.testing.assert_close(found["fd_image"].detach(), fd_loss(ours["image"], TEACHER["image"]))
    weighted = found["clip_long"] + found["fd_text"] + found["kl_text"] + 0.5 * found["fd_image"]
    torch.testing.assert_close(found["loss"], weighted + 1e-9 * found["crd_short"])


def clip_of_sentences(sub: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The losses with clip_sub alone, and the gradient of the sentences."""
    options = replace(OFF, clip_long=0.0, clip_sub=2.0, label_smoothing=0.0)
    objective = Objective(options, needs_of(options), TEACHER_INFO)
    leaf = sub.clone().requires_grad_()
    outputs = Outputs(Features(image=rows(0, 9), long=rows(1, 9), sub=leaf), Features(), LossParameters(SCALE))
    found = objective(outputs, TeacherOutputs(TEACHER), TOKENS, TOKENS, torch.zeros(*sub.shape[:2], 2).long())
    return found, torch.autograd.grad(found["loss"], leaf)[0]


def test_a_sentence_meets_no_other_of_its_picture() -> None:
    """Against a plain formula: for each sentence, its picture among all pictures, and it among one of each picture."""
    image, num_sub = rows(0, 9), SUB.shape[1]
    found, gradient = clip_of_sentences(SUB)
    expected = 0.0
    for k in range(num_sub):
        for i in range(ROWS):
            pictures = [math.exp(float(SCALE * image[j] @ SUB[i, k])) for j in range(ROWS)]
            sentences = [math.exp(float(SCALE * image[i] @ SUB[j, k])) for j in range(ROWS)]
            own = pictures[i]
            expected -= (math.log(own / sum(pictures)) + math.log(own / sum(sentences))) / (2 * ROWS * num_sub)
    assert float(found["clip_sub"].detach()) == pytest.approx(expected, rel=1e-9)
    assert float(found["loss"].detach()) == pytest.approx(2 * expected, rel=1e-9)
    for place, reaches in (((0, 1), False), ((0, 2), False), ((1, 0), True)):
        other = SUB.clone()
        other[place] = rows(30, 9)[0]
        assert torch.equal(clip_of_sentences(other)[1][0, 0], gradient[0, 0]) != reaches, place


def test_distilled_sentences_are_the_mean_of_the_pure_functions() -> None:
    options = replace(OFF, clip_long=0.0, icl_sub=1.0, vrd_sub=3.0, share_identical_captions=True)
    ours = Features(image=rows(0, 9), long=rows(1, 9), sub=SUB)
    tokens = torch.randint(0, 2, (ROWS, 3, 2), generator=torch.Generator().manual_seed(0))
    scales = {name: torch.tensor(value, dtype=torch.float64) for name, value in (("icl", 5.0), ("vrd", 7.0))}
    objective = Objective(options, needs_of(options), TEACHER_INFO)
    outputs = Outputs(ours, Features(), LossParameters(SCALE, scales))
    found = objective(outputs, TeacherOutputs(replace(TEACHER, sub=THEIR_SUB)), TOKENS, TOKENS, tokens)
    icl, vrd = [], []
    for k in range(3):
        features = ours["image"], SUB[:, k], TEACHER["image"], THEIR_SUB[:, k]
        groups = caption_groups(tokens[:, k], tokens.device)
        icl.append(icl_loss(*features, scales["icl"], label_smoothing=0.1, caption_groups=groups))
        vrd.append(vrd_loss(*features, scales["vrd"]))
    torch.testing.assert_close(found["icl_sub"], torch.stack(icl).mean())
    torch.testing.assert_close(found["vrd_sub"], torch.stack(vrd).mean())
    torch.testing.assert_close(found["loss"], found["icl_sub"] + 3 * found["vrd_sub"])


def test_a_loss_of_weight_zero_is_left_out() -> None:
    assert set(losses(OFF)) == {"clip_long", "loss", "grad_image", "grad_long", "grad_scale"}
