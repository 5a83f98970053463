"""Names to folders: local paths, the hubs' caches, and downloads through fake packages. No network,
no paddle.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ernie_tune.checkpoint.hub import resolve

NAME = "baidu/ERNIE-4.5-VL-28B-A3B-PT"


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in (
        "HF_HOME",
        "HF_HUB_CACHE",
        "XDG_CACHE_HOME",
        "MODELSCOPE_CACHE",
        "AISTUDIO_CACHE_HOME",
        "ERNIE_TUNE_DOWNLOAD_HUB",
        "USE_MODELSCOPE_HUB",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def model_at(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_at(tmp_path / "models" / "mine")
    assert resolve(folder) == folder
    assert resolve("~/models/mine") == folder
    monkeypatch.chdir(tmp_path)
    # a folder wins over a repository of that name
    assert resolve("models/mine") == Path("models/mine")


@pytest.mark.parametrize(
    "where",
    [
        ".cache/modelscope/models/PaddlePaddle--ERNIE-4.5-VL-28B-A3B-PT/snapshots/master",
        ".cache/modelscope/models/PaddlePaddle/ERNIE-4___5-VL-28B-A3B-PT",
        ".cache/modelscope/hub/models/PaddlePaddle/ERNIE-4___5-VL-28B-A3B-PT",
        ".cache/modelscope/hub/PaddlePaddle/ERNIE-4___5-VL-28B-A3B-PT",
        ".cache/aistudio/hub/models/PaddlePaddle/ERNIE-4___5-VL-28B-A3B-PT",
        ".cache/huggingface/hub/models--baidu--ERNIE-4.5-VL-28B-A3B-PT/snapshots/abc",
    ],
)
def test_caches(where: str, tmp_path: Path) -> None:
    folder = model_at(tmp_path / where)
    if "huggingface" in where:
        refs = folder.parents[1] / "refs"
        refs.mkdir()
        (refs / "main").write_text("abc")
    assert resolve(NAME) == folder
    assert resolve(NAME.replace("baidu", "PaddlePaddle")) == folder


def test_cache_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    folder = model_at(tmp_path / "ms" / "models" / "me" / "small")
    assert resolve("me/small") == folder


def fake(monkeypatch: pytest.MonkeyPatch, module: str, answer: Path) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def snapshot_download(**arguments: Any) -> str:
        calls.append(arguments)
        return str(answer)

    for name in (module.split(".")[0], module):
        stub = ModuleType(name)
        stub.snapshot_download = snapshot_download  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, stub)
    return calls


@pytest.mark.parametrize(
    ("hub", "module", "call"),
    [
        ("huggingface", "huggingface_hub", {"repo_id": "baidu/ERNIE-4.5-VL-28B-A3B-PT"}),
        ("modelscope", "modelscope", {"model_id": "PaddlePaddle/ERNIE-4.5-VL-28B-A3B-PT"}),
        ("aistudio", "aistudio_sdk.snapshot_download", {"repo_id": "PaddlePaddle/ERNIE-4.5-VL-28B-A3B-PT"}),
    ],
)
def test_download_when_asked(
    hub: str, module: str, call: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    calls = fake(monkeypatch, module, tmp_path / "there")
    assert resolve(NAME, download_hub=hub) == tmp_path / "there"
    assert calls == [call]
    assert f"downloading {next(iter(call.values()))} from {hub}" in capsys.readouterr().err
    monkeypatch.setenv("ERNIE_TUNE_DOWNLOAD_HUB", hub)
    assert resolve("me/small") == tmp_path / "there"
    # only the two owners of the releases are translated
    assert list(calls[-1].values()) == ["me/small"]


def test_modelscope_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake(monkeypatch, "modelscope", tmp_path)
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert resolve("me/small") == tmp_path
    assert calls == [{"model_id": "me/small"}]


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aistudio_sdk", None)
    with pytest.raises(
        ValueError, match=r"download_hub \(aistudio\) must have the package aistudio-sdk .*; pip install"
    ):
        resolve(NAME, download_hub="aistudio")
    # too old: no snapshot_download
    monkeypatch.setitem(sys.modules, "modelscope", ModuleType("modelscope"))
    with pytest.raises(ValueError, match=r"package modelscope .* or download PaddlePaddle/ERNIE-4.5-VL-28B-A3B-PT by"):
        resolve(NAME, download_hub="modelscope")


@pytest.mark.parametrize("module", ["errors", "hub.errors"])
def test_a_failed_download_is_one_clear_message(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class NotExistError(Exception):
        pass

    def snapshot_download(**_: Any) -> str:
        raise NotExistError("no such repository\nat line 3")

    hub, errors = ModuleType("modelscope"), ModuleType("errors")
    hub.snapshot_download, errors.NotExistError = snapshot_download, NotExistError  # type: ignore[attr-defined]
    hub.__path__ = []
    for name in ("modelscope.errors", "modelscope.hub", "modelscope.hub.errors", "modelscope.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "modelscope", hub)
    if module == "hub.errors":
        monkeypatch.setitem(sys.modules, "modelscope.hub", hub)
    monkeypatch.setitem(sys.modules, f"modelscope.{module}", errors)
    with pytest.raises(ValueError, match=r"must give PaddlePaddle/.*, but says: no such repository; check the name"):
        resolve(NAME, download_hub="modelscope")


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nothing is downloaded unasked: set download_hub: hug.*'ernie-4.5-vl-28b-a3b'"
    ):
        resolve(NAME)
    with pytest.raises(FileNotFoundError, match=r"'./nowhere'.* must be a folder or a repository"):
        resolve("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"AutoModel.from_config\('tiny-b'\)"):
        resolve("tiny-b")
    with pytest.raises(ValueError, match=r"download_hub \('hf'\) must be one of"):
        resolve(NAME, download_hub="hf")
    monkeypatch.setenv("ERNIE_TUNE_DOWNLOAD_HUB", "github")
    with pytest.raises(ValueError, match=r"ERNIE_TUNE_DOWNLOAD_HUB \('github'\) must be one of"):
        resolve(NAME)
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match=r"must be a folder, but is a file"):
        resolve(file)
