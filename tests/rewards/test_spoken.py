"""Claims in free text: which sentences make one, in two languages, where they stand, and what they
cost where the picture contradicts them.
"""

from __future__ import annotations

import json

import pytest

from ernie_tune.data.records import Record, Reward, Verifier
from ernie_tune.rewards.evidence import claim_spans, judge_evidence
from ernie_tune.rewards.functions import Answered
from ernie_tune.rewards.rubric import RowVerifiers
from ernie_tune.rewards.spoken import LONGEST, MOST, claims_beside, contradicted_spans, spoken_claims

SCENE = {
    "objects": [
        {"colour": "red", "shape": "circle", "box": [0, 0, 20, 20]},
        {"colour": "blue", "shape": "square", "box": [60, 0, 80, 20]},
        {"colour": "blue", "shape": "square", "box": [60, 60, 80, 80]},
    ],
    "chart": {"red": 10, "green": 30},
}
TRUE = (
    "There is a red circle.", "I count two blue squares.", "The red circle is left of the blue square.",
    "The tallest bar is green.", "green is the highest", "no yellow triangle here", "The circle is red.",
    "图中有红色的圆形。", "有两个蓝色方块。", "红色圆形在蓝色方块的左边。", "最高的柱子是绿色。", "绿色最高", "没有黄色的三角形。", "圆是红色的",
)  # fmt: skip
FALSE = (
    "There is a green circle.", "I count three blue squares.", "The red circle is right of the blue square.",
    "The tallest bar is red.", "red is the highest", "no red circle here", "The circle is blue.",
    "图中有绿色的圆形。", "有三个蓝色方块。", "红色圆形在蓝色方块的右边。", "最高的柱子是红色。", "红色最高", "没有红色的圆形。", "圆是蓝色的",
)  # fmt: skip
NO_CLAIM = (
    "Is there a green circle?", "If a green circle were here, ...", "It is not a green circle.", "maybe a green circle",
    "red", "I look closely at the picture.", "有没有绿色的圆形吗？", "如果有绿色的圆形", "the answer is 3", "hundred circles", "",
)  # fmt: skip


@pytest.mark.parametrize("text", TRUE)
def test_what_is_true_is_read_and_stands(text: str) -> None:
    assert spoken_claims(text)
    assert contradicted_spans(text, SCENE) == []


@pytest.mark.parametrize("text", FALSE)
def test_what_is_false_is_found_where_it_stands(text: str) -> None:
    before = "I look. "
    ((start, end),) = contradicted_spans(before + text, SCENE)
    assert len(before) <= start < end <= len(before + text)
    assert [one.claim for one in spoken_claims((before + text)[start:end])] == [spoken_claims(text)[0].claim]


@pytest.mark.parametrize("text", NO_CLAIM)
def test_what_is_no_claim_is_left_alone(text: str) -> None:
    assert spoken_claims(text) == []


def test_answer_and_thought_apart() -> None:
    text = "<think>a green circle</think>a red circle. a black star"
    read = lambda scope: [one.claim.subject for one in claims_beside(text, scope)]  # noqa: E731
    assert read("thought") == ["green circle"]
    assert read("answer") == ["red circle", "black star"]
    assert read("both") == ["green circle", "red circle", "black star"]
    assert [one.claim.subject for one in claims_beside("<think>a green circle", "thought")] == ["green circle"]
    assert claims_beside("<think>a green circle", "answer") == []
    for one in claims_beside(text):
        assert text[one.start : one.end].split()[-1] in ("circle", "star")


def test_the_block_is_read_as_a_block_alone() -> None:
    claims = [
        {"type": "exists", "subj": "a green circle", "box": [1, 2, 3, 4]},
        {"type": "count", "subj": "square", "value": 2},
    ]
    text = f"x<evidence> {json.dumps(claims)} </evidence>y"
    assert claims_beside(text) == []
    assert [json.loads(text[a:b]) for a, b in claim_spans(text)] == claims
    assert [json.loads(text[a:b]) for a, b in contradicted_spans(text, SCENE)] == claims[:1]
    assert claim_spans("<evidence>[nothing]</evidence>") == []


def test_what_the_thought_gets_wrong_costs_and_what_it_gets_right_earns_nothing() -> None:
    block = '<evidence>[{"type": "exists", "subj": "red circle", "box": [0, 0, 20, 20]}]</evidence>circle'
    checks = (Verifier("exact", 0.8), Verifier("evidence", 0.2))
    row = Record("verifiable", (), reward=Reward("circle", checks, {"required": 1}, SCENE))

    def earned(thought: str, scope: str = "both") -> float:
        return RowVerifiers(evidence_scope=scope)([(row, [Answered(f"<think>{thought}</think>{block}")])])[0][0] or 0.0

    assert earned("hm") == earned("a red circle, two squares") == pytest.approx(1.0)
    assert earned("a green circle") == pytest.approx(1.0 - 0.2 / 2)
    assert earned("a green circle, a green circle") == pytest.approx(1.0 - 0.2 / 2)  # said twice, wrong once
    assert earned("a green circle", "answer") == pytest.approx(1.0)
    assert earned("a green circle", "thought") == pytest.approx(1.0 - 0.2 / 2)
    alone = judge_evidence("circle", None, SCENE, beside=[one.claim for one in spoken_claims("a green circle")])
    assert (alone.score, alone.contradicted) == (0.0, 1.0)


def test_long_texts_are_read_as_far_as_they_go() -> None:
    assert len(spoken_claims("a red circle. " * 1000)) == MOST
    assert claims_beside(" " * LONGEST + "a red circle") == []
