"""Hubs on 127.0.0.1 that speak ModelScope's and AI Studio's protocols as far as their clients ask:
listings, ranged downloads, new repositories, uploads by Git LFS and commits, refusals.

They can cut a download or an upload, spoil a file, refuse blobs and commits, ask for a token, and
write down what they were asked. Written from what modelscope 1.40 (modelscope_hub 0.5) and
aistudio-sdk 0.3.9 send and read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_stub import Answering, answering

REVISION = "a" * 40
_LARGE = ".safetensors"  # what AI Studio stores by its SHA-256; ModelScope's client decides itself


@dataclass
class OtherHub:
    """What it holds (repository -> path -> bytes), how it misbehaves, what it has been asked."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str = ""  # asked for when it is set
    cuts: int = 0  # downloads of large files that are still to be cut in half
    spoil: str = ""  # a path whose bytes come out wrong, or are stored wrong
    blobs: dict[str, bytes] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    refuse_blob: int = 0  # this one, counted from 1, is refused; 0: none
    refuse_commits: bool = False
    plans: list[dict[str, Any]] = field(default_factory=list)  # how it behaves after each GET /next
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def ranges(self, part: str) -> list[str]:
        """The Range headers of downloads whose path holds `part`."""
        return [h["range"] for _, path, h in self.asked if part in path and "range" in h]

    def go_on(self) -> None:
        """Behave as the next plan says."""
        plan = {"spoil": "", "refuse_blob": 0, "refuse_commits": False, **self.plans.pop(0)}
        if plan.pop("forget", False):  # the repository was deleted there
            self.repositories.clear()
        for name, value in plan.items():
            setattr(self, name, value)

    def sent(self) -> list[str]:
        """The SHA-256 of blobs that were sent here, the refused ones too."""
        return [path.rsplit("/", 1)[1] for method, path, _ in self.asked if method == "PUT"]

    def commit(self, name: str, files: list[tuple[str, bytes | None, str]]) -> None:
        """Take (path, content or None, SHA-256 of the blob that holds it) into a repository."""
        for path, content, oid in files:
            held = self.blobs[oid] if content is None else content
            self.repositories[name][path] = held[:-1] + b"?" if path == self.spoil else held


@contextmanager
def serving_other(hub: OtherHub) -> Iterator[OtherHub]:
    """Run it until the block ends."""
    with answering(hub, _Handler):
        yield hub


