"""Remote shards with a manifest: the same index, order and resumption as on a disk, through a cache on this node."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import urllib.parse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from longclip_teacher.errors import InputError
from training.data.byte_index import BAD_INDEX, INDEX_SUFFIX, ByteIndex
from training.data.http_answer import Patience
from training.data.index import ShardIndex, Stage
from training.data.remote_files import OBJECT_STORES, RemoteFile, file_name, parsed_remote, plain_url
from training.data.shard_cache import ShardCache
from training.data.shard_records import MANIFEST_NAME, SHARD_ROW, index_of, manifest_records, sha256_of

__all__ = ["GIGABYTE", "RemoteShardIndex", "RemoteShards", "default_cache_folder", "remote_shards"]

_LOGGER = logging.getLogger(__name__)
_MAX_MANIFEST_BYTES = 4 << 30
GIGABYTE = 10**9


@dataclass(frozen=True)
class RemoteShards:
    """Remote shards as the manifests beside them describe them."""

    urls: list[str]
    table: np.ndarray
    """Their rows (`SHARD_ROW`)."""
    manifests: dict[str, RemoteFile]
    """The manifests of version 1, which hold the indexes of their shards, by URL."""


class RemoteShardIndex(ShardIndex):
    """The samples of remote shards. Whole shards are fetched into a cache, those of the next window ahead of time."""

    def __init__(self, shards: RemoteShards, cache: ShardCache, shuffle_shards: int, stage: Stage = "both") -> None:
        """`shards` is what `remote_shards` returns. A window holds `shuffle_shards` of them."""
        self._remote = shards
        self._beside: list[RemoteFile] = []
        self._expected: tuple[Sequence[int], Sequence[int]] = ((), ())
        self.cache, self.shuffle_shards = cache, shuffle_shards
        self._fill([plain_url(url) for url in shards.urls], shards.table, stage)

    def file_status(self, shard: int) -> tuple[int, int]:
        """See `ShardIndex.file_status`. When a remote shard was changed is not known."""
        return int(self._shards[shard]["num_bytes"]), 0

    def add_beside(self, files: Sequence[RemoteFile]) -> None:
        """Let each shard be fetched with another file, in shard order."""
        self._beside = list(files)

    def beside(self, shard: int) -> RemoteFile:
        """Return the file that is fetched with a shard."""
        return self._beside[shard]

    def check_room(self) -> None:
        """Raise InputError if the cache cannot hold two windows: one to read and one to fetch."""
        sizes = self._shards["num_bytes"] + np.where(self._shards["index_offset"] < 0, self._shards["index_bytes"], 0)
        if self._beside:
            sizes = sizes + [file.num_bytes for file in self._beside]
        needed = int(np.sort(sizes)[-2 * self.shuffle_shards :].sum())
        needed += sum(manifest.num_bytes for manifest in self._remote.manifests.values())
        if needed > self.cache.most_bytes:
            raise InputError(
                f"--data.cache_gb {self.cache.most_bytes / GIGABYTE:g} is too little: two windows of "
                f"{self.shuffle_shards} shards (--data.shuffle_shards) take {needed / GIGABYTE:.3g} GB"
            )
        _LOGGER.info(
            "%d samples in %d remote shards, in exact order, %d shards at a time; fetched into %s, at most %g GB",
            self.num_samples,
            len(self.names),
            self.shuffle_shards,
            self.cache.folder,
            self.cache.most_bytes / GIGABYTE,
        )

    def expect(self, now: Sequence[int], then: Sequence[int]) -> None:
        """Say which shards are read now, and which after them."""
        if (now, then) != self._expected:
            self._expected = now, then
            self.cache.expect(self._files_of(now), self._files_of(then))

    def _files_of(self, shards: Sequence[int]) -> list[RemoteFile]:
        """Return what is fetched for these shards, the indexes first: nothing can be read without them."""
        indexes = dict.fromkeys(self._index_file(shard)[0] for shard in shards)
        pairs = ((self._shard(shard), *self._beside[shard : shard + 1]) for shard in shards)
        return [*indexes, *chain.from_iterable(pairs)]

    def _shard(self, shard: int) -> RemoteFile:
        return RemoteFile(self._remote.urls[shard], int(self._shards[shard]["num_bytes"]), self.sha256(shard))

    def _index_file(self, shard: int) -> tuple[RemoteFile, int]:
        """Return the file that holds a shard's index, and where in it."""
        url, row = self._remote.urls[shard], self._shards[shard]
        if row["index_offset"] >= 0:
            return self._remote.manifests[_manifest_of(url)], int(row["index_offset"])
        return RemoteFile(f"{_path_of(url)}{INDEX_SUFFIX}", int(row["index_bytes"]), sha256_of(row["index_sha256"])), 0

    def _read_index(self, shard: int) -> ByteIndex:
        file, offset = self._index_file(shard)
        row = self._shards[shard]
        try:
            return index_of(row, self.cache.read(file, offset, int(row["index_bytes"])))
        except InputError:
            raise
        except BAD_INDEX as error:
            raise InputError(
                f"{self.names[shard]}: its index in {file} cannot be read ({error}): write the manifest again with "
                "make_shards.py index, and upload it with the indexes"
            ) from None

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        return self.cache.read(self._shard(shard), offset, size)


