"""The tables and charts of a behaviour."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from eval.benchmarks.protocols import RetrievalSet
from eval.measures.behaviour import measure_cuts
from eval.measures.behaviour_figures import TOLERANCE, Behaviour, Effect
from eval.measures.bootstrap import Estimate
from eval.measures.caption_edits import EDITS, FILLER
from eval.measures.figures import WAYS
from eval.measures.retrieval_set import encode_retrieval_set
from eval.pages.behaviour_words import shown_loss
from eval.pages.charts import group_chart, line_chart
from eval.pages.report import Chart, PlainTable
from eval.towers.models import ClipModel

__all__ = ["behaviour_charts", "behaviour_tables", "chart_of_cuts"]

_REARRANGED = {
    "first_removed": "first\nremoved",
    "random_removed": "any\nremoved",
    "swapped": "1st and 4th\nswapped",
    "shuffled": "all\nshuffled",
}
_WORDS = {0: "intact", **{percent: f"words_{percent}" for percent in (10, 20, 30, 40, 50)}}
_FILLER = {0: "intact", **{length: f"filler_{length}" for length in FILLER}}
_FIRST = {"1": "first_1", "2": "first_2", "3": "first_3", "5": "first_5", "all": "intact"}
_RULE = (
    "A caption that an edit does not apply to stays among the candidates as it is and is no query; the loss compares "
    "the same queries with and without the edit."
)


# --- tables ---


def behaviour_tables(behaviour: Behaviour) -> dict[str, PlainTable]:
    """Return the tables by heading: R@1 and loss by edit, differences between the models, changed details."""
    tables = {}
    for way, words in reversed(WAYS.items()):
        rows, sure = _edit_rows(behaviour, way)
        tables[f"{behaviour.test}, {words}: captions edited"] = PlainTable(
            f"R@1 in percent of the queries that the edit applies to, and the loss in points with its 95% interval. "
            f"Bold: the interval excludes 0. {_RULE}",
            ["edit", "queries", *behaviour.measured],
            rows,
            sure,
        )
        if len(behaviour.measured) > 1:
            first, *others = behaviour.measured
            rows, sure = _difference_rows(behaviour, way, others)
            tables[f"{behaviour.test}, {words}: edited captions, beside {first}"] = PlainTable(
                f"R@1 under an edit minus that of {first}, in points, with the 95% interval over pictures, both models "
                f"on the same ones; bold: it excludes 0. Below, the loss minus that of {first}: a model that finds "
                "little has little to lose.",
                ["edit", *others],
                rows,
                sure,
            )
    if details := _detail_rows(behaviour):
        tables[f"{behaviour.test}: one detail changed"] = PlainTable(
            "A rule changes one colour, number or place of a caption, so that it becomes false. The percentage of "
            "pictures with such a caption that prefer the true one, with 95% intervals; a model that cannot see the "
            "difference has 50.",
            ["detail", "captions", *behaviour.measured],
            details,
        )
    return tables


def _edit_rows(behaviour: Behaviour, way: str) -> tuple[list[list[str]], set[tuple[int, int]]]:
    rows: list[list[str]] = []
    sure = set[tuple[int, int]]()
    for edit in EDITS:
        effect = behaviour.effect(edit.name, way)
        if effect is None:
            continue
        cells = [edit.title, str(effect.num_queries)]
        for model in behaviour.measured:
            if _is_sure(effect.losses[model]):
                sure.add((len(rows), len(cells)))
            cut = _newly_cut(behaviour, edit.name, model)
            note = f", {cut} more cut" if cut else ""
            cells.append(f"{effect.recalls[model].value:.1f}\nloss {shown_loss(effect.losses[model])}{note}")
        rows.append(cells)
    return rows, sure


def _newly_cut(behaviour: Behaviour, name: str, model: str) -> int:
    """Return how many captions no longer fit the model's context because of what was put in front of them."""
    figures = behaviour.measured[model][0]["figures"]
    return max(0, figures["edits"][name]["num_truncated"] - figures["num_truncated"])


def _difference_rows(
    behaviour: Behaviour, way: str, models: Sequence[str]
) -> tuple[list[list[str]], set[tuple[int, int]]]:
    rows: list[list[str]] = []
    sure = set[tuple[int, int]]()
    for edit in EDITS:
        if (effect := behaviour.effect(edit.name, way)) is not None:
            recalls = [effect.recall_differences[model] for model in models]
            sure |= {(len(rows), 1 + place) for place, found in enumerate(recalls) if _is_sure(found)}
            losses = [shown_loss(effect.loss_differences[model]) for model in models]
            cells = [f"{shown_loss(found)}\nloss {loss}" for found, loss in zip(recalls, losses, strict=True)]
            rows.append([edit.title, *cells])
    return rows, sure


