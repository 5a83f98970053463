"""`ernie-tune chat`: a scripted conversation, errors in the middle of it, and what can be talked
to.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_runs import IMAGES, train

from ernie_tune.cli.chat import HELP, talk, typed
from ernie_tune.cli.main import main
from ernie_tune.generate.answer import Delta
from ernie_tune.generate.engine import Request
from ernie_tune.generate.opened import open_engine
from ernie_tune.peft.model import PeftModel
from ernie_tune.trainers.assemble import base_of_run

DIGIT = str(IMAGES / "0003.png")


class Scripted:
    """An engine that answers with the number of the question, and keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.options: dict[str, Any] = {}

    def params(self, **options: Any) -> dict[str, Any]:
        self.options = options
        return options

    def stream(self, request: Request, params: Any) -> Iterator[Delta]:
        self.requests.append(request)
        last = request.messages[-1]["content"]
        yield Delta(reasoning_content="hm ")
        yield Delta("answer ")
        if "bad" in last:
            raise ValueError("the question is too long")
        yield Delta(f"{len(self.requests)} ", finish_reason="stop")


def conversation(*lines: str, **options: Any) -> tuple[Scripted, str]:
    engine, out = Scripted(), io.StringIO()

    def write(text: str, end: str = "\n", flush: bool = False) -> None:
        out.write(f"{text}{end}")

    assert talk(engine, [line + "\n" for line in lines], write, options) == 0
    return engine, out.getvalue()


def contents(request: Request) -> list[str]:
    return [m["content"] for m in request.messages]


def test_a_conversation_remembers_and_forgets() -> None:
    engine, said = conversation("hello", "", "more", "/new", "again", "/exit", "never", temperature=0.5)
    assert [contents(r) for r in engine.requests] == [["hello"], ["hello", "answer 1", "more"], ["again"]]
    assert [m["role"] for m in engine.requests[1].messages] == ["user", "assistant", "user"]
    assert said == "hm answer 1 \nhm answer 2 \nhm answer 3 \n"
    assert engine.options == {"max_new_tokens": 256, "temperature": 0.5}


def test_images_go_with_the_next_question_and_stay_in_the_conversation() -> None:
    engine, said = conversation(f"/image {DIGIT}", f"/image {DIGIT}", "both?", "and now?", "/new", "nothing left?")
    assert [contents(r)[0] for r in engine.requests] == ["<image><image>both?", "<image><image>both?", "nothing left?"]
    assert [list(r.images) for r in engine.requests] == [[DIGIT] * 2, [DIGIT] * 2, []]
    assert said.startswith(f"image 1: {DIGIT}\nimage 2: {DIGIT}\n")


