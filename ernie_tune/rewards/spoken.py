"""Claims about a picture in free text, found by patterns: what a thought says of shapes, counts,
places and bars.

Only words that an annotated scene could answer to are read (colours, shapes, bars), so what is no
claim is left alone; a question, a condition or a guess ("if", "maybe", "是否") claims nothing.
Numbers, strings and annotations in, claims and where they stand out. Refuses to know: what a claim
is worth (evidence.py), models, pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ernie_tune.rewards.evidence import Claim, claim_spans, judge_claim, read_claims

_COLOURS = {
    "red": "red", "green": "green", "blue": "blue", "yellow": "yellow", "orange": "orange", "purple": "purple",
    "black": "black", "white": "white", "grey": "grey", "gray": "grey", "pink": "pink", "brown": "brown",
    "红": "red", "绿": "green", "蓝": "blue", "黄": "yellow", "橙": "orange", "紫": "purple",
    "黑": "black", "白": "white", "灰": "grey", "粉": "pink", "棕": "brown",
}  # fmt: skip
_SHAPES = {
    "circle": "circle", "square": "square", "triangle": "triangle", "rectangle": "rectangle", "star": "star",
    "圆形": "circle", "圆": "circle", "正方形": "square", "方块": "square", "方形": "square",
    "三角形": "triangle", "三角": "triangle", "长方形": "rectangle", "矩形": "rectangle", "星": "star",
}  # fmt: skip
_NUMBERS = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "no": 0, "一": 1, "两": 2, "二": 2, "三": 3, "四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "九": 9, "十": 10,
}  # fmt: skip
_SIDES = {
    "left of": "left_of", "right of": "right_of", "above": "above", "below": "below",
    "左": "left_of", "右": "right_of", "上": "above", "下": "below",
}  # fmt: skip
_ENDS = {
    "tallest": "max", "highest": "max", "largest": "max", "biggest": "max", "shortest": "min", "lowest": "min",
    "smallest": "min", "最高": "max", "最大": "max", "最长": "max", "最矮": "min", "最低": "min", "最小": "min",
}  # fmt: skip


def _one_of(words: dict[str, str] | dict[str, int], chinese: bool) -> str:
    return "|".join(sorted((w for w in words if w.isascii() != chinese), key=len, reverse=True))


_EN = {
    "C": _one_of(_COLOURS, False), "S": _one_of(_SHAPES, False), "N": _one_of(_NUMBERS, False) + r"|\d{1,3}",
    "R": _one_of(_SIDES, False), "E": _one_of(_ENDS, False),
}  # fmt: skip
_ZH = {
    "C": _one_of(_COLOURS, True), "S": _one_of(_SHAPES, True), "N": _one_of(_NUMBERS, True) + r"|\d{1,3}",
    "R": _one_of(_SIDES, True), "E": _one_of(_ENDS, True),
}  # fmt: skip
_THING = r"(?:(?P<c{i}>{C})\s+)?(?P<s{i}>{S})(?:e?s)?"
_THING_ZH = r"(?:(?P<c{i}>{C})色?的?)?(?P<s{i}>{S})"


def _compiled(pattern: str, words: dict[str, str], thing: str) -> re.Pattern[str]:
    for i in (1, 2):
        pattern = pattern.replace(f"<<{i}>>", thing.replace("{i}", str(i)))
    for name, choice in words.items():
        pattern = pattern.replace("{" + name + "}", choice)
    return re.compile(pattern, re.IGNORECASE)


# In the order in which they are tried; what one has read is not read again. A plain thing is a
# claim only with an article or "is", and a colour.
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("relation", _compiled(r"\b(?:the|a|an)\s+<<1>>\s+is\s+(?:to\s+the\s+)?(?P<r>{R})\s+(?:the|a|an)\s+<<2>>\b", _EN, _THING)),
    ("relation", _compiled(r"<<1>>在<<2>>的?(?P<r>{R})[边侧方面]", _ZH, _THING_ZH)),
    ("extreme", _compiled(r"\b(?:the\s+)?(?P<e>{E})(?:\s+(?:bar|one))?\s+is\s+(?:the\s+)?(?P<c1>{C})\b", _EN, "")),
    ("extreme", _compiled(r"\b(?P<c1>{C})(?:\s+(?:bar|one))?\s+is\s+(?:the\s+)?(?P<e>{E})\b", _EN, "")),
    ("extreme", _compiled(r"(?P<e>{E})的?(?:柱子?|一根)?[是为](?P<c1>{C})", _ZH, "")),
    ("extreme", _compiled(r"(?P<c1>{C})色?(?:的?柱子?)?(?P<e>{E})", _ZH, "")),
    ("count", _compiled(r"\b(?P<n>{N})\s+<<1>>\b", _EN, _THING)),
    ("count", _compiled(r"(?P<n>{N})[个只]<<1>>", _ZH, _THING_ZH)),
    ("absent", _compiled(r"没有(?:(?P<c1>{C})色?的?)(?P<s1>{S})", _ZH, "")),
    ("exists", _compiled(r"\b(?:a|an|the)\s+(?P<c1>{C})\s+(?P<s1>{S})\b", _EN, "")),
    ("exists", _compiled(r"(?P<c1>{C})色的?(?P<s1>{S})", _ZH, "")),
    ("is", _compiled(r"\b(?:the\s+)?(?P<s1>{S})\s+is\s+(?P<c1>{C})\b", _EN, "")),
    ("is", _compiled(r"(?P<s1>{S})是(?P<c1>{C})", _ZH, "")),
)  # fmt: skip
_OPEN_WORDS = re.compile(
    r"\b(?:if|whether|maybe|perhaps|could|might|suppose|not)\b|是否|如果|可能|也许|不是|吗", re.IGNORECASE
)
_SENTENCE = re.compile(r"[^.!?;\n。！？；]*[.!?;\n。！？；]?")
MOST = 64  # claims that are read of one text
LONGEST = 1 << 16  # characters that are looked at


@dataclass(frozen=True)
class Spoken:
    """A claim and where it stands in the text, [start, end)."""

    claim: Claim
    start: int
    end: int


def spoken_claims(text: str) -> list[Spoken]:
    """The claims of a free text in their order, at most MOST. A sentence that asks, denies ("not")
    or supposes is left out; "no red circle" counts 0 of them.
    """
    out: list[Spoken] = []
    for sentence in _SENTENCE.finditer(text):
        words = sentence.group()
        if not words.strip() or _OPEN_WORDS.search(words) or words.rstrip().endswith(("?", "？")):
            continue
        out += _of_sentence(words, sentence.start())
        if len(out) >= MOST:
            return sorted(out, key=lambda one: one.start)[:MOST]
    return sorted(out, key=lambda one: one.start)


_BLOCK = re.compile(r"<evidence>.*?(?:</evidence>|\Z)", re.DOTALL)


def claims_beside(text: str, scope: str = "both") -> list[Spoken]:
    """What a text claims outside its evidence block: in its `answer`, in its `thought` (up to the
    last </think>), or in both.
    """
    plain = _BLOCK.sub(lambda block: " " * len(block.group()), text[:LONGEST])
    start = (
        plain.rfind("</think>") + len("</think>") if "</think>" in plain else len(plain) if "<think>" in plain else 0
    )
    parts = {"thought": (0, start), "answer": (start, len(plain)), "both": (0, len(plain))}
    first, last = parts[scope]
    return spoken_claims(" " * first + plain[first:last])


def contradicted_spans(text: str, scene: Mapping[str, Any], scope: str = "both") -> list[tuple[int, int]]:
    """Where a text says what the picture's annotation contradicts, [start, end) each: the claims of
    its evidence block, and what it claims beside it.
    """
    block = zip(read_claims(text) or [], claim_spans(text), strict=False)
    wrong = [span for claim, span in block if judge_claim(claim, scene)[0] < 0]
    beside = claims_beside(text, scope)
    return sorted([*wrong, *((one.start, one.end) for one in beside if judge_claim(one.claim, scene)[0] < 0)])


def _of_sentence(words: str, at: int) -> Iterator[Spoken]:
    left = words
    for kind, pattern in _PATTERNS:
        for found in pattern.finditer(left):
            yield Spoken(_claim(kind, found), at + found.start(), at + found.end())
            left = left[: found.start()] + " " * (found.end() - found.start()) + left[found.end() :]


def _claim(kind: str, found: re.Match[str]) -> Claim:
    said = {name: value.casefold() for name, value in found.groupdict().items() if value}
    thing = _thing(said, "1")
    if kind == "relation":
        return Claim("relation", thing, _SIDES[said["r"]], _thing(said, "2"))
    if kind == "extreme":
        return Claim("chart_extreme", _COLOURS[said["c1"]], _ENDS[said["e"]])
    if kind == "count":
        number = said["n"]
        return Claim("count", thing, int(number) if number.isdecimal() else _NUMBERS[number])
    if kind == "absent":
        return Claim("count", thing, 0)
    if kind == "is":
        return Claim("attribute", _SHAPES[said["s1"]], _COLOURS[said["c1"]])
    return Claim("exists", thing)


def _thing(said: dict[str, str], which: str) -> str:
    colour, shape = said.get(f"c{which}"), said.get(f"s{which}")
    return " ".join([*([_COLOURS[colour]] if colour else []), *([_SHAPES[shape]] if shape else [])])
