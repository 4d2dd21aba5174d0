"""From a configuration to the objects of a run: the model, its teacher, the loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.benchmarks.class_prompts import OPENAI_TEMPLATES, read_classnames, read_templates
from eval.benchmarks.labelled_images import find_labelled_images
from eval.measures.zeroshot import zeroshot_classifier
from eval.towers.models import load_model
from longclip_teacher import LongCLIP, create_teacher, load_teacher
from longclip_teacher.activation import Activation
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer
from mobileclip_student import MobileCLIP, create_student, load_student
from mobileclip_student.inference import compile_towers
from mobileclip_student.model import override, variant_config
from mobileclip_student.start import TIMM, LongCLIPText, load_image_tower, load_text_tower, truncated_normal_
from training.cache.datacompdr import DataCompDRStore, datacompdr_facts
from training.cache.reader import cache_facts, open_cache
from training.data.index import ShardIndex, expand_patterns
from training.data.loader import LoaderSettings, OpenStore, ShardLoader, build_loader
from training.data.store import TeacherFacts, TeacherStore
from training.distill import TOWERS, Distiller, Teachers
from training.distributed import Runtime
from training.settings.options import SpeedOptions
from training.settings.tree import TrainConfig
from training.step import seed_everything

CLIP_CONTEXT_LENGTH = 77
_SCALED_BY_TEACHER = {
    f"{name}_{length}"
    for name in ("crd", "affinity", "gd", "kd", "deit_soft", "deit_hard")
    for length in ("long", "short")
}
DATACOMPDR = "datacompdr"  # as teacher.cache: the shards hold the features themselves

__all__ = [
    "DATACOMPDR",
    "build_distiller",
    "build_student",
    "build_training_loader",
    "check_config",
    "frozen_teacher",
    "validation_teacher",
]


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
    _check_stage(config)
    _check_teachers(config)


_STAGE_PAIR_LOSSES = {"kd_long", "deit_soft_long", "deit_hard_long"}  # of the image stage, against class prompts


def _check_stage(config: TrainConfig) -> None:
    """Refuse what a run of one tower cannot do."""
    run, data, mix = config.run, config.data, config.mix
    for name, given, stage in (("images", data.images, "image"), ("captions", data.captions, "text")):
        if given and run.stage != stage:
            raise InputError(f"--data.{name} is read with --run.stage {stage} alone: give --data.shards")
    if max(mix.mixup, mix.cutmix) > 0 and (run.stage != "image" or not config.runs_teacher):
        raise InputError(
            "mixup and cutmix need --run.stage image and a teacher that is run: mixed pictures have no caption, and "
            "no stored features"
        )
    if run.stage == "both":
        return
    if not config.distils:
        raise InputError(f"--run.stage {run.stage} learns from a teacher: give --teacher.checkpoint and a loss")
    if config.teacher.cache is not None or config.teacher.short is not None or config.teacher.ensemble:
        raise InputError(f"--run.stage {run.stage} runs one teacher: leave cache, short and ensemble out")
    allowed = {name for name in config.loss.weights if name.endswith(f"_{run.stage}")}
    if run.stage == "image":
        allowed |= {"masked_fd"} | (_STAGE_PAIR_LOSSES if data.zeroshot is not None else set())
    if wrong := sorted(config.loss.active - allowed):
        raise InputError(
            f"--run.stage {run.stage} has no pairs of pictures and captions: set --loss.{wrong[0]} 0 "
            f"(it can use {', '.join(sorted(allowed))})"
        )


def _check_teachers(config: TrainConfig) -> None:
    """Refuse what stored features, several teachers or chunks cannot give."""
    teacher, loss = config.teacher, config.loss
    layers = sorted(f"{name}_{tower}" for tower, names in loss.layer_losses.items() for name in names)
    if not config.distils:
        return
    if teacher.cache is not None and (teacher.short is not None or teacher.ensemble):
        raise InputError(
            "--teacher.cache holds one teacher's features: leave --teacher.short and --teacher.ensemble out"
        )
    if layers and (not config.runs_teacher or teacher.ensemble):
        raise InputError(
            f"--loss.{layers[0]} looks into one teacher that is run: leave --teacher.cache and --teacher.ensemble out"
        )
    if layers and config.run.accumulation > 1:
        raise InputError(f"--loss.{layers[0]} needs the whole batch at once: set --run.accumulation 1")


def build_distiller(config: TrainConfig, runtime: Runtime) -> Distiller:
    """The trained model and the frozen teachers on the run's device; the same initial weights on every process.

    Where the teacher's features are stored it is not loaded; in a run of one tower, only that tower of it is kept.
    """
    teachers = _teachers(config)
    seed_everything(config.run.seed)
    if config.run.train == "teacher":
        model: MobileCLIP | LongCLIP = _teacher_to_train(config)
    else:
        model = build_student(config, None if teachers is None else teachers.facts["long"].embed_dim)
    model.requires_grad_(True)
    model.train()
    if config.loss.init_logit_scale is not None:
        with torch.no_grad():
            model.logit_scale.fill_(config.loss.init_logit_scale).log_()
    init = config.init
    distiller = Distiller(
        model,
        teachers,
        config.loss,
        towers=TOWERS if config.run.stage == "both" else (config.run.stage,),
        frozen=tuple(tower for tower in TOWERS if getattr(init, f"freeze_{tower}")),
        streaming=config.speed.savings.streaming_losses,
    )
    _apply_speed(config.speed, model, [] if teachers is None else teachers.models)
    if config.run.sync_bn and runtime.world_size > 1:
        if runtime.device.type != "cuda":
            raise InputError("--run.sync_bn needs GPUs: torch has no synchronised BatchNorm on the CPU")
        distiller = torch.nn.SyncBatchNorm.convert_sync_batchnorm(distiller)
    if teachers is not None:
        teachers.to(runtime.device)
    return distiller.to(runtime.device)


def build_student(config: TrainConfig, teacher_width: int | None) -> MobileCLIP:
    """The student with its starting weights. `teacher_width` is the teacher's embedding width, if there is one."""
    options, init = config.student, config.init
    changes = options.shape
    if options.init is not None:
        return _whole_student(config, changes)
    sources = {
        tower: load_model(source)
        for tower, source in (("image", init.image), ("text", init.text))
        if source not in (None, TIMM)
    }
    if changes["embed_dim"] is None:
        widths = {source.embed_dim for source in sources.values() if isinstance(source, MobileCLIP)}
        if config.run.stage != "both" and teacher_width is not None:
            widths.add(teacher_width)
        if len(widths) > 1:
            raise InputError(
                f"the towers to start from have embeddings of {' and '.join(map(str, sorted(widths)))}: they do not fit"
            )
        changes["embed_dim"] = next(iter(widths), None)
    elif config.run.stage != "both" and changes["embed_dim"] != teacher_width:
        raise InputError(
            f"--run.stage {config.run.stage} learns in the teacher's space of {teacher_width} channels: set "
            "--student.embed_dim None"
        )
    shape = override(variant_config(options.variant), **changes)
    student = create_student(shape, context_length=options.context_length, pad_mask=options.pad_mask)
    if init.truncated_normal:
        truncated_normal_(student)
    if init.image is not None:
        image_source = sources.get("image", TIMM)
        if not isinstance(image_source, MobileCLIP | str):
            raise InputError(f"--init.image {init.image} is no student: give one, or {TIMM}")
        load_image_tower(student, image_source)
    if init.text is not None:
        text_source = sources["text"]
        if isinstance(text_source, MobileCLIP):
            load_text_tower(student, text_source)
        elif isinstance(text_source, LongCLIP):
            clip = text_source.config
            load_text_tower(student, LongCLIPText(text_source.text.state_dict(), clip.text.heads, clip.activation))
        else:
            raise InputError(f"--init.text {init.text} is neither a student nor a Long-CLIP")
    return student


