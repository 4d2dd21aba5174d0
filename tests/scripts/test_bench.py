from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
from benches import recall, start_up
from benches.measure import BenchOptions, Row, in_own_process, medians, peak_memory_gb
from benches.recall import recall_case

ROOT = Path(__file__).parents[2]


def test_a_case_times_both_and_knows_its_memory() -> None:
    row = recall_case(num_images=50, num_texts=150, rounds=2)
    assert row.case == "50 x 150, D=512" and row.unit == "s"
    assert row.ours > 0 and row.baseline > 0 and row.ratio == row.baseline / row.ours
    before = peak_memory_gb()
    held = bytearray(int(before * 1e9) + 100_000_000)  # more than this process ever held
    held[::4096] = b"x" * len(held[::4096])
    assert peak_memory_gb() > before and row.peak_gb <= before


def test_functions_take_turns() -> None:
    calls: list[str] = []
    assert len(medians([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3)) == 2
    assert "".join(calls) == "ababab"


def test_a_case_runs_without_cudnn_attention() -> None:
    assert not in_own_process(torch.backends.cuda.cudnn_sdp_enabled)


def test_the_command_writes_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recall, "RECALL_CASES", ((20, 60), (30, 30)))
    monkeypatch.setattr(recall, "in_own_process", lambda function, *args: function(*args))
    monkeypatch.setattr(sys, "argv", ["bench.py", "recall", "--rounds", "1", "--json", str(tmp_path / "recall.json")])
    bench.main()
    written = json.loads((tmp_path / "recall.json").read_text())
    assert written["bench"] == "recall" and written["machine"]["num_threads"] >= 1
    assert [row["case"] for row in written["rows"]] == ["20 x 60, D=512", "30 x 30, D=512"]
    assert set(written["rows"][0]) == set(Row.__dataclass_fields__)
    assert "20 x 60" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recal"], "error: no bench 'recal': choose one of teacher-text, student-text"),
        (["recall", "--rounds", "0"], "error: --rounds 0"),
        (["mobileclip"], "error: mobileclip needs --checkout, the folder of MobileCLIP's training code: clone"),
        (["mobileclip", "--checkout", "docs"], "error: --checkout docs: no patched open_clip there: clone github.com/"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/bench.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1


def test_start_up_measures_both_answers_against_both_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_up, "COMMANDS", ["scripts/make_digit_scenes.py"])
    options = BenchOptions(full=False, rounds=1, device=torch.device("cpu"), precision="fp32")
    rows = list(start_up.bench_start_up(options))
    assert len({(row.case, row.unit) for row in rows}) == len(rows) == 8
    for row in rows:
        assert row.ratio == row.baseline / row.ours and row.max_abs_diff is None
        assert 0 < row.peak_gb < 0.2
        if row.unit == "CPU s":  # a command takes longer than python alone, and less than importing torch does
            assert (row.ratio < 1) == row.case.endswith("against python alone")
