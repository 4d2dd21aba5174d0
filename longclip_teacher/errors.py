"""A user's mistake ends in one line and exit code 2, never in a traceback."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from longclip_teacher.process_failures import explain_failure, kill_children
from longclip_teacher.terminal import print_anywhere

__all__ = ["DISK_ERRORS", "InputError", "reported_once", "run_command", "warn_once"]

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Causes that lie in what is written, whatever else was read: a disk that is full, limited or read-only."""


class InputError(ValueError):
    """Bad input: a missing path, a wrong key, a broken file. The message says what is wrong and what to do, in one
    line."""


def run_command(main: Callable[[], None]) -> None:
    """Call `main()` as a program: an InputError becomes `error: ...` on stderr and exit code 2, Ctrl-C exit code 130.

    So does a disk that takes no more, be it the one that stdout or stderr is written to, and the failure of another
    process on which this one depends, a worker or a rank. No worker outlives the program. What stdout and stderr cannot
    hold, as in file names that are not UTF-8, is printed in ASCII (`print_anywhere`).
    """
    print_anywhere()
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        _print_error(str(error))
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.unraisablehook = lambda _: None  # objects that were half made, such as a loader, complain when they go
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the program that read our output (head, less) has ended
        sys.stderr.close()
        raise SystemExit(141) from None
    except (RuntimeError, OSError, EOFError) as error:
        if (line := explain_failure(error)) is None and isinstance(error, OSError) and error.errno in DISK_ERRORS:
            line = f"cannot write {error.filename or 'the output'} ({error.strerror})"
        if line is None:
            raise
        _print_error(line)
        raise SystemExit(2) from None
    finally:
        kill_children()


def _print_error(message: str) -> None:
    with suppress(OSError):  # stderr may lie on a full disk
        print(f"error: {message}", file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                stream.close()  # or else the interpreter tries again at its end, and changes the exit code


@contextmanager
def reported_once() -> Iterator[None]:
    """Rank 0 alone reports the InputErrors that every process of torchrun would find; the others exit with code 2."""
    try:
        yield
    except InputError:
        if not _is_first():
            raise SystemExit(2) from None
        raise


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning that every process of torchrun would give, on rank 0 alone."""
    if _is_first():
        logger.warning("%s", message)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"
