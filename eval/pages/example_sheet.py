"""Retrieval examples as one picture: queries with the captions that a model ranks first, for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from eval.base.images import open_image
from eval.measures.retrieval_examples import Example

__all__ = ["draw_examples"]

_SIDE, _MARGIN, _LINE, _TEXT_WIDTH, _FONT_SIZE = 160, 16, 18, 760, 13  # pixels
_MAX_LINES = 6  # per caption
_PAPER, _INK, _RIGHT = (255, 255, 255), (40, 44, 52), (26, 127, 75)


def draw_examples(examples: Sequence[Example]) -> Image.Image:
    """The examples whose query is a picture, one below the other: the picture, and its answers with their ranks.

    Right answers are green and say so. Text is drawn as it is, without any markup; one too long is cut. Raises
    InputError for a picture that cannot be read.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    rows = [
        (example.query, [line for answer in _answers(example) for line in _lines(*answer, font)])
        for example in examples
        if isinstance(example.query, Path)
    ]
    heights = [max(_SIDE, _LINE * len(lines)) + 2 * _MARGIN for _, lines in rows]
    sheet = Image.new("RGB", (_SIDE + _TEXT_WIDTH + 3 * _MARGIN, max(sum(heights), 1)), _PAPER)
    draw, top = ImageDraw.Draw(sheet), _MARGIN
    for (query, lines), height in zip(rows, heights, strict=True):
        sheet.paste(ImageOps.contain(open_image(query), (_SIDE, _SIDE)), (_MARGIN, top))
        for number, (text, colour) in enumerate(lines):
            draw.text((_SIDE + 2 * _MARGIN, top + number * _LINE), text, colour, font)
        top += height
    return sheet


def _answers(example: Example) -> Iterator[tuple[str, tuple[int, int, int]]]:
    for answer in example.answers:
        mark = ", right" if answer.is_right else ""
        yield f"{answer.rank}{mark}: {answer.content}", _RIGHT if answer.is_right else _INK


def _lines(
    text: str, colour: tuple[int, int, int], font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> list[tuple[str, tuple[int, int, int]]]:
    """The text in lines that fit, at most `_MAX_LINES`. Words break where one alone is too long, as Chinese may be."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= _TEXT_WIDTH:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for character in word:
            if font.getlength(lines[-1] + character) > _TEXT_WIDTH:
                lines.append("")
            lines[-1] += character
            if len(lines) > _MAX_LINES:
                break
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES - 1 :] = [f"{lines[_MAX_LINES - 1]} ..."]
    return [(line, colour) for line in lines]
