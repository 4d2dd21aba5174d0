"""Image-text retrieval: recall at 1, 5 and 10 both ways, for any protocol of protocols.py, as a command and a library.

    python eval/retrieval.py --checkpoint RUN_OR_FILE --protocol urban1k --root data/Urban1k --json urban1k.json

Shapes: N pictures, M captions, D embedding width, R rows of a block.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eval.command_line import EvaluationOptions, write_json
from eval.features import Precision, encode_captions, encode_images
from eval.models import ClipModel
from eval.protocols import PROTOCOLS, RetrievalSet, load_retrieval_set
from longclip_teacher.errors import InputError, run_command

__all__ = ["evaluate_retrieval", "recall_metrics"]

RECALL_AT = (1, 5, 10)
_BLOCK_ELEMENTS = 1 << 24  # similarities held at once: 64 MB


def evaluate_retrieval(
    model: ClipModel,
    retrieval_set: RetrievalSet,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 64,
    precision: Precision = "fp32",
    num_workers: int = 0,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Retrieval figures of a model on a set, as the JSON has them: percentages 0..100, ranks from 1.

    The model moves to `device` if one is given, and keeps the training mode it was in. A picture that cannot be read
    leaves the test together with its captions and is named under `unreadable`; more than 1% of them is an InputError.
    """
    if device is not None:
        model.to(device)
    pictures = encode_images(
        model,
        retrieval_set.images,
        batch_size=batch_size,
        precision=precision,
        num_workers=num_workers,
        show_progress=show_progress,
    )
    row_of = {image: row for row, image in enumerate(pictures.rows.tolist())}
    kept = [
        (text, row_of[image])
        for text, image in zip(retrieval_set.captions, retrieval_set.caption_image, strict=True)
        if image in row_of
    ]
    captions = [caption for caption, _ in kept]
    text_features, num_truncated = encode_captions(
        model, captions, batch_size=batch_size, precision=precision, show_progress=show_progress
    )
    return {
        "protocol": retrieval_set.name,
        "num_images": len(pictures.features),
        "num_texts": len(captions),
        "num_truncated": num_truncated,
        "context_length": model.context_length,
        "num_unreadable": len(pictures.unreadable),
        "unreadable": [lost.name for lost in pictures.unreadable],
        "count_mismatch": retrieval_set.count_mismatch,
        **recall_metrics(pictures.features, text_features, torch.tensor([row for _, row in kept])),
    }


def recall_metrics(
    image_features: Float[Tensor, "N D"], text_features: Float[Tensor, "M D"], caption_image: Int[Tensor, " M"]
) -> dict[str, dict[str, float]]:
    """`{"i2t": {r1, r5, r10, mean_rank, median_rank, tied}, "t2i": {...}}` of features compared by their dot product.

    A query's rank is the place of its first matching candidate in a stable sort by score: any of a picture's captions
    counts, and of equal scores the earlier candidate comes first. A model that cannot tell four candidates apart thus
    finds one of the four, and a collapsed model next to none. `tied` is the percentage of queries whose best match
    shares its score with a wrong candidate. Memory is bounded: similarities are computed in blocks of rows.
    """
    num_images = len(image_features)
    caption_image = caption_image.to(image_features.device)
    captions_of = _captions_by_image(caption_image, num_images)
    image_features, text_features = image_features.float(), text_features.float()
    ranks_i2t, ranks_t2i, ties_i2t, ties_t2i = [], [], [], []
    for rows in _blocks(num_images, len(text_features)):
        scores = image_features[rows] @ text_features.T  # [R,M]
        own = captions_of[rows]  # [R,K], -1 where a picture has fewer captions
        own_scores = scores.gather(1, own.clamp(min=0)).masked_fill(own < 0, -torch.inf)
        best = own_scores.amax(dim=1, keepdim=True)
        first_own = own.masked_fill(own_scores < best, len(text_features)).amin(dim=1, keepdim=True)
        ranks_i2t.append(_places(scores, best, first_own))
        ties_i2t.append((scores == best).sum(dim=1) > (own_scores == best).sum(dim=1))
    for rows in _blocks(len(text_features), num_images):
        scores = text_features[rows] @ image_features.T  # [R,N]
        best = scores.gather(1, caption_image[rows, None])
        ranks_t2i.append(_places(scores, best, caption_image[rows, None]))
        ties_t2i.append((scores == best).sum(dim=1) > 1)
    return {
        "i2t": _summary(torch.cat(ranks_i2t), torch.cat(ties_i2t)),
        "t2i": _summary(torch.cat(ranks_t2i), torch.cat(ties_t2i)),
    }


def _places(
    scores: Float[Tensor, "R C"], best: Float[Tensor, "R 1"], candidate: Int[Tensor, "R 1"]
) -> Int[Tensor, " R"]:
    """Place from 1 of each row's `candidate`, whose score is `best`, in a stable sort."""
    is_earlier = torch.arange(scores.shape[1], device=scores.device) < candidate
    return 1 + ((scores > best) | ((scores == best) & is_earlier)).sum(dim=1)


