"""Faster ways to run the towers: image features for inference, and torch.compile for training.

Shapes: B images, R image side, D embedding.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from longclip_teacher.errors import InputError
from longclip_teacher.open_clip_parts import ResidualAttentionBlock
from longclip_teacher.packages import ONNX, missing_packages
from mobileclip_student.image_encoder import ImageEncoder
from mobileclip_student.model import MobileCLIP
from mobileclip_student.reparameterization import reparameterize
from mobileclip_student.repmixer import RepMixerBlock
from mobileclip_student.text_encoder import AttentionBlock

__all__ = ["BACKENDS", "Backend", "choose_backend", "compile_towers", "fast_image_encoder"]

Backend = Literal["auto", "eager", "compile", "onnxruntime"]
BACKENDS: tuple[Backend, ...] = ("auto", "eager", "compile", "onnxruntime")


def fast_image_encoder(
    student: MobileCLIP, backend: Backend = "auto"
) -> Callable[[Float[Tensor, "B 3 R R"]], Float[Tensor, "B D"]]:
    """The image tower of `student` as a function of normalised images for inference: float32, any B, no gradient.

    Features equal those of `student.eval()` to 1e-5 of their norm and are not normalised. The function runs a fused,
    frozen copy on the student's device; `student` itself does not change.

    backend  eager: PyTorch, channels last. compile: torch.compile with the weights as constants; needs a C++ compiler
             and half a minute for each new B. onnxruntime: CPU only, needs the extra `export`; uses as many threads as
             torch does at the call. auto: see choose_backend.

    Raises InputError for a backend that is unknown or cannot run here.
    """
    device = student.logit_scale.device
    if backend not in BACKENDS:
        raise InputError(f"no backend {backend!r}: choose {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = choose_backend(device)
    fused = reparameterize(student).image_encoder
    if backend == "onnxruntime":
        return _in_onnxruntime(fused, student.image_size, device)
    if backend == "compile":
        if device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            raise InputError("backend compile needs a C++ compiler: install g++, or choose eager")
        return _compiled(fused)
    return torch.no_grad()(fused)


def choose_backend(device: torch.device) -> Backend:
    """The backend that `auto` means: onnxruntime on a CPU if its packages are installed, otherwise eager."""
    return "onnxruntime" if device.type == "cpu" and not missing_packages(ONNX) else "eager"


def _compiled(tower: nn.Module) -> Callable[[Tensor], Tensor]:
    # freezing folds the weights and lays them out as constants
    compiled: Callable[[Tensor], Tensor] = torch.compile(tower, dynamic=False, options={"freezing": True})
    return torch.no_grad()(compiled)


def _in_onnxruntime(tower: nn.Module, image_size: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    if device.type != "cpu":
        raise InputError(
            f"backend onnxruntime runs on the CPU, but the student is on {device}: choose eager or compile"
        )
    if missing := missing_packages(ONNX):
        raise InputError(f"backend onnxruntime needs {', '.join(missing)}: pip install 'compact-longclip[export]'")
    from mobileclip_student.onnx_graphs import image_graph, onnx_encoder

    graph = image_graph(tower, image_size).SerializeToString()
    encode = onnx_encoder(graph, torch.get_num_threads())
    return lambda images: encode(images.detach().float().contiguous())


def compile_towers(model: nn.Module, mode: str | None = None) -> None:
    """Speed up a MobileCLIP or a LongCLIP with torch.compile, in place, for training or inference.

    Features and gradients change only by rounding. The image tower is compiled whole, for each batch size that occurs;
    the text tower is compiled block by block, for any length. Parameters keep their names (nn.Module.compile), so files
    and checkpoints stay the same. `mode` is torch.compile's; "reduce-overhead" replays the image tower as a CUDA graph,
    which needs batches of one size.
    """
    for name, tower in model.named_children():  # a teacher may be reduced to one tower
        if name in ("image_encoder", "visual"):
            trunk = tower.trunk if isinstance(tower, ImageEncoder) else tower  # every way of encoding runs the blocks
            trunk.compile(mode=mode)
            continue
        for block in tower.modules():
            if isinstance(block, (AttentionBlock, RepMixerBlock, ResidualAttentionBlock)):
                block.compile(dynamic=True)  # lengths change every step, and a CUDA graph cannot follow
