"""Training batches from shards or loose files, in an exact, resumable order over an index of samples.

The order of epoch e is a permutation keyed by (seed, e). Batch k is its k-th run of `global_batch_size` samples, and
rank r of W takes the r-th W-th of it. The complete state of the sampler is therefore (seed, epoch, step): any number of
workers and processes gives the same global batches, a resumed run continues where it stopped, and every rank takes the
same number of steps. An epoch drops only the remainder that is smaller than a batch. Remote shards with a manifest are
read in the same order through remote_index.py, those without one in no order through stream.py.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from eval.base.workers import share_tensors, worker_options
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer
from training.data.download import MissingFile
from training.data.epoch_order import EpochOrder
from training.data.index import RawSample, ShardIndex, Stage, expand_patterns, is_remote
from training.data.loose_files import CaptionFiles, PictureFolder
from training.data.randomness import sample_generator
from training.data.remote_index import GIGABYTE, RemoteShardIndex, default_cache_folder, remote_shards
from training.data.samples import BadSample, Batch, Sample, SampleDecoder, Tokenization, collate
from training.data.shard_cache import ShardCache
from training.data.shard_records import Contents
from training.data.store import TeacherStore
from training.data.stream import ShardStream
from training.data.transforms import ViewSpec
from training.settings.augment import AugmentConfig
from training.settings.captions import NO_SAMPLING, CaptionOptions

__all__ = ["Batch", "LoaderSettings", "OpenStore", "SampleIndex", "ShardLoader", "build_loader"]

OpenStore: TypeAlias = Callable[[ShardIndex | None], TeacherStore]
_LOGGER = logging.getLogger(__name__)
_MAX_ATTEMPTS = 20  # samples tried for one place in a batch
_MIN_JUDGED = 1000  # the share of bad samples is computed as if at least this many had been read


class SampleIndex(Protocol):
    """Samples by number, from shards, a folder of pictures or caption files. Picklable: workers read through it."""

    shard_sizes: np.ndarray
    """int64 [shards]; they sum to `num_samples`. Loose files are one shard."""

    @property
    def contents(self) -> dict[str, Contents]:
        """The description of each shard, caption file or folder of pictures, by path."""
        ...

    @property
    def num_samples(self) -> int: ...

    def read(self, index: int) -> RawSample:
        """Return sample `index`, undecoded. Raise InputError for a file that has changed."""
        ...


@dataclass
class _IndexedBatches(Dataset):
    """The batches of one rank by (epoch, step). An InputError is returned, not raised, because workers would wrap
    it."""

    index: SampleIndex
    decoder: SampleDecoder
    tokenization: Tokenization
    batch_size: int
    rank: int
    world_size: int
    shuffle_shards: int

    def __post_init__(self) -> None:
        self._epoch = -1
        self._windows = range(0)
        self._remote = self.index if isinstance(self.index, RemoteShardIndex) else None

    def __getitem__(self, epoch_step: tuple[int, int]) -> Batch | InputError:
        epoch, step = epoch_step
        if epoch != self._epoch:
            key = self.index.shard_sizes, self.decoder.seed
            self._order = EpochOrder(*key, epoch, self.shuffle_shards)
            self._next_order = EpochOrder(*key, epoch + 1, self.shuffle_shards)
            self._epoch = epoch
            self._windows = range(0)
        start = (step * self.world_size + self.rank) * self.batch_size
        skipped: Counter[str] = Counter()
        try:
            self._turn_to(step, self._order.window_at(start))
            numbers = self._order.samples(start, start + self.batch_size).tolist()
            samples = [self._sample(epoch, number, place, skipped) for place, number in enumerate(numbers, start)]
        except InputError as error:
            return error
        return collate(samples, self.tokenization, dict(skipped))

    def _turn_to(self, step: int, window: int) -> None:
        """Have remote shards of this rank's window and of the next one fetched, and hold the indexes of the windows of
        all ranks: what is wrong with one is found by all of them at the same step."""
        if self._remote is not None:
            following = self._order.shards_of(window + 1) or self._next_order.shards_of(0)
            self._remote.expect(self._order.shards_of(window), following)
        size = self.world_size * self.batch_size
        windows = range(self._order.window_at(step * size), self._order.window_at((step + 1) * size - 1) + 1)
        if windows != self._windows and isinstance(self.index, ShardIndex):
            self.index.hold(shard for window in windows for shard in self._order.shards_of(window))
            self._windows = windows

    def _sample(self, epoch: int, index: int, place: int, skipped: Counter[str]) -> Sample:
        """Return sample `index`, which is at `place` in the order, or the first usable one of those drawn in its place:
        from all samples, or from the same window of remote shards."""
        candidate = index
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            try:
                return self.decoder.decode(self.index.read(candidate), epoch, candidate)
            except BadSample as error:
                skipped[str(error)] += 1
                generator = sample_generator(self.decoder.seed, epoch, index, attempt)
                if self._remote is None:
                    candidate = int(generator.integers(self.index.num_samples))
                else:
                    candidate = self._order.replacement(self._order.window_at(place), generator)
        causes = ", ".join(f"{count} x {cause}" for cause, count in skipped.most_common())
        raise InputError(f"{_MAX_ATTEMPTS} samples drawn in a row cannot be used ({causes}): fix the data")


class _Steps(Sampler[tuple[int, int]]):
    """The steps of one epoch from a given step on. They are set anew for each epoch, so that workers persist."""

    def __init__(self) -> None:
        self.epoch, self.start, self.stop = 0, 0, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, step) for step in range(self.start, self.stop))  # no list: a long epoch has millions

    def __len__(self) -> int:
        return self.stop - self.start


class ShardLoader:
    """The batches of one rank. `build_loader` creates it.

    num_samples      samples in the data; None for a stream
    steps_per_epoch  the same on every rank
    is_exact         whether order and resumption are exact (indexed samples) or resampled (a stream)
    """

    def __init__(
        self,
        source: _IndexedBatches | ShardStream,
        *,
        num_samples: int | None,
        steps_per_epoch: int,
        num_workers: int,
        max_bad_share: float,
        pin_memory: bool,
    ) -> None:
        self.num_samples = num_samples
        self.steps_per_epoch = steps_per_epoch
        self.is_exact = isinstance(source, _IndexedBatches)
        self._source = source
        self._batch_size = source.batch_size
        self._max_bad_share = max_bad_share
        self._seen = 0
        self._skipped: Counter[str] = Counter()
        self._steps = _Steps()
        self._batches: DataLoader = DataLoader(
            source,
            batch_size=None,  # the source yields complete batches
            sampler=self._steps if self.is_exact else None,
            collate_fn=share_tensors,
            pin_memory=pin_memory,
            persistent_workers=self.is_exact and num_workers > 0,  # a stream gets its steps when it starts
            **worker_options(num_workers),
        )

    @property
    def contents(self) -> dict[str, Contents]:
        """A description of each local file or folder with samples; empty for a stream."""
        return self._source.index.contents if isinstance(self._source, _IndexedBatches) else {}

    @property
    def skipped(self) -> dict[str, int]:
        """Samples replaced so far in this process, by cause."""
        return dict(self._skipped)

    def batches(self, epoch: int, step: int = 0) -> Iterator[Batch]:
        """Yield the batches of `epoch` from `step` on, always full.

        Raise InputError for a broken shard, and when the share of unusable samples exceeds the bound.
        """
        if isinstance(self._source, ShardStream):
            self._source.begin(epoch, step, self.steps_per_epoch)
        else:
            self._steps.epoch, self._steps.start, self._steps.stop = epoch, step, self.steps_per_epoch
        for batch in self._batches:
            if isinstance(batch, InputError):
                raise InputError(str(batch))  # not `batch` itself: in its own traceback it would keep the workers alive
            self._count(batch.skipped)
            yield batch

    def _count(self, skipped: dict[str, int]) -> None:
        self._skipped.update(skipped)
        num_bad = self._skipped.total()
        self._seen += self._batch_size + sum(skipped.values())
        if num_bad > self._max_bad_share * max(self._seen, _MIN_JUDGED):
            causes = ", ".join(f"{count} x {cause}" for cause, count in self._skipped.most_common())
            raise InputError(
                f"{num_bad} of {self._seen} samples cannot be used ({causes}): more than max_bad_share allows "
                f"({self._max_bad_share:g}); fix the data or raise it"
            )


@dataclass(frozen=True)
class LoaderSettings:
    """The data of one rank's loader and how it is read. Raise InputError for numbers out of bounds."""

    shards: str | Path | Sequence[str | Path]
    """See `expand_patterns`."""
    _: KW_ONLY
    views: Sequence[ViewSpec]
    """Views of each picture: the student's, then those of teachers with other settings."""
    augment: AugmentConfig
    tokenizer: CaptionTokenizer
    context_length: int
    global_batch_size: int
    """Total of all ranks; divided by `world_size`."""
    stage: Stage = "both"
    """image: samples need no caption; text: they need no picture, none is read, views are unused."""
    images: Path | None = None
    """Image stage: a folder of pictures instead of `shards` (see `PictureFolder`)."""
    captions: Sequence[str] = ()
    """Text stage: caption files instead of `shards` (see `CaptionFiles`)."""
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    num_workers: int = 0
    max_bad_share: float = 0.01
    """Share of samples that may be unusable (and are replaced) before the run stops."""
    shuffle_shards: int = 64
    """Number of shards whose samples are mixed at a time; loose files are all mixed."""
    cache_folder: Path | None = None
    """Folder for remote shards; None: `default_cache_folder`."""
    cache_bytes: int = 50 * GIGABYTE
    """The most bytes that it may hold."""
    epoch_samples: int | None = None
    """Samples per epoch: required for a stream; makes an epoch over indexed samples shorter."""
    open_store: OpenStore | None = None
    """Function that opens the stored teacher features of the indexed shards (None for a stream). Their crops and
    captions are replayed."""
    stored_features: bool = True
    """False leaves the stored features themselves out."""
    fast_decode: bool = True
    """See training/data/decoding.py."""
    trim_captions: bool = True
    """False pads captions to `context_length`."""
    sampling: CaptionOptions = NO_SAMPLING
    """How captions are sampled and shifted."""
    reads_sub: bool = False
    """Draw `sampling.sub_captions` sentences of each long caption too."""
    shifted_length: int | None = None
    """Positions of the trained model, which shifted captions must not leave. None: `context_length`."""
    pads_in_front: bool = False
    """Shift captions by padding in front of the text, for a Long-CLIP, and not by the positions of the model."""
    pin_memory: bool = False
    """Batches in page-locked memory, for a GPU."""
    show_progress: bool = False
    """Show a bar while shards without a manifest are indexed."""

    def __post_init__(self) -> None:
        if not self.views and self.stage != "text":
            raise InputError("no views: give one for the student, and one for each teacher with another size")
        if self.global_batch_size < 1 or self.global_batch_size % self.world_size:
            raise InputError(
                f"global_batch_size {self.global_batch_size} is not divisible by the {self.world_size} processes"
            )
        if not 0 <= self.max_bad_share <= 1 or self.shuffle_shards < 1 or self.seed < 0 or self.num_workers < 0:
            raise InputError(
                "data: max_bad_share must be 0 to 1, shuffle_shards 1 or more, seed and num_workers 0 or more"
            )
        if self.cache_bytes < 1:
            raise InputError("--data.cache_gb must be positive")


