"""Internet addresses of a host, and whether they are public.

A redirect may lead anywhere that its server likes. If it could lead to loopback or into a private network, a stranger's
server would choose what is fetched there.
"""

from __future__ import annotations

import ipaddress
import socket

from longclip_teacher.errors import InputError

__all__ = ["addresses_of", "is_public"]

_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # the only IPv6 block of which public addresses are given out
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address

_UNKNOWN = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", None))


def addresses_of(host: str, port: int) -> list[str]:
    """Return the numeric addresses of `host`, without repetition, in the resolver's order.

    Names and all notations of IPv4 go through the resolver, also octal, hexadecimal and decimal ones. Raise InputError
    for a host that does not exist, and OSError if the resolver gives no answer.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno not in _UNKNOWN:
            raise
        raise InputError(f"no host {host!r} is known here ({error.strerror})") from None
    except UnicodeError:
        raise InputError(f"{host!r} is no name of a host") from None
    return list(dict.fromkeys(str(address[4][0]) for address in found))


def is_public(address: str) -> bool:
    """Return whether a numeric address is reached over the internet: not loopback, private, link-local, shared,
    multicast, reserved or unspecified. IPv6 addresses that carry an IPv4 address are judged by that one."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
        if inner is None:
            return found.is_global and not found.is_multicast and found in _GLOBAL_UNICAST
        found = inner
    return found.is_global and not found.is_multicast and not found.is_reserved
