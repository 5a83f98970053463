"""One step of UPO on sampled answers: its terms alone are the policy's loss and DPO's to the last
bit, gradients as well; the pairs' weight is what it is said to be.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import paddle
import pytest
from support.tiny_runs import IMAGES, processor

from ernie_tune.data.records import Meta, Record, Reward
from ernie_tune.data.units import UnitBatch, collate_units
from ernie_tune.generate.batch import Completion, Prompt
from ernie_tune.machine.alone import forward_loss
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.presets import preset
from ernie_tune.objectives.online_pairs import PairRule
from ernie_tune.objectives.policy import PolicyHyper
from ernie_tune.objectives.preference import PreferenceHyper
from ernie_tune.objectives.upo import UpoSettings
from ernie_tune.rewards.functions import RewardFunction
from ernie_tune.rewards.rubric import Rubric
from ernie_tune.train.policy import PolicyObjective
from ernie_tune.train.preference import PairObjective
from ernie_tune.train.rollouts import Rollouts, RolloutSettings
from ernie_tune.train.upo import SHARE, OnlineUpoObjective, PairTerm, sampled_pairs

PROCESSOR = processor()
BETA = 0.1
STOP = PROCESSOR.stop_ids[0]
# Answers of two prompts by their ids, the third of the first cut off; rewards are their first id's.
ANSWERS = (((7, 9, STOP), (5, STOP), (8, 4, 4), (2, 3, 3, STOP)), ((6, STOP), (6, STOP), (1, 2, STOP), (9, 9, STOP)))


def model() -> ErnieModel:
    paddle.seed(5)
    return ErnieModel(preset("tiny-a"))


def sampler(prompts: Any) -> dict[int, list[Completion]]:
    out = {}
    for prompt in prompts:
        assert isinstance(prompt, Prompt)
        made = []
        for ids in ANSWERS[prompt.key % 2]:
            ended = "stop" if ids[-1] == STOP else "length"
            made.append(Completion(list(ids), [-2.0 - i / 7 for i in ids], ended, [True] * len(ids)))
        out[prompt.key] = made
    return out


def first(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [ids[0] / 10 for ids in completion_ids]


def batch(of: ErnieModel | None = None, groups_per_batch: int = 2, **settings: Any) -> list[UnitBatch]:
    """Two prompts, one with a picture, with what a policy said before and what a reference says."""
    records = [
        Record("verifiable", ({"role": "user", "content": words},), images, reward=Reward("1"), meta=Meta("x", i + 1))
        for i, (words, images) in enumerate((("<image>look", (str(IMAGES / "0000.png"),)), ("say", ())))
    ]
    s = RolloutSettings(prompts=2, num_generations=4, groups_per_batch=groups_per_batch, **settings)

    def known(group: Any) -> None:
        for one in group:
            one.columns["may_win_C"] = np.array([a.finished for a in one.answers], np.float64)
            one.columns["ref_logp_N"] = one.columns["old_logp_N"] - 0.3 * np.cos(
                np.arange(len(one.columns["old_logp_N"]))
            )

    rollouts = Rollouts(s, records, PROCESSOR, sampler, Rubric([RewardFunction(first)]), finish=[known])
    return next(rollouts.windows())


def policy(**hyper: Any) -> PolicyObjective:
    tokens = PROCESSOR.tokens
    return PolicyObjective(PolicyHyper(**hyper), tokens.placeholders() + tokens.markers(), log_entropy=True)


def pair(rule: PairRule | None = None, weight: float | None = 1.0, kappa: int = 0) -> PairTerm:
    settings = UpoSettings(weights={"pair": 1.0}, hyper=PreferenceHyper(beta=BETA), kappa=kappa)
    return PairTerm(rule or PairRule("all_pairs", min_gap=0.05, max_pairs=9), settings, weight)


def step(objective: Any, window: list[UnitBatch]) -> tuple[float, dict[str, np.ndarray], dict[str, Any]]:
    """(loss, gradient of every parameter, metrics) of a window."""
    made = model()
    divisor = objective.begin(objective.counts(window))
    loss, metrics = 0.0, {}
    for one in window:
        out = forward_loss(objective, made, one)
        (out.total / divisor).backward()
        loss += float(out.total) / divisor
        metrics.update(out.metrics)
    return loss, {n: p.grad.numpy() for n, p in made.named_parameters() if p.grad is not None}, metrics


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        np.testing.assert_array_equal(grad, other[1][name], err_msg=name)


@pytest.mark.parametrize("hyper", [{"loss_type": "dapo"}, {"loss_type": "gspo"}, {"loss_type": "cispo"}])
def test_without_pairs_it_is_the_policys_loss(hyper: dict[str, Any]) -> None:
    window = batch()
    alone = step(policy(**hyper), window)
    assert_same(step(OnlineUpoObjective(policy(**hyper), {"pg": 1.0, "pair": 0.0}, pair()), window), alone)
    both = step(OnlineUpoObjective(policy(**hyper), {"pg": 1.0, "pair": 1.0}, pair()), window)
    assert both[0] != alone[0]


def test_without_a_policy_gradient_it_is_dpo_on_the_pairs() -> None:
    window = batch()
    ours = OnlineUpoObjective(policy(), {"pg": 0.0, "pair": 1.0}, pair())
    pairs = sampled_pairs(window[0], pair().rule)
    found = list(zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True))
    assert set(found) == {(0, 1), (0, 3), (1, 3), (4, 6), (5, 6), (7, 4), (7, 5), (7, 6)}, (
        "a cut answer is never better"
    )

    class Dpo(PairObjective):
        """DPO, which takes all comparisons of a row, on the same units as rows of pairs."""

        outputs = PolicyObjective.outputs  # over the same support
        banned, temperature, rewards_entropy, log_entropy = ours.policy.banned, 1.0, False, True

    def judged(number: int) -> Any:
        unit = window[0].units[number]
        first_C = int(window[0].first_candidate_U[number])
        of_unit = tuple((b - first_C, w - first_C) for b, w in found if 0 <= b - first_C < unit.num_candidates)
        row = dataclasses.replace(unit, signal="pair")
        vars(row)["edges"] = of_unit  # what the row's judgements would imply
        return row

    rows = collate_units([judged(0), judged(1)], PROCESSOR)
    dpo = step(
        Dpo({"sigmoid": 1.0}, PreferenceHyper(beta=BETA)),
        [rows.with_columns(ref_logp_N=window[0].columns["ref_logp_N"])],
    )
    assert_same(step(ours, window), dpo)


def test_a_window_may_be_cut_anywhere() -> None:
    """In one micro-batch or two: the same loss and gradient, with the weight that a window's
    answers decide.
    """
    for weight in (1.0, None):
        whole, parts = batch(), batch(groups_per_batch=1)
        assert (len(whole), len(parts)) == (1, 2)
        one, two = (
            step(OnlineUpoObjective(policy(), {"pg": 1.0, "pair": 1.0}, pair(weight=weight)), window)
            for window in (whole, parts)
        )
        assert one[0] == pytest.approx(two[0], rel=1e-5)
        for name, grad in one[1].items():
            np.testing.assert_allclose(grad, two[1][name], rtol=1e-3, atol=1e-6, err_msg=name)


def terms(objective: OnlineUpoObjective, window: list[UnitBatch]) -> tuple[np.ndarray, np.ndarray]:
    """|d pg / d log pi| of every token, and |d pair / d log pi|, weights included, where policy and
    reference are what was sampled.
    """
    known = window[0].with_columns(ref_logp_N=window[0].columns["old_logp_N"])
    out = []
    for kept in ("pg", "pair"):
        logp_N = paddle.to_tensor(known.columns["old_logp_N"].astype(np.float64), stop_gradient=False)
        mine = OnlineUpoObjective(
            objective.policy, {**objective.term_weights, kept: objective.term_weights[kept]}, objective.pair
        )
        mine.begin(mine.counts([known]))
        mine.term_weights["pg" if kept == "pair" else "pair"] = 0.0
        if kept == "pg":
            mine.pair = None
        mine.loss({"logp_N": logp_N}, known).total.backward()
        out.append(np.abs(logp_N.grad.numpy()))
    return out[0], out[1]


@pytest.mark.parametrize("hyper", [{"loss_agg": agg} for agg in ("seq_mean", "token", "fixed", "seq_sum")])
@pytest.mark.parametrize("kappa", [0, 1])
def test_the_pairs_pull_a_fifth_as_hard_with_auto(hyper: dict[str, Any], kappa: int) -> None:
    """Answers that are in one pair each, so that no pull cancels another: the mean over answers of
    a token's gradient.
    """
    window = batch()
    objective = OnlineUpoObjective(policy(**hyper), {"pg": 1.0, "pair": 1.0}, pair(PairRule(), None, kappa))
    pg_N, pair_N = terms(objective, window)
    ends = np.cumsum(window[0].length_C) - 1  # one token of each answer
    paired = pair_N[ends] > 0
    assert paired.sum() == 4
    assert pair_N[ends][paired].mean() == pytest.approx(SHARE * pg_N[ends].mean(), rel=1e-6)


def test_two_answers_of_the_books_example() -> None:
    """G = 2, advantages of half, sums over tokens, beta 0.1: a fifth of the policy gradient's pull
    is weight 1 (0.2 / (2 beta)).
    """
    window = batch()
    one = window[0]
    advantage_N = np.where(one.candidate_N % 2 == 0, 0.5, -0.5)
    objective = OnlineUpoObjective(policy(loss_agg="seq_sum"), {"pg": 1.0, "pair": 1.0}, pair(PairRule(), None))
    counts = objective.counts([one.with_columns(advantage_N=advantage_N)])
    # the window has four answers a prompt, the example two
    objective.begin(counts)
    assert objective.pair_weight == pytest.approx(0.2 / (2 * BETA) / 2)


def test_what_is_told() -> None:
    metrics = step(OnlineUpoObjective(policy(), {"pg": 1.0, "pair": 0.5}, pair(PairRule())), batch())[2]
    assert metrics["upo/pair/weight"] == (0.5, 1.0)
    assert metrics["upo/pair/count"] == (2.0, 1.0)
    assert metrics["upo/pairs_per_group"] == (2.0, 2.0)
    assert metrics["upo/pair_gap"] == (pytest.approx((0.7 - 0.2) + (0.9 - 0.1)), 2.0)
    shares = [metrics[f"upo/{name}/grad_share"] for name in ("pg", "pair")]
    assert shares[0][1] == shares[1][1] == pytest.approx(shares[0][0] + shares[1][0])
    assert min(shares[0][0], shares[1][0]) > 0


def test_pairs_are_not_made_of_equal_tokens_or_of_answers_without_a_reward() -> None:
    one = batch()[0]
    rule = PairRule("all_pairs", min_gap=1e-6, max_pairs=99)
    score_C = np.concatenate([unit.score_C for unit in one.units])
    for unit in one.units:
        unit.score_C[:] = [0.1, 0.9, np.nan, 0.5] if unit is one.units[1] else unit.score_C
    pairs = sampled_pairs(one, rule)
    of_second = [(b, w) for b, w in zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True) if b >= 4]
    assert set(of_second) == {(5, 7), (7, 4)}, "5 and 4 are the same answer, 6 has no reward"
    assert len(score_C) == 8
