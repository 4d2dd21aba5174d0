"""Does every part of this project run on a GPU, and how fast? One command, a bounded time, JSON and a table."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpu_parts.carried import collect, put_on_path

if __name__ == "__main__":
    put_on_path(sys.argv)  # what reads the options may be among the carried wheels

from eval.base.arguments import answer_early, read_options
from gpu_parts.worker import PARTS
from longclip_teacher.errors import InputError, run_command


@dataclass
class Options:
    """Check training on one GPU against the CPU, and measure it.

    python scripts/gpu_check.py --minutes 8 --out gpu_check
    python scripts/gpu_check.py --collect-wheels wheels     # before, on a machine with a network
    python scripts/gpu_check.py --wheels wheels             # on the machine with the GPU, which needs none

    losses     every loss, its gradient, and PCA against float64 on the CPU, TF32 off and on
    towers     features of teacher and student, packed captions, gradients: fp32, TF32, bf16
    precision  steps in fp32, bf16 and fp16 with GradScaler
    resume     a resumed run against one that was never stopped, bit for bit
    nccl       DDP in a group of one process
    waits      how often a step makes the host wait for the GPU
    kernels    where the time of a step goes: the towers, and the costliest kernels
    step       samples/s and share of the measured peak of matrix products; teachers online and stored
    open-clip  the same work in open_clip's own training code
    memory     peak memory by batch size
    run        training/main.py until a signal ends it
    compiled   the steps with torch.compile

    Each part runs in a process of its own and has its share of the time, which grows by what the parts before it leave.
    What a part finds is written at once. The exit code is 1 if a check fails. What could not be done is listed.
    """

    minutes: float = 8.0
    """Time for everything, from start to end."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu rehearses the check on a machine without a GPU."""
    small: bool = False
    """Use the smallest models and batches."""
    only: tuple[str, ...] = ()
    """The parts to run. Default: all."""
    shards: str | None = None
    """Training shards of the real run. Default: the embedded boards."""
    out: Path = Path("gpu_check")
    """Folder for check.json, table.md and log.txt."""
    wheels: Path | None = None
    """Folder of wheels to import packages from."""
    collect_wheels: Path | None = None
    """Download the wheels that a machine with torch, torchvision and timm lacks into this folder, and end."""
    python_version: str = "3.12"
    """Python of that machine."""

    def check(self) -> None:
        """Raise InputError for an unknown part, no time, or a folder of wheels that has none."""
        if unknown := [name for name in self.only if name not in PARTS]:
            raise InputError(f"--only {unknown[0]}: choose among {', '.join(PARTS)}")
        if not 0 < self.minutes <= 60:
            raise InputError(f"--minutes {self.minutes}: give more than 0 and at most 60")
        if self.wheels is not None and not any(self.wheels.glob("*.whl")):
            raise InputError(f"--wheels {self.wheels}: no wheels there; make the folder with --collect-wheels")


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

from gpu_parts.schedule import Check


def main() -> None:
    """Run the command."""
    options = read_options(Options)
    if options.collect_wheels is not None:
        if collect(options.collect_wheels, options.python_version):
            raise InputError(f"--collect-wheels {options.collect_wheels}: pip could not download them (see above)")
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the parts, and writes
    check = Check(options.out, options.minutes * 60)
    is_good = check.run(options.only or tuple(PARTS), options.device, small=options.small, shards=options.shards)
    if not is_good:
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
