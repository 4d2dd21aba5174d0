"""A run that makes no progress says so, and ends: a worker, a disk, a network or another process may hang forever.

Each process notes its station (data, step, evaluation, save) and its progress there. A thread of its own tells the
others through torchrun's store, every second, and judges what they tell: nothing may stand still everywhere for long.
A process that waits while another evaluates is therefore never taken for one that hangs, however long that lasts.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from eval.base.processes import Runtime
from longclip_teacher.errors import InputError
from longclip_teacher.process_failures import is_lost_rank, kill_children

__all__ = ["TIMED_OUT", "Watchdog"]

TIMED_OUT = 124
"""Exit code of a run that is ended for lack of progress, as that of timeout(1)."""
_WARN_AFTER = 60.0  # seconds
_PATIENCE = 5.0  # seconds, with a thread that waits for the store
_COMPILED_STEPS = 10  # in which torch.compile may work for minutes
_COMPILATION = "compilation"
_ADVICE = {
    "data": "a process that loads data or the storage hangs: --data.num_workers 0 loads without such processes, "
    "--shm-size gives a container more shared memory",
    "save": "look at the disk of --run.out_dir",
}
_OTHER_ADVICE = "look at that process and its device (py-spy dump --pid PID)"
_num_watchdogs = itertools.count()  # a run may train its embedded teacher first; each training has its own keys


@dataclass
class _Seen:
    """What a process was last heard to say, and the times (on this process's clock) of its last sign of life and of its
    last progress."""

    alive: float
    moved: float
    moves: int = 0
    station: str = "start"
    step: int = 0
    phase: int = 0
    """Number of stations so far. Of several processes that stand still, the one behind keeps the others waiting."""
    waits: bool = False
    process: Sequence[str | int] = ()


class Watchdog:
    """Watches this process and the others within the block. All processes must enter it.

    limit         seconds without progress after which the run ends with exit code TIMED_OUT. After a minute, or half
                  that time, a line says who stands still, and where
    is_compiled   whether torch.compile works in the first steps, which are then not judged
    """

    def __init__(self, runtime: Runtime, limit: float, *, is_compiled: bool = False) -> None:
        self._rank, self._world_size, self._barrier = runtime.rank, runtime.world_size, runtime.barrier
        self._limit, self._warn_after, self._beat = limit, min(_WARN_AFTER, limit / 2), min(1.0, limit / 20)
        self._compiled_steps = _COMPILED_STEPS if is_compiled else 0
        self._over = threading.Event()
        self._store: dist.Store | None = None

    def __enter__(self) -> Watchdog:
        now = time.monotonic()
        self._threads = [threading.Thread(target=self._judge, daemon=True)]
        self._seen = [_Seen(now, now) for _ in range(self._world_size)]
        self._mine, self._heard = self._seen[self._rank], now
        self._mine.process = _identity(os.getpid())
        if self._world_size > 1:
            # a connection of its own: another thread may be waiting in that of the process group
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=self._limit))
            self._store = dist.PrefixStore(f"watchdog{next(_num_watchdogs)}", store)
            self._store.set(str(self._rank), self._told(0))
            self._barrier()  # all have told something now
            self._threads.append(threading.Thread(target=self._exchange, args=(self._store,), daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        try:
            if self._world_size > 1 and is_lost_rank(error):
                self._name_the_lost()
        finally:
            self._over.set()
            for thread in self._threads:  # one that is in the store when Python ends aborts the process
                thread.join(_PATIENCE)

    def station(self, name: str, step: int, *, waits: bool = False) -> None:
        """Note where this process is. All pass the same stations in the same order. One that only `waits` there for
        another is not at fault."""
        if name == "step" and self._compiled_steps:
            self._compiled_steps, name = self._compiled_steps - 1, _COMPILATION
        mine = self._mine
        mine.station, mine.step, mine.waits, mine.phase = name, step, waits, mine.phase + 1
        self.progress()

    def progress(self) -> None:
        """Note that this process has moved."""
        self._mine.moves += 1
        self._mine.moved = time.monotonic()

    def _told(self, beat: int) -> str:
        mine = self._mine
        return json.dumps([beat, mine.moves, mine.station, mine.step, mine.phase, mine.waits, mine.process])

    def _exchange(self, store: dist.Store) -> None:
        """Tell the others and hear them. Without the store, as after the death of its process, nobody is heard."""
        keys = [str(rank) for rank in range(self._world_size)]
        before = [b""] * self._world_size
        for beat in itertools.count(1):
            if self._over.wait(self._beat):
                return
            try:
                store.set(keys[self._rank], self._told(beat))
                told = store.multi_get(keys)
            except RuntimeError:
                return
            self._heard = time.monotonic()
            for rank, (seen, old, new) in enumerate(zip(self._seen, before, told, strict=True)):
                if rank != self._rank and old != new:
                    _, moves, *place = json.loads(new)
                    seen.alive = self._heard
                    seen.moved = self._heard if moves != seen.moves else seen.moved
                    seen.moves, (seen.station, seen.step, seen.phase, seen.waits, seen.process) = moves, place
            before = told

    def _judge(self) -> None:
        is_warned, looked = False, time.monotonic()
        while not self._over.wait(self._beat):
            now = time.monotonic()
            if now - looked > max(5.0, 10 * self._beat):  # this process was stopped itself
                for seen in self._seen:
                    seen.alive = seen.moved = now
            looked = self._mine.alive = now
            silent = self._silent(now, self._warn_after / 2)
            compiles = any(seen.station == _COMPILATION for rank, seen in enumerate(self._seen) if rank not in silent)
            idle = now - max(seen.moved for seen in self._seen)
            if compiles or idle < self._warn_after:
                is_warned = False
                continue
            if idle >= self._limit:
                self._end(silent)
            if not is_warned:
                is_warned = True
                left = f"the run ends after {self._limit:g} s (--run.collective_timeout)"
                self._say_once(f"no progress for {self._warn_after:g} s: {self._accused(silent)}; {left}")

    def _silent(self, now: float, after: float) -> list[int]:
        """The ranks that have given no sign of life for `after` seconds."""
        if self._world_size > 1 and now - self._heard > after and self._rank != 0:
            return [0]  # the store itself is silent; if torchrun does not hold it, rank 0 does
        return [rank for rank, seen in enumerate(self._seen) if now - seen.alive > after and rank != self._rank]

    def _accused(self, silent: list[int]) -> str:
        """Say which ranks keep the others waiting, where, and what to do."""
        ranks = silent
        if not silent:
            busy = [rank for rank, seen in enumerate(self._seen) if not seen.waits] or list(range(self._world_size))
            behind = min(self._seen[rank].phase for rank in busy)
            ranks = [rank for rank in busy if self._seen[rank].phase == behind]
        seen, (one, several) = self._seen[ranks[0]], ("stands still", "stand still")
        advice = _ADVICE.get(seen.station, _OTHER_ADVICE)
        if silent:
            one, several, advice = "gives no sign of life", "give no sign of life", "it is stopped, killed or cut off"
        who = "the run" if self._world_size == 1 else _ranks(ranks)
        return f"{who} {one if len(ranks) == 1 else several} ({_place(seen)}): {advice}"

    def _say_once(self, line: str) -> None:
        """Print a line, on one of the processes that have it to say."""
        if self._store is not None and time.monotonic() - self._heard < 3 * self._beat:
            try:
                moment = max(seen.phase for seen in self._seen)
                if self._store.add(f"{line.partition(':')[0]} {moment}", 1) > 1:
                    return
            except RuntimeError:  # its process has just ended, with the same line
                return
        os.write(2, f"{line}\n".encode())

    def _end(self, silent: list[int]) -> None:
        resume = "the run ends (--run.collective_timeout); --run.resume auto goes on from the last checkpoint"
        try:
            self._say_once(f"error: no progress for {self._limit:g} s: {self._accused(silent)}; {resume}")
            for process in (self._seen[rank].process for rank in silent):
                if process and process == _identity(int(process[1])):  # it is here, and no other has got its number
                    os.kill(int(process[1]), signal.SIGKILL)
        finally:
            kill_children()
            os._exit(TIMED_OUT)

    def _name_the_lost(self) -> None:
        """Raise InputError that names the ranks that have ended, if their silence tells, on one of the others."""
        for _ in range(8):
            time.sleep(self._beat)
            now = time.monotonic()
            is_ending = now - max(seen.moved for seen in self._seen) > self._limit - 3 * self._beat
            if not is_ending and (lost := self._silent(now, 3 * self._beat)):
                break
        else:
            return
        with contextlib.suppress(RuntimeError):  # nobody else can know if the store has ended too
            if self._store is not None and self._store.add("lost", 1) > 1:
                raise SystemExit(2)
        raise InputError(
            f"{_ranks(lost)} ended ({_place(self._seen[lost[0]])}): the error line of that process says why, or "
            "dmesg if it was killed; --run.resume auto goes on from the last checkpoint"
        )


def _place(seen: _Seen) -> str:
    return f"last station: {seen.station}, {seen.step} steps done"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _identity(pid: int) -> list[str | int]:
    """The host, the number and the start of a process; the number alone is given again."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = ""
    return [socket.gethostname(), pid, started]
