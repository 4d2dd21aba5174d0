"""A JSON object read from front to back without holding it: its members, and the items of one of its lists, in turn.

The text comes in pieces. Held are a few of them, or as many as the longest single value takes.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Member", "file_pieces", "object_members"]

_PIECE_BYTES = 4 << 20
_LONGEST_STRING = 1 << 20  # characters; an error that lies further before the end of what was read is no lack of more
_CUT = 2  # characters of a number that may lie unread at the end of a piece: "1.5" is one before "e-3" is complete
_SPACE = re.compile(r"[ \t\n\r]*")
_VALUE = json.JSONDecoder()


class Member(NamedTuple):
    """A member of the object, or one item of the list of that name."""

    name: str
    value: Any
    offset: int
    """Where the value begins, in bytes."""
    num_bytes: int


def file_pieces(path: Path) -> Iterator[bytes]:
    """Yield the content of a file from front to back."""
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def object_members(pieces: Iterable[bytes], listed: str) -> Iterator[Member]:
    """Yield the members of a JSON object in UTF-8, and of its list `listed` each item by itself.

    Raise ValueError or RecursionError if it is no such object; the members before the error have been yielded then.
    """
    text = _Text(pieces)
    for _ in text.parts("{", "}"):
        name = text.value("").value
        text.take(":")
        if name != listed:
            yield text.value(name)
            continue
        for _ in text.parts("[", "]"):
            yield text.value(name)
    if text.next():
        raise ValueError("something follows its end")


class _Text:
    """A place in a text, of which the part that is being read is held."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._held, self._place = "", 0
        self._offset = 0  # of the place, in bytes

    def next(self) -> str:
        """Pass white space and return the character after it, "" at the end."""
        while True:
            space = _SPACE.match(self._held, self._place)
            self._advance(self._place if space is None else space.end())
            if self._place < len(self._held) or not self._read():
                return self._held[self._place : self._place + 1]

    def take(self, character: str) -> None:
        """Pass this character. Raise ValueError if another one is next."""
        if self.next() != character:
            raise ValueError(f"no {character} at byte {self._offset}")
        self._advance(self._place + 1)

    def parts(self, opening: str, closing: str) -> Iterator[None]:
        """Yield before each part of an object or list, of which the caller then passes one; pass all around them."""
        self.take(opening)
        if self.next() != closing:
            yield
            while self.next() != closing:
                self.take(",")
                yield
        self.take(closing)

    def value(self, name: str) -> Member:
        """Pass a value of any kind, and return it."""
        self.next()
        while True:
            try:
                value, end = _VALUE.raw_decode(self._held, self._place)
                if end + _CUT < len(self._held) or not self._read():
                    break
            except json.JSONDecodeError as error:
                if len(self._held) - error.pos > _LONGEST_STRING or not self._read():
                    raise
        start = self._offset
        self._advance(end)
        return Member(name, value, start, self._offset - start)

    def _advance(self, place: int) -> None:
        passed = self._held[self._place : place]
        self._offset += len(passed) if passed.isascii() else len(passed.encode("utf-8", "surrogatepass"))
        self._place = place

    def _read(self) -> bool:
        """Hold twice as much from the place on, or all that is left. Return whether there was more."""
        held, size = [self._held[self._place :]], 0
        for piece in self._pieces:
            held.append(self._decode(piece))
            size += len(held[-1])
            if size >= len(held[0]):
                break
        else:
            held.append(self._decode(b"", True))
        if size:
            self._held, self._place = "".join(held), 0
        return size > 0
