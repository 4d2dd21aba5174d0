"""Train: `[torchrun --nproc_per_node=N] training/main.py [PRESET] [--section.field VALUE ...]`; see --help."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack

from longclip_teacher.errors import reported_once, run_command
from training.settings.own_data import run_config


def main() -> None:
    """Parse, set up, build, train, report."""
    with reported_once():
        config, notes = run_config(sys.argv[1:])
    # --help and refused options end above: these imports take seconds
    from eval.base.freed_memory import keep_freed_memory
    from eval.base.processes import agreed, job_lock, start
    from eval.base.progress import told
    from training.build import build_distillation, build_training_loader
    from training.embedded import prepare_embedded
    from training.loop import train
    from training.record.evaluate import check_sets
    from training.record.run_report import judge_run, report_run
    from training.settings.checks import check_config
    from training.watchdog import Watchdog

    if config.speed.savings.keep_memory:
        keep_freed_memory()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    with ExitStack() as held:
        with start(config.run.device, config.run.tf32) as runtime:
            logging.getLogger().setLevel(logging.INFO if runtime.is_main else logging.WARNING)
            for note in notes:
                logging.getLogger(__name__).info(note)
            with reported_once():
                check_config(config, runtime.world_size)
                held.enter_context(job_lock(config.run.out_dir))
                prepare_embedded(config, runtime)
                agreed(lambda: check_sets(config))  # nodes may have other disks
                distillation = agreed(lambda: build_distillation(config, runtime))
                loader = agreed(lambda: build_training_loader(config, runtime, distillation))
            state = train(config, runtime, distillation, loader)
            with Watchdog(runtime, config.run.collective_timeout) as watchdog, told(watchdog.progress):
                watchdog.station("evaluation", state.step)
                with reported_once():
                    judged = judge_run(config, runtime, distillation.teacher)
        if runtime.is_main and judged is not None:  # the others need not wait for the page
            report_run(config, runtime, judged)


if __name__ == "__main__":
    run_command(main)
