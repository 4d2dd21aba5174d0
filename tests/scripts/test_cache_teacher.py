"""cache_teacher.py as a command: resumable, the same from any number of processes, strict about what does not fit."""

from __future__ import annotations

import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from longclip_teacher import create_teacher, save_teacher
from mobileclip_student import create_student, save_student
from training.cache.reader import open_cache
from training.cache.sidecar import Sidecar
from training.data.index import ShardIndex
from training.data.writer import caption_member, write_manifest, write_shard
from training.settings.augment import AugmentConfig

SCRIPT = Path(__file__).parents[2] / "scripts" / "cache_teacher.py"
Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in this process and return its exit code."""

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["cache_teacher.py", *map(str, arguments)])
        monkeypatch.syspath_prepend(SCRIPT.parent)
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as exit_:
            return int(exit_.code or 0)
        return 0

    return call


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_teacher(create_teacher("tiny"), path)
    return path


def write_shards(folder: Path, num_shards: int, num_samples: int) -> Path:
    folder.mkdir(parents=True)
    records = []
    for shard in range(num_shards):
        samples = []
        for row in range(num_samples):
            number, buffer = shard * num_samples + row, io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((48, 40)).save(buffer, "JPEG")
            caption = caption_member(f"Board {number}. It has {'many ' * (number % 7)}colours.", f"board {number % 5}")
            samples.append((f"{number:05d}", {"jpg": buffer.getvalue(), "json": caption}))
        records.append(write_shard(folder / f"s-{shard}.tar", samples))
    write_manifest(folder, records, {})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", 3, 9)


def arguments(shards: object, teacher: Path, out: Path, *more: object) -> list[str]:
    common = ["--shards", shards, "--teacher", teacher, "--out", out, "--device", "cpu", "--batch-size", 8]
    return [str(value) for value in (*common, "--num-workers", 0, *more)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_the_command_says_what_it_made_and_training_can_open_it(
    run: Run, shards: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache"
    assert run(*arguments(shards, teacher, out, "--views", 2, "--num-workers", 2)) == 0
    printed = capsys.readouterr()
    num_bytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert f"{out}: 27 samples in 3 sidecars (0 kept), 42 distinct of 54 captions, {num_bytes} bytes, " in printed.out
    assert printed.out.strip().endswith("samples/s")
    assert printed.err.splitlines() == [f"{i + 1} of 3: s-{i}.safetensors" for i in range(3)]
    index = ShardIndex(sorted(shards.glob("*.tar")))
    store = open_cache(out, index, AugmentConfig(), str(teacher))
    assert store.draw(index.read(20), 0, (0, 20)).image.shape == (store.teacher_info.embed_dim,)
    manifest = json.loads((out / "teacher_cache.json").read_text())
    assert {"teacher_sha256", "mean", "std", "interpolation", "image_size", "context_length", "tokenizer", "libraries",
            "decoder", "precision", "augment", "views", "seed"} <= set(manifest["settings"])  # fmt: skip
    data = json.loads((shards / "manifest.json").read_text())
    assert [shard["shard_sha256"] for shard in manifest["shards"]] == [shard["sha256"] for shard in data["shards"]]


def test_without_out_the_sidecars_go_below_the_shards(run: Run, teacher: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 1, 3)
    (shards / "manifest.json").unlink()  # the shard's sha256 is then computed
    command = arguments(shards, teacher, Path("-"))
    del command[4:6]
    assert run(*command) == 0
    content = json.loads((shards / "teacher_cache/teacher_cache.json").read_text())
    assert len(content["shards"][0]["shard_sha256"]) == 64
    assert run(*command) == 0  # teacher_cache is no shard


def test_a_killed_run_goes_on_where_it_was(
    run: Run, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, out = write_shards(tmp_path / "shards", 8, 60), tmp_path / "cache"
    command = arguments(shards, teacher, out, "--views", 2)
    process = subprocess.Popen([sys.executable, str(SCRIPT), *command], env=environment(), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        while len(list(out.glob("*.teacher.json"))) < 2 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    done = {
        path: path.with_name(path.name.replace(".teacher.json", ".safetensors")) for path in out.glob("*.teacher.json")
    }
    assert 2 <= len(done) < 8
    for path in out.glob("*.safetensors"):
        assert not list(Sidecar(path).damage())  # complete, whatever the moment of the kill
    stamps = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in done.values()}
    assert run("--shards", shards, "--out", out, "--status") == 1
    found = counts(capsys.readouterr().out)
    assert (found["done"][0], found["missing"][0]) == (len(done), 8 - len(done))
    assert run(*command) == 0
    assert f"480 samples in 8 sidecars ({len(done)} kept)" in capsys.readouterr().out
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in stamps} == stamps
    expected = {f"s-{i}.{suffix}" for i in range(8) for suffix in ("safetensors", "teacher.json")}
    assert {path.name for path in out.iterdir()} == expected | {"teacher_cache.json"}
    assert len(json.loads((out / "teacher_cache.json").read_text())["shards"]) == 8


def test_a_shard_that_changed_and_a_sidecar_that_went_are_made_again(
    run: Run, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, out = write_shards(tmp_path / "shards", 3, 4), tmp_path / "cache"
    assert run(*arguments(shards, teacher, out)) == 0
    before = (out / "s-1.safetensors").read_bytes()
    (out / "s-1.safetensors").unlink()
    assert run(*arguments(shards, teacher, out)) == 0
    assert "(2 kept)" in capsys.readouterr().out and (out / "s-1.safetensors").read_bytes() == before
    other = write_shards(tmp_path / "other", 1, 5)
    (other / "s-0.tar").replace(shards / "s-0.tar")
    (shards / "manifest.json").unlink()
    assert run(*arguments(shards, teacher, out)) == 0
    assert "13 samples in 3 sidecars (2 kept)" in capsys.readouterr().out


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    return subprocess.run(
        [sys.executable, *launch, *command], env=environment(), capture_output=True, text=True, timeout=200
    )


def test_two_processes_write_the_bytes_that_one_writes(shards: Path, teacher: Path, tmp_path: Path) -> None:
    more = ["--views", "2", "--augment.rand-augment-ops", "2", "--captions.short", "sampled", "--caption-views", "2"]
    one = [sys.executable, str(SCRIPT), *arguments(shards, teacher, tmp_path / "one", *more)]
    subprocess.run(one, env=environment(), check=True, capture_output=True, timeout=200)
    done = torchrun(*arguments(shards, teacher, tmp_path / "two", *more))
    assert done.returncode == 0, done.stderr
    assert "27 samples in 3 sidecars (0 kept)" in done.stdout
    assert "rank 0: 2 of 2: s-2.safetensors" in done.stderr and "rank 1: 1 of 1: s-1.safetensors" in done.stderr
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert len(names) == 7 and names == {path.name for path in (tmp_path / "two").iterdir()}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_an_error_of_one_process_ends_the_others_after_their_share(shards: Path, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    (out / "s-1.safetensors").mkdir(parents=True)  # rank 1 cannot write its shard
    done = torchrun(*arguments(shards, teacher, out))
    assert (
        done.returncode != 0 and "error: rank 1: cannot write" in done.stderr and "Traceback (most" not in done.stdout
    )
    assert (out / "s-0.teacher.json").is_file() and (out / "s-2.teacher.json").is_file()
    assert not (out / "s-1.teacher.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--views", 3], "views is 2 there and 3 now"),
        (["--seed", 5], "seed is 0 there and 5 now"),
        (["--precision", "bf16"], "precision is fp32 there and bf16 now"),
        (["--no-fast-decode"], "decoder is fast there and pil now"),
        (["--augment.flip", 0.5], "augment.flip is 0.0 there and 0.5 now"),
        (["--captions.short", "sampled"], "captions.short is given there and sampled now"),
    ],
)
def test_a_folder_made_otherwise_is_refused(
    run: Run, shards: Path, teacher: Path, tmp_path: Path, more: list[object], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(*arguments(shards / "s-0.tar", teacher, tmp_path, "--views", 2)) == 0
    assert run(*arguments(shards, teacher, tmp_path, "--views", 2, *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path} holds a cache with other settings: {message}")


def test_another_teacher_in_the_same_folder_is_refused(
    run: Run, shards: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    save_teacher(create_teacher("tiny"), tmp_path / "other.safetensors")
    assert run(*arguments(shards / "s-0.tar", teacher, tmp_path / "out")) == 0
    assert run(*arguments(shards / "s-0.tar", tmp_path / "other.safetensors", tmp_path / "out")) == 2
    assert "with other settings: teacher_sha256 is" in capsys.readouterr().err


def counts(printed: str) -> dict[str, tuple[int, int]]:
    """Shards and samples of each state, of the table that --status prints."""
    rows = [[cell.strip() for cell in line.split("│")] for line in printed.splitlines()]
    return {row[1]: (int(row[2]), int(row[3])) for row in rows if len(row) > 4 and row[1]}


def test_status_counts_what_is_done_missing_damaged_and_changed(
    run: Run, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, out = write_shards(tmp_path / "shards", 6, 4), tmp_path / "cache"
    assert run(*arguments(shards, teacher, out)) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    command = ["--shards", shards, "--out", out, "--status"]
    os.utime(shards / "s-5.tar")
    assert run(*command) == 0
    assert counts(capsys.readouterr().out.split("samples/s")[1]) == {
        "done": (6, 24), "missing": (0, 0), "damaged": (0, 0), "changed": (0, 0)
    }  # fmt: skip
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (out / "s-1.safetensors").unlink()
    (out / "s-2.safetensors").write_bytes(before[out / "s-2.safetensors"][:-1] + b"?")
    with (shards / "s-3.tar").open("r+b") as file:
        file.seek((shards / "s-3.tar").read_bytes().index(b"Board 13"))
        file.write(b"Court")
    with (shards / "s-4.tar").open("ab") as file:
        file.write(bytes(512))
    (shards / "manifest.json").unlink()
    assert run(*command) == 1
    printed = capsys.readouterr().out
    assert counts(printed) == {"done": (2, 8), "missing": (1, 4), "damaged": (1, 4), "changed": (2, 8)}
    assert "s-1.tar" in printed and "s-2.tar" in printed and "s-3.tar, s-4.tar" in printed and "s-0.tar" not in printed
    assert "delete the sidecars of damaged shards" in printed
    (out / "s-2.safetensors").unlink()
    assert run(*arguments(shards, teacher, out)) == 0
    assert run(*command) == 0


def test_the_parts_of_an_array_make_what_one_process_makes(
    run: Run, shards: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(*arguments(shards, teacher, tmp_path / "one")) == 0
    for name, value in {"MIN": 3, "STEP": 2, "COUNT": 2, "ID": 5}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    out = tmp_path / "parts"
    assert run(*arguments(shards, teacher, out, "--array", "slurm")) == 0
    printed = capsys.readouterr()
    assert f"{out}: 9 samples in 1 sidecars (0 kept)" in printed.out and "1 of 1: s-1.safetensors" in printed.err
    assert json.loads((out / "teacher_cache.json").read_text())["shards"] == []
    store = ["--shards", shards, "--out", out, "--status"]
    assert run(*store) == 1 and run(*store, "--array", "1/2") == 0
    assert run(*arguments(shards, teacher, out, "--array", "0/2")) == 0
    assert "18 samples in 2 sidecars (0 kept)" in capsys.readouterr().out
    one = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == one


def test_verify_names_what_is_damaged(
    run: Run, shards: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments(shards, teacher, tmp_path)) == 0
    assert run("--out", tmp_path, "--verify") == 0
    assert "3 sidecars are intact" in capsys.readouterr().out
    damaged, header = (
        bytearray((tmp_path / "s-1.safetensors").read_bytes()),
        (tmp_path / "s-0.safetensors").read_bytes(),
    )
    damaged[-40] ^= 1
    (tmp_path / "s-1.safetensors").write_bytes(damaged)
    place = header.index(b"   ")  # blanks fill the header up
    (tmp_path / "s-0.safetensors").write_bytes(header[:place] + b"\n" + header[place + 1 :])
    (tmp_path / "s-2.safetensors").unlink()
    assert run("--out", tmp_path, "--verify") == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 3 and lines[0].endswith("s-0.safetensors is damaged outside its samples")
    assert "s-1.safetensors is damaged: sample 000" in lines[1] and "no sidecar at" in lines[2]
    assert printed.err.splitlines()[-1].startswith("error: 3 of 3 sidecars are damaged: delete them")


def test_bad_input_ends_in_one_line(
    run: Run, shards: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    save_student(create_student("tiny"), tmp_path / "student.safetensors")
    broken = create_teacher("tiny")
    with torch.no_grad():
        broken.visual.proj.fill_(float("nan"))
    save_teacher(broken, tmp_path / "nan.safetensors")
    second = write_shards(tmp_path / "b", 1, 2)
    out = tmp_path / "out"
    cases: list[tuple[list[object], str]] = [
        ([], "give --shards PATTERN and --teacher"),
        (["--verify"], "give --out FOLDER"),
        (["--verify", "--out", tmp_path], "no teacher cache in"),
        ([*arguments("nowhere/*.tar", teacher, out)], "no shard matches"),
        ([*arguments("https://a.example/x.tar", teacher, out)], "sidecars belong to local shards"),
        ([*arguments(shards, tmp_path / "no.safetensors", out)], "no checkpoint at"),
        ([*arguments(shards, tmp_path / "student.safetensors", out)], "is not a Long-CLIP or CLIP of"),
        ([*arguments(shards, tmp_path / "nan.safetensors", out)], "features are not finite"),
        ([*arguments(shards, teacher, out), "--batch-size", 0], "--batch-size 1 or more"),
        ([*arguments(shards, teacher, out), "--augment.centre"], "give --views 0"),
        ([*arguments(shards, teacher, out), "--caption-views", 2], "1 unless --captions.short sampled"),
        ([*arguments(f"{shards}/s-0.tar", teacher, out), "--shards", shards, second], "would share one sidecar"),
        (["--teacher", teacher, "--device", "cpu", "--shards", shards, second], "give --out for"),
        ([*arguments(shards, teacher, out), "--device", "cuda:77"], "cuda"),
        ([*arguments(shards, teacher, out), "--array", "3/3"], "part 3 of 3, but the parts of N are 0 to N - 1"),
        ([*arguments(shards, teacher, out), "--array", "1/0"], "part 1 of 0"),
        ([*arguments(shards, teacher, out), "--array", "-1/3"], "give I/N, such as 0/4"),
        ([*arguments(shards, teacher, out), "--array", "1"], "give I/N, such as 0/4"),
        ([*arguments(shards, teacher, out), "--array", "7/8"], "there are only 3 shards"),
        ([*arguments(shards, teacher, out), "--array", "slurm"], "this is no task of a Slurm array"),
        (["--status", "--shards", shards], "no teacher cache in"),
        (["--status", "--out", out], "give --shards PATTERN"),
    ]
    for command, message in cases:
        assert run(*command) == 2, command
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, error
