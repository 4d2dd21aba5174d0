"""The one walk of all commands: hidden names, links, order; and patterns against existing names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import photo_search.folders
from caption_sources import Pair, read_folder
from eval.base.folders import FoundPictures, find_pictures, matching_paths, pictures_below, subfolders
from eval.benchmarks.labelled_images import find_labelled_images
from eval.benchmarks.protocols import load_retrieval_set
from eval.leakage import picture_files, shard_parts
from longclip_teacher.errors import InputError
from training.data.index import expand_patterns
from training.data.loose_files import CaptionFiles, PictureFolder


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
        (root / name).with_suffix(".txt").write_text(name)
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Pictures among everything that is not one, and links of every kind."""
    root = touch(tmp_path / "set", "b.jpg", "a/x.PNG", "a.b/y.webp", ".hidden/h.jpg", "a/._x.PNG", "a/deep/er/z.tif")
    touch(tmp_path / "outside", "secret.jpg")
    os.mkfifo(root / "fifo.jpg")
    for name, target in (
        ("again.jpg", root / "b.jpg"), ("a/loop", root), ("a/self.jpg", root / "a/self.jpg"), ("to_a", root / "a"),
        ("of_hidden", root / ".hidden"), ("out.jpg", tmp_path / "outside/secret.jpg"), ("out", tmp_path / "outside"),
        ("gone.jpg", root / "no.jpg"), (".h.jpg", root / "b.jpg"), ("note.txt", tmp_path / "outside/secret.jpg"),
    ):  # fmt: skip
        (root / name).symlink_to(target)
    (root / "again.txt").write_text("again")
    return root


FILES = ["a.b/y.webp", "a/deep/er/z.tif", "a/x.PNG", "again.jpg", "b.jpg", "of_hidden/h.jpg"]
MISSING = ["a/self.jpg", "fifo.jpg", "gone.jpg"]
PASSED_OVER = ["a/loop", "out", "out.jpg", "to_a"]
FOUND = FoundPictures(FILES, MISSING, PASSED_OVER)


def test_links_are_followed_within_the_folder_and_once(tree: Path, tmp_path: Path) -> None:
    assert find_pictures(tree) == FOUND
    (tmp_path / "by_link").symlink_to(tree)
    assert find_pictures(tmp_path / "by_link") == FOUND
    wider = find_pictures(tree, tmp_path)  # `root` widens what links may lead to
    assert wider == (sorted([*FILES, "out.jpg", "out/secret.jpg"]), MISSING, ["a/loop", "to_a"])


def test_photo_search_finds_the_same_by_its_own_copy(tree: Path) -> None:
    assert photo_search.folders.find_pictures(tree) == FOUND


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    touch(tmp_path / "set", "a/1.jpg", "b/2.jpg")
    (tmp_path / "set/a/b").symlink_to("../b")
    (tmp_path / "set/b/a").symlink_to("../a")
    assert find_pictures(tmp_path / "set") == (["a/1.jpg", "b/2.jpg"], [], ["a/b", "b/a"])
    assert find_pictures(tmp_path / "set/a", tmp_path / "set") == (["1.jpg", "b/2.jpg"], [], ["b/a"])


Command = Callable[[Path], list[Path]]


def of_make_shards(root: Path) -> list[Path]:
    return [row.path if isinstance(row, Pair) else root / row.name for row in read_folder(root)]


def of_data_images(root: Path) -> list[Path]:
    found = PictureFolder(root)
    return [root / found.key(index) for index in range(found.num_samples)]


COMMANDS: dict[str, Command] = {
    "walk": pictures_below,
    "make_shards folder": of_make_shards,
    "data.images": of_data_images,  # it does not count missing ones
    "leakage": lambda root: [path for path in picture_files(root).paths if path],
}


def test_the_folder_protocol_finds_the_same_and_requires_every_picture(tree: Path) -> None:
    files = [tree / name for name in sorted(FILES + MISSING)]
    for path in files:
        (path.parent / f"{path.stem}.txt").write_text("caption")
    assert load_retrieval_set("folder", tree).images == files


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_every_command_finds_the_same_and_tells_what_it_passes_over(
    command: Command, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = FILES if command is of_data_images else sorted(FILES + MISSING)
    assert command(tree) == [tree / name for name in expected]
    told = capsys.readouterr().err
    assert told.startswith(f"{tree}: 4 links are passed over, the first: a/loop (") and told.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    command(tree)
    assert not capsys.readouterr().err


def test_class_folders_may_be_links_and_hold_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "all", "cat/1.jpg", "dog/2.jpg")
    touch(tmp_path / "some", "bird/3.jpg", ".git/4.jpg")
    for name, target in (("cat", tmp_path / "all/cat"), ("up", tmp_path), ("loop", tmp_path / "some")):
        (tmp_path / "some" / name).symlink_to(target)
    (tmp_path / "some/bird/5.jpg").symlink_to(tmp_path / "all/dog/2.jpg")
    (tmp_path / "some/bird/6.jpg").symlink_to(tmp_path / "some/bird/3.jpg")
    assert subfolders(tmp_path / "some") == [tmp_path / "some" / name for name in ("bird", "cat")]
    assert "2 links are passed over, the first: loop" in capsys.readouterr().err
    labelled = find_labelled_images(tmp_path / "some")
    assert labelled.files is not None
    assert [(path.name, number) for path, number in labelled.files] == [("3.jpg", 0), ("6.jpg", 0), ("1.jpg", 1)]
    assert "1 links are passed over, the first: bird/5.jpg" in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.jpg")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(InputError, match=rf"\A{tmp_path} cannot be read \(Permission denied\)\Z"):
        pictures_below(tmp_path)


LITERAL = "a[1]{2,3}*.tar"


def test_existing_names_are_taken_literally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set[ab]{1}?"
    folder.mkdir()
    for name in (LITERAL, "a12x.tar", "b.tar", "c[x].txt"):
        (folder / name).write_text("x\n")
    every = [folder / name for name in ("a12x.tar", LITERAL, "b.tar")]
    for names in (matching_paths, lambda pattern: list(map(Path, expand_patterns(str(pattern))))):
        assert names(folder / LITERAL) == [folder / LITERAL]
        assert names(folder / "*.tar") == every
        assert names(folder / "[ab].tar") == [folder / "b.tar"]
        monkeypatch.chdir(folder)
        assert names(Path(LITERAL)) == [Path(LITERAL)] and names(Path("b*")) == [Path("b.tar")]
    assert list(map(Path, expand_patterns(folder))) == every
    assert list(map(Path, expand_patterns(str(folder / "{b,a12x}.tar")))) == [folder / "b.tar", folder / "a12x.tar"]
    assert [shard.path for shard in shard_parts(str(folder))] == every
    assert [shard.path for shard in shard_parts(str(folder / LITERAL))] == [folder / LITERAL]
    assert find_labelled_images(folder / LITERAL).shards == [folder / LITERAL]
    assert find_labelled_images(folder).shards == every
    assert CaptionFiles([str(folder / "c[x].txt")]).num_samples == 1
    assert not matching_paths(folder / "no*.tar")
