"""The embedded data: boards of real handwritten digits with long captions, written in the public layouts.

A board is 48 px: a coloured ground in a coloured frame, with a 3x3 grid of tiles. Each tile shows one of scikit-learn's
1,797 handwritten digits in one of 8 inks and 2 sizes, on a dark or a light tile. The caption of about 100 tokens
describes the tiles in reading order; its first sentence names only the ground and the frame. Most boards are full, some
are sparse. One in four belongs to one of a few series of boards that begin alike, so a batch holds captions that
differ only at their ends; without them nothing makes a model read to the end. One in eight shows a single huge digit,
always in the same colours. Only the handwriting tells these apart, so they teach a model to read digits; full boards do
not, because their colours tell them apart. They are also the test of zero-shot classification.

Held out: the glyphs (handwritten digits) of validation and test never appear in training, nor do the layouts (which
digit in which ink is where) of their boards. Nothing downstream knows that these pictures are generated.
"""

from __future__ import annotations

import io
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from rich.progress import track

from longclip_teacher.atomic_files import atomic_folder
from longclip_teacher.errors import InputError
from longclip_teacher.folder_lock import folder_lock
from training.data.shard_records import ShardRecord
from training.data.writer import caption_member, write_manifest, write_shard

__all__ = ["CLASSNAMES", "DIGIT_TEMPLATES", "Board", "Part", "Tile", "is_outdated", "layout_part", "write_digit_scenes"]

FORMAT = "compact-longclip digit scenes"
VERSION = 6  # raise it when pictures or captions change, so that older folders are not taken for these

CLASSNAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CELLS = (
    "top left", "top centre", "top right", "middle left", "centre", "middle right",
    "bottom left", "bottom centre", "bottom right",
)  # fmt: skip
# Every word here is a single CLIP token, so that captions of full boards have nearly the same length
GROUNDS = {
    "navy": (28, 40, 96), "maroon": (110, 26, 42), "teal": (0, 110, 112),
    "grey": (128, 128, 132), "brown": (112, 72, 40), "beige": (222, 206, 170),
}  # fmt: skip
FRAMES = {
    "red": (224, 36, 36), "green": (40, 170, 60), "blue": (56, 100, 240), "yellow": (244, 212, 40),
    "purple": (140, 50, 190), "pink": (250, 130, 190), "white": (250, 250, 250), "black": (8, 8, 8),
}  # fmt: skip
INKS = {  # mid tones: they must stand out on dark and on light tiles
    "red": (226, 40, 40), "green": (30, 150, 50), "blue": (60, 100, 245), "yellow": (222, 184, 0),
    "orange": (244, 124, 20), "purple": (150, 60, 210), "pink": (250, 100, 180), "grey": (136, 136, 140),
}  # fmt: skip
TILES = {"dark": (22, 22, 26), "light": (236, 236, 232)}
SIZES = {"small": 8, "large": 12}  # pixels of the glyph's square; scikit-learn's pictures have 8

BOARD_PX, FRAME_PX, CELL_PX, TILE_PX = 48, 3, 14, 12
NUM_TRAIN_GLYPHS, NUM_VAL_GLYPHS = 1297, 150  # of 1,797; the other 350 are the test's
SINGLE_SHARE, SPARSE_SHARE = 0.12, 0.05  # training boards with one huge digit, with two to eight
SERIES_SHARE, NUM_SERIES = 0.25, 14  # training boards that begin like the others of their series, as twins do
TWINS_PER_FAMILY, NUM_SHARED_CELLS = 4, 7  # the first seven cells' sentences reach past token 77
SHARD_SIZE = 4000

Part = Literal["train", "val", "test"]

WHOLE_BOARD = len(CELLS)  # the cell of a single digit, which fills the board
HUGE, HUGE_PX = "huge", 40
# Prompts for zero-shot classification of single-digit boards: their caption without the digit
DIGIT_TEMPLATES = (f"A beige board in a black frame. the whole board shows a {HUGE} blue {{}} on light.",)


