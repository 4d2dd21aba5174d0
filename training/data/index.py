"""Where each sample is: shard patterns, the index of all samples, and reads by byte offset.

A shard is a plain webdataset tar: `KEY.jpg` (or another picture suffix) with `KEY.json`, `KEY.txt` or both.
DataCompDR's shards also have `EXTRA_MEMBERS`. The shards' records (shard_records.py) say where each member lies, so any
sample is one `pread` away, which makes an exact, resumable order possible. Tars are read, never extracted; nothing in
them is executed or unpickled.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from rich.progress import track

from eval.base.folders import literal_start, matching_paths
from longclip_teacher.errors import InputError
from training.data.brace_patterns import expand_braces
from training.data.shard_records import ShardRecord, contents_of, local_record, read_manifest

__all__ = [
    "MAX_EXTRA_BYTES",
    "MAX_TRAINING_PIXELS",
    "OpenFiles",
    "RawSample",
    "ShardFiles",
    "ShardIndex",
    "Stage",
    "check_url",
    "expand_patterns",
    "is_remote",
]

MAX_IMAGE_BYTES = 64 << 20
MAX_TRAINING_PIXELS = 40_000_000
"""Pictures of more pixels are refused: decoded, they take 120 MB in each worker, and no view needs so many."""
MAX_TEXT_BYTES = 4 << 20
MAX_EXTRA_BYTES = 4 << 20
_MAX_OPEN_FILES = 128
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:")
_ALLOWED_URL = re.compile(r"(https://|s3://|gs://|http://(localhost|127\.0\.0\.1)(:\d+)?/)")

Stage: TypeAlias = Literal["both", "image", "text"]
"""Which members of a sample are read: picture and captions, only the picture, or only the captions."""


@dataclass(frozen=True)
class RawSample:
    """The undecoded members of one sample. A member that is absent or over its size bound is None."""

    key: str
    image: bytes | None
    json: bytes | None
    txt: bytes | None
    extra: dict[str, bytes] = field(default_factory=dict)
    """The sample's `EXTRA_MEMBERS` by suffix, without those that are absent or over their bound."""


def is_remote(shard: str) -> bool:
    """Return whether `shard` is a URL rather than a local path."""
    return _SCHEME.match(shard) is not None


def expand_patterns(shards: str | Path | Sequence[str | Path]) -> list[str]:
    """Return shard paths or URLs from one pattern or a list: braces, globs, or a folder of tars; sorted within a
    pattern. Existing paths are taken literally.

    Raise InputError for a pattern without a match and for a URL that `check_url` refuses.
    """
    patterns = [shards] if isinstance(shards, (str, Path)) else list(shards)
    found: list[str] = []
    for pattern in map(str, patterns):
        folder, rest = literal_start(pattern)
        rest = pattern if folder == Path() else rest  # a URL keeps its slashes
        for part in expand_braces(rest):  # checked after expansion: braces could hide a scheme
            if folder == Path() and is_remote(part):
                check_url(part, "shards")
                found.append(part)
            else:
                found += _local_matches(folder / part)
    if not found:
        raise InputError("no shards given: pass a pattern such as 'data/train/*.tar'")
    if len({is_remote(shard) for shard in found}) > 1:
        raise InputError("shards are partly local, partly remote: pass one kind")
    return list(dict.fromkeys(found))


def check_url(url: str, what: str) -> None:
    """Raise InputError for every URL scheme but https, s3 and gs (http only on loopback). The message names `what`."""
    if not _ALLOWED_URL.match(url) or "::" in url:
        raise InputError(
            f"{what} {url!r}: only local paths, https://, s3:// and gs:// are read (http:// only on localhost)"
        )


def _local_matches(pattern: Path) -> list[str]:
    matches = [str(path) for path in matching_paths(pattern / "*.tar" if pattern.is_dir() else pattern)]
    if not matches:
        raise InputError(f"no shard matches {str(pattern)!r} (looked in {Path.cwd()})")
    return matches


