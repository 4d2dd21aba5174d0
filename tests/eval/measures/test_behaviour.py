"""Towers of which it is known what they read must be shown as what they are."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from eval.measures.behaviour import cut_lengths, decided_at, measure_behaviour
from eval.measures.behaviour_figures import Behaviour
from eval.measures.caption_edits import EDITS
from eval.pages.behaviour_words import behaviour_words
from known_readers import KnownReader, encoded_by, families, first_sentence, first_tokens, whole_caption

CAPTIONS = families(60)


def behaviour_of(**models: KnownReader) -> Behaviour:
    measured = {name: measure_behaviour(model, encoded_by(model, CAPTIONS)) for name, model in models.items()}
    return Behaviour("pairs", {name: [json.loads(json.dumps(found))] for name, found in measured.items()})


@pytest.fixture(scope="module")
def shown() -> Behaviour:
    return behaviour_of(bag=KnownReader(whole_caption), summary=KnownReader(first_sentence))


def test_a_reader_of_the_first_sentence_is_shown_as_such(shown: Behaviour) -> None:
    used = shown.tokens_used("summary", "t2i")
    assert used.value == 16 and used.longest == 134  # ten words, start and end: 12 tokens
    for name in ("swapped", "filler_50"):
        effect = shown.effect(name, "t2i")
        assert effect.intact["summary"] > 50 and effect.recalls["summary"].value < 2
        assert effect.losses["summary"].low > 40
    tokens, losses = behaviour_words(shown, "summary")
    assert tokens == (
        "summary uses the first 16 tokens of a caption on pairs, where the median caption has 134. Cut there or later, "
        "captions lose at most 2 points of R@1, with 95% confidence; the figures alone say so from 8 on. Cut at 8, "
        "they lose 1.7 (0.0 to 4.2) points."
    )
    assert ") of 54.2 if the first and the fourth sentence change places; " in losses


def test_a_bag_of_words_is_not(shown: Behaviour) -> None:
    used = shown.tokens_used("bag", "t2i")
    assert 128 <= used.value <= 134
    for name in ("swapped", "shuffled", "filler_25", "filler_50", "filler_100"):
        effect = shown.effect(name, "t2i")
        assert effect.intact["bag"] == 100
        assert (effect.losses["bag"].low, effect.losses["bag"].high) == (0, 0)
        assert effect.loss_differences["summary"].low > 40  # paired with the first model, the bag
    tokens, losses = behaviour_words(shown, "bag")
    assert "uses all 134 tokens" in tokens or "uses the first 128 tokens" in tokens
    assert ": 0.0 (0.0 to 0.0) of 100.0 if the first and the fourth sentence change places; 0.0 (" in losses


@pytest.mark.parametrize("number", [39, 71, 95])
def test_the_token_figure_of_a_reader_of_so_many_tokens(number: int) -> None:
    """Its last token is the last but one of the smallest cut that keeps it: EOT follows."""
    shown = behaviour_of(reader=KnownReader(first_tokens(number)))
    for way in ("i2t", "t2i"):
        used = shown.tokens_used("reader", way)
        assert (used.value, used.by_figure) == (number + 1, number + 1)
        losses = {cut: shown.effect(f"cut_{cut}", way).losses["reader"].value for cut in (8, number - 7, number + 1)}
        assert used.cut_before == number - 7 and used.loss_before.value == losses[number - 7]
        assert losses[8] > losses[number - 7] > 2 and losses[number + 1] == 0


def test_a_context_that_is_too_short_is_all_that_is_used() -> None:
    shown = behaviour_of(short=KnownReader(whole_caption, context_length=40))
    used = shown.tokens_used("short", "t2i")
    assert (used.value, used.longest) == (40, 40)
    assert max(shown.cuts("short", "t2i")) == 40
    assert shown.measured["short"][0]["figures"]["num_truncated"] == len(CAPTIONS)


def test_a_model_that_finds_nothing_uses_no_number_of_tokens() -> None:
    blind = KnownReader(lambda tokens: torch.zeros_like(tokens, dtype=torch.bool))
    shown = behaviour_of(blind=blind)
    assert shown.tokens_used("blind", "t2i").value is None
    assert behaviour_words(shown, "blind")[0] == (
        "blind finds too little on pairs to say how many tokens it uses: R@1 is 0.8%."
    )


def test_a_changed_detail_is_seen_where_it_is_read() -> None:
    captions = [
        ". ".join(["A cat and a dog"] * (number % 6))
        + f". A red {word} and two birds on the left side. "
        + "A bird. " * 9
        for number, word in enumerate(["lamp", "chair", "table", "clock"] * 15)
    ]
    blind = KnownReader(whole_caption)  # colours, numbers and sides have no vectors
    seeing = KnownReader(whole_caption)
    ids = seeing.tokenizer("red green blue black white yellow purple pink brown grey three two left right", 20)[0]
    seeing.words.weight.data[ids] = torch.randn(20, seeing.embed_dim, generator=torch.Generator().manual_seed(1))
    cut = KnownReader(first_tokens(15))
    cut.words = seeing.words
    result = {name: measure_behaviour(model, encoded_by(model, captions))
              for name, model in (("blind", blind), ("seeing", seeing), ("cut", cut))}  # fmt: skip
    shares = {name: {kind: found["prefers_true"] for kind, found in one["figures"]["details"].items()}
              for name, one in result.items()}  # fmt: skip
    assert shares["blind"] == {"colour": 50, "number": 50, "place": 50}
    assert shares["seeing"] == {"colour": 100, "number": 100, "place": 100}
    for kind in ("colour", "number", "place"):
        places, prefers = result["cut"]["places"][kind], result["cut"]["prefers"][kind]
        # the place is the smallest cut that keeps the detail: the detail, and EOT behind it
        assert prefers == [1 if place <= 16 else 0.5 for place in places]
        assert {0.5, 1} == set(prefers)
    shown = Behaviour("details", {name: [found] for name, found in result.items()})
    groups = shown.by_detail_place()
    assert len(groups) > 1 and [group[2]["seeing"].value for group in groups] == [100] * len(groups)
    assert groups[0][2]["cut"].value == 100 and groups[-1][2]["cut"].value == 50


def test_recall_falls_where_the_deciding_detail_is_not_read() -> None:
    shown = behaviour_of(all=KnownReader(whole_caption), cut=KnownReader(first_tokens(60)))
    groups = shown.by_deciding_place()
    assert len(groups) == 3
    assert [recalls["all"].value for _, _, recalls in groups] == [100, 100, 100]
    near, middle, far = [recalls["cut"].value for _, _, recalls in groups]  # in the middle, some details are read
    assert (near, far) == (100, 50) and 50 < middle < 100
    assert groups[0][0] < 44 and groups[2][0] > 90


def test_decided_at() -> None:
    captions = ["A cat. A dog.", "A cat. A bird.", "A cat.", "A fish.", "A cat. A dog."]
    #           SOT a cat . a dog   against its neighbours: the word that differs, and EOT
    assert decided_at(captions, [0, 1, 2, 3, 0]) == [7, 7, 6, 4, 7]
    assert decided_at(captions, [0, 1, 2, 3, 4]) == [None, 7, 6, 4, None]
    assert decided_at(["A cat."], [0]) == [2]


def test_cuts_are_below_the_longest_caption() -> None:
    assert cut_lengths(8) == [] and cut_lengths(21) == [8, 16, 20]
    assert cut_lengths(248)[-1] == 240 and 77 in cut_lengths(248) and 77 not in cut_lengths(77)


def test_queries_that_an_edit_does_not_apply_to() -> None:
    """They are not asked, and the loss compares the others with themselves."""
    captions = ["Cat. Dog. Bird. Horse.", "Cat. Fish.", "Bear. Lion. Wolf. Duck. Frog.", "Apple.", "Lemon. Grape."]
    model = KnownReader(first_sentence)
    encoded = encoded_by(model, captions, [0, 0, 1, 2, 3])
    found = measure_behaviour(model, encoded)
    assert found["hits"]["swapped"] == {"i2t": [None, 0, None, None], "t2i": [0, None, 0, None, None]}
    swapped = found["figures"]["edits"]["swapped"]
    assert (swapped["num_texts"], swapped["num_images"]) == (2, 1)
    assert swapped["intact"] == {"i2t": 100, "t2i": 100}
    assert swapped["loss"]["t2i"] == {"value": 100, "low": 100, "high": 100}
    assert found["hits"]["first_removed"]["t2i"] == [0, 0, 0, None, 0]
    assert found["hits"]["only_3"]["t2i"] == [0, None, 0, None, None]
    assert found["figures"]["edits"]["first_1"]["num_texts"] == 5
    nothing = measure_behaviour(model, encoded_by(model, ["Cat.", "Dog."]))
    assert nothing["figures"]["edits"]["swapped"]["loss"] == {"i2t": None, "t2i": None}
    shown = Behaviour("short", {"model": [nothing]})
    assert shown.effect("swapped", "t2i") is None
    assert "nothing is known if the first and the fourth" in behaviour_words(shown, "model")[1]


def test_losses_and_their_differences_are_those_of_plain_formulas_and_scipy(shown: Behaviour) -> None:
    """The loss is the mean of what each query loses; its interval, and that of the difference of two models' losses,
    are scipy's percentile intervals of resampled pairs."""
    effect = shown.effect("words_50", "t2i")
    hits = {name: shown.hits[name] for name in ("bag", "summary")}
    before = {name: of_model["intact"]["t2i"] for name, of_model in hits.items()}
    after = {name: of_model["words_50"]["t2i"] for name, of_model in hits.items()}
    for name in hits:
        assert effect.losses[name].value == pytest.approx(100 * (before[name].mean() - after[name].mean()))
        assert effect.intact[name] == pytest.approx(100 * before[name].mean())

    def loss(b: np.ndarray, a: np.ndarray, axis: int) -> np.ndarray:
        return 100 * (b - a).mean(axis=axis)

    reference = stats.bootstrap(
        (before["summary"], after["summary"]), loss, paired=True, n_resamples=10_000, method="percentile",
        vectorized=True, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    found = effect.losses["summary"]
    assert found.low < found.value < found.high and found.high - found.low > 5
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=1.7)  # two queries of 120

    def difference(b: np.ndarray, a: np.ndarray, b2: np.ndarray, a2: np.ndarray, axis: int) -> np.ndarray:
        return loss(b, a, axis) - loss(b2, a2, axis)

    reference = stats.bootstrap(
        (before["summary"], after["summary"], before["bag"], after["bag"]), difference, paired=True,
        n_resamples=10_000, method="percentile", vectorized=True, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    found = effect.loss_differences["summary"]
    assert found.value == pytest.approx(effect.losses["summary"].value - effect.losses["bag"].value)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=1.7)


def test_seeds_count_as_one_model(shown: Behaviour) -> None:
    bag, summary = (shown.measured[name][0] for name in ("bag", "summary"))
    both = Behaviour("pairs", {"two seeds": [bag, summary]})
    effect = both.effect("swapped", "t2i")
    single = shown.effect("swapped", "t2i")
    assert effect.losses["two seeds"].value == pytest.approx(np.mean([it.value for it in single.losses.values()]))
    assert both.tokens_used("two seeds", "t2i").longest == 134
    assert set(both.summary()["beside_first"]) == {edit.name for edit in EDITS}
    assert all(math.isfinite(it.value) for it in both.cuts("two seeds", "t2i").values())
