"""Run the battery of faults: `make soak`, or `ROW=NAME make soak` for one row.

Each row runs with its defences, and a few trials with one of them switched off, which must fail. Finished rows are kept
in a file, so that an interrupted run goes on with the next row. The table is written to docs/reliability.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import Progress

from eval.base.environment import environment_record
from faults.rows import ROWS
from faults.trials import Row, outcomes, prepared
from longclip_teacher.atomic_files import write_text
from longclip_teacher.errors import InputError, run_command

__all__ = ["Result", "write_table"]

ROOT = Path(__file__).resolve().parents[2]
_START, _STOP = "<!-- table of faults: make soak -->", "<!-- end of the table -->"
_MOST_FAILURES = 20  # described in the file of results


@dataclass(frozen=True)
class Result:
    """What a row gave."""

    row: str
    seed: int
    trials: int
    failures: int
    trials_off: int
    failures_off: int
    """With the defence switched off."""
    seconds: float
    commit: str
    examples: list[str]
    """What went wrong in the first trials that failed."""
    examples_off: list[str]

    @property
    def is_sound(self) -> bool:
        """Whether nothing failed, and something does without the defence."""
        return not self.failures and self.failures_off > 0


def measured(row: Row, num_trials: int, seed: int, commit: str, material: Path, progress: Progress) -> Result:
    """Run a row with its defences and without one of them."""
    start = time.monotonic()
    failures: dict[bool, list[str]] = {True: [], False: []}
    task = progress.add_task(row.name, total=num_trials + row.num_off)
    for defended, number in ((True, num_trials), (False, row.num_off)):
        for outcome in outcomes(row, number, seed, material, defended=defended):
            if outcome is not None:
                failures[defended].append(outcome.replace(str(material.parent), ""))
                if defended:
                    progress.print(f"{row.name}: {outcome}", markup=False)
            progress.update(task, advance=1, refresh=True)
    return Result(
        row=row.name,
        seed=seed,
        trials=num_trials,
        failures=len(failures[True]),
        trials_off=row.num_off,
        failures_off=len(failures[False]),
        seconds=round(time.monotonic() - start, 1),
        commit=commit,
        examples=failures[True][:_MOST_FAILURES],
        examples_off=list(dict.fromkeys(failures[False]))[:_MOST_FAILURES],
    )


def read_results(path: Path) -> list[Result]:
    """The results of finished rows. Raises InputError for a file of another layout."""
    if not path.is_file():
        return []
    try:
        return [Result(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} holds no results of the battery ({error}): delete it") from None


def table_of(results: Sequence[Result], earlier: str = "") -> str:
    """The Markdown table: the newest result of each row, marked if it had fewer trials than planned.

    A row without a result keeps its line of the table `earlier`.
    """
    newest = {result.row: result for result in results}
    kept = {line.split("|")[1].strip(): line for line in earlier.splitlines() if line.startswith("| ")}
    heading = ("Row", "What is done, and what must hold", "Trials", "Failures", "Without its defence", "Run")
    lines = [_line(heading), _line(("---", "---", "---:", "---:", "---", "---"))]
    for row in ROWS:
        what = f"{row.what}. Found and mended: {row.found}" if row.found else row.what
        if (result := newest.get(row.name)) is None:
            lines.append(kept.get(row.name) or _line((row.name, what, f"0 of {row.full:,}", "not run", row.off, "")))
            continue
        trials = f"{result.trials:,}" + (f" of {row.full:,}" if result.trials < row.full else "")
        without = f"{row.off}: {result.failures_off} of {result.trials_off} fail"
        run = f"seed {result.seed}, {result.seconds:.0f} s, {result.commit[:8]}"
        lines.append(_line((row.name, what, trials, f"{result.failures:,}", without, run)))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_table(page: Path, results: Sequence[Result]) -> None:
    """Put the table of `results` into a page, between its marks. Raises InputError if it has none."""
    before, start, rest = page.read_text(encoding="utf-8").partition(_START)
    earlier, stop, after = rest.partition(_STOP)
    if not start or not stop:
        raise InputError(f"{page} has no lines {_START} and {_STOP}, between which the table belongs")
    write_text(page, f"{before}{start}\n\n{table_of(results, earlier)}\n\n{stop}{after}")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"rows to run, even if finished: {'; '.join(names)}")
    parser.add_argument("--few", action="store_true", help="as many trials as among the tests")
    parser.add_argument("--share", type=float, default=1.0, help="share of the full number of trials (1)")
    parser.add_argument("--seed", type=int, default=0, help="from which all random numbers are drawn (0)")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "runs" / "soak" / "results.jsonl",
        help="file of finished rows (%(default)s)",
    )
    parser.add_argument("--page", type=Path, help="page to write the table into; none by default")
    found = parser.parse_args(arguments)
    if unknown := [name for name in found.rows if name not in names]:
        raise InputError(f"no row {unknown[0]!r}; there are {', '.join(names)}")
    return found


def main() -> None:
    """Run the rows that are not finished, and write the table."""
    options = parsed(sys.argv[1:])
    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays shared with the forked processes
    record = environment_record()
    commit = (record["commit"] or "no checkout")[:8] + ("+" if record["uncommitted_changes"] else "")
    results = read_results(options.results)
    finished = {(result.row, result.seed, result.trials) for result in results}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    materials: dict[Callable[[Path], None], Path] = {}  # several rows may need the same
    progress = Progress(auto_refresh=False, disable=not sys.stderr.isatty())
    with progress, tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for row in ROWS:
            num_trials = row.few if options.few else max(1, round(options.share * row.full))
            wanted = row.name in options.rows if options.rows else (row.name, options.seed, num_trials) not in finished
            if not wanted:
                continue
            if row.prepare not in materials:
                materials[row.prepare] = Path(folder) / str(len(materials)) / "material"
                prepared(row, materials[row.prepare])
            result = measured(row, num_trials, options.seed, commit, materials[row.prepare], progress)
            results.append(result)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            progress.print(
                f"{row.name}: {result.failures} of {result.trials} failed, without the defence "
                f"{result.failures_off} of {result.trials_off}, {result.seconds:.0f} s",
                markup=False,
            )
    if options.page is not None:
        write_table(options.page, results)
    newest = {result.row: result for result in results}
    if unsound := [result.row for result in newest.values() if not result.is_sound]:
        raise InputError(f"rows with failures, or without any when undefended: {', '.join(unsound)}")


if __name__ == "__main__":
    run_command(main)
