"""Measurements of speed and memory against a plain reference: one function a bench, one row a case.

    python scripts/bench.py recall --json recall.json

Shapes: N pictures, M captions, D embedding width.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table

from eval.atomic_files import write_json
from eval.recall import retrieval_ranks
from longclip_teacher.errors import InputError, run_command

RECALL_CASES = ((1000, 5000), (5000, 25000))
RECALL_FULL_CASES = ((31000, 155000),)  # all of Flickr30k, the largest protocol
RECALL_WIDTH = 512
_BLOCK_IMAGES, _BLOCK_TEXTS = 1024, 2048  # of the bare matmul


@dataclass
class Row:
    """One case: ours against the baseline, medians of interleaved rounds."""

    case: str
    unit: str
    ours: float
    baseline: float
    ratio: float
    """Above 1 where ours is better."""
    max_abs_diff: float | None
    """Largest difference of the two results, where they compute the same."""
    peak_gb: float
    """Largest resident memory of the case's process, GB of 1e9 bytes; it includes the libraries and the inputs."""


@dataclass
class Options:
    """Measure a part of this package against a plain reference on this machine.

    python scripts/bench.py recall                          # a few seconds
    python scripts/bench.py recall --full --json full.json  # 31,000 pictures x 155,000 captions: minutes, 2 GB

    recall: ranks both ways (eval/recall.py) against a bare matmul of the same size in blocks whose results are thrown
    away, on random unit vectors of width 512. Each case runs in a process of its own, so that its peak memory is its
    own. The times are medians of rounds that alternate between the two; leave the machine alone meanwhile.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """What to measure: recall."""
    full: bool = False
    """The sizes of the largest benchmark, not the small ones."""
    rounds: int = 3
    """Rounds of each case; the figures are their medians."""
    json: Path | None = None
    """Write the rows here, as JSON."""


def bench_recall(options: Options) -> Iterator[Row]:
    """Ranks both ways against a bare matmul."""
    for num_images, num_texts in RECALL_FULL_CASES if options.full else RECALL_CASES:
        yield in_own_process(recall_case, num_images, num_texts, options.rounds)


def recall_case(num_images: int, num_texts: int, rounds: int) -> Row:
    """One size: random unit vectors, `num_texts / num_images` captions a picture."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(num_images, RECALL_WIDTH, generator=generator), dim=-1)
    texts = F.normalize(torch.randn(num_texts, RECALL_WIDTH, generator=generator), dim=-1)
    owner = torch.arange(num_texts) % num_images

    def bare_matmul() -> None:
        block = torch.empty(_BLOCK_IMAGES, _BLOCK_TEXTS)
        for rows in images.split(_BLOCK_IMAGES):
            for columns in texts.split(_BLOCK_TEXTS):
                torch.mm(rows, columns.T, out=block[: len(rows), : len(columns)])

    ours, baseline = medians([lambda: retrieval_ranks(images, texts, owner), bare_matmul], rounds)
    return Row(
        case=f"{num_images} x {num_texts}, D={RECALL_WIDTH}",
        unit="s",
        ours=ours,
        baseline=baseline,
        ratio=baseline / ours,
        max_abs_diff=None,  # the matmul's results are thrown away; the tests compare ranks
        peak_gb=peak_memory_gb(),
    )


BENCHES: dict[str, Callable[[Options], Iterator[Row]]] = {"recall": bench_recall}


def medians(functions: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each function; they take turns, so that a slow minute of the machine meets them all."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, taken in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def in_own_process(function: Callable[..., Row], *args: Any) -> Row:
    """function(*args) in a fresh process: peak memory is a process's, and never falls."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in 1e9 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # bytes on macOS, kilobytes on Linux


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "cpu": cpu_name(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_rows(name: str, rows: list[Row]) -> None:
    """The rows as a table on stdout."""
    table = Table(title=f"{name}: ratio above 1 means ours is better")
    for column in ("case", "unit", "ours", "baseline", "ratio", "peak GB"):
        table.add_column(column, justify="left" if column in ("case", "unit") else "right")
    for row in rows:
        figures = (f"{row.ours:.3g}", f"{row.baseline:.3g}", f"{row.ratio:.2f}", f"{row.peak_gb:.2f}")
        table.add_row(row.case, row.unit, *figures)
    Console().print(table)


def main() -> None:
    """The command."""
    options = tyro.cli(Options, description=Options.__doc__)
    if options.name not in BENCHES:
        raise InputError(f"no bench {options.name!r}: it is one of {', '.join(BENCHES)}")
    if options.rounds < 1:
        raise InputError(f"--rounds {options.rounds}: 1 or more")
    found = machine()  # before the bench adds its own load
    rows = list(BENCHES[options.name](options))
    print_rows(options.name, rows)
    if options.json is not None:
        write_json(options.json, {"bench": options.name, "machine": found, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    run_command(main)
