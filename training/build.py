"""From a configuration to the objects of a run: the model, its teacher, the loader."""

from __future__ import annotations

from pathlib import Path

import torch

from eval.models import load_model
from longclip_teacher import LongCLIP, create_teacher, load_teacher
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer
from mobileclip_student import MobileCLIP, create_student, load_student
from mobileclip_student.inference import compile_towers
from training.config import SpeedOptions, TrainConfig
from training.datacompdr import DataCompDRStore, datacompdr_facts
from training.distill import Distiller
from training.distributed import Runtime
from training.shard_index import ShardIndex, expand_patterns
from training.shards import OpenStore, ShardLoader, build_loader
from training.step import seed_everything
from training.stored import TeacherFacts, TeacherStore
from training.teacher_cache import cache_facts, open_cache
from training.transforms import ViewSpec

DATACOMPDR = "datacompdr"  # as teacher.cache: the shards hold the features themselves

__all__ = ["DATACOMPDR", "build_distiller", "build_training_loader", "check_config", "frozen_teacher"]


def check_config(config: TrainConfig, world_size: int) -> None:
    """Refuse, before any work, what the fields of a configuration cannot tell one by one."""
    run, loss = config.run, config.loss
    if run.global_batch_size % world_size:
        raise InputError(f"--run.global_batch_size {run.global_batch_size} does not divide by {world_size} processes")
    local = run.global_batch_size // world_size
    if run.accumulation > local:
        raise InputError(f"--run.accumulation {run.accumulation} is more than the {local} samples of a process")
    compared = local if loss.pca_scope == "rank" else run.global_batch_size
    if loss.uses_short and loss.pca_scope != "off" and compared <= loss.pca_rank:
        raise InputError(
            f"PCA of rank {loss.pca_rank} does nothing on {compared} samples: raise --run.global_batch_size above "
            f"{loss.pca_rank} (better {2 * loss.pca_rank}), lower --loss.pca_rank, or set --loss.pca_scope off"
        )
    if not config.distils and max(loss.clip_long, loss.clip_short) == 0:
        raise InputError(
            "without a teacher nothing is left to learn from: raise --loss.clip_long, or give --teacher.checkpoint"
        )
    if run.train == "student" and config.teacher.init is not None:
        raise InputError(
            "--teacher.init belongs to --run.train teacher; a frozen teacher is given as --teacher.checkpoint"
        )


def build_distiller(config: TrainConfig, runtime: Runtime) -> Distiller:
    """The trained model and the frozen teacher on the run's device; the same initial weights on every process.

    Where the teacher's features are stored it is not loaded.
    """
    seed_everything(config.run.seed)
    model = _teacher_to_train(config) if config.run.train == "teacher" else _student(config)
    model.requires_grad_(True)
    model.train()
    if config.loss.init_logit_scale is not None:
        with torch.no_grad():
            model.logit_scale.fill_(config.loss.init_logit_scale).log_()
    teacher = frozen_teacher(config) if config.runs_teacher else None
    distiller = Distiller(model, teacher, config.loss, _stored_facts(config), config.speed.streaming_losses)
    _apply_speed(config.speed, model, teacher)
    if config.run.sync_bn and runtime.world_size > 1:
        if runtime.device.type != "cuda":
            raise InputError("--run.sync_bn needs GPUs: torch has no synchronised BatchNorm on the CPU")
        distiller = torch.nn.SyncBatchNorm.convert_sync_batchnorm(distiller)
    if distiller.teacher is not None:
        distiller.teacher.to(runtime.device)
    return distiller.to(runtime.device)


def _student(config: TrainConfig) -> MobileCLIP:
    options = config.student
    if options.init is None:
        return create_student(options.variant, context_length=options.context_length, pad_mask=options.pad_mask)
    return load_student(options.init, options.variant, options.context_length, options.pad_mask)


def _teacher_to_train(config: TrainConfig) -> LongCLIP:
    options = config.teacher
    if options.init is None:
        return create_teacher(options.variant)
    return load_teacher(options.init, activation=options.activation)


