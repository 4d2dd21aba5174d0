"""Checks of a run's configuration before any work is done.

The sections check their own fields. The conditions between fields are here, each with a line that says what to do.
"""

from __future__ import annotations

from longclip_teacher.errors import InputError
from training.settings.captions import NO_SAMPLING
from training.settings.needs import Needs, Tower
from training.settings.options import DATACOMPDR
from training.settings.tree import TrainConfig

__all__ = ["NOTHING_LEARNS", "check_config"]

NOTHING_LEARNS = (
    "every tower is frozen and no loss learns anything: set --init.freeze_image or --init.freeze_text False"
)


def check_config(config: TrainConfig, world_size: int) -> None:
    """Raise InputError for a configuration that cannot run on `world_size` processes."""
    run, loss, needs = config.run, config.loss, config.needs
    _check_names(config)
    if run.global_batch_size % world_size:
        raise InputError(f"--run.global_batch_size {run.global_batch_size} does not divide by {world_size} processes")
    local = run.global_batch_size // world_size
    if run.accumulation > local:
        raise InputError(f"--run.accumulation {run.accumulation} is more than the {local} samples per process")
    compared = local if loss.pca_scope == "rank" else run.global_batch_size
    if needs.reads_short and loss.pca_scope != "off" and compared <= loss.pca_rank:
        raise InputError(
            f"PCA of rank {loss.pca_rank} does nothing on {compared} samples: raise --run.global_batch_size above "
            f"{loss.pca_rank} (better {2 * loss.pca_rank}), lower --loss.pca_rank, or set --loss.pca_scope off"
        )
    if not needs.terms:
        raise InputError(
            "without a teacher nothing is left to learn from: raise --loss.clip_long, or give --teacher.checkpoint"
        )
    if run.train == "student" and config.teacher.init is not None:
        raise InputError(
            "--teacher.init belongs to --run.train teacher; a frozen teacher is given as --teacher.checkpoint"
        )
    _check_stage(config)
    _check_captions(config)
    _check_teachers(config)
    _check_towers(config, needs)


def _check_names(config: TrainConfig) -> None:
    """Refuse paths that are not UTF-8, because config.toml cannot hold them. Names below a given folder are free."""
    for section, fields in config.to_dict().items():
        for name, value in fields.items():
            for text in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
                    raise InputError(
                        f"--{section}.{name} {text}: config.toml cannot hold a name that is not UTF-8; rename it, or "
                        "give a link to it that has another name"
                    )


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
    allowed = config.loss.allowed_in(run.stage, with_prompts=data.zeroshot is not None)
    if wrong := sorted(term.name for term in config.needs.terms if term.name not in allowed):
        raise InputError(
            f"--run.stage {run.stage} has no pairs of pictures and captions: set --loss.{wrong[0]} 0 "
            f"(it can use {', '.join(sorted(allowed))})"
        )


def _check_captions(config: TrainConfig) -> None:
    """Refuse sampled captions that nothing reads, or that no store has. A cache says itself which ones it has."""
    captions, teacher = config.captions, config.teacher
    _check_sub_captions(config)
    if captions == NO_SAMPLING:
        return
    changes_short = captions.short != "given" or (captions.max_shift > 0 and captions.long_from_epoch is None)
    if changes_short and not config.needs.reads_short:
        raise InputError(
            "[captions] changes the short captions, which no loss reads: give a loss of short captions a weight, such "
            "as --loss.clip_short 1"
        )
    if captions.target == "full" and (not config.distils or teacher.short is not None):
        raise InputError("--captions.target full needs a teacher that reads the long captions, and no --teacher.short")
    if captions.target == "full" and captions.long_from_epoch is not None:
        raise InputError("--captions.target full needs full long captions: set --captions.long_from_epoch None")
    if not config.distils or teacher.cache is None:
        return
    if captions.long_from_epoch is not None:
        raise InputError(
            "stored features of long captions are those of the full ones: set --captions.long_from_epoch None, or "
            "leave --teacher.cache out"
        )
    if teacher.cache == DATACOMPDR and captions.short != "given":
        raise InputError("DataCompDR's features belong to its own captions: set --captions.short given")


def _check_sub_captions(config: TrainConfig) -> None:
    """Refuse losses of sentences that DataCompDR does not have, and a number of sentences that no loss reads."""
    cache, needs = config.teacher.cache, config.needs
    if config.captions.sub_captions != NO_SAMPLING.sub_captions and not needs.reads_sub:
        raise InputError("--captions.sub_captions is read by no loss: give one a weight, such as --loss.clip_sub 1")
    if needs.reads_sub and config.distils and cache == DATACOMPDR:
        raise InputError("DataCompDR's shards hold captions of their own: leave the losses of sub-captions out")


def _check_teachers(config: TrainConfig) -> None:
    """Refuse what stored features, several teachers or chunks cannot give."""
    teacher = config.teacher
    if not config.distils:
        return
    if teacher.cache is not None and (teacher.short is not None or teacher.ensemble):
        raise InputError(
            "--teacher.cache holds one teacher's features: leave --teacher.short and --teacher.ensemble out"
        )
    layers = sorted(term.name for term in config.needs.terms if term.loss.family == "layer")
    if layers and (not config.runs_teacher or teacher.ensemble):
        raise InputError(
            f"--loss.{layers[0]} looks into one teacher that is run: leave --teacher.cache and --teacher.ensemble out"
        )
    if layers and config.run.accumulation > 1:
        raise InputError(f"--loss.{layers[0]} needs the whole batch at once: set --run.accumulation 1")


def _check_towers(config: TrainConfig, needs: Needs) -> None:
    """Refuse a tower that no loss would train. On one process it would only decay; under DDP the run would fail."""
    other: dict[Tower, Tower] = {"image": "text", "text": "image"}
    trained = [tower for tower in needs.towers if not getattr(config.init, f"freeze_{tower}")]
    for tower in trained:
        if not needs.reaches(tower):
            raise InputError(
                f"no loss reaches the {tower} tower (only {', '.join(term.name for term in needs.terms)}): set "
                f"--run.stage {other[tower]} to train the {other[tower]} tower alone, --init.freeze_{tower} True to "
                f"leave the {tower} tower as it starts, or a loss that reads it, such as --loss.clip_long 1"
            )
    if not trained and not (needs.logit_scale or needs.scales or needs.mixture or needs.maps):
        raise InputError(NOTHING_LEARNS)
