"""Small files that unpack to much: each is refused in bounded memory and time."""

from __future__ import annotations

import io
import random
import resource
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bombs import bomb
from eval.base.tar_samples import streamed_tar_samples
from faults.trials import Row
from longclip_teacher.errors import InputError
from training.cache.datacompdr_arrays import stored_arrays
from training.data.byte_index import scan_tar
from training.data.decoding import open_picture
from training.data.index import RawSample, expand_patterns
from training.data.samples import BadSample

__all__ = ["ROWS"]

MOST_BYTES, MOST_SECONDS = 256 << 20, 2.0
_LIMIT = 1 << 30  # of address space beyond what is in use: an undefended trial must not take all memory


def _peak() -> int:
    """The most resident memory of this process since `_forget_peak`, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# --- tars -------------------------------------------------------------------------------------------------------------


def _sparse(path: Path, kind: bytes, size: int, pieces: int = 1) -> None:
    """A tar of members of a kind that claim `size` bytes, all of them a hole of the file."""
    with path.open("wb") as file:
        for _ in range(pieces):
            header = tarfile.TarInfo("1.jpg")
            header.type, header.size = kind, size
            file.write(header.tobuf(tarfile.GNU_FORMAT))
            file.seek(-(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, io.SEEK_CUR)
        file.write(tarfile.TarInfo("2.jpg").tobuf() + bytes(1024))


def tar_header(draws: random.Random, folder: Path) -> Callable[[], object]:
    """Gigabytes of names or attributes of one member."""
    kind = draws.choice([tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
    path = folder / "bomb.tar"
    _sparse(path, kind, draws.randrange(500 << 20, 3 << 30))
    if draws.random() < 0.5:
        return lambda: scan_tar(path)
    return lambda: _streamed(path)


def _streamed(path: Path) -> None:
    with path.open("rb") as file:
        for _ in streamed_tar_samples(file, lambda suffix: 1 << 20):
            pass


# --- patterns ---------------------------------------------------------------------------------------------------------


def braces(draws: random.Random, folder: Path) -> Callable[[], object]:
    """A pattern that stands for more names than there are shards anywhere."""
    pattern = draws.choice(
        [
            "{000000..999999999}", "{a,b}" * 40, "{1..9999}{1..9999}", "{" * 500 + "a,b" + "}" * 500,
            "{0..1000000000000}.tar", "{a..z}" * 8, "{" + ",".join(["{1..1000}"] * 400) + "}{1..1000}",
        ]
    )  # fmt: skip
    return lambda: expand_patterns(str(folder / "s-") + pattern)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _png(width: int, height: int, content: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def large_picture(draws: random.Random, folder: Path) -> Callable[[], object]:
    """A picture of one colour and of hundreds of millions of pixels, in some kilobytes."""
    side = draws.randrange(12_000, 20_000)
    kind = draws.choice(["png", "jpeg", "gif", "tiff", "bmp"])
    if kind == "png":
        data = _png(side, side, zlib.compress(bytes(3 * side + 1) * 200))
    else:
        buffer = io.BytesIO()
        Image.new("L", (64, 64)).save(buffer, kind.upper())
        data = _with_size(buffer.getvalue(), kind, side)
    fast = draws.random() < 0.5
    return lambda: open_picture(data, fast)


def hostile_picture(draws: random.Random, folder: Path) -> Callable[[], object]:
    """Thousands of scans of a JPEG, endless chunks, frames, comments and tiles: see tests/bombs.py."""
    _, data = bomb(draws.randrange(1 << 30))
    fast = draws.random() < 0.5
    return lambda: open_picture(data, fast)


def _with_size(data: bytes, kind: str, side: int) -> bytes:
    """The same picture with another size in its header."""
    places = {
        "jpeg": (data.find(b"\xff\xc0") + 5, ">HH"), "gif": (6, "<HH"), "bmp": (18, "<ii"),
    }  # fmt: skip
    if kind == "tiff":
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((1, 1), np.uint8)).resize((side, side)).save(
            buffer, "TIFF", compression="tiff_adobe_deflate"
        )
        return buffer.getvalue()
    place, form = places[kind]
    return data[:place] + struct.pack(form, side, side) + data[place + struct.calcsize(form) :]


def arrays(draws: random.Random, folder: Path) -> Callable[[], object]:
    """Hundreds of megabytes of zeros in a sample's npz or gzipped torch file."""
    name = draws.choice(["pth.gz", "npz"])
    packed = (folder.parent / "material" / name).read_bytes()
    return lambda: stored_arrays(RawSample("a", None, None, None, {name: packed}))