class _Handler(Answering):
    hub: OtherHub

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/next":
            self.hub.go_on()
            return self._answer(200, {})
        told = {name.lower(): value for name, value in self.headers.items()}
        self.hub.asked.append((self.command, self.path, told))
        given = told.get("authorization", "").removeprefix("Bearer ").removeprefix("token ")
        if self.hub.token and given != self.hub.token:
            problem = {"Code": 401, "Message": "token is invalid", "message": "token is invalid", "Success": False}
            return self._answer(401, problem)
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        if self.command == "PUT":
            return self._blob(path.rsplit("/", 1)[1], body)
        if self.command == "POST":
            return self._take(path, json.loads(body))
        if path.startswith("/modelcenter/"):  # AI Studio's pages about models
            return self._answer(200, {"errorCode": 0, "errorMsg": "", "logId": "1", "result": [".exe"]})
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
            tree = [{"path": p, "type": "blob", "size": len(c), "sha": _git_id(p, c)} for p, c in files.items()]
            return self._answer(
                200,
                {"url": f"{self.hub.url}/trees/{REVISION}", "tree": tree, "truncated": False, "total_count": len(tree)},
            )
        if rest not in files:
            return self._answer(404, {"message": "not found"})
        if kind == "contents":
            told = {"name": rest, "path": rest, "size": len(files[rest]), "sha": _git_id(rest, files[rest])}
            return self._answer(200, {**told, "Sha256": _sha256(files[rest]), "last_commit_sha": REVISION})
        self._file(rest, files[rest])

    # --- uploads ----------------------------------------------------------------------------------

    def _take(self, path: str, asked: dict[str, Any]) -> None:
        if path == "/api/v1/models":
            return self._create(f"{asked['Path']}/{asked['Name']}", asked["Visibility"] == 1)
        if path == "/modelcenter/v2/models/sdk/add":
            return self._create(f"me/{asked['repoName']}", asked["repoType"] == 0, asked)
        if path == "/modelcenter/v2/models/checkYaml":
            return self._answer(200, {"errorCode": 0, "logId": "1"})
        if path.startswith("/verify/"):
            return self._answer(200, {})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [self._wanted(one) for one in asked["objects"]]
            return self._answer(200, {"Code": 200, "Success": True, "Data": {"objects": objects}, "objects": objects})
        if found := re.fullmatch(r"/api/v1/repos/models/([^/]+/[^/]+)/commit/master", path):
            files = [
                (one["path"], None if one["type"] == "lfs" else base64.b64decode(one["content"]), one["sha256"])
                for one in asked["actions"]
            ]
            return self._commit(found[1], files)
        if found := re.fullmatch(r"/api/v1/repos/([^/]+/[^/]+)/preupload/master", path):
            sizes = [{"path": one["path"], "lfs": one["path"].endswith(_LARGE)} for one in asked["files"]]
            return self._answer(200, {"files": sizes})
        if found := re.fullmatch(r"/api/v1/repos/([^/]+/[^/]+)/contents", path):
            taken = []
            for one in asked["files"]:
                content = base64.b64decode(one["content"])
                known = self.hub.repositories[found[1]].get(one["path"])
                assert one["operation"] == ("create" if known is None else "update")
                assert one.get("sha") == (None if known is None else _git_id(one["path"], known)), "what it replaces"
                oid = re.search(rb"oid sha256:(\w+)", content)[1].decode() if one["lfsPointer"] else ""  # type: ignore[index]
                taken.append((one["path"], None if one["lfsPointer"] else content, oid))
            return self._commit(found[1], taken)
        self._answer(404, {"Code": 404, "Message": "no such page", "Success": False})

    def _create(self, name: str, private: bool, asked: dict[str, Any] | None = None) -> None:
        """`asked`: by AI Studio's client, else by ModelScope's."""
        there = name in self.hub.repositories
        if there and asked is None:
            return self._answer(400, {"Code": 400, "Message": "the model already exists", "Success": False})
        if there:
            return self._answer(200, {"errorCode": 1, "errorMsg": "repo already created", "logId": "1"})
        self.hub.repositories[name], self.hub.private[name] = {}, private
        if asked is None:
            return self._answer(200, {"Code": 200, "Success": True, "Data": {"Path": name.split("/")[0]}})
        self._answer(200, {"errorCode": 0, "logId": "1", "result": asked})

    def _wanted(self, one: dict[str, Any]) -> dict[str, Any]:
        known = {"oid": one["oid"], "size": one["size"]}
        if one["oid"] in self.hub.blobs:
            return known  # nothing is to be sent
        upload, verify = {"href": f"{self.hub.url}/blob/{one['oid']}"}, {"href": f"{self.hub.url}/verify/{one['oid']}"}
        return {**known, "actions": {"upload": upload, "verify": verify}}

    def _blob(self, oid: str, content: bytes) -> None:
        if len(self.hub.sent()) == self.hub.refuse_blob:
            return self._answer(403, {"Code": 403, "Message": "quota", "Success": False})
        assert _sha256(content) == oid
        self.hub.blobs[oid] = content
        self._answer(200, {}, {"Content-Md5": hashlib.md5(content).hexdigest()})

    def _commit(self, name: str, files: list[tuple[str, bytes | None, str]]) -> None:
        if self.hub.refuse_commits:
            return self._answer(403, {"Code": 403, "Message": "no right to write", "Success": False})
        self.hub.commit(name, files)
        self._answer(201, {"Code": 200, "Success": True, "Data": {"CommitId": REVISION}})

    # --- downloads --------------------------------------------------------------------------------

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


def _git_id(path: str, content: bytes) -> str:
    """Git's name of what a repository holds for a file: a pointer in place of weights."""
    if path.endswith(_LARGE):
        content = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{_sha256(content)}\nsize {len(content)}".encode()
        )
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
