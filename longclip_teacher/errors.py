"""A user's mistake ends in one line and exit code 2, never in a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from longclip_teacher.terminal import print_anywhere

__all__ = ["InputError", "reported_once", "run_command"]


class InputError(ValueError):
    """Bad input: a missing path, a wrong key, a broken file. The message says what is wrong and what to do, in one
    line."""


def run_command(main: Callable[[], None]) -> None:
    """Call `main()` as a program: an InputError becomes `error: ...` on stderr and exit code 2, Ctrl-C exit code 130.

    What stdout and stderr cannot hold, as in file names that are not UTF-8, is printed in ASCII (`print_anywhere`).
    """
    print_anywhere()
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the program that read our output (head, less) has ended
        sys.stderr.close()
        raise SystemExit(141) from None


@contextmanager
def reported_once() -> Iterator[None]:
    """Rank 0 alone reports the InputErrors that every process of torchrun would find; the others exit with code 2."""
    try:
        yield
    except InputError:
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(2) from None
        raise
