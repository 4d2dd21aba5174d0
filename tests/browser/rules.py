"""The page's rules, which stand in TypeScript a second time, against those of Python: sentences, token ids, resizing to
the last bit, EXIF orientation, names of pictures."""

from __future__ import annotations

import base64
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image
from tokenizers import Tokenizer

from browser.material import write_other_formats, write_pictures
from caption_strings import caption_strings
from exporting.tokenizer_file import clip_tokenizer
from photo_search.folders import find_pictures
from photo_search.images import is_picture, orientation
from photo_search.sentences import split_sentences
from photo_search.web.build import WEB

__all__ = ["differences"]

CONTEXT = 40
NAMES = ["a.jpg", "A.JPEG", ".a.jpg", "a.txt", "jpg", "a.b.webp", "a.", "a.heic", "a.jpg.part"]
PARTS = (
    "Dr. Who", "St. John", "J. R. Smith", "No. 5", "no. Then", "e.g. this", "6 ft. tall", "4 p.m. in", "4 P.M. In",
    "etc. and", "etc. And", '"Why?" asks', "“Why?” Asks", "…", "...", ". ", "! ", "? ", "。", "！", "「a。」", "۔",
    "؟ ", "।  ", "\n", " \r\n ", "3.5", "$.25", "1. a", "١. A", "A dog", "a cat", "Über", "über", "ß", "éa", " ",
    "\u2003", "\x85", "\x1c", "’", ".)", '."', "U. You", "Inc. is", "fig. 2", "İ",
)  # fmt: skip


def differences(work: Path) -> list[str]:
    """What differs, one line per rule; none if all agree. `work` is an empty folder."""
    given, expected = _given(work)
    (work / "rules.json").write_text(json.dumps(given))
    script = Path(__file__).with_name("rules.mjs")
    subprocess.run(["node", str(script), str(WEB), str(work)], check=True)
    found = json.loads((work / "found.json").read_text())
    lines = []
    for rule, wanted in expected.items():
        wrong = [number for number, (a, b) in enumerate(zip(found[rule], wanted, strict=True)) if a != b]
        if wrong:
            first = wrong[0]
            lines.append(
                f"{rule}: {len(wrong)} of {len(wanted)} differ: {found[rule][first]!r:.200}, not {wanted[first]!r:.200}"
            )
    return lines


def _given(work: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    rng = random.Random(0)
    write_other_formats(write_pictures(work / "photos", 40, seed=1), seed=2)
    files = [name for name in find_pictures(work / "photos").files if name != "broken.jpg"]
    captions = ["".join(rng.choices(PARTS, k=rng.randint(1, 12))) for _ in range(3000)]
    plain = [text for kind, text in caption_strings() if kind in ("plain", "emoji")][::20]
    strings = [*plain, *(" ".join(rng.choices(plain, k=6)) for _ in range(50)), "", "a <end_of_text> b"]
    clip_tokenizer(CONTEXT).save(str(work / "tokenizer.json"))
    pictures = [_pixels(work, number, rng) for number in range(60)]
    given = {
        "names": NAMES,
        "captions": captions,
        "strings": strings,
        "tokenizer": str(work / "tokenizer.json"),
        "pictures": [told for told, _ in pictures],
        "files": [f"photos/{name}" for name in files],
    }
    expected = {
        "names": [is_picture(Path(name)) for name in NAMES],
        "sentences": [split_sentences(caption) for caption in captions],
        "ids": _ids(work / "tokenizer.json", strings),
        "resized": [resized for _, resized in pictures],
        "orientations": [orientation(Image.open(work / "photos" / name)) for name in files],
    }
    return given, expected


def _ids(path: Path, strings: list[str]) -> list[dict[str, Any]]:
    cutting, whole = Tokenizer.from_file(str(path)), Tokenizer.from_file(str(path))
    whole.no_truncation()
    return [{"ids": cutting.encode(text).ids, "tokens": len(whole.encode(text).ids)} for text in strings]


def _pixels(work: Path, number: int, rng: random.Random) -> tuple[dict[str, Any], str]:
    """A picture of noise, and what Pillow makes of it, as photo_search/model.py calls it."""
    width, height = (rng.randint(1, 300) for _ in range(2))
    if int(PIL.__version__.split(".")[0]) < 13:
        height = min(height, 2 * width)  # Pillow 12 and earlier round taller ones in another order
    side, resample = rng.choice([16, 33, 48, 64, 224]), rng.choice([2, 3])
    if number % 10 == 0:
        width = height = side  # nothing to resize
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    noise[::2] = 255 * (noise[::2] > 127)  # overshoots are clipped
    (work / f"{number}.rgb").write_bytes(noise.tobytes())
    scaled = [int(side * length / min(width, height)) for length in (width, height)]
    image = Image.fromarray(noise).resize((scaled[0], scaled[1]), Image.Resampling(resample))
    left, top = (round((length - side) / 2) for length in scaled)
    cut = image.crop((left, top, left + side, top + side))
    told = {"file": f"{number}.rgb", "width": width, "height": height, "side": side, "resample": resample}
    return told, base64.b64encode(np.asarray(cut).tobytes()).decode()
