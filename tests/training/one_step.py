"""Gradient of one training step on random data, as a program: run alone or as one of several ranks.

Usage: one_step.py OUT ACCUMULATION PCA_SCOPE LOSSES LAYERS, LOSSES being "streaming" or "full", LAYERS "layers" or
"none" (torchrun's environment variables give rank and world size). Every loss of pairs and of features is on, and with
LAYERS those between the layers of the text towers. Rank 0 writes the losses and the gradients, float64, with the models
in eval mode, to OUT.
"""

from __future__ import annotations

import sys

import torch
from torch.nn.parallel import DistributedDataParallel

from eval.base.processes import start
from longclip_teacher import create_teacher
from mobileclip_student import create_student
from training.data.mixing import mix
from training.data.samples import Batch
from training.distillation import assemble
from training.losses.table import LOSSES
from training.settings.losses import LossOptions
from training.settings.options import MixOptions
from training.step import backward_step
from training.teachers import Teachers

GLOBAL_BATCH = 24


def random_batch(rank: int, world_size: int) -> Batch:
    """This rank's share of a fixed random batch; captions repeat, so that shared targets matter."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (GLOBAL_BATCH, 3, 48, 48), generator=generator, dtype=torch.uint8)

    def captions(longest: int) -> torch.Tensor:
        tokens = torch.zeros(GLOBAL_BATCH, longest, dtype=torch.long)
        for i in range(GLOBAL_BATCH):
            length = int(torch.randint(4, longest + 1, (), generator=generator))
            tokens[i, : length - 1] = torch.randint(320, 49000, (length - 1,), generator=generator)
            tokens[i, 0], tokens[i, length - 1] = 49406, 49407
        return tokens

    long_tokens, short_tokens, sub_tokens = captions(30), captions(9), torch.stack([captions(7), captions(7)], dim=1)
    short_tokens[::5] = short_tokens[0]
    rows = slice(rank * GLOBAL_BATCH // world_size, (rank + 1) * GLOBAL_BATCH // world_size)
    return Batch(
        images=images[rows],
        teacher_images=(images[rows],),  # the teacher's resampling differs
        long_tokens=long_tokens[rows],
        short_tokens=short_tokens[rows],
        keys=[str(i) for i in range(GLOBAL_BATCH)][rows],
        draws=[(0, i) for i in range(GLOBAL_BATCH)][rows],
        skipped={},
        sub_tokens=sub_tokens[rows],
    )


def options(pca_scope: str, layers: bool) -> LossOptions:
    """All losses at once."""
    weights = {"pair": 0.3, "across": 0.3, "feature": 0.7, "layer": 0.5}
    on = {loss.option(part): weights[loss.family] for loss in LOSSES for part in loss.parts}
    on |= {"gd_long": 1e4, "gd_short": 1e4}
    # the tiny student's image tower has no attention
    off = [loss.option("image") for loss in LOSSES if loss.family == "layer"]
    off += [loss.option("text") for loss in LOSSES if loss.family == "layer" and not layers]
    on |= dict.fromkeys(off, 0.0)
    return LossOptions(
        **on, pca_rank=4, pca_scope=pca_scope, share_identical_captions=True, teacher_scale=20.0, head_match="mean"
    )


def main() -> None:
    out, accumulation, pca_scope = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    streaming, layers = sys.argv[4] == "streaming", sys.argv[5] == "layers"
    with start("cpu") as runtime:
        torch.manual_seed(0)
        student, teacher = create_student("tiny").double().eval(), create_teacher("tiny").double().eval()
        teachers = Teachers([teacher.requires_grad_(False)])
        distillation = assemble(student, teachers, options(pca_scope, layers), streaming=streaming)
        distiller = distillation.distiller.double()
        assert distiller.project, "the widths differ, so that projections are under test"
        module = DistributedDataParallel(distiller) if runtime.world_size > 1 else distiller
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        batch = random_batch(runtime.rank, runtime.world_size)
        batch = mix(batch, MixOptions(), seed=0, step=0, mask=distiller.mask)
        losses = backward_step(
            module, batch, distillation.objective, teachers,
            precision="fp32", accumulation=accumulation, scaler=scaler, key=(0, 0),
        )  # fmt: skip
        if runtime.is_main:
            grads = {name: p.grad for name, p in distiller.named_parameters() if p.requires_grad}
            torch.save({"losses": losses, "grads": grads}, out)


if __name__ == "__main__":
    main()
