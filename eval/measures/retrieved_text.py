"""The quality of the captions that a model finds for pictures: are they right, how close, and how varied.

A wrong caption may still be largely true. BLEU-4 of the found caption against the picture's own captions (Papineni et
al. 2002, as sacrebleu counts it) shows this. A model that finds the same few captions for many pictures uses few words:
distinct-n (Li et al. 2016) and the size of the vocabulary show that.

Shapes: N pictures, M captions, D embedding width, R rows of a block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise, zip_longest
from typing import Any

import torch
from jaxtyping import Float, Int
from sacrebleu import corpus_bleu
from torch import Tensor

from eval.measures.retrieval_set import EncodedSet

__all__ = ["nearest_captions", "retrieved_text_quality"]

_BLOCK_ELEMENTS = 1 << 24  # similarities held at once: 64 MB
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def retrieved_text_quality(encoded: EncodedSet) -> dict[str, Any]:
    """Rate the one caption found for each picture among all: percentages and BLEU 0..100, vocabularies in words.

    `precision_at_1` counts a picture's own captions (it is R@1, image to text); `bleu4` compares with all of them.
    `distinct_captions` is the number of different texts found, in percent of the pictures. `retrieved` and `references`
    each have `distinct_1`, `distinct_2` (different words and pairs of neighbouring words, in percent of all) and
    `vocabulary_size`. `references` are as many texts, the first caption of each picture, because these figures depend
    on the amount of text.
    """
    found = nearest_captions(encoded.image_features, encoded.text_features)
    own: list[list[str]] = [[] for _ in encoded.images]
    for caption, image in zip(encoded.captions, encoded.caption_image.tolist(), strict=True):
        own[image].append(caption)
    retrieved = [encoded.captions[row] for row in found.tolist()]
    is_own = encoded.caption_image[found] == torch.arange(len(found), device=found.device)
    streams = [list(stream) for stream in zip_longest(*own)]  # None if a picture has fewer captions
    return {
        "precision_at_1": float(is_own.double().mean() * 100),
        "bleu4": corpus_bleu(retrieved, streams).score,
        "distinct_captions": 100 * len(set(retrieved)) / len(retrieved),
        "retrieved": _diversity(retrieved),
        "references": _diversity([captions[0] for captions in own]),
    }


def nearest_captions(image_features: Float[Tensor, "N D"], text_features: Float[Tensor, "M D"]) -> Int[Tensor, " N"]:
    """Return the caption of the highest score for each picture; of equal scores the earlier one, as in recall."""
    size = max(1, _BLOCK_ELEMENTS // len(text_features))
    columns = torch.arange(len(text_features), device=text_features.device)
    found = []
    for rows in image_features.float().split(size):
        scores = rows @ text_features.float().T  # [R,M]
        is_best = scores == scores.amax(dim=1, keepdim=True)
        found.append(torch.where(is_best, columns, len(columns)).amin(dim=1))
    return torch.cat(found)


def _diversity(texts: Sequence[str]) -> dict[str, float]:
    """Return the figures of variety. Case is ignored, and a pair of words does not reach from one text into the
    next."""
    words = [_WORD.findall(text.lower()) for text in texts]
    unigrams = [word for text in words for word in text]
    bigrams = [pair for text in words for pair in pairwise(text)]
    return {
        "distinct_1": 100 * len(set(unigrams)) / max(len(unigrams), 1),
        "distinct_2": 100 * len(set(bigrams)) / max(len(bigrams), 1),
        "vocabulary_size": len(set(unigrams)),
    }
