"""Pictures from untrusted files, read by the rules of training and evaluation (eval/base/images.py): known formats,
bounded size, upright RGB out. HEIC is read as well if pillow-heif is installed.
"""

from __future__ import annotations

import io
import mmap
import stat
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

from photo_search.errors import InputError
from photo_search.picture_structure import check_structure, has_hostile_tags

try:
    import pillow_heif
except ImportError:
    pillow_heif = None

__all__ = ["MAX_IMAGE_PIXELS", "check_readable", "is_picture", "open_image"]

_HEIC_SUFFIXES = frozenset({".heic", ".heif"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}) | _HEIC_SUFFIXES
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no EPS, because Pillow would start Ghostscript for it
if pillow_heif is not None:
    pillow_heif.register_heif_opener()
    _FORMATS += ("HEIF",)
MAX_IMAGE_PIXELS = 89_478_485  # Pillow warns of a decompression bomb from here on; for us it is an error
TURNS = {  # what makes a picture upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FULL_16_BITS = 65535
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF's tags
_WHITE_IS_ZERO, _UNSIGNED = 0, 1  # values of the second and the third


def check_readable(path: Path) -> None:
    """Raise InputError for a HEIC picture if what reads it is not installed."""
    if path.suffix.lower() in _HEIC_SUFFIXES and pillow_heif is None:
        raise InputError(f"{path}: HEIC is read only if pillow-heif is installed")


def is_picture(path: Path) -> bool:
    """Return whether a file's name is that of a picture. Hidden files are not: macOS leaves `._1.jpg` beside
    `1.jpg`."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def open_image(source: str | Path | bytes, most_pixels: int | None = None, shrink_to: int | None = None) -> Image.Image:
    """Decode a picture, given as a path or as the bytes of a file, to RGB: transparent pixels on white, turned upright
    as its EXIF data say.

    Raise InputError, naming the path if there is one, for a missing, truncated or foreign file, for one that is not a
    plain file, for a picture of more than `most_pixels` (default and upper limit: MAX_IMAGE_PIXELS), and for one that
    would cost far more than its pixels (`check_structure`); all before it is decoded.

    shrink_to  a JPEG of more than `most_pixels`, but not of more than MAX_IMAGE_PIXELS, may be decoded at a half, a
               quarter or an eighth of its size, whose shorter side is at least this. It counts as decoded
    """
    name = "picture" if isinstance(source, bytes) else str(source)
    most_pixels = MAX_IMAGE_PIXELS if most_pixels is None else min(most_pixels, MAX_IMAGE_PIXELS)
    try:
        if not isinstance(source, bytes):
            check_plain(Path(source))
        if not (len(source) if isinstance(source, bytes) else Path(source).stat().st_size):
            raise InputError(f"{name}: empty file")
        _check_structure(name, source, most_pixels if shrink_to is None else MAX_IMAGE_PIXELS)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as image:
            if shrink_to is not None and most_pixels < image.width * image.height <= MAX_IMAGE_PIXELS:
                image.draft(None, (shrink_to, shrink_to))  # other formats than JPEG stay as they are
            if image.width * image.height > most_pixels:  # only the header has been read so far
                raise Image.DecompressionBombError
            image.load()
            turn = TURNS.get(orientation(image))
            rgb = _to_rgb(image)
            return rgb if turn is None else rgb.transpose(turn)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"no picture at {name}") from None
    except UnidentifiedImageError:
        raise InputError(f"{name}: not a picture ({', '.join(_FORMATS)})") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name}: more than {most_pixels} pixels") from None
    except Exception as error:  # a decoder may raise anything on damaged bytes: OSError, SyntaxError, struct.error, ...
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise InputError(f"{name}: damaged picture ({reason.splitlines()[0]})") from None


def check_plain(path: Path) -> None:
    """Raise InputError for a pipe, a device or a socket. A missing file and a folder pass, and fail to open."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{path}: not a plain file")


def _check_structure(name: str, source: str | Path | bytes, most_pixels: int) -> None:
    if isinstance(source, bytes):
        check_structure(name, source, most_pixels)
        return
    with Path(source).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        check_structure(name, data, most_pixels)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened picture, 1 to 8. Damaged EXIF data count as 1. Pillow itself turns
    TIFFs when it loads them; they have 1 from then on."""
    try:
        if has_hostile_tags(_exif_data(image)):
            return 1
        found = image.getexif().get(Base.Orientation, 1)
    except Exception:  # the data are as untrusted as the picture, and no picture is lost for them
        return 1
    return found if found in TURNS else 1


def _exif_data(image: Image.Image) -> bytes:
    """The EXIF data as a TIFF. Some programs write those of a PNG as hexadecimal text, which Pillow reads too."""
    text = image.info.get("Raw profile type exif", "")
    data: bytes = image.info.get("exif") or bytes.fromhex("".join(text.split("\n")[3:]))
    return data.removeprefix(b"Exif\0\0")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion would clip to 255 and give a white picture
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Return grey levels of more than 8 bits as uint8 [H, W], by the ranges above."""
    values = np.asarray(image)
    if image.mode == "I" and _tiff_tag(image, _SAMPLE_FORMAT, 0) == _UNSIGNED:
        values = values.view(np.uint32)  # Pillow reads all 32-bit integers as signed ones
    values = values.astype(np.float64)
    low, high = _range(image, values)
    grey = np.rint((np.clip(values, low, high) - low) * (255 / (high - low))).astype(np.uint8)
    if _tiff_tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO:
        grey = 255 - grey
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return grey


def _range(image: Image.Image, values: np.ndarray) -> tuple[float, float]:
    """Return the values that stand for black and for white."""
    if image.mode.startswith("I;16"):
        bits = _tiff_tag(image, _BITS_PER_SAMPLE, 16)
        return 0, 2**bits - 1 if bits < 16 else _FULL_16_BITS
    if image.mode == "I" and image.format == "PPM":
        return 0, _FULL_16_BITS  # Pillow scales every depth of a PPM to it
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise ValueError("values that are not finite")
    for most in (1, 255, _FULL_16_BITS) if image.mode == "F" else (255, _FULL_16_BITS):
        if low >= 0 and high <= most:
            return 0, most
    return low, high if high > low else low + 1


def _tiff_tag(image: Image.Image, tag: int, default: int) -> int:
    found = getattr(image, "tag_v2", {}).get(tag, default)
    return int(found[0] if isinstance(found, tuple) else found)
