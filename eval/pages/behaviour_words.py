"""What a behaviour comes to, in sentences: how many tokens a model uses, and what edits of its captions cost it."""

from __future__ import annotations

from eval.measures.behaviour_figures import TOLERANCE, Behaviour
from eval.measures.bootstrap import Estimate
from eval.measures.figures import WAYS

__all__ = ["UNTRAINED_EDITS", "behaviour_words", "shown_loss"]

UNTRAINED_EDITS = {
    "swapped": "the first and the fourth sentence change places",
    "filler_50": "50 tokens about something else stand in front",
    "words_30": "30% of the words are missing",
}
"""Edits that no training in this project makes, by name."""
METHOD = (
    "No training in this project puts text in front of captions, leaves out words, or swaps two sentences; "
    "captions.shuffle, if it was on, moves all of them. Unless it says otherwise, R@1 is that from caption to picture. "
    "Tokens count start and end."
)


def behaviour_words(behaviour: Behaviour, model: str) -> list[str]:
    """Return two sentences or more about a model: the tokens that it uses, and its losses."""
    return [_tokens(behaviour, model), _losses(behaviour, model)]


def shown_loss(loss: Estimate) -> str:
    """Return a loss in points with its interval, such as 41.2 (38.0 to 44.1)."""
    return f"{_points(loss.value)} ({_points(loss.low)} to {_points(loss.high)})"


def _tokens(behaviour: Behaviour, model: str) -> str:
    figures = behaviour.measured[model][0]["figures"]
    used = {way: behaviour.tokens_used(model, way) for way in WAYS}
    if (asked := used["t2i"]).value is None:
        recall = behaviour.hits[model]["intact"]["t2i"].mean() * 100
        return f"{model} finds too little on {behaviour.test} to say how many tokens it uses: R@1 is {recall:.1f}%."
    other = used["i2t"].value
    parts = [
        f"{model} uses {_how_many(asked.value, asked.longest)} of a caption on {behaviour.test}, where the median "
        f"caption has {figures['median_tokens']:.0f}."
    ]
    if asked.value < asked.longest:
        surely = f"Cut there or later, captions lose at most {TOLERANCE:.0f} points of R@1, with 95% confidence"
        alone = "" if asked.by_figure == asked.value else f"; the figures alone say so from {asked.by_figure} on"
        parts.append(f"{surely}{alone}.")
    if asked.loss_before is not None:
        parts.append(f"Cut at {asked.cut_before}, they lose {shown_loss(asked.loss_before)} points.")
    if other is not None and other != asked.value:
        parts.append(f"From picture to caption it uses {_how_many(other, asked.longest)}.")
    return " ".join(parts)


def _how_many(value: int, longest: int) -> str:
    return f"all {longest} tokens" if value >= longest else f"the first {value} tokens"


def _losses(behaviour: Behaviour, model: str) -> str:
    found = []
    for name, words in UNTRAINED_EDITS.items():
        if (effect := behaviour.effect(name, "t2i")) is None:
            found.append(f"nothing is known if {words}, since that applies to no caption")
            continue
        found.append(f"{shown_loss(effect.losses[model])} of {effect.intact[model]:.1f} if {words}")
    return f"{model} loses these points of R@1 from caption to picture: {'; '.join(found)}."


def _points(value: float) -> str:
    return f"{value:.1f}".replace("-", "−") if abs(value) >= 0.05 else "0.0"
