"""Weight files: read without executing anything, checked strictly, written atomically.

`.safetensors` files are preferred; any other file goes through `torch.load(weights_only=True)`, which refuses pickled
code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longclip_teacher.atomic_files import atomic_file, previous_generation
from longclip_teacher.errors import InputError, warn_once
from longclip_teacher.state_dicts import find_state_dict

__all__ = [
    "RECOGNISED",
    "RUN_WEIGHTS",
    "WeightsFile",
    "content_sha256",
    "file_sha256",
    "load_strictly",
    "read_weights",
    "run_weights",
    "torch_load",
    "write_weights",
]

logger = logging.getLogger(__name__)
RECOGNISED = logging.getLogger("longclip_teacher.recognised")
"""Logs at INFO which model was recognised in a file that holds no configuration; the commands show it on stderr."""
RUN_WEIGHTS = ("best.safetensors", "last.safetensors")
"""The weight files of a run folder, in order of preference."""
# in the metadata of our safetensors files: the kind of checksum, and the checksum of everything else; two entries, so
# that damage to the name of one of them is found too
_CHECKSUM = ("checksum", "sha256")
_ANCESTRY = "ancestry"
_SAFE_TORCH_LOAD = (2, 10)  # weights_only=True had bypasses before this release


@dataclass(frozen=True)
class WeightsFile:
    """A weight file as read: the tensors by key, and the safetensors metadata (empty for torch files)."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    place: str = ""
    """Where in a torch file the state dict was, such as `state_dict_ema (an averaged copy)`; "" if the file is one."""
    checksum: str = ""
    """The `content_sha256` that the file itself vouches for and that was found to be right; "" for other files."""
    ancestry: str = ""
    """The record of the weights' ancestors (ancestry.py), as JSON; "" if the file holds none."""

    @cached_property
    def sha256(self) -> str:
        """Hash of the bytes of the file."""
        return file_sha256(self.path)

    @cached_property
    def content_sha256(self) -> str:
        """Hash of tensors and metadata. It does not depend on the record of ancestors."""
        return self.checksum or content_sha256(self.tensors, self.metadata)

    @property
    def remark(self) -> str:
        """What the recognised model's line adds: `, weights from state_dict`, or nothing."""
        return f", weights from {self.place}" if self.place else ""


def read_weights(path: str | Path) -> WeightsFile:
    """Read a state dict from `path` to the CPU.

    Accepts safetensors and torch files that hold a state dict, bare or as a trainer wrapped it (`state_dicts`); the
    prefixes of DDP and torch.compile are removed from the keys. If one of our files is damaged, and the one before it
    (`previous_generation`) is whole, a warning names the first and the second is read.

    Raises InputError in one line for a missing, damaged or executable file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no weight file at {path}")
    if path.suffix != ".safetensors":
        tensors, place = find_state_dict(torch_load(path), path)
        weights = WeightsFile(path, tensors, {}, place)
    else:
        try:
            weights = _read_safetensors(path)
        except _DamagedError as error:
            weights = _read_previous(path, error)
    known_by = f"sha256 of the contents {weights.checksum}" if weights.checksum else f"sha256 {weights.sha256}"
    logger.info("read %s (%d tensors, %s)", weights.path, len(weights.tensors), known_by)
    return weights


class _DamagedError(InputError):
    """A weight file that is not as it was written."""


def _read_safetensors(path: Path) -> WeightsFile:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise _DamagedError(f"{path} is not a whole safetensors file ({_first_line(error)}): fetch it again") from None
    recorded = [metadata.pop(name) for name in _CHECKSUM if name in metadata]
    ancestry = metadata.pop(_ANCESTRY, "")
    checksum = content_sha256(found, metadata) if recorded else ""
    if recorded and recorded != ["sha256", _sealed(checksum, ancestry)]:
        raise _DamagedError(f"{path} is damaged: its weights are not those that were written; copy or fetch it again")
    tensors = find_state_dict(found, path)[0] if found else found
    return WeightsFile(path, tensors, metadata, checksum=checksum, ancestry=ancestry if recorded else "")


def _read_previous(path: Path, error: _DamagedError) -> WeightsFile:
    """The weights before those of a damaged file; `error`, which tells of the damage, if they are not whole either."""
    previous = previous_generation(path)
    try:
        weights = _read_safetensors(previous) if previous.is_file() else None
    except InputError:
        raise InputError(f"{error}; {previous.name} is damaged too") from None
    if weights is None or not weights.checksum:
        raise error
    warn_once(logger, f"{path} is damaged (its checksum is not the one written): going on from {previous}")
    return weights


def run_weights(path: str | Path) -> Path:
    """The weight file in the run folder `path`: the best weights, or the last if no best weights were kept.

    A path that is not a folder comes back unchanged. Raises InputError for a folder that holds neither file.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in RUN_WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path} is a folder without {' or '.join(RUN_WEIGHTS)}: give a weight file or a run folder")


