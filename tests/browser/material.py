"""What the page and scripts/search_photos.py are compared on: models whose scores lie apart, and pictures as cameras
and programs write them.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper
from PIL import Image, ImageCms
from PIL.ExifTags import Base

from exporting.folder import write_manifest
from exporting.tokenizer_file import clip_tokenizer
from longclip_teacher.atomic_files import write_json
from longclip_teacher.text import EOT, SOT, VOCAB_SIZE
from photo_models import save_tower

__all__ = ["WORDS", "write_model", "write_other_formats", "write_pictures"]

SIDE, CONTEXT, WIDTH = 32, 248, 24
WORDS = (
    "red", "green", "blue", "yellow", "dog", "cat", "tree", "house", "river", "sky", "ball", "child", "boat", "road",
    "snow", "night", "table", "window", "bird", "sand",
)  # fmt: skip


def write_model(folder: Path, seed: int, resample: int = 3) -> Path:
    """Write what scripts/export.py would: towers of random weights, in which every part of a picture and each of WORDS
    counts, and other words very little."""
    rng = np.random.default_rng(seed)
    (folder / "onnx").mkdir(parents=True)
    write_json(folder / "preprocessor_config.json", {
        "size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "resample": resample,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.4, 0.45], "image_std": [0.2, 0.25, 0.3],
    })  # fmt: skip
    tokenizer = clip_tokenizer(CONTEXT)
    tokenizer.save(str(folder / "tokenizer.json"))
    words = 0.01 * rng.standard_normal((VOCAB_SIZE, WIDTH), np.float32)
    words[[SOT, EOT]] = 0  # so that padding changes nothing
    for word in WORDS:
        words[tokenizer.encode(word).ids[1]] = rng.standard_normal(WIDTH, np.float32)
    parts = rng.standard_normal((3 * (SIDE // 4) ** 2, WIDTH), np.float32)
    save_tower(folder / "onnx/text_model.onnx", "input_ids", TensorProto.INT64, ["B", "L"], "text_embeds", [
        helper.make_node("Gather", ["words", "input_ids"], ["read"]),
        helper.make_node("ReduceSum", ["read", "tokens"], ["summed"], keepdims=0),
    ], {"words": words, "tokens": np.array([1])}, WIDTH)  # fmt: skip
    shape: list[str | int] = ["B", 3, SIDE, SIDE]
    save_tower(folder / "onnx/vision_model.onnx", "pixel_values", TensorProto.FLOAT, shape, "image_embeds", [
        helper.make_node("AveragePool", ["pixel_values"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "parts"], ["summed"]),
    ], {"parts": parts}, WIDTH)  # fmt: skip
    write_manifest(folder)
    return folder


def write_pictures(folder: Path, count: int, seed: int) -> Path:
    """Write `count` JPEGs of many sizes, qualities and subsamplings, and of each EXIF orientation. Some are grey, some
    progressive, and some have a colour profile that would swap red and green if it were applied."""
    rng = random.Random(seed)
    (folder / "more").mkdir(parents=True)
    swapped = _profile_that_swaps()
    for number in range(count):
        size = rng.randint(40, 500), rng.randint(40, 500)
        picture = _scene(rng, size)
        picture = picture.convert("L") if number % 19 == 18 else picture
        settings = {"quality": rng.randint(60, 95), "subsampling": rng.randint(0, 2), "progressive": number % 7 == 3}
        if number % 2:
            settings["exif"] = _exif(1 + number // 2 % 8)
        if number % 11 == 5 and picture.mode == "RGB":
            settings["icc_profile"] = swapped
        picture.save(folder / ("more" if number % 5 == 0 else "") / f"{number:03d}.jpg", **settings)
    return folder


def write_other_formats(folder: Path, seed: int) -> None:
    """Write a picture of each other format that all browsers read, some of them turned, a broken and a hidden file."""
    rng = random.Random(seed)
    scenes = [_scene(rng, (rng.randint(60, 200), rng.randint(60, 200))) for _ in range(6)]
    clear = scenes[0].copy()
    alpha = Image.new("L", clear.size, 255)
    alpha.paste(0, (0, 0, clear.width, 40))
    clear.putalpha(alpha)
    clear.save(folder / "clear.png")
    scenes[1].save(folder / "turned.png", exif=_exif(6))
    scenes[2].save(folder / "turned.webp", lossless=True, exif=_exif(8))
    scenes[3].convert("P").save(folder / "few.gif")
    scenes[4].save(folder / "plain.bmp")
    scenes[5].save(folder / "capitals.PNG")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / ".hidden.jpg").write_bytes((folder / "few.gif").read_bytes())


def _scene(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A few soft spots of strong colours."""
    few = np.array([rng.randrange(256) for _ in range(5 * 5 * 3)], np.uint8).reshape(5, 5, 3)
    return Image.fromarray(few).resize(size, Image.Resampling.BICUBIC)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[Base.Make], exif[Base.Orientation] = "a camera", orientation
    return exif


def _profile_that_swaps() -> bytes:
    """sRGB with the primaries of red and green exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"#XYZ").replace(b"gXYZ", b"rXYZ").replace(b"#XYZ", b"gXYZ")
