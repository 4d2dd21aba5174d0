"""Shards of small random pictures, and loaders over them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from longclip_teacher.text import CaptionTokenizer
from training.data.byte_index import ByteIndex
from training.data.loader import Batch, LoaderSettings, ShardLoader, build_loader
from training.data.shard_records import MANIFEST_NAME, index_file
from training.data.transforms import ViewSpec
from training.data.writer import caption_member, write_manifest, write_shard
from training.settings.augment import AugmentConfig

TOKENIZER = CaptionTokenizer()
NUM_SAMPLES = 41


def jpeg(number: int) -> bytes:
    """A small picture of random pixels."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def sample(number: int) -> tuple[str, dict[str, bytes]]:
    """The key and the members of a sample."""
    caption = f"Picture {number}. " + "It goes on. " * (number % 5)
    return f"{number:04d}", {"jpg": jpeg(number), "json": caption_member(caption.strip())}


def write_folder(folder: Path, numbers: Sequence[int] = range(NUM_SAMPLES), shard_size: int = 10) -> Path:
    """Samples in shards with a manifest."""
    folder.mkdir()
    records = [
        write_shard(folder / f"s-{start:03d}.tar", [sample(i) for i in numbers[start : start + shard_size]])
        for start in range(0, len(numbers), shard_size)
    ]
    write_manifest(folder, records, {})
    return folder


def write_old_manifest(folder: Path) -> dict[str, Any]:
    """Replace manifest and indexes by a manifest of version 1, which holds the indexes. Return its content."""
    content = json.loads((folder / MANIFEST_NAME).read_text())
    content["version"] = 1
    for entry in content["shards"]:
        file = index_file(folder / entry["name"])
        index = ByteIndex.from_bytes(file.read_bytes())
        spans = {name: found.tolist() for name, found in index.spans.items()}
        entry["index"] = {"key": [index.key(row) for row in range(len(index))], **spans}
        for name in ("layout", "index_bytes", "index_sha256"):
            del entry[name]
        file.unlink()
    (folder / MANIFEST_NAME).write_text(json.dumps(content, ensure_ascii=False), "utf-8", "backslashreplace")
    return content


def loader(shards: Any = (), **options: Any) -> ShardLoader:
    """A loader of batches of 8 with small views; `options` are those of LoaderSettings."""
    settings: dict[str, Any] = {
        "views": [ViewSpec(16)], "augment": AugmentConfig(), "tokenizer": TOKENIZER, "context_length": 248,
        "global_batch_size": 8,
    }  # fmt: skip
    return build_loader(LoaderSettings(shards, **{**settings, **options}))


def keys_of(batches: Iterable[Batch]) -> list[str]:
    """The keys of the samples in order."""
    return [key for batch in batches for key in batch.keys]
