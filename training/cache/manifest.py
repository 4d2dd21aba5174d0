"""The manifest of a folder of sidecars: how they were made, a record of each finished one, and their shards.

A cache is a folder with one sidecar per shard (sidecar.py). Beside each sidecar lies a small record NAME.teacher.json,
which is written last. teacher_cache.json says how the cache was made; it gets all records once every shard has one.
Until then, readers and later runs of scripts/cache_teacher.py find them beside the sidecars.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import urllib.parse
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from eval.towers.models import weights_file
from eval.towers.precision import Precision
from longclip_teacher.ancestry import Ancestry, ancestry_from_json, unrecorded
from longclip_teacher.atomic_files import json_text, write_json
from longclip_teacher.checkpoint import teacher_file
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer
from longclip_teacher.weights_file import file_sha256, read_weights
from training.data.byte_index import BAD_JSON
from training.data.index import ShardIndex, check_url, is_remote
from training.data.remote_files import OBJECT_STORES, RemoteFile, parsed_remote, plain_url
from training.data.transforms import Interpolation
from training.settings.augment import AugmentConfig
from training.settings.captions import NO_SAMPLING, CaptionOptions

__all__ = [
    "CACHE_MANIFEST",
    "CacheSettings",
    "ShardIdentity",
    "SidecarRecord",
    "as_tuple",
    "cache_place",
    "cache_sha256",
    "changes",
    "decoder_name",
    "has_all_records",
    "library_versions",
    "read_cache",
    "read_record",
    "read_records",
    "refuse_same_names",
    "remote_sidecar",
    "shard_identities",
    "shard_number",
    "sidecar_path",
    "teacher_hashes",
    "teacher_sha256",
    "tokenizer_digest",
    "write_cache_manifest",
    "write_record",
]

CACHE_MANIFEST = "teacher_cache.json"
_FORMAT, _VERSION = "compact-longclip teacher cache", 1
_ENTRIES = {"format", "version", "settings", "num_samples", "bytes", "shards", "sha256"}
_LIBRARIES = ("torch", "torchvision", "timm", "open_clip_torch", "pillow", "numpy")
_PROBE = "A photo of 3 naïve cats; it's 'Élan' & <em>more</em> &amp; 中文 🙂"  # its tokens differ between tokenizers
_RECORD = ".teacher.json"
_MAX_MANIFEST_BYTES = 1 << 30  # at a URL


@dataclass(frozen=True)
class CacheSettings:
    """How a cache was made. All fields but `teacher` (a name), `libraries` and `ancestry` must be the same for every
    sidecar in it."""

    teacher: str
    teacher_sha256: str
    """The first of `teacher_hashes`; in older caches the second."""
    embed_dim: int
    logit_scale: float
    """Linear."""
    activation: str
    """Some weight files do not record it."""
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation
    context_length: int
    tokenizer: str
    """`tokenizer_digest`."""
    views: int
    """A: random views per picture; 0 is the centre view."""
    augment: AugmentConfig
    seed: int
    decoder: str
    precision: Precision
    libraries: dict[str, str]
    captions: CaptionOptions = NO_SAMPLING
    """How the short captions are made (`CaptionOptions.of_short_texts`). Older caches hold them as the data gives
    them."""
    caption_views: int = 1
    """Sampled captions per long caption; 1 if none are sampled."""
    sentences: bool = False
    """Whether the sentences of each long caption are stored one by one too."""
    ancestry: Ancestry = ()
    """Where the teacher's weights come from."""

    @property
    def num_stored_views(self) -> int:
        """V; the centre view counts as one."""
        return max(self.views, 1)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CacheSettings:
        """Invert `dataclasses.asdict`. Raise KeyError, TypeError or ValueError for anything else."""
        augment = AugmentConfig(
            **{field.name: as_tuple(data["augment"][field.name]) for field in dataclasses.fields(AugmentConfig)}
        )
        read: dict[str, Any] = {"augment": augment, "libraries": {str(k): str(v) for k, v in data["libraries"].items()}}
        for name in ("teacher", "teacher_sha256", "activation", "interpolation", "tokenizer", "decoder", "precision"):
            read[name] = str(data[name])
        for name in ("embed_dim", "image_size", "context_length", "views", "seed"):
            read[name] = int(data[name])
        for name in ("mean", "std"):
            read[name] = tuple(float(value) for value in data[name])
        captions = {str(name): as_tuple(value) for name, value in data.get("captions", {}).items()}
        read |= {"captions": CaptionOptions(**captions), "caption_views": int(data.get("caption_views", 1))}
        read["sentences"] = bool(data.get("sentences", False))
        not_told = unrecorded("the teacher of a cache without a record", read["teacher_sha256"])
        read["ancestry"] = ancestry_from_json(data["ancestry"]) if "ancestry" in data else not_told
        return cls(**read, logit_scale=float(data["logit_scale"]))


