"""What the losses of a run need from the models, read off the table of losses.

The Distiller builds what is listed here and nothing else, because a parameter that no loss reaches fails under DDP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.losses.table import Loss, Stage
from training.settings.losses import LossOptions, Term

__all__ = ["TOWERS", "Needs", "Tower", "needs_of"]

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, ...] = ("image", "text")


@dataclass(frozen=True)
class Needs:
    """What a run's active losses read and learn."""

    terms: tuple[Term, ...]
    """The active losses, in the order of the table."""
    stage: Stage
    reads_short: bool
    """True if short captions are encoded."""
    reads_sub: bool
    """True if sub-captions are encoded: single sentences of the long caption."""
    features: frozenset[str]
    """Features of the student through which a gradient flows: image, distilled_image, masked_image, and the texts long,
    short, sub."""
    maps: frozenset[str]
    """Features that must have the teacher's width: image, text; short_image, short_text for a short-caption teacher."""
    scales: tuple[str, ...]
    """Losses that learn a logit scale of their own."""
    mixture: bool
    """True if a loss learns matrices over student and teacher features side by side."""
    logit_scale: bool
    """True if a gradient reaches the model's logit scale."""
    layer_losses: dict[Tower, tuple[Loss, ...]]
    """Losses between matched layers, by tower."""

    @property
    def distils_sub(self) -> bool:
        """True if a loss reads the teacher's features of sub-captions."""
        return any(term.part == "sub" and term.loss.needs_teacher for term in self.terms)

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The towers that are run."""
        return TOWERS if self.stage == "both" else (self.stage,)

    @property
    def lengths(self) -> tuple[Literal["long", "short"], ...]:
        """The captions of which every picture has one that is read."""
        if "text" not in self.towers:
            return ()
        return ("long", "short") if self.reads_short else ("long",)

    def reads_features_of(self, tower: Tower) -> bool:
        """True if a loss reads the features of this tower, and so reaches all of it."""
        own = {"long", "short", "sub"} if tower == "text" else {"image", "distilled_image", "masked_image"}
        return bool(self.features & own)

    def reaches(self, tower: Tower) -> bool:
        """True if a loss has a gradient for this tower."""
        return self.reads_features_of(tower) or bool(self.layer_losses[tower])

    @property
    def compares_with_prompts(self) -> bool:
        """True if pictures without captions are compared with class prompts."""
        return self.stage == "image" and any(term.part == "long" for term in self.terms)


def needs_of(
    options: LossOptions, *, stage: Stage = "both", with_teacher: bool = True, short_teacher: bool = False
) -> Needs:
    """The needs of a run of `stage`. `short_teacher` says that another teacher reads the short captions."""
    terms = options.terms(with_teacher=with_teacher)
    reads_short = any(term.part == "short" for term in terms)
    text = {"long", "short"} if reads_short else {"long"}
    features: set[str] = set()
    maps: set[str] = set()
    for term in terms:
        read = term.loss.student_features(term.part, stage)
        if "text" in read:
            read = (read - {"text"}) | (text if term.part == "text" else {term.part})
        features |= read
        if term.loss.needs_same_width and term.loss.family != "layer":
            maps |= _maps(term, reads_short, short_teacher)
    return Needs(
        terms=terms,
        stage=stage,
        reads_short=reads_short,
        reads_sub=any(term.part == "sub" for term in terms),
        features=frozenset(features),
        maps=frozenset(maps),
        scales=tuple(sorted({term.loss.name for term in terms if "scale" in term.loss.learns})),
        mixture=any("mixture" in term.loss.learns for term in terms),
        logit_scale=any(term.loss.uses_logit_scale for term in terms),
        layer_losses={
            tower: tuple(term.loss for term in terms if term.loss.family == "layer" and term.part == tower)
            for tower in TOWERS
        },
    )


def _maps(term: Term, reads_short: bool, short_teacher: bool) -> set[str]:
    if term.loss.family == "across":
        return {"short_image", "short_text"} if term.part == "short" and short_teacher else {"image", "text"}
    if term.part == "image":
        return {"image"}
    return {"text", "short_text"} if reads_short and short_teacher else {"text"}
