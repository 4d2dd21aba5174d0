"""The records of a run while it trains: config.toml, environment.json, metrics.jsonl, TensorBoard, console lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eval.base.consoles import plain_console
from eval.base.environment import environment_record, uncommitted_changes
from eval.base.processes import Runtime
from eval.measures.retrieval_examples import retrieval_examples
from eval.measures.retrieval_set import EncodedSet
from eval.pages.example_sheet import draw_examples
from longclip_teacher.atomic_files import json_text, without_nan, write_text, written_into
from longclip_teacher.folder_lock import check_folder
from training.generations import write_text_generation
from training.record.event_file import EventFile
from training.settings.tree import TrainConfig, config_to_toml

__all__ = ["RunLog", "read_metrics"]

_NUM_EXAMPLES, _NUM_ANSWERS = 4, 3  # of the sheet of retrieval examples


class RunLog:
    """Writes the run's records on rank 0 and nothing elsewhere. Its methods raise InputError if the run's folder cannot
    be written."""

    def __init__(self, config: TrainConfig, runtime: Runtime, *, step: int, total_steps: int) -> None:
        self.enabled = runtime.is_main
        self.total_steps = total_steps
        self.console = plain_console(stderr=True, quiet=not self.enabled, soft_wrap=True)
        if not self.enabled:
            return
        self._out_dir = out_dir = config.run.out_dir
        write_text_generation(out_dir / "config.toml", config_to_toml(config))
        _write_environment(out_dir)
        self._metrics_path = out_dir / "metrics.jsonl"
        every = config.run.eval_every
        _forget_after(self._metrics_path, step, is_validated_again=every > 0 and step % every == 0)
        with written_into(out_dir):
            self._metrics = self._metrics_path.open("a", encoding="utf-8")
            self._board = EventFile(out_dir / "tensorboard", first_step=step + 1)
            self._board.text(step, "config", _code_block(config_to_toml(config)))
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} · {task.fields[rate]} samples/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=step, loss="-", rate="-")
        self._progress.start()
        self._started, self._start_step = time.monotonic(), step

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self.enabled:
            self._progress.update(self._task, completed=step)

    def scalars(self, step: int, values: Mapping[str, float], group: str = "train") -> None:
        """Record named numbers at `step`: a line of metrics.jsonl, TensorBoard scalars, and a console line."""
        if not self.enabled:
            return
        row = without_nan({"step": step, "group": group, **values})
        check_folder(self._metrics_path)
        with written_into(self._out_dir):
            self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
            self._metrics.flush()
            self._board.scalars(step, {f"{group}/{name}": value for name, value in values.items()})
        if group != "train":
            shown = "  ".join(f"{name} {value:.2f}" for name, value in values.items())
            self.console.print(f"step {step} {group}: {shown}")
            return
        loss, rate = f"{values['loss']:.3f}", f"{values['samples_per_second']:.0f}"
        self._progress.update(self._task, loss=loss, rate=rate)
        if not self.console.is_terminal:
            left = (time.monotonic() - self._started) / max(1, step - self._start_step) * (self.total_steps - step)
            self.console.print(
                f"step {step}/{self.total_steps}  loss {loss}  {rate} samples/s  ETA {left:.0f} s", highlight=False
            )

    def examples(self, step: int, encoded: EncodedSet) -> None:
        """Draw a few pictures of an encoded set with the captions found for them, for TensorBoard."""
        if self.enabled:
            sheet = draw_examples(retrieval_examples(encoded, num_examples=_NUM_EXAMPLES, num_answers=_NUM_ANSWERS))
            with written_into(self._out_dir):
                self._board.picture(step, "val/pictures and the captions found", np.asarray(sheet))

    def say(self, message: str) -> None:
        """A line on the console."""
        self.console.print(message)

    def close(self) -> None:
        """Close; call also when the run failed."""
        if self.enabled:
            self._progress.stop()
            with written_into(self._out_dir), closing(self._board):
                self._metrics.close()


def read_metrics(run_dir: Path, group: str = "train") -> list[dict[str, float]]:
    """Lines of a run's metrics.jsonl of one group, in order. A value that was not finite, null in the file, is NaN. A
    half-written line and one of anything but numbers are left out."""
    rows = (row for _, row in _rows(run_dir / "metrics.jsonl") if row.pop("group") == group)
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines that hold a step, a group and numbers, each with its values."""
    content = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in content.split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(row, dict) or not isinstance(row.get("group"), str) or not isinstance(row.get("step"), int):
            continue
        if all(value is None or isinstance(value, (int, float)) for key, value in row.items() if key != "group"):
            yield line, row


def _code_block(text: str) -> str:
    """Text as a code block of Markdown. Indented, because a fence would end at a fence within the text."""
    return indent(text, "    ", lambda _: True)


def _forget_after(path: Path, step: int, *, is_validated_again: bool) -> None:
    """Drop the records of what a run resumed at `step` does again: later steps, and perhaps the validation at this."""
    if not path.exists():
        return
    kept = [
        line for line, row in _rows(path) if row["step"] < step + (row["group"] == "train" or not is_validated_again)
    ]
    write_text(path, "".join(line + "\n" for line in kept))


def _write_environment(out_dir: Path) -> None:
    """environment.json: versions, machine, command and commit; uncommitted changes go to git.diff."""
    write_text_generation(out_dir / "environment.json", json_text(environment_record()))
    if diff := uncommitted_changes():
        write_text(out_dir / "git.diff", diff + "\n")
