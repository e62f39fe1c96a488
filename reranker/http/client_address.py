"""The address of a client for the access log: the peer of the connection, or the hop that trusted proxies report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Literal

from starlette.types import Scope

Mode = Literal["none", "peer", "forwarded"]
Network = IPv4Network | IPv6Network

_MAX_HOPS = 32
"""Hops of X-Forwarded-For that are read, from the last one."""
_MAPPED_BITS = 96
"""Bits of ::ffff:0:0, before the IPv4 address (RFC 4291, 2.5.5.2)."""
_PORT = re.compile(r"\[([^\]]+)\](?::\d+)?|([\d.]+):\d+")  # some proxies append the port


def networks(text: str) -> tuple[Network, ...]:
    """Return the addresses and networks of TRUSTED_PROXIES, which commas separate; raise ValueError."""
    return tuple(_unmapped(ip_network(part.strip())) for part in text.split(",") if part.strip())


def _unmapped(network: Network) -> Network:
    """Return an IPv4-mapped network as IPv4, as `_address` returns the addresses in it."""
    if network.version == 6 and (mapped := network.network_address.ipv4_mapped) and network.prefixlen >= _MAPPED_BITS:
        return IPv4Network((mapped, network.prefixlen - _MAPPED_BITS))
    return network


class ClientAddress:
    """Finds the address of a request's client.

    Args:
        mode: none: no address. peer: that of the other end of the connection. forwarded: if that is a trusted proxy,
            the last hop of X-Forwarded-For that is none. A client can write the hops before that one itself.
        proxies: the trusted proxies.
    """

    def __init__(self, mode: Mode = "none", proxies: Sequence[Network] = ()) -> None:
        self.mode = mode
        self.proxies = proxies

    def of(self, scope: Scope) -> str | None:
        """Return the address; None without one, as on a Unix socket."""
        peer = _address(scope["client"][0]) if self.mode != "none" and scope.get("client") else None
        if peer is None:
            return None
        return str(peer if self.mode == "peer" else self._forwarded(peer, scope["headers"]))

    def _forwarded(self, client: IPv4Address | IPv6Address, headers: list[tuple[bytes, bytes]]) -> object:
        values = [value.decode("latin-1") for name, value in headers if name == b"x-forwarded-for"]
        hops = ",".join(values).rsplit(",", _MAX_HOPS)[-_MAX_HOPS:] if values else []
        while hops and any(client in network for network in self.proxies):
            hop = _address(hops.pop())
            if hop is None:  # not an address: its proxy is the last known hop
                break
            client = hop
        return client


def _address(text: str) -> IPv4Address | IPv6Address | None:
    text = text.strip().partition("%")[0]  # a zone may be any text
    match = _PORT.fullmatch(text)
    try:
        address = ip_address(match[1] or match[2] if match else text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None  # of a socket for both versions
    return mapped or address
