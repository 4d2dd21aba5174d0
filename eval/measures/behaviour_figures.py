"""From the hits of measure_behaviour to figures with intervals: losses, differences between models, tokens used.

Shapes: N pictures, M captions, Q queries (N pictures or M captions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from eval.measures.bootstrap import Estimate, bootstrap_recalls
from eval.measures.caption_edits import EDITS
from eval.measures.figures import WAYS
from eval.measures.query_bins import query_bins

__all__ = [
    "TOLERANCE",
    "Behaviour",
    "Effect",
    "Hits",
    "TokensUsed",
    "loss_figures",
    "read_hits",
    "tokens_used",
]

TOLERANCE = 2.0
"""A cut that loses no more points of R@1 than this does not count as a loss."""

Hits = Mapping[str, Mapping[str, Float[np.ndarray, " Q"]]]
"""By step and direction: the share of seeds that hit, NaN for a query that is not asked."""


@dataclass(frozen=True)
class Effect:
    """What an edit does to the R@1 of several models, on the queries that it applies to. In percent and points."""

    num_queries: int
    intact: dict[str, float]
    recalls: dict[str, Estimate]
    recall_differences: dict[str, Estimate]
    """The recall of each model less that of the first, paired."""
    losses: dict[str, Estimate]
    """The points by which each model's recall falls, paired with its own unedited captions."""
    loss_differences: dict[str, Estimate]
    """The loss of each model less that of the first, paired."""


