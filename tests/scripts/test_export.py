"""scripts/export.py: its files give the model's features in other programs, and a failed export leaves nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from eval.base.images import open_image
from fitted_students import CONTEXT, fitted_student, write_pairs
from longclip_teacher import create_teacher, load_teacher, save_teacher
from longclip_teacher.ancestry import RESEARCH_ONLY, Ancestor
from longclip_teacher.errors import InputError
from longclip_teacher.packages import ONNX, missing_packages
from longclip_teacher.text import EOT
from mobileclip_student import load_student, reparameterize, save_student

if missing_packages((*ONNX, "tokenizers")):
    pytest.skip("the extra export is not installed", allow_module_level=True)

import onnx
import onnxruntime
from tokenizers import Tokenizer

import export
from exporting.card import with_own_resize
from exporting.checks import FULL, Agreement
from exporting.half_weights import with_half_weights
from photo_search.errors import InputError as PhotoError
from photo_search.model import Model

CAPTIONS = ["a red bus", "A dog &amp; its “ball” don’t match!!! " * 5, ""]
# By these names transformers would find weights and build a random CLIP around them
NAMES_OF_OTHERS = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
)


def run_export(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        export.main()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A student's weight file and the folder it was exported to."""
    folder = tmp_path_factory.mktemp("a_telling_name")
    pairs = folder / "pairs"
    save_student(fitted_student(write_pairs(pairs)), folder / "student.safetensors")
    int8 = ("--int8", "--pairs", f"folder:{pairs}", "--calibration", pairs)
    run_export(folder / "student.safetensors", "--out", folder / "model", "--immich", *int8)
    return folder / "student.safetensors", folder / "model"


def run_onnx(path: Path, name: str, batch: object) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path))
    return torch.from_numpy(np.asarray(session.run(None, {name: np.asarray(batch)})[0]))


@torch.no_grad()
@pytest.mark.parametrize(("suffix", "tolerance"), [("", 1e-5), ("_fp16", 3e-3)])
def test_files_give_the_features_of_the_student(exported: tuple[Path, Path], suffix: str, tolerance: float) -> None:
    source, folder = exported
    student = load_student(source)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [found.ids for found in tokenizer.encode_batch(CAPTIONS)]
    assert len(ids[0]) == CONTEXT and ids[0][-1] == EOT
    texts = run_onnx(folder / "onnx" / f"text_model{suffix}.onnx", "input_ids", ids)
    expected = student.encode_text(student.tokenizer(CAPTIONS), normalize=True)
    torch.testing.assert_close(texts, expected, rtol=0, atol=tolerance)

    settings = json.loads((folder / "preprocessor_config.json").read_text())
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    shown = pixels * settings["rescale_factor"]
    if settings["do_normalize"]:
        shown = (shown - settings["image_mean"]) / settings["image_std"]
    shown = shown.transpose(0, 3, 1, 2).astype(np.float32)
    images = run_onnx(folder / "onnx" / f"vision_model{suffix}.onnx", "pixel_values", shown)
    pictures = torch.stack([student.preprocess(Image.fromarray(picture)) for picture in pixels])
    torch.testing.assert_close(images, student.encode_image(pictures, normalize=True), rtol=0, atol=tolerance)


def _file_path(folder: str, name: str, **_: object) -> Path:
    return Path(folder, name)


