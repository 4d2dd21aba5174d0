"""Two optimiser steps of every loss and of many mixes, as a program: run alone or as one of several ranks.

Usage: loss_mixes.py OUT ACCUMULATION (torchrun's environment variables give rank and world size). The models are small,
in float64 and in eval mode, so that processes can be compared. Rank 0 writes to OUT, for each case, the losses of both
steps and two numbers that each gradient of the second step has in common with no other.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from eval.base.processes import Runtime, start
from longclip_teacher import LongCLIP, create_teacher
from longclip_teacher.config import TEACHERS
from mobileclip_student import MobileCLIP, create_student
from mobileclip_student.model import override, variant_config
from training.data.mixing import mix
from training.data.samples import Batch
from training.data.store import TeacherInfo
from training.distillation import assemble
from training.losses.table import LOSSES, Loss, Part, Stage
from training.settings.losses import LossOptions
from training.settings.needs import Tower
from training.settings.options import MixOptions
from training.settings.tree import PRESETS, config_from_toml
from training.step import backward_step
from training.teachers import Teachers

BATCH, VOCABULARY, TEACHER_WIDTH, OTHER_WIDTH = 8, 96, 24, 20


@dataclass(frozen=True)
class Case:
    """One run: what it learns from, and how it is set up."""

    losses: dict[str, float]
    same_width: bool = True
    stage: Stage = "both"
    frozen: tuple[Tower, ...] = ()
    image: str = "fastvit"  # or vit, or token: a ViT with a distillation token
    short_teacher: bool = False
    stored: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def has_layers(self) -> bool:
        return any(loss.option(part) in self.losses for loss in LOSSES if loss.family == "layer" for part in loss.parts)


def _alone(loss: Loss, part: Part) -> dict[str, Case]:
    """One loss as the only one: with both widths, and where it reads one tower, the other frozen or not there."""
    name = loss.option(part)
    image = "vit" if loss.family == "layer" and part == "image" else "fastvit"
    case = Case({name: 1.0}, image=image)
    if loss.family in ("pair", "across"):
        cases = {f"{name}": case}
    else:
        other: Tower = "text" if part == "image" else "image"
        stage: Stage = "image" if part == "image" else "text"
        cases = {
            f"{name}, {other} frozen": replace(case, frozen=(other,)),
            f"{name}, {stage}": replace(case, stage=stage),
        }
    if loss.needs_same_width and loss.family != "layer":
        unequal = {f"{key}, widths": replace(found, same_width=False) for key, found in cases.items()}
        cases |= {key: found for key, found in unequal.items() if found.stage == "both"}
    return cases


def _presets() -> dict[str, Case]:
    """The mix of each preset's losses, on small models."""
    cases = {}
    for path in sorted(PRESETS.glob("*.toml")):
        config = config_from_toml(path)
        losses = {term.name: term.weight for term in config.needs.terms}
        image = "token" if config.student.distillation_token else "fastvit"
        short = config.teacher.short is not None
        cases[f"preset {path.stem}"] = Case(losses, False, config.run.stage, image=image, short_teacher=short)
        if config.run.stage != "both":
            cases[f"preset {path.stem}"] = Case(losses, True, config.run.stage, image=image)
    return cases


_CLIP = {"clip_long": 1.0}
MIXES = {
    "clip + fd_image, widths": Case({**_CLIP, "fd_image": 2.0}, False),
    "clip + fd_text, widths": Case({**_CLIP, "fd_text": 2.0}, False),
    "clip + masked_fd, widths": Case({**_CLIP, "masked_fd": 2.0}, False),
    "clip + kl_image + cos_text, widths": Case({**_CLIP, "kl_image": 1.0, "cos_text": 2.0}, False),
    "clip_short + fd_text, widths": Case({"clip_short": 1.0, "fd_text": 1.0}, False),
    "icl_long + clip_short, short teacher": Case({"icl_long": 1.0, "clip_short": 1.0}, False, short_teacher=True),
    "vrd_long + vrd_short, short teacher": Case({"vrd_long": 1.0, "vrd_short": 1.0}, False, short_teacher=True),
    "clip + icl_short, short teacher": Case({**_CLIP, "icl_short": 1.0}, False, short_teacher=True),
    "fd_text + crd_short, short teacher": Case({"fd_text": 1.0, "crd_short": 1.0}, False, short_teacher=True),
    "clip + hidden_text, widths": Case({**_CLIP, "hidden_text": 1.0}, False),
    "fd_image + hidden_text": Case({"fd_image": 1.0, "hidden_text": 1.0}),
    "fd_text + attention_image": Case({"fd_text": 1.0, "attention_image": 1.0}, image="vit"),
    "hidden_text, last layer": Case({"hidden_text": 1.0}, stage="text", settings={"layer_map": "1:2"}),
    "gd + afd + xrd + kd, widths": Case({"gd_long": 9.0, "afd_long": 1.0, "xrd_short": 1.0, "kd_short": 1.0}, False),
    "clip + crd, token": Case({**_CLIP, "crd_long": 1.0}, image="token"),
    "deit_soft, token": Case({"deit_soft_long": 1.0}, image="token"),
    "masked_fd + clip, token, widths": Case({**_CLIP, "masked_fd": 1.0}, False, image="token"),
    "hidden_image, token": Case({"hidden_image": 1.0}, stage="image", image="token"),
    "cos_image + kd_long on prompts, token": Case({"cos_image": 1.0, "kd_long": 1.0}, stage="image", image="token"),
    "clip_sub + icl_sub + vrd_sub, widths, groups": Case(
        {"clip_sub": 1.0, "icl_sub": 1.0, "vrd_sub": 1.0}, False, settings={"share_identical_captions": True}
    ),
    "clip_sub + crd_short, short teacher": Case({"clip_sub": 1.0, "crd_short": 1.0}, False, short_teacher=True),
    "clip_sub + crd_long, stored": Case({"clip_sub": 1.0, "crd_long": 1.0}, stored=True),
    "clip + icl_sub + vrd_sub, stored": Case({**_CLIP, "icl_sub": 1.0, "vrd_sub": 1.0}, False, stored=True),
    "vrd + clip, stored": Case({**_CLIP, "vrd_short": 1.0}, False, stored=True),
    "fd_text + masked_fd + crd, stored": Case({"fd_text": 1.0, "masked_fd": 1.0, "crd_long": 1.0}, stored=True),
    "clip, both frozen": Case(_CLIP, frozen=("image", "text")),
    "pca of each text, groups": Case(
        {"clip_short": 1.0, "vrd_short": 1.0}, settings={"pca_side": "text", "share_identical_captions": True}
    ),
}
CASES = {
    key: case for loss in LOSSES for part in loss.parts for key, case in _alone(loss, part).items()
} | _presets() | MIXES  # fmt: skip


