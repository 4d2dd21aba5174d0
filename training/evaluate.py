"""Judging a run: the validation measure while it trains, the tests and the report at its end."""

from __future__ import annotations

from typing import Any

from eval.features import Encoding
from eval.models import ClipModel
from eval.named_sets import parse_sets
from eval.protocols import RetrievalSet, load_retrieval_set
from eval.retrieval import evaluate_retrieval
from eval.zeroshot import evaluate_zeroshot
from eval.zeroshot_imagenet import read_lines, read_templates
from longclip_teacher.errors import InputError
from training.config import TrainConfig

__all__ = ["check_sets", "evaluate_tests", "test_sets", "validate"]


def validate(model: ClipModel, config: TrainConfig) -> dict[str, float]:
    """Percentages on the validation set: i2t_r1, t2i_r1, their mean as `score`, and zeroshot_top1 where pictures are
    given."""
    values: dict[str, float] = {}
    if config.data.val is not None:
        found = _retrieval(model, load_retrieval_set(config.data.val_protocol, config.data.val), config)
        i2t, t2i = found["i2t"]["r1"], found["t2i"]["r1"]
        values |= {"i2t_r1": i2t, "t2i_r1": t2i, "score": (i2t + t2i) / 2}
    if config.data.zeroshot is not None:
        values["zeroshot_top1"] = _zeroshot(model, config)["top1"]
    return values


def evaluate_tests(model: ClipModel, config: TrainConfig) -> dict[str, Any]:
    """The retrieval JSON of every test set by its name, and the zero-shot JSON as `zeroshot`."""
    results = {name: _retrieval(model, found, config) for name, found in test_sets(config).items()}
    if config.data.zeroshot is not None:
        results["zeroshot"] = _zeroshot(model, config)
    return results


def test_sets(config: TrainConfig) -> dict[str, RetrievalSet]:
    """The retrieval sets of data.tests by name. Raises InputError for an entry that is not NAME=PROTOCOL:FOLDER."""
    return parse_sets(config.data.tests, "--data.tests")


def check_sets(config: TrainConfig) -> None:
    """Find every validation and test file before the training, not after it."""
    test_sets(config)
    if config.data.val is not None:
        load_retrieval_set(config.data.val_protocol, config.data.val)
    if config.data.zeroshot is not None:
        if not config.data.zeroshot.is_dir():
            raise InputError(
                f"--data.zeroshot {config.data.zeroshot}: no such folder; give one of class folders, or None"
            )
        _classnames(config)
        read_templates(config.data.zeroshot_templates)


def _retrieval(model: ClipModel, found: RetrievalSet, config: TrainConfig) -> dict[str, Any]:
    return evaluate_retrieval(model, found, _encoding(config))


def _zeroshot(model: ClipModel, config: TrainConfig) -> dict[str, Any]:
    assert config.data.zeroshot is not None
    return evaluate_zeroshot(
        model,
        config.data.zeroshot,
        _classnames(config),
        read_templates(config.data.zeroshot_templates),
        _encoding(config),
    )


def _encoding(config: TrainConfig) -> Encoding:
    return Encoding(precision=config.run.precision, num_workers=config.data.num_workers)


def _classnames(config: TrainConfig) -> list[str] | None:
    return None if config.data.zeroshot_classnames is None else read_lines(config.data.zeroshot_classnames)
