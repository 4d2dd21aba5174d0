"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their binary version. The python version is pickle, which runs code.

A picture is a record of label bytes (CIFAR-10: the class; CIFAR-100: the superclass, then the class) and 3072 pixel
bytes: the red, the green and the blue plane of 32 x 32, row by row.

Shapes: N pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from eval.benchmarks.annotation_files import read_text
from longclip_teacher.errors import InputError

__all__ = ["CIFAR_VERSIONS", "CifarImages", "CifarPictures", "CifarVersion", "read_cifar"]

HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"
SIDE = 32
_PIXEL_BYTES = 3 * SIDE * SIDE


@dataclass(frozen=True)
class CifarVersion:
    """The files and sizes of one of the two sets."""

    title: str
    folder: str
    archive: str
    names_file: str
    files: dict[str, tuple[str, ...]]
    """File names by split."""
    num_classes: int
    num_label_bytes: int
    python_folder: str
    num_images: dict[str, int]


CIFAR_VERSIONS = {
    "cifar10": CifarVersion(
        title="CIFAR-10",
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        names_file="batches.meta.txt",
        files={"test": ("test_batch.bin",), "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6))},
        num_classes=10,
        num_label_bytes=1,
        python_folder="cifar-10-batches-py",
        num_images={"test": 10_000, "train": 50_000},
    ),
    "cifar100": CifarVersion(
        title="CIFAR-100",
        folder="cifar-100-binary",
        archive="cifar-100-binary.tar.gz",
        names_file="fine_label_names.txt",
        files={"test": ("test.bin",), "train": ("train.bin",)},
        num_classes=100,
        num_label_bytes=2,
        python_folder="cifar-100-python",
        num_images={"test": 10_000, "train": 50_000},
    ),
}


@dataclass(frozen=True)
class CifarPictures:
    """The pictures: `pixels` in RGB, and `targets`, the number of each picture's class in `classnames`."""

    pixels: UInt8[np.ndarray, "N 32 32 3"]
    targets: Int64[np.ndarray, " N"]
    classnames: list[str]


class CifarImages(Dataset):
    """(class, picture) by index."""

    def __init__(self, pictures: CifarPictures, preprocess: Any) -> None:
        self.pictures, self.preprocess = pictures, preprocess

    def __len__(self) -> int:
        return len(self.pictures.targets)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return int(self.pictures.targets[index]), self.preprocess(Image.fromarray(self.pictures.pixels[index]))


def read_cifar(root: Path, version: CifarVersion, split: Literal["test", "train"]) -> CifarPictures:
    """Read a split of the binary version, in `root` or in its folder of that name. Class names have spaces for `_`.

    Raise InputError that says what is missing, or which record is invalid.
    """
    folder = root / version.folder if (root / version.folder).is_dir() else root
    files = [folder / name for name in version.files[split]]
    missing = [path for path in (*files, folder / version.names_file) if not path.is_file()]
    if missing:
        raise InputError(_what_to_fetch(root, version, missing[0]))
    classnames = [line.strip().replace("_", " ") for line in read_text(folder / version.names_file).splitlines()]
    classnames = [name for name in classnames if name]
    if len(classnames) != version.num_classes:
        raise InputError(
            f"{folder / version.names_file} has {len(classnames)} class names, but {version.title} has "
            f"{version.num_classes}"
        )
    records = np.concatenate([_read_records(path, version) for path in files])
    targets = records[:, version.num_label_bytes - 1].astype(np.int64)
    if targets.max() >= version.num_classes:
        first = int(np.argmax(targets >= version.num_classes))
        raise InputError(
            f"{folder}: picture {first} of the {split} split has class {targets[first]}, but {version.title} has "
            f"{version.num_classes}"
        )
    planes = records[:, version.num_label_bytes :].reshape(-1, 3, SIDE, SIDE)  # [N,3,32,32]
    return CifarPictures(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), targets, classnames)  # [N,32,32,3]


def _read_records(path: Path, version: CifarVersion) -> UInt8[np.ndarray, "N bytes"]:
    record_bytes = version.num_label_bytes + _PIXEL_BYTES
    most = max(version.num_images.values()) * record_bytes
    size = path.stat().st_size
    if size == 0 or size % record_bytes or size > most:
        raise InputError(
            f"{path} is not a {version.title} file: it has {size} bytes, not records of {record_bytes} bytes, "
            f"at most {most} bytes"
        )
    return np.fromfile(path, dtype=np.uint8).reshape(-1, record_bytes)


def _what_to_fetch(root: Path, version: CifarVersion, missing: Path) -> str:
    binary = f"fetch the binary version ({version.archive} at {HOME}) and unpack it there"
    is_python = (root / version.python_folder).is_dir() or root.name == version.python_folder
    if is_python or (root / missing.stem).is_file():  # test_batch and test are the python version's file names
        return f"{root} holds {version.title}'s python version, which is pickle and can run code: {binary}"
    return f"no {missing.name} in {missing.parent}: {version.title} is read from {version.folder}/; {binary}"
