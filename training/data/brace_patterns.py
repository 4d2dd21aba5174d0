"""Braces in shard patterns, as in bash: {a,b}, {000..123}, {0..90..10}, nested. Their number is bounded before any name
is made, because braceexpand holds the names of a range in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from braceexpand import braceexpand

from longclip_teacher.errors import InputError

__all__ = ["MAX_NAMES", "expand_braces"]

MAX_NAMES = 1_000_000
"""Names of one pattern. The largest public data sets have some hundred thousand shards."""
_MAX_DEPTH = 20
_LONGEST = 4096  # characters of a pattern, as of a path
_NUMBERS = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?(\d{1,18}))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d{1,18}))?")
_ANY_RANGE = re.compile(r"-?\d+\.\.-?\d+(\.\.-?\d+)?")


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern stands for. Raise InputError for unbalanced braces and more than MAX_NAMES."""
    try:
        if len(pattern) > _LONGEST:
            raise ValueError(f"more than {_LONGEST} characters")
        if _num_names(pattern, 0) > MAX_NAMES:
            raise ValueError(f"its braces stand for more than {MAX_NAMES:,} names: narrow them or use *")
        return list(braceexpand(pattern))
    except ValueError as error:
        shown = pattern if len(pattern) <= 200 else f"{pattern[:200]}..."
        raise InputError(f"shards {shown!r}: {str(error).partition(': ' + repr(pattern))[0]}") from None


def _num_names(pattern: str, depth: int) -> int:
    """Return the product of the numbers of names of a pattern's top-level braces."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"braces nested more than {_MAX_DEPTH} deep")
    number = 1
    for inner in _top_level(pattern):
        number *= _num_in_braces(inner, depth)
    return number


def _num_in_braces(inner: str, depth: int) -> int:
    if found := _NUMBERS.fullmatch(inner):
        first, last, step = int(found[1]), int(found[2]), int(found[3] or 1) or 1
        return abs(last - first) // step + 1
    if found := _LETTERS.fullmatch(inner):
        return abs(ord(found[2]) - ord(found[1])) + 1
    if _ANY_RANGE.fullmatch(inner):
        return MAX_NAMES + 1  # numbers too long to count
    return sum(_num_names(part, depth + 1) for part in _parts(inner))


def _levels(text: str) -> Iterator[tuple[int, str, int]]:
    """Yield the place of each brace and comma that no backslash escapes, it, and the depth inside it or around it."""
    depth, place = 0, 0
    while place < len(text):
        character = text[place]
        if character in "{},":
            depth += {"{": 1, "}": -1}.get(character, 0)
            yield place, character, depth
        place += 2 if character == "\\" else 1


def _top_level(pattern: str) -> list[str]:
    """Return what the outermost braces hold. Unbalanced ones are braceexpand's to refuse."""
    found, start = [], 0
    for place, character, depth in _levels(pattern):
        if (character, depth) == ("{", 1):
            start = place + 1
        elif (character, depth) == ("}", 0):
            found.append(pattern[start:place])
    return found


def _parts(inner: str) -> list[str]:
    """Return the parts between the outermost commas."""
    cuts = [-1, *(place for place, character, depth in _levels(inner) if (character, depth) == (",", 0)), len(inner)]
    return [inner[start + 1 : stop] for start, stop in pairwise(cuts)]
