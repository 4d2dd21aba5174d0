"""Consoles that print text as it is: paths, class names and captions are no markup, and no colon makes an emoji."""

from __future__ import annotations

from rich.console import Console

__all__ = ["plain_console"]


def plain_console(*, stderr: bool = False, soft_wrap: bool = False, quiet: bool = False) -> Console:
    """Return a rich console on stdout or stderr. What should be bold is given to it as rich's Text."""
    return Console(stderr=stderr, soft_wrap=soft_wrap, quiet=quiet, markup=False, emoji=False, highlight=False)
