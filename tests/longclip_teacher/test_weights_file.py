"""Our weight files: equal weights are equal files, and every damage is found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import content_sha256, read_weights, torch_load, write_weights

ANCESTRY = json.dumps([{"source": "a/naïve", "terms": "not known", "sha256": "12", "role": "weights"}])
METADATA = {"format": "ours", "kind": "teacher", "config": json.dumps({"name": "naïve"}), "a": "1", "z": "2", "m": "3"}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(4, 5, generator=generator),
        "half": torch.randn(3, generator=generator).half(),
        "brain": torch.randn(3, generator=generator).bfloat16(),
        "scale": torch.tensor(4.5),
        "count": torch.tensor(7),
    }


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    """The writer of safetensors takes metadata in a random order, a new one for each file."""
    plain, ours = set(), set()
    for number in range(12):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors(), path, dict(METADATA))
        plain.add(path.read_bytes())
        turned = dict(reversed(tensors().items())), dict(reversed(METADATA.items()))
        write_weights(path, *(turned if number % 2 else (tensors(), METADATA)))
        ours.add(path.read_bytes())
    assert len(plain) > 1 and len(ours) == 1
    read = read_weights(path)
    assert read.metadata == METADATA
    assert all(torch.equal(read.tensors[name], value) for name, value in tensors().items())
    assert load_file(path).keys() == read.tensors.keys(), "other readers read it too"


def test_the_hash_depends_on_values_names_types_shapes_and_metadata() -> None:
    base = tensors()
    others = [
        {**base, "weight": base["weight"] + 1e-6},
        {**base, "weight": base["weight"].reshape(5, 4)},
        {**base, "half": base["half"].view(torch.int16)},
        {**{name: value for name, value in base.items() if name != "scale"}, "other": base["scale"]},
    ]
    hashes = {content_sha256(found, METADATA) for found in (base, *others)} | {content_sha256(base, {"format": "ours"})}
    assert len(hashes) == 6


def test_the_record_of_ancestors_does_not_change_what_the_weights_are(tmp_path: Path) -> None:
    for name, ancestry in (("plain", ""), ("with", ANCESTRY), ("same", ANCESTRY)):
        write_weights(tmp_path / f"{name}.safetensors", tensors(), METADATA, ancestry)
    plain, with_record, same = (read_weights(tmp_path / f"{name}.safetensors") for name in ("plain", "with", "same"))
    assert plain.content_sha256 == with_record.content_sha256 == content_sha256(tensors(), METADATA)
    assert with_record.sha256 == same.sha256 != plain.sha256


def test_a_record_that_no_checksum_covers_is_not_believed(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "edited.safetensors", {**METADATA, "ancestry": ANCESTRY})
    assert read_weights(tmp_path / "edited.safetensors").ancestry == ""


@pytest.mark.parametrize("kind", ["flip", "zero", "cut"])
def test_every_damage_is_found(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_weights(path, tensors(), METADATA, ANCESTRY)
    whole = path.read_bytes()
    assert (read_weights(path).metadata, read_weights(path).ancestry) == (METADATA, ANCESTRY)
    missed = []
    for position in range(len(whole)):
        damaged = {
            "flip": whole[:position] + bytes([whole[position] ^ (1 << position % 8)]) + whole[position + 1 :],
            "zero": whole[:position] + bytes(8) + whole[position + 8 :],
            "cut": whole[:position],
        }[kind]
        if damaged == whole:
            continue
        path.write_bytes(damaged)
        try:
            read = read_weights(path)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            missed.append((position, read.metadata))
    assert missed == []


def test_files_without_a_checksum_are_read(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "published.safetensors", {"format": "pt"})
    assert read_weights(tmp_path / "published.safetensors").metadata == {"format": "pt"}


def test_what_is_no_safetensors_file_but_has_its_name_is_refused_in_one_line(tmp_path: Path) -> None:
    """torch's reader looks at the suffix, but for that of the oldest versions, which looks at the contents."""
    torch.save({"step": 1}, tmp_path / "last.safetensors")
    try:
        content = torch_load(tmp_path / "last.safetensors")
    except InputError as error:
        assert re.fullmatch(r".*last\.safetensors is not a whole torch weight file \([^\n]+\).*", str(error))
    else:
        assert content == {"step": 1}
