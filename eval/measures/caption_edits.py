"""Edits of captions that show what a model reads: sentences dropped, shuffled, counted, alone.

All are pure functions of strings. Joined sentences are one space apart.
"""

from __future__ import annotations

import random

from eval.base.sentences import split_sentences

__all__ = ["drop_first_sentence", "first_sentences", "only_sentence", "shuffle_sentences"]


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
