"""report_to: every number of the log arrives, nothing else does, and a missing package is said
before the first step.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ernie_tune.report.log import RunLog
from ernie_tune.report.writers import PACKAGES, open_writers

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
    assert set(PACKAGES) == {"visualdl", "tensorboard", "wandb", "swanlab"}
