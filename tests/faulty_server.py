"""A web server on 127.0.0.1 that does what servers should not do, and random trials of reading a shard from it."""

from __future__ import annotations

import functools
import http.server
import io
import os
import random
import re
import socket
import ssl
import struct
import tarfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from longclip_teacher.errors import InputError
from training.data.http_answer import Patience
from training.data.index import RawSample
from training.data.stream import read_remote_shard

HURRIED = Patience(
    connect=5, read=3.0, least_bytes=1 << 10, first_wait=0.01, longest_wait=0.02, longest_retry_after=0.05
)
HASTY = replace(HURRIED, read=0.8)
"""For servers that stall."""
MTIME = "Mon, 02 Jan 2023 10:00:00 GMT"


@dataclass(frozen=True)
class Fault:
    """What happens to one request. Without further notice it is answered as it should be."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    """In place of those that would be sent; "" leaves one out."""
    body: bytes | None = None
    cut_at: int | None = None
    """Bytes of the body after which `then` happens. The rest is not sent, or trickles."""
    then: str = "close"
    """close, reset, stall, trickle (one byte at a time), or repeat (`more` without end)."""
    raw: bytes | None = None
    """Sent in place of everything, before `then` happens."""
    more: bytes = b""


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves `content` at every path, or several contents by path. The first requests meet `faults`, one after the
    other."""

    daemon_threads = True

    def __init__(
        self, content: bytes | Mapping[str, bytes], *faults: Fault, ranges: bool = True,
        validators: tuple[str, ...] = ("ETag",), framing: str = "length", tls: ssl.SSLContext | None = None,
    ) -> None:  # fmt: skip
        """framing    length, chunked, or close: the end of the connection is that of the file"""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.faults, self.ranges, self.framing = content, deque(faults), ranges, framing
        self.identity = {name: {"ETag": '"one"', "Last-Modified": MTIME}[name] for name in validators}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.statuses: list[int] = []
        self.closing = threading.Event()
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """Say nothing: clients leave as they like."""


@contextmanager
def serving(*args: Any, **options: Any) -> Iterator[FaultyServer]:
    """A FaultyServer at work; `options` are its own."""
    with FaultyServer(*args, **options) as server:
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.requests.append((self.path, dict(self.headers)))
        fault = server.faults.popleft() if server.faults else Fault()
        self.close_connection = True
        if fault.raw is not None:
            self.wfile.write(fault.raw)
            self._then(fault, bytes(200))
            return
        status, headers, body = self._proper()
        if fault.status is not None:
            status, headers, body = fault.status, {}, fault.body or b""
        body = body if fault.body is None else fault.body
        headers |= {"Content-Length": str(len(body))} if server.framing == "length" else {}
        headers |= {"Transfer-Encoding": "chunked"} if server.framing == "chunked" else {}
        headers |= fault.headers
        server.statuses.append(status)
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        cut = len(body) if fault.cut_at is None else min(fault.cut_at, len(body))
        chunked = headers.get("Transfer-Encoding") == "chunked"
        for start in range(0, cut, 30_000):
            part = body[start : min(start + 30_000, cut)]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
        if fault.cut_at is None:
            self.wfile.write(b"0\r\n\r\n" if chunked else b"")
        else:
            self._then(fault, body[cut : cut + 200])

    def _proper(self) -> tuple[int, dict[str, str], bytes]:
        """The answer that is right."""
        server = self.server
        content, headers = server.content, dict(server.identity)
        if not isinstance(content, bytes):
            content = content.get(self.path)
            if content is None:
                return 404, {}, b""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        if not server.ranges or not asked or (condition and condition not in headers.values()):
            return 200, headers, content
        start, size = int(asked[1]), len(content)
        if start >= size:
            return 416, {"Content-Range": f"bytes */{size}"}, b""
        return 206, {**headers, "Content-Range": f"bytes {start}-{size - 1}/{size}"}, content[start:]

    def _then(self, fault: Fault, rest: bytes) -> None:
        if fault.then == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        elif fault.then == "stall":
            self.server.closing.wait(5)
        elif fault.then == "repeat":
            while not self.server.closing.is_set():
                self.wfile.write(fault.more)
        elif fault.then == "trickle":
            for value in rest:
                self.wfile.write(bytes([value]))
                if self.server.closing.wait(0.05):
                    break


# --- trials -----------------------------------------------------------------------------------------------------------


def make_shard(generator: random.Random, num_samples: int) -> tuple[bytes, list[RawSample]]:
    """A tar of samples of random bytes, and what it holds."""
    buffer, samples = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(num_samples):
            parts = {"jpg": generator.randbytes(generator.randrange(20_000)), "txt": f"caption {number}".encode()}
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            samples.append(RawSample(f"{number:04d}", parts["jpg"], None, parts["txt"]))
    return buffer.getvalue(), samples


