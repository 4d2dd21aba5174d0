"""A contact sheet of picture pairs, side by side with a caption under each, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

__all__ = ["PicturePair", "draw_pairs"]

_SIDE, _MARGIN, _LINE, _COLUMNS, _FONT_SIZE = 160, 12, 16, 3, 13  # pixels, except for the columns
_PAPER, _INK, _EMPTY = (255, 255, 255), (20, 20, 20), (225, 225, 225)


class PicturePair(NamedTuple):
    """Two pictures (None: cannot be shown) and the lines of text under them."""

    left: Image.Image | None
    right: Image.Image | None
    lines: Sequence[str]


def draw_pairs(pairs: Sequence[PicturePair]) -> Image.Image:
    """Draw the pairs in rows of three, in order. A line too long for its pair keeps its end, where file names
    differ."""
    num_lines = max((len(pair.lines) for pair in pairs), default=0)
    width, height = 2 * _SIDE + _MARGIN, _SIDE + num_lines * _LINE + 2 * _MARGIN
    columns = min(_COLUMNS, max(1, len(pairs)))
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * (width + _MARGIN) + _MARGIN, rows * height + _MARGIN), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for number, pair in enumerate(pairs):
        left = _MARGIN + (number % columns) * (width + _MARGIN)
        top = _MARGIN + (number // columns) * height
        for picture, x in ((pair.left, left), (pair.right, left + _SIDE + 4)):
            frame = (x, top, x + _SIDE - 1, top + _SIDE - 1)
            draw.rectangle(frame, fill=_EMPTY)
            if picture is not None:
                fitted = ImageOps.contain(picture, (_SIDE, _SIDE))
                sheet.paste(fitted, (x + (_SIDE - fitted.width) // 2, top + (_SIDE - fitted.height) // 2))
        for line, text in enumerate(pair.lines):
            while len(text) > 4 and draw.textlength(text, font) > width:
                text = "..." + text[4:]
            draw.text((left, top + _SIDE + 2 + line * _LINE), text, _INK, font)
    return sheet
