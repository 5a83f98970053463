"""Scores of generated answers: pure functions on strings and boxes, every score in [0, 1].

A reference is one gold answer or several; the best one counts. Texts are compared as
`normalise_answer` writes them, Chinese and English alike; `squad_*` and `anls` are the published
scorers to the letter, for numbers that stand beside published ones.
Refuses to know: models, tokens, files, where an answer came from (cut the thought off before).
Sources: SQuAD v2.0's evaluate script (arXiv 1806.03822), DocVQA's ANLS (arXiv 2007.00398),
ChartQA's relaxed accuracy (arXiv 2203.10244).
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ernie_tune.config.language import say

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
Gold = str | Sequence[str]

ANLS_THRESHOLD = 0.5
OTHER = ""  # the label of an answer that names no class, or several
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HAS_CJK = re.compile(f"[{_CJK}]")
_TOKEN = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
_SPACE_AT_CJK = re.compile(rf"(?<=[{_CJK}])\s+|\s+(?=[{_CJK}])")
# "A" and "A, B" are options, not articles
_ARTICLE = re.compile(r"\b(?:a|an|the)\s+(?=\w\w)", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NUMBER = re.compile(r"(?<![A-Za-z0-9_.])-?(?:\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?(?!\.?\d)", re.IGNORECASE)
_FOUR = r"[\s,\])>}(\[<{]+".join([r"(-?\d+(?:\.\d+)?)"] * 4)
_BOX = re.compile(rf"(?:^|[\[(<{{])\s*{_FOUR}\s*(?:$|[\])>}}])")
_DASHES = str.maketrans("\u2212\u2013", "--")
_MOST_LABELS = 50


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).translate(_DASHES).strip()


def _keeps(text: str, i: int) -> bool:
    """Whether the punctuation mark at `i` belongs to a number: 3.5, 12:30, 1/2, -5, 50%."""
    before, after = text[i - 1 : i].isdigit(), text[i + 1 : i + 2].isdigit()
    sign = text[i] == "-" and after and not text[i - 1 : i].isalnum()
    return sign or (before and (text[i] == "%" or (after and text[i] in ".:/-")))


def normalise_answer(text: str) -> str:
    """The form in which answers are equal: width and case folded (NFKC), punctuation outside
    numbers dropped, English articles dropped, spaces single.

    Full stops, apostrophes and signs of a currency vanish ("U.S." = "us", "$5" = "5"), other marks
    part words. Other symbols (+ = < > ^ | ~) stay:
    "x > 3" is not "x < 3". Spaces beside Chinese characters do not count.
    """
    text = _THOUSANDS.sub("", _plain(text).casefold())
    if not _HAS_CJK.search(text):
        text = _ARTICLE.sub("", text)
    out = []
    for i, char in enumerate(text):
        kind = unicodedata.category(char)
        mark = (kind.startswith("P") and not _keeps(text, i)) or kind == "Sc" or char == "`"
        out.append(char if not mark else "" if char in ".'’`" or kind == "Sc" else " ")
    return _SPACE_AT_CJK.sub("", " ".join("".join(out).split()))


def answer_tokens(text: str) -> list[str]:
    """Chinese characters one by one, other words whole, of the normalised text."""
    return _TOKEN.findall(normalise_answer(text))


def exact_match(prediction: str, reference: str) -> float:
    """1 where both are the same after normalising, else 0."""
    return float(normalise_answer(prediction) == normalise_answer(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the tokens of both (SQuAD); two empty texts
    agree.
    """
    got, want = answer_tokens(prediction), answer_tokens(reference)
    if not got or not want:
        return float(got == want)
    return 2 * (Counter(got) & Counter(want)).total() / (len(got) + len(want))


def squad_form(text: str) -> str:
    """SQuAD's normalised answer: lower case, ASCII punctuation removed, English articles removed,
    spaces single.
    """
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def squad_exact_match(prediction: str, reference: str) -> float:
    """SQuAD's exact match. It makes "3.5" and "35" one answer; `exact_match` does not."""
    return float(squad_form(prediction) == squad_form(reference))