def frozen_teacher(config: TrainConfig) -> LongCLIP:
    """The teacher that teacher.checkpoint names, on the CPU. Raises InputError for a student, or without a name."""
    checkpoint = config.teacher.checkpoint
    if checkpoint is None:
        raise InputError("--teacher.stored_features False runs the teacher: name it with --teacher.checkpoint")
    teacher = load_model(checkpoint, activation=config.teacher.activation)
    if not isinstance(teacher, LongCLIP):
        raise InputError(f"--teacher.checkpoint {checkpoint} is a student; give a Long-CLIP or CLIP")
    return teacher.requires_grad_(False).eval()


def _stored_facts(config: TrainConfig) -> TeacherFacts | None:
    """What the stored features say of their teacher; None without a store."""
    cache = config.teacher.cache
    if not config.distils or cache is None:
        return None
    if cache != DATACOMPDR:
        return cache_facts(Path(cache))
    facts = datacompdr_facts(expand_patterns(config.data.shards), config.teacher.stored_widths)
    loss = config.loss
    if facts.logit_scale is None and loss.teacher_scale is None and max(loss.crd_long, loss.crd_short) > 0:
        raise InputError(
            "these shards do not tell their teachers' logit scale: give --loss.teacher_scale (DataCompDR: 100)"
        )
    return facts


def _apply_speed(speed: SpeedOptions, model: MobileCLIP | LongCLIP, teacher: LongCLIP | None) -> None:
    for text_side in (model.text_encoder if isinstance(model, MobileCLIP) else model, teacher):
        if text_side is not None:
            text_side.trim_captions = speed.trim
    if isinstance(model, MobileCLIP):
        model.image_encoder.channels_last = speed.channels_last
    for compiled in (model, teacher) if speed.compile else ():
        if compiled is not None:
            compile_towers(compiled)


def build_training_loader(config: TrainConfig, runtime: Runtime, distiller: Distiller) -> ShardLoader:
    """The loader of this process: the model's view of each picture, and the teacher's where it differs."""
    data, speed, model, teacher = config.data, config.speed, distiller.model, distiller.teacher
    views = [_view(model)]
    if teacher is not None and _view(teacher) != views[0]:
        views.append(_view(teacher))
    context_length = max(model.context_length, distiller.facts.context_length if distiller.facts is not None else 0)
    loader = build_loader(
        data.shards,
        views=views,
        augment=config.augment,
        tokenizer=CaptionTokenizer(context_length, fast=speed.fast_tokenizer),
        context_length=context_length,
        global_batch_size=config.run.global_batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=config.run.seed,
        num_workers=data.num_workers,
        max_bad_share=data.max_bad_share,
        shuffle_shards=data.shuffle_shards,
        epoch_samples=data.epoch_samples,
        open_store=_store_opener(config, distiller.facts),
        stored_features=config.teacher.stored_features,
        fast_decode=speed.fast_decode,
        trim_captions=speed.trim,
        pin_memory=runtime.device.type == "cuda",
    )
    if loader.steps_per_epoch < 1:
        raise InputError(
            f"{loader.num_samples} samples make no batch of {config.run.global_batch_size}: "
            "lower --run.global_batch_size"
        )
    return loader


def _store_opener(config: TrainConfig, facts: TeacherFacts | None) -> OpenStore | None:
    cache, teacher = config.teacher.cache, config.teacher
    if not config.distils or cache is None:
        return None

    def open_store(index: ShardIndex | None) -> TeacherStore:
        if cache == DATACOMPDR:
            assert facts is not None
            return DataCompDRStore(facts)
        if index is None:
            raise InputError("streamed shards have no sidecars: copy them to a disk, or leave --teacher.cache out")
        return open_cache(Path(cache), index, config.augment, teacher.checkpoint, config.speed.fast_decode)

    return open_store


def _view(model: MobileCLIP | LongCLIP) -> ViewSpec:
    return ViewSpec(model.image_size, model.preprocess_cfg.interpolation)
