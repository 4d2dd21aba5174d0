"""All tests at the lowest and the newest versions that pyproject.toml admits: `make compat`.

Each part makes an environment in .compat/ (6 GB), runs all tests in it, and enters its result into the table of
docs/reliability.md. `make compat PART=lowest` runs one part. The environment is removed when the part has passed. If
tests failed, the same command runs those again. This file needs nothing but Python, since it makes the environments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".compat"
_START, _STOP = "<!-- table of versions: make compat -->", "<!-- end of the versions -->"
_REQUIREMENT = re.compile(r'"([A-Za-z][\w.-]*)(?:\[[\w,]+\])?>=([\d.]+)')
_IMPORTS = """
import importlib, pkgutil
for name in ("longclip_teacher", "mobileclip_student", "eval", "training"):
    for module in pkgutil.walk_packages(importlib.import_module(name).__path__, name + "."):
        importlib.import_module(module.name)
"""
_OPEN_CLIP_TESTS = ("tests/longclip_teacher", "tests/mobileclip_student", "tests/eval/towers", "tests/training/data")
_CLASSIFIER = re.compile(r'"Programming Language :: Python :: (3\.\d+)"')


@dataclass(frozen=True)
class Part:
    """An environment to test."""

    python: str
    resolution: str
    """uv's name for which of the admitted versions are installed."""
    extras: str = "dev,export,s3"
    tests: tuple[str, ...] = ()
    """Folders of tests, all by default."""
    needs_checkout: bool = False
    """Whether open_clip is installed from the source checkout in the folder that OPEN_CLIP names."""


@dataclass
class Result:
    """What the tests of a part gave, so far."""

    passed: int
    skipped: int
    failed: int
    commit: str
    again: str = ""
    """The commit at which the tests that had failed were run again."""


class Unavailable(Exception):
    """A part that cannot be run here, with the reason."""


def floors(project: str, extras: str) -> dict[str, str]:
    """The lowest admitted version of each package that pyproject.toml names, without the extras export, openvino, ray
    and gs unless `extras` has them."""
    left_out = tuple(f"{extra} = " for extra in ("export", "openvino", "ray", "gs") if extra not in extras)
    lines = [line for line in project.splitlines() if not line.startswith(left_out)]
    return {canonical(name): version for line in lines for name, version in _REQUIREMENT.findall(line)}


def parts(project: str) -> dict[str, Part]:
    """The parts by name, for the oldest and the newest Python among pyproject.toml's classifiers."""
    pythons = sorted(_CLASSIFIER.findall(project), key=numbers)
    return {
        "lowest": Part(pythons[0], "lowest-direct", "dev,s3"),
        "lowest-export": Part(pythons[0], "lowest-direct", tests=("tests/mobileclip_student", "tests/scripts")),
        "newest": Part(pythons[-1], "highest"),
        "oldest-python": Part(pythons[0], "highest"),
        "open-clip-main": Part(pythons[-1], "highest", tests=_OPEN_CLIP_TESTS, needs_checkout=True),
    }


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> list[int]:
    """A version as numbers that compare: no local part, no zeros at the end."""
    found = [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]
    while found and found[-1] == 0:
        found.pop()
    return found


def above_the_floor(lowest: dict[str, str], installed: dict[str, str]) -> list[str]:
    """Packages whose lowest admitted version was not installed, so that no test has proved it."""
    return [
        f"{name} {installed[name]} instead of {version}"
        for name, version in lowest.items()
        if name in installed and numbers(installed[name]) != numbers(version)
    ]


# --- the environment -------------------------------------------------------------------------------------------------


