"""Features of pictures and captions, computed once: pictures decoded in worker processes, captions sorted by length.

Shapes: N pictures, M captions, B batch, D embedding width. Features are float32, unit norm, on the model's device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from eval.images import open_image
from eval.models import ClipModel
from longclip_teacher.errors import InputError

__all__ = [
    "MAX_UNREADABLE_SHARE",
    "Encoding",
    "ImageBatch",
    "ImageFeatures",
    "ImageFiles",
    "Precision",
    "Unreadable",
    "encode_captions",
    "encode_images",
    "evaluation_mode",
    "image_batches",
    "model_device",
    "refuse_many_unreadable",
    "show_track",
]

Precision = Literal["fp32", "bf16", "fp16"]
MAX_UNREADABLE_SHARE = 0.01
_AUTOCAST_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Item = TypeVar("Item")


@dataclass(frozen=True)
class Encoding:
    """How pictures and captions are encoded; what it says does not belong to the figures, but for `precision`."""

    batch_size: int = 64
    """Pictures, or captions, encoded at a time."""
    precision: Precision = "fp32"
    """The arithmetic of the towers; features are float32 in any case."""
    num_workers: int = 0
    """Processes that decode pictures; 0 decodes in the main process."""
    show_progress: bool = False


class Unreadable(NamedTuple):
    """A picture that could not be decoded; `fatal` where what follows it is lost too (a broken shard)."""

    name: str
    reason: str
    fatal: bool = False


class ImageBatch(NamedTuple):
    """`targets` [B] (row numbers or classes) of the `images` [B,3,H,W], and the pictures that could not be read."""

    targets: Tensor
    images: Tensor
    unreadable: list[Unreadable]


class ImageFiles(Dataset):
    """Pictures by path, decoded and preprocessed where the item is asked for: in the DataLoader's workers."""

    def __init__(self, files: Sequence[tuple[Path, int]], preprocess: Any) -> None:
        self.files, self.preprocess = files, preprocess

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor | Unreadable]:
        path, target = self.files[index]
        try:
            return target, self.preprocess(open_image(path))
        except InputError as error:
            return target, Unreadable(str(path), str(error))


@dataclass(frozen=True)
class ImageFeatures:
    """`features` [N',D] of the pictures that could be read; `rows` [N'] says which of the N paths each one is."""

    features: Float[Tensor, "N D"]
    rows: Tensor
    unreadable: list[Unreadable]


@contextmanager
def evaluation_mode(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Eval mode, no gradients, autocast. Afterwards every module is in the mode it had, frozen parts included.

    `no_grad` and not `inference_mode`: what a model caches here must still serve its next training step.
    """
    modes = [(module, module.training) for module in model.modules()]
    autocast = torch.autocast(model_device(model).type, _AUTOCAST_DTYPE[precision], enabled=precision != "fp32")
    model.eval()
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        for module, training in modes:
            module.training = training


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device


def image_batches(dataset: Dataset, encoding: Encoding, device: torch.device) -> Iterator[ImageBatch]:
    """Batches of a dataset of (target, picture | Unreadable), in order, on `device`; raises InputError on a fatal one.

    The loader has a generator of its own: evaluating between two training steps leaves torch's random state alone.
    """
    loader = DataLoader(
        dataset,
        batch_size=encoding.batch_size,
        num_workers=encoding.num_workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),
    )
    total = None if isinstance(dataset, IterableDataset) else len(loader)
    for batch in show_track(loader, "pictures" if encoding.show_progress else None, total):
        for lost in batch.unreadable:
            if lost.fatal:
                raise InputError(lost.reason)
        yield batch._replace(images=batch.images.to(device, non_blocking=True))


def encode_images(model: ClipModel, paths: Sequence[Path], encoding: Encoding = Encoding()) -> ImageFeatures:
    """Unit-norm features of pictures. Unreadable ones are left out and named; more than 1% of them is an InputError."""
    dataset = ImageFiles([(path, row) for row, path in enumerate(paths)], model.preprocess)
    features, rows, unreadable = [], [], list[Unreadable]()
    batches = image_batches(dataset, encoding, model_device(model))
    with evaluation_mode(model, encoding.precision):
        for batch in batches:
            unreadable += batch.unreadable
            refuse_many_unreadable(unreadable, len(paths))
            if len(batch.images):
                features.append(_unit(model.encode_image(batch.images)))
                rows.append(batch.targets)
    if not features:
        raise InputError("no pictures to encode")
    result = ImageFeatures(torch.cat(features), torch.cat(rows), unreadable)
    _require_finite(result.features, lambda index: f"picture {paths[int(result.rows[index])]}")
    return result


def encode_captions(
    model: ClipModel, captions: Sequence[str], encoding: Encoding = Encoding()
) -> tuple[Float[Tensor, "M D"], int]:
    """Unit-norm features of captions, and how many captions are longer than the model's context and were cut.

    Equal captions are encoded once. Captions of like length share a batch, longest first: little is spent on padding,
    and running out of memory happens at once or not at all.
    """
    if not captions:
        raise InputError("no captions to encode")
    num_tokens = {caption: model.tokenizer.count_tokens(caption) for caption in dict.fromkeys(captions)}
    ordered = sorted(num_tokens, key=num_tokens.__getitem__, reverse=True)
    size = encoding.batch_size
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    features = []
    with evaluation_mode(model, encoding.precision):
        for batch in show_track(batches, "captions" if encoding.show_progress else None, len(batches)):
            tokens = model.tokenizer(batch, model.context_length).to(model_device(model))
            features.append(_unit(model.encode_text(tokens)))
    distinct = torch.cat(features)
    _require_finite(distinct, lambda index: f"caption {ordered[index][:80]!r}")
    row_of = {caption: row for row, caption in enumerate(ordered)}
    rows = torch.tensor([row_of[caption] for caption in captions], device=distinct.device)
    return distinct[rows], sum(num_tokens[caption] > model.context_length for caption in captions)


def refuse_many_unreadable(unreadable: Sequence[Unreadable], total: int) -> None:
    """InputError if more than 1% of `total` pictures are unreadable: the figures would be those of another test."""
    if len(unreadable) > MAX_UNREADABLE_SHARE * total:
        raise InputError(
            f"unreadable pictures: {len(unreadable)} by now of {total}, where {MAX_UNREADABLE_SHARE:.0%} is allowed; "
            f"the first: {unreadable[0].reason}"
        )


def show_track(items: Iterable[Item], description: str | None, total: int | None) -> Iterable[Item]:
    """`items`, with a progress bar on stderr if there is a description and a terminal to show it on."""
    if description is None or not sys.stderr.isatty():
        return items
    return track(items, description, total=total, console=Console(stderr=True))


def _collate(items: Sequence[tuple[int, Tensor | Unreadable]]) -> ImageBatch:
    read = [(target, image) for target, image in items if isinstance(image, Tensor)]
    images = torch.stack([image for _, image in read]) if read else torch.empty(0)
    unreadable = [image for _, image in items if isinstance(image, Unreadable)]
    return ImageBatch(torch.tensor([target for target, _ in read], dtype=torch.int64), images, unreadable)


def _unit(features: Tensor) -> Float[Tensor, "B D"]:
    return F.normalize(features.float(), dim=-1)


def _require_finite(features: Float[Tensor, "N D"], name: Any) -> None:
    """One look after the last batch: a look at each batch would make a GPU wait for the CPU."""
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise InputError(
            f"NaN or infinity in the features of {int((~finite).sum())} of {len(finite)} samples, "
            f"first in {name(first)}: check the weights, or use precision fp32"
        )
