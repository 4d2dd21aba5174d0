"""The arithmetic of the towers, by name; apart from features.py so that options need not import torch."""

from __future__ import annotations

from typing import Literal

__all__ = ["Precision"]

Precision = Literal["fp32", "bf16", "fp16"]
