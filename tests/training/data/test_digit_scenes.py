"""Digit scenes: public layouts, true captions, held-out glyphs and layouts, twins that agree on 77 tokens."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer, first_sentence
from training.data import digit_scenes
from training.data.digit_scenes import (
    CLASSNAMES,
    DIGIT_TEMPLATES,
    Board,
    Tile,
    draw_boards,
    draw_full_boards,
    draw_twins,
    is_outdated,
    render,
    write_digit_scenes,
)
from training.data.index import ShardIndex

SMALL = {"num_train": 90, "num_val": 20, "num_test": 40, "num_val_twins": 8}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digit_scenes"
    assert write_digit_scenes(out, **SMALL)
    return out


def captions_of(folder: Path) -> list[str]:
    count = len(list((folder / "caption").iterdir()))
    return [(folder / "caption" / f"{i}.txt").read_text().strip() for i in range(1, count + 1)]


def test_every_part_has_its_layout(scenes: Path) -> None:
    for name, count in [("train", 90), ("val", 20)]:
        index = ShardIndex(sorted((scenes / name).glob("*.tar")))
        assert index.num_samples == count
        captions = json.loads(index.read(0).json or b"")
        assert captions["caption_long"].startswith(captions["caption_short"])
        assert first_sentence(captions["caption_long"]) + "." == captions["caption_short"]
    for name, count in [("random", 40), ("twins", 40), ("val_twins", 8)]:
        assert len(captions_of(scenes / name)) == count
        assert len(set(captions_of(scenes / name))) == count
        with Image.open(scenes / name / "image" / f"{count}.jpg") as picture:
            assert picture.size == (48, 48)
    classes = sorted(path.name for path in (scenes / "digits/val").iterdir())
    assert classes == [str(digit) for digit in range(10)]
    assert all(len(list((scenes / "digits/val" / name).iterdir())) == 4 for name in classes)
    assert (scenes / "digits/classnames.txt").read_text().split() == list(CLASSNAMES)
    assert len((scenes / "digits/templates.txt").read_text().splitlines()) == len(DIGIT_TEMPLATES)


def test_scenes_of_another_version_are_told_from_these(scenes: Path, tmp_path: Path) -> None:
    assert not is_outdated(scenes) and not is_outdated(tmp_path)
    settings = json.loads((scenes / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(settings | {"version": settings["version"] - 1}))
    assert is_outdated(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    assert not is_outdated(tmp_path)


def test_full_captions_have_about_100_tokens_and_a_short_first_sentence() -> None:
    tokenizer = CaptionTokenizer()
    for board in islice(draw_full_boards(random.Random(0), "test"), 50):
        assert 95 <= tokenizer.count_tokens(board.caption) <= 105
        assert tokenizer.count_tokens(board.short_caption) == 10


def test_twins_share_their_first_77_tokens_and_their_captions_differ() -> None:
    tokenizer = CaptionTokenizer()
    boards = list(islice(draw_twins(random.Random(1), "test"), 80))
    assert len({board.caption for board in boards}) == 80
    for start in range(0, 80, 4):
        family = tokenizer([board.caption for board in boards[start : start + 4]])
        assert (family[:, :77] == family[0, :77]).all()
        assert len({tuple(row) for row in family.tolist()}) == 4
        cut = tokenizer([board.caption for board in boards[start : start + 4]], 77)
        assert (cut == cut[0]).all()


def test_no_layout_of_validation_or_test_is_in_training() -> None:
    parts = {
        part: {tuple((tile.cell, tile.digit, tile.ink) for tile in board.tiles) for board in islice(boards, 1500)}
        for part, boards in {
            "train": draw_boards(random.Random(2), "train"),
            "val": draw_twins(random.Random(3), "val"),
            "test": draw_full_boards(random.Random(4), "test"),
        }.items()
    }
    assert not parts["train"] & parts["val"] and not parts["train"] & parts["test"] and not parts["val"] & parts["test"]


def test_glyphs_are_split_without_overlap() -> None:
    glyphs = digit_scenes._glyphs()
    seen = {
        part: [example["small"].tobytes() for examples in digits.values() for example in examples]
        for part, digits in glyphs.items()
    }
    assert {part: len(examples) for part, examples in seen.items()} == {"train": 1297, "val": 150, "test": 350}
    assert not set(seen["train"]) & set(seen["test"]) and not set(seen["train"]) & set(seen["val"])
    assert all(len(examples) >= 10 for digits in glyphs.values() for examples in digits.values())


def test_training_boards_include_single_sparse_and_serial_ones() -> None:
    boards = list(islice(draw_boards(random.Random(5), "train"), 1000))
    counts = Counter(len(board.tiles) for board in boards)
    assert 80 < counts[1] < 160
    assert 25 < sum(counts[number] for number in range(2, 9)) < 80
    beginnings = Counter((board.ground, board.frame, board.tiles[:7]) for board in boards if len(board.tiles) == 9)
    series = [count for count in beginnings.values() if count > 1]
    assert len(series) == 14 and 200 < sum(series) < 300
    twins = {
        (board.ground, board.frame, board.tiles[:7]) for board in islice(draw_twins(random.Random(6), "test"), 400)
    }
    assert not twins & set(beginnings)


def test_single_digits_differ_in_the_digit_alone() -> None:
    captions = [digit_scenes.single_digit(digit).caption for digit in range(10)]
    assert captions == [DIGIT_TEMPLATES[0].format(name) for name in CLASSNAMES]
    pixels = np.asarray(render(digit_scenes.single_digit(8), random.Random(0), "val")).astype(int)
    assert tuple(pixels[0, 0]) == digit_scenes.FRAMES["black"]
    assert tuple(pixels[3, 3]) == digit_scenes.GROUNDS["beige"]
    blue = (pixels[..., 2] - pixels[..., 0] > 100)[4:44, 4:44]
    assert 0.1 < blue.mean() < 0.7
    assert blue[:20].any() and blue[20:].any()


def test_the_picture_shows_what_the_caption_says() -> None:
    tiles = (Tile(0, 7, "red", "large", "dark"), Tile(8, 1, "blue", "small", "light"))
    board = Board("navy", "yellow", tiles)
    assert board.caption == (
        "A navy board in a yellow frame. top left shows a large red seven on dark. "
        "bottom right shows a small blue one on light."
    )
    pixels = np.asarray(render(board, random.Random(0), "train")).astype(int)
    assert tuple(pixels[0, 0]) == digit_scenes.FRAMES["yellow"]
    assert tuple(pixels[24, 24]) == digit_scenes.GROUNDS["navy"]  # the centre has no tile
    top_left, bottom_right = pixels[4:16, 4:16], pixels[32:44, 32:44]
    assert (top_left[..., 0] > 180).any() and top_left.min() < 30  # red ink on a dark tile
    assert bottom_right[0, 0].min() > 225 and (bottom_right[..., 0] < 120).any()  # blue ink on a light tile


def test_same_seed_gives_the_same_bytes_and_a_finished_folder_is_kept(scenes: Path, tmp_path: Path) -> None:
    assert write_digit_scenes(tmp_path / "again", **SMALL)
    for path in sorted(scenes.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(scenes)).read_bytes(), path
    assert not write_digit_scenes(tmp_path / "again", **SMALL)
    with pytest.raises(InputError, match="other settings"):
        write_digit_scenes(tmp_path / "again", **SMALL, seed=1)


def test_a_foreign_folder_is_left_alone_and_an_error_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no digit scenes"):
        write_digit_scenes(tmp_path / "mine", **SMALL)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(digit_scenes, "_write_singles", fail)
    with pytest.raises(OSError, match="disk full"):
        write_digit_scenes(tmp_path / "new", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o002, 0o775), (0o077, 0o700)])
def test_permissions_are_those_of_any_new_folder(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_digit_scenes(tmp_path / "scenes", num_train=2, num_val=1, num_test=1, num_val_twins=1)
    finally:
        os.umask(before)
    folders = [tmp_path / "scenes", *(path for path in (tmp_path / "scenes").rglob("*") if path.is_dir())]
    assert {path.stat().st_mode & 0o777 for path in folders} == {mode}
