"""Pictures with classes: known test sets, any folder of class folders (ImageFolder), shards of .jpg + .cls pairs.

With `auto`, ImageNet is recognised by its folders' names (synsets such as n01440764, some of which are enough), and
ImageNet-V2 by its thousand folders 0 to 999. A data set requested by name must be complete: a folder that does not fit
it is refused with what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from eval.base.folders import find_pictures, matching_paths, subfolders, tell_passed_over
from eval.base.images import is_picture
from eval.benchmarks.cifar import CIFAR_VERSIONS, CifarImages, CifarPictures, read_cifar
from eval.benchmarks.class_folders import refuse_parent_folder
from eval.benchmarks.dataset_names import DatasetName
from eval.benchmarks.imagenet_classes import IMAGENET_SETS, imagenet_synsets
from eval.benchmarks.labelled_shards import ShardImages
from eval.towers.features import ImageFiles
from longclip_teacher.errors import InputError

__all__ = ["LabelledImages", "Split", "find_labelled_images"]

Split = Literal["test", "train"]


@dataclass(frozen=True)
class LabelledImages:
    """Pictures for classification; class c is called `classnames[c]`. They are `files`, or in `shards`, or `cifar`."""

    name: str
    source: str
    """Where they were found."""
    classnames: list[str]
    files: list[tuple[Path, int]] | None = None
    """(picture, class)."""
    shards: list[Path] | None = None
    cifar: CifarPictures | None = None
    title: str = ""
    num_expected: int | None = None
    """The number of pictures in the benchmark `title`, if it is a known one."""

    def dataset(self, preprocess: Any) -> Dataset:
        """Return (class, picture) by index, but for shards as a stream."""
        if self.files is not None:
            return ImageFiles(self.files, preprocess)
        if self.cifar is not None:
            return CifarImages(self.cifar, preprocess)
        assert self.shards is not None
        return ShardImages(self.shards, len(self.classnames), preprocess)

    def count_mismatch(self, num_found: int) -> str | None:
        """Return a warning if a known benchmark has another number of pictures than were found."""
        if self.num_expected is None or num_found == self.num_expected:
            return None
        return f"{self.title} has {self.num_expected} pictures, but {num_found} were found: do not compare the figure"


def find_labelled_images(
    source: str | Path,
    classnames: Sequence[str] | None = None,
    dataset: DatasetName = "auto",
    split: Split = "test",
) -> LabelledImages:
    """Find the pictures of a folder of class folders, of shards (`DIR/*.tar`, or a folder of them), or of a known set.

    `classnames` replace a known set's own, in the order of its class numbers; otherwise they follow the sorted order of
    the folders, or of the shards' class numbers. If all folders are named by numbers, folder N is called by line N,
    counted from 0 (a part of the folders is enough); if there is no such line, the names follow the numbers' order.
    By default they are ImageNet's for synset folders and for shards, and otherwise the folders' names with `_` and `-`
    as spaces. `folder` takes folder names as they are, including synsets. `split` matters to CIFAR, whose two splits
    share a folder; for the other sets, only the test split has a known number of pictures. Raise InputError with what
    is missing, and for the folder above train/ and val/.
    """
    if dataset in CIFAR_VERSIONS:
        return _from_cifar(Path(source), classnames, dataset, split)
    root = Path(source)
    if not root.is_dir():
        return _from_shards(matching_paths(root), source, classnames, dataset, split)
    folders = subfolders(root)
    if not folders and any(is_picture(path) for path in root.iterdir()):
        raise InputError(
            f"{root} holds pictures but no class folders: move them into one folder per class (n01440764/...)"
        )
    if not folders:
        return _from_shards(matching_paths(root / "*.tar"), source, classnames, dataset, split)
    refuse_parent_folder(root, folders, dataset)
    if dataset == "auto" and classnames is None:
        names = {folder.name for folder in folders}
        if names == set(IMAGENET_SETS["imagenet_v2"].folders()):
            dataset = "imagenet_v2"
        elif names == set(imagenet_synsets()):
            dataset = "imagenet"
        elif names < set(imagenet_synsets()):
            return _from_some_synsets(root, folders)
    if dataset in IMAGENET_SETS:
        return _from_imagenet_set(root, folders, classnames, dataset, split)
    return _from_folders(root, folders, classnames)


def _from_folders(root: Path, folders: list[Path], classnames: Sequence[str] | None) -> LabelledImages:
    if classnames is None:
        names = [folder.name.replace("_", " ").replace("-", " ") for folder in folders]
        return LabelledImages(str(root), str(root), names, files=_class_files(root, folders, range(len(folders))))
    places = _places(folders)
    if places is not None and max(places) < len(classnames):
        some = f" ({len(folders)} of {len(classnames)} classes' pictures)" if len(folders) < len(classnames) else ""
        files = _class_files(root, folders, places)
        return LabelledImages(f"{root}{some}", str(root), list(classnames), files=files)
    if len(classnames) != len(folders):
        raise InputError(f"{len(classnames)} class names for the {len(folders)} class folders of {root}: give one each")
    if places is not None:
        folders = sorted(folders, key=lambda folder: int(folder.name))
    return LabelledImages(
        str(root), str(root), list(classnames), files=_class_files(root, folders, range(len(folders)))
    )


def _places(folders: list[Path]) -> list[int] | None:
    """Return the numbers that the folders are named by, or None if not all are numbers, or two are the same."""
    if not all(folder.name.isascii() and folder.name.isdecimal() for folder in folders):
        return None
    places = [int(folder.name) for folder in folders]
    return places if len(set(places)) == len(places) else None


def _from_some_synsets(root: Path, folders: list[Path]) -> LabelledImages:
    synsets = imagenet_synsets()
    return LabelledImages(
        name=f"imagenet ({len(folders)} of {len(synsets)} classes' pictures)",
        source=str(root),
        classnames=IMAGENET_SETS["imagenet"].classnames(),
        files=_class_files(root, folders, [synsets.index(folder.name) for folder in folders]),
    )


def _from_imagenet_set(
    root: Path, folders: list[Path], classnames: Sequence[str] | None, dataset: str, split: Split
) -> LabelledImages:
    entry = IMAGENET_SETS[dataset]
    wanted, found = entry.folders(), {folder.name for folder in folders}
    missing = [number for number, name in enumerate(wanted) if name not in found]
    foreign = sorted(found - set(wanted))
    if missing:
        raise InputError(
            f"{root} is not {entry.title}: {len(missing)} of its {len(wanted)} class folders are missing, the first: "
            f"{wanted[missing[0]]} ({entry.classnames()[missing[0]]})"
        )
    if foreign:
        raise InputError(
            f"{root} is not {entry.title}: {len(foreign)} folders are not among its {len(wanted)} classes, "
            f"the first: {foreign[0]}"
        )
    return LabelledImages(
        name=dataset,
        source=str(root),
        classnames=_own_names(classnames, entry.classnames(), entry.title),
        files=_class_files(root, [root / name for name in wanted], range(len(wanted))),
        title=entry.title,
        num_expected=entry.num_images if split == "test" else None,
    )


def _from_shards(
    paths: list[Path], source: str | Path, classnames: Sequence[str] | None, dataset: str, split: Split
) -> LabelledImages:
    shards = [path for path in paths if path.suffix == ".tar"]
    if not shards:
        raise InputError(f"no class folders and no .tar shards at {source}")
    if dataset not in IMAGENET_SETS and classnames is not None:
        return LabelledImages(str(source), str(source), list(classnames), shards=shards)
    if dataset == "folder":
        raise InputError(f"shards only number their classes: name those of {source} with --classnames FILE")
    name = "imagenet" if dataset == "auto" else dataset
    entry = IMAGENET_SETS[name]
    return LabelledImages(
        name=name,
        source=str(source),
        classnames=_own_names(classnames, entry.classnames(), entry.title),
        shards=shards,
        title=entry.title,
        num_expected=entry.num_images if split == "test" else None,
    )


def _from_cifar(root: Path, classnames: Sequence[str] | None, dataset: str, split: Split) -> LabelledImages:
    version = CIFAR_VERSIONS[dataset]
    pictures = read_cifar(root, version, split)
    return LabelledImages(
        name=dataset,
        source=str(root),
        classnames=_own_names(classnames, pictures.classnames, version.title),
        cifar=pictures,
        title=f"{version.title}'s {split} split",
        num_expected=version.num_images[split],
    )


def _own_names(given: Sequence[str] | None, own: list[str], title: str) -> list[str]:
    if given is None:
        return own
    if len(given) != len(own):
        raise InputError(f"{len(given)} class names for the {len(own)} classes of {title}: give one each")
    return list(given)


def _class_files(root: Path, folders: Sequence[Path], numbers: Sequence[int]) -> list[tuple[Path, int]]:
    files: list[tuple[Path, int]] = []
    passed_over: list[str] = []
    for folder, number in zip(folders, numbers, strict=True):
        found = find_pictures(folder, root)
        names = sorted(found.files + found.missing)
        passed_over += [f"{folder.name}/{link}" for link in found.passed_over]
        if not names:
            tell_passed_over(root, passed_over)
            raise InputError(f"class folder {folder} holds no picture")
        files += [(folder / name, number) for name in names]
    tell_passed_over(root, passed_over)
    return files
