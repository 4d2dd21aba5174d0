"""One part of the GPU check in a process of its own: set up, wait for a line on stdin, then write findings.

The line holds the seconds after which the process will be ended.

Usage: worker.py PART SETTING.json FINDINGS.jsonl
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path

PARTS = {  # module and function
    "losses": ("numerics", "losses_part"),
    "towers": ("numerics", "towers_part"),
    "precision": ("runs", "precision_part"),
    "resume": ("runs", "resume_part"),
    "nccl": ("runs", "nccl_part"),
    "waits": ("waits", "waits_part"),
    "kernels": ("kernels", "kernels_part"),
    "step": ("speed", "step_part"),
    "open-clip": ("against_open_clip", "open_clip_part"),
    "memory": ("speed", "memory_part"),
    "run": ("runs", "run_part"),
    "compiled": ("speed", "compiled_part"),
}
READY = "ready"


def main() -> None:
    """Run one part. Each finding is one line, written at once, so that a process that is killed has told what it
    knew."""
    part, setting_file, findings_file = sys.argv[1:]
    with Path(findings_file).open("a", encoding="utf-8") as file:

        def write(content: object) -> None:
            print(json.dumps(content), file=file, flush=True)

        from eval.base.processes import leave_out_cudnn_attention
        from eval.base.workers import end_with_parent
        from gpu_parts.findings import Finding, Setting

        end_with_parent(signal.SIGKILL)
        leave_out_cudnn_attention()  # as every command of ours
        try:
            setting = Setting(**json.loads(Path(setting_file).read_text()))
            module, function = PARTS[part]
            found = getattr(import_module(f"gpu_parts.{module}"), function)(setting)
            assert next(found) is None, "a part says that it is ready"
            write(READY)
            if not (seconds := sys.stdin.readline()):  # the check has ended
                return
            write(dataclasses.asdict(found.send(float(seconds))))
            for finding in found:
                write(dataclasses.asdict(finding))
        except Exception as error:
            traceback.print_exc()
            told = (str(error).strip().splitlines() or [""])[0]
            write(dataclasses.asdict(Finding("ends early", failed=True, note=f"{type(error).__name__}: {told}"[:300])))


if __name__ == "__main__":
    main()
