"""Recall of image-text retrieval from features: ranks both ways in one pass over the scores, ties, bounded memory.

Shapes: N pictures, M captions, D embedding width, Q queries (N or M), R x C one tile of the N x M scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from longclip_teacher.errors import InputError

__all__ = ["DirectionRanks", "RetrievalRanks", "direction_metrics", "recall_metrics", "retrieval_ranks"]

RECALL_AT = (1, 5, 10)
# A tile of scores is 8 MB: it stays in a CPU's cache while it is counted, and is large enough for a fast matmul.
_TILE_IMAGES, _TILE_TEXTS = 1024, 2048
_TILE_STEP = 64  # smaller sets are one tile, padded to a multiple of this


@dataclass(frozen=True)
class DirectionRanks:
    """The ranks from 1 of Q queries, on the CPU. A query with several matches has the rank of its first."""

    ranks: Int[Tensor, " Q"]
    """Place of the first match in a stable sort by score: of equal scores the earlier candidate comes first."""
    best_case: Int[Tensor, " Q"]
    """1 + the number of candidates that score strictly higher than the best match: every tie is won."""
    tied: Bool[Tensor, " Q"]
    """Whether the best match shares its score with a wrong candidate."""

    def select(self, queries: Tensor) -> DirectionRanks:
        """Return the ranks of some queries, by index or mask."""
        queries = queries.cpu()
        return DirectionRanks(self.ranks[queries], self.best_case[queries], self.tied[queries])


@dataclass(frozen=True)
class RetrievalRanks:
    """Ranks both ways: `i2t` has a rank for each picture, `t2i` for each caption."""

    i2t: DirectionRanks
    t2i: DirectionRanks


def recall_metrics(
    image_features: Float[Tensor, "N D"], text_features: Float[Tensor, "M D"], caption_image: Int[Tensor, " M"]
) -> dict[str, dict[str, Any]]:
    """Return `{"i2t": direction_metrics, "t2i": direction_metrics}` of features compared by their dot product."""
    ranks = retrieval_ranks(image_features, text_features, caption_image)
    return {"i2t": direction_metrics(ranks.i2t), "t2i": direction_metrics(ranks.t2i)}


def direction_metrics(found: DirectionRanks) -> dict[str, Any]:
    """Return `{r1, r5, r10, mean_rank, median_rank, tied, best_case: {r1, r5, r10}}` of one or more queries.

    Recall and `tied` are percentages of the queries. `tied` shows how much recall depends on the rule for ties.
    `best_case` is recall under the common rule 1 + the number that score strictly higher: a model that cannot tell four
    candidates apart finds one of four by place, and all four by that rule.
    """
    if not len(found.ranks):
        raise InputError("there are no queries to compute recall from")
    ranks = found.ranks.double()
    return {
        **_recall(found.ranks),
        "mean_rank": float(ranks.mean()),
        "median_rank": float(ranks.quantile(0.5)),  # of an even number, the mean of the two in the middle
        "tied": float(found.tied.double().mean() * 100),
        "best_case": _recall(found.best_case),
    }


def retrieval_ranks(
    image_features: Float[Tensor, "N D"], text_features: Float[Tensor, "M D"], caption_image: Int[Tensor, " M"]
) -> RetrievalRanks:
    """Return ranks of every picture's captions among all captions, and of every caption's picture among all pictures.

    Scores are float32 dot products, whatever autocast or reduced matmul precision is on. They are computed on the
    features' device in tiles that each serve both directions, so memory beyond the features and one copy is a few
    tiles. Tiles that hold matching pairs are computed twice by the same call on the same shapes, first for the matches'
    own scores and then for counting, so that a score equals itself to the bit. Raise InputError for a picture without a
    caption, a caption whose picture does not exist, and features that are not finite.
    """
    num_images, num_texts = len(image_features), len(text_features)
    owner = caption_image.to(image_features.device)
    captions_of = torch.bincount(owner.clamp(min=0), minlength=num_images) if num_texts else owner.new_zeros(num_images)
    if not num_images or bool((owner < 0).any()) or len(captions_of) > num_images or bool((captions_of == 0).any()):
        raise InputError(f"each of the {num_images} pictures needs a caption, and each caption one of the pictures")
    order = torch.argsort(owner, stable=True)  # a picture's captions side by side, so that matches lie along a diagonal
    with torch.no_grad(), _full_float32(image_features.device):
        tiles = _Tiles(image_features, text_features[order])
        if not (torch.isfinite(tiles.images).all() and torch.isfinite(tiles.texts).all()):
            raise InputError("NaN or infinity in the features: their ranks are meaningless")
        i2t, t2i = _count(tiles, owner[order], order)
    back = torch.argsort(order).cpu()  # from captions side by side to the caller's order
    return RetrievalRanks(i2t, t2i.select(back))


class _Tiles:
    """Scores of N pictures and M captions, one tile at a time. Features are padded so that all tiles have one shape:
    the same kernel computes every score, and equal features get equal scores wherever they are."""

    def __init__(self, images: Float[Tensor, "N D"], texts: Float[Tensor, "M D"]) -> None:
        self.num_images, self.num_texts = len(images), len(texts)
        self.rows, self.columns = _tile_size(len(images), _TILE_IMAGES), _tile_size(len(texts), _TILE_TEXTS)
        self.images = F.pad(images.float(), (0, 0, 0, -len(images) % self.rows))
        self.texts = F.pad(texts.float(), (0, 0, 0, -len(texts) % self.columns))
        self._scores = torch.empty(self.rows, self.columns, device=images.device)

    def row_slices(self) -> list[slice]:
        """The pictures of each row of tiles."""
        return _slices(self.num_images, self.rows)

    def column_slices(self) -> list[slice]:
        """The captions of each column of tiles."""
        return _slices(self.num_texts, self.columns)

    def scores(self, rows: slice, columns: slice) -> Float[Tensor, "R C"]:
        """Return one tile, without the padding. The next call overwrites it."""
        images = self.images[rows.start : rows.start + self.rows]
        texts = self.texts[columns.start : columns.start + self.columns]
        torch.mm(images, texts.T, out=self._scores)
        return self._scores[: rows.stop - rows.start, : columns.stop - columns.start]


def _count(tiles: _Tiles, owner: Int[Tensor, " M"], order: Int[Tensor, " M"]) -> tuple[DirectionRanks, DirectionRanks]:
    """Return ranks of pictures and of captions. `owner` [M] ascends, `order` [M] is a caption's place among the
    candidates."""
    own_score = _own_scores(tiles, owner)
    lowest = own_score.new_full((tiles.num_images,), -torch.inf)
    best = lowest.scatter_reduce(0, owner, own_score, "amax")  # [N]
    is_best = own_score == best[owner]  # [M]
    last = order.new_full((tiles.num_images,), tiles.num_texts)
    first = last.scatter_reduce(0, owner, order.masked_fill(~is_best, tiles.num_texts), "amin")  # [N]
    place = torch.arange(tiles.num_images, device=owner.device)
    of_images, of_texts = _Counts(tiles, tiles.num_images, dim=1), _Counts(tiles, tiles.num_texts, dim=0)
    for rows in tiles.row_slices():
        for columns in tiles.column_slices():
            scores = tiles.scores(rows, columns)
            of_images.add(rows, scores, best[rows, None], order[None, columns], first[rows, None])
            of_texts.add(columns, scores, own_score[None, columns], place[rows, None], owner[None, columns])
    num_best = torch.zeros_like(of_images.equal).index_add_(0, owner, is_best.to(torch.int32))
    return of_images.ranks(num_best), of_texts.ranks(torch.ones_like(of_texts.equal))


class _Counts:
    """Counts, for Q queries along one side of the tiles, of candidates that score higher than or equal to the best
    match."""

    def __init__(self, tiles: _Tiles, num_queries: int, dim: int) -> None:
        self.dim = dim  # axis of the candidates
        zeros = torch.zeros(num_queries, dtype=torch.int32, device=tiles.images.device)
        self.higher, self.equal, self.equal_and_earlier = zeros, zeros.clone(), zeros.clone()
        self._mask = torch.empty(tiles.rows, tiles.columns, dtype=torch.bool, device=tiles.images.device)

    def add(
        self, queries: slice, scores: Float[Tensor, "R C"], best: Tensor, candidate: Tensor, first_match: Tensor
    ) -> None:
        """Count one tile. `best` and `first_match` broadcast along the candidates, `candidate` along the queries."""
        mask = self._mask[: scores.shape[0], : scores.shape[1]]
        higher = torch.gt(scores, best, out=mask).sum(self.dim, dtype=torch.int32)
        equal = torch.ge(scores, best, out=mask).sum(self.dim, dtype=torch.int32) - higher
        self.higher[queries] += higher
        self.equal[queries] += equal
        if equal.any():  # rare, except in the tiles along the diagonal, which hold the matches themselves
            earlier = (scores == best) & (candidate < first_match)
            self.equal_and_earlier[queries] += earlier.sum(self.dim, dtype=torch.int32)

    def ranks(self, num_best: Int[Tensor, " Q"]) -> DirectionRanks:
        """Return the ranks, if `num_best` matches of each query share its best score."""
        best_case = 1 + self.higher.long()
        tied = self.equal > num_best
        return DirectionRanks((best_case + self.equal_and_earlier).cpu(), best_case.cpu(), tied.cpu())


def _own_scores(tiles: _Tiles, owner: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """Return the score of each caption with its own picture, taken from the tile that holds the pair."""
    own_score = tiles.images.new_empty(tiles.num_texts)
    rows = tiles.row_slices()
    for columns in tiles.column_slices():
        image = owner[columns]  # [C], rising
        tile_row = image // tiles.rows
        for row in range(int(tile_row[0]), int(tile_row[-1]) + 1):
            caption = (tile_row == row).nonzero()[:, 0]
            if len(caption):
                scores = tiles.scores(rows[row], columns)
                own_score[columns.start + caption] = scores[image[caption] - rows[row].start, caption]
    return own_score


def _tile_size(count: int, largest: int) -> int:
    return min(largest, -(-count // _TILE_STEP) * _TILE_STEP)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _recall(ranks: Int[Tensor, " Q"]) -> dict[str, float]:
    return {f"r{k}": float((ranks <= k).double().mean() * 100) for k in RECALL_AT}


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Turn off autocast, and TF32 or bfloat16 matmuls, whose rounding would make ties. Restore them afterwards."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
