"""The training loop: evaluate -> checkpoint -> step -> log."""

from __future__ import annotations

import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from eval.base.peak_memory import peak_memory_gb
from eval.base.processes import Runtime, agreed, on_main
from eval.base.progress import Interrupted, told
from longclip_teacher.errors import reported_once
from longclip_teacher.process_failures import kill_children
from training.agreement import check_agreement, resume
from training.build import validation_teacher
from training.checkpointing import TrainState, save_checkpoint, save_weights
from training.data.loader import Batch, ShardLoader
from training.data.mixing import mix
from training.distill import Distiller
from training.distillation import Distillation
from training.ema import ModelEma
from training.optim import build_optimizer, learning_rate
from training.record.evaluate import validate
from training.record.run_log import RunLog
from training.resume import RunInputs
from training.settings.tree import TrainConfig
from training.step import backward_step
from training.stopping import Stopped, StopSignals
from training.update import BadSteps, Statistics, apply_update, read_values
from training.watchdog import Watchdog

__all__ = ["train"]

logger = logging.getLogger(__name__)
_STARVED_SHARE = 0.05  # of the time spent waiting for data, above which the run says so


def train(config: TrainConfig, runtime: Runtime, distillation: Distillation, loader: ShardLoader) -> TrainState:
    """Train the model of `distillation` as `config` says; returns the final state. Weights, log and checkpoints are in
    `run.out_dir`. After a signal that asks for the end it saves the state and raises Stopped."""
    run, out_dir, distiller = config.run, config.run.out_dir, distillation.distiller
    state = _initial_state(config, runtime, distiller, loader)
    steps_per_epoch, total_steps = loader.steps_per_epoch, state.inputs.total_steps
    with reported_once():
        check_agreement(config, state.inputs, steps_per_epoch)
        is_resumed = resume(config, state, runtime)
    if state.evaluated_step == state.step >= total_steps and _exists(out_dir / "best.safetensors"):
        logger.info("%s is finished: all %d steps are done (a larger --run.max_steps extends it)", out_dir, total_steps)
        return state
    module = _parallel(distiller, runtime)
    step = partial(backward_step, module, objective=distillation.objective, teachers=distillation.teachers)
    log = RunLog(config, runtime, step=state.step, total_steps=total_steps)
    how = "resuming" if is_resumed else "starting"
    log.say(f"{how} at step {state.step} of {total_steps}, {steps_per_epoch} steps an epoch -> {out_dir}")
    meter, statistics, feed = _Meter(run.global_batch_size, runtime.device), Statistics(distiller), _Feed(loader)

    watchdog = Watchdog(runtime, run.collective_timeout, is_compiled=config.speed.compile)
    with StopSignals() as stop, watchdog, closing(log):
        bad_steps = BadSteps(state, config, runtime)
        training = _Run(config, runtime, state, bad_steps, log, stop, watchdog)
        while True:
            done = state.step >= total_steps
            training.evaluate_and_save(done)
            watchdog.station("data", state.step)
            waiting = time.monotonic()
            found = None if done else stop.wait_for(lambda: feed.batch_of(state.step))
            watchdog.station("step", state.step)
            training.stop_or_save()
            if found is None:
                break
            meter.wait(time.monotonic() - waiting)
            batch = found.to(runtime.device)
            batch = mix(batch, config.mix, seed=run.seed, step=state.step, mask=distiller.mask)
            key = (run.seed, state.step, runtime.rank)

            rate = learning_rate(state.step, total_steps, config.optim)
            for group in state.optimizer.param_groups:
                group["lr"] = rate * group["lr_share"]
            statistics.remember()
            losses = step(batch, precision=run.precision, accumulation=run.accumulation, scaler=state.scaler, key=key)
            grad_norm, is_good = apply_update(state, config, losses["loss"], statistics)
            bad_steps.add(losses, grad_norm, is_good, batch)
            state.step += 1

            meter.add(batch)
            log.advance(state.step)
            if state.step % run.log_every == 0 or state.step == total_steps:
                bad_steps.count()
                values = read_values({**losses, "grad_norm": grad_norm, **distiller.linear_scales})
                log.scalars(state.step, values | {"lr": rate} | meter.read(state.step))
        if meter.starved_share > _STARVED_SHARE:
            log.say(
                f"{meter.starved_share:.0%} of the training time went into waiting for data: raise "
                "--data.num_workers, or store smaller pictures (make_shards.py --resize)"
            )
    return state


def _initial_state(config: TrainConfig, runtime: Runtime, distiller: Distiller, loader: ShardLoader) -> TrainState:
    return TrainState(
        distiller,
        build_optimizer(distiller, config.optim, fused=config.speed.savings.fused_adamw),
        torch.amp.GradScaler(runtime.device.type, enabled=config.run.precision == "fp16"),
        RunInputs.of_run(config, runtime.world_size, loader),
        None if config.optim.ema is None else ModelEma(distiller.model, config.optim.ema),
    )


def _exists(path: Path) -> bool:
    """Whether rank 0 has this file."""
    return bool(on_main(lambda: {"exists": torch.tensor(path.exists())})["exists"])


def _parallel(distiller: Distiller, runtime: Runtime) -> nn.Module:
    if runtime.world_size == 1:
        return distiller
    # the gradient of a depthwise convolution differs from its weight in the strides of dimensions of size 1 alone
    warnings.filterwarnings("ignore", message="Grad strides do not match")
    # BatchNorm normalises with each rank's own statistics in training; the running ones are rank 0's everywhere. With
    # device_ids, DDP would send the tokens to the device: they stay on the host
    return DistributedDataParallel(distiller, gradient_as_bucket_view=True)


