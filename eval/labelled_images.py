"""Pictures with classes: a folder of class folders (ImageFolder), or webdataset shards of .jpg + .cls pairs.

ImageNet is known by its folders' names (synsets such as n01440764): they have open_clip's class names, and some of the
1000 folders are enough. Shards are streamed, never extracted; of their members only pictures and `.cls` are read, and
only up to a size.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from open_clip import IMAGENET_CLASSNAMES
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from eval.features import ImageFiles, Unreadable
from eval.images import IMAGE_SUFFIXES, is_picture, open_image
from longclip_teacher.errors import InputError

__all__ = ["LabelledImages", "find_labelled_images"]

NUM_IMAGENET_VAL = 50_000
MAX_MEMBER_BYTES = 1 << 26  # of one picture in a shard: 64 MB


@dataclass(frozen=True)
class LabelledImages:
    """A test set for classification: class c is called `classnames[c]`; the pictures are `files` or lie in `shards`."""

    name: str
    classnames: list[str]
    files: list[tuple[Path, int]]
    shards: list[Path]
    num_expected: int | None = None
    """How many pictures the benchmark has, where it is a known one."""

    def dataset(self, preprocess: Any) -> Dataset:
        """(class, picture) by index for files, as a stream for shards."""
        if self.files:
            return ImageFiles(self.files, preprocess)
        return ShardImages(self.shards, len(self.classnames), preprocess)


def find_labelled_images(source: str | Path, classnames: Sequence[str] | None = None) -> LabelledImages:
    """The pictures of a folder of class folders, or of shards (`DIR/*.tar`, or a folder of them).

    `classnames` are in the sorted order of the folders, or of the shards' class numbers. Left out, they are ImageNet's
    for synset folders and for shards, and otherwise the folders' names with `_` and `-` as spaces.
    """
    root = Path(source)
    if not root.is_dir():
        return _from_shards(sorted(root.parent.glob(root.name)), source, classnames)
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if folders:
        return _from_folders(root, folders, classnames)
    if any(is_picture(path) for path in root.iterdir()):
        raise InputError(
            f"{root} holds pictures but no class folders: move them into one folder a class (n01440764/...)"
        )
    return _from_shards(sorted(root.glob("*.tar")), source, classnames)


def _from_folders(root: Path, folders: list[Path], classnames: Sequence[str] | None) -> LabelledImages:
    synsets = ImageNetInfo().label_names()
    name, num_expected = str(root), None
    if classnames is not None:
        classes = list(range(len(folders)))
        if len(classnames) != len(folders):
            raise InputError(
                f"{len(classnames)} class names for the {len(folders)} class folders of {root}: give one each"
            )
    elif all(folder.name in synsets for folder in folders):
        classes = [synsets.index(folder.name) for folder in folders]
        classnames = IMAGENET_CLASSNAMES
        name = (
            "imagenet"
            if len(folders) == len(synsets)
            else f"imagenet ({len(folders)} of {len(synsets)} classes' pictures)"
        )
        num_expected = NUM_IMAGENET_VAL if len(folders) == len(synsets) else None
    else:
        classes = list(range(len(folders)))
        classnames = [folder.name.replace("_", " ").replace("-", " ") for folder in folders]
    files: list[tuple[Path, int]] = []
    for folder, number in zip(folders, classes, strict=True):
        pictures = sorted(path for path in folder.rglob("*") if is_picture(path))
        if not pictures:
            raise InputError(f"class folder {folder} holds no picture")
        files += [(picture, number) for picture in pictures]
    return LabelledImages(name, list(classnames), files, [], num_expected)


def _from_shards(paths: list[Path], source: str | Path, classnames: Sequence[str] | None) -> LabelledImages:
    shards = [path for path in paths if path.suffix == ".tar"]
    if not shards:
        raise InputError(f"no class folders and no .tar shards at {source}")
    if classnames is not None:
        return LabelledImages(str(source), list(classnames), [], shards)
    return LabelledImages("imagenet", list(IMAGENET_CLASSNAMES), [], shards, NUM_IMAGENET_VAL)


class ShardImages(IterableDataset):
    """(class, picture) from shards, each shard read by one worker; what cannot be read arrives as `Unreadable`."""

    def __init__(self, shards: Sequence[Path], num_classes: int, preprocess: Any) -> None:
        self.shards, self.num_classes, self.preprocess = shards, num_classes, preprocess

    def __iter__(self) -> Iterator[tuple[int, Tensor | Unreadable]]:
        worker = get_worker_info()
        shards = self.shards[worker.id :: worker.num_workers] if worker else self.shards
        for shard in shards:
            try:
                for key, members in _samples(shard):
                    try:
                        yield self._label(members), self.preprocess(_picture(members))
                    except InputError as error:
                        yield 0, Unreadable(f"{shard}:{key}", f"{shard}:{key}: {error}")
            except (tarfile.TarError, OSError, EOFError) as error:
                yield (
                    0,
                    Unreadable(str(shard), f"{shard} is not a whole tar file ({error}): fetch it again", fatal=True),
                )

    def _label(self, members: dict[str, bytes]) -> int:
        text = members.get(".cls", b"").decode("ascii", errors="replace").strip()
        if not text.isdecimal() or int(text[:9]) >= self.num_classes:
            raise InputError(f"class {text[:20]!r} is no number below {self.num_classes}" if text else "no .cls member")
        return int(text)


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {suffix: bytes}) of members in a row with one key: their path up to its first dot, as in webdataset."""
    with shard.open("rb") as file:  # tarfile takes a file cut between two members or within a header for a whole one
        size = file.seek(0, 2)
        file.seek(max(0, size - tarfile.BLOCKSIZE))
        if size % tarfile.BLOCKSIZE or any(file.read()):
            raise tarfile.ReadError("its end is missing")
    with tarfile.open(shard, "r|") as archive:
        members = (member for member in archive if member.isfile())
        for key, group in groupby(members, key=lambda member: _split(member.name)[0]):
            content: dict[str, bytes] = {}
            for member in group:
                suffix = _split(member.name)[1]
                if suffix in IMAGE_SUFFIXES or suffix == ".cls":
                    stream = archive.extractfile(member)
                    content[suffix] = stream.read() if stream is not None and member.size <= MAX_MEMBER_BYTES else b""
            yield key, content


def _split(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    stem, dot, suffix = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, (dot + suffix).lower()


def _picture(members: dict[str, bytes]) -> Any:
    pictures = [content for suffix, content in members.items() if suffix != ".cls"]
    if len(pictures) != 1:
        raise InputError(f"{len(pictures)} pictures in one sample")
    return open_image(pictures[0])
