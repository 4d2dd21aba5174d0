"""The sentences of a caption, found by rule."""

from __future__ import annotations

import re

__all__ = ["split_sentences"]

_CLOSING = "\"'”’»)\\]"
# The end of a sentence, unless its surroundings speak against it. Closing marks belong to their sentence. Chinese and
# Japanese put no space after a full stop, Hindi and Arabic have marks of their own.
_END = re.compile(rf"[.!?…؟।]+[{_CLOSING}]*\s+|[。！？｡]+[{_CLOSING}」』）】》]*\s*|\s*\n\s*")
_WITHIN = {"mr", "mrs", "ms", "dr", "prof", "st", "mt", "vs", "e.g", "i.e", "cf", "approx", "fig", "ca"}
_NUMBERED = {"no", "nos", "vol", "pg", "pp"}  # "No. 5", but "It says no. Then ..."
_UNITS = {"ft", "in", "cm", "mm", "m", "km", "kg", "lb", "lbs", "oz", "sq", "min", "sec", "hr", "hrs", "yd"}
_INITIAL = re.compile(r"(?:^|\b[A-Z][\w.'’-]*\s)[A-Z]$")  # "J. Smith", "John F. Kennedy", but "the letter U. You see"
_ASKED_IN_QUOTES = re.compile(r"[!?…][\"'”’»]+$")


def split_sentences(caption: str) -> list[str]:
    """Return the sentences of a caption, without the spaces around them; none for a blank caption.

    A sentence ends at a full stop, question mark, exclamation mark or ellipsis before a space, at their Chinese and
    Japanese forms with or without a space, and at a line break, so that each item of a list is one. A decimal number
    (3.5, $.25) has no space and so no end. A full stop does not end a sentence after a title or an abbreviation used
    within sentences (Dr., St., e.g., vs., No. 5), after the initial of a name (John F. Kennedy), or after the number of
    a list item. Before a small letter, it does not end one after dotted letters (4 p.m. in summer), after "etc.",
    "Inc.", "Jr." and similar, and after a unit that follows a number (6 ft. tall). In text with capitals, an ellipsis
    or a quoted question ("Why?" asks a sign) before a small letter does not end one either.
    """
    sentences, start = [], 0
    has_capitals = caption.lower() != caption
    for end in _END.finditer(caption):
        sentence = caption[start : end.end()].strip()
        if sentence and ("\n" in end.group() or _is_end(sentence, caption[end.end() : end.end() + 2], has_capitals)):
            sentences.append(sentence)
            start = end.end()
    last = caption[start:].strip()
    return [*sentences, last] if last else sentences


def _is_end(sentence: str, following: str, has_capitals: bool) -> bool:
    """Return whether `sentence`, which ends in a mark, is complete, given the first two characters after it."""
    if not following:
        return True
    goes_on = following[0].islower()
    if has_capitals and goes_on and (_ASKED_IN_QUOTES.search(sentence) or sentence.endswith(("...", "…"))):
        return False
    if not sentence.endswith("."):
        return True
    before = sentence.rstrip(".")
    words = before.split()
    word = words[-1].lower().lstrip("\"'“‘(") if words else ""
    if word in _WITHIN or before.isdecimal() or _INITIAL.search(before):
        return False
    if word in _NUMBERED and following[0].isdecimal():
        return False
    if re.search(r"\b[A-Z]$", before) and re.match(r"[A-Z]\.", following):  # "by J. R. Smith"
        return False
    is_open = word in {"etc", "inc", "jr", "sr", "co", "ltd"} or re.fullmatch(r"\w(\.\w)+", word)
    is_measure = word in _UNITS and len(words) > 1 and words[-2][-1].isdecimal()
    return not ((is_open or is_measure) and goes_on)
