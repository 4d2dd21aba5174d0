from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from eval.benchmarks.protocols import PROTOCOLS, RetrievalSet, load_retrieval_set
from longclip_teacher.errors import InputError


def touch(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        touch(folder / name)


def sharegpt4v_row(image: str, caption: object) -> dict[str, object]:
    return {
        "id": image,
        "image": image,
        "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": caption}],
    }


def coco(images: list[dict[str, object]], annotations: list[tuple[int, str]]) -> str:
    return json.dumps({"images": images, "annotations": [{"image_id": i, "caption": text} for i, text in annotations]})


def test_sharegpt4v_takes_the_first_thousand_rows(tmp_path: Path) -> None:
    rows = [sharegpt4v_row(f"coco/{number}.jpg", f"Caption {number}.\nMore. [{{ '") for number in range(1005)]
    touch(tmp_path / "scenes.json", json.dumps(rows, indent=1))
    pictures(tmp_path / "coco", *(f"{number}.jpg" for number in range(1000)))
    read = load_retrieval_set("sharegpt4v_1k", tmp_path)
    assert len(read.images) == 1000 and read.caption_image == list(range(1000)) and read.count_mismatch is None
    assert read.images[999] == tmp_path / "coco" / "999.jpg"
    assert read.captions[7] == "Caption 7. More. [{ '"


def test_sharegpt4v_reads_no_more_of_the_file_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.benchmarks.annotation_files._CHUNK", 37)  # rows that cross chunks
    text = json.dumps([sharegpt4v_row(f"{number}.jpg", f"Größe {number}") for number in range(1000)])
    touch(tmp_path / "rows.json", text.removesuffix("]") + ", {broken" + "x" * 1000)
    pictures(tmp_path, *(f"{number}.jpg" for number in range(1000)))
    read = load_retrieval_set("sharegpt4v_1k", tmp_path)
    assert read.captions == [f"Größe {number}" for number in range(1000)]


