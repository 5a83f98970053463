"""One language on each line: which is chosen, messages within messages, and that every message of
the package has both.
"""

from __future__ import annotations

import ast
import copy
import pickle
import re
from pathlib import Path

import pytest

from ernie_tune.cli.main import main
from ernie_tune.cli.verbs import VERBS, Verb
from ernie_tune.config.language import choose_language, halves, in_language, join, language, say, shown, spoken

VARIABLES = ("ERNIE_TUNE_LANG", "LC_ALL", "LC_MESSAGES", "LANG")


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, "en"),
        ({"LANG": "C.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_TW"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "en_US.UTF-8"}, "en"),
        ({"LANG": "de_DE", "LC_MESSAGES": "zh_CN"}, "zh"),
        ({"LANG": "zh_CN", "LC_ALL": ""}, "zh"),
        ({"LANG": "zh_CN", "ERNIE_TUNE_LANG": "en"}, "en"),
        ({"ERNIE_TUNE_LANG": "both"}, "both"),
        ({"LANG": "zh_CN", "ERNIE_TUNE_LANG": "klingon"}, "zh"),
    ],
)
def test_language_comes_from_the_variable_or_the_system(environ: dict[str, str], wanted: str) -> None:
    assert language(environ) == wanted


def test_message_shows_itself_in_the_language_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    message = say("saved x", "已保存 x")
    assert (message, str(message), f"{message:>8}|") == ("saved x", "saved x", " saved x|")
    monkeypatch.setenv("ERNIE_TUNE_LANG", "zh")
    assert (str(message), f"- {message}", str(ValueError(message))) == ("已保存 x", "- 已保存 x", "已保存 x")
    monkeypatch.setenv("ERNIE_TUNE_LANG", "both")
    assert str(message) == "saved x / 已保存 x"
    assert str(say("a\nb", "甲\n乙")) == "a\nb\n甲\n乙"
    for same in (pickle.loads(pickle.dumps(message)), copy.deepcopy(message)):
        assert (same.english, same.chinese) == ("saved x", "已保存 x")


