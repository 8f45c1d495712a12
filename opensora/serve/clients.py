"""Who asks, for the queue's bound for each client: an address, or the proxy's word for it."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

UNKNOWN = "unknown"
_NETWORK = 64
"""Bits of an IPv6 address that name a network; a client chooses the others freely."""


def client_of(peer: str | None, forwarded: Sequence[str], proxy: Address | None) -> str:
    """The client of a request, as one text for all that it may call itself.

    Args:
        peer: address of the connection's other end.
        forwarded: the request's X-Forwarded-For headers, in order. Only the last entry is read,
            the one that `proxy` wrote itself, and only where the connection comes from it.
    """
    found = _address(peer or "")
    if found is None:
        return UNKNOWN
    if proxy is not None and found == proxy and forwarded:
        found = _address(forwarded[-1].rpartition(",")[2].strip()) or found
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((found, _NETWORK), strict=False))
    return str(found)


def _address(text: str) -> Address | None:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
