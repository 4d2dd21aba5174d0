"""What is known of shards without reading their samples: the manifest beside them, and the scan of a tar.

The manifest holds for each shard its counts, its sha256 and what its byte index is like (byte_index.py). A process
keeps that as one row of a table, 128 bytes, and reads an index when its shard's turn comes. In a manifest of version 1
the indexes are part of the JSON. A tar without a manifest is scanned once, and its index is stored beside it. All are
untrusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from longclip_teacher.atomic_files import atomic_file
from longclip_teacher.errors import InputError
from training.data.byte_index import BAD_INDEX, BAD_JSON, INDEX_SUFFIX, ByteIndex, read_head, scan_tar
from training.data.json_pieces import file_pieces, object_members

__all__ = [
    "MANIFEST_FORMAT",
    "MANIFEST_NAME",
    "MANIFEST_VERSION",
    "SHARD_ROW",
    "Contents",
    "ShardRecord",
    "index_file",
    "index_of",
    "kept_record",
    "local_shards",
    "manifest_records",
    "read_index",
    "read_manifest",
    "sha256_of",
    "write_index",
]

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "compact-longclip shards"
MANIFEST_VERSION = 2
_VERSIONS = (1, MANIFEST_VERSION)
_SHA256 = re.compile("[0-9a-f]{64}")
_IN_A_FILE = -1
SHARD_ROW = np.dtype(
    [
        ("num_samples", np.int64),
        ("num_bytes", np.int64),
        ("sha256", np.uint8, 32),  # zeros if not known
        ("layout", np.uint8, 32),
        ("index_bytes", np.int64),
        ("index_offset", np.int64),  # in a manifest of version 1; -1 if the index is a file
        ("index_sha256", np.uint8, 32),
    ]
)
"""What a process keeps of each shard."""


class Contents(NamedTuple):
    """A description of a file or folder of samples that reveals changes without reading all samples."""

    num_samples: int
    layout: str
    """Hash of its index: sizes, offsets, names."""
    sha256: str = ""
    """sha256 of the complete file from its manifest, or "" if no manifest gives it."""


@dataclass(frozen=True)
class ShardRecord:
    """One shard's entry in the manifest."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    """"" if it is not known."""
    layout: str
    """`ByteIndex.layout`."""
    index_bytes: int
    index_sha256: str
    """Of the index's file; "" if the index is part of the manifest."""
    inputs: str = ""
    """Hash of what the shard was made from, by which an interrupted import knows what is done."""
    index_offset: int = _IN_A_FILE
    """Where the index lies in a manifest of version 1."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the manifest."""
        data = {name: value for name, value in asdict(self).items() if name != "index_offset"}
        data["bytes"] = data.pop("num_bytes")
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any], offset: int = 0, num_bytes: int = 0) -> ShardRecord:
        """Read an entry of a manifest, whose JSON lies at `offset`. Raise ValueError, KeyError or TypeError for
        anything else."""
        counts = int(data["num_samples"]), int(data["bytes"])
        told = str(data["name"]), *counts, _sha256_in(data["sha256"])
        inputs = str(data.get("inputs", ""))
        if "index" in data:
            layout = ByteIndex.from_json(data).checked(*counts).layout(counts[1])
            return cls(*told, layout, num_bytes, "", inputs, offset)
        record = cls(*told, _sha256_in(data["layout"]), int(data["index_bytes"]), str(data["index_sha256"]), inputs)
        if not (record.layout and _sha256_in(record.index_sha256) and record.index_bytes > 0 <= min(counts)):
            raise ValueError("a shard whose index is not described")
        return record

    @property
    def row(self) -> tuple[Any, ...]:
        """The shard's row of `SHARD_ROW`."""
        hashes = (np.frombuffer(bytes.fromhex(text or "00" * 32), np.uint8)
                  for text in (self.sha256, self.layout, self.index_sha256))  # fmt: skip
        sha256, layout, index_sha256 = hashes
        return self.num_samples, self.num_bytes, sha256, layout, self.index_bytes, self.index_offset, index_sha256


def sha256_of(digest: np.ndarray) -> str:
    """Return a hash of a table's row as text; "" if it is not known."""
    return digest.tobytes().hex() if digest.any() else ""


def _sha256_in(value: Any) -> str:
    return value if isinstance(value, str) and _SHA256.fullmatch(value) else ""


