"""Readers of public caption layouts. Each gives pictures with their captions."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from eval.base.images import is_picture
from eval.benchmarks.annotation_files import first_json_rows, inside_root, one_line, read_json, read_text
from eval.benchmarks.protocol_readers import SHAREGPT4V_TEST_ROWS
from longclip_teacher.errors import InputError

__all__ = ["Pair", "read_coco", "read_folder", "read_sharegpt4v", "read_table"]


@dataclass(frozen=True)
class Pair:
    """A picture and its captions, not read yet. The loader replaces a missing short caption by the first sentence."""

    key: str  # the sample's name in the shard
    name: str  # the picture's path as the source writes it, matched by --include and --exclude
    path: Path
    caption_long: str | tuple[str, ...]  # empty if there is none
    caption_short: str | None = None


def read_sharegpt4v(json_file: Path, images: Path, split: Literal["train", "test", "all"]) -> Iterator[Pair]:
    """Yield ShareGPT4V rows: `image` and the answer, `conversations[1].value`. Rows 0 to 999 are Long-CLIP's test."""
    count = SHAREGPT4V_TEST_ROWS if split == "test" else sys.maxsize
    start = SHAREGPT4V_TEST_ROWS if split == "train" else 0
    for number, row in islice(enumerate(first_json_rows(json_file, count)), start, None):
        try:
            name, caption = row["image"], one_line(row["conversations"][1]["value"])
        except (KeyError, IndexError, TypeError):
            raise InputError(
                f"{json_file}: row {number} is not a ShareGPT4V row (image, conversations[1].value)"
            ) from None
        yield Pair(f"{number:09d}", name, inside_root(images, name, json_file), caption)


def read_coco(json_file: Path, images: Path) -> Iterator[Pair]:
    """Yield COCO captions: pictures by id, each with all of its captions. Training draws one of them."""
    content = read_json(json_file)
    captions: dict[Any, list[str]] = {}
    try:
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(one_line(annotation["caption"]))
        rows = [(row["id"], row["file_name"]) for row in sorted(content["images"], key=lambda row: row["id"])]
    except (KeyError, TypeError):
        raise InputError(
            f"{json_file} is not a COCO captions file (images: id, file_name; annotations: image_id, caption)"
        ) from None
    for number, (image_id, name) in enumerate(rows):
        own = tuple(filter(None, captions.get(image_id, [])))
        yield Pair(f"{number:09d}", name, inside_root(images, name, json_file), own[0] if len(own) == 1 else own)


def read_folder(images: Path) -> Iterator[Pair]:
    """Yield pictures with a .txt of the same name beside them, or image/N.jpg with caption/N.txt (Urban-1k's
    layout)."""
    if not images.is_dir():
        raise InputError(f"no folder at {images}")
    twin_folders = (images / "image").is_dir() and (images / "caption").is_dir()
    root = images / "image" if twin_folders else images
    found = sorted(Path(folder, file) for folder, _, files in os.walk(root) for file in files if is_picture(Path(file)))
    for number, path in enumerate(found):
        text = images / "caption" / f"{path.stem}.txt" if twin_folders else path.with_suffix(".txt")
        caption = one_line(read_text(text)) if text.is_file() else ""
        yield Pair(f"{number:09d}", path.relative_to(images).as_posix(), path, caption)


def read_table(file: Path, images: Path, delimiter: Literal["\t", ","]) -> Iterator[Pair]:
    """Yield rows of picture path, long caption and optional short caption. A first row without a picture is a
    header."""
    if not file.is_file():
        raise InputError(f"no table at {file}")
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL  # tsv has no quoting
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            for number, row in enumerate(csv.reader(stream, delimiter=delimiter, quoting=quoting)):
                if not row or (number == 0 and not is_picture(Path(row[0]))):
                    continue
                if len(row) < 2:
                    raise InputError(f"{file}: row {number + 1} has no second column, the long caption")
                path = inside_root(images, row[0], file)
                short = one_line(row[2]) if len(row) > 2 else None
                yield Pair(f"{number:09d}", row[0], path, one_line(row[1]), short or None)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not a UTF-8 table ({error})") from None
