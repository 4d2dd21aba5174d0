"""A run's file for TensorBoard, written at once.

torch's SummaryWriter writes in a thread. When the disk is full, the thread dies with a traceback and the run goes on
without knowing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

__all__ = ["EventFile"]


class EventFile:
    """Scalars, texts and pictures by step, each on the disk when its method returns. All methods raise OSError."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Begin a file in `folder`, which is made if need be. TensorBoard then hides what earlier files hold of
        `first_step` and later."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._file = (folder / name).open("xb")
        self._records = RecordWriter(self._file)
        self._write(Event(step=first_step, file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name."""
        parts = [summary.scalar(name, value).value[0] for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=parts)))

    def text(self, step: int, name: str, markdown: str) -> None:
        """Record a text."""
        self._write(Event(step=step, summary=summary.text(name, markdown)))

    def picture(self, step: int, name: str, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
        """Record a picture."""
        self._write(Event(step=step, summary=summary.image(name, pixels, dataformats="HWC")))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._file.flush()
