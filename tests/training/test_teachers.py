"""Ensembles, a teacher of its own for short captions, towers alone and frozen, tokens that answer to the teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.base.processes import start
from longclip_teacher import LongCLIP, create_teacher
from longclip_teacher.config import TEACHERS
from longclip_teacher.errors import InputError
from longclip_teacher.text import EOT, SOT
from mobileclip_student import create_student, load_student, save_student
from training.build import build_distillation, build_student
from training.data.mixing import Mask, mix
from training.data.samples import Batch
from training.distill import masked
from training.distillation import Distillation, assemble
from training.features import Features
from training.losses import crd_loss
from training.losses.table import LOSSES
from training.pca import pca_project
from training.settings.checks import check_config
from training.settings.losses import LossOptions
from training.settings.options import MixOptions
from training.settings.tree import TrainConfig, parse_config
from training.step import backward_step
from training.teachers import Teachers, views_of

BATCH = 8
OTHER_HEAD = {"clip_long": "crd_long", "crd_long": "clip_long"}
OFF = {"clip_long": 0.0, "clip_short": 0.0, "crd_long": 0.0, "crd_short": 0.0}


def teacher_of(seed: int, **changes: int) -> LongCLIP:
    torch.manual_seed(seed)
    config = TEACHERS["tiny"]
    if "size" in changes:
        config = replace(config, image=replace(config.image, size=changes["size"]))
    if "embed_dim" in changes:
        config = replace(config, embed_dim=changes["embed_dim"])
    return create_teacher(config).double().eval().requires_grad_(False)


def batch_for(distillation: Distillation) -> Batch:
    """Random captions, and pictures in each of the views that the models ask for."""
    teachers = [] if distillation.teachers is None else distillation.teachers.models
    generator = torch.Generator().manual_seed(1)

    def captions(length: int) -> Tensor:
        tokens = torch.randint(1, SOT, (BATCH, length), generator=generator)
        tokens[:, 0], tokens[:, -1] = SOT, EOT
        return tokens

    first, *others = [
        torch.randint(0, 256, (BATCH, 3, view.image_size, view.image_size), generator=generator, dtype=torch.uint8)
        for view in views_of(distillation.distiller.model, teachers)
    ]
    return Batch(
        first,
        tuple(others),
        captions(20),
        captions(7),
        [str(i) for i in range(BATCH)],
        [(0, i) for i in range(BATCH)],
        {},
        sub_tokens=torch.stack([captions(5), captions(5)], dim=1),
    )


def distillation_by(teachers: Teachers | None, options: LossOptions, variant: str = "tiny") -> Distillation:
    torch.manual_seed(3)
    found = assemble(create_student(variant).double().eval(), teachers, options)
    found.distiller.double()
    return found


def step(found: Distillation, batch: Batch | None = None) -> dict[str, Tensor]:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = mix(batch or batch_for(found), MixOptions(), seed=0, step=0, mask=found.distiller.mask)
    return backward_step(
        found.distiller, batch, found.objective, found.teachers,
        precision="fp32", accumulation=1, scaler=scaler, key=(0, 0),
    )  # fmt: skip


def teacher_features(found: Distillation, batch: Batch) -> Features:
    assert found.teachers is not None
    return found.teachers.outputs(batch, found.objective.needs).features


class TestSeveralTeachers:
    everything = LossOptions(
        **{loss.option(part): 1.0 for loss in LOSSES if loss.family in ("pair", "across") and loss.name != "afd"
           for part in loss.parts},
        fd_image=1.0, cos_text=1.0, pca_rank=4,
    )  # fmt: skip

    def test_an_ensemble_of_one_teacher_twice_is_that_teacher(self) -> None:
        """In the losses that need no learned map to the width of their rows."""
        teacher = teacher_of(0)
        mapped = {
            loss.option(part): 0.0 for loss in LOSSES if loss.name in ("icl", "gd", "vrd", "xrd") for part in loss.parts
        }
        options = replace(self.everything, **mapped, fd_image=0, cos_text=0)
        one = step(distillation_by(Teachers([teacher]), options))
        two = step(distillation_by(Teachers([teacher, teacher]), options))
        assert set(one) == set(two) >= {"crd_long", "kd_short", "deit_hard_long"}
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-9, atol=0)

    def test_teachers_of_any_width_and_size_stand_side_by_side(self) -> None:
        first, second = teacher_of(0), teacher_of(1, size=64, embed_dim=80)
        distillation = distillation_by(Teachers([first, second]), self.everything)
        assert distillation.teachers is not None and distillation.teachers.info["long"].widths == (128, 80)
        assert [view.image_size for view in distillation.teachers.views] == [48, 48, 64]
        batch = batch_for(distillation)
        features = teacher_features(distillation, batch)
        assert features["image"].shape == (BATCH, 208)
        alone = teacher_features(
            distillation_by(Teachers([second]), self.everything),
            replace(batch, teacher_images=(batch.teacher_images[1],)),
        )
        torch.testing.assert_close(features["image"][:, 128:], alone["image"])
        torch.testing.assert_close(features["short"][:, 128:], alone["short"])
        losses = step(distillation, batch)
        assert all(value.isfinite() for value in losses.values())
        assert distillation.distiller.project["image"].weight.shape == (208, 96)

    def test_each_teacher_keeps_its_scale(self) -> None:
        first, second = teacher_of(0), teacher_of(1)
        second.logit_scale.add_(1.0)
        options = LossOptions(**{**OFF, "crd_long": 1.0})
        values = [step(distillation_by(Teachers(group), options))["crd_long"] for group in ([first], [second])]
        both = step(distillation_by(Teachers([first, second]), options))["crd_long"]
        torch.testing.assert_close(both, torch.stack(values).mean(), rtol=1e-9, atol=0)

    def test_short_captions_may_have_a_teacher_of_their_own(self) -> None:
        long, short = teacher_of(0), teacher_of(1, embed_dim=80)
        options = LossOptions(**{**OFF, "crd_long": 1.0, "crd_short": 1.0, "fd_text": 1.0}, pca_scope="off")
        found = step(distillation_by(Teachers([long], short), options))
        of_long, of_short = (step(distillation_by(Teachers([teacher]), options)) for teacher in (long, short))
        torch.testing.assert_close(found["crd_long"], of_long["crd_long"])
        torch.testing.assert_close(found["crd_short"], of_short["crd_short"])
        assert (of_long["crd_short"] - of_short["crd_short"]).abs() > 1e-3

    def test_its_pictures_are_not_reduced_by_pca(self) -> None:
        """It has not learnt to match short captions with PCA'd pictures."""
        long, short = teacher_of(0), teacher_of(1)
        options = LossOptions(**{**OFF, "crd_short": 1.0}, pca_rank=4)
        distillation = distillation_by(Teachers([long], short), options)
        batch = batch_for(distillation)
        found = step(distillation, batch)["crd_short"]
        theirs = teacher_features(distillation, batch)
        ours = distillation.distiller(batch.images, batch.long_tokens, batch.short_tokens).features
        scales = distillation.distiller.model.linear_logit_scale, short.linear_logit_scale
        reduced, whole = pca_project(ours["image"], 4), theirs["short_image"]
        expected = crd_loss(reduced, ours["short"], whole, theirs["short"], *scales)
        torch.testing.assert_close(found, expected.detach())
        both_reduced = crd_loss(reduced, ours["short"], pca_project(whole, 4), theirs["short"], *scales)
        assert (found - both_reduced).abs() > 1e-5, "the teacher's are not"


