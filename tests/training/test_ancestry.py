"""What a trained model's terms come to: those of all weights that it, its teachers and theirs began with."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.base.processes import start
from longclip_teacher import LongCLIP, create_teacher, load_teacher, save_teacher
from longclip_teacher.ancestry import (
    DATACOMPDR,
    NOT_KNOWN,
    RESEARCH_ONLY,
    Ancestor,
    Ancestry,
    as_teacher,
    describe_terms,
    hub_ancestry,
    is_research_only,
    merged,
)
from mobileclip_student import MobileCLIP, load_student, save_student
from training.build import build_distillation, build_student, frozen_teacher
from training.cache.manifest import CACHE_MANIFEST, read_cache, write_cache_manifest
from training.cache.writer import cache_settings
from training.checkpointing import TrainState, load_checkpoint, save_checkpoint
from training.optim import build_optimizer
from training.resume import RunInputs
from training.settings.augment import AugmentConfig
from training.settings.options import EMBEDDED_CACHE, EMBEDDED_DATA, EMBEDDED_TEACHER
from training.settings.tree import PRESETS, parse_config

NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))
APPLES = Ancestor("apple/MobileCLIP-S0", RESEARCH_ONLY, "12ab")
FROM_SCRATCH = {
    "tiny_teacher",
    "small_teacher",
    "longclip_finetune",
    "longclip_debias",
}  # unless --teacher.init is given
# The presets that have weights of each of these as ancestors
DESCENDANTS = {
    EMBEDDED_TEACHER: set(NAMES) - FROM_SCRATCH - {"dr_offline"},
    EMBEDDED_CACHE: {"dr_offline"},
    "runs/two_stage_image": {"two_stage"},
    "runs/two_stage_text": {"two_stage"},
}
# The presets whose documented command with real names has weights for research only among its ancestors
RESEARCH_ONLY_COMMANDS = {"distill_s0", "dr_offline"}


def write_sources(ancestries: dict[str, Ancestry]) -> None:
    """All files that presets start from or learn from, each with its ancestry."""
    torch.manual_seed(0)
    teacher = create_teacher("tiny")
    teacher.ancestry = ancestries[EMBEDDED_TEACHER]
    save_teacher(teacher, Path(EMBEDDED_TEACHER, "best.safetensors"))
    for name in ("two_stage_image", "two_stage_text"):
        student = build_student(parse_config([name]), teacher.embed_dim)
        student.ancestry = ancestries[f"runs/{name}"]
        save_student(student, Path("runs", name, "best.safetensors"))
    teacher.ancestry = ancestries[EMBEDDED_CACHE]
    write_cache_manifest(
        Path(EMBEDDED_CACHE), cache_settings(EMBEDDED_TEACHER, teacher, views=1, augment=AugmentConfig())
    )


@pytest.fixture
def place(tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the embedded data."""
    shutil.copytree(checkout / EMBEDDED_DATA, tmp_path / EMBEDDED_DATA)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def built(*args: str) -> LongCLIP | MobileCLIP:
    with start("cpu") as runtime:
        return build_distillation(parse_config(list(args)), runtime).distiller.model


def test_every_preset_has_the_terms_of_its_ancestors(place: Path) -> None:
    write_sources({name: (Ancestor(name, RESEARCH_ONLY),) for name in DESCENDANTS})
    for preset in NAMES:
        ancestry = built(preset).ancestry
        expected = {name for name, descendants in DESCENDANTS.items() if preset in descendants}
        assert {ancestor.source for ancestor in ancestry} == expected, preset
        assert is_research_only(ancestry) == (preset not in FROM_SCRATCH), preset
        assert ("trained from random weights" in describe_terms(ancestry)) == (preset in FROM_SCRATCH), preset


def test_the_documented_command_of_every_preset_has_known_terms() -> None:
    """Names alone decide here: no file is read. A run folder is the work of another preset."""
    research_only = set()
    for name in NAMES:
        header = (PRESETS / f"{name}.toml").read_text().split("[run]")[0].replace("\n#", " ")
        command = header.split("Command:")[1].split("Cheaper:")[0]
        given = re.findall(r"--(?:teacher\.(?:checkpoint|init|short|cache)|student\.init|init\.\w+) (\S+)", command)
        assert given or name in FROM_SCRATCH | {"digit_scenes"}, name
        for source in given:
            if source.startswith("mobileclip") or source == "datacompdr":
                research_only.add(name)
            elif not source.startswith(("runs/", "data/")) and source != "None":
                repository = {"longclip-b": "BeichenZhang/LongCLIP-B"}.get(source, source)
                assert "those of its ancestors" in describe_terms(hub_ancestry(repository, ""))
    assert research_only == RESEARCH_ONLY_COMMANDS
    for name in research_only:
        assert "research only" in (PRESETS / f"{name}.toml").read_text().replace("\n#", "")


