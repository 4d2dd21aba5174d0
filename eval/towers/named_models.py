"""Models named on a command line, each with the settings for reading it.

    NAME=CHECKPOINT                                  one model
    NAME=CHECKPOINT,CHECKPOINT,...                   several seeds of one model
    NAME=CHECKPOINT@context_length=77,pad_mask=True  read with these settings, seeds alike

The text after the last @ counts as settings only if it begins with WORD=, so hub revisions (NAME@main), URLs and
folders with an @ in their names stay whole. A path that exists is never split.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_args

from eval.towers.models import ClipModel, load_model
from longclip_teacher.config import Activation
from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import RUN_WEIGHTS
from mobileclip_student import VARIANTS

__all__ = ["NamedModel", "ReadSettings", "model_name", "parse_models"]

_WITH_SETTINGS = re.compile(r"(.+)@(\w+=[^@]*)")
_FEWEST_TOKENS = 2  # the start and the end of a caption


@dataclass(frozen=True)
class ReadSettings:
    """The options of `load_model` for one checkpoint; None leaves a setting to the file."""

    variant: str | None = None
    context_length: int | None = None
    pad_mask: bool | None = None
    activation: Activation | None = None

    def load(self, checkpoint: str, device: str) -> ClipModel:
        """The model of `checkpoint` with these settings, in eval mode."""
        return load_model(
            checkpoint,
            variant=self.variant,
            context_length=self.context_length,
            pad_mask=self.pad_mask,
            activation=self.activation,
            device=device,
        )

    def given(self) -> dict[str, str | int | bool]:
        """The settings that are not None, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class NamedModel:
    """The checkpoints of one model, one per seed, and the settings for reading all of them."""

    checkpoints: tuple[str, ...]
    settings: ReadSettings = ReadSettings()


def parse_models(entries: Sequence[str]) -> dict[str, NamedModel]:
    """The models by name, in order.

    A checkpoint without a name gets that of its file or run folder, and its settings become part of the name.
    Raises InputError for an entry that is not of the form above, an unknown setting or value, and a name that comes
    twice.
    """
    models: dict[str, NamedModel] = {}
    for entry in entries:
        name, model = _parse(entry)
        if name in models:
            raise InputError(f"two models are called {name}: name them, as in first={entry}")
        models[name] = model
    return models


def _parse(entry: str) -> tuple[str, NamedModel]:
    named, settings = entry, ReadSettings()
    if not _all_exist(entry) and not _all_exist(entry.partition("=")[2]) and (found := _WITH_SETTINGS.fullmatch(entry)):
        named, settings = found[1], _parse_settings(entry, found[2])
    name, equals, places = named.partition("=")
    if not equals or Path(named).exists():
        name, places = model_name(named, settings.given()), named
    checkpoints = tuple(places.split(","))
    if not name or not all(checkpoints):
        raise InputError(f"{entry}: write NAME=CHECKPOINT or NAME=CHECKPOINT,CHECKPOINT,..., with or without @SETTINGS")
    if len(set(checkpoints)) < len(checkpoints):
        raise InputError(f"{entry}: the same checkpoint twice is no second seed")
    return name, NamedModel(checkpoints, settings)


def _all_exist(places: str) -> bool:
    return all(place and Path(place).exists() for place in places.split(","))


def model_name(checkpoint: str, settings: Mapping[str, object] = {}) -> str:
    """The name of a checkpoint that was given none: that of its file or run folder, and its settings."""
    path = Path(checkpoint)
    name = path.parent.name if path.name in RUN_WEIGHTS else path.name
    return "-".join([name, *(f"{key}-{value}" for key, value in settings.items())])


def _parse_settings(entry: str, text: str) -> ReadSettings:
    settings, names = ReadSettings(), [field.name for field in fields(ReadSettings)]
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in names:
            raise InputError(
                f"{entry}: {key!r} is no setting of a model: after @ write {', '.join(names)} as KEY=VALUE"
            )
        if key in settings.given():
            raise InputError(f"{entry}: {key} is given twice")
        settings = _with(settings, entry, key, value)
    return settings


def _with(settings: ReadSettings, entry: str, key: str, value: str) -> ReadSettings:
    if key == "context_length":
        if not value.isdecimal() or int(value) < _FEWEST_TOKENS:
            raise InputError(f"{entry}: context_length is a number of tokens, {_FEWEST_TOKENS} or more, not {value!r}")
        return replace(settings, context_length=int(value))
    if key == "pad_mask":
        if value.lower() not in ("true", "false"):
            raise InputError(f"{entry}: pad_mask is True or False, not {value!r}")
        return replace(settings, pad_mask=value.lower() == "true")
    if key == "variant":
        if value not in VARIANTS:
            raise InputError(f"{entry}: no student variant {value!r}: choose {', '.join(VARIANTS)}")
        return replace(settings, variant=value)
    for activation in get_args(Activation):
        if value == activation:
            return replace(settings, activation=activation)
    raise InputError(f"{entry}: activation is {' or '.join(get_args(Activation))}, not {value!r}")
