"""The file beside a shard with the teacher's results for its samples: safetensors, read through a memory map.

Shapes: N samples, V stored views (crops) per sample, K RandAugment operations per view, C long captions of all samples,
U distinct captions, D width.

    image_features     float16 [N, V, D]  unit norm: normalised in float32, then rounded, so norms are 1 to within 5e-4;
                                          code that reads them in float32 normalises again
    boxes              int32 [N, V, 4]    crop: left, top, right, bottom
    flips              uint8 [N, V]
    op_ids             uint8 [N, V, K]    index into RAND_AUGMENT_OPS, 255 for none
    op_magnitudes      float32 [N, V, K]  signed, in torchvision's units
    sizes              int32 [N, 2]       width and height of the decoded picture
    picture_crcs       uint32 [N]         CRC-32 of the picture's file
    valid              uint8 [N]          0 for an unreadable sample, which has no captions
    keys               uint8 [N, longest]
    long_rows, short_rows  int32          rows of caption_features, sample by sample, split at
    long_offsets, short_offsets  int64 [N + 1]
    shorts_follow      uint8 [N]          1 if the short captions are made from the long ones: the first sentence, or as
                                          many sampled captions of each, in order
    sentence_rows  int32                  rows of the sentences of each long caption, split at
    sentence_offsets  int64 [C + 1]       both are absent if no sentences are stored
    caption_features   float16 [U, D]     unit norm, as above
    tokens             uint16             from SOT to EOT, caption by caption, split at
    token_offsets      int64 [U + 1]
    view_crcs          uint32 [N, V]      of everything stored for the sample and this view
    caption_crcs       uint32 [U]         of features and tokens

Each read compares checksums, so damage is found where it is read. PCA is never applied to the features.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from longclip_teacher.atomic_files import atomic_file
from longclip_teacher.errors import InputError
from training.data.transforms import RAND_AUGMENT_OPS, Augmentation

__all__ = ["CaptionRows", "SampleEntry", "Sidecar", "StoredView", "write_sidecar"]

_FORMAT = "compact-longclip sidecar, version "
_METADATA = {"format": f"{_FORMAT}1"}  # a single entry, because safetensors writes several in any order
_NO_OPERATION = 255
_Layout: TypeAlias = dict[str, tuple[str, tuple[str | int | None, ...]]]
# type and shape of each array; a name stands for a size that must be the same everywhere, None for any size
_LAYOUT: _Layout = {
    "image_features": ("float16", ("N", "V", "D")),
    "boxes": ("int32", ("N", "V", 4)),
    "flips": ("uint8", ("N", "V")),
    "op_ids": ("uint8", ("N", "V", "K")),
    "op_magnitudes": ("float32", ("N", "V", "K")),
    "sizes": ("int32", ("N", 2)),
    "picture_crcs": ("uint32", ("N",)),
    "valid": ("uint8", ("N",)),
    "keys": ("uint8", ("N", None)),
    "long_rows": ("int32", (None,)),
    "long_offsets": ("int64", ("N+1",)),
    "short_rows": ("int32", (None,)),
    "short_offsets": ("int64", ("N+1",)),
    "shorts_follow": ("uint8", ("N",)),
    "caption_features": ("float16", ("U", "D")),
    "tokens": ("uint16", (None,)),
    "token_offsets": ("int64", ("U+1",)),
    "view_crcs": ("uint32", ("N", "V")),
    "caption_crcs": ("uint32", ("U",)),
}
_SENTENCES: _Layout = {
    "sentence_rows": ("int32", (None,)),
    "sentence_offsets": ("int64", (None,)),
}


@dataclass(frozen=True)
class SampleEntry:
    """What is stored for one sample beside its features."""

    key: str
    size: tuple[int, int] = (0, 0)
    picture_crc: int = 0
    augmentations: list[Augmentation] = field(default_factory=list)
    """One per view; empty for an unreadable sample."""
    long: list[int] = field(default_factory=list)
    """Rows of the long captions."""
    short: list[int] = field(default_factory=list)
    """Rows of the short captions."""
    shorts_follow: bool = False
    """Whether the short captions are made from the long ones: as many of each, in order."""
    sentences: list[list[int]] = field(default_factory=list)
    """Rows of the sentences of each long caption; empty if none are stored."""


@dataclass(frozen=True)
class CaptionRows:
    """The distinct captions of a shard."""

    features: np.ndarray  # float16 [U, D]
    tokens: list[np.ndarray]  # uint16, from SOT to EOT


@dataclass(frozen=True)
class StoredView:
    """One stored view of a sample, as read."""

    is_valid: bool
    size: tuple[int, int]
    picture_crc: int
    augmentation: Augmentation
    image: np.ndarray  # float16 [D]
    long: np.ndarray  # int32, rows of the captions
    short: np.ndarray
    shorts_follow: bool
    sentences: list[np.ndarray]
    """Rows of the sentences of each long caption; empty if none are stored."""


def write_sidecar(
    path: Path, entries: Sequence[SampleEntry], num_ops: int, image_features: np.ndarray, captions: CaptionRows
) -> None:
    """Write the sidecar of N samples. It gets its name only once complete, and the same contents give the same bytes.

    image_features  float16 [N, V, D], unit norm
    num_ops         K, the most operations per view

    Raise InputError if the folder cannot be written.
    """
    arrays = _arrays(entries, num_ops, image_features, captions)
    with atomic_file(path, sync=True) as temporary:
        try:
            save_file(arrays, temporary, _METADATA)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write {path} ({error})") from None


def _arrays(
    entries: Sequence[SampleEntry], num_ops: int, image_features: np.ndarray, captions: CaptionRows
) -> dict[str, np.ndarray]:
    num_samples, num_views, _ = image_features.shape
    boxes = np.zeros((num_samples, num_views, 4), np.int32)
    flips = np.zeros((num_samples, num_views), np.uint8)
    op_ids = np.full((num_samples, num_views, num_ops), _NO_OPERATION, np.uint8)
    op_magnitudes = np.zeros((num_samples, num_views, num_ops), np.float32)
    for row, entry in enumerate(entries):
        for view, augmentation in enumerate(entry.augmentations):
            if augmentation.ops_size != Augmentation.ops_size:
                raise ValueError(f"operations at {augmentation.ops_size} pixels: sidecars hold {Augmentation.ops_size}")
            boxes[row, view], flips[row, view] = augmentation.box, augmentation.flip
            for place, (name, magnitude) in enumerate(augmentation.ops):
                op_ids[row, view, place], op_magnitudes[row, view, place] = RAND_AUGMENT_OPS.index(name), magnitude
    keys = np.array([entry.key.encode("utf-8", "surrogateescape") for entry in entries], np.bytes_)
    arrays: dict[str, np.ndarray] = {
        "image_features": np.ascontiguousarray(image_features, np.float16),
        "boxes": boxes,
        "flips": flips,
        "op_ids": op_ids,
        "op_magnitudes": op_magnitudes,
        "sizes": np.array([entry.size for entry in entries], np.int32),
        "picture_crcs": np.array([entry.picture_crc for entry in entries], np.uint32),
        "valid": np.array([bool(entry.augmentations) for entry in entries], np.uint8),
        "keys": np.frombuffer(keys.tobytes(), np.uint8).reshape(num_samples, keys.itemsize),
        "long_rows": _flat([entry.long for entry in entries], np.int32),
        "long_offsets": _offsets([entry.long for entry in entries]),
        "short_rows": _flat([entry.short for entry in entries], np.int32),
        "short_offsets": _offsets([entry.short for entry in entries]),
        "shorts_follow": np.array([entry.shorts_follow for entry in entries], np.uint8),
        "caption_features": np.ascontiguousarray(captions.features, np.float16),
        "tokens": _flat(captions.tokens, np.uint16),
        "token_offsets": _offsets(captions.tokens),
    }
    sentences = [rows for entry in entries for rows in entry.sentences]
    if sentences:
        arrays |= {"sentence_rows": _flat(sentences, np.int32), "sentence_offsets": _offsets(sentences)}
    view_crcs = [[_view_crc(arrays, row, view) for view in range(num_views)] for row in range(num_samples)]
    arrays["view_crcs"] = np.array(view_crcs, np.uint32)
    arrays["caption_crcs"] = np.array([_caption_crc(arrays, row) for row in range(len(captions.tokens))], np.uint32)
    return arrays


def _flat(parts: Sequence[Sequence[int] | np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(part, dtype) for part in parts)])


def _offsets(parts: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)]).astype(np.int64)


def _piece(arrays: dict[str, np.ndarray], values: str, offsets: str, row: int) -> np.ndarray:
    start, stop = arrays[offsets][row : row + 2].tolist()
    return arrays[values][max(start, 0) : max(stop, 0)]  # damaged offsets give arbitrary data, whose checksum differs


def _sentences(arrays: dict[str, np.ndarray], row: int) -> list[np.ndarray]:
    """Return the rows of the sentences of each long caption of a sample; nothing if none are stored."""
    if "sentence_offsets" not in arrays:
        return []
    last = len(arrays["sentence_offsets"]) - 2
    captions = range(*np.clip(arrays["long_offsets"][row : row + 2], 0, last + 1).tolist())
    return [_piece(arrays, "sentence_rows", "sentence_offsets", caption) for caption in captions]


def _view_crc(arrays: dict[str, np.ndarray], row: int, view: int) -> int:
    crc = 0
    for name in ("keys", "sizes"):
        crc = zlib.crc32(arrays[name][row].data, crc)
    for name in ("picture_crcs", "valid", "shorts_follow"):
        crc = zlib.crc32(arrays[name][row : row + 1].data, crc)
    for kind in ("long", "short"):
        crc = zlib.crc32(arrays[f"{kind}_offsets"][row : row + 2].data, crc)
        crc = zlib.crc32(_piece(arrays, f"{kind}_rows", f"{kind}_offsets", row).data, crc)
    for rows in _sentences(arrays, row):
        crc = zlib.crc32(rows.data, zlib.crc32(len(rows).to_bytes(4, "little"), crc))
    for name in ("boxes", "op_ids", "op_magnitudes", "image_features"):
        crc = zlib.crc32(arrays[name][row, view].data, crc)
    return zlib.crc32(arrays["flips"][row, view : view + 1].data, crc)


def _caption_crc(arrays: dict[str, np.ndarray], row: int) -> int:
    crc = zlib.crc32(arrays["token_offsets"][row : row + 2].data)
    crc = zlib.crc32(arrays["caption_features"][row].data, crc)
    return zlib.crc32(_piece(arrays, "tokens", "token_offsets", row).data, crc)


class Sidecar:
    """A sidecar opened for reading. Only what is asked for is read, and compared with its checksum."""

    def __init__(self, path: Path) -> None:
        """Map the file. Raise InputError if it is absent, cut short or laid out differently."""
        self.path = path
        if not path.is_file():
            raise InputError(f"no sidecar at {path}: run scripts/cache_teacher.py again")
        try:
            with safe_open(path, framework="pt") as file:  # framework "np" would read all of the file
                metadata = file.metadata() or {}
                found = metadata.get("format", "")
                if not found.startswith(_FORMAT):
                    raise ValueError("it is not a sidecar of this project")
                if found != _METADATA["format"]:
                    raise ValueError(f"it is of version {found.removeprefix(_FORMAT)}, but this code reads 1")
                has_sentences = not _SENTENCES.keys().isdisjoint(file.keys())
                layout = _LAYOUT | _SENTENCES if has_sentences else _LAYOUT
                self._arrays = {name: file.get_tensor(name).numpy() for name in layout}
            sizes = _checked_sizes(self._arrays, layout)
        except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise self._damaged(str(error).splitlines()[0]) from None
        self.num_samples, self.num_views = sizes["N"], sizes["V"]
        self.num_captions, self.embed_dim = sizes["U"], sizes["D"]

    def view(self, row: int, view: int, key: str) -> StoredView:
        """Return view `view` of sample `row`, whose key must be `key`. Raise InputError for damage or another key."""
        arrays = self._arrays
        if int(arrays["view_crcs"][row, view]) != _view_crc(arrays, row, view):
            raise self._damaged(f"sample {key}, view {view}")
        if self.key(row) != key:
            raise InputError(f"{self.path} holds sample {self.key(row)}, but the shard has {key}: make it again")
        ids, magnitudes = arrays["op_ids"][row, view], arrays["op_magnitudes"][row, view]
        ops = tuple(
            (RAND_AUGMENT_OPS[number], magnitude)
            for number, magnitude in zip(ids.tolist(), magnitudes.tolist(), strict=True)
            if number < len(RAND_AUGMENT_OPS)
        )
        left, top, right, bottom = arrays["boxes"][row, view].tolist()
        width, height = arrays["sizes"][row].tolist()
        return StoredView(
            is_valid=bool(arrays["valid"][row]),
            size=(width, height),
            picture_crc=int(arrays["picture_crcs"][row]),
            augmentation=Augmentation((left, top, right, bottom), ops=ops, flip=bool(arrays["flips"][row, view])),
            image=arrays["image_features"][row, view],
            long=_piece(arrays, "long_rows", "long_offsets", row),
            short=_piece(arrays, "short_rows", "short_offsets", row),
            shorts_follow=bool(arrays["shorts_follow"][row]),
            sentences=_sentences(arrays, row),
        )

    def caption(self, row: int, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return features (float16 [D]) and tokens (uint16) of caption `row` of sample `key`. Raise InputError for
        damage."""
        arrays = self._arrays
        if not 0 <= row < self.num_captions or int(arrays["caption_crcs"][row]) != _caption_crc(arrays, row):
            raise self._damaged(f"sample {key}, caption {row}")
        return arrays["caption_features"][row], _piece(arrays, "tokens", "token_offsets", row)

    def key(self, row: int) -> str:
        """Return the key of sample `row`."""
        return self._arrays["keys"][row].tobytes().rstrip(b"\0").decode("utf-8", "surrogateescape")

    def damage(self) -> Iterator[str]:
        """Read everything, and name each view and each caption whose checksum differs."""
        arrays = self._arrays
        for row in range(self.num_samples):
            for view in range(self.num_views):
                if int(arrays["view_crcs"][row, view]) != _view_crc(arrays, row, view):
                    yield f"sample {self.key(row)}, view {view}"
        for row in range(self.num_captions):
            if int(arrays["caption_crcs"][row]) != _caption_crc(arrays, row):
                yield f"sample {self._owner(row)}, caption {row}"

    def _owner(self, caption: int) -> str:
        """Return the key of the first sample that has a caption."""
        for kind in ("long", "short"):
            places = np.flatnonzero(self._arrays[f"{kind}_rows"] == caption)
            if len(places):
                row = int(np.searchsorted(self._arrays[f"{kind}_offsets"], places[0], side="right")) - 1
                return self.key(min(max(row, 0), self.num_samples - 1))
        return "unknown"

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self.path} is damaged ({what}): delete it and run scripts/cache_teacher.py again")


def _checked_sizes(arrays: dict[str, np.ndarray], layout: _Layout) -> dict[str, int]:
    """Return the sizes N, V, K, U and D if the arrays agree on them. Raise ValueError otherwise."""
    sizes: dict[str, int] = {}
    for name, (dtype, shape) in layout.items():
        array = arrays[name]
        if array.dtype != dtype or array.ndim != len(shape):
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
        for size, wanted in zip(array.shape, shape, strict=True):
            if isinstance(wanted, int):
                fits = size == wanted
            elif wanted is None:
                fits = True
            else:
                symbol, _, more = wanted.partition("+")
                fits = sizes.setdefault(symbol, size - int(more or 0)) == size - int(more or 0)
            if not fits:
                raise ValueError(f"{name} has shape {array.shape}")
    return sizes
