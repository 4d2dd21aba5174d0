"""The definition of an ablation: a TOML grid is read into variants, and these into jobs, one training run each.

A grid names what all runs share and what sets each variant apart:

    preset = "small_student"            # a preset of training/main.py; a variant may name another
    baseline = "none"                   # the variant that the others are compared with
    seeds = [0, 1, 2]
    overrides.run.max_steps = 240       # as in a preset, or a list: ["--run.max_steps", "240"]
    values.cache = "data/cache"         # {cache} in an override; --set cache=FOLDER gives another; {seed} is the run's

    [[variant]]
    name = "crd"
    group = "relational"                # a column of the table and a colour of the plot
    overrides.loss.crd_long = 1.0
    after = ["image_stage"]             # runs of the same seed that must be finished first
    overrides.init.image = "{run:image_stage}"      # the folder of that run
    differs = ["run.max_steps"]         # fields that may differ from the baseline; printed in its row

A variant named in another's `after` is a stage. It has no row of its own: its steps, data and minutes count in the row
of the variant that it leads to.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eval.benchmarks.named_sets import is_plain_name
from longclip_teacher.errors import InputError
from training.settings.checks import check_config
from training.settings.own_data import run_config
from training.settings.tree import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["COMPARED_FIELDS", "Grid", "Job", "Variant", "check_jobs", "make_jobs", "read_grid"]

TRAINING_SCRIPT = Path(__file__).resolve().parent.parent / "training" / "main.py"
COMPARED_FIELDS = (
    *("data.shards", "data.images", "data.captions", "data.epoch_samples", "data.val", "data.tests", "data.zeroshot"),
    *("run.max_steps", "run.global_batch_size", "run.stage"),
)
"""The fields in which compared runs must agree. A variant's `differs` lists exceptions."""
_PLACEHOLDER = re.compile(r"\{(run:)?([A-Za-z_][\w.+-]*)\}")  # not {000..123} of shards, not {} of a prompt

Overrides = dict[str, tuple[str, ...]]  # by section.field


@dataclass(frozen=True)
class Variant:
    """One row of the comparison, or a stage that leads to one."""

    name: str
    group: str
    preset: str
    overrides: Overrides
    """The overrides of the grid, of --set and of the variant, with placeholders still in them."""
    after: tuple[str, ...]
    differs: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """The variants by name, each after its stages."""

    baseline: str
    seeds: tuple[int, ...]
    variants: dict[str, Variant]
    values: dict[str, str]

    @property
    def rows(self) -> list[Variant]:
        """The variants that are compared: those that are not stages."""
        stages = {stage for variant in self.variants.values() for stage in variant.after}
        return [variant for variant in self.variants.values() if variant.name not in stages]

    def stages(self, name: str) -> list[str]:
        """Return the variants that must be finished before `name`, earliest first."""
        found: list[str] = []
        for stage in self.variants[name].after:
            found += [*self.stages(stage), stage]
        return list(dict.fromkeys(found))

    def chosen(self, names: Sequence[str]) -> set[str]:
        """Return the named variants (all if `names` is empty) with their stages. Raise InputError for an unknown
        name."""
        if unknown := [name for name in names if name not in self.variants]:
            raise InputError(f"--only {unknown[0]}: the grid has {', '.join(self.variants)}")
        return {part for name in names or self.variants for part in (*self.stages(name), name)}

    def families(self) -> list[set[str]]:
        """Return the groups of variants tied by `after`. One machine must run a group in order."""
        families: list[set[str]] = []
        for variant in self.variants.values():
            tied = {variant.name, *variant.after}
            touched = [family for family in families if family & tied]
            families = [*(family for family in families if not family & tied), tied.union(*touched)]
        return families


@dataclass(frozen=True)
class Job:
    """One training run: a variant with a seed."""

    variant: Variant
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    stages: tuple[Path, ...]
    """Folders of the runs that must be finished first."""

    @cached_property
    def config(self) -> TrainConfig:
        """The configuration that the arguments give. It is parsed on demand, because that takes a fifth of a second."""
        try:
            return run_config(self.arguments)[0]
        except InputError as error:
            raise InputError(f"variant {self.variant.name}: {error}") from None

    def command(self, processes: int) -> list[str]:
        """Return the command that trains it in `processes` processes."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        return [sys.executable, *(launcher if processes > 1 else []), str(TRAINING_SCRIPT), *self.arguments]


# --- reading ---------------------------------------------------------------------------------------------------------


def read_grid(path: Path, settings: Sequence[str] = ()) -> Grid:
    """Read a grid from a TOML file; `settings` are --set's NAME=VALUE. Raise a one-line InputError for what is
    wrong."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    table = _Table(content, str(path))
    preset, baseline = table.text("preset"), table.text("baseline")
    seeds = table.take("seeds", list, [0])
    values = {name: str(value) for name, value in table.take("values", dict, {}).items()}
    common = _overrides(table.take("overrides", (dict, list), {}), str(path))
    for name, words in _settings(settings).items():
        if "." in name:
            common[name] = words
        elif name in values:
            values[name] = " ".join(words)
        else:
            raise InputError(
                f"--set {name}: neither a section.field nor one of the grid's values ({', '.join(values)})"
            )
    entries = table.take("variant", list, [])
    table.check_empty()
    variants: dict[str, Variant] = {}
    for entry in entries:
        variant = _variant(_Table(entry, f"{path}, a variant"), preset, common)
        if variant.name in variants:
            raise InputError(f"{path}: two variants are called {variant.name}")
        variants[variant.name] = variant
    if not all(isinstance(seed, int) and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds) or not seeds:
        raise InputError(f"{path}: seeds = {seeds}: give different whole numbers from 0")
    grid = Grid(baseline, tuple(seeds), _stages_first(variants, path), values)
    if baseline not in {variant.name for variant in grid.rows}:
        raise InputError(f"{path}: the baseline {baseline} is not a variant of the grid, or it is a stage")
    return grid


