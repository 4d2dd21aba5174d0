"""Losses between what two transformers compute on the way: token vectors, attention and value relations.

Each gives a sum and the number of things summed, because processes hold captions of different lengths: the mean over
all of them is the joined sum over the joined number. Arithmetic is float32 (float64 for a float64 student) with
autocast off; the teacher carries no gradient. What stands at pads, and above the diagonal where attention is causal,
enters neither values nor gradients.

Shapes: B samples, L tokens, C width, H heads of each model.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import log_softmax

from training.losses.precision import widened

__all__ = [
    "HeadMatch",
    "LossSum",
    "attention_cells",
    "relation_scores",
    "score_kl",
    "score_mse",
    "token_mse",
    "value_loss",
]

HeadMatch = Literal["each", "mean"]
"""each: head by head, as many in both models. mean: the means over the heads, whatever their numbers."""


class LossSum(NamedTuple):
    """A loss before its mean is taken."""

    total: Float[Tensor, ""]
    """Sum of the values."""
    terms: Float[Tensor, ""]
    """How many values they are; carries no gradient."""


def token_mse(student: Float[Tensor, "B L C"], teacher: Float[Tensor, "B L C"], valid: Bool[Tensor, "B L"]) -> LossSum:
    """Squared distance of hidden states or embeddings, the mean over channels at each valid token (TinyBERT, Jiao et
    al. 2020, equations 8 and 9). The student's come mapped to the teacher's width. The terms are the tokens."""
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = widened(student), widened(teacher, student)
        squares = (student - teacher).masked_fill(~valid.unsqueeze(2), 0).square()
        return LossSum(squares.mean(dim=2).sum(), valid.sum().to(student.dtype))


def attention_cells(valid: Bool[Tensor, "B L"], *, causal: bool) -> Bool[Tensor, "B L L"]:
    """Which cells of the attention matrices are compared: query and key both valid; with `causal`, no key after its
    query. Causal if either model is: a bidirectional one is then compared by its lower triangle."""
    cells = valid.unsqueeze(2) & valid.unsqueeze(1)
    return cells.tril() if causal else cells


def relation_scores(left: Float[Tensor, "B H L D"], right: Float[Tensor, "B H L D"]) -> Float[Tensor, "B H L L"]:
    """`left @ right.T / sqrt(D)` of each head of width D: of queries and keys, attention scores before the softmax; of
    values and values, MiniLM's value relation before the softmax (Wang et al. 2020, section 3.2)."""
    with torch.autocast(left.device.type, enabled=False):
        left, right = widened(left), widened(right, left)
        return (left / math.sqrt(left.shape[-1])) @ right.transpose(-1, -2)


def score_mse(
    student: Float[Tensor, "B H L L"],
    teacher: Float[Tensor, "B H L L"],
    cells: Bool[Tensor, "B L L"],
    *,
    head_match: HeadMatch = "each",
) -> LossSum:
    """Squared difference of scores at the given cells of each head, or of their means over the heads (TinyBERT,
    equation 7). The terms are the cells, of every head if each."""
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = widened(student), widened(teacher, student)
        if head_match == "mean":
            student, teacher = student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)
        _check_heads(student, teacher)
        squares = (student - teacher).masked_fill(~cells.unsqueeze(1), 0).square()
        return LossSum(squares.sum(), (cells.sum() * student.shape[1]).to(student.dtype))


def score_kl(
    student: Float[Tensor, "B H L L"],
    teacher: Float[Tensor, "B H L L"],
    cells: Bool[Tensor, "B L L"],
    *,
    head_match: HeadMatch = "each",
) -> LossSum:
    """KL(teacher || student) of each query's distribution over its keys, the softmax of the scores at the given cells
    alone (MiniLM, equations 1 and 3); with `head_match` mean, of the mean of the heads' distributions. The terms
    are the queries that have a cell, of every head if each."""
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = widened(student), widened(teacher, student)
        student, teacher = (_log_probs(scores, cells, head_match) for scores in (student, teacher))
        _check_heads(student, teacher)
        terms = teacher.exp() * (teacher - student)
        queries = cells.any(dim=2).sum() * student.shape[1]
        return LossSum(terms.masked_fill(~cells.unsqueeze(1), 0).sum(), queries.to(student.dtype))


def value_loss(
    student: Float[Tensor, "B H L L"],
    teacher: Float[Tensor, "B H L L"],
    cells: Bool[Tensor, "B L L"],
    *,
    kind: Literal["kl", "mse"] = "kl",
    head_match: HeadMatch = "each",
) -> LossSum:
    """The difference of value relations: `score_kl` of their softmaxes (MiniLM, equation 3), or `score_mse`."""
    compute = score_kl if kind == "kl" else score_mse
    return compute(student, teacher, cells, head_match=head_match)


def _log_probs(
    scores: Float[Tensor, "B H L L"], cells: Bool[Tensor, "B L L"], head_match: HeadMatch
) -> Float[Tensor, "B H L L"]:
    """Not -inf outside the cells: a row without any would be NaN, and so would -inf - (-inf)."""
    lowest = torch.finfo(scores.dtype).min / 2
    log_probs = log_softmax(scores.masked_fill(~cells.unsqueeze(1), lowest), dim=3)
    if head_match == "each":
        return log_probs
    return log_probs.logsumexp(dim=1, keepdim=True) - math.log(scores.shape[1])


def _check_heads(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"scores of shapes {tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared")
