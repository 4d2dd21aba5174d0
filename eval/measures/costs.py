"""What a model costs to use: parameters, arithmetic, bytes, milliseconds and memory for pictures and captions.

Shapes: B batch, R image side, L tokens.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from eval.towers.features import evaluation_mode, model_device
from eval.towers.models import ClipModel
from eval.towers.open_clip_model import OpenClipModel
from eval.towers.precision import Precision
from longclip_teacher.errors import InputError
from mobileclip_student import MobileCLIP

__all__ = [
    "BATCH_SIZES",
    "CAPTION_TOKENS",
    "FULL_CAPTION_TOKENS",
    "Cost",
    "FullCost",
    "cost_conditions",
    "count_flops",
    "measure_cost",
    "measure_costs",
    "measure_full_cost",
    "measure_full_costs",
    "threads_in_words",
]

_REPEATS, _FULL_REPEATS = 30, 10  # of measure_costs and of measure_full_costs
CAPTION_TOKENS = 100  # start and end included; a typical long caption
FULL_CAPTION_TOKENS = (77, 248)  # the contexts of CLIP and Long-CLIP
BATCH_SIZES = (1, 32)
_SENTENCE = "a large red bus waits in front of the old station while people cross the wide street"

Cost: TypeAlias = dict[str, float | None]  # params, bytes, image_ms, text_ms
FullCost: TypeAlias = dict[str, float | str | None]  # see measure_full_costs
Calls: TypeAlias = dict[str, Callable[[], Tensor]]


def measure_cost(model: ClipModel, weights: Path | None = None, *, repeats: int = _REPEATS) -> Cost:
    """The cost of one model; `weights` is the file whose size is reported. See `measure_costs`."""
    return measure_costs({"model": model}, {} if weights is None else {"model": weights}, repeats=repeats)["model"]


def measure_costs(
    models: Mapping[str, ClipModel], weights: Mapping[str, Path] | None = None, *, repeats: int = _REPEATS
) -> dict[str, Cost]:
    """The costs of several models, measured in turns so that a machine that slows down affects all of them alike.

    params     parameters of the model as given: fewer after `reparameterize`, without those of a training loss
    bytes      size of its weight file, if `weights` names one, else None
    image_ms   median milliseconds of `encode_image` on one picture
    text_ms    median milliseconds of `encode_text` on one caption

    Only the tower is timed: float32, eval mode, no gradients, batch 1, on the model's device, with torch's current
    number of threads. The picture is already decoded, normalised and resized to the model's input size. The caption has
    `CAPTION_TOKENS` tokens with start and end, and is already tokenised and padded to the model's context length; a
    shorter context cuts it. Each figure is the median of `repeats` calls. An uncounted call precedes each of them, so
    that a model finds its own weights in the processor's cache whichever model came before.
    """
    calls = {
        name: {"image_ms": _image_call(model, 1), "text_ms": _text_call(model, 1, CAPTION_TOKENS)}
        for name, model in models.items()
    }
    milliseconds = _milliseconds(models, calls, repeats, "fp32")
    return {
        name: {
            "params": _num_parameters(model),
            "bytes": weights[name].stat().st_size if weights and name in weights else None,
            **milliseconds[name],
        }
        for name, model in models.items()
    }


def cost_conditions(device: torch.device | str, repeats: int = _REPEATS) -> str:
    """The conditions of `measure_costs` on this machine in one phrase, for tables and pages."""
    return f"batch 1, float32, {device}, {threads_in_words(torch.get_num_threads())}, median of {repeats} calls"


def measure_full_cost(
    model: ClipModel, weights: Path | None = None, *, repeats: int = _FULL_REPEATS, precision: Precision = "fp32"
) -> FullCost:
    """The full cost of one model; `weights` is the file whose size is reported. See `measure_full_costs`."""
    named = {} if weights is None else {"model": weights}
    return measure_full_costs({"model": model}, named, repeats=repeats, precision=precision)["model"]


def measure_full_costs(
    models: Mapping[str, ClipModel],
    weights: Mapping[str, Path] | None = None,
    *,
    repeats: int = _FULL_REPEATS,
    precision: Precision = "fp32",
) -> dict[str, FullCost]:
    """The full costs of several models, one flat dict each, timed in turns as in `measure_costs`.

    params, params_image, params_text    parameters of the model, the image tower, the text tower (the logit scale is in
                                         neither tower)
    bytes                                size of the weight file, if `weights` names one
    flops_image                          FLOPs of one picture at the model's input size
    flops_text_77, flops_text_248        FLOPs of one caption of 77 and 248 tokens, start and end included
    image_ms_b1, image_ms_b32            milliseconds for a whole batch of 1 and of 32 pictures
    text_77_ms_b1, text_77_ms_b32, text_248_ms_b1, text_248_ms_b32     the same for captions
    peak_bytes_b1, peak_bytes_b32        memory of the weights plus the peak of tensors alive in one call, without its
                                         input; the larger of pictures and the longest captions above that fit
    image_size, context_length           pixels, tokens
    precision, repeats, device, machine, threads, torch     how and where it was measured

    FLOPs count multiplications and additions: twice the multiply-accumulates (MACs) that some papers call FLOPs. They
    cover matrix products, convolutions and attention as computed, masked or not, but not norms, activations and
    additions. Lengths beyond the model's context are None. Tensor memory is torch's own count, the same on CPU and
    GPU; Python, the libraries and the temporary memory of kernels come on top.
    """
    calls = {name: _full_calls(model) for name, model in models.items()}
    milliseconds = _milliseconds(models, calls, repeats, precision)
    costs: dict[str, FullCost] = {}
    for name, model in models.items():
        one = calls[name]
        with evaluation_mode(model, precision):
            peaks = {f"peak_bytes_b{batch}": _peak_bytes(model, batch) for batch in BATCH_SIZES}
            flops = {
                "flops_image": _flops(one["image_ms_b1"]),
                **{f"flops_text_{length}": _flops(one.get(f"text_{length}_ms_b1")) for length in FULL_CAPTION_TOKENS},
            }
        costs[name] = {
            **_parameters_by_tower(model),
            "bytes": weights[name].stat().st_size if weights and name in weights else None,
            **flops,
            **{key: milliseconds[name].get(key) for key in _time_keys()},
            **peaks,
            "image_size": model.image_size,
            "context_length": model.context_length,
            "precision": precision,
            "repeats": repeats,
            **_machine(model_device(model)),
        }
    return costs


def _time_keys() -> list[str]:
    inputs = ["image", *(f"text_{length}" for length in FULL_CAPTION_TOKENS)]
    return [f"{name}_ms_b{batch}" for name in inputs for batch in BATCH_SIZES]


def _full_calls(model: ClipModel) -> Calls:
    """The calls to time, by the key of their time; lengths beyond the model's context are left out."""
    calls: Calls = {}
    for batch in BATCH_SIZES:
        calls[f"image_ms_b{batch}"] = _image_call(model, batch)
        for length in FULL_CAPTION_TOKENS:
            if length <= model.context_length:
                calls[f"text_{length}_ms_b{batch}"] = _text_call(model, batch, length)
    return calls


