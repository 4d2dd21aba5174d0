"""The order of an epoch: a permutation of all samples keyed by (seed, epoch), drawn one window of shards at a time.

Shards are shuffled, then the samples of `shuffle_shards` shards at a time, which are a window. So reads stay within
that many files, and a process holds the numbers of one window only, however many samples there are.

Shapes: K shards, W windows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.data.randomness import sample_generator

__all__ = ["EpochOrder"]


class EpochOrder:
    """The order of one epoch. The shards are known from the start; their samples are drawn when they are asked for."""

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, seed: int, epoch: int, shuffle_shards: int) -> None:
        """Draw the order of the shards. `shard_sizes` [K] are their numbers of samples."""
        self._key = (seed, epoch)
        self._shuffle_shards = shuffle_shards
        self._sizes = np.asarray(shard_sizes)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])  # K + 1
        self._begin()
        ends = np.cumsum(self._sizes[self._shards])
        self._ends = ends[[*range(shuffle_shards - 1, len(ends) - 1, shuffle_shards), -1]]  # W: places after windows

    @property
    def num_windows(self) -> int:
        """W, the number of windows."""
        return len(self._ends)

    def window_at(self, place: int) -> int:
        """Return the window of the sample at `place` in the order."""
        return int(np.searchsorted(self._ends, place, side="right"))

    def shards_of(self, window: int) -> list[int]:
        """Return the shards of a window by their numbers; none if there is no such window."""
        start = window * self._shuffle_shards
        return self._shards[start : start + self._shuffle_shards].tolist()

    def samples(self, start: int, stop: int) -> np.ndarray:
        """Return the samples at the places `start` to `stop` (excluded): int64.

        Places that rise from call to call cost one draw per window. Going back draws from the start again.
        """
        stop = min(stop, int(self._ends[-1]))
        parts = []
        while start < stop:
            window = self.window_at(start)
            numbers = self._drawn(window)
            first = int(self._ends[window]) - len(numbers)
            parts.append(numbers[start - first : stop - first])
            start = int(self._ends[window])
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def replacement(self, window: int, generator: np.random.Generator) -> int:
        """Draw any sample of a window."""
        shards = self.shards_of(window)
        ends = np.cumsum(self._sizes[shards])
        number = int(generator.integers(ends[-1]))
        place = int(np.searchsorted(ends, number, side="right"))
        return int(self._starts[shards[place] + 1] - (ends[place] - number))

    def _begin(self) -> None:
        self._generator = sample_generator(*self._key)
        self._shards = self._generator.permutation(len(self._sizes))
        self._window = -1
        self._numbers = np.empty(0, dtype=np.int64)

    def _drawn(self, window: int) -> np.ndarray:
        """Return the samples of a window in order. Earlier ones are drawn too, since all share one generator."""
        if window < self._window:
            self._begin()
        while self._window < window:
            self._window += 1
            ranges = [np.arange(self._starts[shard], self._starts[shard + 1]) for shard in self.shards_of(self._window)]
            self._numbers = self._generator.permutation(np.concatenate(ranges))
        return self._numbers
