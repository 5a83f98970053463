"""What of the published values no other test asks for: groups without spread, who an off-policy
mask keeps, twins, PAPO's distance and its gradient, attention over a shared prompt.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest
from conftest import GOLDEN

from ernie_tune.models import mkl
from ernie_tune.models.segments import SegmentCache
from ernie_tune.objectives import advantages as adv
from ernie_tune.objectives.perception import Perception, perception_term
from ernie_tune.objectives.policy import PolicyHyper, Sampled, kl_estimate, policy_terms
from ernie_tune.rewards.evidence import twin_rewards
from ernie_tune.rewards.scores import iou

ORACLE = json.loads((GOLDEN / "online" / "oracle.json").read_text(encoding="utf-8"))
IN, OUT = ORACLE["inputs"], ORACLE["outputs"]
MASK, LENGTH = np.array(IN["mask"], bool), np.array(IN["lengths"])
CANDIDATE = np.repeat(np.arange(len(LENGTH)), LENGTH)
REWARD = np.array(IN["rewards"])
TIGHT = 1e-9


def flat(name: str) -> np.ndarray:
    return np.array(IN[name], np.float64)[MASK]


def test_groups_without_spread_teach_nothing() -> None:
    wanted, prompts = OUT["groups"], IN["prompts"]
    flat_C = adv.no_spread(REWARD, np.repeat(np.arange(prompts), IN["G"]))
    assert (~flat_C.reshape(prompts, -1)[:, 0]).tolist() == wanted["dapo_keep"]
    assert flat_C.mean() == pytest.approx(wanted["zero_std_fraction"], abs=TIGHT)
    assert REWARD.mean() == pytest.approx(wanted["reward_mean"], abs=TIGHT)
    assert adv.deviation(REWARD, adv.alone) == pytest.approx(wanted["reward_std"], abs=TIGHT)


def test_the_off_policy_mask_keeps_whom_it_should() -> None:
    """An answer that is left out has no gradient in any token, one that is kept has."""
    x = paddle.to_tensor(flat("lp_new"), dtype="float64", stop_gradient=False)
    advantage = np.array(OUT["advantages"]["grpo_eps1e-4"])
    batch = Sampled(x, advantage[CANDIDATE], CANDIDATE, LENGTH, flat("lp_old"))
    hyper = replace(PolicyHyper(max_completion_length=IN["L_max"]), loss_type="grpo", off_policy_mask_threshold=0.05)
    policy_terms(batch, hyper)["pg"].total.backward()
    moved_C = np.bincount(CANDIDATE, np.abs(x.grad.numpy())) > 0
    kept_C = np.array(OUT["offpolicy"]["kept"]) > 0
    assert not moved_C[~kept_C].any()
    assert moved_C[kept_C & (advantage != 0)].all()
    assert not kept_C.all()


def test_how_far_the_policy_went() -> None:
    new, old = flat("lp_new"), flat("lp_old")
    k1 = kl_estimate(paddle.to_tensor(old), paddle.to_tensor(new), "k1")
    assert float(k1.mean()) == pytest.approx(OUT["ppo"]["ppo_kl"], abs=TIGHT)


@pytest.mark.parametrize(("name", "own", "other"), [
    ("d2_both", 1.0, 1.0), ("d2_only_original", 1.0, 0.0), ("d2_only_twin", 0.0, 1.0), ("d2_none", 0.0, 0.0),
])  # fmt: skip
def test_twins(name: str, own: float, other: float) -> None:
    assert twin_rewards([own], [other]) == pytest.approx([OUT["evidence"][name]], abs=TIGHT)


def test_the_distance_from_the_same_answer_without_the_picture() -> None:
    seen, blind = (np.array(IN[name]) for name in ("lp_image", "lp_blind"))
    at = np.concatenate([np.arange(4) + 4, np.full(4, -1)])
    for cap, name in ((1e6, "d3_k3"), (1.0, "d3_k3_clipped_e1")):
        x = paddle.to_tensor(np.concatenate([seen, blind]), stop_gradient=False)
        out = perception_term(x, None, at, Perception(coef=1.0, cap=cap))
        assert -float(out.total) / out.count == pytest.approx(OUT["evidence"][name], abs=TIGHT)
        if name == "d3_k3":
            (-out.total / out.count).backward()
            wanted = [*OUT["evidence"]["d3_dk3_dlp_img"], *OUT["evidence"]["d3_dk3_dlp_blind"]]
            np.testing.assert_allclose(x.grad.numpy(), wanted, atol=TIGHT)


def test_boxes_that_overlap_by_a_quarter_each() -> None:
    assert iou((0, 0, 10, 10), (5, 5, 15, 15)) == pytest.approx(OUT["evidence"]["iou"], abs=TIGHT)


@pytest.mark.skipif(not mkl.usable("float64"), reason="needs Paddle's math library for x86")
def test_attention_over_a_shared_prompt_and_a_rows_own_tokens() -> None:
    """The merged attention of both parts is that of all tokens together."""

    def heads(name: str) -> Any:
        return paddle.to_tensor(np.array(IN[name], np.float64).reshape(-1, 1, 2))

    cache = SegmentCache(1)
    keys, values = heads("merge_k_prefix"), heads("merge_v_prefix")
    cache.fill(0, keys, values, (0, keys.shape[0]))
    query = paddle.to_tensor(np.array(IN["merge_q"], np.float64).reshape(1, 1, 2))
    own_keys, own_values = heads("merge_k_own"), heads("merge_v_own")
    for t in range(own_keys.shape[0]):
        out = cache.attend(0, query, own_keys[t : t + 1], own_values[t : t + 1])
        cache.advance()
    np.testing.assert_allclose(out.numpy().reshape(-1), OUT["rollout"]["merged"], atol=TIGHT)
