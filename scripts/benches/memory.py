"""memory: a large contrastive batch on one device with cached features (GradCache), and what takes the memory.

Shapes: B pairs of the global batch, c pairs of a chunk, D width of the teacher's features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from benches.measure import BenchOptions, Row, in_own_process, peak_memory_gb
from benches.step import FEATURE_WIDTH, Side, random_batch, with_random_features
from mobileclip_student import create_student
from training.data.store import TeacherInfo
from training.distill import Distiller
from training.distillation import assemble
from training.features import Features, LossParameters, Outputs
from training.settings.losses import LossOptions
from training.teachers import Teachers

__all__ = ["ChunkedDistiller", "bench_memory"]

STUDENT = "s0"
BATCH_SIZE = 8192
CHUNK, HALF_CHUNK = 64, 32
_CPU_CHUNKS = 2  # chunks that are run where all of them would take an hour


class ChunkedDistiller(nn.Module):
    """Runs the first `real_chunks` chunks of each pass and draws the features of the others at random.

    Every chunk takes the same memory and frees it, so the peak is that of running all chunks.
    """

    def __init__(self, distiller: Distiller, real_chunks: int) -> None:
        super().__init__()
        self.distiller, self.real_chunks = distiller, real_chunks
        self.chunks_seen = {False: 0, True: 0}
        """Calls so far, of the pass without a graph (False) and of the replay (True)."""

    def forward(self, images: Tensor, *others: Tensor | None) -> Outputs:
        """Features of one chunk and the linear logit scale. `others` are the further inputs of a Distiller."""
        replays = torch.is_grad_enabled()
        self.chunks_seen[replays] += 1
        if self.chunks_seen[replays] <= self.real_chunks:
            return self.distiller(images, *others)
        model = self.distiller.model
        scale = model.linear_logit_scale
        shape = (len(images), model.embed_dim)
        # plus nothing times the scale: a graph, so that the replay can push a gradient through it
        image, long, short = (normalize(torch.randn(shape, device=images.device), dim=-1) + 0 * scale for _ in range(3))
        return Outputs(Features(image, long, short), Features(), LossParameters(scale))


@dataclass
class _Peak:
    """Memory of one process in GB of 1e9 bytes."""

    before: float
    """Parameters, optimiser state and the batch; on a CPU also the libraries."""
    peak: float


def bench_memory(options: BenchOptions) -> Iterator[Row]:
    """Measure the peak of one S0 step at batch 8192 from stored features, and its parts. Only ours runs in chunks.

    The baseline's towers cannot run at this size. Their memory is 8192 times the slope between two measured sizes.
    """
    everything = BATCH_SIZE // CHUNK
    num_run = everything if options.device.type == "cuda" else _CPU_CHUNKS
    chunked = in_own_process(step_peak, STUDENT, BATCH_SIZE, everything, num_run, True, options)
    streaming = in_own_process(step_peak, STUDENT, BATCH_SIZE, everything, 0, True, options)
    full = in_own_process(step_peak, STUDENT, BATCH_SIZE, everything, 0, False, options)
    whole, half = (in_own_process(step_peak, STUDENT, size, 1, 1, True, options) for size in (CHUNK, HALF_CHUNK))

    a_sample = (whole.peak - half.peak) / (CHUNK - HALF_CHUNK)
    losses = [run.peak - run.before for run in (streaming, full)]
    model = create_student(STUDENT)
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e9
    pixels = BATCH_SIZE * 3 * model.image_size**2 / 1e9
    baseline = chunked.peak + a_sample * (BATCH_SIZE - CHUNK) + losses[1] - losses[0]
    parts = {
        "weights": (weights, weights),
        "gradients": (weights, weights),
        "AdamW's averages": (2 * weights, 2 * weights),
        "pictures of the batch, uint8": (pixels, pixels),
        f"activations, {CHUNK} pairs at a time (slope of {HALF_CHUNK} to {CHUNK})": (
            a_sample * CHUNK,
            a_sample * BATCH_SIZE,
        ),
        "losses, streamed against full matrices": (losses[0], losses[1]),
    }
    drawn = "" if num_run == everything else f", {num_run} of them run and the others random"
    yield _row(
        f"{STUDENT}, batch {BATCH_SIZE}, stored teacher: peak in {everything} chunks{drawn}; baseline extrapolated",
        (chunked.peak, baseline),
        chunked.peak,
    )
    for name, sizes in sorted(parts.items(), key=lambda part: -part[1][0]):
        yield _row(f"{name}: {sizes[0] / chunked.peak:.0%} of the peak", sizes, chunked.peak)


def _row(case: str, sizes: tuple[float, float], peak: float) -> Row:
    ours, baseline = sizes
    return Row(
        case=case,
        unit="GB",
        ours=ours,
        baseline=baseline,
        ratio=baseline / max(ours, 1e-6),
        max_abs_diff=None,
        peak_gb=peak,
    )


def step_peak(
    variant: str, batch_size: int, accumulation: int, real_chunks: int, streaming: bool, options: BenchOptions
) -> _Peak:
    """Measure one training step of a random student from stored features, with AdamW's state already allocated."""
    torch.manual_seed(0)
    device = options.device
    model = create_student(variant).to(device).train()
    batch = with_random_features(random_batch(batch_size, model.image_size)).to(device)
    teacher_info = TeacherInfo((FEATURE_WIDTH,), 100.0, model.context_length)
    options_of_losses = LossOptions(pca_rank=min(32, batch_size // 2))
    distillation = assemble(model, Teachers(stored=teacher_info), options_of_losses, streaming=streaming)
    module = ChunkedDistiller(distillation.distiller, real_chunks).to(device)
    side = Side(distillation, batch, options.precision, fused=True, module=module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    side.state.optimizer.step()  # allocates the averages
    side.state.optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = _peak_gb(device)
    side.step(accumulation)
    return _Peak(before, _peak_gb(device))


def _peak_gb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else peak_memory_gb()
