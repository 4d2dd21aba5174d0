"""A user's mistake ends in one line and exit code 2, as in the rest of the project, whatever the terminal can show."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

__all__ = ["InputError", "run", "shown"]


class InputError(ValueError):
    """Bad input. The message says in one line what is wrong and what to do."""


def run(main: Callable[[], None]) -> None:
    """Call `main()` as a program: an InputError, and what the system refuses, becomes `error: ...` and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        _stop(str(error))
    except ModuleNotFoundError as error:
        _stop(f"{error.name} is not installed: pip install numpy onnxruntime tokenizers pillow")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the program that read our output (head, less) has ended
        sys.stderr.close()
        raise SystemExit(141) from None
    except OSError as error:
        _stop(f"{error.filename or 'the output'}: {error.strerror or error}")


def shown(text: str) -> str:
    """Text from outside on one line: control characters, and bytes of file names that are no text, as escapes."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _stop(message: str) -> None:
    print(f"error: {shown(message)}", file=sys.stderr)
    raise SystemExit(2) from None
