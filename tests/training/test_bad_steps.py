"""A step whose loss or gradient is not finite changes nothing on any process, and is counted.

Run as a program (OUT, under torchrun's environment variables) it is one of two processes, of which the second has the
fault.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bad_steps import CONFIG, FAULTS, Run, changed
from eval.base.processes import start
from longclip_teacher.errors import InputError
from mobileclip_student import create_student
from ranks import run_ranks
from training.checkpointing import load_checkpoint, save_checkpoint
from training.settings.tree import TrainConfig, parse_config
from training.update import BadSteps, Statistics


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


def test_every_buffer_is_put_back() -> None:
    """BatchNorm over tokens included, which is not torch's class."""
    model = create_student("tiny", context_length=20)
    statistics, buffers = Statistics(model), dict(model.named_buffers())
    assert {name.partition(".")[0] for name in buffers} == {"image_encoder", "text_encoder"}
    before = {name: value.clone() for name, value in buffers.items()}
    statistics.remember()
    for value in buffers.values():
        value += 1 if value.dtype == torch.int64 else torch.nan
    statistics.restore_unless(torch.tensor(True))
    assert len(changed(before, buffers)) == len(buffers)
    statistics.restore_unless(torch.tensor(False))
    assert changed(before, buffers) == []


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


def test_a_scale_above_the_cap_has_a_gradient_and_comes_back() -> None:
    cap = torch.tensor(math.log(100))
    with start("cpu") as runtime:
        run = Run(runtime)
        scale = run.distiller.log_scales["vrd"]
        for value, comes_to in ((math.log(150), cap), (-1.0, torch.tensor(0.0))):
            scale.data.fill_(value)
            assert not run.step(FAULTS["gradient nan"])[2]
            assert scale.item() == torch.tensor(value), "a bad step changes nothing"
            gradients: list[Tensor] = []
            handle = scale.register_hook(gradients.append)
            assert run.step()[2]
            handle.remove()
            assert gradients[0].abs() > 1e-6
            assert torch.equal(scale.data, comes_to)
        scale.data.copy_(cap)
        run.state.optimizer.state[scale]["exp_avg"].fill_(1.0)  # momentum that moves it down
        assert run.step()[2]
        assert run.distiller.linear_scales["logit_scale_vrd"] < 100


def test_scales_above_the_cap_are_resumed_at_the_cap(tmp_path: Path) -> None:
    with start("cpu") as runtime:
        run = Run(runtime)
        run.step()
        saved = run.contents()
        save_checkpoint(tmp_path / "last.pt", run.state, CONFIG)
        run.step()
        load_checkpoint(tmp_path / "last.pt", run.state, CONFIG)
        assert changed(saved, run.contents()) == []
        run.distiller.log_scales["vrd"].data.fill_(9.0)  # as in checkpoints of versions that clamped in the loss
        save_checkpoint(tmp_path / "last.pt", run.state, CONFIG)
        load_checkpoint(tmp_path / "last.pt", run.state, CONFIG)
        assert changed(saved, run.contents()) == ["model log_scales.vrd"]
        assert run.distiller.linear_scales["logit_scale_vrd"].item() == pytest.approx(100)


def test_a_checkpoint_of_other_groups_is_refused_in_one_line(tmp_path: Path) -> None:
    """As of a version in which layer scales decayed."""
    with start("cpu") as runtime:
        run = Run(runtime)
        run.step()
        decayed, plain = run.state.optimizer.param_groups
        decayed["params"].append(plain["params"].pop())
        save_checkpoint(tmp_path / "last.pt", run.state, CONFIG)
        plain["params"].append(decayed["params"].pop())
        with pytest.raises(InputError, match=r"other parameters decayed: .* --student\.init") as error:
            load_checkpoint(tmp_path / "last.pt", run.state, CONFIG)
        assert "\n" not in str(error.value)


def config_of(tmp_path: Path, *args: str) -> TrainConfig:
    return parse_config(["--run.out_dir", str(tmp_path), *args])


def test_bad_steps_are_counted_and_the_samples_named(tmp_path: Path) -> None:
    with start("cpu") as runtime:
        run = Run(runtime)
        taken = BadSteps(run.state, config_of(tmp_path, "--optim.max_bad_steps", "1"), runtime)
        for fault in (None, FAULTS["gradient nan"], None):
            taken.add(*run.step(fault), run.batch)
        assert run.state.bad_steps == 0, "nobody has looked"
        taken.count()
        assert run.state.bad_steps == 1
        taken.count()
        assert run.state.bad_steps == 1, "a step is counted once"
        taken.add(*run.step(FAULTS["gradient nan"]), run.batch)
        taken.add(*run.step(), run.batch)
        pattern = r"^step 4 is not .*\(grad_norm nan\).*Samples 0 \.\. 7, all 8 in .*max_bad_steps"
        with pytest.raises(InputError, match=pattern) as error:
            taken.count()
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
        run.distiller.log_scales["vrd"].data.fill_(9.0)
        run.step()
        found |= {name: value.detach().item() for name, value in run.distiller.linear_scales.items()}
        torch.save(found, f"{sys.argv[1]}.{runtime.rank}")


def test_a_fault_of_one_process_is_seen_by_both(tmp_path: Path) -> None:
    run_ranks([__file__, str(tmp_path / "out")], 2)
    ranks = [torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in range(2)]
    assert ranks[0] == ranks[1]
    scales = {name: ranks[0].pop(name) for name in ("logit_scale", "logit_scale_vrd")}
    assert ranks[0] == dict.fromkeys(FAULTS, True)
    assert scales["logit_scale_vrd"] == pytest.approx(100)


if __name__ == "__main__":
    main()
