"""Every loss, every preset's mix and many mixes: two processes train like one, in one piece and in chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import loss_mixes
from longclip_teacher.errors import InputError
from loss_mixes import CASES, MIXES, TEACHER_WIDTH, Case, options_of, student_of, teacher_of
from ranks import run_ranks
from training.distill import tower_of
from training.distillation import Distillation, assemble
from training.settings.checks import check_config
from training.settings.tree import parse_config
from training.teachers import Teachers
from training.unreached import check_learns

Results = dict[str, dict[str, torch.Tensor]]
pytestmark = pytest.mark.xdist_group("loss_mixes")  # its runs take a minute: once is enough


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Results]:
    """What loss_mixes.py finds, by processes and chunks."""
    folder = tmp_path_factory.mktemp("mixes")
    found = {}
    for world_size, chunks in ((1, 1), (2, 1), (2, 2)):
        out = folder / f"{world_size}_{chunks}.pt"
        run_ranks([loss_mixes.__file__, str(out), str(chunks)], world_size)
        found[world_size, chunks] = torch.load(out, weights_only=True)
    return found


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_like_one(results: dict[tuple[int, int], Results], name: str, chunks: int) -> None:
    if chunks > 1 and CASES[name].has_layers:
        pytest.skip("layer losses need the whole batch at once")
    ours, reference = results[2, chunks][name], results[1, 1][name]
    assert ours.keys() == reference.keys()
    scale = max(float(value[0]) for key, value in reference.items() if key.endswith("grad"))
    for key, value in reference.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-9 * scale, msg=f"{name}: {key}")


def distillation_of(case: Case) -> Distillation:
    teachers = Teachers([teacher_of(0, TEACHER_WIDTH)])
    return assemble(student_of(case), teachers, options_of(case), stage=case.stage, frozen=case.frozen)


ONE_TOWER = ["--loss.clip_long", "0", "--loss.clip_short", "0", "--loss.vrd_long", "0", "--loss.vrd_short", "0"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--loss.fd_image", "1"],
            r"no loss reaches the text tower \(only fd_image\): set --run.stage image .*freeze_text",
        ),
        (
            ["--loss.fd_text", "1"],
            r"no loss reaches the image tower \(only fd_text\): set --run.stage text .*freeze_image",
        ),
        (["--loss.masked_fd", "1"], "no loss reaches the text tower"),
        (["--loss.hidden_text", "1"], "no loss reaches the image tower"),
        (["--loss.fd_text", "1", "--init.freeze_text", "True"], "no loss reaches the image tower"),
        (["--loss.crd_long", "0", "--loss.kd_long", "0"], "at least one must be positive"),
    ],
)
def test_a_tower_without_a_loss_is_refused(args: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        check_config(parse_config(["digit_scenes", *ONE_TOWER, *args]), 1)
    assert "\n" not in str(error.value)


def test_with_the_other_tower_frozen_or_left_out_it_trains() -> None:
    for args in (["--init.freeze_text", "True"], ["--run.stage", "image"]):
        check_config(parse_config(["digit_scenes", *ONE_TOWER, "--loss.fd_image", "1", *args]), 2)


def test_with_both_towers_frozen_the_map_to_the_teachers_width_learns_if_there_is_one() -> None:
    frozen = ["--init.freeze_image", "True", "--init.freeze_text", "True"]
    check_config(parse_config(["digit_scenes", *ONE_TOWER, "--loss.fd_image", "1", *frozen]), 1)
    case = Case({"fd_image": 1.0}, same_width=False, frozen=("image", "text"))
    check_learns(distillation_of(case).distiller)
    with pytest.raises(InputError, match="every tower is frozen and no loss learns anything"):
        check_learns(distillation_of(replace(case, same_width=True)).distiller)


def test_frozen_towers_leave_nothing_to_learn() -> None:
    frozen = ["--init.freeze_image", "True", "--init.freeze_text", "True"]
    with pytest.raises(InputError, match="every tower is frozen and no loss learns anything"):
        check_config(parse_config(["digit_scenes", *ONE_TOWER, "--loss.fd_image", "0", "--loss.afd_long", "0",
                                   "--loss.xrd_long", "0", "--loss.hidden_text", "1", *frozen]), 1)  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "stage", "head"),
    [
        ({"cos_image": 1.0}, "both", "class token"),
        ({"clip_long": 1.0, "fd_text": 1.0}, "both", "distillation token"),
        ({"kd_long": 1.0}, "both", "class token"),
        ({"cos_image": 1.0}, "image", "distillation token"),
        ({"deit_hard_long": 1.0}, "image", "class token"),
    ],
)
def test_a_distillation_token_needs_losses_for_both_heads(losses: dict[str, float], stage: str, head: str) -> None:
    case = Case(losses, stage=stage, image="token")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"head of the student's {head}.*--student.distillation_token False"):
        distillation_of(case)
    distillation_of(Case(losses, stage=stage, image="vit"))  # type: ignore[arg-type]
    distillation_of(Case(losses, stage=stage, image="token", frozen=("image",)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["hidden_text, last layer", "embedding_text, text", "attention_text, text"])
def test_what_layer_losses_cannot_reach_stays_as_it_starts(name: str) -> None:
    model = distillation_of(CASES[name]).distiller.model
    trained = {key for key, parameter in tower_of(model, "text").named_parameters() if parameter.requires_grad}
    frozen = {key for key, parameter in tower_of(model, "text").named_parameters() if not parameter.requires_grad}
    assert any("projection" in key for key in frozen) and any("embedding" in key for key in trained)
    both = distillation_of(MIXES["clip + hidden_text, widths"]).distiller.model
    assert all(parameter.requires_grad for parameter in both.text_encoder.parameters())
