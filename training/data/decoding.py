"""Decode the pictures of training samples, crop and resize them, with torchvision and torch or with PIL alone.

The fast form is a uint8 tensor [3, H, W]: torchvision's libjpeg-turbo decodes JPEGs, PIL decodes all other files, and
torch resizes the bytes. The slow form is a PIL image. Both refuse the same files, turn pictures upright as their EXIF
data say, antialias, and crop before they resize, so that no pixel outside the crop is read.

Tolerance of fast against slow, in levels of 0 to 255: decoding is equal to the bit if both libraries use libjpeg-turbo,
as their wheels do. Resizing rounds differently, by at most 1 with bilinear and at most 2 with bicubic interpolation,
and by less than 0.02 on average.

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
from eval.base.picture_structure import check_structure
from longclip_teacher.errors import InputError
from training.data.index import MAX_TRAINING_PIXELS

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
# Deprecated since torchvision 0.29 in favour of a package that needs FFmpeg. If torchvision lacks it, PIL reads JPEGs.
_decode_jpeg = getattr(torchvision.io, "decode_jpeg", None)


def open_picture(data: bytes, fast: bool) -> Picture:
    """Decode the bytes of a picture's file to RGB: to a tensor if `fast`, else to a PIL image.

    Raise InputError for what eval.base.images.open_image refuses, with the same message, and for a picture of
    more than MAX_TRAINING_PIXELS, before it is decoded.
    """
    if not fast:
        return images.open_image(data, MAX_TRAINING_PIXELS)
    pixels = _jpeg_pixels(data)
    return pixels_of_pil(images.open_image(data, MAX_TRAINING_PIXELS)) if pixels is None else pixels


def picture_size(picture: Picture) -> tuple[int, int]:
    """Return width and height of either form."""
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[2], picture.shape[1])


def resized_crops(
    picture: Picture, box: tuple[int, int, int, int], views: Sequence[tuple[int, Interpolation]]
) -> list[Picture]:
    """Return the part of a picture inside `box` (left, top, right, bottom) at each (S, interpolation), in its own form.

    Raise InputError for a box that is empty or not inside the picture.
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
    # copy the crop once: torch's kernel for interleaved bytes accepts only complete rows
    crop = picture[None, :, top:bottom, left:right].contiguous(memory_format=torch.channels_last)
    return [F.interpolate(crop, size=(side, side), mode=mode, antialias=True)[0] for side, mode in views]


def pixels_of_pil(picture: Image.Image) -> Tensor:
    """Return an RGB PIL image as uint8 [3, H, W], with its values interleaved in memory."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # [H, W, 3] -> [3, H, W]


def normalized(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return uint8 pixels [B, 3, S, S] as (pixels / 255 - mean) / std. `mean` and `std` are [3] or [3, 1, 1]; the
    result
    has their type.

    It takes one multiplication and one subtraction, equal to the formula up to rounding (relative 1e-6 in float32).
    """
    scale, shift = (1 / (255 * std)).view(3, 1, 1), (mean / std).view(3, 1, 1)
    return pixels.to(mean.dtype, copy=True).mul_(scale).sub_(shift)


def _pil_resize(picture: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    """Resize across, then down, as torch does. Pillow 13 alone chooses the order by the picture's shape, and bicubic
    overshoot, clipped between the passes, then gives other values."""
    return picture.resize((side, picture.height), resample).resize((side, side), resample)


def _jpeg_pixels(data: bytes) -> Tensor | None:
    """Decode a plain RGB or grey JPEG to uint8 [3, H, W]. Return None for everything that PIL should decode or
    refuse."""
    if _decode_jpeg is None or not data.startswith(b"\xff\xd8"):
        return None
    try:
        check_structure("picture", data, MAX_TRAINING_PIXELS)
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as header:  # reads no pixels
            width, height = header.size
            plain = header.format == "JPEG" and header.mode in ("RGB", "L")  # not CMYK, not several pictures in one
            turn = images.orientation(header)
        if not plain or width * height > min(MAX_TRAINING_PIXELS, images.MAX_IMAGE_PIXELS):
            return None
        file = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels: Tensor = _decode_jpeg(file, torchvision.io.ImageReadMode.RGB)
    except Exception:  # a decoder may raise anything on damaged bytes; PIL reports the fault, or is more lenient
        return None
    return _upright(pixels, turn) if pixels.shape == (3, height, width) else None


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Turn pixels [3, H, W] as PIL's transpose does by images.TURNS.

    The orientations 5 to 8 swap height and width.
    """
    if orientation >= 5:
        pixels = pixels.transpose(1, 2)
    mirrored = [dim for dim, those in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if orientation in those]
    return pixels.flip(mirrored) if mirrored else pixels
