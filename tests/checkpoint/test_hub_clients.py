"""ModelScope's and AI Studio's own clients against hubs on this machine: downloads and uploads, cut
and gone on with, damaged, refused; a token that never shows. Loud where a client is not installed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.other_hubs import OtherHub, serving_other

from ernie_tune.checkpoint.hub import resolve
from ernie_tune.checkpoint.push import push

TOKEN = "SECRET" * 8
FILES = {"config.json": b"{}", "README.md": b"card", "model.safetensors": b"weights" * 450_000}
CLIENTS = {"modelscope": "modelscope", "aistudio": "aistudio_sdk"}


# A process of its own, as users have it: a client keeps the address that it first saw. Commands are
# separated by "+"; before each but the first the hub is told to go on to its next plan.
CHILD = """
import itertools, os, sys, time, urllib.request
import urllib3.util.retry
time.sleep = lambda _: None  # clients sleep longer from try to try
urllib3.util.retry.Retry.sleep = lambda *_, **__: None
if sys.argv[1] == "aistudio":  # its count of downloads goes to a fixed address, whatever is set
    import aistudio_sdk.snapshot_download as client
    client.post_repo_statistic = lambda *_: None
from ernie_tune.cli.main import main
commands = [list(words) for more, words in itertools.groupby(sys.argv[2:], lambda word: word == "+") if not more]
for number, words in enumerate(commands):
    if number:
        print("done", code, flush=True)
        print("done", file=sys.stderr, flush=True)
        urllib.request.urlopen(os.environ["STUDIO_GIT_HOST"] + "/next").close()
    code = main(words)
sys.exit(code)
"""


Done = subprocess.CompletedProcess[str]


class Client:
    """A command of ours through a hub's own client, against a hub of the tests."""

    def __init__(self, name: str, hub: OtherHub, home: Path) -> None:
        self.name, self.hub, self.home = name, hub, home

    def download(self, repository: str = "me/small", to: Path | None = None, token: str = "") -> Done:
        return self.run(["download", repository, "--from", self.name, *(["--to", str(to)] if to else [])], token)

    def run(self, words: list[str], token: str = "") -> Done:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MODELSCOPE", "AISTUDIO", "ERNIE_TUNE_DOWN"))}
        cache = str(self.home / "cache")
        places = {"HOME": str(self.home), "MODELSCOPE_CACHE": cache, "AISTUDIO_CACHE_HOME": cache}
        urls = dict.fromkeys(("MODELSCOPE_ENDPOINT", "STUDIO_GIT_HOST", "STUDIO_MODEL_API_URL_PREFIX"), self.hub.url)
        tokens = dict.fromkeys(("MODELSCOPE_API_TOKEN", "AISTUDIO_ACCESS_TOKEN"), token) if token else {}
        return subprocess.run(
            [sys.executable, "-c", CHILD, self.name, *words],
            env={**kept, **places, **urls, **tokens},
            capture_output=True,
            text=True,
            timeout=120,
        )


@pytest.fixture(params=sorted(CLIENTS))
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Client]:
    if importlib.util.find_spec(CLIENTS[request.param]) is None:
        pytest.skip(f"NOT TESTED: the hub {request.param} needs its client; pip install -e '.[hub]'")
    (tmp_path / "home").mkdir()
    with serving_other(OtherHub({"me/small": dict(FILES)})) as running:
        yield Client(request.param, running, tmp_path / "home")


def fetched(folder: Path) -> bool:
    return all((folder / name).is_file() and (folder / name).read_bytes() == content for name, content in FILES.items())


