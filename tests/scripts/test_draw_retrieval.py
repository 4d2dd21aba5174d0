"""The figure of a long caption: which caption is chosen, what of it a model reads, and what is drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import draw_retrieval
from longclip_teacher import create_teacher, save_teacher
from longclip_teacher.errors import InputError
from longclip_teacher.text import CaptionTokenizer

CAPTION = "A red board. " * 30


def test_the_words_read_are_those_that_fit_with_the_end_token() -> None:
    caption = CAPTION.strip()
    read = draw_retrieval._characters_read(caption, 77)
    with_next_word = caption.index(" ", read + 1)
    tokens = CaptionTokenizer(248)([caption[:read], caption[:with_next_word]])
    lengths = (tokens != 0).sum(dim=1).tolist()
    assert lengths[0] <= 77 < lengths[1]
    assert draw_retrieval._characters_read("A dog.", 77) == 6


def encoded(image: torch.Tensor, text: torch.Tensor) -> draw_retrieval.EncodedSet:
    return draw_retrieval.EncodedSet([], ["a", "b", "c"], image, text, torch.arange(3), 0, [])


def test_the_caption_tells_the_last_model_from_the_others() -> None:
    good, other = torch.eye(3), torch.eye(3)[[0, 2, 1]]
    first = {"teacher": torch.arange(3), "last": draw_retrieval._first_pictures(encoded(good, other))}
    assert draw_retrieval._telling(first, encoded(good, good)) == 1
    with pytest.raises(InputError, match="choose one with --caption"):
        draw_retrieval._telling({"teacher": torch.arange(3), "last": torch.arange(3)}, encoded(good, good))


def test_a_figure_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    save_teacher(create_teacher("tiny"), tmp_path / "model.safetensors")
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for number in range(3):
        Image.new("RGB", (48, 48), (80 * number, 0, 0)).save(pairs / f"{number}.png")
        (pairs / f"{number}.txt").write_text(f"{number} {CAPTION}")
    model = tmp_path / "model.safetensors"
    out = tmp_path / "figures" / "found.png"
    args = ["--models", f"one={model}", f"two={model}@context_length=77", "--root", str(pairs), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["draw_retrieval.py", *args, "--caption", "1"])
    draw_retrieval.main()
    with Image.open(out) as picture:
        assert picture.width == 1350 and len(picture.convert("RGB").getcolors(1 << 20) or []) > 3
    monkeypatch.setattr(sys, "argv", ["draw_retrieval.py", *args, "--caption", "3"])
    with pytest.raises(InputError, match="captions 0 to 2"):
        draw_retrieval.main()
