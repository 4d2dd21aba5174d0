"""What the models hand to the losses.

Shapes: B samples of this process (G of all processes once gathered), D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from longclip_teacher import LongCLIP
from longclip_teacher.trace import Trace
from mobileclip_student import MobileCLIP
from training.data.decoding import normalized
from training.data.transforms import ViewSpec
from training.settings.needs import Tower

__all__ = ["Features", "LossParameters", "Outputs", "TeacherOutputs", "normalized_for", "view_of"]


@dataclass(frozen=True)
class Features:
    """Unit-norm rows of one model, or of several teachers side by side, each part of unit norm. None: not needed."""

    image: Float[Tensor, "B D"] | None = None
    """Pictures. For a student with a distillation token, the output of its class token."""
    long: Float[Tensor, "B D"] | None = None
    """Long captions."""
    short: Float[Tensor, "B D"] | None = None
    """Short captions."""
    sub: Float[Tensor, "B K D"] | None = None
    """Sub-captions, K per picture."""
    distilled_image: Float[Tensor, "B D"] | None = None
    """Pictures, from the distillation token of a student that has one."""
    masked_image: Float[Tensor, "B D"] | None = None
    """Pictures of which the student sees a part."""
    short_image: Float[Tensor, "B D"] | None = None
    """Pictures in the space of another teacher, which reads the short captions."""
    reduced: Features | None = None
    """The rows after PCA over each process's share, not of unit norm (only with loss.pca_scope rank)."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Features:
        """`function` applied to each tensor, in a fixed order."""
        found = Features.of({name: function(value) for name, value in self.tensors().items()})
        return found if self.reduced is None else replace(found, reduced=self.reduced.map(function))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name, without the reduced ones."""
        names = (found.name for found in fields(self) if found.name != "reduced")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name. Raises KeyError if this run has none."""
        value = getattr(self, name)
        if value is None:
            raise KeyError(name)
        return value

    def with_sub(self, k: int) -> Features:
        """The same with sub-caption `k` of each picture alone, [B, D]."""
        return self if self.sub is None else replace(self, sub=self.sub[:, k])

    @property
    def answering(self) -> str:
        """Name of the image feature that learns from the teacher: the distillation token's if there is one."""
        return "image" if self.distilled_image is None else "distilled_image"

    @staticmethod
    def of(tensors: Mapping[str, Any]) -> Features:
        """Features from tensors by name."""
        return Features(**tensors)

    @staticmethod
    def joined(parts: Sequence[Features]) -> Features:
        """Rows of several chunks, one below the other."""
        return Features.of({name: torch.cat([part[name] for part in parts]) for name in parts[0].tensors()})


@dataclass(frozen=True)
class LossParameters:
    """What the losses learn. The forward pass returns it, so that DDP and gradient caching see that it is used."""

    logit_scale: Float[Tensor, ""]
    """The model's scale, linear."""
    scales: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Linear scales by the loss that learns them."""
    mixtures: dict[Tower, Float[Tensor, "Do Ds+Dt"]] = field(default_factory=dict)
    """Matrices over student and teacher features side by side (AFD), by tower."""

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        return [self.logit_scale, *self.scales.values(), *self.mixtures.values()]

    def map(self, function: Callable[[Tensor], Tensor]) -> LossParameters:
        """`function` applied to each tensor."""
        return LossParameters(
            function(self.logit_scale),
            {name: function(value) for name, value in self.scales.items()},
            {tower: function(value) for tower, value in self.mixtures.items()},
        )


@dataclass(frozen=True)
class Outputs:
    """What a forward pass of the trained model gives the losses."""

    features: Features
    """The student's own rows, with gradient."""
    mapped: Features
    """Rows mapped to the teacher's width by a learned layer, of unit norm again; empty if the widths agree. `image` is
    the feature that learns from the teacher."""
    parameters: LossParameters
    traces: dict[Tower, Trace] = field(default_factory=dict)
    """What the layers of a tower compute, for layer losses. `hidden` and `embedding` are mapped to the teacher's
    width."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Outputs:
        """`function` applied to each tensor that may carry a gradient."""
        traces = {tower: trace.map(function) for tower, trace in self.traces.items()}
        mapped = self.mapped.map(function)
        return Outputs(self.features.map(function), mapped, self.parameters.map(function), traces)

    def rows(self) -> list[Tensor]:
        """All tensors with a row for each sample that may carry a gradient, in a fixed order."""
        features = [*self.features.tensors().values(), *self.mapped.tensors().values()]
        return features + [tensor for trace in self.traces.values() for tensor in trace.tensors()]


@dataclass(frozen=True)
class TeacherOutputs:
    """What the frozen teachers give the losses, without gradient."""

    features: Features
    traces: dict[Tower, Trace] = field(default_factory=dict)


def view_of(model: MobileCLIP | LongCLIP) -> ViewSpec:
    """The size and the resampling at which a model sees a picture."""
    return ViewSpec(model.image_size, model.preprocess_cfg.interpolation)


def normalized_for(model: MobileCLIP | LongCLIP, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Pictures with the mean and the deviation that `model` expects."""
    mean, std = (
        _channels(tuple(value), model.logit_scale.dtype, images.device)
        for value in (model.preprocess_cfg.mean, model.preprocess_cfg.std)
    )
    return normalized(images, mean, std)


@cache
def _channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Float[Tensor, "3 1 1"]:
    """A value for each channel. It is kept, because the host waits while it is copied to a GPU."""
    return torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1)