class TestDistillationToken:
    def test_the_class_token_answers_to_the_pairs_and_the_other_to_the_teacher(self) -> None:
        torch.manual_seed(0)
        config = parse_config(["deit_image"])
        student = build_student(config, teacher_width=128).double().eval()
        trunk = student.image_encoder.trunk
        for loss, own, other in (("clip_long", "cls_token", "dist_token"), ("crd_long", "dist_token", "cls_token")):
            options = LossOptions(**{**OFF, loss: 1.0, OTHER_HEAD[loss]: 1e-30})
            step(assemble(student, Teachers([teacher_of(0)]), options))
            grads = {name: getattr(trunk, name).grad for name in ("cls_token", "dist_token")}
            heads = {"cls_token": trunk.head.weight.grad, "dist_token": trunk.head_dist.weight.grad}
            assert grads[own].norm() > 0 and heads[own].norm() > 0
            assert heads[other].norm() < 1e-20 * heads[own].norm()
            student.zero_grad()


class TestShortCaptionsWithTheFullTarget:
    options = LossOptions(**{**OFF, "crd_short": 1.0, "fd_text": 1.0, "pca_scope": "off"})

    def test_the_teacher_answers_with_the_full_caption(self, monkeypatch: pytest.MonkeyPatch) -> None:
        teacher = teacher_of(0)
        usual = distillation_by(Teachers([teacher]), self.options)
        batch = batch_for(usual)
        own = teacher_features(usual, batch)
        full = distillation_by(Teachers([teacher], short_is_full=True), self.options)
        read: list[int] = []
        encode = teacher.encode_text
        monkeypatch.setattr(teacher, "encode_text", lambda tokens: read.append(tokens.shape[1]) or encode(tokens))
        found = teacher_features(full, batch)
        assert read == [20], "the short captions are not read"
        assert torch.equal(found["short"], own["long"]) and torch.equal(found["long"], own["long"])
        assert (own["short"] - own["long"]).norm() > 1e-3
        same = replace(batch, short_tokens=batch.long_tokens)  # full captions in both branches: no difference
        torch.testing.assert_close(step(full, same), step(usual, same))
        assert (step(full, batch)["crd_short"] - step(usual, batch)["crd_short"]).abs() > 1e-6

    def test_stored_features_do_the_same(self) -> None:
        teacher = teacher_of(0)
        batch = batch_for(distillation_by(Teachers([teacher]), self.options))
        rows = {
            "image": teacher.encode_image(batch.images.double()),
            "long": teacher.encode_text(batch.long_tokens),
            "short": teacher.encode_text(batch.short_tokens),
        }
        stored = Teachers([teacher], short_is_full=True)
        found = stored.outputs(replace(batch, teacher=rows), distillation_by(stored, self.options).objective.needs)
        torch.testing.assert_close(found.features["short"], torch.nn.functional.normalize(rows["long"], dim=1))