def _detail_rows(behaviour: Behaviour) -> list[list[str]]:
    rows = []
    for kind in behaviour.first["prefers"]:
        if (found := behaviour.details(kind)) is not None:
            count, shares = found
            rows.append([kind, str(count), *(f"{it.value:.1f}\n{it.low:.1f}–{it.high:.1f}" for it in shares.values())])
    return rows


def _is_sure(found: Estimate) -> bool:
    return found.low > 0 or found.high < 0


# --- charts ---


def behaviour_charts(behaviour: Behaviour, colours: Mapping[str, int]) -> list[Chart]:
    """Return a chart for each kind of edit and direction, and two by where the deciding detail stands."""
    charts = []
    for way, words in reversed(WAYS.items()):
        parts = (_cuts, _first_sentences, _single_sentences, _rearranged, _filler, _missing_words)
        charts += [chart for part in parts if (chart := part(behaviour, colours, way, words)) is not None]
    return charts + [
        chart for part in (_details, _by_detail, _by_place) if (chart := part(behaviour, colours)) is not None
    ]


def chart_of_cuts(models: Mapping[str, ClipModel], test: str, found: RetrievalSet, colours: Mapping[str, int]) -> Chart:
    """Return the chart of R@1, from caption to picture, by the number of tokens at which captions are cut."""
    measured = {name: [measure_cuts(model, encode_retrieval_set(model, found))] for name, model in models.items()}
    return _cuts(Behaviour(test, measured), colours, "t2i", WAYS["t2i"])


def _cuts(behaviour: Behaviour, colours: Mapping[str, int], way: str, words: str) -> Chart:
    found = {model: behaviour.cuts(model, way) for model in behaviour.measured}
    lines = {model: [(float(cut), it.value) for cut, it in cuts.items()] for model, cuts in found.items()}
    bands = {model: [(it.low, it.high) for it in cuts.values()] for model, cuts in found.items()}
    used = [f"{model} {behaviour.tokens_used(model, way).value or '–'}" for model in behaviour.measured]
    meaning = (
        "R@1 when every caption is cut at a number of tokens, start and end included; shaded: 95% intervals. From "
        f"here on no cut loses more than {TOLERANCE:.0f} points: {', '.join(used)}."
    )
    title = f"{behaviour.test}, {words}: captions cut"
    return Chart(title, meaning, line_chart(lines, colours, title, x_label="tokens", y_label="R@1 %", bands=bands),
                 list(lines))  # fmt: skip


def _first_sentences(behaviour: Behaviour, colours: Mapping[str, int], way: str, words: str) -> Chart | None:
    return _groups(
        behaviour, colours, way, f"{behaviour.test}, {words}: the first sentences", _FIRST,
        lambda effect: effect.recalls, "R@1 %",
        "R@1 when every caption is cut to its first 1, 2, 3 or 5 sentences, and with all of them; bars: 95% intervals.",
        is_curve=True,
    )  # fmt: skip


def _rearranged(behaviour: Behaviour, colours: Mapping[str, int], way: str, words: str) -> Chart | None:
    steps = {label: name for name, label in _REARRANGED.items()}
    return _groups(
        behaviour, colours, way, f"{behaviour.test}, {words}: sentences removed and moved", steps,
        lambda effect: effect.losses, "R@1 lost, points",
        f"Points of R@1 that a model loses, with 95% intervals; dashed: no loss. {_RULE}", level=0.0,
    )  # fmt: skip


def _groups(
    behaviour: Behaviour,
    colours: Mapping[str, int],
    way: str,
    title: str,
    steps: Mapping[str, str],
    shown: Callable[[Effect], Mapping[str, Estimate]],
    y_label: str,
    meaning: str,
    *,
    level: float | None = None,
    is_curve: bool = False,
) -> Chart | None:
    effects = {label: behaviour.effect(name, way) for label, name in steps.items()}
    found = {label: shown(effect) for label, effect in effects.items() if effect is not None}
    if not found:
        return None
    values = {model: [_point(it[model]) for it in found.values()] for model in behaviour.measured}
    svg = group_chart(list(found), values, colours, title, y_label=y_label, level=level, is_curve=is_curve)
    return Chart(title, meaning, svg, list(values))


