"""`ernie-tune chat`: a conversation in the terminal, images included, no server.

Refuses to know: training, HTTP.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie_tune.cli.options import SAMPLING, options
from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.convert import did_you_mean
from ernie_tune.config.cpu import while_paddle_loads
from ernie_tune.config.language import say
from ernie_tune.config.loader import split_overrides
from ernie_tune.models.presets import shipped_folder

PROMPT = "> "
COMMANDS = ("/image", "/new", "/think", "/help", "/exit")
HELP = say(
    "/image PATH  add an image to the next question    /new  forget the conversation    /think on|off    /exit\n"
    "Ctrl-C stops an answer; a question that begins with / is written after a blank",
    "/image 路径  为下一个问题附上图片    /new  清空对话    /think on|off  开关思考    /exit  退出\n"
    "Ctrl-C 停止回答；以 / 开头的问题请先输入空格",
)


def run(args: list[str]) -> int:
    """ernie-tune chat FOLDER_OR_YAML [--temperature 0.7] [--top_p 0.9] [--max_new_tokens 256]
    [--seed 0]

    Talks to a model folder, or to the result of a run (its output folder, or its
    ernie_tune_args.yaml). In the conversation:
    /image PATH adds an image to the next question, /new forgets, /think on or off, /exit leaves.
    Ctrl-C stops an answer.
    """
    words, entries = split_overrides(args)
    if len(words) != 1:
        raise UsageError(
            say(
                f"expected one folder or YAML file, got {len(words)}",
                f"需要一个文件夹或 YAML 文件，得到 {len(words)} 个",
            )
        )
    chosen = options(entries, SAMPLING, "chat")
    path = shipped_folder(words[0]) or Path(words[0])
    if not path.exists():
        raise ValueError(
            say(
                f"{words[0]} does not exist; give the folder of a model or of a finished run",
                f"{words[0]} 不存在；请给出模型文件夹，或已完成运行的输出目录",
            )
        )
    with while_paddle_loads():
        from ernie_tune.generate.opened import open_engine
        from ernie_tune.trainers.assemble import base_of_run

    engine = open_engine(path, base_of_run)
    print(HELP)
    return talk(engine, typed() if sys.stdin.isatty() else sys.stdin, print, chosen)


def typed() -> Iterator[str]:
    """Lines as a person types them: with a prompt, line editing and a history of this session.
    Ctrl-C drops the line, Ctrl-D ends.
    """
    with contextlib.suppress(ImportError):  # not on every system
        importlib.import_module("readline")
    while True:
        try:
            yield input(PROMPT)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


@dataclass
class _Conversation:
    """What has been said, with the images of it, and the images that wait for the next question."""

    messages: list[Any] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    thinking: bool | None = None


def talk(engine: Any, lines: Iterable[str], write: Callable[..., None], options: dict[str, Any]) -> int:
    """The conversation itself: one line in, one streamed answer out. What cannot be answered is not
    remembered.
    """
    params = engine.params(**{"max_new_tokens": 256, **options})
    said = _Conversation()
    for raw in lines:
        line = raw.strip()
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            break
        if raw.startswith("/"):
            _obey(said, command, rest.strip(), write)
        elif line:
            _ask(engine, said, line, params, write)
    return 0


def _obey(said: _Conversation, command: str, rest: str, write: Callable[..., None]) -> None:
    if command == "/new":
        said.messages, said.images, said.waiting = [], [], []
    elif command == "/think" and rest in ("on", "off"):
        said.thinking = rest == "on"
    elif command == "/image":
        _add_image(said, rest, write)
    elif command in COMMANDS:
        write(HELP)
    else:
        hint = did_you_mean(command, COMMANDS)
        write(say("! unknown command {c}{hint}", "! 未知的命令 {c}{hint}", c=command, hint=hint))
        write(HELP)


def _add_image(said: _Conversation, typed_path: str, write: Callable[..., None]) -> None:
    from ernie_tune.data.media.images import load_image

    try:
        path = unquoted(typed_path)
        load_image(path)
    except ValueError as error:
        write(f"! {error}")
        return
    said.waiting.append(path)
    number = len(said.images) + len(said.waiting)
    write(say(f"image {number}: {path}", f"图片 {number}：{path}"))


def unquoted(text: str) -> str:
    """A path as a person types or drops it: quoted, with escaped blanks, from ~, or as it is,
    blanks included.
    """
    if os.path.exists(text):
        return text
    if text[:1] in ("'", '"') or "\\" in text:
        with contextlib.suppress(ValueError):  # an odd number of quotes: it is meant as it stands
            parts = shlex.split(text)
            text = parts[0] if len(parts) == 1 else text
    return os.path.expanduser(text)


def _ask(engine: Any, said: _Conversation, line: str, params: Any, write: Callable[..., None]) -> None:
    from ernie_tune.generate.engine import Request

    asked = [*said.messages, {"role": "user", "content": "<image>" * len(said.waiting) + line}]
    images = [*said.images, *said.waiting]
    try:
        answer = _stream(engine, Request(asked, images, thinking=said.thinking), params, write)
    except ValueError as error:
        write(f"! {error}")
        return
    said.messages, said.images, said.waiting = [*asked, {"role": "assistant", "content": answer}], images, []


def _stream(engine: Any, request: Any, params: Any, write: Callable[..., None]) -> str:
    """Write the answer as it comes and return it; Ctrl-C ends it where it is."""
    answer = ""
    try:
        for delta in engine.stream(request, params):
            write(delta.reasoning_content + delta.content, end="", flush=True)
            answer += delta.content
    except KeyboardInterrupt:
        write(say(" … stopped", " … 已停止"), end="")
    write("")
    return answer.strip()
