"""Search a folder of photos by paragraphs, with a model that scripts/export.py wrote, and without torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from photo_search.errors import InputError, run, shown

if TYPE_CHECKING:
    from photo_search.index import Index
    from photo_search.indexing import Update

_ABOUT = """\
Search a folder of photos by paragraphs, with a model that scripts/export.py wrote.

  python scripts/search_photos.py index PHOTOS --model MODEL      make the index, or bring it up to date
  python scripts/search_photos.py search "A long text. ..."       the ten pictures that fit best
  python scripts/search_photos.py search --image PICTURE          pictures like this one
  python scripts/search_photos.py search "a beach" --minus "people" --top 30 --open
  python scripts/search_photos.py embed PHOTOS --model MODEL --out features.npy

It needs numpy, onnxruntime, tokenizers and pillow; pillow-heif for HEIC.
"""
_INDEX = """\
Make the index of a folder and its subfolders, or bring it up to date.

Files whose size and time of change are as before are not read again. Renamed, moved and copied files are recognised by
their contents; files that are gone leave the index. A picture that cannot be read is listed and does not stop the
command. If the command is stopped, the next one goes on where it was. With another model, all is embedded again.
"""
_SEARCH = """\
Find the pictures that fit a text, a picture, or both.

The score is the cosine of picture and query, less that of --minus. If the text has several sentences, each hit shows
its score for every sentence and where it stands among all pictures for that sentence: "top 0.1%" is what matched,
"top 60%" is what did not.
"""
_EMBED = """\
Write the features of a folder's pictures for an index of your own: float32 [N, D] of unit norm, and their names.

