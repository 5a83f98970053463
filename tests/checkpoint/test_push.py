"""checkpoint/push.py and the verbs download and push: Hugging Face's own client against a hub on
this machine; the arguments that the other two clients get."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from support.hub_stub import Hub, serving
from support.tiny_runs import train

from ernie_tune.checkpoint.push import MODEL_FILES, model_files, push
from ernie_tune.cli.main import main
from ernie_tune.config.checks import problems
from ernie_tune.config.loader import load_text
from ernie_tune.config.training_arguments import TrainingArguments

TOKEN = "hf_" + "SECRET" * 6
NAME = "me/small"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "ERNIE_TUNE_DOWNLOAD_HUB", "USE_MODELSCOPE_HUB"):
        monkeypatch.delenv(variable, raising=False)
    with serving(Hub()) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield running


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What a run leaves, in names and sizes."""
    folder = tmp_path / "run"
    for name in ("checkpoint-3", "runs", "reward_head"):
        (folder / name).mkdir(parents=True)
    for name in ("config.json", "tokenizer_config.json", "ernie_tune_args.yaml", "README.md", "training_loss.svg"):
        (folder / name).write_text(f"---\n{name}\n---\n")
    (folder / "tokenizer.model").write_bytes(bytes(range(256)) * 10)
    (folder / "model-1.safetensors").write_bytes(b"first" * 1000)
    (folder / "model-2.safetensors").write_bytes(b"second" * 1000)
    (folder / "reward_head" / "model.safetensors").write_bytes(b"head" * 10)
    for name in ("checkpoint-3/model.safetensors", "trainer_log.jsonl", "ledger.json", "eval_answers.jsonl", ".env"):
        (folder / name).write_bytes(b"own")
    (folder / "before_after.html").write_text("pictures")
    return folder


BELONGS = [
    "README.md", "config.json", "ernie_tune_args.yaml", "model-1.safetensors", "model-2.safetensors",
    "reward_head/model.safetensors", "tokenizer.model", "tokenizer_config.json", "training_loss.svg",
]  # fmt: skip


def test_push_sends_the_model_and_nothing_else(
    hub: Hub, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["push", str(run_folder), NAME]) == 0
    assert sorted(hub.repositories[NAME]) == BELONGS == model_files(run_folder)
    assert all(hub.repositories[NAME][name] == (run_folder / name).read_bytes() for name in BELONGS)
    assert hub.private[NAME], "private unless told otherwise"
    told = capsys.readouterr()
    assert "9 files, 3 of them checked by checksum" in told.out
    assert TOKEN not in told.out + told.err
    assert main(["push", str(run_folder), "me/open", "--public", "true"]) == 0
    assert not hub.private["me/open"]


def test_an_upload_that_was_cut_goes_on(hub: Hub, run_folder: Path, capsys: Any) -> None:
    hub.refuse_uploads = 1
    assert main(["push", str(run_folder), NAME]) == 1
    assert "must take me/small, but says" in capsys.readouterr().err
    assert len(hub.blobs) >= 1
    assert hub.repositories[NAME] == {}, "nothing is there in part"
    first, hub.refuse_uploads = set(hub.blobs), 0
    hub.asked.clear()
    assert main(["push", str(run_folder), NAME]) == 0
    assert not {path.rsplit("/", 1)[1] for path in hub.paths("PUT")} & first, "what is there is not sent again"
    assert sorted(hub.repositories[NAME]) == BELONGS


def test_missing_rights_are_one_line_without_the_token(
    hub: Hub, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    hub.token = "another"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["push", str(run_folder), NAME]) == 1
    told = capsys.readouterr()
    assert "check the name, the network and the rights of the token (HF_TOKEN)" in told.err
    assert TOKEN not in told.out + told.err
    assert main(["download", NAME, "--from", "huggingface"]) == 1
    told = capsys.readouterr()
    assert "must give me/small, but says" in told.err
    assert TOKEN not in told.out + told.err


