"""ShareGPT4V's rows: a picture and a conversation, whose first answer is the picture's caption.

Many data sets have this layout. Rows 0 to 999 of ShareGPT4V's own file are the test sharegpt4v_1k (Zhang et al. 2024,
Long-CLIP, section 4); training leaves them out of that file, and of no other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from eval.benchmarks.annotation_files import first_json_rows, one_line

__all__ = [
    "SHAREGPT4V_JSON",
    "SHAREGPT4V_TEST_ROWS",
    "ConversationRow",
    "conversation_rows",
    "count_conversations",
    "held_out_rows",
]

SHAREGPT4V_JSON = "share-captioner_coco_lcs_sam_1246k_1107.json"
SHAREGPT4V_TEST_ROWS = 1000
_MANY_ROWS = 1_000_000  # no other file of this layout has more; ShareGPT4V's has 1.2 million
_LEAST_ROW_BYTES = 64  # no row is shorter, so a small file need not be counted
_ANSWERS = ("gpt", "assistant")
_CHUNK = 1 << 24  # bytes read at a time


class ConversationRow(NamedTuple):
    """One row. It may lack its picture, its caption, or both."""

    number: int
    """Place in the file, from 0."""
    image: Any
    """The picture's path as the file writes it, unchecked (see `inside_root`); None if there is none."""
    caption: str | None
    """The first answer, line breaks as spaces, possibly empty; None if there is none."""


def conversation_rows(path: Path, start: int = 0, stop: int = sys.maxsize) -> Iterator[ConversationRow]:
    """Yield the rows `start` to `stop` - 1 of a JSON array of conversations. Raise InputError if it is no JSON array.

    A turn is {"from": "gpt", "value": ...} or {"role": "assistant", "content": ...}. If no turn of a row says who
    speaks, the second is the answer.
    """
    for number, row in islice(enumerate(first_json_rows(path, stop)), start, None):
        content = row if isinstance(row, dict) else {}
        yield ConversationRow(number, _image(content), _caption(content))


def held_out_rows(path: Path) -> int:
    """Return how many rows at the start of the file are a test: 1000 for ShareGPT4V's own file, 0 for any other.

    Its own file has its published name, or more than a million rows.
    """
    is_own = path.name == SHAREGPT4V_JSON or (
        path.is_file()
        and path.stat().st_size > _MANY_ROWS * _LEAST_ROW_BYTES
        and count_conversations(path) > _MANY_ROWS
    )
    return SHAREGPT4V_TEST_ROWS if is_own else 0


def count_conversations(path: Path) -> int:
    """Return the approximate number of rows, counted in the raw bytes: that takes a second, parsing takes minutes."""
    with path.open("rb") as file:
        return sum(chunk.count(b'"conversations"') for chunk in iter(lambda: file.read(_CHUNK), b""))


def _image(row: dict[str, Any]) -> Any:
    image = row.get("image")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    return None if image == [] else image


def _caption(row: dict[str, Any]) -> str | None:
    turns = row.get("conversations") or row.get("messages")
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    speakers = [str(turn.get("from") or turn.get("role") or "").lower() for turn in turns]
    if any(speakers):
        answers = [turn for turn, speaker in zip(turns, speakers, strict=True) if speaker in _ANSWERS]
    else:
        answers = turns[1:]
    return _text(answers[0]) if answers else None


def _text(turn: dict[str, Any]) -> str | None:
    text = turn.get("value") if turn.get("value") is not None else turn.get("content")
    if isinstance(text, list):  # parts: [{"type": "text", "text": ...}]
        parts = [part.get("text") for part in text if isinstance(part, dict)]
        text = " ".join(part for part in parts if isinstance(part, str))
    return one_line(text) if isinstance(text, str) else None