def _whole_student(config: TrainConfig, changes: dict[str, Any]) -> MobileCLIP:
    """What student.init names, which brings its shape; refused where the options ask for another."""
    options = config.student
    if config.init.image is not None or config.init.text is not None:
        raise InputError("--student.init brings both towers: leave --init.image and --init.text out")
    assert options.init is not None
    student = load_student(options.init, options.variant, options.context_length, options.pad_mask)
    for name, value in changes.items():
        if value is not None and override(student.config, **{name: value}) != student.config:
            raise InputError(
                f"{options.init} has another {name} than {value}: set --student.{name} None, for its shape is its own"
            )
    return student


def _teacher_to_train(config: TrainConfig) -> LongCLIP:
    options = config.teacher
    if options.init is None:
        return create_teacher(options.variant)
    return load_teacher(options.init, activation=options.activation)


def _teachers(config: TrainConfig) -> Teachers | None:
    if not config.distils:
        return None
    if not config.runs_teacher:
        return Teachers(stored=_stored_facts(config))
    options, stage = config.teacher, config.run.stage
    teacher = frozen_teacher(config)
    prompts = _prompts(teacher, config) if stage == "image" and config.loss.active & _STAGE_PAIR_LOSSES else None
    if stage == "image":
        del teacher.text
    elif stage == "text":
        del teacher.visual
    others = [_frozen(name, options.activation) for name in options.ensemble]
    short = None
    if options.short is not None and config.loss.uses_short:
        short = _frozen(options.short, options.activation, context_length=CLIP_CONTEXT_LENGTH)
    stored = None if options.cache is None else _stored_facts(config)
    return Teachers([teacher, *others], short, stored, prompts)


