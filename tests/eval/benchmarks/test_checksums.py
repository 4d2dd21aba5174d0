from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from eval.benchmarks.checksums import pairing_sha256, verify_sha256sums
from longclip_teacher.errors import InputError


def write_sums(root: Path, *names: str) -> None:
    lines = [f"{hashlib.sha256((root / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (root / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "image").mkdir()
    for number in range(3):
        (tmp_path / "image" / f"{number}.jpg").write_bytes(bytes(range(number, 256)) * 9000)  # more than one chunk
    write_sums(tmp_path, *(f"image/{number}.jpg" for number in range(3)))
    return tmp_path


def test_good_files_are_counted(root: Path) -> None:
    assert verify_sha256sums(root) == 3


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_what_sha256sum_writes_is_read(root: Path) -> None:
    for options in ([], ["--binary"]):
        with (root / "SHA256SUMS").open("wb") as sums:
            subprocess.run(["sha256sum", *options, "./image/0.jpg", "image/1.jpg"], cwd=root, stdout=sums, check=True)
        assert verify_sha256sums(root) == 2


def test_bad_files_are_counted_and_the_first_is_named(root: Path) -> None:
    (root / "image" / "1.jpg").write_bytes(b"changed")
    with pytest.raises(InputError, match=r"SHA256SUMS: 1 of 3 files differ from it, the first: .*1\.jpg$"):
        verify_sha256sums(root)
    (root / "image" / "2.jpg").write_bytes(b"changed")
    (root / "image" / "0.jpg").unlink()
    with pytest.raises(InputError, match=r"2 of 3 files differ .*1\.jpg; 1 of 3 .* missing .*0\.jpg$"):
        verify_sha256sums(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no files"),
        ("0" * 64 + "  ../x.jpg\n", "outside the root"),
        ("0" * 64 + "  /etc/passwd\n", "outside the root"),
        ("0" * 63 + "  x.jpg\n", "line 1 is not a line of sha256sum"),
        ("\n" + "0" * 64 + " x.jpg\n", "line 2 is not a line of sha256sum"),
        ("SHA256 (x.jpg) = " + "0" * 64, "line 1 is not a line of sha256sum"),
    ],
)
def test_a_broken_list_is_a_one_line_error(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no SHA256SUMS in"):
        verify_sha256sums(tmp_path)
    (tmp_path / "SHA256SUMS").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        verify_sha256sums(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_is_a_plain_sha256_of_names_and_captions() -> None:
    found = pairing_sha256([Path("/a/1.jpg"), Path("b/2.jpg")], ["Größe", "b", 'c "d"'], [1, 0, 1])
    text = '["1.jpg", ["b"]]\n["2.jpg", ["Gr\\u00f6\\u00dfe", "c \\"d\\""]]\n'
    assert found == hashlib.sha256(text.encode()).hexdigest()
