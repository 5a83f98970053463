"""Every shipped YAML file loads, names files that exist and only rows that fit; every notebook runs
from its first cell to its last.

Notebooks run in a child process with their step counts lowered: the last expression of a cell is
evaluated as a notebook does, and IPython.display, which only a notebook has, is a stand-in that
reads the files it is given. No notebook package is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_tune.config.loader import load_config
from ernie_tune.data.processor import Processor
from ernie_tune.data.sources import load_dataset
from ernie_tune.models.presets import preset

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
RECIPES = sorted(EXAMPLES.glob("*/*.yaml"))
NOTEBOOKS = sorted(EXAMPLES.glob("notebooks/*.ipynb"))
TEMPLATES = {"28b", "424b"}  # for the reader's own data and weights
# Rows that a script makes, as the recipe says: the recipe's folder, and that of the script.
DRAWN = {
    "rlvr": "rlvr",
    "digits": "rlvr",
    "evidence": "evidence",
    "base": "base",
    "upo": "rlvr",
    "chain": "rlvr",
    "rag": "rag",
}

RUNNER = """
import ast, json, sys, types
from pathlib import Path

def shown(*, filename):
    text = Path(filename).read_text(encoding="utf-8")
    assert text.strip(), filename
    return text

display = types.ModuleType("IPython.display")
display.SVG = display.HTML = shown
sys.modules["IPython"], sys.modules["IPython.display"] = types.ModuleType("IPython"), display
sys.modules["IPython"].get_ipython, sys.modules["IPython"].version_info = lambda: None, (9, 0)
names = {"__name__": "__main__"}
for number, cell in enumerate(json.loads(sys.argv[1])):
    tree = ast.parse(cell, f"cell {number}")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"), names)
    if last is not None:
        repr(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names))
"""


def name_of(path: Path) -> str:
    return path.relative_to(EXAMPLES).as_posix()


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    return ROOT


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe(path: Path, root: Path) -> None:
    loaded = load_config(path, for_training=True)
    assert loaded.notes == (), loaded.notes
    if path.parent.name in TEMPLATES:
        return
    c = loaded.config
    if path.parent.name in DRAWN and c.data.train_dataset_path[0].startswith("output/"):
        assert f"`python examples/{DRAWN[path.parent.name]}/make_data.py" in path.read_text(encoding="utf-8")
        return
    for file in (*c.data.train_dataset_path, *c.data.eval_dataset_path, *c.eval.guard_dataset_path):
        assert Path(file.split("#")[0]).is_file()
        assert file.startswith("examples/")
    assert c.save.output_dir.startswith("output/"), "what git ignores"
    made_by = [load_config(other).config.save.output_dir for other in RECIPES]
    if c.model.model_name_or_path in made_by:
        return
    processor = Processor.bundled("small" if preset(c.model.model_name_or_path).vocab_size >= 8192 else "tiny")
    processor = processor.with_videos(max_frames=c.media.video_max_frames, max_pixels=c.media.video_max_pixels)
    for file, kind in (
        (c.data.train_dataset_path, c.data.train_dataset_type),
        (c.data.eval_dataset_path, c.data.eval_dataset_type),
    ):
        rows = load_dataset(list(file), kind[0], signals=("sft",))
        for i in range(0, len(rows), max(1, len(rows) // 40)):
            row = rows[i]
            processor.encode(row.messages, row.images, row.videos, max_tokens=c.data.max_seq_len)


def test_every_example_has_a_page() -> None:
    folders = {p.name for p in EXAMPLES.iterdir() if p.is_dir()} - {"notebooks"}
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for folder in folders:
        assert (EXAMPLES / folder / "README.md").is_file(), folder
        assert f"({folder}/" in table, folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_what_a_notebook_shows(path: Path) -> None:
    """Outputs of the cells as they stand, run in order, without errors, noise, or traces of the
    machine that ran them.
    """
    book = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    again = "python examples/notebooks/execute.py stores the outputs anew"
    said = "\0".join("".join(cell["source"]) for cell in code)
    assert book["metadata"]["ernie_tune"]["executed"] == hashlib.sha256(said.encode()).hexdigest(), again
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)], again
    outputs = [one for cell in code for one in cell["outputs"]]
    assert {one["output_type"] for one in outputs} <= {"stream", "execute_result", "display_data"}, "an error is shown"
    assert all(one.get("name") != "stderr" for one in outputs)
    shown = json.dumps(outputs, ensure_ascii=False)
    found = re.search(r"(?:/(?:home|root|tmp|work|Users|opt|usr)/|file:/)[^\s\"]*|hf_\w{20,}|\\u001b|Traceback", shown)
    assert found is None, found
    assert not re.search(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d", shown), "a time of the day"
    assert not re.search(r"[Ww]arning:", shown)
    assert path.stat().st_size < 600_000
    assert any("text/html" in one.get("data", {}) or "text" in one for one in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebook(path: Path, tmp_path: Path) -> None:
    book = json.loads(path.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    cells = ["".join(cell["source"]) for cell in code]
    cells = [re.sub(r"^STEPS = \d+$", "STEPS = 2", cell, flags=re.MULTILINE) for cell in cells]
    assert sum("STEPS = 2\n" in f"{cell}\n" for cell in cells) == 1
    # The folder that the first cell looks for: the repository's, but with an `output` of its own.
    (tmp_path / "setup.py").touch()
    (tmp_path / "examples").symlink_to(EXAMPLES, target_is_directory=True)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(cells)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert [p.name for p in (tmp_path / "output").iterdir()] == [path.stem]