def build_loader(settings: LoaderSettings) -> ShardLoader:
    """Build one rank's loader over shards or, for a single tower, over loose files.

    Raise InputError for whatever is wrong with the data.
    """
    loose = _loose_files(settings.stage, settings.images, settings.captions)
    if loose is not None and settings.open_store is not None:
        raise InputError("stored teacher features belong to shards: give --data.shards, or drop --teacher.cache")
    # a store identifies a sample by its picture and captions
    members: Stage = settings.stage if settings.open_store is None else "both"
    paths = [] if loose is not None else expand_patterns(settings.shards)
    index = None if loose is not None else _shard_index(settings, paths, members)
    samples: SampleIndex | None = loose or index
    num_samples = None if samples is None else samples.num_samples
    steps_per_epoch = _epoch_samples(settings, num_samples) // settings.global_batch_size
    store = None if settings.open_store is None else settings.open_store(index)
    if isinstance(index, RemoteShardIndex):
        index.check_room()  # with what the store fetches
    source = _source(settings, samples, paths, members, store)
    return ShardLoader(
        source,
        num_samples=num_samples,
        steps_per_epoch=steps_per_epoch,
        num_workers=settings.num_workers,
        max_bad_share=settings.max_bad_share,
        pin_memory=settings.pin_memory,
    )


