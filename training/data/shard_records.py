"""What is known of a shard without reading its samples: the manifest beside the shards, and the scan of a tar.

The manifest holds, for each shard, its size, its sha256 and the byte index of its samples. A tar without a manifest is
scanned once, and the result is stored beside it as `NAME.tar.index.json`. Both are untrusted: an index that points
outside its shard is refused.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.base.images import IMAGE_SUFFIXES
from eval.base.tar_samples import TarMember, tar_samples
from longclip_teacher.atomic_files import write_text
from longclip_teacher.errors import InputError

__all__ = [
    "BAD_JSON",
    "EXTRA_MEMBERS",
    "MANIFEST_FORMAT",
    "MANIFEST_NAME",
    "MANIFEST_VERSION",
    "Contents",
    "ShardRecord",
    "contents_of",
    "local_record",
    "parse_manifest",
    "read_manifest",
    "scan_tar",
]

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "compact-longclip shards"
MANIFEST_VERSION = 1
EXTRA_MEMBERS = ("syn.json", "paug.json", "npz", "pth.gz")
"""Further members of a DataCompDR sample, read as bytes; see datacompdr.py."""
# errors from reading JSON of another shape than ours
BAD_JSON = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
_COLUMNS = ("image", "json", "txt")


class Contents(NamedTuple):
    """A description of a file or folder of samples that reveals changes without reading all samples."""

    num_samples: int
    layout: str
    """Hash of its index: sizes, offsets, names."""
    sha256: str = ""
    """sha256 of the complete file from its manifest, or "" if no manifest gives it."""


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

    def key(self, row: int) -> str:
        """Return the key of sample `row`."""
        return _text_of(bytes(self.keys[row]))

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


def contents_of(record: ShardRecord) -> Contents:
    """Describe a shard by its record."""
    layout = hashlib.sha256(str(record.num_bytes).encode())
    for part in (record.keys, record.spans, *(record.extra[name] for name in sorted(record.extra))):
        layout.update(part.tobytes())
    return Contents(len(record.keys), layout.hexdigest(), record.sha256)


def _is_outside(spans: np.ndarray, num_bytes: int) -> bool:
    return bool((spans < 0).any() or (spans > num_bytes).any() or (spans.sum(axis=-1) > num_bytes).any())


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


def read_manifest(folder: Path) -> dict[str, ShardRecord]:
    """Return the records of `folder`'s manifest by shard name; empty if there is none. Raise InputError if it is
    damaged."""
    path = folder / MANIFEST_NAME
    return parse_manifest(path.read_bytes(), str(path)) if path.is_file() else {}


def parse_manifest(content: bytes, name: str) -> dict[str, ShardRecord]:
    """Return the records in the content of a manifest by shard name. Messages call the manifest `name`."""
    try:
        manifest = json.loads(content)
        if (manifest["format"], manifest["version"]) != (MANIFEST_FORMAT, MANIFEST_VERSION):
            raise ValueError("another format or version")
        records = [ShardRecord.from_json(entry) for entry in manifest["shards"]]
    except BAD_JSON as error:
        raise InputError(
            f"{name} is not a valid shard manifest ({error}): write it again with make_shards.py index"
        ) from None
    return {record.name: record for record in records}


def local_record(record: ShardRecord | None, path: Path) -> ShardRecord:
    """Return the record of the shard at `path`: that of its manifest if there is one, else that of a scan.

    Raise InputError for a shard that is broken, empty or of another size than its manifest says.
    """
    return _cached_scan(path) if record is None else _checked(record, path)


def _checked(record: ShardRecord, path: Path) -> ShardRecord:
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
