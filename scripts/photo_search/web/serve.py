"""Serve the built page, a model and pictures on this machine alone, with the headers that the page is made for."""

from __future__ import annotations

import json
import re
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from photo_search.folders import find_pictures
from photo_search.model import Model

__all__ = ["page_server"]

_LOOPBACK = "127.0.0.1"
_PORT = 8765  # browsers keep the index by address, so it is the same each time, if it is free
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".css": "text/css",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}


def page_server(built: Path, model: Path, pictures: Path) -> ThreadingHTTPServer:
    """A server that is ready to `serve_forever`, on 127.0.0.1 and a port of its choice (`server_port`).

    built     folder of the built page
    model     folder that scripts/export.py wrote
    pictures  folder of pictures; those of its subfolders count

    Raises InputError for a folder that is not what it should be.
    """
    files = {f"/{path.relative_to(built).as_posix()}": path for path in built.rglob("*") if path.is_file()}
    files["/"] = files["/index.html"]
    exported = Model(model)
    exported.check_files()
    files |= {f"/model/{name}": model / name for name in (*exported.hashes, "sha256.json")}
    names = find_pictures(pictures).files
    files |= {f"/pictures/{number}": pictures / name for number, name in enumerate(names)}
    listed = [_listed(pictures, name, number) for number, name in enumerate(names)]
    start = {
        "model": {"name": model.name, "address": "model", "fingerprint": exported.fingerprint},
        "pictures": {"folder": pictures.name, "files": listed},
    }
    policy = re.findall(r'content="(default-src [^"]*)"', files["/"].read_text(encoding="utf-8"))[0]
    handler = type("Handler", (_Handler,), {"files": files, "start": json.dumps(start).encode(), "policy": policy})
    try:
        return _Server((_LOOPBACK, _PORT), handler)
    except OSError:  # in use
        return _Server((_LOOPBACK, 0), handler)


def _listed(folder: Path, name: str, number: int) -> dict[str, Any]:
    found = (folder / name).stat()
    return {
        "name": name,
        "address": f"pictures/{number}",
        "size": found.st_size,
        "changed": found.st_mtime_ns // 1_000_000,
    }


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """A browser that went away in the middle is no error, and the terminal belongs to the command."""


class _Handler(BaseHTTPRequestHandler):
    """Answers with the files that were listed at the start: no address becomes a path."""

    files: dict[str, Path]
    start: bytes
    policy: str

    def do_GET(self) -> None:
        address = self.path.partition("?")[0]
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (_LOOPBACK, "localhost"):  # another site's name that leads to this machine
            self._answer(HTTPStatus.FORBIDDEN, b"", "")
        elif address == "/start.json":
            self._answer(HTTPStatus.OK, self.start, ".json")
        elif (path := self.files.get(address)) is None or not path.is_file():
            self._answer(HTTPStatus.NOT_FOUND, b"", "")
        else:
            self._answer(HTTPStatus.OK, path.read_bytes(), path.suffix)

    def _answer(self, status: HTTPStatus, content: bytes, suffix: str) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": _TYPES.get(suffix, "application/octet-stream"),
            "Content-Length": str(len(content)),
            "Content-Security-Policy": f"{self.policy}; frame-ancestors 'none'",  # the worker has no other policy
            "Cross-Origin-Opener-Policy": "same-origin",  # this and the next allow threads
            "Cross-Origin-Embedder-Policy": "require-corp",
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing of what is asked for."""
