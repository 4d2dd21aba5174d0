"""Encode pictures and captions: worker processes decode pictures, and captions are sorted by length.

Shapes: N pictures, M captions, B batch, D embedding width. Features are float32, unit norm, on the model's device.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from eval.base.consoles import plain_console
from eval.base.images import open_image
from eval.base.processes import all_results, is_main_process, my_share
from eval.base.progress import progress
from eval.base.workers import share_tensors, worker_options
from eval.towers.feature_cache import FeatureCache
from eval.towers.models import ClipModel, cut_tokens
from eval.towers.precision import Precision
from longclip_teacher.errors import InputError
from longclip_teacher.features import unit_features

__all__ = [
    "MAX_UNREADABLE_SHARE",
    "Encoding",
    "ImageBatch",
    "ImageFeatures",
    "ImageFiles",
    "Unreadable",
    "encode_captions",
    "encode_images",
    "evaluation_mode",
    "image_batches",
    "model_device",
    "refuse_many_unreadable",
    "show_track",
]

MAX_UNREADABLE_SHARE = 0.01
_AUTOCAST_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Item = TypeVar("Item")


@dataclass(frozen=True)
class Encoding:
    """How pictures and captions are encoded. Only `precision` can change the figures."""

    batch_size: int = 64
    """Pictures or captions per batch."""
    precision: Precision = "fp32"
    """Arithmetic of the towers; features are always float32."""
    num_workers: int = 0
    """Processes that decode pictures; 0 decodes in the main process."""
    show_progress: bool = False
    shared: bool = False
    """Share the work among torchrun's processes. All must make the same calls, and each gets all features. If False,
    a process encodes alone."""
    cache: FeatureCache | None = None
    """Stores features from one evaluation to the next; None computes them each time."""


class Unreadable(NamedTuple):
    """A picture that could not be decoded. `fatal` means that everything after it is lost too (a broken shard)."""

    name: str
    reason: str
    fatal: bool = False


class ImageBatch(NamedTuple):
    """`targets` [B] (row numbers or classes) of the `images` [B,3,H,W], and the pictures that could not be read."""

    targets: Tensor
    images: Tensor
    unreadable: list[Unreadable]


class ImageFiles(Dataset):
    """Pictures by path, decoded and preprocessed in the DataLoader's workers."""

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
    """`features` [N',D] of the pictures that could be read; `rows` [N'] gives the index of each in the N paths."""

    features: Float[Tensor, "N D"]
    rows: Tensor
    unreadable: list[Unreadable]


@contextmanager
def evaluation_mode(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Eval mode, no gradients, autocast. Afterwards every module returns to its previous mode, frozen parts included.

    This uses `no_grad` rather than `inference_mode`, because tensors that a model caches here must still work in its
    next training step.
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
    """Batches of a dataset of (target, picture | Unreadable), in order, on `device`; InputError at a fatal Unreadable.

    The loader has its own generator, so evaluating between two training steps does not change torch's random state.
    """
    loader = DataLoader(
        dataset,
        batch_size=encoding.batch_size,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),
        **worker_options(encoding.num_workers),
    )
    total = None if isinstance(dataset, IterableDataset) else len(loader)
    for batch in show_track(loader, "pictures" if encoding.show_progress else None, total):
        for lost in batch.unreadable:
            if lost.fatal:
                raise InputError(lost.reason)
        yield batch._replace(images=batch.images.to(device, non_blocking=True))
        progress()


def encode_images(model: ClipModel, paths: Sequence[Path], encoding: Encoding = Encoding()) -> ImageFeatures:
    """Unit-norm features of pictures. Unreadable ones are left out and listed; more than 1% raise InputError."""
    if not paths:
        raise InputError("no pictures to encode")
    found = _kept_or_computed(
        encoding,
        "pictures",
        lambda cache: cache.image_key(model, paths, encoding.precision),
        lambda: _encode_pictures(model, paths, encoding),
    )
    features, rows = found["features"].to(model_device(model)), found["rows"]
    lost, reasons = found["lost"].tolist(), json.loads(bytes(found["reasons"].tolist()))
    unreadable = [Unreadable(str(paths[row]), reason) for row, reason in zip(lost, reasons, strict=True)]
    return ImageFeatures(features, rows, unreadable)


