"""The comparison from checkpoints to page: right figures, nothing measured twice, bad input before any work."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import eval.compare
from eval.benchmarks.protocols import load_retrieval_set
from eval.measures.compare_measures import model_digest
from eval.measures.query_bins import query_bins
from eval.measures.retrieval_set import evaluate_retrieval
from eval.towers.models import load_model
from longclip_teacher import create_teacher, save_teacher
from longclip_teacher.errors import run_command
from mobileclip_student import create_student, save_student


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    paths = {name: folder / f"{name}.safetensors" for name in ("teacher", "s0", "s1")}
    torch.manual_seed(0)
    save_teacher(create_teacher("tiny", context_length=32), paths["teacher"])
    for name in ("s0", "s1"):
        save_student(create_student("tiny", context_length=64), paths[name])
    return paths


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments), "--device", "cpu", "--num-workers", "0"])
    try:
        run_command(eval.compare.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_from_checkpoints_to_page_and_resuming(
    weights: dict[str, Path], colour_folder: Path, colour_classes: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    arguments = [f"teacher={weights['teacher']}", f"student={weights['s0']},{weights['s1']}", "--teacher", "teacher",
                 "--protocols", f"colours=urban1k:{colour_folder}", "--zeroshot", f"classes={colour_classes}",
                 "--behaviour", "--out", out]  # fmt: skip
    assert compare(monkeypatch, *arguments) == 0, capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    found = load_retrieval_set("urban1k", colour_folder)
    single = {name: evaluate_retrieval(load_model(path), found) for name, path in weights.items()}
    student, teacher = results["models"]["student"], results["models"]["teacher"]
    for way in ("i2t", "t2i"):
        for k in (1, 5, 10):
            key = f"colours_{way}_r{k}"
            of_seeds = [single[name][way][f"r{k}"] for name in ("s0", "s1")]
            assert student["figures"][key]["value"] == pytest.approx(np.mean(of_seeds))
            assert student["figures"][key]["standard_deviation"] == pytest.approx(np.std(of_seeds, ddof=1))
            assert teacher["figures"][key]["value"] == pytest.approx(single["teacher"][way][f"r{k}"])
            low, high = teacher["figures"][key]["interval"]
            assert low <= teacher["figures"][key]["value"] <= high
            gain = np.mean(of_seeds) - single["teacher"][way][f"r{k}"]
            assert student["difference_to_first"][key]["value"] == pytest.approx(gain)
    assert teacher["figures"]["classes_top1"]["interval"] and student["figures"]["classes_top1"]["interval"] is None
    assert len(student["seeds"]) == 2 and "mapped_cosine" in student["seeds"][1]["agreement"]["colours"]["image"]
    assert any("1000 pictures" in warning for warning in results["warnings"])
    assert len(results["sets"]["colours"]["sha256"]) == 64

    table = (out / "table.md").read_text().splitlines()
    assert table[0].startswith("| model | colours picture → caption, R@1, %") and table[2].startswith("| teacher | ")
    assert {line.count("|") for line in table[:4]} == {table[0].count("|")}
    page = (out / "report.html").read_text()
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    assert f"float32, cpu, {threads}, median of 30 calls" in "".join(table)
    for heading in ("Difference from teacher", "Agreement with teacher on colours", "Worst failures of student",
                    "Recall against time", f"float32, cpu, {threads}, median of 30 calls",
                    "What is read of a caption: colours", "colours, caption → picture: captions edited",
                    "loses these points of R@1 from caption to picture", "Note:"):  # fmt: skip
        assert heading in page, heading

    # again: nothing is encoded; with other weights under the old path that model alone is measured anew
    encoded: list[object] = []
    original = eval.compare.encode_retrieval_set
    monkeypatch.setattr(eval.compare, "encode_retrieval_set", lambda *a: encoded.append(a[0]) or original(*a))
    assert compare(monkeypatch, *arguments) == 0 and not encoded
    again = json.loads((out / "results.json").read_text())
    assert again["models"] == results["models"]
    changed = tmp_path / "changed.safetensors"
    changed.write_bytes(weights["s1"].read_bytes())
    save_student(create_student("tiny", context_length=32), weights["s1"])
    assert compare(monkeypatch, *arguments) == 0
    weights["s1"].write_bytes(changed.read_bytes())
    assert [type(model).__name__ for model in encoded] == ["MobileCLIP", "LongCLIP"]  # the teacher's for the agreement


def test_bad_input_ends_in_one_line_before_any_encoding(
    weights: dict[str, Path], colour_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def no_encoding(*_: object) -> None:
        raise AssertionError("encoded before everything was checked")

    monkeypatch.setattr(eval.compare, "encode_retrieval_set", no_encoding)
    good, test = f"a={weights['s0']}", f"t=folder:{colour_folder}"
    cases = [
        ([good, f"b={tmp_path}/gone.pt", "--protocols", test], "gone.pt"),
        ([good, "--protocols", test, f"u=folder:{tmp_path}/gone"], "gone"),
        ([good, "--protocols", test, "--zeroshot", f"z={tmp_path}/none"], "none"),
        ([good, "--protocols", "t"], "NAME=PROTOCOL:FOLDER"),
        ([good, "--protocols", test, test], "is taken"),
        ([good, "--protocols", test, "--teacher", "x"], "--teacher x is none of the models: a"),
        ([good], "name a test"),
        (["--protocols", test], "name at least one model"),
        ([good, f"a={weights['s1']}", "--protocols", test], "two models are called a"),
        ([f"a/b={weights['s0']}", "--protocols", test], "cannot name a file"),
        ([good, "--protocols", test, "--num-failures", "-1"], "--num-failures"),
        ([f"{good}@context_length=0", "--protocols", test], "context_length is a number of tokens"),
        ([f"{good}@context_length=900", "--protocols", test], "64 positions"),
        ([f"{good}@activation=gelu", "--protocols", test], "--activation is for teachers"),
    ]
    for arguments, words in cases:
        assert compare(monkeypatch, *arguments, "--out", tmp_path / "out") == 2, arguments
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("error: ") and words in line, line
    assert not (tmp_path / "out").exists()


def test_one_file_at_two_lengths(
    weights: dict[str, Path], colour_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for caption in (colour_folder / "caption").iterdir():  # all alike until a short model stops reading
        caption.write_text("board " * 40 + caption.read_text())
    out, models = tmp_path / "out", [f"full={weights['s0']}", f"cut={weights['s0']}@context_length=20"]
    arguments = ["--protocols", f"colours=folder:{colour_folder}", "--out", out]
    assert compare(monkeypatch, *models, *arguments) == 0
    results = json.loads((out / "results.json").read_text())
    full, cut = results["models"]["full"], results["models"]["cut"]
    assert (full["settings"], cut["settings"]) == ({}, {"context_length": 20})
    assert (full["read_as"], cut["read_as"]) == (
        "MobileCLIP student tiny, 64 tokens, pads masked", "MobileCLIP student tiny, 20 tokens, pads masked",
    )  # fmt: skip
    truncated = [model["seeds"][0]["retrieval"]["colours"]["num_truncated"] for model in (full, cut)]
    assert truncated == [0, 8]
    # captions that read alike: each is picture 1's answer as much as any other's, and the earlier counts
    assert [cut["figures"][f"colours_{way}_r1"]["value"] for way in ("i2t", "t2i")] == [12.5, 12.5]
    kept = [json.loads((out / "kept" / f"{name}.0.colours.json").read_text())["result"] for name in ("full", "cut")]
    assert kept[0]["ranks"] != kept[1]["ranks"] and kept[1]["ranks"]["i2t"] == list(range(1, 9))
    for text in ((out / "report.html").read_text(), (out / "table.md").read_text()):
        assert "MobileCLIP student tiny, 20 tokens, pads masked" in text
    assert "context_length=20" in (out / "report.html").read_text()


def test_a_kept_result_is_not_taken_for_another_setting(weights: dict[str, Path]) -> None:
    digests = [model_digest(load_model(weights["s0"], pad_mask=pad_mask)) for pad_mask in (None, True, False)]
    assert digests[0] == digests[1] != digests[2]


def test_bins_hold_every_query_once_and_equal_lengths_together() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 60, 1000).astype(float)
    bins = query_bins(lengths)
    assert sorted(np.concatenate(bins).tolist()) == list(range(1000))
    assert 2 <= len(bins) <= 8 and min(map(len, bins)) >= 40
    for shorter, longer in pairwise(bins):
        assert lengths[shorter].max() < lengths[longer].min()
    assert len(query_bins(np.full(500, 77.0))) == 1
    assert len(query_bins(np.arange(39.0))) == 0