# --- manifests --------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, ShardRecord]:
    """Return the records of `folder`'s manifest by shard name; empty if there is none. Raise InputError if it is
    damaged."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return {}
    return {record.name: record for record in manifest_records(file_pieces(path), str(path))}


def manifest_records(pieces: Iterable[bytes], name: str) -> Iterator[ShardRecord]:
    """Yield the records in the content of a manifest as it is read. Messages call the manifest `name`.

    Raise InputError if it is damaged, after the records before the damage.
    """
    told = set()
    try:
        for member in object_members(pieces, "shards"):
            if member.name == "shards":
                yield ShardRecord.from_json(member.value, member.offset, member.num_bytes)
            elif member.name in ("format", "version"):
                if member.value not in (MANIFEST_FORMAT, *_VERSIONS):
                    raise ValueError("another format or version")
                told.add(member.name)
        if len(told) < 2:
            raise ValueError("another format or version")
    except InputError:
        raise  # of whoever gives the pieces
    except (OSError, *BAD_JSON) as error:
        raise InputError(
            f"{name} is not a valid shard manifest ({error}): write it again with make_shards.py index"
        ) from None


# --- local shards -----------------------------------------------------------------------------------------------------


def local_shards(paths: Sequence[str], show_progress: bool) -> tuple[np.ndarray, dict[int, ByteIndex]]:
    """Return a table of shards, and the indexes that could not be stored, by place: those of tars without a manifest in
    a folder that cannot be written.

    Raise InputError for a shard that is broken, empty or not as its manifest says.
    """
    table, kept = np.zeros(len(paths), SHARD_ROW), dict[int, ByteIndex]()
    folders: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, shard in enumerate(paths):
        folder, name = os.path.split(shard)
        folders[folder][name].append(place)
    is_known = np.zeros(len(paths), dtype=bool)
    for folder, places in folders.items():
        if (manifest := Path(folder, MANIFEST_NAME)).is_file():
            for record in manifest_records(file_pieces(manifest), str(manifest)):
                for place in places.get(record.name, ()):
                    table[place], is_known[place] = record.row, True
    for place in track(range(len(paths)), "indexing shards", disable=not show_progress, transient=True):
        path = Path(paths[place])
        if is_known[place]:
            _check(path, table[place])
            continue
        record, found = _scanned(path)
        table[place] = record.row
        if found is not None:
            kept[place] = found
    return table, kept


def _check(path: Path, row: np.void) -> None:
    num_bytes = path.stat().st_size
    if num_bytes != row["num_bytes"]:
        raise InputError(
            f"{path} has {num_bytes} bytes, but its manifest says {row['num_bytes']}: make or fetch it again"
        )
    if not row["num_samples"]:
        raise InputError(f"{path} is an empty shard: remove it or make it again")
    file = index_file(path)
    if row["index_offset"] < 0 and not (file.is_file() and file.stat().st_size == row["index_bytes"]):
        raise InputError(
            f"{path}: its index {file.name} is missing or of another size than its manifest says: copy it beside the "
            "shard, or run make_shards.py index again"
        )


def _scanned(path: Path) -> tuple[ShardRecord, ByteIndex | None]:
    """Return the record of a tar without a manifest, and its index if it cannot be stored beside the tar. A stored one
    is valid while the tar's size and time stay."""
    status, file = path.stat(), index_file(path)
    scanned = status.st_size, status.st_mtime_ns
    if (head := read_head(file, scanned)) is not None:
        num_samples, layout = head
        return ShardRecord(path.name, num_samples, status.st_size, "", layout, file.stat().st_size, ""), None
    index = scan_tar(path)
    record = ShardRecord(path.name, len(index), status.st_size, "", index.layout(status.st_size), 0, "")
    try:
        num_bytes, _ = _write(file, index.to_bytes(status.st_size, scanned))
    except InputError:
        return record, index
    return replace(record, index_bytes=num_bytes), None


# --- indexes ----------------------------------------------------------------------------------------------------------


def index_of(row: np.void, content: bytes) -> ByteIndex:
    """Return the index of the shard that a row describes, from the bytes at its place. Raise one of BAD_INDEX if it is
    damaged or another one."""
    read = ByteIndex.from_json(json.loads(content)) if row["index_offset"] >= 0 else ByteIndex.from_bytes(content)
    num_bytes = int(row["num_bytes"])
    index = read.checked(int(row["num_samples"]), num_bytes)
    if index.layout(num_bytes) != sha256_of(row["layout"]):
        raise ValueError("it is not the one that was described")
    return index


def read_index(path: Path, row: np.void) -> ByteIndex:
    """Return the index of the local shard at `path`. Raise InputError in one line naming the shard."""
    offset = int(row["index_offset"])
    file = index_file(path) if offset < 0 else path.with_name(MANIFEST_NAME)
    try:
        with file.open("rb") as source:
            source.seek(max(0, offset))
            return index_of(row, source.read(int(row["index_bytes"])))
    except OSError as error:
        cause = error.strerror
    except BAD_INDEX as error:
        cause = str(error)
    raise InputError(f"{path}: its index in {file.name} cannot be read ({cause}): run make_shards.py index again")


def write_index(path: Path, index: ByteIndex, sha256: str, inputs: str = "") -> ShardRecord:
    """Write the index of the shard at `path` beside it. Return the shard's entry for the manifest."""
    num_bytes = path.stat().st_size
    written = _write(index_file(path), index.to_bytes(num_bytes))
    return ShardRecord(path.name, len(index), num_bytes, sha256, index.layout(num_bytes), *written, inputs)


def index_file(path: Path) -> Path:
    """Return where the index of the shard at `path` lies, unless it is in the manifest."""
    return path.with_name(path.name + INDEX_SUFFIX)


def kept_record(path: Path, record: ShardRecord) -> ShardRecord | None:
    """Return the entry of the shard at `path` in a new manifest, from its entry in an earlier one. None if the shard or
    its index is missing or of another size."""
    try:
        row = np.array([record.row], SHARD_ROW)[0]
        _check(path, row)
        if record.index_offset >= 0:
            return write_index(path, read_index(path, row), record.sha256, record.inputs)
    except (InputError, OSError):
        return None
    return record


def _write(file: Path, content: bytes) -> tuple[int, str]:
    """Write a file. Return its size and its sha256."""
    with atomic_file(file) as temporary:
        temporary.write_bytes(content)
    return len(content), hashlib.sha256(content).hexdigest()