@pytest.mark.parametrize(
    ("args", "role"),
    [
        (["digit_scenes", "--student.init", "apples_student"], "weights"),
        (["digit_scenes", "--init.image", "apples_student"], "weights"),
        (["digit_scenes", "--init.text", "apples_student"], "weights"),
        (["tiny_teacher", "--teacher.init", "apples_teacher"], "weights"),
        (["longclip_text_tower", "--init.text", "apples_teacher"], "weights"),
        (["digit_scenes", "--teacher.checkpoint", "apples_teacher"], "teacher"),
        (["digit_scenes", "--teacher.ensemble", "apples_teacher"], "teacher"),
        (["dual_teacher", "--teacher.short", "apples_teacher"], "teacher"),
        (["digit_scenes", "--teacher.cache", "apples_cache"], "teacher"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else value,
)
def test_every_way_in_is_recorded_and_goes_on_to_descendants(args: list[str], role: str, place: Path) -> None:
    write_sources(dict.fromkeys(DESCENDANTS, ()))
    student = build_student(parse_config(["digit_scenes"]), 128)
    teacher = load_teacher(EMBEDDED_TEACHER)
    for model in (student, teacher):
        model.ancestry = (APPLES,)
    save_student(student, "apples_student.safetensors")
    save_teacher(teacher, "apples_teacher.safetensors")
    settings = cache_settings("apples_teacher.safetensors", teacher, views=1, augment=AugmentConfig())
    write_cache_manifest(Path("apples_cache"), settings)
    named = [f"{value}.safetensors" if Path(f"{value}.safetensors").is_file() else value for value in args]
    if "--student.init" in args:
        named += ["--student.embed_dim", "None"]
    model = built(*named)
    expected = (replace(APPLES, role=role),)
    assert model.ancestry == expected
    # the file of the trained model, and a student of that model
    if isinstance(model, MobileCLIP):
        save_student(model, "trained.safetensors")
        assert load_student("trained.safetensors").ancestry == expected
        child = built("digit_scenes", "--student.init", "trained.safetensors", "--student.embed_dim", "None")
    else:
        save_teacher(model, "trained.safetensors")
        child = built("digit_scenes", "--teacher.checkpoint", "trained.safetensors")
    assert is_research_only(child.ancestry)


def test_a_resumed_run_keeps_the_ancestors_that_it_began_with(place: Path) -> None:
    """Whatever file stands now where its initial weights were, and for a checkpoint without a record."""
    write_sources(dict.fromkeys(DESCENDANTS, ()))
    config = parse_config(["digit_scenes"])
    with start("cpu") as runtime:
        distiller = build_distillation(config, runtime).distiller
    state = TrainState(
        distiller, build_optimizer(distiller, config.optim), torch.amp.GradScaler("cpu"), RunInputs(9, 1, None, {}, {})
    )
    distiller.model.ancestry = (APPLES,)
    save_checkpoint(Path("last.pt"), state, config)
    distiller.model.ancestry = ()
    load_checkpoint(Path("last.pt"), state, config)
    assert distiller.model.ancestry == (APPLES,)
    content = torch.load("last.pt", weights_only=True)
    del content["ancestry"]
    torch.save(content, "older.pt")
    load_checkpoint(Path("older.pt"), state, config)
    assert {one.terms for one in distiller.model.ancestry} == {RESEARCH_ONLY, NOT_KNOWN}


def test_stored_features_of_datacompdrs_layout_are_apples() -> None:
    assert is_research_only(DATACOMPDR) and DATACOMPDR[0].role == "teacher"


def test_a_file_without_a_record_and_its_students_have_terms_that_are_not_known(checkout: Path, place: Path) -> None:
    shutil.copytree(checkout / EMBEDDED_TEACHER, EMBEDDED_TEACHER)
    (ancestor,) = frozen_teacher(parse_config(["digit_scenes"])).ancestry
    assert (ancestor.terms, len(ancestor.sha256)) == (NOT_KNOWN, 64)
    model = built("digit_scenes")
    assert model.ancestry == as_teacher((ancestor,))
    assert describe_terms(model.ancestry) == "not known, since it descends from a teacher without a record"
    assert "for research only" in describe_terms(merged(model.ancestry, (APPLES,)))


def test_a_cache_without_a_record_has_terms_that_are_not_known(place: Path) -> None:
    write_sources(dict.fromkeys(DESCENDANTS, (APPLES,)))
    path = Path(EMBEDDED_CACHE, CACHE_MANIFEST)
    content = json.loads(path.read_text())
    assert read_cache(Path(EMBEDDED_CACHE))[0].ancestry == (APPLES,)
    del content["settings"]["ancestry"], content["sha256"]
    path.write_text(json.dumps(content))
    (ancestor,) = read_cache(Path(EMBEDDED_CACHE))[0].ancestry
    assert (ancestor.terms, ancestor.sha256) == (NOT_KNOWN, content["settings"]["teacher_sha256"])
