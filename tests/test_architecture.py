"""The layout contract, read by a machine: import directions, what may load paddle, sizes, forbidden habits, the closed top level."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ernie_tune"

# A package imports only packages of a smaller number; equal numbers do not know each other.
LEVEL = {
    "config": 0,
    "models": 1,
    "parallel": 1,
    "checkpoint": 2,
    "objectives": 2,
    "data": 2,
    "rewards": 2,
    "peft": 2,
    "plan": 2,
    "generate": 3,
    "machine": 3,
    "report": 3,
    "export": 3,
    "train": 4,
    "serve": 4,
    "evaluate": 5,
    "trainers": 6,
    "ui": 7,
    "cli": 8,
}
# `peft` reads and writes adapter files, so it alone of its row may use `checkpoint` (its tensors, never its models); `plan` counts the adapters that a run
# would train with the rules of `peft` (its files without paddle); `rewards` judge the records of `data`.
ALLOWED = {("peft", "checkpoint"), ("plan", "peft"), ("rewards", "data")}
NO_PADDLE = {"config", "data", "plan", "rewards", "report", "ui", "cli"}
LIGHT_MODEL_FILES = {"config", "config_dialects", "presets", "inputs", "specs"}
NO_DISTRIBUTED = {"models", "data", "config", "plan", "rewards"}
TOP_LEVEL = {"setup.py", "README.md", "LICENSE", "ernie_tune", "examples", "tests", "launch"}
FILES = sorted(PACKAGE.rglob("*.py"))


def modules(tree: ast.AST) -> list[str]:
    """Every module a file imports, anywhere in it."""
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            out.append(node.module or "")
    return out


def top_level_modules(tree: ast.Module) -> list[str]:
    """What importing the file imports: not inside functions, not under TYPE_CHECKING."""
    nodes = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))]
    return [m for n in nodes for m in modules(n) if not isinstance(n, ast.FunctionDef | ast.ClassDef)]


def package_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else "cli" if parts[0] in ("__main__.py", "launcher.py") else "root"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree, package = ast.parse(text), package_of(path)
    assert ast.get_docstring(tree) or path.stat().st_size == 0, "every file opens with what it is"
    assert text.count("\n") <= 600, "a file has at most 600 lines"
    assert "/" not in path.name
    assert path.stem not in ("utils", "helpers", "misc", "common"), "a helper lives with its user or earns a name"
    for name in modules(tree):
        check_import(package, name)
    loaded = top_level_modules(tree)
    if package in NO_PADDLE or (package == "models" and path.stem in LIGHT_MODEL_FILES):
        assert not [m for m in loaded if m.split(".")[0] == "paddle"], f"{package} must load without paddle"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, f"{node.name} has more than 80 lines"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"line {node.lineno}: blanket except"


def check_import(package: str, name: str) -> None:
    if name.startswith("paddle.distributed"):
        assert package not in NO_DISTRIBUTED, f"{package} must not import {name}"
    parts = name.split(".")
    if parts[0] != "ernie_tune" or len(parts) == 1 or package == "root":
        return
    other = parts[1]
    assert other in LEVEL, f"{name} is not one of the packages of the design"
    down = LEVEL[other] < LEVEL[package] or other == package or (package, other) in ALLOWED
    assert down, f"{package} (row {LEVEL[package]}) must not import {other} (row {LEVEL[other]})"


def test_top_level_is_closed() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    names = {f.split("/")[0] for f in files if f}
    assert not {n for n in names if not n.startswith(".")} - TOP_LEVEL


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by bare name: two of one name end the whole suite before its first test."""
    names = sorted(p.name for p in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) == len(set(names)), [n for n in names if names.count(n) > 1]


def test_every_package_has_a_level() -> None:
    packages = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert packages <= set(LEVEL)
