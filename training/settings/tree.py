"""The configuration of a run: one typed tree, TOML presets, command-line overrides.

A preset is a TOML file with the sections below; it is turned into the same `--section.field value` arguments that a
user may type after it, so presets and command line are read by one parser and later values win.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import tomli_w
import tyro

from eval.base.arguments import errors_in_one_line
from longclip_teacher.errors import InputError
from training.settings.augment import AugmentConfig
from training.settings.captions import CaptionOptions
from training.settings.help_page import help_page
from training.settings.losses import LossOptions
from training.settings.needs import Needs, needs_of
from training.settings.options import (
    DataOptions,
    InitOptions,
    MixOptions,
    OptimOptions,
    RunOptions,
    SpeedOptions,
    StudentOptions,
    TeacherOptions,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["PRESETS", "REMOVED", "TrainConfig", "config_from_toml", "config_to_toml", "named_fields", "parse_config"]

REMOVED: dict[str, tuple[Any, str]] = {  # field that is gone: (value at which it changed nothing, what to do instead)
    **dict.fromkeys(
        (
            "speed.fast_decode",
            "speed.fast_tokenizer",
            "speed.trim",
            "speed.streaming_losses",
            "speed.channels_last",
            "speed.fused_adamw",
            "speed.keep_memory",
        ),
        (True, "use --speed.reference True, which computes everything the plain way"),
    ),
    "loss.fd_scale": (1.0, "fold it into the weights --loss.fd_image, --loss.fd_text, --loss.masked_fd"),
    "loss.affinity_long": (0.0, "its gradient is crd's: use --loss.crd_long, as the preset tinyclip_affinity does"),
    "loss.affinity_short": (0.0, "its gradient is crd's: use --loss.crd_short, as the preset tinyclip_affinity does"),
}
PRESETS = Path(__file__).parents[1] / "presets"
DEFAULT_PRESET = "digit_scenes"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; saved beside it as config.toml."""

    run: RunOptions = dataclasses.field(default_factory=RunOptions)
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    captions: CaptionOptions = dataclasses.field(default_factory=CaptionOptions)
    mix: MixOptions = dataclasses.field(default_factory=MixOptions)
    teacher: TeacherOptions = dataclasses.field(default_factory=TeacherOptions)
    student: StudentOptions = dataclasses.field(default_factory=StudentOptions)
    init: InitOptions = dataclasses.field(default_factory=InitOptions)
    optim: OptimOptions = dataclasses.field(default_factory=OptimOptions)
    loss: LossOptions = dataclasses.field(default_factory=LossOptions)
    speed: SpeedOptions = dataclasses.field(default_factory=SpeedOptions)

    @property
    def distils(self) -> bool:
        """True if this run has a teacher, loaded or stored."""
        has_teacher = self.teacher.checkpoint is not None or self.teacher.cache is not None
        return self.run.train == "student" and has_teacher and self.loss.distils

    @property
    def runs_teacher(self) -> bool:
        """True if the frozen teacher itself is run in the training step."""
        return self.distils and not (self.teacher.cache is not None and self.teacher.stored_features)

    @property
    def needs(self) -> Needs:
        """What the losses of this run need from its models."""
        short_teacher = self.distils and self.teacher.short is not None
        return needs_of(self.loss, stage=self.run.stage, with_teacher=self.distils, short_teacher=short_teacher)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section and field, paths as strings."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def parse_config(args: Sequence[str]) -> TrainConfig:
    """Configuration from `[PRESET] [--section.field VALUE ...]`; the preset is a TOML file or the name of one of ours.

    Raises InputError in one line for an unknown preset, key or value. --help prints a
    page of help_page.py, of the section that follows it or of the whole, and exits.
    """
    args = list(args)
    preset = args.pop(0) if args and not args[0].startswith("-") else DEFAULT_PRESET
    preset_config = _parse(_toml_arguments(_preset_path(preset)))
    for number, arg in enumerate(args):
        if arg in ("-h", "--help"):
            section = next((word for word in args[number + 1 :] if not word.startswith("-")), None)
            _print_help(preset_config, preset, section)
    for arg in args:
        if arg.startswith("--"):
            _check_key(_field_of(arg), "the command line")
    return _parse(args, default=preset_config)


