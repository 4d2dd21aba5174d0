"""Graphs in int8: image towers with static ranges per channel, text towers with dynamic ones or the table alone.

Weights have 7 bits: on CPUs without VNNI, products of 8 bits overflow without a word.

Shapes: N calibration pictures, R image side, V vocabulary, W width of a token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from torch import Tensor

from exporting.runtimes import runtime_encoder
from longclip_teacher.text import VOCAB_SIZE
from mobileclip_student.onnx_graphs import quiet_exporter

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["StaticInt8", "with_int8_products", "with_int8_table"]

_LAYERS = ("Conv", "MatMul", "Gemm")  # that have weights
_BATCH = 16
_JUDGED = 16  # pictures by which layers are ranked
_LARGEST = 127


class StaticInt8:
    """An image tower whose layers compute in int8, with the ranges of their inputs as calibration pictures have them.

    Weights have a scale per channel.
    """

    def __init__(self, graph: ModelProto, pixels: Float[Tensor, "N 3 R R"]) -> None:
        """`graph` is the float32 tower, `pixels` are calibration pictures as it takes them."""
        from onnxruntime.quantization import CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        self._graph, self._pixels = graph, pixels
        (name,) = [value.name for value in graph.graph.input]
        batches = iter([{name: batch.numpy()} for batch in pixels.split(_BATCH)])
        with quiet_exporter(), tempfile.TemporaryDirectory() as place:
            calibrator = create_calibrator(
                _saved(graph, Path(place, "float.onnx")),
                _LAYERS,
                augmented_model_path=str(Path(place, "ranges.onnx")),
                calibrate_method=CalibrationMethod.MinMax,
            )
            calibrator.collect_data(_reader(batches))
            self._ranges = calibrator.compute_data()

    @property
    def layers(self) -> list[str]:
        """The names of the layers with weights, without the first, which stays in float32.

        It costs most cosine, and OpenVINO 2026.4 computes an int8 convolution of three channels wrongly.
        """
        constants = {tensor.name for tensor in self._graph.graph.initializer}
        nodes = [node for node in self._graph.graph.node if node.op_type in _LAYERS]
        return [node.name for node in nodes if constants & set(node.input[1:])][1:]

    def graph(self, as_float: Collection[str] = (), only: Collection[str] = ()) -> ModelProto:
        """The graph with all `layers` in int8 but `as_float`, or with the layers `only` in int8."""
        from onnx import ModelProto
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        copied = ModelProto()
        copied.CopyFrom(self._graph)
        with quiet_exporter():
            quantizer = QDQQuantizer(
                copied,
                per_channel=True,
                reduce_range=True,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=self._ranges,
                nodes_to_quantize=list(only or self.layers),
                nodes_to_exclude=list(as_float),
                op_types_to_quantize=list(_LAYERS),
                extra_options={},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        return _without_traces(quantizer.model.model)

    def most_sensitive(self) -> list[str]:
        """The layers, first the one that turns the features of calibration pictures most if it alone is in int8."""
        pixels = self._pixels[:_JUDGED]
        with tempfile.TemporaryDirectory() as place:
            path = Path(place, "tower.onnx")
            expected = runtime_encoder(_saved(self._graph, path))(pixels)
            cosines = {}
            for layer in self.layers:
                features = runtime_encoder(_saved(self.graph(only=[layer]), path))(pixels)
                cosines[layer] = float((features * expected).sum(dim=1).mean())
        return sorted(cosines, key=cosines.__getitem__)


def with_int8_table(graph: ModelProto) -> ModelProto:
    """A copy of a text tower whose token table [V, W] is int8 with a scale per token, and computed in float32."""
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    stored = ModelProto()
    stored.CopyFrom(graph)
    (table,) = [tensor for tensor in stored.graph.initializer if tensor.dims and tensor.dims[0] == VOCAB_SIZE]
    place, read = next((i, node) for i, node in enumerate(stored.graph.node) if table.name in node.input)
    values = numpy_helper.to_array(table)
    scales = np.maximum(np.abs(values).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / _LARGEST
    rounded = np.rint(values / scales).astype(np.int8)
    name, ids, (result,) = table.name, read.input[1], read.output
    table.CopyFrom(numpy_helper.from_array(rounded, f"{name}_int8"))
    stored.graph.initializer.append(numpy_helper.from_array(scales.astype(np.float32), f"{name}_scales"))
    stored.graph.node.remove(read)
    for node in reversed(
        [
            helper.make_node("Gather", [f"{name}_int8", ids], [f"{result}_int8"], "read_tokens"),
            helper.make_node("Gather", [f"{name}_scales", ids], [f"{result}_scales"], "read_scales"),
            helper.make_node("Cast", [f"{result}_int8"], [f"{result}_whole"], "tokens", to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{result}_whole", f"{result}_scales"], [result], "scaled_tokens"),
        ]
    ):
        stored.graph.node.insert(place, node)
    return stored


def with_int8_products(graph: ModelProto) -> ModelProto:
    """A copy of a tower whose products with weights are int8, with ranges that each call takes from its own inputs."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    copied = onnx.ModelProto()
    copied.CopyFrom(graph)
    del copied.graph.value_info[:]  # ONNX Runtime 1.20 transposes weights whose shapes stand there
    with quiet_exporter(), tempfile.TemporaryDirectory() as place:
        given, written = _saved(copied, Path(place, "float.onnx")), Path(place, "int8.onnx")
        kinds, weights = ["MatMul", "Gemm"], QuantType.QInt8
        quantize_dynamic(given, written, kinds, per_channel=True, reduce_range=True, weight_type=weights)
        return _without_traces(onnx.load(written))


def _saved(graph: ModelProto, path: Path) -> Path:
    import onnx

    onnx.save(graph, path)
    return path


def _reader(batches: Iterator[dict[str, np.ndarray]]) -> object:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(batches, None)

    return Reader()


def _without_traces(model: ModelProto) -> ModelProto:
    del model.metadata_props[:]
    return model
