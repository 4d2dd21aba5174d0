"""Image-text retrieval: recall at 1, 5 and 10 both ways, for any protocol of protocols.py, as a command and a library.

    python eval/retrieval.py --checkpoint RUN_OR_FILE --protocol urban1k --root data/Urban1k --json urban1k.json

Shapes: N pictures, M captions, D embedding width.
"""

from __future__ import annotations

import sys
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
from eval.features import Encoding, Unreadable, encode_captions, encode_images
from eval.models import ClipModel
from eval.protocols import PROTOCOLS, RetrievalSet, load_retrieval_set
from eval.recall import recall_metrics
from longclip_teacher.errors import InputError, run_command

__all__ = ["EncodedSet", "encode_retrieval_set", "evaluate_retrieval", "retrieval_figures"]


@dataclass(frozen=True)
class EncodedSet:
    """A retrieval set as a model sees it: what could be read, in the set's order."""

    images: list[Path]
    """The N pictures that could be read."""
    captions: list[str]
    """The M captions of those pictures."""
    image_features: Float[Tensor, "N D"]
    text_features: Float[Tensor, "M D"]
    caption_image: Int[Tensor, " M"]
    """Row in `images` of each caption's picture, on the features' device."""
    num_truncated: int
    """Captions longer than the model's context."""
    unreadable: list[Unreadable]


def encode_retrieval_set(model: ClipModel, retrieval_set: RetrievalSet, encoding: Encoding = Encoding()) -> EncodedSet:
    """Unit-norm features of a set's pictures and captions.

    A picture that cannot be read leaves the test together with its captions and is named under `unreadable`; more than
    1% of them is an InputError.
    """
    pictures = encode_images(model, retrieval_set.images, encoding)
    row_of = {image: row for row, image in enumerate(pictures.rows.tolist())}
    pairs = zip(retrieval_set.captions, retrieval_set.caption_image, strict=True)
    captions, rows = zip(*((text, row_of[image]) for text, image in pairs if image in row_of), strict=True)
    text_features, num_truncated = encode_captions(model, captions, encoding)
    return EncodedSet(
        images=[retrieval_set.images[row] for row in row_of],
        captions=list(captions),
        image_features=pictures.features,
        text_features=text_features,
        caption_image=torch.tensor(rows, device=text_features.device),
        num_truncated=num_truncated,
        unreadable=pictures.unreadable,
    )


def evaluate_retrieval(
    model: ClipModel, retrieval_set: RetrievalSet, encoding: Encoding = Encoding()
) -> dict[str, Any]:
    """Retrieval figures of a model on a set, as the JSON has them: percentages 0..100, ranks from 1.

    The model keeps the training mode it was in. Pictures that cannot be read: see `encode_retrieval_set`.
    """
    return retrieval_figures(model, retrieval_set, encode_retrieval_set(model, retrieval_set, encoding))


def retrieval_figures(model: ClipModel, retrieval_set: RetrievalSet, encoded: EncodedSet) -> dict[str, Any]:
    """The figures of `evaluate_retrieval` from features that are there already."""
    return {
        "protocol": retrieval_set.name,
        "num_images": len(encoded.images),
        "num_texts": len(encoded.captions),
        "num_truncated": encoded.num_truncated,
        "context_length": model.context_length,
        "num_unreadable": len(encoded.unreadable),
        "unreadable": [lost.name for lost in encoded.unreadable],
        "count_mismatch": retrieval_set.count_mismatch,
        **recall_metrics(encoded.image_features, encoded.text_features, encoded.caption_image),
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
    result |= evaluate_retrieval(options.load(), retrieval_set, options.encoding())
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
