"""scripts/export.py --int8 and --openvino: as much in int8 as R@1 on pairs allows, one-line refusals, and OpenVINO."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.benchmarks.protocols import RetrievalSet
from longclip_teacher.errors import InputError
from longclip_teacher.packages import ONNX, missing_packages
from mobileclip_student import save_student
from training.settings.options import EMBEDDED_DATA
from training.settings.tree import TrainConfig, config_to_toml

if missing_packages((*ONNX, "tokenizers")):
    pytest.skip("the extra export is not installed", allow_module_level=True)

import onnx
from onnx import numpy_helper

from exporting import int8_files
from exporting.int8 import StaticInt8, with_int8_products
from exporting.judged_pairs import MOST_LOST, Judge, calibration_pixels, judged_pairs
from exporting.openvino_files import write_openvino
from exporting.runtimes import runtime_encoder
from exporting.sources import Exported, load_source
from fitted_students import CONTEXT, fitted_student, write_pairs
from mobileclip_student.onnx_graphs import image_graph, text_graph


class Case:
    """A student that knows its pairs, with the folder of its float32 graphs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pairs = folder, write_pairs(folder / "pairs")
        save_student(fitted_student(self.pairs), folder / "student.safetensors")
        self.model = load_source(str(folder / "student.safetensors"))
        (folder / "onnx").mkdir()
        self.image = image_graph(self.model.towers[0], self.model.image_size)
        self.text = text_graph(self.model.towers[1], CONTEXT)
        onnx.save(self.image, folder / "onnx" / "vision_model.onnx")
        onnx.save(self.text, folder / "onnx" / "text_model.onnx")
        encoders = [runtime_encoder(folder / "onnx" / f"{stem}.onnx") for stem in ("vision_model", "text_model")]
        self.judge = Judge(self.model, self.pairs, *encoders)
        self.pixels = calibration_pixels(self.model, folder / "pairs")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("int8"))


def encoded(graph: onnx.ModelProto, path: Path, inputs: torch.Tensor) -> torch.Tensor:
    onnx.save(graph, path)
    return runtime_encoder(path)(inputs)


def test_layers_that_int8_harms_stay_in_float(case: Case, tmp_path: Path) -> None:
    tower = StaticInt8(case.image, case.pixels)
    whole = encoded(tower.graph(), tmp_path / "whole.onnx", case.pixels)
    assert case.judge.lost(whole, case.judge.float_texts) > 50
    ranked = tower.most_sensitive()
    assert sorted(ranked) == sorted(tower.layers) and len(ranked) == 10
    alone = [
        encoded(tower.graph(only=[layer]), tmp_path / "one.onnx", case.pixels) for layer in (ranked[0], ranked[-1])
    ]
    assert case.judge.lost(alone[0], case.judge.float_texts) > case.judge.lost(alone[1], case.judge.float_texts)
    form, images = int8_files._first_good(
        tmp_path / "image.onnx",
        int8_files._image_forms(tower),
        case.judge,
        case.judge.images,
        lambda images: [(images, case.judge.float_texts)],
    )
    left, kept = map(int, re.findall(r"\d+", form.removesuffix("float32").replace("int8", "")))
    assert form == f"{left} layers in int8, {kept} sensitive ones in float32"
    assert kept in (2, 4) and left + kept == 10
    assert case.judge.lost(images, case.judge.float_texts) <= MOST_LOST
    written = onnx.load(tmp_path / "image.onnx").graph.initializer
    in_float = {tensor.name for tensor in written if tensor.data_type == onnx.TensorProto.FLOAT}
    weights = {node.name: node.input[1] for node in case.image.graph.node if len(node.input) > 1}
    assert [weights[layer] in in_float for layer in ranked] == [True] * kept + [False] * left
    first = next(node for node in case.image.graph.node if node.op_type == "Conv")
    assert first.input[1] in in_float and first.name not in ranked


def test_a_tower_whose_forms_all_lose_too_much_is_refused_with_the_figure(case: Case, tmp_path: Path) -> None:
    forms = iter([("all in int8", StaticInt8(case.image, case.pixels).graph())])
    with pytest.raises(
        InputError,
        match=r"image\.onnx, with all in int8: R@1 falls from 100\.0 / 100\.0% to [\d.]+ / [\d.]+% on 100 pairs, more",
    ):
        int8_files._first_good(
            tmp_path / "image.onnx",
            forms,
            case.judge,
            case.judge.images,
            lambda images: [(images, case.judge.float_texts)],
        )


def test_a_text_tower_whose_products_lose_too_much_keeps_only_its_table(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_files, "with_int8_products", with_wrong_table)
    written = {one.tower: one for one in int8_files.write_int8(case.model, case.folder, case.judge, case.pixels)}
    assert written["text"].form == "the token table alone in int8" and written["text"].agreement.cosine > 0.98
    assert written["image"].form != f"{len(StaticInt8(case.image, case.pixels).layers)} layers in int8"
    stored = onnx_bytes(onnx.load(case.folder / written["text"].name))
    assert stored < 0.32 * onnx_bytes(case.text)


def with_wrong_table(graph: onnx.ModelProto) -> onnx.ModelProto:
    wrong = onnx.ModelProto()
    wrong.CopyFrom(graph)
    for tensor in wrong.graph.initializer:
        if tensor.name.endswith("_int8"):
            tensor.raw_data = tensor.raw_data[::-1]
    return wrong


def onnx_bytes(graph: onnx.ModelProto) -> int:
    return len(graph.SerializeToString())


