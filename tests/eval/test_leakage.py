"""The leakage audit finds every planted copy by the right sign and never confuses two different pictures."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from eval.benchmarks.conversations import SHAREGPT4V_JSON
from eval.leakage import Options, main, pair_sheet, run_audit
from eval.leaks import audit_parts, picture_hashes
from eval.leaks.audit_parts import FileList, HashedPart, Shard, hash_parts, normalized
from eval.leaks.picture_hashes import find_look_alikes, hash_picture
from longclip_teacher.errors import InputError

NUM_PLANTED = 30
COMMAND = Path(__file__).parents[2] / "eval" / "leakage.py"


def draw_scene(seed: int, size: int = 96) -> Image.Image:
    """A white board with three shapes in a fixed frame: all scenes share background and layout."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, size - 1, size - 1), outline=(40, 40, 120), width=4)
    for cell in random.permutation(9)[:3]:
        left, top = 8 + 28 * (cell % 3), 8 + 28 * (cell // 3)
        box = (left, top, left + random.integers(10, 25), top + random.integers(10, 25))
        colour = tuple(int(value) for value in random.integers(0, 220, 3))
        (draw.ellipse, draw.rectangle)[random.integers(2)](box, fill=colour)
    return image


def encoded(image: Image.Image, format: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def caption_of(number: int) -> str:
    return f"Board {number} has a frame. Three shapes stand in it, and it is the {number}th board of its long row."


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, members in enumerate(samples):
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{number:06d}{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def benchmark_scenes() -> list[Image.Image]:
    return [draw_scene(seed) for seed in range(NUM_PLANTED)]


@pytest.fixture(scope="module")
def benchmark_root(tmp_path_factory: pytest.TempPathFactory, benchmark_scenes: list[Image.Image]) -> Path:
    root = tmp_path_factory.mktemp("benchmark")
    (root / "image").mkdir()
    (root / "caption").mkdir()
    for number, scene in enumerate(benchmark_scenes):
        (root / "image" / f"{number}.png").write_bytes(encoded(scene))
        (root / "caption" / f"{number}.txt").write_text(caption_of(number))
    return root


def audit(root: Path, shards: Path, **options: object):
    return run_audit(Options(train=str(shards), protocol="folder", root=root, **options))


def pairs(audit, sign: str) -> set[tuple[int, str]]:
    return {(match.sample, Path(match.benchmark).stem) for match in audit.matches[sign]}


PLANTED = {
    "jpeg 60": lambda scene: encoded(scene, "JPEG", quality=60),
    "jpeg 95": lambda scene: encoded(scene, "JPEG", quality=95),
    "webp": lambda scene: encoded(scene, "WEBP", quality=70),
    "half": lambda scene: encoded(scene.resize((48, 48), Image.Resampling.BICUBIC), "JPEG", quality=85),
    "double": lambda scene: encoded(scene.resize((192, 192), Image.Resampling.BILINEAR)),
    "stretched": lambda scene: encoded(scene.resize((144, 96), Image.Resampling.LANCZOS), "JPEG", quality=75),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_every_copy_is_found_by_its_look(kind, benchmark_root, benchmark_scenes, tmp_path) -> None:
    """Among as many other scenes, which are not flagged."""
    others = [{".jpg": encoded(draw_scene(1000 + seed), "JPEG", quality=80)} for seed in range(NUM_PLANTED)]
    planted = [{".jpg": PLANTED[kind](scene)} for scene in benchmark_scenes]
    write_shard(tmp_path / "a.tar", others + planted)
    found = audit(benchmark_root, tmp_path)
    assert pairs(found, "look") == {(NUM_PLANTED + number, str(number)) for number in range(NUM_PLANTED)}
    assert found.matches["sha256"] == found.matches["caption"] == []
    assert found.has_leak


def test_every_copied_file_is_found_by_its_bytes(benchmark_root, benchmark_scenes, tmp_path) -> None:
    write_shard(tmp_path / "a.tar", [{".png": encoded(scene)} for scene in benchmark_scenes])
    found = audit(benchmark_root, tmp_path)
    assert pairs(found, "sha256") == {(number, str(number)) for number in range(NUM_PLANTED)}
    assert found.matches["look"] == []  # a pair is listed once, under the stronger sign


def test_no_two_different_scenes_look_the_same() -> None:
    hashes = [hash_picture(draw_scene(seed)) for seed in range(1000)]
    phashes, thumbnails = (np.stack(parts) for parts in zip(*hashes, strict=True))
    found = find_look_alikes(phashes, thumbnails, phashes, thumbnails)
    assert list(zip(found.rows, found.others, strict=True)) == [(row, row) for row in range(1000)]
    assert (found.distances == 0).all()


def test_the_hash_distance_is_the_number_of_unequal_bits() -> None:
    random = np.random.default_rng(0)
    thumbnail = np.asarray(draw_scene(0, 32))
    first = random.integers(0, 256, (1500, 32), dtype=np.uint8)  # more than a block of rows
    second = first[:3].copy()
    for row, count in enumerate((1, 40, 41)):
        bits = np.unpackbits(second[row])
        bits[random.permutation(256)[:count]] ^= 1
        second[row] = np.packbits(bits)
    second = second[[0, 1, 2, 0]]
    first = np.concatenate([first, first[:1]])
    found = find_look_alikes(first, np.stack([thumbnail] * 1501), second, np.stack([thumbnail] * 4))
    assert list(zip(*(array.tolist() for array in found[:3]), strict=True)) == [
        (0, 0, 1), (0, 3, 1), (1, 1, 40), (1500, 0, 1), (1500, 3, 1)
    ]  # fmt: skip


def test_one_object_of_another_colour_makes_another_picture(monkeypatch) -> None:
    """Equal brightness keeps the hash and the shared rest keeps the correlation high; only its tile differs."""
    pairs = []
    for colour in ((200, 0, 0), (0, 102, 0)):
        scene = draw_scene(11, 192)
        ImageDraw.Draw(scene).ellipse((120, 120, 150, 150), fill=colour)
        pairs.append(tuple(part[None] for part in hash_picture(scene)))
    assert len(find_look_alikes(*pairs[0], *pairs[0]).rows) == 1
    assert len(find_look_alikes(*pairs[0], *pairs[1]).rows) == 0
    monkeypatch.setattr(picture_hashes, "MAX_TILE_DIFFERENCE", 255.0)
    assert len(find_look_alikes(*pairs[0], *pairs[1]).rows) == 1


def test_pictures_of_one_colour_are_compared_only_by_their_bytes(tmp_path) -> None:
    root = tmp_path / "plain"
    root.mkdir()
    Image.new("RGB", (40, 40), (200, 10, 10)).save(root / "red.png")
    shards = write_shard(tmp_path / "a.tar", [{".png": (root / "red.png").read_bytes()}, {".jpg": encoded(
        Image.new("RGB", (40, 40), (10, 10, 200)), "JPEG")}])  # fmt: skip
    found = run_audit(Options(train=str(shards), pictures=root))
    assert [match.sample for match in found.matches["sha256"]] == [0] and found.matches["look"] == []
    assert (found.figures()["num_train_plain"], found.figures()["num_benchmark_plain"]) == (2, 1)


def test_captions_are_compared_without_case_spaces_and_punctuation(benchmark_root, tmp_path) -> None:
    written = {
        ".txt": lambda text: ("  " + text.upper().replace(" ", " \n ").replace(".", " !")).encode(),
        ".json": lambda text: json.dumps({"caption_long": [text.replace(",", ""), "another one"]}).encode(),
        ".syn.json": lambda text: json.dumps({"syn_text": ["something else", text]}).encode(),
    }
    for suffix, write in written.items():
        write_shard(tmp_path / "a.tar", [{suffix: write(caption_of(number))} for number in range(NUM_PLANTED)])
        found = audit(benchmark_root, tmp_path)
        assert pairs(found, "caption") == {(number, str(number)) for number in range(NUM_PLANTED)}, suffix
        assert found.matches["first_sentence"] == []
    assert found.matches["caption"][0].caption == caption_of(0)
    assert normalized("«Œuvre»  d’art_No. ５!") == "œuvre d art no 5"


def test_short_captions_and_first_sentences_are_hints_not_leaks(benchmark_root, tmp_path) -> None:
    begins_alike = caption_of(3).split(". ")[0] + ". The rest of it is quite another story."
    write_shard(tmp_path / "a.tar", [{".txt": begins_alike.encode()}, {".txt": caption_of(4).encode()}, {".txt": b"!"}])
    found = audit(benchmark_root, tmp_path, min_caption_length=1000)
    assert pairs(found, "first_sentence") == {(0, "3")} and pairs(found, "short_caption") == {(1, "4")}
    assert not found.has_leak
    assert pairs(audit(benchmark_root, tmp_path), "caption") == {(1, "4")}


def test_equal_file_names_are_a_hint(tmp_path) -> None:
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    draw_scene(1).save(root / "sub" / "000001.png")
    shards = write_shard(tmp_path / "a.tar", [{".jpg": encoded(draw_scene(seed), "JPEG")} for seed in (2, 3, 4)])
    found = run_audit(Options(train=str(shards), pictures=root))
    assert [match.sample for match in found.matches["name"]] == [1] and not found.has_leak


def test_sharegpt4v_rows_from_the_thousandth_on_are_the_training_data(benchmark_root, benchmark_scenes, tmp_path):
    """Row 5 repeats a benchmark picture and caption, but is a test row; rows 1005 to 1007 are training rows."""
    images = tmp_path / "images" / "coco"
    images.mkdir(parents=True)
    for number in range(5, 8):
        benchmark_scenes[number].save(images / f"{number}.jpg", quality=80)
    rows = [{"image": f"coco/{number}.jpg", "conversations": [{"value": ""}, {"value": f"Nothing much at {number}."}]}
            for number in range(1010)]  # fmt: skip
    rows[5] = {"image": "coco/5.jpg", "conversations": [{"value": ""}, {"value": caption_of(5)}]}
    for number in (6, 7):
        rows[1000 + number] = rows[5] | {"image": f"coco/{number}.jpg"}
    rows[1009]["conversations"][1]["value"] = caption_of(9).lower()
    source = tmp_path / SHAREGPT4V_JSON
    source.write_text(json.dumps(rows))
    options = Options(train_json=source, train_images=tmp_path / "images", protocol="folder", root=benchmark_root)
    found = run_audit(options)
    assert found.num_samples == 10 and found.num_problems == 8  # pictures that are not there
    assert pairs(found, "look") == {(6, "6"), (7, "7")}
    assert pairs(found, "caption") == {(6, "5"), (7, "5"), (9, "9")}
    options = Options(train_json=source, protocol="folder", root=benchmark_root, skip_rows=0)
    found = run_audit(options)
    assert found.num_samples == 1010 and found.num_problems == found.num_pictures == 0
    assert pairs(found, "caption") == {(5, "5"), (6, "5"), (7, "5"), (9, "9")}  # of the second part, too
    own = Options(train_json=source.rename(tmp_path / "own.json"), protocol="folder", root=benchmark_root)
    assert run_audit(own).num_samples == 1010  # only ShareGPT4V's own file begins with a test


def test_rows_without_picture_or_caption_do_not_stop_the_audit(benchmark_root, tmp_path):
    answer = [
        {"from": "system", "value": "x"},
        {"from": "human", "value": "y"},
        {"from": "gpt", "value": caption_of(5)},
    ]
    rows = [{"conversations": answer}, {"image": "a.jpg"}, {"image": "b.jpg", "conversations": answer}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = run_audit(Options(train_json=tmp_path / "rows.json", protocol="folder", root=benchmark_root))
    assert found.num_samples == 3 and [match.sample for match in found.matches["caption"]] == [0, 2]


def test_a_damaged_picture_is_named_and_its_bytes_and_captions_still_count(benchmark_root, benchmark_scenes, tmp_path):
    damaged = encoded(benchmark_scenes[0])[:200]
    root = tmp_path / "benchmark"
    root.mkdir()
    (root / "x.png").write_bytes(damaged)
    benchmark_scenes[1].save(root / "y.png")
    samples = [{".png": damaged, ".txt": caption_of(2).encode()}, {".png": b"", ".json": b"{"}]
    shards = write_shard(tmp_path / "a.tar", samples)
    found = run_audit(Options(train=str(shards), pictures=root))
    assert [match.sample for match in found.matches["sha256"]] == [0]
    assert found.num_problems == 3  # also the benchmark's
    assert "x.png: " in found.problems[0] and "000000.png: " in found.problems[1] and "empty" in found.problems[2]
    assert pairs(audit(benchmark_root, tmp_path), "caption") == {(0, "2")}


@pytest.mark.parametrize("cut", [1, 700, 10240])
def test_a_broken_shard_is_one_line(cut: int, benchmark_root, tmp_path) -> None:
    shard = write_shard(tmp_path / "a.tar", [{".jpg": encoded(draw_scene(0), "JPEG")} for _ in range(8)])
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(InputError, match=r"a\.tar is not a complete tar file \(.+\): make or fetch it again"):
        audit(benchmark_root, tmp_path)


def test_a_killed_audit_resumes(benchmark_root, benchmark_scenes, tmp_path, monkeypatch) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(3):
        write_shard(shards / f"{number}.tar", [{".jpg": encoded(benchmark_scenes[number], "JPEG"), ".txt": b"Hm."}])
    whole = audit(benchmark_root, shards).figures()
    hashed: list[Path] = []
    hash_part = audit_parts.hash_part

    def hash_two(part):
        if isinstance(part, Shard):
            if len(hashed) == 2:
                raise KeyboardInterrupt
            hashed.append(part.path)
        return hash_part(part)

    monkeypatch.setattr(audit_parts, "hash_part", hash_two)
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        audit(benchmark_root, shards, hash_cache=cache)
    hashed.clear()
    assert audit(benchmark_root, shards, hash_cache=cache).figures() == whole
    assert hashed == [shards / "2.tar"]
    hashed.clear()
    write_shard(shards / "1.tar", [{".jpg": encoded(benchmark_scenes[9], "JPEG")}])  # another content, the same name
    assert pairs(audit(benchmark_root, shards, hash_cache=cache), "look") == {(0, "0"), (0, "9"), (0, "2")}
    assert hashed == [shards / "1.tar"]
    for kept in cache.iterdir():
        kept.write_bytes(kept.read_bytes()[:100])
    hashed.clear()
    with pytest.raises(KeyboardInterrupt):  # damaged files are hashed again: all three, and the third stops it
        audit(benchmark_root, shards, hash_cache=cache)


def test_the_cache_follows_a_moved_shard_and_a_changed_picture(tmp_path, benchmark_scenes) -> None:
    cache, picture = tmp_path / "cache", tmp_path / "1.png"
    for scene in benchmark_scenes[:2]:
        picture.write_bytes(encoded(scene))
        ((_, part),) = hash_parts([FileList(("1.png",), (picture,), (("x",),))], cache)
        assert (part.phashes[0] == hash_picture(scene).phash).all()
    first = write_shard(tmp_path / "a.tar", [{".png": encoded(benchmark_scenes[0])}])
    list(hash_parts([Shard(first)], cache))
    moved = first.rename(tmp_path / "b.tar")
    ((_, part),) = hash_parts([Shard(moved)], cache)
    assert (part.names.tolist(), Shard(moved).title("000000.png")) == (["000000.png"], f"{moved}:000000.png")


def test_workers_give_the_same_answer_in_the_same_order(benchmark_scenes, tmp_path) -> None:
    shards = [
        Shard(write_shard(tmp_path / f"{number}.tar", [{".jpg": encoded(benchmark_scenes[number], "JPEG")}] * size))
        for number, size in enumerate((40, 1, 2, 3))
    ]
    alone, pool = list(hash_parts(shards)), list(hash_parts(shards, num_workers=1))
    assert [part for part, _ in pool] == shards
    for (_, first), (_, second) in zip(alone, pool, strict=True):
        for field in fields(HashedPart):
            np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))


def test_the_pairs_are_drawn(benchmark_root, benchmark_scenes, tmp_path) -> None:
    scene = benchmark_scenes[7]
    write_shard(tmp_path / "a.tar", [{".txt": b"x"}, {".jpg": encoded(scene, "JPEG", quality=95)}])
    sheet = np.asarray(pair_sheet(audit(benchmark_root, tmp_path)), dtype=float)
    shown = np.asarray(scene.resize((160, 160), Image.Resampling.BICUBIC), dtype=float)
    for left in (12, 12 + 160 + 4):
        assert np.abs(sheet[12:172, left : left + 160] - shown).mean() < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either --train"),
        ({"train": "a", "train_json": Path("b")}, "either --train"),
        ({"train": "a"}, "either --protocol"),
        ({"train": "a", "protocol": "folder"}, "go together"),
        ({"train": "a", "train_images": Path("c"), "pictures": Path("d")}, "goes with --train-json"),
        ({"train": "a", "pictures": Path("d"), "num_workers": -1}, "0 or more"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options, message) -> None:
    with pytest.raises(InputError, match=message):
        Options(**options).check()


def test_strict_exits_with_1_for_a_leak(benchmark_root, benchmark_scenes, tmp_path) -> None:
    leaky = write_shard(tmp_path / "leaky.tar", [{".jpg": encoded(benchmark_scenes[0], "JPEG")}])
    arguments = ["--protocol", "folder", "--root", benchmark_root, "--train", leaky, "--strict"]
    files = ["--json", tmp_path / "a.json", "--pairs-image", tmp_path / "a.png"]
    command = [str(part) for part in [sys.executable, COMMAND, *arguments, *files]]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (result.returncode, result.stderr) == (1, "")
    assert "LEAK: training samples 1 with the same look" in result.stdout
    row = json.loads((tmp_path / "a.json").read_text())["signs"]["look"]
    assert (row["num_pairs"], row["is_leak"]) == (1, True)
    assert row["pairs"][0]["train"] == f"{leaky}:000000.jpg" and row["pairs"][0]["benchmark"].endswith("/0.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("scene", "strict", "status"), [(5000, True, 0), (0, False, 0), (0, True, 1)])
def test_the_exit_status_is_1_for_a_leak_only_under_strict(
    scene, strict, status, benchmark_root, tmp_path, monkeypatch, capsys
) -> None:
    shard = write_shard(tmp_path / "a.tar", [{".jpg": encoded(draw_scene(scene), "JPEG")}])
    arguments = ["--protocol", "folder", "--root", str(benchmark_root), "--train", str(shard)]
    monkeypatch.setattr(sys, "argv", ["leakage.py", *arguments, *(["--strict"] if strict else [])])
    if status:
        with pytest.raises(SystemExit, match="1"):
            main()
    else:
        main()
    assert ("LEAK" if scene == 0 else "No leak") in capsys.readouterr().out


def test_a_pattern_without_shards_is_one_line(tmp_path) -> None:
    with pytest.raises(InputError, match=r"no shards at .*none"):
        run_audit(Options(train=str(tmp_path / "none*.tar"), pictures=tmp_path))
