"""What a cache holds of a list of shards: done, missing, damaged, or made from other contents."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias, get_args

from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import file_sha256
from training.cache.freshness import is_stale
from training.cache.manifest import CacheSettings, ShardIdentity, SidecarRecord, changes, sidecar_path
from training.cache.sidecar import Sidecar
from training.data.index import ShardIndex

__all__ = ["STATES", "State", "damage_of", "state_of"]

State: TypeAlias = Literal["done", "missing", "damaged", "changed"]
STATES: tuple[State, ...] = get_args(State)


def state_of(
    folder: Path,
    settings: CacheSettings,
    index: ShardIndex,
    place: int,
    identity: ShardIdentity,
    record: SidecarRecord | None,
) -> State:
    """Return the state of the index's shard number `place`. Reads its sidecar, and the shard if its file has another
    time than `record`."""
    path = sidecar_path(folder, identity.shard)
    if record is None or not path.is_file():
        return "missing"
    if changes(record, identity):
        return "changed"
    if damage_of(path, record.sha256):
        return "damaged"
    is_upright, is_touched = record.shard_changed_ns != 0, record.shard_changed_ns != identity.shard_changed_ns
    return "changed" if is_touched and is_stale(path, index, place, settings, is_upright=is_upright) else "done"


def damage_of(path: Path, sha256: str) -> list[str]:
    """Return one line for each damaged sample of a sidecar, or one for the file."""
    try:
        sidecar = Sidecar(path)
        if file_sha256(path) == sha256:
            return []
    except InputError as error:
        return [str(error)]
    return [f"{path} is damaged: {what}" for what in sidecar.damage()] or [f"{path} is damaged outside its samples"]
