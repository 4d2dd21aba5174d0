"""The GPU check, rehearsed on the CPU: parts are run, timed, judged and written down one by one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from gpu_parts import schedule
from gpu_parts.findings import Finding, Setting
from gpu_parts.kernels import kernels_part
from gpu_parts.numerics import losses_part
from gpu_parts.schedule import STAGES, Check
from gpu_parts.waits import waits_in
from gpu_parts.worker import PARTS

ROOT = Path(__file__).parents[2]
_FAKE_WORKER = """
import json, sys, time
part, setting, file = sys.argv[1:]
def tell(content):
    with open(file, "a") as f: print(json.dumps(content), file=f)
if part == "towers":
    sys.exit("no such tower")
tell("ready")
seconds = float(sys.stdin.readline())
tell({"case": "seconds", "value": seconds})
if part == "losses":
    time.sleep(60)
tell({"case": "device", "value": 1.0, "limit": 2.0, "note": json.load(open(setting))["device"]})
"""


def gpu_check(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    call = [sys.executable, "scripts/gpu_check.py", *arguments]
    return subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_the_command_judges_the_cpu_against_itself(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gpu_check("--device", "cpu", "--small", "--only", "losses", "nccl", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((out / "check.json").read_text())
    assert list(written["parts"]) == ["losses", "nccl"] and written["machine"]["torch"] == torch.__version__
    findings = [found for part in written["parts"].values() for found in part["findings"]]
    assert len(findings) > 15 and {found["verdict"] for found in findings} == {"ok"}
    assert len((out / "table.md").read_text().splitlines()) == len(findings) + 2
    assert done.stdout.count("\nok ") == len(findings)


def test_parts_fail_and_hang_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(_FAKE_WORKER)
    monkeypatch.setattr(schedule, "_WORKER", worker)
    monkeypatch.setattr(schedule, "_LAST_WORD", 0.0)
    monkeypatch.setattr(schedule, "STAGES", ((("losses", "towers"), 1.0), (("step",), 1.0), (("run",), 1.0)))
    begun = time.monotonic()
    check = Check(tmp_path / "out", 9.0)
    assert not check.run(("losses", "towers", "step", "run"), "cpu", small=True, shards=None)
    assert time.monotonic() - begun < 9
    written = json.loads((tmp_path / "out" / "check.json").read_text())["parts"]
    verdicts = {
        name: [(found["case"], found["verdict"]) for found in part["findings"]] for name, part in written.items()
    }
    assert verdicts == {
        "losses": [("seconds", "told"), ("the rest", "could not")],
        "towers": [("ends early", "FAILED")],
        "step": [("seconds", "told"), ("device", "ok")],
        "run": [("seconds", "told"), ("device", "ok")],
    }
    assert "no such tower" in written["towers"]["findings"][0]["note"]
    given = {name: part["findings"][0]["value"] for name, part in written.items() if name != "towers"}
    assert given["losses"] <= 3 and given["step"] <= given["run"], "what a part leaves goes to the next"


def test_every_part_has_its_time() -> None:
    assert [name for parts, _ in STAGES for name in parts] == list(PARTS)
    assert all(share > 0 for _, share in STAGES)


def test_a_finding_passes_at_its_limit_and_nan_fails() -> None:
    values = (1.0, 2.0, 3.0, math.nan)
    assert [Finding("a", value, limit=2.0).verdict for value in values] == ["ok", "ok", "FAILED", "FAILED"]
    assert [Finding("a", 1.0).verdict, Finding("a", note="no memory").verdict] == ["told", "could not"]
    assert Finding("a", failed=True).verdict == "FAILED"


def test_rounded_products_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses part fails if a device rounds the inputs of PCA's products, as TF32 does."""
    from training import pca

    setting, exact = Setting("cpu", True, None, 1.0), pca._eigh
    part = losses_part(setting)
    assert next(part) is None
    monkeypatch.setattr(pca, "_eigh", lambda gram: exact(gram.bfloat16().to(gram.dtype)))
    found = [part.send(1.0), *part]
    assert {finding.case.partition(",")[0] for finding in found if finding.verdict == "FAILED"} >= {
        "PCA",
        "gradient of PCA",
    }


def test_the_costliest_kernels_of_a_step_are_told() -> None:
    part = kernels_part(Setting("cpu", True, None, 1.0))
    assert next(part) is None
    found = [part.send(1.0), *part]
    shares = [finding.value for finding in found if finding.unit == "of the kernels' time"]
    assert shares == sorted(shares, reverse=True) and 0.5 < sum(shares) <= 1
    whole, image, text = (finding.value for finding in found[:3])
    assert whole > max(image, text) and any("convolution" in finding.case for finding in found)


def test_reads_are_counted_by_line() -> None:
    values = torch.ones(3)

    def step() -> None:
        assert values.sum() > 2
        values[0].item()
        values * 2

    places = waits_in(step, torch.device("cpu"))
    assert sum(places.values()) == 2 and all(place.startswith("tests/scripts/test_gpu_check.py") for place in places)


def test_carried_wheels_are_imported(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "tyro-9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tyro/__init__.py", "raise SystemExit('the carried one')")
    done = gpu_check("--wheels", str(tmp_path), "--device", "cpu")
    assert "the carried one" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "looses"], "error: --only looses: choose among losses, towers"),
        (["--minutes", "0"], "error: --minutes 0"),
        (["--wheels", "nowhere"], "error: --wheels nowhere: no wheels there; make the folder with --collect-wheels"),
        (["--device", "cuda", "--only", "losses"], "error: device cuda: torch sees no GPU here; use cpu"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = gpu_check(*arguments, "--out", str(tmp_path / "out"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1, done.stderr
