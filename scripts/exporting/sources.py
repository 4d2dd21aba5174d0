"""The model that is exported: a student or a teacher, from a run folder, a file or a hub name.

Shapes: B images or captions, R image side, L tokens, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eval.towers.exported_model import exportable_towers
from eval.towers.models import load_model
from longclip_teacher import LongCLIP, save_teacher
from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import file_sha256, run_weights
from mobileclip_student import MobileCLIP, reparameterize, save_student
from training.settings.tree import TrainConfig, config_from_toml

__all__ = ["Exported", "load_source"]


@dataclass
class Exported:
    """A model in the form in which it is used: a student's branches merged, frozen, in eval mode."""

    model: MobileCLIP | LongCLIP
    run: Path | None
    """The run folder it comes from."""
    unfused: MobileCLIP | LongCLIP
    """The model as it was read, a student's branches as they were."""
    sha256: str = ""
    """Of the run's weight file."""

    @cached_property
    def config(self) -> TrainConfig | None:
        """The run's configuration."""
        return None if self.run is None else config_from_toml(self.run / "config.toml")

    @property
    def kind(self) -> str:
        return "student" if isinstance(self.model, MobileCLIP) else "teacher"

    @cached_property
    def towers(self) -> tuple[nn.Module, nn.Module]:
        """Image tower and text tower, whose features have unit norm."""
        return exportable_towers(self.model)

    @torch.no_grad()
    def encode_image(self, pixels: Float[Tensor, "B 3 R R"]) -> Float[Tensor, "B D"]:
        """The model's own features of unit norm, against which files are checked."""
        return self.model.encode_image(pixels, normalize=True)

    @torch.no_grad()
    def encode_text(self, tokens: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """The model's own features of unit norm, against which files are checked."""
        return self.model.encode_text(tokens, normalize=True)

    def save(self, path: Path) -> None:
        """Write the weights in this form."""
        if isinstance(self.model, MobileCLIP):
            save_student(self.model, path)
        else:
            save_teacher(self.model, path)

    @property
    def image_size(self) -> int:
        return self.model.image_size

    @property
    def context_length(self) -> int:
        return self.model.context_length

    @property
    def mean(self) -> tuple[float, ...]:
        """Each channel's value, for the normalisation of pictures."""
        return tuple(self.model.preprocess_cfg.mean)

    @property
    def std(self) -> tuple[float, ...]:
        """Each channel's value, for the normalisation of pictures."""
        return tuple(self.model.preprocess_cfg.std)


def load_source(source: str) -> Exported:
    """The model of a run folder, a weight file or a hub name.

    Raises InputError for what is neither a student nor a teacher of this project, and for a run of one tower, whose
    other tower stands elsewhere.
    """
    run = Path(source) if (Path(source) / "config.toml").is_file() else None
    sha256 = "" if run is None else file_sha256(run_weights(run))  # before it is read: it may be replaced meanwhile
    model = load_model(source)
    if not isinstance(model, MobileCLIP | LongCLIP):
        raise InputError(
            f"{source} is neither a student nor a Long-CLIP: open_clip's own models are exported elsewhere"
        )
    fused = reparameterize(model) if isinstance(model, MobileCLIP) else model.requires_grad_(False)
    exported = Exported(fused, run, model, sha256)
    if exported.config is not None and exported.config.run.stage != "both":
        raise InputError(
            f"{source} trained the {exported.config.run.stage} tower alone: train both from it (--init.image, "
            "--init.text), then export that run"
        )
    return exported