@dataclass(frozen=True)
class ShardIdentity:
    """What distinguishes one shard from another."""

    shard: str
    """File name."""
    shard_bytes: int
    shard_sha256: str
    """"" if the shard's own manifest does not give it."""
    shard_changed_ns: int
    """When the file was last changed, as the file system says (ctime). A sidecar whose record has another time is
    compared with its shard before it is kept. 0 in caches of earlier versions."""
    num_samples: int
    keys_sha256: str


@dataclass(frozen=True)
class SidecarRecord(ShardIdentity):
    """A finished sidecar and the shard from which it was made."""

    num_bytes: int
    sha256: str
    num_unreadable: int
    num_captions: int
    num_distinct_captions: int

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SidecarRecord:
        """Invert `dataclasses.asdict`. Raise KeyError, TypeError or ValueError for anything else."""
        data = {"shard_changed_ns": 0, **data}
        read: dict[str, Any] = {
            f.name: (int if f.type == "int" else str)(data[f.name]) for f in dataclasses.fields(cls)
        }
        return cls(**read)


# --- the folder -------------------------------------------------------------------------------------------------------


def sidecar_path(folder: Path, shard: str | Path) -> Path:
    """Return the path of a shard's sidecar. Only the shard's name matters."""
    return folder / f"{Path(shard).name.removesuffix('.tar')}.safetensors"


def cache_place(cache: str) -> Path | str:
    """Return the folder of a cache: a path, or a URL without a slash at its end. Raise InputError for other URLs."""
    if not is_remote(cache):
        return Path(cache)
    check_url(cache, "--teacher.cache")
    return cache.rstrip("/")


def remote_sidecar(folder: str, record: SidecarRecord) -> RemoteFile:
    """Return the sidecar of a shard in the cache at the URL `folder`."""
    name = sidecar_path(Path(), record.shard).name
    quoted = name if folder.startswith(OBJECT_STORES) else urllib.parse.quote(name)
    return RemoteFile(f"{folder}/{quoted}", record.num_bytes, record.sha256)


def read_cache(folder: Path | str) -> tuple[CacheSettings, dict[str, SidecarRecord]]:
    """Return how the cache in `folder` (a path or `cache_place`'s URL) was made, and the records in its manifest by
    shard name.

    Raise InputError if there is no cache, or a damaged one.
    """
    if not isinstance(folder, Path):
        url = f"{folder}/{CACHE_MANIFEST}"
        return parsed_remote(url, _MAX_MANIFEST_BYTES, lambda pieces: _parsed(b"".join(pieces), plain_url(url)))
    path = folder / CACHE_MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"no teacher cache in {folder} ({CACHE_MANIFEST}: {error.strerror}): make one with scripts/cache_teacher.py"
        ) from None
    return _parsed(content, str(path))


