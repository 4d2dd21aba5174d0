"""A retrieval set encoded by a model, and its figures.

Shapes: N pictures, M captions, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eval.benchmarks.protocols import RetrievalSet
from eval.measures.recall import recall_metrics
from eval.towers.features import Encoding, Unreadable, encode_captions, encode_images
from eval.towers.models import ClipModel

__all__ = ["EncodedSet", "encode_retrieval_set", "evaluate_retrieval", "retrieval_figures"]


@dataclass(frozen=True)
class EncodedSet:
    """A retrieval set encoded by a model: what could be read, in the set's order."""

    images: list[Path]
    """The N pictures that could be read."""
    captions: list[str]
    """The M captions of those pictures."""
    image_features: Float[Tensor, "N D"]
    text_features: Float[Tensor, "M D"]
    caption_image: Int[Tensor, " M"]
    """Row in `images` of each caption's picture, on the features' device."""
    num_truncated: int
    """Number of captions longer than the model's context."""
    unreadable: list[Unreadable]


def encode_retrieval_set(model: ClipModel, retrieval_set: RetrievalSet, encoding: Encoding = Encoding()) -> EncodedSet:
    """Return unit-norm features of a set's pictures and captions.

    A picture that cannot be read is left out together with its captions and named under `unreadable`. More than 1% of
    them raises InputError.
    """
    pictures = encode_images(model, retrieval_set.images, encoding)
    row_of = {image: row for row, image in enumerate(pictures.rows.tolist())}
    pairs = zip(retrieval_set.captions, retrieval_set.caption_image, strict=True)
    captions, rows = zip(*((text, row_of[image]) for text, image in pairs if image in row_of), strict=True)
    text_features, num_truncated = encode_captions(model, captions, encoding)
    return EncodedSet(
        images=[retrieval_set.images[row] for row in row_of],
        captions=list(captions),
        image_features=pictures.features,
        text_features=text_features,
        caption_image=torch.tensor(rows, device=text_features.device),
        num_truncated=num_truncated,
        unreadable=pictures.unreadable,
    )


def evaluate_retrieval(
    model: ClipModel, retrieval_set: RetrievalSet, encoding: Encoding = Encoding()
) -> dict[str, Any]:
    """Return the retrieval figures of a model on a set, as in the JSON: percentages 0..100, ranks from 1.

    The model's training mode does not change. For pictures that cannot be read see `encode_retrieval_set`.
    """
    return retrieval_figures(model, retrieval_set, encode_retrieval_set(model, retrieval_set, encoding))


def retrieval_figures(model: ClipModel, retrieval_set: RetrievalSet, encoded: EncodedSet) -> dict[str, Any]:
    """Return the figures of `evaluate_retrieval` from existing features."""
    return {
        "protocol": retrieval_set.name,
        "num_images": len(encoded.images),
        "num_texts": len(encoded.captions),
        "num_truncated": encoded.num_truncated,
        "context_length": model.context_length,
        "num_unreadable": len(encoded.unreadable),
        "unreadable": [lost.name for lost in encoded.unreadable],
        "count_mismatch": retrieval_set.count_mismatch,
        "sha256": retrieval_set.sha256,
        **recall_metrics(encoded.image_features, encoded.text_features, encoded.caption_image),
    }