def _print_help(config: TrainConfig, preset: str, section: str | None) -> NoReturn:
    page = help_page(config, preset, {path.stem: path for path in PRESETS.glob("*.toml")}, section)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one
        print(page)
    raise SystemExit(0)


def named_fields(args: Sequence[str]) -> frozenset[str]:
    """The fields (section.field) that the user gave in the arguments of `parse_config`: on the command line, or in a
    TOML preset that is not one of ours."""
    given = list(args)
    if given and not given[0].startswith("-"):
        path = _preset_path(given[0])
        given[:1] = [] if path.resolve().parent == PRESETS.resolve() else _toml_arguments(path)
    return frozenset(_field_of(arg) for arg in given if arg.startswith("--"))


def config_from_toml(path: Path) -> TrainConfig:
    """Configuration of a TOML file alone, such as the config.toml of a finished run."""
    return _parse(_toml_arguments(path))


def config_to_toml(config: TrainConfig) -> str:
    """The whole configuration as a preset that reads back to the same values; None is written as "None"."""
    sections = {
        section: {name: "None" if value is None else value for name, value in fields.items()}
        for section, fields in config.to_dict().items()
    }
    return tomli_w.dumps(sections)


def _parse(args: list[str], default: TrainConfig | None = None) -> TrainConfig:
    with errors_in_one_line():
        return tyro.cli(
            TrainConfig,
            args=args,
            default=default or TrainConfig(),
            prog="training/main.py",
            use_underscores=True,
            add_help=False,  # help_page.py
            config=(tyro.conf.FlagConversionOff,),
        )


def _preset_path(preset: str) -> Path:
    for path in (Path(preset), PRESETS / preset, PRESETS / f"{preset}.toml"):
        if path.is_file():
            return path
    names = sorted(path.stem for path in PRESETS.glob("*.toml"))
    near = difflib.get_close_matches(Path(preset).stem, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"no preset {preset}{hint} (a TOML file, or one of {', '.join(names)})")


def _toml_arguments(path: Path) -> list[str]:
    """The values of a TOML preset as command-line arguments."""
    try:
        sections = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    args: list[str] = []
    for section, fields in sections.items():
        if not isinstance(fields, dict):
            _check_key(section, str(path))
            raise InputError(f"{path}: {section} is a section, write [{section}] and its fields below")
        for name, value in without_removed({section: fields}, path)[section].items():
            _check_key(f"{section}.{name}", str(path))
            values = value if isinstance(value, list) else [value]
            args += [f"--{section}.{name}", *(str(item) for item in values)]
    return args


def without_removed(sections: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, dict[str, Any]]:
    """The values of an older configuration without the fields that are gone and changed nothing as they were set.

    Raises InputError, with what replaced it, for one that was set otherwise.
    """
    known = set(_keys())
    kept: dict[str, dict[str, Any]] = {}
    for section, fields in sections.items():
        kept[section] = {}
        for name, value in fields.items():
            key = f"{section}.{name}"
            if key in known or key not in REMOVED:
                kept[section][name] = value
            elif value != REMOVED[key][0]:
                _check_key(key, str(path))
    return kept


def _field_of(arg: str) -> str:
    """section.field of an argument --section.field, --section.field=VALUE or --section.other-field."""
    return arg[2:].split("=")[0].replace("-", "_")


def _check_key(key: str, where: str) -> None:
    known = list(_keys())
    if key in known:
        return
    if key in REMOVED:
        raise InputError(f"{where}: --{key} is gone: {REMOVED[key][1]}")
    same_name = [other for other in known if other.split(".")[1] == key.split(".")[-1]]
    near = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    raise InputError(f"{where}: there is no {key}{f'; did you mean {near[0]}?' if near else ''}")


def _keys() -> Iterator[str]:
    for section, kind in get_type_hints(TrainConfig).items():
        for field in dataclasses.fields(kind):
            yield f"{section}.{field.name}"
