"""Wait for a program that was launched, and pass on to it the signals that ask for the end."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

from eval.base.workers import STOP_SIGNALS

__all__ = ["run_passing_signals"]

_POLL = 1.0  # seconds


def run_passing_signals(
    command: list[str], *, env: Mapping[str, str], tick: Callable[[], None] = lambda: None, **options: Any
) -> int:
    """Run `command` to its end and return its exit code, as subprocess.run does. Call `tick` every second.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on, so that a training saves its state. When it has ended,
    KeyboardInterrupt is raised after Ctrl-C, or else SystemExit with 128 + the signal's number. The program gets a
    session of its own: a terminal would send it Ctrl-C a second time.
    """
    received: list[int] = []
    process = subprocess.Popen(command, env=env, start_new_session=True, **options)

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        # torchrun itself would die of SIGUSR1
        process.send_signal(signal.SIGTERM if number == signal.SIGUSR1 else number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        while (code := _ended(process)) is None:
            tick()
    except BaseException:  # an error of `tick` must not leave a training behind
        process.terminate()
        process.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received:
        raise SystemExit(128 + received[0])
    return code


def _ended(process: subprocess.Popen[Any]) -> int | None:
    try:
        return process.wait(timeout=_POLL)
    except subprocess.TimeoutExpired:
        return None