@pytest.mark.parametrize("make", ["missing", "text", "folder"])
def test_a_bad_image_is_told_at_once_and_not_taken(make: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.png"
    if make == "text":
        path.write_text("no picture", encoding="utf-8")
    elif make == "folder":
        path.mkdir()
    engine, said = conversation(f"/image {path}", f"/image {DIGIT}", "what?")
    assert said.startswith("! image '")
    assert f"image 1: {DIGIT}" in said
    assert list(engine.requests[0].images) == [DIGIT]


def test_an_error_in_the_middle_keeps_the_conversation() -> None:
    engine, said = conversation("one", f"/image {DIGIT}", "bad", "two")
    assert "! the question is too long\n" in said
    assert contents(engine.requests[2]) == ["one", "answer 1", "<image>two"], "the image waits for a question"
    assert list(engine.requests[2].images) == [DIGIT]


def test_thinking_and_help() -> None:
    engine, said = conversation(
        "a", "/think on", "b", "/think off", "c", "/think", "/think maybe", "d", "/help", "/new"
    )
    assert [r.thinking for r in engine.requests] == [None, True, False, False]
    assert said.count(HELP) == 3


def test_unknown_commands_are_refused_with_the_list() -> None:
    engine, said = conversation("/imgae a.png", "/etc/passwd is what?", " /etc/passwd is what?")
    assert said.startswith("! unknown command /imgae; did you mean '/image'?\n/image PATH")
    assert "! unknown command /etc/passwd\n" in said
    assert [contents(r) for r in engine.requests] == [["/etc/passwd is what?"]], "after a blank it is a question"


def test_paths_as_people_type_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my digit.png"
    file.write_bytes(Path(DIGIT).read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    escaped = str(file).replace(" ", "\\ ")
    engine, said = conversation(
        *(f"/image {p}" for p in (file, f"'{file}'", f'"{file}"', escaped, "~/my digit.png")), "?"
    )
    assert "!" not in said
    assert list(engine.requests[0].images) == [str(file)] * 5


def test_an_interrupt_stops_the_answer_and_not_the_conversation() -> None:
    class Stopped(Scripted):
        def stream(self, request: Request, params: Any) -> Iterator[Delta]:
            yield from itertools.islice(super().stream(request, params), 2)
            if len(self.requests) == 1:
                raise KeyboardInterrupt

    engine, out = Stopped(), io.StringIO()
    talk(engine, ["one", "two"], lambda text, end="\n", flush=False: out.write(f"{text}{end}"), {})
    assert out.getvalue() == "hm answer  … stopped\nhm answer \n"
    assert contents(engine.requests[1]) == ["one", "answer", "two"]


def test_typed_lines_have_a_prompt_and_survive_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, given = [], iter(["a", KeyboardInterrupt, "b", EOFError, "never"])

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        found = next(given)
        if isinstance(found, str):
            return found
        raise found

    monkeypatch.setattr("builtins.input", answer)
    assert list(typed()) == ["a", "b"]
    assert prompts == ["> "] * 4


def test_the_verb_refuses_wrong_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["chat"]) == 2
    assert main(["chat", "a", "b"]) == 2
    assert "expected one folder or YAML file, got 2" in capsys.readouterr().err
    assert main(["chat", str(tmp_path / "no"), "--top_k", "2"]) == 1
    assert capsys.readouterr().err.startswith(f"{tmp_path / 'no'} does not exist; give the folder")
    assert main(["chat", str(tmp_path), "--temperature", "warm"]) == 2
    assert capsys.readouterr().err == "temperature (warm) must be a number\n"
    assert main(["chat", str(tmp_path), "--beams", "4"]) == 2
    assert "unknown option 'beams'; chat takes temperature, top_p" in capsys.readouterr().err


def test_a_finished_run_can_be_talked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(tmp_path, max_steps=1)
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {DIGIT}\nread\n/exit\n"))
    written, other = tmp_path / "run.yaml", tmp_path / "other.yaml"  # as a run was started
    written.write_text(f"output_dir: {out}\n", encoding="utf-8")
    other.write_text("output_dir: not/run\n", encoding="utf-8")
    assert main(["chat", str(written), "--max_new_tokens", "3", "--seed", "1"]) == 0
    for path, told in (
        (other, "names output_dir (not/run), which is not there; run `ernie-tune train"),
        (DIGIT, "must be the folder of a model, or the folder or YAML file of a run"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            open_engine(Path(path), base_of_run)
    said = capsys.readouterr().out
    assert said.startswith(str(HELP))
    assert f"image 1: {DIGIT}" in said
    assert "!" not in said


def test_adapters_are_put_on_the_base_that_their_run_names(tmp_path: Path) -> None:
    out = train(tmp_path, max_steps=1, fine_tuning="LoRA", weight_quantize_algo="weight_only_int8")
    for path in (out, out / "ernie_tune_args.yaml"):
        engine = open_engine(path, base_of_run)
        assert isinstance(engine.model, PeftModel)
        assert [type(a).__name__ for a in (engine.model.layers[0].self_attn.q_proj,)] == ["QuantizedLinear"]
    file = out / "ernie_tune_args.yaml"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("model_name_or_path: tiny-a", "model_name_or_path: ''"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"ernie_tune_args.yaml must name the base model of the adapter"):
        open_engine(out, base_of_run)
    file.unlink()
    with pytest.raises(
        ValueError, match=r"must hold a model \(config.json\) or a finished run \(ernie_tune_args.yaml\)"
    ):
        open_engine(out, base_of_run)
