"""Search by paragraph, by picture, or both: exact, over all pictures, with what each sentence of the text adds.

Shapes: N pictures, S sentences, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from photo_search.errors import InputError
from photo_search.index import Features
from photo_search.model import Model
from photo_search.sentences import split_sentences

__all__ = ["Hit", "Query", "SentenceScore", "search"]


@dataclass(frozen=True)
class Query:
    """What is looked for: a text, a picture's file, or both."""

    text: str | None = None
    image: Path | None = None
    minus: str | None = None
    """What the pictures should not show."""


@dataclass(frozen=True)
class SentenceScore:
    """One sentence of the text against one picture."""

    text: str
    score: float
    """Cosine."""
    rank: int
    """1 for the picture that fits this sentence best, N for the one that fits it least."""


@dataclass(frozen=True)
class Hit:
    """A picture that was found."""

    name: str
    """Relative to the folder that was indexed."""
    score: float
    sentences: list[SentenceScore]
    """In the order of the text; none if the text is a single sentence."""


def search(features: Features, model: Model, query: Query, top: int) -> list[Hit]:
    """The `top` pictures of the highest scores, the best first; equal scores are in the order of their names.

    The score is the cosine of picture and query. A text and a picture together count half each. The cosine with
    `query.minus` is taken off. Raises InputError for a query without content, and for a picture that cannot be read.
    """
    sentences = split_sentences(query.text or "")
    sentences = sentences if len(sentences) > 1 else []
    scores = features.vectors @ _direction(model, query)
    by_sentence = np.empty((len(scores), 0), np.float32)
    if sentences:
        by_sentence = features.vectors @ model.encode_texts(sentences).T  # [N, S]
    hits = []
    for row in np.argsort(-scores, kind="stable")[:top]:
        ranks = 1 + (by_sentence > by_sentence[row]).sum(axis=0)
        told = zip(sentences, by_sentence[row].tolist(), ranks.tolist(), strict=True)
        hits.append(Hit(features.names[row], float(scores[row]), [SentenceScore(*one) for one in told]))
    return hits


def _direction(model: Model, query: Query) -> np.ndarray:
    """The vector [D] whose product with a picture's feature is its score."""
    wanted = []
    if query.text is not None and query.text.strip():
        wanted.append(model.encode_texts([query.text])[0])
    if query.image is not None:
        from photo_search.images import check_readable  # it takes time, and most queries are texts

        check_readable(query.image)
        wanted.append(model.encode_images([model.pixels(query.image)])[0])
    if not wanted:
        raise InputError("nothing to look for: give a text, or --image FILE")
    direction = np.mean(wanted, axis=0)
    direction /= np.linalg.norm(direction)
    return direction if query.minus is None else direction - model.encode_texts([query.minus])[0]
