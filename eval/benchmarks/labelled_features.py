"""Features of pictures with classes, for zero-shot classification and the probes.

Shapes: N pictures, D embedding width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from eval.base.processes import on_main
from eval.benchmarks.labelled_images import LabelledImages
from eval.towers.features import (
    Encoding,
    Unreadable,
    encode_images,
    evaluation_mode,
    image_batches,
    model_device,
    refuse_many_unreadable,
)
from eval.towers.models import ClipModel
from longclip_teacher.errors import InputError

__all__ = ["LabelledFeatures", "encode_labelled"]


@dataclass(frozen=True)
class LabelledFeatures:
    """Unit-norm `features` [N,D] of the readable pictures, and the class `targets` [N] of each."""

    features: Float[Tensor, "N D"]
    targets: Int64[Tensor, " N"]
    unreadable: list[Unreadable]

    @property
    def num_found(self) -> int:
        """The number of pictures, including unreadable ones."""
        return len(self.targets) + len(self.unreadable)


def encode_labelled(model: ClipModel, labelled: LabelledImages, encoding: Encoding = Encoding()) -> LabelledFeatures:
    """Return features and classes of labelled pictures, on the model's device. The model's training mode does not
    change.

    Unreadable pictures are left out and named. More than 1% of them raises InputError, and so do NaN features.
    """
    if labelled.files is None:
        return _encode_stream(model, labelled, encoding)
    pictures = encode_images(model, [path for path, _ in labelled.files], encoding)
    targets = torch.tensor([number for _, number in labelled.files])
    return LabelledFeatures(
        pictures.features, targets[pictures.rows.cpu()].to(pictures.features.device), pictures.unreadable
    )


def _encode_stream(model: ClipModel, labelled: LabelledImages, encoding: Encoding) -> LabelledFeatures:
    def encode() -> dict[str, Tensor]:
        return _encoded_alone(model, labelled, encoding)

    # a stream cannot be dealt out: with several processes, rank 0 reads it
    found = on_main(encode) if encoding.shared else encode()
    unreadable = [Unreadable(*lost) for lost in json.loads(bytes(found["unreadable"].tolist()))]
    features = found["features"].to(model_device(model))
    return LabelledFeatures(features, found["targets"].to(features.device), unreadable)


def _encoded_alone(model: ClipModel, labelled: LabelledImages, encoding: Encoding) -> dict[str, Tensor]:
    """`features` [N,D] and `targets` [N], and the `unreadable` pictures as JSON bytes."""
    features, targets, unreadable = [], [], list[Unreadable]()
    with evaluation_mode(model, encoding.precision):
        for batch in image_batches(labelled.dataset(model.preprocess), encoding, model_device(model)):
            unreadable += batch.unreadable
            if len(batch.images):
                features.append(F.normalize(model.encode_image(batch.images).float(), dim=-1))
                targets.append(batch.targets)
    num_found = sum(len(part) for part in targets) + len(unreadable)
    refuse_many_unreadable(unreadable, num_found)
    if not features:
        raise InputError(f"no pictures with classes at {labelled.source}")
    stacked = torch.cat(features)
    if not torch.isfinite(stacked).all():
        raise InputError(
            f"NaN or infinity in the features of {labelled.source}: check the weights, or use precision fp32"
        )
    names = torch.frombuffer(bytearray(json.dumps(unreadable).encode()), dtype=torch.uint8)
    return {"features": stacked, "targets": torch.cat(targets), "unreadable": names}
