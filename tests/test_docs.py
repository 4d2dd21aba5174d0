"""The documents keep up with the code: the table of losses, links and paths, the README's length, commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from longclip_teacher.errors import InputError
from training.losses.table import LOSSES, Loss
from training.settings.tree import parse_config

ROOT = Path(__file__).resolve().parent.parent
MOST_README_WORDS = 1300
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*GUIDES, *(ROOT / name for name in ("CONTRIBUTING.md", "EXPERIMENTS.md"))]
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FLAG = re.compile(r"--[A-Za-z][\w.-]*")
_SUBCOMMANDS = ("index", "folder", "tsv", "csv", "coco", "sharegpt4v", "search", "embed")


def text_of(document: Path) -> str:
    return _COMMENT.sub("", document.read_text(encoding="utf-8"))


# --- the table of losses ---------------------------------------------------------------------------------------------


def losses_table(losses: tuple[Loss, ...]) -> str:
    """The rows of the table of losses as a Markdown table."""

    def code(names: Iterator[str]) -> str:
        return ", ".join(f"`{name}`" for name in names)

    headings = ("Loss", "Weights under `--loss.`", "Family", "Reads", "Learns", "Teacher's width", "Stages", "Paper")
    rows = [headings, ("---",) * len(headings)]
    for loss in losses:
        rows.append(
            (
                f"`{loss.name}`: {loss.title}",
                code(loss.option(part) for part in loss.parts),
                loss.family,
                code(iter(dict.fromkeys(loss.arguments.values()))),
                ", ".join(loss.learns) or "nothing",
                "yes" if loss.needs_same_width else "no",
                ", ".join(loss.stages),
                loss.paper or "none",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_the_guide_has_the_table_of_losses() -> None:
    table = losses_table(LOSSES)
    assert table in text_of(ROOT / "docs" / "losses.md"), f"docs/losses.md needs this table:\n\n{table}\n"


# --- links and paths -------------------------------------------------------------------------------------------------


def leads_somewhere(document: Path, link: str) -> bool:
    """Whether a relative link's file exists, and has the heading that the link names after a #."""
    name, _, heading = link.partition("#")
    target = document.parent / name if name else document
    if not (target.exists() and heading):
        return target.exists()
    headings = re.findall(r"^#+ (.*)$", text_of(target), re.MULTILINE)
    return heading in {re.sub(r"[^\w -]", "", found.lower()).replace(" ", "-") for found in headings}


def broken_references(document: Path, folders: set[str]) -> list[str]:
    """Relative links, and paths in backticks that begin with one of `folders`, that lead nowhere."""
    prose = _CODE_BLOCK.sub("", text_of(document))
    broken = [link for link in _LINK.findall(prose) if "://" not in link and not leads_somewhere(document, link)]
    for words in _INLINE_CODE.findall(prose):
        for word in words.split():
            path = word.strip("'\",;()").split("::")[0]
            is_ours = re.fullmatch(r"[\w.-]+(/[\w.-]*)+", path) and path.split("/")[0] in folders
            if is_ours and not (ROOT / path).exists():
                broken.append(path)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_exist(document: Path, tracked_files: list[Path]) -> None:
    folders = {path.parts[0] for path in tracked_files if len(path.parts) > 1}
    assert {"training", "eval", "scripts", "tests", "docs"} <= folders
    assert broken_references(document, folders) == []


def test_a_broken_link_and_a_wrong_path_are_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(
        "# A heading, here\n[heading](#a-heading-here) [other](a.md#no-heading) [here](a.md) [gone](b.md#part)\n"
        "[web](https://example.org/c.md) `training/main.py --run.seed 1` `data/no.json`\n"
        "<!-- [later](d.md) --> `python training/gone.py` `tests/gone.py::test_a`\n"
    )
    assert broken_references(document, {"training", "tests"}) == [
        "a.md#no-heading", "b.md#part", "training/gone.py", "tests/gone.py",
    ]  # fmt: skip


# --- the README ------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    num_words = len((ROOT / "README.md").read_text(encoding="utf-8").split())  # as wc -w counts
    assert num_words <= MOST_README_WORDS, f"README.md has {num_words} words, more than {MOST_README_WORDS}"


