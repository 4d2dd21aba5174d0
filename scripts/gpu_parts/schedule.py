"""Runs the parts of the GPU check: each in a process of its own, within its share of the time, its findings kept."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_parts.findings import Finding, Setting
from gpu_parts.worker import READY
from longclip_teacher.atomic_files import write_json, write_text

__all__ = ["STAGES", "Check"]

STAGES: tuple[tuple[tuple[str, ...], float], ...] = (
    (("losses", "towers", "precision", "resume", "nccl", "waits"), 75),
    (("kernels",), 15),
    (("step",), 45),
    (("open-clip",), 20),
    (("memory",), 15),
    (("run",), 30),
    (("compiled",), 25),
)
"""Parts and their shares of the time. Parts of one stage are not timed and run at once if there are enough cores."""
_WORKER = Path(__file__).with_name("worker.py")
_RUN_SHARE = 0.6  # of the real run's time, for training; the rest is its start and end
_CORES_EACH = 2
_LEAST_SHARES = 4  # into which the cores are divided, so that a part that prepares leaves some to the one that runs
_POLL = 0.2  # seconds
_LAST_WORD = 5.0  # seconds before the end in which the last part is ended and all is written


class Part:
    """The process of one part, and what it has found so far."""

    def __init__(self, name: str, folder: Path, setting: Setting, threads: int) -> None:
        self.name, self.findings, self.seconds = name, list[Finding](), 0.0
        self._told, self._log = folder / f"{name}.jsonl", folder / f"{name}.log"
        self._told.touch()
        self._read, self._since, self.ended = 0, 0.0, False
        chosen = folder / f"{name}.json"
        chosen.write_text(json.dumps(dataclasses.asdict(setting)))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-u", str(_WORKER), name, str(chosen), str(self._told)],
                env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                text=True, start_new_session=True,
            )  # fmt: skip

    def go(self, seconds: float) -> None:
        """Let it start, as soon as it is ready. It will be ended after `seconds`."""
        self._since = time.monotonic()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.close()
        except BrokenPipeError:  # it has failed already, and told why
            pass

    def poll(self) -> bool:
        """Read what it has told since; return whether there is anything new."""
        if self.ended:
            return False
        code = self._process.poll()
        text = self._told.read_text(encoding="utf-8")
        complete = text.rfind("\n") + 1
        new = [json.loads(line) for line in text[self._read : complete].splitlines()]
        self._read = complete
        self.findings += [Finding(**content) for content in new if content != READY]
        if code is not None:
            self.ended = True
            self.seconds = time.monotonic() - self._since
            if code:
                self.findings.append(Finding("ends early", failed=True, note=f"exit code {code}: {self._last_line()}"))
        return bool(new) or self.ended

    def end(self, why: str) -> None:
        """Kill it, with the processes that it has started, if it still runs."""
        if self.ended:
            return
        self.poll()
        if not self.ended:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self.ended, self.seconds = True, time.monotonic() - (self._since or time.monotonic())
            self.findings.append(Finding("the rest", note=why))

    def output(self) -> str:
        """What it has printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _last_line(self) -> str:
        return next((line for line in reversed(self.output().splitlines()) if line.strip()), "no output")[:200]


