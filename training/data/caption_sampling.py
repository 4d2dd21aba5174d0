"""Captions made of some sentences of a longer one, and shifts of their positions (DeBias-CLIP, 2026).

Shapes: B captions, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from eval.base.sentences import split_sentences
from longclip_teacher.text import caption_lengths
from training.settings.captions import CaptionOptions

__all__ = ["padded_in_front", "sample_caption", "shifts"]


def sample_caption(caption: str, options: CaptionOptions, generator: np.random.Generator) -> str:
    """Return some sentences of `caption`, one space apart. A caption of one sentence stays as it is.

    The first sentence is left out with probability `options.drop_first`. A share of the others is kept, drawn uniformly
    from the range `options.keep` and rounded to a number of sentences; if nothing would remain, one of them is.
    """
    sentences = split_sentences(caption)
    if len(sentences) < 2:
        return caption
    drop, share = generator.random(2)  # all numbers are drawn whatever the options, so that one changes nothing else
    others, order = generator.permutation(len(sentences) - 1) + 1, generator.permutation(len(sentences))
    low, high = options.keep
    first = [] if drop < options.drop_first else [0]
    number = int((low + (high - low) * share) * len(others) + 0.5)
    kept = sorted([*first, *others[: max(number, 1 - len(first))].tolist()])
    if options.shuffle:
        kept = [index for index in order.tolist() if index in kept]
    return " ".join(sentences[index] for index in kept)


def shifts(
    tokens: Int[Tensor, "B L"], draws: Sequence[float], max_shift: int, context_length: int
) -> Int[Tensor, " B"]:
    """Return a shift for each caption, from 0 to `max_shift`, but never one that moves EOT past `context_length`.

    `draws` are numbers from 0 to 1 (1 excluded), which decide the shift uniformly.
    """
    room = (context_length - caption_lengths(tokens)).clamp(0, max_shift)
    drawn: Float[Tensor, " B"] = torch.tensor(draws, dtype=torch.float64)
    return (drawn * (room + 1)).long()


def padded_in_front(tokens: Int[Tensor, "B L"], shift: Int[Tensor, " B"]) -> Int[Tensor, "B K"]:
    """Return captions with `shift` padding tokens between SOT and the text, as wide as the longest needs.

    This is the shift of DeBias-CLIP: a causal tower attends to the padding, which is the token of "!".
    """
    lengths = caption_lengths(tokens) + shift
    padded = tokens.new_zeros(len(tokens), max(tokens.shape[1], int(lengths.max()))) if len(tokens) else tokens
    for row, source, moved, length in zip(padded, tokens, shift.tolist(), lengths.tolist(), strict=True):
        row[0] = source[0]
        row[1 + moved : length] = source[1 : length - moved]
    return padded
