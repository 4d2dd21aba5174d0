"""The bench against MobileCLIP's published loop: what is handed to a checkout and what comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benches.checkout import patched_open_clip
from benches.measure import BenchOptions
from benches.mobileclip_step import PublishedLoop, reinforced
from benches.open_clip_step import STUDENT_FILE
from benches.step import random_batch
from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import read_weights

OPTIONS = BenchOptions(full=False, rounds=1, device=torch.device("cpu"), precision="fp32")
OPEN_CLIP = """
import torch
from torch import nn

def create_model(name, device, force_image_size, output_dict):
    print("this line is no answer")
    return nn.Linear(force_image_size, 2).to(device)

class Entropy(nn.Module):
    def forward(self, image, text, synthetic):
        total = 0
        for captions in (text, synthetic):
            for start in (0, 768):
                logits = 100 * image[:, start:start + 768] @ captions[:, start:start + 768].T
                for direction in (logits, logits.T):
                    p = torch.softmax(direction.double(), dim=1)
                    total = total - (p * p.log()).sum() / len(p) / 4
        return {"distill_loss": total + 3, "loss": total}

def create_loss(arguments):
    assert arguments.given[arguments.given.index("--distill-loss-weights"):][1:3] == ["0.0", "1.0"]
    return Entropy()
"""
PARAMS = """
from types import SimpleNamespace

def parse_args(words):
    assert "--dataset-reinforcement" in words
    return SimpleNamespace(given=words, lr=1e-3, wd=0.2, beta1=0.9, beta2=0.95, eps=1e-8)
"""
TRAIN = """
def train_one_epoch(model, data, loss, epoch, optimizer, scaler, scheduler, dist_model, args):  # dataset_reinforcement
    data["train"].set_epoch(epoch)
    for images, texts, image, text, synthetic_texts, synthetic in data["train"].dataloader:
        assert images.shape == (4, 3, 8, 8) and texts.shape == synthetic_texts.shape == (4, 77) and not args.distill
        if "fp32" not in args.given:
            raise ValueError("a cause")
        loss(image, text, synthetic)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder in the layout of the published code, whose loss is the entropy of the teachers, plus 3."""
    source = tmp_path / "training" / "open_clip" / "src"
    for name, text in (
        ("open_clip/__init__", OPEN_CLIP),
        ("open_clip_train/__init__", ""),
        ("open_clip_train/params", PARAMS),
        ("open_clip_train/train", TRAIN),
    ):
        file = source / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def test_the_loop_of_the_checkout_makes_the_steps(checkout: Path) -> None:
    batch = reinforced(random_batch(4, 8), 12)
    assert not torch.equal(batch.long_tokens, batch.short_tokens)
    with PublishedLoop(patched_open_clip(checkout), checkout, batch, 8, OPTIONS, 1) as loop:
        assert [loop.step() for _ in range(2)] == pytest.approx([3.0, 3.0], abs=1e-4)
        assert 0.1 < loop.peak_gb < 2
    assert read_weights(checkout / STUDENT_FILE).tensors["weight"].shape == (2, 8)


def test_a_checkout_that_fails_ends_in_one_line(checkout: Path) -> None:
    options = BenchOptions(full=False, rounds=1, device=torch.device("cpu"), precision="bf16")
    with (
        PublishedLoop(patched_open_clip(checkout), checkout, reinforced(random_batch(4, 8), 12), 8, options, 1) as loop,
        pytest.raises(InputError, match=r"--checkout .*src: its training code failed: ValueError: a cause$"),
    ):
        loop.step()