def _encode_pictures(model: ClipModel, paths: Sequence[Path], encoding: Encoding) -> dict[str, Tensor]:
    """`features` [N',D] of the `rows` [N'] that could be read, the `lost` rows, and the `reasons` as JSON bytes."""
    starts = range(0, len(paths), encoding.batch_size)
    parts = _parts(encoding, starts, lambda share: _encode_share_of_pictures(model, paths, share, encoding))
    rows, order = torch.cat([part["rows"] for part in parts]).sort()
    lost, order_lost = torch.cat([part["lost"] for part in parts]).sort()
    reasons = [reason for part in parts for reason in json.loads(bytes(part["reasons"].tolist()))]
    reasons = [reasons[index] for index in order_lost.tolist()]
    unreadable = [Unreadable(str(paths[row]), why) for row, why in zip(lost.tolist(), reasons, strict=True)]
    refuse_many_unreadable(unreadable, len(paths))
    if not len(rows):
        raise InputError("no pictures to encode")
    features = torch.cat([part["features"] for part in parts])
    features = features[order.to(features.device)]
    _require_finite(features, lambda index: f"picture {paths[int(rows[index])]}")
    return {"features": features, "rows": rows, "lost": lost, "reasons": _json_bytes(reasons)}


def _encode_share_of_pictures(
    model: ClipModel, paths: Sequence[Path], starts: Sequence[int], encoding: Encoding
) -> dict[str, Tensor]:
    """`_encode_pictures` for the batches that begin at `starts`, in this process."""
    mine = [row for start in starts for row in range(start, min(start + encoding.batch_size, len(paths)))]
    dataset = ImageFiles([(paths[row], row) for row in mine], model.preprocess)
    features = [torch.empty(0, model.embed_dim, device=model_device(model))]
    rows, unreadable = list[int](), list[Unreadable]()
    with evaluation_mode(model, encoding.precision):
        for batch in image_batches(dataset, encoding, model_device(model)):
            unreadable += batch.unreadable
            refuse_many_unreadable(unreadable, len(paths))
            if len(batch.images):
                features.append(unit_features(model.encode_image(batch.images)))
                rows += batch.targets.tolist()
    read = set(rows)
    return {
        "features": torch.cat(features),
        "rows": torch.tensor(rows, dtype=torch.int64),
        "lost": torch.tensor([row for row in mine if row not in read], dtype=torch.int64),
        "reasons": _json_bytes([lost.reason for lost in unreadable]),
    }


def encode_captions(
    model: ClipModel, captions: Sequence[str], encoding: Encoding = Encoding(), num_tokens: int | None = None
) -> tuple[Float[Tensor, "M D"], int]:
    """Unit-norm features of captions, and the number of captions that were cut.

    They are cut at the model's context length, or at `num_tokens` if that is shorter; a caption that is cut keeps its
    end token. Equal captions are encoded once. Captions of similar length share a batch, longest first: this wastes
    little on padding, and memory runs out at once or not at all.
    """
    if not captions:
        raise InputError("no captions to encode")
    longest = min(num_tokens or model.context_length, model.context_length)
    found = _kept_or_computed(
        encoding,
        "captions",
        lambda cache: cache.caption_key(model, captions, encoding.precision, longest),
        lambda: _encode_captions(model, captions, encoding, longest),
    )
    return found["features"].to(model_device(model)), int(found["num_truncated"])


