"""Checks before a run is resumed: what decides its result must be unchanged; other changes are reported, a line each.

The checks compare the configuration, the contents of the training data and the weights of the frozen teachers.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from eval.benchmarks.protocols import load_retrieval_set
from longclip_teacher.errors import InputError
from training.cache.manifest import cache_place, cache_sha256, teacher_sha256
from training.data.index import is_remote
from training.data.loader import ShardLoader
from training.data.shard_records import Contents
from training.optim import learning_rate
from training.settings.options import SpeedOptions
from training.settings.tree import TrainConfig, without_removed

__all__ = ["RunInputs", "changes_since", "other_processes"]

_LENGTH = ("max_steps", "epochs")  # of section run: compared by the number of steps that they come to
_OTHER_FOLDER = "use another --run.out_dir"
_PROMPTS = {"zeroshot", "zeroshot_classnames", "zeroshot_templates"}
# fields that may change between a run and its continuation, because no sample, step or weight depends on them beyond
# rounding
_FREE_FIELDS = {
    "run": {"out_dir", "device", "tf32", "log_every", "eval_every", "save_every", "save_minutes", "keep_every"}
    | {"collective_timeout"},
    "data": {"val", "val_protocol", "tests", "num_workers", "max_bad_share", "cache_dir", "cache_gb"} | _PROMPTS,
    "speed": {field.name for field in dataclasses.fields(SpeedOptions)},
}


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """What decides the result of a run besides its configuration and its initial weights."""

    total_steps: int
    world_size: int
    stream_workers: int | None
    """Loader processes of each training process, on which the order of a stream depends; None: no stream."""
    data: dict[str, Contents]
    """Contents of each shard, caption file or folder of pictures, by path."""
    teachers: dict[str, str]
    """By field: the sha256 of a frozen teacher's weight file, or a hash of stored features."""
    validation: str = ""
    """Hash of the pictures' names and sizes and the captions of data.val; empty if there is none or it is not known.
    It decides which weights are the best, and nothing else."""

    @classmethod
    def of_run(cls, config: TrainConfig, world_size: int, loader: ShardLoader) -> RunInputs:
        """The inputs of a run that is about to train. Reads the teachers' weight files once."""
        run = config.run
        return cls(
            run.max_steps or max(1, round(run.epochs * loader.steps_per_epoch)),
            world_size,
            None if loader.is_exact else config.data.num_workers,
            loader.contents,
            _teacher_hashes(config, loader.contents),
            _validation_hash(config),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {**dataclasses.asdict(self), "data": {path: tuple(known) for path, known in self.data.items()}}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RunInputs:
        """The inverse of `to_dict`."""
        return cls(**{**content, "data": {path: Contents(*known) for path, known in content["data"].items()}})


def changes_since(
    path: Path, step: int, saved: Mapping[str, Any], before: RunInputs | None, config: TrainConfig, now: RunInputs
) -> list[str]:
    """Compare a run with the one that wrote the checkpoint `path` at `step`. Returns a line for each harmless change.

    saved     the configuration of that run, as `TrainConfig.to_dict` gives it
    before    its inputs, None for a checkpoint of an earlier version, which does not hold them

    Raises InputError for a change that affects the result. A finished run may be extended.
    """
    speed = {name: value for name, value in saved.get("speed", {}).items() if name in _FREE_FIELDS["speed"]}
    free = dict(_FREE_FIELDS)
    if now.stream_workers is not None:
        free["data"] = free["data"] | {"shuffle_shards"}  # which a stream does not have
    notes = _changed_fields(path, without_removed({**saved, "speed": speed}, path), config, free)
    if before is None:
        if any(saved["run"].get(name) != config.to_dict()["run"][name] for name in _LENGTH):
            raise InputError(f"{path} is of a run of another length (run.max_steps, run.epochs): {_OTHER_FOLDER}")
        return [*notes, f"{path} does not tell the contents of its data: they are not compared"]
    notes += _changed_length(path, step, before.total_steps, config, now.total_steps)
    _check_data(path, before.data, now.data)
    for field in sorted(before.teachers.keys() | now.teachers.keys()):
        if before.teachers.get(field) != now.teachers.get(field):
            raise InputError(
                f"--{field} holds other weights or features than when the run of {path} began: put those back, or "
                f"{_OTHER_FOLDER}"
            )
    if (before.stream_workers is None) != (now.stream_workers is None):
        was, are = ("streamed", "indexed") if now.stream_workers is None else ("indexed", "streamed")
        raise InputError(f"{path} is of a run whose shards were {was}, and now they are {are}: {_OTHER_FOLDER}")
    if before.stream_workers != now.stream_workers:
        raise InputError(
            f"{path} is of a run with data.num_workers = {before.stream_workers}, this one has {now.stream_workers}, "
            f"and the order of streamed samples depends on it: {_OTHER_FOLDER}"
        )
    return notes


def other_processes(before: RunInputs, config: TrainConfig, now: RunInputs, module: nn.Module) -> list[str]:
    """A line if the run goes on with another number of processes: what of the trained `module` depends on it.

    Crops, captions, rectangles and masks do not: they are keyed by sample.
    """
    if before.world_size == now.world_size:
        return []
    shares = [config.run.global_batch_size // inputs.world_size for inputs in (before, now)]
    depends = {
        "BatchNorm normalises each process's share of the batch": not config.run.sync_bn
        and any(isinstance(part, _BatchNorm) and _learns(part) for part in module.modules()),
        "drop path is drawn by each process": any(
            getattr(part, "drop_prob", 0) or (isinstance(part, nn.Dropout) and part.p) for part in module.modules()
        ),
        "PCA is that of each process's share": config.needs.reads_short and config.loss.pca_scope == "rank",
        "pictures are mixed within each process's share, which is odd": bool(config.mix.mixup or config.mix.cutmix)
        and any(share % 2 for share in shares),
        "each process draws its own streamed samples": now.stream_workers is not None,
    }
    told = [what for what, does in depends.items() if does]
    result = f"{', '.join(told)}: the result will differ a little" if told else "the result differs by rounding alone"
    return [f"resuming with another number of processes ({now.world_size}, it was {before.world_size}): {result}"]


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _teacher_hashes(config: TrainConfig, data: Mapping[str, Contents]) -> dict[str, str]:
    if not config.distils:
        return {}
    teacher = config.teacher
    hashes = {}
    if teacher.cache is not None and (is_remote(teacher.cache) or Path(teacher.cache).is_dir()):
        hashes["teacher.cache"] = cache_sha256(cache_place(teacher.cache), [Path(path).name for path in data])
    if config.runs_teacher:
        names = {"teacher.checkpoint": [teacher.checkpoint], "teacher.ensemble": teacher.ensemble}
        if config.needs.reads_short:
            names["teacher.short"] = [teacher.short]
        for field, sources in names.items():
            if known := [teacher_sha256(source) for source in sources if source is not None]:
                hashes[field] = " ".join(known)
    return hashes


def _validation_hash(config: TrainConfig) -> str:
    if config.data.val is None:
        return ""
    found = load_retrieval_set(config.data.val_protocol, config.data.val)
    sizes = [path.stat().st_size for path in found.images]
    return hashlib.sha256(f"{found.sha256} {sizes}".encode()).hexdigest()


def _changed_fields(
    path: Path, saved: Mapping[str, Any], config: TrainConfig, free: Mapping[str, Set[str]]
) -> list[str]:
    notes = []
    prompts_teach = config.needs.compares_with_prompts
    for section, fields in config.to_dict().items():
        for name, value in fields.items():
            before = saved.get(section, {}).get(name)
            if before == value or (section == "run" and name in ("resume", *_LENGTH)):
                continue
            if name not in free.get(section, ()) or (prompts_teach and name in _PROMPTS):
                raise InputError(
                    f"{path} is of a run with {section}.{name} = {before}, this one has {value}: {_OTHER_FOLDER}"
                )
            if name in saved.get(section, {}):  # an earlier version may not have had it
                notes.append(f"resuming with --{section}.{name} {_shown(value)} instead of {_shown(before)}")
    return notes


def _shown(value: Any) -> str:
    return (" ".join(map(str, value)) or "(nothing)") if isinstance(value, list) else str(value)


def _changed_length(path: Path, step: int, before: int, config: TrainConfig, now: int) -> list[str]:
    if now == before:
        return []
    if now < before or step < before:
        hint = "" if now < before else f", or finish it first: a run that has done its {before} steps can be extended"
        raise InputError(f"{path} is of a run of {before} steps, this one has {now}: {_OTHER_FOLDER}{hint}")
    ended, goes_on = (learning_rate(at, total, config.optim) for at, total in ((before - 1, before), (step, now)))
    last = learning_rate(now - 1, now, config.optim)
    peak = max(range(step, now), key=lambda at: learning_rate(at, now, config.optim))
    rises = f", is highest at step {peak + 1} ({learning_rate(peak, now, config.optim):.3g})" if peak > step else ""
    return [
        f"the finished run of {before} steps is extended to {now}: the learning rate follows the "
        f"{config.optim.schedule} schedule of {now} steps; it was {ended:.3g} at step {before}, goes on with "
        f"{goes_on:.3g} at step {step + 1}{rises} and ends with {last:.3g}"
    ]


def _check_data(path: Path, before: Mapping[str, Contents], now: Mapping[str, Contents]) -> None:
    for source in sorted(before.keys() | now.keys()):
        old, new = before.get(source), now.get(source)
        if old is None or new is None:
            change = "it is new" if old is None else "it is gone"
        elif old.num_samples != new.num_samples:
            change = f"{old.num_samples} samples then, {new.num_samples} now"
        elif old.layout != new.layout or (old.sha256 and new.sha256 and old.sha256 != new.sha256):
            change = "it has other contents"
        else:
            continue
        raise InputError(
            f"{source} is not what it was when the run of {path} began ({change}): put the old data back, or "
            f"{_OTHER_FOLDER}"
        )
