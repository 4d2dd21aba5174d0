"""Stored teacher features for training: the check that a cache fits a run, and the draws from it.

manifest.py describes the cache, sidecar.py the file beside a shard.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.base.processes import is_main_process
from eval.base.sentences import split_sentences
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer
from training.cache.freshness import has_caption, is_same_picture, may_be_mirrored, sample_captions
from training.cache.manifest import (
    CacheSettings,
    SidecarRecord,
    as_tuple,
    changes,
    decoder_name,
    library_versions,
    read_cache,
    read_record,
    refuse_same_names,
    remote_sidecar,
    shard_identities,
    sidecar_path,
    teacher_hashes,
    tokenizer_digest,
)
from training.cache.sidecar import Sidecar, StoredView
from training.data.index import RawSample, ShardIndex
from training.data.remote_index import RemoteShardIndex
from training.data.samples import BadSample
from training.data.store import (
    StoredDraw,
    TeacherInfo,
    choose_captions,
    choose_sentences,
    choose_variant,
    choose_view,
)
from training.settings.augment import AugmentConfig
from training.settings.captions import NO_SAMPLING, CaptionOptions

__all__ = ["TeacherCacheStore", "cached_teacher_info", "open_cache"]

_MAX_OPEN_SIDECARS = 128


def cached_teacher_info(folder: Path | str) -> TeacherInfo:
    """Return what the losses need to know about the cache's teacher. Raise InputError if there is no cache."""
    settings, _ = read_cache(folder)
    return _teacher_info(settings)


def _teacher_info(settings: CacheSettings) -> TeacherInfo:
    return TeacherInfo((settings.embed_dim,), settings.logit_scale, settings.context_length, settings.ancestry)


def open_cache(
    folder: Path | str,
    index: ShardIndex,
    augment: AugmentConfig,
    teacher_checkpoint: str | None,
    fast_decode: bool = True,
    captions: CaptionOptions | None = NO_SAMPLING,
    sub_captions: int = 0,
) -> TeacherCacheStore:
    """Open the cache in `folder` (a path, or `cache_place`'s URL for remote shards) for a run over the shards of
    `index`.

    augment             the run's; must equal the cache's, or have centre=True for a cache of centre views
    teacher_checkpoint  the run's teacher, whose weights must be the cache's; None accepts any cached teacher
    captions            the run's; must make the cache's short captions. None: the run does not read those
    sub_captions        how many single sentences of a long caption the run reads the features of

    Raise a one-line InputError, which names the field and both values, for a cache of another teacher, tokenizer,
    recipe or other shards. Only warn about other library versions or another decoder, which change pixels little.
    """
    settings, records = read_cache(folder)
    if teacher_checkpoint is not None:
        hashes = teacher_hashes(teacher_checkpoint)
        if settings.teacher_sha256 not in hashes:
            raise _misfit(folder, "teacher sha256", settings.teacher_sha256, hashes[0], f" ({teacher_checkpoint})")
    digest = tokenizer_digest(settings.context_length)
    if digest != settings.tokenizer:
        raise _misfit(folder, "tokenizer", settings.tokenizer, digest)
    _check_augment(folder, settings, augment)
    if captions is not None:
        _check_captions(folder, settings.captions, captions.of_short_texts)
    if sub_captions and not settings.sentences:
        raise InputError(
            f"teacher cache {folder} has no features of single sentences, which the losses of sub-captions read: "
            "make it with scripts/cache_teacher.py --sentences, in another folder"
        )
    found = _check_shards(folder, records, index)
    _warn_of_versions(folder, settings, fast_decode)
    if not isinstance(folder, Path):
        if not isinstance(index, RemoteShardIndex):
            raise InputError(f"--teacher.cache {folder} belongs to remote shards: copy it to the disk of these")
        index.add_beside([remote_sidecar(folder, record) for record in found])
    is_upright = [bool(record.shard_changed_ns) for record in found]
    return TeacherCacheStore(folder, settings, index, is_upright, sub_captions)