class TestMaskedPictures:
    @pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
    def test_that_share_of_the_squares_is_hidden(self, ratio: float) -> None:
        batch = replace(batch_for(distillation_by(None, LossOptions())), draws=[(2, i) for i in range(BATCH)])
        batch = mix(batch, MixOptions(), seed=1, step=0, mask=Mask(ratio, 8))
        assert batch.hidden is not None and any(value is batch.hidden for value in batch.inputs)
        hidden = masked(torch.ones(BATCH, 3, 48, 48), batch.hidden, 8) == 0
        assert hidden.double().mean() == ratio
        squares = hidden.unflatten(3, (6, 8)).unflatten(2, (6, 8))  # [B, 3, 6, 8, 6, 8]
        assert (squares.all(dim=5).all(dim=3) == squares.any(dim=5).any(dim=3)).all(), "whole squares"
        assert (hidden[:, :1] == hidden).all()
        assert ratio in (0.0, 1.0) or not torch.equal(hidden[0], hidden[1]), "each picture has its own"

    def test_the_teacher_sees_all_of_the_picture(self) -> None:
        teachers = Teachers([teacher_of(0)])
        masked, whole = (LossOptions(**OFF, **{name: 1.0}) for name in ("masked_fd", "fd_image"))
        nothing_hidden = step(distillation_by(teachers, replace(masked, mask_ratio=0.0)))["masked_fd"]
        torch.testing.assert_close(nothing_hidden, step(distillation_by(teachers, whole))["fd_image"])
        assert (step(distillation_by(teachers, masked))["masked_fd"] - nothing_hidden).abs() > 1e-6

    @pytest.mark.parametrize("others", [{}, {"fd_image": 1.0}])
    def test_running_statistics_are_those_of_whole_pictures(self, others: dict[str, float]) -> None:
        teachers = Teachers([teacher_of(0)])
        runs = [LossOptions(**{**OFF, "fd_image": 1.0}), LossOptions(**{**OFF, "masked_fd": 1.0, **others})]
        found = [distillation_by(teachers, options) for options in runs]
        distillers = [distillation.distiller for distillation in found]
        before = {name: value.clone() for name, value in distillers[0].named_buffers()}
        for distillation in found:
            distillation.distiller.train()
            step(distillation)
        whole, masked = ({name: value for name, value in d.named_buffers() if "running" in name} for d in distillers)
        assert any((whole[name] - before[name]).abs().max() > 1e-3 for name in whole)
        for name, value in whole.items():
            torch.testing.assert_close(masked[name], value, rtol=1e-9, atol=1e-12, msg=name)

    def test_a_vit_reads_no_whole_picture_for_it(self) -> None:
        """It has no running statistics, for which an MCi tower reads the pictures a second time."""
        student = build_student(parse_config(["deit_image"]), teacher_width=128).double().eval()
        seen: list[Tensor] = []
        student.image_encoder.trunk.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        step(assemble(student, Teachers([teacher_of(0)]), LossOptions(**{**OFF, "masked_fd": 1.0})))
        assert [bool((pictures == 0).all(dim=1).any()) for pictures in seen] == [True]


