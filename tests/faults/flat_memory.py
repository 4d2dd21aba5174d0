"""Many samples in a row, in one process: memory does not grow."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache as remembered
from itertools import islice
from pathlib import Path

import pytest

from faults.not_finite import small_run
from faults.trials import Row
from shard_files import loader, write_folder
from training.data.loader import ShardLoader
from training.data.samples import Batch
from training.data.transforms import ViewSpec

__all__ = ["ROWS"]

SAMPLES, BATCH, STEPS = 1000, 50, 4
"""Of each trial: samples that are read, their batches, and steps of a small training run."""
WARM = 3  # trials after which memory is taken as the measure
MOST_GROWTH = 16 << 20


def _shards(material: Path) -> None:
    write_folder(material / "shards", range(500), 100)


@dataclass
class _Reading:
    """What this process has read so far."""

    loader: ShardLoader
    resident: list[int] = field(default_factory=list)
    """Bytes of memory after each trial."""

    def batches(self) -> Iterator[Batch]:
        epoch = 0
        while True:
            yield from self.loader.batches(epoch)
            epoch += 1


@remembered
def _reading(material: Path) -> tuple[_Reading, Iterator[Batch]]:
    found = _Reading(loader(material / "shards", views=[ViewSpec(64)], global_batch_size=BATCH))
    return found, found.batches()


def trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    reading, batches = _reading(material)
    num_samples = sum(len(batch.keys) for batch in islice(batches, SAMPLES // BATCH))
    for _ in range(STEPS):
        small_run().step()
    reading.resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    growth = reading.resident[-1] - reading.resident[min(WARM, len(reading.resident)) - 1]
    if num_samples != SAMPLES:
        return f"{num_samples} samples instead of {SAMPLES}"
    return None if growth < MOST_GROWTH else f"{growth >> 20} MiB more after {len(reading.resident) * SAMPLES} samples"


def _keep_batches(patch: pytest.MonkeyPatch) -> None:
    kept, read = [], ShardLoader.batches

    def batches(self: ShardLoader, epoch: int, step: int = 0) -> Iterator[Batch]:
        for batch in read(self, epoch, step):
            kept.append(batch)
            yield batch

    patch.setattr(ShardLoader, "batches", batches)


ROWS = [
    Row(
        "flat memory",
        f"each trial reads {SAMPLES:,} samples and takes {STEPS} steps, all in one process: after the first {WARM} its "
        f"memory grows by less than {MOST_GROWTH >> 20} MiB",
        trial,
        full=50,
        few=5,
        off="the loader keeps its batches",
        switch_off=_keep_batches,
        num_off=6,
        prepare=_shards,
        per_process=50,
    ),
]
