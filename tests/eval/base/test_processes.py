"""Two processes give the same results as one. Run as a program, this file is one of the processes: OUT FOLDER."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from eval.base.processes import all_results, my_share, start
from eval.towers.feature_cache import FeatureCache
from eval.towers.features import Encoding, encode_captions, encode_images
from longclip_teacher import create_teacher, save_teacher
from longclip_teacher.errors import InputError, run_command
from longclip_teacher.folder_lock import folder_lock
from ranks import ends_of_ranks

ROOT = Path(__file__).parents[3]
CAPTIONS = [f"a {name} board and a {other} board" for name in ("red", "green", "blue") for other in ("aqua", "white")]


HOLD = """
import sys
from pathlib import Path
from eval.base.processes import job_lock, start
from longclip_teacher.errors import run_command
def main():
    with start("cpu") as runtime, job_lock(Path(sys.argv[1])):
        runtime.barrier()
        print("held")
        runtime.barrier()
run_command(main)
"""


def test_the_processes_of_a_job_share_its_folder_and_those_of_another_job_all_end(tmp_path: Path) -> None:
    script, folder = tmp_path / "hold.py", tmp_path / "out"
    script.write_text(HOLD)
    assert [(end.returncode, end.stdout) for end in ends_of_ranks([str(script), str(folder)], 2)] == [(0, "held\n")] * 2
    with folder_lock(folder):
        ends = ends_of_ranks([str(script), str(folder)], 2)
    line = rf"error: {folder} is in use by process {os.getpid()} on .+"
    assert all(end.returncode == 2 and re.fullmatch(line, end.stderr.splitlines()[-1]) for end in ends), ends


def test_an_error_about_a_name_that_is_not_utf8_reaches_every_process(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text(
        "from eval.base.processes import all_results, start\n"
        "from longclip_teacher.errors import InputError, run_command\n"
        "def fail(): raise InputError('no picture: caf\\udce9.jpg')\n"
        "def main():\n"
        "    with start('cpu') as runtime: all_results(fail if runtime.rank else dict)\n"
        "run_command(main)\n"
    )
    for process in ends_of_ranks([str(script)], 2):
        assert (process.returncode, process.stderr.splitlines()[-1]) == (2, "error: rank 1: no picture: caf\\udce9.jpg")


@pytest.mark.parametrize("is_agent", [False, True], ids=["rank 0 holds the store", "torchrun holds the store"])
def test_a_process_that_ends_before_it_joins_does_not_keep_the_others_waiting(
    is_agent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun on another node does not tell this one that its process has refused an option."""
    script = tmp_path / "join.py"
    script.write_text(
        "from datetime import timedelta\n"
        "import os, sys\n"
        "from eval.base import processes\n"
        "from longclip_teacher.errors import InputError, run_command\n"
        "def main():\n"
        "    if os.environ['RANK'] == '1': raise InputError('no such option')\n"
        "    processes._JOINED_WITHIN = timedelta(seconds=2)\n"
        "    if sys.argv[1:]: os.environ['MASTER_PORT'] = sys.argv[1]\n"
        "    with processes.start('cpu'): pass\n"
        "run_command(main)\n"
    )
    command, who = [str(script)], "not all of 2 processes"
    if is_agent:
        agent = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        command, who = [*command, str(agent.port)], f"rank 1 is missing: {who}"
    first, _ = ends_of_ranks(command, 2, timeout=60)
    line = (
        rf"error: {who} have joined at 127\.0\.0\.1:\d+ within 2 s: the error line of the one that ended says why, .+"
    )
    assert first.returncode == 2 and re.fullmatch(line, first.stderr.splitlines()[-1]), first.stderr


@pytest.fixture
def boards(tmp_path: Path) -> Path:
    """Write 101 pictures, one of them unreadable."""
    folder = tmp_path / "boards"
    folder.mkdir()
    for number in range(101):
        Image.new("RGB", (8, 8), (number, 255 - number, 40)).save(folder / f"{number:03d}.png")
    (folder / "033.png").write_text("no picture")
    return folder


def encode(model: nn.Module, folder: Path, encoding: Encoding) -> dict[str, torch.Tensor]:
    """Return everything that encoding returns, as tensors."""
    images = encode_images(model, sorted(folder.glob("*.png")), encoding)
    texts, num_truncated = encode_captions(model, CAPTIONS, encoding)
    names = json.dumps(images.unreadable).encode()
    return {
        "images": images.features,
        "rows": images.rows,
        "texts": texts,
        "num_truncated": torch.tensor(num_truncated),
        "unreadable": torch.frombuffer(bytearray(names), dtype=torch.uint8),
    }


