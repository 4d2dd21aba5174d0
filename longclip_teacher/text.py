"""From captions to the text tower's input: CLIP's byte-pair tokens at 248 positions, truncation, trimming.

Token ids are open_clip's. A row is SOT, the caption's tokens, EOT, then zeros. EOT has the highest id, so `argmax`
finds it; zero is also a real token ("!"), so only EOT marks the end of a caption.

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
from torch import Tensor

from longclip_teacher.errors import InputError
from longclip_teacher.open_clip_parts import SimpleTokenizer

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
    "with_end",
]

CONTEXT_LENGTH = 248
VOCAB_SIZE = 49408
SOT, EOT = VOCAB_SIZE - 2, VOCAB_SIZE - 1
Value = TypeVar("Value")
# Within this file ids are bytes, 16 bits each: joining the ids of chunks then creates no Python numbers
_ID_BYTES = 2
_SOT, _EOT = array("H", [SOT]).tobytes(), array("H", [EOT]).tobytes()
# Text that the tokenizer's clean-up (mojibake repair, HTML entities, control characters) does not change
_PLAIN = re.compile(r"[\t\n\r !-%'-~]*")
# Characters whose repair may take several passes: SimpleTokenizer gets such captions whole
_UNRULY = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_CONTEXT = 6  # characters on either side of a non-ASCII one that ftfy's search for mojibake may look at
_LONGEST_SEGMENT = 100_000  # characters; ftfy cuts longer lines (at 1,000,000) at any character
_LONGEST_MEMO = 64  # characters; longer chunks are not remembered, which bounds the memo in bytes
_MEMO_SIZE = 1 << 18


class CaptionTokenizer:
    """Captions to token ids, the same as open_clip's `SimpleTokenizer` and more than ten times as fast.

    No token spans a space, so a caption's ids are those of its chunks between spaces. Captions share most chunks, and
    each chunk is cleaned and encoded once. The clean-up looks across spaces only for mojibake: a caption that shows any
    goes to SimpleTokenizer whole, as every caption does with `fast=False`.

    The object holds only its two settings, so pickling it for a DataLoader worker costs nothing.
    """

    def __init__(self, context_length: int = CONTEXT_LENGTH, fast: bool = True) -> None:
        self.context_length, self.fast = context_length, fast

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Int[Tensor, "N L"]:
        """Token ids as int64, padded with zeros to the context length; a caption that is too long keeps EOT."""
        texts = [texts] if isinstance(texts, str) else texts
        context_length = context_length or self.context_length
        if context_length < 2:
            raise InputError(
                f"context_length {context_length} leaves no room for the start and end of a caption: give 2 or more"
            )
        size = context_length * _ID_BYTES
        rows = [(_SOT + self._encode(text)[: size - 2 * _ID_BYTES] + _EOT).ljust(size, b"\0") for text in texts]
        tokens = np.frombuffer(b"".join(rows), dtype=np.uint16).astype(np.int64)
        return torch.from_numpy(tokens.reshape(len(rows), context_length))

    def count_tokens(self, text: str) -> int:
        """The caption's length in tokens, SOT and EOT included, before any truncation."""
        return len(self._encode(text)) // _ID_BYTES + 2

    def _encode(self, text: str) -> bytes:
        """Token ids of `text` without SOT and EOT, 16 bits each."""
        ids = _encode_by_chunks(text) if self.fast else None
        return _ids(_simple_tokenizer(), text) if ids is None else ids


def caption_lengths(tokens: Int[Tensor, "N L"]) -> Int[Tensor, " N"]:
    """Number of tokens of each caption, up to and including EOT."""
    return tokens.argmax(dim=1) + 1


def trim(tokens: Int[Tensor, "N L"]) -> Int[Tensor, "N K"]:
    """Drop the columns in which every caption is padding. Exact for a causal text tower. Tokens on a GPU are waited
    for."""
    return tokens[:, : int(caption_lengths(tokens).cpu().numpy().max())] if len(tokens) else tokens


def truncate(tokens: Int[Tensor, "N L"], context_length: int) -> Int[Tensor, "N K"]:
    """Cut to at most `context_length` columns; a caption that is cut ends in EOT. Tokens that fit stay as they are."""
    if tokens.shape[1] <= context_length:
        return tokens
    is_cut = caption_lengths(tokens) > context_length
    kept = tokens[:, :context_length].clone()
    kept[:, -1] = torch.where(is_cut, tokens.amax(dim=1), kept[:, -1])  # EOT is a row's highest id
    return kept


