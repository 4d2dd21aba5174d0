"""The byte index of a shard: where each member of each sample lies in the tar. It is read when its shard's turn comes.

It lies beside the shard as NAME.tar.index, a safetensors file; in manifests of version 1 it is a part of the JSON.
Both are untrusted: an index that points outside its shard, or is not the one that was described, is refused.

Shapes: N samples of a shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from eval.base.images import IMAGE_SUFFIXES
from eval.base.tar_samples import TarMember, tar_samples
from longclip_teacher.errors import InputError

__all__ = ["BAD_INDEX", "BAD_JSON", "EXTRA_MEMBERS", "INDEX_SUFFIX", "ByteIndex", "IndexHead", "read_head", "scan_tar"]

INDEX_SUFFIX = ".index"
"""What an index's file adds to the name of its shard."""
EXTRA_MEMBERS = ("syn.json", "paug.json", "npz", "pth.gz")
"""Further members of a DataCompDR sample, read as bytes; see datacompdr.py."""
BAD_JSON = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""Errors from reading JSON of another shape than ours."""
BAD_INDEX = (*BAD_JSON, SafetensorError)
_MEMBERS = ("image", "json", "txt")
_KEYS, _LAYOUT, _SCANNED = "key", "layout", "scanned"  # of the file, beside the kinds of members


@dataclass(frozen=True)
class ByteIndex:
    """The samples of one shard."""

    keys: np.ndarray
    """bytes [N]."""
    spans: dict[str, np.ndarray]
    """For each kind of member that the shard has (image, json, txt, `EXTRA_MEMBERS`) int64 [N, 2]: offset and size;
    size 0 if the sample has none."""

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        """Return the key of sample `row`."""
        return bytes(self.keys[row]).decode("utf-8", "surrogateescape")  # a name in a tar need not be UTF-8

    def layout(self, num_bytes: int) -> str:
        """Return a hash of the index and the size of its shard. Checkpoints hold it."""
        spans = np.zeros((len(self), len(_MEMBERS), 2), dtype=np.int64)
        for column, name in enumerate(_MEMBERS):
            if name in self.spans:
                spans[:, column] = self.spans[name]
        digest = hashlib.sha256(str(num_bytes).encode())
        for part in (self.keys, spans, *(self.spans[name] for name in sorted(self.spans) if name not in _MEMBERS)):
            digest.update(part.tobytes())
        return digest.hexdigest()

    def to_bytes(self, num_bytes: int, scanned: tuple[int, int] | None = None) -> bytes:
        """Return the content of the index's file. The same index gives the same bytes. `scanned` is the size and the
        time of the shard's file, if the index is no part of a data set with a manifest."""
        tensors = {_KEYS: self.keys.view(np.uint8).reshape(len(self), -1), **self.spans}
        if scanned is not None:
            tensors[_SCANNED] = np.array(scanned, dtype=np.int64)
            tensors[_LAYOUT] = np.frombuffer(bytes.fromhex(self.layout(num_bytes)), dtype=np.uint8)
        return save(tensors)

    @classmethod
    def from_bytes(cls, content: bytes) -> ByteIndex:
        """Invert `to_bytes`. Raise one of BAD_INDEX for anything else."""
        tensors = load(content)
        keys = np.ascontiguousarray(tensors[_KEYS])
        if keys.dtype != np.uint8:
            raise ValueError("keys of another type")
        return cls(keys.view(f"S{keys.shape[1]}")[:, 0], _known_spans(tensors, len(keys)))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ByteIndex:
        """Read the index in an entry of a manifest of version 1. Raise one of BAD_JSON for anything else."""
        index = data["index"]
        keys = np.array([_key_of(key) for key in index["key"]], dtype=np.bytes_)
        return cls(keys, _known_spans(index, len(keys)))

    def checked(self, num_samples: int, num_bytes: int) -> ByteIndex:
        """Return the index itself. Raise ValueError if it is not that of a shard of this size."""
        if len(self) != num_samples or any(_is_outside(spans, num_bytes) for spans in self.spans.values()):
            raise ValueError("an index that points outside its shard")
        return self


class IndexHead(NamedTuple):
    """What an index's file tells of a shard that was scanned, without its samples."""

    num_samples: int
    layout: str


def read_head(path: Path, scanned: tuple[int, int]) -> IndexHead | None:
    """Return the head of an index's file. None if it is not there, damaged, or not of a scan of this very shard."""
    try:
        with safe_open(path, framework="np") as file:
            if tuple(file.get_tensor(_SCANNED).tolist()) != scanned:
                return None
            return IndexHead(int(file.get_slice(_KEYS).get_shape()[0]), file.get_tensor(_LAYOUT).tobytes().hex())
    except (OSError, *BAD_INDEX):
        return None


def scan_tar(path: Path) -> ByteIndex:
    """Index a tar from its headers alone. Raise InputError naming a tar that is broken, cut short or empty."""
    samples = list(tar_samples(path, lambda _: -1))
    if not samples:
        raise InputError(f"{path} is an empty shard: remove it or make it again")
    keys = np.array([_key_of(key) for key, _ in samples], dtype=np.bytes_)
    spans = {
        name: np.array([_span(_member(members, name)) for _, members in samples], dtype=np.int64)
        for name in (*_MEMBERS, *EXTRA_MEMBERS)
    }
    # as in manifests of version 1, on which the layout in checkpoints rests
    return ByteIndex(keys, {name: found for name, found in spans.items() if found[:, name in _MEMBERS :].any()})


def _member(members: dict[str, TarMember], name: str) -> TarMember | None:
    if name != "image":
        return members.get(name)
    return next((member for suffix, member in members.items() if f".{suffix}" in IMAGE_SUFFIXES), None)


def _span(member: TarMember | None) -> tuple[int, int]:
    return (0, 0) if member is None else (member.offset, member.size)


def _key_of(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _known_spans(columns: Mapping[str, Any], num_samples: int) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(columns[name], dtype=np.int64).reshape(num_samples, 2)
        for name in (*_MEMBERS, *EXTRA_MEMBERS)
        if name in columns
    }


def _is_outside(spans: np.ndarray, num_bytes: int) -> bool:
    return bool((spans < 0).any() or (spans > num_bytes).any() or (spans.sum(axis=-1) > num_bytes).any())
