"""--run.sync_bn changes which pictures BatchNorm's statistics come from, and nothing else.

torch has no synchronised BatchNorm on the CPU: that two processes share their statistics is not tested here.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from eval.base.processes import Runtime
from longclip_teacher.errors import InputError
from mobileclip_student import VARIANTS
from mobileclip_student.image_encoder import ImageEncoder
from mobileclip_student.model import variant_config
from training.build import with_synchronised_norms

GPUS = Runtime(0, 2, torch.device("cuda"))


def image_tower(variant: str) -> ImageEncoder:
    """The image tower with at most two blocks a stage. Its random weights and statistics keep activations near 1."""
    with torch.device("meta"):
        tower = ImageEncoder(variant_config(variant).image, 16)
    for stage in getattr(tower.trunk, "stages", [tower.trunk]):
        stage.blocks = stage.blocks[:2]
    tower.to_empty(device="cpu")
    torch.manual_seed(0)
    for value in (*tower.parameters(), *tower.buffers()):
        if value.ndim > 1:
            value.data.uniform_(-1, 1).mul_((3 / value[0].numel()) ** 0.5)
        elif value.is_floating_point():
            value.data.uniform_(0.5, 1.5)
        else:
            value.zero_()
    return tower


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_output_changes(variant: str) -> None:
    tower = image_tower(variant).eval()
    config = variant_config(variant).image
    side = 64 if "fastvit" in config.tower else config.image_size
    pictures = torch.rand(1, 3, side, side)
    with torch.no_grad():
        before = tower(pictures)
        norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in tower.modules())
        synchronised = with_synchronised_norms(tower, GPUS)  # type: ignore[arg-type]
        assert sum(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules()) == norms
        assert before.std() > 1e-3 and torch.equal(synchronised(pictures), before)


@pytest.mark.parametrize("variant", ["tiny", "b"])
def test_training_in_one_process_does_not_change(variant: str) -> None:
    tower = image_tower(variant).train()
    other = with_synchronised_norms(deepcopy(tower), GPUS)  # type: ignore[arg-type]
    side = variant_config(variant).image.image_size
    pictures = torch.rand(2, 3, side, side)
    results = []
    for found in (tower, other):
        torch.manual_seed(1)  # stochastic depth
        out = found(pictures)
        out.square().sum().backward()
        gradients = {f"{name} grad": parameter.grad for name, parameter in found.named_parameters()}
        results.append({"out": out.detach(), **gradients, **dict(found.named_buffers())})
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_cpus_are_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="needs GPUs"):
        with_synchronised_norms(nn.Module(), Runtime(0, 2, torch.device("cpu")))  # type: ignore[arg-type]