class Check:
    """One run of the check, and its files: check.json, table.md, log.txt."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.seconds = out, seconds
        self._begun = time.monotonic()
        self._parts: list[Part] = []
        self._machine: dict[str, Any] = {}
        self._shown: dict[str, int] = {}

    def run(self, names: tuple[str, ...], device: str, *, small: bool, shards: str | None) -> bool:
        """Run these parts; return whether no check failed."""
        stages = [(tuple(name for name in parts if name in names), share) for parts, share in STAGES]
        stages = _cut([(parts, share) for parts, share in stages if parts])
        total = sum(share for _, share in stages)
        scale = (self.seconds - _LAST_WORD) / total
        run_seconds = scale * _RUN_SHARE * dict(STAGES)[("run",)]
        setting = Setting(device, small, None if shards is None else str(Path(shards).absolute()), run_seconds)
        with tempfile.TemporaryDirectory() as folder:

            def started(stage: tuple[str, ...]) -> list[Part]:
                threads = max(1, (os.cpu_count() or 1) // max(len(stage), _LEAST_SHARES))
                return [Part(name, Path(folder), setting, threads) for name in stage]

            try:
                waiting = started(stages[0][0])
                self._look_at_machine(device)
                end = self._begun
                for number, (_, share) in enumerate(stages):
                    end += scale * share
                    self._parts += (current := waiting)
                    # the next parts import and prepare meanwhile
                    waiting = started(stages[number + 1][0]) if number + 1 < len(stages) else []
                    self._finish(current, end)
            finally:
                for part in (*self._parts, *waiting):
                    part.end("stopped")
                self._write()
        print(f"{time.monotonic() - self._begun:.0f} s in all; {self.out}/check.json, table.md, log.txt", flush=True)
        return not any(finding.verdict == "FAILED" for part in self._parts for finding in part.findings)

    def _look_at_machine(self, device: str) -> None:
        from benches.measure import machine
        from eval.base.processes import process_device

        process_device(device)  # refuses a GPU that is not there
        self._machine = machine()
        print(self._machine, flush=True)

    def _finish(self, parts: list[Part], end: float) -> None:
        """Let parts run to their end, or to the end of their time."""
        for part in parts:
            part.go(end - time.monotonic())
        while not all(part.ended for part in parts) and time.monotonic() < end:
            time.sleep(_POLL)
            new = [part.poll() for part in parts]  # each of them, whatever the others say
            if any(new):
                self._write()
        for part in parts:
            part.end(f"not done in {end - self._begun:.0f} s since the start of the check")
        self._write()

    def _write(self) -> None:
        """Print what is new, and write everything found so far."""
        for part in self._parts:
            shown = self._shown.get(part.name, 0)
            for finding in part.findings[shown:]:
                print(f"{finding.verdict:9} {part.name:9} {_in_words(finding)}", flush=True)
            self._shown[part.name] = len(part.findings)
        content = {
            "machine": self._machine,
            "seconds": round(time.monotonic() - self._begun, 1),
            "parts": {
                part.name: {
                    "seconds": round(part.seconds, 1),
                    "findings": [{"verdict": found.verdict, **dataclasses.asdict(found)} for found in part.findings],
                }
                for part in self._parts
            },
        }
        write_json(self.out / "check.json", content)
        write_text(self.out / "table.md", self._table())
        write_text(self.out / "log.txt", "\n".join(f"=== {part.name}\n{part.output()}" for part in self._parts))

    def _table(self) -> str:
        rows = ["| Part | Case | Value | Limit | Verdict | Note |", "| --- | --- | --- | --- | --- | --- |"]
        for part in self._parts:
            for found in part.findings:
                value = "" if found.value is None else f"{found.value:.4g} {found.unit}"
                limit = "" if found.limit is None else f"{found.limit:.2g}"
                cells = (part.name, found.case, value, limit, found.verdict, found.note)
                rows.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
        return "\n".join(rows) + "\n"


def _in_words(found: Finding) -> str:
    value = "" if found.value is None else f": {found.value:.4g} {found.unit}"
    limit = "" if found.limit is None else f" (limit {found.limit:.2g})"
    return f"{found.case}{value}{limit}{f'  [{found.note}]' if found.note else ''}"


def _cut(stages: list[tuple[tuple[str, ...], float]]) -> list[tuple[tuple[str, ...], float]]:
    """The same stages, with no more parts at once than there are cores for."""
    most = max(1, (os.cpu_count() or 1) // _CORES_EACH)
    cut = []
    for parts, share in stages:
        for start in range(0, len(parts), most):
            some = parts[start : start + most]
            cut.append((some, share * len(some) / len(parts)))
    return cut