def _single_sentences(behaviour: Behaviour, colours: Mapping[str, int], way: str, words: str) -> Chart | None:
    steps = {number: f"only_{number}" for number in range(1, 1 + len(behaviour.first["figures"]["only_sentence"]))}
    return _curve(
        behaviour, colours, way, f"{behaviour.test}, {words}: one sentence alone", steps, "number of the sentence",
        "R@1 when a single sentence stands for its caption. Captions without a sentence of that number stand there "
        "with their last, and are no queries. Shaded: 95% intervals.",
    )  # fmt: skip


def _filler(behaviour: Behaviour, colours: Mapping[str, int], way: str, words: str) -> Chart | None:
    return _curve(
        behaviour, colours, way, f"{behaviour.test}, {words}: text in front", _FILLER, "tokens in front",
        "R@1 when text that says nothing of the picture stands in front of every caption (the Declaration of "
        "Independence); shaded: 95% intervals. What then lies beyond a model's context is cut: see the table.",
    )  # fmt: skip


def _missing_words(behaviour: Behaviour, colours: Mapping[str, int], way: str, words: str) -> Chart | None:
    return _curve(
        behaviour, colours, way, f"{behaviour.test}, {words}: words missing", _WORDS, "% of the words missing",
        "R@1 when a share of each caption's words, drawn at random, is left out; shaded: 95% intervals.",
    )  # fmt: skip


def _curve(
    behaviour: Behaviour,
    colours: Mapping[str, int],
    way: str,
    title: str,
    steps: Mapping[int, str],
    x_label: str,
    meaning: str,
) -> Chart | None:
    found = {x: effect for x, name in steps.items() if (effect := behaviour.effect(name, way)) is not None}
    return _lines(
        behaviour, colours, title, {float(x): it.recalls for x, it in found.items()}, x_label, "R@1 %", meaning
    )


def _details(behaviour: Behaviour, colours: Mapping[str, int]) -> Chart | None:
    found = {kind: it for kind in behaviour.first["prefers"] if (it := behaviour.details(kind)) is not None}
    if not found:
        return None
    title = f"{behaviour.test}: one detail changed"
    values = {model: [_point(shares[model]) for _, shares in found.values()] for model in behaviour.measured}
    groups = [f"{kind}\n({count})" for kind, (count, _) in found.items()]
    svg = group_chart(groups, values, colours, title, y_label="true preferred, %", level=50.0)
    meaning = (
        "The percentage of pictures that prefer their caption to the same caption with one colour, number or place "
        "changed (in brackets: how many captions); bars: 95% intervals; dashed: the difference is not seen."
    )
    return Chart(title, meaning, svg, list(values))


def _by_detail(behaviour: Behaviour, colours: Mapping[str, int]) -> Chart | None:
    meaning = (
        "As before, all kinds of details together, in groups by where the changed word stands in the caption: a model "
        "that reads up to some token falls to 50 behind it. Shaded: 95% intervals."
    )
    return _lines(
        behaviour, colours, f"{behaviour.test}: one detail changed, by its place",
        {x: shares for x, _, shares in behaviour.by_detail_place()},
        "the detail's token", "true preferred, %", meaning, fewest=2,
    )  # fmt: skip


def _by_place(behaviour: Behaviour, colours: Mapping[str, int]) -> Chart | None:
    meaning = (
        "R@1 from caption to picture, in groups by the token from which on a caption reads like no other picture's "
        "caption: a model that stops reading before it cannot find the picture but by luck. Shaded: 95% intervals."
    )
    return _lines(
        behaviour, colours, f"{behaviour.test}: by where the caption becomes unlike all others",
        {x: shares for x, _, shares in behaviour.by_deciding_place()}, "token", "R@1 %", meaning, fewest=2,
    )  # fmt: skip


def _lines(
    behaviour: Behaviour,
    colours: Mapping[str, int],
    title: str,
    found: Mapping[float, Mapping[str, Estimate]],
    x_label: str,
    y_label: str,
    meaning: str,
    fewest: int = 1,
) -> Chart | None:
    if len(found) < fewest:
        return None
    lines = {model: [(x, it[model].value) for x, it in found.items()] for model in behaviour.measured}
    bands = {model: [(it[model].low, it[model].high) for it in found.values()] for model in behaviour.measured}
    svg = line_chart(lines, colours, title, x_label=x_label, y_label=y_label, bands=bands)
    return Chart(title, meaning, svg, list(lines))


def _point(found: Estimate) -> tuple[float, float, float]:
    return found.value, found.low, found.high
