"""Options that the evaluation commands share: which model, how it runs, where the figures go.

The methods import torch only when they are called, so that --help and a refused option do not wait for it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from eval.towers.encoding_options import EncodingOptions
from longclip_teacher.activation import Activation
from longclip_teacher.errors import InputError

if TYPE_CHECKING:
    from eval.towers.features import Encoding
    from eval.towers.models import ClipModel

__all__ = ["EvaluationOptions", "show_recognised"]


@contextmanager
def show_recognised() -> Iterator[None]:
    """Within this context, say on stderr which model is recognised in a file that holds no configuration.

    Under torchrun, rank 0 alone says it.
    """
    from eval.base.processes import is_main_process
    from longclip_teacher.weights_file import RECOGNISED

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{Path(sys.argv[0]).stem}: %(message)s"))
    level = RECOGNISED.level
    if is_main_process():
        RECOGNISED.addHandler(handler)
        RECOGNISED.setLevel(logging.INFO)
    try:
        yield
    finally:
        RECOGNISED.removeHandler(handler)
        RECOGNISED.setLevel(level)


@dataclass
class EvaluationOptions(EncodingOptions):
    """Which model is evaluated, and how it runs."""

    checkpoint: str | None = None
    """A student's or teacher's weight file, a run folder (its best weights), a hub name such as longclip-b, or an
    open_clip model: open_clip:ARCHITECTURE/WEIGHTS, hf-hub:NAME, local-dir:FOLDER."""
    json: Path | None = None
    """File for the figures, as JSON."""
    variant: str | None = None
    """Architecture of a published student, if its file does not show it: s0, s1, s2, b, mobileclip2_s0, ..."""
    context_length: int | None = None
    """Longest caption in tokens. Unset: 77 for published students, the saved value for ours, 248 for teachers."""
    pad_mask: bool | None = None
    """Mask padding in a student's text tower. Unset: False for published students, the saved value for ours."""
    activation: Activation | None = None
    """Activation of a CLIP teacher, if its file does not show it: quickgelu for OpenAI's, gelu for most others."""
    reparameterize: bool = False
    """Fuse a student's branches first, as for deployment: it runs faster and gives the same figures."""
    cache_dir: Path | None = None
    """Folder that stores features; they are reused if model, data, precision and code are the same."""

    def check(self) -> None:
        """Raise InputError for options that cannot work, before any data is read."""
        if self.checkpoint is None:
            raise InputError("pass --checkpoint PATH: a weight file, a run folder, or a hub name such as longclip-b")
        if self.json is not None and self.json.is_dir():
            raise InputError(f"--json {self.json} is a folder: name a file")
        if self.cache_dir is not None and self.cache_dir.exists() and not self.cache_dir.is_dir():
            raise InputError(f"--cache-dir {self.cache_dir} is a file: name a folder")
        super().check()

    def load(self) -> ClipModel:
        """The model, in eval mode, on its device. A line on stderr says what a published file was recognised as."""
        from eval.towers.models import load_model
        from mobileclip_student import MobileCLIP, reparameterize

        assert self.checkpoint is not None  # check() comes first
        with show_recognised():
            model = load_model(
                self.checkpoint,
                variant=self.variant,
                context_length=self.context_length,
                pad_mask=self.pad_mask,
                activation=self.activation,
                device=self.torch_device(),
            )
        if not self.reparameterize:
            return model
        if not isinstance(model, MobileCLIP):
            raise InputError(
                f"{self.checkpoint} is not a student and has no branches to fuse: leave --reparameterize out"
            )
        return reparameterize(model)

    def encoding(self) -> Encoding:
        """The encoding options, with progress bars and the cache of --cache-dir."""
        from eval.towers.feature_cache import FeatureCache

        cache = FeatureCache(self.cache_dir) if self.cache_dir is not None else None
        return replace(super().encoding(), cache=cache)
