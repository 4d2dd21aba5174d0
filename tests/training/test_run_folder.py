"""What commands read from a run folder is verified: a damaged file is named in one line, and the one before is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import longclip_teacher.weights_file
import training.generations
from damages import READERS, clean_trial, damage_trial, make_run
from eval.towers.models import load_model
from longclip_teacher import create_teacher, load_teacher
from longclip_teacher.atomic_files import previous_generation
from longclip_teacher.errors import InputError
from mobileclip_student import create_student, load_student
from training.checkpointing import save_weights
from training.generations import verified_text, write_text_generation
from training.record.curves import run_provenance


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def test_every_damage_to_a_run_folder_is_found(run: Path) -> None:
    assert [problem for seed in range(210) if (problem := damage_trial(run, seed))] == []


def test_whole_files_are_read_without_a_word(run: Path) -> None:
    assert [problem for seed in range(70) if (problem := clean_trial(run, seed))] == []


def test_the_trials_fail_without_the_checks(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longclip_teacher.weights_file, "_CHECKSUM", ())
    monkeypatch.setattr(training.generations, "_known", lambda folder: {})
    assert sum(damage_trial(run, seed) is not None for seed in range(42)) > 30


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_commands_fall_back_to_the_weights_before(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The header's damage too, which decides what model the file is said to be."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = create_student("tiny") if kind == "student" else create_teacher("tiny")
        save_weights(tmp_path / "best.safetensors", model)
        if seed == 0:
            wanted = {name: value.clone() for name, value in model.state_dict().items()}
    best = tmp_path / "best.safetensors"
    whole = best.read_bytes()
    places = [whole.index(part) for part in (b'"format"', f':"{kind}"'.encode())]
    for place in (*places, len(whole) // 2, len(whole) - 1):
        best.write_bytes(whole[: place + 2] + bytes([whole[min(place + 2, len(whole) - 1)] ^ 1]) + whole[place + 3 :])
        for load, source in ((load_model, tmp_path), (load_student if kind == "student" else load_teacher, best)):
            caplog.clear()
            found = load(source).state_dict()
            assert all(torch.equal(found[name], value) for name, value in wanted.items())
            (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
            assert line.startswith(f"{best} is damaged") and line.endswith("best.previous.safetensors")


def test_two_damaged_generations_are_one_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    for name, read in READERS.items():
        path = folder / name
        for part in (path, previous_generation(path)):
            part.write_bytes(part.read_bytes()[:-1])
        with pytest.raises(InputError, match=f"{path.name} is (damaged|not a whole)") as caught:
            read(path)
        assert "\n" not in str(caught.value) and ".previous" in str(caught.value)


def test_a_damaged_record_of_hashes_is_named_and_costs_no_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "results.json"
    for number in (1, 2):
        write_text_generation(path, f'{{"figure": {number}}}')
    record = tmp_path / "sha256.json"
    whole = record.read_bytes()
    for place in range(len(whole)):
        record.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        caplog.clear()
        assert verified_text(path) == '{"figure": 2}'
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith(f"{record} is damaged")
    write_text_generation(path, '{"figure": 3}')  # which writes a whole record again
    caplog.clear()
    assert verified_text(path) == '{"figure": 3}' and not caplog.records


def test_an_environment_that_no_run_wrote_is_one_line(tmp_path: Path) -> None:
    for content in (b"[1]", b"{", b"\xff", b"{}"):
        (tmp_path / "environment.json").write_bytes(content)
        with pytest.raises(InputError, match=r"environment\.json is not what a run writes"):
            run_provenance(tmp_path)
