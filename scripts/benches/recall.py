"""recall: ranks both ways against a bare matmul. Shapes: N pictures, M captions, D embedding width."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benches.measure import BenchOptions, Row, in_own_process, medians, peak_memory_gb
from eval.measures.recall import retrieval_ranks

__all__ = ["bench_recall"]

RECALL_CASES = ((1000, 5000), (5000, 25000))
RECALL_FULL_CASES = ((31000, 155000),)  # all of Flickr30k, the largest protocol
RECALL_WIDTH = 512
_BLOCK_IMAGES, _BLOCK_TEXTS = 1024, 2048  # blocks of the bare matmul


def bench_recall(options: BenchOptions) -> Iterator[Row]:
    """Measure ranks both ways against a bare matmul."""
    for num_images, num_texts in RECALL_FULL_CASES if options.full else RECALL_CASES:
        yield in_own_process(recall_case, num_images, num_texts, options.rounds)


def recall_case(num_images: int, num_texts: int, rounds: int) -> Row:
    """Measure one size: random unit vectors, `num_texts / num_images` captions per picture."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(num_images, RECALL_WIDTH, generator=generator), dim=-1)
    texts = F.normalize(torch.randn(num_texts, RECALL_WIDTH, generator=generator), dim=-1)
    owner = torch.arange(num_texts) % num_images

    def bare_matmul() -> None:
        block = torch.empty(_BLOCK_IMAGES, _BLOCK_TEXTS)
        for rows in images.split(_BLOCK_IMAGES):
            for columns in texts.split(_BLOCK_TEXTS):
                torch.mm(rows, columns.T, out=block[: len(rows), : len(columns)])

    ours, baseline = medians([lambda: retrieval_ranks(images, texts, owner), bare_matmul], rounds)
    return Row(
        case=f"{num_images} x {num_texts}, D={RECALL_WIDTH}",
        unit="s",
        ours=ours,
        baseline=baseline,
        ratio=baseline / ours,
        max_abs_diff=None,  # the matmul's results are discarded; the tests compare ranks
        peak_gb=peak_memory_gb(),
    )
