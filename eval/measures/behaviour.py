"""How the recall of a model depends on what its captions are like: the edits of caption_edits, cuts, changed details.

Shapes: N pictures, M captions, Q queries (N pictures or M captions), D embedding width.

An edit that does not apply to a caption (a first and fourth sentence, where there are three) leaves it among the
candidates as it is, and does not count it as a query; nor does it count a picture with such a caption. Each figure is
therefore compared with that of the same queries and unedited captions, its `intact` figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from eval.base.sentences import split_sentences
from eval.measures.behaviour_figures import loss_figures, read_hits, tokens_used
from eval.measures.caption_edits import EDITS, Edit, first_sentences, only_sentence
from eval.measures.detail_changes import DETAILS, changed_caption
from eval.measures.figures import WAYS
from eval.measures.padding import padding_cosines
from eval.measures.recall import DirectionRanks, direction_metrics, retrieval_ranks
from eval.measures.retrieval_set import EncodedSet
from eval.towers.features import Encoding, encode_captions, show_track
from eval.towers.models import ClipModel
from longclip_teacher.text import CaptionTokenizer

__all__ = ["cut_lengths", "decided_at", "measure_behaviour", "measure_cuts"]

_CUT_STEP = 8
_OTHER_CUTS = (20, 77)  # MobileCLIP's effective length of Long-CLIP's paper, and CLIP's context
_MOST_SENTENCES = 12
_EQUAL = 1e-6  # scores closer than this are equal: a caption that reads alike may differ by rounding
_TOKENIZER = CaptionTokenizer()  # places in captions are counted in CLIP's tokens, whatever the model


@dataclass(frozen=True)
class _Step:
    """One pass over the captions for each seed of an edit."""

    edit: Edit
    num_tokens: int | None = None
    """Where the captions are cut, if they are."""
    instead: Callable[[str], str] = str
    """What a caption becomes that the edit does not apply to: itself."""


def measure_behaviour(model: ClipModel, encoded: EncodedSet, encoding: Encoding = Encoding()) -> dict[str, Any]:
    """Return, ready for JSON, the `figures` and what intervals and charts need.

    `figures` has `intact` (see `recall_metrics`); `edits` and `cuts`, each by name, with the numbers of queries, both
    directions' `direction_metrics` (means over the edit's seeds), the `intact` R@1 of the same queries and the `loss`
    in points with its interval; `only_sentence` (the k-th sentence alone); `details` (the share of pictures with a
    changed caption that prefer the true one, in percent); `tokens_used` for both directions; `padding`.

    `hits` are the queries that R@1 counts, by step and direction: 0 or 1, the share of seeds if there are several, None
    for a query that is not asked. `prefers` [M] of each kind of detail is 1 if the picture prefers the true caption, a
    half if it cannot tell them apart, None if no detail could be changed; `places` [M] has the place of the detail.
    `decided_at` [M]: see there.
    """
    steps = _steps(model, encoded)
    passes = _Passes(model, encoded, replace(encoding, cache=None, show_progress=False))
    found = {}
    for step in show_track(steps, "edited captions" if encoding.show_progress else None, len(steps)):
        found[step.edit.name] = passes.measure(step)
    hits = {name: result.pop("hits") for name, result in found.items()}
    details = {kind: passes.details(kind) for kind in DETAILS}
    measured = {
        "hits": hits,
        "prefers": {kind: detail["prefers"] for kind, detail in details.items()},
        "places": {kind: detail["places"] for kind, detail in details.items()},
        "decided_at": decided_at(encoded.captions, encoded.caption_image.tolist()),
        "caption_image": encoded.caption_image.tolist(),
    }
    return {"figures": _figures(model, encoded, encoding, found, measured), **measured}


def measure_cuts(model: ClipModel, encoded: EncodedSet, encoding: Encoding = Encoding()) -> dict[str, Any]:
    """Return of `measure_behaviour` only what shows the recall of captions that are cut, for a fraction of the time."""
    passes = _Passes(model, encoded, replace(encoding, cache=None, show_progress=False))
    steps = [step for step in _steps(model, encoded) if step.edit.name == "intact" or step.num_tokens is not None]
    measured = {
        "hits": {step.edit.name: passes.measure(step)["hits"] for step in steps},
        "caption_image": encoded.caption_image.tolist(),
    }
    longest = min(max(passes.num_tokens), model.context_length)
    return {"figures": {"tokens_used": _tokens_used(measured, longest)}, **measured}


def cut_lengths(longest: int) -> list[int]:
    """Return the numbers of tokens at which captions are cut, if the longest has this many: every 8, and 20 and 77."""
    return sorted({*range(_CUT_STEP, longest, _CUT_STEP), *(cut for cut in _OTHER_CUTS if cut < longest)})


def decided_at(captions: Sequence[str], owner: Sequence[int]) -> list[int | None]:
    """Return [M] the smallest cut, in CLIP tokens, at which a caption reads like no caption of another picture.

    A model that reads less cannot tell the caption from all others. None: another picture has the same caption.
    """
    longest = max(_TOKENIZER.count_tokens(caption) for caption in captions)
    tokens = _TOKENIZER(captions, longest + 1).numpy().astype(">u2")  # [M,L]; big end first: bytes sort as the numbers
    order = sorted(range(len(captions)), key=lambda row: tokens[row].tobytes())
    shared = np.zeros(len(captions), dtype=int)
    for walk in (order, order[::-1]):  # the nearest neighbours in this order share the longest beginnings
        for place, row in enumerate(walk):
            other = next((row_ for row_ in walk[place + 1 :] if owner[row_] != owner[row]), None)
            if other is not None:
                differ = np.flatnonzero(tokens[row] != tokens[other])
                shared[row] = max(shared[row], differ[0] if len(differ) else longest + 1)
    return [None if count > longest else int(count) + 2 for count in shared]  # the token that differs, and EOT


class _Passes:
    """Passes over edited captions. Captions that an edit leaves as they are keep their features."""

    def __init__(self, model: ClipModel, encoded: EncodedSet, encoding: Encoding) -> None:
        self.model, self.encoded, self.encoding = model, encoded, encoding
        self.captions, self.owner = encoded.captions, encoded.caption_image.cpu()
        self.num_tokens = [model.tokenizer.count_tokens(caption) for caption in encoded.captions]

    def measure(self, step: _Step) -> dict[str, Any]:
        """Return the figures of a step, and its `hits`."""
        metrics, hits = list[dict[str, Any]](), list[dict[str, np.ndarray]]()
        num_truncated = 0
        for seed in step.edit.seeds:
            edited = [step.edit.apply(caption, seed) for caption in self.captions]
            asked = self._asked(edited)
            texts = [step.instead(old) if new is None else new for old, new in zip(self.captions, edited, strict=True)]
            features = self._features(texts, step.num_tokens)
            ranks = retrieval_ranks(self.encoded.image_features, features, self.encoded.caption_image)
            found = {"i2t": ranks.i2t, "t2i": ranks.t2i}
            metrics.append({way: _metrics(found[way], asked[way]) for way in found})
            hits.append({way: (found[way].ranks == 1).double().numpy() for way in found})
            if seed == step.edit.seeds[0]:
                num_truncated = sum(
                    self.model.tokenizer.count_tokens(text) > self.model.context_length for text in edited if text
                )
        return {
            "num_texts": int(asked["t2i"].sum()),
            "num_images": int(asked["i2t"].sum()),
            "num_truncated": num_truncated,
            **_mean(metrics),
            "hits": {way: _plain(np.mean([hit[way] for hit in hits], axis=0), asked[way]) for way in asked},
        }

    def details(self, kind: str) -> dict[str, Any]:
        """Return `prefers` and `places` [M] of a kind of detail, as `measure_behaviour` does."""
        changes = [changed_caption(caption, kind) for caption in self.captions]
        made = {row: change for row, change in enumerate(changes) if change is not None}
        prefers: list[float | None] = [None] * len(changes)
        places: list[int | None] = [None] * len(changes)
        if made:
            rows = list(made)
            features, _ = encode_captions(self.model, [change.text for change in made.values()], self.encoding)
            pictures = self.encoded.image_features[self.encoded.caption_image[rows]].double()
            more = (pictures * (self.encoded.text_features[rows].double() - features.double())).sum(dim=1).tolist()
            for row, margin in zip(rows, more, strict=True):
                prefers[row] = 0.5 if abs(margin) < _EQUAL else float(margin > 0)
                places[row] = _TOKENIZER.count_tokens(self.captions[row][: made[row].place])
        return {"prefers": prefers, "places": places}

    def _asked(self, edited: Sequence[str | None]) -> dict[str, Bool[Tensor, " Q"]]:
        """Return which queries count: captions that were edited, and pictures all of whose captions were."""
        captions = torch.tensor([text is not None for text in edited])
        pictures = torch.ones(len(self.encoded.images), dtype=torch.bool)
        pictures[self.owner[~captions]] = False
        return {"i2t": pictures, "t2i": captions}

    def _features(self, texts: Sequence[str], num_tokens: int | None) -> Tensor:
        """Return [M,D], where only captions that changed are encoded."""
        rows = [
            row
            for row, (old, new) in enumerate(zip(self.captions, texts, strict=True))
            if old != new or (num_tokens is not None and self.num_tokens[row] > num_tokens)
        ]
        if not rows:
            return self.encoded.text_features
        features = self.encoded.text_features.clone()
        features[rows], _ = encode_captions(self.model, [texts[row] for row in rows], self.encoding, num_tokens)
        return features


def _steps(model: ClipModel, encoded: EncodedSet) -> list[_Step]:
    whole = Edit("intact", "unedited", lambda caption, _: caption)
    num_sentences = [len(split_sentences(caption)) for caption in encoded.captions]
    most = min(_MOST_SENTENCES, int(np.ceil(np.percentile(num_sentences, 95))))
    longest = max(model.tokenizer.count_tokens(caption) for caption in encoded.captions)
    return [
        _Step(whole),
        *(_Step(edit) for edit in EDITS),
        *(
            _Step(
                Edit(f"only_{k}", f"sentence {k} alone", partial(_only, k)),
                instead=lambda caption: split_sentences(caption)[-1],
            )
            for k in range(1, most + 1)
        ),
        *(
            _Step(replace(whole, name=f"cut_{cut}"), num_tokens=cut)
            for cut in cut_lengths(min(longest, model.context_length))
        ),
    ]


def _only(k: int, caption: str, seed: int) -> str | None:
    return only_sentence(caption, k)


def _figures(
    model: ClipModel,
    encoded: EncodedSet,
    encoding: Encoding,
    found: dict[str, dict[str, Any]],
    measured: dict[str, Any],
) -> dict[str, Any]:
    """Return the `figures` of `measure_behaviour`."""
    hits = read_hits([measured])
    num_sentences = [len(split_sentences(caption)) for caption in encoded.captions]
    num_tokens = [model.tokenizer.count_tokens(caption) for caption in encoded.captions]

    def compared(name: str) -> dict[str, Any]:
        return found[name] | loss_figures(hits, name, measured["caption_image"])

    return {
        "num_images": len(encoded.images),
        "num_texts": len(encoded.captions),
        "num_truncated": encoded.num_truncated,
        "context_length": model.context_length,
        "unreadable": [lost.name for lost in encoded.unreadable],
        "mean_sentences": mean(num_sentences),
        "num_of_one_sentence": sum(number <= 1 for number in num_sentences),
        "median_tokens": float(np.median(num_tokens)),
        "intact": {way: found["intact"][way] for way in WAYS},
        "tokens_used": _tokens_used(measured, min(max(num_tokens), model.context_length)),
        "edits": {edit.name: compared(edit.name) for edit in EDITS},
        "cuts": {name: compared(name) for name in found if name.startswith("cut_")},
        "only_sentence": {name: found[name] for name in found if name.startswith("only_")},
        "details": {kind: _preference(prefers) for kind, prefers in measured["prefers"].items()},
        "padding": padding_cosines(model, [first_sentences(text, 1) for text in encoded.captions], encoding),
    }


def _tokens_used(measured: dict[str, Any], longest: int) -> dict[str, Any]:
    hits = read_hits([measured])
    return {way: tokens_used(hits, way, measured["caption_image"], longest).plain() for way in WAYS}


def _preference(prefers: Sequence[float | None]) -> dict[str, Any]:
    asked = [value for value in prefers if value is not None]
    return {"num_texts": len(asked), "prefers_true": 100 * mean(asked) if asked else None}


def _metrics(ranks: DirectionRanks, asked: Bool[Tensor, " Q"]) -> dict[str, Any] | None:
    return direction_metrics(ranks.select(asked)) if asked.any() else None


def _plain(values: np.ndarray, asked: Bool[Tensor, " Q"]) -> list[float | None]:
    return [value if is_asked else None for value, is_asked in zip(values.tolist(), asked.tolist(), strict=True)]


def _mean(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of several dicts of figures with the same keys, nested dicts included; None stays None."""
    return {
        key: _mean([figure[key] for figure in figures])
        if isinstance(value, dict)
        else None
        if value is None
        else mean(figure[key] for figure in figures)
        for key, value in figures[0].items()
    }
