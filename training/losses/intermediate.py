"""Losses between the intermediate results of two transformers: token vectors, attention and value relations.

Each loss returns a sum and the number of its terms, because processes hold captions of different lengths: the mean over
all processes is the total sum divided by the total number. Arithmetic is float32 (float64 for a float64 student) with
autocast off. The teacher carries no gradient. Pads, and the cells above the diagonal of causal attention, affect
neither values nor gradients.

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
"""each: head by head; both models need the same number. mean: the means over the heads, for any numbers."""


class LossSum(NamedTuple):
    """A loss before its mean is taken."""

    total: Float[Tensor, ""]
    """Sum of the values."""
    terms: Float[Tensor, ""]
    """Number of values in the sum; carries no gradient."""


def token_mse(student: Float[Tensor, "B L C"], teacher: Float[Tensor, "B L C"], valid: Bool[Tensor, "B L"]) -> LossSum:
    """Squared difference of hidden states or embeddings at each valid token, averaged over channels (TinyBERT, Jiao et
    al. 2020, equations 8 and 9). The caller maps the student's to the teacher's width. The terms are the tokens."""
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = widened(student), widened(teacher, student)
        squares = (student - teacher).masked_fill(~valid.unsqueeze(2), 0).square()
        return LossSum(squares.mean(dim=2).sum(), valid.sum().to(student.dtype))


def attention_cells(valid: Bool[Tensor, "B L"], *, causal: bool) -> Bool[Tensor, "B L L"]:
    """The cells of the attention matrices that are compared: query and key are both valid, and with `causal` the key
    does not come after its query. Pass True if either model is causal: a bidirectional one then counts with its lower
    triangle alone."""
    cells = valid.unsqueeze(2) & valid.unsqueeze(1)
    return cells.tril() if causal else cells


def relation_scores(left: Float[Tensor, "B H L D"], right: Float[Tensor, "B H L D"]) -> Float[Tensor, "B H L L"]:
    """`left @ right.T / sqrt(D)` for each head of width D. Queries and keys give the attention scores before the
    softmax; values and values give MiniLM's value relation before the softmax (Wang et al. 2020, section 3.2)."""
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
    equation 7). The terms are the cells, counted once per head if `head_match` is each."""
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
    """KL(teacher || student) of each query's distribution over its keys: the softmax of the scores at the given cells
    (MiniLM, equations 1 and 3). With `head_match` mean, the heads' distributions are averaged first. The terms are the
    queries that have a cell, counted once per head if `head_match` is each."""
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
    """Log softmax within the cells. Outside them the scores are very low, not -inf, because a row without cells, and
    -inf - (-inf), would give NaN."""
    lowest = torch.finfo(scores.dtype).min / 2
    log_probs = log_softmax(scores.masked_fill(~cells.unsqueeze(1), lowest), dim=3)
    if head_match == "each":
        return log_probs
    return log_probs.logsumexp(dim=1, keepdim=True) - math.log(scores.shape[1])


def _check_heads(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"scores of shapes {tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared")
