"""`ernie-tune chat`: a conversation in the terminal, images included, no server.

Refuses to know: training, HTTP.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.cpu import while_paddle_loads
from ernie_tune.config.loader import split_overrides

HELP = "/image PATH  add an image to the next question    /new  forget the conversation    /think on|off    /exit"


def run(args: list[str]) -> int:
    """ernie-tune chat FOLDER_OR_YAML [--temperature 0.7] [--top_p 0.9] [--max_new_tokens 256] [--seed 0]

    Talks to a model folder, or to the result of a run (its output folder, or its ernie_tune_args.yaml). In the conversation:
    /image PATH adds an image to the next question, /new forgets, /think on or off, /exit leaves.
    """
    words, entries = split_overrides(args)
    if len(words) != 1:
        raise UsageError(f"expected one folder or YAML file, got {len(words)} / 需要一个文件夹或 YAML 文件")
    known: dict[str, Callable[[Any], Any]] = {
        "temperature": float,
        "top_p": float,
        "top_k": int,
        "max_new_tokens": int,
        "seed": int,
    }
    unknown = [e.name for e in entries if e.name not in known]
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r}; chat takes {', '.join(known)} / 未知的选项")
    options = {e.name: known[e.name](e.raw) for e in entries}
    with while_paddle_loads():
        from ernie_tune.generate.opened import open_engine
        from ernie_tune.trainers.assemble import base_of_run

    engine = open_engine(Path(words[0]), base_of_run)
    print(HELP)
    return talk(engine, sys.stdin, print, options)


def talk(engine: Any, lines: Iterable[str], write: Callable[..., None], options: dict[str, Any]) -> int:
    """The conversation itself: one line in, one streamed answer out. What cannot be answered is not remembered."""
    from ernie_tune.data.images import load_image
    from ernie_tune.generate.engine import Request

    params = engine.params(**{"max_new_tokens": 256, **options})
    messages: list[Any] = []
    images: list[str] = []
    waiting: list[str] = []
    thinking: bool | None = None
    for line in (raw.strip() for raw in lines):
        command, _, rest = line.partition(" ")
        if command == "/exit":
            break
        if command == "/new":
            messages, images, waiting = [], [], []
        elif command == "/think" and rest in ("on", "off"):
            thinking = rest == "on"
        elif command == "/image":
            try:
                load_image(rest)
            except ValueError as error:
                write(f"! {error}")
                continue
            waiting.append(rest)
            write(f"image {len(images) + len(waiting)}: {rest}")
        elif command == "/think" or (command.startswith("/") and " " not in line):
            write(HELP)
        elif line:
            asked = [*messages, {"role": "user", "content": "<image>" * len(waiting) + line}]
            try:
                answer = _stream(engine, Request(asked, [*images, *waiting], thinking=thinking), params, write)
            except ValueError as error:
                write(f"! {error}")
                continue
            messages, images, waiting = [*asked, {"role": "assistant", "content": answer}], [*images, *waiting], []
    return 0


def _stream(engine: Any, request: Any, params: Any, write: Callable[..., None]) -> str:
    answer = ""
    for delta in engine.stream(request, params):
        write(delta.reasoning_content + delta.content, end="", flush=True)
        answer += delta.content
    write("")
    return answer.strip()
