"""The activation of a CLIP's blocks, by name; apart from config.py so that options need not import torch."""

from __future__ import annotations

from typing import Literal

__all__ = ["Activation"]

Activation = Literal["quickgelu", "gelu"]
