"""Downloads for a server that strangers talk to: http(s) only, public addresses only, bounded in size, time and redirects.

A name is resolved once, every address it has is checked, and the connection goes to the checked address itself, so a name cannot change its
mind in between. Each redirect is checked like the first URL. Refuses to know: pictures, the API.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

Address = tuple[Any, ...]  # an entry of `socket.getaddrinfo`
Resolve = Callable[[str, int], Sequence[Address]]

_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # its last 32 bits are an IPv4 address
_PATH_SAFE = "%/:=&?~#+!$,;'@()*[]"


@dataclass(frozen=True)
class FetchPolicy:
    """`allowed_hosts`: names and addresses that may be private (an image server of one's own); `allow_private`: all may."""

    allow_private: bool = False
    allowed_hosts: frozenset[str] = frozenset()
    max_bytes: int = 32 * 2**20
    timeout_seconds: float = 20.0
    max_redirects: int = 3


def _resolve(host: str, port: int) -> Sequence[Address]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open Internet, seen through the IPv6 forms that wrap an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner: list[ipaddress.IPv4Address | None] = []
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        low = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        # ::a.b.c.d (deprecated) and 64:ff9b::a.b.c.d lead to a.b.c.d where such a gateway exists
        inner += [low] if ip in _NAT64 or int(ip) >> 32 == 0 else []
    found = [one for one in inner if one is not None]
    return ip.is_global and not ip.is_multicast and all(one.is_global and not one.is_multicast for one in found)


def fetch(url: str, policy: FetchPolicy, label: str, resolve: Resolve = _resolve) -> bytes:
    """The body behind `url`. Raises ValueError, opened by `label`, for everything that is not a complete answer 200 within the policy."""
    deadline = time.monotonic() + policy.timeout_seconds
    for _ in range(policy.max_redirects + 1):
        target = _split(url, label)
        addresses = _addresses(target, policy, label, resolve)
        try:
            connection = _connect(target, addresses, deadline)
            try:
                where, body = _read(connection, target, policy, label, deadline)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"{label} cannot be downloaded ({type(error).__name__}); check the URL") from error
        if where is None:
            return body
        url = urljoin(url, where)
    raise ValueError(
        f"{label} must be reached within {policy.max_redirects} redirects; give the address that it ends at"
    )


def _split(url: str, label: str) -> SplitResult:
    try:
        target = urlsplit(url)
        fine = target.scheme in ("http", "https") and target.hostname and target.port != 0
    except ValueError as error:
        raise ValueError(f"{label} must be a valid URL ({error}); correct it") from error
    if not fine or target.username is not None:
        raise ValueError(
            f"{label} must be http:// or https:// and a host, without a user name, redirects too; correct it"
        )
    return target


def _addresses(target: SplitResult, policy: FetchPolicy, label: str, resolve: Resolve) -> Sequence[Address]:
    host, port = target.hostname or "", target.port or (443 if target.scheme == "https" else 80)
    try:
        found = resolve(host, port)
    except (OSError, ValueError) as error:  # ValueError: names that cannot be written as one
        raise ValueError(f"{label} must name a host that exists; correct the URL") from error
    private = not all(is_public(str(address[4][0])) for address in found)
    if not found or (private and not policy.allow_private and host not in policy.allowed_hosts):
        raise ValueError(
            f"{label} must lead to a public address, redirects too; send the data as a data: URL, or ask the operator to allow the host"
        )
    return found


def _connect(target: SplitResult, addresses: Sequence[Address], deadline: float) -> http.client.HTTPConnection:
    host, error = target.hostname or "", OSError("no address")
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(_left(deadline))
            sock.connect(address)
            if target.scheme == "https":
                sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        except OSError as failed:
            sock.close()
            error = failed
            continue
        connection = http.client.HTTPConnection(host, target.port)
        connection.sock = sock
        return connection
    raise error


def _read(
    connection: http.client.HTTPConnection, target: SplitResult, policy: FetchPolicy, label: str, deadline: float
) -> tuple[str | None, bytes]:
    """(where a redirect leads, b"") or (None, the body)."""
    path = quote(target.path or "/", safe=_PATH_SAFE) + (
        f"?{quote(target.query, safe=_PATH_SAFE)}" if target.query else ""
    )
    sock = connection.sock  # `getresponse` lets go of it where the connection is to close
    connection.request("GET", path, headers={"Accept-Encoding": "identity", "User-Agent": "ernie-tune"})
    response = connection.getresponse()
    if response.status in _REDIRECTS and response.headers["Location"]:
        return response.headers["Location"], b""
    if response.status != 200 or response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError(f"{label} must be answered with 200 and a plain body, got {response.status}; check the URL")
    body = bytearray()
    while True:
        sock.settimeout(_left(deadline))
        part = response.read1(2**16)
        if not part:
            if response.length:
                raise http.client.IncompleteRead(bytes(body), response.length)
            return None, bytes(body)
        body += part
        if len(body) > policy.max_bytes or (response.length or 0) > policy.max_bytes:
            raise ValueError(f"{label} must be at most {policy.max_bytes} bytes; send a smaller file")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("too slow")
    return left
