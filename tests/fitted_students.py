"""A small student that tells a hundred pairs apart without having been trained: its last layers are solved for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from eval.base.images import open_image
from eval.benchmarks.protocols import RetrievalSet, load_retrieval_set
from longclip_teacher.open_clip_parts import SimpleTokenizer
from mobileclip_student import MobileCLIP, create_student
from mobileclip_student.model import variant_config

__all__ = ["CONTEXT", "PAIRS", "fitted_student", "write_pairs"]

CONTEXT, PAIRS = 20, 100
_LOUD = 1000.0  # against values of about 1
_KEPT = 0.05  # of the largest singular value
_RIDGE = 1e-5


def write_pairs(folder: Path, count: int = PAIRS) -> RetrievalSet:
    """Blurred pictures of a few random colours with captions of a word each, of the protocol `folder`."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    words = [token[:-4] for token in SimpleTokenizer().encoder if token.endswith("</w>") and token[:-4].isalpha()]
    for number in range(count):
        pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(words[1000 + number], encoding="utf-8")
    return load_retrieval_set("folder", folder)


@torch.no_grad()
def fitted_student(pairs: RetrievalSet) -> MobileCLIP:
    """A student whose R@1 on `pairs` is 100%.

    One channel of its image tower, which no feature depends on, is so loud that layers which read it in int8 lose all
    others.
    """
    torch.manual_seed(0)
    config = variant_config("tiny")
    means = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    image = replace(config.image, image_size=32, layers=(1,), embed_dims=(16,), **means)
    student = create_student(replace(config, image=image, text=replace(config.text, width=128)), CONTEXT).eval()
    trunk, tower = student.image_encoder.trunk, student.text_encoder
    norm = [part for part in trunk.final_conv.modules() if isinstance(part, nn.BatchNorm2d)][-1]
    norm.bias[0] += _LOUD
    pixels = torch.stack([student.preprocess(open_image(path)) for path in pairs.images])
    head = trunk.head.fc
    read = trunk.forward_head(trunk.forward_features(pixels), pre_logits=True)
    read[:, 0] = 0
    spread, mean = _spreading(read)
    head.weight.zero_()
    head.weight[: spread.shape[1]] = spread.T
    head.weight[:, 0] = 0
    head.bias[: spread.shape[1]] = -(mean @ spread)
    tower.token_embedding.weight.mul_(10)  # so that captions differ more in their words than they have in common
    tower.projection, projection = nn.Parameter(torch.eye(len(tower.projection))), tower.projection
    found = student.encode_text(student.tokenizer(pairs.captions)).double()
    products = found @ found.T
    products.diagonal().mul_(1 + _RIDGE)
    features = student.encode_image(pixels, normalize=True).double()
    tower.projection = projection.copy_(found.T @ torch.linalg.solve(products, features))
    return student


def _spreading(values: Tensor) -> tuple[Tensor, Tensor]:
    """The map [F, K] of values [N, F] to uncorrelated ones, without the directions that are nearly constant, and their
    mean."""
    mean = values.mean(dim=0)
    _, sizes, directions = torch.linalg.svd(values - mean, full_matrices=False)
    count = int((sizes > _KEPT * sizes[0]).sum())
    return directions[:count].T / sizes[:count] * len(values) ** 0.5, mean