@pytest.mark.parametrize("system", ["en", "zh", "both"])
def test_what_is_put_together_is_made_in_each_language(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    monkeypatch.setenv("ERNIE_TUNE_LANG", system)
    told = spoken(lambda: [f"1. {say('one', '一')}", str(ValueError(say("two", "二")))])
    assert [(t.english, t.chinese) for t in told] == [("1. one", "1. 一"), ("two", "二")]
    [uneven] = spoken(lambda: ["a", "b"] if language() == "en" else ["甲"])
    assert (uneven.english, uneven.chinese) == ("a\nb", "甲")
    assert language() == system, "as before"


def test_what_a_process_said_in_both_languages_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIE_TUNE_LANG", "both")
    told = halves(f"{say('no /x/y here', '没有 /x/y')}\nplain / text")
    assert (told.english, told.chinese) == ("no /x/y here\nplain / text", "没有 /x/y\nplain / text")


def test_part_of_a_message_is_in_the_language_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = ValueError(say("no {x} here", "没有 {x}", x="cat"))
    outer = say("not read: {why} ({n})", "无法读取：{why}（{n}）", why=inner, n=3)
    assert (outer.english, outer.chinese) == ("not read: no cat here (3)", "无法读取：没有 cat（3）")
    assert in_language(KeyError("k"), "zh") is not None
    assert join("; ", [outer, say("b", "乙")]).chinese == "无法读取：没有 cat（3）; 乙"
    monkeypatch.setenv("ERNIE_TUNE_LANG", "zh")
    assert f"{outer}" == "无法读取：没有 cat（3）"


def test_braces_in_values_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert say("{'a': 1} is odd", "{'a': 1} 不对").english == "{'a': 1} is odd"
    assert say("got {v}", "得到 {v}", v="{w}").chinese == "得到 {w}"


@pytest.mark.parametrize(
    ("text", "english", "chinese"),
    [
        ("x (3) must be 4 / 必须是 4", "x (3) must be 4", "必须是 4"),
        ("a / b: no / 请改用 x / y", "a / b: no", "请改用 x / y"),
        ("plain", "plain", "plain"),
        ("one / 一\ntwo / 二", "one\ntwo", "一\n二"),
        ("数据 / x", "数据 / x", "数据 / x"),
    ],
)
def test_text_in_both_languages_is_cut(text: str, english: str, chinese: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(text) == english
    monkeypatch.setenv("ERNIE_TUNE_LANG", "zh")
    assert shown(text) == chinese
    monkeypatch.setenv("ERNIE_TUNE_LANG", "both")
    assert shown(text) == text


def test_unknown_language_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIE_TUNE_LANG", "en")  # set again after main has changed it
    with pytest.raises(ValueError, match=r"^lang \(fr\) must be en, zh or both$"):
        choose_language("fr")
    assert main(["--lang", "fr", "version"]) == 2
    assert main(["version", "--lang"]) == 2
    assert capsys.readouterr().err == "lang (fr) must be en, zh or both\nlang () must be en, zh or both\n"


def test_command_line_speaks_the_language_that_it_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["--lang", "zh", "trian"], ["trian", "--lang=zh"]):
        monkeypatch.setenv("ERNIE_TUNE_LANG", "en")
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "未知的命令" in error
        assert "unknown" not in error
    monkeypatch.setenv("ERNIE_TUNE_LANG", "en")
    assert main(["trian"]) == 2
    assert not any("\u4e00" <= sign <= "\u9fff" for sign in capsys.readouterr().err)


PACKAGE = Path(__file__).parents[2] / "ernie_tune"
CHINESE = re.compile("[\u4e00-\u9fff]")
# Every room. Left out by rule: TypeError, AttributeError and AssertionError, which tell a
# programmer of a mistake in the call, and codes for programs.
ROOMS = sorted(folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file())


def literal(node: ast.expr) -> str | None:
    """The text of a string or f-string, its values as {expression}; None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if not isinstance(node, ast.JoinedStr):
        return None
    return "".join(
        v.value if isinstance(v, ast.Constant) else ast.unparse(ast.JoinedStr([v]))[2:-1] for v in node.values
    )


def values_of(node: ast.expr) -> set[str]:
    """The names of what an f-string, or a text that `say` fills, shows beside its words."""
    if isinstance(node, ast.JoinedStr):
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return set(re.findall(r"(?<!\{)\{(\w+)[^{}]*\}(?!\})", literal(node) or ""))


def calls(path: Path, name: str) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == name]


FILES = sorted(PACKAGE.rglob("*.py"))
# Names that stand for an English word or its number, which Chinese does without or says itself.
GRAMMAR = {"counted", "what", "verb", "count", "len", "map", "str", "english"}


def test_every_message_is_whole_in_both_languages() -> None:
    """English without Chinese, Chinese with it, and the same values in both, though `say` is called
    with texts only.
    """
    count, wrong = 0, []
    for path in FILES:
        for call in calls(path, "say"):
            english, chinese = (literal(arg) for arg in call.args[:2]) if len(call.args) == 2 else (None, None)
            if english is None or chinese is None:  # passed on
                continue
            count += 1
            place = f"{path.relative_to(PACKAGE)}:{call.lineno}"
            words = re.search(
                "[A-Za-z]{3}", re.sub(r"\{[^}]*\}|\w+_\w+", "", english)
            )  # beside values and names of settings
            if CHINESE.search(english) or (words and not CHINESE.search(chinese)):
                wrong.append(f"{place}: {english!r} / {chinese!r}")
            missing = values_of(call.args[0]) - values_of(call.args[1]) - GRAMMAR
            if missing:
                wrong.append(f"{place}: the Chinese lacks {missing}")
    assert count > 500
    assert wrong == []


def test_no_text_holds_both_languages() -> None:
    """What was `english / 中文` is a call of `say`."""
    old = re.compile("[a-z)] / [^/]*[\u4e00-\u9fff]")
    wrong = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        spoken = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "say"]
        said = {id(n) for call in spoken for n in ast.walk(call)}
        for node in ast.walk(tree):
            text = literal(node) if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in said else None
            if text and "\n" not in text and old.search(text) and path.name != "language.py":
                wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {text[:80]}")
    assert wrong == []


@pytest.mark.parametrize("package", ROOMS)
def test_nothing_is_refused_in_english_only(package: str) -> None:
    wrong = []
    for path in sorted((PACKAGE / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            raised = node.exc if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) else None
            if raised is None or ast.unparse(raised.func) in ("AssertionError", "TypeError", "AttributeError"):
                continue
            for arg in raised.args:
                named = re.sub(r"\{[^}]*\}|\w*[_.]\w+", "", literal(arg) or "")
                words = re.findall(r"[A-Za-z]{2,}", named)
                if len(words) > 2:
                    wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {literal(arg)!r}")
    assert wrong == []


def test_remedies_name_packages_of_others() -> None:
    """Ours is on no index: whoever takes its name there would be installed by our own errors."""
    wrong = [
        f"{path.relative_to(PACKAGE)}" for path in FILES if re.search(r"pip install [\"']?ernie.tune", path.read_text())
    ]
    assert wrong == []


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_help_of_a_verb_has_the_same_options_in_chinese(
    verb: Verb, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {}
    for wanted in ("en", "zh"):
        monkeypatch.setenv("ERNIE_TUNE_LANG", wanted)
        assert main([verb.name, "--help"]) == 0
        said[wanted] = capsys.readouterr().out
    assert CHINESE.search(said["zh"])
    assert not CHINESE.search(said["en"])
    english, chinese = ({*re.findall(r"--[a-z][\w-]*|[A-Z]{3,}(?:_[A-Z]+)+", said[name])} for name in said)
    assert english == chinese