def _prompts(teacher: LongCLIP, config: TrainConfig) -> Tensor:
    """The teacher's features of the classes of data.zeroshot, with which pictures without captions are compared."""
    assert config.data.zeroshot is not None
    classes = read_classnames(config.data.zeroshot_classnames) or find_labelled_images(config.data.zeroshot).classnames
    return zeroshot_classifier(teacher, classes, read_templates(config.data.zeroshot_templates) or OPENAI_TEMPLATES)


def frozen_teacher(config: TrainConfig) -> LongCLIP:
    """The teacher that teacher.checkpoint names, on the CPU. Raises InputError for a student, or without a name."""
    checkpoint = config.teacher.checkpoint
    if checkpoint is None:
        raise InputError("--teacher.stored_features False runs the teacher: name it with --teacher.checkpoint")
    return _frozen(checkpoint, config.teacher.activation)


def _frozen(checkpoint: str, activation: Activation | None, context_length: int | None = None) -> LongCLIP:
    teacher = load_model(checkpoint, activation=activation, context_length=context_length)
    if not isinstance(teacher, LongCLIP):
        raise InputError(f"the teacher {checkpoint} is a student; give a Long-CLIP or CLIP")
    return teacher.requires_grad_(False).eval()


def validation_teacher(config: TrainConfig, device: torch.device) -> LongCLIP | None:
    """The whole teacher, whose other tower a run of one tower is validated with; None where both are trained."""
    return None if config.run.stage == "both" else frozen_teacher(config).to(device)


def _stored_facts(config: TrainConfig) -> TeacherFacts | None:
    """What the stored features say of their teacher; None without a store."""
    cache = config.teacher.cache
    if not config.distils or cache is None:
        return None
    if cache != DATACOMPDR:
        return cache_facts(Path(cache))
    facts = datacompdr_facts(expand_patterns(config.data.shards), config.teacher.stored_widths)
    if facts.logit_scale is None and config.loss.teacher_scale is None and config.loss.active & _SCALED_BY_TEACHER:
        raise InputError(
            "these shards do not tell their teachers' logit scale: give --loss.teacher_scale (DataCompDR: 100)"
        )
    return facts


def _apply_speed(speed: SpeedOptions, model: MobileCLIP | LongCLIP, teachers: list[LongCLIP]) -> None:
    for text_side in (model.text_encoder if isinstance(model, MobileCLIP) else model, *teachers):
        text_side.trim_captions = speed.savings.trim
    if isinstance(model, MobileCLIP):
        model.image_encoder.channels_last = speed.savings.channels_last
    for compiled in (model, *teachers) if speed.compile else ():
        compile_towers(compiled)


def build_training_loader(config: TrainConfig, runtime: Runtime, distiller: Distiller) -> ShardLoader:
    """The loader of this process: the model's view of each picture, and the teachers' where they differ."""
    data, savings = config.data, config.speed.savings
    facts = {} if distiller.teachers is None else distiller.teachers.facts
    context_length = max(distiller.model.context_length, *(known.context_length for known in facts.values()), 0)
    settings = LoaderSettings(
        data.shards,
        views=distiller.views,
        augment=config.augment,
        tokenizer=CaptionTokenizer(context_length, fast=savings.fast_tokenizer),
        context_length=context_length,
        global_batch_size=config.run.global_batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=config.run.seed,
        num_workers=data.num_workers,
        max_bad_share=data.max_bad_share,
        shuffle_shards=data.shuffle_shards,
        epoch_samples=data.epoch_samples,
        open_store=_store_opener(config, facts.get("long")),
        stored_features=config.teacher.stored_features,
        stage=config.run.stage,
        images=data.images,
        captions=data.captions,
        fast_decode=savings.fast_decode,
        trim_captions=savings.trim,
        pin_memory=runtime.device.type == "cuda",
    )
    loader = build_loader(settings)
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
        return open_cache(Path(cache), index, config.augment, teacher.checkpoint, config.speed.savings.fast_decode)

    return open_store
