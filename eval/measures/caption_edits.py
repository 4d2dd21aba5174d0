"""Edits of captions that show what a model reads: sentences dropped, shuffled, counted, alone.

All are pure functions of strings. `split_sentences` finds sentences by rule. Joined sentences are one space apart.
"""

from __future__ import annotations

import random
import re

__all__ = ["drop_first_sentence", "first_sentences", "only_sentence", "shuffle_sentences", "split_sentences"]

# The end of a sentence, unless its surroundings speak against it. Closing marks belong to their sentence.
_END = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+|\s*\n\s*")
_WITHIN = {"mr", "mrs", "ms", "dr", "prof", "st", "mt", "vs", "e.g", "i.e", "cf", "approx", "fig", "ca"}
_NUMBERED = {"no", "nos", "vol", "pg", "pp"}  # "No. 5", but "It says no. Then ..."
_INITIAL = re.compile(r"(?:^|\b[A-Z][\w.'’-]*\s)[A-Z]$")  # "J. Smith", "John F. Kennedy", but "the letter U. You see"


def split_sentences(caption: str) -> list[str]:
    """Return the sentences of a caption, without the spaces around them; none for a blank caption.

    A sentence ends at a full stop, question mark, exclamation mark or ellipsis before a space, and at a line break. A
    decimal number (3.5, $.25) has no space and so no end. A full stop does not end a sentence after a title or an
    abbreviation used within sentences (Dr., St., e.g., vs., No. 5), after the initial of a name (John F. Kennedy), or
    after the number of a list item. In text with capitals, the same holds for dotted letters and "etc.", "Inc.", "Jr."
    and similar before a small letter (4 p.m. in summer).
    """
    sentences, start = [], 0
    for end in _END.finditer(caption):
        sentence = caption[start : end.end()].strip()
        if sentence and ("\n" in end.group() or _is_end(sentence, caption[end.end() : end.end() + 2])):
            sentences.append(sentence)
            start = end.end()
    last = caption[start:].strip()
    return [*sentences, last] if last else sentences


def drop_first_sentence(caption: str) -> str:
    """Return all but the first sentence. A caption of one sentence stays as it is."""
    sentences = split_sentences(caption)
    return " ".join(sentences[1:] or sentences)


def shuffle_sentences(caption: str, seed: int) -> str:
    """Return the sentences in a random order that depends only on caption and seed. All orders are equally likely."""
    sentences = split_sentences(caption)
    random.Random(f"{seed} {caption}").shuffle(sentences)
    return " ".join(sentences)


def first_sentences(caption: str, k: int) -> str:
    """Return the first `k` >= 1 sentences, or the full caption if it has fewer."""
    return " ".join(split_sentences(caption)[:k])


def only_sentence(caption: str, k: int) -> str | None:
    """Return sentence number `k`, from 1, or None if the caption has fewer."""
    sentences = split_sentences(caption)
    return sentences[k - 1] if k <= len(sentences) else None


def _is_end(sentence: str, following: str) -> bool:
    """Return whether `sentence`, which ends in a mark, is complete, given the first two characters after it."""
    if not sentence.endswith(".") or not following:
        return True
    before = sentence.rstrip(".")
    word = before.split()[-1].lower().lstrip("\"'“‘(") if before.split() else ""
    if word in _WITHIN or before.isdecimal() or _INITIAL.search(before):
        return False
    if word in _NUMBERED and following[0].isdecimal():
        return False
    if re.search(r"\b[A-Z]$", before) and re.match(r"[A-Z]\.", following):  # "by J. R. Smith"
        return False
    is_open = word in {"etc", "inc", "jr", "sr", "co", "ltd"} or re.fullmatch(r"\w(\.\w)+", word)
    return not (is_open and following[0].islower())
