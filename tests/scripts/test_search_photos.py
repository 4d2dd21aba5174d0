"""scripts/search_photos.py as users type it, where nothing but its four packages can be imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import search_photos
from eval.base.images import open_image
from photo_models import write_model, write_pictures

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"numpy", "onnxruntime", "tokenizers", "PIL"}
# What is neither Python's own, nor named, cannot be imported
ALONE = """
import runpy, sys
allowed = {*sys.stdlib_module_names, "photo_search", *sys.argv.pop(1).split()}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"{name} is not there", name=name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, "scripts")
sys.argv[0] = "search_photos.py"
runpy.run_path("scripts/search_photos.py", run_name="__main__")
"""


def command(*arguments: object, packages: set[str] = PACKAGES, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ALONE, " ".join(packages), *map(os.fspath, map(_text, arguments))],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "DISPLAY": "", "WAYLAND_DISPLAY": "", **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def _text(argument: object) -> str | os.PathLike[str]:
    return argument if isinstance(argument, os.PathLike) else str(argument)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Photos, model and index."""
    root = tmp_path_factory.mktemp("search")
    photos, model, index = write_pictures(root / "photos", 9), write_model(root / "model"), root / "index"
    (photos / "red0.png").rename(photos / "<img src=x onerror=alert(1)>&.png")
    (photos / "blue2.png").rename(photos / os.fsdecode(b"caf\xe9\n\x1b[31m.png"))
    (photos / "broken.jpg").write_bytes(b"no picture")
    done = command("index", photos, "--model", model, "--index", index)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "9 pictures: 9 embedded, 0 known by their contents, 0 unchanged; 0 removed, 1 not read"
    )
    assert done.stderr == "not read: broken.jpg: not a picture (JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM)\n"
    return photos, model, index


