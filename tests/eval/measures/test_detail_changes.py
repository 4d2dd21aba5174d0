"""The rules that make a caption false, on plain cases."""

from __future__ import annotations

import pytest

from eval.measures.detail_changes import DETAILS, changed_caption

CASES = {
    "colour": [
        ("A red board.", "red"),
        ("A photo of\n- RED shoes", "RED"),
        ("Gray skies", "Gray"),
        ("an orange and a rose, redder than a blackboard", None),  # a fruit, a flower, parts of words
        ("black, white, red, green, blue, yellow, purple, pink, brown and grey", None),  # no colour is left
    ],
    "number": [
        ("Seven birds.", "Seven"),
        ("There are 3 birds", "3"),
        ("one of them, 3.5 m long, at 10:30, in 2010, on the 2nd, twenty-two, 5%, 4x", None),
    ],
    "place": [
        ("on the left of a house", "left"),
        ("middle left shows a cat", "left"),
        ("top half of a house", "top"),
        ("a cat in the background", "background"),
        ("It stands in front  of it", "in front  of"),
        ("Above it hangs a lamp", "Above"),
        ("He left, right away, on top of a blue top", None),
    ],
}


@pytest.mark.parametrize(("kind", "caption", "detail"), [(kind, *case) for kind in CASES for case in CASES[kind]])
def test_rules(kind: str, caption: str, detail: str | None) -> None:
    changed = changed_caption(caption, kind)
    if detail is None:
        assert changed is None
        return
    assert changed is not None and caption[: changed.place].endswith(detail)
    before, after = caption[: changed.place - len(detail)], caption[changed.place :]
    assert changed.text.startswith(before) and changed.text.endswith(after)
    new = changed.text[len(before) : len(changed.text) - len(after)]
    assert new.lower() != detail.lower() and new.isupper() == detail.isupper()
    assert new[0].isupper() == detail[0].isupper()


@pytest.mark.parametrize("kind", DETAILS)
@pytest.mark.parametrize("caption", ["", "一只红色的猫。它在左边。有三只。", "A cat."])
def test_captions_without_such_a_detail(kind: str, caption: str) -> None:
    assert changed_caption(caption, kind) is None


def test_opposites() -> None:
    for caption, changed in (
        ("on the left side", "on the right side"),
        ("It is behind the tree", "It is in front of the tree"),
        ("the lower shelf", "the upper shelf"),
    ):
        assert changed_caption(caption, "place").text == changed


def test_the_new_word_stands_nowhere_else_in_the_caption() -> None:
    """Red and blue must not become blue and blue, nor three and five birds five and five, or five and three."""
    for kind, caption, words in (
        ("colour", "red shoes, blue socks, a grey hat and gray hair", {"red", "blue", "grey"}),
        ("number", "three birds and five cats", {"three", "five"}),
    ):
        for seed in range(60):
            new = set(changed_caption(caption, kind, seed).text.split()) - set(caption.split())
            assert len(new) == 1 and not new & words


def test_every_detail_is_drawn_and_the_seed_decides() -> None:
    caption = "a red cat, a blue dog, a green bird"
    places = [changed_caption(caption, "colour", seed).place for seed in range(300)]
    assert {place: 70 < places.count(place) < 130 for place in places} == {5: True, 17: True, 30: True}
    assert changed_caption(caption, "colour", 5) == changed_caption(caption, "colour", 5)
