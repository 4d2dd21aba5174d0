"""Evaluation of a run: validation while it trains, tests at its end. All processes share it and must call it together.

An InputError on one process is raised on all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eval.base.processes import agreed, on_main
from eval.benchmarks.class_prompts import read_classnames, read_templates
from eval.benchmarks.labelled_images import find_labelled_images
from eval.benchmarks.named_sets import parse_sets
from eval.benchmarks.protocols import RetrievalSet, load_retrieval_set
from eval.measures.retrieval_set import EncodedSet, encode_retrieval_set, evaluate_retrieval, retrieval_figures
from eval.measures.zeroshot import ZeroshotAnswers, classify, zeroshot_figures
from eval.towers.features import Encoding, encode_captions, encode_images
from eval.towers.models import ClipModel
from eval.towers.tower_pair import TowerPair
from longclip_teacher import LongCLIP
from longclip_teacher.errors import InputError
from mobileclip_student import MobileCLIP
from training.distributed import send_statistics
from training.settings.tree import TrainConfig

__all__ = ["Validation", "check_sets", "evaluate_tests", "evaluated_model", "test_sets", "validate"]


class Validation(NamedTuple):
    """The result of `validate`."""

    figures: dict[str, float]
    """Percentages by name, computed on rank 0 and the same on every process."""
    encoded: EncodedSet | None
    """The validation set as the evaluated model encodes it, None without such a set."""


def evaluated_model(model: ClipModel, config: TrainConfig, teacher: LongCLIP | None) -> ClipModel:
    """The model that a run is evaluated by: `model` itself or, if one tower was trained, that tower with the teacher's
    other one. Raises InputError if the two towers have different widths."""
    if config.run.stage == "both":
        return model
    if teacher is None:
        raise InputError(
            f"--run.stage {config.run.stage} is evaluated with the teacher's other tower: give --teacher.checkpoint"
        )
    assert isinstance(model, LongCLIP | MobileCLIP)
    image, text = (model, teacher) if config.run.stage == "image" else (teacher, model)
    return TowerPair(image, text, teacher.logit_scale)


def validate(model: ClipModel, config: TrainConfig, teacher: LongCLIP | None = None) -> Validation:
    """Percentages on the validation set: i2t_r1, t2i_r1, their mean as `score`, and zeroshot_top1 if data.zeroshot is
    set.

    If one tower is trained, the figures are those of `evaluated_model`. It needs the whole `teacher`, on the model's
    device. `agreement` is then 100 times the mean cosine between that tower's features of the validation set's pictures
    or captions and the teacher's features of the same.

    Every process judges rank 0's model, whose BatchNorm statistics it takes. The figures are those of one process.
    """
    send_statistics(model)
    evaluated = evaluated_model(model, config, teacher)
    data, encoding = config.data, _encoding(config)
    found, encoded, taught, answers = None, None, None, None
    if data.val is not None:
        folder = data.val
        found = agreed(lambda: load_retrieval_set(data.val_protocol, folder))
        encoded = encode_retrieval_set(evaluated, found, encoding)
        if evaluated is not model:
            assert teacher is not None
            taught = _teacher_features(teacher, encoded, config)
    if data.zeroshot is not None:
        answers = _zeroshot(evaluated, config)

    def figures() -> dict[str, Tensor]:
        values: dict[str, float] = {}
        if found is not None and encoded is not None:
            recall = retrieval_figures(evaluated, found, encoded)
            i2t, t2i = recall["i2t"]["r1"], recall["t2i"]["r1"]
            values |= {"i2t_r1": i2t, "t2i_r1": t2i, "score": (i2t + t2i) / 2}
            if taught is not None:
                ours = encoded.image_features if config.run.stage == "image" else encoded.text_features
                values["agreement"] = 100 * (ours * taught).sum(dim=1).mean().item()
        if answers is not None:
            values["zeroshot_top1"] = zeroshot_figures(answers)["top1"]
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    return Validation({name: value.item() for name, value in on_main(figures).items()}, encoded)


def _teacher_features(teacher: LongCLIP, encoded: EncodedSet, config: TrainConfig) -> Tensor:
    """The teacher's features of the pictures or captions that the trained tower has encoded."""
    if config.run.stage == "image":
        return encode_images(teacher, encoded.images, _encoding(config)).features
    return encode_captions(teacher, encoded.captions, _encoding(config))[0]


def evaluate_tests(model: ClipModel, config: TrainConfig) -> dict[str, Any]:
    """The retrieval JSON of every test set by its name, and the zero-shot JSON as `zeroshot`. For a run of one tower,
    pass its `evaluated_model`."""
    sets = agreed(lambda: test_sets(config))
    results: dict[str, Any] = {
        name: evaluate_retrieval(model, found, _encoding(config)) for name, found in sets.items()
    }
    if config.data.zeroshot is not None:
        results["zeroshot"] = zeroshot_figures(_zeroshot(model, config))
    return results


def test_sets(config: TrainConfig) -> dict[str, RetrievalSet]:
    """The retrieval sets of data.tests by name. Raises InputError for an entry that is not NAME=PROTOCOL:FOLDER."""
    return parse_sets(config.data.tests, "--data.tests")


def check_sets(config: TrainConfig) -> None:
    """Raise InputError for missing validation and test files before training, not after it."""
    test_sets(config)
    if config.data.val is not None:
        load_retrieval_set(config.data.val_protocol, config.data.val)
    if config.data.zeroshot is not None:
        if not config.data.zeroshot.is_dir():
            raise InputError(
                f"--data.zeroshot {config.data.zeroshot}: no such folder; give one of class folders, or None"
            )
        read_classnames(config.data.zeroshot_classnames)
        read_templates(config.data.zeroshot_templates)


def _zeroshot(model: ClipModel, config: TrainConfig) -> ZeroshotAnswers:
    source, names, prompts = config.data.zeroshot, config.data.zeroshot_classnames, config.data.zeroshot_templates
    assert source is not None
    labelled = agreed(lambda: find_labelled_images(source, read_classnames(names)))
    return classify(model, labelled, agreed(lambda: read_templates(prompts)), _encoding(config))


def _encoding(config: TrainConfig) -> Encoding:
    return Encoding(precision=config.run.precision, num_workers=config.data.num_workers, shared=True)
