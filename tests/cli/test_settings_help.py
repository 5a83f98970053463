"""`ernie-tune help NAME` and `help --all`: every setting with what stands beside its field, in both
languages, and as a page.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ernie_tune.cli.main import main
from ernie_tune.config.aliases import EXPANDED, RENAMED
from ernie_tune.config.arguments import SETTINGS
from ernie_tune.config.sections_model import METHODS
from ernie_tune.config.sections_online import CHECKERS
from ernie_tune.config.stages import STAGES
from ernie_tune.models.presets import PRESETS
from ernie_tune.rewards.scores import CLASSIFICATION, MACRO_F1, METRICS, score_answers
from ernie_tune.rewards.verifiers import VERIFIERS


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["help", *words]) == 0
    return capsys.readouterr().out


def test_all_settings_are_told_in_both_languages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    english = told(capsys, "--all")
    monkeypatch.setenv("ERNIE_TUNE_LANG", "zh")
    chinese = told(capsys, "--all")
    for name, setting in SETTINGS.items():
        assert f"\n{name}: {setting.about.help}\n" in english, name
        assert f"\n{name}: {setting.about.help_zh}\n" in chinese, name
        for word, (en, zh) in setting.about.explained.items():
            assert f"{word}: {en}" in english
            assert f"{word}: {zh}" in chinese
    for stage in STAGES.values():
        assert stage.help in english
        assert stage.help_zh in chinese
    assert all(name in english for name in (*METHODS, *RENAMED, *PRESETS))
    assert not re.search("[\u4e00-\u9fff]", english)


def test_the_page_holds_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "ernie_tune_settings.html" in told(capsys, "--all", "--html")
    assert "own.html" in told(capsys, "--html=own.html")
    text = Path("own.html").read_text(encoding="utf-8")
    assert text == Path("ernie_tune_settings.html").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*.tmp"))

    class Open(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.depth: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag in ("table", "tr", "td", "code", "span"):
                self.depth.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag in ("table", "tr", "td", "code", "span"):
                assert self.depth.pop() == tag

    parser = Open()
    parser.feed(text)
    assert parser.depth == []
    assert all(f"<code>{name}</code>" in text for name in (*SETTINGS, *RENAMED))
    assert SETTINGS["lora_rank"].about.help_zh in text


def test_one_setting(capsys: pytest.CaptureFixture[str]) -> None:
    rate = told(capsys, "lr")
    assert re.search(r"default: 0.0003 at SFT, .*PT \(LoRA, Adapter, Prompt, PTuning, Prefix\)", rate)
    assert "default: 1.0e-06 at DPO" in rate
    assert "presets: " in told(capsys, "model")
    assert "tiny-a" in told(capsys, "model_name_or_path")
    assert "read at: stage DPO, UPO; loss simpo" in told(capsys, "simpo_gamma")
    assert "read at: stage UPO; rank_loss plackett_luce" in told(capsys, "rank_top_k")
    assert "DPO: sigmoid, odpo" in told(capsys, "loss_type")
    assert "adamw_torch = adamw" in told(capsys, "optim")
    assert "has no effect in this version: the training process" in told(capsys, "dataloader-num-workers")
    assert "not in this version: set bf16: true" in told(capsys, "fp16")
    assert "a number: 0 … 0.99" in told(capsys, "lora_dropout")
    assert "also set by: " in told(capsys, "freeze_config")


def test_settings_speak_chinese_to_the_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIE_TUNE_LANG", "zh")
    everything = told(capsys, "--all")
    assert not re.findall(r".*\b(?:at|the|of|with|is|out|use|to) \w.*", everything)
    assert "默认：1.0e-05（SFT, PT (Full, Freeze)）" in told(capsys, "learning_rate")
    assert "此版本无效：训练进程自行准备数据" in told(capsys, "dataloader_num_workers")
    assert "此版本尚无：请设 bf16: true" in told(capsys, "fp16")


def test_names_of_others_and_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "attn_impl").startswith("attn_impl: not used here: the machine and the model decide")
    assert told(capsys, "neftune_noise_alpha").startswith(
        "neftune_noise_alpha: not a setting here; noise on embeddings"
    )
    assert "  bfloat16: bf16: true" in told(capsys, "torch_dtype")
    assert set(EXPANDED["use_hf"]) == {"true", "false"}
    stage = told(capsys, "PPO")
    assert "settings of its own: " in stage
    assert "loss_type: upo_hetero, mpo" in told(capsys, "Upo".upper()) or told(
        capsys, "upo"
    )  # a verb of this name comes first


@pytest.mark.parametrize("words", [["--all", "--what"], ["--all", "--html", "--html=a"], ["--all", "x"]])
def test_wrong_words(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", *words]) == 2
    assert "help --all takes --html or nothing more" in capsys.readouterr().err


def test_scores_are_judged_before_a_run_by_the_names_that_it_computes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = (*METRICS, CLASSIFICATION, MACRO_F1)
    assert SETTINGS["eval_metrics"].choices == names
    assert f"one of: {', '.join(names)}" in told(capsys, "eval_metrics")
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: tiny-a\ntrain_dataset_path: rows.jsonl\n")
    for wrong in ("foo", "os:getcwd", "metrics.py:f", "exact_match,foo", "[foo]"):
        assert main(["validate", str(file), f"eval_metrics={wrong}"]) == 1
        assert "must be one of exact_match, " in capsys.readouterr().err
    assert main(["validate", str(file), f"eval_metrics={','.join(names)}"]) == 0
    scored = score_answers(["a", "b", "a"], ["a", "b", "b"], names)
    assert set(scored) == set(names), "each is computed"


def test_rewards_are_judged_before_a_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name as rewards/ has them, functions by the text of their file, which is not run."""
    assert ("row", *VERIFIERS) == CHECKERS
    assert f"checkers: {', '.join(CHECKERS)}" in told(capsys, "reward_funcs")
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").touch()
    Path("model").mkdir()
    Path("mine.py").write_text("raise SystemExit('run')\ndef score(**more): ...\nclass Judge: ...\nlater = print\n")
    Path("others.py").write_text("from operator import *\n")
    Path("broken.py").write_text("def (\n")
    Path("run.yaml").write_text("stage: GRPO\nmodel_name_or_path: tiny-a\ntrain_dataset_path: rows.jsonl\n")
    for right in (*CHECKERS, "mine.py:score", "mine.py:Judge", "mine.py:later", "others.py:add", "broken.py:f", "model",
                  "judge:http://127.0.0.1/v1", "row,exact"):  # fmt: skip
        assert main(["validate", "run.yaml", f"reward_funcs={right}"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "# run.yaml is valid", right
    for wrong in ("foo", "exact,foo", "os:getcwd", "mine.py", "mine.py:none", "gone.py:score", "gone"):
        assert main(["validate", "run.yaml", f"reward_funcs={wrong}"]) == 0
        out = capsys.readouterr().out.splitlines()
        words = {
            "gone.py:score": "(gone.py) is not there",
            "mine.py:none": "function of mine.py, which has none called 'none' but score, Judge; name one of them",
        }.get(wrong, "must be a checker (row, numeric, ")
        assert words in out[-2], wrong
        assert out[-1] == "# run.yaml is valid, but cannot run yet: 1 thing named above must be there first"
        assert main(["train", "run.yaml", f"reward_funcs={wrong}"]) == 1
        assert words in capsys.readouterr().err
    assert main(["validate", "run.yaml", "stage=SFT", "reward_funcs=foo"]) == 0
    assert "must be a checker" not in capsys.readouterr().out, "not read there"
