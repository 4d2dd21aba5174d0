"""Zero-shot classification (Radford et al. 2021, section 3.1): a class is the mean of its name in many templates.

Shapes: C classes, T templates, N pictures, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from eval.benchmarks.class_prompts import CIFAR_TEMPLATES, OPENAI_TEMPLATES
from eval.benchmarks.labelled_features import LabelledFeatures, encode_labelled
from eval.benchmarks.labelled_images import LabelledImages, find_labelled_images
from eval.measures.confusion import Matrix, confused_pairs, confusion_matrix, mean_recall, recall_by_class
from eval.towers.features import Encoding, encode_captions, show_track
from eval.towers.models import ClipModel
from longclip_teacher.errors import InputError

__all__ = [
    "ZeroshotAnswers",
    "classify",
    "evaluate_zeroshot",
    "zeroshot_classifier",
    "zeroshot_figures",
]

TOP = 5
_CLASSES_AT_ONCE = 64  # 5120 prompts: enough of similar length to fill batches, few enough to hold
_SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class ZeroshotAnswers:
    """A model's answers: `best` [N,5] are each picture's classes of highest score, best first (all, if fewer)."""

    labelled: LabelledImages
    pictures: LabelledFeatures
    best: Int64[Tensor, "N top"]
    num_templates: int

    def confusion(self) -> Matrix:
        """Return pictures by true class (rows) and first answer (columns)."""
        return confusion_matrix(self.pictures.targets, self.best[:, 0], len(self.labelled.classnames))


def zeroshot_classifier(
    model: ClipModel,
    classnames: Sequence[str],
    templates: Sequence[str],
    encoding: Encoding = Encoding(),
) -> Float[Tensor, "C D"]:
    """Return unit-norm class embeddings: the normalised mean of the normalised features of a class in each template.

    Each template holds `{}` in place of the class name.
    """
    if not classnames:
        raise InputError("no class names to classify with")
    if not templates or not all("{}" in template for template in templates):
        raise InputError("give one or more templates, each with {} in place of the class name")
    starts = range(0, len(classnames), _CLASSES_AT_ONCE)
    embeddings = []
    for start in show_track(starts, "classes" if encoding.show_progress else None, len(starts)):
        names = classnames[start : start + _CLASSES_AT_ONCE]
        prompts = [template.replace("{}", name) for name in names for template in templates]
        features, _ = encode_captions(model, prompts, replace(encoding, show_progress=False))
        embeddings.append(features.unflatten(0, (len(names), len(templates))).mean(dim=1))  # [C,T,D] -> [C,D]
    return F.normalize(torch.cat(embeddings), dim=-1)


def evaluate_zeroshot(
    model: ClipModel,
    source: str | Path,
    classnames: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    encoding: Encoding = Encoding(),
) -> dict[str, Any]:
    """Return zero-shot figures on a folder of class folders or on shards, as in the JSON: see `zeroshot_figures`.

    `source` and `classnames` are as for find_labelled_images. The default templates are the data set's: CIFAR's 18 for
    CIFAR, the 80 of ImageNet otherwise. The model's training mode does not change.
    Unreadable pictures are left out and named. More than 1% of them raises InputError.
    """
    return zeroshot_figures(classify(model, find_labelled_images(source, classnames), templates, encoding))


def classify(
    model: ClipModel,
    labelled: LabelledImages,
    templates: Sequence[str] | None = None,
    encoding: Encoding = Encoding(),
) -> ZeroshotAnswers:
    """Return a model's answers for labelled pictures: the classes whose embeddings have the highest cosines."""
    if len(labelled.classnames) < 2:
        raise InputError(
            f"there is only one class, {labelled.classnames[0]!r}, so every answer is right: give the folder of classes"
        )
    if templates is None:
        templates = OPENAI_TEMPLATES if labelled.cifar is None else CIFAR_TEMPLATES
    classifier = zeroshot_classifier(model, labelled.classnames, templates, encoding)
    pictures = encode_labelled(model, labelled, encoding)
    return ZeroshotAnswers(labelled, pictures, _best_classes(pictures.features, classifier), len(templates))


def zeroshot_figures(answers: ZeroshotAnswers) -> dict[str, Any]:
    """Return top-1, top-5 and mean per-class accuracy in percent, accuracy by class, and the 20 most confused pairs."""
    labelled, pictures = answers.labelled, answers.pictures
    hits = answers.best == pictures.targets[:, None]  # [N,5]
    num_images, matrix = len(pictures.targets), answers.confusion()
    return {
        "dataset": labelled.name,
        "source": labelled.source,
        "num_images": num_images,
        "num_classes": len(labelled.classnames),
        "num_templates": answers.num_templates,
        "num_unreadable": len(pictures.unreadable),
        "unreadable": [lost.name for lost in pictures.unreadable],
        "count_mismatch": labelled.count_mismatch(pictures.num_found),
        "top1": int(hits[:, 0].sum()) * 100 / num_images,
        "top5": int(hits.sum()) * 100 / num_images,
        "mean_per_class": mean_recall(matrix),
        "per_class": recall_by_class(matrix, labelled.classnames),
        "confusion": confused_pairs(matrix, labelled.classnames),
    }


def _best_classes(features: Float[Tensor, "N D"], classifier: Float[Tensor, "C D"]) -> Int64[Tensor, "N top"]:
    blocks = features.split(max(1, _SCORES_AT_ONCE // len(classifier)))
    top = min(TOP, len(classifier))
    return torch.cat([(block @ classifier.T).topk(top, dim=1).indices for block in blocks])
