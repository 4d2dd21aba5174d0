"""Training data of a single tower: a folder of pictures without captions, or caption files without pictures.

Both are indexes of samples, like shards (index.py): numbered in a fixed order and read one at a time. They keep a few
bytes per sample in numpy arrays, which loader workers share with the process that forked them, so millions of lines
create no Python strings. The files are untrusted: reads are bounded.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.base.folders import find_pictures, matching_paths, tell_passed_over
from eval.base.images import is_picture
from eval.benchmarks.annotation_files import one_line, read_json
from eval.benchmarks.conversations import conversation_rows, held_out_rows
from eval.benchmarks.table_columns import is_header, read_header
from longclip_teacher.errors import InputError
from training.data.index import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, OpenFiles, RawSample
from training.data.shard_records import Contents

__all__ = ["CaptionFiles", "PictureFolder"]

_LOGGER = logging.getLogger(__name__)
_CHUNK = 1 << 24  # bytes of a caption file scanned at a time
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class PictureFolder:
    """The pictures of a folder and its subfolders, sorted by path; samples without captions.

    eval/base/folders.py says which files count and which links are followed.
    """

    def __init__(self, folder: Path) -> None:
        """Find the pictures. Raise InputError for a folder that does not exist or holds no picture."""
        if not folder.is_dir():
            raise InputError(f"--data.images {folder}: no such folder")
        self.folder = folder
        found = find_pictures(folder)
        tell_passed_over(folder, found.passed_over)
        self._names = _Texts(map(os.fsencode, found.files))
        if not self.num_samples:
            raise InputError(f"--data.images {folder}: no picture in it (.jpg, .png, .webp, ...)")
        self.shard_sizes = np.array([self.num_samples])
        self.contents = {str(folder): Contents(self.num_samples, self._names.sha256())}

    @property
    def num_samples(self) -> int:
        """Pictures found."""
        return len(self._names)

    def key(self, index: int) -> str:
        """Return the picture's path below the folder."""
        return os.fsdecode(self._names[index])

    def read(self, index: int) -> RawSample:
        """Read the file of picture `index`. `image` is None if it is missing, not a plain file or over its bound."""
        key = self.key(index)
        return RawSample(key, _read_picture(self.folder / key), None, None)


class CaptionFiles:
    """The captions of files, in the order of the files; samples without pictures, each with one long caption.

    .txt     one caption per line
    .tsv     the column of captions that a header names (caption, title, text, ...), or the first column where there is
             no header (Conceptual Captions)
    .json    COCO captions, {"annotations": [{"caption": ...}]}; or an array of conversations as ShareGPT4V's, whose
             first answer is the caption. Rows 0 to 999 of ShareGPT4V's own file are a test and are left out.

    Empty lines are skipped. For .txt and .tsv only the offsets of lines are kept; lines are read on demand.
    """

    def __init__(self, files: Sequence[str]) -> None:
        """Index `files`, paths or patterns with *. Raise InputError for a file that is missing or of another kind."""
        paths = list(dict.fromkeys(path for pattern in files for path in _matches(pattern)))
        self._sources = [_source(path) for path in paths]
        self._names = [path.name for path in paths]
        sizes = [len(source) for source in self._sources]
        for path, size in zip(paths, sizes, strict=True):
            if not size:
                raise InputError(f"--data.captions {path}: no caption in it")
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.shard_sizes = np.array([self.num_samples])
        self.contents = {
            str(path): Contents(len(source), source.sha256()) for path, source in zip(paths, self._sources, strict=True)
        }

    @property
    def num_samples(self) -> int:
        """The number of captions in all files."""
        return int(self._starts[-1])

    def read(self, index: int) -> RawSample:
        """Return caption `index` as `txt`, None if over its bound. The key is its file and its number there, from 0."""
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = int(index - self._starts[file])
        return RawSample(f"{self._names[file]}:{row}", None, None, self._sources[file][row])


class _Texts:
    """Texts in one array of bytes."""

    def __init__(self, texts: Iterable[bytes]) -> None:
        content, ends = bytearray(), [0]
        for text in texts:
            content += text
            ends.append(len(content))
        self._content, self._ends = np.frombuffer(bytes(content), dtype=np.uint8), np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> bytes:
        return self._content[self._ends[row] : self._ends[row + 1]].tobytes()

    def sha256(self) -> str:
        """Return a hash of all texts."""
        return hashlib.sha256(self._ends.tobytes() + self._content.tobytes()).hexdigest()


