"""A model whose towers are computed by the runtime of exported files, such as ONNX Runtime.

Shapes: B images or captions, R image side, L tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eval.towers.tower_pair import OurModel, TowerPair
from longclip_teacher import towers as teacher_towers
from longclip_teacher.text import trim
from mobileclip_student import MobileCLIP, reparameterize
from mobileclip_student import towers as student_towers
from mobileclip_student.onnx_graphs import image_graph, onnx_encoder, text_graph

__all__ = ["ExportedModel", "exportable_towers", "exported_in_memory"]

_Encoder: TypeAlias = Callable[[Tensor], Tensor]


class ExportedModel(TowerPair):
    """Two functions in the place of a model's towers. Everything else is that of the model."""

    def __init__(
        self,
        model: OurModel,
        encode_image: _Encoder,
        encode_text: _Encoder,
        num_bytes: Mapping[str, int] | None = None,
    ) -> None:
        """`encode_image` takes pixels [B, 3, R, R] and `encode_text` token ids [B, L]; both give features [B, D] of
        unit norm. `model` is on the CPU. `num_bytes` are the sizes of the files of `image` and `text`."""
        super().__init__(model, model, model.logit_scale)
        self._encode_image, self._encode_text = encode_image, encode_text
        self.tower_bytes = dict(num_bytes or {})

    @property
    def num_bytes(self) -> int:
        """The size of both files."""
        return sum(self.tower_bytes.values())

    def encode_image(self, images: Float[Tensor, "B 3 R R"], normalize: bool = True) -> Float[Tensor, "B D"]:
        """Features of images that `preprocess` has normalised. They have unit norm in any case."""
        return self._encode_image(images)

    def encode_text(self, tokens: Int[Tensor, "B L"], normalize: bool = True) -> Float[Tensor, "B D"]:
        """Features of token ids, padded or not. They have unit norm in any case."""
        return self._encode_text(trim(tokens))


def exported_in_memory(model: OurModel) -> ExportedModel:
    """The float32 graphs that scripts/export.py writes, in memory: a student's with its branches merged.

    `model` is in eval mode and on the CPU. ONNX Runtime gets as many threads as torch has now. The packages of the
    extra `export` must be installed.
    """
    used = reparameterize(model) if isinstance(model, MobileCLIP) else model
    image_tower, text_tower = exportable_towers(used)
    graphs = {
        "image": image_graph(image_tower, used.image_size).SerializeToString(),
        "text": text_graph(text_tower, used.context_length).SerializeToString(),
    }
    image, text = (onnx_encoder(graph, torch.get_num_threads()) for graph in graphs.values())
    return ExportedModel(used, image, text, {tower: len(graph) for tower, graph in graphs.items()})


def exportable_towers(model: OurModel) -> tuple[nn.Module, nn.Module]:
    """Image tower and text tower in eval mode. Their features have unit norm."""
    towers = student_towers if isinstance(model, MobileCLIP) else teacher_towers
    return towers.ImageTower(model).eval(), towers.TextTower(model).eval()
