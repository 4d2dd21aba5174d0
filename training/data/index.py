"""Where each sample is: shard patterns, the manifest beside the shards, and reads by byte offset.

A shard is a plain webdataset tar: `KEY.jpg` (or another picture suffix) with `KEY.json`, `KEY.txt` or both.
DataCompDR's shards also have `EXTRA_MEMBERS`. With the byte index of its members any sample is one `pread` away, which
makes an exact, resumable order possible. The index comes from `manifest.json` beside the shards, or from one scan of a
tar's headers, stored as `NAME.tar.index.json`. Tars are read, never extracted; nothing in them is executed or
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from rich.progress import track

from eval.base.folders import literal_start, matching_paths
from eval.base.images import IMAGE_SUFFIXES
from eval.base.tar_samples import TarMember, tar_samples
from longclip_teacher.atomic_files import write_text
from longclip_teacher.errors import InputError
from training.data.brace_patterns import expand_braces

__all__ = [
    "BAD_JSON",
    "EXTRA_MEMBERS",
    "MANIFEST_NAME",
    "MAX_EXTRA_BYTES",
    "MAX_TRAINING_PIXELS",
    "Contents",
    "OpenFiles",
    "RawSample",
    "ShardIndex",
    "ShardRecord",
    "Stage",
    "expand_patterns",
    "is_remote",
    "scan_tar",
]

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "compact-longclip shards"
MANIFEST_VERSION = 1
MAX_IMAGE_BYTES = 64 << 20
MAX_TRAINING_PIXELS = 40_000_000
"""Pictures of more pixels are refused: decoded, they take 120 MB in each worker, and no view needs so many."""
MAX_TEXT_BYTES = 4 << 20
MAX_EXTRA_BYTES = 4 << 20
EXTRA_MEMBERS = ("syn.json", "paug.json", "npz", "pth.gz")
"""Further members of a DataCompDR sample, read as bytes; see datacompdr.py."""
_MAX_OPEN_FILES = 128
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:")
_ALLOWED_URL = re.compile(r"(https://|s3://|http://(localhost|127\.0\.0\.1)(:\d+)?/)")
# errors from reading JSON of another shape than ours
BAD_JSON = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
_COLUMNS = ("image", "json", "txt")

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


@dataclass(frozen=True)
class ShardRecord:
    """One shard's entry in the manifest: its size, its hash ("" when only scanned) and its byte index."""

    name: str
    num_bytes: int
    sha256: str
    keys: np.ndarray  # bytes [N]
    spans: np.ndarray  # int64 [N, 3, 2]: offset and size of the image, json and txt member; size 0 if absent
    inputs: str = ""  # hash of what the shard was made from, by which an interrupted import knows what is done
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    """For each of `EXTRA_MEMBERS` that the shard has: int64 [N, 2], offset and size; size 0 if absent."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the manifest. A kind of member that no sample has is left out."""
        index: dict[str, Any] = {"key": [_text_of(key) for key in self.keys]}
        for column, name in enumerate(_COLUMNS):
            if self.spans[:, column, 1].any():
                index[name] = self.spans[:, column].tolist()
        index.update({name: spans.tolist() for name, spans in self.extra.items()})
        return {
            "name": self.name,
            "num_samples": len(self.keys),
            "bytes": self.num_bytes,
            "sha256": self.sha256,
            "inputs": self.inputs,
            "index": index,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ShardRecord:
        """Invert `to_json`. Raise ValueError, KeyError or TypeError for anything else."""
        index, num_bytes = data["index"], int(data["bytes"])
        keys = np.array([_key_of(key) for key in index["key"]], dtype=np.bytes_)
        spans = np.zeros((len(keys), len(_COLUMNS), 2), dtype=np.int64)
        for column, name in enumerate(_COLUMNS):
            if name in index:
                spans[:, column] = np.asarray(index[name], dtype=np.int64).reshape(len(keys), 2)
        extra = {
            name: np.asarray(index[name], dtype=np.int64).reshape(len(keys), 2)
            for name in EXTRA_MEMBERS
            if name in index
        }
        if len(keys) != data["num_samples"] or any(_is_outside(part, num_bytes) for part in (spans, *extra.values())):
            raise ValueError("an index that points outside its shard")
        return cls(str(data["name"]), num_bytes, str(data["sha256"]), keys, spans, str(data.get("inputs", "")), extra)


def _key_of(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # a name in a tar need not be UTF-8


def _text_of(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def _contents(record: ShardRecord) -> Contents:
    layout = hashlib.sha256(str(record.num_bytes).encode())
    for part in (record.keys, record.spans, *(record.extra[name] for name in sorted(record.extra))):
        layout.update(part.tobytes())
    return Contents(len(record.keys), layout.hexdigest(), record.sha256)


def _is_outside(spans: np.ndarray, num_bytes: int) -> bool:
    return bool((spans < 0).any() or (spans > num_bytes).any() or (spans.sum(axis=-1) > num_bytes).any())


def is_remote(shard: str) -> bool:
    """Return whether `shard` is a URL rather than a local path."""
    return _SCHEME.match(shard) is not None


def expand_patterns(shards: str | Path | Sequence[str | Path]) -> list[str]:
    """Return shard paths or URLs from one pattern or a list: braces, globs, or a folder of tars; sorted within a
    pattern. Existing paths are taken literally.

    Raise InputError for a pattern without a match and for every URL scheme but https and s3 (http only on loopback).
    """
    patterns = [shards] if isinstance(shards, (str, Path)) else list(shards)
    found: list[str] = []
    for pattern in map(str, patterns):
        folder, rest = literal_start(pattern)
        rest = pattern if folder == Path() else rest  # a URL keeps its slashes
        for part in expand_braces(rest):  # checked after expansion: braces could hide a scheme
            if folder == Path() and is_remote(part):
                if not _ALLOWED_URL.match(part) or "::" in part:
                    raise InputError(
                        f"shards {part!r}: only local paths, https:// and s3:// are read (http:// only on localhost)"
                    )
                found.append(part)
            else:
                found += _local_matches(folder / part)
    if not found:
        raise InputError("no shards given: pass a pattern such as 'data/train/*.tar'")
    if len({is_remote(shard) for shard in found}) > 1:
        raise InputError("shards are partly local, partly remote: pass one kind")
    return list(dict.fromkeys(found))


def _local_matches(pattern: Path) -> list[str]:
    matches = [str(path) for path in matching_paths(pattern / "*.tar" if pattern.is_dir() else pattern)]
    if not matches:
        raise InputError(f"no shard matches {str(pattern)!r} (looked in {Path.cwd()})")
    return matches


def scan_tar(path: Path) -> ShardRecord:
    """Index a tar from its headers alone. Raise InputError naming a tar that is broken, cut short or empty."""
    num_bytes = path.stat().st_size
    samples = list(tar_samples(path, lambda _: -1))
    if not samples:
        raise InputError(f"{path} is an empty shard: remove it or make it again")
    keys = np.array([_key_of(key) for key, _ in samples], dtype=np.bytes_)
    spans = np.array([_spans(members) for _, members in samples], dtype=np.int64)
    extra = {
        name: np.array([_span(members.get(name)) for _, members in samples], dtype=np.int64)
        for name in EXTRA_MEMBERS
        if any(name in members for _, members in samples)
    }
    return ShardRecord(path.name, num_bytes, "", keys, spans, extra=extra)


def _spans(members: dict[str, TarMember]) -> list[tuple[int, int]]:
    image = next((member for suffix, member in members.items() if f".{suffix}" in IMAGE_SUFFIXES), None)
    return [_span(member) for member in (image, members.get("json"), members.get("txt"))]


def _span(member: TarMember | None) -> tuple[int, int]:
    return (0, 0) if member is None else (member.offset, member.size)


class Contents(NamedTuple):
    """A description of a file or folder of samples that reveals changes without reading all samples."""

    num_samples: int
    layout: str
    """Hash of its index: sizes, offsets, names."""
    sha256: str = ""
    """sha256 of the complete file from its manifest, or "" if no manifest gives it."""


class OpenFiles:
    """Read by offset from many files, and keep the last used ones open.

    Picklable and safe in several processes: each process opens its own files, and `pread` shares no position.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
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
        self.paths = [Path(path) for path in paths]
        self._stage = stage
        manifests = {folder: read_manifest(folder) for folder in {path.parent for path in self.paths}}
        steps = track(self.paths, description="indexing shards", disable=not show_progress, transient=True)
        records = [_checked(manifests[path.parent].get(path.name), path) or _cached_scan(path) for path in steps]
        self.shard_sizes = np.array([len(record.keys) for record in records])
        self.shard_sha256 = [record.sha256 for record in records]  # "" if no manifest gives it
        self.contents = {str(path): _contents(record) for path, record in zip(self.paths, records, strict=True)}
        self._starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._keys = np.concatenate([record.keys for record in records])
        self._spans = np.concatenate([record.spans for record in records])  # [N, 3, 2]
        self._extra = {  # [N, 2] each; absent in ordinary shards
            name: np.concatenate(
                [record.extra.get(name, np.zeros((len(record.keys), 2), dtype=np.int64)) for record in records]
            )
            for name in EXTRA_MEMBERS
            if any(name in record.extra for record in records)
        }
        self._files = OpenFiles(self.paths)

    @property
    def num_samples(self) -> int:
        """The number of samples in all shards."""
        return len(self._keys)

    def key(self, index: int) -> str:
        """Return the key of sample `index`: the name of its members without the suffix."""
        return _text_of(bytes(self._keys[index]))

    def locate(self, index: int) -> tuple[int, int]:
        """Return the shard of sample `index`, as its place in `paths`, and the sample's row in that shard."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, int(index - self._starts[shard])

    def read(self, index: int) -> RawSample:
        """Read the members of sample `index` that the stage needs, undecoded. The others are None, as if absent.

        Raise InputError naming a shard that has shrunk since.
        """
        shard, _ = self.locate(index)
        image_bound = 0 if self._stage == "text" else MAX_IMAGE_BYTES
        text_bound = 0 if self._stage == "image" else MAX_TEXT_BYTES
        image, captions, txt = (
            self._files.read(shard, int(offset), int(size)) if 0 < size <= bound else None
            for (offset, size), bound in zip(self._spans[index], (image_bound, text_bound, text_bound), strict=True)
        )
        extra = {
            name: self._files.read(shard, int(spans[index, 0]), int(spans[index, 1]))
            for name, spans in self._extra.items()
            if self._stage == "both" and 0 < spans[index, 1] <= MAX_EXTRA_BYTES
        }
        return RawSample(self.key(index), image, captions, txt, extra)


def read_manifest(folder: Path) -> dict[str, ShardRecord]:
    """Return the records of `folder`'s manifest by shard name; empty if there is none. Raise InputError if it is
    damaged."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_bytes())
        if (manifest["format"], manifest["version"]) != (MANIFEST_FORMAT, MANIFEST_VERSION):
            raise ValueError("another format or version")
        records = [ShardRecord.from_json(entry) for entry in manifest["shards"]]
    except BAD_JSON as error:
        raise InputError(
            f"{path} is not a valid shard manifest ({error}): write it again with make_shards.py index"
        ) from None
    return {record.name: record for record in records}


def _checked(record: ShardRecord | None, path: Path) -> ShardRecord | None:
    """Return `record` if the shard still has its recorded size."""
    if record is None:
        return None
    num_bytes = path.stat().st_size
    if num_bytes != record.num_bytes:
        raise InputError(
            f"{path} has {num_bytes} bytes, but its manifest says {record.num_bytes}: make or fetch it again"
        )
    if not len(record.keys):
        raise InputError(f"{path} is an empty shard: remove it or make it again")
    return record


def _cached_scan(path: Path) -> ShardRecord:
    """Return `scan_tar`'s record, stored beside the tar if possible. It is valid while the tar's size and time stay."""
    cache = path.with_name(path.name + ".index.json")
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    try:
        data = json.loads(cache.read_bytes())
        if data["stamp"] == stamp and data["version"] == MANIFEST_VERSION:
            return ShardRecord.from_json(data["shard"])
    except (OSError, *BAD_JSON):
        pass  # absent, foreign or damaged: the tar itself decides
    record = scan_tar(path)
    with suppress(InputError):  # a read-only folder: scan again next time
        write_text(cache, json.dumps({"version": MANIFEST_VERSION, "stamp": stamp, "shard": record.to_json()}))
    return record
