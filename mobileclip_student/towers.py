"""The student's towers one by one, from pixels or token ids to features of unit norm, ready to be exported.

Nothing in them depends on the values of their inputs: any batch goes through, and captions of 2 tokens to the context
length.

Shapes: B images or captions, R image side, L tokens, D embedding.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from longclip_teacher.features import unit_features
from longclip_teacher.text import with_end
from mobileclip_student.model import MobileCLIP

__all__ = ["ImageTower", "TextTower"]


class ImageTower(nn.Module):
    """Features of unit norm of pictures that `preprocess` has made."""

    def __init__(self, student: MobileCLIP) -> None:
        super().__init__()
        self.encoder = student.image_encoder

    def forward(self, pixel_values: Float[Tensor, "B 3 R R"]) -> Float[Tensor, "B D"]:
        return unit_features(self.encoder(pixel_values))


class TextTower(nn.Module):
    """Features of unit norm of captions.

    L is at most the context length, and a caption ends at its first EOT: it may be padded with EOT, with zeros or not
    at all. A caption without EOT, as transformers.js cuts long ones, ends in its last place.
    """

    def __init__(self, student: MobileCLIP) -> None:
        super().__init__()
        self.encoder = student.text_encoder

    def forward(self, input_ids: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        return unit_features(self.encoder.by_shape(with_end(input_ids)))
