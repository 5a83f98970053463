"""What an answer says: the span that counts, and the number, unit or letter in it. Strings in,
plain values out.

Everything is bounded: a text longer than MAX_TEXT has no answer, a span longer than MAX_SPAN is
none, and no pattern here can take more than linear time, since what is read was written by a model
that is paid for finding holes.
Refuses to know: gold answers, scores, models.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from ernie_tune.config.language import say

MAX_TEXT, MAX_SPAN = 1 << 20, 256
STYLES = ("auto", "boxed", "tag")
_END_MARKS = ".。,，;；!！"

# Full width and every decimal digit become ASCII, dashes "-", what is invisible goes. Not NFKC,
# which makes 102 of 10².
_FOLD: dict[int, str | None] = {
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},
    **{code: str(digit) for code in range(0x110000) if (digit := unicodedata.decimal(chr(code), None)) is not None},
    0x3000: " ",
    **dict.fromkeys(map(ord, "−–—﹣－‐‑"), "-"),
    **dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"), None),
}
_MARKED = re.compile(
    rf"(?:final answer|the answer|answer|答案|结果)\s{{0,8}}(?:is|:|是|为)[\s:]{{0,8}}([^\n]{{1,{MAX_SPAN}}})",
    re.IGNORECASE,
)


def fold(text: str) -> str:
    """One spelling for every width of a character and every script's digits."""
    return text if text.isascii() else text.translate(_FOLD)


def squash(text: str) -> str:
    """The form in which spans are compared: no spaces, no case, no mark at the ends."""
    return "".join(text.split()).casefold().strip(_END_MARKS)


def without_thought(text: str) -> str | None:
    """What follows the thought; None where a thought was opened and never closed, or a second one
    follows.
    """
    if "<think>" not in text and "</think>" not in text:
        return text
    _, closed, rest = text.rpartition("</think>")
    return rest if closed and "<think>" not in rest else None


def boxed(text: str) -> tuple[list[str], str]:
    r"""The contents of every `\boxed{…}` with balanced braces, and the text up to one that is never
    closed (all of it where there is none).
    """
    found: list[str] = []
    at = text.find("\\boxed{")
    while at >= 0:
        depth, end = 1, at + len("\\boxed{")
        start = end
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth:
            return found, text[:at]
        found.append(text[start : end - 1].strip())
        at = text.find("\\boxed{", end)
    return found, text


def tagged(text: str) -> list[str]:
    """The contents of every <answer>…</answer>."""
    found, at = [], text.find("<answer>")
    while at >= 0:
        start = at + len("<answer>")
        end = text.find("</answer>", start)
        if end < 0:
            break
        found.append(text[start:end].strip())
        at = text.find("<answer>", end)
    return found


def answer_span(text: str, style: str = "auto") -> str | None:
    r"""The part of a completion that is its answer, or None. Thoughts never count; two different
    answers of one kind are none.

    In turn: every `\boxed{…}` (all the same), the only <answer>…</answer>, what follows "the answer
    is", "答案是" and the like (all the same), a text of one line. `style` "boxed" or "tag" accepts
    that form alone. Raises ValueError for another style.
    """
    if style not in STYLES:
        raise ValueError(
            say(
                f"answer_style ({style!r}) must be one of {', '.join(STYLES)}; use 'auto'",
                f"answer_style（{style!r}）须为 {', '.join(STYLES)} 之一；请用 'auto'",
            )
        )
    if len(text) > MAX_TEXT:
        return None
    after = without_thought(text)
    if after is None:
        return None
    boxes, text = boxed(fold(after))
    tags = tagged(text)
    if style == "boxed" or (style == "auto" and boxes):
        return _only(boxes)
    if style == "tag" or tags:
        return tags[0] if len(tags) == 1 and tags[0] else None
    marked = _MARKED.findall(text)
    if marked:
        return _only([span.strip() for span in marked])
    text = text.strip()
    return text if 0 < len(text) <= MAX_SPAN and "\n" not in text else None


def _only(spans: list[str]) -> str | None:
    """The last of spans that all say the same, else None."""
    return spans[-1] if spans and spans[-1] and len(set(map(squash, spans))) == 1 else None


# --- numbers --------------------------------------------------------------------------------------

