"""Losses between matched layers: the plain formulas, what is compared, and two processes against one.

Run as a program (OUT, under torchrun's environment variables) it is one of the processes of that last test.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from eval.base.processes import start
from longclip_teacher import create_teacher
from longclip_teacher.errors import InputError
from longclip_teacher.text import EOT
from longclip_teacher.trace import Trace
from mobileclip_student import create_student
from mobileclip_student.text_encoder import TextConfig, TextTransformer
from plain_layers import (
    LENGTHS,
    STUDENT,
    TEACHER,
    plain_score_kl,
    plain_score_mse,
    plain_scores,
    plain_token_mse,
    random_trace,
)
from ranks import run_ranks
from training.layer_losses import (
    LayerMaps,
    TowerShape,
    layer_losses,
    layer_pairs,
    layer_sums,
    match_layers,
    student_shape,
    sum_parts,
    teacher_shape,
)
from training.losses.intermediate import LossSum
from training.losses.table import LOSSES
from training.settings.losses import LossOptions
from training.settings.needs import needs_of

NAMES = [loss.name for loss in LOSSES if loss.family == "layer"]


class LayerLosses(nn.Module):
    """Matched layers and their maps, as the Distiller holds them, with the losses on top."""

    def __init__(self, options: LossOptions, tower: str, student: TowerShape, teacher: TowerShape) -> None:
        super().__init__()
        self.options = options
        self.match = match_layers(needs_of(options).layer_losses[tower], options, tower, student, teacher)
        self.map = LayerMaps(self.match)

    def forward(self, student: Trace, teacher: Trace) -> dict[str, Tensor]:
        return layer_losses(self.match, self.options, self.map(student), teacher)

    def sums(self, student: Trace, teacher: Trace) -> dict[str, LossSum]:
        return layer_sums(self.match, self.options, self.map(student), teacher)


def options(**settings: float | str | bool) -> LossOptions:
    """All weights at 0 but those given."""
    return replace(LossOptions(clip_long=1e-9, clip_short=0, crd_long=0, crd_short=0), **settings)  # type: ignore[arg-type]


def all_on(tower: str = "text", **settings: float | str | bool) -> LossOptions:
    return options(**{f"{name}_{tower}": 1.0 for name in NAMES}, **settings)


@pytest.mark.parametrize("causal", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("value_kind", ["kl", "mse"])
def test_module_against_the_plain_formulas(causal: tuple[bool, bool], value_kind: str) -> None:
    torch.manual_seed(0)
    losses = LayerLosses(all_on(value_kind=value_kind), "text", STUDENT, TEACHER).double()
    student = random_trace(STUDENT, 0, causal=causal[0])
    teacher = random_trace(TEACHER, 1, causal=causal[1])
    found = losses(student, teacher)
    lower = any(causal)
    pairs = [(0, 1), (1, 3)]

    def mapped(name: str, x: Tensor) -> np.ndarray:
        layer = losses.map.maps[name]
        assert isinstance(layer, nn.Linear)
        return x.numpy() @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()

    def scores(trace: Trace, left: str, right: str, layer: int) -> np.ndarray:
        return plain_scores(getattr(trace, left)[layer].numpy(), getattr(trace, right)[layer].numpy())

    attention = [(scores(student, "query", "key", i), scores(teacher, "query", "key", j)) for i, j in pairs]
    values = [(scores(student, "value", "value", i), scores(teacher, "value", "value", j)) for i, j in pairs]
    of_values = plain_score_kl if value_kind == "kl" else plain_score_mse
    expected = {
        "hidden_text": np.mean(
            [plain_token_mse(mapped("hidden", student.hidden[i]), teacher.hidden[j].numpy(), LENGTHS) for i, j in pairs]
        ),
        "attention_text": np.mean([plain_score_mse(*pair, LENGTHS, lower) for pair in attention]),
        "attention_probs_text": np.mean([plain_score_kl(*pair, LENGTHS, lower) for pair in attention]),
        "value_text": np.mean([of_values(*pair, LENGTHS, lower) for pair in values]),
        "embedding_text": plain_token_mse(mapped("embedding", student.embedding), teacher.embedding.numpy(), LENGTHS),
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-12), name


def test_only_what_is_on_is_computed_and_learned() -> None:
    student, teacher = random_trace(STUDENT, 0), random_trace(TEACHER, 1)
    losses = LayerLosses(options(hidden_text=1.0, attention_image=1.0), "text", STUDENT, TEACHER).double()
    assert set(losses(student, teacher)) == {"hidden_text"} and set(losses.map.maps) == {"hidden"}
    same = LayerLosses(all_on(), "text", STUDENT, replace(TEACHER, width=STUDENT.width))
    assert not list(same.parameters())


def test_embedding_with_and_without_positions() -> None:
    student, teacher = random_trace(STUDENT, 0), random_trace(STUDENT, 1)
    for positions, name in ((True, "embedding"), (False, "tokens")):
        wanted = options(embedding_text=1.0, embedding_positions=positions)
        found = LayerLosses(wanted, "text", STUDENT, STUDENT)(student, teacher)["embedding_text"]
        ours, theirs = getattr(student, name).numpy(), getattr(teacher, name).numpy()
        assert found.item() == pytest.approx(plain_token_mse(ours, theirs, LENGTHS), rel=1e-12)


def test_a_caption_that_one_model_has_cut_is_compared_up_to_its_end() -> None:
    """The student reads 4 tokens: captions of 5 and 7 end in EOT there, where the teacher goes on."""
    student = random_trace(STUDENT, 0, lengths=(4, 1, 4, 3))
    teacher = random_trace(STUDENT, 1)
    for ours, theirs in ((student, teacher), (teacher, student)):
        found = LayerLosses(options(hidden_text=1.0, layer_map="last"), "text", STUDENT, STUDENT)(ours, theirs)
        expected = plain_token_mse(ours.hidden[1].numpy(), theirs.hidden[1].numpy(), (3, 1, 3, 3))
        assert found["hidden_text"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("prefix", [(1, 1), (2, 1)], ids=str)
def test_pictures_are_compared_at_the_tokens_both_have(prefix: tuple[int, int]) -> None:
    student, teacher = (random_trace(STUDENT, seed, prefix=number) for seed, number in enumerate(prefix))
    found = LayerLosses(all_on("image"), "image", STUDENT, STUDENT)(student, teacher)
    firsts = (0, 0) if prefix == (1, 1) else prefix
    lengths = (5 if prefix == (1, 1) else 4,) * 4

    def both(name: str) -> list[np.ndarray]:
        pairs = zip((student, teacher), firsts, strict=True)
        return [getattr(trace, name)[1][..., first:, :].numpy() for trace, first in pairs]

    hidden = np.mean(
        [
            plain_token_mse(s[:, firsts[0] :].numpy(), t[:, firsts[1] :].numpy(), lengths)
            for s, t in zip(student.hidden, teacher.hidden, strict=True)
        ]
    )
    assert found["hidden_image"].item() == pytest.approx(hidden, rel=1e-12)
    last = LayerLosses(options(attention_probs_image=1.0, layer_map="last"), "image", STUDENT, STUDENT)
    scores = [plain_scores(query, key) for query, key in zip(both("query"), both("key"), strict=True)]
    expected = plain_score_kl(*scores, lengths, False)
    assert last(student, teacher)["attention_probs_image"].item() == pytest.approx(expected, rel=1e-12)


def test_pictures_in_different_grids_are_refused() -> None:
    student, teacher = random_trace(STUDENT, 0, prefix=1), random_trace(STUDENT, 1, prefix=1)
    teacher.valid, teacher.num_prefix_tokens = torch.ones(4, 10).bool(), 1
    with pytest.raises(InputError, match="4 patches and the teacher into 9"):
        LayerLosses(options(hidden_image=1.0), "image", STUDENT, STUDENT)(student, teacher)


@pytest.mark.parametrize(
    ("layer_map", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, [(1, 3), (2, 6), (3, 9), (4, 12)]),
        ("uniform", 3, 3, [(1, 1), (2, 2), (3, 3)]),
        ("uniform", 3, 4, [(1, 2), (2, 3), (3, 4)]),
        ("uniform", 4, 2, [(1, 1), (2, 1), (3, 2), (4, 2)]),
        ("last", 4, 12, [(4, 12)]),
        ("1:3,2:6", 4, 12, [(1, 3), (2, 6)]),
    ],
)
def test_layer_pairs(layer_map: str, student: int, teacher: int, expected: list[tuple[int, int]]) -> None:
    assert layer_pairs(layer_map, student, teacher) == expected


@pytest.mark.parametrize(
    ("layer_map", "message"),
    [
        ("first", "uniform, last or pairs such as 1:3,2:6, not 'first'"),
        ("1:3,", "not '1:3,'"),
        ("1-3", "not '1-3'"),
        ("", "not ''"),
        ("5:3", "has 5:3, but the student has layers 1 to 4 and the teacher 1 to 12"),
        ("1:0", "has 1:0"),
        ("1:13", "has 1:13"),
        ("1:3,1:3", "names a pair of layers twice"),
    ],
)
def test_bad_layer_maps_are_refused_in_one_line(layer_map: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        LayerLosses(options(hidden_text=1, layer_map=layer_map), "text", TowerShape(4, 8, 2), TowerShape(12, 8, 2))
    assert "\n" not in str(error.value)


def test_heads_that_do_not_match_are_refused_with_the_way_out() -> None:
    other = replace(TEACHER, heads=2)
    for name in ("attention", "attention_probs", "value"):
        with pytest.raises(InputError, match=r"4 heads and the teacher's 2: .*--loss.head_match mean"):
            LayerLosses(options(**{f"{name}_text": 1.0}), "text", STUDENT, other)
    losses = LayerLosses(all_on(head_match="mean"), "text", STUDENT, other).double()
    found = losses(random_trace(STUDENT, 0), random_trace(other, 1))
    assert all(value.isfinite() and value > 0 for value in found.values())
    LayerLosses(options(hidden_text=1.0, embedding_text=1.0), "text", STUDENT, other)  # no heads are compared


# With real towers


def captions(*lengths: int, eot: int = EOT) -> Tensor:
    tokens = torch.zeros(len(lengths), max(lengths) + 3, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    for row, length in zip(tokens, lengths, strict=True):
        row[1 : length - 1] = torch.randint(1, eot - 1, (length - 2,), generator=generator)
        row[0], row[length - 1] = eot - 1, eot
    return tokens


def test_shapes_are_those_of_the_traces() -> None:
    student, teacher = create_student("tiny").eval(), create_teacher("tiny").eval()
    tokens = captions(12, 5, 2)
    shapes = student_shape(student, "text"), teacher_shape(teacher, "text")
    with torch.no_grad():
        traces = student.text_encoder.traced(tokens)[1][0], teacher.trace_text(tokens)[1]
        size = teacher.image_size
        shapes += (teacher_shape(teacher, "image"),)
        traces += (teacher.trace_image(torch.rand(2, 3, size, size))[1],)
    for shape, trace in zip(shapes, traces, strict=True):
        assert len(trace.hidden) == shape.layers and trace.hidden[0].shape[2] == shape.width
        assert trace.query[0].shape[1] == shape.heads
    with pytest.raises(InputError, match=r"need a ViT, which tiny has not: choose --student.variant vit_s"):
        student_shape(student, "image")
    found = LayerLosses(all_on(head_match="mean"), "text", *shapes[:2])(*traces[:2])
    assert all(value.isfinite() and value > 0 for value in found.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_follows_one_loss_comes_close_to_its_teacher(name: str) -> None:
    torch.manual_seed(0)
    config = TextConfig(width=16, heads=2, layers=2, vocab_size=50)
    student = TextTransformer(replace(config, width=8), 8, context_length=8, pad_mask=True)
    teacher = TextTransformer(replace(config, causal=True), 8, context_length=8, pad_mask=True)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # attention as sharp as a trained model's
    losses = LayerLosses(options(**{f"{name}_text": 1.0}), "text", TowerShape(2, 8, 2), TowerShape(2, 16, 2))
    tokens = captions(8, 5, 2, 4, eot=49)
    with torch.no_grad():
        wanted = teacher.traced(tokens)[1][0]
    optimizer = torch.optim.Adam([*student.parameters(), *losses.parameters()], lr=2e-2)
    course = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = losses(student.traced(tokens)[1][0], wanted)[f"{name}_text"]
        loss.backward()
        optimizer.step()
        course.append(loss.item())
    assert course[-1] < 0.2 * course[0]


# Two processes


class Tower(nn.Module):
    """A linear tower in which everything that a trace holds depends on one parameter, under the losses."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.losses = LayerLosses(all_on(), "text", STUDENT, TEACHER)
        for parameter in self.losses.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 2, dtype=torch.float64))

    def forward(self, student: Trace, teacher: Trace) -> dict[str, Tensor]:
        return self.losses(
            replace(
                student,
                embedding=student.embedding * self.gain.repeat(4),
                hidden=[x * self.gain.repeat(4) for x in student.hidden],
                query=[x * self.gain for x in student.query],
                value=[x * self.gain for x in student.value],
            ),
            teacher,
        )


