"""Random students in which no block is invisible, and random captions."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from longclip_teacher.text import EOT, SOT
from mobileclip_student.repmixer import TokenBatchNorm


@pytest.fixture(scope="session")
def published() -> ModuleType:
    """`published.py`, beside this file: the published key layouts and equations."""
    spec = importlib.util.spec_from_file_location("published_students", Path(__file__).with_name("published.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def visible() -> Callable[[nn.Module], nn.Module]:
    """Draw layer scales and BatchNorm entries from U(0.5, 1.5): as initialised, RepMixer blocks do almost nothing."""

    def draw(module: nn.Module) -> nn.Module:
        with torch.no_grad():
            for part in module.modules():
                if isinstance(part, (nn.modules.batchnorm._BatchNorm, TokenBatchNorm)):
                    for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                        tensor.uniform_(0.5, 1.5)
            for name, parameter in module.named_parameters():
                if "layer_scale" in name:
                    parameter.uniform_(0.5, 1.5)
        return module

    return draw


@pytest.fixture
def captions() -> Callable[..., Tensor]:
    """Token ids of random captions with the given lengths (SOT and EOT included), zero-padded to `width`."""

    def make(*lengths: int, width: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.zeros(len(lengths), width, dtype=torch.int64)
        for row, length in zip(tokens, lengths, strict=True):
            row[0], row[length - 1] = SOT, EOT
            row[1 : length - 1] = torch.randint(0, SOT, (length - 2,), generator=generator)  # id 0 is a real token too
        return tokens

    return make
