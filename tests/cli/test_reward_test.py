"""`ernie-tune reward test`: the table, the exit code, both languages, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ernie_tune.cli.main import main
from ernie_tune.config.language import VARIABLE


def settings(folder: Path, reward: str = "", stage: str = "RLVR") -> str:
    rows = [
        {"messages": [{"role": "user", "content": "read"}], "signal": {"type": "verifiable", "answer": str(i)}}
        for i in range(5)
    ]
    (folder / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = f"stage: {stage}\nmodel_name_or_path: tiny-a\ntrain_dataset_path: {folder}/ask.jsonl\n{reward}"
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return str(folder / "run.yaml")


def test_rewards_that_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["reward", "test", settings(tmp_path), "--rows", "3"]) == 0
    out = capsys.readouterr().out
    assert "right answers (share)   3        1.000" in out
    assert out.splitlines()[-1] == "the rewards hold"
    monkeypatch.setenv(VARIABLE, "zh")
    assert main(["reward", "test", settings(tmp_path), "--rows=3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "奖励通过测试"


def test_rewards_that_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "def mine(completions, answer, **_):\n"
        "    return [float(a in c[0]['content']) for c, a in zip(completions, answer)]\n",
        encoding="utf-8",
    )
    assert main(["reward", "test", settings(tmp_path, f"reward_funcs: {tmp_path}/mine.py:mine\n")]) == 1
    out = capsys.readouterr().out
    assert f"{tmp_path}/ask.jsonl:1: '0 or not 0'" in out
    assert "gold_or_not" in out.splitlines()[-1]
    assert "reference" not in out.splitlines()[-1]


def test_answers_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = f"num_generations: 2\nper_device_train_batch_size: 4\nmax_completion_length: 3\noutput_dir: {tmp_path}/run\n"
    assert main(["reward", "test", settings(tmp_path, more), "--samples", "4"]) == 0
    assert (
        "4 answers of the model: mean 0.000, spread 0.000; 0 of 2 prompts have answers that differ"
        in capsys.readouterr().out
    )
    assert not (tmp_path / "run" / "rollouts.jsonl").exists()


def test_rewards_of_upo_are_tried_on_the_prompts_beside_judged_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (
        "loss_type: upo_offline\nallow_base: true\nnum_generations: 2\nper_device_train_batch_size: 4\n"
        f"max_completion_length: 3\noutput_dir: {tmp_path}/run\n"
    )
    path = settings(tmp_path, more, stage="UPO")
    asked = {"messages": [{"role": "user", "content": "read"}]}
    pair = {**asked, "signal": {"type": "pair", "chosen": "1", "rejected": "2"}}
    with (tmp_path / "ask.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(pair) + "\n")
    assert main(["reward", "test", path, "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert "right answers (share)   5        1.000" in out
    assert "2 answers of the model: mean 0.000" in out
    (tmp_path / "ask.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    assert main(["reward", "test", path]) != 0
    assert "train_dataset_path (1 rows) must hold prompts that are answered by sampling" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "stage", "match"), [
    (["--rows", "many"], "RLVR", "--rows (many) must be a number, such as 200"),
    ([], "SFT", "stage (SFT) must be one that learns from rewards: RLVR, PPO, or UPO with loss_type upo_online"),
    ([], "UPO", "stage (UPO, loss_type auto) must be one that learns from rewards"),
])  # fmt: skip
def test_what_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], stage: str, match: str
) -> None:
    assert main(["reward", "test", settings(tmp_path, stage=stage), *words]) != 0
    assert match in capsys.readouterr().err
