"""Signals that ask a run to end (TERM, INT, HUP, USR1): it finishes its step, saves, and ends with 128 + the number.

A signal may reach one process alone, or each at another moment. Before every step the processes therefore exchange
what they have received, so that all of them stop at the same step. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from eval.base.processes import Runtime
from eval.base.progress import Interrupted
from eval.base.workers import STOP_SIGNALS
from longclip_teacher.process_failures import kill_children

__all__ = ["StopSignals", "Stopped"]

_PATIENCE = 2.0  # seconds in which data that are on their way may still come
_APART = 1.0  # seconds; a launcher may pass on a signal that was also sent to everyone, which is still one request
Result = TypeVar("Result")


class Stopped(SystemExit):
    """The end of a run that a signal has asked for. Its state is saved; `code` is 128 + the signal's number."""


class _Woken(BaseException):
    """Ends a wait."""


class StopSignals:
    """Within the block, signals are noted instead of ending the process. A signal that is ignored stays ignored."""

    received = 0
    """Number of the first signal that came, 0 before."""

    def __enter__(self) -> StopSignals:
        self._is_waiting = False
        self._before = {
            number: signal.signal(number, self._note)
            for number in STOP_SIGNALS
            if signal.getsignal(number) != signal.SIG_IGN
        }
        self._alarm_before = signal.signal(signal.SIGALRM, self._wake)
        # Python calls a handler between two of its own instructions, so never while a collective waits. The number of
        # a signal is written into the pipe at once.
        self._numbers, self._written = os.pipe()
        os.set_blocking(self._written, False)
        self._wakeup_before = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        threading.Thread(target=self._end_at_the_second, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._written)  # ends the thread
        for number, handler in (*self._before.items(), (signal.SIGALRM, self._alarm_before)):
            signal.signal(number, handler)

    def wait_for(self, get: Callable[[], Result]) -> Result | None:
        """Return what `get` returns, but None if a signal has come and it does not return soon."""
        try:
            self._is_waiting = True
            try:
                return None if self.received else get()
            finally:
                self._is_waiting = False
                signal.setitimer(signal.ITIMER_REAL, 0)
        except _Woken:
            return None

    def interrupt(self) -> None:
        """Raise Interrupted once a signal has come: a listener to the progress of an evaluation."""
        if self.received:
            raise Interrupted

    def agreed(self, runtime: Runtime, is_due: bool = False) -> tuple[int, bool]:
        """Return a signal that any process has received, the same one on all, or 0 if none has; and whether `is_due` is
        True on any. If there is a signal, the second may be False. All must call this: it is one exchange."""
        number, due = divmod(runtime.highest(2 * self.received + is_due), 2)
        return number, bool(due)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number
        if self._is_waiting:
            signal.setitimer(signal.ITIMER_REAL, _PATIENCE)

    def _wake(self, *_: object) -> None:
        if self._is_waiting:
            self._is_waiting = False
            raise _Woken

    def _end_at_the_second(self) -> None:
        first = None
        while numbers := os.read(self._numbers, 64):
            ours = [number for number in numbers if number in STOP_SIGNALS]
            if not ours:
                continue
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first > _APART:
                os.write(2, f"second signal ({signal.Signals(ours[0]).name}): ended at once\n".encode())
                kill_children()
                os._exit(128 + ours[0])
        os.close(self._numbers)
