"""A graph whose weights are stored in half precision and computed in float32.

Half of the bytes, and rounded weights are all that changes: no overflow, and the final norm stays in float32. Graphs
that also compute in half precision gain nothing on a CPU, and ONNX Runtime 1.32 ends the process when it loads one of a
Long-CLIP image tower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["with_half_weights"]

_SMALLEST = 256  # entries; below, a cast weighs more than it saves


def with_half_weights(model: ModelProto) -> ModelProto:
    """A copy of `model`. Tensors that half precision cannot hold, and small ones, stay as they are."""
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    halved = ModelProto()
    halved.CopyFrom(model)
    casts = []
    for tensor in halved.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size < _SMALLEST or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], f"cast_{len(casts)}", to=TensorProto.FLOAT))
    nodes = [*casts, *halved.graph.node]
    del halved.graph.node[:]
    halved.graph.node.extend(nodes)
    return halved