def uv(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run uv, which is installed first if need be."""
    folder = HOME / "uv"
    if not (program := folder / "bin" / "uv").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", "uv"], check=True)
    environment = {**os.environ, "UV_CACHE_DIR": str(HOME / "cache"), "UV_NO_PROGRESS": "1"}
    return subprocess.run([program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def must(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, done.args[1:]))}: {done.stderr.strip()}")
    return done.stdout


def made(part: Part, folder: Path, project: str) -> dict[str, str]:
    """Make the environment of a part unless it is there, and return the installed versions."""
    checkout = os.environ.get("OPEN_CLIP", "")
    if part.needs_checkout and not checkout:
        raise Unavailable("OPEN_CLIP=DIR names no source checkout of open_clip")
    made_for = hashlib.sha256(f"{part} {project} {checkout if part.needs_checkout else ''}".encode()).hexdigest()
    mark, python = folder / "made_for", folder / "env" / "bin" / "python"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != made_for:
        shutil.rmtree(folder, ignore_errors=True)
        found = uv("venv", "--quiet", "--python", part.python, str(folder / "env"))
        if found.returncode:
            reason = found.stderr.strip().splitlines()[-1].strip().removeprefix("cause: ")
            raise Unavailable(f"uv makes no environment of Python {part.python}: {reason}")
        print(f"installing for Python {part.python}, resolution {part.resolution}: 6 GB", flush=True)
        install = ["pip", "install", "--quiet", "--python", str(python)]
        must(uv(*install, "--resolution", part.resolution, "--editable", "."))
        must(subprocess.run([python, "-c", _IMPORTS], cwd=folder, capture_output=True, text=True))  # needs no extra
        must(uv(*install, "--upgrade", "--resolution", part.resolution, "--editable", f".[{part.extras}]"))
        must(uv(*install, "--no-deps", "clip-benchmark==1.6.2"))
        if part.needs_checkout:
            must(uv(*install, "--no-deps", checkout))
        mark.write_text(made_for, encoding="utf-8")
    listed = json.loads(must(uv("pip", "list", "--quiet", "--format", "json", "--python", str(python))))
    version = must(subprocess.run([python, "--version"], capture_output=True, text=True)).split()[1]
    return {"Python": version, **{canonical(package["name"]): package["version"] for package in listed}}


# --- the tests -------------------------------------------------------------------------------------------------------


def run_tests(folder: Path, *options: str) -> Result:
    """Run tests in a part's environment and count them. Ends the program if pytest could not run them all."""
    report = folder / "report.xml"
    command = [folder / "env" / "bin" / "python", "-m", "pytest", "-q", "-o", f"cache_dir={folder / 'cache'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, f"--junitxml={report}", *options], cwd=ROOT, env=environment)
    if done.returncode not in (0, 1):
        raise SystemExit(f"error: pytest ended with code {done.returncode}; its messages are above")
    suite = ElementTree.parse(report).getroot()[0]
    tests, skipped, failed = (int(suite.attrib[key]) for key in ("tests", "skipped", "failures"))
    failed += int(suite.attrib["errors"])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    # the parts before have written the page
    others = ["git", "status", "--porcelain", "--", ".", ":(exclude)docs/reliability.md"]
    changed = subprocess.run(others, cwd=ROOT, capture_output=True, text=True)
    name = commit.stdout.strip() + ("+" if changed.stdout else "")
    return Result(passed=tests - skipped - failed, skipped=skipped, failed=failed, commit=name)


def tested(folder: Path, *tests: str) -> Result:
    """The result of all tests, or of those in the folders `tests`.

    Those that failed are run again, one by one: a busy machine passes time limits.
    """
    state = folder / "result.json"
    if state.is_file():
        result = Result(**json.loads(state.read_text(encoding="utf-8")))
    else:
        result = run_tests(folder, "-n", "2", "--dist", "loadgroup", *tests)
    if result.failed:
        state.write_text(json.dumps(asdict(result)), encoding="utf-8")
        print(f"{result.failed} failed; running them again", flush=True)
        second = run_tests(folder, "--last-failed")
        result = Result(result.passed + second.passed, result.skipped, second.failed, result.commit, second.commit)
    state.write_text(json.dumps(asdict(result)), encoding="utf-8")
    return result


# --- the table -------------------------------------------------------------------------------------------------------

Columns = dict[str, dict[str, str]]


def read_table(text: str) -> Columns:
    """The columns of a Markdown table by heading, each from the first cell of a row to its own cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    return {
        name: {row[0]: row[place] for row in rows[2:] if row[place]}
        for place, name in enumerate(rows[0] if rows else [])
        if place
    }


def table_of(columns: Columns) -> str:
    """The Markdown table of `columns`."""
    names = dict.fromkeys(key for column in columns.values() for key in column)
    rows = [["", *columns], ["---"] * (1 + len(columns))]
    rows += [[name, *(column.get(name, "") for column in columns.values())] for name in names]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def enter(page: Path, part: str, column: dict[str, str], order: list[str]) -> None:
    """Replace the column of a part in the page's table."""
    before, start, rest = page.read_text(encoding="utf-8").partition(_START)
    table, stop, after = rest.partition(_STOP)
    if not start or not stop:
        raise SystemExit(f"error: {page} has no lines {_START} and {_STOP}, between which the table belongs")
    columns = {**read_table(table), part: column}
    ordered = {name: columns[name] for name in order if name in columns}
    page.write_text(f"{before}{start}\n\n{table_of(ordered)}\n\n{stop}{after}", encoding="utf-8")


def column_of(result: Result, lowest: dict[str, str], installed: dict[str, str]) -> dict[str, str]:
    """A column of the table: the outcome, then the version of each package that pyproject.toml names."""
    run = result.commit + (f", then {result.again}" if result.again else "")
    outcome = f"{result.passed:,} passed, {result.skipped} skipped, {result.failed} failed"
    return {
        "tests": outcome,
        "commit": run,
        "Python": installed["Python"],
        **{name: installed[name] for name in lowest if name in installed},
    }


def main() -> None:
    """Run the parts named, or all."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    known = parts(project)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"parts to run, all by default: {', '.join(known)}")
    chosen = parser.parse_args().parts or list(known)
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(known)}")
    bad = []
    for name in chosen:
        folder = HOME / name
        print(f"{name}: Python {known[name].python}, resolution {known[name].resolution}", flush=True)
        try:
            installed = made(known[name], folder, project)
        except Unavailable as error:
            print(f"{name}: skipped, {error}", flush=True)
            continue
        lowest = floors(project, known[name].extras)
        if known[name].resolution != "highest" and (untested := above_the_floor(lowest, installed)):
            raise SystemExit(f"error: floors that cannot be installed: {', '.join(untested)}. Raise them.")
        result = tested(folder, *known[name].tests)
        enter(ROOT / "docs" / "reliability.md", name, column_of(result, lowest, installed), list(known))
        print(f"{name}: {result.passed} passed, {result.skipped} skipped, {result.failed} failed", flush=True)
        if result.failed:
            bad.append(name)
        else:
            shutil.rmtree(folder)
            shutil.rmtree(HOME / "cache", ignore_errors=True)
    if bad:
        raise SystemExit(f"error: tests failed in {', '.join(bad)}; the environment is kept, `make compat` goes on")


if __name__ == "__main__":
    main()
