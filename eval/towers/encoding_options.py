"""How an evaluation command runs a model: device, precision, batch size, workers.

The methods import torch only when they are called, so that --help and a refused option do not wait for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eval.towers.precision import Precision
from longclip_teacher.errors import InputError

if TYPE_CHECKING:
    from eval.towers.features import Encoding

__all__ = ["EncodingOptions"]


@dataclass
class EncodingOptions:
    """How models are run."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto uses a GPU if there is one."""
    precision: Precision = "fp32"
    """Arithmetic of the towers. The figures are always computed from float32 features."""
    batch_size: int = 64
    """Pictures or captions per batch."""
    num_workers: int = min(8, os.cpu_count() or 1)
    """Processes that decode pictures; 0 decodes in the main process."""

    def check(self) -> None:
        """Raise InputError for options that cannot work, before any data is read."""
        if self.batch_size < 1 or self.num_workers < 0:
            raise InputError(
                f"--batch-size {self.batch_size} --num-workers {self.num_workers}: give at least 1 and at least 0"
            )
        if self.device in ("auto", "cpu"):
            return
        import torch

        try:
            torch.empty(0, device=self.torch_device())
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {self.device} cannot be used here ({str(error).splitlines()[0]})") from None

    def torch_device(self) -> str:
        """The device's name, with auto resolved."""
        if self.device != "auto":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def encoding(self) -> Encoding:
        """The encoding options, with progress bars and with the work shared among torchrun's processes."""
        from eval.towers.features import Encoding

        return Encoding(self.batch_size, self.precision, self.num_workers, show_progress=True, shared=True)
