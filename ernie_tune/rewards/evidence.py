"""Whether an answer rests on the picture: claims with boxes, edited twins, dependence on the
picture, zooming, drawing it again.

Numbers, strings and annotations in, scores on [0, 1] out. Evidence never pays for what is not
there: claims repeated or in surplus earn nothing, a box much larger than its object earns nothing,
no evidence at all is 0.
Legend: verdicts are +1 supported, -1 contradicted, 0 cannot be told. Refuses to know: models,
    pixels of files, how scores are weighed.
Sources: DeFacto (arXiv 2509.20912), PAPO (2507.06448), DeepEyes (2505.14362).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.rewards.reading import MAX_TEXT, fold, squash, without_thought
from ernie_tune.rewards.scores import Box, iou

TYPES = ("exists", "attribute", "count", "relation", "ocr", "chart_value", "chart_extreme", "chart_compare", "bbox")
PLACELESS = ("count", "chart_extreme", "chart_compare")
RELATIONS = ("left_of", "right_of", "above", "below")
_OPEN, _CLOSE = "<evidence>", "</evidence>"
_MAX_BLOCK = 1 << 16
LARGEST_BOX = 4.0  # times its object
SPARE = 2  # claims beyond twice the required ones that are still counted


@dataclass(frozen=True)
class Claim:
    """One statement about the picture, as a model writes it in the evidence block."""

    type: str
    subject: str = ""
    value: Any = None
    other: str = ""
    box: Box | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes two claims the same."""
        return self.type, squash(fold(self.subject)), squash(fold(str(self.value))), squash(fold(self.other))


def claim_spans(text: str) -> list[tuple[int, int]]:
    """Where each claim of the only evidence block stands in the text, [start, end), in the order of
    `read_claims`; none where that reads nothing.
    """
    if not read_claims(text):
        return []
    at, spans, decoder = text.index(_OPEN) + len(_OPEN), [], json.JSONDecoder()
    end = text.index(_CLOSE)
    while (start := text.find("{", at, end)) >= 0:
        _, at = decoder.raw_decode(text, start)
        spans.append((start, at))
    return spans


def read_claims(text: str) -> list[Claim] | None:
    """The claims of the only <evidence>[…]</evidence> block; None where there is none, several, or
    no list of objects in it.
    """
    if len(text) > MAX_TEXT or text.count(_OPEN) != 1 or text.count(_CLOSE) != 1:
        return None
    block = text.partition(_OPEN)[2].partition(_CLOSE)[0]
    if len(block) > _MAX_BLOCK:
        return None
    try:
        items = json.loads(block)
    except (ValueError, RecursionError):
        return None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return None
    return [_claim(item) for item in items]


def _claim(item: Mapping[str, Any]) -> Claim:
    corners = item.get("box")
    box = None
    if isinstance(corners, list) and len(corners) == 4 and all(isinstance(x, int | float) for x in corners):
        box = (float(corners[0]), float(corners[1]), float(corners[2]), float(corners[3]))
    text = lambda *names: next((str(item[n]) for n in names if item.get(n) is not None), "")  # noqa: E731
    value = next((item[n] for n in ("value", "pred") if item.get(n) is not None), None)
    return Claim(text("type"), text("subj", "subject"), value, text("obj", "object", "other"), box)


# --- against an annotated scene -------------------------------------------------------------------
# scene: {"objects": [{"name", "colour", "shape", "box", …}], "chart": {label: number}, "ocr":
# [{"text", "box"}]}


def judge_claim(claim: Claim, scene: Mapping[str, Any]) -> tuple[int, float]:
    """(verdict, quality of its box) of one claim by the picture's annotation.

    The quality is the IoU with the annotated box of what is spoken of, 1 for claims without a
    place, 0 for a box that is missing or more than LARGEST_BOX times too large.
    """
    if claim.type not in TYPES:
        return 0, 0.0
    if claim.type.startswith("chart"):
        return _chart_verdict(claim, scene.get("chart") or {}), 1.0 if claim.type in PLACELESS else _placed(
            claim, (scene.get("boxes") or {}).get(claim.subject)
        )
    objects = list(scene.get("ocr") or ()) if claim.type == "ocr" else list(scene.get("objects") or ())
    named = [o for o in objects if _is_called(o, claim.subject, claim.type)]
    if claim.type == "count":
        return _equal(len(named), claim.value), 1.0
    if claim.type == "relation":
        others = [o for o in objects if _is_called(o, claim.other, claim.type)]
        return _relation_verdict(str(claim.value), named, others), max(
            (_placed(claim, o.get("box")) for o in named), default=0.0
        )
    if not named:
        return -1 if objects or claim.type in ("exists", "ocr", "bbox") else 0, 0.0
    if claim.type == "attribute":
        named = [o for o in named if squash(str(claim.value)) in {squash(str(v)) for k, v in o.items() if k != "box"}]
        if not named:
            return -1, 0.0
    return 1, max(_placed(claim, o.get("box")) for o in named)


