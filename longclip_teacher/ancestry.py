"""Where weights come from, and what their terms come to.

A model's ancestors are the weights from elsewhere from which its own began, and those from which its teachers' began:
each with its source, its sha256 and its terms. They go with the weights: into every file, and from a file into the
model that starts from it or learns from it.

No ancestors: trained from random weights, by teachers that were too. What the terms of data say is not recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

from longclip_teacher.errors import InputError

__all__ = [
    "DATACOMPDR",
    "NOT_KNOWN",
    "NOT_RECORDED",
    "RESEARCH_ONLY",
    "Ancestor",
    "Ancestry",
    "ancestry_from_json",
    "ancestry_to_json",
    "as_teacher",
    "describe_terms",
    "hub_ancestry",
    "is_research_only",
    "merged",
    "recorded",
    "unrecorded",
]

RESEARCH_ONLY, NOT_KNOWN = "apple-amlr", "not known"
"""Terms: Apple's licence for research models, as the hub abbreviates it; and those of files that do not tell."""


@dataclass(frozen=True, order=True)
class Ancestor:
    """Weights from elsewhere."""

    source: str
    """The hub's name of them, or what the file was recognised as. No path: it would tell about a machine."""
    terms: str
    """The licence, as the hub abbreviates it, or `NOT_KNOWN`."""
    sha256: str = ""
    """Of the file; of tensors and configuration for our own; "" if no file was read."""
    role: Literal["weights", "teacher"] = "weights"
    """weights: the model's own began with them. teacher: a teacher's did."""


Ancestry: TypeAlias = tuple[Ancestor, ...]

NOT_RECORDED: Ancestry = (Ancestor("weights without a record", NOT_KNOWN),)
"""The ancestry of a model that nobody has told where its weights come from."""
# The hub's pages of Apple's DataCompDR sets name the licence of the models
DATACOMPDR: Ancestry = (Ancestor("features in shards of DataCompDR's layout", RESEARCH_ONLY, role="teacher"),)
# Terms as the hub's pages state them. OpenAI's are those of its repository, which does not speak of weights separately
_OPENAI = "openai/clip-vit-base-patch16", "openai/clip-vit-large-patch14"
_HUB_TERMS = {
    "BeichenZhang/LongCLIP-B": "apache-2.0",
    "BeichenZhang/LongCLIP-L": "apache-2.0",
    **dict.fromkeys(_OPENAI, "mit"),
}
_HUB_PARENTS = dict(zip(("BeichenZhang/LongCLIP-B", "BeichenZhang/LongCLIP-L"), _OPENAI, strict=True))


def hub_ancestry(repository: str, sha256: str) -> Ancestry:
    """The ancestry of weights that the hub gave under this name; terms are not known of names that the table lacks."""
    own = Ancestor(repository, _HUB_TERMS.get(repository, NOT_KNOWN), sha256)
    parent = _HUB_PARENTS.get(repository)
    return (own,) if parent is None else merged((own, Ancestor(parent, _HUB_TERMS[parent])))


def recorded(record: str, kind: str, sha256: str) -> Ancestry:
    """The ancestry of our own file: its record, or without one (older files) an ancestor of terms not known."""
    if not record:
        return unrecorded(f"a {kind} without a record", sha256)
    try:
        return ancestry_from_json(json.loads(record))
    except ValueError:
        raise InputError(f"no record of ancestors: {record[:100]!r}") from None


def unrecorded(source: str, sha256: str = "") -> Ancestry:
    """The ancestry of weights of which nothing is known but these."""
    return (Ancestor(source, NOT_KNOWN, sha256),)


def merged(*ancestries: Iterable[Ancestor]) -> Ancestry:
    """All ancestors, each once and in order, so that equal ancestors are equal records."""
    return tuple(sorted({ancestor for ancestry in ancestries for ancestor in ancestry}))


def as_teacher(ancestry: Ancestry) -> Ancestry:
    """The ancestors that a model has through a teacher of this ancestry."""
    return merged(replace(ancestor, role="teacher") for ancestor in ancestry)


def is_research_only(ancestry: Ancestry) -> bool:
    """Whether a model of this ancestry may be used for research only: one such ancestor is enough."""
    return any(ancestor.terms == RESEARCH_ONLY for ancestor in ancestry)


def describe_terms(ancestry: Ancestry) -> str:
    """What the terms come to, in one line."""
    bound = {
        terms: _joined(ancestor.source for ancestor in ancestry if ancestor.terms == terms)
        for terms in dict.fromkeys(ancestor.terms for ancestor in ancestry)
    }
    if is_research_only(ancestry):
        return f"for research only, since it descends from {bound[RESEARCH_ONLY]} ({RESEARCH_ONLY})"
    if NOT_KNOWN in bound:
        return f"not known, since it descends from {bound[NOT_KNOWN]}"
    if bound:
        return "those of its ancestors: " + "; ".join(f"{sources} ({terms})" for terms, sources in bound.items())
    return "none but those of its data: it was trained from random weights"


def _joined(sources: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(sources))


def _ancestor(source: str, terms: str, sha256: str, role: str) -> Ancestor:
    return Ancestor(str(source), str(terms), str(sha256), "teacher" if role == "teacher" else "weights")


def ancestry_to_json(ancestry: Ancestry) -> list[dict[str, str]]:
    """Plain values."""
    return [asdict(ancestor) for ancestor in ancestry]


def ancestry_from_json(content: Any) -> Ancestry:
    """The inverse of `ancestry_to_json`. Raises ValueError for anything else."""
    try:
        return merged(_ancestor(**entry) for entry in content)
    except TypeError:
        raise ValueError(f"no record of ancestors: {str(content)[:100]!r}") from None
