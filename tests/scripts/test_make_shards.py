"""make_shards.py: every layout in, valid shards out; resumable, deterministic, honest about what is missing."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from eval.benchmarks.conversations import SHAREGPT4V_JSON
from importer_runs import SCRIPTS, Run, contents, run, sharegpt4v, write_pictures
from shard_files import write_old_manifest
from training.data.byte_index import ByteIndex
from training.data.index import ShardIndex

__all__ = ["run"]  # a fixture


def make_sharegpt4v(root: Path, num_rows: int, missing: tuple[int, ...] = ()) -> Path:
    rows = [
        {
            "id": str(number),
            "image": f"coco/{number:04d}.png" if number % 2 else f"sam/{number:04d}.png",
            "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": f"Row {number}.\nIt is long."}],
        }
        for number in range(num_rows)
    ]
    write_pictures(root, [row["image"] for number, row in enumerate(rows) if number not in missing], (6, 4))
    (root / "rows.json").write_text(json.dumps(rows))
    return root


def test_sharegpt4v_training_starts_at_row_1000_and_newlines_become_spaces(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_sharegpt4v(tmp_path / "in", 1012)
    assert run(*sharegpt4v(root, tmp_path / "own"), "--limit", 3) == 0  # another file of this layout has no test in it
    assert list(contents(tmp_path / "own")) == [f"{number:09d}" for number in range(3)]
    assert "all rows are used; --split train leaves out rows 0 to 999" in capsys.readouterr().err
    assert run(*sharegpt4v(root, tmp_path / "cut"), "--split", "train") == 0
    assert list(contents(tmp_path / "cut")) == [f"{number:09d}" for number in range(1000, 1012)]
    capsys.readouterr()
    published = (root / "rows.json").rename(root / SHAREGPT4V_JSON)
    (root / "rows.json").symlink_to(published)
    train = ["sharegpt4v", "--json", published, "--images", root, "--out", tmp_path / "train", "--workers", 1]
    assert run(*train, "--shard-size", 5) == 0
    assert "rows 0 to 999 are held out" in (told := capsys.readouterr().err) and "--split all" in told
    found = contents(tmp_path / "train")
    assert list(found) == [f"{number:09d}" for number in range(1000, 1012)]
    assert found["000001003"] == {"caption_long": "Row 1003. It is long."}
    assert len(list((tmp_path / "train").glob("*.tar"))) == 3
    index = ShardIndex([tmp_path / "train" / "train-000000.tar"])
    assert index.read(1).image == (root / "coco" / "1001.png").read_bytes()  # verbatim
    assert run(*sharegpt4v(root, tmp_path / "test"), "--split", "test", "--limit", 7) == 0
    assert list(contents(tmp_path / "test")) == [f"{number:09d}" for number in range(7)]


def test_include_exclude_and_limit(run: Run, tmp_path: Path) -> None:
    root = make_sharegpt4v(tmp_path / "in", 20)
    common = ["--split", "all", "--include", "coco/*", "--exclude", "*/0003.png", "*/0007.png", "--limit", 4]
    assert run(*sharegpt4v(root, tmp_path / "out"), *common) == 0
    assert [int(key) for key in contents(tmp_path / "out")] == [1, 5, 9, 11]


def test_coco_keeps_all_captions_of_a_picture(run: Run, tmp_path: Path) -> None:
    write_pictures(tmp_path / "val", ["a.jpg", "b.jpg"])
    images = [{"id": 9, "file_name": "b.jpg"}, {"id": 4, "file_name": "a.jpg"}]
    notes = [(4, "one"), (9, "alone\n"), (4, "two")]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(notes)]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    assert run("coco", "--json", tmp_path / "c.json", "--images", tmp_path / "val", "--out", tmp_path / "out") == 0
    assert list(contents(tmp_path / "out").values()) == [{"caption_long": ["one", "two"]}, {"caption_long": "alone"}]


def test_folder_reads_texts_beside_the_pictures_and_urban1k(run: Run, tmp_path: Path) -> None:
    write_pictures(tmp_path / "a", ["x/1.jpg", "2.png"])
    (tmp_path / "a/x/1.txt").write_text("First.\nSecond.")
    (tmp_path / "a/2.txt").write_text("Zwei größer")
    assert run("folder", "--images", tmp_path / "a", "--out", tmp_path / "out-a") == 0
    assert [row["caption_long"] for row in contents(tmp_path / "out-a").values()] == ["Zwei größer", "First. Second."]
    write_pictures(tmp_path / "b", ["image/1.jpg", "image/2.jpg"])
    (tmp_path / "b/caption").mkdir()
    for number in (1, 2):
        (tmp_path / "b/caption" / f"{number}.txt").write_text(f"Pair {number}")
    assert run("folder", "--images", tmp_path / "b", "--out", tmp_path / "out-b") == 0
    assert [row["caption_long"] for row in contents(tmp_path / "out-b").values()] == ["Pair 1", "Pair 2"]


def test_tables_with_and_without_header_and_short_captions(run: Run, tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "t.tsv").write_text('image\tlong\tshort\na.jpg\tsays "hi" and, goes on\tshort\nb.jpg\tlong b\t\n')
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["a.jpg", 'one, "two"'], ["b.jpg", "line\nbreak"]])
    assert run("tsv", "--file", tmp_path / "t.tsv", "--out", tmp_path / "tsv") == 0
    assert list(contents(tmp_path / "tsv").values()) == [
        {"caption_long": 'says "hi" and, goes on', "caption_short": "short"},
        {"caption_long": "long b"},
    ]
    assert run("csv", "--file", tmp_path / "t.csv", "--out", tmp_path / "csv") == 0
    assert [row["caption_long"] for row in contents(tmp_path / "csv").values()] == ['one, "two"', "line break"]


def test_the_same_bytes_from_any_number_of_workers(run: Run, tmp_path: Path) -> None:
    root = make_sharegpt4v(tmp_path / "in", 30)
    common = ["--split", "all", "--shard-size", "7"]
    assert run(*sharegpt4v(root, tmp_path / "one"), *common) == 0
    # a real process with real workers
    arguments = [*sharegpt4v(root, tmp_path / "two"), *common, "--workers", 2]
    command = [sys.executable, str(SCRIPTS / "make_shards.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "30 samples in 5 shards" in result.stdout
    for name in [path.name for path in (tmp_path / "one").iterdir()]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_interrupted_run_keeps_what_is_done(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import training.data.writer as writer

    root = make_sharegpt4v(tmp_path / "in", 20)
    arguments = [*sharegpt4v(root, tmp_path / "out"), "--split", "all", "--shard-size", 5]
    real = writer.scan_tar

    def killed(path: Path) -> ByteIndex:
        if "000002" in path.name:
            raise KeyboardInterrupt  # in the middle of the third shard, after its bytes and before its name
        return real(path)

    monkeypatch.setattr(writer, "scan_tar", killed)
    assert run(*arguments) == 130
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name for name in names if name.endswith(".tar")] == ["train-000000.tar", "train-000001.tar"]
    assert not any(name.endswith(".part") or name == "manifest.json" for name in names)
    (tmp_path / "out/.train-000002.tar.0123456789abcdef.part").mkdir()  # what SIGKILL would have left
    monkeypatch.setattr(writer, "scan_tar", real)
    stamp = (tmp_path / "out/train-000000.tar").stat().st_mtime_ns
    assert run(*arguments) == 0
    assert "20 samples in 4 shards (2 kept)" in capsys.readouterr().out
    assert (tmp_path / "out/train-000000.tar").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json", *(f"train-{number:06d}.tar{more}" for number in range(4) for more in ("", ".index"))
    ]  # fmt: skip
    write_pictures(root, ["sam/0000.png"], (9, 9))  # one picture changes: its shard is made again, the others stay
    assert run(*arguments) == 0
    assert "(3 kept)" in capsys.readouterr().out
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write_old_manifest(tmp_path / "out")  # as an earlier version has left it
    assert run(*arguments) == 0
    assert "(4 kept)" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == written
    (tmp_path / "out/train-000001.tar.index").unlink()
    assert run(*arguments) == 0
    assert "(3 kept)" in capsys.readouterr().out


def test_missing_pictures_are_listed_and_fatal_past_the_share(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_sharegpt4v(tmp_path / "in", 20, missing=(3, 8))
    arguments = [*sharegpt4v(root, tmp_path / "out"), "--split", "all"]
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert "2 of 20 pictures are missing" in error and "--max-missing-share" in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.tar"))
    assert run(*arguments, "--max-missing-share", 0.1) == 0
    assert (tmp_path / "out/missing.txt").read_text().split() == ["coco/0003.png", "sam/0008.png"]
    assert len(contents(tmp_path / "out")) == 18


def test_resize_shrinks_large_pictures_and_counts_what_it_cannot_decode(run: Run, tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", ["a.png"], (100, 60))
    write_pictures(tmp_path / "in", ["b.png"], (20, 20))
    (tmp_path / "in/c.png").write_bytes(b"no picture")
    for name in "abc":
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    common = ["--out", tmp_path / "out", "--resize", 30, "--max-missing-share", 0.5]
    assert run("folder", "--images", tmp_path / "in", *common) == 0
    index = ShardIndex([tmp_path / "out/train-000000.tar"])
    (tmp_path / "a.jpg").write_bytes(index.read(0).image or b"")
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.size == (50, 30)
    assert index.read(1).image == (tmp_path / "in/b.png").read_bytes()
    assert (tmp_path / "out/missing.txt").read_text() == "c.png\n" and index.num_samples == 2


def test_validation_share_is_chosen_by_path_and_read_by_the_folder_protocol(run: Run, tmp_path: Path) -> None:
    from eval.benchmarks.protocols import load_retrieval_set

    root = make_sharegpt4v(tmp_path / "in", 60)
    assert run(*sharegpt4v(root, tmp_path / "out"), "--split", "all", "--val-share", 0.2) == 0
    val = load_retrieval_set("folder", tmp_path / "out" / "val")
    train = contents(tmp_path / "out")
    assert 4 <= len(val.images) <= 20 and len(val.images) + len(train) == 60
    assert not {row["caption_long"] for row in train.values()} & set(val.captions)
    for image, caption in zip(val.images, val.captions, strict=True):
        row = int(caption.split()[1].rstrip("."))
        source = root / ("coco" if row % 2 else "sam") / f"{row:04d}.png"
        assert image.read_bytes() == source.read_bytes()


def test_index_writes_the_manifest_of_existing_tars(run: Run, tmp_path: Path) -> None:
    root = make_sharegpt4v(tmp_path / "in", 12)
    assert run(*sharegpt4v(root, tmp_path / "out"), "--split", "all", "--shard-size", 5) == 0
    made = json.loads((tmp_path / "out/manifest.json").read_text())
    (tmp_path / "out/manifest.json").unlink()
    assert run("index", "--shards", tmp_path / "out", "--workers", 1) == 0
    found = json.loads((tmp_path / "out/manifest.json").read_text())
    for before, after in zip(made["shards"], found["shards"], strict=True):
        assert {**before, "inputs": ""} == after


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd.png", "a/../../b.png", "", 7])
def test_paths_that_climb_out_of_the_root_are_refused(
    run: Run, tmp_path: Path, name: object, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    row = {"image": name, "conversations": [{}, {"value": "caption"}]}
    (tmp_path / "in/rows.json").write_text(json.dumps([row]))
    assert run(*sharegpt4v(tmp_path / "in", tmp_path / "out"), "--split", "all") == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()


def test_bad_input_ends_in_one_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_sharegpt4v(tmp_path / "in", 4)
    (tmp_path / "cut.json").write_text('[{"image": "a.jpg", "conv')
    (tmp_path / "other.json").write_text('[{"file": "a.jpg"}]')
    (tmp_path / "one.tsv").write_text("a.jpg\n")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/train-000007.tar").write_bytes(b"")
    every = ["--split", "all"]
    cases: list[tuple[list[object], str]] = [
        (["sharegpt4v", "--json", "nowhere.json", "--images", root, "--out", tmp_path / "o"], "no annotation file"),
        (["sharegpt4v", "--json", tmp_path / "cut.json", "--images", root, "--out", tmp_path / "o", *every], "JSON"),
        (["sharegpt4v", "--json", tmp_path / "other.json", "--images", root, "--out", tmp_path / "o", *every], "row 0"),
        (["coco", "--json", tmp_path / "other.json", "--images", root, "--out", tmp_path / "o"], "not a COCO"),
        (["folder", "--images", tmp_path / "none", "--out", tmp_path / "o"], "no folder"),
        (["tsv", "--file", tmp_path / "one.tsv", "--out", tmp_path / "o"], "second column"),
        ([*sharegpt4v(root, tmp_path / "o"), *every, "--include", "nix/*"], "no pictures are left"),
        ([*sharegpt4v(root, tmp_path / "o"), *every, "--shard-size", 0], "must be 1 or more"),
        ([*sharegpt4v(root, tmp_path / "old"), *every], "shards of another run"),
        (["index", "--shards", tmp_path / "nix-*.tar"], "no shard matches"),
    ]
    for arguments, message in cases:
        assert run(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
