"""The embedded inputs: digit scenes and a tiny teacher, made when a run asks for them and they are not there."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from training.build import build_distiller, build_training_loader, check_config
from training.config import EMBEDDED_DATA, EMBEDDED_TEACHER, TrainConfig, parse_config
from training.digit_scenes import write_digit_scenes
from training.distributed import Runtime
from training.loop import train

__all__ = ["prepare_embedded"]

logger = logging.getLogger(__name__)


def prepare_embedded(config: TrainConfig, runtime: Runtime) -> None:
    """Make the digit scenes, and by the same training loop the tiny teacher, if `config` names them and they are
    missing."""
    named = (*config.data.shards, str(config.data.val), str(config.data.zeroshot), *config.data.tests)
    if any(f"{EMBEDDED_DATA}/" in name for name in named) and not EMBEDDED_DATA.exists():
        if runtime.is_main:
            logger.info("making the embedded data: digit scenes in %s", EMBEDDED_DATA)
            write_digit_scenes(EMBEDDED_DATA, show_progress=sys.stderr.isatty())
        runtime.barrier()
    if (
        config.distils
        and config.teacher.cache is None
        and config.teacher.checkpoint == EMBEDDED_TEACHER
        and not Path(EMBEDDED_TEACHER, "best.safetensors").exists()
    ):
        logger.info("no teacher in %s: training the tiny one first (preset tiny_teacher)", EMBEDDED_TEACHER)
        teacher_config = parse_config(["tiny_teacher", "--run.device", config.run.device])
        check_config(teacher_config, runtime.world_size)
        distiller = build_distiller(teacher_config, runtime)
        train(teacher_config, runtime, distiller, build_training_loader(teacher_config, runtime, distiller))