def test_sharegpt4v_finds_its_json(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    touch(tmp_path / "a.json", json.dumps([sharegpt4v_row("1.jpg", "one")]))
    touch(tmp_path / "b.json", json.dumps([sharegpt4v_row("2.jpg", "two")]))
    with pytest.raises(InputError, match=r"2 JSON files .* --annotations"):
        load_retrieval_set("sharegpt4v_1k", tmp_path)
    named = load_retrieval_set("sharegpt4v_1k", tmp_path, annotations=tmp_path / "b.json")
    assert named.captions == ["two"] and "1000 pictures and 1000 captions, but 1 and 1 were found" in str(
        named.count_mismatch
    )
    touch(tmp_path / "share-captioner_coco_lcs_sam_1246k_1107.json", json.dumps([sharegpt4v_row("3.jpg", "three")]))
    assert load_retrieval_set("sharegpt4v_1k", tmp_path).captions == ["three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("{}", "not an array of rows"),
        ("[]", "no pictures"),
        ("[{]", "not valid JSON"),
        ('[{"image": "1.jpg"', "not valid JSON"),
        ('[{"image": "1.jpg"}]', "row 0 is not a ShareGPT4V row"),
        (json.dumps([sharegpt4v_row("1.jpg", 3)]), "row 0 is not a ShareGPT4V row"),
        (json.dumps([sharegpt4v_row("1.jpg", " ")]), "empty caption"),
        (json.dumps([sharegpt4v_row("../1.jpg", "x")]), "outside the root"),
        (json.dumps([sharegpt4v_row("a/../../1.jpg", "x")]), "outside the root"),
        (json.dumps([sharegpt4v_row("/etc/passwd", "x")]), "outside the root"),
        (json.dumps([sharegpt4v_row("", "x")]), "an invalid file name"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_sharegpt4v_files_are_one_line_errors(content: str, message: str, tmp_path: Path) -> None:
    touch(tmp_path / "scenes.json", content)
    with pytest.raises(InputError, match=message) as caught:
        load_retrieval_set("sharegpt4v_1k", tmp_path)
    assert "\n" not in str(caught.value)


def test_urban1k_pairs_numbers_in_order_with_first_lines(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        touch(tmp_path / "image" / f"{number}.jpg")
        touch(tmp_path / "caption" / f"{number}.txt", f"caption {number}\nsecond line\n")
    touch(tmp_path / "image" / "._1.jpg")
    read = load_retrieval_set("urban1k", tmp_path)
    assert [path.name for path in read.images] == ["1.jpg", "2.jpg", "10.jpg"]
    assert read.captions == ["caption 1", "caption 2", "caption 10"]
    assert load_retrieval_set("urban1k", tmp_path, limit=2).captions == ["caption 1", "caption 2"]


def test_urban1k_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder .*image: the pairs are image/N\.jpg"):
        load_retrieval_set("urban1k", tmp_path)
    touch(tmp_path / "image" / "1.jpg")
    with pytest.raises(InputError, match=r"no folder .*caption"):
        load_retrieval_set("urban1k", tmp_path)
    touch(tmp_path / "caption" / "2.txt")
    with pytest.raises(InputError, match=r"1 of 1 pictures have no caption file, the first missing: .*1\.txt"):
        load_retrieval_set("urban1k", tmp_path)
    touch(tmp_path / "caption" / "1.txt")
    with pytest.raises(InputError, match=r"1 captions .* have no picture in image/, the first: 2\.txt"):
        load_retrieval_set("urban1k", tmp_path)


def test_coco_takes_five_captions_in_the_files_order(tmp_path: Path) -> None:
    images = [{"id": 9, "file_name": "9.jpg"}, {"id": 3, "file_name": "3.jpg"}]
    annotations = [(9, "nine a"), (3, "three a\nline"), *((9, f"nine {letter}") for letter in "bcdef"), (3, "three b")]
    touch(tmp_path / "annotations" / "captions_val2017.json", coco(images, annotations))
    pictures(tmp_path / "val2017", "3.jpg", "9.jpg")
    read = load_retrieval_set("coco2017val", tmp_path)
    assert read.images == [tmp_path / "val2017" / "3.jpg", tmp_path / "val2017" / "9.jpg"]
    assert read.captions == ["three a line", "three b", "nine a", "nine b", "nine c", "nine d", "nine e"]
    assert read.caption_image == [0, 0, 1, 1, 1, 1, 1]
    assert "5000 pictures and 25000 captions, but 2 and 7 were found" in str(read.count_mismatch)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (coco([{"id": 1, "file_name": "1.jpg"}], []), "has no caption"),
        (coco([{"id": 1, "file_name": "../1.jpg"}], [(1, "x")]), "outside the root"),
        (coco([{"id": 1}], [(1, "x")]), "not a COCO captions file"),
        ("[1, 2]", "not a COCO captions file"),
        ("{", "not valid JSON"),
    ],
)
def test_broken_coco_files_are_one_line_errors(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder .*val2017"):
        load_retrieval_set("coco2017val", tmp_path)
    (tmp_path / "val2017").mkdir()
    with pytest.raises(InputError, match=r"no annotation file at .*captions_val2017\.json"):
        load_retrieval_set("coco2017val", tmp_path)
    touch(tmp_path / "annotations" / "captions_val2017.json", content)
    with pytest.raises(InputError, match=message):
        load_retrieval_set("coco2017val", tmp_path)


def test_folder_reads_both_layouts(tmp_path: Path) -> None:
    beside, paired = tmp_path / "beside", tmp_path / "paired"
    touch(beside / "b.png")
    touch(beside / "b.txt", "a bee\nin two lines\n")
    touch(beside / "sub" / "a.JPG")
    touch(beside / "sub" / "a.txt", "\ufeffan ant")
    touch(beside / "README.txt")
    assert load_retrieval_set("folder", beside).captions == ["a bee in two lines", "an ant"]
    touch(paired / "image" / "1.webp")
    touch(paired / "caption" / "1.txt", "one\ntwo")
    assert load_retrieval_set("folder", paired).captions == ["one two"]
    touch(beside / "c.png")
    with pytest.raises(InputError, match=r"1 of 3 pictures have no caption file, the first missing: .*c\.txt"):
        load_retrieval_set("folder", beside)


def test_a_caption_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path / "1.jpg")
    (tmp_path / "1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"1\.txt is not UTF-8 text \(byte 3\)"):
        load_retrieval_set("folder", tmp_path)


def test_wrong_arguments_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean urban1k"):
        load_retrieval_set("urban-1k", tmp_path)
    with pytest.raises(InputError, match=r"no folder at .*absent: folder needs pictures with a"):
        load_retrieval_set("folder", tmp_path / "absent")
    with pytest.raises(InputError, match="no pictures in"):
        load_retrieval_set("folder", tmp_path)
    with pytest.raises(InputError, match="limit of 0"):
        load_retrieval_set("folder", tmp_path, limit=0)
    with pytest.raises(InputError, match="urban1k has no annotation file"):
        load_retrieval_set("urban1k", tmp_path, annotations=tmp_path / "x.json")


def test_every_protocol_is_explained() -> None:
    names = "sharegpt4v_1k urban1k docci dci_full dci_extra dci_short long_dci iiw_400 iiw_612 coco2017val "
    assert list(PROTOCOLS) == [*names.split(), "coco_karpathy_5k", "flickr30k_1k_test", "flickr30k_all", "folder"]
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name and protocol.files
        for part in (protocol.about, protocol.caption_rule, protocol.one_to_many, protocol.compare):
            assert part.endswith(".") and part in protocol.definition
        if protocol.num_images and protocol.num_captions:
            many = protocol.num_captions // protocol.num_images
            assert protocol.num_captions == many * protocol.num_images
            assert protocol.one_to_many.startswith("Five captions" if many == 5 else "One caption")


def urban1k(root: Path, number: int) -> None:
    for index in range(number):
        touch(root / "image" / f"{index}.jpg")
        touch(root / "caption" / f"{index}.txt", f"Street {index}.")


def test_a_count_that_is_roughly_known_may_differ_a_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mismatch(tolerance: float) -> str | None:
        entry = replace(PROTOCOLS["urban1k"], num_images=100, num_captions=100, count_tolerance=tolerance)
        monkeypatch.setitem(PROTOCOLS, "urban1k", entry)
        return load_retrieval_set("urban1k", tmp_path).count_mismatch

    urban1k(tmp_path, 97)
    assert mismatch(0.03) is None
    assert "has about 100 pictures" in str(mismatch(0.02)) and "has 100 pictures" in str(mismatch(0.0))


def test_one_percent_of_the_pictures_may_be_absent(tmp_path: Path) -> None:
    def read(absent: int) -> RetrievalSet:
        lines = [f"{number}.jpg#0\tcaption {number}\n" for number in range(200)]
        touch(tmp_path / str(absent) / "results_20130124.token", "".join(lines))
        pictures(tmp_path / str(absent) / "flickr30k-images", *(f"{number}.jpg" for number in range(absent, 200)))
        return load_retrieval_set("flickr30k_all", tmp_path / str(absent))

    assert len(read(2).images) == 200  # the encoder leaves out and names the missing ones
    with pytest.raises(InputError, match=r"3 of the 200 pictures of flickr30k_all .* first: .*0\.jpg"):
        read(3)


def test_a_set_has_one_fingerprint_under_any_root(tmp_path: Path) -> None:
    urban1k(tmp_path / "a", 3)
    urban1k(tmp_path / "b" / "c", 3)
    first, second = load_retrieval_set("urban1k", tmp_path / "a"), load_retrieval_set("urban1k", tmp_path / "b" / "c")
    assert first.sha256 == second.sha256 and len(first.sha256) == 64
    assert load_retrieval_set("urban1k", tmp_path / "a", limit=2).sha256 != first.sha256
    swapped = replace(first, caption_image=[1, 0, 2])
    renamed = replace(first, images=[*first.images[:2], Path("other.jpg")])
    reworded = replace(first, captions=[*first.captions[:2], "Street 2"])
    joined = RetrievalSet("x", first.images[:1], ["ab"], [0], "")
    split = RetrievalSet("x", first.images[:1], ["a", "b"], [0, 0], "")
    found = [one.sha256 for one in (first, swapped, renamed, reworded, joined, split)]
    assert len(set(found)) == len(found)


def test_a_known_fingerprint_that_differs_is_a_mismatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urban1k(tmp_path, 3)
    entry = replace(PROTOCOLS["urban1k"], num_images=3, num_captions=3)
    own = load_retrieval_set("urban1k", tmp_path).sha256
    for known in (None, own):
        monkeypatch.setitem(PROTOCOLS, "urban1k", replace(entry, known_sha256=known))
        assert load_retrieval_set("urban1k", tmp_path).count_mismatch is None
    touch(tmp_path / "caption" / "1.txt", "Street one.")
    message = str(load_retrieval_set("urban1k", tmp_path).count_mismatch)
    assert "their names, texts or order differ from the published ones" in message and own in message