_CHINESE = dict(zip("零〇一二两三四五六七八九", (0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9), strict=True))
_POWERS = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_ENGLISH = {
    word: number
    for number, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ]
    )
}
# unit -> (dimension, how many of the dimension's base): length, mass, time, currency, angle,
# number, share
UNITS: dict[str, tuple[str, float]] = {
    "mm": ("length", 0.001), "毫米": ("length", 0.001), "cm": ("length", 0.01), "厘米": ("length", 0.01),
    "m": ("length", 1.0), "米": ("length", 1.0), "km": ("length", 1000.0), "千米": ("length", 1000.0), "公里": ("length", 1000.0),
    "g": ("mass", 0.001), "克": ("mass", 0.001), "kg": ("mass", 1.0), "千克": ("mass", 1.0), "公斤": ("mass", 1.0),
    "t": ("mass", 1000.0), "吨": ("mass", 1000.0),
    "s": ("time", 1.0), "秒": ("time", 1.0), "min": ("time", 60.0), "分钟": ("time", 60.0), "h": ("time", 3600.0), "小时": ("time", 3600.0),
    "元": ("currency", 1.0), "yuan": ("currency", 1.0), "度": ("angle", 1.0), "°": ("angle", 1.0),
    "个": ("number", 1.0), "只": ("number", 1.0), "张": ("number", 1.0), "人": ("number", 1.0), "辆": ("number", 1.0),
    "%": ("share", 0.01),
}  # fmt: skip
_LATEX = (
    (re.compile(r"\\(?:left|right|,|;|!| )"), ""),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\^\{?\\circ\}?|\^\{?°\}?|\\circ"), "°"),
    (re.compile(r"\\(?:times|cdot)"), "×"),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\%"), "%"),
    (re.compile("[\u00a0\u202f\u2009](?=\\d{3}(?!\\d))"), ","),
)
_FRACTION = re.compile(r"([+-]?)\s*\\frac\{\s*([+-]?\d+(?:\.\d+)?)\s*\}\{\s*([+-]?\d+(?:\.\d+)?)\s*\}(.*)", re.DOTALL)
_RATIO = re.compile(r"([+-]?)\s*(\d+)\s*/\s*(\d+)(.*)", re.DOTALL)
_DECIMAL = re.compile(
    r"[¥￥]?([+-]?)\s*((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE]([+-]?\d{1,3})|\s*×\s*10\s*\^\s*\{?\s*([+-]?\d{1,3})\s*\}?)?(.*)",
    re.DOTALL,
)
_CHINESE_NUMBER = re.compile(rf"(负?)([{''.join(_CHINESE)}{''.join(_POWERS)}]+)(.*)", re.DOTALL)
_ENGLISH_NUMBER = re.compile(r"(minus )?([a-z]+)(.*)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Quantity:
    """A finite number and the unit behind it (a key of UNITS), None for a bare number."""

    value: float
    unit: str | None = None

    @property
    def dimension(self) -> str | None:
        return UNITS[self.unit][0] if self.unit else None


def chinese_number(text: str) -> int | None:
    """一百零五 -> 105, 二〇二四 -> 2024; None where it is none: 一两 names no number."""
    if not text or any(char not in _CHINESE and char not in _POWERS for char in text):
        return None
    if all(char in _CHINESE for char in text):
        return int("".join(str(_CHINESE[char]) for char in text)) if len(text) != 2 else None
    total = part = digit = 0
    for char in text:
        if char in _CHINESE:
            digit = _CHINESE[char]
        elif _POWERS[char] >= 10**4:
            total, part, digit = (total + part + digit) * _POWERS[char], 0, 0
        else:
            part, digit = part + (digit or 1) * _POWERS[char], 0
    return total + part + digit


def _value_and_rest(text: str) -> tuple[float, str] | None:
    """The number that a text begins with, and what follows it."""
    parts = _FRACTION.fullmatch(text) or _RATIO.fullmatch(text)
    if parts:
        if float(parts[3]) == 0:
            return None
        return (-1 if parts[1] == "-" else 1) * float(Fraction(parts[2]) / Fraction(parts[3])), parts[4]
    parts = _DECIMAL.fullmatch(text)
    if parts:
        return float(f"{parts[1]}{parts[2].replace(',', '')}e{parts[3] or parts[4] or 0}"), parts[5]
    parts = _CHINESE_NUMBER.fullmatch(text)
    number = chinese_number(parts[2]) if parts else None
    if parts and number is not None:
        return (-1 if parts[1] else 1) * float(number), parts[3]
    parts = _ENGLISH_NUMBER.fullmatch(text)
    if parts and parts[2].casefold() in _ENGLISH:
        return (-1 if parts[1] else 1) * float(_ENGLISH[parts[2].casefold()]), parts[3]
    return None


def read_quantity(span: str) -> Quantity | None:
    """The quantity that the whole of a span is, with a unit of UNITS or none; None for anything
    else: words around it, ranges, two numbers, no number.
    """
    if len(span) > MAX_SPAN:
        return None
    text = fold(span).strip().strip("$").strip().rstrip(_END_MARKS)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    found = _value_and_rest(text.strip().lstrip("=≈").strip())
    if found is None:
        return None
    value, rest = found
    rest = rest.lstrip()
    for power in ("万", "亿"):
        if rest.startswith(power):
            value, rest = value * _POWERS[power], rest[1:]
    rest = rest.strip()
    unit = next((name for name in UNITS if rest in (name, name.upper())), None) if rest else None
    return None if (rest and unit is None) or not math.isfinite(value) else Quantity(value, unit)
