"""Captions as people have them: rows that lack something, half emojis, tables with any header."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from importer_runs import SCRIPTS, Run, contents, run, sharegpt4v, write_pictures
from shard_files import write_old_manifest
from training.data.index import ShardIndex

__all__ = ["run"]  # a fixture

PAIR = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A caption."}]
ROWS_WITHOUT = [
    {"conversations": PAIR},
    {"image": None, "conversations": PAIR},
    {"image": "1.jpg"},
    {"image": "1.jpg", "conversations": [*PAIR[:1], {"from": "gpt", "value": None}]},
    {"image": "1.mp4", "conversations": PAIR},
    {"image": "9.jpg", "conversations": PAIR},
    7,
]


def test_rows_without_picture_or_caption_are_counted_one_by_one(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path, ["1.jpg", "2.jpg"])
    rows = [{"image": "1.jpg", "conversations": PAIR}, *ROWS_WITHOUT, {"image": "2.jpg", "conversations": PAIR}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = [*sharegpt4v(tmp_path, tmp_path / "out"), "--split", "all"]
    assert run(*arguments, "--max-missing-share", 0.8) == 0
    causes = "3 no picture named, 2 no caption, 1 no file, 1 not a picture's file name"
    assert f"2 samples in 1 shards (0 kept), 7 pictures left out ({causes}; " in capsys.readouterr().out
    assert list(contents(tmp_path / "out")) == ["000000000", "000000008"]
    names = ["1.jpg", "1.jpg", "1.mp4", "9.jpg", "row 1", "row 2", "row 7"]
    assert (tmp_path / "out/missing.txt").read_text().splitlines() == names
    assert run(*arguments) == 2 and causes in capsys.readouterr().err


def test_an_empty_row_takes_no_other_row_of_its_picture_along(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path, ["0.jpg", "1.jpg"])
    (tmp_path / "t.csv").write_text("0.jpg,One.\n0.jpg,\n0.jpg,Two.\n1.jpg\n,no picture\n1.jpg,Three.\n")
    assert run("csv", "--file", tmp_path / "t.csv", "--out", tmp_path / "out", "--max-missing-share", 0.5) == 0
    assert [row["caption_long"] for row in contents(tmp_path / "out").values()] == ["One.", "Two.", "Three."]
    assert "(2 no caption, 1 no picture named; " in capsys.readouterr().out
    annotations = [{"image_id": 0, "caption": text} for text in ("A", None, "B")] + [{"image_id": 1, "caption": ""}]
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(2)] + [{"id": 2}]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    coco = ["coco", "--json", tmp_path / "c.json", "--images", tmp_path, "--out", tmp_path / "coco"]
    assert run(*coco, "--max-missing-share", 0.9) == 0
    assert list(contents(tmp_path / "coco").values()) == [{"caption_long": ["A", "B"]}]
    assert "(1 no caption, 1 no picture named; " in capsys.readouterr().out


HALF = "A dog \ud83d on grass \ud83d\ude00\ud83d"  # half an emoji, two halves of one, half an emoji
WHOLE = "A dog \ufffd on grass \N{GRINNING FACE}\ufffd"


def test_half_an_emoji_is_replaced(run: Run, tmp_path: Path) -> None:
    write_pictures(tmp_path / "f", ["0.jpg"])
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "0.jpg", "conversations": [{}, {"value": HALF}]}]))
    coco = {"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [{"image_id": 1, "caption": HALF}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    for name, text in (("t.csv", f"0.jpg,{HALF}"), ("t.tsv", f"0.jpg\t{HALF}"), ("f/0.txt", HALF)):
        (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    for number, source in enumerate((
        ["sharegpt4v", "--json", tmp_path / "rows.json"], ["coco", "--json", tmp_path / "coco.json"],
        ["csv", "--file", tmp_path / "t.csv"], ["tsv", "--file", tmp_path / "t.tsv"], ["folder"],
    )):  # fmt: skip
        out = tmp_path / f"out{number}"
        assert run(*source, "--images", tmp_path / "f", "--out", out) == 0
        assert list(contents(out).values()) == [{"caption_long": WHOLE}]


@pytest.mark.parametrize(
    ("header", "row", "expected", "told"),
    [
        ("filepath,title", "0.jpg,T", {"caption_long": "T"}, "columns used: filepath, title; ignored: none"),
        (
            "id,Caption Short, TEXT ,File-Name,score", "7,S,T,0.jpg,0.3",
            {"caption_long": "T", "caption_short": "S"},
            "columns used: File-Name, TEXT, Caption Short; ignored: id, score",
        ),
        ("image_path,caption,long", "0.jpg,C,L", {"caption_long": "L"}, "used: image_path, long; ignored: caption"),
        ("image,caption,split", "0.jpg,C,train", {"caption_long": "C"}, "used: image, caption; ignored: split"),
    ],
)  # fmt: skip
def test_a_header_names_the_columns(
    header: str, row: str, expected: dict[str, str], told: str, run: Run, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_pictures(tmp_path, ["0.jpg"])
    for kind, mark in (("csv", ","), ("tsv", "\t")):
        (tmp_path / "table").write_text(f"\ufeff{header}\n{row}\n".replace(",", mark), encoding="utf-8")
        assert run(kind, "--file", tmp_path / "table", "--out", tmp_path / kind) == 0
        assert list(contents(tmp_path / kind).values()) == [expected]
        assert told in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_a_header_without_picture_or_caption_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path, ["0.jpg"])
    for header, message in (
        ("filepath,score", "(filepath, score) holds the caption: call it caption_long, "),
        ("id,caption", "(id, caption) holds the picture: call it filepath, "),
        ("id,words", "its first row (id, words) neither names columns"),
        ("A caption,0.jpg", "nor begins with a picture's path"),
    ):
        (tmp_path / "t.csv").write_text(f"{header}\n0.jpg,One\n")
        assert run("csv", "--file", tmp_path / "t.csv", "--out", tmp_path / "out") == 2
        assert message in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_absolute_paths_below_the_root_are_accepted(run: Run, tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", ["a/0.jpg", "1.jpg"])
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for root in (tmp_path / "in", tmp_path / "link"):
        (tmp_path / "t.csv").write_text(f"{tmp_path}/in/a/0.jpg,A\n{root}/1.jpg,B\n")
        assert run("csv", "--file", tmp_path / "t.csv", "--images", root, "--out", tmp_path / f"out-{root.name}") == 0
        assert len(contents(tmp_path / f"out-{root.name}")) == 2


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Packed, listed, indexed and printed, in processes whose streams take UTF-8 alone."""
    folder = tmp_path / "in"
    write_pictures(folder, [f"caf\udce9{number}.jpg" for number in range(30)])
    for number in range(29):
        (folder / f"caf\udce9{number}.txt").write_text(f"Caption {number}")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}

    def make_shards(*arguments: object) -> str:
        command = [sys.executable, str(SCRIPTS / "make_shards.py"), *map(str, arguments), "--workers", "2"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = tmp_path / "caf\udce9"
    told = make_shards("folder", "--images", folder, "--out", out, "--val-share", 0.3, "--max-missing-share", 0.1)
    assert f"{tmp_path}/caf\\udce9: " in told and "1 pictures left out (1 no caption; " in told
    assert (out / "missing.txt").read_text() == "caf\\udce929.jpg\n"
    captions = [path.read_text().strip() for path in (out / "val/caption").iterdir()]
    captions += [str(row["caption_long"]) for row in contents(out).values()]
    assert sorted(captions) == sorted(f"Caption {number}" for number in range(29)) and len(captions) > len(
        contents(out)
    )
    tar = tmp_path / "t.tar"
    with tarfile.open(tar, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    scanned = ShardIndex([tar])
    assert "30 samples in 1 shards" in make_shards("index", "--shards", tar)
    indexes = [scanned, ShardIndex([tar])]
    assert [index.key(0) for index in indexes] == ["caf\udce90"] * 2
    write_old_manifest(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_bytes().decode("utf-8", "strict"))
    assert manifest["shards"][0]["index"]["key"][0] == "caf\udce90"
    for index in (*indexes, ShardIndex([tar])):
        assert index.key(0) == "caf\udce90" and index.read(0).txt == b"Caption 0"
