"""The options that say how any evaluation command runs a model: device, precision, batches, workers.

The methods import what they need when they are called: --help and a refused option must not wait for torch.
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
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    precision: Precision = "fp32"
    """The arithmetic of the towers; the figures are computed from float32 features in any case."""
    batch_size: int = 64
    """Pictures, or captions, encoded at a time."""
    num_workers: int = min(8, os.cpu_count() or 1)
    """Processes that decode pictures; 0 decodes in the main process."""

    def check(self) -> None:
        """InputError for options that can do nothing, before any data is read."""
        if self.batch_size < 1 or self.num_workers < 0:
            raise InputError(
                f"--batch-size {self.batch_size} --num-workers {self.num_workers}: 1 or more and 0 or more"
            )
        if self.device in ("auto", "cpu"):
            return
        import torch

        try:
            torch.empty(0, device=self.torch_device())
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {self.device} cannot be used here ({str(error).splitlines()[0]})") from None

    def torch_device(self) -> str:
        """The device that is meant."""
        if self.device != "auto":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def encoding(self) -> Encoding:
        """How to encode: with progress bars, and shared where the command joined torchrun's processes."""
        from eval.towers.features import Encoding

        return Encoding(self.batch_size, self.precision, self.num_workers, show_progress=True, shared=True)