ROWS = (slice(0, 3), slice(3, 4))  # unequal shares of captions and of tokens


def share_of_batch(rows: slice) -> tuple[Trace, Trace]:
    """Rows of a fixed batch, trimmed to their longest caption; the student's attention is causal, the teacher's not."""
    length = max(LENGTHS[rows])
    cut = []
    for trace in (random_trace(STUDENT, 0, causal=True), random_trace(TEACHER, 1)):
        tensors = {name: getattr(trace, name)[rows, :length] for name in ("embedding", "tokens", "valid")}
        lists = {name: [x[rows, :length] for x in getattr(trace, name)] for name in ("hidden",)}
        lists |= {name: [x[rows, :, :length] for x in getattr(trace, name)] for name in ("query", "key", "value")}
        cut.append(replace(trace, **tensors, **lists))
    return cut[0], cut[1]


def losses_and_gradients(module: nn.Module, tower: Tower, rows: slice) -> dict[str, dict[str, Tensor]]:
    losses = module(*share_of_batch(rows))
    torch.stack([weight * value for weight, value in enumerate(losses.values(), start=1)]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in tower.named_parameters() if parameter.grad is not None}
    return {"losses": {name: value.detach() for name, value in losses.items()}, "gradients": gradients}


def main() -> None:
    with start("cpu") as runtime:
        tower = Tower()
        found = losses_and_gradients(DistributedDataParallel(tower), tower, ROWS[runtime.rank])
        with torch.no_grad():
            # chunks of one process count as processes do
            parts = [tower.losses.sums(*share_of_batch(ROWS[runtime.rank])) for _ in range(2)]
            found["sums"] = {name: torch.stack(part) for name, part in sum_parts(parts).items()}
        torch.save(found, f"{sys.argv[1]}.{runtime.rank}")


def test_two_processes_with_unequal_shares_equal_one(tmp_path: Path) -> None:
    run_ranks([__file__, str(tmp_path / "out")], 2)
    tower = Tower()
    expected = losses_and_gradients(tower, tower, slice(0, 4))
    assert len(expected["gradients"]) == 5  # two maps and the gain
    sums = {name: torch.stack(part) for name, part in tower.losses.sums(*share_of_batch(slice(0, 4))).items()}
    for rank in range(2):
        found = torch.load(tmp_path / f"out.{rank}", weights_only=True)
        for kind in ("losses", "gradients"):
            torch.testing.assert_close(found[kind], expected[kind], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found["sums"], {name: 2 * value for name, value in sums.items()})


if __name__ == "__main__":
    main()