def _shard_index(settings: LoaderSettings, paths: list[str], members: Stage) -> ShardIndex | None:
    """Return the index of the shards; None if they are remote and have no manifest."""
    if not is_remote(paths[0]):
        return ShardIndex(paths, settings.show_progress, members)
    try:
        shards = remote_shards(paths)
    except MissingFile as error:
        _LOGGER.info(
            "no manifest beside the shards (%s): they are streamed, drawn with replacement and without exact order or "
            "resumption; make_shards.py index writes a manifest",
            error,
        )
        return None
    cache = ShardCache(settings.cache_folder or default_cache_folder(), settings.cache_bytes)
    return RemoteShardIndex(shards, cache, settings.shuffle_shards, members)


def _epoch_samples(settings: LoaderSettings, num_samples: int | None) -> int:
    """Return the number of samples per epoch, given `num_samples` in the data (None for a stream)."""
    num_epoch = settings.epoch_samples or num_samples
    if num_epoch is None:
        raise InputError(
            "remote shards without a manifest.json beside them are streamed: upload it, or set epoch_samples to the "
            "number of samples per epoch"
        )
    if num_samples is not None and num_epoch > num_samples:
        raise InputError(f"epoch_samples {num_epoch} exceeds the {num_samples} samples of the data: lower it")
    if num_epoch < settings.global_batch_size:
        raise InputError(
            f"{num_epoch} samples are fewer than one global batch of {settings.global_batch_size}: lower it"
        )
    return num_epoch


