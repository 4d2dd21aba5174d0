"""Students saved by us, names on the hub, and files that are something else."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

import mobileclip_student.checkpoint as checkpoint
from longclip_teacher import create_teacher, save_teacher
from longclip_teacher.errors import InputError
from longclip_teacher.positions import stretch_positions
from mobileclip_student import MobileCLIP, create_student, load_student, save_student


@pytest.fixture(scope="module")
def student() -> MobileCLIP:
    torch.manual_seed(0)
    return create_student("tiny", context_length=77)


@pytest.fixture(scope="module")
def path(student: MobileCLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "student.safetensors"
    save_student(student, path)
    return path


def test_round_trip(student: MobileCLIP, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        loaded = load_student(path)
    assert "longclip_teacher.recognised" not in {name for name, _, _ in caplog.record_tuples}  # it says what it is
    assert loaded.config == student.config and not loaded.training
    for name, tensor in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@torch.no_grad()
def test_context_length_and_pad_mask_can_be_changed(student: MobileCLIP, path: Path, captions: Callable) -> None:
    table = student.text_encoder.positional_embedding
    stretched = load_student(path, context_length=248, pad_mask=False)
    assert (stretched.context_length, stretched.pad_mask) == (248, False)
    assert torch.equal(stretched.text_encoder.positional_embedding, stretch_positions(table, 248))
    cut = load_student(path, context_length=30)
    assert torch.equal(cut.text_encoder.positional_embedding, table[:30])
    tokens = captions(25, width=77)
    torch.testing.assert_close(cut.encode_text(tokens), student.eval().encode_text(tokens), rtol=0, atol=1e-5)


def test_only_77_positions_are_stretched(tmp_path: Path) -> None:
    save_student(create_student("tiny", context_length=50), tmp_path / "s.safetensors")
    with pytest.raises(InputError, match="50 positions"):
        load_student(tmp_path / "s.safetensors", context_length=248)


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"kind": "teacher"}, "teacher"),
        ({"config": "{"}, "no readable configuration"),
        ({"config": "[]"}, "not a student configuration"),
        ({"config": json.dumps({"variant": "tiny"})}, "image"),
    ],
)
def test_broken_metadata_is_one_line(path: Path, tmp_path: Path, metadata: dict[str, str], complaint: str) -> None:
    complete = {"format": "compact-longclip", "kind": "student", **metadata}
    save_file(load_file(path), tmp_path / "broken.safetensors", complete)
    with pytest.raises(InputError, match=complaint):
        load_student(tmp_path / "broken.safetensors")


def test_a_configuration_may_not_ask_for_all_memory(path: Path, student: MobileCLIP, tmp_path: Path) -> None:
    values = student.config.to_dict()
    values["text"]["width"] = 10**9
    metadata = {"format": "compact-longclip", "kind": "student", "config": json.dumps(values)}
    save_file(load_file(path), tmp_path / "huge.safetensors", metadata)
    with pytest.raises(InputError, match="text tower"):
        load_student(tmp_path / "huge.safetensors")


def test_another_variant_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match=r"variant tiny, not s0"):
        load_student(path, variant="s0")


def test_files_that_are_not_students(tmp_path: Path) -> None:
    save_file({"visual.conv1.weight": torch.zeros(2)}, tmp_path / "clip.safetensors")
    with pytest.raises(InputError, match=r"is not a MobileCLIP.*visual\.conv1\.weight"):
        load_student(tmp_path / "clip.safetensors")
    save_file({"visual.trunk.x": torch.zeros(2)}, tmp_path / "parts.safetensors")
    with pytest.raises(InputError, match="fits none of the variants"):
        load_student(tmp_path / "parts.safetensors")
    for name in (tmp_path / "missing.pt", "missing/mobileclip_s0.pt", "nowhere"):
        with pytest.raises(InputError, match="no weight file at"):
            load_student(name)


def test_a_run_folder_stands_for_its_weights(student: MobileCLIP, tmp_path: Path) -> None:
    save_student(student, tmp_path / "last.safetensors")
    assert torch.equal(load_student(tmp_path).logit_scale, student.logit_scale)
    best = create_student(student.config)
    best.logit_scale.data.fill_(1.5)
    save_student(best, tmp_path / "best.safetensors")
    assert load_student(str(tmp_path)).logit_scale.item() == 1.5


def test_other_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder without best\.safetensors or last\.safetensors: give a"):
        load_student(tmp_path)
    save_teacher(create_teacher("tiny", context_length=32), tmp_path / "best.safetensors")
    with pytest.raises(InputError, match="holds a teacher, not a student: load it with load_teacher"):
        load_student(tmp_path)


def test_ambiguous_weights_ask_for_the_variant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoint, "fits", lambda _tensors, config: config.variant in ("s2", "mobileclip2_s2"))
    save_file({"visual.trunk.x": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="could be mobileclip2_s2 or s2"):
        load_student(tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("mobileclip_s0.pt", "s0"),
        ("checkpoints/mobileclip_blt.pt", "b"),
        ("apple/MobileCLIP-S1-OpenCLIP", "s1"),
        ("apple/MobileCLIP-B-LT-OpenCLIP", "b"),
        ("apple/MobileCLIP-B-OpenCLIP", "b"),
        ("apple/MobileCLIP-S3", "mobileclip2_s3"),
        ("timm/MobileCLIP2-S0-OpenCLIP", "mobileclip2_s0"),
        ("mobileclip2_l14.pt", "mobileclip2_l14"),
        ("timm/MobileCLIP2-L-14-OpenCLIP", "mobileclip2_l14"),
        ("mobileclip_base.pt", None),
        ("mobileclip2_s1.pt", None),
        ("student.safetensors", None),
    ],
)
def test_names_show_the_variant(name: str, variant: str | None) -> None:
    assert checkpoint._variant_in_name(name) == variant


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("apple/MobileCLIP-S0", "mobileclip_s0.pt"),
        ("apple/MobileCLIP-B-LT", "mobileclip_blt.pt"),
        ("apple/MobileCLIP2-L-14", "mobileclip2_l14.pt"),
        ("timm/MobileCLIP2-S0-OpenCLIP", "open_clip_model.safetensors"),
        ("apple/MobileCLIP-S1-OpenCLIP", "open_clip_pytorch_model.bin"),
        ("someone/tiny-student", "model.safetensors"),
    ],
)
def test_hub_names(monkeypatch: pytest.MonkeyPatch, path: Path, name: str, file: str) -> None:
    def download(repository: str, filename: str) -> str:
        assert repository == name
        if filename != file:
            raise EntryNotFoundError(f"404: {filename}")
        return str(path)

    monkeypatch.setattr(checkpoint, "hf_hub_download", download)
    assert load_student(name).config.variant == "tiny"


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: str, filename: str) -> str:
        raise ConnectionError(f"cannot resolve\n{repository}/{filename}")

    monkeypatch.setattr(checkpoint, "hf_hub_download", download)
    with pytest.raises(InputError, match=r"no file apple/MobileCLIP-S0.*mobileclip_s0\.pt.*cannot resolve") as error:
        load_student("apple/MobileCLIP-S0")
    assert "\n" not in str(error.value)


def test_a_saved_student_keeps_its_pad_mask(student: MobileCLIP, tmp_path: Path) -> None:
    unmasked = create_student(replace(student.config, pad_mask=False))
    save_student(unmasked, tmp_path / "s.safetensors")
    assert load_student(tmp_path / "s.safetensors").pad_mask is False
    assert load_student(tmp_path / "s.safetensors", pad_mask=True).pad_mask is True