def test_a_hub_that_holds_something_else_is_noticed(
    hub: Hub, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "blobs", _Forgetful())
    with pytest.raises(ValueError, match=r"model-1.safetensors.* is missing or differs"):
        push(run_folder, NAME)


class _Forgetful(dict[str, bytes]):
    """Keeps other bytes than it was given."""

    def __setitem__(self, key: str, value: bytes) -> None:
        super().__setitem__(key, value + b"!")


def test_download_is_checked_and_goes_on(
    hub: Hub, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": b"{}", "README.md": b"card", "model.safetensors": b"weights" * 5000}
    hub.repositories["baidu/ERNIE-small"] = files
    hub.cut_after = 10_000
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    command = ["download", "PaddlePaddle/ERNIE-small", "--to", str(tmp_path / "there")]
    main(command)
    if not (tmp_path / "there" / "model.safetensors").exists():
        capsys.readouterr()
        assert main(command) == 0
    assert {name: (tmp_path / "there" / name).read_bytes() for name in files} == files
    assert "1 file checked by SHA-256" in capsys.readouterr().out
    ranges = [h.get("Range") or h.get("range") for m, p, h in hub.asked if m == "GET" and "model.safetensors" in p]
    assert any(r and not r.startswith("bytes=0-") for r in ranges), "what had come was not fetched again"


@pytest.mark.parametrize("to", [True, False], ids=["folder", "cache"])
def test_a_damaged_file_is_refused_and_fetched_again(hub: Hub, tmp_path: Path, capsys: Any, to: bool) -> None:
    hub.repositories[NAME] = {"config.json": b"{}", "model.safetensors": b"weights" * 500}
    hub.spoil = "model.safetensors"
    command = ["download", NAME, "--from", "huggingface", *(["--to", str(tmp_path / "there")] if to else [])]
    assert main(command) == 1
    assert "model.safetensors must be what huggingface holds, but came damaged" in capsys.readouterr().err
    hub.spoil = ""
    assert main(command) == 0
    folder = Path(capsys.readouterr().out.split(" (")[0])
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 500


@pytest.mark.parametrize("secret", [TOKEN, "hf_" + "x" * 34, "sk-" + "y" * 40])
def test_a_token_in_a_file_stays_here(hub: Hub, run_folder: Path, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (run_folder / "ernie_tune_args.yaml").write_text(f"key: {secret}\n")
    with pytest.raises(ValueError, match=r"ernie_tune_args.yaml must hold no access token"):
        push(run_folder, NAME)
    assert hub.asked == []


def test_refusals(tmp_path: Path, run_folder: Path, capsys: Any) -> None:
    with pytest.raises(ValueError, match=r"name \('small'\) must be 'owner/model'"):
        push(run_folder, "small")
    with pytest.raises(ValueError, match=r"hub \('github'\) must be one of"):
        push(run_folder, NAME, "github")
    with pytest.raises(ValueError, match="must hold a model"):
        push(tmp_path / "empty", NAME)
    (run_folder / "README.md").unlink()
    with pytest.raises(ValueError, match=r"must hold a card \(README.md\)"):
        push(run_folder, NAME)
    for words in (["push", str(run_folder), NAME, "--token", TOKEN], ["download", NAME, f"--hf_token={TOKEN}"]):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert "must not stand on the command line" in told
        assert TOKEN not in told
    assert main(["push", str(run_folder)]) == 2
    assert main(["download"]) == 2
    assert main(["download", "nowhere"]) == 1
    assert main(["download", NAME, "--from", "github"]) == 1


def other_client(monkeypatch: pytest.MonkeyPatch, kind: str, there: list[str], fails: bool = False) -> list[Any]:
    """ModelScope's or AI Studio's client as a module that writes down its calls."""
    calls: list[Any] = []

    def called(name: str, answer: Any) -> Any:
        def call(*words: Any, **named: Any) -> Any:
            calls.append((name, words, named))
            return answer(*words) if callable(answer) else answer

        return call

    if kind == "modelscope":
        listing = [{"Path": name, "Sha256": ""} for name in there]
        api = SimpleNamespace(
            create_repo=called("create", None),
            upload_folder=called("upload", None),
            get_model_files=called("list", listing),
        )
        module, names = ModuleType("modelscope.hub.api"), ("modelscope", "modelscope.hub")
        monkeypatch.setitem(sys.modules, "modelscope_hub", None)  # of newer versions
        module.HubApi = lambda token: calls.append(("token", token, {})) or api  # type: ignore[attr-defined]
    else:
        made = {"error_code": 10001, "error_msg": "no rights"} if fails else {"repo_id": "small"}
        module, names = ModuleType("aistudio_sdk.hub"), ("aistudio_sdk",)
        module.create_repo = called("create", made)  # type: ignore[attr-defined]
        module.upload_folder = called("upload", None)  # type: ignore[attr-defined]
        module.file_exists = called("list", lambda name, file: file in there)  # type: ignore[attr-defined]
    for name in names:
        package = ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.mark.parametrize(
    ("kind", "variable"), [("modelscope", "MODELSCOPE_API_TOKEN"), ("aistudio", "AISTUDIO_ACCESS_TOKEN")]
)
def test_the_other_hubs(
    kind: str, variable: str, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv(variable, TOKEN)
    calls = other_client(monkeypatch, kind, BELONGS)
    assert main(["push", str(run_folder), NAME, "--to", kind]) == 0
    named = {name: more for name, _, more in calls}
    assert named["upload"]["allow_patterns"] == BELONGS
    assert named["create"].get("visibility", "private" if named["create"].get("private") else "") == "private"
    assert TOKEN in json.dumps([str(c) for c in calls]), "the client is given the token"
    assert TOKEN not in "".join(capsys.readouterr())
    other_client(monkeypatch, kind, BELONGS[:-1])
    assert main(["push", str(run_folder), NAME, "--to", kind]) == 1
    assert "training_loss.svg is missing or differs" in capsys.readouterr().err


def test_a_refusal_that_the_client_only_returns(run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    other_client(monkeypatch, "aistudio", [], fails=True)
    assert main(["push", str(run_folder), NAME, "--to", "aistudio"]) == 1
    assert "says: no rights (10001)" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert main(["push", str(run_folder), NAME, "--to", "modelscope"]) == 1
    assert "must have the package modelscope" in capsys.readouterr().err


def test_a_run_hands_its_result_to_the_hub(hub: Hub, tmp_path: Path, capsys: Any) -> None:
    told = {"push_to_hub": NAME, "max_steps": 1, "eval_strategy": "no"}
    folder = train(tmp_path, **told)
    held = hub.repositories[NAME]
    assert held["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert hub.private[NAME]
    assert not [name for name in held if "checkpoint" in name or name.endswith((".jsonl", ".csv"))]
    hub.repositories[NAME] = {}
    assert train(tmp_path, **told) == folder, "of a run that is over only the result is sent"
    assert sorted(hub.repositories[NAME]) == sorted(held)


def test_settings_of_pushing() -> None:
    assert [p.setting for p in problems(TrainingArguments(push_to_hub="me/small"))] == []
    wrong = load_text("push_to_hub: false\npush_hub: ms\n", "run.yaml")
    assert (wrong.config.save.push_to_hub, wrong.config.save.push_hub) == ("", "modelscope")
    assert any("push_hub has no effect without push_to_hub" in str(note) for note in wrong.notes)
    with pytest.raises(ValueError, match=r"push_to_hub \(true\) must be the repository, owner/model"):
        load_text("push_to_hub: true\n", "run.yaml")


def test_patterns_name_no_data() -> None:
    assert not [p for p in MODEL_FILES if p.endswith((".jsonl", ".html", ".log", ".csv"))]
