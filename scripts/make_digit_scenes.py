"""Write the embedded data set: handwritten digits on coloured boards with long captions."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from eval.base.arguments import answer_early, read_options
from longclip_teacher.errors import InputError, run_command


@dataclass
class Arguments:
    """Write digit scenes: boards of real handwritten digits with captions of about 100 tokens; no download.

    OUT/train, OUT/val: shards for training. OUT/random, OUT/twins: test pairs as Urban-1k folders; the captions of a
    twin family share their first 77 tokens. OUT/val_twins: twins for choosing settings. OUT/digits: single digits as an
    ImageFolder, for zero-shot classification. A finished folder is left unchanged.
    """

    out: Path = Path("data/digit_scenes")
    """Folder to write. It appears only once it is complete."""
    num_train: int = 16000
    """Training boards."""
    num_val: int = 1000
    """Validation boards, as shards."""
    num_test: int = 1000
    """Pairs in each test set: random, twins and single digits."""
    num_val_twins: int = 500
    """Pairs in the twin set used to choose settings."""
    seed: int = 0
    """Seed of the boards. Held-out digits and layouts do not depend on it."""

    def check(self) -> None:
        """Raise InputError for invalid options."""
        if self.seed < 0:
            raise InputError("--seed must be 0 or more")


if __name__ == "__main__":
    answer_early(Arguments)  # --help and refused options end here: the imports below take seconds

from training.data.digit_scenes import write_digit_scenes


def main() -> None:
    """Parse the command line and write."""
    args = read_options(Arguments)
    start = time.perf_counter()
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
        + (f"written in {time.perf_counter() - start:.0f} s" if written else "already there, left unchanged")
    )


if __name__ == "__main__":
    run_command(main)
