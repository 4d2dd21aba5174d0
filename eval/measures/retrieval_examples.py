"""Examples of retrieval: single queries, the answers a model ranks first, and the place of the right one.

Shapes: N pictures, M captions, Q queries, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eval.measures.recall import RetrievalRanks
from eval.measures.retrieval_set import EncodedSet

__all__ = ["Answer", "Example", "pick_examples", "retrieval_examples", "worst_examples"]

_QUERIES_CONSIDERED = 500  # per direction: enough to find failures, few enough to compare with every candidate


@dataclass(frozen=True)
class Answer:
    """A candidate: the path of a picture, or a caption."""

    content: Path | str
    is_right: bool
    rank: int
    """1 for the candidate that the model ranks first."""


@dataclass(frozen=True)
class Example:
    """A query and the model's first answers. If no right one is among them, the best ranked right one comes last."""

    query: Path | str
    answers: list[Answer]

    @property
    def is_success(self) -> bool:
        """Whether the first answer is right."""
        return self.answers[0].is_right


class _Direction(NamedTuple):
    """The arguments of `pick_examples`."""

    queries: Sequence[Path | str]
    candidates: Sequence[Path | str]
    query_features: Tensor
    candidate_features: Tensor
    query_image: Tensor
    candidate_image: Tensor


def retrieval_examples(encoded: EncodedSet, *, num_examples: int = 4, num_answers: int = 5) -> list[Example]:
    """Return `num_examples` pictures that look for captions, then as many captions that look for pictures.

    Half of each are queries whose first answer is right and half are failures, as far as they exist; both are spread
    evenly over the set. The same features give the same examples.
    """
    return [
        example
        for direction in _directions(encoded)
        for example in pick_examples(*direction, num_examples=num_examples, num_answers=num_answers)
    ]


def worst_examples(
    encoded: EncodedSet, ranks: RetrievalRanks, *, num_examples: int = 2, num_answers: int = 4
) -> list[Example]:
    """Return the `num_examples` pictures with the worst ranked right caption, then as many captions likewise.

    `ranks` are those of the features. A picture comes once, with the worst of its captions. Queries whose first answer
    is right are not failures and are left out.
    """
    examples = []
    for direction, found in zip(_directions(encoded), (ranks.i2t, ranks.t2i), strict=True):
        queries, candidates, query_features, candidate_features, query_image, candidate_image = direction
        worst: dict[int, int] = {}  # picture -> its query
        for query in found.ranks.argsort(descending=True, stable=True).tolist():
            if len(worst) == num_examples or found.ranks[query] == 1:
                break
            worst.setdefault(int(query_image[query]), query)
        if worst:
            rows = torch.tensor(list(worst.values()), device=query_features.device)
            order, right = _ranking(rows, query_features, candidate_features, query_image, candidate_image)
            examples += [
                Example(queries[query], _answers(candidates, order[row], right[row], num_answers))
                for row, query in enumerate(worst.values())
            ]
    return examples


def pick_examples(
    queries: Sequence[Path | str],
    candidates: Sequence[Path | str],
    query_features: Float[Tensor, "Q D"],
    candidate_features: Float[Tensor, "C D"],
    query_image: Int[Tensor, " Q"],
    candidate_image: Int[Tensor, " C"],
    *,
    num_examples: int,
    num_answers: int,
) -> list[Example]:
    """Return examples of one direction. A candidate is right if it belongs to the query's picture."""
    considered = torch.tensor(_spread(range(len(queries)), _QUERIES_CONSIDERED), device=query_features.device)
    order, right = _ranking(considered, query_features, candidate_features, query_image, candidate_image)
    succeeded: list[bool] = right[:, 0].tolist()
    successes = [row for row, success in enumerate(succeeded) if success]
    failures = [row for row, success in enumerate(succeeded) if not success]
    num_failures = min(len(failures), max(num_examples // 2, num_examples - len(successes)))
    chosen = _spread(successes, num_examples - num_failures) + _spread(failures, num_failures)
    return [
        Example(queries[int(considered[row])], _answers(candidates, order[row], right[row], num_answers))
        for row in chosen
    ]


def _directions(encoded: EncodedSet) -> list[_Direction]:
    """Return both directions: pictures that look for captions, and captions that look for pictures."""
    images, captions, owner = encoded.images, encoded.captions, encoded.caption_image
    everyone = torch.arange(len(images), device=owner.device)
    return [
        _Direction(images, captions, encoded.image_features, encoded.text_features, everyone, owner),
        _Direction(captions, images, encoded.text_features, encoded.image_features, owner, everyone),
    ]


def _ranking(
    rows: Int[Tensor, " R"],
    query_features: Float[Tensor, "Q D"],
    candidate_features: Float[Tensor, "C D"],
    query_image: Int[Tensor, " Q"],
    candidate_image: Int[Tensor, " C"],
) -> tuple[Int[Tensor, "R C"], Bool[Tensor, "R C"]]:
    """Return the candidates of some queries, best first, and which of them are right."""
    order = (query_features[rows] @ candidate_features.T).argsort(dim=1, descending=True, stable=True)
    return order, candidate_image[order] == query_image[rows, None]


def _answers(
    candidates: Sequence[Path | str], order: Int[Tensor, " C"], right: Bool[Tensor, " C"], num_answers: int
) -> list[Answer]:
    shown = list(range(min(num_answers, len(order))))
    first_right = int(right.int().argmax())
    if first_right not in shown:
        shown.append(first_right)
    return [Answer(candidates[int(order[place])], bool(right[place]), place + 1) for place in shown]


def _spread(items: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]
