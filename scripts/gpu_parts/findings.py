"""What a part of the GPU check is given, and what it finds."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch

__all__ = ["Finding", "Findings", "Setting"]


@dataclass(frozen=True)
class Setting:
    """How the parts run."""

    device: str
    """cuda, or cpu for a rehearsal."""
    small: bool
    """Use the smallest models and batches."""
    shards: str | None
    """Training shards of the real run. None: the embedded boards."""
    seconds: float
    """Seconds for which the real run trains after its first log entry, if there is time."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


@dataclass(frozen=True)
class Finding:
    """One measured figure, or what could not be measured."""

    case: str
    value: float | None = None
    unit: str = ""
    limit: float | None = None
    """Largest value that passes. None: the value is reported and not judged."""
    failed: bool = False
    """True for a failure that has no figure."""
    note: str = ""
    """Context, or the reason why there is no value."""

    @property
    def verdict(self) -> str:
        """ok or FAILED for what is judged, told for a mere figure, and `could not` for what has none."""
        if self.failed:
            return "FAILED"
        if self.value is None:
            return "could not"
        if self.limit is None:
            return "told"
        return "ok" if self.value <= self.limit else "FAILED"  # nan fails


Findings = Generator[Finding | None, float, None]
"""A part is a generator. It sets itself up, yields None once, for which it gets the seconds that it has, and yields its
findings from then on: at least one."""
