"""Retrieval examples as one picture: what is drawn, in which colours, and text that asks for markup."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.measures.retrieval_examples import Answer, Example
from eval.pages import example_sheet
from eval.pages.example_sheet import draw_examples

GREEN, INK = example_sheet._RIGHT, example_sheet._INK


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (40, 20), (255, 0, 0)).save(path)
    return path


def count(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(axis=-1).sum())


def example(picture: Path, *captions: str, right: int | None = None) -> Example:
    return Example(picture, [Answer(text, number == right, number + 1) for number, text in enumerate(captions)])


def test_pictures_stand_beside_their_answers(picture: Path) -> None:
    one = draw_examples([example(picture, "a red board", "a blue board", right=0)])
    assert count(one, (255, 0, 0)) == 160 * 80  # fitted into a square of 160, not distorted
    assert count(one, GREEN) > 0 and count(one, INK) > 0
    wrong = draw_examples([example(picture, "a red board", "a blue board")])
    assert count(wrong, GREEN) == 0 and count(wrong, INK) > count(one, INK)
    both = draw_examples(
        [example(picture, "a"), Example("a caption that looks for pictures", []), example(picture, "b")]
    )
    assert both.height == 2 * one.height and both.width == one.width
    assert draw_examples([]).size == (one.width, 1)


def test_captions_are_drawn_as_they_are(picture: Path) -> None:
    plain = draw_examples([example(picture, "x")])
    for text in ("$x^2$ \\frac{1}{2}", "<b>x</b> &amp; **x**", "[red]x[/red]"):
        assert count(draw_examples([example(picture, text)]), INK) > 4 * count(plain, INK)


def test_a_caption_too_long_is_cut_at_six_lines(picture: Path) -> None:
    for text in ("word " * 2000, "字" * 3000):
        sheet = draw_examples([example(picture, text, text, text)])
        assert sheet.height == 18 * 18 + 2 * 16  # three captions of six lines of 18 pixels, and the margins
        lines = example_sheet._lines(text, INK, example_sheet.ImageFont.load_default(13))
        assert len(lines) == 6 and lines[-1][0].endswith(" ...")
        assert all(example_sheet.ImageFont.load_default(13).getlength(line) < 790 for line, _ in lines)
