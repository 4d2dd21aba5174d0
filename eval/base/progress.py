"""Progress of long work, told to whoever watches this process.

Code that encodes batches reports each of them. Training listens: it notices a process that hangs, and it can end an
evaluation when a signal asks for the end of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Interrupted", "progress", "told"]

_listeners: list[Callable[[], None]] = []


class Interrupted(Exception):
    """Raised by a listener to end the work that reports its progress."""


def progress() -> None:
    """Tell the listeners that a part of the work is done. Raise Interrupted if one of them asks for the end."""
    for listener in _listeners:
        listener()


@contextmanager
def told(listener: Callable[[], None]) -> Iterator[None]:
    """Call `listener` at each progress within the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
