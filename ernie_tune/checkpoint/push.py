"""From a folder to a hub: the files of a model and nothing else, private unless told otherwise,
checked when they are there; and the check of what came from a hub.

The hubs' own clients do the talking; they skip what the hub already holds, so the same command goes
on with an upload that was cut. A token is taken from the hub's variable or its client's login,
never from a command line, and is never shown. Refuses to know: how a model was made, paddle.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_tune.checkpoint.hub import HUBS, check_hub, errors_of, missing_package, owned, reason_of
from ernie_tune.checkpoint.ledger import sha256_of
from ernie_tune.config.language import counted, say

# What belongs to a model: all that loading, talking to it and its card need.
MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "adapter_config.json",
    "lora_config.json", "ernie_tune_args.yaml", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "reward_head/*.safetensors", "reward_head/*.json",
    "README.md", "LICENSE", "training_loss.svg", "quantize_config.json", "export_report.json", "*.npz",
)  # fmt: skip
_TOKENS = {
    "huggingface": ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    "modelscope": ("MODELSCOPE_API_TOKEN", "MODELSCOPE_SDK_TOKEN"),
    "aistudio": ("AISTUDIO_ACCESS_TOKEN",),
}
_LOOKS_LIKE_A_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|ms-[0-9a-f]{8}-[0-9a-f-]{27,}|sk-[A-Za-z0-9_-]{20,})")
_TEXT_BYTES = 8 << 20  # files up to this are searched for tokens, and may stand in a git repository as they are
_GIT_DIGITS = 40
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HEAD = re.compile(r"^---\s.*?\s---", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Pushed:
    """What the hub holds now. `checked`: files that it has confirmed by their SHA-256."""

    name: str
    hub: str
    files: tuple[str, ...]
    checked: int
    private: bool


def model_files(folder: Path) -> list[str]:
    """The files of a folder that belong to its model, as paths in it, sorted. Raises ValueError
    where there is no model, and where it has no card."""
    found = sorted({f.relative_to(folder).as_posix() for p in MODEL_FILES for f in folder.glob(p) if f.is_file()})
    if not any(name.endswith(".safetensors") for name in found):
        raise ValueError(
            say(
                f"{folder} must hold a model (*.safetensors); give the output_dir of a finished run, or an exported folder",
                f"{folder} 中须有模型（*.safetensors）；请给出已完成运行的输出目录，或导出的文件夹",
            )
        )
    if "README.md" not in found:
        raise ValueError(
            say(
                f"{folder} must hold a card (README.md), which says what the model is; write one, or push the folder of the run",
                f"{folder} 中须有说明模型的 README.md；请写一份，或上传运行的输出目录",
            )
        )
    return found


def check_no_token(folder: Path, files: Sequence[str], token: str) -> None:
    """Raises ValueError where a text file holds the token in use, or what looks like one of a
    hub's."""
    for name in files:
        file = folder / name
        if file.suffix in (".safetensors", ".npz", ".model") or file.stat().st_size > _TEXT_BYTES:
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if (token and token in text) or _LOOKS_LIKE_A_TOKEN.search(text):
            raise ValueError(
                say(
                    f"{file} must hold no access token; take it out, and have the hub revoke it",
                    f"{file} 中不得含有访问令牌；请删去，并在 hub 上吊销它",
                )
            )


def push(
    folder: Path, name: str, hub: str = "huggingface", *, private: bool = True, message: str = "", token: str = ""
) -> Pushed:
    """Put the model of `folder` into the repository `name` ("owner/model") of a hub, which is made
    where it is not there, and check what the hub then holds.

    `private`: only of a repository that is made now. `token`: by default the hub's variable, or
    what its client knows. Raises ValueError for a bad name, folder or hub, a missing package, a
    token in a file, what the hub refuses, and for files that came out different there.
    """
    check_hub("hub", hub)
    if not _NAME.fullmatch(name):
        raise ValueError(
            say(
                f"name ({name!r}) must be 'owner/model' in letters, digits, '.', '_' and '-'; correct it",
                f"名称（{name!r}）须为 'owner/model'，由字母、数字、.、_ 和 - 组成；请改正",
            )
        )
    files = model_files(folder)
    if hub == "aistudio" and not _HEAD.search((folder / "README.md").read_text(encoding="utf-8", errors="replace")):
        raise ValueError(
            say(
                f"{folder / 'README.md'} must begin with a head (---, license: …, ---), or AI Studio leaves it out; write one",
                f"{folder / 'README.md'} 须以元数据开头（---、license: …、---），否则 AI Studio 会略过它；请补上",
            )
        )
    token = token or next((os.environ[v] for v in _TOKENS[hub] if os.environ.get(v)), "")
    check_no_token(folder, files, token)
    package = HUBS[hub].module.split(".")[0]
    try:
        client: Any = _CLIENTS[hub](token)
    except (ImportError, AttributeError) as error:
        raise missing_package("hub", hub, package, error) from error
    size = sum((folder / f).stat().st_size for f in files)
    print(
        say(
            f"ernie_tune: {counted(len(files), 'file')}, {size / 1e6:,.1f} MB -> {hub}:{name}",
            f"ernie_tune：{len(files)} 个文件，{size / 1e6:,.1f} MB → {hub}:{name}",
        ),
        file=sys.stderr,
        flush=True,
    )
    try:
        client.create(name, private)
        client.upload(name, folder, files, message or f"Upload {folder.name} with ernie_tune")
        there: Mapping[str, str] = client.listing(name, files)
    except errors_of(package) as error:
        raise ValueError(
            say(
                "{hub} must take {name}, but says: {why}; check the name, the network and the rights of the token "
                "({variable}), then give the same command: it goes on where it stopped",
                "{hub} 没有接受 {name}，而是说：{why}；请检查名称、网络和令牌（{variable}）的权限，再执行同一命令：会从中断处继续",
                hub=hub,
                name=name,
                variable=_TOKENS[hub][0],
                why=reason_of(error, token),
            )
        ) from None  # the client's traceback may show the request and its token
    return Pushed(name, hub, tuple(files), _checked(folder, files, there, hub, name), private)


