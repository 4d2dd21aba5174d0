"""What exported files are worth: milliseconds beside the model and its teacher, and R@1 on the tests of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.measures.costs import Cost, measure_costs
from eval.towers.exported_model import ExportedModel, exported_in_memory
from exporting.checks import Written
from exporting.folder import STEMS
from exporting.runtimes import num_bytes, runtime_encoder
from exporting.sources import Exported
from longclip_teacher.errors import InputError
from longclip_teacher.folder_lock import folder_lock
from training.build import frozen_teacher
from training.record.evaluate import evaluate_tests
from training.record.exported import ExportedRecord, write_exported
from training.record.run_report import write_run_page

__all__ = ["Measured", "kind_of", "measure", "record_of_run", "record_with_run", "teacher_beside"]

_REPEATS, _FEW_REPEATS = 30, 10
_LARGE = 100e6  # bytes of a teacher from which calls are repeated less often
_LARGEST = 2**31  # bytes of an ONNX file
_PYTORCH, _TEACHER = "PyTorch", "teacher"
_RECORDED = {"onnx/*.onnx": "onnx", "onnx/*_quantized.onnx": "onnx_int8"}  # kind: name in the run's report


@dataclass(frozen=True)
class Measured:
    """The exported files, both towers of a kind together, and the costs of each kind."""

    models: Mapping[str, ExportedModel]
    """By kind, such as `onnx/*_fp16.onnx`."""
    teacher: ExportedModel | None
    """The run's teacher, exported in memory."""
    costs: Mapping[str, Cost]
    """By kind, of the model in PyTorch, and of the teacher."""
    repeats: int

    @property
    def torch_cost(self) -> Cost:
        """The model in PyTorch."""
        return self.costs[_PYTORCH]

    @property
    def teacher_cost(self) -> Cost:
        """The exported teacher, if there is one."""
        return self.costs[_TEACHER]


def kind_of(written: Written) -> str:
    """The name of a file without its tower, which the two files of a kind share."""
    return written.name.replace(STEMS[written.tower], "*")


def measure(model: Exported, folder: Path, written: Sequence[Written], teacher: ExportedModel | None) -> Measured:
    """Time all kinds of files, the model in PyTorch and the teacher, all in turns, with torch's number of threads."""
    files: dict[str, dict[str, Path]] = {}
    for one in written:
        files.setdefault(kind_of(one), {})[one.tower] = folder / one.name
    models = {
        kind: ExportedModel(
            model.model,
            runtime_encoder(paths["image"]),
            runtime_encoder(paths["text"]),
            {tower: num_bytes(path) for tower, path in paths.items()},
        )
        for kind, paths in files.items()
    }
    repeats = _FEW_REPEATS if teacher is not None and teacher.num_bytes > _LARGE else _REPEATS
    beside = {} if teacher is None else {_TEACHER: teacher}
    costs = measure_costs({_PYTORCH: model.model, **models, **beside}, repeats=repeats)
    for name, exported in (models | beside).items():
        costs[name]["bytes"] = exported.num_bytes
    return Measured(models, teacher, costs, repeats)


def teacher_beside(model: Exported, say: Callable[[str], None]) -> ExportedModel | None:
    """The teacher of the run, exported in memory. None if there is none at hand: `say` gets the reason in one line."""
    config = model.config
    if model.kind == "teacher":
        return None
    if config is None:
        say("no row for the teacher: a weight file does not name it, its run folder does")
        return None
    checkpoint = config.teacher.checkpoint
    if not config.distils or checkpoint is None:
        say(f"no row for the teacher: the run {'names' if config.distils else 'has'} none")
        return None
    if not Path(checkpoint).exists():
        say(f"no row for the teacher: the run names {checkpoint}, which is not here")
        return None
    try:
        teacher = frozen_teacher(config)
    except InputError as error:
        say(f"no row for the teacher: {error}")
        return None
    if max(4 * sum(part.numel() for part in tower.parameters()) for tower in (teacher.visual, teacher.text)) > _LARGEST:
        say(f"no row for the teacher: a tower of {checkpoint} does not fit into an ONNX file of 2 GB")
        return None
    say(f"exporting the teacher {checkpoint} to compare its milliseconds")
    return exported_in_memory(teacher)


def record_of_run(model: Exported, measured: Measured, say: Callable[[str], None]) -> ExportedRecord | None:
    """What the run's report shows of the files for ONNX Runtime, with R@1 on the run's tests. None without a run."""
    if model.config is None:
        return None
    data = replace(model.config.data, zeroshot=None)  # thousands of pictures, one thread
    config = replace(model.config, data=data, run=replace(model.config.run, precision="fp32"))
    models: dict[str, dict[str, Any]] = {}
    for kind, name in _RECORDED.items():
        if (exported := measured.models.get(kind)) is not None:
            results = {}
            try:
                if data.tests:
                    say(f"R@1 of {kind} on the run's tests")
                results = evaluate_tests(exported, config)
            except InputError as error:
                say(f"R@1 of {kind} was not measured: {error}")
            models[f"{model.kind}_{name}"] = {**results, "cost": measured.costs[kind]}
    if measured.teacher is not None:
        models["teacher_onnx"] = {"cost": measured.teacher_cost}
    conditions = [
        "_onnx: exported by scripts/export.py, in ONNX Runtime, both files together; float32, but for _int8; "
        f"ms: batch 1, cpu, 1 thread, median of {measured.repeats} calls, in turns"
    ]
    return ExportedRecord(models, conditions)


def record_with_run(model: Exported, record: ExportedRecord, say: Callable[[str], None]) -> None:
    """Keep the record in the run's folder, and show it in the report of a run that was judged.

    If that is impossible, as while the run trains on, `say` gets the reason in one line.
    """
    assert model.run is not None
    try:
        with folder_lock(model.run):
            write_exported(model.run, record, model.sha256)
            if (model.run / "results.json").is_file():
                write_run_page(model.run, model.model)
                say(f"{model.run / 'report.html'} shows the exported files")
    except InputError as error:
        say(f"the report of the run does not show the exported files: {error}")
