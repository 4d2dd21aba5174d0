from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k

import eval.measures.recall
from eval.measures.recall import DirectionRanks, direction_metrics, recall_metrics, retrieval_ranks
from longclip_teacher.errors import InputError


def brute_force(queries: np.ndarray, candidates: np.ndarray, matches: list[set[int]]) -> tuple[list, list, list]:
    """Return both ranks and the ties by a loop over queries: place in a stable sort, 1 + strictly higher, best is
    tied."""
    ranks, best_case, tied = [], [], []
    for query, own in zip(queries, matches, strict=True):
        scores = [float(np.dot(query, candidate)) for candidate in candidates]
        order = sorted(range(len(scores)), key=lambda index: -scores[index])  # stable: the earlier of equals first
        best = max(scores[match] for match in own)
        ranks.append(1 + min(order.index(match) for match in own))
        best_case.append(1 + sum(score > best for score in scores))
        tied.append(any(score == best for index, score in enumerate(scores) if index not in own))
    return ranks, best_case, tied


def matches_of(owner: np.ndarray, num_images: int) -> tuple[list[set[int]], list[set[int]]]:
    """Return the captions of each picture, and the picture of each caption."""
    return [set(np.flatnonzero(owner == image).tolist()) for image in range(num_images)], [{int(i)} for i in owner]


def random_set(seed: int, num_images: int = 41, num_texts: int = 103) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return integers, so that many scores tie exactly. Captions of a picture lie anywhere; one picture has many."""
    rng = np.random.default_rng(seed)
    images, texts = rng.integers(-4, 5, (num_images, 4)), rng.integers(-4, 5, (num_texts, 4))
    owner = np.concatenate([np.arange(num_images), np.full(9, 5), rng.integers(0, num_images, num_texts)])[:num_texts]
    rng.shuffle(owner)
    return images, texts, owner


@pytest.mark.parametrize("tile", [(1, 1), (3, 1), (1, 5), (7, 16), (41, 103), (40, 102), (1024, 2048)])
@pytest.mark.parametrize("shuffled", [True, False])
def test_ranks_are_the_definition_with_ties_and_many_captions(
    tile: tuple[int, int], shuffled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval.measures.recall, "_TILE_IMAGES", tile[0])
    monkeypatch.setattr(eval.measures.recall, "_TILE_TEXTS", tile[1])
    images, texts, owner = random_set(seed=tile[0])
    owner = owner if shuffled else np.sort(owner)
    found = retrieval_ranks(torch.tensor(images), torch.tensor(texts), torch.tensor(owner))
    of_image, of_text = matches_of(owner, len(images))
    for ours, expected in (
        (found.i2t, brute_force(images, texts, of_image)),
        (found.t2i, brute_force(texts, images, of_text)),
    ):
        assert (ours.ranks.tolist(), ours.best_case.tolist(), ours.tied.tolist()) == expected
        assert ours.ranks.dtype == ours.best_case.dtype == torch.int64
        assert 0 < sum(expected[2]) < len(expected[2]) and expected[0] != expected[1], "ties, but not everywhere"


def test_metrics_summarise_the_ranks() -> None:
    images, texts, owner = random_set(seed=3)
    result = recall_metrics(torch.tensor(images), torch.tensor(texts), torch.tensor(owner))
    of_image, _ = matches_of(owner, len(images))
    ranks, best_case, tied = brute_force(images, texts, of_image)
    assert result["i2t"] == {
        **{f"r{k}": pytest.approx(100 * sum(rank <= k for rank in ranks) / 41) for k in (1, 5, 10)},
        "mean_rank": pytest.approx(np.mean(ranks)),
        "median_rank": pytest.approx(np.median(ranks)),
        "tied": pytest.approx(100 * np.mean(tied)),
        "best_case": {f"r{k}": pytest.approx(100 * sum(rank <= k for rank in best_case) / 41) for k in (1, 5, 10)},
    }
    assert any(result["t2i"][key] < best for key, best in result["t2i"]["best_case"].items())
    found = retrieval_ranks(torch.tensor(images), torch.tensor(texts), torch.tensor(owner))
    some = direction_metrics(found.i2t.select(torch.arange(41) < 4))
    assert some["mean_rank"] == pytest.approx(np.mean(ranks[:4])) and some["tied"] == 100 * np.mean(tied[:4])
    with pytest.raises(InputError, match="no queries"):
        direction_metrics(DirectionRanks(torch.empty(0), torch.empty(0), torch.empty(0)))


def tie_free(num_images: int = 90, num_texts: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    owner = torch.cat(
        [torch.arange(num_images), torch.randint(num_images, (num_texts - num_images,), generator=generator)]
    )
    images = F.normalize(torch.randn(num_images, 32, generator=generator), dim=-1)
    texts = F.normalize(images[owner] + torch.randn(num_texts, 32, generator=generator) * 0.35, dim=-1)
    return images, texts, owner


def test_recall_is_clip_benchmarks_on_tie_free_features() -> None:
    images, texts, owner = tie_free()
    result = recall_metrics(images, texts, owner)
    scores = texts @ images.T
    positive = owner[:, None] == torch.arange(len(images))
    for k in (1, 5, 10):  # as in its evaluate(): a hit if any match is among the first k
        theirs = (recall_at_k(scores, positive, k) > 0).double().mean() * 100
        assert result["t2i"][f"r{k}"] == pytest.approx(float(theirs), abs=1e-6)
        theirs = (recall_at_k(scores.T, positive.T, k) > 0).double().mean() * 100
        assert result["i2t"][f"r{k}"] == pytest.approx(float(theirs), abs=1e-6)
        assert 0 < float(theirs) < 100
    for way in ("i2t", "t2i"):
        assert result[way]["tied"] == 0
        assert result[way]["best_case"] == {key: result[way][key] for key in ("r1", "r5", "r10")}


def test_recall_is_long_clips_counting_on_tie_free_features() -> None:
    """Long-CLIP's evaluation counts, query by query, whether any match is among the k highest scores."""
    images, texts, owner = tie_free()
    result = recall_metrics(images, texts, owner)
    for k in (1, 5, 10):
        hits = 0
        for image in range(len(images)):
            highest = torch.argsort(texts @ images[image], descending=True)[:k]
            hits += any(int(owner[caption]) == image for caption in highest)
        assert result["i2t"][f"r{k}"] == pytest.approx(100 * hits / len(images), abs=1e-6)
        hits = 0
        for caption in range(len(texts)):
            highest = torch.argsort(images @ texts[caption], descending=True)[:k]
            hits += int(owner[caption]) in highest.tolist()
        assert result["t2i"][f"r{k}"] == pytest.approx(100 * hits / len(texts), abs=1e-6)


