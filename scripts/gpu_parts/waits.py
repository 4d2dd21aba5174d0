"""How often a training step makes the host wait for the device.

A step that waits leaves the device without work until the host has queued more. On a GPU torch itself reports each
wait. On the CPU, which waits for nothing, the reads of single values, and of sizes that depend on values, are counted
instead.
"""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_parts.findings import Finding, Findings, Setting
from gpu_parts.sides import build_side, sizes
from training import pca

__all__ = ["ScalarReads", "waits_in", "waits_part"]

_ROOT = Path(__file__).parents[2]
_PRECISIONS = ("fp32", "bf16", "fp16")
_ATEN = torch.ops.aten
_READS = {
    _ATEN._local_scalar_dense.default, _ATEN.equal.default, _ATEN.nonzero.default, _ATEN.masked_select.default,
    _ATEN._unique2.default, _ATEN.unique_dim.default,
}  # fmt: skip


class ScalarReads(TorchDispatchMode):
    """Counts the reads of values (`item`, `bool`, `tolist`, `nonzero`) in the block, by the line of ours that reads.

    What is read through numpy lies on the host, or numpy would refuse it: such reads are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._lists = _Lists(self.places)

    def __enter__(self) -> ScalarReads:
        self._lists.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            self.places[_line(traceback.extract_stack())] += 1
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    """Counts the calls of `tolist`, which reads a CPU's memory without an operation."""

    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self._places = places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            self._places[_line(traceback.extract_stack())] += 1
        return func(*args, **(kwargs or {}))


def _line(stack: traceback.StackSummary) -> str:
    """The innermost line of the stack that is in this project, but not in this file."""
    for frame in reversed(stack):
        path = Path(frame.filename)
        if path.is_relative_to(_ROOT) and "site-packages" not in path.parts and path != Path(__file__):
            return f"{path.relative_to(_ROOT)}:{frame.lineno}"
    return "elsewhere"


def waits_in(function: Callable[[], Any], device: torch.device) -> Counter[str]:
    """Call the function; return the waits in it, by line."""
    if device.type != "cuda":
        with ScalarReads() as reads:
            function()
        return reads.places
    places: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            places[_line(traceback.extract_stack())] += 1

    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return places


def _eigenvalue_lines() -> set[str]:
    """The lines in which PCA decomposes a matrix. torch always waits there, to learn whether it has converged."""
    lines, first = inspect.getsourcelines(pca._eigh)
    path = Path(pca.__file__).relative_to(_ROOT)
    return {f"{path}:{number}" for number in range(first, first + len(lines))}


def waits_part(setting: Setting) -> Findings:
    """Count the waits of a step, teacher online and stored. Those of PCA's eigenvalues are told and not judged."""
    device = setting.torch_device
    student, teachers, batch = sizes(setting)
    yield None
    for stored in (True, False):
        for precision in _PRECISIONS:
            side = build_side(student, teachers[0], batch // 4, precision, device, stored=stored)
            side.step()
            found = waits_in(side.step, device)
            eigen = sum(found.pop(line) for line in _eigenvalue_lines() & found.keys())
            where = ", ".join(f"{line} ({count})" for line, count in found.most_common(8))
            name = f"{student} from {teachers[0]}, {'stored' if stored else 'online'}, {precision}"
            note = f"{eigen} in PCA's eigenvalues; {where}" if eigen else where
            yield Finding(f"{name}: host waits in a step", sum(found.values()), "waits", 0, note=note)