@dataclass(frozen=True)
class Tile:
    """One digit on the board: its place, its value and its look."""

    cell: int  # index into CELLS, reading order
    digit: int
    ink: str
    size: str
    shade: str  # the tile's, under the digit

    @property
    def sentence(self) -> str:
        """The caption's sentence about this tile."""
        place = "the whole board" if self.cell == WHOLE_BOARD else CELLS[self.cell]
        return f"{place} shows a {self.size} {self.ink} {CLASSNAMES[self.digit]} on {self.shade}."


@dataclass(frozen=True)
class Board:
    """Everything that a caption says about a picture. The picture adds the handwriting."""

    ground: str
    frame: str
    tiles: tuple[Tile, ...]

    @property
    def short_caption(self) -> str:
        """The first sentence."""
        return f"A {self.ground} board in a {self.frame} frame."

    @property
    def caption(self) -> str:
        """First sentence, then the tiles in reading order."""
        return " ".join([self.short_caption, *(tile.sentence for tile in self.tiles)])


def layout_part(board: Board) -> Part:
    """Return the part of the data to which a board's layout (which digit in which ink is where) belongs: 10% test, 10%
    val."""
    layout = ",".join(f"{tile.cell}{tile.digit}{tile.ink}" for tile in board.tiles)
    fate = zlib.crc32(layout.encode()) % 10
    return "test" if fate == 0 else "val" if fate == 1 else "train"


def draw_board(rng: random.Random, part: Part, num_tiles: int = 9, family: Board | None = None) -> Board:
    """Draw a board whose layout belongs to `part`. With `family`, it shares that board's ground, frame and first
    cells."""
    while True:
        ground, frame = (
            (family.ground, family.frame) if family else (rng.choice(list(GROUNDS)), rng.choice(list(FRAMES)))
        )
        shared = family.tiles[:NUM_SHARED_CELLS] if family else ()
        cells = sorted(rng.sample(range(9), num_tiles))[len(shared) :]
        tiles = [
            Tile(cell, rng.randrange(10), rng.choice(list(INKS)), rng.choice(list(SIZES)), rng.choice(list(TILES)))
            for cell in cells
        ]
        board = Board(ground, frame, (*shared, *tiles))
        if layout_part(board) == part:
            return board


