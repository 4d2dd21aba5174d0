"""A shard from a server with faults: whole and in order, or the cause in one line."""

from __future__ import annotations

import email.utils
import io
import random
import tarfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from faulty_server import HASTY, HURRIED, MTIME, Fault, FaultyServer, http_trial, make_shard, serving
from longclip_teacher.errors import InputError
from training.data.download import Download, TriesExhausted
from training.data.stream import read_remote_shard

CONTENT, SAMPLES = make_shard(random.Random(0), 9)
CUT = 40_000
MOST_MEMORY = 2 << 20


def downloaded(server: FaultyServer, patience: Any = HURRIED, ending: bytes = b"") -> bytes:
    pieces = []
    with closing(Download(f"{server.url}/a.tar", ending, patience)) as download:
        while data := download.read(10_240):
            pieces.append(data)
    return b"".join(pieces)


def requested(server: FaultyServer, name: str) -> list[str | None]:
    """A header of each request."""
    return [headers.get(name) for _, headers in server.requests]


PASSING = {
    **{f"HTTP {status}": Fault(status) for status in (408, 429, 500, 502, 503, 504)},
    **{then: Fault(cut_at=CUT, then=then) for then in ("close", "reset", "stall", "trickle")},
    "no answer": Fault(raw=b""),
    "no http": Fault(raw=b"SSH-2.0-OpenSSH\r\n"),
    "half a header": Fault(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 12"),
    "lengths": Fault(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello"),
    "no length": Fault(headers={"Content-Length": "-5"}),
    "too long": Fault(headers={"Content-Length": str(len(CONTENT) + 9)}, cut_at=len(CONTENT)),
}


@pytest.mark.parametrize("validators", [("ETag",), ("Last-Modified",), ()], ids=str)
@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_passes_is_tried_again(fault: Fault, validators: tuple[str, ...]) -> None:
    with serving(CONTENT, fault, validators=validators) as server:
        assert downloaded(server, HASTY if fault.then in ("stall", "trickle") else HURRIED) == CONTENT
    assert len(server.requests) == 2 and not server.faults


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("then", ["close", "reset", "stall"])
def test_the_rest_is_asked_for_if_the_server_can_tell_its_files_apart(framing: str, then: str) -> None:
    for validators, expected in [(("ETag", "Last-Modified"), '"one"'), (("Last-Modified",), MTIME)]:
        with serving(CONTENT, Fault(cut_at=CUT, then=then), validators=validators, framing=framing) as server:
            assert downloaded(server, HASTY if then == "stall" else HURRIED, bytes(1024)) == CONTENT
        (first, start), condition = requested(server, "Range"), requested(server, "If-Range")
        assert first is None and start is not None and condition == [None, expected]
        assert start == f"bytes={CUT}-" or then == "reset"  # a reset throws away what was on the way


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({"validators": ()}, Fault()),
        ({"ranges": False}, Fault()),
        ({}, Fault(headers={"ETag": '"two"'})),  # another number for the same bytes
        ({}, Fault(headers={"Content-Range": f"bytes {CUT + 1}-{len(CONTENT) - 1}/{len(CONTENT)}"})),
        ({}, Fault(headers={"Content-Range": f"bytes {CUT}-{len(CONTENT) - 1}/{len(CONTENT) + 1}"})),
        ({}, Fault(headers={"Content-Range": ""})),
        ({}, Fault(416, headers={"Content-Range": f"bytes */{CUT - 1}"})),
    ],
    ids=["no ETag", "no ranges", "other ETag", "other start", "other size", "no range", "no end"],
)
def test_otherwise_the_shard_is_read_again_past_what_was_delivered(options: dict[str, Any], again: Fault) -> None:
    with serving(CONTENT, Fault(cut_at=CUT), again, **options) as server:
        assert downloaded(server, ending=bytes(1024)) == CONTENT
    assert server.statuses[-1] == 200 and len(server.requests) <= 3


def test_a_weak_etag_proves_nothing() -> None:
    weak = {"ETag": 'W/"one"'}
    with serving(CONTENT, Fault(cut_at=CUT, headers=weak), Fault(headers=weak)) as server:
        assert downloaded(server) == CONTENT
    assert requested(server, "Range") == [None, None]


