"""Whether a checkpoint still holds what was written: the list of its files with their sizes and
hashes, and what is wrong with a folder.

Files beyond 64 MiB are known by their size and samples (`ledger.sample_of`) but for the ranks'
tensors, whose full hashes the optimizer's manifest has and whoever reads them checks. Checkpoints
of releases that wrote no list are looked at for what can be seen without one.
Refuses to know: what the files mean, which checkpoint is wanted.
"""

from __future__ import annotations

import json
from pathlib import Path

from ernie_tune.checkpoint.ledger import LEDGER_FILE, sample_of

FILES_FILE = "checkpoint_files.json"
# What a checkpoint that can be resumed from has held in every release.
_ALWAYS = ("trainer_state.json", "loop_state.json", "objective_state.json", "data_state.json", "guards_state.json")
_OPTIMIZER = "optimizer"


def files_text(folder: Path) -> str:
    """The list of all files of a folder that is complete but for this list."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sample_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return json.dumps({"format": 1, "files": files}, ensure_ascii=False, indent=1) + "\n"


def damage(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one text a file; empty where nothing is."""
    listed = folder / FILES_FILE
    if not listed.is_file():
        # Releases without a list had no ledger either: here the list is lost, and what it would say
        # of the rest.
        lost = (folder / LEDGER_FILE).is_file()
        return [f"{FILES_FILE} is missing"] if lost else _visible_damage(folder)
    try:
        content = json.loads(listed.read_text(encoding="utf-8"))
        files = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{FILES_FILE} is not the list that a save wrote ({error!r})"]
    return [text for name, (size, sha256) in files.items() if (text := _wrong(folder, name, size, sha256))]


def _wrong(folder: Path, name: str, size: int, sha256: str) -> str:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} of {size} bytes"
    return "" if sample_of(path) == sha256 else f"{name} has changed since it was written"


def _visible_damage(folder: Path) -> list[str]:
    found = []
    if (folder / _OPTIMIZER).is_dir():
        found = [f"{name} is missing" for name in _ALWAYS if not (folder / name).is_file()]
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            found.append(f"{path.name} is no JSON ({error})")
    return found
