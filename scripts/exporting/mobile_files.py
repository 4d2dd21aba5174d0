"""The towers for telephones: ExecuTorch files and Core ML packages, for one picture or one caption at a time.

Shapes: R image side, L tokens.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from exporting.checks import FULL, compare_tower
from exporting.folder import STEMS
from exporting.sources import Exported
from longclip_teacher.errors import InputError
from mobileclip_student.onnx_graphs import quiet_exporter

__all__ = ["write_core_ml", "write_executorch"]

_INPUTS = {"image": "pixel_values", "text": "input_ids"}
_OUTPUTS = {"image": "image_embeds", "text": "text_embeds"}


def write_executorch(model: Exported, folder: Path) -> list[dict[str, str]]:
    """Write executorch/*.pte for XNNPACK, each compared with the model by ExecuTorch's own runtime. Return rows of the
    table of files."""
    (folder / "executorch").mkdir()
    rows = []
    for tower, stem in STEMS.items():
        path = folder / "executorch" / f"{stem}.pte"
        with _told_in_a_line("--executorch", tower):
            path.write_bytes(_executorch_file(_program(model, tower)))
        found = compare_tower(model, tower, _executorch_encoder(path), path.name, FULL)
        agreement = {"cosine": f"{found.cosine:.7f}", "max diff": f"{found.difference:.1e}"}
        rows.append({"file": f"executorch/{path.name}", "bytes": str(path.stat().st_size), **agreement})
    return rows


def write_core_ml(model: Exported, folder: Path) -> list[dict[str, str]]:
    """Write coreml/*.mlpackage. They are not compared: outside Apple's systems nothing runs them. Return rows of the
    table of files."""
    (folder / "coreml").mkdir()
    rows = []
    for tower, stem in STEMS.items():
        path = folder / "coreml" / f"{stem}.mlpackage"
        with _told_in_a_line("--coreml", tower):
            _save_core_ml(model, tower, path)
        num_bytes = sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
        rows.append({"file": f"coreml/{path.name}", "bytes": str(num_bytes), "cosine": "not run"})
    return rows


@torch.no_grad()
def _program(model: Exported, tower: str, dtype: torch.dtype = torch.int64) -> ExportedProgram:
    """A tower for [1, 3, R, R] pixels, or for [1, L] token ids with L from 2 to the context length."""
    if tower == "image":
        return torch.export.export(model.towers[0], (torch.zeros(1, 3, model.image_size, model.image_size),))
    lengths = {1: Dim("tokens", min=2, max=model.context_length)}
    example = torch.ones(1, min(9, model.context_length - 1), dtype=dtype)
    return torch.export.export(model.towers[1], (example,), dynamic_shapes=(lengths,))


def _executorch_file(program: ExportedProgram) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    return bytes(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


def _executorch_encoder(path: Path) -> Callable[[Tensor], Tensor]:
    """The function of a file, which takes one picture or caption at a time."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    # a copy: the next call writes there
    return lambda batch: torch.cat([method.execute([row[None].contiguous()])[0].clone() for row in batch])


def _save_core_ml(model: Exported, tower: str, path: Path) -> None:
    import coremltools
    import numpy as np

    program = _program(model, tower, torch.int32).run_decompositions({})  # Core ML has no int64 inputs
    if tower == "image":
        given = coremltools.TensorType(_INPUTS[tower], (1, 3, model.image_size, model.image_size))
    else:
        lengths = coremltools.RangeDim(2, model.context_length)
        given = coremltools.TensorType(_INPUTS[tower], (1, lengths), dtype=np.int32)
    package = coremltools.convert(
        program,
        inputs=[given],
        outputs=[coremltools.TensorType(_OUTPUTS[tower])],
        convert_to="mlprogram",
        minimum_deployment_target=coremltools.target.iOS17,
        compute_precision=coremltools.precision.FLOAT32,  # rounding that nobody has measured is left out
    )
    package.save(str(path))


@contextmanager
def _told_in_a_line(option: str, tower: str) -> Iterator[None]:
    """Keep the libraries' remarks off stderr, and say in one line what they cannot convert."""
    try:
        with quiet_exporter(), redirect_stderr(io.StringIO()):
            yield
    except Exception as error:  # each cause has a class of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{option}: the {tower} tower cannot be converted ({reason}); leave {option} out") from None
