"""Pictures with classes in webdataset shards: tar files whose samples have a picture and a `.cls`, the class number.

Shards are streamed, never extracted. Only pictures and `.cls` members are read, and only up to a size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from eval.base.images import IMAGE_SUFFIXES, open_image
from eval.benchmarks.shard_samples import shard_samples
from eval.towers.features import Unreadable
from longclip_teacher.errors import InputError

__all__ = ["ShardImages"]


class ShardImages(IterableDataset):
    """(class, picture) from shards, each shard read by one worker. What cannot be read arrives as `Unreadable`."""

    def __init__(self, shards: Sequence[Path], num_classes: int, preprocess: Any) -> None:
        self.shards, self.num_classes, self.preprocess = shards, num_classes, preprocess

    def __iter__(self) -> Iterator[tuple[int, Tensor | Unreadable]]:
        worker = get_worker_info()
        shards = self.shards[worker.id :: worker.num_workers] if worker else self.shards
        for shard in shards:
            try:
                for key, members in shard_samples(shard, lambda suffix: suffix in IMAGE_SUFFIXES or suffix == ".cls"):
                    try:
                        yield self._label(members), self.preprocess(_picture(members))
                    except InputError as error:
                        yield 0, Unreadable(f"{shard}:{key}", f"{shard}:{key}: {error}")
            except InputError as error:
                yield 0, Unreadable(str(shard), str(error), fatal=True)

    def _label(self, members: dict[str, bytes]) -> int:
        text = members.get(".cls", b"").decode("ascii", errors="replace").strip()
        if not text.isdecimal() or int(text[:9]) >= self.num_classes:
            raise InputError(
                f"class {text[:20]!r} is not a number below {self.num_classes}" if text else "no .cls member"
            )
        return int(text)


def _picture(members: dict[str, bytes]) -> Any:
    pictures = [content for suffix, content in members.items() if suffix != ".cls"]
    if len(pictures) != 1:
        raise InputError(f"{len(pictures)} pictures in one sample")
    return open_image(pictures[0])
