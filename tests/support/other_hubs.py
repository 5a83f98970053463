"""Hubs on 127.0.0.1 that speak ModelScope's and AI Studio's protocols as far as their clients ask:
listings, ranged downloads, refusals.

They can cut a download, spoil a file and ask for a token, and write down what they were asked.
Written from what modelscope 1.40 (modelscope_hub 0.5) and aistudio-sdk 0.3.9 send and read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_stub import answering

REVISION = "a" * 40


@dataclass
class OtherHub:
    """What it holds (repository -> path -> bytes), how it misbehaves, what it has been asked."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str = ""  # asked for when it is set
    cuts: int = 0  # downloads of large files that are still to be cut in half
    spoil: str = ""  # a path whose bytes come out wrong
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def ranges(self, part: str) -> list[str]:
        """The Range headers of downloads whose path holds `part`."""
        return [h["range"] for _, path, h in self.asked if part in path and "range" in h]


@contextmanager
def serving_other(hub: OtherHub) -> Iterator[OtherHub]:
    """Run it until the block ends."""
    with answering(hub, _Handler):
        yield hub


class _Handler(BaseHTTPRequestHandler):
    hub: OtherHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _serve(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        told = {name.lower(): value for name, value in self.headers.items()}
        self.hub.asked.append((self.command, self.path, told))
        given = told.get("authorization", "").removeprefix("Bearer ").removeprefix("token ")
        if self.hub.token and given != self.hub.token:
            problem = {"Code": 401, "Message": "token is invalid", "message": "token is invalid", "Success": False}
            return self._answer(401, problem)
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        if found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/(.*)", path):
            return self._modelscope(found[1], found[2], query)
        if found := re.fullmatch(r"/api/v1/repos/([^/]+/[^/]+)/(tags|git/trees|contents|media)/(.*)", path):
            return self._aistudio(found[1], found[2], found[3])
        self._answer(404, {"Code": 404, "Message": "no such page", "Success": False})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _modelscope(self, name: str, what: str, query: dict[str, list[str]]) -> None:
        files = self.hub.repositories.get(name)
        if files is None:
            return self._answer(404, {"Code": 404, "Message": f"{name} does not exist", "Success": False})
        if what == "repo/files":
            listed = [
                {"Name": p, "Path": p, "Size": len(c), "Type": "blob", "Sha256": _sha256(c), "Revision": REVISION}
                for p, c in files.items()
            ]
            return self._answer(200, {"Code": 200, "Success": True, "Data": {"Files": listed}})
        if what == "repo" and query["FilePath"][0] in files:
            return self._file(query["FilePath"][0], files[query["FilePath"][0]])
        self._answer(404, {"Code": 404, "Message": "no such file", "Success": False})

    def _aistudio(self, name: str, kind: str, rest: str) -> None:
        files = self.hub.repositories.get(name)
        if files is None or kind == "tags":
            return self._answer(404, {"message": "not found"})
        if kind == "git/trees":
            tree = [{"path": p, "type": "blob", "size": len(c), "sha": _sha256(c)[:40]} for p, c in files.items()]
            return self._answer(
                200,
                {"url": f"{self.hub.url}/trees/{REVISION}", "tree": tree, "truncated": False, "total_count": len(tree)},
            )
        if rest not in files:
            return self._answer(404, {"message": "not found"})
        if kind == "contents":
            told = {"name": rest, "path": rest, "size": len(files[rest]), "sha": _sha256(files[rest])[:40]}
            return self._answer(200, {**told, "Sha256": _sha256(files[rest]), "last_commit_sha": REVISION})
        self._file(rest, files[rest])

    def _file(self, path: str, content: bytes) -> None:
        if path == self.hub.spoil:
            content = content[:-1] + b"?"
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, end = (int(wanted[1]), int(wanted[2] or len(content) - 1)) if wanted else (0, len(content) - 1)
        part = content[start : end + 1]
        known = {"Accept-Ranges": "bytes"}
        if wanted:
            known["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        if self.hub.cuts and len(part) > 2000:
            self.hub.cuts -= 1
            self.send_response(206 if wanted else 200)
            for name, value in {"Content-Length": str(len(part)), **known}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self._answer(206 if wanted else 200, part, known)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
