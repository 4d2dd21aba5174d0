"""Tars, pictures and JSON, changed as a fuzzer changes them: read, refused in one line, or left out and counted."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from functools import cache as remembered
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from caption_sources import read_coco, read_sharegpt4v
from eval.base.images import open_image
from eval.base.tar_samples import TarMember, streamed_tar_samples
from faults.bytes import mutated
from faults.trials import Row
from longclip_teacher.errors import InputError
from shard_files import jpeg, loader, sample
from training.cache.datacompdr import DataCompDRStore
from training.cache.manifest import read_cache, read_record
from training.data.decoding import open_picture
from training.data.index import RawSample, ShardIndex
from training.data.samples import BadSample, read_captions
from training.data.shard_records import read_manifest
from training.data.store import TeacherInfo
from training.generations import verified_file
from training.record.run_log import read_metrics
from training.settings.tree import config_from_toml, config_to_toml, parse_config

from faults.stored import small_cache  # isort: skip

__all__ = ["ROWS"]


def _one_line(error: Exception) -> str | None:
    return f"a message of several lines: {error}" if "\n" in str(error).strip() else None


# --- tars -------------------------------------------------------------------------------------------------------------


def _tars(material: Path) -> None:
    """Shards in both formats of headers, with names short and long, and with members of DataCompDR."""
    for form, name in ((tarfile.PAX_FORMAT, "pax.tar"), (tarfile.GNU_FORMAT, "gnu.tar")):
        with tarfile.open(material / name, "w", format=form) as tar:
            for number in range(10):
                key, members = sample(number)
                key = f"{'folder/' * 20}{key}é" if number % 3 else key
                members |= {"syn.json": b"{}", "npz": b"PK"} if number == 5 else {}
                for suffix, content in members.items():
                    header = tarfile.TarInfo(f"{key}.{suffix}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))


def tar_trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    content = mutated(_content(material / draws.choice(["pax.tar", "gnu.tar"])), draws)
    path = folder / "shard.tar"
    path.write_bytes(content)
    try:
        for batch in loader(str(path), global_batch_size=4, max_bad_share=1.0).batches(0):
            assert len(batch.keys) == 4
    except InputError as error:
        if wrong := _one_line(error):
            return wrong
    try:
        for _ in streamed_tar_samples(io.BytesIO(content), lambda suffix: 1 << 20):
            pass
    except (tarfile.TarError, ValueError) as error:  # the stream counts both as a shard that failed
        return _one_line(error)
    return None


@remembered
def _content(path: Path) -> bytes:
    return path.read_bytes()


def _plain_tarfile(patch: pytest.MonkeyPatch) -> None:
    def naive(path: Path, most_bytes: Any) -> Iterator[tuple[str, dict[str, TarMember]]]:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                yield key, {suffix: TarMember(member.offset_data, member.size, None)}

    patch.setattr("training.data.byte_index.tar_samples", naive)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(material: Path) -> None:
    """A small picture in each format that is read, and in several modes."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)
    colour, alpha = Image.fromarray(pixels[:, :, :3]), Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    saved: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("plain.jpg", colour, {}), ("turned.jpg", colour, {"exif": exif}), ("scans.jpg", colour, {"progressive": True}),
        ("cmyk.jpg", colour.convert("CMYK"), {}), ("grey.jpg", colour.convert("L"), {}),
        ("alpha.png", alpha, {}), ("palette.png", colour.convert("P"), {"transparency": 3}), ("deep.png", deep, {}),
        ("a.gif", colour.convert("P"), {}), ("a.webp", alpha, {}), ("a.bmp", colour, {}), ("a.ppm", colour, {}),
        ("a.tiff", colour, {"compression": "tiff_lzw"}), ("deep.tiff", deep, {}),
    ]  # fmt: skip
    for name, picture, options in saved:
        picture.save(material / name, **options)


def picture_trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    source = draws.choice(sorted(material.iterdir()))
    content = mutated(_content(source), draws)
    path = folder / source.name
    path.write_bytes(content)
    ways: list[Callable[[], Any]] = [
        lambda: open_picture(content, True),
        lambda: open_picture(content, False),
        lambda: open_image(path),
    ]
    for way in ways:
        try:
            way()
        except InputError as error:
            if wrong := _one_line(error):
                return wrong
    return None


def _plain_pillow(patch: pytest.MonkeyPatch) -> None:
    def naive(source: Path | bytes, most_pixels: int | None = None) -> Image.Image:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).convert("RGB")

    patch.setattr("eval.base.images.open_image", naive)


# --- JSON and TOML ----------------------------------------------------------------------------------------------------

TALK = [
    {"id": number, "image": f"a/{number}.jpg", "conversations": [{"from": "gpt", "value": f"Caption {number}."}]}
    for number in range(5)
]
COCO = {
    "images": [{"id": number, "file_name": f"{number}.jpg"} for number in range(5)],
    "annotations": [{"image_id": number, "caption": f"Caption {number}."} for number in range(5)],
}
PAUG = {"param_aug": [[[0, 1, 20, 20], True, [[3, 4.0], None]], [[0, 0, 10, 10], False, None]]}