def _is_called(thing: Mapping[str, Any], name: str, kind: str) -> bool:
    """Whether the words of `name` are all among what the annotation says of the thing: "red circle"
    of {colour: red, shape: circle}.
    """
    if kind == "ocr":
        return squash(fold(str(thing.get("text", "")))) == squash(fold(name))
    words = {word for key, value in thing.items() if key != "box" for word in str(value).casefold().split()}
    asked = fold(name).casefold().split()
    return bool(asked) and all(word in words or word.rstrip("s") in words for word in asked)


def _placed(claim: Claim, box: Any) -> float:
    if claim.box is None or box is None:
        return 0.0
    there = (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
    return iou(claim.box, there) if box_area(claim.box) <= LARGEST_BOX * box_area(there) else 0.0


def box_area(box: Box) -> float:
    """Of what it holds, 0 for corners in the wrong order."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _equal(number: float, value: Any) -> int:
    try:
        return 1 if float(value) == number else -1
    except (TypeError, ValueError):
        return 0


def _chart_verdict(claim: Claim, chart: Mapping[str, float]) -> int:
    if claim.type == "chart_value":
        return _equal(chart[claim.subject], claim.value) if claim.subject in chart else -1 if chart else 0
    if not chart:
        return 0
    if claim.type == "chart_extreme":
        pick = {"max": max, "argmax": max, "highest": max, "min": min, "argmin": min, "lowest": min}.get(
            str(claim.value)
        )
        return 0 if pick is None else 1 if claim.subject == pick(chart, key=lambda k: chart[k]) else -1
    if claim.subject not in chart or claim.other not in chart:
        return -1
    signs = {"greater": 1, "more": 1, ">": 1, "less": -1, "fewer": -1, "<": -1, "equal": 0, "=": 0}
    wanted = signs.get(str(claim.value))
    return 0 if wanted is None else 1 if np.sign(chart[claim.subject] - chart[claim.other]) == wanted else -1


def _relation_verdict(relation: str, named: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> int:
    if relation not in RELATIONS:
        return 0
    if not named or not others:
        return -1
    axis, before = (0, relation == "left_of") if relation in ("left_of", "right_of") else (1, relation == "above")
    middle = lambda o: (o["box"][axis] + o["box"][axis + 2]) / 2  # noqa: E731
    return 1 if any((middle(a) < middle(b)) == before and middle(a) != middle(b) for a in named for b in others) else -1


# --- D1: grounded claims --------------------------------------------------------------------------


@dataclass(frozen=True)
class Grounded:
    """`score` E of the claims, the share of them that the picture contradicts, and E's two
    halves.
    """

    score: float
    contradicted: float
    precision: float
    recall: float
    count: int = 0  # claims that are told apart


def grounded(verdicts: Sequence[tuple[int, float]], required: int, claims: Sequence[Claim] = ()) -> Grounded:
    """E = 2 p q / (p + q): p = sum of box qualities of supported claims over supported +
    contradicted ones, q = the same sum over `required` (at most 1).

    With `claims` only distinct ones count, at most 2 required + SPARE; the surplus cannot be told.
    No claims: 0.
    """
    kept: list[tuple[int, float]] = []
    seen: set[tuple[str, ...]] = set()
    for i, (verdict, quality) in enumerate(verdicts):
        if claims:
            if claims[i].key in seen:
                continue
            seen.add(claims[i].key)
        kept.append((verdict, quality) if not claims or len(kept) < 2 * required + SPARE else (0, 0.0))
    supported = sum(v > 0 for v, _ in kept)
    against = sum(v < 0 for v, _ in kept)
    total = sum(quality for v, quality in kept if v > 0)
    p = total / (supported + against) if supported + against else 0.0
    q = min(1.0, total / max(required, 1))
    return Grounded(2 * p * q / (p + q) if p + q else 0.0, against / max(len(kept), 1), p, q, len(kept))


@dataclass(frozen=True)
class Judged:
    """What the evidence of one answer is worth: `score` E, the shares of its claims that the
    picture contradicts and that nobody can tell, E's two halves.
    """

    score: float
    contradicted: float
    unverifiable: float
    precision: float
    recall: float


NOTHING_SAID = Judged(0.0, 0.0, 0.0, 0.0, 0.0)


def without_evidence(text: str) -> str:
    """The text without its evidence block; the text itself where the block is not closed."""
    before, opened, rest = text.partition(_OPEN)
    _, closed, after = rest.partition(_CLOSE)
    return before + after if opened and closed else text


def answer_part(text: str) -> str:
    """What scores judge: the text without its evidence block; the whole of a text that has nothing
    beside it.
    """
    rest = without_evidence(text).strip()
    return rest or text


def judge_evidence(
    text: str,
    answer: str | None,
    scene: Mapping[str, Any],
    required: Sequence[Mapping[str, Any]] | int = 1,
    answer_from: str = "",
    beside: Sequence[Claim] = (),
) -> Judged:
    """The claims of an answer's evidence block against the scene (`grounded`). `beside`: what the
    text claims elsewhere, which earns nothing and may be contradicted.

    `required`: the claims that prove the answer, of which only those that are stated count as
    found; or how many there must be. `answer_from`: the rule by which `answer` follows from what is
    *stated*; a right answer for another reason has no evidence. Nothing in a block that cannot be
    read, or in a thought, is evidence. Raises ValueError for another rule.
    """
    after = without_thought(text)
    claims = (read_claims(after) if after is not None else None) or []
    others = [judge_claim(claim, scene)[0] for claim in {claim.key: claim for claim in beside}.values()]
    if not claims and not others:
        return NOTHING_SAID
    verdicts = [judge_claim(claim, scene) for claim in claims]
    listed = None if isinstance(required, int) else [_claim(item).key for item in required]
    found = grounded(verdicts, max(1, required if isinstance(required, int) else len(required)), claims)
    recall = found.recall
    if listed is not None:
        proofs = [0.0] * len(listed)
        for claim, (verdict, quality) in zip(claims, verdicts, strict=True):
            if verdict > 0 and claim.key in listed:
                at = listed.index(claim.key)
                proofs[at] = max(proofs[at], quality)
        recall = min(recall, sum(proofs) / max(1, len(listed)))
    p, score = found.precision, 0.0
    if p + recall and not (answer_from and not (answer is not None and follows(claims, answer_from, answer))):
        score = 2 * p * recall / (p + recall)
    every = [*(verdict for verdict, _ in verdicts), *others]
    unknown = sum(verdict == 0 for verdict in every) / len(every)
    against = found.contradicted * found.count + sum(verdict < 0 for verdict in others)
    return Judged(score, against / max(found.count + len(others), 1), unknown, p, recall)


def follows(claims: Sequence[Claim], rule: str, answer: str) -> bool:
    """Whether the answer is what `rule` gives of the *stated* claims: "argmax(chart_value)",
    "argmin(chart_value)", "count(exists)". Raises ValueError for another rule: a right answer for a
    wrong reason earns no evidence.
    """
    values = {c.subject: float(c.value) for c in claims if c.type == "chart_value" and _equal(0, c.value)}
    if rule in ("argmax(chart_value)", "argmin(chart_value)"):
        pick = max if "max" in rule else min
        return bool(values) and squash(fold(answer)) == squash(fold(pick(values, key=lambda k: values[k])))
    if rule == "count(exists)":
        return squash(fold(answer)) == str(len({c.key for c in claims if c.type == "exists"}))
    raise ValueError(
        say(
            f"answer_from ({rule!r}) must be argmax(chart_value), argmin(chart_value) or count(exists); correct "
            "the row",
            f"answer_from（{rule!r}）须为 argmax(chart_value)、argmin(chart_value) 或 count(exists)；请改正该行",
        )
    )


# --- D2 to D6 -------------------------------------------------------------------------------------


def twin_rewards(scores: Sequence[float], twin_scores: Sequence[float], share: float = 0.5) -> list[float]:
    """a (share + (1 - share) mean of the twin's scores) for each answer to the picture: who does
    not look is right on one of the two only.
    """
    mean = float(np.mean(twin_scores)) if len(twin_scores) else 0.0
    return [score * (share + (1 - share) * mean) for score in scores]


def blind_ceiling(golds: Sequence[Any], twin_golds: Sequence[Any], share: float = 0.5) -> float:
    """The best mean reward on pairs of twins of a policy that sees no picture: one constant answer,
    right on one twin of a pair at most.
    """
    pairs = list(zip(map(str, golds), map(str, twin_golds), strict=True))
    if not pairs:
        return 0.0
    said = {gold for pair in pairs for gold in pair}
    best = max(
        np.mean(
            [
                np.mean([(a == s) * (share + (1 - share) * (b == s)), (b == s) * (share + (1 - share) * (a == s))])
                for a, b in pairs
            ]
        )
        for s in said
    )
    return float(best)


def blind_reward(golds: Sequence[Any], twin_golds: Sequence[Any], share: float = 0.5, rounds: int = 2000) -> float:
    """The best mean reward on pairs of twins of a policy that sees no picture and may draw its
    answers by chance (`blind_ceiling`: of one constant answer).

    The reward of answering g with probability p_g is share sum f_g p_g + (1 - share) sum M_gh p_g
    p_h, with f the golds' frequencies and M those of the twins' pairs. M's diagonal is 0, so chance
    may beat every constant answer. Found by replicator steps from the middle and from each corner,
    which never lower it: the best local maximum.
    """
    pairs = list(zip(map(str, golds), map(str, twin_golds), strict=True))
    names = sorted({gold for pair in pairs for gold in pair})
    if not pairs:
        return 0.0
    place = {name: i for i, name in enumerate(names)}
    both_KK = np.zeros((len(names), len(names)))
    for a, b in pairs:
        both_KK[place[a], place[b]] += 0.5 / len(pairs)
        both_KK[place[b], place[a]] += 0.5 / len(pairs)
    seen_K = both_KK.sum(1)
    best = 0.0
    for start in [None, *range(len(names))]:
        p_K = np.full(len(names), 1 / len(names))
        if start is not None:
            p_K = 0.1 * p_K + 0.9 * np.eye(len(names))[start]
        for _ in range(rounds):
            fitness_K = share * seen_K + 2 * (1 - share) * both_KK @ p_K
            p_K = p_K * fitness_K / max(float(p_K @ fitness_K), 1e-300)
        best = max(best, float(share * seen_K @ p_K + (1 - share) * p_K @ both_KK @ p_K))
    return best


def dependence(logp_seen: Sequence[float], logp_blind: Sequence[float], scale: float = 2.0) -> float:
    """clip(mean over the answer's tokens of log p(with picture) - log p(without), 0, scale) /
    scale, in nats.
    """
    return float(np.clip(np.mean(np.subtract(logp_seen, logp_blind)) / scale, 0, 1)) if len(logp_seen) else 0.0


def box_evidence(
    full: float, without_box: float, only_box: float, area: float, scale: float = 2.0, largest: float = 0.5
) -> float:
    """How much a cited box is what the answer needs: (need) (enough) (tight) from the answer's mean
    log-probability with the whole picture, without the box and with the box alone; `area`: the
    box's share of the picture, free up to .05, worthless at `largest`.
    """
    need = np.clip((full - without_box) / scale, 0, 1)
    enough = 1 - np.clip((full - only_box) / scale, 0, 1)
    tight = np.clip(1 - max(0.0, area - 0.05) / (largest - 0.05), 0, 1)
    return float(need * enough * tight)


def cover(crop: Box, target: Box) -> float:
    """The share of the target that lies in the crop."""
    width, height = min(crop[2], target[2]) - max(crop[0], target[0]), min(crop[3], target[3]) - max(crop[1], target[1])
    return max(0.0, width) * max(0.0, height) / box_area(target) if box_area(target) else 0.0


def redrawn(picture: np.ndarray, drawing: np.ndarray, background: np.ndarray | float = 0.0) -> float:
    """1 - sum |I - D| / sum max(|I - bg|, |D - bg|): 1 for the same picture, 0 for an empty
    drawing. Arrays of one shape.
    """
    scale = np.maximum(np.abs(picture - background), np.abs(drawing - background)).sum()
    return float(1 - np.abs(picture - drawing).sum() / scale) if scale else 1.0
