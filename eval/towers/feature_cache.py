"""Features of pictures and captions on disk, stored under a key of everything they depend on.

The key is a hash of the weights, the model's structure and settings, our code, the library versions, the precision, and
the contents of the pictures or captions in their order. File names and times play no part.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import longclip_teacher
import mobileclip_student
from eval.towers.models import ClipModel
from longclip_teacher.atomic_files import atomic_file
from longclip_teacher.errors import InputError
from longclip_teacher.temporaries import remove_leftovers

__all__ = ["FeatureCache"]

_LIBRARIES = ("torch", "torchvision", "timm", "open_clip_torch", "pillow")
_CODE = (Path(__file__).parents[1], Path(longclip_teacher.__file__).parent, Path(mobileclip_student.__file__).parent)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # an address in the representation of a function
_PROBE = "A photo of 3 naïve cats; it's 'Élan' & <em>more</em>, 中文"  # its tokens tell tokenizers apart
_CHUNK = 1 << 20  # bytes of a picture read at a time
_NUM_THREADS = min(16, os.cpu_count() or 1)  # hashing releases Python's lock


class FeatureCache:
    """A folder of features with one safetensors file per key. Files may be deleted at any time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        remove_leftovers(self.folder, is_shared=True)

    def image_key(self, model: ClipModel, paths: Sequence[Path], precision: str) -> str:
        """The key for the features of these pictures (their contents, in this order)."""
        return _hash(["pictures", _model_hash(model), precision, *_in_threads(_file_hash, paths)])

    def caption_key(self, model: ClipModel, captions: Sequence[str], precision: str, longest: int = 0) -> str:
        """The key for the features of these captions, in this order, cut at `longest` tokens (0: not cut)."""
        return _hash(["captions", _model_hash(model), precision, str(longest), *captions])

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The tensors stored under `key`, on the CPU; None if there are none. A damaged file counts as none, and stderr
        says so."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                if (file.metadata() or {}).get("sha256") == _tensors_hash(tensors):
                    return tensors
            reason = "its contents have changed"
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
        print(f"warning: {path} is damaged ({reason}): the features are computed again", file=sys.stderr)
        return None

    def save(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Store `tensors` under `key`, whole or not at all. If the folder cannot be written, stderr says so."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        try:
            with atomic_file(self._path(key)) as temporary:
                save_file(tensors, temporary, {"sha256": _tensors_hash(tensors)})
        except (InputError, OSError, SafetensorError) as error:
            print(f"warning: features are not kept in {self.folder} ({error})", file=sys.stderr)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def _model_hash(model: ClipModel) -> str:
    """Hash of everything that a model's features depend on: weights, structure, settings, code, libraries, device."""
    settings = [
        f"{name}.{key}={value!r}"
        for name, module in model.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str)) and key != "training" and not key.startswith("_")
    ]
    parts = [
        f"{type(model).__module__}.{type(model).__qualname__}",
        repr(model),
        repr(getattr(model, "config", None)),
        repr(model.preprocess),
        str(model.context_length),
        repr(model.tokenizer([_PROBE], model.context_length).tolist()),
        *settings,
        *(f"{name} {version(name)}" for name in _LIBRARIES),
        next(model.parameters()).device.type,
        torch.get_float32_matmul_precision(),
        *_in_threads(_file_hash, sorted(path for folder in _CODE for path in folder.rglob("*.py"))),
    ]
    return _hash([*(_ADDRESS.sub("", part) for part in parts), _tensors_hash(model.state_dict())])


def _tensors_hash(tensors: dict[str, Tensor]) -> str:
    """Hash of names, types, shapes and bytes."""
    names = sorted(tensors)
    heads = [f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}" for name in names]
    return _hash([*heads, *_in_threads(_tensor_hash, [tensors[name] for name in names])])


def _tensor_hash(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()


def _file_hash(path: Path) -> str:
    """Hash of a file's contents, or `unreadable`."""
    if not path.is_file():
        return "unreadable"
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
    except OSError:
        return "unreadable"
    return found.hexdigest()


def _in_threads(function: Callable[[Any], str], items: Iterable[Any]) -> list[str]:
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(function, items))


def _hash(parts: Iterable[str]) -> str:
    """Hash of a list of texts. Each goes in with its length, so that no two lists give the same bytes."""
    found = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        found.update(len(content).to_bytes(8, "little") + content)
    return found.hexdigest()
