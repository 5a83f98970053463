"""`report_to`: the run's numbers for the loggers that people already have open. The files of log.py
never depend on them.

A package is imported only when a setting names it. Refuses to know: what the numbers mean, the
run's own files, paddle.
VisualDL takes scalars only, and one writer a process.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_tune.config.language import say
from ernie_tune.config.sections_run import LOGGERS, has_logger

PROJECT = "ernie_tune"

Write = Callable[[Mapping[str, float], int], object]


class LogWriter:
    """One open logger: `write(step, record)` takes a record of the run's log, `close()` ends it."""

    def __init__(self, write: Write, close: Callable[[], object]) -> None:
        self._write, self.close = write, close

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """The record's numbers, true and false as 1 and 0; texts, lists and nothing (a loss that is
        no number) are left out.
        """
        values = {k: float(v) for k, v in record.items() if isinstance(v, bool | int | float) and k != "step"}
        self._write(values, step)


def open_writers(names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> list[LogWriter]:
    """The loggers that `report_to` names, writing below `folder`; "all": those whose package is
    installed. Raises ValueError for one whose package is not.
    """
    wanted = [n for n in LOGGERS if has_logger(n)] if "all" in names else list(names)
    return [_open(name, folder, settings) for name in wanted]


def _open(name: str, folder: Path, settings: Mapping[str, Any]) -> LogWriter:
    package = LOGGERS[name]
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            say(
                f"report_to ({name}) must have the package {package} ({error}); pip install {package}, or remove it",
                f"report_to（{name}）需要软件包 {package}（{error}）；pip install {package}，或去掉该项",
            )
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    if name in ("wandb", "swanlab"):
        place = {"dir" if name == "wandb" else "logdir": str(folder)}
        module.init(project=PROJECT, config=dict(settings), **place)
        return LogWriter(lambda values, step: module.log(dict(values), step=step), module.finish)
    if name == "mlflow":
        return _mlflow(module, folder, settings)
    log = module.LogWriter(logdir=str(folder)) if name == "visualdl" else module.SummaryWriter(logdir=str(folder))

    def write(values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            log.add_scalar(tag, value, step)

    return LogWriter(write, log.close)


def _mlflow(module: Any, folder: Path, settings: Mapping[str, Any]) -> LogWriter:
    """To where MLFLOW_TRACKING_URI says, else into a database below `folder`."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        module.set_tracking_uri(f"sqlite:///{folder.resolve() / 'mlflow.db'}")
    module.set_experiment(PROJECT)
    module.start_run()
    # of a setting it keeps 500 characters, as text
    module.log_params({name: str(value)[:500] for name, value in settings.items()})
    return LogWriter(lambda values, step: module.log_metrics(dict(values), step=step), module.end_run)
