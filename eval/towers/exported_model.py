"""A model whose towers are computed by ONNX Runtime, as they are once exported.

Shapes: B images or captions, R image side, L tokens, D embedding.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eval.towers.tower_pair import OurModel, TowerPair
from longclip_teacher import towers as teacher_towers
from longclip_teacher.text import trim
from mobileclip_student import MobileCLIP, reparameterize
from mobileclip_student import towers as student_towers
from mobileclip_student.onnx_graphs import image_graph, onnx_encoder, text_graph

__all__ = ["ExportedModel"]


class ExportedModel(TowerPair):
    """The float32 graphs that scripts/export.py writes, in memory: a student's with its branches merged.

    `model` is in eval mode and on the CPU. ONNX Runtime gets as many threads as torch has now. The packages of the
    extra `export` must be installed.
    """

    def __init__(self, model: OurModel) -> None:
        used = reparameterize(model) if isinstance(model, MobileCLIP) else model
        super().__init__(used, used, used.logit_scale)
        towers = student_towers if isinstance(used, MobileCLIP) else teacher_towers
        graphs = [
            image_graph(towers.ImageTower(used).eval(), used.image_size).SerializeToString(),
            text_graph(towers.TextTower(used).eval(), used.context_length).SerializeToString(),
        ]
        self.num_bytes = sum(map(len, graphs))
        """The size of both files."""
        self._encode_image, self._encode_text = (onnx_encoder(graph, torch.get_num_threads()) for graph in graphs)

    def encode_image(self, images: Float[Tensor, "B 3 R R"], normalize: bool = True) -> Float[Tensor, "B D"]:
        """Features of images that `preprocess` has normalised. They have unit norm in any case."""
        return self._encode_image(images)

    def encode_text(self, tokens: Int[Tensor, "B L"], normalize: bool = True) -> Float[Tensor, "B D"]:
        """Features of token ids, padded or not. They have unit norm in any case."""
        return self._encode_text(trim(tokens))
