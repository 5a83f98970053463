"""Passages and a question -> what the model is asked; its answer -> the text and what it cites.

Refuses to know: where passages come from, servers.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Any

from passages import Passage

_ASKED = {
    "zh": ("根据资料回答，并注明编号。", "问题：{question}"),
    "en": ("Answer from the passages and cite their number.", "Question: {question}"),
}
_CITED = re.compile(r"\s*\[(\d{1,3})\]\s*")


def question(asked: str, passages: Sequence[Passage], language: str) -> str:
    """The whole question as text: pictures by their captions alone."""
    opening, closing = _ASKED[language]
    shown = [f"[{i}] {one.head}{_colon(one)}{one.text}" for i, one in enumerate(passages, 1)]
    return "\n".join([opening, *shown, closing.format(question=asked)])


def _colon(one: Passage) -> str:
    return "" if not one.text else "：" if one.language == "zh" else ": "


def parts(asked: str, passages: Sequence[Passage], language: str) -> list[dict[str, Any]]:
    """The same as parts of a message, each picture behind its caption."""
    out: list[dict[str, Any]] = []
    text = ""
    for line in question(asked, passages, language).split("\n"):
        text += line + "\n"
        number = re.match(r"\[(\d+)\]", line)
        picture = passages[int(number[1]) - 1].picture if number else None
        if picture is not None:
            data = base64.b64encode(picture.read_bytes()).decode()
            out += [{"type": "text", "text": text}]
            out += [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}]
            text = "\n"
    return [*out, {"type": "text", "text": text.rstrip("\n")}]


def read_answer(answer: str, passages: Sequence[Passage]) -> tuple[str, list[Passage]]:
    """(the answer without its citations, the passages that it cites). Numbers of passages that were
    not shown cite nothing.
    """
    numbers = dict.fromkeys(int(n) for n in _CITED.findall(answer))
    cited = [passages[n - 1] for n in numbers if 1 <= n <= len(passages)]
    return _CITED.sub(" ", answer).strip(), cited
