"""MobileCLIP: an image tower, a text tower that reads 248 tokens, and the scale of their logits.

Shapes: B images or captions, R image side, L tokens, D embedding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor, nn

from longclip_teacher.ancestry import NOT_RECORDED, Ancestry
from longclip_teacher.errors import InputError
from longclip_teacher.open_clip_parts import PreprocessCfg, image_transform_v2
from longclip_teacher.text import CONTEXT_LENGTH, CaptionTokenizer
from mobileclip_student.image_encoder import FIXED_SIZE_TOWERS, VIT, ImageConfig, ImageEncoder
from mobileclip_student.text_encoder import TextConfig, TextTransformer

__all__ = ["VARIANTS", "MobileCLIP", "StudentConfig", "TextTowerName", "create_student", "override", "variant_config"]

_CONFIGS = Path(__file__).parent / "configs"
TextTowerName = Literal["hybrid", "base", "causal", "longclip"]
_TEXT_TOWERS: dict[str, dict[str, Any]] = {
    "hybrid": {"hybrid": True, "causal": False, "activation": "gelu"},
    "base": {"hybrid": False, "causal": False, "activation": "gelu"},
    "causal": {"hybrid": False, "causal": True, "activation": "gelu"},
    "longclip": {"hybrid": False, "causal": True, "activation": "quickgelu"},
}
VARIANTS: tuple[str, ...] = tuple(sorted(path.stem for path in _CONFIGS.glob("*.json")))
_VIT_FIELDS = {  # the names of `override` and the fields of ImageConfig
    "image_patch": "patch",
    "image_width": "width",
    "image_layers": "depth",
    "image_heads": "heads",
    "distillation_token": "distillation_token",
}
_INITIAL_TEMPERATURE = 0.07
_MAX_SIZE = 8192  # bounds the memory that a configuration read from a file can ask for


@dataclass(frozen=True)
class StudentConfig:
    """Everything that is needed to build a student; stored with its weights."""

    variant: str
    embed_dim: int
    image: ImageConfig
    text: TextConfig
    context_length: int = CONTEXT_LENGTH
    """longest caption in tokens; longer ones are cut, with EOT kept"""
    pad_mask: bool = True
    """True: pads never matter. False, as published: every position up to the context length takes part"""
    reparameterized: bool = False
    """whether the student is in inference form, with branches and BatchNorms folded"""

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """The model in one phrase, such as `MobileCLIP student s0, 77 tokens, pads attended`."""
        pads = "masked" if self.pad_mask else "attended"
        fused = ", branches fused" if self.reparameterized else ""
        return f"MobileCLIP student {self.variant}, {self.context_length} tokens, pads {pads}{fused}"

    def __post_init__(self) -> None:
        if not (1 <= self.embed_dim <= _MAX_SIZE and 2 <= self.context_length <= _MAX_SIZE):
            raise InputError(f"embed_dim {self.embed_dim} or context_length {self.context_length} is out of range")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StudentConfig:
        """The inverse of `to_dict`; an unknown, missing or malformed entry is an InputError."""
        try:
            image: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in values["image"].items()
            }
            parts = {"image": ImageConfig(**image), "text": TextConfig(**values["text"])}
            return cls(**{**values, **parts})
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a student configuration ({error}): it needs {', '.join(_names())}") from None


class MobileCLIP(nn.Module):
    """The student. Features are not normalised unless asked for; captions may be padded to any length."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config.image, config.embed_dim)
        self.text_encoder = TextTransformer(
            config.text, config.embed_dim, context_length=config.context_length, pad_mask=config.pad_mask
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / _INITIAL_TEMPERATURE)))  # log space
        self.tokenizer = CaptionTokenizer(config.context_length)
        self.ancestry: Ancestry = NOT_RECORDED
        """Where its weights come from; saved with them."""

    def encode_image(self, images: Float[Tensor, "B 3 R R"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Features of images that `preprocess` (or its mean and std) has normalised."""
        features = self.image_encoder(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_image_heads(
        self, images: Float[Tensor, "B 3 R R"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"] | None]:
        """Features of the class token and of the distillation token (None where the tower has none), not normalised.

        `encode_image` returns their mean: the heads differ in training and answer together (DeiT, section 4).
        """
        return self.image_encoder.heads(images)

    def encode_text(self, tokens: Int[Tensor, "B L"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Features of captions; captions beyond `context_length` tokens are cut, with EOT kept."""
        return self.encode_texts(tokens, normalize=normalize)[0]

    def encode_texts(
        self,
        *batches: Int[Tensor, "B L"],
        normalize: bool = False,
        shifts: Sequence[Int[Tensor, " B"] | None] | None = None,
    ) -> list[Float[Tensor, "B D"]]:
        """Features of batches of captions, each at its own length; in training they share BatchNorm statistics.

        `shifts`, one per batch, moves the tokens after SOT to later positions, so that training reaches all of them.
        """
        features = self.text_encoder(*batches, shifts=shifts)
        return [F.normalize(value, dim=-1) for value in features] if normalize else features

    @property
    def linear_logit_scale(self) -> Float[Tensor, ""]:
        """The factor of the cosine similarities; `logit_scale` is its logarithm."""
        return self.logit_scale.exp()

    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim

    @property
    def image_size(self) -> int:
        return self.config.image.image_size

    @property
    def context_length(self) -> int:
        return self.config.context_length

    @property
    def pad_mask(self) -> bool:
        return self.config.pad_mask

    @property
    def preprocess_cfg(self) -> PreprocessCfg:
        image = self.config.image
        return PreprocessCfg(size=image.image_size, mean=image.mean, std=image.std, interpolation=image.interpolation)

    @property
    def preprocess(self) -> Callable[[Image], Tensor]:
        """PIL image to [3, R, R], resized, cropped and normalised."""
        return image_transform_v2(self.preprocess_cfg, is_train=False)


def variant_config(variant: str) -> StudentConfig:
    """The configuration of a named variant, at 248 tokens with pads masked."""
    if variant not in VARIANTS:
        raise InputError(f"no student variant {variant!r}: choose {', '.join(VARIANTS)}")
    values = json.loads((_CONFIGS / f"{variant}.json").read_text())
    return StudentConfig.from_dict({"variant": variant, **values})


def override(
    config: StudentConfig,
    *,
    embed_dim: int | None = None,
    image_size: int | None = None,
    image_patch: int | None = None,
    image_width: int | None = None,
    image_layers: int | None = None,
    image_heads: int | None = None,
    distillation_token: bool | None = None,
    drop_path: float | None = None,
    text_tower: TextTowerName | None = None,
    text_width: int | None = None,
    text_layers: int | None = None,
    text_heads: int | None = None,
) -> StudentConfig:
    """`config` with towers of another shape; None leaves a value as it is. Tensors of the same shape still load.

    image_patch, image_width, image_layers, image_heads and distillation_token belong to a ViT (tower `vit`). text_tower
    is hybrid (RepMixer, attention, RepMixer), base (attention both ways), causal, or longclip (causal with QuickGELU:
    Long-CLIP's own text transformer).

    Raises InputError for options that the image tower does not have and for sizes that do not fit together.
    """
    of_vit = _given(
        image_patch=image_patch,
        image_width=image_width,
        image_layers=image_layers,
        image_heads=image_heads,
        distillation_token=distillation_token,
    )
    _check_image_overrides(config, of_vit, image_size)
    image = {_VIT_FIELDS[name]: value for name, value in of_vit.items()}
    image |= _given(image_size=image_size, drop_path=drop_path)
    text = _given(width=text_width, layers=text_layers, heads=text_heads)
    if text_tower is not None:
        if text_tower not in _TEXT_TOWERS:
            raise InputError(f"no text tower {text_tower!r}: choose {', '.join(_TEXT_TOWERS)}")
        text |= _TEXT_TOWERS[text_tower]
    return replace(
        config,
        **_given(embed_dim=embed_dim),
        image=replace(config.image, **image),
        text=replace(config.text, **text),
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _check_image_overrides(config: StudentConfig, of_vit: Mapping[str, Any], image_size: int | None) -> None:
    image = config.image
    refused = [name for name, value in of_vit.items() if value is not False]
    if refused and image.tower != VIT:
        vits = [name for name in VARIANTS if variant_config(name).image.tower == VIT]
        raise InputError(
            f"the image tower {image.tower} of student {config.variant} has no {', no '.join(refused)}: "
            f"the ViT students do ({', '.join(vits)})"
        )
    if image.tower in FIXED_SIZE_TOWERS and image_size not in (None, image.image_size):
        raise InputError(
            f"the image tower {image.tower} of student {config.variant} reads pictures of {image.image_size} pixels: "
            "for another image_size take a FastViT or a ViT student"
        )


def create_student(
    variant: str | StudentConfig, context_length: int | None = None, pad_mask: bool | None = None
) -> MobileCLIP:
    """A student with random weights. A named variant reads 248 tokens and masks pads unless told otherwise."""
    config = variant_config(variant) if isinstance(variant, str) else variant
    if context_length is not None:
        config = replace(config, context_length=context_length)
    if pad_mask is not None:
        config = replace(config, pad_mask=pad_mask)
    return MobileCLIP(config)


def _names() -> list[str]:
    return [field.name for field in fields(StudentConfig)]