def _variant(table: _Table, preset: str, common: Overrides) -> Variant:
    name = table.text("name")
    table.where = f"{table.where} called {name}"
    if not is_plain_name(name):
        raise InputError(f"{table.where}: write letters, digits, . _ + and -, because it names a folder")
    differs = tuple(table.take("differs", list, []))
    if unknown := [field for field in differs if field not in COMPARED_FIELDS]:
        raise InputError(f"{table.where}: differs may name {', '.join(COMPARED_FIELDS)}, not {unknown[0]}")
    variant = Variant(
        name=name,
        group=table.text("group", ""),
        preset=table.text("preset", preset),
        overrides=common | _overrides(table.take("overrides", (dict, list), {}), table.where),
        after=tuple(table.take("after", list, [])),
        differs=differs,
    )
    table.check_empty()
    return variant


class _Table:
    """A TOML table whose keys are taken one by one, so that a leftover key shows a typing error."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            raise InputError(f"{where}: write [[variant]] with its fields below")
        self.content, self.where = dict(content), where

    def take(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self.content.pop(key, default)
        if not isinstance(value, kind):
            raise InputError(f"{self.where}: {key} = {value!r} has the wrong type")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.take(key, (str, type(None)), default)
        if value is None:
            raise InputError(f"{self.where}: there is no {key}")
        return value

    def check_empty(self) -> None:
        if self.content:
            raise InputError(f"{self.where}: unknown key {next(iter(self.content))}")


def _overrides(content: Mapping[str, Any] | Sequence[Any], where: str) -> Overrides:
    """Read `{section = {field = value}}` or `["--section.field", "value", ...]`."""
    if isinstance(content, Mapping):
        found: Overrides = {}
        for section, fields in content.items():
            if not isinstance(fields, Mapping):
                raise InputError(f"{where}: overrides.{section} is a section: write overrides.{section}.FIELD = VALUE")
            for field, value in fields.items():
                values = value if isinstance(value, list) else [value]
                found[f"{section}.{field}"] = tuple(str(item) for item in values)
        return found
    words: dict[str, list[str]] = {}
    for word in map(str, content):
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            words[key] = [value] if equals else []
        elif not words:
            raise InputError(f"{where}: overrides begin with --section.field, not {word}")
        else:
            words[list(words)[-1]].append(word)
    return {key: tuple(values) for key, values in words.items()}


def _settings(entries: Iterable[str]) -> Overrides:
    found: Overrides = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not (name and equals):
            raise InputError(f"--set {entry}: write section.field=VALUE, such as data.shards='data/train/*.tar'")
        try:
            found[name] = tuple(shlex.split(value))
        except ValueError as error:
            raise InputError(f"--set {entry}: {error}") from None
    return found


def _stages_first(variants: Mapping[str, Variant], path: Path) -> dict[str, Variant]:
    ordered: dict[str, Variant] = {}

    def add(name: str, waiting: tuple[str, ...]) -> None:
        if name not in variants:
            raise InputError(f"{path}: {waiting[-1]} comes after {name}, which is not in the grid")
        if name in waiting:
            raise InputError(f"{path}: {' after '.join([*waiting, name])}: a variant cannot wait for itself")
        if name not in ordered:
            for stage in variants[name].after:
                add(stage, (*waiting, name))
            ordered[name] = variants[name]

    for name in variants:
        add(name, ())
    return ordered


# --- jobs ------------------------------------------------------------------------------------------------------------


def make_jobs(grid: Grid, out: Path) -> list[Job]:
    """Return all runs of the grid, seed by seed, so that every variant gets its first run early."""
    return [_job(grid, variant, seed, out) for seed in grid.seeds for variant in grid.variants.values()]


def check_jobs(jobs: Iterable[Job], processes: int) -> None:
    """Raise InputError for settings that the training would refuse, before anything is trained. One check per variant
    is enough, because its seeds differ in nothing that matters."""
    for job in {job.variant.name: job for job in jobs}.values():
        config, name = job.config, job.variant.name
        try:
            check_config(config, processes)
        except InputError as error:
            raise InputError(f"variant {name}: {error}") from None
        if not config.data.tests and config.data.zeroshot is None:
            raise InputError(f"variant {name} has no test to evaluate it: give --data.tests or --data.zeroshot")


def _job(grid: Grid, variant: Variant, seed: int, out: Path) -> Job:
    def folder(name: str) -> Path:
        return out / name / f"seed_{seed}"

    def fill(match: re.Match[str]) -> str:
        is_run, name = match.groups()
        if is_run and name in grid.stages(variant.name):
            return str(folder(name))
        if not is_run and name == "seed":
            return str(seed)
        if not is_run and name in grid.values:
            return grid.values[name]
        hint = f"name {name} in its `after`" if is_run else f"write values.{name} = ... in the grid"
        raise InputError(f"variant {variant.name}: {match.group()} has no value; {hint}")

    arguments = [variant.preset, *_flags(variant.overrides, fill)]
    arguments += ["--run.out_dir", str(folder(variant.name)), "--run.seed", str(seed), "--run.resume", "auto"]
    stages = tuple(folder(name) for name in grid.stages(variant.name))
    return Job(variant, seed, folder(variant.name), tuple(arguments), stages)


def _flags(overrides: Overrides, fill: Callable[[re.Match[str]], str]) -> Iterator[str]:
    for key, values in overrides.items():
        yield f"--{key}"
        yield from (_PLACEHOLDER.sub(fill, value) for value in values)
