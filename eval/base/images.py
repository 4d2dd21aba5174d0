"""Pictures from untrusted files: known formats, bounded size, one kind of error, RGB out."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from longclip_teacher.errors import InputError

__all__ = ["IMAGE_SUFFIXES", "MAX_IMAGE_PIXELS", "is_picture", "open_image"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no EPS, because Pillow would start Ghostscript for it
MAX_IMAGE_PIXELS = 89_478_485  # Pillow warns of a decompression bomb from here on; for us it is an error


def is_picture(path: Path) -> bool:
    """Return whether a file's name is that of a picture. Hidden files are not: macOS leaves `._1.jpg` beside
    `1.jpg`."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def open_image(source: str | Path | bytes) -> Image.Image:
    """Decode a picture, given as a path or as the bytes of a file, to RGB (transparent pixels on white).

    Raise InputError, naming the path if there is one, for a missing, truncated, oversized or foreign file.
    """
    name = "picture" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:  # only the header has been read so far
                raise Image.DecompressionBombError
            return _to_rgb(image)
    except FileNotFoundError:
        raise InputError(f"no picture at {name}") from None
    except UnidentifiedImageError:
        raise InputError(f"{name}: not a picture") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name}: more than {MAX_IMAGE_PIXELS} pixels") from None
    except Exception as error:  # a decoder may raise anything on damaged bytes: OSError, SyntaxError, struct.error, ...
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise InputError(f"{name}: damaged picture ({reason.splitlines()[0]})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip 16 bits to 8 and give a white picture
        return image.point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")
