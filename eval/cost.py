"""What a model costs to use: parameters, bytes of its file, milliseconds for a picture and for a caption."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eval.features import evaluation_mode, model_device
from eval.models import ClipModel
from longclip_teacher.errors import InputError

__all__ = ["CAPTION_TOKENS", "Cost", "measure_cost", "measure_costs"]

CAPTION_TOKENS = 100  # start and end included: a long caption of the kind this project is for
_SENTENCE = "a large red bus waits in front of the old station while people cross the wide street"


Cost: TypeAlias = dict[str, float | None]  # params, bytes, image_ms, text_ms


def measure_cost(model: ClipModel, weights: Path | None = None, *, repeats: int = 30) -> Cost:
    """The cost of one model; `weights` is the file whose size is told. See `measure_costs`."""
    return measure_costs({"model": model}, {} if weights is None else {"model": weights}, repeats=repeats)["model"]


def measure_costs(
    models: Mapping[str, ClipModel], weights: Mapping[str, Path] | None = None, *, repeats: int = 30
) -> dict[str, Cost]:
    """The costs of several models, measured in turns so that a machine that slows down favours none of them.

    params     parameters of the model as it is handed over: fewer after `reparameterize`, none of a training loss
    bytes      size of its weight file, if `weights` names one, else None
    image_ms   median milliseconds of `encode_image` on one picture
    text_ms    median milliseconds of `encode_text` on one caption

    What is timed is the tower alone: float32, eval mode, no gradients, batch 1, on the model's device, with torch's
    threads as they are. The picture is already decoded, resized and normalised, at the model's own size. The caption
    has `CAPTION_TOKENS` tokens with start and end, is already tokenised and padded to the model's context length; a
    model with a shorter context reads it cut there. Each figure is the median of `repeats` calls, each directly after
    one that is not counted: a model finds its own weights in the processor's cache, whichever model came before.
    """
    if repeats < 1:
        raise InputError(f"a cost is measured in 1 or more repeats, got {repeats}")
    calls = {name: _calls(model) for name, model in models.items()}
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(evaluation_mode(model, "fp32"))
        for _ in range(repeats):
            for name, model in models.items():
                for call, measured in zip(calls[name], seconds[name], strict=True):
                    measured.append(_seconds(call, model_device(model)))
    return {
        name: {
            "params": sum(parameter.numel() for parameter in model.parameters()),
            "bytes": weights[name].stat().st_size if weights and name in weights else None,
            "image_ms": median(seconds[name][0]) * 1e3,
            "text_ms": median(seconds[name][1]) * 1e3,
        }
        for name, model in models.items()
    }


def _calls(model: ClipModel) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    device = model_device(model)
    own_generator = torch.Generator().manual_seed(0)  # timing leaves torch's random state alone
    picture: Float[Tensor, "1 3 H W"] = torch.rand(
        1, 3, model.image_size, model.image_size, generator=own_generator
    ).to(device)
    tokens: Int[Tensor, "1 L"] = model.tokenizer([_caption(model)], model.context_length).to(device)
    return lambda: model.encode_image(picture), lambda: model.encode_text(tokens)


def _caption(model: ClipModel) -> str:
    """A caption of exactly CAPTION_TOKENS tokens: common words are one token each."""
    words = (_SENTENCE.split() * CAPTION_TOKENS)[: CAPTION_TOKENS - 2]
    caption = " ".join(words)
    assert model.tokenizer.count_tokens(caption) == CAPTION_TOKENS
    return caption


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    call()
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
