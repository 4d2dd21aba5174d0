"""Zero-shot classification (Radford et al. 2021, section 3.1): a class is the mean of its name in many templates.

Shapes: C classes, T templates, B batch, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from torch import Tensor

from eval.features import (
    Encoding,
    Unreadable,
    encode_captions,
    evaluation_mode,
    image_batches,
    model_device,
    refuse_many_unreadable,
    show_track,
)
from eval.labelled_images import find_labelled_images
from eval.models import ClipModel
from longclip_teacher.errors import InputError

__all__ = ["OPENAI_TEMPLATES", "SIMPLE_TEMPLATES", "evaluate_zeroshot", "zeroshot_classifier"]

OPENAI_TEMPLATES: tuple[str, ...] = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)  # 80
SIMPLE_TEMPLATES: tuple[str, ...] = tuple(template("{}") for template in SIMPLE_IMAGENET_TEMPLATES)  # 7
_CLASSES_AT_ONCE = 64  # 5120 prompts: enough of like length to fill batches, few enough to hold


def zeroshot_classifier(
    model: ClipModel,
    classnames: Sequence[str],
    templates: Sequence[str],
    encoding: Encoding = Encoding(),
) -> Float[Tensor, "C D"]:
    """Unit-norm class embeddings: the normalised mean of the normalised features of a class in each template.

    Each template holds `{}` in the class name's place.
    """
    if not classnames:
        raise InputError("no class names to classify with")
    if not templates or not all("{}" in template for template in templates):
        raise InputError("every template needs {} in the class name's place, and there must be one")
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
    templates: Sequence[str] = OPENAI_TEMPLATES,
    encoding: Encoding = Encoding(),
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy (percent) on a folder of class folders or on shards, as the JSON has them.

    `source` and `classnames` are find_labelled_images's. The model keeps the training mode it was in.
    Unreadable pictures are left out and named; more than 1% of them is an InputError.
    """
    labelled = find_labelled_images(source, classnames)
    classifier = zeroshot_classifier(model, labelled.classnames, templates, encoding)
    batches = image_batches(labelled.dataset(model.preprocess), encoding, model_device(model))
    num_images, unreadable = 0, list[Unreadable]()
    hits = torch.zeros(2, dtype=torch.int64, device=classifier.device)  # top-1, top-5
    with evaluation_mode(model, encoding.precision):
        for batch in batches:
            unreadable += batch.unreadable
            if labelled.files:
                refuse_many_unreadable(unreadable, len(labelled.files))
            if len(batch.images):
                num_images += len(batch.images)
                hits += _hits(model.encode_image(batch.images), classifier, batch.targets.to(classifier.device))
    refuse_many_unreadable(unreadable, num_images + len(unreadable))
    if not num_images:
        raise InputError(f"no pictures with classes at {source}")
    top1, top5 = (hits.double() * 100 / num_images).tolist()
    return {
        "dataset": labelled.name,
        "num_images": num_images,
        "num_classes": len(labelled.classnames),
        "num_templates": len(templates),
        "num_unreadable": len(unreadable),
        "unreadable": [lost.name for lost in unreadable],
        "count_mismatch": _count_mismatch(labelled.num_expected, num_images + len(unreadable)),
        "top1": top1,
        "top5": top5,
    }


def _hits(features: Float[Tensor, "B D"], classifier: Float[Tensor, "C D"], targets: Tensor) -> Tensor:
    """How many of the batch have the right class first, and among the first five."""
    with torch.autocast(features.device.type, enabled=False):  # bf16 scores would tie
        scores = features.float() @ classifier.T  # a picture's own norm does not change the order of its classes
    best = scores.topk(min(5, len(classifier)), dim=1).indices == targets[:, None]  # [B,5]
    return torch.stack([best[:, 0].sum(), best.sum()])


def _count_mismatch(num_expected: int | None, num_found: int) -> str | None:
    if num_expected is None or num_found == num_expected:
        return None
    return f"ImageNet's validation set has {num_expected} pictures, here are {num_found}: not a figure to compare"