def _check_augment(folder: Path | str, settings: CacheSettings, augment: AugmentConfig) -> None:
    if settings.augment.centre and augment.centre:
        return  # the other fields have no effect then
    fields = sorted(dataclasses.fields(AugmentConfig), key=lambda field: field.name != "centre")
    for field in fields:
        cached, wanted = getattr(settings.augment, field.name), getattr(augment, field.name)
        if as_tuple(cached) != as_tuple(wanted):
            raise _misfit(folder, f"augment.{field.name}", cached, wanted)


def _check_captions(folder: Path | str, cached: CaptionOptions, wanted: CaptionOptions) -> None:
    for field in dataclasses.fields(CaptionOptions):
        there, here = getattr(cached, field.name), getattr(wanted, field.name)
        if there != here:
            raise _misfit(folder, f"captions.{field.name}", there, here)


def _check_shards(folder: Path | str, records: dict[str, SidecarRecord], index: ShardIndex) -> list[SidecarRecord]:
    """Return the record of each of the index's shards."""
    refuse_same_names(index.names)
    names = [Path(name).name for name in index.names]
    found = {name: records.get(name) or read_record(folder, name) for name in names}
    missing = [
        name
        for name, record in found.items()
        if record is None or (isinstance(folder, Path) and not sidecar_path(folder, record.shard).is_file())
    ]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(names)} shards have no sidecar, the first {missing[0]}: "
            "run scripts/cache_teacher.py again"
        )
    complete = [record for record in found.values() if record is not None]
    for identity, record in zip(shard_identities(index, found), complete, strict=True):
        for name, cached, value in changes(record, identity):
            raise _misfit(folder, f"{identity.shard}: {name}", cached, value)
        if not isinstance(folder, Path):
            continue  # it is compared with its record when it is fetched
        num_bytes = sidecar_path(folder, identity.shard).stat().st_size
        if num_bytes != record.num_bytes:
            raise InputError(
                f"{sidecar_path(folder, identity.shard)} is damaged ({num_bytes} bytes instead of {record.num_bytes}): "
                "delete it and run scripts/cache_teacher.py again"
            )
    return complete


def _warn_of_versions(folder: Path | str, settings: CacheSettings, fast_decode: bool) -> None:
    here = {"decoder": decoder_name(fast_decode), **library_versions()}
    there = {"decoder": settings.decoder, **settings.libraries}
    other = [f"{name} {there.get(name)} (here {value})" for name, value in here.items() if there.get(name) != value]
    if other and is_main_process():
        print(f"warning: the teacher cache {folder} was made with {', '.join(other)}", file=sys.stderr)


def _misfit(folder: Path | str, field: str, cached: object, wanted: object, note: str = "") -> InputError:
    return InputError(
        f"teacher cache {folder} does not fit: {field} is {cached} there and {wanted} here{note}; "
        "make the cache again, or give the run the cache's settings"
    )


