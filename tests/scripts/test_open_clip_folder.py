"""`scripts/export.py --open-clip`: what open_clip loads has the student's features, and other students are refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longclip_teacher import create_teacher
from longclip_teacher.ancestry import Ancestor, ancestry_to_json
from longclip_teacher.errors import InputError
from longclip_teacher.packages import ONNX, missing_packages
from longclip_teacher.weights_file import read_weights
from mobileclip_student import MobileCLIP, create_student, override, reparameterize, save_student
from mobileclip_student.model import variant_config

if missing_packages((*ONNX, "tokenizers")):
    pytest.skip("the extra export is not installed", allow_module_level=True)

import export
from exporting.open_clip_folder import refuse_what_open_clip_cannot_say, write_open_clip
from exporting.sources import Exported


def student_of(tower: str, *, pad_mask: bool) -> MobileCLIP:
    """A student with a published image tower, weights that are not zero anywhere, and a small text tower."""
    torch.manual_seed(0)
    config = override(variant_config("s0"), image_size=64, text_tower=tower, text_width=32, text_heads=4, text_layers=2)
    student = create_student(config, 40, pad_mask=pad_mask).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return student


@pytest.mark.parametrize(("tower", "pad_mask"), [("causal", True), ("base", False)])
def test_open_clip_loads_the_student(tower: str, pad_mask: bool, tmp_path: Path) -> None:
    """`write_open_clip` compares; the next test shows that it does."""
    student = student_of(tower, pad_mask=pad_mask)
    student.ancestry = (Ancestor("a/name", "mit", "12"),)
    refuse_what_open_clip_cannot_say(Exported(student, None, student), "student")
    write_open_clip(student, tmp_path / "open_clip")
    names = {path.name for path in (tmp_path / "open_clip").iterdir()}
    assert names == {"open_clip_config.json", "open_clip_model.safetensors"}
    weights = read_weights(tmp_path / "open_clip" / "open_clip_model.safetensors")
    assert json.loads(weights.ancestry) == ancestry_to_json(student.ancestry), "the record goes with the weights"


def test_a_text_tower_that_hides_padding_would_load_with_other_features(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"what open_clip loads differs from the model: cosine -?0\.[0-8]"):
        write_open_clip(student_of("base", pad_mask=True), tmp_path / "open_clip")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: create_student("tiny", 40), "no image tower fastvit of its shape"),
        (lambda: student_of("hybrid", pad_mask=True), "no text tower with RepMixer blocks"),
        (lambda: student_of("base", pad_mask=True), "text towers see padding, which this one hides"),
        (lambda: reparameterize(student_of("causal", pad_mask=True)), "its branches are merged"),
        (lambda: create_teacher("tiny"), "it is a teacher"),
        (lambda: _with_stem_padding(), "builds the stem and the norms"),
    ],
    ids=["tiny", "hybrid", "masked base", "merged", "teacher", "stem"],
)
def test_what_open_clip_cannot_say_is_refused(model, reason: str) -> None:
    own = model()
    with pytest.raises(InputError, match=f"student cannot be an open_clip folder: .*{reason}") as caught:
        refuse_what_open_clip_cannot_say(Exported(own, None, own), "student")
    assert "\n" not in str(caught.value)


def _with_stem_padding() -> MobileCLIP:
    config = override(variant_config("b"), text_tower="causal", text_width=32, text_heads=4, text_layers=1)
    with torch.device("meta"):
        return create_student(replace(config, image=replace(config.image, stem_padding=1)), 40)


def test_the_command_refuses_before_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_student(create_student("tiny", 20), tmp_path / "student.safetensors")
    arguments = [tmp_path / "student.safetensors", "--out", tmp_path / "model", "--open-clip"]
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    monkeypatch.setattr(export, "write_graphs", None)
    with pytest.raises(InputError, match=r"--open-clip: .*student\.safetensors cannot be an open_clip folder"):
        export.main()
    assert not (tmp_path / "model").exists()
