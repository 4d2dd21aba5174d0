"""Redirects and certificates of servers that stand for public ones, and servers that never come to an end."""

from __future__ import annotations

import base64
import socket
import ssl
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import trustme

from faulty_server import HASTY, HURRIED, Fault, FaultyServer, serving
from longclip_teacher.errors import InputError
from training.data.http_answer import Interrupted, get, shown_url

HUB, CDN = "93.184.216.34", "151.101.1.5"
MOST_MEMORY = 2 << 20


@dataclass
class Internet:
    """Names, and servers on 127.0.0.1 that stand for others."""

    tls: ssl.SSLContext
    names: dict[str, list[str]] = field(default_factory=dict)
    """What a name resolves to. A second list of addresses would be that of a second question."""
    ports: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    connected: list[tuple[str, int]] = field(default_factory=list)

    @contextmanager
    def site(self, name: str, address: str, *faults: Fault) -> Iterator[FaultyServer]:
        """A site with one address."""
        with serving(b"the file", *faults, tls=self.tls) as server:
            self.names[name] = [address]
            self.ports[address] = server.server_port
            yield server


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def internet(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Internet:
    """No traffic leaves 127.0.0.1: an address without a site there refuses the connection."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("hub.example", "cdn.example", "127.0.0.1").configure_cert(tls)
    internet = Internet(tls)
    resolve, connect = socket.getaddrinfo, socket.create_connection

    def getaddrinfo(host: str, *args: Any, **options: Any) -> Any:
        internet.asked.append(host)
        if host not in internet.names:
            return resolve(host, *args, **{**options, "flags": socket.AI_NUMERICHOST})
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 443)) for one in internet.names[host]]

    def create_connection(address: tuple[str, int], timeout: float) -> socket.socket:
        internet.connected.append(address)
        if address[0] in internet.ports:
            address = ("127.0.0.1", internet.ports[address[0]])
        if address[0] != "127.0.0.1":
            raise ConnectionRefusedError(111, "Connection refused")
        return connect(address, timeout)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    return internet


def fetched(url: str) -> bytes:
    with closing(get(url, {}, HURRIED)) as answer:
        assert answer.status == 200
        return answer.read(100)


def to(location: str, status: int = 302) -> Fault:
    return Fault(status, headers={"Location": location, "Set-Cookie": "secret=1"})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_hubs_may_redirect_to_public_addresses_and_keep_the_login_to_themselves(
    internet: Internet, status: int
) -> None:
    with (
        internet.site("hub.example", HUB, to("/b.tar", status), to("https://cdn.example/c.tar?key=1#x", status)) as hub,
        internet.site("cdn.example", CDN) as cdn,
    ):
        assert fetched("https://me:p%40ss@hub.example/a b.tar") == b"the file"
    assert [path for path, _ in hub.requests + cdn.requests] == ["/a%20b.tar", "/b.tar", "/c.tar?key=1"]
    login = f"Basic {base64.b64encode(b'me:p@ss').decode()}"
    assert [headers["Authorization"] for _, headers in hub.requests] == [login, login]
    ((_, headers),) = cdn.requests
    assert headers["Host"] == "cdn.example" and not {"Authorization", "Cookie", "Referer"} & headers.keys()
    assert "me" not in str(headers).replace("cdn.example", "")


def test_a_login_that_a_redirect_brings_along_is_not_sent(internet: Internet) -> None:
    with (
        internet.site("hub.example", HUB, to("https://me:pass@cdn.example/")),
        internet.site("cdn.example", CDN, to("https://hub.example/")) as cdn,
    ):
        assert fetched("https://other:word@hub.example/x.tar") == b"the file"
    assert "Authorization" not in cdn.requests[0][1]


@pytest.mark.parametrize(
    "addresses",
    [["10.0.0.1"], ["127.0.0.1"], ["169.254.169.254"], ["224.0.0.1"], ["::1"], ["::ffff:127.0.0.1"], ["fe80::1"],
     [CDN, "192.168.1.1"], ["240.0.0.1"]],
    ids=str,
)  # fmt: skip
def test_a_redirect_to_a_name_with_an_address_that_is_not_public_is_refused(
    internet: Internet, addresses: list[str]
) -> None:
    with internet.site("hub.example", HUB, to("https://cdn.example/latest/meta-data")):
        internet.names["cdn.example"] = addresses
        with pytest.raises(InputError) as caught:
            fetched("https://hub.example/a.tar")
    told = f"a redirect to https://cdn.example/latest/meta-data is not followed: {addresses[-1]} is no public address"
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)
    assert internet.connected == [(HUB, 443)]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "0177.0.0.1", "0x7f.1", "127.1", "[::1]", "[::ffff:7f00:1]", "[::ffff:127.0.0.1]",
     "192.168.0.1:8443", "x@127.0.0.1", "127.0.0.1."],
)  # fmt: skip
def test_a_redirect_to_such_an_address_is_refused_in_every_notation(internet: Internet, host: str) -> None:
    cause = r"is no public address|no host .* is known"
    with internet.site("hub.example", HUB, to(f"https://{host}/secret")), pytest.raises(InputError, match=cause):
        fetched("https://hub.example/a.tar")
    assert internet.connected == [(HUB, 443)]


def test_the_address_that_was_checked_is_the_one_that_is_used(internet: Internet) -> None:
    with internet.site("hub.example", HUB, to("https://cdn.example/")), internet.site("cdn.example", CDN):
        asked = socket.getaddrinfo

        def rebinding(host: str, *args: Any, **options: Any) -> Any:
            found = asked(host, *args, **options)
            internet.names["cdn.example"] = ["127.0.0.1"] if host == "cdn.example" else internet.names["cdn.example"]
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", rebinding)
            assert fetched("https://hub.example/a.tar") == b"the file"
    assert internet.connected == [(HUB, 443), (CDN, 443)] and internet.asked.count("cdn.example") == 1


def test_a_private_server_that_the_user_names_may_redirect_to_itself_alone(internet: Internet) -> None:
    with serving(b"the file", to("/b.tar"), to("//127.0.0.1:1/c.tar")) as server, internet.site("cdn.example", CDN):
        with pytest.raises(InputError, match=r"127\.0\.0\.1:1/c\.tar is not followed: only one from https to https is"):
            fetched(f"{server.url}/a.tar")
        assert fetched(f"{server.url}/a.tar") == b"the file"
    internet.names["nas.example"] = ["192.168.1.9"]
    with pytest.raises(Interrupted, match="Connection refused"):
        fetched("https://nas.example/a.tar")
    assert internet.connected[-1] == ("192.168.1.9", 443)
    with serving(b"the file", to("/b.tar"), to("https://localhost/"), tls=internet.tls) as server:
        with pytest.raises(InputError, match=r"to https://localhost/ is not followed|no host 'localhost'"):
            fetched(f"{server.url}/a.tar")
        assert fetched(f"{server.url}/a.tar") == b"the file"


@pytest.mark.parametrize(
    ("location", "cause"),
    [
        ("http://hub.example/a.tar", "only one from https to https is"),
        ("http://hub.example:443/a.tar", "only one from https to https is"),
        ("ftp://cdn.example/a.tar", "only https is"),
        ("file:///etc/passwd", "only https is"),
        ("data:text/plain,x", "only https is"),
        ("https://cdn.example:99999/", "only https is"),
        ("https://[::1/", "a redirect to no URL"),
        ("", "a redirect to no URL"),
        ("/a.tar", "goes in a circle"),
    ],
)
def test_other_redirects_are_refused(internet: Internet, location: str, cause: str) -> None:
    with internet.site("hub.example", HUB, to(location)), pytest.raises(InputError, match=cause) as caught:
        fetched("https://hub.example/a.tar")
    assert "\n" not in str(caught.value) and internet.connected == [(HUB, 443)]


def test_the_number_of_redirects_is_bounded(internet: Internet) -> None:
    with (
        internet.site("hub.example", HUB, *[to(f"/{number}") for number in range(11)]) as hub,
        pytest.raises(InputError, match=r"HTTP 302, a redirect to https://hub.example/10 that follows on 10 others"),
    ):
        fetched("https://hub.example/a.tar")
    assert len(hub.requests) == 11


def test_a_certificate_that_is_not_valid_ends_it(internet: Internet, monkeypatch: pytest.MonkeyPatch) -> None:
    with internet.site("other.example", CDN) as server, pytest.raises(InputError, match=r"mismatch.*SSL_CERT_FILE"):
        fetched("https://other.example/a.tar")
    monkeypatch.delenv("SSL_CERT_FILE")
    with internet.site("hub.example", HUB) as hub, pytest.raises(InputError, match=r"hub\.example is not valid"):
        fetched("https://hub.example/a.tar")
    assert not server.requests and not hub.requests


def test_another_address_is_tried_if_the_first_does_not_answer(internet: Internet) -> None:
    with internet.site("hub.example", HUB):
        internet.names["hub.example"] = ["93.184.216.35", HUB]
        assert fetched("https://hub.example/a.tar") == b"the file"


def test_secrets_of_a_url_are_not_told() -> None:
    assert shown_url("https://me:pass@host/a/b.tar?X-Amz-Signature=1#x") == "https://host/a/b.tar?..."
    assert shown_url("https://me:pass@host?key") == "https://host?..."
    assert shown_url("https://host/a\x1b\n.tar") == "https://host/a??.tar"
    assert len(shown_url("https://host/" + "a" * 9999)) == 300
    for url in ("https:///a.tar", "https://h:x/", "https://h\u00ad/", "https://" + "a" * 64 + ".example/"):
        with pytest.raises(InputError, match=r"is no http or https URL|no host"):
            get(url, {}, HURRIED)


# --- servers without end ----------------------------------------------------------------------------------------------

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = "headers without end|got more than 100 (interim responses|trailers)"  # ours, or that of Python 3.14


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault(raw=b"HTTP/1.1 200 OK\r\nX: ", then="repeat", more=b"x" * 9999), "LineTooLong"),
        (Fault(raw=b"HTTP/1.1 200 OK\r\n", then="repeat", more=b"X: 1\r\n" * 99), "more than 100 headers"),
        (Fault(raw=b"", then="repeat", more=b"HTTP/1.1 100 Continue\r\n\r\n" * 99), ENDLESS),
        (Fault(raw=CHUNKED + b"0\r\n", then="repeat", more=b"X: 1\r\n" * 99), ENDLESS),
        (Fault(raw=CHUNKED + b"1;", then="repeat", more=b"x" * 9999), "broke off|LineTooLong"),
        (Fault(raw=b"", then="repeat", more=b"x" * 9999), "LineTooLong"),
    ],
    ids=["line", "headers", "continue", "trailers", "chunk", "status"],
)
def test_headers_without_end_are_left_in_little_memory(fault: Fault, cause: str) -> None:
    with serving(b"", fault) as server:
        tracemalloc.start()
        try:
            with pytest.raises(Interrupted, match=cause):
                fetched(server.url)
            assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
        finally:
            tracemalloc.stop()


def test_headers_that_are_cut_short_are_not_believed() -> None:
    fault = Fault(raw=b"HTTP/1.1 302 Found\r\nLocation: /b")
    with serving(b"", fault) as server, pytest.raises(Interrupted, match="the connection broke off"):
        fetched(f"{server.url}/a.tar")


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n", CHUNKED + b"99\r\n"])
def test_a_byte_now_and_then_is_too_slow(start: bytes) -> None:
    """The server sends one every 0.05 s and would go on for 10 s; each comes within the time-out."""
    cause = r"only \d+ bytes in \d s"
    with serving(b"", Fault(raw=start, then="trickle")) as server, pytest.raises(Interrupted, match=cause):
        answer = get(server.url, {}, HASTY)
        while answer.read(100):
            pass
    assert len(server.requests) == 1


def test_time_in_which_nobody_reads_does_not_count() -> None:
    patience = replace(HURRIED, read=1.0, least_bytes=1 << 30)
    with serving(bytes(1 << 20)) as server, closing(get(server.url, {}, patience)) as answer:
        size, slept = 0, 0.0
        while data := answer.read(1 << 17):
            size += len(data)
            slept += 0.25
            time.sleep(0.25)
    assert size == 1 << 20 and slept > patience.read