def _packed_arrays(material: Path) -> None:
    (material / "pth.gz").write_bytes(_zeros(400 << 20))
    with (material / "npz").open("wb") as file:
        np.savez_compressed(file, image_emb=np.zeros((100 << 20, 1), np.float32))


def _zeros(size: int) -> bytes:
    packer = zlib.compressobj(9, wbits=16 + zlib.MAX_WBITS)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(size >> 20)) + packer.flush()


# --- the row ----------------------------------------------------------------------------------------------------------

KINDS = (tar_header, braces, large_picture, hostile_picture, arrays)


def _warm(folder: Path) -> None:
    """Use what the trials use, so that code that is loaded now is not counted as theirs."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    for fast in (True, False):
        open_picture(buffer.getvalue(), fast)
    np.savez_compressed(buffer := io.BytesIO(), image_emb=np.eye(2, dtype=np.float32))
    stored_arrays(RawSample("a", None, None, None, {"npz": buffer.getvalue()}))
    path = folder / "warm.tar"
    path.write_bytes(tarfile.TarInfo("2.jpg").tobuf() + bytes(1024))
    scan_tar(path)
    _streamed(path)
    expand_patterns(str(path))


def trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    kind = draws.choice(KINDS)
    read = kind(draws, folder)
    _warm(folder)
    _forget_peak()
    before, start = _peak(), time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + _LIMIT,) * 2)
    said = ""
    try:
        read()
    except (InputError, BadSample, tarfile.TarError, ValueError) as error:
        said = str(error)
    seconds, growth = time.process_time() - start, _peak() - before
    name = kind.__name__.replace("_", " ")
    if growth > MOST_BYTES or seconds > MOST_SECONDS:
        return f"{name}: {growth >> 20} MiB and {seconds:.1f} s"
    is_said = bool(said) or kind is hostile_picture  # some of these can be read within the bounds
    return None if is_said and "\n" not in said else f"{name}: said {said!r}"


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _no_bounds(patch: pytest.MonkeyPatch) -> None:
    """All bounds but that of patterns, which would take minutes to fail."""
    patch.setattr("eval.base.tar_headers.MAX_EXTENDED_BYTES", 1 << 50)
    patch.setattr("training.cache.datacompdr_arrays._MAX_UNPACKED_BYTES", 1 << 50)
    patch.setattr("PIL.Image.MAX_IMAGE_PIXELS", None)
    for name in ("eval.base.images.MAX_IMAGE_PIXELS", "training.data.decoding.MAX_TRAINING_PIXELS"):
        patch.setattr(name, 1 << 50)


ROWS = [
    Row(
        "bombs",
        "tars with gigabytes of names, patterns of billions of shards, small files of pictures and arrays that unpack "
        "to gigabytes, JPEGs of thousands of scans: refused in one line (odd pictures may be read), with less than "
        f"{MOST_BYTES >> 20} MiB and {MOST_SECONDS:g} s of processor time",
        trial,
        full=100,
        few=10,
        off="nothing but patterns is bounded",
        switch_off=_no_bounds,
        num_off=6,
        prepare=_packed_arrays,
        seconds=120,
        found="tags that share their bytes took 12 GB with Pillow before 13, and one enormous tile of a TIFF 1 GB",
    ),
]