def _encode_captions(model: ClipModel, captions: Sequence[str], encoding: Encoding, longest: int) -> dict[str, Tensor]:
    """`features` [M,D] and `num_truncated` []."""
    num_tokens = {caption: model.tokenizer.count_tokens(caption) for caption in dict.fromkeys(captions)}
    ordered = sorted(num_tokens, key=num_tokens.__getitem__, reverse=True)
    size = encoding.batch_size
    batches = [range(start, min(start + size, len(ordered))) for start in range(0, len(ordered), size)]
    parts = _parts(encoding, batches, lambda share: _encode_share_of_captions(model, ordered, share, encoding, longest))
    features = torch.cat([part["features"] for part in parts])
    place = torch.cat([part["rows"] for part in parts]).argsort().to(features.device)
    distinct = features[place]
    _require_finite(distinct, lambda index: f"caption {ordered[index][:80]!r}")
    row_of = {caption: row for row, caption in enumerate(ordered)}
    rows = torch.tensor([row_of[caption] for caption in captions], device=distinct.device)
    num_truncated = sum(num_tokens[caption] > longest for caption in captions)
    return {"features": distinct[rows], "num_truncated": torch.tensor(num_truncated)}


def _encode_share_of_captions(
    model: ClipModel, ordered: Sequence[str], batches: Sequence[range], encoding: Encoding, longest: int
) -> dict[str, Tensor]:
    """`features` of the captions in `batches`, and their `rows` in `ordered`."""
    features = [torch.empty(0, model.embed_dim, device=model_device(model))]
    with evaluation_mode(model, encoding.precision):
        for batch in show_track(batches, "captions" if encoding.show_progress else None, len(batches)):
            tokens = cut_tokens(model, [ordered[row] for row in batch], longest).to(model_device(model))
            features.append(unit_features(model.encode_text(tokens)))
            progress()
    rows = [row for batch in batches for row in batch]
    return {"features": torch.cat(features), "rows": torch.tensor(rows, dtype=torch.int64)}


def _parts(
    encoding: Encoding, batches: Sequence[Item], compute: Callable[[Sequence[Item]], dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """The results of `compute` on the batches: one part, or one part per process."""
    return all_results(lambda: compute(my_share(batches))) if encoding.shared else [compute(batches)]


def _kept_or_computed(
    encoding: Encoding, what: str, key_of: Callable[[FeatureCache], str], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors from the cache, or else computed and stored. With several processes, rank 0 handles the cache."""
    cache = encoding.cache
    if cache is None:
        return compute()
    reads = not encoding.shared or is_main_process()
    key = key_of(cache) if reads else ""
    found = _parts(encoding, [key], lambda _: (cache.load(key) if reads else None) or {})[0]
    if found:
        if encoding.show_progress and is_main_process():
            print(f"{what}: features from the cache", file=sys.stderr)
        return found
    found = compute()
    if reads:
        cache.save(key, found)
    return found


def refuse_many_unreadable(unreadable: Sequence[Unreadable], total: int) -> None:
    """Raise InputError if more than 1% of `total` pictures are unreadable: the figures would describe another test."""
    if len(unreadable) > MAX_UNREADABLE_SHARE * total:
        raise InputError(
            f"unreadable pictures: {len(unreadable)} by now of {total}, where {MAX_UNREADABLE_SHARE:.0%} is allowed; "
            f"the first: {unreadable[0].reason}"
        )


def show_track(items: Iterable[Item], description: str | None, total: int | None) -> Iterable[Item]:
    """`items`, with a progress bar on stderr if there is a description and stderr is a terminal."""
    if description is None or not sys.stderr.isatty() or not is_main_process():
        return items
    return track(items, description, total=total, console=plain_console(stderr=True))


def _collate(items: Sequence[tuple[int, Tensor | Unreadable]]) -> ImageBatch:
    read = [(target, image) for target, image in items if isinstance(image, Tensor)]
    images = torch.stack([image for _, image in read]) if read else torch.empty(0)
    unreadable = [image for _, image in items if isinstance(image, Unreadable)]
    targets = torch.tensor([target for target, _ in read], dtype=torch.int64)
    return share_tensors(ImageBatch(targets, images, unreadable))


def _json_bytes(content: list[str]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


def _require_finite(features: Float[Tensor, "N D"], name: Any) -> None:
    """Check once after the last batch: checking each batch would make a GPU wait for the CPU."""
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise InputError(
            f"NaN or infinity in the features of {int((~finite).sum())} of {len(finite)} samples, "
            f"first in {name(first)}: check the weights, or use precision fp32"
        )
