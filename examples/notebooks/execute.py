"""Runs notebooks from the first cell to the last and stores what their cells showed, without what
differs from machine to machine: paths, times, speeds, warnings, colours.

Each runs in an empty folder beside the examples, so that nothing of an earlier run is found there.
Usage: python examples/notebooks/execute.py [NAME.ipynb …]     (pip install nbclient ipykernel)
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_SECONDS = 1800
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_MADE = re.compile(r"<dt>(?:(?!</dt>).)*</dt><dd>\d{4}-\d\d-\d\d[ T][\d:]+</dd>")  # when a page was made
_CLOCK = re.compile(r"^\[?\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[,.\d]*\]? *", re.MULTILINE)
_SPEED = re.compile(r", tokens_per_second: [\d.]+|^.*(?:\belapsed: |train_runtime +=|_per_second +=).*\n", re.MULTILINE)


def digest(book: dict[str, Any]) -> str:
    """Of what its code cells say: notebooks keep it with their outputs."""
    code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def executed(path: Path) -> dict[str, Any]:
    """The notebook with what its cells show now. Raises nbclient's error where one fails."""
    import nbformat
    from nbclient import NotebookClient

    import ernie_tune

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "setup.py").touch()  # what the first cell looks for
        (Path(folder) / "examples").symlink_to(HERE.parent, target_is_directory=True)
        resources = {"metadata": {"path": folder}}
        book = nbformat.read(path, as_version=4)
        NotebookClient(book, timeout=_SECONDS, resources=resources, record_timing=False).execute()
        found: dict[str, Any] = json.loads(nbformat.writes(book))
        here = {str(HERE.parents[1]), str(Path(ernie_tune.__file__).parents[1])}
        for cell in found["cells"]:
            cell["metadata"] = {}
            if cell["cell_type"] == "code":
                cell["outputs"] = cleaned(cell["outputs"], [folder, *here, str(Path.home())])
    found["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "ernie_tune": {"executed": digest(found)},
    }
    return found


def cleaned(outputs: Sequence[dict[str, Any]], folders: Sequence[str]) -> list[dict[str, Any]]:
    """Outputs without warnings and progress, without folders of this machine, one text in a row."""
    out: list[dict[str, Any]] = []
    for one in outputs:
        if one.get("name") == "stderr" or (one["output_type"] == "display_data" and "elapsed" in json.dumps(one)):
            continue
        one = json.loads(_MADE.sub("", _plain(json.dumps(one, ensure_ascii=False), folders)))
        if one["output_type"] == "stream" and out and out[-1]["output_type"] == "stream":
            out[-1]["text"] += one["text"]
        else:
            out.append(one)
    for one in out:
        if one["output_type"] == "stream":
            text = _CLOCK.sub("", _COLOURS.sub("", "".join(one["text"])))
            one["text"] = _SPEED.sub("", text).splitlines(keepends=True)
    return out


def _plain(text: str, folders: Sequence[str]) -> str:
    for folder in folders:
        text = text.replace(f"{folder}/", "").replace(folder, ".")
    return text


def main(names: Sequence[str]) -> None:
    for path in [HERE / name for name in names] or sorted(HERE.glob("*.ipynb")):
        text = json.dumps(executed(path), ensure_ascii=False, indent=1) + "\n"
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
        print(f"{path.name}: {len(text) / 1e3:,.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