def _source(
    settings: LoaderSettings, samples: SampleIndex | None, urls: list[str], members: Stage, store: TeacherStore | None
) -> _IndexedBatches | ShardStream:
    """Return the batches of `samples`, or of the remote shards at `urls` if there is no index."""
    decoder = SampleDecoder(
        tuple(settings.views),
        settings.augment,
        settings.seed,
        settings.fast_decode,
        store,
        settings.stored_features,
        settings.stage,
        settings.sampling.sub_captions if settings.reads_sub else 0,
        settings.sampling,
    )
    tokenization = Tokenization(
        settings.tokenizer,
        settings.context_length,
        settings.trim_captions,
        settings.sampling.max_shift,
        settings.shifted_length or settings.context_length,
        settings.pads_in_front,
    )
    batch_size = settings.global_batch_size // settings.world_size
    if samples is None:
        return ShardStream(urls, decoder, tokenization, batch_size, settings.rank, members)
    return _IndexedBatches(
        samples,
        decoder,
        tokenization,
        batch_size,
        settings.rank,
        settings.world_size,
        settings.shuffle_shards,
    )


def _loose_files(stage: Stage, images: Path | None, captions: Sequence[str]) -> SampleIndex | None:
    """Return the index of the loose files that are given instead of shards, if any."""
    if images is not None and stage != "image":
        raise InputError(f"--data.images {images} belongs to --run.stage image, not {stage}: give --data.shards")
    if captions and stage != "text":
        raise InputError(f"--data.captions belongs to --run.stage text, not {stage}: give --data.shards")
    if images is not None:
        return PictureFolder(images)
    return CaptionFiles(captions) if captions else None
