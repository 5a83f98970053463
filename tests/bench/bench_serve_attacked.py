"""`ernie-tune serve` while it is attacked: how long a text request waits meanwhile, and what the
process grows by.

usage: python tests/bench/bench_serve_attacked.py [--preset tiny-a] [--seconds 8] [--only NAME,NAME]
The server is a process of its own, let to ask this machine's loopback for pictures. Each attack
runs for some seconds while one text request of three tokens follows the other; the same without an
attack comes before and after. The attacks: hosts that trickle their header, chunk line, 100
Continue or body (four each, their clients gone after a second); an animation of 2,000 frames of 49
megapixels, four at once; bodies of 4 MiB and 1 MiB of lists; answers that nobody reads; connections
that say nothing; half surrogates in stop strings. At last SIGTERM while hosts trickle.
Prints one JSON line: seconds at the median and at most, processor time of the server, growth of
the resident memory in MB, statuses; exit code 1 for a 5xx or a wrong answer.
"""

from __future__ import annotations

import argparse
import base64
import collections
import json
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ernie_tune  # noqa: F401  sets the CPU variables before paddle loads

import httpx  # isort: skip

JSON = {"content-type": "application/json"}
TEXT = {"messages": [{"role": "user", "content": "why"}], "max_tokens": 3, "temperature": 0}
TRICKLES = {
    "header": (b"HTTP/1.1 200 OK\r\nX-A: ", b"a"),
    "chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
}


@contextmanager
def trickling(mode: str) -> Iterator[str]:
    """A host that never comes to an end, and the address of a picture on it."""
    first, then = TRICKLES[mode]
    server = socket.create_server(("127.0.0.1", 0), backlog=200)

    def drip(connection: socket.socket) -> None:
        try:
            connection.recv(2000)
            connection.sendall(first)
            while True:
                time.sleep(0.2)
                connection.sendall(then)
        except OSError:
            connection.close()

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=drip, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/a.png"
    finally:
        server.close()


def bomb(frames: int, side: int) -> bytes:
    """A GIF whose frames are as large as its screen and hold one colour each, in 23 bytes."""
    out = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6)
    one = b"!\xf9\x04\x00\x0a\x00\x00\x00" + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return out + one * frames + b";"


class Target:
    """The server process, and what it said to the attackers."""

    def __init__(self, folder: Path) -> None:
        words = [sys.executable, "-m", "ernie_tune", "serve", str(folder), "--port", "0", "--max_num_seqs", "8"]
        words += ["--allow_media_hosts", "127.0.0.1", "--shutdown_timeout", "3"]
        self.child = subprocess.Popen(
            words, stderr=subprocess.PIPE, text=True, env={**os.environ, "ERNIE_TUNE_LANG": "en"}
        )
        assert self.child.stderr is not None
        line = next((one for one in self.child.stderr if " at http://" in one), "")
        self.url = line.split()[-1].removesuffix("/v1") if line else ""
        self.errors: list[str] = []
        threading.Thread(target=lambda: self.errors.extend(self.child.stderr or ()), daemon=True).start()
        self.port = int(self.url.rsplit(":", 1)[1])
        self.statuses: collections.Counter[int] = collections.Counter()

    def post(self, body: Any, path: str = "/v1/chat/completions", seconds: float = 60) -> None:
        """One request of an attacker; 0 where he leaves before its answer."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            reply = httpx.post(self.url + path, content=content, headers=JSON, timeout=seconds)
            self.statuses[reply.status_code] += 1
        except httpx.HTTPError:
            self.statuses[0] += 1

    def at_once(self, bodies: list[Any], path: str = "/v1/chat/completions", seconds: float = 60) -> None:
        threads = [threading.Thread(target=self.post, args=(body, path, seconds), daemon=True) for body in bodies]
        for thread in threads:
            thread.start()

    def cpu_seconds(self) -> float:
        """Processor time of the server so far."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.child.pid}/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def media(kind: str, url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": kind, kind: {"url": url}}]}], "max_tokens": 1}