@pytest.mark.parametrize("ranges", [True, False])
def test_two_versions_are_never_mixed(ranges: bool) -> None:
    changed = Fault(200, headers={"ETag": '"two"'}, body=b"\1" + CONTENT[1:])
    cause = r"\Ait changed on the server while it was read\Z"
    with serving(CONTENT, Fault(cut_at=CUT), changed, ranges=ranges) as server, pytest.raises(InputError, match=cause):
        downloaded(server)
    shorter = [Fault(200, body=CONTENT[: CUT - 1])] * 9
    with serving(CONTENT, Fault(cut_at=CUT), *shorter, ranges=ranges) as server, pytest.raises(InputError, match=cause):
        downloaded(server)
    assert len(server.faults) == 7  # what is shorter is asked for once more


LASTING = {
    "404": (Fault(404), r"HTTP 404 \(Not Found\): check its name"),
    "403": (Fault(403), r"HTTP 403 \(Forbidden\): the server wants a login, or does not let you have it"),
    "401": (Fault(401), r"HTTP 401 \(Unauthorized\): the server wants a login"),
    "418": (Fault(418), r"HTTP 418 \(I'm a Teapot\)\Z"),
    "799": (Fault(799), r"HTTP 799 \(unknown\)\Z"),
    "part": (Fault(206, body=b"part"), r"HTTP 206 \(Partial Content\): a part of it, though all was asked for"),
    "gzip": (Fault(headers={"Content-Encoding": "gzip"}), r"on the way \(Content-Encoding: gzip\): let it"),
    "transfer": (Fault(headers={"Transfer-Encoding": "gzip, chunked"}), r"\(Transfer-Encoding: gzip, chunked\)"),
    "page": (
        Fault(200, headers={"Content-Type": "text/html; charset=utf-8"}, body=b"\xef\xbb\xbf\n<!DOCTYPE html>" * 999),
        "a web page in its place: perhaps the server wants a login, or the URL is that of a page",
    ),
    "loop": (Fault(301, headers={"Location": "?key=secret"}), r"301, a redirect to .*/a\.tar\?\.\.\. that goes in a"),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "cause"), LASTING.values(), ids=LASTING)
def test_what_lasts_is_named_at_once(fault: Fault, cause: str) -> None:
    with serving(CONTENT, fault) as server, pytest.raises(InputError, match=cause) as caught:
        list(read_remote_shard(f"{server.url}/a.tar?key=secret", patience=HURRIED))
    message = str(caught.value)
    assert message.startswith(f"cannot read {server.url}/a.tar?...: ") and message.isprintable()
    assert len(server.requests) == 1 and not isinstance(caught.value, TriesExhausted)


def test_a_tar_that_is_called_a_page_is_read() -> None:
    with serving(CONTENT, Fault(headers={"Content-Type": "text/html", "Content-Encoding": "identity"})) as server:
        assert downloaded(server) == CONTENT


def test_a_page_in_the_middle_is_named() -> None:
    page = Fault(200, headers={"Content-Type": "text/html"}, body=b"<html>" + bytes(len(CONTENT)))
    with (
        serving(CONTENT, Fault(cut_at=CUT), page) as server,
        pytest.raises(InputError, match="a web page in its place"),
    ):
        downloaded(server)


def test_after_the_last_try_the_cause_is_named() -> None:
    with serving(CONTENT, Fault(cut_at=CUT), *[Fault(503)] * 20) as server, pytest.raises(TriesExhausted) as caught:
        list(read_remote_shard(f"{server.url}/a.tar", patience=HURRIED))
    cause = "HTTP 503 (Service Unavailable), after 8 tries"
    assert str(caught.value) == f"cannot read {server.url}/a.tar: {cause}"
    assert len(server.requests) == 8


def test_nobody_listens() -> None:
    with serving(CONTENT) as server:
        pass
    with pytest.raises(TriesExhausted, match=r"127\.0\.0\.1: Connection refused, after 3 tries"):
        downloaded(server, replace(HURRIED, tries=3))


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    waited: list[float] = []
    with monkeypatch.context() as patch:
        patch.setattr("training.data.download.time.sleep", waited.append)
        yield waited