@dataclass(frozen=True)
class TokensUsed:
    """How many tokens of its captions a model uses, start and end included."""

    value: int | None
    """The smallest cut from which on no cut loses more than 2 points of R@1 with 95% confidence; None if the model
    finds so little that no cut could lose them."""
    by_figure: int | None
    """The smallest cut from which on no cut loses more than 2 points, as the figures stand, without their intervals."""
    longest: int
    """The length of the longest caption, or the model's context if that is shorter."""
    cut_before: int | None = None
    """The next smaller cut, one that may lose more."""
    loss_before: Estimate | None = None
    """What it loses."""

    def plain(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def read_hits(seeds: Sequence[Mapping[str, Any]]) -> Hits:
    """Return the mean hits of one or more results of `measure_behaviour`, the seeds of a model. A step that one of the
    seeds lacks is left out."""
    names = [name for name in seeds[0]["hits"] if all(name in seed["hits"] for seed in seeds)]
    return {
        name: {way: np.mean([np.array(seed["hits"][name][way], dtype=float) for seed in seeds], axis=0) for way in WAYS}
        for name in names
    }


def _pictures_of(caption_image: Sequence[int], way: str) -> Int[np.ndarray, " Q"]:
    """Return each query's picture."""
    owner = np.array(caption_image)
    return owner if way == "t2i" else np.arange(owner.max() + 1)


def _effect(models: Mapping[str, Hits], name: str, way: str, caption_image: Sequence[int]) -> Effect | None:
    """Return what the step `name` does to each model, or None if it asks no query."""
    edited = {model: hits[name][way] for model, hits in models.items()}
    asked = ~np.isnan(np.stack(list(edited.values()))).any(axis=0)
    if not asked.any():
        return None
    picture = _pictures_of(caption_image, way)[asked]
    before = {model: hits["intact"][way][asked] for model, hits in models.items()}
    after = {model: values[asked] for model, values in edited.items()}
    recalls = bootstrap_recalls(after, picture)
    losses = bootstrap_recalls({model: before[model] - after[model] for model in models}, picture)
    return Effect(
        int(asked.sum()),
        {model: float(100 * values.mean()) for model, values in before.items()},
        recalls.recalls,
        recalls.differences,
        losses.recalls,
        losses.differences,
    )


class Behaviour:
    """The behaviour of several models on one test. What is computed is kept: page and console ask for the same."""

    def __init__(self, test: str, measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """`measured` holds, for each model, the results of `measure_behaviour`, one per seed."""
        self.test, self.measured = test, measured
        self.hits = {model: read_hits(seeds) for model, seeds in measured.items()}
        self.first = next(iter(measured.values()))[0]
        """The first model's first result, for what is the same in all: pictures, captions, places."""
        self._effects: dict[tuple[str, str], Effect | None] = {}

    def effect(self, name: str, way: str) -> Effect | None:
        """Return what the step `name` does to each model; None if it asks no query, or if a model lacks the step."""
        if (name, way) not in self._effects:
            has_all = all(name in hits for hits in self.hits.values())
            found = _effect(self.hits, name, way, self.first["caption_image"]) if has_all else None
            self._effects[name, way] = found
        return self._effects[name, way]

    def tokens_used(self, model: str, way: str) -> TokensUsed:
        """Return how many tokens the model uses; of several seeds, their mean hits decide."""
        longest = max(seed["figures"]["tokens_used"][way]["longest"] for seed in self.measured[model])
        return tokens_used(self.hits[model], way, self.first["caption_image"], longest)

    def summary(self) -> dict[str, Any]:
        """Return, for JSON, each model's `tokens_used`, and `beside_first`, by edit and direction: the differences of
        its `recall` and of its `loss` from the first model's."""
        beside = {
            edit.name: {
                way: {
                    model: {"recall": asdict(found), "loss": asdict(effect.loss_differences[model])}
                    for model, found in effect.recall_differences.items()
                }
                for way in WAYS
                if (effect := self.effect(edit.name, way)) is not None
            }
            for edit in EDITS
        }
        return {
            "tokens_used": {model: {way: self.tokens_used(model, way).plain() for way in WAYS} for model in self.hits},
            "beside_first": beside,
        }

    def cuts(self, model: str, way: str) -> dict[int, Estimate]:
        """Return R@1 by the number of tokens at which the captions are cut, the whole captions included."""
        hits, picture = self.hits[model], _pictures_of(self.first["caption_image"], way)
        series = {cut: hits[f"cut_{cut}"][way] for cut in _cuts_of(hits)}
        series[self.tokens_used(model, way).longest] = hits["intact"][way]
        found = bootstrap_recalls({str(cut): values for cut, values in series.items()}, picture).recalls
        return {cut: found[str(cut)] for cut in series}

    def by_deciding_place(self) -> list[tuple[float, int, dict[str, Estimate]]]:
        """Return the `_groups` of R@1 (caption to picture) by `decided_at`."""
        numbers = np.array(self.first["decided_at"], dtype=float)
        hits = {model: of_model["intact"]["t2i"] for model, of_model in self.hits.items()}
        return _groups(hits, numbers, np.array(self.first["caption_image"]))

    def preferences(self, kinds: Sequence[str]) -> dict[str, Float[np.ndarray, " Q"]]:
        """Return each model's mean preference for the true caption, of the captions for each of `kinds` in turn."""
        return {
            model: np.mean(
                [np.concatenate([np.array(seed["prefers"][kind], dtype=float) for kind in kinds]) for seed in seeds],
                axis=0,
            )
            for model, seeds in self.measured.items()
        }

    def details(self, kind: str) -> tuple[int, dict[str, Estimate]] | None:
        """Return the number of captions with a changed detail of a kind, and the share that each model prefers true."""
        values, picture = self.preferences([kind]), np.array(self.first["caption_image"])
        asked = ~np.isnan(np.stack(list(values.values()))).any(axis=0)
        if not asked.any():
            return None
        return int(asked.sum()), bootstrap_recalls(
            {model: of_model[asked] for model, of_model in values.items()}, picture[asked]
        ).recalls

    def by_detail_place(self) -> list[tuple[float, int, dict[str, Estimate]]]:
        """Return the `_groups` of preferences by the place of the changed detail, all kinds together."""
        kinds = list(self.first["places"])
        numbers = np.concatenate([np.array(self.first["places"][kind], dtype=float) for kind in kinds])
        return _groups(self.preferences(kinds), numbers, np.tile(self.first["caption_image"], len(kinds)))


def loss_figures(hits: Hits, name: str, caption_image: Sequence[int]) -> dict[str, Any]:
    """Return, for JSON, the `intact` R@1 of a step's queries and the `loss` with its interval, by direction."""
    found = {way: _effect({"": hits}, name, way, caption_image) for way in WAYS}
    return {
        "intact": {way: None if it is None else it.intact[""] for way, it in found.items()},
        "loss": {way: None if it is None else asdict(it.losses[""]) for way, it in found.items()},
    }


def _groups(
    values: Mapping[str, Float[np.ndarray, " Q"]],
    numbers: Float[np.ndarray, " Q"],
    picture: Int[np.ndarray, " Q"],
) -> list[tuple[float, int, dict[str, Estimate]]]:
    """Return (mean number, queries, each model's mean of its values in percent) of queries grouped by `numbers`.
    Queries with a NaN are left out."""
    asked = ~np.isnan(np.stack([numbers, *values.values()])).any(axis=0)
    numbers, picture = numbers[asked], picture[asked]
    kept = {model: of_model[asked] for model, of_model in values.items()}
    return [
        (
            float(numbers[rows].mean()),
            len(rows),
            bootstrap_recalls({model: hits[rows] for model, hits in kept.items()}, picture[rows]).recalls,
        )
        for rows in query_bins(numbers)
    ]


def _cuts_of(hits: Hits) -> list[int]:
    """Return the numbers of tokens at which captions were cut, rising."""
    return sorted(int(name.removeprefix("cut_")) for name in hits if name.startswith("cut_"))


def tokens_used(hits: Hits, way: str, caption_image: Sequence[int], longest: int) -> TokensUsed:
    """Return how many tokens a model uses in one direction."""
    picture, cuts, intact = _pictures_of(caption_image, way), _cuts_of(hits), hits["intact"][way]
    chance = 100 / len(_pictures_of(caption_image, "i2t"))
    if 100 * intact.mean() - chance <= TOLERANCE:
        return TokensUsed(None, None, longest)
    series = {str(cut): intact - hits[f"cut_{cut}"][way] for cut in cuts}
    losses = bootstrap_recalls(series, picture).recalls if cuts else {}
    value = _first_of_the_last([cut for cut in cuts if losses[str(cut)].high <= TOLERANCE], [*cuts, longest])
    by_figure = _first_of_the_last([cut for cut in cuts if losses[str(cut)].value <= TOLERANCE], [*cuts, longest])
    before = max((cut for cut in cuts if cut < value), default=None)
    return TokensUsed(value, by_figure, longest, before, None if before is None else losses[str(before)])


def _first_of_the_last(good: Sequence[int], cuts: Sequence[int]) -> int:
    """Return the smallest of the rising `cuts` from which on all are good; the last always is."""
    found = cuts[-1]
    for cut in reversed(cuts[:-1]):
        if cut not in good:
            break
        found = cut
    return found
