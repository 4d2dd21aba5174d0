"""The image tower of one model with the text tower of another, as one model.

A student tower that was trained alone in its teacher's embedding space is evaluated with the teacher's other tower.

Shapes: B images or captions, R image side, L tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor, nn

from longclip_teacher import LongCLIP
from longclip_teacher.config import TeacherConfig
from longclip_teacher.errors import InputError
from longclip_teacher.open_clip_parts import PreprocessCfg
from longclip_teacher.text import CaptionTokenizer
from mobileclip_student import MobileCLIP
from mobileclip_student.model import StudentConfig

__all__ = ["OurModel", "TowerPair"]

OurModel: TypeAlias = LongCLIP | MobileCLIP


class TowerPair(nn.Module):
    """Two towers with one embedding space. Nothing else of the two models becomes part of the pair.

    Both models must be on the same device. `logit_scale` (log space) belongs to neither tower and is given.
    """

    def __init__(self, image: OurModel, text: OurModel, logit_scale: nn.Parameter) -> None:
        """Raises InputError for towers of different feature widths."""
        super().__init__()
        if image.embed_dim != text.embed_dim:
            raise InputError(
                f"the image tower gives {image.embed_dim} features and the text tower {text.embed_dim}: they have no "
                f"common space (--student.embed_dim sets a student's width)"
            )
        self.visual = image.image_encoder if isinstance(image, MobileCLIP) else image.visual
        self.text = text.text_encoder if isinstance(text, MobileCLIP) else text.text
        self.logit_scale = logit_scale
        self._models = (image, text)  # a tuple keeps the models, with their unused towers, outside the module tree

    def encode_image(self, images: Float[Tensor, "B 3 R R"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Features of images that `preprocess` has normalised."""
        return self._models[0].encode_image(images, normalize=normalize)

    def encode_text(self, tokens: Int[Tensor, "B L"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Features of token ids of any length; captions beyond `context_length` are cut, with EOT kept."""
        return self._models[1].encode_text(tokens, normalize=normalize)

    @property
    def config(self) -> tuple[StudentConfig | TeacherConfig, StudentConfig | TeacherConfig]:
        """The configurations of the models of the image tower and the text tower."""
        return self._models[0].config, self._models[1].config

    @property
    def linear_logit_scale(self) -> Float[Tensor, ""]:
        """The factor on cosine similarities."""
        return self.logit_scale.exp()

    @property
    def embed_dim(self) -> int:
        """Width D of the features."""
        return self._models[0].embed_dim

    @property
    def image_size(self) -> int:
        """The image tower's input size: side of the square picture in pixels."""
        return self._models[0].image_size

    @property
    def context_length(self) -> int:
        """The text tower's longest caption in tokens."""
        return self._models[1].context_length

    @property
    def tokenizer(self) -> CaptionTokenizer:
        """The text tower's tokenizer."""
        return self._models[1].tokenizer

    @property
    def preprocess_cfg(self) -> PreprocessCfg:
        """The image tower's size, mean, std and interpolation."""
        return self._models[0].preprocess_cfg

    @property
    def preprocess(self) -> Callable[[Image], Tensor]:
        """The image tower's evaluation transform: a PIL picture to a normalised [3, R, R] tensor."""
        return self._models[0].preprocess