def squad_f1(prediction: str, reference: str) -> float:
    """SQuAD v2.0's token F1: words at spaces, so a Chinese sentence is one word; `token_f1` counts
    its characters.
    """
    got, want = squad_form(prediction).split(), squad_form(reference).split()
    if not got or not want:
        return float(got == want)
    return 2 * (Counter(got) & Counter(want)).total() / (len(got) + len(want))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance in characters. One vector operation per character of the longer text."""
    if len(a) < len(b):
        a, b = b, a
    codes_B = np.array([ord(char) for char in b], np.int64)
    index_B = np.arange(len(b) + 1)
    row_B = index_B
    for i, char in enumerate(a, 1):
        change_B = np.minimum(row_B[:-1] + (codes_B != ord(char)), row_B[1:] + 1)
        row_B = np.concatenate(([i], change_B))
        # insertions: the best start to the left
        row_B = np.minimum.accumulate(row_B - index_B) + index_B
    return int(row_B[-1])


def anls(prediction: str, reference: str) -> float:
    """DocVQA's score of one answer: 1 - edit distance over the longer length, 0 below one half
    (exactly one half counts).

    As its scorer has it, the distance is that of the lower-cased texts with single spaces, the
    length that of the texts as they were given.
    """
    got, want = (" ".join(text.strip().lower().split()) for text in (prediction, reference))
    length = max(len(prediction.upper()), len(reference.upper()))
    score = 1 - (edit_distance(got, want) / length if length else 0.0)
    return score if score >= ANLS_THRESHOLD else 0.0


def parse_number(text: str) -> float | None:
    """The one number in a text, whatever the unit around it; None for none, for several, and for
    names such as Q3.
    """
    found = _NUMBER.findall(_THOUSANDS.sub("", _plain(text)))
    return float(found[0]) if len(found) == 1 else None


def relaxed_match(prediction: str, reference: str, tolerance: float = 0.05) -> float:
    """1 within `tolerance` of a gold number (ChartQA), else by exact match. Bare years (1900 to
    2100) and texts must match exactly.
    """
    gold, answer = parse_number(reference), parse_number(prediction)
    year = re.fullmatch(r"19\d\d|20\d\d|2100", _plain(reference))
    if gold is None or answer is None or year:
        return exact_match(prediction, reference)
    return float(abs(answer - gold) <= tolerance * abs(gold) * (1 + 1e-12))


def parse_boxes(text: str) -> list[Box]:
    """Every box written as [x1, y1, x2, y2] or (x1,y1),(x2,y2), in order; in the units of the
    text.
    """
    return [(float(a), float(b), float(c), float(d)) for a, b, c, d in _BOX.findall(_plain(text))]


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 where one has no area (x2 <= x1 or y2 <= y1)."""
    areas = [(x2 - x1) * (y2 - y1) if x2 > x1 and y2 > y1 else 0.0 for x1, y1, x2, y2 in (a, b)]
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if 0.0 in areas or width <= 0 or height <= 0:
        return 0.0
    return width * height / (sum(areas) - width * height)


def box_iou(prediction: str, reference: str) -> float:
    """IoU of the boxes in two texts, matched one to one from the best pair down, over the larger
    count: a box too many or repeated costs.
    """
    got, want = parse_boxes(prediction), parse_boxes(reference)
    pairs = sorted(((iou(a, b), i, j) for i, a in enumerate(got) for j, b in enumerate(want)), reverse=True)
    total, used = 0.0, (set[int](), set[int]())
    for score, i, j in pairs:
        if i not in used[0] and j not in used[1]:
            total += score
            used[0].add(i)
            used[1].add(j)
    return total / max(len(got), len(want), 1)


def match_label(answer: str, labels: Sequence[str]) -> str:
    """The label that an answer means: the one it equals, else the only one it contains as whole
    words; else OTHER. "A or B" means neither.
    """
    normal = {normalise_answer(label): label for label in labels}
    text = normalise_answer(answer)
    if text in normal:
        return normal[text]
    padded = f" {' '.join(_TOKEN.findall(text))} "
    words = {n: f" {' '.join(_TOKEN.findall(n))} " for n in normal if n}
    found = [n for n, word in words.items() if word in padded]
    longest = [n for n in found if not any(n != m and words[n] in words[m] for m in found)]
    return normal[longest[0]] if len(longest) == 1 else OTHER


