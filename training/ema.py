"""An exponential moving average of a model's weights, to be evaluated and saved in place of the last ones."""

from __future__ import annotations

from copy import deepcopy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["ModelEma"]

Model = TypeVar("Model", bound=nn.Module)


class ModelEma(Generic[Model]):
    """A copy of a model in training that holds the average of its weights (Polyak and Juditsky 1992).

    The average runs over all floating tensors of the state_dict, BatchNorm's statistics included; counters are copied.
    The copy is on the model's device, in evaluation mode and without gradients, and is no part of the model: no
    optimiser, DDP or `.train()` sees it.
    """

    def __init__(self, model: Model, decay: float) -> None:
        """Start from the weights of `model`. `decay` is the share that an update leaves of the average, in the end."""
        self.decay = decay
        self.model = deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: Model, step: int, moves: Tensor) -> None:
        """Move the average towards the weights that `model` has after step `step` (from 0), unless `moves` is False.

        The decay starts small and grows, min(decay, (1 + step) / (10 + step)), so that the initial weights are soon
        forgotten.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, values = self.model.state_dict(), model.state_dict()
        floating = [name for name, value in values.items() if value.is_floating_point()]
        share = moves.double() * (1 - decay)
        shares = [share.to(values[name].dtype) for name in floating]
        torch._foreach_lerp_([averages[name] for name in floating], [values[name] for name in floating], shares)
        for name in values.keys() - set(floating):
            averages[name].copy_(values[name])
