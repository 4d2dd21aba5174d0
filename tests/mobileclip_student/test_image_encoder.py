"""The image tower equals timm's and computes the same function in every memory format."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import timm
import torch
from torch import Tensor, nn

from longclip_teacher.errors import InputError
from mobileclip_student import create_student
from mobileclip_student.image_encoder import ImageConfig, ImageEncoder

NARROW = {"tower": "fastvit", "image_size": 32, "layers": (1, 1), "embed_dims": (8, 16), "layer_scale": 0.5}


def _formats(tower: ImageEncoder) -> list[bool]:
    """Filled at each pass: whether the last convolution reads channels-last pictures."""
    formats: list[bool] = []
    tower.trunk.final_conv.register_forward_pre_hook(
        lambda _, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    return formats


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-8))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", [NARROW, {"tower": "fastvit_mci0", "image_size": 64}], ids=["narrow", "mci0"])
def test_channels_last_changes_no_feature_and_no_gradient(config: dict, training: bool, visible: Callable) -> None:
    torch.manual_seed(0)
    tower = visible(ImageEncoder(ImageConfig(**config), 12)).double().train(training)
    images = torch.rand(3, 3, config["image_size"], config["image_size"], dtype=torch.float64)
    formats, results = _formats(tower), []
    for channels_last in (True, False):
        tower.channels_last = channels_last
        tower.zero_grad()
        features = tower(images)
        features.square().sum().backward()
        grads = {name: parameter.grad.clone() for name, parameter in tower.named_parameters()}
        results.append({"features": features.detach(), **grads})
    assert formats == [True, False]
    # biases under a BatchNorm of the batch have no gradient but rounding: errors are measured against 1e-8 at least
    assert max(_relative(value, results[1][name]) for name, value in results[0].items()) < 1e-7


def test_channels_last_in_float32_changes_only_rounding() -> None:
    torch.manual_seed(0)
    tower = ImageEncoder(ImageConfig(**NARROW), 12).eval()
    images, results = torch.rand(3, 3, 32, 32), []
    for channels_last in (True, False):
        tower.channels_last = channels_last
        tower.zero_grad()
        features = tower(images)
        features.square().sum().backward()
        with torch.no_grad():
            assert _relative(tower(images), features) < 1e-5
        grads = {name: parameter.grad.clone() for name, parameter in tower.named_parameters()}
        results.append({"features": features.detach(), **grads})
    assert max(_relative(value, results[1][name]) for name, value in results[0].items()) < 1e-5


def test_pictures_in_either_format_train_a_wide_tower() -> None:
    """Left to oneDNN, the 1 x 1 convolution of stride 2 in the stem would end the process."""
    torch.manual_seed(0)
    tower = ImageEncoder(ImageConfig("fastvit_mci0", 256), 12)
    tower(torch.rand(2, 3, 256, 256).contiguous(memory_format=torch.channels_last)).sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())


def test_a_copy_has_its_own_switch_and_inference_is_all_channels_last() -> None:
    tower = ImageEncoder(ImageConfig(**NARROW), 12).eval()
    copy = deepcopy(tower)
    copy.channels_last = False
    formats, copied = _formats(tower), _formats(copy)
    with torch.no_grad():
        tower(torch.rand(2, 3, 32, 32))
        copy(torch.rand(2, 3, 32, 32))
    copy(torch.rand(2, 3, 32, 32))
    assert formats == [True] and copied == [False, False]


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
