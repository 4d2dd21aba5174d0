"""Which part of a caption training reads: the section [captions], which a teacher cache records too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longclip_teacher.errors import InputError

__all__ = ["NO_SAMPLING", "CaptionOptions"]


@dataclass(frozen=True)
class CaptionOptions:
    """Which part of a caption is read in training, so that the model learns from all its sentences.

    A sampled caption is made of some sentences of the long one (DeBias-CLIP, 2026). Evaluation always reads captions as
    they are.
    """

    short: Literal["given", "first", "sampled"] = "given"
    """The short caption. given: the one in the data, or else the text before the first full stop. first: the first
    sentence of the long caption. sampled: some of its sentences."""
    long_from_epoch: int | None = None
    """Epoch, counted from 0, from which the long caption is sampled too. None: it is always read in full. From scratch,
    sampled captions alone learn slowly, so keep full ones in the first epochs."""
    drop_first: float = 1.0
    """Sampled captions: probability that the first sentence is left out, which often sums up the others."""
    keep: tuple[float, float] = (0.0, 1.0)
    """Sampled captions: least and largest share of the other sentences that is kept. The share is drawn from this
    range, and at least one sentence remains."""
    shuffle: bool = False
    """Sampled captions: put the sentences in random order."""
    max_shift: int = 0
    """Largest shift of the positions of short and of sampled captions, in tokens, so that later positions learn from
    them too. A student's tokens move to later positions; a teacher's get padding in front. 0: no shift."""
    target: Literal["sampled", "full"] = "sampled"
    """The teacher's feature that a sampled short caption learns: that of its own text, or that of the full long
    caption."""

    sub_captions: int = 3
    """Sentences drawn from each long caption for the losses of sub-captions (clip_sub, icl_sub, vrd_sub). Those of one
    picture are never each other's negatives. A caption of fewer sentences repeats them."""

    def __post_init__(self) -> None:
        """Raise InputError for values out of range."""
        if self.long_from_epoch is not None and self.long_from_epoch < 0:
            raise InputError(f"--captions.long_from_epoch counts from 0, got {self.long_from_epoch}")
        if not 0 <= self.drop_first <= 1:
            raise InputError(f"--captions.drop_first is a probability, 0 to 1, got {self.drop_first}")
        if not 0 <= self.keep[0] <= self.keep[1] <= 1:
            raise InputError(f"--captions.keep {self.keep}: give two shares, 0 <= low <= high <= 1")
        if self.max_shift < 0:
            raise InputError(f"--captions.max_shift must not be negative, got {self.max_shift}")
        if self.sub_captions < 1:
            raise InputError(f"--captions.sub_captions must be at least 1, got {self.sub_captions}")
        if self.target == "full" and self.short != "sampled":
            raise InputError("--captions.target full needs sampled short captions: set --captions.short sampled")

    @property
    def of_short_texts(self) -> CaptionOptions:
        """The options that decide what short captions say; all others as they are by default."""
        if self.short != "sampled":
            return CaptionOptions(short=self.short)
        return CaptionOptions(short=self.short, drop_first=self.drop_first, keep=self.keep, shuffle=self.shuffle)


NO_SAMPLING = CaptionOptions()
"""Captions as the data gives them."""
