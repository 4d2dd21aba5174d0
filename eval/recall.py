"""Recall of image-text retrieval from features: ranks both ways, ties, memory-bounded.

Shapes: N pictures, M captions, D embedding width, R rows of a block, K captions a picture, Q queries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from longclip_teacher.errors import InputError

__all__ = ["recall_metrics"]

RECALL_AT = (1, 5, 10)
_BLOCK_ELEMENTS = 1 << 24  # similarities held at once: 64 MB


def recall_metrics(
    image_features: Float[Tensor, "N D"], text_features: Float[Tensor, "M D"], caption_image: Int[Tensor, " M"]
) -> dict[str, dict[str, float]]:
    """`{"i2t": {r1, r5, r10, mean_rank, median_rank, tied}, "t2i": {...}}` of features compared by their dot product.

    A query's rank is the place of its first matching candidate in a stable sort by score: any of a picture's captions
    counts, and of equal scores the earlier candidate comes first. A model that cannot tell four candidates apart thus
    finds one of the four, and a collapsed model next to none. `tied` is the percentage of queries whose best match
    shares its score with a wrong candidate. Memory is bounded: similarities are computed in blocks of rows.
    """
    num_images = len(image_features)
    caption_image = caption_image.to(image_features.device)
    captions_of = _captions_by_image(caption_image, num_images)
    image_features, text_features = image_features.float(), text_features.float()
    ranks_i2t, ranks_t2i, ties_i2t, ties_t2i = [], [], [], []
    for rows in _blocks(num_images, len(text_features)):
        scores = image_features[rows] @ text_features.T  # [R,M]
        own = captions_of[rows]  # [R,K], -1 where a picture has fewer captions
        own_scores = scores.gather(1, own.clamp(min=0)).masked_fill(own < 0, -torch.inf)
        best = own_scores.amax(dim=1, keepdim=True)
        first_own = own.masked_fill(own_scores < best, len(text_features)).amin(dim=1, keepdim=True)
        ranks_i2t.append(_places(scores, best, first_own))
        ties_i2t.append((scores == best).sum(dim=1) > (own_scores == best).sum(dim=1))
    for rows in _blocks(len(text_features), num_images):
        scores = text_features[rows] @ image_features.T  # [R,N]
        best = scores.gather(1, caption_image[rows, None])
        ranks_t2i.append(_places(scores, best, caption_image[rows, None]))
        ties_t2i.append((scores == best).sum(dim=1) > 1)
    return {
        "i2t": _summary(torch.cat(ranks_i2t), torch.cat(ties_i2t)),
        "t2i": _summary(torch.cat(ranks_t2i), torch.cat(ties_t2i)),
    }


def _places(
    scores: Float[Tensor, "R C"], best: Float[Tensor, "R 1"], candidate: Int[Tensor, "R 1"]
) -> Int[Tensor, " R"]:
    """Place from 1 of each row's `candidate`, whose score is `best`, in a stable sort."""
    is_earlier = torch.arange(scores.shape[1], device=scores.device) < candidate
    return 1 + ((scores > best) | ((scores == best) & is_earlier)).sum(dim=1)


def _captions_by_image(caption_image: Int[Tensor, " M"], num_images: int) -> Int[Tensor, "N K"]:
    """The captions of each picture, K the most that any has, filled up with -1."""
    counts = torch.bincount(caption_image, minlength=num_images)
    if len(counts) > num_images or bool((counts == 0).any()):
        raise InputError(f"every one of the {num_images} pictures needs a caption, and every caption one of them")
    order = torch.argsort(caption_image, stable=True)
    image = caption_image[order]
    position = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[image]
    table = torch.full((num_images, int(counts.max())), -1, device=order.device)
    table[image, position] = order
    return table


def _blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    size = max(1, _BLOCK_ELEMENTS // num_columns)
    return (slice(start, start + size) for start in range(0, num_rows, size))


def _summary(ranks: Int[Tensor, " Q"], tied: Tensor) -> dict[str, float]:
    ranks = ranks.double().cpu()
    recall = {f"r{k}": float((ranks <= k).double().mean() * 100) for k in RECALL_AT}
    middle = float(torch.quantile(ranks, 0.5))  # of an even number, the mean of the two in the middle
    return {
        **recall,
        "mean_rank": float(ranks.mean()),
        "median_rank": middle,
        "tied": float(tied.double().mean() * 100),
    }
