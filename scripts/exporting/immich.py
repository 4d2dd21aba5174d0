"""The same towers as immich's machine learning reads them: `textual/` and `visual/` beside the hub's files.

It passes `text` (int32, padded to the context length) and `image`, and reads `text_cfg` of config.json.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from exporting.sources import Exported
from longclip_teacher.atomic_files import write_json

__all__ = ["write_immich"]


def write_immich(model: Exported, folder: Path) -> None:
    """Add immich's files to an exported folder."""
    import onnx
    from onnx import TensorProto, helper

    for tower, stem, ours, theirs in (
        ("textual", "text_model", "input_ids", "text"),
        ("visual", "vision_model", "pixel_values", "image"),
    ):
        (folder / tower).mkdir()
        graph = onnx.load(folder / "onnx" / f"{stem}.onnx")
        (given,) = graph.graph.input
        given.name = theirs
        kind = given.type.tensor_type
        wanted, kind.elem_type = kind.elem_type, TensorProto.INT32 if tower == "textual" else kind.elem_type
        graph.graph.node.insert(0, helper.make_node("Cast", [theirs], [ours], "as_exported", to=wanted))
        onnx.save(graph, folder / tower / "model.onnx")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, folder / "textual" / name)
    preprocessing = {
        "size": [model.image_size, model.image_size],
        "mode": "RGB",
        "mean": list(model.mean),
        "std": list(model.std),
        "interpolation": model.model.preprocess_cfg.interpolation,
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    write_json(folder / "visual" / "preprocess_cfg.json", preprocessing)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = {"embed_dim": model.model.embed_dim, "text_cfg": {"context_length": model.context_length}}
    write_json(folder / "config.json", {**config, **own, "vision_cfg": {"image_size": model.image_size}})
