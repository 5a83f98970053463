"""What the buttons of the studio's rooms do and say, without a browser: start, stop, resume,
export, the FastDeploy command; each in the language of the page that asked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="THE STUDIO'S ROOMS WERE NOT TRIED: pip install gradio")

from support.tiny_runs import write_rows

from ernie_tune.ui import forms, room_data, room_serve, room_train
from ernie_tune.ui.jobs import DONE, RUNNING, STOPPED, ChildJob, Jobs
from ernie_tune.ui.studio import Studio

CHINESE = re.compile("[\u4e00-\u9fff]")
ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


class Told(Jobs):
    """Jobs that say in which language they were asked to speak, and with which words; a file `wait`
    beside them keeps them until they are interrupted.
    """

    command = (
        sys.executable,
        "-c",
        "import os, sys, time\nprint(os.environ['ERNIE_TUNE_LANG'], *sys.argv[1:], flush=True)\n"
        "try:\n while os.path.exists('wait'): time.sleep(0.05)\nexcept KeyboardInterrupt: sys.exit(130)",
    )


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    made = Studio.at(tmp_path / "work", (), lambda key: key)
    monkeypatch.chdir(made.workspace.root)  # as the command line does
    made.jobs = Told(made.jobs.folder)
    write_rows(made.workspace.root / "train.jsonl", [ROW] * 4)
    yield made
    made.servers.close()


def halves_of(page: str) -> tuple[str, str]:
    """What a piece of a page says in English, and in Chinese."""
    return tuple("\n".join(re.findall(f'<span class="{lang}">(.*?)</span>', page, re.DOTALL)) for lang in ("en", "zh"))  # type: ignore[return-value]


def newest(studio: Studio, state: str = DONE) -> ChildJob:
    job = studio.jobs.all()[0]
    assert studio.jobs.wait(job, 60 if state != RUNNING else 0) == state, studio.jobs.output(job)
    return job


def test_start_stop_and_resume(studio: Studio) -> None:
    (studio.workspace.root / "wait").touch()
    told, update = room_train._start(studio, forms.START, "runs/mine.yaml", "zh")
    job = newest(studio, RUNNING)
    path = studio.workspace.root / "runs" / "mine.yaml"
    assert (job.argv, update["value"]) == (("train", "./runs/mine.yaml"), job.id)
    assert path.read_text(encoding="utf-8") == forms.START
    assert "started" in halves_of(told)[0]
    assert "已启动" in halves_of(told)[1]
    for chosen, why in (
        (job.id, "must be training that has ended"),
        ("none", "must be one of this studio"),
        (None, "must be"),
    ):
        refused, _ = room_train._resume(studio, chosen, "en")
        assert why in halves_of(refused)[0]
        assert CHINESE.search(halves_of(refused)[1])
    while "zh train" not in studio.jobs.output(job):
        pass
    assert "resume goes on" in halves_of(room_train._stop(studio, job.id))[0]
    assert studio.jobs.wait(job, 60) == STOPPED
    refused = halves_of(room_train._stop(studio, job.id))
    assert "must be running to be stopped, but is: stopped" in refused[0]
    assert "现为：已停止" in refused[1]
    (studio.workspace.root / "wait").unlink()
    told, update = room_train._resume(studio, job.id, "en")
    again = newest(studio)
    assert again.id != job.id
    assert (again.title, again.argv, update["value"]) == (job.title, job.argv, again.id), "the same words: it goes on"
    assert studio.jobs.output(again).split() == ["en", "train", "./runs/mine.yaml"]
    assert "newest checkpoint" in halves_of(told)[0]
    room_serve._export(studio, "ernie-4.5-vl-nano", "wint8", "output/x", "zh")
    export = newest(studio)
    assert studio.jobs.output(export).split()[:2] == ["zh", "export"]
    assert "must be training" in room_train._resume(studio, export.id, "en")[0]
    _, shown = room_train._look(studio, again.id)
    assert 'data-state="done"' in shown
    assert 'class="zh">已完成' in shown


@pytest.mark.parametrize("name", ["train_dataset_path", "eval_dataset_path", "lora_path", "model_name_or_path"])
def test_settings_that_name_what_is_not_there_are_not_called_ready(studio: Studio, name: str) -> None:
    whole = forms.with_value(forms.START, "eval_dataset_path", "train.jsonl")
    assert 'class="good"' in room_train._judged(studio, whole)
    text = forms.with_value(whole, name, "gone/nowhere/x")
    page = room_train._judged(studio, text)
    assert "is not there" in halves_of(page)[0]
    assert "cannot start before" in halves_of(page)[0]
    assert 'class="good"' not in page
    told, _ = room_train._start(studio, text, "run.yaml", "en")
    assert 'class="bad"' in told
    assert not studio.jobs.all(), "no run that cannot begin"
    assert str(studio.workspace.root) not in page


@pytest.mark.parametrize("asked", ["both", "", None, "zh; rm -rf", 3])
def test_a_language_that_no_page_speaks_is_english(studio: Studio, asked: Any) -> None:
    room_train._start(studio, forms.START, "run.yaml", asked)
    assert studio.jobs.output(newest(studio)).split()[0] == "en"


def test_what_is_shown_of_other_verbs_is_in_both_languages(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the studio's own process speaks."""
    write_rows(studio.workspace.root / "bad.jsonl", [{"prompt": "a ", "response": "b "}, {"prompt": "a"}])
    for language in ("en", "zh"):
        monkeypatch.setenv("ERNIE_TUNE_LANG", language)
        mended, _ = room_data._mended(studio, "bad.jsonl")
        (studio.workspace.root / "bad.fixed.jsonl").unlink()
        for page in (
            room_train._estimated(studio, forms.START),
            room_train._estimated(studio, "stage: no\n"),
            room_train._judged(studio, "stage: SFT\nlr: many\n"),
            room_data._rows(studio, "train.jsonl"),
            room_data._rows(studio, "bad.jsonl"),
            mended,
        ):
            english, chinese = halves_of(page)
            assert not CHINESE.search(english), page
            assert CHINESE.search(chinese), page


def test_the_fastdeploy_command(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ernie-tune serve --engine fastdeploy --print` makes it, notes in both languages; and why
    there is none."""
    asked = []

    def printed(studio: Studio, model: str, lang: str) -> Any:
        asked.append((model, lang))
        note = {"en": "ernie-tune: a note", "zh": "ernie-tune: 一条说明"}[lang]
        return type("Done", (), {"returncode": code, "stdout": "python -m fastdeploy <x>\n", "stderr": note})

    monkeypatch.setattr(room_serve, "_printed", printed)
    for code in (0, 1):
        page = room_serve._fastdeploy(studio, "ernie-4.5-vl-nano")
        english, chinese = halves_of(page)
        assert ("a note" in english, "一条说明" in chinese) == (True, True)
        assert ("python -m fastdeploy &lt;x&gt;" in page) == (code == 0)
        assert ('class="bad"' in page) == (code == 1)
    assert asked == [("ernie-4.5-vl-nano", "en"), ("ernie-4.5-vl-nano", "zh")] * 2
    assert "must lie in the workspace" in room_serve._fastdeploy(studio, "/etc")
