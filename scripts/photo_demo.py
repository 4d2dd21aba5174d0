"""Search pictures by paragraphs in a browser: export the quickstart's student, build the page, serve both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eval.base.arguments import answer_early, read_options
from longclip_teacher.errors import InputError, run_command

RUN = Path("runs/quickstart/distilled")
MODEL = RUN.with_name("distilled_export")


@dataclass
class Options:
    """Serve the photo search as a page on this machine, with the quickstart's student and a folder of pictures.

    The student is exported to runs/quickstart/distilled_export if it is not there yet, or was trained again since. The
    page is built with npm and Node.js 20.19 or later. It is served on 127.0.0.1, for this machine alone, until Ctrl-C.
    """

    pictures: Path = Path("data/digit_scenes/random/image")
    """Folder of pictures with which the page starts. More can be chosen in the page."""

    def check(self) -> None:
        """Raise InputError if a folder is missing, before any work."""
        if not (RUN / "best.safetensors").is_file():
            raise InputError(f"no {RUN / 'best.safetensors'}: run `make quickstart` first")
        if not self.pictures.is_dir():
            raise InputError(f"--pictures {self.pictures}: no such folder")


if __name__ == "__main__":
    answer_early(Options)  # --help and refused options end here: the imports below take seconds

import shutil
import subprocess
import sys

import photo_search.errors
from eval.base.consoles import plain_console
from photo_search.web.build import built_page
from photo_search.web.serve import page_server

EXPORT = Path(__file__).with_name("export.py")
say = plain_console(stderr=True, soft_wrap=True).print


def main() -> None:
    """Export, build, serve."""
    options = read_options(Options)
    export_student()
    say("building the page")
    try:
        server = page_server(built_page(), MODEL.resolve(), options.pictures.resolve())
    except photo_search.errors.InputError as error:
        raise InputError(str(error)) from None
    print(f"Open http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("ended", file=sys.stderr)


def export_student() -> None:
    """Export the student of the quickstart, unless that was done since it was trained."""
    manifest = MODEL / "sha256.json"
    if manifest.is_file() and manifest.stat().st_mtime > (RUN / "best.safetensors").stat().st_mtime:
        return
    shutil.rmtree(MODEL, ignore_errors=True)
    if subprocess.run([sys.executable, str(EXPORT), str(RUN), "--out", str(MODEL)], check=False).returncode:
        raise InputError(f"{RUN} could not be exported: see the error above")


if __name__ == "__main__":
    run_command(main)
