"""The embedded inputs: digit scenes, a tiny teacher, its stored features and first stages.

They are made when a run asks for them and they do not exist.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch

from eval.base.processes import Runtime, job_lock, on_main
from longclip_teacher.errors import InputError
from training.build import build_distillation, build_training_loader, frozen_teacher
from training.cache.manifest import CACHE_MANIFEST, shard_identities, write_cache_manifest
from training.cache.writer import SidecarWriter, cache_settings
from training.data.digit_scenes import is_outdated, write_digit_scenes
from training.data.index import ShardIndex, expand_patterns
from training.loop import train
from training.settings.checks import check_config
from training.settings.options import EMBEDDED_CACHE, EMBEDDED_DATA, EMBEDDED_TEACHER, DataOptions
from training.settings.own_data import is_embedded, trains_on_embedded
from training.settings.tree import TrainConfig, parse_config

__all__ = ["prepare_embedded"]

logger = logging.getLogger(__name__)
_STAGES = {f"runs/{preset}": preset for preset in ("two_stage_image", "two_stage_text")}
_CACHE_BATCH = 256


def prepare_embedded(config: TrainConfig, runtime: Runtime) -> None:
    """Make the embedded inputs that `config` names and that are missing: the digit scenes, the tiny teacher, its stored
    features, and the first stages of two_stage. Teacher and stages are trained by the same training loop.

    Raises InputError if a first stage is missing and the run has other data, because the stage would learn from digits.
    """
    if _names_embedded_data(config.data):
        on_main(_make_data)
    cached = config.teacher.cache == EMBEDDED_CACHE and not _is_there(Path(EMBEDDED_CACHE, CACHE_MANIFEST))
    teachers = {config.teacher.checkpoint, config.teacher.short} if config.distils else set()
    if EMBEDDED_TEACHER in teachers and (config.teacher.cache is None or cached):
        _run_first("tiny_teacher", Path(EMBEDDED_TEACHER), config, runtime)
    if cached and config.distils:
        with job_lock(Path(EMBEDDED_CACHE)):
            on_main(lambda: _write_cache(config))
    for tower, source in (("image", config.init.image), ("text", config.init.text)):
        if source not in _STAGES:
            continue
        if not (trains_on_embedded(config.data) or _is_finished(Path(source))):
            raise InputError(
                f"--init.{tower} {source}: no finished run there; train it on your data first with preset "
                f"{_STAGES[source]}, or give another --init.{tower}"
            )
        _run_first(_STAGES[source], Path(source), config, runtime)


def _names_embedded_data(data: DataOptions) -> bool:
    evaluated = (data.val, data.zeroshot, *(entry.partition(":")[2] for entry in data.tests))
    return trains_on_embedded(data) or any(path is not None and is_embedded(path) for path in evaluated)


def _make_data() -> None:
    if not EMBEDDED_DATA.exists():
        logger.info("making the embedded data: digit scenes in %s", EMBEDDED_DATA)
        write_digit_scenes(EMBEDDED_DATA, show_progress=sys.stderr.isatty())
    elif is_outdated(EMBEDDED_DATA):
        logger.warning(
            "%s is of another version than this code: delete it and %s to have both made anew",
            EMBEDDED_DATA,
            EMBEDDED_TEACHER,
        )


def _run_first(preset: str, out_dir: Path, config: TrainConfig, runtime: Runtime) -> None:
    if _is_finished(out_dir):
        return
    logger.info("nothing in %s yet: running preset %s first", out_dir, preset)
    # a run that was stopped goes on
    first = parse_config([preset, "--run.device", config.run.device, "--run.resume", "auto"])
    check_config(first, runtime.world_size)
    with job_lock(out_dir):
        prepare_embedded(first, runtime)
        distillation = build_distillation(first, runtime)
        train(first, runtime, distillation, build_training_loader(first, runtime, distillation))


def _is_finished(out_dir: Path) -> bool:
    return _is_there(out_dir / "best.safetensors")


def _is_there(path: Path) -> bool:
    """Rank 0's view, for all processes: another job may be writing the file."""
    return bool(on_main(lambda: {"is_there": torch.tensor(path.exists())})["is_there"])


def _write_cache(config: TrainConfig) -> None:
    """Store the teacher's features of one crop per picture. For any data, scripts/cache_teacher.py does this."""
    logger.info("storing the teacher's features of the embedded pictures in %s", EMBEDDED_CACHE)
    folder, checkpoint = Path(EMBEDDED_CACHE), str(config.teacher.checkpoint)
    teacher = frozen_teacher(config)
    index = ShardIndex(expand_patterns(config.data.shards))
    settings = cache_settings(checkpoint, teacher, views=1, augment=config.augment)
    writer = SidecarWriter(teacher, settings, index, folder, _CACHE_BATCH, config.data.num_workers)
    for _ in writer.write(list(enumerate(shard_identities(index))), lambda _: None):
        pass
    write_cache_manifest(folder, settings)
