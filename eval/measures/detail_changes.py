"""One detail of a caption changed by rule, so that the caption becomes false: a colour, a number or a place.

The rules are for English. They pass over words that often mean something else: "orange" the fruit, "one of them",
"he left", "a blue top".
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["DETAILS", "Changed", "changed_caption"]

_COLOURS = ("black", "white", "red", "green", "blue", "yellow", "purple", "pink", "brown", "grey")
_SAME = {"gray": "grey"}
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = tuple(str(number) for number in range(2, 11))
_OPPOSITES = (
    *(("left", "right"), ("top", "bottom"), ("upper", "lower"), ("above", "below"), ("foreground", "background")),
    *(("in front of", "behind"), ("inside", "outside"), ("leftmost", "rightmost")),
)
_SIDES = "left|right|top|bottom"
_PARTS = "side|hand|corner|half|edge|part|portion|third|end|centre|center|middle|foreground|background"
_OF_WHAT = "the|its|their|his|her|far|upper|lower|top|bottom|middle|centre|center"
_OTHERS = "|".join(word.replace(" ", r"\s+") for pair in _OPPOSITES for word in pair if word not in _SIDES.split("|"))
# a side counts as a place after a word of _OF_WHAT or before another side or one of _PARTS; the other words always do
_PLACE = re.compile(
    rf"\b(?P<of>(?:{_OF_WHAT})[ -])?(?P<detail>(?P<side>{_SIDES})|{_OTHERS})\b"
    rf"(?(side)(?(of)|(?=[ -](?:{_SIDES}|{_PARTS})\b)))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Changed:
    """A false caption made from a true one."""

    text: str
    place: int
    """The number of characters of the true caption up to the end of the detail."""


def changed_caption(caption: str, kind: str, seed: int = 0) -> Changed | None:
    """Return the caption with one detail of the `kind` changed, one of `DETAILS`; None if the rule finds none.

    Where the detail stands and what it becomes are drawn from the seed and the caption alone. A colour or number that
    the caption names elsewhere is not put in its place, since the new caption could then be true.
    """
    pattern, replacements = _RULES[kind]
    found = list(pattern.finditer(caption))
    generator = random.Random(f"{kind} {seed} {caption}")
    generator.shuffle(found)
    named = {_plain(match["detail"]) for match in found}
    for match in found:
        others = [word for word in replacements(_plain(match["detail"])) if word not in named or kind == "place"]
        if others:
            start, end = match.span("detail")
            word = _cased(generator.choice(others), match["detail"])
            return Changed(caption[:start] + word + caption[end:], end)
    return None


def _plain(word: str) -> str:
    word = " ".join(word.lower().split())
    return _SAME.get(word, word)


def _cased(word: str, like: str) -> str:
    if len(like) > 1 and like.isupper():
        return word.upper()
    return word[0].upper() + word[1:] if like[0].isupper() else word


def _any_of(words: tuple[str, ...]) -> re.Pattern[str]:
    # not part of a decimal, a date or a time, nor of a compound number
    return re.compile(rf"(?<![\w.,:/-])(?P<detail>{'|'.join(words)})(?![\w%°]|[.,:/-]\d)", re.IGNORECASE)


def _other_numbers(word: str) -> list[str]:
    return [other for other in (_DIGITS if word in _DIGITS else _NUMBERS) if other != word]


def _opposite(word: str) -> list[str]:
    return [b if word == a else a for a, b in _OPPOSITES if word in (a, b)]


_RULES: dict[str, tuple[re.Pattern[str], Callable[[str], list[str]]]] = {
    "colour": (_any_of((*_COLOURS, *_SAME)), lambda word: [other for other in _COLOURS if other != word]),
    "number": (_any_of((*_NUMBERS, *_DIGITS)), _other_numbers),
    "place": (_PLACE, _opposite),
}
DETAILS = tuple(_RULES)
"""The kinds of details that a rule can change."""
