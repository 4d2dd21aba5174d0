"""exported.json in a run's folder: what scripts/export.py measured of the files that it made of the run's weights.

The run's report shows it beside the models in PyTorch. It tells by the sha256 of the weight file whether the figures
are still those of the run's weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longclip_teacher.atomic_files import json_text
from longclip_teacher.errors import InputError, warn_once
from longclip_teacher.weights_file import file_sha256, run_weights
from training.generations import verified_text, write_text_generation

__all__ = ["ExportedRecord", "read_exported", "write_exported"]

logger = logging.getLogger(__name__)
_NAME = "exported.json"


@dataclass(frozen=True)
class ExportedRecord:
    """Figures of exported files."""

    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By name, such as `student_onnx`, in the form of results.json: the JSON of each test, and `cost`."""
    conditions: Sequence[str] = ()
    """What the names mean and how the figures were measured, for the page."""


def write_exported(run: Path, record: ExportedRecord, weights_sha256: str) -> None:
    """Write the record of files that were made of the weight file of this sha256. The caller holds the folder's lock.

    Raises InputError if the folder cannot be written.
    """
    content = {"weights_sha256": weights_sha256, "conditions": record.conditions, "models": record.models}
    write_text_generation(run / _NAME, json_text(content))


def read_exported(run: Path) -> ExportedRecord:
    """The record of a run; an empty one if there is none, or if the run has other weights by now.

    A damaged record is named in a warning and left out.
    """
    path = run / _NAME
    if not path.exists():
        return ExportedRecord()
    try:
        content = json.loads(verified_text(path))
        if content["weights_sha256"] != file_sha256(run_weights(run)):
            return ExportedRecord()
        models = {str(name): dict(model, cost=dict(model["cost"])) for name, model in content["models"].items()}
        return ExportedRecord(models, [str(line) for line in content["conditions"]])
    except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        warn_once(logger, f"{path} is damaged: the exported files are left out of the report, export the run again")
        return ExportedRecord()
