"""Read a dataset's annotations: caption files, annotation JSON and tables, as untrusted data.

Sizes are bounded, and a path that leaves the dataset's root is refused (symbolic links are the user's own).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from eval.base.foreign_text import HALVES, whole_characters
from eval.base.plain_files import check_plain
from longclip_teacher.errors import InputError

__all__ = [
    "first_json_rows",
    "inside_root",
    "json_lines",
    "one_line",
    "read_json",
    "read_lines",
    "read_text",
    "tab_separated_rows",
]

MAX_TEXT_BYTES = 1 << 20  # limit of one caption file
MAX_JSON_BYTES = 1 << 30  # limit of an annotation file read at once
MAX_ROW_CHARACTERS = 1 << 24  # limit of one row of an annotation file read row by row
_BETWEEN_ROWS = re.compile(r"\s*,?\s*")
_CHUNK = 1 << 20  # characters read at a time


def inside_root(root: Path, name: object, source: Path) -> Path:
    """Return root / name, where `name` comes from the file `source` and must not lead out of the root.

    An absolute path below the root is accepted.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise InputError(f"{source} contains an invalid file name: {name!r}")
    path = PurePosixPath(name)
    if path.is_absolute():
        above = [folder for folder in (root, root.absolute(), root.resolve()) if path.is_relative_to(folder)]
        path = path.relative_to(above[0]) if above else path
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{source} names a file outside the root {root}, which is refused: {name}")
    return root / path


def one_line(caption: object) -> str:
    """Return the caption with line breaks as spaces and half emojis as U+FFFD. Raise TypeError if it is not text."""
    if not isinstance(caption, str):
        raise TypeError(f"a caption is {type(caption).__name__}, not text")
    return whole_characters(caption).replace("\n", " ").strip()


def read_text(path: Path) -> str:
    """Read a small UTF-8 file. Half an emoji becomes U+FFFD."""
    check_plain(path)
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise InputError(f"{path} is larger than {MAX_TEXT_BYTES} bytes, too large for captions or names")
        return whole_characters(path.read_text(encoding="utf-8-sig", errors=HALVES))
    except FileNotFoundError:
        raise InputError(f"no file at {path}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None


def read_json(path: Path) -> Any:
    """Read an annotation file."""
    if not path.is_file():
        raise InputError(f"no annotation file at {path}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"{path} is larger than {MAX_JSON_BYTES} bytes, too large for an annotation file")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig", errors=HALVES))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None


def first_json_rows(path: Path, count: int) -> Iterator[Any]:
    """Yield the first `count` elements of a JSON array without reading the rest: ShareGPT4V's test is 1 MB of its 1
    GB."""
    if not path.is_file():
        raise InputError(f"no annotation file at {path}")
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig", errors=HALVES) as file:
        try:
            text = file.read(_CHUNK).lstrip()
            if not text.startswith("["):
                raise ValueError("not an array of rows")
            position = 1
            while count > 0:
                position = _BETWEEN_ROWS.match(text, position).end()  # type: ignore[union-attr]  # matches anything
                if text.startswith("]", position):
                    return
                try:
                    row, position = decoder.raw_decode(text, position)
                except ValueError:
                    more = file.read(_CHUNK)  # the row continues in the next chunk, if there is one
                    text, position = text[position:], 0
                    if not more or len(text) > MAX_ROW_CHARACTERS:
                        raise
                    text += more
                    continue
                yield row
                count -= 1
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not valid JSON ({error})") from None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the non-empty lines of a UTF-8 file, numbered from 1, without their ends. Half an emoji becomes U+FFFD."""
    if not path.is_file():
        raise InputError(f"no annotation file at {path}")
    with path.open(encoding="utf-8-sig", errors=HALVES) as file:
        number = 0
        try:
            while line := file.readline(MAX_ROW_CHARACTERS):
                number += 1
                if len(line) == MAX_ROW_CHARACTERS:
                    raise InputError(f"{path}: line {number} is longer than {MAX_ROW_CHARACTERS} characters")
                if line.strip():
                    yield number, whole_characters(line.rstrip("\n"))
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text (after line {number}, byte {error.start})") from None


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the objects of a JSON-lines file with their line numbers from 1."""
    for number, line in read_lines(path):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is not valid JSON ({error})") from None


def tab_separated_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a tab-separated file with a header, as {column: text}, with their line numbers.

    Quoting is as in spreadsheets and pandas: a field in double quotes may hold tabs, line ends and doubled quotes. A
    column that a row lacks is None. A field has at most 131072 characters, the limit of csv.
    """
    if not path.is_file():
        raise InputError(f"no annotation file at {path}")
    try:
        with path.open(encoding="utf-8-sig", errors=HALVES, newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            for row in reader:
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a tab-separated UTF-8 table ({error})") from None
