"""The image tower: timm's, and in no memory format another function."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from longclip_teacher.errors import InputError
from mobileclip_student import create_student
from mobileclip_student.image_encoder import ImageConfig, ImageEncoder

NARROW = {"tower": "fastvit", "image_size": 32, "layers": (1, 1), "embed_dims": (8, 16), "layer_scale": 0.5}


def test_channels_last_on_cpu_changes_no_feature_and_no_gradient() -> None:
    images = torch.rand(3, 3, 32, 32)
    results = []
    for is_hooked in (True, False):
        torch.manual_seed(0)
        tower = ImageEncoder(ImageConfig(**NARROW), 12)
        if not is_hooked:
            tower.trunk.stem[0]._forward_hooks.clear()
        formats: list[bool] = []
        tower.trunk.final_conv.register_forward_pre_hook(
            lambda _, inputs, formats=formats: formats.append(
                inputs[0].is_contiguous(memory_format=torch.channels_last)
            )
        )
        features = tower(images)
        features.square().sum().backward()
        assert formats == [is_hooked]
        results.append((features, {name: parameter.grad for name, parameter in tower.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_published_b_differs_from_timm_in_two_constants_only() -> None:
    """ml-mobileclip's stem pads its first convolution by (4 - 1) // 2 and its LayerNorms use PyTorch's epsilon."""
    with torch.device("meta"):
        ours = create_student("b").image_encoder.trunk
        theirs = timm.create_model("vit_base_mci_224", num_classes=512, global_pool="token")
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }
    assert [module.padding for module in ours.modules() if isinstance(module, nn.Conv2d)] == [(1, 1), (0, 0), (0, 0)]
    assert {module.eps for module in ours.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}
    with torch.device("meta"):
        assert ours(torch.zeros(1, 3, 224, 224)).shape == (1, 512)


@pytest.mark.parametrize(
    "change",
    [
        {"tower": "resnet50"},
        {"tower": "fastvit_mci0"},
        {"layers": ()},
        {"layers": (1, 1, 1)},
        {"embed_dims": (8, 20)},
        {"embed_dims": (8, 80000)},
        {"mean": (0.5,)},
        {"image_size": 10**6},
        {"stem_padding": 1},
    ],
)
def test_impossible_towers_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        ImageConfig(**{**NARROW, **change})