def _parsed(content: bytes, name: str) -> tuple[CacheSettings, dict[str, SidecarRecord]]:
    try:
        cache = json.loads(content)
        if (cache["format"], cache["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"format version {cache['version']}, but this code reads {_VERSION}")
        if unknown := cache.keys() - _ENTRIES:
            raise ValueError(f"it has {min(unknown)!r}")
        if "sha256" in cache and cache["sha256"] != _contents_sha256(cache):  # not in caches of earlier versions
            raise ValueError("damaged: its contents are not those that its sha256 names")
        records = [SidecarRecord.from_json(entry) for entry in cache["shards"]]
        return CacheSettings.from_json(cache["settings"]), {record.shard: record for record in records}
    except BAD_JSON as error:
        raise InputError(
            f"{name} is not a valid teacher cache ({error!r}): make it again with scripts/cache_teacher.py"
        ) from None


def read_record(folder: Path | str, shard: str) -> SidecarRecord | None:
    """Return the record beside a shard's sidecar. None if there is none, if it is incomplete, or at a URL."""
    if not isinstance(folder, Path):
        return None
    try:
        return SidecarRecord.from_json(json.loads(_record_path(folder, shard).read_bytes()))
    except (OSError, *BAD_JSON):
        return None


def write_record(folder: Path, record: SidecarRecord) -> None:
    """Record that a sidecar is finished."""
    write_json(_record_path(folder, record.shard), dataclasses.asdict(record))


def read_records(folder: Path) -> dict[str, SidecarRecord]:
    """Return all records of a cache by shard name: those in its manifest, if any, and newer ones beside sidecars."""
    records = read_cache(folder)[1] if (folder / CACHE_MANIFEST).is_file() else {}
    for path in sorted(folder.glob(f"*{_RECORD}")):
        record = read_record(folder, path.name.removesuffix(_RECORD))
        if record is not None:
            records[record.shard] = record
    return dict(sorted(records.items()))


def has_all_records(folder: Path, shards: Iterable[str], known: Mapping[str, SidecarRecord]) -> bool:
    """Return whether each of `shards` has a record: beside its sidecar, or in `known`. Only the folder is listed."""
    beside = {path.name for path in folder.glob(f"*{_RECORD}")}
    return all(shard in known or _record_path(folder, shard).name in beside for shard in shards)


def write_cache_manifest(folder: Path, settings: CacheSettings) -> dict[str, SidecarRecord]:
    """Write the manifest anew with all records, and return them by shard name."""
    records = read_records(folder)
    content: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "settings": dataclasses.asdict(settings),
        "num_samples": sum(record.num_samples for record in records.values()),
        "bytes": sum(record.num_bytes for record in records.values()),
        "shards": [
            {**dataclasses.asdict(record), "sidecar": sidecar_path(folder, record.shard).name}
            for record in records.values()
        ],
    }
    write_json(folder / CACHE_MANIFEST, content | {"sha256": _contents_sha256(json.loads(json_text(content)))})
    return records


def _contents_sha256(cache: Mapping[str, Any]) -> str:
    """Return a hash of the values of a manifest, as read, without the hash that it names itself."""
    values = {name: value for name, value in cache.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _record_path(folder: Path, shard: str) -> Path:
    return sidecar_path(folder, shard).with_suffix(_RECORD)


# --- what a cache depends on ------------------------------------------------------------------------------------------


def teacher_sha256(checkpoint: str) -> str:
    """Return the sha256 of the weight file that `checkpoint` (a file, a run's folder or a hub name) refers to."""
    return file_sha256(weights_file(checkpoint) or teacher_file(checkpoint))


def teacher_hashes(checkpoint: str) -> tuple[str, str]:
    """Return the hash of a teacher's weights and configuration, and the sha256 of its file.

    Caches name their teacher by the first. Those made before name it by the second, which says the same only of the
    very same file.
    """
    path = weights_file(checkpoint) or teacher_file(checkpoint)
    weights = read_weights(path)
    return weights.content_sha256, weights.sha256


def cache_sha256(folder: Path | str, shards: Iterable[str]) -> str:
    """Return a hash of the stored features of the named shards and of how they were made."""
    settings, records = read_cache(folder)
    left_out = {"teacher", "libraries", "ancestry"}
    if settings.captions == NO_SAMPLING:  # as in caches from before captions were sampled
        left_out |= {"captions", "caption_views"}
    if not settings.sentences:  # as in caches from before they could be stored
        left_out.add("sentences")
    made = {name: value for name, value in dataclasses.asdict(settings).items() if name not in left_out}
    found = [records.get(name) or read_record(folder, name) for name in shards]
    sidecars = [None if record is None else record.sha256 for record in found]
    return hashlib.sha256(json.dumps([made, sidecars]).encode()).hexdigest()


def tokenizer_digest(context_length: int) -> str:
    """Return a hash of the ids that our tokenizer gives to a fixed text of letters, entities, accents and symbols."""
    ids = CaptionTokenizer(context_length)([_PROBE])
    return hashlib.sha256(json.dumps(ids.tolist()).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decode, crop and encode."""
    return {name: metadata.version(name) for name in _LIBRARIES}


def decoder_name(fast: bool) -> str:
    """Return the name under which a cache records its decoder."""
    return "fast" if fast else "pil"


def shard_identities(index: ShardIndex, known: Mapping[str, SidecarRecord | None] | None = None) -> list[ShardIdentity]:
    """Describe each of the index's shards. The sha256 comes from the shards' manifest.

    A shard whose record in `known`, by name, has the same sha256 has the same keys: its index is not read.
    """
    identities = []
    for shard, path in enumerate(index.names):
        name, sha256 = Path(path).name, index.sha256(shard)
        record = (known or {}).get(name)
        if record is not None and sha256 and record.shard_sha256 == sha256:
            digest = record.keys_sha256
        else:
            digest = hashlib.sha256(json.dumps(index.keys(shard)).encode()).hexdigest()
        num_bytes, changed_ns = index.file_status(shard)
        size = int(index.shard_sizes[shard])
        identities.append(ShardIdentity(name, num_bytes, sha256, changed_ns, size, digest))
    return identities


def shard_number(shard: str) -> int:
    """Return the number that keys the draws of a shard: of its name, because its place in a list may differ."""
    return zlib.crc32(os.fsencode(shard))


def changes(record: SidecarRecord, identity: ShardIdentity) -> list[tuple[str, Any, Any]]:
    """Return the fields in which a shard differs from the one that a sidecar was made from, with both values.

    A sha256 that the shards' manifest does not give is not compared, nor is the time of the last change.
    """
    return [
        (field.name.replace("_", " "), getattr(record, field.name), getattr(identity, field.name))
        for field in dataclasses.fields(ShardIdentity)
        if getattr(record, field.name) != getattr(identity, field.name)
        and field.name != "shard_changed_ns"
        and not (field.name == "shard_sha256" and not identity.shard_sha256)
    ]


def refuse_same_names(paths: Sequence[Path | str]) -> None:
    """Raise InputError if two shards would share a sidecar."""
    seen: dict[str, Path | str] = {}
    for path in paths:
        other = seen.setdefault(sidecar_path(Path(), path).name, path)
        if other != path:
            raise InputError(f"{other} and {path} would share one sidecar: rename one of them")


def as_tuple(value: Any) -> Any:
    """Return a list, which is how JSON stores a tuple, as a tuple, and other values unchanged."""
    return tuple(value) if isinstance(value, list) else value
