"""Write shards: deterministic tars and their indexes, written atomically, and the manifest that lists them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longclip_teacher.atomic_files import atomic_file, write_text
from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import file_sha256
from training.data.byte_index import scan_tar
from training.data.shard_records import MANIFEST_FORMAT, MANIFEST_NAME, MANIFEST_VERSION, ShardRecord, write_index

__all__ = ["caption_member", "index_shard", "write_manifest", "write_shard"]


def caption_member(caption_long: str | Sequence[str], caption_short: str | Sequence[str] | None = None) -> bytes:
    """Return the `.json` member of a sample. Without a short caption the loader takes the long one's first sentence."""
    captions: dict[str, Any] = {"caption_long": caption_long}
    if caption_short:
        captions["caption_short"] = caption_short
    return json.dumps(captions, ensure_ascii=False).encode("utf-8", "backslashreplace")


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> ShardRecord:
    """Write `samples`, each (key, {suffix without a dot: bytes}), to the tar `path` with its index beside it, and
    return its manifest entry.

    The same samples give the same bytes (times, owners and modes are fixed). The file gets its name once complete.
    """
    num_samples = 0
    with atomic_file(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for num_samples, (key, members) in enumerate(samples, start=1):  # noqa: B007 -- used below
                for suffix, data in members.items():
                    header = tarfile.TarInfo(f"{key}.{suffix}")
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
        if not num_samples:
            raise InputError(f"{path} would be an empty shard: none of its samples can be read")
        index, sha256 = scan_tar(temporary), file_sha256(temporary)
    return write_index(path, index, sha256)


def index_shard(path: Path) -> ShardRecord:
    """Write the index of an existing tar beside it, and return its manifest entry. Raise InputError if it is broken or
    empty."""
    return write_index(path, scan_tar(path), file_sha256(path))


def write_manifest(folder: Path, records: Sequence[ShardRecord], settings: Mapping[str, Any]) -> None:
    """Write `folder`/manifest.json: counts, `settings` (how the shards were made), each shard's hashes."""
    manifest = {
        "format": MANIFEST_FORMAT,
        "version": MANIFEST_VERSION,
        "num_samples": sum(record.num_samples for record in records),
        "settings": dict(settings),
        "shards": [record.to_json() for record in records],
    }
    write_text(folder / MANIFEST_NAME, json.dumps(manifest, ensure_ascii=False))