def _checked(folder: Path, files: Sequence[str], there: Mapping[str, str], hub: str, name: str) -> int:
    """How many files the hub has confirmed. ValueError for those that are missing or differ."""
    missing = [file for file in files if file not in there]
    known = [file for file in files if there.get(file)]
    differ = [file for file in known if not _same(folder / file, there[file])]
    if missing or differ:
        told = ", ".join([*missing, *differ])
        raise ValueError(
            say(
                f"{hub}:{name} must hold every file as it is here, but {told} is missing or differs; give the same command again",
                f"{hub}:{name} 中的文件须与本机相同，但 {told} 缺失或不同；请再执行同一命令",
            )
        )
    return len(known)


def _same(file: Path, told: str) -> bool:
    """Whether a file is what a hub tells of: a SHA-256, or (40 digits) git's id of what the
    repository holds, which for large files is Git LFS' pointer to them.
    """
    if len(told) != _GIT_DIGITS:
        return told == sha256_of(file)
    size = file.stat().st_size
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256_of(file)}\nsize {size}".encode()
    held = [pointer, pointer + b"\n", *([file.read_bytes()] if size <= _TEXT_BYTES else [])]
    return told in [hashlib.sha1(b"blob %d\0" % len(c) + c, usedforsecurity=False).hexdigest() for c in held]


def check_download(folder: Path, name: str, hub: str) -> int:
    """Look for every file that a hub lists, and compare it with the SHA-256 that it tells; how many
    it tells of (AI Studio: none). A file that differs is deleted, and what was left of one that did
    not come, so that the next download fetches it. Raises ValueError naming such files, and for
    what the hub says.
    """
    package = HUBS[hub].module.split(".")[0]
    token = next((os.environ[v] for v in _TOKENS[hub] if os.environ.get(v)), "")
    try:
        client: Any = _CLIENTS[hub](token)
        there: Mapping[str, str] = client.listing(owned(name, hub), [])
    except errors_of(package) as error:
        raise ValueError(
            say(
                "{hub} must list the files of {name}, but says: {why}; check the network and try again",
                "{hub} 没有列出 {name} 的文件，而是说：{why}；请检查网络后重试",
                hub=hub,
                name=name,
                why=reason_of(error, token),
            )
        ) from None
    known = [file for file, sha256 in there.items() if sha256]
    absent = [f for f in there if not (folder / f).is_file()]
    differ = [f for f in known if f not in absent and sha256_of(folder / f) != there[f]]
    for file in absent:
        client.forget(owned(name, hub), folder, file)
    for file in differ:
        (folder / file).resolve().unlink(missing_ok=True)  # in a cache the name is a link
        (folder / file).unlink(missing_ok=True)
    if differ:
        raise ValueError(
            say(
                f"{', '.join(differ)} must be what {hub} holds, but came damaged and was deleted; give the same command again",
                f"{'、'.join(differ)} 与 {hub} 上的不同，已删去；请再执行同一命令",
            )
        )
    if absent:
        raise ValueError(
            say(
                f"{', '.join(absent)} must have come from {hub}, but did not; give the same command again",
                f"{'、'.join(absent)} 没有从 {hub} 下载下来；请再执行同一命令",
            )
        )
    return len(known)


class _Client:
    def forget(self, name: str, folder: Path, file: str) -> None:
        """Drop what the client keeps of a file that did not come whole: most go on by
        themselves.
        """


