"""How well a student's features agree with its teacher's: cosine through a linear map, CKA, neighbours, retention.

    python eval/agreement.py --teacher longclip-b --checkpoint runs/distil --protocol urban1k --root data/Urban1k

Shapes: N pictures, M captions, S samples (N or M), Q queries, C candidates, D widths (the teacher's and the student's
may differ), K neighbours, R rows of a block.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from eval.base.arguments import answer_early, read_options
from eval.command_line import EvaluationOptions
from longclip_teacher.errors import InputError, run_command


@dataclass
class Options(EvaluationOptions):
    """How well a student agrees with its teacher: cosine through a linear map, CKA, shared neighbours, retained recall.

    python eval/agreement.py --teacher longclip-b --checkpoint runs/distil --protocol urban1k --root data/Urban1k
    python eval/agreement.py --teacher runs/teacher --checkpoint runs/distil --root data/mine --json agreement.json

    --checkpoint is the student. Options such as --variant and --pad-mask apply to it and not to the teacher.
    """

    teacher: str | None = None
    """The reference model: a weight file, a run folder (its best weights), or a hub name."""
    protocol: str = "folder"
    """Benchmark; `python eval/retrieval.py --protocol list` explains each. folder: your own pairs."""
    root: Path | None = None
    """Folder of the benchmark's files."""
    annotations: Path | None = None
    """The protocol's annotation file, if it has one that is not in its usual place below --root."""
    limit: int | None = None
    """Use only the first N pictures: for a quick look, not for a figure to report."""

    def check(self) -> None:
        """Raise InputError for options that cannot work, before any data is read."""
        if self.teacher is None:
            raise InputError("pass --teacher PATH, the model that the student is compared with")
        if self.root is None:
            raise InputError("pass --root DIR, the folder of the benchmark's files")
        super().check()


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eval.base.consoles import plain_console
from eval.base.processes import is_main_process, start
from eval.benchmarks.protocols import load_retrieval_set
from eval.measures.recall import DirectionRanks, retrieval_ranks
from eval.measures.retrieval_set import EncodedSet, encode_retrieval_set
from longclip_teacher.atomic_files import write_json
from longclip_teacher.text import CaptionTokenizer

__all__ = ["agreement", "linear_cka", "mapped_cosine", "neighbour_overlap"]

NUM_NEIGHBOURS = 10
MAX_NEIGHBOUR_QUERIES = 5000
TOKEN_BINS = {"<=77": (0, 77), "78-128": (78, 128), "129-248": (129, 248), ">248": (249, sys.maxsize)}
RELATIVE_RIDGE = 1e-4  # share of the mean eigenvalue: this damps only directions that hardly occur
_BLOCK_ELEMENTS = 1 << 24  # similarities held at once: 64 MB


def agreement(teacher: EncodedSet, student: EncodedSet) -> dict[str, Any]:
    """Agreement of two models on one set, as in the JSON; percentages 0..100.

    `image` and `text` each have `mapped_cosine` (the dict of that function), `cosine` (of the features as they are;
    None if the widths differ) and `linear_cka`. `neighbour_overlap` has `image_image`, `text_text` and `image_text`:
    the percentage of the 10 nearest that the two models share. `retention` is the student's R@1 in percent of the
    teacher's, `overall` and by caption length in tokens; a picture counts at the mean length of its captions. Raises
    InputError unless both sets have the same pictures and captions.
    """
    if teacher.images != student.images or teacher.captions != student.captions:
        raise InputError("teacher and student have different pictures or captions: encode the same set with both")
    in_half = _random_half(len(teacher.images))
    caption_image = teacher.caption_image.cpu()
    halves = {"image": in_half, "text": in_half[caption_image]}  # captions go with their picture
    pairs = {
        "image": (teacher.image_features, student.image_features),
        "text": (teacher.text_features, student.text_features),
    }
    overlaps = {}
    for name, (queries, candidates) in {
        "image_image": ("image", "image"),
        "text_text": ("text", "text"),
        "image_text": ("image", "text"),
    }.items():
        sides = [(pairs[queries][side], pairs[candidates][side]) for side in (0, 1)]
        overlaps[name] = neighbour_overlap(*sides[0], *sides[1], exclude_self=queries == candidates)
    return {
        "num_images": len(teacher.images),
        "num_texts": len(teacher.captions),
        "teacher_dim": teacher.image_features.shape[1],
        "student_dim": student.image_features.shape[1],
        "num_neighbours": NUM_NEIGHBOURS,
        **{
            name: {
                "mapped_cosine": mapped_cosine(*pair, halves[name]),
                "cosine": _direct_cosine(*pair),
                "linear_cka": linear_cka(*pair),
            }
            for name, pair in pairs.items()
        },
        "neighbour_overlap": overlaps,
        "retention": _retention(teacher, student),
    }


