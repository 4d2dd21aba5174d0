"""Reading what a dataset says of its pictures: caption files and annotation JSON, as untrusted data.

Sizes are bounded, and a path that leaves the dataset's root is refused (symbolic links are the user's own).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from longclip_teacher.errors import InputError

__all__ = ["first_json_rows", "inside_root", "one_line", "read_json", "read_text"]

MAX_TEXT_BYTES = 1 << 20  # of one caption file
MAX_JSON_BYTES = 1 << 30  # of an annotation file read whole
MAX_ROW_CHARACTERS = 1 << 24  # of one row of an annotation file read row by row
_CHUNK = 1 << 20  # characters read at a time


def inside_root(root: Path, name: object, source: Path) -> Path:
    """root / name, where `name` stands in the file `source` and must not lead out of the root."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise InputError(f"{source} names a picture that is no file name: {name!r}")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise InputError(f"{source} names a picture outside the root, which is refused: {name}")
    return root / name


def one_line(caption: object) -> str:
    """The caption with line breaks as spaces. TypeError if it is not text."""
    if not isinstance(caption, str):
        raise TypeError(f"a caption is {type(caption).__name__}, not text")
    return caption.replace("\n", " ").strip()


def read_text(path: Path) -> str:
    """A small UTF-8 file whole."""
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise InputError(f"{path} is larger than {MAX_TEXT_BYTES} bytes, too large for captions or names")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"no file at {path}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None


def read_json(path: Path) -> Any:
    """An annotation file whole."""
    if not path.is_file():
        raise InputError(f"no annotation file at {path}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"{path} is larger than {MAX_JSON_BYTES} bytes, too large for an annotation file")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None


def first_json_rows(path: Path, count: int) -> Iterator[Any]:
    """The first `count` elements of a JSON array, without reading the rest: of ShareGPT4V's 1 GB the test is 1 MB."""
    if not path.is_file():
        raise InputError(f"no annotation file at {path}")
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig") as file:
        try:
            text = file.read(_CHUNK).lstrip()
            if not text.startswith("["):
                raise ValueError("no array of rows")
            text = text[1:]
            while count > 0:
                text = text.lstrip().removeprefix(",").lstrip()
                if text.startswith("]"):
                    return
                try:
                    row, end = decoder.raw_decode(text)
                except ValueError:
                    more = file.read(_CHUNK)  # the row goes on in the next chunk, unless there is none
                    if not more or len(text) > MAX_ROW_CHARACTERS:
                        raise
                    text += more
                    continue
                yield row
                text, count = text[end:], count - 1
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not valid JSON ({error})") from None
