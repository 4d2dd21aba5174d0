from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from eval.base.sentences import split_sentences
from eval.measures.caption_edits import (
    EDITS,
    FILLER,
    drop_words,
    first_sentences,
    only_sentence,
    put_in_front,
    remove_first_sentence,
    remove_random_sentence,
    shuffle_sentences,
    swap_first_and_fourth,
)
from longclip_teacher.text import CaptionTokenizer

THREE = "A red board. It hangs on a wall! Is it wet?"
FIVE = "One. Two. Three. Four. Five."
CHINESE = "一只红色的猫。它在桌子上！桌子是木头的。窗外下雨。"
BULLETS = "- a cat\n- a table\n- a window\n- rain"


def test_sentences_removed() -> None:
    assert remove_first_sentence(THREE) == "It hangs on a wall! Is it wet?"
    assert remove_first_sentence(CHINESE) == "它在桌子上！ 桌子是木头的。 窗外下雨。"
    assert remove_first_sentence(BULLETS) == "- a table - a window - rain"
    removed = Counter(remove_random_sentence(THREE, seed) for seed in range(900))
    assert set(removed) == {
        "It hangs on a wall! Is it wet?",
        "A red board. Is it wet?",
        "A red board. It hangs on a wall!",
    }
    assert all(240 < count < 360 for count in removed.values())  # 300 expected, sd 14


def test_sentences_moved() -> None:
    assert swap_first_and_fourth(FIVE) == "Four. Two. Three. One. Five."
    assert swap_first_and_fourth(CHINESE) == "窗外下雨。 它在桌子上！ 桌子是木头的。 一只红色的猫。"
    assert swap_first_and_fourth(BULLETS) == "- rain - a table - a window - a cat"
    assert swap_first_and_fourth(THREE) is None
    orders = Counter(shuffle_sentences(THREE, seed) for seed in range(1200))
    assert len(orders) == 6 and all(140 < count < 260 for count in orders.values())  # 200 expected, sd 13
    assert all(sorted(split_sentences(order or "")) == sorted(split_sentences(THREE)) for order in orders)


def test_sentences_counted() -> None:
    assert [first_sentences(THREE, k) for k in (1, 2)] == ["A red board.", "A red board. It hangs on a wall!"]
    assert first_sentences(THREE, 3) == first_sentences(THREE, 9) == THREE
    assert first_sentences(CHINESE, 2) == "一只红色的猫。 它在桌子上！"
    assert [only_sentence(THREE, k) for k in (1, 3, 4)] == ["A red board.", "Is it wet?", None]


@pytest.mark.parametrize("num_tokens", FILLER)
def test_filler_has_the_length_that_its_name_says(num_tokens: int) -> None:
    filler = FILLER[num_tokens]
    assert CaptionTokenizer().count_tokens(filler) - 2 == num_tokens  # without start and end
    assert filler.endswith(".") and put_in_front(THREE, num_tokens) == f"{filler} {THREE}"


def test_words_dropped() -> None:
    caption = " ".join(f"word{number}" for number in range(20))
    kept = {percent: drop_words(caption, 0, percent=percent).split() for percent in (10, 20, 30, 40, 50)}
    assert [len(words) for words in kept.values()] == [18, 16, 14, 12, 10]
    for fewer, more in ((20, 10), (30, 20), (40, 30), (50, 40)):
        assert set(kept[fewer]) < set(kept[more])
    for words in kept.values():
        assert words == [word for word in caption.split() if word in words]  # in their order
    drawn = Counter(word for seed in range(500) for word in drop_words(caption, seed, percent=50).split())
    assert all(200 < drawn[word] < 300 for word in caption.split())  # 250 expected, sd 11
    assert (
        len(drop_words("猫在桌子上，它是红的。", 0, percent=50).translate({ord("，"): "", ord("。"): ""})) == 4
    )  # of 9 words
    assert drop_words("a cat", 0, percent=50) in ("a", "cat") and drop_words("a cat", 0, percent=10) is None
    assert drop_words("cat", 0, percent=50) is None


def test_every_edit_on_captions_that_it_does_not_apply_to() -> None:
    assert len({edit.name for edit in EDITS}) == len(EDITS)
    for caption in ("", "  \n"):
        assert all(not edit.apply(caption, 0) for edit in EDITS)
    applies = {edit.name for edit in EDITS if edit.apply("Cats.", 0) is not None}
    assert applies == {*(f"filler_{n}" for n in FILLER), *(f"first_{k}" for k in (1, 2, 3, 5))}
    assert {edit.name for edit in EDITS} - {edit.name for edit in EDITS if edit.apply(THREE, 0)} == {"swapped"}


def test_what_is_drawn_depends_on_seed_and_caption_alone() -> None:
    program = (
        "from eval.measures.caption_edits import EDITS\n"
        f"print([edit.apply(text, seed) for edit in EDITS for seed in (0, 1) for text in ({FIVE!r}, {CHINESE!r})])"
    )
    here = str([edit.apply(text, seed) for edit in EDITS for seed in (0, 1) for text in (FIVE, CHINESE)])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == here  # Python's own hashes differ between the two processes
    for edit in EDITS:
        if len(edit.seeds) > 1:
            assert len({edit.apply(FIVE, seed) for seed in range(50)}) > 3
    others = [f"{FIVE} {number}." for number in range(40)]  # not all captions are shuffled alike
    assert len({tuple(shuffle_sentences(text, 0).split()[:3]) for text in others}) > 10


def test_an_edit_is_a_row() -> None:
    by_name = {edit.name: edit for edit in EDITS}
    assert by_name["words_30"].apply(FIVE * 4, 0) == drop_words(FIVE * 4, 0, percent=30)
    assert by_name["filler_50"].apply(THREE, 0) == put_in_front(THREE, 50)
    assert by_name["first_2"].apply(THREE, 0) == first_sentences(THREE, 2)
    assert by_name["swapped"].apply(FIVE, 0) == swap_first_and_fourth(FIVE)
