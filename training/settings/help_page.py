"""The pages of `training/main.py --help`: an overview of two screens, and a page for each section of the configuration.

Option texts are the docstrings under the fields of the sections, preset texts the first line of each preset file.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from longclip_teacher.errors import InputError

__all__ = ["EVERYTHING", "WIDTH", "help_page"]

WIDTH = 100
EVERYTHING = "all"
_OFTEN_SET = (
    "data.shards",
    "data.val",
    "data.tests",
    "teacher.checkpoint",
    "teacher.cache",
    "student.variant",
    "student.init",
    "optim.lr",
    "run.out_dir",
    "run.max_steps",
    "run.epochs",
    "run.global_batch_size",
    "run.device",
    "run.precision",
    "run.resume",
)
_USAGE = """\
usage: python training/main.py [PRESET] [--section.field VALUE ...]
       torchrun --nproc_per_node=4 training/main.py [PRESET] [--section.field VALUE ...]

Train a student with or without a teacher, or train a teacher. PRESET is one of those below, or a
TOML file of your own; without one it is digit_scenes, which needs no data and no download. Options
override the preset. The global batch size does not depend on the number of processes.
"""
_SECTIONS = "Sections. `main.py [PRESET] --help SECTION` explains the options of one, `--help all` those of all:"
_NAMES = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", bool: "True|False", NoneType: "None"}


def help_page(config: Any, preset: str, presets: Mapping[str, Path], section: str | None) -> str:
    """The page that --help prints: the overview without `section`, else that section's options or all of them.

    `config` is the configuration whose values are shown, `preset` its name, `presets` the files of all by name. Raises
    InputError for a section that does not exist.
    """
    if section is None:
        return _overview(config, preset, presets)
    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if section == EVERYTHING:
        return "\n".join(_section(name, options, preset) for name, options in sections.items())
    if section not in sections:
        owners = [name for name, options in sections.items() if hasattr(options, section.rpartition(".")[2])]
        near = owners or difflib.get_close_matches(section.partition(".")[0], (*sections, EVERYTHING))
        hint = (
            f"; did you mean {' or '.join(near)}?" if near else f": choose one of {', '.join(sections)}, {EVERYTHING}"
        )
        raise InputError(f"--help {section}: there is no such section{hint}")
    return _section(section, sections[section], preset)


def _overview(config: Any, preset: str, presets: Mapping[str, Path]) -> str:
    lines = [_USAGE, "Presets:"]
    lines += _rows({name: _first_line(path) for name, path in sorted(presets.items())})
    lines += ["", f"Options that runs often set, with their values in {preset}:"]
    rows = {}
    for key in _OFTEN_SET:
        section, name = key.split(".")
        options = getattr(config, section)
        if section == "run" and "--loss.NAME" not in rows:  # data, models, losses, then the run
            weights = ", ".join(f"{loss} {weight:g}" for loss, weight in config.loss.weights.items() if weight)
            rows["--loss.NAME"] = f"Weight of a loss; 0 turns it off. [{weights}]"
        rows[f"--{key}"] = f"{_first_sentence(_field_texts(type(options))[name])} [{_shown(getattr(options, name))}]"
    lines += _rows(rows)
    lines += ["", _SECTIONS]
    lines += _rows(
        {
            field.name: _first_sentence(inspect.getdoc(type(getattr(config, field.name))) or "")
            for field in dataclasses.fields(config)
        }
    )
    return "\n".join(lines)


def _section(name: str, options: Any, preset: str) -> str:
    """One section: its options, each with the values it takes, its value in the preset, and its text."""
    lines = [*_wrapped(f"[{name}] {inspect.getdoc(type(options))}", ""), f"Values are those of {preset}.", ""]
    texts, hints = _field_texts(type(options)), get_type_hints(type(options))
    for field in dataclasses.fields(options):
        lines += _wrapped(
            f"--{name}.{field.name} {_values(hints[field.name])}  [{_shown(getattr(options, field.name))}]", ""
        )
        lines += _wrapped(texts[field.name], "    ")
    return "\n".join([*lines, ""])


def _field_texts(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    texts = {}
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def _first_line(preset: Path) -> str:
    with preset.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def _first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence."""
    first, stop, _ = " ".join(text.split()).partition(". ")
    return first + "." * bool(stop)


def _values(hint: Any) -> str:
    """The values that an option takes, in the way of a usage line."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return "|".join(map(_values, get_args(hint)))
    if get_origin(hint) is tuple:
        members = get_args(hint)
        return f"{_values(members[0])} ..." if Ellipsis in members else " ".join(map(_values, members))
    return _NAMES[hint]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _rows(texts: Mapping[str, str]) -> list[str]:
    """Names and texts in two columns."""
    indent = max(map(len, texts)) + 4
    return [
        line
        for name, text in texts.items()
        for line in textwrap.wrap(
            text, _width(), initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent,
            break_long_words=False, break_on_hyphens=False,
        )
    ]  # fmt: skip


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), _width(), initial_indent=indent, subsequent_indent=indent or "    ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _width() -> int:
    return min(WIDTH, max(60, shutil.get_terminal_size((WIDTH, 24)).columns))