def _texts(material: Path) -> None:
    """A folder with files of every layout of ours, and foreign ones."""
    small_cache(material)
    ShardIndex([shutil.copy(material / "shards" / "s-000.tar", material / "alone.tar")])
    files = {"talk.json": TALK, "coco.json": COCO, "syn.json": {"syn_text": ["a", "b"]}, "paug.json": PAUG}
    files |= {"sample.json": {"caption_long": ["One. Two.", "Three."], "caption_short": "One."}}
    for name, content in files.items():
        (material / name).write_text(json.dumps(content))
    (material / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n')
    (material / "config.toml").write_text(config_to_toml(parse_config([])))
    (material / "sha256.json").write_text(json.dumps({"last.pt": ["0" * 64, "1" * 64]}))


def _read_datacompdr(folder: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, image_emb=np.eye(2, 8, dtype=np.float32), text_emb=np.eye(3, 8, dtype=np.float32))
    extra = {name: (folder / name).read_bytes() for name in ("syn.json", "paug.json")} | {"npz": buffer.getvalue()}
    store = DataCompDRStore(TeacherInfo((8,), 100.0, 77))
    for epoch in range(3):
        store.draw(RawSample("a", jpeg(0), None, b"text", extra), 0, (epoch, 0))


def _read_checkpoint(folder: Path) -> None:
    (folder / "last.pt").write_bytes(b"content")
    verified_file(folder / "last.pt")


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "captions": ("sample.json", lambda f: read_captions(RawSample("a", None, (f / "sample.json").read_bytes(), None))),
    "manifest of shards": ("shards/manifest.json", lambda f: read_manifest(f / "shards")),
    "shards": ("shards/manifest.json", lambda f: ShardIndex(sorted((f / "shards").glob("*.tar"))).read(3)),
    "index": ("alone.tar.index", lambda f: ShardIndex([f / "alone.tar"]).read(3)),
    "manifest of a cache": ("cache/teacher_cache.json", lambda f: read_cache(f / "cache")),
    "record of a cache": ("cache/s-000.teacher.json", lambda f: read_record(f / "cache", "s-000.tar")),
    "conversations": ("talk.json", lambda f: list(read_sharegpt4v(f / "talk.json", f, "auto"))),
    "COCO": ("coco.json", lambda f: list(read_coco(f / "coco.json", f))),
    "synthetic captions": ("syn.json", _read_datacompdr),
    "augmentations": ("paug.json", _read_datacompdr),
    "metrics": ("metrics.jsonl", read_metrics),
    "configuration": ("config.toml", lambda f: config_from_toml(f / "config.toml")),
    "hashes": ("sha256.json", _read_checkpoint),
}


def text_trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    name = draws.choice(list(READERS))
    file, read = READERS[name]
    shutil.copytree(material, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / file
    path.write_bytes(_deeper(mutated(path.read_bytes(), draws), draws))
    try:
        read(folder)
    except (InputError, BadSample) as error:
        return _one_line(error) and f"{name}: a message of several lines: {error}"
    except Exception as error:
        return f"{name}: {type(error).__name__}: {error}"
    return None


def _deeper(content: bytes, draws: random.Random) -> bytes:
    """In some trials, the content inside a hundred thousand lists."""
    return b"[" * 100_000 + content if draws.random() < 0.02 else content


def _expect_good_json(patch: pytest.MonkeyPatch) -> None:
    for name in ("shard_records.BAD_JSON", "shard_records.BAD_INDEX", "byte_index.BAD_INDEX"):
        patch.setattr(f"training.data.{name}", ())
    patch.setattr("training.cache.manifest.BAD_JSON", ())


_MUTATED = "changed as by a fuzzer in one to eight places: read, or refused in one line, or left out and counted"
ROWS = [
    Row(
        "mutated tars",
        f"shards {_MUTATED}, from a disk and as a stream",
        tar_trial,
        full=3400,
        few=40,
        off="tarfile alone reads them",
        switch_off=_plain_tarfile,
        num_off=40,
        prepare=_tars,
        per_process=50,
    ),
    Row(
        "mutated pictures",
        f"JPEG, PNG, GIF, WebP, BMP, PPM and TIFF {_MUTATED}",
        picture_trial,
        full=3300,
        few=40,
        off="Pillow alone reads them",
        switch_off=_plain_pillow,
        num_off=40,
        prepare=_pictures,
        per_process=50,
    ),
    Row(
        "mutated JSON",
        f"manifests, indexes, captions, annotations, metrics and settings {_MUTATED}",
        text_trial,
        full=3300,
        few=60,
        off="errors of other layouts are not expected",
        switch_off=_expect_good_json,
        num_off=60,
        prepare=_texts,
        per_process=50,
    ),
]
