"""Evidence in the picture against the outside oracle and closed forms, and what must not pay."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import GOLDEN

from ernie_tune.rewards import evidence as ev
from ernie_tune.rewards.evidence import Claim, grounded, judge_claim, read_claims

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
        found = ev.zoom_reward(right, 1.0, [crops[u] for u in used], target, 100 * 100)
        assert found == pytest.approx(E["d5_reward"][name])
    assert ev.zoom_reward(1, 1.0, [(0.0, 0.0, 100.0, 100.0)], target, 100 * 100) == pytest.approx(0.9)


def test_drawing_again() -> None:
    picture, shifted = np.zeros((4, 4)), np.zeros((4, 4))
    picture[1:3, 1:3] = shifted[1:3, 1:4] = 1
    assert ev.redrawn(picture, picture) == pytest.approx(E["d6_same"])
    assert ev.redrawn(picture, shifted) == pytest.approx(E["d6_shifted"])
    assert ev.redrawn(picture, np.zeros((4, 4))) == pytest.approx(E["d6_empty"])
