"""Output that no terminal breaks: what its encoding lacks is written in ASCII."""

from __future__ import annotations

import codecs
import io
import sys

__all__ = ["print_anywhere"]

_ASCII = {
    "–": "-", "—": "-", "−": "-", "‐": "-", "·": ".", "•": "*", "…": "...", "→": "->", "←": "<-", "↔": "<->", "×": "x",
    "±": "+-", "≤": "<=", "≥": ">=", "≈": "~", "‘": "'", "’": "'", "“": '"', "”": '"', "°": " deg", "✓": "ok", "━": "-",
    "─": "-", "│": "|",
}  # fmt: skip
_HANDLER = "longclip_teacher.ascii"


def print_anywhere() -> None:
    """Let stdout and stderr take every character: one that their encoding lacks becomes its nearest ASCII characters,
    else an escape such as \\u4e2d, and \\udce9 for a byte of a file name that is no text."""
    codecs.register_error(_HANDLER, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    escapes = (_ASCII.get(one) or one.encode("ascii", "backslashreplace").decode() for one in characters)
    return "".join(escapes), error.end
