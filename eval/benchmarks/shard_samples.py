"""Samples of a webdataset shard for evaluation: the members of the requested kinds, as bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from eval.base.tar_samples import tar_samples

__all__ = ["MAX_MEMBER_BYTES", "shard_samples"]

MAX_MEMBER_BYTES = 1 << 26  # 64 MB


def shard_samples(shard: Path, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, {suffix: bytes}) of each sample, with the members whose suffix (".jpg", ".syn.json") is wanted.

    A member above `MAX_MEMBER_BYTES` arrives as b"". For keys, suffixes and InputErrors see `tar_samples`.
    """
    for key, members in tar_samples(shard, lambda suffix: MAX_MEMBER_BYTES if is_wanted(f".{suffix}") else -1):
        wanted = {f".{suffix}": member.content or b"" for suffix, member in members.items()}
        yield key, {suffix: content for suffix, content in wanted.items() if is_wanted(suffix)}