def _captions_by_image(caption_image: Int[Tensor, " M"], num_images: int) -> Int[Tensor, "N K"]:
    """The captions of each picture, K the most that any has, filled up with -1."""
    counts = torch.bincount(caption_image, minlength=num_images)
    if len(counts) > num_images or bool((counts == 0).any()):
        raise InputError(f"every one of the {num_images} pictures needs a caption, and every caption one of them")
    order = torch.argsort(caption_image, stable=True)
    image = caption_image[order]
    position = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[image]
    table = torch.full((num_images, int(counts.max())), -1, device=order.device)
    table[image, position] = order
    return table


def _blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    size = max(1, _BLOCK_ELEMENTS // num_columns)
    return (slice(start, start + size) for start in range(0, num_rows, size))


def _summary(ranks: Int[Tensor, " Q"], tied: Tensor) -> dict[str, float]:
    ranks = ranks.double().cpu()
    recall = {f"r{k}": float((ranks <= k).double().mean() * 100) for k in RECALL_AT}
    middle = float(torch.quantile(ranks, 0.5))  # of an even number, the mean of the two in the middle
    return {
        **recall,
        "mean_rank": float(ranks.mean()),
        "median_rank": middle,
        "tied": float(tied.double().mean() * 100),
    }


@dataclass
class Options(EvaluationOptions):
    """Long-caption retrieval of a student, a teacher or published weights: R@1/5/10 both ways, mean and median rank.

    python eval/retrieval.py --checkpoint runs/distil --protocol urban1k --root data/Urban1k --json urban1k.json
    python eval/retrieval.py --checkpoint longclip-b --protocol coco2017val --root data/coco --precision bf16
    python eval/retrieval.py --protocol list
    """

    protocol: Annotated[str, tyro.conf.arg(metavar="NAME|list")] = "folder"
    """The benchmark: sharegpt4v_1k, urban1k, coco2017val, folder; `list` explains each and what files it needs."""
    root: Path | None = None
    """The folder that holds the benchmark's files."""
    annotations: Path | None = None
    """The captions JSON of sharegpt4v_1k or coco2017val, where it is not in its usual place below --root."""
    limit: int | None = None
    """Use the first so many pictures only: for a quick look, not for a figure to report."""


def main() -> None:
    """The command."""
    options = tyro.cli(Options, description=Options.__doc__)
    if options.protocol == "list":
        print_protocols()
        return
    if options.root is None:
        raise InputError("pass --root DIR, the folder that holds the benchmark's files (--protocol list says which)")
    options.check()
    retrieval_set = load_retrieval_set(options.protocol, options.root, options.limit, options.annotations)
    if retrieval_set.count_mismatch:
        print(f"warning: {retrieval_set.count_mismatch}", file=sys.stderr)
    result = {"checkpoint": options.checkpoint, "precision": options.precision}
    result |= evaluate_retrieval(
        options.load(),
        retrieval_set,
        batch_size=options.batch_size,
        precision=options.precision,
        num_workers=options.num_workers,
        show_progress=True,
    )
    print_table(result)
    if options.json is not None:
        write_json(options.json, result)


def print_table(result: dict[str, Any]) -> None:
    """The figures as a table on stdout."""
    table = Table(title=f"{result['protocol']}: {result['num_images']} pictures, {result['num_texts']} captions")
    for column in ("", "R@1 %", "R@5 %", "R@10 %", "mean rank", "median rank"):
        table.add_column(column, justify="right" if column else "left")
    for way, name in (("i2t", "image to text"), ("t2i", "text to image")):
        figures = result[way]
        table.add_row(name, *(f"{figures[key]:.1f}" for key in ("r1", "r5", "r10", "mean_rank", "median_rank")))
    console = Console()
    console.print(table)
    notes = [f"{result['num_truncated']} captions cut at {result['context_length']} tokens"]
    if result["num_unreadable"]:
        notes.append(
            f"{result['num_unreadable']} pictures unreadable and left out, the first: {result['unreadable'][0]}"
        )
    tied = max(result["i2t"]["tied"], result["t2i"]["tied"])
    if tied >= 1:
        notes.append(
            f"{tied:.0f}% of the queries tie with a wrong candidate, of which the earlier counts: "
            "captions or features repeat"
        )
    for note in notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)


def print_protocols() -> None:
    """What each protocol is and which files it needs, on stdout."""
    console = Console()
    for protocol in PROTOCOLS.values():
        counts = (
            f"{protocol.num_images} pictures, {protocol.num_captions} captions" if protocol.num_images else "any number"
        )
        console.print(f"[bold]{protocol.name}[/bold] ({counts})", highlight=False)
        console.print(f"  {protocol.definition}\n  Files: {protocol.files}\n", markup=False, highlight=False)


if __name__ == "__main__":
    run_command(main)