def test_waits_grow_at_random_within_bounds(sleeps: list[float]) -> None:
    patience = replace(HURRIED, first_wait=1.0, longest_wait=5.0)
    state = random.getstate()
    for _ in range(2):
        with serving(CONTENT, *[Fault(503)] * 7) as server:
            downloaded(server, patience)
    assert random.getstate() == state
    longest = [1.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0]
    assert all(most / 2 <= wait <= most for wait, most in zip(sleeps, longest * 2, strict=True))
    assert sleeps[:7] != sleeps[7:]


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [("2", 2, 2), ("9999", 7, 7), ("-1", 0, 1), ("soon", 0, 1), (MTIME, 0, 1), ("later", 2, 5.1), ("9" * 99, 0, 1)],
)
def test_a_server_may_ask_for_some_patience(sleeps: list[float], asked: str, least: float, most: float) -> None:
    asked = email.utils.formatdate(time.time() + 5, usegmt=True) if asked == "later" else asked
    with serving(CONTENT, Fault(429, headers={"Retry-After": asked})) as server:
        downloaded(server, replace(HURRIED, longest_retry_after=7.0))
    assert least <= sleeps[0] <= most


def test_tries_are_counted_anew_after_progress(sleeps: list[float]) -> None:
    content = random.Random(0).randbytes(12 << 20)
    with serving(content, *[Fault(cut_at=1_200_000)] * 30) as server:
        assert downloaded(server, replace(HURRIED, tries=2)) == content
    assert len(server.requests) > 9
    with (
        serving(content, *[Fault(cut_at=900_000)] * 30) as server,
        pytest.raises(TriesExhausted, match="after 2 tries"),
    ):
        downloaded(server, replace(HURRIED, tries=2))


# --- the end of a shard -----------------------------------------------------------------------------------------------


def boundary(number: int) -> int:
    """The offset of a member, at which a cut leaves a tar without fault but for its missing end mark."""
    with tarfile.open(fileobj=io.BytesIO(CONTENT)) as archive:
        return archive.getmembers()[number].offset


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("number", [4, 5])
def test_a_cut_at_a_member_that_nothing_else_reveals_is_noticed(number: int, ranges: bool) -> None:
    cut = boundary(number)
    for framing, fault in (("close", Fault(cut_at=cut)), ("length", Fault(headers={"Content-Length": str(cut)}))):
        with serving(CONTENT, fault, ranges=ranges, framing=framing) as server:
            assert list(read_remote_shard(f"{server.url}/a.tar", patience=HURRIED)) == SAMPLES
        assert len(server.requests) > 1
    for framing in ("length", "chunked", "close"):
        found = []
        with (
            serving(CONTENT[:cut], ranges=ranges, framing=framing) as server,
            pytest.raises(
                InputError, match=r"\Acannot read [^\n]*a\.tar: no complete tar file \(.* after \d samples\)\Z"
            ),
        ):
            found.extend(read_remote_shard(f"{server.url}/a.tar", patience=HURRIED))
        assert found == SAMPLES[: len(found)] and len(found) >= 1  # none that lacks its caption
        assert len(server.requests) == 2  # once more, and no more often


@pytest.mark.parametrize("seed", range(12))
def test_random_faults_lose_nothing(seed: int) -> None:
    assert http_trial(random.Random(seed)) is None


def test_without_tries_the_trials_would_fail() -> None:
    patience = replace(HASTY, tries=1)
    assert sum(http_trial(random.Random(seed), patience) is not None for seed in range(12)) >= 6


# --- tars without end -------------------------------------------------------------------------------------------------


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("start", "more", "cause"),
    [
        (header("x", 3 << 30, tarfile.XHDTYPE), b"x" * 51_200, "more than 64 KiB of names and attributes"),
        (header("x", 3 << 30, tarfile.GNUTYPE_LONGNAME), b"x" * 51_200, "more than 64 KiB of names and attributes"),
        (header("1.mp4", 1 << 50), b"x" * 51_200, "no sample in 2 MiB"),
        (header("1.jpg", 0) + bytes(1024), bytes(51_200), "no sample in 2 MiB"),
        (b"", header("folder", 0, tarfile.DIRTYPE) * 100, "no sample in 2 MiB"),
        (b"", b"".join(header(f"1.{n}", 0) for n in range(2000)), "more than 1000 members"),
    ],
    ids=["pax", "long name", "member", "end mark", "folders", "members"],
)
def test_tars_without_end_are_left_in_little_memory(
    start: bytes, more: bytes, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.base.tar_samples._MAX_BYTES_WITHOUT_SAMPLE", 2 << 20)
    with serving(b"", Fault(raw=b"HTTP/1.1 200 OK\r\n\r\n" + start, then="repeat", more=more)) as server:
        tracemalloc.start()
        try:
            with pytest.raises(InputError, match=cause):
                list(read_remote_shard(server.url, patience=HURRIED))
            assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
        finally:
            tracemalloc.stop()
    assert len(server.requests) == 1