class TeacherCacheStore:
    """Sidecars as a TeacherStore (store.py). Picklable; each process maps the files that it reads."""

    def __init__(
        self,
        folder: Path | str,
        settings: CacheSettings,
        index: ShardIndex,
        is_upright: Sequence[bool],
        sub_captions: int = 0,
    ) -> None:
        """`is_upright` says of each shard whether its pictures are known to have been stored upright. `sub_captions` is
        the number of sentences that a draw has the features of."""
        self.folder = folder
        self.settings = settings
        self.index = index
        self.teacher_info = _teacher_info(settings)
        self._is_upright = is_upright
        self._sub_captions = sub_captions
        # what is mapped takes room even if the cache has removed it
        self._most_open = index.shuffle_shards if isinstance(index, RemoteShardIndex) else _MAX_OPEN_SIDECARS
        self._tokenizer = CaptionTokenizer(settings.context_length)
        self._sidecars: OrderedDict[int, Sidecar] = OrderedDict()

    def draw(self, raw: RawSample, seed: int, key: tuple[int, ...]) -> StoredDraw:
        """See `TeacherStore.draw`. Features are float16; normalise them in float32 before use (sidecar.py)."""
        shard, row = self.index.locate(key[-1])
        sidecar = self._sidecar(shard)
        stored = sidecar.view(row, choose_view(sidecar.num_views, seed, key), raw.key)
        if not stored.is_valid:
            raise BadSample("no stored features: unreadable when the teacher cache was made")
        if not is_same_picture(stored, raw):
            raise self._stale(shard, f"the picture of {raw.key} is not the one that the teacher cache was made from")
        if not self._is_upright[shard] and may_be_mirrored(stored, raw):
            raise self._stale(shard, f"the teacher cache may hold the picture of {raw.key} before it is turned upright")
        chosen_long, chosen_short = choose_captions(
            len(stored.long), 0 if stored.shorts_follow else len(stored.short), seed, key
        )
        if stored.shorts_follow:
            num_variants = len(stored.short) // len(stored.long)
            chosen_short = chosen_long * num_variants + choose_variant(num_variants, seed, key)
        rows = int(stored.long[chosen_long]), int(stored.short[chosen_short])
        captions = self._captions(stored, raw, shard, row)
        texts = None if captions is None else (captions[0][chosen_long], captions[1][chosen_short])
        if texts is None or not self._has_captions(sidecar, rows, raw.key, texts):
            raise self._stale(shard, f"the captions of {raw.key} are not those that the teacher cache was made from")
        (long, long_tokens), (short, short_tokens) = (sidecar.caption(place, raw.key) for place in rows)
        draw = StoredDraw(
            stored.augmentation, long_tokens, short_tokens, stored.image, long, short, picture_size=stored.size
        )
        if not self._sub_captions:
            return draw
        sentences, places = split_sentences(texts[0]), stored.sentences[chosen_long].tolist()
        if len(sentences) == len(places):
            chosen = choose_sentences(len(sentences), self._sub_captions, seed, key)
            drawn, places = tuple(sentences[number] for number in chosen), [places[number] for number in chosen]
            if self._has_captions(sidecar, places, raw.key, drawn):
                sub = np.stack([sidecar.caption(place, raw.key)[0] for place in places])
                return dataclasses.replace(draw, sub=sub, sub_captions=drawn)
        raise self._stale(shard, f"the sentences of {raw.key} are not those of the teacher cache")

    def _has_captions(self, sidecar: Sidecar, rows: Sequence[int], key: str, texts: Sequence[str]) -> bool:
        return all(has_caption(sidecar, row, key, text, self._tokenizer) for row, text in zip(rows, texts, strict=True))

    def _captions(self, stored: StoredView, raw: RawSample, shard: int, row: int) -> tuple[list[str], list[str]] | None:
        """Return the long and the short captions of a sample now; None if they are more or fewer than are stored."""
        try:
            long, short, shorts_follow = sample_captions(raw, self.settings, Path(self.index.names[shard]).name, row)
        except BadSample:
            return None
        if (len(long), len(short), shorts_follow) != (len(stored.long), len(stored.short), stored.shorts_follow):
            return None
        return long, short

    def _stale(self, shard: int, what: str) -> InputError:
        name = self.index.names[shard]
        sidecar = sidecar_path(Path(), name).name
        return InputError(f"{name}: {what}: run scripts/cache_teacher.py again, which makes {sidecar} anew")

    def _sidecar(self, shard: int) -> Sidecar:
        if shard not in self._sidecars:
            while len(self._sidecars) >= self._most_open:
                self._sidecars.popitem(last=False)
            sidecar = self._open(shard)
            sizes = (sidecar.num_samples, sidecar.num_views, sidecar.embed_dim)
            wanted = (int(self.index.shard_sizes[shard]), self.settings.num_stored_views, self.settings.embed_dim)
            if sizes != wanted:
                raise InputError(
                    f"{sidecar.path} holds samples, views, width {sizes}, but its manifest says {wanted}: "
                    "delete it and run scripts/cache_teacher.py again"
                )
            self._sidecars[shard] = sidecar
        self._sidecars.move_to_end(shard)
        return self._sidecars[shard]

    def _open(self, shard: int) -> Sidecar:
        if isinstance(self.folder, Path):
            return Sidecar(sidecar_path(self.folder, self.index.names[shard]))
        assert isinstance(self.index, RemoteShardIndex)
        file = self.index.beside(shard)
        while True:
            path = self.index.cache.path(file)
            try:
                return Sidecar(path)
            except InputError:
                if path.is_file():  # else another process has made room just now
                    raise

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sidecars": OrderedDict()}
