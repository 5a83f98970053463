"""A hub on 127.0.0.1 that speaks Hugging Face's protocol as far as its client asks: listings,
ranged downloads, LFS uploads, commits.

It can cut a download, spoil a file, refuse a token, and cut an upload, and it writes down what it
was asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
LFS_BYTES = 2000  # files from this size on are stored by their SHA-256


@dataclass
class Hub:
    """What it holds (repository -> path -> bytes), how it misbehaves, what it has been asked."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    token: str = ""  # asked for when it is set
    cut_after: int | None = None  # bytes of the next download of a large file
    spoil: str = ""  # a path whose bytes come out wrong
    refuse_uploads: int = 0  # blobs that may still come before they are refused
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def paths(self, method: str) -> list[str]:
        return [path for m, path, _ in self.asked if m == method]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Run it until the block ends."""
    with answering(hub, _Handler):
        yield hub


@contextmanager
def answering(hub: Any, handler: type[BaseHTTPRequestHandler]) -> Iterator[None]:
    """Let a handler answer for a hub, whose address is set, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


class Answering(BaseHTTPRequestHandler):
    """How any of the hubs answers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def _answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class _Handler(Answering):
    hub: Hub

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _allowed(self) -> bool:
        self.hub.asked.append((self.command, self.path, dict(self.headers)))
        if not self.hub.token or self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self._read()
        self._answer(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
        return False

    def do_HEAD(self) -> None:
        if self._allowed():
            self._file()

    def do_GET(self) -> None:
        if not self._allowed():
            return
        path = unquote(urlsplit(self.path).path)
        if "/resolve/" in path:
            return self._file()
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.*|/tree/.*)?", path)
        files = self.hub.repositories.get(found[1]) if found else None
        if found is None or files is None:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        listed = [self._listed(name, content) for name, content in files.items()]
        if (found[2] or "").startswith("/tree"):
            return self._answer(200, [{**one, "path": one["rfilename"], "type": "file", "oid": "0"} for one in listed])
        self._answer(200, {"id": found[1], "sha": COMMIT, "private": False, "siblings": listed})

    def _listed(self, name: str, content: bytes) -> dict[str, Any]:
        sha = hashlib.sha256(content).hexdigest()
        lfs = {"lfs": {"sha256": sha, "oid": sha, "size": len(content), "pointerSize": 130}}
        return {"rfilename": name, "size": len(content), **(lfs if len(content) >= LFS_BYTES else {})}

    def _file(self) -> None:
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", unquote(urlsplit(self.path).path))
        content = self.hub.repositories.get(found[1], {}).get(found[2]) if found else None
        if found is None or content is None:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        sha = hashlib.sha256(content).hexdigest()
        if found[2] == self.hub.spoil:
            content = content[:-1] + b"?"
        known = {
            "ETag": f'"{sha}"',
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(content)),
            "Accept-Ranges": "bytes",
        }
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        part, status = content[start:], 206 if "Range" in self.headers else 200
        if status == 206:
            known["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = self.hub.cut_after
        if self.command == "GET" and cut is not None and len(content) >= LFS_BYTES:
            self.hub.cut_after = None
            self.send_response(status)
            for name, value in {"Content-Length": str(len(part)), **known}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(part[:cut])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self._answer(status, part, known)

    def do_POST(self) -> None:
        if not self._allowed():
            return
        path, body = unquote(urlsplit(self.path).path), self._read()
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.hub.repositories:
                return self._answer(
                    409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
                )
            self.hub.repositories[name] = {}
            self.hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            return self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [self._wanted(one) for one in json.loads(body)["objects"]]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if "/preupload/" in path:
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LFS_BYTES else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": modes})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.*", path)
        if found is None:
            return self._answer(404, {"error": f"no {path}"})
        files = self.hub.repositories[found[1]]
        for line in body.splitlines():
            one = json.loads(line)
            if one["key"] == "file":
                files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
            elif one["key"] == "lfsFile":
                files[one["value"]["path"]] = self.hub.blobs[one["value"]["oid"]]
        self._answer(
            200, {"commitUrl": f"{self.hub.url}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        )

    def _wanted(self, one: dict[str, Any]) -> dict[str, Any]:
        known = {"oid": one["oid"], "size": one["size"]}
        if one["oid"] in self.hub.blobs:
            return known  # nothing is to be sent
        return {**known, "actions": {"upload": {"href": f"{self.hub.url}/blob/{one['oid']}"}}}

    def do_PUT(self) -> None:
        self.hub.asked.append((self.command, self.path, dict(self.headers)))
        body, oid = self._read(), self.path.rsplit("/", 1)[1]
        if self.hub.refuse_uploads and len(self.hub.blobs) >= self.hub.refuse_uploads:
            return self._answer(403, {"error": "quota"})
        self.hub.blobs[oid] = body
        self._answer(200)
