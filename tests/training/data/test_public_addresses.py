"""Which addresses a redirect may lead to."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from longclip_teacher.errors import InputError
from training.data.public_addresses import addresses_of, is_public

PUBLIC = ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"]
NOT_PUBLIC = [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1",
    "::", "::1", "fe80::1", "fe80::1%lo", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "::7f00:1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a00:1::",
]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0177.0.0.1", "0x7f.1", "127.1", "0x7f000001"])
def test_every_notation_is_resolved(host: str) -> None:
    assert addresses_of(host, 443) == ["127.0.0.1"]


def test_a_host_that_does_not_exist_is_told_from_a_resolver_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise socket.gaierror(code, "told by the resolver")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    code = socket.EAI_NONAME
    with pytest.raises(InputError, match=r"\Ano host 'nas' is known here \(told by the resolver\)\Z"):
        addresses_of("nas", 443)
    code = socket.EAI_AGAIN
    with pytest.raises(OSError, match="told by the resolver"):
        addresses_of("nas", 443)
