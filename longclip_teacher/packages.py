"""Packages that only a part of this project needs: which of them this environment lacks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable

__all__ = ["ONNX", "missing_packages"]

ONNX = ("torch>=2.7", "onnx", "onnxruntime", "onnxscript")
"""What writes and runs ONNX graphs. torch 2.6 fixes the batch of a graph, or cannot write it."""


def missing_packages(needed: Iterable[str]) -> list[str]:
    """Those of `needed` that cannot be imported, or are older than `name>=version` asks for."""
    missing = []
    for requirement in needed:
        name, _, lowest = requirement.partition(">=")
        if importlib.util.find_spec(name) is None or (
            lowest and _numbers(importlib.metadata.version(name)) < _numbers(lowest)
        ):
            missing.append(requirement)
    return missing


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0]))