# --- commands --------------------------------------------------------------------------------------------------------


def shell_scripts_of(text: str) -> Iterator[str]:
    """The bash blocks, and what the YAML blocks give a shell: strings that call torchrun."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from strings(part)

    for language, block in _CODE_BLOCK.findall(text):
        if language == "bash":
            yield block
        elif language == "yaml":
            yield from (found for found in strings(yaml.safe_load(block)) if "torchrun" in found)


def commands_of(document: Path) -> Iterator[list[str]]:
    """Each call of a script of this repository: [script, arguments ...], from shell scripts and inline code."""
    text = text_of(document)
    lines = [line for script in shell_scripts_of(text) for line in script.replace("\\\n", " ").splitlines()]
    for line in (*lines, *_INLINE_CODE.findall(_CODE_BLOCK.sub("", text))):
        if not re.search(r"(python|torchrun)\S* .*\.py\b", line):
            continue
        words = shlex.split(line, comments=True)
        start = next((number for number, word in enumerate(words) if (ROOT / word).suffix == ".py"), None)
        if start is not None:
            yield words[start:]


@cache
def help_of(script: str, subcommand: str | None) -> str:
    call = [sys.executable, script, *([subcommand] if subcommand else []), "--help"]
    done = subprocess.run(
        call, cwd=ROOT, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{call}: {done.stderr}"
    return done.stdout


def wrong_options(command: list[str]) -> list[str]:
    """What a command of the documents names that its script does not know."""
    script, *arguments = command
    if not (ROOT / script).is_file():
        return [f"{script}: no such script"]
    if script == "training/main.py":
        arguments = arguments[: arguments.index("--help")] if "--help" in arguments else arguments
        try:
            parse_config([word for word in arguments if word != "..."])
        except InputError as error:
            return [str(error)]
        return []
    subcommand = arguments[0] if arguments and arguments[0] in _SUBCOMMANDS else None
    known = set(_FLAG.findall(help_of(script, subcommand)))
    return [f"{script}: {word}" for word in arguments if _FLAG.match(word) and word.split("=")[0] not in known]


def test_commands_name_options_that_exist() -> None:
    commands = [command for document in GUIDES for command in commands_of(document)]
    assert len({command[0] for command in commands}) > 10
    assert [wrong for command in commands for wrong in wrong_options(command)] == []


def test_wrong_options_are_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(
        "```bash\ntorchrun --nproc_per_node=4 training/main.py distill_s0 ... \\\n    --run.sead 1  # a comment\n"
        "python eval/cost.py --checkpoint x --thread 1\npython scripts/make_shards.py folder --image x --out y\n```\n"
        "`python scripts/gone.py --x 1` and `python training/main.py no_preset`, "
        "`python training/main.py --help loss`\n"
    )
    wrong = [found for command in commands_of(document) for found in wrong_options(command)]
    assert [line.split(":")[0] for line in wrong[:4]] == [
        "the command line", "eval/cost.py", "scripts/make_shards.py", "scripts/gone.py"
    ]  # fmt: skip
    assert "run.sead" in wrong[0] and "--thread" in wrong[1] and "--image" in wrong[2] and "no_preset" in wrong[4]
    assert len(wrong) == 5


def syntax_error(script: str) -> str:
    """What bash says of a script that it does not run."""
    return subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True).stderr


def test_shell_scripts_and_jobs_can_be_parsed() -> None:
    scripts = [script for document in GUIDES for script in shell_scripts_of(text_of(document))]
    assert len(scripts) > 20 and [found for script in scripts if (found := syntax_error(script))] == []
    assert syntax_error("if true; then torchrun")
    blocks = _CODE_BLOCK.findall(text_of(ROOT / "docs" / "training.md"))
    jobs = [block for language, block in blocks if language == "yaml" or "#SBATCH" in block]
    assert len(jobs) == 4 and max(len(job.splitlines()) for job in jobs) <= 20
    assert all(len(list(shell_scripts_of(f"```yaml\n{job}```"))) == 1 for job in jobs if "#SBATCH" not in job)