class _Lines:
    """The non-empty lines of a file, or one tab-separated column of them, from the line `start` on."""

    def __init__(self, path: Path, column: int | None = None, start: int = 0) -> None:
        self._files, self._column = OpenFiles([path]), column
        self._spans = _line_spans(path)[start:]  # int64 [N, 2]: offset and size

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, row: int) -> bytes | None:
        offset, size = self._spans[row].tolist()
        if size > MAX_TEXT_BYTES:
            return None
        line = self._files.read(0, offset, size)
        if self._column is None:
            return line
        cells = line.split(b"\t", self._column + 1)
        return cells[self._column] if self._column < len(cells) else b""

    def sha256(self) -> str:
        """Return a hash of the places of the lines, without reading their text."""
        return hashlib.sha256(self._spans.tobytes()).hexdigest()


def _line_spans(path: Path) -> np.ndarray:
    """Return the offset and size of each non-empty line, without its end (\
    or \\r\
    ): int64 [N, 2]."""
    ends, returns, position = [], [], 0
    with path.open("rb") as file:
        first = len(_BYTE_ORDER_MARK) if file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK else 0
        file.seek(0)
        while chunk := file.read(_CHUNK):
            content = np.frombuffer(chunk, dtype=np.uint8)
            ends.append(np.flatnonzero(content == ord("\n")) + position)
            returns.append(np.flatnonzero(content == ord("\r")) + position)
            position += len(chunk)
    stops = np.concatenate([*ends, [position]]).astype(np.int64)  # the last line may have no end
    starts = np.concatenate([[first], stops[:-1] + 1])
    stops -= np.isin(stops - 1, np.concatenate([*returns, []]).astype(np.int64), assume_unique=True)
    return np.stack([starts, stops - starts], axis=1)[stops > starts]


def _source(path: Path) -> _Texts | _Lines:
    try:
        if path.suffix == ".txt":
            return _Lines(path)
        if path.suffix == ".tsv":
            return _caption_column(path)
        if path.suffix == ".json":
            return _Texts(text.encode() for text in _json_captions(path))
    except OSError as error:
        raise InputError(f"--data.captions {path} cannot be read ({error.strerror})") from None
    raise InputError(
        f"--data.captions {path}: give COCO captions or ShareGPT4V (.json), Conceptual Captions (.tsv) or one caption "
        "per line (.txt)"
    )


def _caption_column(path: Path) -> _Lines:
    lines = _Lines(path)
    first = ((lines[0] or b"") if len(lines) else b"").decode("utf-8", "replace").split("\t")
    if is_header(first):
        columns = read_header(first, path, needs_picture=False)
        _LOGGER.info("--data.captions %s: %s", path, columns.told)
        return _Lines(path, columns.caption, start=1)
    if is_picture(Path(first[0])):
        raise InputError(f"--data.captions {path}: the first column holds picture names; it must hold the captions")
    return _Lines(path, column=0)


def _json_captions(path: Path) -> Iterator[str]:
    """Yield the captions of the file's rows, then log how many rows have none. Raise InputError if all have none."""
    with path.open("rb") as file:
        is_array = file.read(1024).removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"[")
    if is_array:
        if held_out := held_out_rows(path):
            _LOGGER.info("--data.captions %s: rows 0 to %d are left out, the test sharegpt4v_1k", path, held_out - 1)
        captions: Iterable[str | None] = (row.caption for row in conversation_rows(path, held_out))
    else:
        captions = _coco_captions(read_json(path))
    num_rows, num_empty = 0, 0
    for num_rows, caption in enumerate(captions, start=1):  # noqa: B007 -- used below
        if caption:
            yield caption
        else:
            num_empty += 1
    if num_empty == num_rows:
        raise InputError(
            f"--data.captions {path}: no caption in it; it is neither COCO captions (annotations: caption) nor an "
            "array of conversations (image, conversations) with answers"
        )
    if num_empty:
        _LOGGER.info("--data.captions %s: %d of %d rows have no caption and are left out", path, num_empty, num_rows)


def _coco_captions(content: Any) -> list[str]:
    rows = content.get("annotations") if isinstance(content, dict) else None
    captions = [row.get("caption") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [one_line(caption) if isinstance(caption, str) else "" for caption in captions]


def _matches(pattern: str) -> list[Path]:
    found = [path for path in matching_paths(pattern) if path.is_file()]
    if not found:
        raise InputError(f"--data.captions: no file matches {pattern!r} (looked in {Path.cwd()})")
    return found


def _read_picture(path: Path) -> bytes | None:
    try:
        status = path.stat()
        is_usable = stat.S_ISREG(status.st_mode) and 0 < status.st_size <= MAX_IMAGE_BYTES
        return path.read_bytes() if is_usable else None
    except OSError:
        return None