def test_two_processes_give_the_features_of_one_and_share_the_cache(
    colour_model: nn.Module, boards: Path, tmp_path: Path
) -> None:
    """Encode three batches of captions and eleven of pictures in two processes, then both from the cache."""
    alone = encode(colour_model, boards, Encoding(batch_size=10))
    ends = ends_of_ranks([__file__, str(tmp_path / "out"), str(boards)], 2)
    assert [end.returncode for end in ends] == [0, 0], ends
    for name in ("rank0", "rank1", "rank0_again", "rank1_again", "rank0_alone"):
        theirs = load_file(tmp_path / "out" / name)
        assert set(theirs) == set(alone)
        assert all(torch.equal(theirs[key], alone[key]) for key in alone), name
    work = [end.stdout.split() for end in ends]
    assert work[0][0] != "0" and work[1][0] != "0", "both had pictures to encode"
    assert int(work[0][0]) + int(work[1][0]) == 11
    assert [line[1] for line in work] == ["0", "0"], "the second time neither had any"


def test_an_error_on_one_process_ends_all_with_one_line(boards: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3):  # four with 033: 1% of 101 is one, and no process may wait for another
        (boards / f"00{number}.png").write_text("no picture")
    ends = ends_of_ranks([__file__, str(tmp_path / "out"), str(boards)], 2)
    for end in ends:
        assert end.returncode == 2
        assert end.stderr.splitlines()[-1].startswith("error: unreadable pictures: ")
        assert "Traceback" not in end.stderr


def test_the_command_on_two_processes_writes_what_it_writes_on_one(colour_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_teacher(create_teacher("tiny"), tmp_path / "tiny.safetensors")
    written, ends = [], []
    for world_size in (1, 2):
        out = tmp_path / f"{world_size}.json"
        command = ["eval/retrieval.py", "--checkpoint", str(tmp_path / "tiny.safetensors"), "--protocol", "folder"]
        command += ["--root", str(colour_folder), "--batch-size", "3", "--num-workers", "0", "--device", "cpu"]
        ends = ends_of_ranks([*command, "--json", str(out)], world_size, cwd=ROOT)
        assert [end.returncode for end in ends] == [0] * world_size, ends
        written.append(json.loads(out.read_text()))
    assert written[0] == written[1] and written[0]["num_images"] == 8
    assert "image to text" in ends[0].stdout and not ends[1].stdout, "rank 0 alone prints"


def test_one_process_alone_needs_no_group() -> None:
    assert my_share([1, 2, 3]) == [1, 2, 3]
    (only,) = all_results(lambda: {"rows": torch.arange(3)})
    assert torch.equal(only["rows"], torch.arange(3))
    with start("cpu") as runtime:
        assert (runtime.rank, runtime.world_size, runtime.is_main) == (0, 1, True)
    with pytest.raises(InputError, match="device nonsense: give auto, cpu, cuda or cuda:N"), start("nonsense"):
        pass


def test_a_gpu_is_used_without_cudnn_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.base.processes.process_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    before = (
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        with start():
            assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before[0])
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[1:]


def main() -> None:
    """Run one process: encode twice, the second time from the cache, and print the number of batches each time."""
    sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/eval has its own conftest
    from conftest import ColourClip

    out, folder = Path(sys.argv[1]), Path(sys.argv[2])
    with start("cpu") as runtime:
        model = ColourClip()
        encode_image, calls = model.encode_image, list[int]()

        def counted(images: torch.Tensor) -> torch.Tensor:
            calls.append(len(images))
            return encode_image(images)

        model.encode_image = counted
        encoding = Encoding(batch_size=10, cache=FeatureCache(out / "cache"), shared=True)
        first = encode(model, folder, encoding)
        num_first = len(calls)
        second = encode(model, folder, encoding)
        print(num_first, len(calls) - num_first)
        save_file(first, out / f"rank{runtime.rank}")
        save_file(second, out / f"rank{runtime.rank}_again")
        if runtime.is_main:  # rank 0 evaluates like this between two training steps: no other process answers
            save_file(encode(model, folder, Encoding(batch_size=10)), out / "rank0_alone")
        runtime.barrier()


if __name__ == "__main__":
    run_command(main)
