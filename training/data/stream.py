"""Remote shards as an endless resampled stream, for data without an index.

Shards are drawn with replacement, keyed by (seed, epoch, step, rank, worker), and mixed in a small buffer. There is no
position to resume: a run that continues at (epoch, step) draws anew from there. Every rank takes the requested number
of steps. Only fsspec opens URLs, never webdataset's `gopen`, which runs `pipe:` URLs in a shell. Tars are read in one
pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import fsspec
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from eval.base.images import IMAGE_SUFFIXES
from eval.base.tar_samples import streamed_tar_samples
from longclip_teacher.errors import InputError
from training.data.index import (
    EXTRA_MEMBERS,
    MAX_EXTRA_BYTES,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    RawSample,
    Stage,
)
from training.data.randomness import sample_generator
from training.data.samples import BadSample, Batch, Sample, SampleDecoder, Tokenization, collate

__all__ = ["ShardStream"]

_SHUFFLE_BUFFER = 256  # samples, undecoded
_MAX_FAILURES = 10  # shards in a row without a sample


@dataclass
class ShardStream(IterableDataset):
    """Batches of one rank from remote shards. An InputError is yielded, not raised, because workers would wrap it."""

    urls: list[str]
    decoder: SampleDecoder
    tokenization: Tokenization
    batch_size: int
    rank: int
    stage: Stage = "both"
    """Which members of the download are kept."""

    def __post_init__(self) -> None:
        self._epoch, self._start, self._stop = 0, 0, 0

    def begin(self, epoch: int, step: int, stop: int) -> None:
        """Set the steps that the next iteration yields."""
        self._epoch, self._start, self._stop = epoch, step, stop

    def __iter__(self) -> Iterator[Batch | InputError]:
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        key = (self._epoch, self._start, self.rank, number)
        skipped: Counter[str] = Counter()
        samples = self._decoded(key, skipped)
        try:
            for _ in range(self._start + number, self._stop, num_workers):  # DataLoader takes the workers in turn
                batch = [next(samples) for _ in range(self.batch_size)]
                yield collate(batch, self.tokenization, dict(skipped))
                skipped.clear()
        except InputError as error:
            yield error

    def _decoded(self, key: tuple[int, ...], skipped: Counter[str]) -> Iterator[Sample]:
        for number, raw in enumerate(self._shuffled(key, skipped)):
            try:
                yield self.decoder.decode(raw, *key, number)
            except BadSample as error:
                skipped[str(error)] += 1
                if skipped.total() > max(_SHUFFLE_BUFFER, 10 * self.batch_size):
                    causes = ", ".join(f"{count} x {cause}" for cause, count in skipped.most_common())
                    raise InputError(f"hardly any sample of the shards can be used ({causes})") from None

    def _shuffled(self, key: tuple[int, ...], skipped: Counter[str]) -> Iterator[RawSample]:
        """Yield raw samples through a buffer: a random one leaves as each new one arrives."""
        generator = sample_generator(self.decoder.seed, *key)
        buffer: list[RawSample] = []
        for raw in self._raw(generator, skipped):
            if len(buffer) < _SHUFFLE_BUFFER:
                buffer.append(raw)
                if len(buffer) > 1 and generator.random() < 0.5:  # start to yield before the buffer is full
                    yield buffer.pop(int(generator.integers(len(buffer))))
                continue
            place = int(generator.integers(len(buffer)))
            buffer[place], raw = raw, buffer[place]
            yield raw

    def _raw(self, generator: np.random.Generator, skipped: Counter[str]) -> Iterator[RawSample]:
        """Yield samples of randomly drawn shards without end. A shard that fails on the way is counted and dropped."""
        failures = 0
        while failures < _MAX_FAILURES:
            url = self.urls[int(generator.integers(len(self.urls)))]
            num_samples = 0
            reason = "no samples in it"
            try:
                for raw in read_remote_shard(url, self.stage):
                    num_samples += 1
                    yield raw
            except Exception as error:  # each network library has its own errors; any of them ends this shard
                skipped["shard that failed"] += 1
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
            failures = 0 if num_samples else failures + 1
        raise InputError(f"{_MAX_FAILURES} remote shards in a row failed, the last was {url} ({reason})")


def read_remote_shard(url: str, stage: Stage = "both") -> Iterator[RawSample]:
    """Yield the samples of a remote tar in one pass, undecoded. A member over its size bound is skipped unread, and so
    is one that the stage does not use."""
    options = {} if url.startswith("s3:") else {"block_size": 0}  # 0: one plain download, no ranges
    bounds = _member_bounds(stage)
    with fsspec.open(url, "rb", **options) as file:
        for key, members in streamed_tar_samples(file, lambda suffix: bounds.get(suffix, -1)):  # -1: not ours
            content = {suffix: member.content for suffix, member in members.items() if member.content is not None}
            if content:
                image = next((content[suffix] for suffix in content if f".{suffix}" in IMAGE_SUFFIXES), None)
                extra = {name: content[name] for name in EXTRA_MEMBERS if content.get(name)}
                yield RawSample(key, image, content.get("json"), content.get("txt"), extra)


def _member_bounds(stage: Stage) -> dict[str, int]:
    """Return the most bytes of each member that a stage reads, by suffix."""
    bounds = {} if stage == "text" else {suffix[1:]: MAX_IMAGE_BYTES for suffix in IMAGE_SUFFIXES}
    if stage != "image":
        bounds |= {"json": MAX_TEXT_BYTES, "txt": MAX_TEXT_BYTES}
    if stage == "both":
        bounds |= dict.fromkeys(EXTRA_MEMBERS, MAX_EXTRA_BYTES)
    return bounds
