"""Write the embedded data set: handwritten digits on coloured boards with long captions."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from longclip_teacher.errors import InputError, run_command
from training.data.digit_scenes import write_digit_scenes


@dataclass
class Arguments:
    """Write digit scenes: boards of real handwritten digits with captions of about 100 tokens; no download.

    OUT/train, OUT/val: shards for training. OUT/random, OUT/twins: test pairs as Urban-1k folders; the captions of a
    twin family share their first 77 tokens. OUT/val_twins: the same for choosing settings. OUT/digits: single digits as
    an ImageFolder, for zero-shot classification. A folder that is finished is left as it is.
    """

    out: Path = Path("data/digit_scenes")
    """Folder to write; it appears only when whole."""
    num_train: int = 16000
    """Training boards."""
    num_val: int = 1000
    """Validation boards, as shards."""
    num_test: int = 1000
    """Pairs in each test: random, twins, and single digits."""
    num_val_twins: int = 500
    """Pairs in the twin set for choosing settings."""
    seed: int = 0
    """Draws other boards; held-out digits and layouts stay the same."""


def main() -> None:
    """Parse the command line and write."""
    args = tyro.cli(Arguments)
    start = time.perf_counter()
    if args.seed < 0:
        raise InputError("--seed must be 0 or more")
    written = write_digit_scenes(
        args.out,
        num_train=args.num_train,
        num_val=args.num_val,
        num_test=args.num_test,
        num_val_twins=args.num_val_twins,
        seed=args.seed,
        show_progress=sys.stderr.isatty(),
    )
    print(
        f"{args.out}: "
        + (f"written in {time.perf_counter() - start:.0f} s" if written else "already there, left as it is")
    )


if __name__ == "__main__":
    run_command(main)
