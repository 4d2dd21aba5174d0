"""Accumulation by cached features: one big batch, not many small ones."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longclip_teacher.text import EOT, SOT
from mobileclip_student import create_student
from mobileclip_student.model import variant_config
from training.data.samples import Batch
from training.distill import Distiller
from training.distillation import assemble
from training.features import Features
from training.objective import Objective
from training.settings.losses import LossOptions
from training.settings.needs import needs_of
from training.step import backward_step, seed_everything

OPTIONS = LossOptions(pca_rank=4, crd_long=0, crd_short=0)
OBJECTIVE = Objective(OPTIONS, needs_of(OPTIONS, with_teacher=False))
CHUNKS, BATCH_SIZE = 3, 24
KEY = (7, 1)


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(0)

    def captions(length: int) -> Tensor:
        tokens = torch.randint(1, SOT, (BATCH_SIZE, length), generator=generator)
        tokens[:, 0] = SOT
        ends = torch.randint(3, length, (BATCH_SIZE,), generator=generator)
        tokens[torch.arange(length) == ends[:, None]] = EOT
        tokens[torch.arange(length) > ends[:, None]] = 0
        return tokens

    return Batch(
        images=torch.randint(0, 256, (BATCH_SIZE, 3, 48, 48), generator=generator, dtype=torch.uint8),
        teacher_images=(),
        long_tokens=captions(30),
        short_tokens=captions(9),
        keys=[str(number) for number in range(BATCH_SIZE)],
        draws=[(0, number) for number in range(BATCH_SIZE)],
        skipped={},
    )


def _distiller(drop_path: float) -> Distiller:
    torch.manual_seed(0)
    config = variant_config("tiny")
    student = create_student(replace(config, image=replace(config.image, drop_path=drop_path), context_length=40))
    return assemble(student, None, OPTIONS).distiller


def _step(distiller: Distiller, accumulation: int) -> dict[str, Tensor]:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return backward_step(
        distiller, _batch(), OBJECTIVE, None, precision="fp32", accumulation=accumulation, scaler=scaler, key=KEY
    )


def _grads(distiller: Distiller) -> dict[str, Tensor]:
    grads = {name: parameter.grad for name, parameter in distiller.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return {name: grad for name, grad in grads.items() if grad is not None}


def _joined_by_hand(distiller: Distiller) -> dict[str, Tensor]:
    """The same chunks in order, all graphs kept, one loss, one backward."""
    size = BATCH_SIZE // CHUNKS
    parts = []
    for number in range(CHUNKS):
        chunk = _batch().rows(slice(number * size, (number + 1) * size))
        seed_everything(*KEY, number)
        outputs = distiller(chunk.images, chunk.long_tokens, chunk.short_tokens)
        parts.append(outputs.features)
    batch = _batch()
    losses = OBJECTIVE(replace(outputs, features=Features.joined(parts)), None, batch.long_tokens, batch.short_tokens)
    losses["loss"].backward()
    return losses


def test_float32_chunks_equal_one_batch_in_eval_mode() -> None:
    whole = _distiller(0.0).eval()
    chunked = deepcopy(whole)
    losses, reference = _step(chunked, CHUNKS), _step(whole, 1)
    torch.testing.assert_close(losses, reference, rtol=1e-5, atol=0)
    expected = _grads(whole)
    length = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in _grads(chunked).items():
        assert (grad - expected[name]).norm() < 1e-5 * length, name
        if expected[name].norm() > 1e-3 * length:  # others are below float32's resolution of the sum
            assert (grad - expected[name]).norm() < 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_in_training_the_replay_is_the_first_pass(drop_path: float) -> None:
    """Statistics of each chunk, dropped paths of each chunk: gradients are those of all chunks held in one graph, and
    the running statistics move once a chunk."""
    by_hand = _distiller(drop_path).double().train()
    chunked = deepcopy(by_hand)
    untouched = {name: value.clone() for name, value in chunked.named_buffers()}
    losses, reference = _step(chunked, CHUNKS), _joined_by_hand(by_hand)
    for name, value in reference.items():
        torch.testing.assert_close(losses[name], value.detach(), rtol=1e-12, atol=0)
    expected = _grads(by_hand)
    length = float(torch.stack([grad.norm() for grad in expected.values()]).norm())
    for name, grad in _grads(chunked).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12 * length, msg=name)

    buffers = dict(by_hand.named_buffers())
    moved = 0
    for name, value in chunked.named_buffers():
        torch.testing.assert_close(value, buffers[name], rtol=1e-12, atol=1e-12, msg=name)
        moved += not torch.equal(value, untouched[name])
        if name.endswith("num_batches_tracked"):
            assert value - untouched[name] == CHUNKS, name
    assert moved > 20


def test_dropped_paths_are_part_of_the_function() -> None:
    """If they were not, the test above could not tell one draw from another."""
    distiller = _distiller(0.5).double().train()
    loss = _step(deepcopy(distiller), CHUNKS)["loss"]
    plain = _distiller(0.0).double().train()
    assert (_step(plain, CHUNKS)["loss"] - loss).abs() > 1e-6
