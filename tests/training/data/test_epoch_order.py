"""The order of an epoch, drawn by windows, against the permutation of all samples at once."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest

from training.data.epoch_order import EpochOrder


def plain_order(shard_sizes: Sequence[int], seed: int, epoch: int, shuffle_shards: int) -> np.ndarray:
    """The order as checkpoints have relied on it since the first version."""
    generator = np.random.default_rng((seed, epoch))
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    shards = generator.permutation(len(shard_sizes))
    windows = [shards[i : i + shuffle_shards] for i in range(0, len(shards), shuffle_shards)]
    return np.concatenate(
        [
            generator.permutation(np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in window]))
            for window in windows
        ]
    )


def whole(shard_sizes: Sequence[int], seed: int, epoch: int, shuffle_shards: int) -> np.ndarray:
    return EpochOrder(shard_sizes, seed, epoch, shuffle_shards).samples(0, 10**9)


@pytest.mark.parametrize("shuffle_shards", [1, 2, 3, 4, 64])
def test_an_epoch_is_a_permutation_keyed_by_seed_and_epoch(shuffle_shards: int) -> None:
    sizes = [5, 1, 8, 3]
    order = whole(sizes, 0, 0, shuffle_shards)
    assert sorted(order) == list(range(17))
    assert (order == whole(sizes, 0, 0, shuffle_shards)).all()
    for other in [(1, 0), (0, 1)]:
        assert (order != whole(sizes, *other, shuffle_shards)).any()


def test_samples_are_mixed_within_a_window_of_shards_only() -> None:
    order = whole([10] * 6, 0, 0, shuffle_shards=2)
    windows = [set(order[start : start + 20] // 10) for start in range(0, 60, 20)]
    assert [len(window) for window in windows] == [2, 2, 2]
    assert len(set(np.abs(np.diff(order[:20])))) > 3  # mixed, not in sequence


def test_any_part_is_that_of_the_permutation_of_all_samples() -> None:
    draws = np.random.default_rng(0)
    for _ in range(100):
        sizes = draws.integers(1, 40, draws.integers(1, 20)).tolist()
        seed, epoch, shuffle_shards = (int(value) for value in draws.integers(1, 9, 3))
        expected = plain_order(sizes, seed, epoch, shuffle_shards)
        order = EpochOrder(sizes, seed, epoch, shuffle_shards)
        owners = np.repeat(np.arange(len(sizes)), sizes)
        for start, stop in np.sort(draws.integers(0, len(expected) + 3, (8, 2))):  # forward, backward, past the end
            part = order.samples(start, stop)
            assert part.dtype == np.int64 and (part == expected[start:stop]).all()
            for place, number in zip(range(start, stop), part, strict=False):
                assert owners[number] in order.shards_of(order.window_at(place))
        shards = [shard for window in range(order.num_windows) for shard in order.shards_of(window)]
        assert sorted(shards) == [*range(len(sizes))]
        assert order.shards_of(order.num_windows) == []


def test_a_replacement_is_any_sample_of_the_window() -> None:
    order = EpochOrder([3, 1, 4, 2, 5], 0, 0, shuffle_shards=2)
    draws = np.random.default_rng(0)
    for window, (start, stop) in enumerate(zip([0, *order._ends], order._ends, strict=False)):
        drawn = [order.replacement(window, draws) for _ in range(200)]
        assert set(drawn) == set(order.samples(start, stop))


def test_a_process_holds_the_numbers_of_one_window() -> None:
    sizes = np.full(2000, 1000)  # 16 MB of numbers at once
    tracemalloc.start()
    order = EpochOrder(sizes, 0, 0, shuffle_shards=4)
    last = order.samples(1_999_000, 2_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(last)) == 1000 and peak < 400_000