@pytest.mark.parametrize("missing", sorted(PACKAGES))
def test_a_missing_package_is_named(missing: str, places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    photos, model, index = places
    made = command("index", photos, "--model", model, "--index", tmp_path / "new", packages=PACKAGES - {missing})
    asked = command("search", "red", "--index", index, packages=PACKAGES - {missing})
    failed = [done for done in (made, asked) if done.returncode]  # indexing reads no text, most searches no picture
    assert failed
    for done in failed:
        assert done.returncode == 2
        assert done.stderr == f"error: {missing} is not installed: pip install numpy onnxruntime tokenizers pillow\n"


def test_help_needs_no_package_and_teaches() -> None:
    for arguments in ([], ["index"], ["search"], ["embed"]):
        done = command(*arguments, "--help", packages=set())
        assert done.returncode == 0 and len(done.stdout.splitlines()) > 12, done.stderr


def test_index_knows_its_model_and_reports_in_json(places: tuple[Path, Path, Path]) -> None:
    photos, _, index = places
    done = command("index", photos, "--index", index, "--json")
    told = json.loads(done.stdout)
    assert (told["pictures"], told["unchanged"], list(told["problems"])) == (9, 10, ["broken.jpg"])
    assert not done.stderr


def test_search_prints_on_any_terminal(places: tuple[Path, Path, Path]) -> None:
    photos, _, index = places
    for encoding in ("ascii", "utf-8"):
        done = command("search", "A blue “thing”. It is red.", "--index", index, "--top", 9, PYTHONIOENCODING=encoding)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 9 * 3 and str(photos) in lines[0]
        assert r"caf\udce9\n\x1b[31m.png" in done.stdout and "\x1b" not in done.stdout
        assert re.search(r"^ {6}[01]\.\d{3}  top 11\.1%  It is red\.$", done.stdout, re.MULTILINE)
        assert ("“thing”" in done.stdout) == (encoding == "utf-8")


def test_search_in_json(places: tuple[Path, Path, Path]) -> None:
    photos, _, index = places
    done = command("search", "blue", "--minus", "red", "--index", index, "--json", "--top", 3)
    hits = json.loads(done.stdout)
    expected = {photos / os.fsdecode(b"caf\xe9\n\x1b[31m.png"), photos / "blue5.png", photos / "blue8.png"}
    assert {Path(hit["file"]) for hit in hits} == expected
    assert all(Path(hit["file"]).is_file() and hit["score"] > 0.5 for hit in hits)
    like = json.loads(command("search", "--image", photos / "blue5.png", "--index", index, "--json").stdout)
    assert like[0]["name"] == "blue5.png" and len(like) == 9


def test_a_text_that_is_too_long_is_told(places: tuple[Path, Path, Path]) -> None:
    done = command("search", "red " * 30, "--index", places[2])
    assert done.stderr == "the text has 32 tokens; the model reads the first 20\n"


def test_the_contact_sheet_holds_all_and_runs_nothing(places: tuple[Path, Path, Path]) -> None:
    photos, _, index = places
    gone = photos / "green1.png"
    content = gone.read_bytes()
    gone.unlink()
    query = ("red <script>alert(1)</script>. Green.", "--minus", "<b>blue</b>")
    done = command("search", *query, "--index", index, "--open")
    gone.write_bytes(content)
    assert done.stderr == f"contact sheet: {index / 'search.html'}\n"
    page = (index / "search.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 8 and page.count("cannot be read any more") == 1
    assert "<script" not in page and "<b>" not in page and "onerror=alert(1)&gt;&amp;.png" in page
    assert page.count("<img") == 8 and "&lt;script&gt;" in page
    assert "http://" not in page and "https://" not in page
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in page
    assert "caf%E9%0A%1B%5B31m.png" in page
    assert sorted(path.name for path in index.iterdir()) == ["index.sqlite", "lock.sqlite", "search.html"]


def test_embed_writes_features_and_names(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    photos, model, _ = places
    done = command("embed", photos, "--model", model, "--out", tmp_path / "new/features.npy")
    assert done.returncode == 0, done.stderr
    (tmp_path / "any").touch()
    files = {path.name for path in (tmp_path / "new").iterdir() if path.is_file()}
    assert files == {"features.npy", "features.json"}
    assert len({path.stat().st_mode for path in (tmp_path / "any", *(tmp_path / "new").glob("features.[nj]*"))}) == 1
    features, told = np.load(tmp_path / "new/features.npy"), json.loads((tmp_path / "new/features.json").read_text())
    assert features.shape == (9, 3) and features.dtype == np.float32 and list(told["problems"]) == ["broken.jpg"]
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    for name, feature in zip(told["names"], features, strict=True):
        colour = np.asarray(open_image(photos / name).getpixel((0, 0))) / 255 + 0.01
        np.testing.assert_allclose(feature, colour / np.linalg.norm(colour), atol=1e-3)


def test_embed_reads_only_what_is_new(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    photos, out = write_pictures(tmp_path / "photos", 9), tmp_path / "features.npy"
    call = ("embed", photos, "--model", places[1], "--out", out)
    assert command(*call).stdout.startswith("9 pictures: 9 embedded, 0 known by their contents, 0 unchanged; 0 removed")
    first = dict(zip(json.loads((tmp_path / "features.json").read_text())["names"], np.load(out), strict=True))
    (photos / "red0.png").rename(photos / "renamed.png")
    (photos / "blue2.png").unlink()
    (photos / "blue5.png").write_bytes((photos / "green1.png").read_bytes())
    Image.new("RGB", (20, 20), (9, 99, 199)).save(photos / "new.png")
    out.unlink()
    done = command(*call)
    assert done.stdout.startswith("9 pictures: 1 embedded, 2 known by their contents, 6 unchanged; 2 removed"), done
    told, features = json.loads((tmp_path / "features.json").read_text()), np.load(out)
    second = dict(zip(told["names"], features, strict=True))
    assert set(second) == {*first, "renamed.png", "new.png"} - {"red0.png", "blue2.png"}
    np.testing.assert_array_equal(second["renamed.png"], first["red0.png"])
    np.testing.assert_array_equal(second["blue5.png"], first["green1.png"])
    (tmp_path / "other").mkdir()
    (photos / "red3.png").rename(tmp_path / "other/red3.png")
    done = command("embed", tmp_path / "other", *call[2:])
    assert done.returncode == 2 and "choose another place for that of" in done.stderr
    np.testing.assert_array_equal(np.load(out), features)


def test_where_no_picture_can_be_read_there_is_nothing_to_search(
    places: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/broken.jpg").write_bytes(b"no picture")
    made = command("index", tmp_path / "photos", "--model", places[1], "--index", tmp_path / "index")
    assert made.returncode == 0 and made.stdout.startswith("0 pictures: ")
    for call in (
        ["search", "red", "--index", tmp_path / "index"],
        ["embed", tmp_path / "photos", "--model", places[1], "--out", tmp_path / "features.npy"],
    ):
        done = command(*call)
        assert done.returncode == 2 and done.stderr.startswith(f"error: no picture below {tmp_path / 'photos'} could")
        assert done.stderr.endswith("broken.jpg: not a picture (JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM)\n")
    assert not (tmp_path / "features.npy").exists()


def test_progress_is_told_in_a_log_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    progress = search_photos._Progress()
    progress(32, 64)
    assert not capsys.readouterr().err  # nothing yet: it is too early for a line
    monkeypatch.setattr(search_photos, "_BETWEEN_LINES", -1)
    progress(32, 64)
    assert re.fullmatch(r"32 of 64 files, \d+/s, \d+ s left\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND (search_photos.py --help explains)"),
        (["find"], "invalid choice: 'find'"),
        (["index", "PHOTOS", "--modle", "x"], "unrecognized arguments: --modle"),
        (["index", "nowhere", "--model", "MODEL"], "no folder nowhere"),
        (["index", "PHOTOS", "--index", "NEW"], "is new: name the model with --model"),
        (["index", "PHOTOS", "--model", "PHOTOS", "--index", "NEW"], "no sha256.json in"),
        (["index", "MODEL", "--model", "MODEL", "--index", "NEW"], "no pictures below"),
        (["index", "PHOTOS", "--model", "MODEL", "--index", "PHOTOS/blue5.png"], "blue5.png: File exists"),
        (["search", "red", "--index", "NEW"], "no index at"),
        (["search", "--index", "INDEX"], "nothing to look for"),
        (["search", "red", "--index", "INDEX", "--top", "0"], "'0' is not a whole number of 1 or more"),
        (["search", "red", "--index", "INDEX", "--model", "OTHER"], "is not the model of"),
        (["search", "--image", "nowhere.jpg", "--index", "INDEX"], "no picture at nowhere.jpg"),
        (["embed", "PHOTOS", "--model", "MODEL", "--out", "features"], "name a file that ends in .npy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, places: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    named = dict(zip(("PHOTOS", "MODEL", "INDEX"), map(str, places), strict=True)) | {"NEW": str(tmp_path / "new")}
    if "OTHER" in arguments:
        named["OTHER"] = str(write_model(tmp_path / "other", image_mean=[0.5, 0.5, 0.5]))
    words = [re.sub("^[A-Z]+", lambda found: named.get(found.group(), found.group()), word) for word in arguments]
    done = command(*words)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
