"""A step whose loss or gradient is not finite changes nothing on any process, and is counted.

Run as a program (OUT, under torchrun's environment variables) it is one of two processes, of which the second has the
fault.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from eval.base.processes import Runtime, start
from longclip_teacher.errors import InputError
from loss_mixes import Case, batch_of, options_of, student_of, teacher_of
from ranks import run_ranks
from training.checkpointing import TrainState, save_checkpoint
from training.data.samples import Batch
from training.distillation import Distillation, assemble
from training.ema import ModelEma
from training.optim import build_optimizer
from training.resume import RunInputs
from training.settings.tree import TrainConfig, parse_config
from training.step import backward_step
from training.teachers import Teachers
from training.update import Statistics, apply_update, count_bad_step

CASE = Case({"clip_long": 1.0, "clip_short": 0.5, "vrd_long": 1.0, "fd_image": 1.0}, same_width=False)
CONFIG = parse_config(["--optim.ema", "0.9", "--run.out_dir", "never_written"])
Fault = Callable[[Distillation, Batch], Batch]


def gradient(value: float) -> Fault:
    def inject(found: Distillation, batch: Batch) -> Batch:
        parameter = found.distiller.model.text_encoder.token_embedding.weight
        handle = parameter.register_hook(
            lambda grad: (handle.remove(), grad.index_fill(0, torch.tensor([3]), value))[1]
        )
        return batch

    return inject


def teacher_row(value: float) -> Fault:
    def inject(found: Distillation, batch: Batch) -> Batch:
        assert batch.teacher is not None
        image = batch.teacher["image"].clone()
        image[0, 0] = value
        return replace(batch, teacher={**batch.teacher, "image": image})

    return inject


def picture(value: float) -> Fault:
    """One picture's features are not finite in the middle of the forward pass, so BatchNorm's statistics are not."""

    def inject(found: Distillation, batch: Batch) -> Batch:
        stem = found.distiller.model.image_encoder.trunk.stem[0]
        handle = stem.register_forward_pre_hook(
            lambda _, args: (handle.remove(), args[0].index_fill(0, torch.tensor([1]), value))[1:]
        )
        return batch

    return inject


FAULTS = {
    f"{kind.__name__} {value}": kind(value)
    for kind in (gradient, teacher_row, picture)
    for value in (float("nan"), float("inf"))
}


class Run:
    """A small training run with stored teacher features, in training mode."""

    def __init__(self, runtime: Runtime, *, fused: bool = True, precision: str = "fp32") -> None:
        self.runtime, self.precision = runtime, precision
        teachers = Teachers([teacher_of(0, 24)])
        torch.manual_seed(2)
        student = student_of(CASE).float()
        self.batch = batch_of(runtime)
        online = assemble(student, teachers, options_of(CASE))
        rows = teachers.outputs(self.batch, online.objective.needs).features.tensors()
        self.batch = replace(self.batch, teacher={name: value.float() for name, value in rows.items()})
        stored = Teachers(stored=teachers.info["long"])
        self.found = assemble(student, stored, options_of(CASE))
        self.distiller = self.found.distiller.train()
        self.module = DistributedDataParallel(self.distiller) if runtime.world_size > 1 else self.distiller
        self.state = TrainState(
            self.distiller,
            build_optimizer(self.distiller, CONFIG.optim, fused=fused),
            torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=2.0**10),
            RunInputs(10, runtime.world_size, None, {}, {}),
            ModelEma(student, 0.9),
        )
        self.statistics = Statistics(self.distiller)

    def step(self, fault: Fault | None = None) -> tuple[dict[str, Tensor], Tensor, bool]:
        self.statistics.remember()
        batch = self.batch if fault is None else fault(self.found, self.batch)
        losses = backward_step(
            self.module, batch, self.found.objective, self.found.teachers,
            precision=self.precision, accumulation=1, scaler=self.state.scaler, key=(0, self.state.step),
        )  # fmt: skip
        norm, is_good = apply_update(self.state, CONFIG, losses["loss"], self.statistics)
        self.state.step += 1
        return losses, norm, is_good

    def contents(self) -> dict[str, Tensor]:
        """Everything that a step may change."""
        assert self.state.ema is not None
        found = {f"model {name}": value for name, value in self.distiller.state_dict().items()}
        found |= {f"ema {name}": value for name, value in self.state.ema.model.state_dict().items()}
        for number, moments in self.state.optimizer.state_dict()["state"].items():
            found |= {f"moment {number} {name}": value for name, value in moments.items()}
        return {name: value.clone() for name, value in found.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name, value in before.items() if not torch.equal(value, after[name])]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_step_changes_nothing(name: str, fused: bool) -> None:
    with start("cpu") as runtime:
        run = Run(runtime, fused=fused)
        assert run.step()[2]
        before = run.contents()
        losses, norm, is_good = run.step(FAULTS[name])
        assert not is_good
        assert losses["loss"].isfinite() == name.startswith("gradient") or not norm.isfinite()
        assert changed(before, run.contents()) == []
        assert run.step()[2], "a good step follows"
        assert len(changed(before, run.contents())) > 100


def test_a_finite_loss_with_an_infinite_gradient_is_the_scalers_affair() -> None:
    with start("cpu") as runtime:
        run = Run(runtime, precision="fp16")
        assert run.step()[2]
        before, scale = run.contents(), run.state.scaler.get_scale()
        _, _, is_good = run.step(FAULTS["gradient inf"])
        assert is_good, "it is not counted"
        assert run.state.scaler.get_scale() < scale
        assert all("running" in name or "num_batches" in name for name in changed(before, run.contents()))
        before = run.contents()
        assert not run.step(FAULTS["teacher_row nan"])[2]
        assert changed(before, run.contents()) == []


def config_of(tmp_path: Path, *args: str) -> TrainConfig:
    return parse_config(["--run.out_dir", str(tmp_path), *args])


def test_bad_steps_are_counted_and_the_samples_named(tmp_path: Path) -> None:
    with start("cpu") as runtime:
        run = Run(runtime)
        losses, norm, _ = run.step(FAULTS["gradient nan"])
        count_bad_step(losses, norm, run.batch, run.state, config_of(tmp_path, "--optim.max_bad_steps", "1"), runtime)
        assert run.state.bad_steps == 1
        with pytest.raises(InputError, match=r"\(grad_norm nan\).*Samples 0 \.\. 7, all 8 in .*max_bad_steps") as error:
            count_bad_step(losses, norm, run.batch, run.state, config_of(tmp_path), runtime)
        assert "\n" not in str(error.value)
    report = json.loads((tmp_path / "nonfinite_rank0.json").read_text())
    assert report["keys"] == [str(number) for number in range(8)] and report["losses"]["grad_norm"] == "nan"


@pytest.mark.parametrize("part", ["model", "moment", "average"])
def test_nothing_that_is_not_finite_is_saved(part: str, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with start("cpu") as runtime:
        run = Run(runtime)
        run.step()
        save_checkpoint(path, run.state, CONFIG)
        kept = path.read_bytes()
        assert run.state.ema is not None
        tensors = {
            "model": next(run.distiller.parameters()).data,
            "moment": next(iter(run.state.optimizer.state.values()))["exp_avg"],
            "average": run.state.ema.model.logit_scale.data,
        }
        tensors[part].view(-1)[0] = float("inf")
        with pytest.raises(InputError, match="is left as it was"):
            save_checkpoint(path, run.state, CONFIG)
    assert path.read_bytes() == kept
    assert {found.name for found in tmp_path.iterdir()} == {"last.pt", "sha256.json"}


def main() -> None:
    with start("cpu") as runtime:
        found = {}
        for name, fault in FAULTS.items():
            run = Run(runtime)
            run.step()
            before = run.contents()
            _, _, is_good = run.step(fault if runtime.rank == 1 else None)
            found[name] = (not is_good) and not changed(before, run.contents()) and run.step()[2]
        torch.save(found, f"{sys.argv[1]}.{runtime.rank}")


def test_a_fault_of_one_process_is_seen_by_both(tmp_path: Path) -> None:
    run_ranks([__file__, str(tmp_path / "out")], 2)
    for rank in range(2):
        assert torch.load(tmp_path / f"out.{rank}", weights_only=True) == dict.fromkeys(FAULTS, True)


if __name__ == "__main__":
    main()
