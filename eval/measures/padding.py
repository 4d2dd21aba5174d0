"""What padding does to the features of captions.

Shapes: M captions, D embedding width, B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from eval.towers.features import Encoding, evaluation_mode, model_device
from eval.towers.models import ClipModel, cut_tokens
from longclip_teacher.errors import InputError

__all__ = ["EXACT_COSINE", "padding_cosines"]

EXACT_COSINE = 0.99999  # a model that masks pads reaches this in float32
_PADDED_LENGTHS = (77, 128, 248)


def padding_cosines(
    model: ClipModel, captions: Sequence[str], encoding: Encoding = Encoding()
) -> list[dict[str, float]]:
    """`[{num_tokens, min_cosine, mean_cosine}]`: features of captions padded to 77, 128 and 248 tokens, compared with
    those of the same captions without padding.

    Lengths beyond the model's context are left out, and so are captions that the shortest length would cut. Every batch
    has one caption of the full length beside the padded ones, so that no model can trim the padding away. A model that
    always pads to its context (published students, open_clip's models) has the cosine 1 by construction.
    """
    lengths = [length for length in _PADDED_LENGTHS if length <= model.context_length]
    if not lengths:
        return []
    num_tokens = {text: model.tokenizer.count_tokens(text) for text in dict.fromkeys(captions)}
    short = sorted((text for text in num_tokens if num_tokens[text] <= lengths[0]), key=num_tokens.__getitem__)
    if not short:
        raise InputError(f"no caption of at most {lengths[0]} tokens to pad: all first sentences are longer")
    by_length: dict[int, list[str]] = {}
    for text in short:
        by_length.setdefault(num_tokens[text], []).append(text)
    unpadded = torch.cat([_encode_at(model, texts, length, encoding) for length, texts in by_length.items()]).double()
    result: list[dict[str, float]] = []
    for length in lengths:
        padded = _encode_at(model, short, length, encoding, beside=f"{short[0]} " * length)
        cosines = F.cosine_similarity(padded.double(), unpadded, dim=1)
        result.append({"num_tokens": length, "min_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())})
    return result


def _encode_at(
    model: ClipModel, captions: Sequence[str], num_tokens: int, encoding: Encoding, beside: str | None = None
) -> Float[Tensor, "M D"]:
    """Features of captions cut and padded to `num_tokens`, in order; each batch ends with `beside`."""
    size = encoding.batch_size
    features = []
    with evaluation_mode(model, encoding.precision):
        for start in range(0, len(captions), size):
            batch = list(captions[start : start + size])
            texts = [*batch, beside] if beside is not None else batch
            tokens = cut_tokens(model, texts, num_tokens).to(model_device(model))  # [B,L]
            features.append(model.encode_text(tokens)[: len(batch)].float())
    return torch.cat(features)
