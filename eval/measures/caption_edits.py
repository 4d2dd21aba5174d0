"""Edits of captions that show what a model reads: sentences removed, moved or added, words left out.

Every edit is a pure function of strings. What is random is drawn from the seed and the caption alone, so that a caption
is edited alike in every model, run and process. A function returns None for a caption that it does not apply to, such
as one of a single sentence. Joined sentences are one space apart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

from eval.base.sentences import split_sentences

__all__ = [
    "EDITS",
    "FILLER",
    "Edit",
    "drop_words",
    "first_sentences",
    "only_sentence",
    "put_in_front",
    "remove_first_sentence",
    "remove_random_sentence",
    "shuffle_sentences",
    "swap_first_and_fourth",
]

_DRAWN_SEEDS = (0, 1, 2)  # the figures of a random edit are means over these
_SWAPPED_WITH = 4
# Chinese and Japanese put no spaces between words: there, a character and the marks after it are a word
_CHARACTER = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uff66-\uff9f"
_WORD = re.compile(rf"(?:[{_CHARACTER}][^\w\s]*|[^\s{_CHARACTER}]+)\s*")

# The Declaration of Independence (1776), shortened: people wrote it, and it says nothing that a picture shows
_OPENING = (
    "When in the Course of human events, it becomes necessary for one people to dissolve the political bands which "
    "have connected them"
)
_POWERS = (
    "and to assume among the powers of the earth, the separate and equal station to which the Laws of Nature and of "
    "Nature's God entitle them,"
)
_CAUSES = (
    "a decent respect to the opinions of mankind requires that they should declare the causes which impel them to the "
    "separation."
)
_TRUTHS = (
    "We hold these truths to be self-evident that all men are created equal, that they are endowed by their Creator "
    "with certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness, that to secure "
    "these rights"
)
_GOVERNMENTS = "Governments are instituted among Men, deriving their just powers from the consent of the governed."
FILLER = {
    25: f"{_OPENING}.",
    50: f"{_OPENING} with another, {_CAUSES}",
    100: f"{_OPENING} with another, {_CAUSES} {_TRUTHS}.",
    150: f"{_OPENING} with another, {_POWERS} {_CAUSES} {_TRUTHS}, {_GOVERNMENTS}",
}
"""Text to put in front of a caption, by its length in CLIP tokens, start and end not counted."""


@dataclass(frozen=True)
class Edit:
    """An edit as a row of the report."""

    name: str
    """Its key in the JSON."""
    title: str
    apply: Callable[[str, int], str | None]
    """(caption, seed) -> the edited caption, or None if the edit does not apply."""
    seeds: tuple[int, ...] = (0,)
    """The seeds over which its figures are means."""


def remove_first_sentence(caption: str) -> str | None:
    """Return all but the first sentence; None for fewer than two."""
    sentences = _sentences(caption)
    return " ".join(sentences[1:]) if len(sentences) > 1 else None


def remove_random_sentence(caption: str, seed: int) -> str | None:
    """Return all sentences but one, and each of them, the first included, is as likely to go; None for fewer than
    two."""
    sentences = list(_sentences(caption))
    if len(sentences) < 2:
        return None
    del sentences[_generator("remove", seed, caption).randrange(len(sentences))]
    return " ".join(sentences)


def swap_first_and_fourth(caption: str) -> str | None:
    """Return the sentences with the first and the fourth in each other's place; None for fewer than four."""
    sentences = list(_sentences(caption))
    if len(sentences) < _SWAPPED_WITH:
        return None
    fourth = _SWAPPED_WITH - 1
    sentences[0], sentences[fourth] = sentences[fourth], sentences[0]
    return " ".join(sentences)


def shuffle_sentences(caption: str, seed: int) -> str | None:
    """Return the sentences in a random order, and all orders, that of the caption included, are equally likely; None
    for fewer than two."""
    sentences = list(_sentences(caption))
    if len(sentences) < 2:
        return None
    _generator("shuffle", seed, caption).shuffle(sentences)
    return " ".join(sentences)


def put_in_front(caption: str, num_tokens: int) -> str | None:
    """Return the caption behind the `FILLER` of `num_tokens` tokens; None for a blank caption."""
    return f"{FILLER[num_tokens]} {caption}" if caption.strip() else None


def drop_words(caption: str, seed: int, *, percent: int) -> str | None:
    """Return the caption without `percent` of its words, rounded to whole words; one word at least remains.

    The words that go at 10% also go at 20%. None if no word goes.
    """
    words = _WORD.findall(caption)
    num_dropped = min((percent * len(words) + 50) // 100, len(words) - 1)
    if num_dropped < 1:
        return None
    dropped = set(_generator("words", seed, caption).sample(range(len(words)), len(words))[:num_dropped])
    return "".join(word for index, word in enumerate(words) if index not in dropped).strip()


def first_sentences(caption: str, k: int) -> str:
    """Return the first `k` >= 1 sentences, or the full caption if it has fewer."""
    return " ".join(_sentences(caption)[:k])


def only_sentence(caption: str, k: int) -> str | None:
    """Return sentence number `k`, from 1, or None if the caption has fewer."""
    sentences = _sentences(caption)
    return sentences[k - 1] if k <= len(sentences) else None


@lru_cache(maxsize=1 << 16)
def _sentences(caption: str) -> tuple[str, ...]:
    return tuple(split_sentences(caption))  # every edit asks for those of every caption


def _generator(what: str, seed: int, caption: str) -> random.Random:
    return random.Random(
        f"{what} {seed} {caption}"
    )  # a text, unlike Python's hash of it, gives the same numbers always


def _seedless(edit: Callable[[str], str | None]) -> Callable[[str, int], str | None]:
    return lambda caption, _: edit(caption)


EDITS = (
    Edit("first_removed", "first sentence removed", _seedless(remove_first_sentence)),
    Edit("random_removed", "a random sentence removed", remove_random_sentence, _DRAWN_SEEDS),
    Edit("swapped", "first and fourth sentences swapped", _seedless(swap_first_and_fourth)),
    Edit("shuffled", "sentences shuffled", shuffle_sentences, _DRAWN_SEEDS),
    *(
        Edit(f"filler_{n}", f"filler of {n} tokens in front", _seedless(partial(put_in_front, num_tokens=n)))
        for n in FILLER
    ),
    *(
        Edit(f"words_{n}", f"{n}% of the words missing", partial(drop_words, percent=n))
        for n in (10, 20, 30, 40, 50)
    ),
    *(
        Edit(f"first_{k}", f"the first {k} sentences" if k > 1 else "the first sentence alone",
             _seedless(partial(first_sentences, k=k)))
        for k in (1, 2, 3, 5)
    ),
)  # fmt: skip
"""The edits of the report, in its order."""
