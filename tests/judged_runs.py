"""Configurations of runs that are evaluated on a folder of boards, the same boards by class, and prompt templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.settings.options import DataOptions, RunOptions, StudentOptions
from training.settings.tree import TrainConfig

__all__ = ["config_of"]


def config_of(data: Path, stage: Any = "both", **run: Any) -> TrainConfig:
    """A run of the tiny student that reads `boards`, `classes` and `templates.txt` in `data`; `run` are further run
    options."""
    return TrainConfig(
        run=RunOptions(stage=stage, **run),
        data=DataOptions(
            val=data / "boards",
            tests=(f"boards=folder:{data / 'boards'}",),
            zeroshot=data / "classes",
            zeroshot_classnames=None,
            zeroshot_templates=str(data / "templates.txt"),
            num_workers=0,
        ),
        student=StudentOptions(variant="tiny"),
    )
