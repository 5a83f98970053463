"""What the buttons of the studio's rooms do and say, without a browser: start, stop, resume,
export, the FastDeploy command; each in the language of the page that asked.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="THE STUDIO'S ROOMS WERE NOT TRIED: pip install gradio")

import gradio as gr
from support.tiny_runs import write_rows

import ernie_tune
from ernie_tune.ui import asking, forms, room_compare, room_data, room_judge, room_serve, room_train, room_watch
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


def test_settings_that_others_take_the_name_of_are_kept(studio: Studio) -> None:
    mine = studio.workspace.root / "run.yaml"
    mine.write_text("# mine\n")
    told, _ = room_train._start(studio, forms.START, "run.yaml", "en")
    (kept,) = (studio.workspace.own / "replaced").iterdir()
    assert kept.read_text() == "# mine\n"
    assert kept.name in halves_of(told)[0]
    assert mine.read_text() == forms.START
    room_train._start(studio, forms.START, "run.yaml", "en")
    assert len(list(kept.parent.iterdir())) == 1, "the same again replaces nothing"


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


def test_what_the_studio_starts_are_command_lines_that_the_verbs_take(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each word for word, given to the verb itself, with the work behind it taken away."""
    from ernie_tune.cli import serve
    from ernie_tune.cli.main import main

    done: list[Any] = []
    report = {"notes": [], "replaced": False, "quantization": "wint8", "layout": "paddle", "sha256": {}, "kind": "x",
              "weight_bytes": 0, "use": ""}  # fmt: skip
    run = types.ModuleType("run")
    vars(run)["export"] = lambda words, folder, **more: done.append(("export", words, folder, more)) or report
    monkeypatch.setitem(sys.modules, "ernie_tune.export.run", run)
    monkeypatch.setattr(serve, "_serve", lambda path, settings: done.append(("serve", str(path), settings)) or 0)
    monkeypatch.setattr(studio.servers, "close", lambda: None)
    for quantization in room_serve.QUANTIZATIONS:
        assert 'class="good"' in room_serve._export(studio, "nano", quantization, "output/x", "en")
    (studio.workspace.root / "model").mkdir()
    assert 'class="good"' in room_serve._serve(studio, "model")
    for job in studio.jobs.all():
        with contextlib.suppress(KeyError):  # what a report without content lacks
            assert main(list(job.argv)) == 0
    kinds = [("none", {}), ("wint8", {"quantization": "wint8"}), ("wint4", {"quantization": "wint4"})]
    made = sorted((one for one in done if one[0] == "export"), key=lambda one: one[3].get("quantization", ""))
    assert [one[1:3] for one in made] == [(["ernie-4.5-vl-nano"], "./output/x")] * len(kinds)
    assert [{k: v for k, v in one[3].items() if k == "quantization"} for one in made] == [
        kinds[0][1],
        kinds[2][1],
        kinds[1][1],
    ]
    (served,) = [one for one in done if one[0] == "serve"]
    assert served[1] == "model"
    assert served[2]["host"] == "127.0.0.1"
    shown, _ = room_serve._exporting(studio, "")
    assert "export output/x" in shown
    assert room_serve._exporting(studio, shown)[0] == gr.skip()


def test_each_side_of_a_comparison_says_who_speaks(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def asked(model: str) -> Iterator[str]:
        yield model

    monkeypatch.setattr(studio.servers, "asked", asked)
    monkeypatch.setattr(asking, "stream", lambda model, body: iter([" "] if model == "./b" else ["one", "one two"]))
    seen = list(room_compare._both(studio, ["<a>", "b"], "q", None, 0.0))
    left, right = seen[-1]
    assert "<b>&lt;a&gt;</b>" in left
    assert "one two" in left
    assert any("one</div>" in some[0] for some in seen), "as it comes"
    assert "<b>b</b>" in right
    assert "(empty)" in right


def test_several_runs_have_the_colours_of_their_curves(studio: Studio) -> None:
    root = studio.workspace.root
    for name, steps in (("a", 3), ("empty", 0), ("b", 4)):
        (root / name).mkdir()
        lines = [
            json.dumps({"step": n, "loss": 1.0 / n, "epoch": 0.1, "learning_rate": 1e-3}) for n in range(1, steps + 1)
        ]
        (root / name / "trainer_log.jsonl").write_text("".join(line + "\n" for line in lines))
    facts, curves, _, _ = room_watch._look(studio, ["a", "empty", "b"], "")
    found = re.findall(r'background: (#\w+)"></i><b>(\w+)</b>', facts)
    assert [name for _, name in found] == ["a", "b"]
    for colour, name in found:
        assert re.search(rf"{colour}[^>]*>(?:(?!stroke=).)*?{name}\b", curves, re.DOTALL)
    assert "<i " not in room_watch._look(studio, ["b"], "")[0]


def test_no_page_says_where_the_workspace_lies(studio: Studio) -> None:
    root = studio.workspace.root
    write_rows(root / "rows.jsonl", [ROW, {"messages": 3}, {**ROW, "images": ["gone.png"]}])
    write_rows(root / "out.jsonl", [{"row": 1, "answers": 3}, {"row": 2, "error": "rows.jsonl:2: no"}])
    (root / "text.jsonl").write_text("{")
    for page in (
        *(room(studio, name) for room in (room_data._checked, room_data._rows, lambda s, n: room_data._mended(s, n)[0])
          for name in ("rows.jsonl", "out.jsonl", "text.jsonl", "gone.jsonl", "../x", "train.jsonl")),
        *(list(room_judge._start(studio, name, "", "judged", "ann", "pick", 2, 1.0))[-1][1] for name in ("rows.jsonl", "out.jsonl")),
        room_train._judged(studio, "train_dataset_path: gone.jsonl\n"),
        room_train._estimated(studio, "model_name_or_path: gone\n"),
        room_serve._export(studio, "gone/../..", "none", "out", "en"),
        room_serve._fastdeploy(studio, "gone"),
    ):  # fmt: skip
        assert str(root) not in page, page
        assert str(Path(ernie_tune.__file__).parent) not in page