class _HuggingFace(_Client):
    def __init__(self, token: str) -> None:
        self.api = importlib.import_module("huggingface_hub").HfApi(token=token or None)

    def create(self, name: str, private: bool) -> None:
        self.api.create_repo(name, private=private, exist_ok=True)

    def upload(self, name: str, folder: Path, files: Sequence[str], message: str) -> None:
        self.api.upload_folder(
            repo_id=name, folder_path=str(folder), allow_patterns=[_literal(f) for f in files], commit_message=message
        )

    def listing(self, name: str, files: Sequence[str]) -> dict[str, str]:
        siblings = self.api.model_info(name, files_metadata=True).siblings or []
        return {s.rfilename: (s.lfs.sha256 if s.lfs else "") for s in siblings}


class _ModelScope(_Client):
    def __init__(self, token: str) -> None:
        self.api, self.token = importlib.import_module("modelscope.hub.api").HubApi(token=token or None), token

    def create(self, name: str, private: bool) -> None:
        self.api.create_repo(name, visibility="private" if private else "public", exist_ok=True)

    def upload(self, name: str, folder: Path, files: Sequence[str], message: str) -> None:
        # Newer versions write down in the folder what they have sent, and believe it even where the
        # repository was made anew; what the hub holds already it says itself.
        trusting = {"use_cache": False} if importlib.util.find_spec("modelscope_hub") else {}
        self.api.upload_folder(
            name,
            folder_path=str(folder),
            allow_patterns=[_literal(f) for f in files],
            commit_message=message,
            repo_type="model",
            **trusting,
        )

    def listing(self, name: str, files: Sequence[str]) -> dict[str, str]:
        try:  # what newer versions stand on; their own listing leaves the checksums out
            newer = importlib.import_module("modelscope_hub")
        except ImportError:
            return {f["Path"]: f.get("Sha256") or "" for f in self.api.get_model_files(name, recursive=True)}
        found = newer.HubApi(token=self.token or None).list_repo_files(name, "model", recursive=True)
        return {f.path: f.sha256 or "" for f in found if not f.is_dir}


class _AIStudio(_Client):
    def __init__(self, token: str) -> None:
        self.hub, self.token = importlib.import_module("aistudio_sdk.hub"), {"token": token} if token else {}

    def create(self, name: str, private: bool) -> None:
        model = name.split("/")[1]
        told = self.hub.create_repo(repo_id=name, model_name=model, private=private, **self.token)
        if told.get("error_code") and "already" not in str(told.get("error_msg", "")):
            raise ValueError(f"{told.get('error_msg')} ({told['error_code']})")

    def upload(self, name: str, folder: Path, files: Sequence[str], message: str) -> None:
        self.hub.upload_folder(
            repo_id=name,
            folder_path=str(folder),
            allow_patterns=[_literal(f) for f in files],
            commit_message=message,
            **self.token,
        )

    def listing(self, name: str, files: Sequence[str]) -> dict[str, str]:
        # the client tells failures of single files in lines that it prints
        if not files:
            module = importlib.import_module("aistudio_sdk.snapshot_download")
            listed, _ = module.get_model_files(name, **self.token)
            return {one["path"]: "" for one in listed if one.get("type") != "tree"}
        there = [f for f in files if self.hub.file_exists(name, f, **self.token) is True]
        return {f: self._git_id(name, f) for f in there}

    def _git_id(self, name: str, file: str) -> str:
        """What git calls the file that is there; "" where the client does not find out."""
        try:
            ask = importlib.import_module("aistudio_sdk.requests.hub").request_aistudio_git_file_info
            config = importlib.import_module("aistudio_sdk.config")
        except (ImportError, AttributeError):
            return ""
        host = os.environ.get("STUDIO_GIT_HOST") or config.STUDIO_GIT_HOST_DEFAULT
        told = str(ask(host, *name.split("/"), file, "master", self.token.get("token", "")).get("sha", ""))
        return told if len(told) == _GIT_DIGITS else ""

    def forget(self, name: str, folder: Path, file: str) -> None:
        """A file that the client goes on with is complete in its temporary folder, and never moved
        out of it (0.3.9): the part is dropped, and the file fetched anew.
        """
        parts = importlib.import_module("aistudio_sdk.config").TEMPORARY_FOLDER_NAME
        for place in (folder / parts, folder.parent.parent / parts / name):
            (place / file).unlink(missing_ok=True)


def _literal(name: str) -> str:
    """A file's name as a pattern that matches it alone."""
    return re.sub(r"([\[*?])", r"[\1]", name)


_CLIENTS: dict[str, type[Any]] = {"huggingface": _HuggingFace, "modelscope": _ModelScope, "aistudio": _AIStudio}
