"""From a configuration to the objects of a run: the model, its teacher, the loader."""

from __future__ import annotations

import logging
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor

from eval.base.processes import Runtime
from eval.benchmarks.class_prompts import OPENAI_TEMPLATES, read_classnames, read_templates
from eval.benchmarks.labelled_images import find_labelled_images
from eval.measures.zeroshot import zeroshot_classifier
from eval.towers.models import load_model
from longclip_teacher import LongCLIP, create_teacher, load_teacher
from longclip_teacher.activation import Activation
from longclip_teacher.ancestry import as_teacher, describe_terms, merged
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer
from mobileclip_student import MobileCLIP, create_student, load_student
from mobileclip_student.inference import compile_towers
from mobileclip_student.initial_weights import TIMM, LongCLIPText, load_image_tower, load_text_tower, truncated_normal_
from mobileclip_student.model import override, variant_config
from training.cache.datacompdr import DataCompDRStore, datacompdr_teacher_info
from training.cache.manifest import cache_place
from training.cache.reader import cached_teacher_info, open_cache
from training.data.index import ShardIndex, expand_patterns
from training.data.loader import LoaderSettings, OpenStore, ShardLoader, build_loader
from training.data.remote_index import GIGABYTE
from training.data.store import TeacherInfo, TeacherStore
from training.distill import Distiller
from training.distillation import Distillation, assemble
from training.settings.needs import TOWERS, Needs
from training.settings.options import DATACOMPDR, SpeedOptions
from training.settings.tree import TrainConfig
from training.step import seed_everything
from training.teachers import Teachers, views_of
from training.unreached import check_learns

logger = logging.getLogger(__name__)
CLIP_CONTEXT_LENGTH = 77

__all__ = [
    "build_distillation",
    "build_student",
    "build_training_loader",
    "frozen_teacher",
    "validation_teacher",
    "with_synchronised_norms",
]


def build_distillation(config: TrainConfig, runtime: Runtime) -> Distillation:
    """Build the trained model, its objective and the frozen teachers on the run's device.

    Every process gets the same initial weights. No teacher is loaded if its features are stored, and a run of one tower
    keeps only that tower of the teacher. Raises InputError if no loss reaches a part of the model that trains.
    """
    needs = config.needs
    teachers, prompts = _teachers(config, needs)
    teacher_info = {} if teachers is None else teachers.info
    seed_everything(config.run.seed)
    if config.run.train == "teacher":
        model: MobileCLIP | LongCLIP = _teacher_to_train(config)
    else:
        model = build_student(config, teacher_info["long"].embed_dim if teacher_info else None)
    if teachers is not None:
        model.ancestry = merged(model.ancestry, as_teacher(teachers.ancestry))
    model.requires_grad_(True)
    model.train()
    if config.loss.init_logit_scale is not None:
        with torch.no_grad():
            model.logit_scale.fill_(config.loss.init_logit_scale).log_()
    logger.info("terms of the trained model: %s", describe_terms(model.ancestry))
    distillation = assemble(
        model,
        teachers,
        config.loss,
        stage=config.run.stage,
        frozen=tuple(tower for tower in TOWERS if getattr(config.init, f"freeze_{tower}")),
        prompts=None if prompts is None else prompts.to(runtime.device),
        streaming=config.speed.savings.streaming_losses,
    )
    check_learns(distillation.distiller)
    _apply_speed(config.speed, model, [] if teachers is None else teachers.models)
    if config.run.sync_bn and runtime.world_size > 1:
        distillation.distiller = with_synchronised_norms(distillation.distiller, runtime)
    if teachers is not None:
        teachers.to(runtime.device)
    distillation.distiller.to(runtime.device)
    return distillation


def with_synchronised_norms(distiller: Distiller, runtime: Runtime) -> Distiller:
    """The same model, with BatchNorms that share their statistics among the processes.

    timm's converter keeps the activation that timm's BatchNorms hold; torch's would drop it.
    """
    if runtime.device.type != "cuda":
        raise InputError("--run.sync_bn needs GPUs: torch has no synchronised BatchNorm on the CPU")
    return convert_sync_batchnorm(distiller)


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
    student.ancestry = ()  # random weights
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
            clip, tensors = text_source.config, text_source.text.state_dict()
            load_text_tower(student, LongCLIPText(tensors, clip.text.heads, clip.activation, text_source.ancestry))
        else:
            raise InputError(f"--init.text {init.text} is neither a student nor a Long-CLIP")
    return student


def _whole_student(config: TrainConfig, changes: dict[str, Any]) -> MobileCLIP:
    """Load the student that student.init names. It brings its own shape; options that ask for another are refused."""
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
        teacher = create_teacher(options.variant)
        teacher.ancestry = ()  # random weights
        return teacher
    return load_teacher(options.init, activation=options.activation)


