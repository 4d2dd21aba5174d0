"""Text towers that read a known part of a caption, and captions that only a reader of the right part can tell apart."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from eval.measures.retrieval_set import EncodedSet
from eval.towers.features import encode_captions
from longclip_teacher.text import CaptionTokenizer

__all__ = ["KnownReader", "encoded_by", "families", "first_sentence", "first_tokens", "whole_caption"]

# one CLIP token each, and none of them in the text that is put in front of captions
WORDS = tuple(
    word
    for line in (
        "cat dog bird horse fish bear lion wolf duck frog apple bread cheese onion pepper sugar lemon grape peach",
        "berry table chair lamp clock mirror carpet window door stairs garden river lake hill forest beach island",
        "bridge tower street market boat train plane truck bike hat coat shoe glove scarf",
    )
    for word in line.split()
)
_FULL_STOP = 269
_WIDTH = 256

Reads = Callable[[Tensor], Tensor]
"""[B,L] token ids -> [B,L] whether a token is read."""


def whole_caption(tokens: Tensor) -> Tensor:
    """Every token is read, in no order: a bag of words."""
    return torch.ones_like(tokens, dtype=torch.bool)


def first_sentence(tokens: Tensor) -> Tensor:
    """The tokens up to the first full stop are read."""
    return (tokens == _FULL_STOP).int().cumsum(dim=1) == 0


def first_tokens(number: int) -> Reads:
    """The first tokens are read, the start included."""
    return lambda tokens: (torch.arange(tokens.shape[1]) < number).expand_as(tokens)


class KnownReader(nn.Module):
    """A text tower that adds up the vectors of the words that it reads; other words than WORDS have none."""

    embed_dim = _WIDTH

    def __init__(self, reads: Reads, context_length: int = 248) -> None:
        super().__init__()
        self.reads, self.context_length = reads, context_length
        self.tokenizer = CaptionTokenizer(context_length)
        ids = self.tokenizer(" ".join(WORDS), len(WORDS) + 2)[0, 1:-1]
        assert len(set(ids.tolist())) == len(WORDS)
        self.words = nn.Embedding(49408, _WIDTH)
        nn.init.zeros_(self.words.weight)
        self.words.weight.data[ids] = torch.randn(len(WORDS), _WIDTH, generator=torch.Generator().manual_seed(0))

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        return (self.words(tokens) * self.reads(tokens)[..., None]).sum(dim=1)


def families(num_families: int, num_words: int = 120, seed: int = 0) -> list[str]:
    """Pairs of captions, in sentences of ten words, that differ in one word, which stands anywhere."""
    generator = random.Random(seed)
    captions = []
    for number in range(num_families):
        words = [generator.choice(WORDS) for _ in range(num_words)]
        other = list(words)
        place = number * num_words // num_families
        other[place] = generator.choice([word for word in WORDS if word != words[place]])
        for member in (words, other):
            sentences = [" ".join(member[start : start + 10]).capitalize() for start in range(0, num_words, 10)]
            captions.append(". ".join(sentences) + ".")
    return captions


def encoded_by(model: KnownReader, captions: list[str], owner: list[int] | None = None) -> EncodedSet:
    """A set whose pictures look to the model exactly as their first caption reads to it."""
    owner = list(range(len(captions))) if owner is None else owner
    texts, num_truncated = encode_captions(model, captions)
    pictures = torch.stack([texts[owner.index(picture)] for picture in range(max(owner) + 1)])
    names = [Path(f"{picture}.png") for picture in range(len(pictures))]
    return EncodedSet(names, captions, pictures, texts, torch.tensor(owner), num_truncated, [])
