"""Remote shards with a manifest: the same index, order and resumption as on a disk, through a cache on this node."""

from __future__ import annotations

import logging
import os
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from longclip_teacher.errors import InputError
from training.data.http_answer import Patience
from training.data.index import ShardIndex, Stage
from training.data.remote_files import OBJECT_STORES, RemoteFile, file_name, parsed_remote, plain_url
from training.data.shard_cache import CachedFiles, ShardCache
from training.data.shard_records import MANIFEST_NAME, ShardRecord, parse_manifest

__all__ = ["GIGABYTE", "RemoteShardIndex", "default_cache_folder", "remote_records"]

_LOGGER = logging.getLogger(__name__)
_MAX_MANIFEST_BYTES = 4 << 30
_SHA256 = re.compile("[0-9a-f]{64}")
GIGABYTE = 10**9


class RemoteShardIndex(ShardIndex):
    """The samples of remote shards. Whole shards are fetched into a cache, those of the next window ahead of time."""

    def __init__(
        self,
        urls: Sequence[str],
        records: Sequence[ShardRecord],
        cache: ShardCache,
        shuffle_shards: int,
        stage: Stage = "both",
    ) -> None:
        """`records` are those of the shards at `urls` (`remote_records`). A window holds `shuffle_shards` of them."""
        self._shards = [RemoteFile(url, one.num_bytes, one.sha256) for url, one in zip(urls, records, strict=True)]
        self._beside: list[RemoteFile] = []
        self._expected: tuple[Sequence[int], Sequence[int]] = ((), ())
        self.cache, self.shuffle_shards = cache, shuffle_shards
        self.paths = []
        self._fill([plain_url(url) for url in urls], records, CachedFiles(self._shards, cache), stage)
        if len(self.contents) < len(self.names):
            raise InputError(f"two of the {len(urls)} remote shards have the same URL but for login and query")

    def file_status(self, shard: int) -> tuple[int, int]:
        """See `ShardIndex.file_status`. When a remote shard was changed is not known."""
        return self.shard_bytes[shard], 0

    def add_beside(self, files: Sequence[RemoteFile]) -> None:
        """Let each shard be fetched with another file, in shard order."""
        self._beside = list(files)

    def beside(self, shard: int) -> RemoteFile:
        """Return the file that is fetched with a shard."""
        return self._beside[shard]

    def check_room(self) -> None:
        """Raise InputError if the cache cannot hold two windows: one to read and one to fetch."""
        sizes = [sum(file.num_bytes for file in self._files_of([shard])) for shard in range(len(self._shards))]
        needed = sum(sorted(sizes, reverse=True)[: 2 * self.shuffle_shards])
        if needed > self.cache.most_bytes:
            raise InputError(
                f"--data.cache_gb {self.cache.most_bytes / GIGABYTE:g} is too little: two windows of "
                f"{self.shuffle_shards} shards (--data.shuffle_shards) take {needed / GIGABYTE:.3g} GB"
            )
        _LOGGER.info(
            "%d samples in %d remote shards, in exact order, %d shards at a time; fetched into %s, at most %g GB",
            self.num_samples,
            len(self._shards),
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
        return [file for shard in shards for file in (self._shards[shard], *self._beside[shard : shard + 1])]


def remote_records(urls: Sequence[str], patience: Patience | None = None) -> list[ShardRecord]:
    """Return the records of remote shards from the manifests beside them.

    Raise MissingFile if a folder has no manifest, and InputError for a manifest that is damaged or does not list one of
    the shards with its sha256.
    """
    manifests = {url: _manifest(url, patience) for url in dict.fromkeys(map(_manifest_of, urls))}
    found = []
    for url in urls:
        manifest, name = _manifest_of(url), file_name(url)
        record = manifests[manifest].get(name) or manifests[manifest].get(urllib.parse.unquote(name))
        if record is None:
            raise InputError(f"{plain_url(manifest)} does not list {name}: upload its newest version, or leave it out")
        if not _SHA256.fullmatch(record.sha256) or not len(record.keys) or record.num_bytes < 1:
            raise InputError(
                f"{plain_url(manifest)} does not give the sha256 and the samples of {name}: write it again with "
                "make_shards.py index"
            )
        found.append(record)
    return found


def default_cache_folder() -> Path:
    """Return the folder of the cache in the user's folder of caches."""
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "compact-longclip" / "shards"


def _manifest(url: str, patience: Patience | None) -> dict[str, ShardRecord]:
    return parsed_remote(url, _MAX_MANIFEST_BYTES, lambda content: parse_manifest(content, plain_url(url)), patience)


def _manifest_of(url: str) -> str:
    path = url if url.startswith(OBJECT_STORES) else re.split("[?#]", url, maxsplit=1)[0]
    return f"{path.rpartition('/')[0]}/{MANIFEST_NAME}"