def remote_shards(urls: Sequence[str], patience: Patience | None = None) -> RemoteShards:
    """Return what the manifests beside remote shards say of them.

    Raise MissingFile if a folder has no manifest, and InputError for a manifest that is damaged or does not list one of
    the shards with its sha256.
    """
    found = RemoteShards(list(urls), np.zeros(len(urls), SHARD_ROW), {})
    if len(set(map(plain_url, urls))) < len(urls):
        raise InputError(f"two of the {len(urls)} remote shards have the same URL but for login and query")
    folders = defaultdict[str, list[int]](list)
    for place, url in enumerate(urls):
        folders[_manifest_of(url)].append(place)
    for manifest, places in folders.items():
        parsed_remote(manifest, _MAX_MANIFEST_BYTES, partial(_fill, found, places, manifest), patience)
    table = found.table
    for place in np.flatnonzero(~table["layout"].any(axis=1)).tolist():
        manifest, name = plain_url(_manifest_of(urls[place])), file_name(urls[place])
        raise InputError(f"{manifest} does not list {name}: upload its newest version, or leave it out")
    is_bad = ~table["sha256"].any(axis=1) | (table["num_samples"] < 1) | (table["num_bytes"] < 1)
    for place in np.flatnonzero(is_bad).tolist():
        raise InputError(
            f"{plain_url(_manifest_of(urls[place]))} does not give the sha256 and the samples of "
            f"{file_name(urls[place])}: write it again with make_shards.py index"
        )
    return found


def _fill(found: RemoteShards, places: Sequence[int], manifest: str, pieces: Iterable[bytes]) -> None:
    """Fill the rows at `places` from the content of their manifest, whose URL is `manifest`."""
    digest, num_bytes = hashlib.sha256(), 0

    def counted() -> Iterator[bytes]:
        nonlocal num_bytes
        for piece in pieces:
            digest.update(piece)
            num_bytes += len(piece)
            yield piece

    found.table[places] = np.zeros((), SHARD_ROW)
    named = {file_name(found.urls[place]): place for place in places}
    unquoted = {urllib.parse.unquote(name): name for name in named if "%" in name}
    holds_indexes = False
    for record in manifest_records(counted(), plain_url(manifest)):
        place = named.get(record.name)
        if place is None and record.name in unquoted:  # a name that is listed as it is in the URL goes before
            place = named[unquoted[record.name]]
            place = None if found.table[place]["layout"].any() else place
        if place is not None:
            found.table[place] = record.row
            holds_indexes |= record.index_offset >= 0
    if holds_indexes:
        found.manifests[manifest] = RemoteFile(manifest, num_bytes, digest.hexdigest())


def default_cache_folder() -> Path:
    """Return the folder of the cache in the user's folder of caches."""
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "compact-longclip" / "shards"


def _manifest_of(url: str) -> str:
    return f"{_path_of(url).rpartition('/')[0]}/{MANIFEST_NAME}"


def _path_of(url: str) -> str:
    """Return a URL without query and fragment. A login stays."""
    return url if url.startswith(OBJECT_STORES) else re.split("[?#]", url, maxsplit=1)[0]
