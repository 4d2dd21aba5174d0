"""What happens to a caption before the text tower: CLIP's byte-pair tokens at 248 positions, truncation, trimming.

Token ids are open_clip's. A row is SOT, the caption's tokens, EOT, then zeros. EOT has the highest id, so `argmax`
finds it; zero is also a real token ("!"), so only EOT says where a caption ends.

Shapes: N captions, L tokens.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from copy import copy
from functools import lru_cache
from typing import TypeVar

import ftfy
import numpy as np
import torch
from ftfy.badness import is_bad
from ftfy.fixes import unescape_html
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
Value = TypeVar("Value")
# Within this file ids are bytes, 16 bits each: joining those of a caption's chunks makes no Python number of them
_ID_BYTES = 2
_SOT, _EOT = array("H", [SOT]).tobytes(), array("H", [EOT]).tobytes()
# Text that the tokenizer's clean-up (mojibake repair, HTML entities, control characters) leaves as it is
_PLAIN = re.compile(r"[\t\n\r !-%'-~]*")
# Characters whose repair may take several passes: such captions are left to SimpleTokenizer whole
_UNRULY = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_CONTEXT = 6  # characters either side of a non-ASCII one that ftfy's search for mojibake may look at
_LONGEST_SEGMENT = 100_000  # characters; ftfy cuts longer lines (at 1,000,000) wherever that falls
_LONGEST_MEMO = 64  # characters of a chunk that is remembered, so that the memo is bounded in bytes too
_MEMO_SIZE = 1 << 18


class CaptionTokenizer:
    """Captions to token ids, the same as open_clip's `SimpleTokenizer` and more than ten times as fast.

    No token spans a space, so a caption's ids are those of its chunks between spaces, and captions share most of them:
    each chunk is cleaned and encoded once. The clean-up looks across spaces only for mojibake; a caption that shows any
    goes to SimpleTokenizer whole, as all do with `fast=False`.

    It holds nothing but its two settings, so pickling it for a DataLoader worker costs nothing.
    """

    def __init__(self, context_length: int = CONTEXT_LENGTH, fast: bool = True) -> None:
        self.context_length, self.fast = context_length, fast

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Int[Tensor, "N L"]:
        """Token ids as int64, padded with zeros to the context length; a caption that is too long keeps EOT."""
        texts = [texts] if isinstance(texts, str) else texts
        context_length = context_length or self.context_length
        if context_length < 2:
            raise InputError(
                f"a context of {context_length} tokens has no room for the start and end of a caption: give 2 or more"
            )
        size = context_length * _ID_BYTES
        rows = [(_SOT + self._encode(text)[: size - 2 * _ID_BYTES] + _EOT).ljust(size, b"\0") for text in texts]
        tokens = np.frombuffer(b"".join(rows), dtype=np.uint16).astype(np.int64)
        return torch.from_numpy(tokens.reshape(len(rows), context_length))

    def count_tokens(self, text: str) -> int:
        """The caption's length in tokens with SOT and EOT, before any truncation."""
        return len(self._encode(text)) // _ID_BYTES + 2

    def _encode(self, text: str) -> bytes:
        """Token ids of `text` without SOT and EOT, 16 bits each."""
        ids = _encode_by_chunks(text) if self.fast else None
        return _ids(_simple_tokenizer(), text) if ids is None else ids


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


def _encode_by_chunks(text: str) -> bytes | None:
    """Ids of `text`, 16 bits each, chunk by chunk; None where the chunks' clean-up may not be the text's."""
    if _PLAIN.fullmatch(text):
        return b"".join(map(_CHUNK_IDS.__getitem__, text.lower().split()))
    if _UNRULY.search(text) or len(text) > _LONGEST_SEGMENT or ("&" in text and "<" in text):
        return None  # where "<" stands, ftfy takes entities for markup and keeps them
    lines = [line.split(" ") for line in text.split("\n")]  # ftfy repairs each line by itself, and so its other spaces
    if not all(map(_is_repaired_by_chunks, lines)):
        return None
    return b"".join([_CHUNK_IDS[chunk] for chunks in lines for chunk in chunks])


