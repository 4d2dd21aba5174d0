"""Code in files never runs: in pickles behind every suffix, in arrays, in settings, annotations and titles."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch

from caption_sources import read_sharegpt4v
from eval.leaks import audit_parts
from eval.pages.report import PlainTable, Report, write_report
from eval.towers.models import load_model
from faults.trials import Row
from longclip_teacher import load_teacher
from longclip_teacher.errors import InputError
from longclip_teacher.weights_file import read_weights, torch_load
from mobileclip_student import load_student
from shard_files import jpeg
from training.cache.datacompdr import DataCompDRStore
from training.data.index import RawSample
from training.data.samples import BadSample, read_captions
from training.data.shard_records import read_manifest
from training.data.store import TeacherInfo
from training.settings.tree import config_from_toml

__all__ = ["ROWS"]

MARK = "executed"  # the file that the code makes


class _Code:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, mark: Path, draws: random.Random) -> None:
        name = str(mark)
        self._call: tuple[Callable[..., object], tuple[Any, ...]] = draws.choice(
            [
                (os.mkdir, (name,)),
                (os.system, (f"touch '{name}'",)),
                (exec, (f"open({name!r}, 'w')",)),
                (eval, (f"open({name!r}, 'w')",)),
                (open, (name, "w")),
                (Path.touch, (Path(name),)),
                (os.makedirs, (name,)),
            ]
        )

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, ...]]:
        return self._call


def _ran(folder: Path, read: Callable[[], object], expected: tuple[type[Exception], ...]) -> str | None:
    """Read, and say what is wrong: that code ran, or that something but `expected` was raised."""
    try:
        read()
    except expected as error:
        if "\n" in str(error):
            return f"a message of several lines: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}" + (" after the code ran" if (folder / MARK).exists() else "")
    return "the code ran" if (folder / MARK).exists() else None


# --- weights ----------------------------------------------------------------------------------------------------------


def _torch_file(path: Path, content: object, draws: random.Random) -> str:
    """Save `content` in one of the ways in which such files are made; its name."""
    way = draws.choice(["zip", "legacy", "pickle", "gzip", "renamed"])
    if way in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip", pickle_protocol=draws.choice([2, 3, 4]))
    else:
        data = pickle.dumps(content, protocol=draws.randrange(6))
        if way == "renamed":  # a pickle inside an archive of another kind
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr(draws.choice(["data.pkl", "archive/data.pkl", "a.npy"]), data)
                archive.writestr("archive/version", b"3\n")
            data = buffer.getvalue()
        path.write_bytes(gzip.compress(data) if way == "gzip" else data)
    return way


def weights_trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    path = folder / f"model{draws.choice(['.pt', '.pth', '.bin', '.ckpt', '.safetensors', ''])}"
    code = _Code(folder / MARK, draws)
    weight = torch.zeros(2, 2)
    content = draws.choice(
        [
            code,
            [code],
            {"weight": weight, "code": code},
            {"state_dict": {"weight": weight}, "epoch": code},
            {"step": code},
        ]
    )
    way = _torch_file(path, content, draws)
    readers: dict[str, Callable[[Path], object]] = {
        "read_weights": read_weights, "torch_load": torch_load, "load_teacher": load_teacher,
        "load_student": load_student, "load_model": lambda file: load_model(str(file)),
    }  # fmt: skip
    name = draws.choice(list(readers))
    wrong = _ran(folder, lambda: readers[name](path), (InputError,))
    return wrong and f"{name} of {path.suffix or 'no suffix'}, {way}: {wrong}"


def _unpickle_all(patch: pytest.MonkeyPatch) -> None:
    safe = torch.load
    patch.setattr("torch.load", lambda file, **options: safe(file, **{**options, "weights_only": False}))


# --- arrays -----------------------------------------------------------------------------------------------------------


def arrays_trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    code = _Code(folder / MARK, draws)
    array = np.array([code, 1], dtype=object)
    buffer = io.BytesIO()
    kind = draws.choice(["npz", "pth.gz", "hashes"])
    if kind == "pth.gz":
        torch.save({"image_emb": torch.eye(2), "text_emb": code}, buffer)
        content = gzip.compress(buffer.getvalue())
    else:
        names = ("image_emb", "text_emb") if kind == "npz" else ("keys", "hashes")
        np.savez(buffer, allow_pickle=True, **dict.fromkeys(names, array))
        content = buffer.getvalue()
    if kind == "hashes":
        (folder / "part.npz").write_bytes(content)
        return _ran(folder, lambda: audit_parts._load(folder / "part.npz"), ())
    extra = {"syn.json": b'{"syn_text": ["a"]}', "paug.json": b'{"param_aug": [[[0, 0, 9, 9]]]}', kind: content}
    store = DataCompDRStore(TeacherInfo((8,), 100.0, 77))
    wrong = _ran(folder, lambda: store.draw(RawSample("a", jpeg(0), None, None, extra), 0, (0, 0)), (BadSample,))
    return wrong and f"{kind}: {wrong}"


def _unpickle_arrays(patch: pytest.MonkeyPatch) -> None:
    def load_npz(data: bytes) -> dict[str, np.ndarray]:
        with np.load(io.BytesIO(data), allow_pickle=True) as file:
            return {name: file[name] for name in file.files}

    _unpickle_all(patch)
    patch.setattr("training.cache.datacompdr_arrays._read_npz", load_npz)
    safe = np.load
    patch.setattr("numpy.load", lambda file, **options: safe(file, **{**options, "allow_pickle": True}))


# --- texts ------------------------------------------------------------------------------------------------------------


class _Scripts(HTMLParser):
    """Finds what a browser would run."""

    found: str | None = None

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        handlers = [name for name, value in attributes if name.startswith("on") or "javascript:" in (value or "")]
        if tag in ("script", "iframe", "object", "embed") or handlers:
            self.found = f"<{tag} {' '.join(handlers)}>"


def _texts(mark: str, draws: random.Random) -> str:
    return draws.choice(
        [
            f"__import__('os').mkdir({mark!r})",
            f"!!python/object/apply:os.mkdir [{mark!r}]",
            f"{{{{ cycler.__init__.__globals__.os.mkdir({mark!r}) }}}}",
            f"$(mkdir {mark}) `mkdir {mark}` | mkdir {mark}; mkdir {mark}",
            "<script>alert(1)</script>",
            "</title><script src=//example.org></script>",
            '"><img src=x onerror=alert(1)>',
            "' onmouseover='alert(1)",
            "<svg onload=alert(1)>",
            "<a href=javascript:alert(1)>x</a>",
        ]
    )


def texts_trial(draws: random.Random, folder: Path, material: Path) -> str | None:
    text = _texts(str(folder / MARK), draws)
    kind = draws.choice(["page", "page", "TOML", "conversations", "sample", "manifest"])
    path = folder / "file"
    if kind == "page":
        page = Report(
            text, [text], conditions=[text], warnings=[text], tables={text: PlainTable(text, [text], [[text]])},
            provenance={text: text},
        )  # fmt: skip
        if wrong := _ran(folder, lambda: write_report(path, page), ()):
            return wrong
        finder = _Scripts()
        finder.feed(path.read_text())
        return finder.found and f"the page holds {finder.found} from {text}"
    path.write_text(
        f"[run]\nout_dir = {json.dumps(text)}\n" if kind == "TOML" else json.dumps(_annotations(kind, text))
    )
    readers: dict[str, Callable[[], object]] = {
        "TOML": lambda: config_from_toml(path),
        "conversations": lambda: list(read_sharegpt4v(path, folder, "auto")),
        "sample": lambda: read_captions(RawSample("a", None, path.read_bytes(), None)),
        "manifest": lambda: read_manifest(path.rename(folder / "manifest.json").parent),
    }
    wrong = _ran(folder, readers[kind], (InputError, BadSample))
    return wrong and f"{kind}: {wrong}"


def _annotations(kind: str, text: str) -> object:
    if kind == "conversations":
        return [{"image": text, "id": text, "conversations": [{"from": "gpt", "value": text}]}]
    return {"caption_long": text, "caption_short": text, "format": text, "shards": [text]}


def _run_texts(patch: pytest.MonkeyPatch) -> None:
    """Pages without escapes, and a reader of JSON that evaluates its texts."""
    environment = jinja2.Environment
    patch.setattr("eval.pages.report.Environment", lambda **options: environment(**{**options, "autoescape": False}))
    read = json.loads

    def evaluate(value: object) -> object:
        if isinstance(value, str):
            with contextlib.suppress(Exception):
                eval(value)  # noqa: S307 -- our own text, in a process that must fail
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            evaluate(item)
        return value

    patch.setattr("json.loads", lambda text, **options: evaluate(read(text, **options)))


ROWS = [
    Row(
        "code in weights",
        "pickles with code in torch files of every form and suffix: refused in one line, and nothing runs",
        weights_trial,
        full=750,
        few=30,
        off="torch.load unpickles everything",
        switch_off=_unpickle_all,
        num_off=30,
        per_process=30,
        found="a torch file with the suffix .safetensors, given to `--run.resume`, was a traceback",
    ),
    Row(
        "code in arrays",
        "pickles with code in npz and gzipped torch files of stored features: left out, and nothing runs",
        arrays_trial,
        full=350,
        few=20,
        off="numpy and torch unpickle everything",
        switch_off=_unpickle_arrays,
        num_off=20,
        per_process=30,
    ),
    Row(
        "code in texts",
        "code and markup in settings, annotations, captions, names and titles: plain text everywhere",
        texts_trial,
        full=400,
        few=40,
        off="pages escape nothing, texts are evaluated",
        switch_off=_run_texts,
        num_off=40,
        per_process=40,
    ),
]
