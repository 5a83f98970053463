"""`ernie-tune data` from outside: exit codes, what is printed, files written, run files as
input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ernie_tune.cli import main
from ernie_tune.data.processor import Processor

ROOT = Path(main.__file__).parents[2]
GOOD = {
    "messages": [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a dog"}],
    "images": ["p.png"],
}
BAD = {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": ""}]}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (56, 56)).save("p.png")
    Path("good.jsonl").write_text(json.dumps(GOOD) + "\n")
    Path("bad.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(BAD) + "\n")
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main.main(["data", *map(str, args)])
    return code, *capsys.readouterr()


def test_check(rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = call(capsys, "check", "good.jsonl")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("good.jsonl: 1 row, messages: 1 of 1 sampled rows have messages")
    code, out, err = call(capsys, "check", "bad.jsonl", "--html")
    assert (code, err) == (1, "")
    english = (
        "bad.jsonl:2: error: messages[1]: found '', expected an answer; fix: write it, or drop the row (--fix drops it)"
    )
    assert (out.splitlines()[0], "修复" in out) == (english, False)
    monkeypatch.setenv("ERNIE_TUNE_LANG", "zh")
    chinese = "bad.jsonl:2：错误：messages[1]：实际为 ''，应为 非空的回答；修复：补写回答，或删去该行（--fix 会删去）"
    said = call(capsys, "check", "bad.jsonl")[1]
    assert (said.splitlines()[0], "fix:" in said, " rows" in said) == (chinese, False, False)
    monkeypatch.setenv("ERNIE_TUNE_LANG", "en")
    assert out.splitlines()[-1] == "wrote bad.check.html"
    assert Path("bad.check.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    code, out, err = call(capsys, "check", "bad.jsonl", "--json", "--fix")
    assert (code, json.loads(out)["errors"]) == (1, 1)
    assert "bad.jsonl:2: dropped: no answer" in err
    assert call(capsys, "check", "bad.fixed.jsonl")[0] == 0
    assert call(capsys, "check", "bad.jsonl", "--fix")[0] == 1  # the copy is there already
    assert call(capsys, "check", "*.jsonl")[1].count(" row, messages:") == 2


def test_check_options(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "check", "good.jsonl", "--eval", "good.jsonl", "--max-seq-len=9", "--decode=0")
    assert code == 1
    assert (
        "good.jsonl:1: error: row: found '<image>what?', expected a row that training does not see (good.jsonl:1)"
        in out
    )
    encoded = Processor.bundled().encode(GOOD["messages"], ["p.png"])  # type: ignore[arg-type]
    assert f"found {encoded.num_tokens} tokens, expected at most 9 tokens" in out
    assert "pictures: 0 of 2 opened" in out
    Processor.bundled("tiny").save_pretrained("model")
    encoded = Processor.bundled("tiny").encode(GOOD["messages"], ["p.png"])  # type: ignore[arg-type]
    out = call(capsys, "check", "good.jsonl", "--tokenizer", "model", "--max-seq-len", 9, "--decode", "all")[1]
    assert f"found {encoded.num_tokens} tokens" in out
    (rows / "sub").mkdir()
    os.rename("p.png", "sub/p.png")
    assert call(capsys, "check", "good.jsonl")[0] == 1
    assert call(capsys, "check", "good.jsonl", "--media-dir", "sub")[0] == 0
    Path("many.jsonl").write_text((json.dumps(BAD) + "\n") * 30)
    assert call(capsys, "check", "many.jsonl")[1].count("error: ") == 20
    assert call(capsys, "check", "many.jsonl", "--limit=0")[1].count("error: ") == 30
    assert "30 errors" in call(capsys, "check", "many.jsonl", "--limit=1")[1]


def test_a_run_file(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("run.yaml")
    run.write_text(
        "model: tiny-a\ntrain_dataset_path: good.jsonl, bad.jsonl\neval_dataset_path: bad.jsonl\nmax_seq_len: 20\n"
    )
    code, out, err = call(capsys, "check", run)
    assert (code, err) == (1, "")
    assert "expected at most 20 tokens" in out
    assert "bad.jsonl (evaluation): 2 rows" in out
    assert "a row that training does not see (good.jsonl:1)" in out
    assert "rows: 3 (" in call(capsys, "stats", run)[1]
    run.write_text("model: hub/name\ntrain_dataset_path: good.jsonl\n")
    assert call(capsys, "check", run)[2].startswith("note: hub/name has no tokenizer here")
    for text, message in [
        ("seed: 1\n", "run.yaml:1: train_dataset_path must name the rows"),
        ("seed: 1\ntrain_dataset_path: no.jsonl\n", "run.yaml:2: train_dataset_path (no.jsonl) is not there, seen from"),
        ("train_dataset_path: good.jsonl\nmodel: Qwen/Qwen2-VL-7B\n", "run.yaml:2: model_name_or_path (Qwen/Qwen2-VL-7B) must be an ERNIE"),
        ("train_dataset_path: good.jsonl\ntrain_dataset_type: x\n", "run.yaml:2: train_dataset_type ('x') must be one of auto"),
        ("train_dataset_path: good.jsonl\nsed: 1\n", "run.yaml:2: unknown key 'sed'"),
    ]:  # fmt: skip
        run.write_text(text)
        code, out, err = call(capsys, "check", run)
        assert (code, out) == (1, "")
        assert err.startswith(message), err


def test_show(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = call(capsys, "show", "good.jsonl")[1]
    assert "<image 4x4 patches = 4 tokens>" in out
    assert "⟦a dog</s>⟧" in out
    assert "⟦</s>⟧" in call(capsys, "show", "bad.jsonl:2")[1] == call(capsys, "show", "bad.jsonl", "--row=2")[1]
    assert "\n<think>\n" in call(capsys, "show", "good.jsonl", "--template", "ernie_vl")[1]
    Path("broken.jsonl").write_text(json.dumps(GOOD) + "\nbroken\n")
    code, _, err = call(capsys, "show", "broken.jsonl:2")
    assert code == 1
    assert err.startswith("broken.jsonl:2: row: found 'broken', expected one JSON object a row")
    code, _, err = call(capsys, "show", "broken.jsonl:9")
    assert (code, err) == (1, "broken.jsonl has no row in line 9; its last row is in line 2\n")


def test_stats_and_convert(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "stats", "bad.jsonl")
    assert code == 0
    assert out.startswith("rows: 2 (sft 2)\n")
    assert "tokens a picture" in out
    assert out.endswith("1 error, see `ernie-tune data check bad.jsonl`\n")
    code, out, _ = call(capsys, "convert", "good.jsonl", "--to", "sharegpt")
    assert (code, out) == (0, "wrote good.sharegpt.jsonl: 1 row\n")
    row = json.loads(Path("good.sharegpt.jsonl").read_text())
    assert row == {
        "conversations": [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a dog"}],
        "images": ["p.png"],
    }
    assert call(capsys, "convert", "*.jsonl", "--to", "messages", "--out", "all.jsonl")[0] == 0
    assert Path("all.jsonl").read_text().count("\n") == 4
    code, _, err = call(capsys, "convert", "good.jsonl", "--to", "pairs", "--out", "x.jsonl")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("good.jsonl:1: signal (sft) must be something that pairs can express")
    assert not Path("x.jsonl").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "data needs one of check, stats, show, convert, got ''"),
        (("chek", "a"), "data needs one of check, stats, show, convert, got 'chek'; did you mean 'check'?"),
        (("check",), "data check needs a file"),
        (("check", "a", "--jsn"), "data check has no option --jsn; did you mean 'json'?"),
        (("show", "a", "--json"), "data show has no option --json"),
        (("check", "a", "--json=1"), "--json takes no value, got '1'"),
        (("check", "a", "--eval"), "--eval needs a value: --eval FILE"),
        (("check", "good.jsonl", "--limit", "few"), "--limit (few) must be a whole number from 0"),
        (("check", "good.jsonl", "--max-seq-len", "1"), "--max-seq-len (1) must be a whole number from 2"),
        (("check", "good.jsonl", "--decode", "some"), "--decode (some) must be a whole number from 0, or all"),
        (("check", "good.jsonl", "--drop"), "--drop needs --fix"),
        (("check", "a.yaml", "b"), "a YAML file stands alone, got a.yaml b"),
        (("show", "a", "b"), "data show takes one file, got a b"),
        (("convert", "a"), "data convert needs --to messages|sharegpt|alpaca|pairs"),
        (("convert", "good.jsonl", "bad.jsonl", "--to", "alpaca"), "data convert needs --out for more than one file"),
        (("convert", "*.jsonl", "--to", "alpaca"), "data convert needs --out for more than one file"),
    ],
)
def test_wrong_command_lines(
    args: tuple[str, ...], message: str, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith(message)


def test_wrong_files(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "check", "no.jsonl")
    assert (code, out) == (1, "")
    assert err.startswith("no.jsonl: path: found nothing of this name")
    assert call(capsys, "check", "no.yaml") == (1, "", "no.yaml: No such file or directory\n")
    code, _, err = call(capsys, "convert", "good.jsonl", "--to", "x")
    assert (code, err.startswith("format ('x') must be one of messages")) == (1, True)


def test_no_paddle_and_a_pipe_without_chinese(rows: Path) -> None:
    code = (
        "import sys; from ernie_tune.cli.main import main\n"
        "for args in (['check', 'good.jsonl'], ['show', 'good.jsonl'], ['stats', 'good.jsonl'], ['convert', 'good.jsonl', '--to', 'alpaca']):\n"
        "    assert main(['data', *args]) == 0, args\n"
        "print(sorted(m for m in ('paddle', 'torch') if m in sys.modules))"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, timeout=120)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "[]"
