"""Float32 products on a GPU: with inputs rounded to the 10 bits of TF32's mantissa, which is faster, or in full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["allow_tf32", "full_float32"]


def allow_tf32(allowed: bool) -> None:
    """Let this process round the inputs of float32 matrix products and convolutions to TF32, or not.

    This is the setting that every torch has. torch 2.9 keeps its newer one, `fp32_precision`, in step with it.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 matrix products in full while the block runs, whatever the setting is around it.

    A setting of the process, read when an operation is queued: it waits for nothing, and holds in autograd's thread.
    """
    products = torch.backends.cuda.matmul
    # since torch 2.9; the older setting cannot be read while the newer one is changed
    has_newer = hasattr(products, "fp32_precision")
    name, full = ("fp32_precision", "ieee") if has_newer else ("allow_tf32", False)
    before = getattr(products, name)
    setattr(products, name, full)
    try:
        yield
    finally:
        setattr(products, name, before)
