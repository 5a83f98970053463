"""What the pages promise exists: verbs, settings, flags and files of every shown command, links,
and the Python of the README runs.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_tune.cli import data as data_verb
from ernie_tune.cli.main import help_, main
from ernie_tune.cli.verbs import find_verb
from ernie_tune.config.aliases import SPELLINGS
from ernie_tune.config.arguments import SETTINGS
from ernie_tune.config.loader import load_config, load_text, split_overrides

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "examples" / "README.zh.md"
PAGES = [ENGLISH, ROOT / "ernie_tune" / "README.md", *sorted((ROOT / "examples").glob("**/*.md"))]
# What the reader makes: outputs of commands shown, and rows of their own.
MADE = re.compile(r"(output|my_run)/|(my\w*)\.(jsonl|yaml|png)$|output/\w+$")


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """The words of every command in the page's bash blocks, comments left out."""
    lines = [line for language, text in blocks(path) if language == "bash" for line in text.splitlines()]
    return [words for line in lines for words in [shlex.split(line, comments=True)] if words]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def check_ernie_tune(words: list[str]) -> None:
    verb = find_verb(words[0]).name
    if verb == "help":
        assert help_(words[1:]) == 0
        return
    if verb == "data":
        about = data_verb.run.__doc__ or ""
        assert f"ernie-tune data {words[1]} " in about
        assert [w for w in words if w.startswith("--") and w not in about] == []
    after = words[2:] if words[:2] == ["reward", "test"] else words[1:]
    files, settings = split_overrides([w for w in after if w != "--dry-run"])
    if verb in ("train", "eval", "demo"):
        assert [e.name for e in settings if e.name not in SETTINGS and e.name not in SPELLINGS] == []
    if verb == "download":
        assert [re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None for name in files] == [True]
        return
    for file in files[1:] if verb == "data" else files:
        assert MADE.search(file) or file == "my_run" or (ROOT / file).exists(), file
        if file.startswith("examples/") and file.endswith(".yaml"):
            load_config(ROOT / file, settings, for_training=True)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands_exist(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for program, *rest in commands(path):
        if program == "ernie-tune":
            check_ernie_tune(rest)
        elif program in ("bash", "python"):
            script = path.parent / rest[0] if (path.parent / rest[0]).is_file() else ROOT / rest[0]
            assert script.is_file(), rest
        else:
            assert program in ("source", "pip", "hf", "modelscope", "aistudio"), program


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_yaml_blocks_are_settings(path: Path) -> None:
    for text in (text for language, text in blocks(path) if language == "yaml"):
        load_text(text, path.name)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)):
        file, _, anchor = target.partition("#")
        if re.match(r"https://", target):
            continue
        page = path.parent / file if file else path
        assert page.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, target


def test_readme_is_short_and_the_chinese_one_says_the_same() -> None:
    assert len(ENGLISH.read_text(encoding="utf-8").splitlines()) <= 200

    def bare(path: Path) -> list[str]:
        """Blocks without comments; of the file tree only the names."""
        return [
            "\n".join(line.split()[0] if language == "text" else re.sub(r"\s+#\s.*$", "", line) for line in text.splitlines())
            for language, text in blocks(path)
        ]  # fmt: skip

    assert bare(ENGLISH) == bare(CHINESE)
    numbers = [re.findall(r"\d+\.\d+|\d+ %", page.read_text(encoding="utf-8")) for page in (ENGLISH, CHINESE)]
    assert sorted(numbers[0]) == sorted(numbers[1])


def test_file_tree_is_complete() -> None:
    tree = next(text for language, text in blocks(ENGLISH) if language == "text")
    named = {line.split()[0] for line in tree.splitlines()}
    # the rooms of the package stand on its own page (test_architecture.py)
    assert named == {"ernie_tune", "examples", "launch", "tests"}


