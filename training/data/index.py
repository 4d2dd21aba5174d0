"""Where each sample is: shard patterns, the index of all samples, and reads by byte offset.

A shard is a plain webdataset tar: `KEY.jpg` (or another picture suffix) with `KEY.json`, `KEY.txt` or both.
DataCompDR's shards also have `EXTRA_MEMBERS`. A shard's byte index (byte_index.py) says where each member lies, so any
sample is one `pread` away, which makes an exact, resumable order possible. A process holds the indexes of the shards
that it reads from, and of the others what shard_records.py keeps. Tars are read, never extracted; nothing in them is
executed or unpickled.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from eval.base.folders import literal_start, matching_paths
from longclip_teacher.errors import InputError
from training.data.brace_patterns import expand_braces
from training.data.byte_index import ByteIndex
from training.data.shard_records import Contents, local_shards, read_index, sha256_of

__all__ = [
    "MAX_EXTRA_BYTES",
    "MAX_TRAINING_PIXELS",
    "OpenFiles",
    "RawSample",
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
_MOST_OTHERS = 16  # indexes held besides those of a window, for who reads in another order
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


class OpenFiles:
    """Read by offset from many files, and keep the last used ones open.

    Picklable and safe in several processes: each process opens its own files, and `pread` shares no position.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = paths
        self._files: OrderedDict[int, int] = OrderedDict()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` of file `number`. Raise InputError naming a file that is missing or too
        short."""
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
        names = [str(path) for path in paths]
        shards, self._kept = local_shards(names, show_progress)
        self._files = OpenFiles(names)
        self._fill(names, shards, stage)

    def _fill(self, names: list[str], shards: np.ndarray, stage: Stage) -> None:
        """Take the rows (`SHARD_ROW`) of shards. Messages call the shards by `names`."""
        self.names = names
        self.shard_sizes = np.ascontiguousarray(shards["num_samples"])
        self._starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._shards = shards
        self._stage = stage
        self._window = dict[int, ByteIndex]()
        self._others = OrderedDict[int, ByteIndex]()

    def path(self, shard: int) -> Path:
        """Return where a local shard lies."""
        return Path(self.names[shard])

    def file_status(self, shard: int) -> tuple[int, int]:
        """Return the bytes of a shard's file, and when it was last changed (ctime in ns; 0 if that is not known)."""
        status = self.path(shard).stat()
        return status.st_size, status.st_ctime_ns

    def sha256(self, shard: int) -> str:
        """Return the sha256 of a shard's file; "" if no manifest gives it."""
        return sha256_of(self._shards[shard]["sha256"])

    @property
    def contents(self) -> dict[str, Contents]:
        """The description of each shard by name."""
        rows = zip(self.names, self._shards, strict=True)
        return {
            name: Contents(int(row["num_samples"]), sha256_of(row["layout"]), sha256_of(row["sha256"]))
            for name, row in rows
        }

    @property
    def num_samples(self) -> int:
        """The number of samples in all shards."""
        return int(self._starts[-1])

    def keys(self, shard: int) -> list[str]:
        """Return the keys of a shard's samples."""
        index = self._index(shard)
        return [index.key(row) for row in range(len(index))]

    def key(self, index: int) -> str:
        """Return the key of sample `index`: the name of its members without the suffix."""
        shard, row = self.locate(index)
        return self._index(shard).key(row)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the shard of sample `index`, as its place in `names`, and the sample's row in that shard."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, int(index - self._starts[shard])

    def hold(self, shards: Iterable[int]) -> None:
        """Read the byte indexes of these shards, and let go of those that were held before.

        Raise InputError naming a shard whose index is missing or damaged.
        """
        wanted = list(shards)
        self._window = {shard: self._window[shard] for shard in wanted if shard in self._window}
        for shard in wanted:
            if shard not in self._window:
                self._window[shard] = self._read_index(shard)

    def read(self, index: int) -> RawSample:
        """Read the members of sample `index` that the stage needs, undecoded. The others are None, as if absent.

        Raise InputError naming a shard that has shrunk since, or whose index is missing or damaged.
        """
        shard, row = self.locate(index)
        found = self._index(shard)
        members = {}
        for name, spans in found.spans.items():
            offset, size = spans[row].tolist()
            if 0 < size <= self._most_bytes(name):
                members[name] = self._read(shard, offset, size)
        image, captions, txt = (members.pop(name, None) for name in ("image", "json", "txt"))
        return RawSample(found.key(row), image, captions, txt, members)

    def _most_bytes(self, member: str) -> int:
        """Return the most bytes of a member that are read; 0 for one that the stage does not need."""
        if member == "image":
            return 0 if self._stage == "text" else MAX_IMAGE_BYTES
        if member in ("json", "txt"):
            return 0 if self._stage == "image" else MAX_TEXT_BYTES
        return MAX_EXTRA_BYTES if self._stage == "both" else 0

    def _index(self, shard: int) -> ByteIndex:
        if shard in self._window:
            return self._window[shard]
        if shard not in self._others:
            while len(self._others) >= _MOST_OTHERS:
                self._others.popitem(last=False)
            self._others[shard] = self._read_index(shard)
        self._others.move_to_end(shard)
        return self._others[shard]

    def _read_index(self, shard: int) -> ByteIndex:
        """Return the byte index of a shard from wherever it lies."""
        return self._kept.get(shard) or read_index(self.path(shard), self._shards[shard])

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` of a shard. Raise InputError if it is missing or too short."""
        return self._files.read(shard, offset, size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_window": {}, "_others": OrderedDict()}