@dataclass
class _Run:
    """A run that trains, for the parts of the loop that evaluate and save."""

    config: TrainConfig
    runtime: Runtime
    state: TrainState
    bad_steps: BadSteps
    log: RunLog
    stop: StopSignals
    watchdog: Watchdog
    saved: float = field(default_factory=time.monotonic)
    """When the last checkpoint was saved, by this process's clock."""

    @property
    def save_is_due(self) -> bool:
        """Whether the last checkpoint is older than run.save_minutes. Rank 0's clock counts."""
        minutes = self.config.run.save_minutes
        is_old = self.runtime.is_main and time.monotonic() - self.saved >= 60 * minutes > 0
        return is_old and 0 < self.state.step < self.state.inputs.total_steps

    def evaluate_and_save(self, done: bool) -> None:
        """Evaluate and write the checkpoints that are due at this step; at the last one both, whatever the
        intervals."""
        run, step = self.config.run, self.state.step
        if (run.eval_every and step % run.eval_every == 0 and step > 0) or done:
            self.watchdog.station("evaluation", step)
            with told(self.watchdog.progress), told(self.stop.interrupt):
                self._evaluate()
        if run.keep_every and step > 0 and step % run.keep_every == 0:
            self._save(f"step_{step}")
        if step > 0 and (step % run.save_every == 0 or done):
            self.save()

    def stop_or_save(self) -> None:
        """Stop if a signal has reached any process, and save if it is time: all processes at the same step."""
        number, is_due = self.stop.agreed(self.runtime, self.save_is_due)
        if number:
            self.save_and_stop(number)
        if is_due:
            self.save()
            self.watchdog.station("step", self.state.step)

    def save_and_stop(self, number: int) -> NoReturn:
        """Save at the request of signal `number`, and end the run."""
        step, total = self.state.step, self.state.inputs.total_steps
        name = signal.Signals(number).name
        if step == 0:
            self.log.say(f"{name}: stopped before the first step; there is nothing to save")
        else:
            self.save()
            self.log.say(
                f"{name}: stopped after step {step} of {total}, which is saved; the same command with "
                "--run.resume auto goes on"
            )
        kill_children()  # the loader would wait five seconds for each worker that is busy
        raise Stopped(128 + number)

    def _evaluate(self) -> None:
        """Validate on all processes together, and keep the weights and state of the best value so far, unless it is
        interrupted."""
        config, state = self.config, self.state
        self.bad_steps.count()
        with reported_once():
            teacher = agreed(lambda: validation_teacher(config, self.runtime.device))
            try:
                figures, encoded = validate(state.evaluated_model, config, teacher)
            except Interrupted:  # on all of them
                return
            state.evaluated_step, score = state.step, figures.get("score")
            is_best = state.best is None or score is None or score > state.best
            if is_best and score is not None:
                state.best = score

            def record() -> None:
                if figures:
                    self.log.scalars(state.step, figures, group="val")
                if encoded is not None:
                    self.log.examples(state.step, encoded)
                if is_best:
                    save_weights(config.run.out_dir / "best.safetensors", state.evaluated_model)
                    save_checkpoint(config.run.out_dir / "checkpoints" / "best.pt", state, config)

            self._on_main(record)

    def save(self) -> None:
        """Update the last checkpoint."""
        self._save("last")
        self.saved = time.monotonic()

    def _save(self, name: str) -> None:
        out_dir, state = self.config.run.out_dir, self.state

        def save() -> None:
            if name == "last":  # the checkpoint comes after all else of its step: once it is there, nothing is missing
                save_weights(out_dir / "last.safetensors", state.evaluated_model)
            save_checkpoint(out_dir / "checkpoints" / f"{name}.pt", state, self.config)

        self.bad_steps.count()  # the checkpoint holds their number
        with reported_once():
            self._on_main(save)

    def _on_main(self, write: Callable[[], None]) -> None:
        self.watchdog.station("save", self.state.step, waits=not self.runtime.is_main)
        on_main(write)


@dataclass
class _Feed:
    """The batches of a run, by step."""

    loader: ShardLoader
    _batches: Iterator[Batch] = field(default_factory=lambda: iter(()))

    def batch_of(self, step: int) -> Batch:
        """Return the batch of `step`, which must be the one after the last, or any at first."""
        if (batch := next(self._batches, None)) is None:
            self._batches = self.loader.batches(*divmod(step, self.loader.steps_per_epoch))
            batch = next(self._batches)
        return batch


@dataclass
class _Meter:
    """Throughput, the share of time spent waiting for data, and unreadable samples, since the last reading."""

    global_batch_size: int
    device: torch.device

    def __post_init__(self) -> None:
        self.waited, self.steps, self.skipped, self.since = 0.0, 0, 0, time.monotonic()
        self._total_waited, self._total_steps, self._started = 0.0, 0, 0.0

    def wait(self, seconds: float) -> None:
        self.waited += seconds
        if self._total_steps == 0:
            self._started = time.monotonic()  # the first batch comes after the workers' start: it tells nothing
        else:
            self._total_waited += seconds

    def add(self, batch: Batch) -> None:
        self.steps += 1
        self._total_steps += 1
        self.skipped += sum(batch.skipped.values())

    @property
    def starved_share(self) -> float:
        """Share of the time since the first batch that went into waiting for data."""
        return self._total_waited / max(time.monotonic() - self._started, 1e-9) if self._total_steps > 1 else 0.0

    def read(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        seconds = max(now - self.since, 1e-9)
        values = {
            "samples_seen": float(step * self.global_batch_size),
            "samples_per_second": self.steps * self.global_batch_size / seconds,
            "data_wait_share": self.waited / seconds,
            "skipped_samples": float(self.skipped),
            "peak_memory_gb": peak_memory_gb(self.device),
        }
        self.waited, self.steps, self.since = 0.0, 0, now
        return values
