"""Photo search: what is read again and what not, what a kill leaves, what damage says, and what a search answers."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import photo_search.images
import photo_search.indexing
from photo_models import COLOURS, write_model, write_pictures
from photo_search.errors import InputError
from photo_search.index import open_index, written_index
from photo_search.indexing import Update, update
from photo_search.model import BATCH, Model
from photo_search.searching import Hit, Query, search

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(write_model(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Nine photos: red0, green1, blue2, red3, ..."""
    return write_pictures(tmp_path / "photos", 9)


@pytest.fixture
def index_photos(tmp_path: Path, photos: Path, model: Model) -> Callable[..., Update]:
    """Bring the index in tmp_path up to date."""

    def run(folder: Path = photos, by: Model = model) -> Update:
        with written_index(tmp_path / "index") as index:
            return update(index, folder, by, lambda done, total: None)

    return run


def features_of(folder: Path) -> dict[str, list[float]]:
    with open_index(folder) as index:
        found = index.features()
    assert found.names == sorted(found.names)
    return dict(zip(found.names, found.vectors.tolist(), strict=True))


def found(folder: Path, model: Model, query: Query, top: int = 10) -> list[Hit]:
    with open_index(folder) as index:
        return search(index.features(), model, query, top)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_what_is_unchanged_is_not_read_again(
    index_photos: Callable[..., Update], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert index_photos() == Update(pictures=9, embedded=9)
    read: list[Path] = []
    real = photo_search.indexing.file_sha256
    monkeypatch.setattr(photo_search.indexing, "file_sha256", lambda path: read.append(path) or real(path))
    monkeypatch.setattr(Model, "check_files", lambda self: pytest.fail("the model is not needed"))
    assert index_photos() == Update(pictures=9, unchanged=9)
    assert not read
    monkeypatch.undo()
    monkeypatch.setattr(photo_search.indexing, "file_sha256", lambda path: read.append(path) or real(path))
    Image.new("RGB", (30, 30), (9, 9, 9)).save(photos / "red0.png")
    assert index_photos() == Update(pictures=9, embedded=1, unchanged=8)
    assert read == [photos / "red0.png"]


def test_renamed_and_copied_files_keep_their_feature_and_removed_ones_go(
    index_photos: Callable[..., Update], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_photos()
    before = features_of(tmp_path / "index")
    (photos / "new").mkdir()
    (photos / "red0.png").rename(photos / "new/red0.png")
    shutil.copyfile(photos / "green1.png", photos / "copy.png")
    (photos / "blue2.png").unlink()
    for method in ("pixels", "encode_images"):
        monkeypatch.setattr(Model, method, lambda self, given: pytest.fail("no picture is new"))
    assert index_photos() == Update(pictures=9, known=2, unchanged=7, removed=2)
    after = features_of(tmp_path / "index")
    assert after["new/red0.png"] == before["red0.png"] and after["copy.png"] == before["green1.png"]
    assert not {"red0.png", "blue2.png"} & after.keys()
    with open_index(tmp_path / "index") as index:
        assert len(index.contents()) == 8  # that of blue2 went too


def test_equal_files_are_embedded_once(index_photos: Callable[..., Update], photos: Path, tmp_path: Path) -> None:
    for number in range(BATCH + 3):
        shutil.copyfile(photos / "red0.png", photos / f"copy{number:02d}.png")
    assert index_photos() == Update(pictures=9 + BATCH + 3, embedded=9, known=BATCH + 3)
    assert features_of(tmp_path / "index")["copy34.png"] == features_of(tmp_path / "index")["red0.png"]


def test_broken_pictures_are_listed_and_tried_again_if_the_cause_lies_outside(
    index_photos: Callable[..., Update], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    (photos / "empty.png").touch()
    os.mkfifo(photos / "pipe.png")
    (photos / "gone.png").symlink_to(photos / "nothing.png")
    (photos / "phone.heic").write_bytes(b"some")
    monkeypatch.setattr(photo_search.images, "pillow_heif", None)
    done = index_photos()
    assert (done.pictures, done.embedded) == (9, 9)
    assert list(done.problems) == ["cut.jpg", "empty.png", "gone.png", "phone.heic", "pipe.png"]
    assert done.problems["empty.png"] == "empty file" and "pillow-heif is installed" in done.problems["phone.heic"]
    assert done.problems["cut.jpg"].startswith("not a picture (JPEG, ")
    assert done.problems["pipe.png"] == done.problems["gone.png"] == "not a file"
    again = index_photos()
    assert again.problems == done.problems and again.unchanged == 9 + 2  # cut.jpg and empty.png are known to be broken
    monkeypatch.setattr(photo_search.images, "pillow_heif", object())
    assert index_photos().problems["phone.heic"].startswith("not a picture (JPEG, ")


def test_a_heic_picture_to_search_by_says_what_it_takes(
    index_photos: Callable[..., Update], tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_photos()
    (tmp_path / "phone.heic").write_bytes(b"some")
    monkeypatch.setattr(photo_search.images, "pillow_heif", None)
    with pytest.raises(InputError, match=r"phone\.heic: HEIC is read only if pillow-heif is installed"):
        found(tmp_path / "index", model, Query(image=tmp_path / "phone.heic"))


def test_a_picture_that_changes_while_it_is_read_is_tried_again(
    index_photos: Callable[..., Update], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Model.pixels

    def change(self: Model, path: Path) -> np.ndarray:
        pixels = real(self, path)
        if path.name == "red0.png":
            Image.new("RGB", (50, 50)).save(path)
        return pixels

    monkeypatch.setattr(Model, "pixels", change)
    assert index_photos().problems == {"red0.png": "it changed while it was read"}
    monkeypatch.undo()
    assert index_photos() == Update(pictures=9, embedded=1, unchanged=8)


def test_a_picture_too_narrow_to_be_resized_is_refused(index_photos: Callable[..., Update], photos: Path) -> None:
    Image.new("RGB", (400_000, 1)).save(photos / "line.png")
    assert index_photos().problems == {"line.png": "400000 x 1 pixels are too narrow"}


def test_names_of_any_bytes(index_photos: Callable[..., Update], photos: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \n\x1b[31m.png")
    (photos / "red0.png").rename(photos / name)
    index_photos()
    assert name in features_of(tmp_path / "index")
    assert index_photos().unchanged == 9


def test_another_model_embeds_all_again(index_photos: Callable[..., Update], tmp_path: Path, model: Model) -> None:
    index_photos()
    other = Model(write_model(tmp_path / "other", image_mean=[0.3, 0.2, 0.1]))
    assert other.fingerprint != model.fingerprint
    assert index_photos(by=other) == Update(pictures=9, embedded=9)
    assert index_photos(by=other) == Update(pictures=9, unchanged=9)


def test_a_folder_may_move_but_an_index_is_not_turned_into_anothers(
    index_photos: Callable[..., Update], photos: Path, tmp_path: Path
) -> None:
    index_photos()
    other = write_pictures(tmp_path / "other", 3)
    with pytest.raises(InputError, match=r"is the index of .*photos: choose another place for that of .*other"):
        index_photos(other)
    moved = photos.rename(tmp_path / "moved")
    assert index_photos(moved) == Update(pictures=9, unchanged=9)
    moved.rename(tmp_path / "unplugged")
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(other / "red0.png")
    for folder, message in ((other, "is the index of"), (tmp_path / "empty", "no pictures below")):
        if folder == other:
            for name in ("green1.png", "blue2.png"):
                (other / name).unlink()
        with pytest.raises(InputError, match=message):
            index_photos(folder)
    assert len(features_of(tmp_path / "index")) == 9


# --- kills, locks and damage -----------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import photo_search.index
from pathlib import Path
from photo_search.index import written_index
from photo_search.indexing import update
from photo_search.model import Model
from types import SimpleNamespace

def kill_after(calls, function):
    def counted(*arguments):
        global calls_left
        calls_left -= 1
        if not calls_left:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    globals()["calls_left"] = calls
    return counted

progress = lambda done, total: None
if sys.argv[4] == "between batches":
    progress = kill_after(2, progress)
else:
    photo_search.index.zlib = SimpleNamespace(crc32=kill_after(2 * 32 + 10, photo_search.index.zlib.crc32))
with written_index(Path(sys.argv[1])) as index:
    update(index, Path(sys.argv[2]), Model(Path(sys.argv[3])), progress)
"""


@pytest.mark.parametrize("moment", ["between batches", "in the third batch"])
def test_a_killed_command_loses_no_finished_batch_and_leaves_no_lock(
    moment: str, index_photos: Callable[..., Update], tmp_path: Path, model: Model
) -> None:
    photos = write_pictures(tmp_path / "photos", 2 * BATCH + 20)
    arguments = [str(tmp_path / "index"), str(photos), str(model.folder), moment]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT / "scripts", check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(features_of(tmp_path / "index")) == 2 * BATCH  # a killed index can be searched
    assert index_photos() == Update(pictures=2 * BATCH + 20, embedded=20, unchanged=2 * BATCH)


def test_one_writes_and_others_search(index_photos: Callable[..., Update], tmp_path: Path, model: Model) -> None:
    index_photos()
    with written_index(tmp_path / "index"):
        with (
            pytest.raises(InputError, match="is being written by another process: wait"),
            written_index(tmp_path / "index"),
        ):
            pass
        assert len(found(tmp_path / "index", model, Query("red"))) == 9
    index_photos()


def flip(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as database:
        database.execute(statement)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"no index" * 1000), "is damaged (file is not a database)"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "is damaged (database disk image is malformed)"),
        (lambda path: flip(path, "UPDATE features SET vector = zeroblob(12) WHERE id = 2"), "is not as it was written"),
        (lambda path: flip(path, "UPDATE features SET vector = 7"), "is damaged ("),
        (lambda path: flip(path, "DELETE FROM features"), "is damaged ("),
        (lambda path: flip(path, "DROP TABLE features"), "is damaged (no such table: features)"),
        (lambda path: flip(path, "PRAGMA user_version = 99"), "is not an index of this version"),
        (lambda path: path.unlink(), "no index at"),
        (lambda path: path.write_bytes(b""), "no index at"),
    ],
    ids=["garbage", "cut", "flipped", "type", "emptied", "table", "version", "gone", "empty"],
)
def test_a_damaged_index_is_named_in_one_line(
    damage: Callable[[Path], object], message: str, index_photos: Callable[..., Update], tmp_path: Path
) -> None:
    index_photos()
    damage(tmp_path / "index/index.sqlite")
    with pytest.raises(InputError) as error:
        features_of(tmp_path / "index")
    assert message in str(error.value) and str(tmp_path / "index") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sha256.json", None, "--model takes a folder that scripts/export.py wrote"),
        ("sha256.json", "{}", "does not name preprocessor_config.json"),
        ("sha256.json", "[", "cannot be read"),
        ("preprocessor_config.json", "{}", "is not the file that was exported"),
        ("onnx/vision_model.onnx", "no graph", "is not the file that was exported"),
        ("onnx/text_model.onnx", None, "no onnx/text_model.onnx in"),
    ],
)
def test_a_damaged_model_is_named(
    name: str, content: str | None, message: str, index_photos: Callable[..., Update], tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model") / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        index_photos(by=Model(tmp_path / "model"))
    assert name in str(error.value)


def test_a_model_that_cannot_be_used_leaves_the_index_of_the_other(
    index_photos: Callable[..., Update], tmp_path: Path
) -> None:
    index_photos()
    before = features_of(tmp_path / "index")
    damaged = write_model(tmp_path / "damaged", image_std=[1, 1, 1])
    (damaged / "onnx/vision_model.onnx").write_bytes(b"no graph")
    of_another_kind = write_model(tmp_path / "of_another_kind", resample=0)
    for folder, message in (
        (damaged, "is not the file that was exported"),
        (of_another_kind, "another way of resizing"),
    ):
        with pytest.raises(InputError, match=message):
            index_photos(by=Model(folder))
    assert features_of(tmp_path / "index") == before


# --- searching -------------------------------------------------------------------------------------------------------


def names(hits: list[Hit]) -> list[str]:
    return [hit.name for hit in hits]


def test_a_search_is_exact_and_says_what_each_sentence_matched(
    index_photos: Callable[..., Update], photos: Path, tmp_path: Path, model: Model
) -> None:
    index_photos()
    index = tmp_path / "index"
    hits = found(index, model, Query("red"))
    assert {hit.name for hit in hits[:3]} == {"red0.png", "red3.png", "red6.png"} and len(hits) == 9
    vectors = features_of(index)
    text = model.encode_texts(["red"])[0]
    np.testing.assert_allclose([hit.score for hit in hits], [text @ vectors[hit.name] for hit in hits], rtol=1e-6)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert found(index, model, Query("red"), top=2) == hits[:2]
    assert not hits[0].sentences  # one sentence is the whole text

    (best,) = found(index, model, Query("It is red. It is not blue! Red?"), top=1)
    assert [one.text for one in best.sentences] == ["It is red.", "It is not blue!", "Red?"]
    for one in best.sentences:
        scores = {name: float(model.encode_texts([one.text])[0] @ vector) for name, vector in vectors.items()}
        assert one.score == pytest.approx(scores[best.name], abs=1e-6)
        assert one.rank == 1 + sum(score > scores[best.name] + 1e-6 for score in scores.values())
    assert best.sentences[0].rank <= 3 < best.sentences[1].rank


def test_pictures_and_texts_are_joined_and_taken_off(
    index_photos: Callable[..., Update], photos: Path, tmp_path: Path, model: Model
) -> None:
    index_photos()
    index = tmp_path / "index"
    assert names(found(index, model, Query(image=photos / "blue5.png"), top=1)) == ["blue5.png"]
    Image.new("RGB", (20, 20), (200, 200, 0)).save(photos / "red_and_green.png")
    index_photos()
    assert names(found(index, model, Query("red green"), top=1)) == ["red_and_green.png"]
    assert names(found(index, model, Query("red", photos / "green1.png"), top=1)) == ["red_and_green.png"]
    (best,) = found(index, model, Query("red green", minus="green"), top=1)
    assert best.name == "red0.png"
    both, less = model.encode_texts(["red green", "green"])
    assert best.score == pytest.approx((both - less) @ features_of(index)["red0.png"], abs=1e-6)
    for query in (Query(), Query("  ")):
        with pytest.raises(InputError, match="nothing to look for"):
            found(index, model, query)
    with pytest.raises(InputError, match=r"no picture at .*none\.png"):
        found(index, model, Query(image=photos / "none.png"))


def test_exif_rotation_counts(index_photos: Callable[..., Update], photos: Path, model: Model) -> None:
    halves = Image.new("RGB", (20, 20), COLOURS["red"])
    halves.paste(COLOURS["blue"], (0, 10, 20, 20))
    halves.save(photos / "upright.png")
    turn = Image.Exif()
    turn[0x0112] = 3
    halves.rotate(180).save(photos / "turned.png", exif=turn)
    np.testing.assert_array_equal(model.pixels(photos / "turned.png"), model.pixels(photos / "upright.png"))
