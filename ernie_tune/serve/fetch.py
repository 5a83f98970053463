"""Downloads for a server that strangers talk to: http(s) only, public addresses only, bounded in
size, time and redirects.

A name is resolved once, every address it has is checked, and the connection goes to the checked
address itself, so a name cannot change its mind in between. Each redirect is checked like the first
URL. The time that is left is set anew before every read, headers and chunk lines included: a host
that trickles gains nothing. Refuses to know: pictures, the API.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from ernie_tune.config.language import say
from ernie_tune.serve.pool import Lease

Address = tuple[Any, ...]  # an entry of `socket.getaddrinfo`
Resolve = Callable[[str, int], Sequence[Address]]

_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # its last 32 bits are an IPv4 address
_PATH_SAFE = "%/:=&?~#+!$,;'@()*[]"


@dataclass(frozen=True)
class FetchPolicy:
    """`allowed_hosts`: names and addresses that may be private (an image server of one's own);
    `allow_private`: all may.
    """

    allow_private: bool = False
    allowed_hosts: frozenset[str] = frozenset()
    max_bytes: int = 32 * 2**20
    timeout_seconds: float = 20.0
    max_redirects: int = 3


def _resolve(host: str, port: int) -> Sequence[Address]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


# A resolver cannot be interrupted, so names are looked up in threads that may be left behind, this
# many at most.
_RESOLVING = threading.BoundedSemaphore(32)


def _resolve_within(resolve: Resolve, host: str, port: int, seconds: float) -> Sequence[Address]:
    """What `resolve` gives or raises. Raises TimeoutError when it takes longer, and when too many
    do already.
    """
    if not _RESOLVING.acquire(blocking=False):
        raise TimeoutError(say("too many names are being looked up", "正在查询的域名太多"))
    found: queue.SimpleQueue[Sequence[Address] | OSError | ValueError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found.put(resolve(host, port))
        except (OSError, ValueError) as error:
            found.put(error)
        finally:
            _RESOLVING.release()

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    try:
        answer = found.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(say("looking up the name took too long", "查询域名耗时过长")) from None
    if isinstance(answer, OSError | ValueError):
        raise answer
    return answer


class _Clock:
    """The time that one download has left: its own, and its lease's."""

    def __init__(self, seconds: float, lease: Lease) -> None:
        self._deadline, self._lease = time.monotonic() + seconds, lease

    def left(self) -> float:
        """Seconds above 0. Raises TimeoutError."""
        left = min(self._deadline - time.monotonic(), self._lease.left())
        if left <= 0:
            raise TimeoutError("too slow")
        return left


class _Reader(io.RawIOBase):
    """A socket's bytes; each read waits at most for the time that is left of the whole."""

    def __init__(self, sock: socket.socket, clock: _Clock) -> None:
        self._sock, self._clock = sock, clock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._clock.left())
        return self._sock.recv_into(buffer)


class _TimedSocket:
    """As much of a socket as `http.client` uses, read through a `_Reader`."""

    def __init__(self, sock: socket.socket, clock: _Clock) -> None:
        self._sock, self._clock = sock, clock

    def makefile(self, *_: Any) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._sock, self._clock))

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._clock.left())
        self._sock.sendall(data)

    def close(self) -> None:
        """Left to the one who opened it: `http.client` lets go of a socket while its answer is
        still read.
        """


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open Internet, seen through the IPv6 forms that wrap an
    IPv4 address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner: list[ipaddress.IPv4Address | None] = []
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        low = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        # ::a.b.c.d (deprecated) and 64:ff9b::a.b.c.d lead to a.b.c.d where such a gateway exists
        inner += [low] if ip in _NAT64 or int(ip) >> 32 == 0 else []
    found = [one for one in inner if one is not None]
    return ip.is_global and not ip.is_multicast and all(one.is_global and not one.is_multicast for one in found)


def fetch(url: str, policy: FetchPolicy, label: str, resolve: Resolve = _resolve, lease: Lease | None = None) -> bytes:
    """The body behind `url`. Raises ValueError, opened by `label`, for everything that is not a
    complete answer 200 within the policy, and where the `lease` ends or is given up.
    """
    clock = _Clock(policy.timeout_seconds, lease := lease or Lease(policy.timeout_seconds))
    for _ in range(policy.max_redirects + 1):
        target = _split(url, label)
        try:
            addresses = _addresses(target, policy, label, resolve, clock)
            where, body = _ask(target, addresses, policy, label, clock, lease)
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(
                say(
                    f"{label} cannot be downloaded ({type(error).__name__}); check the URL",
                    f"{label} 无法下载（{type(error).__name__}）；请检查 URL",
                )
            ) from error
        if where is None:
            return body
        url = urljoin(url, where)
    raise ValueError(
        say(
            f"{label} must be reached within {policy.max_redirects} redirects; give the address that it ends at",
            f"{label} 须在 {policy.max_redirects} 次重定向之内到达；请给出最终地址",
        )
    )


