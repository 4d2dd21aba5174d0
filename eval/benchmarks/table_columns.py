"""Columns of a caption table, found by their names in its header."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eval.base.images import is_picture
from longclip_teacher.errors import InputError

__all__ = ["Columns", "is_header", "read_header"]

# The first name that a header has is used; case, spaces and hyphens do not count.
PICTURE_COLUMNS = ("filepath", "file_path", "image", "image_path", "file_name", "filename", "picture", "path", "file")
CAPTION_COLUMNS = ("caption_long", "long_caption", "long", "caption", "title", "text")
SHORT_COLUMNS = ("caption_short", "short_caption", "short")


class Columns(NamedTuple):
    """Places of the columns in a row, from 0; None for a column that the table lacks."""

    picture: int | None
    caption: int
    short: int | None
    told: str
    """Which columns are used and which are ignored, in words."""


def is_header(cells: Sequence[str]) -> bool:
    """Return whether a table's first row names columns: a known name is among its cells, and no picture or URL."""
    known = {*PICTURE_COLUMNS, *CAPTION_COLUMNS, *SHORT_COLUMNS}
    is_data = any(is_picture(Path(cell)) or "://" in cell for cell in cells)
    return not is_data and any(_plain(cell) in known for cell in cells)


def read_header(cells: Sequence[str], table: Path, needs_picture: bool = True) -> Columns:
    """Return the columns that a header names. Raise InputError if there is none for the caption or the picture."""
    names = [_plain(cell) for cell in cells]
    picture, caption, short = (_first(names, known) for known in (PICTURE_COLUMNS, CAPTION_COLUMNS, SHORT_COLUMNS))
    for what, place, known in (("picture", picture, PICTURE_COLUMNS), ("caption", caption, CAPTION_COLUMNS)):
        if place is None and (needs_picture or what == "caption"):
            raise InputError(
                f"{table}: none of its columns ({', '.join(map(str.strip, cells))}) holds the {what}: "
                f"call it {', '.join(known[:-1])} or {known[-1]}"
            )
    assert caption is not None
    used = [place for place in (picture if needs_picture else None, caption, short) if place is not None]
    ignored = [cell.strip() for place, cell in enumerate(cells) if place not in used]
    told = f"columns used: {', '.join(cells[place].strip() for place in used)}; ignored: {', '.join(ignored) or 'none'}"
    return Columns(picture, caption, short, told)


def _plain(cell: str) -> str:
    return cell.strip().lower().replace(" ", "_").replace("-", "_")


def _first(names: Sequence[str], known: Sequence[str]) -> int | None:
    return next((names.index(name) for name in known if name in names), None)
