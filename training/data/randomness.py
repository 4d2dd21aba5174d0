"""Random generators keyed by seed, epoch and sample, so that no draw depends on the order of earlier ones."""

from __future__ import annotations

import numpy as np

__all__ = ["sample_generator"]


def sample_generator(*key: int) -> np.random.Generator:
    """Return a random generator that depends only on `key`, for example (seed, epoch, index)."""
    return np.random.default_rng(key)
