"""Readers of public caption layouts. Each gives pictures with their captions, and what lacks one of the two."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from eval.base.folders import pictures_below
from eval.base.foreign_text import HALVES
from eval.base.images import IMAGE_SUFFIXES, is_picture
from eval.benchmarks.annotation_files import inside_root, one_line, read_json, read_text
from eval.benchmarks.conversations import SHAREGPT4V_TEST_ROWS, conversation_rows, held_out_rows
from eval.benchmarks.table_columns import Columns, is_header, read_header
from longclip_teacher.errors import InputError

__all__ = ["LeftOut", "Pair", "Row", "Split", "read_coco", "read_folder", "read_sharegpt4v", "read_table"]

Split: TypeAlias = Literal["auto", "train", "test", "all"]


@dataclass(frozen=True)
class Pair:
    """A picture and its captions, not read yet. The loader replaces a missing short caption by the first sentence."""

    key: str  # the sample's name in the shard
    name: str  # the picture's path as the source writes it, matched by --include and --exclude
    path: Path
    caption_long: str | tuple[str, ...]  # not empty
    caption_short: str | None = None


@dataclass(frozen=True)
class LeftOut:
    """A row that no shard holds, for want of a picture or a caption."""

    name: str  # as Pair's, or the row's number if it names no picture
    cause: str  # under which it is counted


Row: TypeAlias = Pair | LeftOut


def read_sharegpt4v(json_file: Path, images: Path, split: Split) -> Iterator[Row]:
    """Yield rows of conversations, whose first answer is the caption. Rows 0 to 999 of ShareGPT4V's own file are a
    test, which "auto" leaves out of that file alone, and says so on stderr."""
    start, stop = (SHAREGPT4V_TEST_ROWS if split == "train" else 0), sys.maxsize
    if split == "auto" and json_file.is_file():
        start = held_out_rows(json_file)
        told = f"rows 0 to {start - 1} are held out, the test sharegpt4v_1k; --split all takes them too"
        other = f"all rows are used; --split train leaves out rows 0 to {SHAREGPT4V_TEST_ROWS - 1}, ShareGPT4V's test"
        print(f"{json_file}: {told if start else other}", file=sys.stderr)
    elif split == "test":
        stop = SHAREGPT4V_TEST_ROWS
    for row in conversation_rows(json_file, start, stop):
        yield _row(row.number, row.image, images, json_file, row.caption)


def read_coco(json_file: Path, images: Path) -> Iterator[Row]:
    """Yield COCO captions: pictures by id, each with all of its captions. Training draws one of them."""
    content = read_json(json_file)
    captions: dict[Any, list[str]] = {}
    try:
        for annotation in content["annotations"]:
            if isinstance(caption := annotation.get("caption"), str):
                captions.setdefault(annotation["image_id"], []).append(one_line(caption))
        rows = [(row["id"], row.get("file_name")) for row in sorted(content["images"], key=lambda row: row["id"])]
    except (KeyError, TypeError, AttributeError):
        raise InputError(
            f"{json_file} is not a COCO captions file (images: id, file_name; annotations: image_id, caption)"
        ) from None
    for number, (image_id, name) in enumerate(rows):
        own = tuple(filter(None, captions.get(image_id, [])))
        yield _row(number, name, images, json_file, own[0] if len(own) == 1 else own)


def read_folder(images: Path) -> Iterator[Row]:
    """Yield pictures with a .txt of the same name beside them, or image/N.jpg with caption/N.txt (Urban-1k's
    layout)."""
    if not images.is_dir():
        raise InputError(f"no folder at {images}")
    twin_folders = (images / "image").is_dir() and (images / "caption").is_dir()
    root = images / "image" if twin_folders else images
    for number, path in enumerate(pictures_below(root)):
        text = images / "caption" / f"{path.stem}.txt" if twin_folders else path.with_suffix(".txt")
        name = path.relative_to(images).as_posix()
        try:
            caption = one_line(read_text(text)) if text.is_file() else ""
        except InputError:
            yield LeftOut(name, "unreadable caption")
        else:
            yield Pair(f"{number:09d}", name, path, caption) if caption else LeftOut(name, "no caption")


def read_table(file: Path, images: Path, delimiter: Literal["\t", ","]) -> Iterator[Row]:
    """Yield the rows of a table. Its header names the columns; without a header they are the picture's path, the long
    caption and the optional short caption. Which columns of a header are used is said on stderr."""
    if not file.is_file():
        raise InputError(f"no table at {file}")
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL  # tsv has no quoting
    columns = None
    try:
        with file.open(encoding="utf-8-sig", errors=HALVES, newline="") as stream:
            for number, row in enumerate(csv.reader(stream, delimiter=delimiter, quoting=quoting)):
                if not row:
                    continue
                if columns is None:
                    columns = _columns(row, file)
                    if columns.told:
                        print(f"{file}: {columns.told}", file=sys.stderr)
                        continue
                name, caption, short = (_cell(row, place) for place in columns[:3])
                yield _row(number, name, images, file, one_line(caption), one_line(short) or None)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not a UTF-8 table ({error})") from None


def _columns(first: list[str], file: Path) -> Columns:
    """Return the columns that the first row of a table names, or the usual ones if it is no header."""
    if is_header(first):
        return read_header(first, file)
    if not is_picture(Path(first[0])):
        raise InputError(
            f"{file}: its first row ({', '.join(first)[:200]}) neither names columns (filepath, caption, ...) nor "
            "begins with a picture's path"
        )
    if len(first) < 2:
        raise InputError(f"{file}: row 1 has no second column, the long caption")
    return Columns(picture=0, caption=1, short=2, told="")


def _cell(row: list[str], place: int | None) -> str:
    return row[place] if place is not None and place < len(row) else ""


def _row(
    number: int, name: Any, images: Path, source: Path, caption: str | tuple[str, ...] | None, short: str | None = None
) -> Row:
    """Return row `number` of the file `source`. Raise InputError if its picture's path leads out of `images`."""
    if name in (None, ""):
        return LeftOut(f"row {number}", "no picture named")
    path = inside_root(images, name, source)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return LeftOut(name, "not a picture's file name")
    return Pair(f"{number:09d}", name, path, caption, short) if caption else LeftOut(name, "no caption")
