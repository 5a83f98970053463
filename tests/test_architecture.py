"""The layout contract, read by a machine: import directions, what may load paddle, sizes,
forbidden habits, the closed top level.
"""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ernie_tune"

PAGE = (PACKAGE / "README.md").read_text(encoding="utf-8")


def rows_of_the_page() -> tuple[dict[str, int], set[tuple[str, str]]]:
    """The row of each room, and who of one row may import whom, as the picture has them."""
    (picture,) = re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^(\d+)  (.+)$", picture, re.MULTILINE)
    level = {room: int(row) for row, rooms in rows for room in rooms.split()}
    allowed = re.findall(r"^   (\w+) -> (\w+)$", picture, re.MULTILINE)
    assert len(rows) + len(allowed) == picture.count("\n"), "a line of the picture is neither a row nor an arrow"
    assert [int(row) for row, _ in rows] == sorted((int(row) for row, _ in rows), reverse=True)
    assert sum(len(rooms.split()) for _, rooms in rows) == len(level), "a room stands in two rows"
    return level, {(a, b) for a, b in allowed}


def rooms_of_the_page() -> dict[str, tuple[bool, bool]]:
    """Room -> whether it loads without paddle, whether it never imports paddle.distributed."""
    table = re.findall(r"^\| `(\w+)` \| [^|]+ \|([^|]*)\|([^|]*)\|$", PAGE, re.MULTILINE)
    assert all(mark.strip() in ("", "yes") for _, *marks in table for mark in marks)
    return {room: (bool(light.strip()), bool(alone.strip())) for room, light, alone in table}


# A package imports only packages of a smaller number; equal numbers do not know each other, but for
# ALLOWED.
LEVEL, ALLOWED = rows_of_the_page()
NO_PADDLE = {room for room, (light, _) in rooms_of_the_page().items() if light}
NO_DISTRIBUTED = {room for room, (_, alone) in rooms_of_the_page().items() if alone}
LIGHT_MODEL_FILES = {"config", "config_dialects", "presets", "inputs", "specs"}
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
    """pytest imports them by bare name: two of one name end the whole suite before its first
    test.
    """
    names = sorted(p.name for p in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) == len(set(names)), [n for n in names if names.count(n) > 1]


def test_only_the_top_sees_a_whole_configuration() -> None:
    """`RunConfig` is taken apart in trainers/; who reads one setting does not get three hundred.
    The planner alone judges whole configurations, before there is a run.
    """
    rooms = {room for room, row in LEVEL.items() if row < LEVEL["trainers"]} - {"config", "plan"}
    seen = [
        str(path.relative_to(PACKAGE))
        for path in FILES
        if package_of(path) in rooms
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "RunConfig"
    ]
    assert not seen


def test_pages_that_are_cited_are_here() -> None:
    """Whoever reads the code has this checkout, and nothing else of ours."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    pages = {name.rsplit("/", 1)[-1] for name in tracked if name.endswith(".md")}
    cited = re.compile(r"(?<![\w/.-])([a-z][a-z_]*\.md)\b")
    lost = [
        f"{name}: {page}"
        for name in tracked
        if name.endswith((".py", ".md", ".yaml", ".sh", ".ipynb")) and (ROOT / name).is_file()
        for page in cited.findall((ROOT / name).read_text(encoding="utf-8"))
        if page not in pages
    ]
    assert not lost


def test_prose_of_pages_is_wrapped() -> None:
    """At 100 characters, where a line can be broken: not in tables, code and headings. (Comments
    and docstrings: ruff, W505.)
    """
    wide = []
    for page in sorted(
        p for p in ROOT.rglob("*.md") if not {".venv", ".git", "output"} & set(p.relative_to(ROOT).parts)
    ):
        code = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            code ^= line.lstrip().startswith("```")
            fixed = code or line.lstrip().startswith(("|", "#", "<", "[![")) or line.startswith("    ")
            if len(line) > 100 and " " in line.strip("-*> ") and not fixed:
                wide.append(f"{page.relative_to(ROOT)}:{number}")
    assert wide == []


def test_no_circle_of_files() -> None:
    """What loading a file loads never comes back to it. (Rows rule out circles of rooms.)"""
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    loads = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        from_rooms = [
            f"{node.module}.{alias.name}"
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        ]
        loads[name] = {m for m in (*top_level_modules(tree), *from_rooms) if m in names and m != name}
    while loose := {name for name, needed in loads.items() if not needed & set(loads)}:
        loads = {name: needed for name, needed in loads.items() if name not in loose}
    assert not loads, "each of these waits for another of them"


def test_trainers_differ_in_few_places() -> None:
    """What a method is, is a `Method`; the faces that users call override little of `Trainer`."""
    kin, hooks = {"Trainer"}, set()
    classes = [
        node for p in FILES for node in ast.parse(p.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)
    ]
    (trainer,) = [c for c in classes if c.name == "Trainer"]
    own = {n.name for n in trainer.body if isinstance(n, ast.FunctionDef)} - {"__init__"}
    for _ in range(3):
        for c in classes:
            if kin & {ast.unparse(base) for base in c.bases}:
                kin.add(c.name)
                hooks |= own & {n.name for n in c.body if isinstance(n, ast.FunctionDef)}
    assert len(hooks) <= 6, sorted(hooks)


def test_a_public_class_name_exists_once() -> None:
    """Who reads a name must know what it is, and a search must find one thing."""
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_the_page_names_every_room_and_no_other() -> None:
    packages = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert packages == set(LEVEL) == set(rooms_of_the_page())


def test_what_the_rows_must_say() -> None:
    """The page may move rooms; not these."""
    assert min(LEVEL, key=lambda room: LEVEL[room]) == "config"
    assert max(LEVEL, key=lambda room: LEVEL[room]) == "cli"
    assert all(LEVEL[a] == LEVEL[b] for a, b in ALLOWED), "an arrow to a lower row needs no line"
    assert not any((b, a) in ALLOWED for a, b in ALLOWED)
    assert LEVEL["serve"] <= LEVEL["train"], "a server knows no training"
    assert {"config", "data", "plan", "rewards", "report", "cli"} <= NO_PADDLE
    assert {"models", "data", "config", "plan", "rewards"} <= NO_DISTRIBUTED


def test_the_page_is_one_page() -> None:
    assert PAGE.count("\n") <= 120


def test_the_page_names_its_files_and_their_tables() -> None:
    """What "where a new thing goes" promises: each file, and each name in capitals in one of the
    files of its row.
    """
    table = PAGE.partition("## Where a new thing goes")[2].partition("\n## ")[0]
    for line in re.findall(r"^\| (?:a|an) .*$", table, re.MULTILINE):
        files = [PACKAGE / target for target in re.findall(r"\]\(([^)]+)\)", line)]
        assert files
        assert all(file.is_file() for file in files), line
        text = "".join(file.read_text(encoding="utf-8") for file in files)
        assert not [
            name for name in re.findall(r"`([A-Z_]+)`", line) if not re.search(rf"^{name}\b", text, re.MULTILINE)
        ]
