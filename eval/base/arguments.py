"""Reading a command line: --help and bad options are answered in a second, bad ones in one line.

torch and what is built on it take seconds to import. A command therefore has its options on top, then

    if __name__ == "__main__":
        answer_early(Options)  # --help and refused options end here: the imports below take seconds

and its slow imports below that. Imported by a test or by another module, it is a module like any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar, get_args

import tyro

from longclip_teacher.errors import InputError, reported_once, run_command

__all__ = ["answer_early", "errors_in_one_line", "read_options"]

_FRAME = re.compile(r"[^\x20-\x7e]+")  # the box that tyro draws around its message


class _Checked(Protocol):
    def check(self) -> None: ...


Options = TypeVar("Options", bound=_Checked)


def read_options(kind: type[Options], description: str | None = None) -> Options:
    """The options on the command line, checked. `kind` is a dataclass, or a union of them, one for each subcommand.

    `description` is the text above the options in --help; None: the docstring of `kind`. Raises InputError in one line.
    """
    with errors_in_one_line(_option_names(kind)):
        options = tyro.cli(kind, description=kind.__doc__ if description is None else description)
    options.check()
    return options


def answer_early(kind: type[Any], description: str | None = None) -> None:
    """End the program if the command line asks for help or is refused; return otherwise."""

    def answer() -> None:
        with reported_once():
            read_options(kind, description)

    run_command(answer)


def _option_names(kind: Any) -> list[str]:
    """Options of a dataclass, or of all members of a union."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)]
    return [name for member in get_args(kind) for name in _option_names(member)]


@contextlib.contextmanager
def errors_in_one_line(names: Sequence[str] = ()) -> Iterator[None]:
    """Turn tyro's box of several lines into an InputError; --help passes through. `names` are the options that exist,
    of which the error names the one nearest to an unknown one."""
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
        raise InputError(message) from None
