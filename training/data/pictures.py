"""Pictures of training samples: decoded, cropped and resized, with torchvision and torch or with PIL alone.

The fast form is a uint8 tensor [3, H, W]: a JPEG is decoded by torchvision's libjpeg-turbo, any other file by PIL, and
torch resizes on bytes. The slow form is a PIL image. Both refuse the same files, know no EXIF rotation, crop first and
resize after, so that no pixel outside the crop is read, and antialias.

Tolerance of fast against slow, in levels of 0 to 255: decoding is equal to the bit where both libraries carry
libjpeg-turbo, as their wheels do; resizing rounds differently, by 1 at most with bilinear and by 2 with bicubic, on
average below 0.02.

Shapes: B batch, H, W height and width of the decoded picture, S the view's image size.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.io
from PIL import Image
from torch import Tensor

from eval.base import images
from longclip_teacher.errors import InputError

__all__ = [
    "Interpolation",
    "Picture",
    "normalized",
    "open_picture",
    "picture_size",
    "pixels_of_pil",
    "resized_crops",
]

Picture: TypeAlias = Image.Image | Tensor
"""A decoded RGB picture: a PIL image, or uint8 [3, H, W] in any memory format."""
Interpolation = Literal["bicubic", "bilinear"]

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Deprecated since torchvision 0.29 for a package that needs FFmpeg; a torchvision without it leaves JPEGs to PIL.
_decode_jpeg = getattr(torchvision.io, "decode_jpeg", None)


def open_picture(data: bytes, fast: bool) -> Picture:
    """Decode the bytes of a picture's file to RGB, to a tensor if `fast`, else to a PIL image.

    Raises InputError as eval.base.images.open_image does: what it refuses is refused, with the same line.
    """
    if not fast:
        return images.open_image(data)
    pixels = _jpeg_pixels(data)
    return pixels_of_pil(images.open_image(data)) if pixels is None else pixels


def picture_size(picture: Picture) -> tuple[int, int]:
    """Width and height of either form."""
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[2], picture.shape[1])


def resized_crops(
    picture: Picture, box: tuple[int, int, int, int], views: Sequence[tuple[int, Interpolation]]
) -> list[Picture]:
    """The part of a picture inside `box` (left, top, right, bottom) at each (S, interpolation), in the picture's form.

    Raises InputError for a box that is empty or not inside the picture.
    """
    width, height = picture_size(picture)
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(
            f"crop {tuple(box)} does not lie inside a picture of {width} x {height}: it was drawn for another picture"
        )
    if isinstance(picture, Image.Image):
        part = picture.crop(box)
        return [_pil_resize(part, side, _RESAMPLE[interpolation]) for side, interpolation in views]
    # one copy of the crop: torch's kernel for interleaved bytes takes whole rows alone
    crop = picture[None, :, top:bottom, left:right].contiguous(memory_format=torch.channels_last)
    return [F.interpolate(crop, size=(side, side), mode=mode, antialias=True)[0] for side, mode in views]


def pixels_of_pil(picture: Image.Image) -> Tensor:
    """An RGB PIL image as uint8 [3, H, W], its values interleaved in memory."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # [H, W, 3] -> [3, H, W]


def normalized(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels uint8 [B, 3, S, S] as (pixels / 255 - mean) / std, in the type of `mean` and `std`, both [3] or [3, 1, 1].

    In one multiplication and one subtraction: equal to the formula to rounding (relative 1e-6 in float32).
    """
    scale, shift = (1 / (255 * std)).view(3, 1, 1), (mean / std).view(3, 1, 1)
    return pixels.to(mean.dtype, copy=True).mul_(scale).sub_(shift)


def _pil_resize(picture: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    """Across, then down, as torch does. Left to itself, Pillow 13 goes by the picture's shape, and a bicubic curve that
    is clipped between the passes then ends elsewhere."""
    return picture.resize((side, picture.height), resample).resize((side, side), resample)


def _jpeg_pixels(data: bytes) -> Tensor | None:
    """A plain RGB or grey JPEG as uint8 [3, H, W]; None for everything that PIL is to decode or to refuse."""
    if _decode_jpeg is None or not data.startswith(b"\xff\xd8"):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as header:  # reads no pixel
            width, height = header.size
            plain = header.format == "JPEG" and header.mode in ("RGB", "L")  # not CMYK, not several pictures in one
        if not plain or width * height > images.MAX_IMAGE_PIXELS:
            return None
        file = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels: Tensor = _decode_jpeg(file, torchvision.io.ImageReadMode.RGB)
    except Exception:  # a decoder fed damaged bytes raises anything; PIL says what is wrong, or is more lenient
        return None
    return pixels if pixels.shape == (3, height, width) else None
