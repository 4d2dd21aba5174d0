"""Run the teacher once: write the sidecars of a list of shards, each from its own pictures and captions alone.

Loader workers decode each picture once and render all its views. Views are encoded in batches that cross the borders of
samples; a shard's distinct captions are encoded once each, sorted by length. No batch crosses a shard, so a sidecar
does not depend on the process that makes it.

Shapes: N samples of a shard, V views, M samples of a piece, U distinct captions, L tokens, D width.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eval.base.workers import share_tensors, worker_options
from eval.towers.features import evaluation_mode, model_device
from eval.towers.precision import Precision
from longclip_teacher import LongCLIP
from longclip_teacher.errors import InputError
from longclip_teacher.features import unit_features
from longclip_teacher.text import caption_lengths
from longclip_teacher.weights_file import file_sha256
from training.cache.freshness import sample_captions, stored_sentences
from training.cache.manifest import (
    CacheSettings,
    ShardIdentity,
    SidecarRecord,
    decoder_name,
    library_versions,
    shard_number,
    sidecar_path,
    teacher_hashes,
    tokenizer_digest,
    write_record,
)
from training.cache.sidecar import CaptionRows, SampleEntry, write_sidecar
from training.data.decoding import normalized, open_picture, picture_size
from training.data.index import RawSample, ShardIndex
from training.data.randomness import sample_generator
from training.data.samples import BadSample
from training.data.transforms import ViewSpec, draw_augmentation, render
from training.settings.augment import AugmentConfig
from training.settings.captions import NO_SAMPLING, CaptionOptions

__all__ = ["SidecarWriter", "cache_settings"]

_TOKENS_PER_ROW = 64  # a batch of captions has as many tokens as `batch_size` captions of this length


def cache_settings(
    teacher: str,
    model: LongCLIP,
    *,
    views: int,
    augment: AugmentConfig,
    seed: int = 0,
    precision: Precision = "fp32",
    fast_decode: bool = True,
    captions: CaptionOptions = NO_SAMPLING,
    caption_views: int = 1,
    sentences: bool = False,
) -> CacheSettings:
    """Return the settings of a cache of `model`, loaded from `teacher`, with `views` crops per picture (0: centre) and,
    if `captions` samples the short ones, `caption_views` of them per long caption. `sentences` stores the sentences of
    the long captions too."""
    preprocess = model.preprocess_cfg
    return CacheSettings(
        teacher=teacher,
        teacher_sha256=teacher_hashes(teacher)[0],
        embed_dim=model.embed_dim,
        logit_scale=float(model.linear_logit_scale.detach()),
        activation=model.config.activation,
        image_size=model.image_size,
        mean=tuple(preprocess.mean),
        std=tuple(preprocess.std),
        interpolation=preprocess.interpolation,
        context_length=model.context_length,
        tokenizer=tokenizer_digest(model.context_length),
        views=views,
        augment=augment,
        seed=seed,
        decoder=decoder_name(fast_decode),
        precision=precision,
        libraries=library_versions(),
        captions=captions.of_short_texts,
        caption_views=caption_views if captions.short == "sampled" else 1,
        sentences=sentences,
        ancestry=model.ancestry,
    )


class _ReadSample(NamedTuple):
    """A sample as a worker reads it."""

    entry: SampleEntry  # captions not yet numbered
    long: list[str]
    short: list[str]


class _Rows(NamedTuple):
    """Consecutive rows of a shard, which one worker reads at a time."""

    shard: int
    start: int
    stop: int


class _Piece(NamedTuple):
    """Consecutive samples of a shard. `images` are all views of the readable ones."""

    shard: int
    is_last: bool
    samples: list[_ReadSample]
    images: Tensor  # uint8 [M * V, 3, S, S]


@dataclass
class _Pieces(Dataset):
    """Pieces by their rows. An InputError is returned, not raised, because workers would wrap it."""

    index: ShardIndex
    settings: CacheSettings

    def __getitem__(self, rows: _Rows) -> _Piece | InputError:
        shard, start, stop = rows
        first = int(self.index.shard_sizes[:shard].sum())
        samples: list[_ReadSample] = []
        views: list[Tensor] = []
        try:
            for row in range(start, stop):
                sample, rendered = self._read(self.index.read(first + row), shard, row)
                samples.append(sample)
                views += rendered
        except InputError as error:
            return error
        size = self.settings.image_size
        images = torch.stack(views) if views else torch.empty((0, 3, size, size), dtype=torch.uint8)
        return _Piece(shard, stop == int(self.index.shard_sizes[shard]), samples, images)

    def _read(self, raw: RawSample, shard: int, row: int) -> tuple[_ReadSample, list[Tensor]]:
        settings, name = self.settings, self.index.path(shard).name
        try:
            long, short, shorts_follow = sample_captions(raw, settings, name, row)
            picture = open_picture(raw.image or b"", settings.decoder == "fast")
        except (BadSample, InputError):
            return _ReadSample(SampleEntry(raw.key), [], []), []
        size = picture_size(picture)
        augmentations = [
            draw_augmentation(size, settings.augment, sample_generator(settings.seed, shard_number(name), row, view))
            for view in range(settings.num_stored_views)
        ]
        spec = ViewSpec(settings.image_size, settings.interpolation)
        images = [render(picture, augmentation, [spec])[0] for augmentation in augmentations]
        entry = SampleEntry(raw.key, size, zlib.crc32(raw.image or b""), augmentations, shorts_follow=shorts_follow)
        return _ReadSample(entry, long, short), images


@dataclass(frozen=True)
class SidecarWriter:
    """What all sidecars of a cache share."""

    model: LongCLIP
    settings: CacheSettings
    index: ShardIndex
    folder: Path
    batch_size: int
    num_workers: int

    def write(
        self, shards: Iterable[tuple[int, ShardIdentity]], progress: Callable[[int], None] = lambda num_samples: None
    ) -> Iterator[SidecarRecord]:
        """Write the sidecars of `shards`, given by their place in the index. Yield each record once it is on disk.

        The next shard is asked for when its first samples are to be read, which workers do ahead of the encoding.
        `progress` counts samples as they are encoded. Raise InputError for an unreadable shard.
        """
        identities: dict[int, ShardIdentity] = {}
        step = max(1, self.batch_size // self.settings.num_stored_views)

        def pieces() -> Iterator[_Rows]:
            for shard, identity in shards:
                identities[shard] = identity
                for start in range(0, identity.num_samples, step):
                    yield _Rows(shard, start, min(start + step, identity.num_samples))

        samples: list[_ReadSample] = []
        features: list[Tensor] = []
        for piece in DataLoader(
            _Pieces(self.index, self.settings),
            sampler=pieces(),
            batch_size=None,
            collate_fn=share_tensors,
            pin_memory=model_device(self.model).type == "cuda",
            **worker_options(self.num_workers),
        ):
            if isinstance(piece, InputError):
                raise InputError(str(piece))
            samples += piece.samples
            features += self._encode_images(piece.images)
            progress(len(piece.samples))
            if piece.is_last:
                yield self._finish(identities.pop(piece.shard), self.index.path(piece.shard), samples, features)
                samples, features = [], []

    def _finish(
        self, identity: ShardIdentity, shard: Path, samples: list[_ReadSample], features: list[Tensor]
    ) -> SidecarRecord:
        settings = self.settings
        is_valid = np.array([bool(sample.entry.augmentations) for sample in samples])
        image_features = np.zeros((len(samples), settings.num_stored_views, settings.embed_dim), np.float16)
        if features:
            encoded = self._checked(torch.cat(features), shard)
            image_features[is_valid] = encoded.reshape(-1, *image_features.shape[1:])
        captions: dict[str, int] = {}  # caption to row
        entries = [
            replace(
                sample.entry,
                long=[captions.setdefault(caption, len(captions)) for caption in sample.long],
                short=[captions.setdefault(caption, len(captions)) for caption in sample.short],
                sentences=[
                    [captions.setdefault(sentence, len(captions)) for sentence in sentences]
                    for sentences in stored_sentences(sample.long, settings)
                ],
            )
            for sample in samples
        ]
        rows = self._encode_captions(list(captions), shard)
        path = sidecar_path(self.folder, shard)
        write_sidecar(path, entries, settings.augment.rand_augment_ops, image_features, rows)
        known = identity if identity.shard_sha256 else replace(identity, shard_sha256=file_sha256(shard))
        record = SidecarRecord(
            **vars(known),
            num_bytes=path.stat().st_size,
            sha256=file_sha256(path),
            num_unreadable=int((~is_valid).sum()),
            num_captions=sum(len(entry.long) + len(entry.short) + sum(map(len, entry.sentences)) for entry in entries),
            num_distinct_captions=len(captions),
        )
        write_record(self.folder, record)
        return record

    def _encode_images(self, images: Tensor) -> list[Tensor]:
        """Return unit-norm float16 features on the model's device. Nothing waits for them until the shard is
        finished."""
        device = model_device(self.model)
        mean, std = (torch.tensor(value, device=device) for value in (self.settings.mean, self.settings.std))
        features = []
        with evaluation_mode(self.model, self.settings.precision):
            for batch in images.split(self.batch_size):
                pixels = normalized(batch.to(device, non_blocking=True), mean, std)
                features.append(unit_features(self.model.encode_image(pixels)).half())
        return features if len(images) else []

    def _encode_captions(self, captions: list[str], shard: Path) -> CaptionRows:
        tokens = self.model.tokenizer(captions)  # [U, L]
        lengths = caption_lengths(tokens) if captions else torch.zeros(0, dtype=torch.long)
        features = np.zeros((len(captions), self.settings.embed_dim), np.float16)
        order = lengths.argsort(descending=True, stable=True)
        parts = []
        with evaluation_mode(self.model, self.settings.precision):
            while len(order):
                longest = int(lengths[order[0]])
                size = max(8, self.batch_size * _TOKENS_PER_ROW // longest)
                rows, order = order[:size], order[size:]
                batch = tokens[rows, :longest].to(model_device(self.model))
                parts.append((rows, unit_features(self.model.encode_text(batch)).half()))
        for rows, part in parts:
            features[rows.numpy()] = self._checked(part, shard)
        own = [row[:length].astype(np.uint16) for row, length in zip(tokens.numpy(), lengths.tolist(), strict=True)]
        return CaptionRows(features, own)

    def _checked(self, features: Tensor, shard: Path) -> np.ndarray:
        array = features.cpu().numpy()
        if not np.isfinite(array).all():
            raise InputError(f"{shard}: the teacher's features are not finite: use --precision fp32 or bf16")
        return array
