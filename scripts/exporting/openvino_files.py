"""The same towers as OpenVINO reads them: `openvino/*.xml` with the weights beside it, held to the same bounds."""

from __future__ import annotations

from pathlib import Path

from eval.benchmarks.protocols import RetrievalSet
from exporting.checks import ANY, FULL, HALF, Agreement, Bounds, Written, check_file
from exporting.folder import STEMS
from exporting.judged_pairs import MOST_LOST, Judge, shown
from exporting.runtimes import runtime_encoder
from exporting.sources import Exported

__all__ = ["write_openvino"]


def write_openvino(model: Exported, folder: Path, pairs: RetrievalSet | None) -> list[Written]:
    """Write what OpenVINO makes of both float32 graphs and, if there are `pairs`, of the int8 graphs.

    Raises InputError for a file that differs from the model or, in int8, loses too much R@1 on the pairs.
    """
    (folder / "openvino").mkdir()
    kinds = (("", FULL), ("_fp16", HALF))
    written = [_write(model, folder, tower, suffix, bounds) for tower in STEMS for suffix, bounds in kinds]
    if pairs is None:
        return written
    int8 = [_write(model, folder, tower, "_quantized", ANY) for tower in STEMS]
    judge = Judge(model, pairs, *(runtime_encoder(folder / f"openvino/{stem}.xml") for stem in STEMS.values()))
    image, text = (folder / one.name for one in int8)
    images, texts = judge.images(runtime_encoder(image)), judge.texts(runtime_encoder(text))
    if judge.lost(images, texts) > MOST_LOST:
        raise judge.refusal(images, texts, "the int8 files in OpenVINO")
    r1 = shown(judge.r1(images, texts))
    return [
        *judge.with_r1(written),
        Written(int8[0].name, "image", Agreement.of(images, judge.float_images, image.name), r1),
        Written(int8[1].name, "text", Agreement.of(texts, judge.float_texts, text.name), r1),
    ]


def _write(model: Exported, folder: Path, tower: str, suffix: str, bounds: Bounds) -> Written:
    """Convert one graph and compare it with the model. Half weights come from the float32 graph."""
    import openvino

    stem, half = STEMS[tower], suffix == "_fp16"
    path = folder / "openvino" / f"{stem}{suffix}.xml"
    graph = folder / "onnx" / f"{stem}{'' if half else suffix}.onnx"
    openvino.save_model(openvino.Core().read_model(str(graph)), str(path), compress_to_fp16=half)
    return Written(f"openvino/{path.name}", tower, check_file(model, tower, path, bounds))