@lru_cache(maxsize=1)
def _glyphs() -> dict[Part, dict[int, list[dict[str, np.ndarray]]]]:
    """Return handwritten examples by part and digit, each as ink coverage 0..1 [px, px, 1] by size. The split is
    fixed."""
    from sklearn.datasets import load_digits  # slow to import and needed only here

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    bounds = np.split(order, [NUM_TRAIN_GLYPHS, NUM_TRAIN_GLYPHS + NUM_VAL_GLYPHS])
    glyphs: dict[Part, dict[int, list[dict[str, np.ndarray]]]] = {}
    parts: tuple[Part, ...] = ("train", "val", "test")
    for part, members in zip(parts, bounds, strict=True):
        glyphs[part] = {digit: [] for digit in range(10)}
        for i in members:
            picture = Image.fromarray(np.uint8(digits.images[i] / 16 * 255))
            sizes = {
                name: np.asarray(picture.resize((px, px), Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
                for name, px in (*SIZES.items(), (HUGE, HUGE_PX))
            }
            glyphs[part][int(digits.target[i])].append(sizes)
    return glyphs


def render(board: Board, rng: random.Random, part: Part) -> Image.Image:
    """Draw the picture of a board, with each digit in a handwriting of `part` that `rng` chooses."""
    pixels = np.empty((BOARD_PX, BOARD_PX, 3), dtype=np.float32)
    pixels[:] = FRAMES[board.frame]
    pixels[FRAME_PX:-FRAME_PX, FRAME_PX:-FRAME_PX] = GROUNDS[board.ground]
    for tile in board.tiles:
        if tile.cell == WHOLE_BOARD:
            side = HUGE_PX
            top = left = (BOARD_PX - HUGE_PX) // 2
        else:
            side, row, column = TILE_PX, *divmod(tile.cell, 3)
            top, left = (FRAME_PX + CELL_PX * index + (CELL_PX - TILE_PX) // 2 for index in (row, column))
        pixels[top : top + side, left : left + side] = TILES[tile.shade]
        coverage = rng.choice(_glyphs()[part][tile.digit])[tile.size]
        px = len(coverage)
        slack = (side - px) // 2
        square = pixels[top + slack : top + slack + px, left + slack : left + slack + px]
        square += coverage * (np.asarray(INKS[tile.ink], dtype=np.float32) - square)
    return Image.fromarray(pixels.round().astype(np.uint8))


def _jpeg(picture: Image.Image) -> bytes:
    """Encode as JPEG at full colour resolution, because 4:2:0 would smear the ink of an 8 px digit."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def single_digit(digit: int) -> Board:
    """Return the board of a single huge digit, in the colours that all of them share."""
    return Board("beige", "black", (Tile(WHOLE_BOARD, digit, "blue", HUGE, "light"),))


def draw_boards(rng: random.Random, part: Part) -> Iterator[Board]:
    """Yield boards for training or validation without end: full, sparse, single, in series. No two captions of several
    digits are equal."""
    seen: set[str] = set()
    series = [draw_board(rng, part) for _ in range(NUM_SERIES)]
    kinds = {"single": SINGLE_SHARE, "sparse": SPARSE_SHARE, "series": SERIES_SHARE}
    while True:
        (kind,) = rng.choices([*kinds, "full"], [*kinds.values(), 1 - sum(kinds.values())])
        if kind == "single":
            yield single_digit(rng.randrange(10))
            continue
        family = rng.choice(series) if kind == "series" else None
        board = draw_board(rng, part, rng.randint(2, 8) if kind == "sparse" else 9, family)
        if board.caption not in seen:
            seen.add(board.caption)
            yield board


def draw_full_boards(rng: random.Random, part: Part) -> Iterator[Board]:
    """Yield full boards without end, no two with the same caption."""
    seen: set[str] = set()
    while True:
        board = draw_board(rng, part)
        if board.caption not in seen:
            seen.add(board.caption)
            yield board


def draw_twins(rng: random.Random, part: Part) -> Iterator[Board]:
    """Yield families of four full boards without end. Their captions share the first 77 tokens and differ after
    that."""
    for first in draw_full_boards(rng, part):
        family = {first.caption: first}
        while len(family) < TWINS_PER_FAMILY:
            twin = draw_board(rng, part, family=first)
            family.setdefault(twin.caption, twin)
        yield from family.values()


def write_digit_scenes(
    out: Path,
    *,
    num_train: int = 16000,
    num_val: int = 1000,
    num_test: int = 1000,
    num_val_twins: int = 500,
    seed: int = 0,
    show_progress: bool = False,
) -> bool:
    """Write the digit scenes to the folder `out` atomically. Return False if the same scenes were there already.

    A process that is writing them is waited for.

    train/, val/              indexed shards
    val_twins/                `num_val_twins` pairs, Urban-1k folder, for choosing settings and the best checkpoint
    random/, twins/           `num_test` pairs each, Urban-1k folders (image/N.jpg, caption/N.txt)
    digits/val/CLASS/*.jpg    `num_test` boards of a single digit, with classnames.txt and templates.txt beside val/

    Raise InputError if `out` holds anything else, or scenes with other settings.
    """
    settings = {
        "format": FORMAT, "version": VERSION, "num_train": num_train, "num_val": num_val, "num_test": num_test,
        "num_val_twins": num_val_twins, "seed": seed,
    }  # fmt: skip
    if min(num_train, num_val, num_test, num_val_twins) < 1:
        raise InputError("each part of the digit scenes needs at least one sample")
    if _is_finished(out, settings):
        return False
    with folder_lock(out, beside=True, wait=True):
        if _is_finished(out, settings):  # another process has just written them
            return False
        _write_parts(out, settings, show_progress)
    return True


Picture = tuple[Board, bytes]  # what a picture shows, and its JPEG file


def _write_parts(out: Path, settings: dict[str, Any], show_progress: bool) -> None:
    def boards(
        name: str, draw: Callable[[random.Random, Part], Iterable[Board]], part: Part, count: int
    ) -> Iterator[Picture]:
        rng = random.Random(f"{settings['seed']} {name}")
        steps = track(range(count), description=f"digit scenes: {name}", disable=not show_progress, transient=True)
        for _, board in zip(steps, draw(rng, part), strict=False):
            yield board, _jpeg(render(board, rng, part))

    num_test = settings["num_test"]
    with atomic_folder(out) as folder:
        _write_shards(folder / "train", boards("train", draw_boards, "train", settings["num_train"]), settings)
        _write_shards(folder / "val", boards("val", draw_boards, "val", settings["num_val"]), settings)
        _write_pairs(folder / "val_twins", boards("val_twins", draw_twins, "val", settings["num_val_twins"]))
        _write_pairs(folder / "random", boards("random", draw_full_boards, "test", num_test))
        _write_pairs(folder / "twins", boards("twins", draw_twins, "test", num_test))
        _write_singles(folder / "digits", boards("digits", _draw_singles, "test", num_test))
        (folder / "manifest.json").write_text(json.dumps(settings, indent=2) + "\n")


def _is_finished(out: Path, settings: dict[str, Any]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    found = _settings(out)
    if found == settings:
        return True
    if found.get("format") == FORMAT:
        raise InputError(f"{out} holds digit scenes with other settings: delete it or choose another folder")
    raise InputError(f"{out} exists but holds no digit scenes: choose another folder")


def is_outdated(folder: Path) -> bool:
    """Return whether `folder` holds digit scenes of another version of this code, with other pictures or captions."""
    found = _settings(folder)
    return found.get("format") == FORMAT and found.get("version") != VERSION


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _draw_singles(rng: random.Random, part: Part) -> Iterator[Board]:
    """Yield boards of a single digit without end, the ten classes in turn."""
    while True:
        yield from map(single_digit, range(10))


def _write_shards(folder: Path, pictures: Iterator[Picture], settings: dict[str, Any]) -> None:
    folder.mkdir()
    samples = (
        (f"{i:06d}", {"jpg": jpeg, "json": caption_member(board.caption, board.short_caption)})
        for i, (board, jpeg) in enumerate(pictures)
    )
    records: list[ShardRecord] = []
    while shard := list(islice(samples, SHARD_SIZE)):
        records.append(write_shard(folder / f"{folder.name}-{len(records):06d}.tar", shard))
    write_manifest(folder, records, settings)


def _write_pairs(folder: Path, pictures: Iterator[Picture]) -> None:
    (folder / "image").mkdir(parents=True)
    (folder / "caption").mkdir()
    for i, (board, jpeg) in enumerate(pictures, start=1):
        (folder / "image" / f"{i}.jpg").write_bytes(jpeg)
        (folder / "caption" / f"{i}.txt").write_text(board.caption + "\n")


def _write_singles(folder: Path, pictures: Iterator[Picture]) -> None:
    for i, (board, jpeg) in enumerate(pictures):
        class_folder = folder / "val" / str(board.tiles[0].digit)  # sorted like CLASSNAMES
        class_folder.mkdir(parents=True, exist_ok=True)
        (class_folder / f"{i:04d}.jpg").write_bytes(jpeg)
    (folder / "classnames.txt").write_text("\n".join(CLASSNAMES) + "\n")
    (folder / "templates.txt").write_text("\n".join(DIGIT_TEMPLATES) + "\n")
