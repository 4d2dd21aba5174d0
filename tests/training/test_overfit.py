"""Each loss alone, on 64 pairs whose features are free to move, teaches what it should.

The teacher tells its image-text pairs apart well, but not perfectly; the student starts from noise. Every case names
the measure that its loss should raise, from near its floor to near its ceiling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

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

PAIRS, WIDTH, SCALE = 64, 16, 10.0


def table(seed: int) -> Tensor:
    return normalize(torch.randn(PAIRS, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=1)


@dataclass
class Pairs:
    """Free student embeddings with afd's maps, and the teacher's features."""

    student: list[Tensor] = field(default_factory=lambda: [nn.Parameter(table(seed)) for seed in (0, 1)])
    maps: list[Tensor] = field(default_factory=lambda: [nn.Parameter(torch.eye(WIDTH).repeat(1, 2)) for _ in range(2)])
    teacher: tuple[Tensor, Tensor] = field(
        default_factory=lambda: (table(2), normalize(table(2) + 0.8 * table(3), dim=1))
    )

    @property
    def features(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return unit-norm images and texts of the student, then of the teacher."""
        image, text = (normalize(x, dim=1) for x in self.student)
        return (image, text, *self.teacher)

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        """Return the student's and the teacher's."""
        si, st, ti, tt = self.features
        return similarity_logits(si, st, SCALE), similarity_logits(ti, tt, SCALE)


def cosine(pairs: Pairs) -> float:
    """Return the mean cosine of the student's features with the teacher's."""
    si, st, ti, tt = pairs.features
    return (((si * ti).sum(dim=1) + (st * tt).sum(dim=1)).mean() / 2).item()


def recall(pairs: Pairs) -> float:
    """Return R@1 of the student's images among its texts."""
    student, _ = pairs.logits
    return (student.argmax(dim=1) == torch.arange(PAIRS)).float().mean().item()


def overlap(pairs: Pairs) -> float:
    """Return 1 - total variation between the image-to-text distributions of student and teacher."""
    student, teacher = (x.softmax(dim=1) for x in pairs.logits)
    return torch.minimum(student, teacher).sum(dim=1).mean().item()


def same_best(pairs: Pairs) -> float:
    """Return the share of images for which student and teacher find the same text."""
    student, teacher = (x.argmax(dim=1) for x in pairs.logits)
    return (student == teacher).float().mean().item()


def crossed(pairs: Pairs) -> float:
    """Return 1 - total variation between the teacher's images in student texts and its texts in student images."""
    si, st, ti, tt = pairs.features
    image, text = ((SCALE * x).softmax(dim=1) for x in (ti @ st.T, tt @ si.T))
    return torch.minimum(image, text).sum(dim=1).mean().item()


def pull(pairs: Pairs) -> float:
    """Return the mean cosine of the contrastive loss's gradients at the student's and at the teacher's images."""
    si, st, ti, tt = pairs.features
    student, teacher = (
        torch.autograd.grad(clip_loss(image, text, SCALE), image)[0]
        for image, text in ((si, st), (ti.clone().requires_grad_(), tt))
    )
    return cosine_similarity(student, teacher).mean().item()


class Case(NamedTuple):
    loss: Callable[[Pairs], Tensor]
    measure: Callable[[Pairs], float]
    after: float
    """The measure ends above this; it starts below 0.2."""


def of_logits(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Pairs], Tensor]:
    def both_ways(pairs: Pairs) -> Tensor:
        student, teacher = pairs.logits
        targets = contrastive_targets(student)
        return (loss(student, teacher, targets) + loss(student.T, teacher.T, targets)) / 2

    return both_ways


def of_features(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Pairs], Tensor]:
    def both_towers(pairs: Pairs) -> Tensor:
        si, st, ti, tt = pairs.features
        return loss(si, ti) + loss(st, tt)

    return both_towers


CASES = {
    "clip": Case(lambda p: clip_loss(*p.features[:2], SCALE), recall, 0.95),
    "crd": Case(lambda p: crd_loss(*p.features, SCALE, SCALE), overlap, 0.95),
    "crd reverse": Case(lambda p: crd_loss(*p.features, SCALE, SCALE, direction="reverse"), overlap, 0.85),
    "crd symmetric": Case(lambda p: crd_loss(*p.features, SCALE, SCALE, direction="symmetric"), overlap, 0.95),
    "icl": Case(lambda p: icl_loss(*p.features, SCALE), recall, 0.9),
    "gd": Case(lambda p: 1e4 * gd_loss(*p.features, SCALE, SCALE), pull, 0.7),
    "afd": Case(lambda p: afd_loss(*p.features, *p.maps, SCALE), recall, 0.5),
    "vrd": Case(lambda p: vrd_loss(*p.features, SCALE), cosine, 0.9),
    "xrd": Case(lambda p: xrd_loss(*p.features, SCALE), crossed, 0.85),
    "kd": Case(of_logits(kd_loss), overlap, 0.8),
    "deit_soft": Case(of_logits(lambda s, t, y: deit_soft_loss(s, s, t, y)), overlap, 0.8),
    "deit_hard": Case(of_logits(lambda s, t, y: deit_hard_loss(s, s, t)), same_best, 0.95),
    "fd": Case(of_features(fd_loss), cosine, 0.99),
    "l1": Case(of_features(l1_loss), cosine, 0.99),
    "cos": Case(of_features(cos_loss), cosine, 0.99),
    "kl": Case(of_features(lambda s, t: 1e3 * kl_loss(s, t)), cosine, 0.9),
}


@pytest.mark.parametrize("name", CASES)
def test_a_single_loss_raises_its_measure(name: str) -> None:
    loss, measure, after = CASES[name]
    pairs = Pairs()
    optimizer = torch.optim.Adam([*pairs.student, *pairs.maps], lr=0.05)
    at_start = measure(pairs)
    for _ in range(200):
        optimizer.zero_grad()
        loss(pairs).backward()
        optimizer.step()
    at_end = measure(pairs)
    assert at_start < 0.2
    assert at_end > after
