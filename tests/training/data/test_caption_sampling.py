"""Sampled and shifted captions: what is kept, and the same for any number of workers and processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from longclip_teacher.text import EOT, SOT, caption_lengths
from shard_files import TOKENIZER, loader
from training.data.caption_sampling import padded_in_front, sample_caption, shifts
from training.data.randomness import sample_generator
from training.data.store import choose_sentences
from training.data.writer import caption_member, write_manifest, write_shard
from training.settings.captions import NO_SAMPLING, CaptionOptions

NUMBERS = ["Zero", "One", "Two", "Three", "Four", "Five"]
CAPTION = " ".join(f"{word} here." for word in NUMBERS)
SAMPLED = CaptionOptions(short="sampled")


def kept(options: CaptionOptions, draw: int, caption: str = CAPTION) -> list[int]:
    """The numbers of the sentences that a draw keeps, in its order."""
    found = sample_caption(caption, options, sample_generator(draw))
    numbers = [NUMBERS.index(word) for word in found.replace(" here.", "").split()]
    assert found == " ".join(f"{NUMBERS[number]} here." for number in numbers)
    return numbers


def test_the_first_sentence_goes_as_often_as_asked() -> None:
    assert not any(0 in kept(SAMPLED, draw) for draw in range(200))
    share = np.mean([0 not in kept(replace(SAMPLED, drop_first=0.25), draw) for draw in range(1000)])
    assert abs(share - 0.25) < 0.05
    assert all(kept(replace(SAMPLED, drop_first=0.0), draw)[0] == 0 for draw in range(50))


@pytest.mark.parametrize(
    ("keep", "drop_first", "numbers"),
    [
        ((0.0, 1.0), 1.0, {1, 2, 3, 4, 5}),
        ((0.0, 0.0), 1.0, {1}),  # something remains
        ((0.0, 0.0), 0.0, {1}),  # the first sentence alone
        ((1.0, 1.0), 1.0, {5}),
        ((1.0, 1.0), 0.0, {6}),
        ((0.4, 0.6), 1.0, {2, 3}),
    ],
)
def test_the_share_of_the_others(keep: tuple[float, float], drop_first: float, numbers: set[int]) -> None:
    options = replace(SAMPLED, keep=keep, drop_first=drop_first)
    found = [kept(options, draw) for draw in range(300)]
    assert {len(sentences) for sentences in found} == numbers
    assert all(sentences == sorted(set(sentences)) for sentences in found), "in order, each once"
    chosen = Counter(number for sentences in found for number in sentences if number)
    if chosen:
        assert max(chosen.values()) < 1.6 * min(chosen.values()), "the others are all alike"


def test_shuffling_changes_the_order_alone() -> None:
    shuffled = replace(SAMPLED, shuffle=True)
    orders = Counter(tuple(kept(replace(shuffled, keep=(1.0, 1.0)), draw)) for draw in range(300))
    assert len(orders) > 100  # of 120
    for draw in range(50):
        assert sorted(kept(shuffled, draw)) == kept(SAMPLED, draw)


def test_a_caption_of_one_sentence_stays() -> None:
    for caption in ("A red board", "一只狗。", "Mr. Smith, 3.5 m tall."):
        assert sample_caption(caption, replace(SAMPLED, shuffle=True), sample_generator(0)) == caption
    two = {sample_caption("It is red. It is wet.", SAMPLED, sample_generator(draw)) for draw in range(20)}
    assert two == {"It is wet."}


def test_single_sentences_are_drawn_alike_and_repeated_if_there_are_too_few() -> None:
    drawn = [choose_sentences(len(NUMBERS), 4, 0, (draw,)) for draw in range(300)]
    assert all(len(set(sentences)) == 4 for sentences in drawn)
    counts = Counter(sentence for sentences in drawn for sentence in sentences)
    assert set(counts) == set(range(len(NUMBERS))) and max(counts.values()) < 1.4 * min(counts.values())
    three = choose_sentences(2, 3, 0, (0,))
    assert set(three) == {0, 1} and three[0] == three[2]
    assert choose_sentences(1, 3, 0, (0,)) == [0] * 3


def test_shifts_are_uniform_and_keep_eot_inside(captions_of: list[Tensor]) -> None:
    tokens = captions_of[0]
    lengths = caption_lengths(tokens)
    draws = np.random.default_rng(0).random((2000, len(tokens)))
    found = torch.stack([shifts(tokens, row.tolist(), 30, 40) for row in draws])
    for column, length in zip(found.T, lengths.tolist(), strict=True):
        largest = min(30, 40 - length)
        assert (column.min(), column.max()) == (0, largest)
        assert abs(column.double().mean() - largest / 2) < 0.1 * (largest + 1)


@pytest.fixture
def captions_of() -> list[Tensor]:
    return [TOKENIZER([CAPTION[:20], CAPTION, "a"], 40)]


def test_padding_stands_between_sot_and_the_text(captions_of: list[Tensor]) -> None:
    tokens = captions_of[0]
    shift = torch.tensor([3, 0, 37])
    padded = padded_in_front(tokens, shift)
    assert padded.shape == (3, 40)
    for row, source, moved in zip(padded, tokens, shift.tolist(), strict=True):
        text = source[1 : int(source.argmax()) + 1].tolist()
        assert row.tolist() == [SOT, *[0] * moved, *text, *[0] * (39 - moved - len(text))]
        assert text[-1] == EOT


# --- in the loader ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from shard_files import jpeg

    folder = tmp_path_factory.mktemp("sentences") / "shards"
    folder.mkdir()
    texts = [" ".join([f"Picture {i}.", *(f"Thing {k} of {i}." for k in range(1 + i % 6))]) for i in range(40)]
    members = [(f"{i:03d}", {"jpg": jpeg(i), "json": caption_member(text)}) for i, text in enumerate(texts)]
    write_manifest(
        folder, [write_shard(folder / "a.tar", members[:25]), write_shard(folder / "b.tar", members[25:])], {}
    )
    return folder


ALL_ON = CaptionOptions("sampled", long_from_epoch=1, drop_first=0.5, keep=(0.2, 0.8), shuffle=True, max_shift=20)


def rows(batches: object, length: int = 248) -> list[tuple[list[int], ...]]:
    """Tokens and shifts of the samples, whatever the batches."""
    found = []
    for batch in batches:  # type: ignore[attr-defined]
        reads_sub = batch.sub_tokens is not None
        for row in range(len(batch.keys)):
            shift = [-1 if shift is None else int(shift[row]) for shift in (batch.long_shift, batch.short_shift)]
            ids = (tokens[row][tokens[row] > 0].tolist() for tokens in (batch.long_tokens, batch.short_tokens))
            found.append((*ids, batch.sub_tokens[row].flatten().tolist() if reads_sub else [], shift))
    return found


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (1, 4), (2, 0), (2, 1)])
def test_captions_do_not_depend_on_workers_and_processes(shards: Path, world_size: int, num_workers: int) -> None:
    options = {"sampling": ALL_ON, "reads_sub": True, "trim_captions": False}
    whole = loader(shards, **options)
    parts = [
        loader(shards, **options, rank=rank, world_size=world_size, num_workers=num_workers)
        for rank in range(world_size)
    ]
    for epoch, step in ((0, 0), (1, 0), (1, 3)):  # the last as after a resumption
        expected = rows(whole.batches(epoch))[step * 8 :]
        by_rank = [
            rows([batch]) for part in zip(*(part.batches(epoch, step) for part in parts), strict=True) for batch in part
        ]
        assert [row for batch in by_rank for row in batch] == expected
        assert any(shift > 0 for *_, (_, shift) in expected)
        assert all((long < 0) == (epoch == 0) for *_, (long, _) in expected), "the long caption is full at first"


def test_off_the_section_is_not_entered(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions are as the shards hold them, and nothing of this section draws a number."""
    for name in ("sample_caption", "split_sentences", "shifts", "padded_in_front"):
        monkeypatch.setattr(f"training.data.samples.{name}", lambda *_: pytest.fail("the section is off"))
    drawn: list[tuple[int, ...]] = []

    def counted(*key: int) -> np.random.Generator:
        drawn.append(key)
        return sample_generator(*key)

    monkeypatch.setattr("training.data.samples.sample_generator", counted)
    for batch in loader(shards).batches(1):
        texts = [
            " ".join([f"Picture {i}.", *(f"Thing {k} of {i}." for k in range(1 + i % 6))]) for i in map(int, batch.keys)
        ]
        for tokens, expected in (
            (batch.long_tokens, TOKENIZER(texts, 248)),
            (batch.short_tokens, TOKENIZER([f"Picture {int(key)}" for key in batch.keys], 248)),
        ):
            assert torch.equal(tokens, expected[:, : tokens.shape[1]]) and not expected[:, tokens.shape[1] :].any()
        assert batch.long_shift is None and batch.short_shift is None
    assert drawn and {key[-1] for key in drawn} == {0}, "crops alone"


