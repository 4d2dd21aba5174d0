"""What several test folders share: a folder laid out as a fresh checkout would have it after the embedded inputs are
made."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from longclip_teacher import create_teacher, save_teacher
from training.data.digit_scenes import write_digit_scenes
from training.settings.options import EMBEDDED_DATA, EMBEDDED_TEACHER


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small digit scenes and a tiny teacher of random weights where the default preset looks for them."""
    root = tmp_path_factory.mktemp("checkout")
    write_digit_scenes(root / EMBEDDED_DATA, num_train=300, num_val=40, num_test=40, num_val_twins=40)
    torch.manual_seed(0)
    save_teacher(create_teacher("tiny"), root / EMBEDDED_TEACHER / "best.safetensors")
    return root


@pytest.fixture(scope="session")
def tracked_files() -> list[Path]:
    """The files that git tracks and that are there, relative to the root of the checkout."""
    root = Path(__file__).resolve().parent.parent
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=True)
    return [Path(name) for name in listed.stdout.split("\0") if name and (root / name).is_file()]