@torch.no_grad()
def test_sentence_transformers_module_gives_the_features_of_the_student(
    exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """sentence-transformers itself is not installed here: `make loaders` runs it. All it gives the module is a base."""
    source, folder = exported
    student = load_student(source)
    base = ModuleType("sentence_transformers.base.modules")
    base.InputModule = type("InputModule", (torch.nn.Module,), {"load_file_path": staticmethod(_file_path)})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, base.__name__, base)
    module, name = json.loads((folder / "modules.json").read_text())[0]["type"].split(".")
    specification = importlib.util.spec_from_file_location(module, folder / f"{module}.py")
    assert specification is not None and specification.loader is not None
    loaded = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(loaded)
    model = getattr(loaded, name).load(str(folder), trust_remote_code=True)
    texts = model(model.preprocess(CAPTIONS))["sentence_embedding"]
    expected = student.encode_text(student.tokenizer(CAPTIONS), normalize=True)
    torch.testing.assert_close(texts, expected, rtol=0, atol=1e-5)

    random = np.random.default_rng(0)
    shapes = [(32, 32, 3), (50, 81, 3), (77, 33, 3), (31, 200, 3), (333, 334, 3)]
    pictures = [Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    pixels = torch.stack([student.preprocess(picture) for picture in pictures])
    torch.testing.assert_close(model.preprocess(pictures)["pixel_values"], pixels, rtol=0, atol=1e-6)
    images = model(model.preprocess(pictures))["sentence_embedding"]
    torch.testing.assert_close(images, student.encode_image(pixels, normalize=True), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="encode them apart"):
        model.preprocess(["a", pictures[0]])

    model = getattr(loaded, name).load(str(folder), model_kwargs={"kind": "quantized"})
    found = run_onnx(
        folder / "onnx" / "text_model_quantized.onnx", "input_ids", model.preprocess(CAPTIONS)["input_ids"]
    )
    torch.testing.assert_close(model(model.preprocess(CAPTIONS))["sentence_embedding"], found)
    assert (found - texts).abs().max() > 1e-4


@torch.no_grad()
def test_immichs_files_give_the_features_of_the_student(exported: tuple[Path, Path]) -> None:
    """Read as immich's machine learning reads them."""
    source, folder = exported
    student = load_student(source)
    context_length = json.loads((folder / "config.json").read_text())["text_cfg"]["context_length"]
    settings = json.loads((folder / "textual" / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
    pad = settings["pad_token"]
    tokenizer.enable_padding(length=context_length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=context_length)
    for caption in CAPTIONS:
        ids = np.array([tokenizer.encode(caption).ids], dtype=np.int32)
        expected = student.encode_text(student.tokenizer([caption]), normalize=True)
        found = run_onnx(folder / "textual" / "model.onnx", "text", ids)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    settings = json.loads((folder / "visual" / "preprocess_cfg.json").read_text())
    preprocess = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 81, 3), dtype=np.uint8))
    found = run_onnx(folder / "visual" / "model.onnx", "image", preprocess(picture)[None])
    expected = student.encode_image(student.preprocess(picture)[None], normalize=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_photo_search_has_the_features_of_the_student(exported: tuple[Path, Path], tmp_path: Path) -> None:
    student, model = load_student(exported[0]), Model(exported[1])
    texts = student.encode_text(student.tokenizer(CAPTIONS), normalize=True)
    np.testing.assert_allclose(model.encode_texts(CAPTIONS), texts, rtol=0, atol=1e-5)
    noise = np.random.default_rng(0).integers(0, 256, (41, 60, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(noise[..., :3]).save(tmp_path / "turned.jpg", exif=turned)
    Image.fromarray(noise).save(tmp_path / "transparent.png")
    Image.fromarray(noise[..., :2].copy().view(np.uint16)[..., 0]).save(tmp_path / "grey_16_bits.png")
    Image.fromarray(noise[:32, :32, :3]).save(tmp_path / "of_the_size.webp")
    Image.fromarray(noise[:40, :9, 0]).convert("P").save(tmp_path / "small.gif")
    paths = sorted(tmp_path.iterdir())
    pictures = torch.stack([student.preprocess(open_image(path)) for path in paths])
    pixels = [model.pixels(path) for path in paths]
    np.testing.assert_allclose(model.normalised(pixels), pictures, rtol=0, atol=1e-5)
    images = student.encode_image(pictures, normalize=True)
    np.testing.assert_allclose(model.encode_images(pixels), images, rtol=0, atol=1e-5)


def test_photo_search_uses_the_graphs_that_are_named(exported: tuple[Path, Path], tmp_path: Path) -> None:
    whole, named = Model(exported[1]), Model(exported[1] / "onnx" / "vision_model_quantized.onnx")
    assert whole.fingerprint != named.fingerprint
    named.check_files()
    pixels = [named.pixels(path) for path in sorted((exported[0].parent / "pairs").glob("*.png"))[:4]]
    found = run_onnx(exported[1] / "onnx/vision_model_quantized.onnx", "pixel_values", named.normalised(pixels))
    np.testing.assert_allclose(named.encode_images(pixels), found, rtol=0, atol=1e-6)
    assert np.abs(named.encode_images(pixels) - whole.encode_images(pixels)).max() > 1e-3
    with pytest.raises(PhotoError, match=r"sha256\.json does not name onnx/vision_model_q4\.onnx"):
        Model(exported[1] / "onnx" / "vision_model_q4.onnx")


def test_half_weights_are_half_of_the_bytes(exported: tuple[Path, Path]) -> None:
    whole, half = ((exported[1] / "onnx" / f"text_model{suffix}.onnx").stat().st_size for suffix in ("", "_fp16"))
    assert 0.5 <= half / whole < 0.53


def test_the_folder_is_complete_and_says_what_is_in_it(exported: tuple[Path, Path]) -> None:
    source, folder = exported
    hashes = json.loads((folder / "sha256.json").read_text())
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(files) - {"sha256.json"} == set(hashes)
    assert {"README.md", "config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} < set(
        hashes
    )
    assert all(hashlib.sha256(files[name].read_bytes()).hexdigest() == value for name, value in hashes.items())
    config = json.loads(files["config.json"].read_text())
    assert config["model_type"] == "clip" and config["text_config"]["max_position_embeddings"] == CONTEXT
    assert not set(NAMES_OF_OTHERS) & set(files)
    kept = load_student(folder / config["compact_longclip"]["weights"])
    expected = reparameterize(load_student(source)).state_dict()
    torch.testing.assert_close(dict(kept.state_dict()), dict(expected))
    card = files["README.md"].read_text()
    assert f"captions of up to {CONTEXT} tokens" in card and "onnx/vision_model_fp16.onnx" in card
    assert "The terms of this model are not known, since it descends from a student without a record." in card
    assert "license:" not in card
    assert "| onnx/vision_model_quantized.onnx |" in card and "pictures of `folder`" in card
    assert re.search(r"- `onnx/vision_model_quantized.onnx`: \d+ layers in int8, \d sensitive ones in float32\.", card)
    assert len(re.findall(r"\| onnx/\w+_model\.onnx \|.*\| 100\.0 / 100\.0 \|", card)) == 2


def test_the_card_takes_the_cosine_that_was_measured(exported: tuple[Path, Path]) -> None:
    card = (exported[1] / "README.md").read_text()
    assert "how far that is off was not measured" in card
    once = with_own_resize(card, 0.98765)
    assert "cosine 0.9877 at least with ours" in once and "not measured" not in once
    assert with_own_resize(once, 0.5) == once.replace("0.9877", "0.5000")


def test_no_file_tells_about_the_machine(exported: tuple[Path, Path]) -> None:
    secrets = [str(Path(export.__file__).resolve().parents[1]), "a_telling_name", sys.prefix, str(Path.home())]
    for path in exported[1].rglob("*"):
        if path.is_file():
            contents = path.read_bytes()
            assert not [secret for secret in secrets if secret.encode() in contents], path
        if path.suffix == ".onnx":
            graph = onnx.load(path)
            for tensor in graph.graph.initializer:
                tensor.ClearField("raw_data")  # in which any three bytes may stand
            assert b".py" not in graph.SerializeToString()


def test_an_export_that_differs_leaves_nothing(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(model: onnx.ModelProto) -> onnx.ModelProto:
        halved = with_half_weights(model)
        weight = max(halved.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        weight.raw_data = weight.raw_data[::-1][1:] + b"\0"  # the weights in another order
        return halved

    monkeypatch.setattr(export, "with_half_weights", worse)
    with pytest.raises(InputError, match=r"vision_model_fp16\.onnx differs from the model: cosine"):
        run_export(exported[0], "--out", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_agreement_is_held() -> None:
    ours = torch.eye(2)
    found = Agreement()
    found.add(ours, ours, "a")
    found.hold(FULL, "a")
    turned = torch.tensor([[1.0, 2e-4], [0.0, 1.0]])
    found.add(torch.nn.functional.normalize(turned), ours, "a")
    with pytest.raises(InputError, match=r"largest difference 2\.0e-04"):
        found.hold(FULL, "a")
    with pytest.raises(InputError, match=r"norm is 1\.0e\+00 off 1"):
        found.add(2 * ours, ours, "a")


def test_a_teacher_is_exported_too_and_says_that_it_is_for_research_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    teacher = create_teacher("tiny", CONTEXT)
    teacher.ancestry = (Ancestor("apple/MobileCLIP-S0", RESEARCH_ONLY, "12ab"),)
    save_teacher(teacher, tmp_path / "teacher.safetensors")
    run_export(tmp_path / "teacher.safetensors", "--out", tmp_path / "model")
    assert (tmp_path / "model" / "onnx" / "text_model.onnx").is_file()
    assert "Terms: for research only, since it descends from apple/MobileCLIP-S0" in capsys.readouterr().out
    card = (tmp_path / "model" / "README.md").read_text()
    assert "CLIP teacher" in card and "license: apple-amlr" in card.split("---")[1]
    assert "| apple/MobileCLIP-S0 | its weights began with these | apple-amlr | 12ab |" in card
    assert "Apple Machine Learning Research Model License Agreement" in card
    assert load_teacher(tmp_path / "model" / "compact_longclip.safetensors").ancestry == teacher.ancestry


def test_a_folder_in_use_and_a_missing_package_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "note").touch()
    with pytest.raises(InputError, match="exists: name a new folder"):
        run_export("student.safetensors", "--out", tmp_path)
    for option in ("--pairs", "--calibration"):
        with pytest.raises(InputError, match=f"{option} is for int8 files: add --int8, or leave it out"):
            run_export("student.safetensors", "--out", tmp_path / "new", option, "urban1k:data")
    monkeypatch.setattr(export, "OPENVINO", "no_such_openvino")
    with pytest.raises(InputError, match=r"needs no_such_openvino: pip install 'compact-longclip\[export,openvino\]'"):
        run_export("student.safetensors", "--out", tmp_path / "new", "--openvino")
    monkeypatch.setattr(export, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(InputError, match=r"export needs no_such_package: pip install 'compact-longclip\[export\]'"):
        run_export("student.safetensors", "--out", tmp_path / "new")
    monkeypatch.undo()
    for option in ("executorch", "coreml"):
        monkeypatch.setitem(export.MOBILE_PACKAGES, option, "no_such_package")
        with pytest.raises(InputError, match=f"--{option} needs no_such_package, best in an environment of its own"):
            run_export("student.safetensors", "--out", tmp_path / "new", f"--{option}")