def _teachers(config: TrainConfig, needs: Needs) -> tuple[Teachers | None, Tensor | None]:
    """The frozen teachers, and the first one's features of class prompts if pictures are compared with prompts."""
    if not config.distils:
        return None, None
    if not config.runs_teacher:
        return Teachers(stored=_stored_teacher_info(config), short_is_full=_short_is_full(config)), None
    options = config.teacher
    teacher = frozen_teacher(config)
    prompts = _prompts(teacher, config) if needs.compares_with_prompts else None
    if needs.stage == "image":
        del teacher.text
    elif needs.stage == "text":
        del teacher.visual
    others = [_frozen(name, options.activation) for name in options.ensemble]
    short = None
    if options.short is not None and needs.reads_short:
        short = _frozen(options.short, options.activation, context_length=CLIP_CONTEXT_LENGTH)
    stored = None if options.cache is None else _stored_teacher_info(config)
    return Teachers([teacher, *others], short, stored, _short_is_full(config)), prompts


def _short_is_full(config: TrainConfig) -> bool:
    return config.captions.target == "full" and config.needs.reads_short


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
    """The complete teacher, whose other tower validates a run of one tower; None if both towers train."""
    return None if config.run.stage == "both" else frozen_teacher(config).to(device)


def _stored_teacher_info(config: TrainConfig) -> TeacherInfo | None:
    """What the stored features say about their teacher; None if no features are stored."""
    cache = config.teacher.cache
    if not config.distils or cache is None:
        return None
    if cache != DATACOMPDR:
        return cached_teacher_info(cache_place(cache))
    teacher_info = datacompdr_teacher_info(expand_patterns(config.data.shards), config.teacher.stored_widths)
    scaled = any(term.loss.uses_teacher_scale for term in config.needs.terms)
    if teacher_info.logit_scale is None and config.loss.teacher_scale is None and scaled:
        raise InputError(
            "these shards do not tell their teachers' logit scale: give --loss.teacher_scale (DataCompDR: 100)"
        )
    return teacher_info


def _apply_speed(speed: SpeedOptions, model: MobileCLIP | LongCLIP, teachers: list[LongCLIP]) -> None:
    for text_side in (model.text_encoder if isinstance(model, MobileCLIP) else model, *teachers):
        text_side.trim_captions = speed.savings.trim
    if isinstance(model, MobileCLIP):
        model.image_encoder.channels_last = speed.savings.channels_last
    for compiled in (model, *teachers) if speed.compile else ():
        compile_towers(compiled)


def build_training_loader(config: TrainConfig, runtime: Runtime, distillation: Distillation) -> ShardLoader:
    """The loader of this process. It shows the model's view of each picture, and the teachers' views if they differ."""
    data, savings = config.data, config.speed.savings
    model, teachers = distillation.distiller.model, distillation.teachers
    teacher_info = {} if teachers is None else teachers.info
    context_length = max(model.context_length, *(known.context_length for known in teacher_info.values()), 0)
    settings = LoaderSettings(
        data.shards,
        views=views_of(model, [] if teachers is None else teachers.models),
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
        cache_folder=data.cache_dir,
        cache_bytes=round(data.cache_gb * GIGABYTE),
        epoch_samples=data.epoch_samples,
        open_store=_store_opener(config, teacher_info.get("long")),
        stored_features=config.teacher.stored_features,
        stage=config.run.stage,
        images=data.images,
        captions=data.captions,
        fast_decode=savings.fast_decode,
        trim_captions=savings.trim,
        sampling=config.captions,
        reads_sub=config.needs.reads_sub,
        shifted_length=model.context_length,
        pads_in_front=isinstance(model, LongCLIP),
        pin_memory=runtime.device.type == "cuda",
    )
    loader = build_loader(settings)
    if loader.steps_per_epoch < 1:
        raise InputError(
            f"{loader.num_samples} samples make no batch of {config.run.global_batch_size}: "
            "lower --run.global_batch_size"
        )
    return loader


def _store_opener(config: TrainConfig, teacher_info: TeacherInfo | None) -> OpenStore | None:
    cache, teacher = config.teacher.cache, config.teacher
    if not config.distils or cache is None:
        return None

    def open_store(index: ShardIndex | None) -> TeacherStore:
        if cache == DATACOMPDR:
            assert teacher_info is not None
            return DataCompDRStore(teacher_info)
        if index is None:
            raise InputError(
                "shards without a manifest are streamed, without sidecars: upload manifest.json beside them, or leave "
                "--teacher.cache out"
            )
        # the short captions are those of the cache, unless no loss reads the features of their own texts
        captions = None if _short_is_full(config) or not config.needs.reads_short else config.captions
        fast_decode = config.speed.savings.fast_decode
        sub_captions = config.captions.sub_captions if config.needs.distils_sub and teacher.stored_features else 0
        return open_cache(
            cache_place(cache), index, config.augment, teacher.checkpoint, fast_decode, captions, sub_captions
        )

    return open_store
