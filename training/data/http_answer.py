"""One GET over http or https: bounded in time and memory, and redirected only to public https addresses.

No HTTP library bounds the time in which headers arrive or the lowest rate of a body, or connects to an address that was
checked before. So this is the standard library's client with these three things added. Each request has a connection of
its own: nothing is shared between processes, and a shard is long enough to pay for it.
"""

from __future__ import annotations

import base64
import functools
import http.client
import io
import re
import socket
import ssl
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from longclip_teacher.errors import InputError
from training.data.public_addresses import addresses_of, is_public

__all__ = ["Answer", "Interrupted", "Patience", "get", "shown_url"]

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 10
_MAX_OVERHEAD = 1 << 20  # bytes of headers, and of chunk sizes in one read
_BUFFER_BYTES = 128 << 10
_HOST = re.compile(r"[\x21-\x7e]+")
_SAFE = "/%:=&?~#+!$,;'@()*[]"  # kept as they are in a path or query; all else is escaped
_MOST_SHOWN = 300  # characters of a URL in a message


class Interrupted(Exception):
    """A request that failed, and that may succeed if it is made again. The message is the cause."""

    def __init__(self, cause: str, retry_after: str | None = None) -> None:
        super().__init__(cause)
        self.retry_after = retry_after
        """The server's header of that name."""


@dataclass(frozen=True)
class Patience:
    """How long a server may take, in seconds, and how often it is asked."""

    connect: float = 15.0
    """Time to connect to one address, and for each step of the TLS handshake."""
    read: float = 30.0
    """Time spent waiting in which fewer than `least_bytes` arrive. Time in which nobody reads does not count."""
    least_bytes: int = 32 << 10
    tries: int = 8
    """Failures in a row, with less than a mebibyte received between them."""
    first_wait: float = 0.5
    """Before the second try; doubled before each further one, and shortened by up to half at random."""
    longest_wait: float = 30.0
    longest_retry_after: float = 30.0
    """A server may ask for a longer wait than ours, up to this."""


@dataclass(frozen=True)
class _Place:
    """What is asked of which server."""

    scheme: str
    host: str
    port: int
    target: str
    authorization: str | None
    """From the user part of the URL."""

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port


class Answer:
    """The status, headers and body of an answer."""

    def __init__(self, connection: _Connection) -> None:
        """Wait for the headers."""
        self._connection = connection
        response, paced = connection.getresponse(), connection.paced
        assert paced is not None
        paced.in_headers = False
        self._response, self._paced = response, paced
        self.status = response.status
        self.headers = response.headers

    def read(self, size: int) -> bytes:
        """Return some bytes of the body, at most `size`; b"" at its end. Raise Interrupted if it breaks off."""
        self._paced.allow(size + _MAX_OVERHEAD)
        try:
            return self._response.read1(size)
        except (OSError, http.client.HTTPException) as error:
            raise Interrupted(_cause(error)) from None

    def close(self) -> None:
        """End the connection."""
        self._response.close()
        self._connection.close()


def get(url: str, headers: Mapping[str, str], patience: Patience) -> Answer:
    """Ask for `url` and follow redirects.

    url        its server may have any address, because the user chose it
    headers    sent to every server, so they hold nothing secret

    A redirect leads to https on public addresses, or stays on the server that sends it. Names are resolved once, and
    the addresses that were checked are those that are used. What the URL gives as user and password goes to its own
    server only. Raise InputError for a redirect that is refused and for what will fail again, and Interrupted for what
    may not.
    """
    place = _place(url)
    addresses = _addresses(place)
    seen = {url}
    while True:
        answer = _ask(place, addresses, headers, patience)
        if answer.status not in _REDIRECTS:
            return answer
        answer.close()
        url = _location(url, answer)
        if url in seen or len(seen) > _MAX_REDIRECTS:
            what = "goes in a circle" if url in seen else f"follows on {_MAX_REDIRECTS} others"
            raise InputError(f"HTTP {answer.status}, a redirect to {shown_url(url)} that {what}")
        seen.add(url)
        target = _redirected(place, url)
        if target.origin != place.origin:
            addresses = _public_addresses(target, url)
        place = target


def shown_url(url: str) -> str:
    """Return a URL for a message of one line: without user and password, and without the query, which may be a key."""
    path, *query = re.split("[?#]", url, maxsplit=1)
    short = (re.sub("//[^/]*@", "//", path) + "?..." * len(query))[:_MOST_SHOWN]
    return "".join(character if character.isprintable() else "?" for character in short)


