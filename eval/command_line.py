"""What the evaluation commands share: the options that say which model and how it is run, and the JSON they write."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.features import Encoding, Precision
from eval.models import ClipModel, load_model
from longclip_teacher.config import Activation
from longclip_teacher.errors import InputError
from mobileclip_student import MobileCLIP, reparameterize

__all__ = ["EvaluationOptions", "write_json"]


@dataclass
class EvaluationOptions:
    """Which model, and how it is run."""

    checkpoint: str | None = None
    """A student's or a teacher's weight file, a run's folder (its best weights), or a hub name such as longclip-b."""
    json: Path | None = None
    """Write the figures here, as JSON."""
    variant: str | None = None
    """The architecture of a published student whose file does not tell it: s0, s1, s2, b, mobileclip2_s0, ..."""
    context_length: int | None = None
    """Tokens read of a caption. Unset: 77 for published students, what was saved for ours, 248 for teachers."""
    pad_mask: bool | None = None
    """Hide padding from a student's attention. Unset: False for published students, what was saved for ours."""
    activation: Activation | None = None
    """A CLIP teacher's activation where its file does not tell it: quickgelu for OpenAI's, gelu for most others."""
    reparameterize: bool = False
    """Fuse a student's branches first, as for deployment: faster, the same figures."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    precision: Precision = "fp32"
    """The arithmetic of the towers; the figures are computed from float32 features in any case."""
    batch_size: int = 64
    """Pictures, or captions, encoded at a time."""
    num_workers: int = min(8, os.cpu_count() or 1)
    """Processes that decode pictures; 0 decodes in the main process."""

    def check(self) -> None:
        """InputError for options that can do nothing, before any data is read."""
        if self.checkpoint is None:
            raise InputError("pass --checkpoint PATH: a weight file, a run's folder, or a hub name such as longclip-b")
        if self.batch_size < 1 or self.num_workers < 0:
            raise InputError(
                f"--batch-size {self.batch_size} --num-workers {self.num_workers}: 1 or more and 0 or more"
            )
        if self.json is not None and self.json.is_dir():
            raise InputError(f"--json {self.json} is a folder: name a file")
        try:
            torch.empty(0, device=self._device())
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {self.device} cannot be used here ({str(error).splitlines()[0]})") from None

    def load(self) -> ClipModel:
        """The model, in eval mode, on its device."""
        assert self.checkpoint is not None  # check() comes first
        model = load_model(
            self.checkpoint,
            variant=self.variant,
            context_length=self.context_length,
            pad_mask=self.pad_mask,
            activation=self.activation,
            device=self._device(),
        )
        if not self.reparameterize:
            return model
        if not isinstance(model, MobileCLIP):
            raise InputError(
                f"{self.checkpoint} is a teacher, which has no branches to fuse: leave --reparameterize out"
            )
        return reparameterize(model)

    def encoding(self) -> Encoding:
        """How to encode, with progress bars."""
        return Encoding(self.batch_size, self.precision, self.num_workers, show_progress=True)

    def _device(self) -> str:
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` atomically: readers see the old file or the whole new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror})") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, allow_nan=False)
            file.write("\n")
        Path(temporary).chmod(0o644)  # mkstemp's 0600 would keep a shared run folder unreadable
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