def test_products_with_weights_are_int8_and_agree(case: Case, tmp_path: Path) -> None:
    graph = with_int8_products(case.text)
    large = [tensor for tensor in graph.graph.initializer if tensor.data_type == 1 and np.prod(tensor.dims) > 10_000]
    assert [tensor.dims[0] for tensor in large] == [49408]  # the table, which it leaves alone
    assert "MatMulInteger" in {node.op_type for node in graph.graph.node}
    weights = [numpy_helper.to_array(one) for one in graph.graph.initializer if one.name.endswith("_quantized")]
    assert weights and max(np.abs(weight.astype(int)).max() for weight in weights) <= 64  # 7 bits
    tokens = case.model.model.tokenizer(case.pairs.captions)
    found, expected = encoded(graph, tmp_path / "text.onnx", tokens), case.model.encode_text(tokens)
    assert 0.9 < (found * expected).sum(dim=1).mean() < 0.99999


def run_of(case: Case, folder: Path, **data: object) -> Exported:
    """The model as that of a run with these options of its data."""
    folder.mkdir()
    config = TrainConfig()
    (folder / "config.toml").write_text(config_to_toml(replace(config, data=replace(config.data, **data))))
    return Exported(case.model.model, folder, case.model.unfused)


def test_a_run_brings_its_own_pairs_and_calibration_pictures(case: Case, tmp_path: Path, checkout: Path) -> None:
    pairs, shards = case.folder / "pairs", (str(checkout / EMBEDDED_DATA / "train/*.tar"),)
    model = run_of(case, tmp_path / "run", val=pairs, shards=shards)
    assert judged_pairs(model, None).sha256 == case.pairs.sha256
    assert calibration_pixels(model, None).shape == (128, 3, 32, 32)
    tested = run_of(
        case, tmp_path / "tested", val=None, tests=(f"own=folder:{pairs}",), shards=("https://a/{0..9}.tar",)
    )
    assert judged_pairs(tested, None).sha256 == case.pairs.sha256
    with pytest.raises(InputError, match="training shards are remote: name pictures with --calibration"):
        calibration_pixels(tested, None)
    gone = run_of(case, tmp_path / "gone", val=tmp_path / "no_set", shards=(str(tmp_path / "no.tar"),))
    with pytest.raises(InputError, match=r"no_set.*it is the run's own set: --pairs names another"):
        judged_pairs(gone, None)
    with pytest.raises(InputError, match=r"no\.tar.*they are the run's own: name pictures with --calibration FOLDER"):
        calibration_pixels(gone, None)


def test_what_cannot_be_judged_is_refused_in_one_line(case: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this source names no pairs: give --pairs PROTOCOL:DIR"):
        judged_pairs(case.model, None)
    with pytest.raises(InputError, match="write PROTOCOL:DIR, such as"):
        judged_pairs(case.model, "urban1k")
    few = write_pairs(tmp_path / "few", 99)
    with pytest.raises(InputError, match=r"has 99 pairs, of which one is more than a point of R@1"):
        judged_pairs(case.model, f"folder:{tmp_path / 'few'}")
    with pytest.raises(InputError, match="give --calibration FOLDER"):
        calibration_pixels(case.model, None)
    with pytest.raises(InputError, match="no such folder"):
        calibration_pixels(case.model, tmp_path / "nowhere")
    (tmp_path / "broken").mkdir()
    for number in range(30):
        Image.new("RGB", (40, 40)).save(tmp_path / "broken" / f"{number}.png")
    for number in range(15):
        (tmp_path / "broken" / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"broken: 15 pictures that can be read, and --int8 needs 16"):
        calibration_pixels(case.model, tmp_path / "broken")
    noise = RetrievalSet("noise", few.images, few.captions[::-1], few.caption_image, "")
    with pytest.raises(InputError, match=r"R@1 of the model is [\d.]+ / [\d.]+% on 99 pairs: too low to judge"):
        Judge(case.model, noise, case.model.encode_image, case.model.encode_text)


def test_a_point_is_a_point(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case.judge, "float_r1", (57.0, 98.0))
    monkeypatch.setattr(case.judge, "r1", lambda images, texts: (56.00000000000001, 97.0 - 1e-14))
    assert case.judge.lost(case.pixels, case.pixels) == MOST_LOST


@pytest.fixture
def openvino_folder(case: Case) -> Iterator[Path]:
    pytest.importorskip("openvino", reason="needs the extra [openvino]")
    yield case.folder


def test_openvino_gives_the_features_of_the_model(
    case: Case, openvino_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = openvino_folder
    int8_files.write_int8(case.model, folder, case.judge, case.pixels)
    written = write_openvino(case.model, folder, case.pairs)
    assert sorted(one.name for one in written) == [
        f"openvino/{stem}_model{suffix}.xml" for stem in ("text", "vision") for suffix in ("", "_fp16", "_quantized")
    ]
    tokens = case.model.model.tokenizer(case.pairs.captions)
    found = runtime_encoder(folder / "openvino" / "text_model.xml")(tokens)
    torch.testing.assert_close(found, case.model.encode_text(tokens), rtol=0, atol=1e-5)
    assert all(str(folder).encode() not in path.read_bytes() for path in (folder / "openvino").iterdir())
    for path in (folder / "openvino").iterdir():
        path.unlink()
    (folder / "openvino").rmdir()
    halved = onnx.load(folder / "onnx" / "vision_model_quantized.onnx")
    scale = next(one for one in halved.graph.initializer if one.name.endswith("_scale") and one.dims)
    scale.raw_data = scale.raw_data[::-1]
    onnx.save(halved, folder / "onnx" / "vision_model_quantized.onnx")
    with pytest.raises(InputError, match=r"the int8 files in OpenVINO: R@1 falls|vision_model_quantized\.xml gives"):
        write_openvino(case.model, folder, case.pairs)
