"""Pictures on their way into shards: each one is looked at, and what cannot be trained on is counted by its cause."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from caption_sources import LeftOut
from eval.base.images import open_image
from longclip_teacher.errors import InputError
from training.data.index import MAX_IMAGE_BYTES, MAX_TRAINING_PIXELS

__all__ = ["left_out", "picture_bytes"]

_JPEG_QUALITY = 95


def picture_bytes(path: Path, resize: int | None) -> tuple[str, bytes]:
    """Return the suffix and bytes of a picture for the shard: the file unchanged, or shrunk to the shorter side
    `resize`, upright.

    The picture is decoded in either case. Raise InputError for one that training could not use.
    """
    picture = open_image(path, MAX_TRAINING_PIXELS, shrink_to=resize)
    width, height = picture.size
    scale = 1 if resize is None else min(1, resize / min(picture.size))
    if scale < 1:
        width, height = (max(resize or 1, round(side * scale)) for side in picture.size)
    if width * height > MAX_TRAINING_PIXELS:
        raise InputError(f"{path}: more than {MAX_TRAINING_PIXELS} pixels")
    if scale < 1:
        buffer = io.BytesIO()
        picture.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=_JPEG_QUALITY)
        return "jpg", buffer.getvalue()
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise InputError(f"{path}: file of more than {MAX_IMAGE_BYTES >> 20} MB")
    return path.suffix.lower().removeprefix("."), path.read_bytes()


def left_out(name: str, path: Path, error: InputError) -> LeftOut:
    """Return the entry of a picture that `picture_bytes` refused: the message without the path and the details."""
    return LeftOut(name, str(error).removeprefix(f"{path}: ").partition(" (")[0])
