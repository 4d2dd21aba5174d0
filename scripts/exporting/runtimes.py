"""Exported files as functions, each computed by the runtime that it is written for: ONNX Runtime or OpenVINO.

Shapes: B pictures or captions, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mobileclip_student.onnx_graphs import onnx_encoder

__all__ = ["Encoder", "num_bytes", "runtime_encoder"]

Encoder: TypeAlias = Callable[[Tensor], Tensor]
"""Pixels [B, 3, R, R] or token ids [B, L] to features [B, D]."""


def runtime_encoder(path: Path) -> Encoder:
    """The function of a file on one thread of the CPU: `.onnx` by ONNX Runtime, `.xml` by OpenVINO."""
    return _openvino_encoder(path) if path.suffix == ".xml" else onnx_encoder(path, 1)


def num_bytes(path: Path) -> int:
    """The size of a file, with OpenVINO's weights, which lie beside it."""
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" else 0)


def _openvino_encoder(path: Path) -> Encoder:
    """In float32: on a CPU with bfloat16, OpenVINO takes that unless it is told."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda batch: torch.from_numpy(np.array(compiled(batch.numpy())[0]))  # a copy: the next call writes there