@dataclass(frozen=True)
class Confusion:
    """`counts[i][j]`: answers of gold class `labels[i]` that named `labels[j]`; the last column
    counts those that named none.
    """

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def accuracy(self) -> float:
        return sum(row[i] for i, row in enumerate(self.counts)) / sum(map(sum, self.counts))

    def per_class(self) -> dict[str, dict[str, float]]:
        """label -> precision, recall, f1 and support (rows). A ratio without cases is 0."""
        out = {}
        for i, label in enumerate(self.labels):
            hits, support, named = self.counts[i][i], sum(self.counts[i]), sum(row[i] for row in self.counts)
            scores = {"precision": hits / (named or 1), "recall": hits / (support or 1)}
            out[label] = scores | {"f1": 2 * hits / ((named + support) or 1), "support": float(support)}
        return out

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes, each counted once."""
        return sum(scores["f1"] for scores in self.per_class().values()) / len(self.labels)


def confusion(predictions: Sequence[str], references: Sequence[str], labels: Sequence[str] = ()) -> Confusion:
    """Which class was named for which. `labels`: the classes in order; empty: those of the
    references, as they appear.

    Raises ValueError for unequal or empty lists, and for a reference that is not one of `labels`.
    """
    _check(predictions, references)
    labels = tuple(labels) or tuple(_distinct(references))
    row_of = {normalise_answer(label): i for i, label in enumerate(labels)}
    counts = [[0] * (len(labels) + 1) for _ in labels]
    for prediction, reference in zip(predictions, references, strict=True):
        if normalise_answer(reference) not in row_of:
            raise ValueError(
                say(
                    f"reference ({reference!r}) must be one of labels ({', '.join(labels)}); add it or correct the row",
                    f"参考答案（{reference!r}）须为标签（{', '.join(labels)}）之一；请补上，或改正该行",
                )
            )
        named = match_label(prediction, labels)
        counts[row_of[normalise_answer(reference)]][labels.index(named) if named in labels else -1] += 1
    return Confusion(labels, tuple(map(tuple, counts)))


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "squad_exact_match": squad_exact_match,
    "squad_f1": squad_f1,
    "anls": anls,
    "relaxed_accuracy": relaxed_match,
    "iou": box_iou,
}
CLASSIFICATION, MACRO_F1 = "accuracy", "macro_f1"


def pass_at(k: int, sampled: int, right: int) -> float:
    """The chance that one of `k` answers is right, of a prompt that `sampled` answers were sampled
    to, `right` of them right: 1 - C(n - c, k) / C(n, k), without bias (Chen et al. 2021, arXiv
    2107.03374, equation 1). Raises ValueError unless 1 <= k <= sampled and 0 <= right <= sampled.
    """
    if not (1 <= k <= sampled and 0 <= right <= sampled):
        raise ValueError(
            say(
                f"k ({k}) must be from 1 to the answers sampled ({sampled}), and right ({right}) at most these; "
                "sample more answers",
                f"k（{k}）须在 1 与采样的回答数（{sampled}）之间，且 right（{right}）不超过后者；请多采样",
            )
        )
    return 1.0 - math.comb(sampled - right, k) / math.comb(sampled, k)


def row_scores(predictions: Sequence[str], references: Sequence[Gold], name: str) -> list[float]:
    """One score a row, the best over its gold answers. "accuracy" asks for the label of
    `match_label` among all references.

    Raises ValueError for unequal or empty lists, and for an unknown name.
    """
    _check(predictions, references)
    golds = [[gold] if isinstance(gold, str) else list(gold) for gold in references]
    if name == CLASSIFICATION:
        labels = _distinct([g for gold in golds for g in gold])
        named = [match_label(prediction, labels) for prediction in predictions]
        return [float(any(exact_match(n, g) for g in gold)) for n, gold in zip(named, golds, strict=True)]
    if name not in METRICS:
        raise ValueError(
            say(
                f"metric ({name!r}) must be one of {', '.join((*METRICS, CLASSIFICATION))}; correct the name",
                f"指标（{name!r}）须为 {', '.join((*METRICS, CLASSIFICATION))} 之一；请改正名称",
            )
        )
    score = METRICS[name]
    return [max((score(p, g) for g in gold), default=0.0) for p, gold in zip(predictions, golds, strict=True)]


def score_answers(predictions: Sequence[str], references: Sequence[Gold], names: Sequence[str]) -> dict[str, float]:
    """name -> mean score over the rows; "accuracy" brings "macro_f1" where each row has one gold
    answer. Raises as `row_scores` does, and for "macro_f1" of rows with several gold answers.
    """
    out = {}
    singles = [r for r in references if isinstance(r, str)]
    one_each = len(singles) == len(references)
    for name in names:
        if name == MACRO_F1 and not one_each:
            raise ValueError(
                say(
                    f"metric ({name}) must go with one gold answer a row; take {CLASSIFICATION}",
                    f"指标（{name}）要求每行只有一个参考答案；请用 {CLASSIFICATION}",
                )
            )
        if name != MACRO_F1:
            rows = row_scores(predictions, references, name)
            out[name] = sum(rows) / len(rows)
        if name in (MACRO_F1, CLASSIFICATION) and one_each:
            out[MACRO_F1] = confusion(predictions, singles).macro_f1
    return out


def fitting_metrics(references: Sequence[Gold]) -> tuple[str, str]:
    """The two names that say most about these gold answers, the first one for each row: exact
    match, and beside it the mean F1 of classes, the tolerant match of numbers, or the tokens that
    are right; the overlap of boxes first. All others must be asked for.
    """
    flat = _flat(references)
    if all(parse_boxes(gold) for gold in flat):
        return "iou", "exact_match"
    if has_classes(references) and all(isinstance(r, str) for r in references):
        return "exact_match", MACRO_F1
    numbers = all(parse_number(gold) is not None for gold in flat)
    return "exact_match", "relaxed_accuracy" if numbers else "token_f1"


def has_classes(references: Sequence[Gold]) -> bool:
    """Whether the gold answers are few names that come again and again: 2 to 50, each twice on
    average; boxes never are.
    """
    flat = _flat(references)
    few = 2 <= len(_distinct(flat)) <= min(_MOST_LABELS, len(references) // 2)
    return few and not all(parse_boxes(gold) for gold in flat)


def _flat(references: Sequence[Gold]) -> list[str]:
    return [gold for reference in references for gold in ([reference] if isinstance(reference, str) else reference)]


def _distinct(texts: Sequence[str]) -> list[str]:
    """Each answer once, in the spelling and at the place where it first appears."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(normalise_answer(text), text)
    return list(first.values())


def _check(predictions: Sequence[str], references: Sequence[Gold]) -> None:
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            say(
                f"predictions ({len(predictions)}) must be as many as references ({len(references)}) and "
                "at least one; give one a row",
                f"预测（{len(predictions)} 个）须与参考答案（{len(references)} 个）一样多且至少一个；请每行给一个",
            )
        )
