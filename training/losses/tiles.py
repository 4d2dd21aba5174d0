"""Similarity logits in tiles, with their row and column softmaxes, on one process or shared by several.

Shapes: G global batch, D width, R rank of PCA'd images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Factors", "TiledLogits", "Tiles"]

Factors = tuple[Tensor, Tensor]
"""Coordinates [G, R] and basis [R, D] of image features that are their product."""
_CPU_TILE, _GPU_TILE = (512, 1024), (4096, 8192)  # rows, columns; the CPU's stay in its cache


class Tiles:
    """The tiles in this process's share of the rows of a G x G matrix, reusable memory for a tile, and sums over
    processes."""

    def __init__(self, like: Tensor, share: tuple[int, int], shape: tuple[int, int] | None) -> None:
        rank, self._processes = share
        self._like, self._count = like, len(like)
        self._first, self._last = (number * self._count // self._processes for number in (rank, rank + 1))
        self._height, self._width = shape or (_CPU_TILE if like.device.type == "cpu" else _GPU_TILE)
        self._memory: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for row in range(self._first, self._last, self._height):
            rows = slice(row, min(row + self._height, self._last))
            for column in range(0, self._count, self._width):
                yield rows, slice(column, min(column + self._width, self._count))

    def memory(self, name: str, rows: slice, columns: slice) -> Tensor:
        """Uninitialised, contiguous memory for a tile; the same at every call with this name."""
        if name not in self._memory:
            largest = min(self._height, self._count) * min(self._width, self._count)
            self._memory[name] = self._like.new_empty(largest)
        height, width = rows.stop - rows.start, columns.stop - columns.start
        return self._memory[name][: height * width].view(height, width)

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self._processes > 1:
            dist.all_reduce(tensor)
        return tensor

    def max_over_processes(self, tensor: Tensor) -> Tensor:
        """Take the maximum over all processes, in place."""
        if self._processes > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor


class TiledLogits:
    """The logits `scale * image @ text.T` of one model, and both their softmaxes, tile by tile.

    The constructor makes the first pass over the tiles. One exponential of a logit serves both its row and its column,
    unless a row or column lies so far below the rest that it would underflow (at scale 100, a picture whose cosines are
    all below -0.3). Such a row or column has its own maximum and its own exponentials. Which they are is known to the
    device alone: both ways are computed everywhere, which takes little beside the products, and nobody waits.
    """

    def __init__(
        self, image: Tensor, text: Tensor, scale: Tensor | float, factors: Factors | None, tiles: Tiles
    ) -> None:
        coordinates, basis = (image, None) if factors is None else factors
        self.left = coordinates.to(image.dtype) * scale  # [G, D or R]
        self._right = text if basis is None else text @ basis.to(text.dtype).T  # [G, D or R]
        self._tiles = tiles
        limits = torch.finfo(image.dtype)
        bound = scale * torch.linalg.vector_norm(image, dim=1).max() * torch.linalg.vector_norm(text, dim=1).max()
        self._shift = (bound - 0.8 * math.log(limits.max)).clamp_min(0)  # 0.2: a sum of G is larger than a term
        sums, own_log_sums = self._sums()
        is_shared = sums > len(image) * limits.tiny / limits.eps  # anything that underflowed is below rounding
        self._log_sums = torch.where(is_shared, sums.log() + self._shift, own_log_sums)
        # for rows and columns [2, G]: softmax = exp(logit - self._shift) * factor + exp(logit - own shift) * own
        # factor, one of which is 0. The own factor corrects the rounding of the log-sum-exp
        self._factors = sums.reciprocal().where(is_shared, 0).to(image.dtype)
        own_shifts = own_log_sums.to(image.dtype)
        self._own_factors = (own_shifts - own_log_sums).exp().where(~is_shared, 0).to(image.dtype)
        self._own_shifts = own_shifts.where(~is_shared, torch.inf)

    @property
    def mean_log_sum(self) -> Tensor:
        """Mean log-sum-exp over all rows and columns, float64."""
        return self._log_sums.mean()

    def tile(self, rows: slice, columns: slice, name: str) -> Tensor:
        """Logits of these rows and columns, in the tile memory of that name."""
        return torch.mm(self.left[rows], self._right[columns].T, out=self._tiles.memory(name, rows, columns))

    def to_softmaxes(self, tile: Tensor, rows: slice, columns: slice, scratch: Tensor) -> Tensor:
        """Turn a tile of logits into row softmax + column softmax, in place."""
        own = self._tiles.memory("own", rows, columns)
        torch.sub(tile, self._own_shifts[0, rows, None], out=own).exp_().mul_(self._own_factors[0, rows, None])
        torch.sub(tile, self._own_shifts[1, columns], out=scratch).exp_().mul_(self._own_factors[1, columns])
        own.add_(scratch)
        factors = torch.add(self._factors[0, rows, None], self._factors[1, columns], out=scratch)
        return tile.sub_(self._shift).exp_().mul_(factors).add_(own)

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Sums of exp(logit - shift) over rows and over columns [2, G], and the log-sum-exps of rows and columns with
        maxima of their own [2, G], both float64."""
        sums = self.left.new_zeros(2, len(self.left), dtype=torch.float64)
        log_sums = torch.full_like(sums, -torch.inf)
        for rows, columns in self._tiles:
            tile = self.tile(rows, columns, "logits")
            places = (0, rows, 1), (1, columns, 0)
            for side, part, dim in places:
                log_sums[side, part] = torch.logaddexp(log_sums[side, part], tile.logsumexp(dim).double())
            exponentials = tile.sub_(self._shift).exp_()
            for side, part, dim in places:
                sums[side, part] += exponentials.sum(dim)
        largest = self._tiles.max_over_processes(log_sums.clone())
        log_sums = self._tiles.sum_over_processes((log_sums - largest).exp_()).log_().add_(largest)
        return self._tiles.sum_over_processes(sums), log_sums