def test_off_changes_nothing_and_each_option_only_its_own(shards: Path) -> None:
    plain = rows(loader(shards).batches(1))
    assert plain == rows(loader(shards, sampling=NO_SAMPLING).batches(1))
    assert all(shift == [-1, -1] for *_, shift in plain)
    sampled = rows(loader(shards, sampling=SAMPLED).batches(1))
    shifted = rows(loader(shards, sampling=replace(SAMPLED, max_shift=20)).batches(1))
    assert [row[0] for row in sampled] == [row[0] for row in plain], "long captions are in full"
    assert [row[:2] for row in sampled] == [row[:2] for row in shifted]
    assert sum(row[1] != other[1] for row, other in zip(sampled, plain, strict=True)) > 30
    assert sampled != rows(loader(shards, sampling=SAMPLED).batches(2)), "each epoch draws anew"


def test_the_first_sentence_has_its_full_stop(shards: Path) -> None:
    for batch in loader(shards, sampling=CaptionOptions(short="first")).batches(0):
        for key, tokens in zip(batch.keys, batch.short_tokens, strict=True):
            assert (
                tokens[tokens > 0].tolist()
                == TOKENIZER([f"Picture {int(key)}."], 248)[0][: int(tokens.argmax()) + 1].tolist()
            )


def test_single_sentences_are_those_of_the_full_caption(shards: Path) -> None:
    """They stay the same if the long caption is sampled, and they change no other draw."""
    for sampling in (NO_SAMPLING, replace(ALL_ON, sub_captions=2)):
        without = rows(loader(shards, sampling=sampling).batches(1))
        batches = list(loader(shards, sampling=sampling, reads_sub=True).batches(1))
        assert [(*row[:2], row[3]) for row in rows(batches)] == [(*row[:2], row[3]) for row in without]
        for batch in batches:
            assert batch.sub_tokens is not None and batch.sub_tokens.shape[:2] == (8, sampling.sub_captions)
            for key, tokens in zip(batch.keys, batch.sub_tokens, strict=True):
                number = int(key)
                texts = [f"Picture {number}.", *(f"Thing {k} of {number}." for k in range(1 + number % 6))]
                known = {tuple(row[row > 0].tolist()) for row in TOKENIZER(texts, 248)}
                drawn = {tuple(row[row > 0].tolist()) for row in tokens}
                assert drawn <= known and len(drawn) == min(sampling.sub_captions, len(texts))


def test_a_teacher_in_training_gets_padding_in_front(shards: Path) -> None:
    options = CaptionOptions(max_shift=20)
    for_student = next(loader(shards, sampling=options, shifted_length=60).batches(0))
    for_teacher = next(loader(shards, sampling=options, shifted_length=60, pads_in_front=True).batches(0))
    assert for_teacher.short_shift is None and for_student.short_shift is not None
    expected = padded_in_front(for_student.short_tokens, for_student.short_shift)
    width = int(caption_lengths(expected).max())
    assert torch.equal(for_teacher.short_tokens, expected[:, :width])
    assert torch.equal(for_teacher.long_tokens, for_student.long_tokens)
