"""Milliseconds of exported graphs and of the model itself, measured in turns.

Shapes: B batch, R image side, L tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from exporting.runtimes import runtime_encoder
from exporting.sources import Exported
from longclip_teacher.text import EOT, SOT

__all__ = ["milliseconds"]

_TOKENS = 100  # of the caption
_ROUNDS = 30


def milliseconds(model: Exported, graphs: Mapping[str, tuple[str, Path]], rounds: int = _ROUNDS) -> dict[str, float]:
    """Median milliseconds of each graph (name: tower and file), and under `image` and `text` of the model's towers.

    Batch 1 and one thread. A caption has 100 tokens, or as many as the context has. All are called in turns, so that a
    machine that slows down affects all alike.
    """
    picture = torch.rand(1, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(0))
    caption = torch.full((1, min(_TOKENS, model.context_length)), 320)
    caption[0, 0], caption[0, -1] = SOT, EOT
    inputs = {"image": picture, "text": caption}
    calls: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "image": (model.encode_image, picture),
        "text": (model.encode_text, caption),
    }
    calls |= {name: (runtime_encoder(path), inputs[tower]) for name, (tower, path) in graphs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, given) in calls.items():
            call(given)  # not counted: weights come into the cache
            started = time.perf_counter()
            call(given)
            seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * median(values) for name, values in seconds.items()}