def with_end(tokens: Int[Tensor, "N L"]) -> Int[Tensor, "N L"]:
    """The captions, with EOT in the last place of those that have none: some tokenizers cut it off. No value decides a
    shape, so that the function can be exported; nor is a place cut off, which torch.export forbids in two tokens."""
    has_end = (tokens == EOT).any(dim=1, keepdim=True)
    is_last = torch.arange(tokens.shape[1], device=tokens.device) == tokens.shape[1] - 1
    return tokens.masked_fill(torch.logical_and(is_last, ~has_end), EOT)


def first_sentence(caption: str) -> str:
    """The short caption of a long one (Long-CLIP, section 4.1): the text before the first full stop and space."""
    return caption.split(". ")[0]


def length_buckets(lengths: Sequence[int], *, smallest: int = 8, slack: float = 1.2) -> list[list[int]]:
    """Group captions of similar length, longest first, so that padding a group to its longest wastes little.

    A group takes captions that are at least 1 / `slack` as long as its longest, and it never closes below `smallest`
    captions: tiny batches cost more than the padding they save. Returns row indices, each of `range(len(lengths))`
    once.
    """
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not buckets or (len(buckets[-1]) >= smallest and lengths[buckets[-1][0]] > slack * lengths[index]):
            buckets.append([])
        buckets[-1].append(index)
    return buckets


def _encode_by_chunks(text: str) -> bytes | None:
    """Ids of `text`, 16 bits each, made chunk by chunk; None if cleaning it in chunks may give another text."""
    if _PLAIN.fullmatch(text):
        return b"".join(map(_CHUNK_IDS.__getitem__, text.lower().split()))
    if _UNRULY.search(text) or len(text) > _LONGEST_SEGMENT or ("&" in text and "<" in text):
        return None  # beside "<", ftfy takes entities for markup and keeps them
    lines = [line.split(" ") for line in text.split("\n")]  # ftfy repairs each line on its own
    if not all(map(_is_repaired_by_chunks, lines)):
        return None
    return b"".join([_CHUNK_IDS[chunk] for chunks in lines for chunk in chunks])


def _is_repaired_by_chunks(chunks: list[str]) -> bool:
    """Whether ftfy's repair of a line equals the repair of its chunks. All fixes but one work within a chunk.

    The exception, mojibake repair, starts where `is_bad` finds something. ftfy calls it on the line with its entities
    decoded and on the line with everything fixed. A match is at most `_CONTEXT` + 1 characters long and contains a
    non-ASCII one, so checking the neighbourhoods of those is enough.
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
        if not chunks[index].isascii():  # at least a space stands before a chunk
            before = " ".join([*chunks[max(0, index - _CONTEXT) : index], ""])[-_CONTEXT:]
            after = (
                " ".join(["", *chunks[index + 1 : index + 1 + _CONTEXT]])[:_CONTEXT] + "\n"
            )  # the line break ends a line
            near.append(before + chunks[index] + after)
    return bool(near) and is_bad("".join(near))


class _Memo(dict[str, Value]):
    """Remembers `compute(chunk)` for short chunks. When full it forgets everything; common chunks soon return."""

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

    None if one of them contains mojibake, or if ftfy may go through more than these two.
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
    """The ids that `tokenizer` gives `text`, 16 bits each."""
    ids = tokenizer.encode(text)
    if len(tokenizer.cache) > _MEMO_SIZE:  # its cache would grow without limit
        tokenizer.cache = {tokenizer.decoder[index]: tokenizer.decoder[index] for index in tokenizer.all_special_ids}
    return array("H", ids).tobytes()


@lru_cache(maxsize=1)
def _simple_tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


@lru_cache(maxsize=1)
def _lowering_tokenizer() -> SimpleTokenizer:
    """The same tokenizer without the clean-up: plain text only needs lower case."""
    tokenizer = copy(_simple_tokenizer())
    tokenizer.clean_fn = str.lower
    return tokenizer


_WORD_IDS = _Memo(_encode_word, _MEMO_SIZE)  # ids of the words in a plain chunk: "dog" and "," in "Dog,"
_CHUNK_IDS = _Memo(_encode_chunk, _MEMO_SIZE)
_REPAIRS = _Memo(_repair, _MEMO_SIZE // 8)