def _is_repaired_by_chunks(chunks: list[str]) -> bool:
    """Whether ftfy makes of a line what it makes of its chunks: all its fixes but one look at one chunk at a time.

    The one, mojibake repair, starts where `is_bad` finds something. ftfy asks it of the line with its entities decoded
    and of the line with everything fixed. What it finds is at most `_CONTEXT` + 1 characters with a non-ASCII one among
    them, so it is enough to ask it of their neighbourhoods.
    """
    odd = [index for index, chunk in enumerate(chunks) if not chunk.isascii() or "&" in chunk]
    decoded, fixed = chunks.copy(), chunks.copy()
    for index in odd:
        repair = _REPAIRS[chunks[index]]
        if repair is None:
            return False
        decoded[index], fixed[index] = repair
    return not _may_hold_mojibake(decoded, odd) and (decoded == fixed or not _may_hold_mojibake(fixed, odd))


def _may_hold_mojibake(chunks: list[str], odd: list[int]) -> bool:
    near = []
    for index in odd:
        if not chunks[index].isascii():  # a chunk has a space before it, if nothing else
            before = " ".join([*chunks[max(0, index - _CONTEXT) : index], ""])[-_CONTEXT:]
            after = " ".join(["", *chunks[index + 1 : index + 1 + _CONTEXT]])[:_CONTEXT] + "\n"  # which ends a line
            near.append(before + chunks[index] + after)
    return bool(near) and is_bad("".join(near))


class _Memo(dict[str, Value]):
    """What `compute` makes of a chunk; of a short one, once. Forgets all when full: the common ones are soon back."""

    def __init__(self, compute: Callable[[str], Value], size: int) -> None:
        super().__init__()
        self.compute, self.size = compute, size

    def __missing__(self, chunk: str) -> Value:
        value = self.compute(chunk)
        if len(chunk) <= _LONGEST_MEMO:
            if len(self) >= self.size:
                self.clear()
            self[chunk] = value
        return value


def _repair(chunk: str) -> tuple[str, str] | None:
    """The two states of a chunk that ftfy searches for mojibake: its entities decoded, and everything fixed.

    None where a state holds some, or where ftfy may go through more than these two.
    """
    decoded = unescape_html(chunk)
    fixed = ftfy.fix_text(decoded, unescape_html=False, fix_encoding=False)
    settled = unescape_html(fixed) == fixed and not is_bad(decoded) and not is_bad(fixed)
    return (decoded, fixed) if settled and not _UNRULY.search(decoded) else None


def _encode_chunk(chunk: str) -> bytes:
    if not _PLAIN.fullmatch(chunk):
        return _ids(_simple_tokenizer(), chunk)
    return b"".join(map(_WORD_IDS.__getitem__, _lowering_tokenizer().pat.findall(chunk.lower())))


def _encode_word(word: str) -> bytes:
    return _ids(_lowering_tokenizer(), word)


def _ids(tokenizer: SimpleTokenizer, text: str) -> bytes:
    """Its ids, 16 bits each."""
    ids = tokenizer.encode(text)
    if len(tokenizer.cache) > _MEMO_SIZE:  # it never forgets a word by itself
        tokenizer.cache = {tokenizer.decoder[index]: tokenizer.decoder[index] for index in tokenizer.all_special_ids}
    return array("H", ids).tobytes()


@lru_cache(maxsize=1)
def _simple_tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


@lru_cache(maxsize=1)
def _lowering_tokenizer() -> SimpleTokenizer:
    """The same without the clean-up, of which plain text needs only the lower case."""
    tokenizer = copy(_simple_tokenizer())
    tokenizer.clean_fn = str.lower
    return tokenizer


_WORD_IDS = _Memo(_encode_word, _MEMO_SIZE)  # of a plain chunk: "dog" and "," of "Dog,"
_CHUNK_IDS = _Memo(_encode_chunk, _MEMO_SIZE)
_REPAIRS = _Memo(_repair, _MEMO_SIZE // 8)
