"""Examples of retrieval: the right ranks, successes and failures, the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from eval.benchmarks.protocols import RetrievalSet, load_retrieval_set
from eval.measures.recall import retrieval_ranks
from eval.measures.retrieval_examples import pick_examples, retrieval_examples, worst_examples
from eval.measures.retrieval_set import EncodedSet, encode_retrieval_set


def test_known_colours_are_all_found(colour_model: torch.nn.Module, colour_folder: Path) -> None:
    found = load_retrieval_set("folder", colour_folder)
    examples = retrieval_examples(encode_retrieval_set(colour_model, found), num_examples=4, num_answers=3)
    assert len(examples) == 8
    assert [isinstance(example.query, Path) for example in examples] == [True] * 4 + [False] * 4
    for example in examples:
        assert example.is_success
        assert [answer.rank for answer in example.answers] == [1, 2, 3]
        assert [answer.is_right for answer in example.answers] == [True, False, False]
        image, caption = example.query, example.answers[0].content
        if isinstance(caption, Path):
            image, caption = caption, image
        assert Image.open(image).getpixel((0, 0)) == _colour_named(str(caption))
    again = retrieval_examples(encode_retrieval_set(colour_model, found), num_examples=4, num_answers=3)
    assert again == examples


def test_wrong_pairs_are_failures_and_the_right_answer_is_shown_last(
    colour_model: torch.nn.Module, colour_folder: Path
) -> None:
    found = load_retrieval_set("folder", colour_folder)
    shifted = RetrievalSet(found.name, found.images, found.captions[1:] + found.captions[:1], found.caption_image, "")
    examples = retrieval_examples(encode_retrieval_set(colour_model, shifted), num_examples=3, num_answers=1)
    assert len(examples) == 6
    for example in examples:
        assert not example.is_success
        assert [answer.is_right for answer in example.answers] == [False, True]
        assert example.answers[1].rank > 1


@pytest.mark.parametrize(("num_wrong", "expected_failures"), [(0, 0), (1, 1), (10, 3), (19, 5), (20, 6)])
def test_half_are_failures_as_far_as_there_are_such(num_wrong: int, expected_failures: int) -> None:
    features = torch.eye(20)
    queries = features.clone()
    queries[:num_wrong] = features[:num_wrong].roll(1, dims=1)  # these find their neighbour instead
    names = [str(index) for index in range(20)]
    examples = pick_examples(
        names, names, queries, features, torch.arange(20), torch.arange(20), num_examples=6, num_answers=2
    )
    failures = [example for example in examples if not example.is_success]
    assert len(examples) == 6
    assert len(failures) == expected_failures
    assert len({example.query for example in examples}) == 6


def test_ranks_are_those_of_the_similarities_and_any_own_caption_is_right() -> None:
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(12, 8, generator=generator), dim=1)
    captions = F.normalize(torch.randn(36, 8, generator=generator), dim=1)
    owner = torch.arange(36) // 3
    examples = pick_examples(
        [f"image {i}" for i in range(12)], [f"caption {j}" for j in range(36)], images, captions,
        torch.arange(12), owner, num_examples=12, num_answers=5,
    )  # fmt: skip
    assert len(examples) == 12
    for example in examples:
        query = int(str(example.query).split()[1])
        scores = {f"caption {j}": float(images[query] @ captions[j]) for j in range(36)}
        ranked = sorted(scores, key=scores.__getitem__, reverse=True)
        assert [answer.content for answer in example.answers[:5]] == ranked[:5]
        for answer in example.answers:
            assert ranked[answer.rank - 1] == answer.content
            assert answer.is_right == (int(str(answer.content).split()[1]) // 3 == query)
        assert any(answer.is_right for answer in example.answers)


def _colour_named(caption: str) -> tuple[int, int, int]:
    values = {"black": (0, 0, 0), "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    values |= {"yellow": (255, 255, 0), "purple": (255, 0, 255), "aqua": (0, 255, 255), "white": (255, 255, 255)}
    return values[caption.split()[1]]


def test_the_worst_are_the_queries_of_the_worst_ranks_each_picture_once() -> None:
    generator = torch.Generator().manual_seed(1)
    images = F.normalize(torch.randn(12, 8, generator=generator), dim=1)
    captions = F.normalize(torch.randn(36, 8, generator=generator), dim=1)
    owner = torch.arange(36) // 3
    paths, texts = [Path(f"{i}.png") for i in range(12)], [f"caption {j}" for j in range(36)]
    encoded = EncodedSet(paths, texts, images, captions, owner, 0, [])
    ranks = retrieval_ranks(images, captions, owner)
    examples = worst_examples(encoded, ranks, num_examples=3, num_answers=2)
    shown = [example.answers[-1].rank for example in examples]
    assert shown[:3] == sorted(ranks.i2t.ranks.tolist(), reverse=True)[:3]
    of_pictures = ranks.t2i.ranks.reshape(12, 3).amax(dim=1).tolist()
    assert shown[3:] == sorted(of_pictures, reverse=True)[:3]
    assert not any(example.is_success for example in examples)
    perfect = EncodedSet(paths, texts[:12], images, images, torch.arange(12), 0, [])
    assert worst_examples(perfect, retrieval_ranks(images, images, torch.arange(12)), num_examples=3) == []
