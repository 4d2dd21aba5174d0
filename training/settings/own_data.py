"""The configuration of a run on the user's own data: embedded defaults that do not belong to it fall away.

Every preset validates, tests and teaches with the embedded digit scenes unless told otherwise. A run that names other
training data is not evaluated on digits, and learns from a teacher of digits only if its user names that teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from longclip_teacher.errors import InputError
from training.settings.options import (
    EMBEDDED_CACHE,
    EMBEDDED_DATA,
    EMBEDDED_TEACHER,
    REMOTE_SHUFFLE_SHARDS,
    DataOptions,
)
from training.settings.tree import TrainConfig, named_fields, parse_config

__all__ = ["is_embedded", "leave_out_embedded", "run_config", "trains_on_embedded"]

_SETS = {"val": "validation", "tests": "tests", "zeroshot": "zero-shot set"}
_INSTEAD_OF_EMBEDDED = {  # field: (its embedded value, what to give instead)
    "teacher.checkpoint": (
        EMBEDDED_TEACHER,
        "longclip-b, a weight file or a run folder; None trains without a teacher",
    ),
    "teacher.short": (EMBEDDED_TEACHER, "another teacher for short captions; None: the first teacher reads both"),
    "teacher.cache": (EMBEDDED_CACHE, "a folder that scripts/cache_teacher.py wrote; None runs the teacher itself"),
    "init.text": (EMBEDDED_TEACHER, "a student or a Long-CLIP to take the text tower from; None starts from scratch"),
}


def run_config(args: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """`parse_config` without the embedded defaults that do not belong to the run's data, and a line for each change."""
    return leave_out_embedded(parse_config(args), named_fields(args))


def leave_out_embedded(config: TrainConfig, named: Collection[str]) -> tuple[TrainConfig, list[str]]:
    """`config` without the embedded defaults that do not belong to its data, and what to tell the user, a line each.

    `named` are the fields (section.field) that the user gave: these keep their values. With other training data than
    the embedded ones, validation, tests and zero-shot set are dropped. With another zero-shot set than the embedded
    one, its folders name the classes and open_clip's prompts are used. Remote shards are mixed fewer at a time. Raises
    InputError where a run on other data would take the embedded teacher, its features or its text tower by default.
    """
    notes: list[str] = []
    if (source := _other_source(config.data)) is not None:
        config = _without_sets(config, named, source, notes)
        config = _with_teacher_of_cache(config, named, notes)
        _refuse_embedded_teacher(config, named, source)
    config = _with_remote_windows(config, named, notes)
    return _with_own_classes(config, named, notes), notes


def is_embedded(path: str | Path) -> bool:
    """Whether a path or pattern lies in the embedded data of the current folder."""
    return Path(path).resolve().is_relative_to(EMBEDDED_DATA.resolve())


def trains_on_embedded(data: DataOptions) -> bool:
    """Whether some of the training data are the embedded ones."""
    return _other_source(data) is None


def _other_source(data: DataOptions) -> str | None:
    """The field that names other training data than the embedded ones, None where there is no such field."""
    sources: tuple[str, ...]
    if data.images is not None:
        field, sources = "--data.images", (str(data.images),)
    elif data.captions:
        field, sources = "--data.captions", data.captions
    else:
        field, sources = "--data.shards", data.shards
    return None if any(map(is_embedded, sources)) else field


def _without_sets(config: TrainConfig, named: Collection[str], source: str, notes: list[str]) -> TrainConfig:
    defaults = DataOptions()
    dropped = [
        name for name in _SETS if f"data.{name}" not in named and getattr(config.data, name) == getattr(defaults, name)
    ]
    if not dropped:
        return config
    sets, fields = _and([_SETS[name] for name in dropped]), _and([f"--data.{name}" for name in dropped])
    notes.append(
        f"the default {sets} {'are' if len(dropped) > 1 or dropped == ['tests'] else 'is'} made of digit scenes: left "
        f"out, since {source} names other data; give {fields} to evaluate the run"
    )
    return _replaced(config, "data", {name: () if name == "tests" else None for name in dropped})


def _with_own_classes(config: TrainConfig, named: Collection[str], notes: list[str]) -> TrainConfig:
    data, defaults = config.data, DataOptions()
    if data.zeroshot is not None and is_embedded(data.zeroshot):
        return config
    changes = {
        name: value
        for name, value in (("zeroshot_classnames", None), ("zeroshot_templates", "openai"))
        if f"data.{name}" not in named and getattr(data, name) == getattr(defaults, name)
    }
    if changes and data.zeroshot is not None:
        told = {"zeroshot_classnames": "classes are named by its folders", "zeroshot_templates": "prompts are openai's"}
        notes.append(
            f"--data.zeroshot {data.zeroshot}: {_and([told[name] for name in changes])}; give "
            f"{_and([f'--data.{name}' for name in changes])} for others"
        )
    return _replaced(config, "data", changes)


def _with_remote_windows(config: TrainConfig, named: Collection[str], notes: list[str]) -> TrainConfig:
    """Remote shards lie on a disk of this node for two windows only, so windows are smaller."""
    data = config.data
    if data.images is not None or data.captions or not any("://" in pattern for pattern in data.shards):
        return config
    if "data.shuffle_shards" in named or data.shuffle_shards <= REMOTE_SHUFFLE_SHARDS:
        return config
    notes.append(f"remote shards are mixed {REMOTE_SHUFFLE_SHARDS} at a time: give --data.shuffle_shards for more")
    return _replaced(config, "data", {"shuffle_shards": REMOTE_SHUFFLE_SHARDS})


def _with_teacher_of_cache(config: TrainConfig, named: Collection[str], notes: list[str]) -> TrainConfig:
    """A cache that the user names brings its own teacher where none is named."""
    teacher = config.teacher
    is_default = teacher.checkpoint == EMBEDDED_TEACHER and "teacher.checkpoint" not in named
    if not (config.distils and is_default and teacher.cache is not None and _is_own(config, named, "teacher.cache")):
        return config
    notes.append(
        f"the teacher is the one whose features --teacher.cache {teacher.cache} holds; "
        "give --teacher.checkpoint to have it checked and evaluated"
    )
    return _replaced(config, "teacher", {"checkpoint": None})


def _refuse_embedded_teacher(config: TrainConfig, named: Collection[str], source: str) -> None:
    used = ["teacher.checkpoint"] if config.distils else []
    used += ["teacher.short"] if config.distils and config.needs.reads_short else []
    used += ["teacher.cache"] if config.distils else []
    used += ["init.text"] if config.run.train == "student" else []
    for field in used:
        if not _is_own(config, named, field):
            value, instead = _INSTEAD_OF_EMBEDDED[field]
            raise InputError(
                f"--{field} is {value} by default, which knows digit scenes alone, but {source} names other data: give "
                f"--{field} ({instead})"
            )


def _is_own(config: TrainConfig, named: Collection[str], field: str) -> bool:
    """Whether the user named the field, or its value is not the embedded one."""
    section, name = field.split(".")
    return field in named or getattr(getattr(config, section), name) != _INSTEAD_OF_EMBEDDED[field][0]


def _replaced(config: TrainConfig, section: str, changes: dict[str, Any]) -> TrainConfig:
    changed: dict[str, Any] = {section: dataclasses.replace(getattr(config, section), **changes)}
    return dataclasses.replace(config, **changed)


def _and(words: Sequence[str]) -> str:
    """The words as an English list."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