def mapped_cosine(
    teacher: Float[Tensor, "S Dt"], student: Float[Tensor, "S Ds"], is_fitted: Bool[Tensor, " S"]
) -> dict[str, Any]:
    """Mean cosine between the teacher's features and the student's, mapped to them by the best linear map.

    The map (least squares with a small ridge, no constant) is fitted on the samples of `is_fitted`, and `mean` is
    measured on the others. `of_constant` is the cosine that the mean teacher feature of the fitted samples reaches
    there: features of CLIP models lie in a narrow cone, so a high cosine says little by itself. With fewer than twice
    as many fitted samples as the student is wide, the map fits noise: use a larger set.
    """
    is_fitted = is_fitted.to(teacher.device)
    teacher, student = teacher.double(), student.double()
    inputs, targets = student[is_fitted], teacher[is_fitted]
    gram = inputs.T @ inputs
    ridge = RELATIVE_RIDGE * gram.diagonal().mean()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve(gram + ridge * identity, inputs.T @ targets)  # [Ds,Dt]
    rest = teacher[~is_fitted]
    mapped = F.cosine_similarity(student[~is_fitted] @ weights, rest, dim=1)
    constant = F.cosine_similarity(targets.mean(dim=0, keepdim=True), rest, dim=1)
    return {
        "mean": float(mapped.mean()),
        "of_constant": float(constant.mean()),
        "num_fitted": len(inputs),
        "num_measured": len(rest),
    }


def linear_cka(teacher: Float[Tensor, "S Dt"], student: Float[Tensor, "S Ds"]) -> float:
    """Linear CKA, 0..1 (Kornblith et al. 2019, equation 5 with linear kernels); rotating or scaling features keeps it.

    It is 0 if one side does not vary at all, and grows towards 1 if there are fewer samples than dimensions.
    """
    teacher, student = teacher.double(), student.double()  # float32 sums would be wrong in the fourth digit
    teacher, student = teacher - teacher.mean(dim=0), student - student.mean(dim=0)
    shared = (teacher.T @ student).square().sum()  # ||X^T Y||_F^2: no S x S matrix is needed
    norms = (teacher.T @ teacher).norm() * (student.T @ student).norm()
    return float(shared / norms) if norms > 0 else 0.0