def test_equal_features_have_equal_scores_wherever_they_lie() -> None:
    """Real-valued copies lie in several uneven tiles: the edge of a tile must round like its middle."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(1, 512, generator=generator), dim=-1)
    text = F.normalize(torch.randn(1, 512, generator=generator), dim=-1)
    num_images, num_texts = 1024 + 37, 2 * 2048 + 301
    owner = torch.arange(num_texts) % num_images
    found = retrieval_ranks(image.repeat(num_images, 1), text.repeat(num_texts, 1), owner)
    assert found.i2t.tied.all() and found.t2i.tied.all()
    assert (found.i2t.best_case == 1).all() and (found.t2i.best_case == 1).all()
    assert torch.equal(found.i2t.ranks, torch.arange(1, num_images + 1))
    assert torch.equal(found.t2i.ranks, 1 + owner)


def test_a_collapsed_model_shows_in_the_ties() -> None:
    result = recall_metrics(torch.ones(6, 2), torch.ones(12, 2), torch.arange(12) // 2)
    for way in ("i2t", "t2i"):
        assert result[way]["r1"] == pytest.approx(100 / 6) and result[way]["tied"] == 100
        assert result[way]["best_case"]["r1"] == 100
    separate = recall_metrics(torch.eye(6), torch.eye(6).repeat_interleave(2, dim=0), torch.arange(12) // 2)
    assert separate["i2t"]["tied"] == separate["t2i"]["tied"] == 0  # two captions of one picture are not a tie


def test_of_captions_that_look_the_same_one_is_found() -> None:
    """A model cannot tell four captions of a family apart: 25% both ways, however well it tells families apart."""
    families = torch.eye(5).repeat_interleave(4, dim=0)  # [20,5]
    own = families + 0.1 * F.pad(torch.eye(4).repeat(5, 1), (0, 1))
    result = recall_metrics(own, families, torch.arange(20))
    assert result["i2t"]["r1"] <= 25 and result["t2i"]["r1"] <= 25
    assert result["i2t"]["best_case"]["r1"] > 75, "the rule that lets it win every tie"


def test_reduced_precision_of_the_caller_is_put_aside_and_left_as_it_was() -> None:
    images, texts, owner = tie_free()
    expected = retrieval_ranks(images, texts, owner)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = retrieval_ranks(images.requires_grad_(), texts, owner)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.i2t.ranks, expected.i2t.ranks) and torch.equal(found.t2i.ranks, expected.t2i.ranks)
    assert not found.t2i.tied.any()


@pytest.mark.parametrize("owner", [[0, 1, 1], [0, 1, 3], [0, 1, -1], []])
def test_every_picture_needs_a_caption(owner: list[int]) -> None:
    with pytest.raises(
        InputError, match="each of the 3 pictures needs a caption, and each caption one of the pictures"
    ):
        recall_metrics(torch.eye(3), torch.eye(3)[: len(owner)], torch.tensor(owner, dtype=torch.int64))


def test_features_that_are_not_finite_are_refused() -> None:
    texts = torch.eye(3)
    texts[1, 1] = torch.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        retrieval_ranks(torch.eye(3), texts, torch.arange(3))