def _ask(
    target: SplitResult, addresses: Sequence[Address], policy: FetchPolicy, label: str, clock: _Clock, lease: Lease
) -> tuple[str | None, bytes]:
    """`_read` of the first address that takes the connection. Raises OSError where none does."""
    failed = OSError("no address")
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as sock, lease.holding(sock):
            try:
                sock.settimeout(clock.left())
                sock.connect(address)
            except OSError as error:
                failed = error
                continue
            if target.scheme != "https":
                return _read(sock, target, policy, label, clock)
            sock.settimeout(clock.left())
            # The handshake is one call that keeps to this time as a whole.
            with _tls(sock, target.hostname or "") as secured, lease.holding(secured):
                return _read(secured, target, policy, label, clock)
    raise failed


def _tls(sock: socket.socket, host: str) -> ssl.SSLSocket:
    return ssl.create_default_context().wrap_socket(sock, server_hostname=host)


def _split(url: str, label: str) -> SplitResult:
    try:
        target = urlsplit(url)
        fine = target.scheme in ("http", "https") and target.hostname and target.port != 0
    except ValueError as error:
        raise ValueError(
            say(f"{label} must be a valid URL ({error}); correct it", f"{label} 须为有效的 URL（{error}）；请改正")
        ) from error
    if not fine or target.username is not None:
        raise ValueError(
            say(
                f"{label} must be http:// or https:// and a host, without a user name, redirects too; correct it",
                f"{label} 须为 http:// 或 https:// 加主机名，不含用户名，重定向也一样；请改正",
            )
        )
    return target


def _addresses(
    target: SplitResult, policy: FetchPolicy, label: str, resolve: Resolve, clock: _Clock
) -> Sequence[Address]:
    host, port = target.hostname or "", target.port or (443 if target.scheme == "https" else 80)
    try:
        found = _resolve_within(resolve, host, port, clock.left())
    except TimeoutError:
        raise
    except (OSError, ValueError) as error:  # ValueError: names that cannot be written as one
        raise ValueError(
            say(f"{label} must name a host that exists; correct the URL", f"{label} 须指向存在的主机；请改正 URL")
        ) from error
    private = not all(is_public(str(address[4][0])) for address in found)
    if not found or (private and not policy.allow_private and host not in policy.allowed_hosts):
        raise ValueError(
            say(
                f"{label} must lead to a public address, redirects too; send the data as a data: URL, or ask the "
                "operator to allow the host",
                f"{label} 须指向公网地址，重定向也一样；请以 data: URL 发送数据，或请管理员允许该主机",
            )
        )
    return found


def _read(
    sock: socket.socket, target: SplitResult, policy: FetchPolicy, label: str, clock: _Clock
) -> tuple[str | None, bytes]:
    """(where a redirect leads, b"") or (None, the body)."""
    path = quote(target.path or "/", safe=_PATH_SAFE) + (
        f"?{quote(target.query, safe=_PATH_SAFE)}" if target.query else ""
    )
    connection = http.client.HTTPConnection(target.hostname or "", target.port)
    connection.sock = _TimedSocket(sock, clock)
    connection.request("GET", path, headers={"Accept-Encoding": "identity", "User-Agent": "ernie-tune"})
    with connection.getresponse() as response:
        if response.status in _REDIRECTS and response.headers["Location"]:
            return response.headers["Location"], b""
        if response.status != 200 or response.headers.get("Content-Encoding", "identity") != "identity":
            raise ValueError(
                say(
                    f"{label} must be answered with 200 and a plain body, got {response.status}; check the URL",
                    f"{label} 须得到 200 与普通内容的答复，实际为 {response.status}；请检查 URL",
                )
            )
        body = bytearray()
        while part := response.read1(2**16):
            body += part
            if len(body) > policy.max_bytes or (response.length or 0) > policy.max_bytes:
                raise ValueError(
                    say(
                        f"{label} must be at most {policy.max_bytes} bytes; send a smaller file",
                        f"{label} 至多 {policy.max_bytes} 字节；请发送更小的文件",
                    )
                )
        if response.length:
            raise http.client.IncompleteRead(bytes(body), response.length)
        clock.left()  # an end that came of giving up is none
        return None, bytes(body)