@pytest.mark.parametrize("to", [True, False], ids=["folder", "cache"])
def test_a_download_is_whole_and_checked(
    client: Client, to: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = client.download(to=tmp_path / "there" if to else None)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.strip().splitlines()[-1]
    assert fetched(Path(told.split(" (")[0])), told
    assert ("3 files checked" if client.name == "modelscope" else "0 files checked") in told
    if not to:
        monkeypatch.setenv("MODELSCOPE_CACHE", str(client.home / "cache"))
        monkeypatch.setenv("AISTUDIO_CACHE_HOME", str(client.home / "cache"))
        monkeypatch.setenv("HOME", str(client.home))
        assert fetched(resolve("me/small")), "found in the client's cache, without asking the hub"


def test_a_download_that_is_cut_goes_on(client: Client, tmp_path: Path) -> None:
    """In one command or the next. AI Studio's client goes on, too, and then leaves the file in its
    temporary folder for good (0.3.9): ours says that it did not come, and fetches it anew.
    """
    client.hub.cuts = 1
    tries = [client.download(to=tmp_path / "there")]
    while tries[-1].returncode and len(tries) < 4:
        assert "give the same command again" in tries[-1].stderr
        tries.append(client.download(to=tmp_path / "there"))
    assert fetched(tmp_path / "there"), tries[-1].stderr[-2000:]
    starts = [one for one in client.hub.ranges("model.safetensors") if not one.startswith(("bytes=0-", "bytes=0-1"))]
    assert starts, client.hub.ranges("model.safetensors")


def test_a_damaged_file_is_never_left_in_place(client: Client, tmp_path: Path) -> None:
    client.hub.spoil = "model.safetensors"
    done = client.download(to=tmp_path / "there")
    assert done.returncode == 1
    told = done.stderr.splitlines()[-1]
    assert "model.safetensors" in told or "1 of 3 file(s) failed" in told, "the client's own check, or ours"
    assert not (tmp_path / "there" / "model.safetensors").exists()
    client.hub.spoil = ""
    done = client.download(to=tmp_path / "there")
    assert done.returncode == 0, done.stderr[-2000:]
    assert fetched(tmp_path / "there")


def test_missing_rights_are_told_without_the_token(client: Client, tmp_path: Path) -> None:
    client.hub.token = "another"
    done = client.download(to=tmp_path / "there", token=TOKEN)
    assert done.returncode == 1
    assert f"({client.name}) must give me/small, but says" in done.stderr.splitlines()[-1]
    assert TOKEN not in done.stdout + done.stderr
    sent = {told.get("authorization", "").split(" ")[-1] for _, _, told in client.hub.asked}
    assert TOKEN in sent, "the client did send it, to this hub alone"
    assert not list((tmp_path / "there").rglob("*.safetensors"))


def test_the_right_token_opens(client: Client, tmp_path: Path) -> None:
    client.hub.token = TOKEN
    done = client.download(to=tmp_path / "there", token=TOKEN)
    assert done.returncode == 0, done.stderr[-2000:]
    assert fetched(tmp_path / "there")
    assert TOKEN not in done.stdout + done.stderr


def test_an_unknown_repository_is_one_line(client: Client, tmp_path: Path) -> None:
    done = client.download("me/nothing", tmp_path / "there")
    assert done.returncode == 1
    assert f"({client.name}) must give me/nothing" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_push_without_rights_is_one_line_without_the_token(client: Client, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / "run" / name).write_text("---\n{}\n---\n")
    client.hub.token = "another"
    done = client.run(["push", str(tmp_path / "run"), "me/new", "--to", client.name], token=TOKEN)
    assert done.returncode == 1
    assert f"{client.name} must take me/new, but says" in done.stderr.splitlines()[-1]
    assert TOKEN not in done.stdout + done.stderr
    assert "me/new" not in client.hub.repositories


def model_folder(folder: Path, weights: bytes) -> Path:
    """What a run leaves, in names and sizes, and something that belongs to nobody else."""
    folder.mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text(f"{{}} {weights!r}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# card\n")
    (folder / "model-1.safetensors").write_bytes(b"first" * 1000)
    (folder / "model-2.safetensors").write_bytes(weights * 1000)
    (folder / "trainer_log.jsonl").write_text("own")
    return folder


def test_uploads_that_are_cut_refused_spoiled_and_forgotten(client: Client, tmp_path: Path) -> None:
    """Six pushes of two runs into one repository."""
    one, two = model_folder(tmp_path / "one", b"second"), model_folder(tmp_path / "two", b"another")
    hub, given = client.hub, {folder: {f.name: f.read_bytes() for f in folder.iterdir()} for folder in (one, two)}
    hub.token, hub.refuse_blob = TOKEN, 2
    hub.plans = [{}, {"refuse_commits": True}, {"spoil": "model-2.safetensors"}, {}, {"forget": True}]
    pushes = [["push", str(folder), "me/new", "--to", client.name] for folder in (one, one, two, two, two, two)]
    done = client.run([word for push in pushes for word in ("+", *push)][1:], token=TOKEN)
    assert hub.plans == [], done.stderr[-2000:]
    codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("done ")]
    assert [*codes, done.returncode] == [1, 0, 1, 1, 0, 0], done.stderr[-2000:]
    told = [part.strip().splitlines()[-1] for part in done.stderr.split("\ndone\n")]
    assert "is missing or differs" in told[0] or "1 file(s) failed to upload" in told[0]
    assert "5 file(s) failed to upload" in told[2] or "config.json, model-2.safetensors, tokenizer_config" in told[2], (
        "old ones"
    )
    assert "new must hold every file as it is here, but model-2.safetensors is missing or differs" in told[3]
    assert all("give the same command" in told[n] for n in (0, 2, 3))
    assert done.stdout.count("me/new holds 5 files, 5 of them checked") == 3
    assert len(hub.sent()) == len(set(hub.sent())) + 1 == 4, "what had come is not sent again"
    held = {name: content for name, content in given[two].items() if name != "trainer_log.jsonl"}
    assert hub.repositories["me/new"] == held
    assert hub.private["me/new"], "private unless told otherwise"
    assert TOKEN not in done.stdout + done.stderr
    for folder in (one, two):
        assert {f.name: f.read_bytes() for f in folder.iterdir()} == given[folder], (
            "nothing is left in the run's folder"
        )


def test_a_card_that_ai_studio_would_leave_out(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "run", b"weights")
    (folder / "README.md").write_text("# a card without a head\n")
    with pytest.raises(ValueError, match=r"README.md must begin with a head .* AI Studio"):
        push(folder, "me/new", "aistudio")
