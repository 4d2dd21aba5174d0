"""Small copies of every benchmark's published files, read by its reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.protocols import PROTOCOLS, load_retrieval_set
from longclip_teacher.errors import InputError


def touch(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        touch(folder / name)


def docci_row(name: str, split: str, description: str = "A toilet.\nOn tiles.") -> str:
    return json.dumps({"split": split, "example_id": name, "image_file": f"{name}.jpg", "description": description})


def make_docci(root: Path) -> None:
    rows = [docci_row("train_0", "train"), docci_row("test_1", "test"), docci_row("qual_test_0", "qual_test")]
    touch(root / "docci_descriptions.jsonlines", "\n".join([*rows, docci_row("test_0", "test", "Second.")]) + "\n\n")
    pictures(root / "images", "test_0.jpg", "test_1.jpg")


def make_dci(root: Path) -> None:
    for number, extra in ((1, "A wall\nand a door."), (2, " "), (3, "Sky.")):
        row = {"image": f"sa_{number}.jpg", "short_caption": f"House {number}.", "extra_caption": extra}
        touch(root / "annotations" / f"{number}-data.json", json.dumps({**row, "mask_data": {}, "mask_keys": []}))
        pictures(root / "photos", f"sa_{number}.jpg")


def make_long_dci(root: Path) -> None:
    touch(root / "dci_long.csv", 'filepath\ttitle\nsa_1.jpg\t"A ""wall""\nand\ta door."\nsa_2.jpg\tSky, grey.\n')
    pictures(root, "sa_1.jpg", "sa_2.jpg")


def make_iiw(root: Path) -> None:
    touch(root / "IIW-400" / "data.jsonl", json.dumps({"image/key": "aar_test_04600", "IIW": "Bee.", "IIW-P5B": "No."}))
    touch(root / "DCI_Test" / "data.jsonl", json.dumps({"image": "sa_1545038.jpg", "ex_id": "1", "IIW": "House."}))
    touch(root / "DOCCI_Test" / "data.jsonl", json.dumps({"image": "test_00731", "IIW": "Toilet.", "DOCCI": "No."}))
    pictures(root / "images_aar", "aar_test_04600.jpg")
    pictures(root / "photos", "sa_1545038.jpg")
    pictures(root / "images", "test_00731.jpg")


def karpathy(*rows: tuple[str, str, int], filepath: str | None = None) -> str:
    images: list[dict[str, Any]] = []
    for name, split, count in rows:
        sentences = [{"raw": f"{name} says {number}.", "tokens": []} for number in range(count)]
        images.append({"filename": name, "split": split, "sentences": sentences})
        if filepath is not None:
            images[-1]["filepath"] = filepath
    return json.dumps({"images": images, "dataset": "x"})


def make_coco_karpathy(root: Path) -> None:
    rows = (("b.jpg", "test", 6), ("c.jpg", "restval", 5), ("d.jpg", "val", 5), ("a.jpg", "test", 5))
    touch(root / "dataset_coco.json", karpathy(*rows, filepath="val2014"))
    pictures(root / "val2014", "a.jpg", "b.jpg")


def make_flickr_1k(root: Path) -> None:
    touch(root / "annotations" / "dataset_flickr30k.json", karpathy(("7.jpg", "test", 5), ("8.jpg", "train", 5)))
    pictures(root / "flickr30k-images", "7.jpg")


def make_flickr_all(root: Path) -> None:
    lines = [f'{name}.jpg#{number}\t{name} "says" # {number} .\n' for name in (9, 4) for number in range(5)]
    touch(root / "results_20130124.token", "".join(lines))
    pictures(root / "images", "4.jpg", "9.jpg")


SIX = [f"b.jpg says {number}." for number in range(5)] + [f"a.jpg says {number}." for number in range(5)]
LAYOUTS: dict[str, tuple[Callable[[Path], None], list[str], list[str]]] = {
    "docci": (make_docci, ["images/test_1.jpg", "images/test_0.jpg"], ["A toilet. On tiles.", "Second."]),
    "dci_full": (
        make_dci,
        ["photos/sa_1.jpg", "photos/sa_2.jpg", "photos/sa_3.jpg"],
        ["House 1. A wall and a door.", "House 2.", "House 3. Sky."],
    ),
    "dci_extra": (make_dci, ["photos/sa_1.jpg", "photos/sa_3.jpg"], ["A wall and a door.", "Sky."]),
    "dci_short": (
        make_dci,
        ["photos/sa_1.jpg", "photos/sa_2.jpg", "photos/sa_3.jpg"],
        ["House 1.", "House 2.", "House 3."],
    ),
    "long_dci": (make_long_dci, ["sa_1.jpg", "sa_2.jpg"], ['A "wall" and\ta door.', "Sky, grey."]),
    "iiw_400": (make_iiw, ["images_aar/aar_test_04600.jpg"], ["Bee."]),
    "iiw_612": (
        make_iiw,
        ["images_aar/aar_test_04600.jpg", "photos/sa_1545038.jpg", "images/test_00731.jpg"],
        ["Bee.", "House.", "Toilet."],
    ),
    "coco_karpathy_5k": (make_coco_karpathy, ["val2014/b.jpg", "val2014/a.jpg"], SIX),
    "flickr30k_1k_test": (make_flickr_1k, ["flickr30k-images/7.jpg"], [f"7.jpg says {n}." for n in range(5)]),
    "flickr30k_all": (
        make_flickr_all,
        ["images/9.jpg", "images/4.jpg"],
        [f'{name} "says" # {number} .' for name in (9, 4) for number in range(5)],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_its_pictures_and_captions_in_order(name: str, tmp_path: Path) -> None:
    make, images, captions = LAYOUTS[name]
    make(tmp_path)
    read = load_retrieval_set(name, tmp_path)
    assert [image.relative_to(tmp_path).as_posix() for image in read.images] == images
    assert read.captions == captions
    many = len(captions) // len(images)
    assert read.caption_image == [row for row in range(len(images)) for _ in range(many)]
    entry = PROTOCOLS[name]
    about = "about " if name in ("dci_extra", "long_dci") else ""
    assert str(read.count_mismatch).startswith(
        f"{name} has {about}{entry.num_images} pictures and {entry.num_captions} captions, "
        f"but {len(images)} and {len(captions)} were found: "
    )
    assert read.description == entry.definition


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_empty_folder_says_what_is_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^no (folder|annotation file|pictures)") as caught:
        load_retrieval_set(name, tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", LAYOUTS)
def test_absent_pictures_are_counted_before_anything_is_encoded(name: str, tmp_path: Path) -> None:
    make, images, _ = LAYOUTS[name]
    make(tmp_path)
    (tmp_path / images[0]).unlink()
    pattern = rf"1 of the {len(images)} pictures of {name} are missing, the first: .*{Path(images[0]).name}"
    with pytest.raises(InputError, match=pattern):
        load_retrieval_set(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("docci", "docci_descriptions.jsonlines", "{", r"line 1 is not valid JSON"),
        ("docci", "docci_descriptions.jsonlines", "\n[1]", r"line 2 is not a DOCCI row"),
        (
            "docci",
            "docci_descriptions.jsonlines",
            '{"split": "test", "image_file": "x.jpg"}',
            r"line 1 is not a DOCCI row",
        ),
        ("docci", "docci_descriptions.jsonlines", docci_row("../x", "test"), r"outside the root"),
        ("docci", "docci_descriptions.jsonlines", docci_row("x", "train"), r"no pictures in .* docci needs"),
        ("docci", "docci_descriptions.jsonlines", docci_row("test_0", "test", " "), r"an empty caption"),
        ("dci_full", "annotations/1-data.json", '{"image": "sa_1.jpg"}', r"1-data\.json is not a DCI annotation"),
        ("dci_extra", "annotations/2-data.json", "[]", r"2-data\.json is not a DCI annotation"),
        (
            "dci_short",
            "annotations/1-data.json",
            '{"image": "/etc/x.jpg", "short_caption": "a", "extra_caption": ""}',
            r"outside the root",
        ),
        ("long_dci", "dci_long.csv", "sa_1.jpg,A wall\nsa_2.jpg,x\n", r"has the columns sa_1\.jpg,A wall: Long-DCI"),
        ("long_dci", "dci_long.csv", "filepath\ttitle\nsa_1.jpg\n", r"line 2 has no title"),
        ("long_dci", "dci_long.csv", "filepath\ttitle\n../../x.jpg\ta\n", r"outside the root"),
        ("long_dci", "dci_long.csv", "filepath\ttitle\nx.jpg\t" + "a" * 200_000, r"not a tab-separated UTF-8 table"),
        ("iiw_400", "IIW-400/data.jsonl", '{"image/key": "aar"}', r"line 1 is not an ImageInWords row"),
        ("iiw_400", "IIW-400/data.jsonl", '{"IIW": "x"}', r"an invalid file name: None"),
        ("iiw_612", "DCI_Test/data.jsonl", '{"image": "../x", "IIW": "a"}', r"outside the root"),
        ("iiw_612", "DOCCI_Test/data.jsonl", "7", r"line 1 is not an ImageInWords row"),
        ("coco_karpathy_5k", "dataset_coco.json", "[]", r"not a file of Karpathy's splits"),
        ("coco_karpathy_5k", "dataset_coco.json", karpathy(("x.jpg", "test", 5), filepath=".."), r"outside the root"),
        ("coco_karpathy_5k", "dataset_coco.json", karpathy(("a.jpg", "val", 5)), r"no pictures in"),
        ("flickr30k_1k_test", "dataset_flickr30k.json", karpathy(("/x.jpg", "test", 5)), r"outside the root"),
        ("flickr30k_1k_test", "dataset_flickr30k.json", karpathy(("7.jpg", "test", 0)), r"has no caption"),
        ("flickr30k_all", "results_20130124.token", "9.jpg#0 a caption\n", r"line 1 is not a caption of Flickr30k"),
        ("flickr30k_all", "results_20130124.token", "9.jpg\ta caption\n", r"line 1 is not a caption of Flickr30k"),
        ("flickr30k_all", "results_20130124.token", "../9.jpg#0\ta caption\n", r"outside the root"),
    ],
)
def test_malformed_files_are_one_line_errors(name: str, file: str, content: str, message: str, tmp_path: Path) -> None:
    LAYOUTS[name][0](tmp_path)
    touch(tmp_path / file, content)
    with pytest.raises(InputError, match=message) as caught:
        load_retrieval_set(name, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("docci", "images"),
        ("dci_full", "photos"),
        ("dci_full", "annotations"),
        ("iiw_400", "images_aar"),
        ("iiw_612", "photos"),
        ("coco_karpathy_5k", "val2014"),
        ("flickr30k_1k_test", "flickr30k-images"),
        ("flickr30k_all", "images"),
    ],
)
def test_a_missing_folder_is_named(name: str, folder: str, tmp_path: Path) -> None:
    LAYOUTS[name][0](tmp_path)
    (tmp_path / folder).rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=rf"no folder .*{folder}.* in .* belong there"):
        load_retrieval_set(name, tmp_path)


def test_the_other_places_of_files(tmp_path: Path) -> None:
    make_dci(tmp_path / "dci" / "densely_captioned_images")
    assert len(load_retrieval_set("dci_short", tmp_path / "dci").images) == 3
    make_iiw(tmp_path / "iiw" / "datasets")
    for old, new in (("images_aar", "docci_aar"), ("photos", "dci"), ("images", "docci")):
        (tmp_path / "iiw" / "datasets" / old).rename(tmp_path / "iiw" / new)
    assert load_retrieval_set("iiw_612", tmp_path / "iiw").images[2] == tmp_path / "iiw" / "docci" / "test_00731.jpg"
    touch(tmp_path / "table.tsv", "caption\timage\nA sky.\tsa_9.jpg\n")
    pictures(tmp_path / "photos", "sa_9.jpg")
    table = load_retrieval_set("long_dci", tmp_path, annotations=tmp_path / "table.tsv")
    assert table.images == [tmp_path / "photos" / "sa_9.jpg"] and table.captions == ["A sky."]