Beside features.npy stands features.json: "names" in the order of the rows, "problems" and the model's "fingerprint".
The folder features.index is an index as `index` makes it, so that the next call reads only new and changed files.
"""
_MODEL = "folder that export.py wrote, or one of its graphs, such as MODEL/onnx/vision_model_quantized.onnx"
_MORE = 10  # broken pictures that are named
_BETWEEN_LINES = 10  # seconds between lines of progress in a log


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help explains)")


def main() -> None:
    """Read the options and call the command."""
    parser = _Parser(description=_ABOUT)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    index = commands.add_parser("index", help="make an index, or bring it up to date", description=_INDEX)
    index.add_argument("folder", type=Path, help="folder of photos; its subfolders count")
    index.add_argument("--model", type=Path, help=f"{_MODEL}; by default, the one of the index")
    index.set_defaults(run=index_command)
    find = commands.add_parser("search", help="search by text or picture", description=_SEARCH)
    find.add_argument("text", nargs="?", help="what the pictures show, in one sentence or many")
    find.add_argument("--image", type=Path, metavar="FILE", help="find pictures like this one")
    find.add_argument("--minus", metavar="TEXT", help="what they should not show")
    find.add_argument("--top", type=_positive, default=10, metavar="N", help="how many to show (default: 10)")
    find.add_argument("--model", type=Path, help="where the model is now, if it was moved")
    find.add_argument("--open", action="store_true", help="write INDEX/search.html with the pictures, and show it")
    find.set_defaults(run=search_command)
    embed = commands.add_parser("embed", help="write features for an index of your own", description=_EMBED)
    embed.add_argument("folder", type=Path, help="folder of photos; its subfolders count")
    embed.add_argument("--model", type=Path, required=True, help=_MODEL)
    embed.add_argument("--out", type=Path, required=True, metavar="FILE.npy", help="file of features to write")
    embed.set_defaults(run=embed_command)
    for command in (index, find):
        command.add_argument(
            "--index", type=Path, default=Path("photo_index"), metavar="DIR", help="the index (default: photo_index)"
        )
    for command in (index, find, embed):
        command.add_argument("--json", action="store_true", help="print JSON for programs")
    options = parser.parse_args()
    options.run(options)


def index_command(options: argparse.Namespace) -> None:
    """Make an index, or bring it up to date."""
    start = time.perf_counter()
    with _updated(options, options.index) as (_, done):
        pass
    _report(done, options.json, time.perf_counter() - start)


def search_command(options: argparse.Namespace) -> None:
    """Search, print, and write the contact sheet if asked."""
    from photo_search.index import open_index
    from photo_search.model import Model
    from photo_search.searching import Query, search

    with open_index(options.index) as index:
        source = index.source
        if source is None:
            raise InputError(f"{options.index} is empty: index a folder first")
        features, problems = index.features(), index.problems()
    _check_some_were_read(features.names, problems, source.folder)
    model = Model((options.model or source.model).absolute())
    if model.fingerprint != source.fingerprint:
        raise InputError(f"{model.folder} is not the model of {options.index}: index the folder again with it")
    query = Query(options.text, options.image, options.minus)
    _warn_of_length(model, options.text)
    hits = search(features, model, query, options.top)
    if options.json:
        print(json.dumps([{"file": str(source.folder / hit.name), **_plain(hit)} for hit in hits], indent=2))
    else:
        _print_hits(source.folder, hits, len(features.names))
    if options.open:
        from photo_search.contact_sheet import write_contact_sheet

        sheet = (options.index / "search.html").resolve()
        write_contact_sheet(sheet, source.folder, query, hits, len(features.names))
        _show(sheet)


def embed_command(options: argparse.Namespace) -> None:
    """Write features and names, from an index beside them that is brought up to date."""
    import numpy as np

    from photo_search.atomic import replaced

    if options.out.suffix != ".npy":
        raise InputError(f"--out {options.out}: name a file that ends in .npy")
    start = time.perf_counter()
    with _updated(options, options.out.with_suffix(".index")) as (index, done):
        features, source = index.features(), index.source
    _check_some_were_read(features.names, done.problems, source.folder)
    told = {"names": features.names, "problems": done.problems, "fingerprint": source.fingerprint}
    with replaced(options.out.with_suffix(".json")) as names, replaced(options.out) as file:
        names.write(json.dumps(told, indent=2).encode())
        np.save(file, features.vectors)
    _report(done, options.json, time.perf_counter() - start)


@contextmanager
def _updated(options: argparse.Namespace, place: Path) -> Iterator[tuple[Index, Update]]:
    """The index at `place`, made or brought up to date, and what that took."""
    from photo_search.index import written_index
    from photo_search.indexing import update
    from photo_search.model import Model

    if not options.folder.is_dir():
        raise InputError(f"no folder {options.folder}")
    model = None if options.model is None else Model(options.model.absolute())
    with written_index(place) as index:
        if model is None and (source := index.source) is None:
            raise InputError(f"{place} is new: name the model with --model")
        yield index, update(index, options.folder.resolve(), model or Model(source.model), _Progress())


def _check_some_were_read(names: list[str], problems: dict[str, str], folder: Path) -> None:
    if not names:
        name, problem = next(iter(problems.items()), ("index the folder again", "it has changed"))
        raise InputError(f"no picture below {folder} could be read, the first for this reason: {name}: {problem}")


def _report(done: Update, as_json: bool, seconds: float) -> None:
    """Say what was done: numbers on stdout, pictures that cannot be read on stderr."""
    if as_json:
        print(json.dumps({**_plain(done), "seconds": round(seconds, 2)}, indent=2))
        return
    for name, problem in list(done.problems.items())[:_MORE]:
        print(f"not read: {shown(name)}: {problem}", file=sys.stderr)
    if len(done.problems) > _MORE:
        print(f"not read: {len(done.problems) - _MORE} more, which --json lists", file=sys.stderr)
    if done.passed_over:
        print(
            f"passed over: {len(done.passed_over)} links that lead out of the folder or to what is read already, "
            f"the first: {shown(done.passed_over[0])}",
            file=sys.stderr,
        )
    print(
        f"{done.pictures} pictures: {done.embedded} embedded, {done.known} known by their contents, "
        f"{done.unchanged} unchanged; {done.removed} removed, {len(done.problems)} not read; {seconds:.1f} s"
    )


def _print_hits(folder: Path, hits: list[Any], num_pictures: int) -> None:
    for number, hit in enumerate(hits, start=1):
        print(f"{number:3d}  {hit.score:6.3f}  {shown(str(folder / hit.name))}")
        for one in hit.sentences:
            print(f"     {one.score:6.3f}  top {100 * one.rank / num_pictures:.3g}%  {shown(one.text)}")


def _warn_of_length(model: Any, text: str | None) -> None:
    if text is not None:
        length, read = model.num_tokens(text)
        if length > read:
            print(f"the text has {length} tokens; the model reads the first {read}", file=sys.stderr)


def _show(sheet: Path) -> None:
    """Say where the page is, and open it if there is a desktop: a browser of the terminal would take that over."""
    import webbrowser

    print(f"contact sheet: {shown(str(sheet))}", file=sys.stderr)
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(sheet.as_uri())


class _Progress:
    """How far a command is, on stderr: one line that is written over on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._start = self._told = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now, is_terminal = time.perf_counter(), sys.stderr.isatty()
        if is_terminal or now - self._told > _BETWEEN_LINES:
            self._told, speed = now, done / (now - self._start)
            line = f"{done} of {total} files, {speed:.0f}/s, {(total - done) / speed:.0f} s left"
            start, end = ("\r", "   " + "\n" * (done == total)) if is_terminal else ("", "\n")
            print(start, line, sep="", end=end, file=sys.stderr, flush=True)


def _plain(value: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(value)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


if __name__ == "__main__":
    run(main)
