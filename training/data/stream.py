"""Remote shards as an endless resampled stream, for data without an index.

Shards are drawn with replacement, keyed by (seed, epoch, step, rank, worker), and mixed in a small buffer. There is no
position to resume: a run that continues at (epoch, step) draws anew from there. Every rank takes the requested number
of steps. URLs are opened by download.py (http, https) and fsspec (s3, gs), never by webdataset's `gopen`, which runs
`pipe:` URLs in a shell. Tars are read in one pass.
"""

from __future__ import annotations

import logging
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from eval.base.images import IMAGE_SUFFIXES
from eval.base.tar_samples import streamed_tar_samples
from longclip_teacher.errors import InputError
from training.data.byte_index import EXTRA_MEMBERS
from training.data.download import Download, TriesExhausted
from training.data.http_answer import Patience, shown_url
from training.data.index import MAX_EXTRA_BYTES, MAX_IMAGE_BYTES, MAX_TEXT_BYTES, RawSample, Stage
from training.data.randomness import sample_generator
from training.data.remote_files import OBJECT_STORES, open_object
from training.data.samples import BadSample, Batch, Sample, SampleDecoder, Tokenization, collate

__all__ = ["ShardStream", "read_remote_shard"]

_LOGGER = logging.getLogger(__name__)
_SHUFFLE_BUFFER = 256  # samples, undecoded
_SHUFFLE_BYTES = 512 << 20  # fewer samples are held if they are larger than this together
_MAX_FAILURES = 10  # shards in a row without a sample
_MAX_EXHAUSTED = 2  # the same, if each took as many tries as `Patience` allows
_END_MARK = bytes(2 * tarfile.BLOCKSIZE)  # padding alone is shorter than one block


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
        self._told: set[str] = set()

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
        held = 0  # bytes, with the new one
        for raw in self._raw(generator, skipped):
            held += _num_bytes(raw)
            while buffer and held > _SHUFFLE_BYTES:
                held -= _num_bytes(buffer[-1])
                yield buffer.pop()
            if len(buffer) < _SHUFFLE_BUFFER:
                buffer.append(raw)
                if len(buffer) == 1 or generator.random() >= 0.5:  # start to yield before the buffer is full
                    continue
                raw = buffer.pop(int(generator.integers(len(buffer))))
            else:
                place = int(generator.integers(len(buffer)))
                buffer[place], raw = raw, buffer[place]
            held -= _num_bytes(raw)
            yield raw

    def _raw(self, generator: np.random.Generator, skipped: Counter[str]) -> Iterator[RawSample]:
        """Yield samples of randomly drawn shards without end. A shard that fails on the way is counted and dropped."""
        failures, exhausted = 0, 0
        while failures < _MAX_FAILURES and exhausted < _MAX_EXHAUSTED:
            url = self.urls[int(generator.integers(len(self.urls)))]
            num_samples = 0
            cause = InputError(f"{shown_url(url)} has no samples in it")
            try:
                for raw in read_remote_shard(url, self.stage):
                    num_samples += 1
                    yield raw
            except InputError as error:
                cause = error
                skipped["shard that failed"] += 1
                if url not in self._told:
                    self._told.add(url)
                    _LOGGER.warning("%s; left after %d samples", error, num_samples)
            failures = 0 if num_samples else failures + 1
            exhausted = exhausted + 1 if isinstance(cause, TriesExhausted) and not num_samples else 0
        raise InputError(f"{failures} remote shards in a row failed, at last: {cause}")


def read_remote_shard(url: str, stage: Stage = "both", patience: Patience | None = None) -> Iterator[RawSample]:
    """Yield the samples of a remote tar in one pass, undecoded. A member over its size bound is skipped unread, and so
    is one that the stage does not use.

    Raise InputError naming the shard and the cause; TriesExhausted if the server gave nothing more within `patience`.
    """
    bounds = _member_bounds(stage)
    try:
        with _opened(url, patience) as file:
            for key, members in streamed_tar_samples(file, lambda suffix: bounds.get(suffix, -1)):  # -1: not ours
                content = {suffix: member.content for suffix, member in members.items() if member.content is not None}
                if content:
                    image = next((content[suffix] for suffix in content if f".{suffix}" in IMAGE_SUFFIXES), None)
                    extra = {name: content[name] for name in EXTRA_MEMBERS if content.get(name)}
                    yield RawSample(key, image, content.get("json"), content.get("txt"), extra)
    except TriesExhausted as error:
        raise TriesExhausted(f"cannot read {shown_url(url)}: {error}") from None
    except InputError as error:
        raise InputError(f"cannot read {shown_url(url)}: {error}") from None
    except tarfile.TarError as error:
        raise InputError(f"cannot read {shown_url(url)}: no complete tar file ({error})") from None
    except Exception as error:  # fsspec's storages have errors of their own
        lines = f"{type(error).__name__}: {error}".splitlines()
        raise InputError(f"cannot read {shown_url(url)}: {lines[0]}") from None


def _opened(url: str, patience: Patience | None) -> AbstractContextManager[Any]:
    if url.startswith(OBJECT_STORES):
        return open_object(url, patience or Patience())
    return closing(Download(url, _END_MARK, patience))


def _num_bytes(raw: RawSample) -> int:
    return sum(len(member) for member in (raw.image, raw.json, raw.txt, *raw.extra.values()) if member)


def _member_bounds(stage: Stage) -> dict[str, int]:
    """Return the most bytes of each member that a stage reads, by suffix."""
    bounds = {} if stage == "text" else {suffix[1:]: MAX_IMAGE_BYTES for suffix in IMAGE_SUFFIXES}
    if stage != "image":
        bounds |= {"json": MAX_TEXT_BYTES, "txt": MAX_TEXT_BYTES}
    if stage == "both":
        bounds |= dict.fromkeys(EXTRA_MEMBERS, MAX_EXTRA_BYTES)
    return bounds