def passing_fault(generator: random.Random, size: int) -> Fault:
    """A fault that is gone when the shard is asked for again."""
    cut = generator.randrange(size)
    later = generator.choice(("", "0", "9", "x"))
    kinds = [
        Fault(generator.choice((429, 500, 502, 503, 504)), headers={"Retry-After": later}),
        Fault(cut_at=cut, then=generator.choice(("close", "reset", "stall"))),
        Fault(cut_at=cut, then="close"),
        Fault(cut_at=0, then="trickle", raw=b"HTTP/1.1 200 OK\r\nX-Slow: "),
        Fault(raw=generator.choice((b"", b"HTTP/1.1 200 OK\r\nContent-Le", b"SSH-2.0-x\r\n")), then="close"),
        Fault(raw=b"HTTP/1.1 200 OK\r\n" + b"X-More: 1\r\n" * 200, then="close"),
        Fault(headers={"Content-Length": str(cut), "Transfer-Encoding": ""}, cut_at=cut),
        Fault(headers={"Content-Length": str(size + 1 + cut), "Transfer-Encoding": ""}, cut_at=size),
        Fault(headers={"ETag": '"two"', "Last-Modified": ""}, cut_at=cut),
        Fault(headers={"Content-Range": f"bytes {cut}-{size - 1}/{size}"}, cut_at=cut),
        Fault(302, headers={"Location": "elsewhere.tar?again=" + "1" * generator.randrange(9)}),
    ]  # fmt: skip
    return generator.choice(kinds)


def lasting_fault(generator: random.Random) -> tuple[Fault, str]:
    """A fault that does not go away, and words of the line that names it."""
    page = Fault(200, headers={"Content-Type": "text/html; charset=utf-8"}, body=b"\n<html>log in")
    return generator.choice([
        (Fault(404), r"HTTP 404 \(Not Found\)"),
        (Fault(403), r"HTTP 403 \(Forbidden\): the server wants a login"),
        (Fault(206, body=b"part"), "a part of it, though all was asked for"),
        (page, "a web page in its place"),
        (Fault(headers={"Content-Encoding": "gzip"}), "Content-Encoding: gzip"),
        (Fault(301, headers={"Location": "/s.tar"}), "a redirect to .*/s.tar that goes in a circle"),
        (Fault(302, headers={"Location": "file:///etc/passwd"}), "only https is"),
        (Fault(302, headers={"Location": "http://127.0.0.2:9/s.tar"}), "only one from https to https is"),
    ])  # fmt: skip


def http_trial(generator: random.Random, patience: Patience = HASTY) -> str | None:
    """Read a random shard from a server with random faults. Return what went wrong, or None if no sample was lost or
    doubled, or else the shard and the cause were named in one line."""
    content, expected = make_shard(generator, generator.randrange(1, 12))
    options: dict[str, Any] = {
        "ranges": generator.random() < 0.7,
        "validators": generator.choice([("ETag",), ("ETag", "Last-Modified"), ("Last-Modified",), ()]),
        "framing": generator.choice(["length", "length", "chunked", "close"]),
    }
    end = len(content.rstrip(b"\0"))
    faults = [passing_fault(generator, len(content)) for _ in range(generator.randrange(1, 5))]
    cause = ""
    if generator.random() < 0.25:
        fault, cause = lasting_fault(generator)
        faults = [*[fault for fault in faults if fault.status in (429, 500, 502, 503, 504)], *[fault] * 20]
    elif generator.random() < 0.1:
        content, cause = content[: generator.randrange(0, end, 512)], "cut short|end of data|empty file"
        faults = [replace(fault, cut_at=None) for fault in faults if fault.status]
    elif generator.random() < 0.1:
        changed = bytes(1) + content[1:]
        faults = [Fault(cut_at=end), *[Fault(headers={"ETag": '"two"', "Last-Modified": ""}, body=changed)] * 20]
        options["ranges"], cause = False, "it changed on the server while it was read"
    found: list[RawSample] = []
    message = ""
    with serving(content, *faults, **options) as server:
        try:
            found.extend(read_remote_shard(f"{server.url}/s.tar", patience=patience))
        except InputError as error:
            message = str(error)
    told = f"{faults} {options}: {len(found)} of {len(expected)} samples, {message!r}"
    if found != expected[: len(found)]:
        return f"samples are wrong: {told}"
    if not cause:
        return None if found == expected and not message else f"samples are lost: {told}"
    is_named = message.startswith(f"cannot read {server.url}/s.tar: ") and "\n" not in message
    return None if is_named and re.search(cause, message) else f"the cause is not named: {told}"
