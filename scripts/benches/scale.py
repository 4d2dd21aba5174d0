"""scale: what a training process takes until it knows where its first sample lies, by the number of samples.

Shards hold 10,000 samples each and are simulated in a temporary folder: manifest and indexes are written, the tars are
empty files of the right size, which take no room, and shards have equal indexes, which are hard links to a few files.
The baseline is a manifest of version 1, which holds all indexes as JSON.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from benches.measure import BenchOptions, Row, in_own_process, peak_memory_gb
from training.data.byte_index import ByteIndex
from training.data.epoch_order import EpochOrder
from training.data.index import ShardIndex
from training.data.shard_records import MANIFEST_FORMAT, MANIFEST_NAME, ShardRecord, index_file, write_index
from training.data.writer import write_manifest

__all__ = ["bench_scale"]

SHARD_SAMPLES, WINDOW = 10_000, 64
_SIZES, _FULL_SIZES = (10**6, 10**7, 10**8), (10**6, 10**7, 10**8, 10**9)
_LARGEST_OLD, _FULL_LARGEST_OLD = 10**6, 10**7  # half a gigabyte and half a minute per 10**7 samples
_PICTURE, _CAPTION, _BLOCK = 50_000, 700, 512  # bytes
_MAX_LINKS = 1000  # names of one file; file systems bound them


@dataclass
class _Start:
    """A process from its shards' paths to its first sample."""

    seconds: float
    cpu_seconds: float
    gb: float
    """The most memory, beside what the process had before."""
    peak_gb: float


def bench_scale(options: BenchOptions) -> Iterator[Row]:
    """Measure seconds, CPU seconds and memory of each size in a process of its own. The baseline's seconds are
    extrapolated to the larger sizes; its memory does not grow."""
    sizes, largest_old = (_FULL_SIZES, _FULL_LARGEST_OLD) if options.full else (_SIZES, _LARGEST_OLD)
    old = _Start(0, 0, 0, 0)
    for size in sizes:
        ours, disk = _measured(size, is_old=False)
        told = "extrapolated"
        if size <= largest_old:
            old, old_disk = _measured(size, is_old=True)
            told = f"{old_disk:.2g} GB"
        else:
            grown, largest_old = size / largest_old, size
            old = replace(old, seconds=old.seconds * grown, cpu_seconds=old.cpu_seconds * grown)
        case = (
            f"10^{round(np.log10(size))} samples, {size // SHARD_SAMPLES} shards; disk {disk:.2g} GB, baseline {told}"
        )
        for unit, field in (("s", "seconds"), ("CPU s", "cpu_seconds"), ("GB", "gb")):
            mine, theirs = getattr(ours, field), getattr(old, field)
            yield Row(case, unit, mine, theirs, theirs / max(mine, 1e-6), None, ours.peak_gb)


def _measured(num_samples: int, *, is_old: bool) -> tuple[_Start, float]:
    """Return what a process takes, and the gigabytes of manifest and indexes."""
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = simulate(Path(folder), num_samples // SHARD_SAMPLES, is_old=is_old)
        return in_own_process(_start, folder, num_samples), num_bytes / 1e9


def _start(folder: str, num_samples: int) -> _Start:
    """Find and read the first sample of an epoch."""
    before, began, cpu = peak_memory_gb(), time.perf_counter(), time.process_time()
    index = ShardIndex([f"{folder}/{_name(shard)}" for shard in range(num_samples // SHARD_SAMPLES)])
    contents = index.contents  # which a run keeps for its checkpoints
    order = EpochOrder(index.shard_sizes, 0, 0, WINDOW)
    index.hold(order.shards_of(0))
    raw = index.read(int(order.samples(0, 1)[0]))
    seconds, cpu_seconds, peak = time.perf_counter() - began, time.process_time() - cpu, peak_memory_gb()
    assert len(contents) * SHARD_SAMPLES == num_samples and raw.image is not None and len(raw.image) == _PICTURE
    return _Start(seconds, cpu_seconds, peak - before, peak)


def simulate(folder: Path, num_shards: int, *, is_old: bool) -> int:
    """Write the files of shards without their content, with a manifest of this or the first version. Return the bytes
    of manifest and indexes, each file counted once."""
    index, tar_bytes = _index()
    for shard in range(num_shards):
        with (folder / _name(shard)).open("wb") as tar:
            tar.truncate(tar_bytes)
    if is_old:
        _write_old_manifest(folder, num_shards, index, tar_bytes)
    else:
        record = write_index(folder / _name(0), index, "")
        files = [index_file(folder / _name(shard)) for shard in range(num_shards)]
        for shard in range(1, num_shards):
            if shard % _MAX_LINKS:
                os.link(files[shard - shard % _MAX_LINKS], files[shard])
            else:
                files[shard].write_bytes(files[0].read_bytes())
        write_manifest(folder, [_named(record, shard) for shard in range(num_shards)], {})
    statuses = (path.stat() for path in folder.iterdir() if path.suffix != ".tar")
    return sum({status.st_ino: status.st_size for status in statuses}.values())


def _name(shard: int) -> str:
    return f"{shard:06d}.tar"


def _named(record: ShardRecord, shard: int) -> ShardRecord:
    name = _name(shard)
    return replace(record, name=name, sha256=sha256(name.encode()).hexdigest())


def _index() -> tuple[ByteIndex, int]:
    """Return the index of a shard, and the bytes of its tar: per sample a picture and a caption, each after a
    header."""
    picture, caption = (_BLOCK + -(-num_bytes // _BLOCK) * _BLOCK for num_bytes in (_PICTURE, _CAPTION))
    starts = np.arange(SHARD_SAMPLES) * (picture + caption) + _BLOCK
    keys = np.array([f"{row:09d}" for row in range(SHARD_SAMPLES)], dtype=np.bytes_)
    spans = {
        name: np.stack([offsets, np.full(SHARD_SAMPLES, size)], axis=1)
        for name, offsets, size in (("image", starts, _PICTURE), ("json", starts + picture, _CAPTION))
    }
    return ByteIndex(keys, spans), SHARD_SAMPLES * (picture + caption) + 2 * _BLOCK


def _write_old_manifest(folder: Path, num_shards: int, index: ByteIndex, tar_bytes: int) -> None:
    """Write a manifest of version 1, which no command of this version makes."""
    spans = {name: found.tolist() for name, found in index.spans.items()}
    told = {"key": [index.key(row) for row in range(len(index))], **spans}
    rest = json.dumps({"num_samples": len(index), "bytes": tar_bytes, "inputs": "", "index": told})[1:]
    with (folder / MANIFEST_NAME).open("w") as file:
        head = {"format": MANIFEST_FORMAT, "version": 1, "num_samples": num_shards * len(index), "settings": {}}
        file.write(f'{json.dumps(head)[:-1]}, "shards": [')
        for shard in range(num_shards):
            name = _name(shard)
            digest = sha256(name.encode()).hexdigest()
            file.write(f'{", " if shard else ""}{{"name": "{name}", "sha256": "{digest}", {rest}')
        file.write("]}")
