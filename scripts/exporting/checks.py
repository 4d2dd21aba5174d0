"""What an exported file must give before it is kept: the features of the model, by its runtime, at every size.

Shapes: B images or captions, R image side, L tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exporting.runtimes import Encoder, runtime_encoder
from exporting.sources import Exported
from longclip_teacher.errors import InputError
from longclip_teacher.text import EOT, SOT, VOCAB_SIZE

__all__ = [
    "ANY",
    "FULL",
    "HALF",
    "Agreement",
    "Bounds",
    "Written",
    "check_file",
    "compare_images",
    "compare_texts",
    "compare_tower",
]

BATCHES = (1, 2, 5)
_WORD = 320  # any id but EOT's


@dataclass(frozen=True)
class Bounds:
    """How far an exported file may be from the model."""

    cosine: float
    """least cosine of a feature with the model's"""
    difference: float
    """largest difference of an entry of a feature"""


FULL, HALF = Bounds(0.99999, 1e-4), Bounds(0.999, float("inf"))
ANY = Bounds(-1, float("inf"))
"""Of int8, which R@1 judges: features of unit norm at every size."""


@dataclass
class Agreement:
    """The worst that was found over all features compared."""

    cosine: float = 1.0
    difference: float = 0.0

    @classmethod
    def of(cls, ours: Tensor, theirs: Tensor, what: str) -> Agreement:
        """That of one set of features."""
        found = cls()
        found.add(ours, theirs, what)
        return found

    def add(self, ours: Tensor, theirs: Tensor, what: str) -> None:
        """Take in features [B, D] and those of the model; raise InputError if they are not features of unit norm."""
        if ours.shape != theirs.shape or ours.dtype != torch.float32 or not ours.isfinite().all():
            raise InputError(f"{what} gives {tuple(ours.shape)} {ours.dtype} instead of {tuple(theirs.shape)}, finite")
        if (norm := float((ours.double().norm(dim=1) - 1).abs().max())) > 1e-5:
            raise InputError(f"{what} gives features whose norm is {norm:.1e} off 1")
        cosines = torch.nn.functional.cosine_similarity(ours.double(), theirs.double())
        self.cosine = min(self.cosine, float(cosines.min()))
        self.difference = max(self.difference, float((ours - theirs).abs().max()))

    def hold(self, bounds: Bounds, what: str) -> None:
        """Raise InputError if the agreement is not within `bounds`."""
        if self.cosine < bounds.cosine or self.difference > bounds.difference:
            raise InputError(
                f"{what} differs from the model: cosine {self.cosine:.6f} (at least {bounds.cosine}), largest "
                f"difference {self.difference:.1e} (at most {bounds.difference}); nothing was written"
            )


@dataclass(frozen=True)
class Written:
    """A file of the folder that was checked."""

    name: str
    """Relative to the folder."""
    tower: str
    """image or text"""
    agreement: Agreement
    r1: str = ""
    """R@1 of both towers of this kind, if it was measured."""
    form: str = ""
    """Which parts are int8, if some are."""


def check_file(model: Exported, tower: str, path: Path, bounds: Bounds) -> Agreement:
    """`compare_tower` for a file, computed by its runtime."""
    return compare_tower(model, tower, runtime_encoder(path), path.name, bounds)


def compare_tower(model: Exported, tower: str, encode: Encoder, name: str, bounds: Bounds) -> Agreement:
    """Compare a function in the place of a tower (image or text) with the model. Raise InputError, which calls it
    `name`, if they differ by more than `bounds`."""
    compare = compare_images if tower == "image" else compare_texts
    return compare(model, encode, name, bounds)


def compare_images(model: Exported, encode: Encoder, name: str, bounds: Bounds) -> Agreement:
    """Compare at each batch size on random pictures, one of them black and one white."""
    found = Agreement()
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    for batch in BATCHES:
        pictures = torch.rand(batch, 3, model.image_size, model.image_size, generator=generator)
        pictures[1:2], pictures[2:3] = 0, 1
        pixels = (pictures - mean) / std
        found.add(encode(pixels), model.encode_image(pixels), name)
    found.hold(bounds, name)
    return found


def compare_texts(model: Exported, encode: Encoder, name: str, bounds: Bounds) -> Agreement:
    """Compare at every length from 2 to the context, and at each batch size, with captions that are padded with EOT,
    with zeros, and not at all, and with captions whose EOT is cut off."""
    found = Agreement()
    for tokens, lengths in _captions(model.context_length):
        width = tokens.shape[1]
        expected = model.encode_text(tokens)
        found.add(encode(tokens), expected, name)
        for pad in (EOT, 0):
            is_pad = torch.arange(width) >= lengths[:, None]
            found.add(encode(torch.where(is_pad, pad, tokens)), expected, name)
        if bool((lengths == width).all()):
            cut = torch.cat([tokens[:, :-1], torch.full((len(tokens), 1), _WORD)], dim=1)
            found.add(encode(cut), expected, name)
    found.hold(bounds, name)
    return found


def _captions(context_length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of captions [B, L] with zeros after EOT, and their lengths: each length alone, then mixed ones."""
    generator = torch.Generator().manual_seed(0)
    for longest in range(2, context_length + 1):
        yield _random_captions([longest], generator)
    for batch in BATCHES[1:]:
        spread = np.linspace(2, context_length, batch).astype(int).tolist()
        yield _random_captions(spread, generator)
        yield _random_captions([context_length] * batch, generator)


def _random_captions(lengths: Iterable[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    ends = torch.tensor(list(lengths))
    tokens = torch.randint(0, VOCAB_SIZE - 2, (len(ends), int(ends.max())), generator=generator)
    tokens[torch.arange(tokens.shape[1]) >= ends[:, None]] = 0
    tokens[:, 0] = SOT
    tokens[torch.arange(len(ends)), ends - 1] = EOT
    return tokens, ends
