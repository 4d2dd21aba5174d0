"""Where the user's checkout of MobileCLIP's training code has its patched open_clip. Only light imports: see
`bench.Options`."""

from __future__ import annotations

from pathlib import Path

from longclip_teacher.errors import InputError

__all__ = ["patched_open_clip"]

_HOW = (
    "clone github.com/apple/ml-mobileclip and follow its training/README.md: clone open_clip in training/, check out "
    "the commit, git apply --recount ../open_clip_v2.patch, copy configs, dr and mobileclip2"
)


def patched_open_clip(checkout: Path | None) -> Path:
    """The src folder of the patched open_clip in the user's checkout. Raise InputError if there is none."""
    if checkout is None:
        raise InputError(f"mobileclip needs --checkout, the folder of MobileCLIP's training code: {_HOW}")
    for folder in (checkout, checkout / "open_clip", checkout / "training" / "open_clip"):
        loop = folder / "src" / "open_clip_train" / "train.py"
        if loop.is_file() and "dataset_reinforcement" in loop.read_text(encoding="utf-8", errors="replace"):
            return (folder / "src").resolve()
    raise InputError(f"--checkout {checkout}: no patched open_clip there: {_HOW}")