class ShardFiles(Protocol):
    """Files by number, read by offset. Picklable."""

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` of file `number`. Raise InputError naming a file that is missing or too
        short."""
        ...


class OpenFiles:
    """Read by offset from many files, and keep the last used ones open.

    Picklable and safe in several processes: each process opens its own files, and `pread` shares no position.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._files: OrderedDict[int, int] = OrderedDict()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """See `ShardFiles.read`."""
        path = self._paths[number]
        if number not in self._files:
            while len(self._files) >= _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            try:
                self._files[number] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise InputError(f"can no longer read {path}: {error.strerror}") from None
        self._files.move_to_end(number)
        data = os.pread(self._files[number], size, offset)
        if len(data) != size:
            raise InputError(f"{path} has become shorter than its index says: make or fetch it again")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}


class ShardIndex:
    """The samples of a list of local shards, numbered 0 .. num_samples - 1 in shard order. Picklable."""

    def __init__(self, paths: Sequence[str | Path], show_progress: bool = False, stage: Stage = "both") -> None:
        """Read the manifests, and scan shards that have none. `stage` decides which members `read` reads.

        Raise InputError for a broken shard or one that differs from its manifest.
        """
        self.paths = [Path(path) for path in paths]
        manifests = {folder: read_manifest(folder) for folder in {path.parent for path in self.paths}}
        steps = track(self.paths, description="indexing shards", disable=not show_progress, transient=True)
        records = [local_record(manifests[path.parent].get(path.name), path) for path in steps]
        self._fill([str(path) for path in self.paths], records, OpenFiles(self.paths), stage)

    def _fill(self, names: Sequence[str], records: Sequence[ShardRecord], files: ShardFiles, stage: Stage) -> None:
        """Take the records of shards, which `files` reads by their place. Messages call the shards by `names`."""
        self.names = list(names)
        self.shard_sizes = np.array([len(record.keys) for record in records])
        self.shard_bytes = [record.num_bytes for record in records]
        self.shard_sha256 = [record.sha256 for record in records]  # "" if no manifest gives it
        self.contents = {name: contents_of(record) for name, record in zip(names, records, strict=True)}
        self._starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._records = list(records)
        self._files = files
        self._stage = stage

    def file_status(self, shard: int) -> tuple[int, int]:
        """Return the bytes of a shard's file, and when it was last changed (ctime in ns; 0 if that is not known)."""
        status = self.paths[shard].stat()
        return status.st_size, status.st_ctime_ns

    @property
    def num_samples(self) -> int:
        """The number of samples in all shards."""
        return int(self._starts[-1])

    def keys(self, shard: int) -> list[str]:
        """Return the keys of a shard's samples."""
        record = self._records[shard]
        return [record.key(row) for row in range(len(record.keys))]

    def key(self, index: int) -> str:
        """Return the key of sample `index`: the name of its members without the suffix."""
        shard, row = self.locate(index)
        return self._records[shard].key(row)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the shard of sample `index`, as its place in `names`, and the sample's row in that shard."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, int(index - self._starts[shard])

    def read(self, index: int) -> RawSample:
        """Read the members of sample `index` that the stage needs, undecoded. The others are None, as if absent.

        Raise InputError naming a shard that has shrunk since.
        """
        shard, row = self.locate(index)
        record = self._records[shard]
        image_bound = 0 if self._stage == "text" else MAX_IMAGE_BYTES
        text_bound = 0 if self._stage == "image" else MAX_TEXT_BYTES
        image, captions, txt = (
            self._files.read(shard, int(offset), int(size)) if 0 < size <= bound else None
            for (offset, size), bound in zip(record.spans[row], (image_bound, text_bound, text_bound), strict=True)
        )
        extra = {
            name: self._files.read(shard, int(spans[row, 0]), int(spans[row, 1]))
            for name, spans in record.extra.items()
            if self._stage == "both" and 0 < spans[row, 1] <= MAX_EXTRA_BYTES
        }
        return RawSample(record.key(row), image, captions, txt, extra)
