"""Benches of speed and memory against a named baseline: one module in benches/ per bench, one row per case."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Table

from benches.checkout import patched_open_clip
from eval.base.arguments import answer_early, read_options
from longclip_teacher.errors import InputError, run_command

BENCHES = {  # module of benches/ and function in it, imported when the bench is run
    "teacher-text": ("text", "bench_teacher_text"),
    "student-text": ("text", "bench_student_text"),
    "step": ("step", "bench_step"),
    "data": ("data", "bench_data"),
    "tokenize": ("text", "bench_tokenize"),
    "pca": ("losses", "bench_pca"),
    "loss": ("losses", "bench_loss"),
    "run": ("run", "bench_run"),
    "image": ("image", "bench_image"),
    "memory": ("memory", "bench_memory"),
    "recall": ("recall", "bench_recall"),
    "open-clip": ("open_clip_step", "bench_open_clip"),
    "mobileclip": ("mobileclip_step", "bench_mobileclip"),
    "start-up": ("start_up", "bench_start_up"),
    "scale": ("scale", "bench_scale"),
}


@dataclass
class Options:
    """Measure a part of this package against a named baseline on this machine.

    python scripts/bench.py tokenize                        # seconds
    python scripts/bench.py recall --full --json full.json  # 31,000 pictures x 155,000 captions: minutes, 2 GB
    python scripts/bench.py step --device cuda --precision bf16

    teacher-text  teacher's text pass, long to short captions, against padding them to 248 at the best batch
    student-text  student's text forward and backward, short captions, against padded to 248
    step          training step from stored teacher features, against the teacher online and everything padded
    data          JPEGs to an augmented batch on one core, against PIL and torchvision's v1 transforms
    tokenize      captions of 95 tokens, against open_clip's SimpleTokenizer
    pca           PCA branch forward and backward, against autograd through torch.linalg.svd
    loss          contrastive loss and KL, long and short, against full matrices: seconds, then memory
    run           training under torchrun from the teacher cache, against the same preset with every saving off
    image         student's image tower for inference, against its training form in eager mode
    memory        peak memory of a step of 8192 pairs in chunks, and what dominates it
    recall        ranks both ways, against a bare blockwise matmul of the same size that discards its results
    open-clip     step of MobileCLIP-S1 from ViT-B/16, against open_clip's own training code: samples/s, parts, memory
    mobileclip    step of MobileCLIP-S1 from stored features, against the published loop: samples/s, memory
    start-up      --help and a refused option of every command, against bare python and against importing torch
    scale         from the paths of up to 100,000 shards to the first sample, against manifests of version 1

    Each case runs in its own process, so its peak memory is its own. Times are medians of rounds that alternate between
    ours and the baseline; leave the machine idle meanwhile.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """The bench to run, from the list above."""
    full: bool = False
    """Use the sizes of the largest benchmark instead of the small ones."""
    rounds: int = 3
    """Rounds per case; the figures are their medians."""
    device: str = "cpu"
    """Device of the models: cpu, cuda or auto."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of the models, on both sides."""
    preset: str = "digit_scenes"
    """run: the preset that both sides train."""
    shards: str | None = None
    """run: shard pattern. Default: the embedded data (python training/main.py creates it)."""
    teacher: str | None = None
    """run: the teacher's weights. Default: the embedded teacher."""
    processes: int = 2
    """run: processes under torchrun."""
    checkout: Path | None = None
    """mobileclip: folder of MobileCLIP's training code, as its training/README.md makes it."""
    json: Path | None = None
    """Write the rows to this file as JSON."""

    def check(self) -> None:
        """Raise InputError for an unknown bench, fewer than one round, or no published loop to compare with."""
        if self.name not in BENCHES:
            raise InputError(f"no bench {self.name!r}: choose one of {', '.join(BENCHES)}")
        if self.rounds < 1:
            raise InputError(f"--rounds {self.rounds}: give 1 or more")
        if self.name == "mobileclip":
            patched_open_clip(self.checkout)


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

from benches.measure import BenchOptions, Row, machine
from eval.base.consoles import plain_console
from eval.base.processes import process_device
from longclip_teacher.atomic_files import write_json


def print_rows(name: str, rows: list[Row]) -> None:
    """Print the rows as a table on stdout."""
    table = Table(title=f"{name}: ratio above 1 means ours is better")
    for column in ("case", "unit", "ours", "baseline", "ratio", "largest difference", "peak GB"):
        table.add_column(column, justify="left" if column in ("case", "unit") else "right")
    for row in rows:
        difference = "" if row.max_abs_diff is None else f"{row.max_abs_diff:.1e}"
        peak = "" if row.peak_gb is None else f"{row.peak_gb:.2f}"
        figures = (f"{row.ours:.3g}", f"{row.baseline:.3g}", f"{row.ratio:.2f}", difference, peak)
        table.add_row(row.case, row.unit, *figures)
    plain_console().print(table)


def main() -> None:
    """Run the command."""
    options = read_options(Options)
    found = machine()  # before the bench adds its own load
    device = process_device(options.device)
    told = BenchOptions(
        full=options.full,
        rounds=options.rounds,
        device=device,
        precision=options.precision,
        preset=options.preset,
        shards=options.shards,
        teacher=options.teacher,
        processes=options.processes,
        checkout=options.checkout,
    )
    module, function = BENCHES[options.name]
    rows = []
    for row in getattr(import_module(f"benches.{module}"), function)(told):
        print(f"{row.case}: {row.ours:.3g} {row.unit}, ratio {row.ratio:.2f}", file=sys.stderr, flush=True)
        rows.append(row)
    if options.json is not None:
        write_json(options.json, {"bench": options.name, "machine": found, "rows": [asdict(row) for row in rows]})
    print_rows(options.name, rows)


if __name__ == "__main__":
    run_command(main)
