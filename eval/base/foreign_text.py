"""Text from foreign files, which may hold what UTF-8 cannot: half an emoji."""

from __future__ import annotations

__all__ = ["HALVES", "whole_characters"]

HALVES = "surrogatepass"
"""Error handler with which a file of foreign text is opened: half an emoji is read, and `whole_characters` replaces it.
Other bytes that are not UTF-8 still raise UnicodeDecodeError."""


def whole_characters(text: str) -> str:
    """Return `text` with U+FFFD for each lone surrogate (half an emoji, which a cut or a JSON escape leaves behind).

    Two halves in sequence become their character. The result can always be encoded as UTF-8.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
