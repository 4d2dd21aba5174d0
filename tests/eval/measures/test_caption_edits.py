from __future__ import annotations

from collections import Counter

from eval.base.sentences import split_sentences
from eval.measures.caption_edits import (
    drop_first_sentence,
    first_sentences,
    only_sentence,
    shuffle_sentences,
)

THREE = "A red board. It hangs on a wall! Is it wet?"


def test_edits() -> None:
    assert drop_first_sentence(THREE) == "It hangs on a wall! Is it wet?"
    assert drop_first_sentence("One only.") == "One only."
    assert [first_sentences(THREE, k) for k in (1, 2)] == ["A red board.", "A red board. It hangs on a wall!"]
    assert first_sentences(THREE, 3) == first_sentences(THREE, 9) == THREE
    assert [only_sentence(THREE, k) for k in (1, 3, 4)] == ["A red board.", "Is it wet?", None]


def test_shuffling_draws_every_order_alike_and_repeats_itself() -> None:
    orders = Counter(shuffle_sentences(THREE, seed) for seed in range(1200))
    assert len(orders) == 6 and all(140 < count < 260 for count in orders.values())  # 200 expected, sd 13
    assert all(sorted(split_sentences(order)) == sorted(split_sentences(THREE)) for order in orders)
    assert shuffle_sentences(THREE, 1) == shuffle_sentences(THREE, 1)
    other = ["One. Two. Three. Four.", "Five. Six. Seven. Eight."]
    assert len({shuffle_sentences(other[0], seed) for seed in range(50)}) > 10
    assert shuffle_sentences("One only.", 0) == "One only."
