from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch

from eval.towers.models import load_model
from longclip_teacher import LongCLIP, create_teacher, save_teacher
from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import write_weights
from mobileclip_student import MobileCLIP, create_student, load_student, reparameterize, save_student

TOKENS = torch.tensor([[49406, 320, 736, 49407, 0, 0]])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """student.safetensors, teacher.safetensors and a run whose best weights are a student's."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save_teacher(create_teacher("tiny", context_length=32), root / "teacher.safetensors")
    student = create_student("tiny", context_length=32)
    save_student(student, root / "student.safetensors")
    save_student(student, root / "run" / "best.safetensors")
    save_student(reparameterize(student), root / "fused.safetensors")
    return root


def test_our_files_are_told_apart_and_evaluated_as_saved(files: Path) -> None:
    teacher = load_model(files / "teacher.safetensors")
    assert isinstance(teacher, LongCLIP) and teacher.context_length == 32 and not teacher.training
    for name in ("student.safetensors", "run", "fused.safetensors"):
        student = load_model(str(files / name))
        assert isinstance(student, MobileCLIP) and not student.training
        assert (student.context_length, student.pad_mask) == (32, True)
        expected = load_student(files / "student.safetensors").encode_text(TOKENS)
        torch.testing.assert_close(student.encode_text(TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_options_that_belong_to_the_other_model_are_refused(files: Path) -> None:
    for options in ({"variant": "s0"}, {"pad_mask": True}):
        with pytest.raises(InputError, match="is a teacher: --variant and --pad-mask are for students"):
            load_model(files / "teacher.safetensors", **options)
    with pytest.raises(InputError, match="is a student: --activation is for teachers"):
        load_model(files / "student.safetensors", activation="gelu")


@pytest.mark.parametrize(
    ("keys", "loader"),
    [
        (["image_encoder.model.conv_exp.weight", "text_encoder.x"], "load_student"),
        (["visual.trunk.stem.weight", "text.token_embedding.weight"], "load_student"),
        (["visual.conv1.weight", "positional_embedding_res"], "load_teacher"),
        (["visual.conv1.weight", "text.positional_embedding"], "load_teacher"),
        (["vision_model.embeddings.class_embedding"], "load_teacher"),
    ],
)
def test_published_layouts_are_known_by_their_keys(
    keys: list[str], loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(f"eval.towers.models.{loader}", lambda weights, *args, **kwargs: calls.append(weights.path))
    write_weights(tmp_path / "a.safetensors", {key: torch.zeros(1) for key in keys}, {})
    torch.save({key: torch.zeros(1) for key in keys}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        load_model(tmp_path / name)
    assert calls == [tmp_path / "a.safetensors", tmp_path / "a.pt"]


def test_a_published_student_is_evaluated_as_published(tmp_path: Path) -> None:
    theirs = open_clip.create_model("MobileCLIP-S1", pretrained=None).eval()
    torch.save(theirs.state_dict(), tmp_path / "mobileclip_s1.pt")
    model = load_model(tmp_path / "mobileclip_s1.pt")
    assert (model.context_length, model.pad_mask) == (77, False)
    tokens = torch.nn.functional.pad(TOKENS, (0, 71))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(TOKENS), theirs.encode_text(tokens), rtol=1e-4, atol=1e-5)
    long = load_model(tmp_path / "mobileclip_s1.pt", variant="s1", context_length=248, pad_mask=True)
    assert (long.context_length, long.pad_mask) == (248, True)


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    for loader in ("load_student", "load_teacher"):
        monkeypatch.setattr(
            f"eval.towers.models.{loader}", lambda name, *args, of=loader, **kwargs: calls.append((of, str(name)))
        )
    for name in ("longclip-b", "apple/MobileCLIP-S1-OpenCLIP"):
        load_model(name)
    assert calls == [("load_teacher", "longclip-b"), ("load_student", "apple/MobileCLIP-S1-OpenCLIP")]


def test_files_that_are_not_models_are_one_line(files: Path, tmp_path: Path) -> None:
    write_weights(tmp_path / "other.safetensors", {"layer.weight": torch.zeros(1)}, {})
    (tmp_path / "broken.safetensors").write_bytes((files / "student.safetensors").read_bytes()[:5000])
    torch.save({"x": torch.zeros(1000)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:3000])
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("other.safetensors", "neither a MobileCLIP student nor a CLIP teacher: it begins with 'layer.weight'"),
        ("broken.safetensors", "not a whole safetensors file"),
        ("cut.pt", "not a whole torch weight file"),
        ("empty", "is a folder without best.safetensors or last.safetensors: .* a folder with open_clip_config.json"),
        ("absent.pt", "no checkpoint at"),
        ("mobileclip", "no checkpoint at"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_model(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"no checkpoint at resnet50: .* hub name"):
        load_model("resnet50")
