"""Traces of random numbers, and the losses between layers as plain formulas, one cell at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from longclip_teacher.trace import Trace
from training.layer_losses import TowerShape

LENGTHS = (5, 1, 7, 3)
STUDENT, TEACHER = TowerShape(layers=2, width=8, heads=4), TowerShape(layers=4, width=12, heads=4)


def random_trace(
    shape: TowerShape, seed: int, *, lengths: tuple[int, ...] = LENGTHS, causal: bool = False, prefix: int = 0
) -> Trace:
    """Captions of `lengths` tokens; with `prefix`, pictures of 4 patches and so many class tokens."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = len(lengths), 4 + prefix if prefix else max(lengths)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(batch, *sizes, generator=generator, dtype=torch.float64)

    def heads() -> list[Tensor]:
        return [draw(shape.heads, length, shape.width // shape.heads) for _ in range(shape.layers)]

    return Trace(
        embedding=draw(length, shape.width),
        tokens=draw(length, shape.width),
        hidden=[draw(length, shape.width) for _ in range(shape.layers)],
        query=heads(),
        key=heads(),
        value=heads(),
        valid=torch.ones(batch, length).bool() if prefix else torch.arange(length) < torch.tensor(lengths)[:, None],
        causal=causal,
        num_prefix_tokens=prefix,
    )


def plain_token_mse(student: np.ndarray, teacher: np.ndarray, lengths: tuple[int, ...]) -> float:
    cells = [np.mean((student[b, i] - teacher[b, i]) ** 2) for b, length in enumerate(lengths) for i in range(length)]
    return float(np.mean(cells))


def plain_scores(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.einsum("bhid,bhjd->bhij", left, right) / np.sqrt(left.shape[-1])


def plain_score_mse(student: np.ndarray, teacher: np.ndarray, lengths: tuple[int, ...], causal: bool) -> float:
    cells = [
        (student[b, h, i, j] - teacher[b, h, i, j]) ** 2
        for b, length in enumerate(lengths)
        for h in range(student.shape[1])
        for i in range(length)
        for j in range(i + 1 if causal else length)
    ]
    return float(np.mean(cells))


def plain_probs(scores: np.ndarray, count: int) -> np.ndarray:
    powers = np.exp(scores[..., :count] - scores[..., :count].max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def plain_score_kl(
    student: np.ndarray, teacher: np.ndarray, lengths: tuple[int, ...], causal: bool, mean: bool = False
) -> float:
    values = []
    for b, length in enumerate(lengths):
        for i in range(length):
            p, q = (plain_probs(scores[b, :, i], i + 1 if causal else length) for scores in (teacher, student))
            if mean:
                p, q = p.mean(axis=0, keepdims=True), q.mean(axis=0, keepdims=True)
            values += list((p * np.log(p / q)).sum(axis=1))
    return float(np.mean(values))
