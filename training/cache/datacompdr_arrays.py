"""The features in a sample of DataCompDR: float arrays from an untrusted npz or gzipped torch file.

Sizes are bounded before anything is unpacked, and only tensors are unpickled.
"""

from __future__ import annotations

import functools
import io
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np
import torch

from training.data.index import RawSample
from training.data.samples import BadSample

__all__ = ["stored_arrays", "two_dimensional"]

_MAX_UNPACKED_BYTES = 16 << 20


def stored_arrays(raw: RawSample) -> dict[str, np.ndarray]:
    """Return all float arrays of the npz, or of the pth.gz if there is no npz."""
    for name, read in (("npz", _read_npz), ("pth.gz", _read_pth)):
        if name in raw.extra:
            try:
                return read(raw.extra[name])
            except Exception:  # zipfile, numpy and torch may raise anything; either way the features are unusable
                raise BadSample(f"{name} is damaged") from None
    raise BadSample("no npz or pth.gz, or one of more than 4 MB")


def two_dimensional(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Return the two-dimensional array `name`."""
    if name not in arrays:
        raise BadSample(f"no {name} among the features")
    if arrays[name].ndim != 2 or not arrays[name].shape[1]:
        raise BadSample(f"{name} is not two-dimensional")
    return arrays[name]


def _read_npz(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of an npz as np.load(allow_pickle=False) reads them, but with a bound on the bytes.

    numpy does not know bfloat16, so its two bytes identify it: void (as ml_dtypes writes it) or uint16.
    """
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        _check_archive(archive)
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if not name.endswith("_emb"):
                continue
            member = archive.read(entry)
            end = 10 + int.from_bytes(member[8:10], "little")
            shape, dtype = _npy_header(member[:end])
            array = np.frombuffer(member, dtype, offset=end).reshape(shape)
            is_bfloat16 = dtype.itemsize == 2 and dtype.kind in "uV"
            arrays[name] = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32) if is_bfloat16 else array
    return arrays


@functools.lru_cache(maxsize=64)  # parsing takes longer than all the rest, and most samples have the same header
def _npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and type of an array in numpy's format 1.0, the one such arrays use. Raise ValueError for any
    other."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array of another format than 1.0")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if is_fortran or dtype.hasobject or dtype.kind not in "fuV":
        raise ValueError("not an array of floats")
    return shape, dtype


def _read_pth(data: bytes) -> dict[str, np.ndarray]:
    """Return the tensors of a gzipped `torch.save({name: tensor})`."""
    unpacked = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS).decompress(data, _MAX_UNPACKED_BYTES)  # 16: gzip
    with zipfile.ZipFile(
        io.BytesIO(unpacked)
    ) as archive:  # torch's older format is not a zip and cannot be bounded: an error
        _check_archive(archive)
    tensors = torch.load(io.BytesIO(unpacked), map_location="cpu", weights_only=True)
    return {name: torch.as_tensor(value).float().numpy() for name, value in tensors.items() if name.endswith("_emb")}


def _check_archive(archive: zipfile.ZipFile) -> None:
    entries = archive.infolist()
    if sum(entry.file_size for entry in entries) > _MAX_UNPACKED_BYTES:
        raise ValueError("an archive that unpacks to too much")
    if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
        raise ValueError("an archive packed in an unknown way")