def _image_call(model: ClipModel, batch: int) -> Callable[[], Tensor]:
    own_generator = torch.Generator().manual_seed(0)  # timing must not change torch's random state
    pictures: Float[Tensor, "B 3 R R"] = torch.rand(
        batch, 3, model.image_size, model.image_size, generator=own_generator
    ).to(model_device(model))
    return lambda: model.encode_image(pictures)


def _text_call(model: ClipModel, batch: int, num_tokens: int) -> Callable[[], Tensor]:
    captions = [_caption(model, num_tokens)] * batch
    tokens: Int[Tensor, "B L"] = model.tokenizer(captions, model.context_length).to(model_device(model))
    return lambda: model.encode_text(tokens)


def _caption(model: ClipModel, num_tokens: int) -> str:
    """A caption of exactly `num_tokens` tokens: a word that would make it too long is skipped for a shorter one."""
    words, caption = _SENTENCE.split(), ""
    for index in range(4 * num_tokens):
        longer = f"{caption} {words[index % len(words)]}".strip()
        count = model.tokenizer.count_tokens(longer)
        if count <= num_tokens:
            caption = longer
        if count == num_tokens:
            return caption
    raise InputError(f"common words give no caption of exactly {num_tokens} tokens with the model's tokenizer")


def _milliseconds(
    models: Mapping[str, ClipModel], calls: Mapping[str, Calls], repeats: int, precision: Precision
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each call of each model; the models take turns."""
    if repeats < 1:
        raise InputError(f"measuring a cost needs 1 or more repeats, got {repeats}")
    seconds: dict[str, dict[str, list[float]]] = {name: {key: [] for key in calls[name]} for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            with evaluation_mode(model, precision):
                for key, call in calls[name].items():
                    seconds[name][key].append(_seconds(call, model_device(model)))
    return {name: {key: median(values) * 1e3 for key, values in seconds[name].items()} for name in models}


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


def _flops(call: Callable[[], Tensor] | None) -> int | None:
    return None if call is None else count_flops(call)


def count_flops(call: Callable[[], Tensor]) -> int:
    """Twice the multiply-accumulates of a call, gradients included. Attention runs as plain products, which every torch
    version counts."""
    was_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused operator that no counter knows
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=_CORRECTED) as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fused)
    return counter.get_total_flops()


def _convolution_backward_flops(
    grad_shape: Sequence[int], _: Sequence[int], weight_shape: Sequence[int], *others: Any, **more: Any
) -> int:
    """The gradients of input and weights cost as much as the convolution itself, each if it is asked for. torch counts
    those of grouped weights as if there were one group: 512 times too many for 512 channels of one each."""
    mask = more["output_mask"] if "output_mask" in more else others[-1]
    return sum(mask[:2]) * 2 * math.prod(grad_shape) * math.prod(weight_shape[1:])


_CORRECTED = {torch.ops.aten.convolution_backward: _convolution_backward_flops}


def _peak_bytes(model: ClipModel, batch: int) -> int | None:
    """Bytes of the weights plus the peak of one call: the larger of pictures and the longest captions."""
    fitting = [length for length in FULL_CAPTION_TOKENS if length <= model.context_length]
    calls = [_image_call(model, batch)] + [_text_call(model, batch, length) for length in fitting[-1:]]
    peaks = [_peak_of_call(call, model_device(model)) for call in calls]
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    known = [peak for peak in peaks if peak is not None]
    return held + max(known) if known else None


def _peak_of_call(call: Callable[[], Tensor], device: torch.device) -> int | None:
    """Peak bytes that torch's allocator hands out during a call, beyond those it had handed out before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler's lines off stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocated = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    return max(allocated, default=None)


def _parameters_by_tower(model: ClipModel) -> dict[str, float]:
    image: nn.Module = model.image_encoder if isinstance(model, MobileCLIP) else model.visual
    clip = model.clip if isinstance(model, OpenClipModel) else model
    of_neither = [clip.logit_scale] + ([clip.logit_bias] if getattr(clip, "logit_bias", None) is not None else [])
    total, of_image = _num_parameters(model), _num_parameters(image)
    of_text = total - of_image - sum(parameter.numel() for parameter in of_neither)
    return {"params": total, "params_image": of_image, "params_text": of_text}


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _machine(device: torch.device) -> dict[str, float | str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": str(device),
        "machine": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """The processor's name; on Linux only a file has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def threads_in_words(number: int) -> str:
    """A number of threads, as tables and pages say it."""
    return f"{number} thread{'s' * (number != 1)}"
