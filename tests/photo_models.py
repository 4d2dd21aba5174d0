"""A model for photo search that takes no torch to make: the colours of a picture, and those that a text names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from exporting.tokenizer_file import clip_tokenizer
from longclip_teacher.text import EOT, SOT, VOCAB_SIZE

__all__ = ["COLOURS", "SIDE", "save_tower", "write_model", "write_pictures"]

SIDE, CONTEXT = 16, 20
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
_SETTINGS = {
    "size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "resample": 3,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.2, 0.3, 0.4],
}  # fmt: skip


def write_model(folder: Path, **settings: object) -> Path:
    """Write what scripts/export.py would; `settings` change the preprocessing."""
    (folder / "onnx").mkdir(parents=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(_SETTINGS | settings))
    tokenizer = clip_tokenizer(CONTEXT)
    tokenizer.save(str(folder / "tokenizer.json"))
    words = np.full((VOCAB_SIZE, 3), 0.01, np.float32)
    words[[SOT, EOT]] = 0  # so that padding changes nothing
    for channel, word in enumerate(COLOURS):
        words[tokenizer.encode(word).ids[1], channel] = 1
    save_tower(folder / "onnx/text_model.onnx", "input_ids", TensorProto.INT64, ["B", "L"], "text_embeds", [
        helper.make_node("Gather", ["words", "input_ids"], ["read"]),
        helper.make_node("ReduceSum", ["read", "tokens"], ["summed"], keepdims=0),
    ], {"words": words, "tokens": np.array([1])}, 3)  # fmt: skip
    mean, std = (np.array(_SETTINGS[name], np.float32)[None, :, None, None] for name in ("image_mean", "image_std"))
    shape: list[str | int] = ["B", 3, SIDE, SIDE]
    save_tower(folder / "onnx/vision_model.onnx", "pixel_values", TensorProto.FLOAT, shape, "image_embeds", [
        helper.make_node("Mul", ["pixel_values", "std"], ["scaled"]),
        helper.make_node("Add", ["scaled", "mean"], ["shown"]),
        helper.make_node("ReduceMean", ["shown"], ["whole"], axes=[2, 3], keepdims=0),
        helper.make_node("Add", ["whole", "little"], ["summed"]),
    ], {"mean": mean, "std": std, "little": np.full(3, 0.01, np.float32)}, 3)  # fmt: skip
    files = [path for path in folder.rglob("*") if path.is_file()]
    hashes = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "sha256.json").write_text(json.dumps(hashes))
    return folder


def write_pictures(folder: Path, count: int) -> Path:
    """Write pictures of one colour each, which all differ a little: red0.png, green1.png, blue2.png, red3.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        name = list(COLOURS)[number % 3]
        colour = tuple(abs(value - number) for value in COLOURS[name])
        Image.new("RGB", (20, 24), colour).save(folder / f"{name}{number}.png")
    return folder


def save_tower(
    path: Path, given: str, kind: int, shape: list[str | int], result: str, nodes: list[onnx.NodeProto],
    weights: Mapping[str, np.ndarray], width: int,
) -> None:  # fmt: skip
    """Write a graph whose node `summed` [B, width] is divided by its norm: a tower that gives unit features."""
    nodes += [
        helper.make_node("ReduceL2", ["summed"], ["norm"], axes=[1], keepdims=1),
        helper.make_node("Div", ["summed", "norm"], [result]),
    ]
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info(given, kind, shape)],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, ["B", width])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
