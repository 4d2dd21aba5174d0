"""A model whose answers are known: it sees a picture's mean colour and reads the names of colours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from longclip_teacher.text import CaptionTokenizer

# the corners of the colour cube, each by a name of one token
COLOURS = {
    "black": (0, 0, 0),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "purple": (255, 0, 255),
    "aqua": (0, 255, 255),
    "white": (255, 255, 255),
}


class ColourClip(nn.Module):
    """The interface of both models, with features of width 3: -1..1 a colour channel."""

    embed_dim, image_size = 3, 8

    def __init__(self, context_length: int = 16) -> None:
        super().__init__()
        self.context_length = context_length
        self.tokenizer = CaptionTokenizer(context_length)
        self.preprocess_cfg = PreprocessCfg(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self.preprocess = image_transform_v2(self.preprocess_cfg, is_train=False)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.dropout = nn.Dropout(0.9)
        self.words = nn.Embedding(49408, 3)
        nn.init.zeros_(self.words.weight)
        for name, colour in COLOURS.items():
            token = self.tokenizer(name)[0, 1]
            self.words.weight.data[token] = torch.tensor(colour) / 127.5 - 1

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        return self.dropout(images.mean(dim=(2, 3)) * 2 - 1)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        return self.dropout(self.words(tokens).sum(dim=1))


@pytest.fixture
def colour_model() -> ColourClip:
    return ColourClip()


@pytest.fixture
def colour_folder(tmp_path: Path) -> Path:
    """Eight pictures in the Urban-1k layout, each of one colour, and a caption that names it."""
    root = tmp_path / "colours"
    (root / "image").mkdir(parents=True)
    (root / "caption").mkdir()
    for number, (name, colour) in enumerate(COLOURS.items(), start=1):
        Image.new("RGB", (20, 12), colour).save(root / "image" / f"{number}.png")
        (root / "caption" / f"{number}.txt").write_text(f"a {name} board\nsecond line\n")
    return root


@pytest.fixture
def colour_classes(tmp_path: Path) -> Path:
    """Three pictures of each colour in a folder of class folders."""
    root = tmp_path / "classes"
    for name, colour in COLOURS.items():
        (root / f"{name}_board").mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (12, 12 + number), colour).save(root / f"{name}_board" / f"{number}.png")
    return root