def torch_load(path: Path) -> object:
    """`torch.load(weights_only=True)` to the CPU, with one-line errors for TorchScript, pickled code and damage."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _SAFE_TORCH_LOAD:
        warnings.warn(
            f"torch {torch.__version__} reads untrusted .pt files less safely than 2.10; prefer safetensors",
            stacklevel=2,
        )
    if _is_torchscript(path):
        raise InputError(
            f"{path} is a TorchScript archive, which can run code: use the model's safetensors or state dict instead"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "allowed global" in str(error):
            raise InputError(
                f"{path} holds pickled code or objects, which is refused: export its tensors as safetensors"
            ) from None
        raise InputError(f"{path} is not a torch weight file") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, SafetensorError) as error:  # by the file's suffix
        raise InputError(f"{path} is not a whole torch weight file ({_first_line(error)}): fetch it again") from None


def write_weights(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], ancestry: str = ""
) -> None:
    """Write safetensors atomically: readers see the old file or the whole new one, also after a crash.

    Equal weights, metadata and ancestors give equal files. The metadata gain the record of ancestors, if there is one,
    and a checksum, which `read_weights` compares.
    """
    contents = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with atomic_file(Path(path)) as temporary:
        sealed = _sealed(content_sha256(contents, metadata), ancestry)
        added = {**dict(zip(_CHECKSUM, ("sha256", sealed), strict=True)), **({_ANCESTRY: ancestry} if ancestry else {})}
        try:
            save_file(contents, temporary, {**metadata, **added})
        except SafetensorError as error:  # its writer hides what the disk says
            raise InputError(f"cannot write {path} ({_first_line(error)}): the file before it is as it was") from None
        _sort_metadata(temporary)


def content_sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """A hash of tensors and metadata that depends on neither their order nor the layout of the file."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sealed(content: str, ancestry: str) -> str:
    """The checksum of a file whose `content_sha256` this is. It covers the record of ancestors, which is no part of
    what makes two models the same."""
    return hashlib.sha256(f"{content}\n{ancestry}".encode()).hexdigest() if ancestry else content


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order, in place: its writer takes them in a random one."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) > length:
            raise ValueError(f"{path}: the header grew from {length} to {len(ordered)} bytes")
        file.seek(8)
        file.write(ordered.ljust(length))


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """`load_state_dict(strict=True)` that fails with one line naming the first missing, unexpected, misshapen keys."""
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in tensors]
    unexpected = [key for key in tensors if key not in wanted]
    misshapen = [
        f"{key} is {tuple(tensors[key].shape)}, not {tuple(wanted[key].shape)}"
        for key in wanted
        if key in tensors and tensors[key].shape != wanted[key].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing keys", missing), ("unexpected keys", unexpected), ("wrong shapes", misshapen))
        if names
    ]
    if problems:
        raise InputError(f"{source} does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(dict(tensors), strict=True)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") or "/code/" in name for name in archive.namelist())


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, read a block at a time."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]
