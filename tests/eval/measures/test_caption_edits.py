from __future__ import annotations

from collections import Counter

import pytest

from eval.measures.caption_edits import (
    drop_first_sentence,
    first_sentences,
    only_sentence,
    shuffle_sentences,
    split_sentences,
)

THREE = "A red board. It hangs on a wall! Is it wet?"


@pytest.mark.parametrize(
    "sentences",
    [
        ["A red board.", "It hangs on a wall!", "Is it wet?"],
        ["A board 3.5 m wide costs $.25 or 1.00 each.", "It is red."],
        ["Dr. Smith meets Mrs. Jones on St. James St. near Mt. Hope.", "They talk."],
        ["Many fruits, e.g. apples vs. pears, lie here.", "One is cut."],
        ["A statue of John F. Kennedy by J. R. Smith.", "It is of bronze."],
        ["J. Smith stands there.", "He waves."],
        ["There is the letter U.", "You can see a skull."],
        ["At 4 p.m. in summer, cups, plates, etc. stand around.", "They are blue."],
        ["The shop opens at 9 a.m.", "A man waits."],
        ["It is bus No. 5 to town.", "The sign says no.", "Nobody waits."],
        ["1. A dog.", "2. A cat."],
        ['A sign says "Stop."', "A car (a red one.)", "It waits..."],
        ["It fades…", "Then nothing?!", "No."],
        ["a navy board in a red frame.", "top left shows a zero.", "centre is empty."],
        ["no end at all"],
    ],
)
def test_sentences_are_found_and_joined_again(sentences: list[str]) -> None:
    assert split_sentences(" ".join(sentences)) == sentences
    assert split_sentences("  " + "  \t".join(sentences) + " ") == sentences


def test_line_breaks_end_sentences_and_blanks_hold_none() -> None:
    assert split_sentences("A title without a stop\n\nA dog runs.\r\nIt barks") == [
        "A title without a stop",
        "A dog runs.",
        "It barks",
    ]
    assert split_sentences(" \n ") == split_sentences("") == []


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
