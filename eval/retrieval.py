"""The command for image-text retrieval: recall at 1, 5 and 10 in both directions, for any protocol of protocols.py.

python eval/retrieval.py --checkpoint RUN_OR_FILE --protocol urban1k --root data/Urban1k --json urban1k.json
torchrun --nproc_per_node=2 eval/retrieval.py ...  # shares the pictures and captions among processes
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from eval.base.arguments import answer_early, read_options
from eval.command_line import EvaluationOptions
from longclip_teacher.errors import InputError, run_command


@dataclass
class Options(EvaluationOptions):
    """Long-caption retrieval with a student, a teacher or published weights: R@1/5/10 both ways, mean and median rank.

    python eval/retrieval.py --checkpoint runs/distil --protocol urban1k --root data/Urban1k --json urban1k.json
    python eval/retrieval.py --checkpoint longclip-b --protocol coco2017val --root data/coco --precision bf16
    python eval/retrieval.py --protocol list
    torchrun --nproc_per_node=4 eval/retrieval.py --checkpoint longclip-l --protocol flickr30k_all --root data/flickr30k

    The earlier of two candidates with equal scores ranks first. In the JSON, best_case is recall if every tie were won.
    """

    protocol: Annotated[str, tyro.conf.arg(metavar="NAME|list")] = "folder"
    """Benchmark, such as urban1k. `list` explains each: the files it needs and the figures it compares with."""
    root: Path | None = None
    """Folder of the benchmark's files."""
    annotations: Path | None = None
    """The protocol's annotation file, if it has one that is not in its usual place below --root."""
    limit: int | None = None
    """Use only the first N pictures: for a quick look, not for a figure to report."""
    retrieved_text: bool = False
    """Also measure the caption found for each picture: BLEU-4 and share of distinct captions."""
    verify: bool = False
    """First check every file listed in ROOT/SHA256SUMS."""

    def check(self) -> None:
        """Raise InputError for options that cannot work, before any data is read."""
        if self.protocol == "list":
            return
        if self.root is None:
            raise InputError("pass --root DIR, the folder of the benchmark's files (--protocol list says which)")
        super().check()


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

from torch import Tensor

from eval.base.consoles import plain_console
from eval.base.processes import all_results, is_main_process, start
from eval.benchmarks.checksums import SHA256SUMS, verify_sha256sums
from eval.benchmarks.protocols import PROTOCOLS, TIES, load_retrieval_set
from eval.measures.retrieval_set import encode_retrieval_set, retrieval_figures
from eval.measures.retrieved_text import retrieved_text_quality
from eval.towers.models import describe_model
from longclip_teacher.atomic_files import write_json


def main() -> None:
    """Run the command."""
    options = read_options(Options)
    if options.protocol == "list":
        print_protocols()
        return
    assert options.root is not None  # check() has seen to it
    with start(options.device, tf32=False) as runtime:
        result = run(options, options.root)
        if runtime.is_main:
            if options.json is not None:
                write_json(options.json, result)
            print_table(result)


def run(options: Options, root: Path) -> dict[str, Any]:
    """The command's JSON, on every process of torchrun."""
    if options.verify:
        all_results(lambda: _verify(root) if is_main_process() else {})
    retrieval_set = load_retrieval_set(options.protocol, root, options.limit, options.annotations)
    if retrieval_set.count_mismatch and is_main_process():
        print(f"warning: {retrieval_set.count_mismatch}", file=sys.stderr)
    model = options.load()
    encoded = encode_retrieval_set(model, retrieval_set, options.encoding())
    figures = retrieval_figures(model, retrieval_set, encoded)
    if options.retrieved_text:
        figures["retrieved_text"] = retrieved_text_quality(encoded)
    return {
        "checkpoint": options.checkpoint,
        "model": describe_model(model),
        "precision": options.precision,
        **figures,
    }


def _verify(root: Path) -> dict[str, Tensor]:
    num_files = verify_sha256sums(root, show_progress=True)
    print(f"{num_files} files match {SHA256SUMS}", file=sys.stderr)
    return {}


def print_table(result: dict[str, Any]) -> None:
    """Print the figures as a table on stdout, and their conditions below it."""
    table = Table(title=f"{result['protocol']}: {result['num_images']} pictures, {result['num_texts']} captions")
    for column in ("", "R@1 %", "R@5 %", "R@10 %", "mean rank", "median rank"):
        table.add_column(column, justify="right" if column else "left")
    for way, name in (("i2t", "image to text"), ("t2i", "text to image")):
        figures = result[way]
        table.add_row(name, *(f"{figures[key]:.1f}" for key in ("r1", "r5", "r10", "mean_rank", "median_rank")))
    console = plain_console()
    console.print(table)
    notes = [
        "R@k: per cent of the queries with a right answer among the first k of all "
        f"{result['num_texts']} captions or {result['num_images']} pictures",
        f"{result['num_truncated']} captions cut at {result['context_length']} tokens",
    ]
    if "model" in result:
        notes.insert(0, f"{result['model']}, {result['precision']}")
    if text := result.get("retrieved_text"):
        notes.append(f"retrieved captions: BLEU-4 {text['bleu4']:.1f}, {text['distinct_captions']:.1f}% distinct")
    if result["num_unreadable"]:
        notes.append(
            f"{result['num_unreadable']} unreadable pictures were left out, the first: {result['unreadable'][0]}"
        )
    tied = max(result["i2t"]["tied"], result["t2i"]["tied"])
    if tied >= 1:
        notes.append(
            f"{tied:.0f}% of the queries tie with a wrong candidate, and the earlier one ranks first: "
            "captions or features repeat"
        )
    best_case = [
        f"{name} {', '.join(f'{value:.1f}' for value in result[way]['best_case'].values())}"
        for way, name in (("i2t", "image to text"), ("t2i", "text to image"))
        if any(f"{value:.1f}" != f"{result[way][key]:.1f}" for key, value in result[way]["best_case"].items())
    ]
    if best_case:
        notes.append(f"R@1, 5, 10 if every tie were won (do not report these): {'; '.join(best_case)}")
    for note in notes:
        console.print(note, soft_wrap=True)


def print_protocols() -> None:
    """Print each protocol on stdout: what it is, which files it needs and what it compares with."""
    console = plain_console()
    for protocol in PROTOCOLS.values():
        about = "about " if protocol.count_tolerance else ""
        counts = f"{about}{protocol.num_images} pictures, {protocol.num_captions} captions"
        shown = f" ({counts if protocol.num_images else 'any number'})"
        console.print(Text.assemble((protocol.name, "bold"), shown))
        for label, text in (
            ("What", protocol.about),
            ("Files", protocol.files),
            ("Caption", protocol.caption_rule),
            ("Matches", protocol.one_to_many),
            ("Compares", protocol.compare),
        ):
            console.print(Padding(Text(f"{label}: {text}"), (0, 0, 0, 2)))
        console.print()
    console.print(Text(TIES))


if __name__ == "__main__":
    run_command(main)
