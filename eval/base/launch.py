"""Wait for programs that were launched, and pass on to them the signals that ask for the end."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from eval.base.workers import STOP_SIGNALS

__all__ = ["passing_signals", "run_passing_signals"]

_POLL = 1.0  # seconds


class _Relay:
    """The programs that run, and the signals that were passed on to them."""

    def __init__(self) -> None:
        self.processes: set[subprocess.Popen[Any]] = set()
        self.received: list[int] = []

    def pass_on(self, number: int, _: object = None) -> None:
        self.received.append(number)
        for process in tuple(self.processes):  # a thread may add one meanwhile
            _send(process, number)

    def raise_received(self) -> None:
        if signal.SIGINT in self.received:
            raise KeyboardInterrupt
        if self.received:
            raise SystemExit(128 + self.received[0])


_relays: list[_Relay] = []  # the outermost that is open; blocks within it use the same one


@contextmanager
def passing_signals() -> Iterator[_Relay]:
    """In the block SIGINT, SIGTERM, SIGHUP and SIGUSR1 go to the programs of `run_passing_signals`, of all threads.

    Only the main thread may open the outermost block. After a signal its end raises KeyboardInterrupt for Ctrl-C, or
    else SystemExit with 128 + the signal's number. An error ends the programs that run.
    """
    if _relays:
        yield _relays[0]
        return
    relay = _Relay()
    before = {number: signal.signal(number, relay.pass_on) for number in STOP_SIGNALS}
    _relays.append(relay)
    try:
        yield relay
    except BaseException:  # an error here must not leave a training behind
        for process in tuple(relay.processes):
            if not relay.received:  # a second signal would end a training that saves its state
                process.terminate()
            process.wait()
        raise
    finally:
        _relays.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
    relay.raise_received()


def run_passing_signals(
    command: list[str], *, env: Mapping[str, str], tick: Callable[[], None] = lambda: None, **options: Any
) -> int:
    """Run `command` to its end and return its exit code, as subprocess.run does. Call `tick` every second.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on, so that a training saves its state. When it has ended,
    KeyboardInterrupt is raised after Ctrl-C, or else SystemExit with 128 + the signal's number. The program gets a
    session of its own: a terminal would send it Ctrl-C a second time. Threads may run several programs at once within
    `passing_signals`.
    """
    with passing_signals() as relay:
        relay.raise_received()  # before another program begins
        process = subprocess.Popen(command, env=env, start_new_session=True, **options)
        relay.processes.add(process)
        for number in relay.received:  # one that came in between
            _send(process, number)
        try:
            while (code := _ended(process)) is None:
                tick()
        except BaseException:  # an error of `tick`
            process.terminate()
            process.wait()
            raise
        finally:
            relay.processes.discard(process)
        relay.raise_received()
    return code


def _send(process: subprocess.Popen[Any], number: int) -> None:
    # torchrun itself would die of SIGUSR1
    process.send_signal(signal.SIGTERM if number == signal.SIGUSR1 else number)


def _ended(process: subprocess.Popen[Any]) -> int | None:
    try:
        return process.wait(timeout=_POLL)
    except subprocess.TimeoutExpired:
        return None
