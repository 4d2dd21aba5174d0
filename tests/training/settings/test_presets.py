"""Every preset takes twenty steps as it stands, on small embedded data; its header tells source and cost, and a command
that parses."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from eval.towers.models import load_model
from training.main import main
from training.record.run_log import read_metrics
from training.settings.options import EMBEDDED_TEACHER
from training.settings.own_data import is_embedded, run_config, trains_on_embedded
from training.settings.tree import PRESETS, config_from_toml

NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))
SHORT = [
    "--run.max_steps", "20", "--run.log_every", "10", "--run.global_batch_size", "36", "--data.num_workers", "0",
    "--data.val", "None", "--data.tests",
]  # fmt: skip
STAGES = ("two_stage_image", "two_stage_text")  # presets whose runs others start from
SECTIONS = ("Source", "Cost", "Command")


@pytest.fixture(scope="module")
def trained(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a preset's run folder after twenty steps; what another preset starts from is trained first, once."""

    @cache
    def train(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        arguments = [name, *SHORT, "--run.out_dir", str(folder)]
        config = config_from_toml(PRESETS / f"{name}.toml")
        if not config.needs.compares_with_prompts:
            arguments += ["--data.zeroshot", "None"]  # else its class prompts stand for captions
        for tower, start in (("image", config.init.image), ("text", config.init.text)):
            if start is not None and Path(start).name in STAGES:
                arguments += [f"--init.{tower}", str(train(Path(start).name))]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(checkout)
            patch.setattr(sys, "argv", ["training/main.py", *arguments])
            main()
        return folder

    return train


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_trains_on_the_embedded_data(name: str, trained: Callable[[str], Path]) -> None:
    folder = trained(name)
    config = config_from_toml(folder / "config.toml")
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [10, 20]
    terms = {term.name for term in config.needs.terms}
    for row in rows:
        assert terms <= row.keys()
        assert row["loss"] > 0 and row["grad_norm"] > 0
    model = load_model(folder)
    size = model.image_size if isinstance(model.image_size, int) else model.image_size[0]
    with torch.no_grad():
        features = model.encode_image(torch.rand(2, 3, size, size)), model.encode_text(model.tokenizer(["a board"]))
    assert all(feature.isfinite().all() for feature in features)
    assert features[0].shape[1] == features[1].shape[1] == model.embed_dim


@pytest.mark.parametrize("name", NAMES)
def test_a_header_tells_source_cost_and_a_command_that_parses(name: str) -> None:
    lines = list(takewhile(lambda line: line.startswith("#"), (PRESETS / f"{name}.toml").read_text().splitlines()))
    starts = {section: [line.startswith(f"# {section}: ") for line in lines] for section in SECTIONS}
    assert {section: sum(found) for section, found in starts.items()} == dict.fromkeys(SECTIONS, 1)
    first = starts["Command"].index(True)
    more = takewhile(lambda line: line.startswith("#  "), lines[first + 1 :])  # indented: the command goes on
    words = shlex.split(" ".join([lines[first].removeprefix("# Command:"), *(line[1:] for line in more)]))
    program = words.index("training/main.py")
    assert words[:program] == ["python"] or re.fullmatch(r"torchrun --nproc_per_node=\d", " ".join(words[:program]))
    arguments = words[program + 1 :]
    assert (arguments[0] if arguments else "digit_scenes") == name  # the default needs no name
    config, _ = run_config(arguments)
    if not trains_on_embedded(config.data):
        assert config.data.val is not None and not is_embedded(config.data.val)
        assert config.data.tests and not any(is_embedded(entry.partition(":")[2]) for entry in config.data.tests)
        assert config.data.zeroshot is None or not is_embedded(config.data.zeroshot)
        assert not (config.distils and config.teacher.checkpoint == EMBEDDED_TEACHER)