def filled(opening: bytes, item: bytes, closing: bytes, size: int) -> bytes:
    return opening + b",".join([item] * ((size - len(opening) - len(closing)) // (len(item) + 1))) + closing


@contextmanager
def trickles(mode: str, target: Target) -> Iterator[None]:
    with trickling(mode) as url:
        target.at_once([media("image_url", url)] * 4, seconds=1)
        yield


@contextmanager
def animation(target: Target) -> Iterator[None]:
    url = "data:image/gif;base64," + base64.b64encode(bomb(2000, 7000)).decode()
    target.at_once([media("video_url", url)] * 4, seconds=20)
    yield


@contextmanager
def lists(size: int, target: Target) -> Iterator[None]:
    opening = b'{"messages":[{"role":"user","content":"x"}],'
    chats = [
        filled(b'{"messages":[', b"{}", b"]}", size),
        filled(b'{"messages":[{"role":"user","content":[', b"0", b"]}]}", size),
        filled(opening + b'"stop":[', b"0", b"]}", size),
        filled(
            opening + b'"tools":[{"type":"function","function":{"name":"f","parameters":{"a":[',
            b"[[]]",
            b"]}}}]}",
            size,
        ),
        filled(b'{"messages":[', b'{"role":"user","content":""}', b"]}", size),
    ]
    prompts = [filled(b'{"prompt":[', item, b"]}", size) for item in (b"{}", b"7", b"[]")]

    def again() -> None:
        for _ in range(2):
            for body in chats:
                target.post(body)
            for body in prompts:
                target.post(body, "/v1/completions")

    thread = threading.Thread(target=again, daemon=True)
    thread.start()
    yield
    thread.join(120)


def drain(sock: socket.socket) -> None:
    try:
        while sock.recv(65536):
            pass
    except OSError:
        return


@contextmanager
def streams(target: Target, read: bool) -> Iterator[None]:
    """Twelve answers of 60 tokens ahead of the text requests, for eight places. Read or not, the
    model has the same to do; only what unread ones cost more is an attack.
    """
    body = {**TEXT, "max_tokens": 60, "ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 20}
    raw = json.dumps({**body, "return_token_ids": True}).encode()
    socks = []
    for _ in range(12):
        sock = socket.socket()
        if not read:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect(("127.0.0.1", target.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
        sock.sendall(head.encode() + b"\r\n\r\n" + raw)
        socks.append(sock)
        if read:
            threading.Thread(target=drain, args=(sock,), daemon=True).start()
    yield
    for sock in socks:
        sock.close()


@contextmanager
def silent(target: Target) -> Iterator[None]:
    socks = [socket.create_connection(("127.0.0.1", target.port)) for _ in range(900)]
    yield
    for sock in socks:
        sock.close()


@contextmanager
def surrogates(target: Target) -> Iterator[None]:
    target.at_once([b'{"prompt":[9],"stop":"\\ud800","max_tokens":3}'] * 20, "/v1/completions")
    yield


@contextmanager
def nothing(target: Target) -> Iterator[None]:
    yield


ATTACKS: dict[str, Callable[[Target], Any]] = {
    "before": nothing,
    **{f"trickled {mode}": (lambda target, mode=mode: trickles(mode, target)) for mode in TRICKLES},
    "animation": animation,
    "lists of 4 MiB": lambda target: lists(2**22, target),
    "lists of 1 MiB": lambda target: lists(2**20 - 100, target),
    "read": lambda target: streams(target, True),
    "unread": lambda target: streams(target, False),
    "silent": silent,
    "surrogates": surrogates,
    "after": nothing,
}


def measured(target: Target, attack: Callable[[Target], Any], seconds: float) -> dict[str, Any]:
    """One phase."""
    took: list[float] = []
    started_cpu = target.cpu_seconds()
    failed = 0
    memory, start_mb = [], target.resident_mb()
    target.statuses.clear()
    with attack(target), httpx.Client(headers=JSON, timeout=120) as client:
        end = time.monotonic() + seconds
        while time.monotonic() < end or not took:
            started = time.monotonic()
            reply = client.post(f"{target.url}/v1/chat/completions", json=TEXT)
            took.append(time.monotonic() - started)
            failed += reply.status_code != 200
            memory.append(target.resident_mb())
            time.sleep(0.02)
    took.sort()
    return {
        "answers": len(took),
        "failed": failed,
        "median_seconds": round(took[len(took) // 2], 3),
        "most_seconds": round(took[-1], 3),
        "cpu_seconds": round(target.cpu_seconds() - started_cpu, 2),
        "grew_mb": round(max(memory) - start_mb, 1),
        "statuses": dict(target.statuses),
    }


def ended(target: Target) -> float:
    """Seconds from SIGTERM to the end of the process, while hosts trickle and their clients have
    gone.
    """
    with trickling("header") as url:
        target.at_once([media("image_url", url)] * 4, seconds=30)
        time.sleep(1)
        started = time.monotonic()
        target.child.send_signal(signal.SIGTERM)
        target.child.wait(120)
        return round(time.monotonic() - started, 2)


def fresh(preset: str, folder: Path) -> None:
    from bench_serve import fresh_model

    fresh_model(preset, folder)


def main() -> int:
    """Everything; 1 if somebody else's answer failed, or an attacker saw a 5xx."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny-a")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--only", default="")
    a = parser.parse_args()
    wanted = a.only.split(",") if a.only else list(ATTACKS)
    with tempfile.TemporaryDirectory() as scratch:
        fresh(a.preset, Path(scratch) / "model")
        target = Target(Path(scratch) / "model")
        try:
            first_mb = target.resident_mb()
            found = {name: measured(target, ATTACKS[name], a.seconds) for name in wanted}
            last_mb = target.resident_mb()
            sigterm = ended(target)
        finally:
            target.child.kill()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {"bench": "serve_attacked", "commit": commit, "python": platform.python_version(), "cores": os.cpu_count()}
    ends = {"grew_mb": round(last_mb - first_mb, 1), "sigterm_seconds": sigterm, "log_lines": len(target.errors)}
    print(json.dumps({**about, "preset": a.preset, "attacks": found, **ends}))
    bad = any(one["failed"] or any(s >= 500 for s in one["statuses"]) for one in found.values())
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