def test_python_of_the_readme_runs(tmp_path: Path) -> None:
    [snippet] = [text for language, text in blocks(ENGLISH) if language == "python"]
    assert "num_train_epochs=3" in snippet
    script = f"""
{snippet.replace("num_train_epochs=3", "max_steps=2")}
from ernie_tune import PeftModel
PeftModel.from_pretrained(AutoModel.from_pretrained("nano"), "./my_ernie_vl_lora_adapter")
"""
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "trainable" in done.stdout
    assert (tmp_path / "my_ernie_vl_lora_adapter" / "lora_config.json").is_file()
    assert (tmp_path / "output" / "python" / "trainer_log.jsonl").is_file()


def test_quickstart_reports_the_run_it_was_given(tmp_path: Path) -> None:
    """The summary at the end of the script, on the files of a finished run; installing and training
    need a fresh clone.
    """
    script = (ROOT / "launch" / "quickstart.sh").read_text(encoding="utf-8")
    summary = re.search(r"<<'EOF'\n(.*?)^EOF$", script, re.MULTILINE | re.DOTALL)
    assert summary is not None
    (tmp_path / "before.json").write_text('{"metrics": {"eval_exact_match": 0.125}, "answers": []}')
    (tmp_path / "eval_results.json").write_text('{"eval_exact_match": 0.9375}')
    done = subprocess.run(
        [sys.executable, "-", "40", "200", f"output_dir={tmp_path}", "seed=1"],
        input=summary[1],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for wanted in ("12.5%", "93.8%", "40 s", "200 s", f"{tmp_path}/before_after.html"):
        assert wanted in done.stdout
    assert subprocess.run(["bash", "-n", ROOT / "launch" / "quickstart.sh"]).returncode == 0


# What keeps a command short, by verb: the same road with fewer steps and rows.
SHORT = ("max_steps=2", "eval_max_samples=2", "report_max_samples=2", "eval_steps=2", "save_steps=2")
# What other tests run: servers, several processes, and the check of a recipe whose weights are not
# here.
ELSEWHERE = ("serve", "ui", "judge", "download", "tensor_model_parallel_size=2", "examples/28b/sft_lora.yaml")


def runnable(words: list[str]) -> bool:
    return words[:1] == ["ernie-tune"] and not set(ELSEWHERE) & set(words)


def test_commands_of_the_readme_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a clone without outputs; the quickstart stands for its training line, since installing
    needs a network. What is left out is in ELSEWHERE.
    """
    tracked = subprocess.run(["git", "ls-files", "examples"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.split("\n"):
        if name and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    rows = (tmp_path / "examples" / "identity" / "train.json").read_text(encoding="utf-8")
    for name, part in (("my_train.jsonl", slice(0, 8)), ("my_eval.jsonl", slice(8, 12))):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in json.loads(rows)[part]]
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    recipe = (tmp_path / "examples" / "identity" / "sft.yaml").read_text(encoding="utf-8")
    mine = re.sub(r"examples/identity/(train|eval).json", r"my_\1.jsonl", recipe)
    (tmp_path / "my.yaml").write_text(mine, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("/exit\n"))
    assert main(["train", "examples/digits/sft.yaml", *SHORT]) == 0  # launch/quickstart.sh
    done = [["bash", "launch/quickstart.sh"]]
    for words in commands(ENGLISH):
        if not runnable(words):
            continue
        trains = words[1] in ("train", "dpo", "demo")
        settings = [*SHORT, "output_dir=output/demo"] if words[1] == "demo" else SHORT if trains else ()
        assert main([*words[1:], *settings]) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err[-2000:]}"
        done.append(words)
        capsys.readouterr()
    assert {words[1] for words in done[1:]} >= {
        "chat",
        "data",
        "train",
        "demo",
        "init",
        "validate",
        "eval",
        "plot",
        "dpo",
        "estimate",
        "export",
        "doctor",
        "help",
    }
    assert (tmp_path / "output" / "wint4").is_dir()
    assert (tmp_path / "output" / "digits" / "eval_answers.jsonl").is_file()
