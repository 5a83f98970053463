"""How an answer looks, apart from whether it is right: its grammar of thought and answer, its
language, repetition and length.

Scores are 0 or 1 (format) or penalties on [-1, 0]; length alone may also praise. Refuses to know:
gold answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ernie_tune.config.language import say

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
_WORD = re.compile("[\u3400-\u9fff]|[^\\s\u3400-\u9fff]+")
LENGTH_KINDS = ("soft_overlong", "cosine")
_SHARE = 0.8


def think_format(text: str, mode: str = "think") -> float:
    """1 where the whole text follows the grammar. think: one thought, then an answer, neither
    empty, nothing before. nothink: no marks of a thought.

    Raises ValueError for another mode.
    """
    if mode not in ("think", "nothink"):
        raise ValueError(
            say(
                f"mode ({mode!r}) must be think or nothink; use 'think'",
                f"mode（{mode!r}）须为 think 或 nothink；请用 'think'",
            )
        )
    if mode == "nothink":
        return float("<think>" not in text and "</think>" not in text and bool(text.strip()))
    parts = _THOUGHT.fullmatch(text)
    if not parts or "<think>" in parts[1] or "think>" in parts[2]:
        return 0.0
    return float(bool(parts[1].strip()) and bool(parts[2].strip()))


def language(text: str, language: str) -> float:
    """0 where at least 0.8 of the letters outside code are of the language ("zh" or "en"), else
    minus what is missing. Raises ValueError for another.
    """
    if language not in ("zh", "en"):
        raise ValueError(
            say(
                f"language ({language!r}) must be zh or en; choose one",
                f"language（{language!r}）须为 zh 或 en；请选一种",
            )
        )
    plain = _CODE.sub(" ", text)
    chinese, latin = len(_CJK.findall(plain)), len(_LATIN.findall(plain))
    if not chinese + latin:
        return 0.0
    share = (chinese if language == "zh" else latin) / (chinese + latin)
    return min(0.0, share - _SHARE)


def repetition(text: str | Sequence[int], n: int = 3, max_penalty: float = 1.0) -> float:
    """-max_penalty (1 - distinct n-grams / n-grams) of words (Chinese characters count as words) or
    of token ids (arXiv 2502.03373); 0 for less than n of them. Raises ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(say(f"n ({n}) must be at least 1; 3 is usual", f"n（{n}）至少为 1；通常为 3"))
    parts: Sequence[object] = _WORD.findall(text.casefold()) if isinstance(text, str) else text
    grams = [tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)]
    return -max_penalty * (1 - len(set(grams)) / len(grams)) if grams else 0.0


def soft_overlong(tokens: int, limit: int, buffer: int) -> float:
    """0 up to limit - buffer tokens, falling to -1 at the limit, -1 beyond (DAPO, arXiv 2503.14476,
    eq. 13). Raises ValueError where buffer > limit.
    """
    if not 0 <= buffer <= limit:
        raise ValueError(
            say(
                f"overlong_buffer ({buffer}) must lie in [0, max_completion_length ({limit})]; lower it",
                f"overlong_buffer（{buffer}）须在 [0, max_completion_length（{limit}）] 之内；请调小",
            )
        )
    if tokens <= limit - buffer:
        return 0.0
    return (limit - buffer - tokens) / buffer if tokens <= limit and buffer else -1.0


def cosine_length(
    tokens: int, limit: int, right: bool, bounds: tuple[float, float, float, float] = (1.0, 0.5, -1.0, -0.5)
) -> float:
    """Short right answers earn most, long wrong ones lose least (arXiv 2502.03373): from bounds[0]
    to bounds[1] for right, [2] to [3] for wrong ones.
    """
    start, end = bounds[:2] if right else bounds[2:]
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(tokens, limit) / limit))


def length(
    text: str, tokens: int, limit: int, kind: str = "soft_overlong", buffer: int = 0, right: bool = False
) -> float:
    """`soft_overlong` or `cosine_length` by name. Raises ValueError for another kind."""
    if kind not in LENGTH_KINDS:
        raise ValueError(
            say(
                f"kind ({kind!r}) must be one of {', '.join(LENGTH_KINDS)}; use 'soft_overlong'",
                f"kind（{kind!r}）须为 {', '.join(LENGTH_KINDS)} 之一；请用 'soft_overlong'",
            )
        )
    return soft_overlong(tokens, limit, buffer) if kind == "soft_overlong" else cosine_length(tokens, limit, right)
