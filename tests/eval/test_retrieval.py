from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from torch import nn

import eval.retrieval
from eval.benchmarks.protocols import PROTOCOLS, load_retrieval_set
from eval.measures.retrieval_set import evaluate_retrieval
from eval.retrieval import print_table
from eval.towers.features import Encoding
from longclip_teacher.errors import InputError


def test_a_model_that_knows_colours_finds_every_board(colour_model: nn.Module, colour_folder: Path) -> None:
    colour_model.train()
    result = evaluate_retrieval(
        colour_model, load_retrieval_set("folder", colour_folder), Encoding(batch_size=3, num_workers=1)
    )
    assert colour_model.training
    assert (result["protocol"], result["num_images"], result["num_texts"]) == ("folder", 8, 8)
    assert (result["num_truncated"], result["num_unreadable"], result["count_mismatch"]) == (0, 0, None)
    for way in ("i2t", "t2i"):
        assert result[way] == {
            "r1": 100.0,
            "r5": 100.0,
            "r10": 100.0,
            "mean_rank": 1.0,
            "median_rank": 1.0,
            "tied": 0.0,
            "best_case": {"r1": 100.0, "r5": 100.0, "r10": 100.0},
        }


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_finds_them_too(precision: str, colour_model: nn.Module, colour_folder: Path) -> None:
    result = evaluate_retrieval(
        colour_model, load_retrieval_set("folder", colour_folder), Encoding(precision=precision)
    )
    assert result["i2t"]["r1"] == result["t2i"]["r1"] == 100


def test_captions_of_an_unreadable_picture_leave_with_it(
    colour_model: nn.Module, colour_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.towers.features.MAX_UNREADABLE_SHARE", 0.2)
    (colour_folder / "image" / "3.png").write_text("text in a picture's place")
    result = evaluate_retrieval(colour_model, load_retrieval_set("folder", colour_folder))
    assert (result["num_images"], result["num_texts"], result["num_unreadable"]) == (7, 7, 1)
    assert result["unreadable"] == [str(colour_folder / "image" / "3.png")]
    assert result["i2t"]["r1"] == result["t2i"]["r1"] == 100


def test_the_sha256_identifies_the_set(colour_model: nn.Module, colour_folder: Path) -> None:
    retrieval_set = load_retrieval_set("folder", colour_folder)
    before = evaluate_retrieval(colour_model, retrieval_set)["sha256"]
    assert before == retrieval_set.sha256 and len(before) == 64
    (colour_folder / "caption" / "3.txt").write_text("a green plank")
    assert evaluate_retrieval(colour_model, load_retrieval_set("folder", colour_folder))["sha256"] != before


def test_the_table_shows_the_figures_if_every_tie_were_won(
    colour_model: nn.Module, colour_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(evaluate_retrieval(colour_model, load_retrieval_set("folder", colour_folder)))
    assert "tie" not in capsys.readouterr().out
    for number in (1, 2, 3, 4):  # four boards that read the same
        (colour_folder / "caption" / f"{number}.txt").write_text("a white board")
        Image.new("RGB", (20, 12), "white").save(colour_folder / "image" / f"{number}.png")
    print_table(evaluate_retrieval(colour_model, load_retrieval_set("folder", colour_folder)))
    notes = capsys.readouterr().out
    assert "62% of the queries tie with a wrong candidate" in notes  # five of eight: the eighth is white too
    assert "if every tie were won (do not report these): image to text 100.0, 100.0, 100.0; text to image" in notes


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["retrieval.py", *arguments])
    eval.retrieval.main()


def test_verify_comes_before_the_figures(
    colour_model: nn.Module,
    colour_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("eval.towers.models.load_model", lambda *args, **kwargs: colour_model)
    cache, out = tmp_path / "cache", tmp_path / "out.json"
    options = ["--checkpoint", "any", "--protocol", "folder", "--root", str(colour_folder), "--device", "cpu"]
    options += ["--num-workers", "0", "--cache-dir", str(cache), "--json", str(out)]
    files = sorted(colour_folder.rglob("*.png"))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(colour_folder)}\n" for path in files]
    (colour_folder / "SHA256SUMS").write_text("".join(lines))
    command(monkeypatch, *options, "--verify")
    assert "8 files match SHA256SUMS" in capsys.readouterr().err
    first = json.loads(out.read_text())
    assert first["i2t"]["r1"] == 100 and len(list(cache.iterdir())) == 2
    command(monkeypatch, *options)
    assert "pictures: features from the cache\ncaptions: features from the cache" in capsys.readouterr().err
    assert json.loads(out.read_text()) == first
    (colour_folder / "image" / "3.png").write_bytes(b"another picture")
    with pytest.raises(InputError, match="1 of 8 files differ"):
        command(monkeypatch, *options, "--verify")


def test_list_explains_every_protocol(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command(monkeypatch, "--protocol", "list")
    printed = " ".join(capsys.readouterr().out.split())
    for protocol in PROTOCOLS.values():
        for text in (protocol.name, protocol.about, protocol.caption_rule, protocol.one_to_many, protocol.compare):
            assert " ".join(text.split()) in printed
