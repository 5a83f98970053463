"""Evidence in the picture against the outside oracle and closed forms, and what must not pay."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN

from ernie_tune.data.records import Record, Reward, Verifier
from ernie_tune.rewards import evidence as ev
from ernie_tune.rewards.evidence import Claim, grounded, judge_claim, read_claims
from ernie_tune.rewards.functions import Answered, Called
from ernie_tune.rewards.rubric import RowVerifiers
from ernie_tune.rewards.scores import Box

E = json.loads((GOLDEN / "online" / "oracle.json").read_text(encoding="utf-8"))["outputs"]["evidence"]
INPUTS = json.loads((GOLDEN / "online" / "oracle.json").read_text(encoding="utf-8"))["inputs"]


def test_grounded_claims() -> None:
    given = E["d1_inputs"]
    found = grounded([(v, q) for v, q in given["claims_verdict_iou"]], given["required"])
    assert found.score == pytest.approx(E["d1_f"])
    assert found.contradicted == pytest.approx(E["d1_contradicted"])
    assert (found.precision, found.recall) == (pytest.approx(E["d1_precision"]), pytest.approx(E["d1_recall"]))
    assert grounded([], 3).score == 0


def test_repeats_and_surplus_do_not_pay() -> None:
    one = Claim("exists", "red circle", box=(0, 0, 10, 10))
    same = Claim("exists", "Red Circle ", box=(0, 0, 10, 10))
    honest = grounded([(1, 0.8)], 2, [one])
    assert grounded([(1, 0.8)] * 1000, 2, [same] * 1000) == honest
    many = [Claim("exists", f"thing {i}") for i in range(1000)]
    assert grounded([(1, 0.1)] * 1000, 2, many).precision <= 0.11
    wrong = grounded([(1, 0.8), (-1, 0.0)], 2, [one, Claim("exists", "blue square")])
    assert wrong.score < honest.score
    assert wrong.contradicted == 0.5


SCENE = {
    "objects": [
        {"colour": "red", "shape": "circle", "box": [10, 10, 30, 30]},
        {"colour": "blue", "shape": "square", "box": [60, 60, 80, 80]},
        {"colour": "red", "shape": "square", "box": [60, 10, 80, 30]},
    ],
    "chart": {"q1": 10, "q2": 30, "q3": 20},
    "ocr": [{"text": "TOTAL 12.50", "box": [0, 90, 50, 99]}],
}


@pytest.mark.parametrize(("claim", "verdict", "quality"), [
    (Claim("exists", "red circle", box=(10, 10, 30, 30)), 1, 1.0),
    (Claim("exists", "red circles", box=(10, 10, 30, 20)), 1, 0.5),
    (Claim("exists", "red circle"), 1, 0.0),  # supported, but nobody knows where
    (Claim("exists", "red circle", box=(0, 0, 100, 100)), 1, 0.0),  # the whole picture
    (Claim("exists", "green circle", box=(10, 10, 30, 30)), -1, 0.0),
    (Claim("attribute", "circle", "red", box=(10, 10, 30, 30)), 1, 1.0),
    (Claim("attribute", "circle", "blue", box=(10, 10, 30, 30)), -1, 0.0),
    (Claim("count", "square", 2), 1, 1.0),
    (Claim("count", "squares", "3"), -1, 1.0),
    (Claim("count", "square", "many"), 0, 1.0),
    (Claim("relation", "circle", "left_of", "blue square", (10, 10, 30, 30)), 1, 1.0),
    (Claim("relation", "circle", "below", "blue square", (10, 10, 30, 30)), -1, 1.0),
    (Claim("relation", "circle", "near", "blue square"), 0, 0.0),
    (Claim("relation", "circle", "above", "triangle"), -1, 0.0),
    (Claim("ocr", "total 12.50", box=(0, 90, 50, 99)), 1, 1.0),
    (Claim("ocr", "total 99.50"), -1, 0.0),
    (Claim("chart_value", "q2", 30), 1, 0.0),
    (Claim("chart_value", "q2", 31), -1, 0.0),
    (Claim("chart_value", "q9", 31), -1, 0.0),
    (Claim("chart_extreme", "q2", "max"), 1, 1.0),
    (Claim("chart_extreme", "q3", "argmax"), -1, 1.0),
    (Claim("chart_extreme", "q2", "nicest"), 0, 1.0),
    (Claim("chart_compare", "q2", "greater", "q3"), 1, 1.0),
    (Claim("chart_compare", "q1", ">", "q3"), -1, 1.0),
    (Claim("chart_compare", "q1", ">", "q7"), -1, 1.0),
    (Claim("beautiful", "picture"), 0, 0.0),
    (Claim("exists", ""), -1, 0.0),
])  # fmt: skip
def test_claims_against_a_scene(claim: Claim, verdict: int, quality: float) -> None:
    assert judge_claim(claim, SCENE) == (verdict, pytest.approx(quality))


def test_claims_without_an_annotation_cannot_be_told() -> None:
    assert judge_claim(Claim("chart_extreme", "q2", "max"), {})[0] == 0
    assert judge_claim(Claim("attribute", "circle", "red"), {})[0] == 0


def test_the_block_is_read_strictly() -> None:
    text = 'so <evidence>[{"type": "exists", "subj": "red circle", "box": [1, 2, 3, 4]}]</evidence> 3'
    assert read_claims(text) == [Claim("exists", "red circle", box=(1, 2, 3, 4))]
    for bad in (
        "",
        "<evidence>",
        "<evidence>[1]</evidence>",
        "<evidence>{}</evidence>",
        text * 2,
        "<evidence>[" + "[" * 9999 + "</evidence>",
    ):
        assert read_claims(bad) is None, bad[:40]
    assert read_claims('<evidence>[{"type": "exists", "box": ["a", 1, 2, 3]}]</evidence>') == [Claim("exists")]


def test_answers_follow_from_what_was_claimed() -> None:
    claims = [Claim("chart_value", "q1", 10), Claim("chart_value", "q2", "30"), Claim("chart_value", "q3", "much")]
    assert ev.follows(claims, "argmax(chart_value)", "Q2.")
    assert not ev.follows(claims, "argmax(chart_value)", "q1")
    assert ev.follows(claims, "argmin(chart_value)", "q1")
    assert ev.follows([Claim("exists", "a"), Claim("exists", "b"), Claim("exists", "A ")], "count(exists)", "2")
    assert not ev.follows([], "argmax(chart_value)", "q1")
    with pytest.raises(ValueError, match=r"answer_from \('mean'\) must be argmax"):
        ev.follows(claims, "mean", "q1")


def test_twins() -> None:
    for name, (a, b) in {"both": (1, 1), "only_original": (1, 0), "only_twin": (0, 1), "none": (0, 0)}.items():
        assert ev.twin_rewards([a], [b]) == [pytest.approx(E[f"d2_{name}"])]
    golds, twins = ["a", "b", "c", "d"], ["b", "c", "d", "a"]
    assert ev.blind_ceiling(golds, twins) == pytest.approx(E["d2_blind_ceiling_uniform_4"]["pair_reward"])
    assert ev.blind_ceiling(["a"], ["a"]) == 1
    assert ev.blind_ceiling([], []) == 0


def test_dependence_on_the_picture() -> None:
    assert ev.dependence(INPUTS["lp_image"], INPUTS["lp_blind"]) == pytest.approx(E["d3_reward_c2"])
    assert ev.dependence([-5.0], [-1.0]) == 0
    assert ev.dependence([], []) == 0


def test_boxes_that_are_needed_and_enough() -> None:
    assert ev.box_evidence(-0.1, -2.3, -0.2, 0.08) == pytest.approx(E["d4_good"])
    assert ev.box_evidence(-0.1, -2.3, -0.1, 1.0) == pytest.approx(E["d4_whole_picture"])
    assert ev.box_evidence(-0.1, -0.15, -2.4, 0.08) == pytest.approx(E["d4_wrong_place"])
    assert ev.box_evidence(-0.1, -1.3, -0.6, 0.2) == pytest.approx(E["d4_half"])


def zoomed(target: Box, right: int, shown: list[Box]) -> float | None:
    """What a row earns that asks for the answer, its form and a look at the target."""
    checks = (Verifier("exact", 0.8), Verifier("format", 0.1, {"mode": "nothink"}), Verifier("zoom", 0.1))
    record = Record(
        "verifiable",
        ({"role": "user", "content": "what?"},),
        reward=Reward("x", checks, scene={"target": list(target)}),
    )
    calls = tuple(Called("zoom", box, shown=box, size=(100, 100)) for box in shown)
    ((earned,),) = RowVerifiers()([(record, [Answered("x" if right else "y", calls=calls)])])
    return earned


def test_zooming() -> None:
    target = (20.0, 20.0, 40.0, 40.0)
    crops = {"inside": (10.0, 10.0, 60.0, 60.0), "half": (30.0, 10.0, 60.0, 60.0), "miss": (50.0, 50.0, 60.0, 60.0)}
    for name, wanted in E["d5_cover"].items():
        assert ev.cover(crops[name], target) == pytest.approx(wanted)
    rewards = {
        "right_covered": (1, ["inside"]),
        "right_no_tool": (1, []),
        "right_missed": (1, ["miss"]),
        "wrong_covered": (0, ["inside"]),
    }
    for name, (right, used) in rewards.items():
        assert zoomed(target, right, [crops[u] for u in used]) == pytest.approx(E["d5_reward"][name])
    assert zoomed(target, 1, [(0.0, 0.0, 100.0, 100.0)]) == pytest.approx(0.9), "the whole picture shows nothing"


def test_drawing_again() -> None:
    picture, shifted = np.zeros((4, 4)), np.zeros((4, 4))
    picture[1:3, 1:3] = shifted[1:3, 1:4] = 1
    assert ev.redrawn(picture, picture) == pytest.approx(E["d6_same"])
    assert ev.redrawn(picture, shifted) == pytest.approx(E["d6_shifted"])
    assert ev.redrawn(picture, np.zeros((4, 4))) == pytest.approx(E["d6_empty"])


CLAIMS = [
    {"type": "exists", "subj": "red circle", "box": [10, 10, 30, 30]},
    {"type": "attribute", "subj": "square", "value": "blue", "box": [60, 60, 80, 80]},
]


def block(claims: Any, answer: str = "circle") -> str:
    return f"<evidence>{json.dumps(claims)}</evidence>{answer}"


def earned(text: str, **spec: Any) -> float:
    checks = (Verifier("exact", 0.8), Verifier("evidence", 0.2, spec))
    scene = Reward("circle", checks, {"required": CLAIMS}, SCENE)
    return RowVerifiers()([(Record("verifiable", (), reward=scene), [Answered(text)])])[0][0] or 0.0


def test_evidence_in_the_reward() -> None:
    """0.8 for the answer, 0.2 E beside a right one, less 0.2 of the share of contradicted
    claims."""
    assert earned("circle") == pytest.approx(0.8)
    assert earned(block(CLAIMS)) == pytest.approx(1.0)
    assert earned(block(CLAIMS[:1])) == pytest.approx(0.8 + 0.2 * 2 * 0.5 / 1.5)
    assert earned(block(CLAIMS, "square")) == 0.0
    assert earned(block(CLAIMS, "square"), leak=0.5) == pytest.approx(0.1)
    wrong = [*CLAIMS, {"type": "exists", "subj": "green circle", "box": [0, 0, 9, 9]}]
    found = ev.judge_evidence(block(wrong), None, SCENE, CLAIMS)
    assert (found.precision, found.recall) == (pytest.approx(2 / 3), 1.0)
    assert earned(block(wrong)) == pytest.approx(0.8 + 0.2 * 0.8 - 0.2 / 3)


MUTANTS = {
    "no claims": block([]),
    "the picture exists": block([{"type": "exists", "subj": "picture"}]),
    "claims without a place": block([{k: v for k, v in c.items() if k != "box"} for c in CLAIMS]),
    "the whole picture": block([{**c, "box": [0, 0, 100, 100]} for c in CLAIMS]),
    "corners turned": block([{**c, "box": c["box"][::-1]} for c in CLAIMS]),
    "other true claims": block([{"type": "exists", "subj": "red square", "box": [60, 10, 80, 30]}]),
    "what is not there": block([{**CLAIMS[0], "subj": "yellow circle"}]),
    "in the thought": f"<think>{block(CLAIMS)}</think>circle",
    "never closed": f"<evidence>{json.dumps(CLAIMS)}circle",
    "two blocks": block(CLAIMS, "") + block(CLAIMS),
    "words": "<evidence>I have looked carefully</evidence>circle",
}


@pytest.mark.parametrize("name", MUTANTS)
def test_an_answer_never_profits_from_evidence_that_is_not_there(name: str) -> None:
    assert earned(MUTANTS[name]) <= earned("circle") + 1e-12


def test_repeats_and_surplus_do_not_raise_evidence() -> None:
    once = earned(block(CLAIMS[:1]))
    assert earned(block(CLAIMS[:1] * 500)) == pytest.approx(once)
    surplus = [{"type": "exists", "subj": "square", "box": [60 + i / 100, 60, 80, 80]} for i in range(1000)]
    assert earned(block([*CLAIMS[:1], *surplus])) <= once + 1e-12
    assert earned(block(list(reversed(CLAIMS)))) == earned(block(CLAIMS))  # claims have no order


def test_right_answers_beat_wrong_ones_whatever_their_evidence() -> None:
    lies = [{"type": "exists", "subj": f"green thing {i}"} for i in range(3)]
    worst, best = earned(block(lies)), earned(block(CLAIMS, "square"), leak=0.2)
    assert worst == pytest.approx(0.6)
    assert best == pytest.approx(0.04)
    scene = Reward("x", (Verifier("exact", 0.2), Verifier("evidence", 0.2)), {}, SCENE)
    with pytest.raises(ValueError, match=r"weights of the answer \(0.2\) less contradiction \(0.2\) must be above"):
        RowVerifiers().check(Record("verifiable", (), reward=scene))
    alone = Reward("x", (Verifier("evidence"), Verifier("format", 0.1)), {}, SCENE)
    with pytest.raises(ValueError, match="must hold one that asks whether the answer is right"):
        RowVerifiers().check(Record("verifiable", (), reward=alone))


def test_malformed_answers_earn_nothing_beside_evidence() -> None:
    checks = (Verifier("exact", 0.7), Verifier("evidence", 0.2), Verifier("format", 0.1, {"mode": "think"}))
    row = Record("verifiable", (), reward=Reward("circle", checks, {"required": CLAIMS}, SCENE))
    thought = "<think>hm</think>"
    ((formed, bare),) = RowVerifiers()([(row, [Answered(thought + block(CLAIMS)), Answered(block(CLAIMS))])])
    assert formed == pytest.approx(1.0)
    assert bare == 0.0


def test_a_right_answer_for_another_reason_has_no_evidence() -> None:
    scene = {**SCENE, "boxes": {"q1": [0, 0, 5, 5], "q2": [5, 0, 10, 5]}}
    said = [
        {"type": "chart_value", "subj": q, "value": v, "box": b}
        for q, v, b in (("q1", 10, [0, 0, 5, 5]), ("q2", 30, [5, 0, 10, 5]))
    ]
    judge = lambda claims, answer: ev.judge_evidence(block(claims, answer), answer, scene, said, "argmax(chart_value)")  # noqa: E731
    assert judge(said, "q2").score == 1.0
    assert judge(said, "q1").score == 0.0
    assert judge(said[:1], "q2").score == 0.0  # q1 is the largest of what is stated


@pytest.mark.parametrize("kinds", [2, 3, 4])
def test_who_does_not_look_may_still_gain_by_chance(kinds: int) -> None:
    """All pairs of different golds equally often: answering each as often earns share / K + (1 -
    share) / K^2, one answer share / K."""
    pairs = [(a, b) for a in range(kinds) for b in range(kinds) if a != b]
    golds, twins = [a for a, _ in pairs], [b for _, b in pairs]
    for share in (0.5, 0.2):
        assert ev.blind_reward(golds, twins, share) == pytest.approx(share / kinds + (1 - share) / kinds**2)
        assert ev.blind_ceiling(golds, twins, share) == pytest.approx(share / kinds)
    assert ev.blind_reward([], []) == 0.0
    assert ev.blind_reward(["a"] * 9, ["b"] * 9, 0.0) == pytest.approx(0.25)


def test_the_best_blind_reward_is_no_less_than_any_mixture() -> None:
    rng = np.random.default_rng(0)
    golds, twins = rng.integers(0, 5, 40), rng.integers(0, 5, 40)
    best = ev.blind_reward(golds.tolist(), twins.tolist(), 0.3)
    for _ in range(300):
        p = rng.dirichlet(rng.choice([0.2, 1.0, 5.0], 5))
        assert np.mean(0.3 * (p[golds] + p[twins]) / 2 + 0.7 * p[golds] * p[twins]) <= best + 1e-9
