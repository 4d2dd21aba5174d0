"""Training data of a single tower: a folder of pictures without captions, or caption files without pictures.

Both are indexes of samples, like shards (index.py): numbered in a fixed order and read one at a time. They keep a few
bytes per sample in numpy arrays, which loader workers share with the process that forked them, so millions of lines
create no Python strings. The files are untrusted: reads are bounded.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from eval.base.images import is_picture
from eval.benchmarks.annotation_files import first_json_rows, one_line, read_json
from eval.benchmarks.protocol_readers import SHAREGPT4V_TEST_ROWS
from longclip_teacher.errors import InputError
from training.data.index import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, Contents, OpenFiles, RawSample

__all__ = ["CaptionFiles", "PictureFolder"]

_CHUNK = 1 << 24  # bytes of a caption file scanned at a time
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class PictureFolder:
    """The pictures of a folder and its subfolders, sorted by path; samples without captions.

    Hidden files and folders are skipped. Links are followed only within the folder, and never to folders.
    """

    def __init__(self, folder: Path) -> None:
        """Find the pictures. Raise InputError for a folder that does not exist or holds no picture."""
        if not folder.is_dir():
            raise InputError(f"--data.images {folder}: no such folder")
        self.folder = folder
        try:
            names = sorted(_picture_names(folder.resolve()))
        except OSError as error:
            raise InputError(f"--data.images {folder} cannot be read: {error.filename}: {error.strerror}") from None
        self._names = _Texts(map(os.fsencode, names))
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

    .txt             one caption per line
    .tsv             Conceptual Captions: the caption is the part of a line before its first tab
    .json            COCO captions, {"annotations": [{"caption": ...}]}; or ShareGPT4V's array of rows, without the
    first
    1000, which are Long-CLIP's test

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
    """The non-empty lines of a file, or the part of each before the first `delimiter`."""

    def __init__(self, path: Path, delimiter: bytes | None = None) -> None:
        self._files, self._delimiter = OpenFiles([path]), delimiter
        self._spans = _line_spans(path)  # int64 [N, 2]: offset and size

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, row: int) -> bytes | None:
        offset, size = self._spans[row].tolist()
        if size > MAX_TEXT_BYTES:
            return None
        line = self._files.read(0, offset, size)
        return line if self._delimiter is None else line.partition(self._delimiter)[0]

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
            return _first_column(path)
        if path.suffix == ".json":
            return _Texts(text.encode("utf-8", "surrogatepass") for text in _json_captions(path))
    except OSError as error:
        raise InputError(f"--data.captions {path} cannot be read ({error.strerror})") from None
    raise InputError(
        f"--data.captions {path}: give COCO captions or ShareGPT4V (.json), Conceptual Captions (.tsv) or one caption "
        "line (.txt)"
    )


def _first_column(path: Path) -> _Lines:
    lines = _Lines(path, delimiter=b"\t")
    first = (lines[0] or b"") if len(lines) else b""
    if is_picture(Path(first.decode("utf-8", "replace"))):
        raise InputError(f"--data.captions {path}: the first column holds picture names; it must hold the captions")
    return lines


def _json_captions(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        is_array = file.read(1024).removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"[")
    try:
        if is_array:
            rows = islice(first_json_rows(path, sys.maxsize), SHAREGPT4V_TEST_ROWS, None)
            yield from (one_line(row["conversations"][1]["value"]) for row in rows)
        else:
            yield from (one_line(row["caption"]) for row in read_json(path)["annotations"])
    except (KeyError, IndexError, TypeError):
        raise InputError(
            f"--data.captions {path}: neither COCO captions (annotations: caption) nor an array of ShareGPT4V's rows "
            "(conversations[1].value)"
        ) from None


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
    if not found:
        raise InputError(f"--data.captions: no file matches {pattern!r} (looked in {Path.cwd()})")
    return found


def _picture_names(root: Path) -> Iterator[str]:
    """Yield the paths of the pictures below `root`, in the order of the file system."""
    folders = [root]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                    folders.append(Path(entry.path))
                elif is_picture(Path(entry.name)) and _is_file_below(entry, root):
                    yield os.path.relpath(entry.path, root)


def _is_file_below(entry: os.DirEntry[str], root: Path) -> bool:
    if entry.is_symlink():
        return entry.is_file() and Path(entry.path).resolve().is_relative_to(root)
    return entry.is_file(follow_symlinks=False)


def _read_picture(path: Path) -> bytes | None:
    try:
        status = path.stat()
        is_usable = stat.S_ISREG(status.st_mode) and 0 < status.st_size <= MAX_IMAGE_BYTES
        return path.read_bytes() if is_usable else None
    except OSError:
        return None
