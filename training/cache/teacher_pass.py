"""The pass of the teacher over a list of shards, by any number of processes that share nothing but the cache's folder.

One shard gives one sidecar, whose bytes do not depend on the process that makes it. A process claims the sidecar that
it makes; a claim ends with its process, however that ends. What is done, missing or damaged follows from the folder
alone, and the process that completes it writes the manifest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeAlias

from longclip_teacher.ancestry import merged
from longclip_teacher.errors import InputError
from longclip_teacher.folder_lock import file_claim, remove_claims
from training.cache.freshness import is_stale
from training.cache.manifest import (
    CACHE_MANIFEST,
    CacheSettings,
    ShardIdentity,
    SidecarRecord,
    changes,
    has_all_records,
    read_cache,
    read_record,
    sidecar_path,
    teacher_hashes,
    write_cache_manifest,
    write_record,
)
from training.cache.writer import SidecarWriter
from training.settings.augment import AugmentConfig
from training.settings.captions import CaptionOptions

__all__ = ["Records", "begin_cache", "finish_cache", "fits", "make_sidecars"]

_MAY_DIFFER = ("teacher", "libraries", "ancestry")  # settings in which the sidecars of a cache may differ
Records: TypeAlias = Mapping[str, SidecarRecord]
"""Records by the name of their shard."""


def begin_cache(folder: Path, settings: CacheSettings) -> tuple[CacheSettings, Records]:
    """Return the settings of the cache in `folder` and the records in its manifest. If there is none, make it.

    Raise InputError if it has other settings than `settings`. Other versions of libraries are only warned of.
    """
    if not (folder / CACHE_MANIFEST).is_file():
        with file_claim(folder / CACHE_MANIFEST, wait=True):  # of processes with different options one is first
            if not (folder / CACHE_MANIFEST).is_file():
                write_cache_manifest(folder, settings)
    remove_claims(folder)
    before, records = read_cache(folder)
    _refuse_other_settings(folder, before, settings)
    ancestry = merged(before.ancestry, settings.ancestry)
    if ancestry != before.ancestry:
        with file_claim(folder / CACHE_MANIFEST, wait=True):
            before = replace(read_cache(folder)[0], ancestry=ancestry)
            write_cache_manifest(folder, before)
    return before, records


def _refuse_other_settings(folder: Path, before: CacheSettings, settings: CacheSettings) -> None:
    if before.teacher_sha256 in teacher_hashes(settings.teacher):
        settings = replace(settings, teacher_sha256=before.teacher_sha256)
    for item in fields(CacheSettings):
        old, new = getattr(before, item.name), getattr(settings, item.name)
        if old == new or item.name in _MAY_DIFFER:
            continue
        if isinstance(old, AugmentConfig | CaptionOptions):
            part = next(f.name for f in fields(old) if getattr(old, f.name) != getattr(new, f.name))
            raise _other(folder, f"{item.name}.{part}", getattr(old, part), getattr(new, part))
        raise _other(folder, item.name, old, new)
    if before.libraries != settings.libraries:
        other = [
            f"{name} {version}" for name, version in before.libraries.items() if settings.libraries[name] != version
        ]
        print(f"warning: the sidecars in {folder} were made with {', '.join(other)}", file=sys.stderr)


def _other(folder: Path, name: str, old: object, new: object) -> InputError:
    return InputError(
        f"{folder} holds a cache with other settings: {name} is {old} there and {new} now; "
        "give another --out, or the same options"
    )


def finish_cache(folder: Path, shards: Iterable[str]) -> None:
    """Write all records into the manifest if each of `shards` has one. Whichever process ends last, it is the same."""
    with file_claim(folder / CACHE_MANIFEST, wait=True):
        settings, records = read_cache(folder)
        if has_all_records(folder, shards, records):
            write_cache_manifest(folder, settings)


def fits(folder: Path, identity: ShardIdentity, record: SidecarRecord | None) -> bool:
    """Return whether a shard is the one that its record names, and has a sidecar of the size that the record names."""
    path = sidecar_path(folder, identity.shard)
    return (
        record is not None
        and not changes(record, identity)
        and path.is_file()
        and path.stat().st_size == record.num_bytes
    )


def make_sidecars(
    writer: SidecarWriter,
    shards: Iterable[tuple[int, ShardIdentity]],
    known: Records,
    progress: Callable[[int], None] = lambda num_samples: None,
) -> Iterator[SidecarRecord]:
    """Make the missing sidecars of `shards`, given by their place in the index, and yield the record of each.

    Shards that another process is making come last, and are waited for: all are done in the end, also if the other
    process dies. A shard whose file has another time than its record is read; if its contents are the same, the
    record gets the new time.

    known     the records in the cache's manifest
    progress  counts samples that were encoded or need not be

    Raise InputError for an unreadable shard, or if the folder cannot be written.
    """
    left = {identity.shard: (place, identity) for place, identity in shards}
    claims: dict[str, ExitStack] = {}

    def claimed(names: Iterable[str], *, wait: bool) -> Iterator[tuple[int, ShardIdentity]]:
        for name in names:
            place, identity = left[name]
            with ExitStack() as claim:
                if not claim.enter_context(file_claim(sidecar_path(writer.folder, name), wait=wait)):
                    continue
                if _is_done(writer, place, identity, read_record(writer.folder, name) or known.get(name)):
                    del left[name]
                    progress(identity.num_samples)
                    continue
                claims[name] = claim.pop_all()
            yield place, identity

    def made(names: Iterable[str], *, wait: bool) -> Iterator[SidecarRecord]:
        for record in writer.write(claimed(names, wait=wait), progress):
            claims.pop(record.shard).close()
            del left[record.shard]
            yield record

    try:
        yield from made(list(left), wait=False)
        for name in list(left):  # one at a time: who waits holds no claim that others may wait for
            yield from made([name], wait=True)
    finally:
        for claim in claims.values():
            claim.close()


def _is_done(writer: SidecarWriter, place: int, identity: ShardIdentity, record: SidecarRecord | None) -> bool:
    if record is None or not fits(writer.folder, identity, record):
        return False
    if record.shard_changed_ns == identity.shard_changed_ns:
        return True
    path = sidecar_path(writer.folder, record.shard)
    if is_stale(path, writer.index, place, writer.settings, is_upright=record.shard_changed_ns != 0):
        print(f"{record.shard} was changed since {path.name} was made: made again", file=sys.stderr)
        return False
    write_record(writer.folder, replace(record, shard_changed_ns=identity.shard_changed_ns))
    return True
