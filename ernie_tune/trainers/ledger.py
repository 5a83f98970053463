"""What defines a run: its settings, and what the files that they name hold.

Refuses to know: the folder of a run, models, the loop.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_tune.checkpoint.hub import resolve
from ernie_tune.checkpoint.ledger import (
    STARTED_FROM,
    Content,
    Ledger,
    fingerprint,
    sha256_of,
)
from ernie_tune.config.arguments import RunConfig
from ernie_tune.data.sources import Dataset

_SOME_ROWS = 64


def ledger_of(config: RunConfig, model: str, given: Mapping[str, Any], rows_per_step: int) -> Ledger:
    """The ledger of a run. `model`: name of what is trained on; `given`: the data sets by the
    setting they stand for. Reads all data files once.
    """
    contents = {name: _rows(data) for name, data in given.items()}
    if model:
        contents["model_name_or_path"] = (Content(model, _model(model)),)
    for name in ("lora_path", "freeze_spec"):
        path = config.flat()[name]
        if path:
            contents[name] = (Content(path, fingerprint(Path(path))),)
    guards = config.eval.guard_dataset_path
    contents["guard_dataset_path"] = tuple(Content(p, sha256_of(Path(p)) if Path(p).is_file() else "") for p in guards)
    if config.save.resume_only_model:
        start = config.save.resume_from_checkpoint
        contents[STARTED_FROM] = (Content(start, fingerprint(Path(start))),)
    return Ledger.of(config.effective(), contents, rows_per_step)


def _model(name: str) -> str:
    try:
        return fingerprint(resolve(name))
    except (FileNotFoundError, ValueError):  # a preset: its name says it all
        return ""


def _rows(sets: Sequence[Any]) -> tuple[Content, ...]:
    """Files by all their bytes, and how many of their rows are taken; rows given as objects by
    their number and some of them.
    """
    found: list[Content] = []
    for rows in (part for several in sets for part in getattr(several, "parts", [several])):
        files = rows.files if isinstance(rows, Dataset) else []
        found += [Content(path, sha256_of(Path(path)), count) for path, count in files]
        if not files:
            found.append(Content("rows given as objects", _some(rows), len(rows)))
    return tuple(found)


def _some(rows: Sequence[Any]) -> str:
    """SHA-256 of the messages of at most 64 rows, drawn evenly."""
    digest, count = hashlib.sha256(), min(_SOME_ROWS, len(rows))
    for k in range(count):
        try:
            messages = rows[k * len(rows) // count].messages
        except ValueError:  # a row that cannot be read is told of elsewhere
            continue
        digest.update(json.dumps(messages, default=lambda value: type(value).__name__).encode())
    return digest.hexdigest()