def neighbour_overlap(
    teacher_queries: Float[Tensor, "Q Dt"],
    teacher_candidates: Float[Tensor, "C Dt"],
    student_queries: Float[Tensor, "Q Ds"],
    student_candidates: Float[Tensor, "C Ds"],
    *,
    exclude_self: bool,
    k: int = NUM_NEIGHBOURS,
) -> float | None:
    """Percentage of a query's `k` nearest candidates that the two models share, averaged over the queries.

    With `exclude_self`, candidate i does not count for query i. Chance is k / C. None if k is all candidates. Of more
    than 5000 queries, 5000 at equal steps are used.
    """
    num_candidates = len(teacher_candidates) - exclude_self
    if k >= num_candidates:
        return None
    num_queries = min(len(teacher_queries), MAX_NEIGHBOUR_QUERIES)
    asked = torch.arange(num_queries, device=teacher_queries.device) * len(teacher_queries) // num_queries
    shared = 0
    for rows in asked.split(max(1, _BLOCK_ELEMENTS // len(teacher_candidates))):
        left_out = rows if exclude_self else None
        first = _nearest(teacher_queries[rows], teacher_candidates, k, left_out)
        second = _nearest(student_queries[rows], student_candidates, k, left_out)
        shared += int((first[:, :, None] == second[:, None, :]).sum())
    return 100 * shared / (k * num_queries)


def _nearest(
    queries: Float[Tensor, "R D"], candidates: Float[Tensor, "C D"], k: int, left_out: Int[Tensor, " R"] | None
) -> Int[Tensor, "R K"]:
    """The `k` candidates of the highest scores; each row leaves one candidate out if told so."""
    scores = queries @ candidates.T  # [R,C]
    if left_out is not None:
        scores.scatter_(1, left_out[:, None], -torch.inf)
    return scores.topk(k, dim=1).indices


def _random_half(num_images: int) -> Bool[Tensor, " N"]:
    """A fixed half of the pictures, with at least one picture on either side."""
    if num_images < 2:
        raise InputError(f"{num_images} picture: the linear map is fitted on one half and measured on the other")
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    return order < num_images // 2


def _direct_cosine(teacher: Float[Tensor, "S Dt"], student: Float[Tensor, "S Ds"]) -> float | None:
    if teacher.shape != student.shape:
        return None
    return float(F.cosine_similarity(teacher, student, dim=1).mean())


def _retention(teacher: EncodedSet, student: EncodedSet) -> dict[str, Any]:
    """R@1 of both models and their ratio, in both directions, overall and for each caption-length bin with queries."""
    tokenizer = CaptionTokenizer()
    caption_image = teacher.caption_image.cpu()
    lengths = torch.tensor([tokenizer.count_tokens(caption) for caption in teacher.captions], dtype=torch.float64)
    totals = torch.zeros(len(teacher.images), dtype=torch.float64).index_add_(0, caption_image, lengths)
    mean_lengths = totals / torch.bincount(caption_image, minlength=len(teacher.images))
    ranks = [
        retrieval_ranks(side.image_features, side.text_features, side.caption_image) for side in (teacher, student)
    ]
    ways = {
        "i2t": (ranks[0].i2t, ranks[1].i2t, mean_lengths.round()),
        "t2i": (ranks[0].t2i, ranks[1].t2i, lengths),
    }
    everything = (0, sys.maxsize)
    bins = {
        name: {way: _retained(*values, between) for way, values in ways.items()} for name, between in TOKEN_BINS.items()
    }
    return {
        "overall": {way: _retained(*values, everything) for way, values in ways.items()},
        "by_num_tokens": {name: figures for name, figures in bins.items() if any(figures.values())},
    }


def _retained(
    teacher: DirectionRanks, student: DirectionRanks, lengths: Float[Tensor, " Q"], between: tuple[int, int]
) -> dict[str, Any] | None:
    """Figures of the queries with `between` tokens, both ends included; None if there are none."""
    queries = (lengths >= between[0]) & (lengths <= between[1])
    if not queries.any():
        return None
    of_teacher, of_student = (float((side.ranks[queries] == 1).double().mean() * 100) for side in (teacher, student))
    return {
        "num_queries": int(queries.sum()),
        "teacher_r1": of_teacher,
        "student_r1": of_student,
        "retention": 100 * of_student / of_teacher if of_teacher else None,
    }


def main() -> None:
    """Run the command."""
    options = read_options(Options)
    assert options.root is not None  # check() has seen to it
    with start(options.device, tf32=False) as runtime:
        result = run(options, options.root)
        if runtime.is_main:
            if options.json is not None:
                write_json(options.json, result)
            print_agreement(result)


def run(options: Options, root: Path) -> dict[str, Any]:
    """The command's JSON, on every process of torchrun."""
    retrieval_set = load_retrieval_set(options.protocol, root, options.limit, options.annotations)
    if retrieval_set.count_mismatch and is_main_process():
        print(f"warning: {retrieval_set.count_mismatch}", file=sys.stderr)
    student_model = options.load()
    teacher_model = replace(
        options, checkpoint=options.teacher, variant=None, context_length=None, pad_mask=None, activation=None,
        reparameterize=False,
    ).load()  # fmt: skip
    teacher = encode_retrieval_set(teacher_model, retrieval_set, options.encoding())
    student = encode_retrieval_set(student_model, retrieval_set, options.encoding())
    result = {"teacher": options.teacher, "checkpoint": options.checkpoint, "precision": options.precision}
    result |= {"protocol": retrieval_set.name, "count_mismatch": retrieval_set.count_mismatch}
    return result | agreement(teacher, student)


def print_agreement(result: Mapping[str, Any]) -> None:
    """Print the figures as two tables on stdout."""
    features = Table(title=f"features of {result['num_images']} pictures and {result['num_texts']} captions")
    for column in ("", "cosine through a linear map", "(of a constant)", "cosine", "linear CKA"):
        features.add_column(column, justify="right" if column else "left")
    for name in ("image", "text"):
        mapped, direct = result[name]["mapped_cosine"], result[name]["cosine"]
        shown = "-" if direct is None else f"{direct:.3f}"
        cka = f"{result[name]['linear_cka']:.3f}"
        features.add_row(name, f"{mapped['mean']:.3f}", f"{mapped['of_constant']:.3f}", shown, cka)
    table = Table(title="R@1 %: student / teacher, retained")
    for column in ("tokens", "image to text", "text to image"):
        table.add_column(column, justify="left" if column == "tokens" else "right")
    retention = result["retention"]
    for name, figures in {"any": retention["overall"], **retention["by_num_tokens"]}.items():
        table.add_row(name, *(_shown(figures[way]) for way in ("i2t", "t2i")))
    console = plain_console()
    console.print(features, table)
    overlaps = (
        f"{name.replace('_', ' to ')} {'-' if value is None else f'{value:.1f}%'}"
        for name, value in result["neighbour_overlap"].items()
    )
    num_fitted = result["image"]["mapped_cosine"]["num_fitted"]
    if num_fitted < 2 * result["student_dim"]:
        console.print(
            f"the linear map is fitted on {num_fitted} pictures, too few for {result['student_dim']} dimensions: "
            "its cosine is unreliable, use a larger set",
            soft_wrap=True,
        )
    console.print(f"shared of the {result['num_neighbours']} nearest: {', '.join(overlaps)}", soft_wrap=True)


def _shown(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "-"
    retained = "-" if figures["retention"] is None else f"{figures['retention']:.1f}%"
    return f"{figures['student_r1']:.1f} / {figures['teacher_r1']:.1f}, {retained} of {figures['num_queries']}"


if __name__ == "__main__":
    run_command(main)
