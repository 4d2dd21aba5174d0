"""Read a command line: answer --help and bad options within a second, and bad options in one line.

torch and the libraries built on it take seconds to import. A command therefore has its options first, then

    if __name__ == "__main__":
        answer_early(Options)  # --help and refused options end here: the imports below take seconds

and its slow imports after that. When imported by a test or another module, it behaves like any module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar, get_args

import tyro

from longclip_teacher.errors import InputError, reported_once, run_command

__all__ = ["answer_early", "errors_in_one_line", "read_options"]

_FRAME = re.compile(r"[^\x20-\x7e]+")  # the box that tyro draws around its message

_WRONG_VALUE = re.compile(
    r"Error parsing (?P<option>\S+): .*?(?P<given>'[^']*')(?=\]?( Got|\. Got| Argument|\. Argument)).*"
    r"Argument helptext: \S+ (?P<kind>\S+)"
)


class _Checked(Protocol):
    def check(self) -> None: ...


Options = TypeVar("Options", bound=_Checked)


def read_options(kind: type[Options], description: str | None = None) -> Options:
    """Return the checked options of the command line. `kind` is a dataclass, or a union of one per subcommand.

    `description` is the text above the options in --help; None: the docstring of `kind`. Raise a one-line InputError.
    """
    with errors_in_one_line(_option_names(kind)):
        options = tyro.cli(kind, description=kind.__doc__ if description is None else description)
    for value in vars(options).values():
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, str | Path) and str(one).startswith("--"):  # tyro 1.0 takes it for a positional one
                raise InputError(f"Unrecognized options: {one}; --help lists the options")
    options.check()
    return options


def answer_early(kind: type[Any], description: str | None = None) -> None:
    """End the program if the command line asks for help or is refused; return otherwise. From now on Ctrl-C is one line
    and exit code 130, in the imports that follow too."""

    def answer() -> None:
        with reported_once():
            read_options(kind, description)

    run_command(answer)
    sys.excepthook = _interrupted_in_one_line


def _interrupted_in_one_line(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, where)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def _option_names(kind: Any) -> list[str]:
    """Return the options of a dataclass, or of all members of a union."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)]
    return [name for member in get_args(kind) for name in _option_names(member)]


@contextlib.contextmanager
def errors_in_one_line(names: Sequence[str] = ()) -> Iterator[None]:
    """Turn tyro's box of several lines into an InputError; --help passes through. `names` are the existing options;
    the error suggests the one nearest to an unknown option."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        content = errors.getvalue().partition("\n")[2]  # below the box's title
        message = " ".join(_FRAME.sub(" ", content).split()).partition(" For full helptext")[0].removesuffix(".")
        if unknown := re.search(r"Unrecognized options: ([^\s,]+)", message):
            message = message[unknown.start() :].partition(" Perhaps you meant")[0]
            near = difflib.get_close_matches(unknown[1].partition("=")[0], names, n=1)
            message += f"; did you mean {near[0]}?" if near else "; --help lists the options"
        elif value := _WRONG_VALUE.match(message):
            kind = value["kind"].replace("{", "").replace("}", "")
            message = f"{value['option']} takes {kind}, got {value['given']}"
        raise InputError(message.partition(" Argument helptext")[0]) from None
