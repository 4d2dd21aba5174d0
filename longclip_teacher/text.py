"""What happens to a caption before the text tower: CLIP's byte-pair tokens at 248 positions, truncation, trimming.

Token ids are open_clip's. A row is SOT, the caption's tokens, EOT, then zeros. EOT has the highest id, so `argmax`
finds it; zero is also a real token ("!"), so only EOT says where a caption ends.

Shapes: N captions, L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from longclip_teacher.errors import InputError

__all__ = [
    "CONTEXT_LENGTH",
    "EOT",
    "SOT",
    "VOCAB_SIZE",
    "CaptionTokenizer",
    "caption_lengths",
    "first_sentence",
    "length_buckets",
    "trim",
    "truncate",
]

CONTEXT_LENGTH = 248
VOCAB_SIZE = 49408
SOT, EOT = VOCAB_SIZE - 2, VOCAB_SIZE - 1
# Text that the tokenizer's clean-up (mojibake repair, HTML entities, control characters) leaves as it is
_PLAIN = re.compile(r"[\t\n\r !-%'-~]*")


class CaptionTokenizer:
    """Captions to token ids, the same as open_clip's `SimpleTokenizer` and more than ten times as fast on plain ASCII.

    It holds nothing but its context length, so pickling it for a DataLoader worker costs nothing.
    """

    def __init__(self, context_length: int = CONTEXT_LENGTH) -> None:
        self.context_length = context_length

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Int[Tensor, "N L"]:
        """Token ids as int64, padded with zeros to the context length; a caption that is too long keeps EOT."""
        texts = [texts] if isinstance(texts, str) else texts
        context_length = context_length or self.context_length
        if context_length < 2:
            raise InputError(
                f"a context of {context_length} tokens has no room for the start and end of a caption: give 2 or more"
            )
        rows = np.zeros((len(texts), context_length), dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            tokens = [SOT, *_encode(text)[: context_length - 2], EOT]
            row[: len(tokens)] = tokens
        return torch.from_numpy(rows)

    def count_tokens(self, text: str) -> int:
        """The caption's length in tokens with SOT and EOT, before any truncation."""
        return len(_encode(text)) + 2


def caption_lengths(tokens: Int[Tensor, "N L"]) -> Int[Tensor, " N"]:
    """Tokens of each caption up to and including EOT."""
    return tokens.argmax(dim=1) + 1


def trim(tokens: Int[Tensor, "N L"]) -> Int[Tensor, "N K"]:
    """Drop the columns in which every caption is padding. Exact for a causal text tower."""
    return tokens[:, : int(caption_lengths(tokens).max())] if len(tokens) else tokens


def truncate(tokens: Int[Tensor, "N L"], context_length: int) -> Int[Tensor, "N K"]:
    """At most `context_length` columns; a caption that is cut ends in EOT there. Tokens that fit stay."""
    if tokens.shape[1] <= context_length:
        return tokens
    is_cut = caption_lengths(tokens) > context_length
    kept = tokens[:, :context_length].clone()
    kept[:, -1] = torch.where(is_cut, tokens.amax(dim=1), kept[:, -1])  # EOT is a row's highest id
    return kept


def first_sentence(caption: str) -> str:
    """The short caption of a long one (Long-CLIP, section 4.1): all before the first full stop and space."""
    return caption.split(". ")[0]


def length_buckets(lengths: Sequence[int], *, smallest: int = 8, slack: float = 1.2) -> list[list[int]]:
    """Group captions of like length, longest first, so that a group padded to its longest wastes little.

    A group takes captions while they are at least 1 / `slack` as long as its longest, and never closes below `smallest`
    captions: tiny batches cost more than the padding they save. Gives row indices, each of `range(len(lengths))` once.
    """
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not buckets or (len(buckets[-1]) >= smallest and lengths[buckets[-1][0]] > slack * lengths[index]):
            buckets.append([])
        buckets[-1].append(index)
    return buckets


def _encode(text: str) -> list[int]:
    """Token ids of `text` without SOT and EOT.

    No token spans whitespace, so a plain text is the sum of its chunks between spaces; captions share most of them.
    """
    if not _PLAIN.fullmatch(text):
        return _simple_tokenizer().encode(text)
    return [token for chunk in text.split() for token in _encode_chunk(chunk)]


@lru_cache(maxsize=1 << 18)
def _encode_chunk(chunk: str) -> tuple[int, ...]:
    return tuple(_simple_tokenizer().encode(chunk))


@lru_cache(maxsize=1)
def _simple_tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()
