"""One language on each line: which is chosen, messages within messages, and that every message of the package has both."""

from __future__ import annotations

import copy
import pickle

import pytest

from ernie_tune.cli.main import main
from ernie_tune.config.language import choose_language, in_language, join, language, say, shown

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
