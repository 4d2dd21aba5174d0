"""Hostile pictures by seed: small files that cost an unguarded decoder seconds or gigabytes."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

from PIL import Image

__all__ = ["BOMBS", "bomb"]


def bomb(seed: int) -> tuple[str, bytes]:
    """Return the name and the file of hostile picture number `seed`; all kinds come in turn."""
    names = list(BOMBS)
    name = names[seed % len(names)]
    return name, BOMBS[name](random.Random(seed))


# --- JPEG -------------------------------------------------------------------------------------------------------------


def _jpeg(side: int, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side), 90 if mode == "L" else (90, 120, 40)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _progressive_scans(draw: random.Random) -> bytes:
    """The last scan of a progressive JPEG again and again."""
    whole = _jpeg(draw.choice((1000, 3000)), progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + scan * draw.randrange(1000, 3000) + b"\xff\xd9"


def _scans_behind_thumbnails(draw: random.Random) -> bytes:
    """The same behind segments in which the marker of a scan stands too."""
    whole = _progressive_scans(draw)
    return whole[:2] + _segment(0xE5, b"\xff\xda" * 9) + whole[2:]


def _sequential_scans(draw: random.Random) -> bytes:
    """A baseline JPEG of three colours whose first is sent again and again."""
    grey = _jpeg(draw.choice((1000, 2000)), "L")
    frame = grey.index(b"\xff\xc0")
    start = grey.index(b"\xff\xda")
    height_width = grey[frame + 5 : frame + 9]
    colours = b"".join(bytes((number, 0x11, 0)) for number in (1, 2, 3))
    head = grey[:frame] + _segment(0xC0, b"\x08" + height_width + b"\x03" + colours)
    head += grey[frame + 2 + struct.unpack(">H", grey[frame + 2 : frame + 4])[0] : start]
    length = struct.unpack(">H", grey[start + 2 : start + 4])[0]
    entropy = grey[start + 2 + length : -2]
    scans = [_segment(0xDA, bytes((1, number, 0x00, 0, 63, 0))) + entropy for number in (1, 2, 3)]
    return head + scans[0] * draw.randrange(500, 1000) + b"".join(scans[1:]) + b"\xff\xd9"


def _wide_jpeg(draw: random.Random) -> bytes:
    """A frame of up to 65,535 pixels each way, and next to no data."""
    whole = _jpeg(16, progressive=draw.random() < 0.5)
    frame = max(whole.find(b"\xff\xc0"), whole.find(b"\xff\xc2"))
    size = struct.pack(">HH", draw.randrange(6500, 65535), draw.randrange(6500, 65535))
    return whole[: frame + 5] + size + whole[frame + 9 :]


def _many_segments(draw: random.Random) -> bytes:
    whole = _jpeg(16)
    return whole[:2] + _segment(draw.choice((0xFE, 0xE9)), b"") * draw.randrange(2_000_000, 3_000_000) + whole[2:]


def _repeated_tables(draw: random.Random) -> bytes:
    """Huffman tables, defined again and again."""
    whole = _jpeg(16)
    start = whole.index(b"\xff\xc4")
    table = whole[start : start + 2 + struct.unpack(">H", whole[start + 2 : start + 4])[0]]
    return whole[:start] + table * draw.randrange(100_000, 200_000) + whole[start:]


def _fill_bytes(draw: random.Random) -> bytes:
    whole = _jpeg(16)
    return whole[:2] + b"\xff" * draw.randrange(20_000_000, 30_000_000) + whole[2:]


def _directory(num_tags: int, size: int, tail: bytes = b"") -> bytes:
    """A TIFF whose tags all point to the same `size` bytes."""
    data = 8 + 2 + 12 * num_tags + 4
    tags = b"".join(struct.pack("<HHLL", 0x8000 + tag % 0x7000, 7, size, data) for tag in range(num_tags))
    return b"II*\0" + struct.pack("<LH", 8, num_tags) + tags + bytes(4) + (tail or bytes(size))


def _jpeg_exif(draw: random.Random) -> bytes:
    """EXIF data of many segments, whose tags share their bytes."""
    exif = _directory(draw.randrange(5_000, 25_000), draw.randrange(1_000_000, 4_000_000))
    parts = [exif[start : start + 65000] for start in range(0, len(exif), 65000)]
    whole = _jpeg(16)
    return whole[:2] + b"".join(_segment(0xE1, b"Exif\0\0" + part) for part in parts) + whole[2:]


def _jpeg_pictures(draw: random.Random) -> bytes:
    """A directory of several pictures, whose tags share their bytes."""
    whole = _jpeg(16)
    return whole[:2] + _segment(0xE2, b"MPF\0" + _directory(draw.randrange(1000, 2700), 30000)) + whole[2:]


# --- PNG --------------------------------------------------------------------------------------------------------------


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))


def _zeros(num_bytes: int) -> bytes:
    packer, block = zlib.compressobj(9), bytes(1 << 20)
    parts = [packer.compress(block) for _ in range(num_bytes >> 20)]
    return b"".join(parts) + packer.flush()


def _png(width: int, height: int, before: bytes = b"", data: bytes | None = None, after: bytes = b"") -> bytes:
    head = struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(height * (1 + 3 * width))) if data is None else data
    image = b"" if data == b"" else _chunk(b"IDAT", rows)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + before + image + after + _chunk(b"IEND", b"")


def _wide_png(draw: random.Random) -> bytes:
    width, height = draw.randrange(6500, 40000), draw.randrange(6500, 40000)
    return _png(width, height, data=_zeros(300 << 20) if draw.random() < 0.3 else _zeros(1 << 20))


def _png_rest(draw: random.Random) -> bytes:
    """A small picture whose data unpack to hundreds of megabytes."""
    return _png(16, 16, data=_zeros(draw.randrange(300, 600) << 20))


def _png_texts(draw: random.Random) -> bytes:
    packed = _zeros(draw.choice((1, 600)) << 20)
    kinds = (_chunk(b"zTXt", b"k\0\0" + packed), _chunk(b"iTXt", b"k\0\1\0\0\0" + packed))
    return _png(16, 16, before=draw.choice(kinds) * draw.randrange(1, 200 if len(packed) < 9999 else 2))


def _png_profile(draw: random.Random) -> bytes:
    return _png(16, 16, before=_chunk(b"iCCP", b"p\0\0" + _zeros(draw.randrange(300, 900) << 20)))


def _png_chunks(draw: random.Random) -> bytes:
    chunk = _chunk(draw.choice((b"tIME", b"prVt", b"pHYs")), b"")
    return _png(16, 16, before=chunk * draw.randrange(2_000_000, 3_000_000))


def _png_empty_data(draw: random.Random) -> bytes:
    return _png(16, 16, before=_chunk(b"IDAT", b"") * draw.randrange(2_000_000, 3_000_000))


def _png_exif(draw: random.Random) -> bytes:
    exif = _directory(draw.randrange(5_000, 25_000), draw.randrange(1_000_000, 4_000_000))
    return _png(16, 16, before=_chunk(b"eXIf", exif))


def _png_exif_text(draw: random.Random) -> bytes:
    """EXIF data as hexadecimal text, packed."""
    exif = _directory(draw.randrange(5_000, 20_000), draw.randrange(100_000, 200_000))
    text = f"\nexif\n{len(exif)}\n{exif.hex()}".encode()
    return _png(16, 16, before=_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)))


def _png_frames(draw: random.Random) -> bytes:
    """An animation of many large frames."""
    count = draw.randrange(50_000, 200_000)
    control = struct.pack(">LLLLLHHBB", 0, 16, 16, 0, 0, 1, 1, 0, 0)
    frames = _chunk(b"fcTL", control) + _chunk(b"fdAT", struct.pack(">L", 1) + zlib.compress(bytes(49 * 16)))
    return _png(16, 16, before=_chunk(b"acTL", struct.pack(">LL", 2**31 - 1, 0)), after=frames * count)


# --- GIF, WebP, TIFF, BMP, PPM ----------------------------------------------------------------------------------------


def _gif(width: int = 16, height: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (16, 16)).save(buffer, "GIF")
    whole = buffer.getvalue()
    return whole[:6] + struct.pack("<HH", width, height) + whole[10:]


def _wide_gif(draw: random.Random) -> bytes:
    return _gif(draw.randrange(6500, 65535), draw.randrange(6500, 65535))


def _gif_frames(draw: random.Random) -> bytes:
    whole = _gif()
    first = whole.index(b",")
    return whole[:-1] + whole[first:-1] * draw.randrange(100_000, 300_000) + b";"


def _gif_comments(draw: random.Random) -> bytes:
    whole = _gif()
    first = whole.index(b",")
    one = b"!\xfe\x01x\0"
    comments = one * draw.randrange(1_000_000, 3_000_000)
    if draw.random() < 0.5:
        comments = b"!\xfe" + b"\x01x" * draw.randrange(2_000_000, 4_000_000) + b"\0"
    return whole[:first] + comments + whole[first:]


def _gif_extensions(draw: random.Random) -> bytes:
    whole = _gif()
    first = whole.index(b",")
    return whole[:first] + b"!\xff\x01N\0" * draw.randrange(2_000_000, 3_000_000) + whole[first:]


def _webp(draw: random.Random) -> bytes:
    """An animation on a large canvas."""
    side = draw.randrange(6400, 16383)
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "WEBP", lossless=True)
    frame = buffer.getvalue()[12:]
    sizes = (side - 1).to_bytes(3, "little") * 2
    anmf = bytes(6) + (15).to_bytes(3, "little") * 2 + (100).to_bytes(3, "little") + b"\0" + frame
    chunks = b"VP8X" + struct.pack("<L", 10) + b"\x02" + bytes(3) + sizes
    chunks += b"ANIM" + struct.pack("<L", 6) + bytes(6)
    chunks += (b"ANMF" + struct.pack("<L", len(anmf)) + anmf) * draw.randrange(1, 50_000)
    return b"RIFF" + struct.pack("<L", len(chunks) + 4) + b"WEBP" + chunks


def _tiff(tags: dict[int, tuple[int, int, bytes]], data: bytes = b"", repeats: int = 0) -> bytes:
    """A TIFF of `tags` (type, count, value of 4 bytes or an offset into `data`)."""
    entries = sorted(tags.items())
    base = 8 + 2 + 12 * len(entries) + 4
    packed = b"".join(
        struct.pack("<HHL", tag, kind, count)
        + (struct.pack("<L", base + value) if isinstance(value, int) else value.ljust(4, b"\0"))
        for tag, (kind, count, value) in entries
    )
    return b"II*\0" + struct.pack("<LH", 8, len(entries)) + packed + bytes(4) + data


def _long(value: int) -> tuple[int, int, bytes]:
    return 4, 1, struct.pack("<L", value)


def _plain_tags(width: int, height: int, compression: int = 1) -> dict[int, tuple[int, int, bytes]]:
    return {256: _long(width), 257: _long(height), 258: (3, 1, b"\x08\0"), 259: _long(compression), 262: _long(1)}


def _wide_tiff(draw: random.Random) -> bytes:
    width, height = draw.randrange(6500, 60000), draw.randrange(6500, 60000)
    tags = {**_plain_tags(width, height, 8), 273: _long(0), 277: _long(1), 278: _long(height), 279: _long(100)}
    data = _zeros(64 << 20)
    tags[273] = _long(8 + 2 + 12 * len(tags) + 4)
    tags[279] = _long(len(data))
    return _tiff(tags, data)


def _tiff_tiles(draw: random.Random) -> bytes:
    """A small picture in one enormous tile."""
    side = draw.choice((16384, 32768, 65520))
    tags = {
        **_plain_tags(64, 64, draw.choice((1, 8))),
        322: _long(side),
        323: _long(side),
        324: _long(0),
        325: _long(0),
    }
    data = _zeros(draw.choice((1, 256)) << 20)
    tags[324] = _long(8 + 2 + 12 * len(tags) + 4)
    tags[325] = _long(len(data))
    return _tiff(tags, data)


def _tiff_strips(draw: random.Random) -> bytes:
    """A strip for each row of a very tall picture."""
    height = draw.randrange(1_000_000, 4_000_000)
    tags: dict = {**_plain_tags(1, height), 278: _long(1), 273: (4, height, 0), 279: (4, height, 4 * height)}
    return _tiff(tags, struct.pack("<L", 8) * height + struct.pack("<L", 1) * height)


def _tiff_directories(draw: random.Random) -> bytes:
    return _directory(draw.randrange(5_000, 25_000), draw.randrange(1_000_000, 4_000_000))


def _tiff_chain(draw: random.Random) -> bytes:
    """A directory that says it is followed by itself."""
    whole = bytearray(_tiff({**_plain_tags(16, 16), 273: _long(8), 278: _long(16), 279: _long(256)}, bytes(256)))
    struct.pack_into("<L", whole, 8 + 2 + 12 * 8, 8)
    return bytes(whole)


def _bmp(draw: random.Random) -> bytes:
    """Run-length coded: many steps for little data, or a large picture."""
    width, height = (6000, 6000) if draw.random() < 0.7 else (60000, 60000)
    runs = draw.choice((b"\x01\x00", b"\x00\x02\x00\x00", b"\x00\x00", b"\x00\x02\x01\x00")) * 4_000_000
    head = struct.pack("<LllHHLLllLL", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0) + bytes(1024)
    return b"BM" + struct.pack("<LHHL", 14 + len(head) + len(runs), 0, 0, 14 + len(head)) + head + runs


def _ppm(draw: random.Random) -> bytes:
    kind = draw.randrange(3)
    if kind == 0:
        return b"P6 65000 65000 255\n"
    if kind == 1:
        return b"P6\n#" + b"x" * draw.randrange(10_000_000, 30_000_000) + b"\n4 4 255\n" + bytes(48)
    return b"P3 3000 3000 255\n" + b"1 " * 27_000_000


BOMBS: dict[str, Callable[[random.Random], bytes]] = {
    "JPEG, progressive scans": _progressive_scans,
    "JPEG, scans behind thumbnails": _scans_behind_thumbnails,
    "JPEG, sequential scans": _sequential_scans,
    "JPEG, large frame": _wide_jpeg,
    "JPEG, many segments": _many_segments,
    "JPEG, many tables": _repeated_tables,
    "JPEG, fill bytes": _fill_bytes,
    "JPEG, EXIF": _jpeg_exif,
    "JPEG, directory of pictures": _jpeg_pictures,
    "PNG, large": _wide_png,
    "PNG, data beyond the picture": _png_rest,
    "PNG, texts": _png_texts,
    "PNG, colour profile": _png_profile,
    "PNG, many chunks": _png_chunks,
    "PNG, empty data": _png_empty_data,
    "PNG, EXIF": _png_exif,
    "PNG, EXIF as text": _png_exif_text,
    "PNG, frames": _png_frames,
    "GIF, large": _wide_gif,
    "GIF, frames": _gif_frames,
    "GIF, comments": _gif_comments,
    "GIF, extensions": _gif_extensions,
    "WebP, large canvas and frames": _webp,
    "TIFF, large": _wide_tiff,
    "TIFF, large tile": _tiff_tiles,
    "TIFF, strips": _tiff_strips,
    "TIFF, tags": _tiff_directories,
    "TIFF, circle": _tiff_chain,
    "BMP, run lengths": _bmp,
    "PPM": _ppm,
}