def built(checkout: Path, *args: str) -> tuple[TrainConfig, Distillation]:
    config = parse_config(list(args))
    check_config(config, 1)
    with start("cpu") as runtime:
        return config, build_distillation(config, runtime)


class TestOneTower:
    @pytest.fixture(autouse=True)
    def _at_checkout(self, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(checkout)

    @pytest.mark.parametrize("stage", ["image", "text"])
    def test_only_that_tower_is_kept_run_and_trained(self, checkout: Path, stage: str) -> None:
        _, distillation = built(checkout, f"two_stage_{stage}")
        assert distillation.teachers is not None
        (teacher,) = distillation.teachers.long
        distiller = distillation.distiller
        assert hasattr(teacher, "visual") == (stage == "image") and hasattr(teacher, "text") == (stage == "text")
        assert distiller.model.embed_dim == teacher.embed_dim and not distiller.project
        losses = step(distillation)
        assert set(losses) == {f"fd_{stage}", "loss"}
        trained = {name.split(".")[1] for name, value in distiller.named_parameters() if value.grad is not None}
        assert trained == {f"{stage}_encoder"}

    def test_class_prompts_stand_for_captions(self, checkout: Path) -> None:
        _, distillation = built(checkout, "deit_image")
        assert distillation.objective.prompts is not None and distillation.objective.prompts.shape == (10, 128)
        assert set(step(distillation)) == {"deit_hard_long", "masked_fd", "loss"}

    def test_two_towers_are_joined_in_the_teachers_space(self, checkout: Path, tmp_path: Path) -> None:
        torch.manual_seed(5)
        for name in ("image", "text"):
            config = parse_config([f"two_stage_{name}"])
            save_student(build_student(config, 128), tmp_path / f"{name}.safetensors")
        sources = [f"--init.{name}={tmp_path / name}.safetensors" for name in ("image", "text")]
        distiller = built(checkout, "two_stage", *sources)[1].distiller
        assert distiller.model.embed_dim == 128
        image, text = (load_student(tmp_path / f"{name}.safetensors") for name in ("image", "text"))
        ours = distiller.model.state_dict()
        for source, prefix in ((image, "image_encoder."), (text, "text_encoder.")):
            for name, value in source.state_dict().items():
                if name.startswith(prefix):
                    assert torch.equal(ours[name], value), name

    def test_a_frozen_tower_stays_bitwise(self, checkout: Path) -> None:
        _, distillation = built(
            checkout, "longclip_text_tower", "--init.freeze_image", "True", "--init.freeze_text", "False"
        )
        distiller = distillation.distiller.train()
        before = {name: value.clone() for name, value in distiller.model.image_encoder.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.1)
        text_before = distiller.model.text_encoder.projection.detach().clone()
        step(distillation)
        optimizer.step()
        for name, value in distiller.model.image_encoder.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert not torch.equal(text_before, distiller.model.text_encoder.projection)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--run.stage", "image"], "no pairs of pictures and captions: set --loss.clip_long 0"),
            (["--run.stage", "text", "--teacher.checkpoint", "None"], "learns from a teacher"),
            (["--data.images", "pictures"], "--data.images is read with --run.stage image"),
            (["--mix.mixup", "0.2"], "mixup and cutmix need --run.stage image"),
            (["--teacher.cache", "c", "--teacher.short", "t"], "holds one teacher's features"),
            (["--teacher.cache", "c", "--loss.hidden_text", "1"], "looks into one teacher that is run"),
            (["--loss.hidden_text", "1", "--run.accumulation", "2"], "needs the whole batch at once"),
            (["two_stage_image", "--teacher.short", "t"], "runs one teacher"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, args: list[str], message: str) -> None:
        with pytest.raises(InputError, match=message):
            check_config(parse_config(args), 1)

    def test_a_whole_student_brings_its_shape(self, checkout: Path, tmp_path: Path) -> None:
        file = str(tmp_path / "student.safetensors")
        save_student(create_student("tiny"), file)
        for same in ("None", "96"):
            _, distillation = built(checkout, "--student.init", file, "--student.embed_dim", same)
            assert distillation.distiller.model.embed_dim == 96
        with pytest.raises(InputError, match="has another embed_dim than 128"):
            built(checkout, "--student.init", file)
        with pytest.raises(InputError, match="brings both towers"):
            built(checkout, "--student.init", file, "--student.embed_dim", "None", "--init.image", file)

    def test_a_width_that_is_not_the_teachers_is_refused(self, checkout: Path) -> None:
        with pytest.raises(InputError, match="teacher's space of 128 channels"):
            built(checkout, "two_stage_image", "--student.embed_dim", "64")
