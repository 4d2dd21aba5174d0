"""The labelled sets that --dataset names, separate from their readers, so that options need not import torch."""

from __future__ import annotations

from typing import Literal

__all__ = ["DatasetName"]

DatasetName = Literal[
    "auto",
    "folder",
    "imagenet",
    "imagenet_v2",
    "imagenet_a",
    "imagenet_r",
    "imagenet_sketch",
    "cifar10",
    "cifar100",
]