def _place(url: str) -> _Place:
    """Return what a URL asks for."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        host = ""
    if not _HOST.fullmatch(host):
        raise InputError(f"{shown_url(url)} is no http or https URL")
    target = urllib.parse.quote(parts.path or "/", safe=_SAFE) + (
        f"?{urllib.parse.quote(parts.query, safe=_SAFE)}" if parts.query else ""
    )
    authorization = None
    if parts.username is not None:
        login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        authorization = f"Basic {base64.b64encode(login.encode()).decode()}"
    return _Place(parts.scheme, host, port, target, authorization)


def _location(url: str, answer: Answer) -> str:
    """Return the URL to which an answer to a request for `url` redirects."""
    location = answer.headers.get("Location", "").encode("iso-8859-1", "replace").decode("utf-8", "replace")
    try:
        if location:
            return urllib.parse.urljoin(url, location)
    except ValueError:
        pass
    raise InputError(f"HTTP {answer.status}, a redirect to no URL")


def _redirected(place: _Place, url: str) -> _Place:
    """Return what a redirect from `place` to `url` asks for. Raise InputError if it leads to another scheme."""
    refusal = f"a redirect to {shown_url(url)} is not followed"
    try:
        target = _place(url)
    except InputError:
        raise InputError(f"{refusal}: only https is") from None
    if target.origin == place.origin:
        return replace(target, authorization=place.authorization)
    if (place.scheme, target.scheme) != ("https", "https"):
        raise InputError(f"{refusal}: only one from https to https is")
    return replace(target, authorization=None)


def _addresses(place: _Place) -> list[str]:
    try:
        return addresses_of(place.host, place.port)
    except OSError as error:
        raise Interrupted(f"the name {place.host} is not resolved ({_cause(error)})") from None


def _public_addresses(place: _Place, url: str) -> list[str]:
    addresses = _addresses(place)
    for address in addresses:
        if not is_public(address):
            raise InputError(
                f"a redirect to {shown_url(url)} is not followed: {address} is no public address. If you trust it, "
                "name that URL yourself"
            )
    return addresses


def _ask(place: _Place, addresses: list[str], headers: Mapping[str, str], patience: Patience) -> Answer:
    """Send one request and return the answer, whatever its status."""
    fields = {**headers, "Connection": "close", "Accept-Encoding": "identity"}
    if place.authorization is not None:
        fields["Authorization"] = place.authorization
    connection = _Connection(place, addresses, patience)
    try:
        connection.request("GET", place.target, headers=fields)
        return Answer(connection)
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        if isinstance(error, ssl.SSLCertVerificationError):
            raise InputError(
                f"the certificate of {place.host} is not valid ({error.verify_message}). If an authority of your own "
                "has signed it, name that one's file in SSL_CERT_FILE"
            ) from None
        raise Interrupted(f"{place.host}: {_cause(error)}") from None


def _cause(error: Exception) -> str:
    """Return in a few words why a connection failed."""
    if isinstance(error, TimeoutError):
        return str(error) if isinstance(error, _TooSlow) else "no answer in time"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection broke off"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = "".join(character if character.isprintable() else "?" for character in str(error))
    return f"{type(error).__name__} {text[:_MOST_SHOWN]}".strip()


class _Connection(http.client.HTTPConnection):
    """A connection to one of the given addresses, which need not be what the host's name resolves to by now."""

    def __init__(self, place: _Place, addresses: list[str], patience: Patience) -> None:
        self.default_port = 443 if place.scheme == "https" else 80
        super().__init__(place.host, place.port)
        self._is_tls, self._addresses, self._patience = place.scheme == "https", addresses, patience
        self.paced: _Paced | None = None
        self.response_class = functools.partial(_response, self)  # type: ignore[assignment]

    def connect(self) -> None:
        """Connect to the first address that answers."""
        for left, address in reversed(list(enumerate(reversed(self._addresses)))):
            try:
                self.sock = socket.create_connection((address, self.port), self._patience.connect)
                break
            except OSError:
                if not left:
                    raise
        if self._is_tls:
            context = ssl.create_default_context()
            context.set_alpn_protocols(["http/1.1"])
            try:
                self.sock = context.wrap_socket(self.sock, server_hostname=self.host)
            except BaseException:
                self.sock.close()
                raise
        self.sock.settimeout(self._patience.read)


def _response(connection: _Connection, sock: socket.socket, *args: Any, **options: Any) -> http.client.HTTPResponse:
    """Return the response to be read from a socket, through `_Paced`."""
    response = http.client.HTTPResponse(sock, *args, **options)
    connection.paced = _Paced(response.fp.detach(), connection._patience)
    connection.paced.allow(_MAX_OVERHEAD)
    response.fp = io.BufferedReader(connection.paced, _BUFFER_BYTES)
    return response


class _TooSlow(TimeoutError):
    pass


class _Paced(io.RawIOBase):
    """What a socket receives, as long as it comes fast enough, and no more of it than is allowed at a time. A server
    could otherwise send headers for ever, or one byte just before each time-out."""

    def __init__(self, raw: io.RawIOBase, patience: Patience) -> None:
        self._raw, self._patience = raw, patience
        self._waited, self._received, self._allowed = 0.0, 0, 0
        self.in_headers = True
        """Whether an end would be one in the middle of the headers, which http.client takes for their end."""

    def allow(self, num_bytes: int) -> None:
        """Let this many bytes be received from now on."""
        self._allowed = num_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._allowed <= 0:
            raise http.client.HTTPException("headers without end")
        started = time.monotonic()
        num_bytes = self._raw.readinto(memoryview(buffer)[: self._allowed]) or 0
        if not num_bytes and self.in_headers:
            raise http.client.IncompleteRead(b"")
        self._allowed -= num_bytes
        self._waited += time.monotonic() - started
        self._received += num_bytes
        if self._received >= self._patience.least_bytes:
            self._waited, self._received = 0.0, 0
        elif self._waited > self._patience.read:
            raise _TooSlow(f"only {self._received} bytes in {self._waited:.0f} s")
        return num_bytes

    def close(self) -> None:
        self._raw.close()
        super().close()
