"""Features on disk: what a model makes of a set of pictures or captions, kept under what they depend on.

A key is a hash of the weights, the model's structure and settings, our code, the library versions, the precision, and
the contents of the pictures or captions in their order. Nothing is guessed from names or times of files.
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

__all__ = ["FeatureCache"]

_LIBRARIES = ("torch", "torchvision", "timm", "open_clip_torch", "pillow")
_CODE = (Path(__file__).parents[1], Path(longclip_teacher.__file__).parent, Path(mobileclip_student.__file__).parent)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the representation of a function
_PROBE = "A photo of 3 naïve cats; it's 'Élan' & <em>more</em>, 中文"  # tokenised, it tells tokenizers apart
_CHUNK = 1 << 20  # bytes of a picture read at a time
_NUM_THREADS = min(16, os.cpu_count() or 1)  # hashing leaves Python's lock


class FeatureCache:
    """A folder of features, one safetensors file a key; files may be deleted at any time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def image_key(self, model: ClipModel, paths: Sequence[Path], precision: str) -> str:
        """The key of the features of these pictures, in this order, by their contents."""
        return _hash(["pictures", _model_hash(model), precision, *_in_threads(_file_hash, paths)])

    def caption_key(self, model: ClipModel, captions: Sequence[str], precision: str) -> str:
        """The key of the features of these captions, in this order."""
        return _hash(["captions", _model_hash(model), precision, *captions])

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The tensors kept under `key`, on the CPU; None, with a line on stderr, where the file is damaged."""
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
        print(f"warning: {path} is damaged and made anew ({reason})", file=sys.stderr)
        return None

    def save(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep `tensors` under `key`: whole or not at all. A folder that cannot be written costs a line on stderr."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        try:
            with atomic_file(self._path(key)) as temporary:
                save_file(tensors, temporary, {"sha256": _tensors_hash(tensors)})
        except (InputError, OSError, SafetensorError) as error:
            print(f"warning: features are not kept in {self.folder} ({error})", file=sys.stderr)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def _model_hash(model: ClipModel) -> str:
    """Everything about a model that its features depend on: weights, structure, settings, code, libraries, device."""
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
    """Names, types, shapes and bytes."""
    names = sorted(tensors)
    heads = [f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}" for name in names]
    return _hash([*heads, *_in_threads(_tensor_hash, [tensors[name] for name in names])])


def _tensor_hash(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()


def _file_hash(path: Path) -> str:
    """Of a file's contents; of one that cannot be read, a word that is no hash."""
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
    """Of a list of texts, each with its length: no two lists run together to the same bytes."""
    found = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        found.update(len(content).to_bytes(8, "little") + content)
    return found.hexdigest()
