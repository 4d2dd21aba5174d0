"""The int8 files of an exported folder: as much of each tower in int8 as R@1 on pairs allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from exporting.checks import ANY, Agreement, Written, check_file
from exporting.int8 import StaticInt8, with_int8_products, with_int8_table
from exporting.judged_pairs import MOST_LOST, Judge, shown
from exporting.runtimes import runtime_encoder
from exporting.sources import Exported

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["write_int8"]

_TABLE = "the token table alone in int8"  # the text tower's form that loses least


def write_int8(model: Exported, folder: Path, judge: Judge, pixels: Float[Tensor, "N 3 R R"]) -> list[Written]:
    """Write both towers in int8 beside the float32 graphs. `pixels` are N calibration pictures of side R.

    The cosines are the worst over the pairs. Raises InputError, with R@1, if every form of a tower loses too much, with
    the other tower in float32 or in int8.
    """
    import onnx

    graphs, image, text = folder / "onnx", "vision_model_quantized.onnx", "text_model_quantized.onnx"
    tower = StaticInt8(onnx.load(graphs / "vision_model.onnx"), pixels)
    stored = with_int8_table(onnx.load(graphs / "text_model.onnx"))
    table = (_TABLE, stored)
    _, least_texts = _first_good(
        graphs / text, iter([table]), judge, judge.texts, lambda texts: [(judge.float_images, texts)]
    )
    image_form, images = _first_good(
        graphs / image,
        _image_forms(tower),
        judge,
        judge.images,
        lambda images: [(images, judge.float_texts), (images, least_texts)],
    )
    text_form, texts = _first_good(
        graphs / text,
        iter([("products and token table in int8", with_int8_products(stored)), table]),
        judge,
        judge.texts,
        lambda texts: [(judge.float_images, texts), (images, texts)],
    )
    check_file(model, "image", graphs / image, ANY)
    check_file(model, "text", graphs / text, ANY)
    r1 = shown(judge.r1(images, texts))
    return [
        Written(f"onnx/{image}", "image", Agreement.of(images, judge.float_images, image), r1, image_form),
        Written(f"onnx/{text}", "text", Agreement.of(texts, judge.float_texts, text), r1, text_form),
    ]


def _first_good(
    path: Path,
    forms: Iterator[tuple[str, ModelProto]],
    judge: Judge,
    encode: Callable[..., Tensor],
    towers: Callable[[Tensor], list[tuple[Tensor, Tensor]]],
) -> tuple[str, Tensor]:
    """Write the first form that loses little enough; return what it is and its features.

    `towers` gives the features of pictures and captions with which a form's features are judged. A form is written
    over the one before it.
    """
    import onnx

    for form, graph in forms:
        onnx.save(graph, path)
        onnx.checker.check_model(str(path))
        features = encode(runtime_encoder(path))
        worst = max(towers(features), key=lambda pair: judge.lost(*pair))
        if judge.lost(*worst) <= MOST_LOST:
            return form, features
    raise judge.refusal(*worst, f"{path.name}, with {form}")


def _image_forms(tower: StaticInt8) -> Iterator[tuple[str, ModelProto]]:
    """All layers in int8, then the most sensitive ones in float32: 1, 2, 4 and so on, up to half of them."""
    total = len(tower.layers)
    yield f"{total} layers in int8", tower.graph()
    ranked, number = tower.most_sensitive(), 1
    while number <= total / 2:
        yield f"{total - number} layers in int8, {number} sensitive ones in float32", tower.graph(ranked[:number])
        number *= 2
