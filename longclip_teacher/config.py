"""The configuration of a Long-CLIP teacher, which its weight file stores beside the weights, and the named ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from longclip_teacher.activation import Activation
from longclip_teacher.errors import InputError
from longclip_teacher.open_clip_parts import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from longclip_teacher.text import CONTEXT_LENGTH, VOCAB_SIZE

__all__ = ["TEACHERS", "ImageTowerConfig", "TeacherConfig", "TextTowerConfig"]

Stem = Literal["patch", "conv"]
Interpolation = Literal["bicubic", "bilinear"]
_LARGEST = {"layers": 1000}  # no real size comes near these; a hostile file must not keep the machine busy
_LARGEST_ELSE = 1 << 20


@dataclass(frozen=True)
class ImageTowerConfig:
    """A vision transformer on square pictures."""

    size: int
    """Side of the picture in pixels."""
    patch: int
    """Side of a patch in pixels; must divide `size`."""
    width: int
    """Channels of a token."""
    layers: int
    """Transformer blocks."""
    heads: int
    """Attention heads; must divide `width`."""
    stem: Stem = "patch"
    """`patch`: one convolution, as in CLIP. `conv`: stride-2 3x3 convolutions; `patch` must then be a power of two."""

    def __post_init__(self) -> None:
        _check_tower("image", asdict(self))
        if self.size % self.patch:
            raise InputError(f"image size {self.size} is not a multiple of the patch {self.patch}")
        _check_choice("image stem", self.stem, get_args(Stem))
        if self.stem == "conv" and (self.patch < 2 or self.patch & (self.patch - 1)):
            raise InputError(
                f"a conv stem halves the picture at each step: patch must be a power of 2, not {self.patch}"
            )


@dataclass(frozen=True)
class TextTowerConfig:
    """A causal text transformer."""

    width: int
    """Channels of a token."""
    heads: int
    """Attention heads; must divide `width`."""
    layers: int
    """Transformer blocks."""
    context_length: int = CONTEXT_LENGTH
    """Longest caption in tokens, SOT and EOT included."""
    vocab_size: int = VOCAB_SIZE
    """Rows of the token embedding."""

    def __post_init__(self) -> None:
        _check_tower("text", asdict(self))


@dataclass(frozen=True)
class TeacherConfig:
    """Everything besides the weights that decides a teacher's features."""

    embed_dim: int
    """Width of the image and text features."""
    image: ImageTowerConfig
    """The image tower."""
    text: TextTowerConfig
    """The text tower."""
    activation: Activation = "quickgelu"
    """`quickgelu` for OpenAI's and Long-CLIP's weights, `gelu` for most of open_clip's."""
    num_frozen_positions: int = 0
    """Text positions that training does not change: 20 if they come from CLIP, 0 from scratch."""
    mean: tuple[float, float, float] = OPENAI_DATASET_MEAN
    """Subtracted from the RGB values, which lie in 0..1."""
    std: tuple[float, float, float] = OPENAI_DATASET_STD
    """Divides the result, channel by channel."""
    interpolation: Interpolation = "bicubic"
    """Resampling of the input pictures."""

    def __post_init__(self) -> None:
        _check_size("embed_dim", self.embed_dim)
        _check_choice("activation", self.activation, get_args(Activation))
        _check_choice("interpolation", self.interpolation, get_args(Interpolation))
        if not 0 <= self.num_frozen_positions <= self.text.context_length:
            raise InputError(f"num_frozen_positions is {self.num_frozen_positions}, not 0..{self.text.context_length}")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """The model in one phrase, such as `CLIP teacher with ViT 768 wide and patch 16, 248 tokens, quickgelu`."""
        tower = f"ViT {self.image.width} wide and patch {self.image.patch}"
        return f"CLIP teacher with {tower}, {self.text.context_length} tokens, {self.activation}"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TeacherConfig:
        """The inverse of `to_dict`, also after JSON; raises InputError for missing, unknown and impossible values."""
        try:
            mean, std = tuple(map(float, values["mean"])), tuple(map(float, values["std"]))
            if len(mean) != 3 or len(std) != 3:
                raise InputError("mean and std of a teacher configuration need three values each")
            image, text = ImageTowerConfig(**values["image"]), TextTowerConfig(**values["text"])
            return cls(**{**values, "image": image, "text": text, "mean": mean, "std": std})
        except KeyError as error:
            raise InputError(f"the teacher configuration lacks {error}") from None
        except TypeError as error:
            raise InputError(f"the teacher configuration does not fit: {error}") from None


def _check_tower(tower: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name != "stem":
            _check_size(f"{tower} {name}", value)
    if values["width"] % values["heads"]:
        raise InputError(f"{tower} width {values['width']} is not a multiple of its {values['heads']} heads")


def _check_size(name: str, value: object) -> None:
    largest = _LARGEST.get(name.split()[-1], _LARGEST_ELSE)
    if type(value) is not int or not 0 < value <= largest:
        raise InputError(f"{name} is {value!r}, not a whole number in 1..{largest}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}: choose one of {', '.join(choices)}")


TEACHERS = {
    "tiny": TeacherConfig(
        embed_dim=128,
        image=ImageTowerConfig(size=48, patch=8, width=96, layers=3, heads=3, stem="conv"),
        text=TextTowerConfig(width=96, heads=3, layers=2),
    ),
    "small": TeacherConfig(
        embed_dim=192,
        image=ImageTowerConfig(size=96, patch=16, width=192, layers=4, heads=3, stem="conv"),
        text=TextTowerConfig(width=128, heads=2, layers=3),
    ),
    "b16": TeacherConfig(
        embed_dim=512,
        image=ImageTowerConfig(size=224, patch=16, width=768, layers=12, heads=12),
        text=TextTowerConfig(width=512, heads=8, layers=12),
    ),
    "l14": TeacherConfig(
        embed_dim=768,
        image=ImageTowerConfig(size=224, patch=14, width=1024, layers=24, heads=16),
        text=TextTowerConfig(width=768, heads=12, layers=12),
    ),
}
