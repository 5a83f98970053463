"""What stands behind the studio's page: paths, jobs, settings as fields and YAML, run folders,
questions, the gate."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from support.tiny_runs import IMAGES, write_rows

from ernie_tune.config.arguments import SETTINGS
from ernie_tune.config.language import in_language
from ernie_tune.config.loader import load_text
from ernie_tune.ui import asking, forms, judging, runs, studio
from ernie_tune.ui.gate import StudioGate
from ernie_tune.ui.jobs import Jobs
from ernie_tune.ui.judgements import AskedRow, Judgement, Judgements
from ernie_tune.ui.questions import questions
from ernie_tune.ui.workspace import Workspace

# --- paths ----------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.jsonl").write_text("{}")
    return Workspace(tmp_path / "work")


@pytest.mark.parametrize(
    "path",
    ["../outside/secret.jsonl", "/etc/passwd", "a/../../outside/secret.jsonl", "link/secret.jsonl", "~/x", "\0", "  ",
     "//etc/passwd", ".ernie_tune_ui/jobs/x/job.json"],
)  # fmt: skip
def test_no_path_leads_out(place: Workspace, path: str) -> None:
    (place.root / "link").symlink_to(place.root.parent / "outside")
    if path == "~/x":
        assert place.inside(path) == place.root / "~/x", "a name like any other"
        return
    with pytest.raises(ValueError, match="must"):
        place.inside(path)


def test_what_the_command_line_let_in(tmp_path: Path, place: Workspace) -> None:
    secret = tmp_path / "outside" / "secret.jsonl"
    wider = Workspace(tmp_path / "work", [secret])
    assert wider.inside(str(secret)) == secret
    assert str(secret) in wider.rows()
    with pytest.raises(ValueError, match="must lie in the workspace"):
        wider.inside(str(secret.parent))


def test_a_file_that_no_browser_sent(place: Workspace) -> None:
    (place.sent / "ab").mkdir(parents=True)
    (place.sent / "ab" / "a.png").write_text("")
    (place.sent / "link").symlink_to("/etc/passwd")
    assert place.received(str(place.sent / "ab" / "a.png")).name == "a.png"
    for path in (
        "/etc/passwd",
        str(place.sent / "link"),
        str(place.sent / ".." / "jobs"),
        "a.png",
        str(place.sent / "no"),
    ):
        with pytest.raises(ValueError, match="must be sent with the page"):
            place.received(path)


@pytest.mark.parametrize(
    "value", ["/etc/rewards.py:score", "../outside/rewards.py:score", "linked/rewards.py:score", "~/rewards.py:score",
              "judge:http://127.0.0.1/v1?prompt=/etc/passwd", "judge:http://127.0.0.1/v1?token_env=HF_TOKEN"]
)  # fmt: skip
def test_settings_of_online_methods_name_nothing_outside(place: Workspace, value: str) -> None:
    (place.root / "linked").symlink_to(place.root.parent / "outside")
    text = "stage: GRPO\nmodel_name_or_path: tiny-a\ntrain_dataset_path: train.jsonl\n"
    place.check_settings(load_text(text + "reward_funcs: row, rewards.py:score\n", "run.yaml").config)
    with pytest.raises(ValueError, match=r"reward_funcs: (path|token_env) "):
        place.check_settings(load_text(forms.with_value(text, "reward_funcs", value), "run.yaml").config)


def test_nobody_publishes_under_the_name_of_the_machines_owner(place: Workspace) -> None:
    with pytest.raises(ValueError, match=r"push_to_hub \(me/model\) must not be used from here"):
        place.check_settings(load_text(forms.with_value(forms.START, "push_to_hub", "me/model"), "x").config)


def test_data_sets_by_name_lead_nowhere_else(place: Workspace) -> None:
    (place.root / "dataset_info.json").write_text('{"mine": {"file_name": "../outside/secret.jsonl"}}')
    with pytest.raises(ValueError, match=r"train_dataset_path: path .* must lie in the workspace"):
        place.check_settings(load_text(forms.with_value(forms.START, "train_dataset_path", "mine"), "x").config)


@pytest.mark.parametrize(
    ("changed", "setting"),
    [
        ("train_dataset_path: /etc/passwd", "train_dataset_path"),
        ("train_dataset_path: ../outside/secret.jsonl#5", "train_dataset_path"),
        ("output_dir: ../outside/out", "output_dir"),
        ("logging_dir: /tmp/logs", "logging_dir"),
        ("model_name_or_path: /root/model", "model_name_or_path"),
        ("model_name_or_path: ../outside", "model_name_or_path"),
        ("eval_dataset_path: /etc/passwd", "eval_dataset_path"),
        ("eval_dataset_path: linked*/secret.jsonl", "eval_dataset_path"),
        ("dataset_dir: ../outside", "dataset_dir"),
        ("guard_dataset_path: /etc/passwd", "guard_dataset_path"),
        ("lora_path: ~/adapter", "lora_path"),
        ("freeze_spec: ../outside/spec.json", "freeze_spec"),
        ("resume_from_checkpoint: /tmp/checkpoint-3", "resume_from_checkpoint"),
        ("model_name_or_path: .ernie_tune_ui/jobs/x", "model_name_or_path"),
    ],
)
def test_settings_name_nothing_outside(place: Workspace, changed: str, setting: str) -> None:
    text = forms.START + "eval_strategy: steps\neval_steps: 5\neval_dataset_path: held_out.jsonl\n"
    (place.root / "linked").symlink_to(place.root.parent / "outside")
    place.check_settings(load_text(text, "run.yaml").config)
    place.check_settings(load_text(text.replace(": nano", ": baidu/ERNIE-4.5-VL-28B-A3B-PT"), "run.yaml").config)
    name, value = changed.split(": ")
    with pytest.raises(ValueError, match=f"{setting}: path .* must lie in the workspace"):
        place.check_settings(load_text(forms.with_value(text, name, value), "run.yaml").config)


def test_what_is_offered(place: Workspace) -> None:
    for name in ("run/trainer_log.jsonl", "run/config.json", "run/model.safetensors", "run/checkpoint-3/config.json",
                 "data/rows.jsonl", "data/table.csv", "a.yaml", "deep/1/2/3/4/5/rows.jsonl"):  # fmt: skip
        file = place.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    assert place.rows() == ["data/rows.jsonl", "data/table.csv"]
    assert place.runs() == ["run"]
    assert place.models() == ["run", "ernie-4.5-vl-nano"], "and the model that comes along"
    assert place.model("ernie-4.5-vl-nano") == "ernie-4.5-vl-nano"
    assert place.model("nano") == "ernie-4.5-vl-nano"
    assert place.model("run") == "./run", "from the folder that every process of the studio works in"
    (place.root / "--help").mkdir()
    assert place.model("--help") == "./--help", "never taken for an option"
    with pytest.raises(ValueError, match="must lie in the workspace"):
        place.model("../outside")
    assert place.settings() == ["a.yaml"]


# --- settings -------------------------------------------------------------------------------------


def test_every_setting_is_a_field_and_comes_back() -> None:
    fields = {field.name: field for field in forms.fields()}
    assert set(fields) == set(SETTINGS)
    assert set(forms.FIRST) <= set(fields)
    text = ""
    for field in fields.values():
        text = forms.with_value(text, field.name, field.value)
    flat = load_text(text, "run.yaml").config.flat()
    assert flat == load_text("stage: SFT\nfine_tuning: LoRA\n", "run.yaml").config.flat(), (
        "defaults written are defaults"
    )
    assert {f.kind for f in fields.values()} == {"choice", "switch", "text"}
    assert all(f.label.english != f.label.chinese for f in fields.values())
    assert {f.name: f.value for f in forms.fields({"seed": "7"})}["seed"] == "7"


def test_a_field_changes_its_line_only() -> None:
    text = "# mine\nlr: 1.0e-3  # peak\nseed: 3\ntrain_dataset_path:\n  - a.jsonl\n  - b.jsonl\n\nmax_steps: 5\n"

    changed = forms.with_value(forms.with_value(text, "seed", "4"), "train_dataset_path", "c.jsonl, d.jsonl")
    assert changed.startswith("# mine\n")
    assert "seed: 4\n" in changed
    assert "a.jsonl" not in changed
    assert changed.endswith("max_steps: 5\n")
    assert load_text(changed, "x").config.data.train_dataset_path == ("c.jsonl", "d.jsonl")
    assert "seed" not in forms.with_value(changed, "seed", "")
    added = forms.with_value(changed, "bf16", True)
    assert added.endswith("max_steps: 5\nbf16: true\n")
    spelt = forms.with_value(
        "num_epochs: 3\nper_device_train_batch_size: 1  # small\n", "per_device_train_batch_size", 8
    )
    assert "per_device_train_batch_size: 8  # small" in spelt


@pytest.mark.parametrize(
    "value", ["a: b", "it's", "# no comment", "[not, closed", "*star", "data#500", "- dash", "x, y", "%1"]
)
def test_any_value_survives_the_yaml(value: str) -> None:
    text = forms.with_value("seed: 1\n", "output_dir", value)
    assert load_text(text, "x").config.save.output_dir == value


def test_mistakes_and_estimates_are_told() -> None:
    loaded, told = forms.read("stage: SFT\nlearnign_rate: 1\n")
    assert loaded is None
    assert "run.yaml:2" in told[0]
    assert "did you mean 'learning_rate'" in told[0]
    assert "4.93 M parameters, 0.0" in forms.estimated(forms.START)
    assert "learnign_rate" in forms.estimated("learnign_rate: 1\n")
    assert forms.written("seed: 4\n") == {"seed": "4"}
    assert forms.written("seed: [\n") == {}


@pytest.mark.parametrize("system", ["en", "zh"])
def test_what_is_told_does_not_depend_on_the_language_of_the_process(
    place: Workspace, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.setenv("ERNIE_TUNE_LANG", system)
    chinese = re.compile("[\u4e00-\u9fff]")
    _, mistakes = forms.read("stage: SFT\nlearnign_rate: 1\nmax_steps: many\n")
    _, notes = forms.read(forms.START + "dataloader_num_workers: 4\n")
    shown = {"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "3"}]}
    _, rows = questions(Path(write_rows(place.root / "bad.jsonl", [shown])), place)
    assert len(mistakes) == 2
    assert notes
    assert rows
    for told in (*mistakes, *notes, *rows, forms.estimated(forms.START), forms.estimated("stage: no\n")):
        assert not chinese.search(str(in_language(told, "en"))), told
        assert chinese.search(str(in_language(told, "zh"))), told
        shown_both = studio.line(told)
        assert '<span class="en">' in shown_both
        assert '<span class="zh">' in shown_both
    gate = StudioGate(inside)
    for tongue, language in (("zh-CN,zh;q=0.9", "zh"), ("en-US", "en")):
        _, body = answers_of(gate, host="evil.example", accept_language=tongue)
        assert bool(chinese.search(body["body"].decode())) == (language == "zh")


def test_servers_speak_both_languages_and_each_browser_reads_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, given = Jobs.start, []

    def started(self: Jobs, kind: str, title: str, words: Any, cwd: Path, environ: Any = None, **rest: Any) -> Any:
        given.append(environ)
        return start(self, kind, title, ["nonsense", *words], cwd, environ, **rest)

    monkeypatch.setattr(Jobs, "start", started)
    servers = asking.ModelServers(Jobs(tmp_path / "jobs"), tmp_path)
    with pytest.raises(ValueError, match="must come up") as raised, servers.asked("nothing"):
        pass
    servers.close()
    assert "unknown verb" in str(in_language(raised.value, "en"))
    assert "未知" in str(in_language(raised.value, "zh"))
    assert "未知" not in str(in_language(raised.value, "en"))
    assert given[0]["ERNIE_TUNE_LANG"] == "both"


# --- run folders ----------------------------------------------------------------------------------


def test_what_a_growing_run_tells(tmp_path: Path) -> None:
    assert runs.curves([tmp_path]) == ""
    log = tmp_path / "trainer_log.jsonl"
    log.write_text('{"step": 1, "epoch": 0.1, "loss": 2.0}\n{"step": 2, "epoch": 0.2, "loss": 1.5}\n{"step": 3, "lo')
    assert [r["loss"] for r in runs.history(tmp_path)] == [2.0, 1.5], "a line that is being written is left"
    one = runs.curves([tmp_path])
    assert one.startswith("<svg")
    other = tmp_path / "other"
    other.mkdir()
    (other / "trainer_log.jsonl").write_text(log.read_text())
    both = runs.curves([tmp_path, other])
    assert both.count("polyline") + both.count("<path") > one.count("polyline") + one.count("<path")
    assert runs.last_numbers(tmp_path) == {"step": 2, "epoch": 0.2, "loss": 1.5}
    line = '{"step": %d, "row": "a:1", "question": "q", "images": ["a.png", 3], "reference": "y", "answer": "%s"}\n'
    (tmp_path / "samples.jsonl").write_text(line % (0, "x") + line % (20, "w") + line % (20, "z") + '{"step": ')
    (sample,) = runs.samples(tmp_path)
    assert sample == runs.SampledRow("a:1", "q", ("a.png",), "y", {0: "x", 20: "z"})
    assert runs.samples(other) == []
    (tmp_path / "rollouts.jsonl").write_text("".join(f'{{"n": {i}}}\n' for i in range(100)) + '{"n": 1')
    assert [row["n"] for row in runs.rollouts(tmp_path, 3)] == [99, 98, 97]
    assert runs.rollouts(other) == []


# --- questions and the judge's session ------------------------------------------------------------


def test_questions_of_rows_and_of_predictions(place: Workspace) -> None:
    (place.root / "a.png").write_bytes((IMAGES / "0003.png").read_bytes())
    shown = {
        "messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "3"}],
        "images": ["a.png"],
    }
    outside = {"messages": [{"role": "user", "content": "<image>q"}], "images": [str(IMAGES / "0003.png")]}
    judged = {"messages": [{"role": "user", "content": "q"}], "responses": ["x", "y"], "scores": [1, 5]}
    file = Path(write_rows(place.root / "rows.jsonl", [shown]))
    found, told = questions(file, place)
    (only,) = found.values()
    assert (only.reference, only.answers, told) == ("3", (), [])
    assert only.asked.images == (str(place.root / "a.png"),)
    found, told = questions(Path(write_rows(place.root / "out.jsonl", [outside])), place)
    assert not found
    assert "must lie in the workspace" in str(told[0])
    (only,) = questions(Path(write_rows(place.root / "judged.jsonl", [judged])), place)[0].values()
    assert only.answers == ("x", "y")
    line = {"row": 4, "line": 4, "messages": shown["messages"][:1], "images": ["a.png"], "reference": "3",
            "answers": [{"content": "3"}, {"content": "8"}]}  # fmt: skip
    (only,) = questions(Path(write_rows(place.root / "predicted.jsonl", [line, {"row": 5, "error": "no"}])), place)[
        0
    ].values()
    assert (only.asked.id, only.answers, only.reference) == ("predicted.jsonl:4", ("3", "8"), "3")


class NoServers:
    """Servers of a session that asks no model."""


def session(place: Workspace, judge: str = "ann", mode: str = "pick") -> judging.Session:
    rows = [
        {
            "row": i,
            "messages": [{"role": "user", "content": f"q{i} <b>bold</b>"}],
            "answers": [{"content": t} for t in "ab"],
        }
        for i in range(1, 4)
    ]
    write_rows(place.root / "rows.jsonl", rows)
    return judging.begin(place, NoServers(), "rows.jsonl", "", "judged", judge, mode, 2)  # type: ignore[arg-type]


def test_a_session_writes_at_once_and_goes_on_where_it_was(place: Workspace) -> None:
    now = session(place)
    now.lay()
    assert "&lt;b&gt;bold" in now.question_html()
    assert now.answers_html().count("<article") == 2
    assert now.press("1")
    assert len(now.store.all()) == 1
    assert "1 / 3" in now.progress_html()
    now.lay()
    assert not now.press("s")
    again = session(place)
    assert again.desk.todo == ("rows.jsonl:2", "rows.jsonl:3"), "what is judged is not asked again"
    assert "1 / 3" in again.progress_html(), "and counts as done"
    bob = session(place, "bob")
    assert len(bob.desk.todo) == 3
    for _ in range(3):
        bob.lay()
        bob.press("2")
    bob.lay()
    assert "all questions are judged" in bob.question_html()
    assert judging.judges(bob.store) == ["ann", "bob"]
    assert "pairs of answers" in judging.agreement_html(bob.store, "ann", "bob")
    assert "no question was judged by both" in judging.agreement_html(bob.store, "ann", "eve")
    assert load_text(judging.learn_from(bob.store, place), "x").config.model.stage == "DPO"


def test_keys_judge_the_question_that_was_seen_only(place: Workspace) -> None:
    now = session(place)
    now.lay()
    assert now.press("1", at=0)
    assert not now.press("1", at=0), "pressed twice: the second one was meant for the first question"
    now.lay()
    assert not now.press("2", at=7)
    assert not now.press("mark1", at=1)
    assert now.desk.marked == 1
    for nonsense in ("mark9", "mark", "markx", "", "10", "²", "Escape"):
        assert not now.press(nonsense, at=1)
    assert now.desk.marked == 1
    assert f'data-turn="{now.turn}" data-at="1"' in now.answers_html()
    assert len(now.store.all()) == 1
    assert now.press("2", at=1)
    assert [one.asked.id for one in now.store.all()] == ["rows.jsonl:1", "rows.jsonl:2"]


def test_settings_that_learn_from_judgements(place: Workspace) -> None:
    store = Judgements(place.root / "judged")
    with pytest.raises(ValueError, match="must hold judgements that training can learn from"):
        judging.learn_from(store, place)
    asked = AskedRow("q", ({"role": "user", "content": "q"},))
    store.add(Judgement(asked, "ann", ("a", "b"), labels=(True, False)))
    config = load_text(judging.learn_from(store, place), "x").config
    assert (config.model.stage, list(config.data.train_dataset_path)) == ("KTO", ["judged/labels.jsonl"])
    run = place.root / "output" / "first"
    run.mkdir(parents=True)
    (run / "ernie_tune_args.yaml").write_text("model_name_or_path: nano\nfine_tuning: LoRA\nstage: SFT\n")
    (run / "lora_config.json").write_text("{}")
    config = load_text(judging.learn_from(store, place, "output/first"), "x").config
    assert (config.model.model_name_or_path, config.lora.lora_path) == ("nano", "output/first")
    (run / "lora_config.json").unlink()
    config = load_text(judging.learn_from(store, place, "output/first"), "x").config
    assert (config.model.model_name_or_path, config.lora.lora_path) == ("output/first", "")


def test_what_cannot_be_judged_is_told(place: Workspace) -> None:
    session(place)
    write_rows(place.root / "bare.jsonl", [{"messages": [{"role": "user", "content": "q"}]}])
    begin = judging.begin
    with pytest.raises(ValueError, match="must hold questions with answers"):
        begin(place, NoServers(), "bare.jsonl", "", "judged", "ann", "pick", 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mode .x. must be one of"):
        begin(place, NoServers(), "rows.jsonl", "", "judged", "ann", "x", 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="judge must be named"):
        begin(place, NoServers(), "rows.jsonl", "", "judged", "  ", "pick", 2)  # type: ignore[arg-type]
    for rows, folder in (("../outside/secret.jsonl", "judged"), ("rows.jsonl", "../outside")):
        with pytest.raises(ValueError, match="must lie in the workspace"):
            begin(place, NoServers(), rows, "", folder, "ann", "pick", 2)  # type: ignore[arg-type]
    now = session(place, mode="rate")
    now.lay()
    with pytest.raises(ValueError, match="must prefer, rate, label or correct"):
        now.press("Enter")


@pytest.mark.parametrize(
    "attack", ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</div><svg onload=x>"]
)
def test_rows_and_answers_stay_text(place: Workspace, attack: str) -> None:
    row = {
        "row": 1,
        "messages": [{"role": "user", "content": attack}],
        "answers": [{"content": attack}, {"content": "b"}],
    }
    write_rows(place.root / "rows.jsonl", [row])
    now = judging.begin(place, NoServers(), "rows.jsonl", "", "judged", attack, "pick", 2)  # type: ignore[arg-type]
    now.lay()
    now.press("1")
    page = (
        now.question_html()
        + now.answers_html()
        + now.progress_html()
        + judging.agreement_html(now.store, attack, attack)
    )
    page += (
        studio.line(ValueError(attack))
        + studio.text(attack)
        + studio.dialogue([{"role": attack, "content": attack}], [attack])
    )
    assert attack not in page
    assert isinstance(Judgements(place.root / "judged").all()[0], Judgement)


# --- the gate -------------------------------------------------------------------------------------


def ask(gate: StudioGate, path: str = "/", kind: str = "http", **headers: str) -> dict[str, Any]:
    """The first message of the answer."""
    return answers_of(gate, path, kind, **headers)[0]


def answers_of(gate: StudioGate, path: str = "/", kind: str = "http", **headers: str) -> list[dict[str, Any]]:
    """The messages of the answer."""
    told: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        told.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    where, _, query = path.partition("?")
    scope = {"type": kind, "method": "GET", "path": where, "query_string": query.encode(), "headers": raw}
    asyncio.run(gate(scope, receive, send))
    return told


async def inside(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"in"})


def test_the_gate() -> None:
    gate = StudioGate(inside)
    assert ask(gate, host="127.0.0.1:7860")["status"] == 200
    assert ask(gate, host="localhost:7860", origin="http://localhost:7860")["status"] == 200
    assert ask(gate, host="evil.example")["status"] == 421, "a name that was bent to this machine"
    assert ask(gate)["status"] == 421
    assert ask(gate, host="localhost:7860", origin="http://evil.example")["status"] == 403
    assert ask(gate, host="localhost:7860", origin="null")["status"] == 403
    assert ask(gate, host="localhost:7860", origin="http://localhost:9999")["status"] == 403
    assert ask(gate, kind="websocket", host="evil.example")["type"] == "websocket.close"
    policy = dict(ask(gate, host="127.0.0.1")["headers"])[b"content-security-policy"].decode()
    assert "frame-ancestors 'none'" in policy
    assert "http:" not in policy


def test_the_key_opens_once_and_stays_as_a_cookie() -> None:
    gate = StudioGate(inside, hosts=(), key="open sesame")
    assert ask(gate, host="10.0.0.4")["status"] == 401
    assert ask(gate, "/?key=wrong", host="10.0.0.4")["status"] == 401
    opened = ask(gate, "/?key=open+sesame", host="10.0.0.4")
    cookie = dict(opened["headers"])[b"set-cookie"].decode()
    assert opened["status"] == 303
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    kept = cookie.split(";")[0]
    assert ask(gate, host="10.0.0.4", cookie=kept)["status"] == 200
    assert ask(gate, host="10.0.0.4", cookie=f"{kept.split('=')[0]}=other")["status"] == 401
    assert ask(gate, kind="websocket", host="10.0.0.4")["type"] == "websocket.close"


@pytest.mark.parametrize("key", ["a;b", " a b ", "\"q\" 'q'", "密钥", "100%", "%41", "a&key=b", "a#b", "a+b", "a=b", ",", "\n\t\\",
                                 "é", "\udcff", "<b>"])  # fmt: skip
def test_any_key_opens_and_stays_with_its_owner(key: str) -> None:
    gate, other = StudioGate(inside, hosts=(), key=key), StudioGate(inside, hosts=(), key="another")
    opened = ask(gate, f"/?key={quote(os.fsencode(key), safe='')}", host="10.0.0.4")
    cookie = dict(opened["headers"])[b"set-cookie"].decode("ascii").split(";")[0]
    assert re.fullmatch(r"\w+=\w+", cookie), "needs no quotes"
    theirs = dict(ask(other, "/?key=another", host="10.0.0.4")["headers"])[b"set-cookie"].decode().split(";")[0]
    for sent in (cookie, f"{cookie}; {theirs}", f"{theirs}; {cookie}"):
        assert ask(gate, host="10.0.0.4", cookie=sent)["status"] == 200
    assert ask(gate, host="10.0.0.4", cookie=theirs)["status"] == 401
    assert ask(gate, f"/?key={quote(os.fsencode(key + 'x'), safe='')}", host="10.0.0.4")["status"] == 401
    if key in ("a+b", "a;b", "a&key=b", "100%"):  # as people type it
        assert ask(gate, f"/?key={key}", host="10.0.0.4")["status"] == 303


def test_the_studio_loads_neither_paddle_nor_trainers() -> None:
    names = "asking desk forms gate jobs judgements judging questions runs studio style workspace"
    code = f"import sys, importlib\nfor name in {names.split()!r}: importlib.import_module('ernie_tune.ui.' + name)\n"
    code += "print([m for m in sys.modules if m == 'paddle' or m.startswith('ernie_tune.train')])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
