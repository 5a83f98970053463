"""setup.py: nothing is required that is never imported, and nothing is allowed that is known to be
unsafe.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

from ernie_tune.cli.doctor import _CORE

ROOT = Path(__file__).parents[1]
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml"}
# First versions without the holes known when this was written.
FLOORS = {
    "pillow": (12, 1, 1), "sentencepiece": (0, 2, 1), "tqdm": (4, 66, 3), "fastapi": (0, 132), "starlette": (0, 49, 1),
    "h11": (0, 16), "jinja2": (3, 1, 6),
}  # fmt: skip


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **given: found.update(given))
        exec(
            compile((ROOT / "setup.py").read_text(encoding="utf-8"), str(ROOT / "setup.py"), "exec"),
            {"__file__": str(ROOT / "setup.py")},
        )
    return found


def name_of(requirement: str) -> str:
    return re.split(r"[<>=\[; ]", requirement, maxsplit=1)[0].lower()


def test_what_is_required_is_imported(declared: dict[str, Any]) -> None:
    imported = set()
    for file in (ROOT / "ernie_tune").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            imported |= {name.split(".")[0] for name in names}
    required = [name_of(r) for r in declared["install_requires"]]
    assert [name for name in required if IMPORTED_AS.get(name, name) not in imported] == []
    assert set(required) == set(_CORE), "doctor looks for what is required"


# rooms whose modules are loaded by verbs that name what they need
BEHIND_EXTRAS = {
    "serve": {"fastapi", "starlette", "uvicorn", "pydantic", "pydantic_core", "h11", "llguidance"},
    "ui": {"gradio", "fastapi", "starlette", "uvicorn"},
}


def test_what_is_imported_at_once_is_required(declared: dict[str, Any]) -> None:
    """An import at the head of a module works in an environment for developers, whatever it
    names; a user has what is required.
    """
    required = {IMPORTED_AS.get(name, name) for name in map(name_of, declared["install_requires"])}
    lacking = set()
    for file in (ROOT / "ernie_tune").rglob("*.py"):
        known = required | {"paddle", "ernie_tune"} | BEHIND_EXTRAS.get(file.relative_to(ROOT).parts[1], set())
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            tops = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
            lacking |= {(str(file.relative_to(ROOT)), top) for top in tops - known}
    assert lacking == set()


def test_floors(declared: dict[str, Any]) -> None:
    every = [*declared["install_requires"], *(r for extra in declared["extras_require"].values() for r in extra)]
    seen = set()
    for requirement in every:
        if floor := FLOORS.get(name_of(requirement)):
            least = re.search(r">=([0-9.]+)", requirement)
            assert least, requirement
            assert tuple(map(int, least[1].split("."))) >= floor, requirement
            seen.add(name_of(requirement))
    assert seen == set(FLOORS)
    assert any(re.fullmatch(r"numpy>=[0-9.]+", r) for r in every), "no upper bound: users hold other packages to it"