def options_of(case: Case) -> LossOptions:
    weights = dict.fromkeys(LossOptions().weights, 0.0) | case.losses
    return LossOptions(**weights, **{"pca_rank": 3, "head_match": "mean", **case.settings})


def student_of(case: Case) -> MobileCLIP:
    variant = variant_config("tiny" if case.image == "fastvit" else "vit_tiny")
    width = TEACHER_WIDTH if case.same_width else OTHER_WIDTH
    config = override(variant, embed_dim=width, text_width=16, text_heads=2, text_layers=2, text_tower="base")
    if case.image != "fastvit":
        config = override(config, image_width=24, image_layers=2, image_heads=2, image_patch=16)
        config = override(config, distillation_token=case.image == "token")
    config = replace(config, text=replace(config.text, vocab_size=VOCABULARY), context_length=16)
    return create_student(config).double()


def teacher_of(seed: int, width: int) -> LongCLIP:
    torch.manual_seed(seed)
    config = TEACHERS["tiny"]
    text = replace(config.text, width=32, heads=2, vocab_size=VOCABULARY, context_length=16)
    image = replace(config.image, width=32, heads=2, patch=16)
    teacher = create_teacher(replace(config, embed_dim=width, text=text, image=image))
    return teacher.double().eval().requires_grad_(False)


def batch_of(runtime: Runtime) -> Batch:
    """This process's share of a fixed random batch, in which captions repeat."""
    generator = torch.Generator().manual_seed(1)

    def captions(longest: int) -> Tensor:
        tokens = torch.zeros(BATCH, longest, dtype=torch.long)
        for row in tokens:
            length = int(torch.randint(3, longest + 1, (), generator=generator))
            row[: length - 1] = torch.randint(1, VOCABULARY - 1, (length - 1,), generator=generator)
            row[length - 1] = VOCABULARY - 1
        tokens[4] = tokens[0]
        return tokens

    def pictures() -> Tensor:
        return torch.randint(0, 256, (BATCH, 3, 48, 48), generator=generator, dtype=torch.uint8)

    whole = Batch(
        pictures(),
        (pictures(),),
        captions(12),
        captions(6),
        [str(i) for i in range(BATCH)],
        [(0, i) for i in range(BATCH)],
        {},
        sub_tokens=torch.stack([captions(5) for _ in range(3)], dim=1),
    )
    share = BATCH // runtime.world_size
    return whole.rows(slice(runtime.rank * share, (runtime.rank + 1) * share))


def two_steps(case: Case, runtime: Runtime, accumulation: int) -> dict[str, Tensor]:
    teacher = teacher_of(0, TEACHER_WIDTH)
    short = teacher_of(1, 28) if case.short_teacher else None
    batch = batch_of(runtime)
    teachers = Teachers([teacher], short)
    torch.manual_seed(2)
    student = student_of(case)
    prompts = normalize(torch.randn(5, TEACHER_WIDTH, dtype=torch.float64), dim=1)
    given = {"stage": case.stage, "frozen": case.frozen, "prompts": prompts}
    found = assemble(student, teachers, options_of(case), **given)
    if case.stored:
        rows = teachers.outputs(batch, found.objective.needs).features.tensors()
        stored = TeacherInfo((TEACHER_WIDTH,), float(teacher.linear_logit_scale), 16)
        found = assemble(student, Teachers(stored=stored), options_of(case), **given)
        batch = replace(batch, teacher={name: value.half().double() for name, value in rows.items()})
    distiller = found.distiller.double().eval()
    batch = mix(batch, MixOptions(), seed=0, step=0, mask=distiller.mask)
    module = DistributedDataParallel(distiller) if runtime.world_size > 1 else distiller
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    results: dict[str, Tensor] = {}
    for step in range(2):
        optimizer.zero_grad()
        losses = backward_step(
            module, batch, found.objective, found.teachers,
            precision="fp32", accumulation=accumulation, scaler=scaler, key=(0, step),
        )  # fmt: skip
        results |= {f"{name} {step}": value for name, value in losses.items()}
        optimizer.step()
    for name, parameter in distiller.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"no loss reaches {name}"
            grad = parameter.grad.flatten()
            probe = torch.sin(torch.arange(len(grad), dtype=torch.float64))
            results[f"{name} grad"] = torch.stack([grad.norm(), grad @ probe])
    return results


def main() -> None:
    accumulation = int(sys.argv[2])
    with start("cpu") as runtime:
        found = {}
        for name, case in CASES.items():
            if accumulation > 1 and case.has_layers:
                continue
            try:
                found[name] = two_steps(case, runtime, accumulation)
            except Exception as error:
                raise RuntimeError(f"case {name}: {error}") from error
        if runtime.is_main:
            torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
