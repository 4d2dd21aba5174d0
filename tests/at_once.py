"""Commands that run at the same time, each in a process of its own."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from longclip_teacher.errors import run_command

__all__ = ["at_once", "start"]


def at_once(main: Callable[[], object], *commands: Sequence[str]) -> list[tuple[int, str]]:
    """Run `main` under each command line, and return exit codes and what was printed. The processes are forked, so that
    they need not import torch again."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, str(number)) for number in range(len(commands))]
        pids = [start(main, command, log) for command, log in zip(commands, logs, strict=True)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def start(main: Callable[[], object], command: Sequence[str], log: Path) -> int:
    """Run `main` under a command line in a forked process that prints into `log`. Return the process."""
    if (pid := os.fork()) != 0:
        return pid
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        sys.argv = list(command)
        run_command(main)  # type: ignore[arg-type]
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)
