"""Pictures on their way into shards: broken ones are left out and counted by cause, turned ones come upright."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

import training.data.index
from eval.base.images import open_image
from importer_runs import Run, contents, run, write_pictures
from training.data.index import ShardIndex

__all__ = ["run"]  # a fixture


def broken_pictures(folder: Path) -> None:
    """Seven pictures with captions: four cannot be used."""
    write_pictures(folder, [f"{number}.jpg" for number in range(7)])
    (folder / "1.jpg").write_text("<html>404</html>")
    (folder / "2.jpg").write_bytes(b"")
    (folder / "3.jpg").write_bytes((folder / "3.jpg").read_bytes()[:400])
    (folder / "5.jpg").unlink()
    os.mkfifo(folder / "5.jpg")
    for number in range(7):
        (folder / f"{number}.txt").write_text(f"Caption {number}")


@pytest.mark.parametrize("more", [[], ["--resize", 100], ["--shard-size", 1]])
def test_broken_pictures_are_left_out_and_counted_by_cause(
    more: list[object], run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_pictures(tmp_path / "in")
    arguments = ["folder", "--images", tmp_path / "in", "--out", tmp_path / "out", "--workers", 1, *more]
    assert run(*arguments, "--max-missing-share", 0.6) == 0
    causes = "(1 damaged picture, 1 empty file, 1 no file, 1 not a picture; "
    assert f"3 samples in {3 if '--shard-size' in more else 1} shards (0 kept), 4 pictures left out {causes}" in (
        capsys.readouterr().out
    )
    assert [row["caption_long"] for row in contents(tmp_path / "out").values()] == [
        "Caption 0",
        "Caption 4",
        "Caption 6",
    ]
    assert (tmp_path / "out/missing.txt").read_text().split() == ["1.jpg", "2.jpg", "3.jpg", "5.jpg"]
    assert run(*arguments) == 2
    assert "1 no file), more than --max-missing-share 0.02" in capsys.readouterr().err
    assert run(*arguments, "--max-missing-share", 0.3) == 2
    error = capsys.readouterr().err
    assert causes[:-2] in error and error.count("\n") == 1
    nothing = [*arguments[:3], "--out", tmp_path / "nothing", *arguments[5:], "--exclude", "0.jpg", "4.jpg", "6.jpg"]
    assert run(*nothing, "--max-missing-share", 1) == 2
    assert f"4 of 4 pictures are missing, broken or without a caption {causes[:-2]}" in capsys.readouterr().err


def test_broken_pictures_of_the_validation_share_are_left_out(run: Run, tmp_path: Path) -> None:
    broken_pictures(tmp_path / "in")
    arguments = ["folder", "--images", tmp_path / "in", "--out", tmp_path / "out", "--val-share", 0.5]
    assert run(*arguments, "--max-missing-share", 0.6) == 0
    val = [path.read_text() for path in (tmp_path / "out/val/caption").iterdir()]
    train = [f"{row['caption_long']}\n" for row in contents(tmp_path / "out").values()]
    assert sorted(val + train) == ["Caption 0\n", "Caption 4\n", "Caption 6\n"] and val and train
    assert (tmp_path / "out/missing.txt").read_text().split() == ["1.jpg", "2.jpg", "3.jpg", "5.jpg"]


def test_shrunk_pictures_are_upright(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 60)).save(tmp_path / "in/a.jpg", exif=exif)
    (tmp_path / "in/a.txt").write_text("a")
    for out, more in (("small", ["--resize", 30]), ("same", [])):
        assert run("folder", "--images", tmp_path / "in", "--out", tmp_path / out, *more) == 0
    small, same = (ShardIndex([tmp_path / out / "train-000000.tar"]).read(0).image or b"" for out in ("small", "same"))
    assert open_image(small).size == (30, 50) and Image.open(io.BytesIO(small)).getexif().get(0x0112) is None
    assert same == (tmp_path / "in/a.jpg").read_bytes() and open_image(same).size == (60, 100)


def test_pictures_that_training_would_refuse_are_left_out_unless_they_shrink(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "in", ["a.jpg", "b.jpg"], (100, 60))
    write_pictures(tmp_path / "in", ["b.jpg"], (10, 10))
    for name in "ab":
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    monkeypatch.setattr(training.data.index, "MAX_TRAINING_PIXELS", 5999)
    monkeypatch.delitem(sys.modules, "packed_pictures", raising=False)
    arguments = ["folder", "--images", tmp_path / "in", "--max-missing-share", 0.5, "--workers", 1]
    assert run(*arguments, "--out", tmp_path / "same") == 0
    assert "1 samples" in (out := capsys.readouterr().out) and "1 more than 5999 pixels" in out
    assert run(*arguments, "--out", tmp_path / "small", "--resize", 30) == 0
    assert "2 samples" in capsys.readouterr().out
    sys.modules.pop("packed_pictures")
