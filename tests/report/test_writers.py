"""report_to: every number of the log arrives, nothing else does, and a missing package is said
before the first step.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ernie_tune.config.sections_run import LOGGERS
from ernie_tune.report.log import RunLog
from ernie_tune.report.writers import open_writers

RECORD = {"loss": 0.5, "step": 3, "done": True, "note": "text", "nan": float("nan"), "table": [1]}


class Fake(types.ModuleType):
    """Stands for any logger: keeps what it is told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.told: list[Any] = []

    def init(self, **given: Any) -> None:
        self.told.append(given)

    def log(self, values: dict[str, float], step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finished")

    def LogWriter(self, logdir: str) -> Any:
        self.told.append(logdir)
        return types.SimpleNamespace(
            add_scalar=lambda tag, value, step: self.told.append((tag, value, step)), close=self.finish
        )


def use(monkeypatch: pytest.MonkeyPatch, name: str) -> Fake:
    fake = Fake(name)
    monkeypatch.setitem(sys.modules, name, fake)
    return fake


@pytest.mark.parametrize(("name", "folder_word"), [("wandb", "dir"), ("swanlab", "logdir")])
def test_services_get_numbers_and_settings(
    name: str, folder_word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = use(monkeypatch, name)
    log = RunLog(tmp_path, echo=lambda _: None, writers=open_writers([name], tmp_path / "runs", {"seed": 1}))
    log.log(3, {k: v for k, v in RECORD.items() if k != "step"}, epoch=0.5)
    log.close()
    assert fake.told == [
        {"project": "ernie_tune", "config": {"seed": 1}, folder_word: str(tmp_path / "runs")},
        (3, {"epoch": 0.5, "loss": 0.5, "done": 1.0}),
        "finished",
    ]


def test_visualdl_gets_scalars_and_no_booleans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, "visualdl")
    (writer,) = open_writers(["visualdl"], tmp_path / "vdl", {})
    writer.write(3, RECORD)
    assert fake.told[0] == str(tmp_path / "vdl")
    assert ("done", 1.0, 3) in fake.told
    assert all(type(entry[1]) is float for entry in fake.told[1:])


def test_tensorboard_writes_an_event_file(tmp_path: Path) -> None:
    (writer,) = open_writers(["tensorboard"], tmp_path, {})
    writer.write(7, {"loss": 0.25, "eval_exact_match": 1})
    writer.close()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()
    assert b"eval_exact_match" in events.read_bytes()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "visualdl", None)
    with pytest.raises(
        ValueError, match=r"report_to \(visualdl\) must have the package visualdl .*pip install visualdl"
    ):
        open_writers(["visualdl"], tmp_path, {})


def test_all_means_those_that_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "wandb" else None)
    fake = use(monkeypatch, "wandb")
    assert len(open_writers(["all"], tmp_path, {})) == 1
    assert fake.told[0]["project"] == "ernie_tune"
    assert set(LOGGERS) == {"visualdl", "tensorboard", "wandb", "swanlab", "mlflow"}


# --- the libraries themselves, where they are installed ------------------------------------------

OWN = """
import os, sys, tempfile
from pathlib import Path
os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "SWANLAB_MODE": "offline", "SWANLAB_LOG_LEVEL": "error"}
os.environ.pop("MLFLOW_TRACKING_URI", None)
import socket
connect = socket.socket.connect
def local(self, address):
    assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"), address
    return connect(self, address)
socket.socket.connect = local
from ernie_tune.report.writers import open_writers
(writer,) = open_writers([sys.argv[1]], Path(sys.argv[2]), {"seed": 1, "learning_rate": 1e-3})
for step in (1, 2):
    writer.write(step, {"loss": 0.5 / step, "done": True, "note": "text"})
writer.close()
"""


@pytest.mark.parametrize("name", sorted(LOGGERS))
def test_each_library_writes_offline_below_the_folder(name: str, tmp_path: Path) -> None:
    package = LOGGERS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"NOT TESTED: report_to: {name} needs the package {package}; pip install {package}")
    done = subprocess.run(
        [sys.executable, "-c", OWN, name, str(tmp_path / "runs")],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    written = b"".join(path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file())
    assert b"loss" in written, sorted(map(str, tmp_path.rglob("*")))


def test_mlflow_gets_numbers_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, "mlflow")
    for call in ("set_tracking_uri", "set_experiment", "log_params"):
        setattr(fake, call, lambda value, call=call: fake.told.append((call, value)))
    fake.start_run = lambda: fake.told.append("started")  # type: ignore[attr-defined]
    fake.log_metrics, fake.end_run = fake.log, fake.finish  # type: ignore[attr-defined]
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (writer,) = open_writers(["mlflow"], tmp_path, {"seed": 1, "long": "x" * 900})
    writer.write(3, RECORD)
    writer.close()
    assert fake.told[0] == ("set_tracking_uri", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert fake.told[3] == ("log_params", {"seed": "1", "long": "x" * 500})
    assert fake.told[4][0] == 3
    assert fake.told[4][1]["done"] == 1.0
    assert fake.told[-1] == "finished"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    fake.told.clear()
    open_writers(["mlflow"], tmp_path, {})
    assert fake.told[0][0] == "set_experiment", "the user's own server"
