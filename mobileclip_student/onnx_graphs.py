"""Towers as ONNX graphs: for any batch, and for captions of 2 tokens to the context length; and graphs as functions.

A graph holds weights and operations alone: names of the exporting machine's files and lines, which torch writes beside
every operation, are removed.

Shapes: B images or captions, R image side, L tokens, D embedding.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

__all__ = ["image_graph", "onnx_encoder", "quiet_exporter", "text_graph"]

_LARGEST_BATCH = 1 << 20


def image_graph(tower: nn.Module, image_size: int) -> ModelProto:
    """The graph of a tower in eval mode: `pixel_values` [B, 3, R, R] to `image_embeds` [B, D], both float32.

    Raises RuntimeError for a tower that fixes B.
    """
    example = torch.zeros(2, 3, image_size, image_size)  # torch.export treats a size of 1 as a constant
    return _graph(tower, example, {0: _batch()}, ("pixel_values", "image_embeds"))


def text_graph(tower: nn.Module, context_length: int) -> ModelProto:
    """The graph of a tower in eval mode: `input_ids` [B, L], int64, to `text_embeds` [B, D], float32.

    Raises RuntimeError for a tower that fixes B or L.
    """
    example = torch.ones(2, min(9, context_length - 1), dtype=torch.int64)
    tokens = torch.export.Dim("tokens", min=2, max=context_length)
    return _graph(tower, example, {0: _batch(), 1: tokens}, ("input_ids", "text_embeds"))


def onnx_encoder(graph: Path | bytes, threads: int) -> Callable[[Tensor], Tensor]:
    """The function of a graph in a file or in memory, computed by ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    source = graph if isinstance(graph, bytes) else str(graph)
    session = onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])
    (name,) = [value.name for value in session.get_inputs()]
    return lambda batch: torch.from_numpy(np.asarray(session.run(None, {name: batch.numpy()})[0]))


def _batch() -> torch.export.Dim:
    return torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)


@torch.no_grad()
def _graph(tower: nn.Module, example: Tensor, free: dict[int, torch.export.Dim], names: tuple[str, str]) -> ModelProto:
    with quiet_exporter():
        program = torch.onnx.export(
            tower,
            (example,),
            input_names=[names[0]],
            output_names=[names[1]],
            dynamo=True,
            dynamic_shapes=(free,),
            verbose=False,
        )
    assert program is not None
    model: ModelProto = program.model_proto
    shapes = [value.type.tensor_type.shape.dim for value in (model.graph.input[0], model.graph.output[0])]
    frozen = [dim.__name__ for index, dim in free.items() if not shapes[0][index].dim_param]
    if frozen or not shapes[1][0].dim_param:  # the exporter says nothing of it
        raise RuntimeError(f"the graph of {type(tower).__name__} fixes {', '.join(frozen or ['batch'])}")
    _strip(model)
    return model


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep what exporters, converters and quantizers remark on their own workings off stderr."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _strip(model: ModelProto) -> None:
    """Remove what says where and by which lines the graph was made."""
    del model.metadata_props[:]
    model.doc_string = ""
    for part in (model.graph, *model.functions):
        _strip_part(part)


def _strip_part(graph: GraphProto) -> None:
    for values in (graph.node, graph.value_info, getattr(graph, "initializer", ()), [graph]):
        for value in values:
            value.doc_string = ""
            del value.metadata_props[:]
    for node in graph.node:
        for attribute in node.attribute:
            for part in (attribute.g, *attribute.graphs) if attribute.HasField("g") or attribute.graphs else ():
                _strip_part(part)
