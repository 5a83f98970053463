"""The critic's loss and what a round says of it, against the published values; however a window or
a round is cut.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from conftest import GOLDEN
from support.thread_ranks import on_ranks

from ernie_tune.objectives import advantages as adv
from ernie_tune.objectives.policy import KlControl
from ernie_tune.train.critic import RoundOfCritic, ValueObjective, ValueScale

ORACLE = json.loads((GOLDEN / "online" / "oracle.json").read_text(encoding="utf-8"))
IN, OUT = ORACLE["inputs"], ORACLE["outputs"]["ppo"]
MASK, LENGTH = np.array(IN["mask"], bool), np.array(IN["lengths"])
CANDIDATE = np.repeat(np.arange(len(LENGTH)), LENGTH)


def flat(padded: Any) -> np.ndarray:
    return np.array(padded, np.float64)[MASK]


OLD, NEW, RETURN = flat(IN["values_old"]), flat(IN["values_new"]), flat(OUT["returns_lam0.95"])


@pytest.mark.parametrize("cuts", [(), (5,), (5, 17)])
def test_the_loss_of_a_window_is_the_oracles_however_it_is_cut(cuts: tuple[int, ...]) -> None:
    """Value, gradient and, with the policy's, the total; what does not count has no part."""
    objective = ValueObjective(0.1, 0.2)
    columns = {"value_N": OLD, "return_N": RETURN, "keep_N": np.ones(len(OLD))}
    parts = [
        dict(zip(columns, one, strict=True)) for one in zip(*(np.split(v, cuts) for v in columns.values()), strict=True)
    ]
    extra = {name: np.array([99.0, -99.0]) for name in ("value_N", "return_N")} | {"keep_N": np.zeros(2)}
    parts[-1] = {name: np.concatenate([parts[-1][name], extra[name]]) for name in columns}
    window = [SimpleNamespace(columns=part) for part in parts]
    assert objective.begin(objective.counts(window)) == 1.0
    x = paddle.to_tensor(np.concatenate([NEW, [3.0, 4.0]]), dtype="float64", stop_gradient=False)
    values = paddle.split(x, [len(part["keep_N"]) for part in parts])
    outs = [objective.loss({"value_N": v}, batch) for v, batch in zip(values, window, strict=True)]  # type: ignore[arg-type]
    total = sum(out.total for out in outs)
    assert float(total) == pytest.approx(0.1 * OUT["value_loss"], abs=1e-9)
    assert float(total) + OUT["policy_loss"] == pytest.approx(OUT["total"], abs=1e-9)
    total.backward()
    np.testing.assert_allclose(x.grad.numpy()[:-2], 0.1 * flat(OUT["d_value_loss_d_value"]), atol=1e-9)
    assert not x.grad.numpy()[-2:].any()
    over, count = np.sum([out.metrics["critic/vf_clipfrac"] for out in outs], axis=0)
    assert over / count == pytest.approx(OUT["value_clip_fraction"], abs=1e-9)


def groups(answers: range) -> list[Any]:
    """The oracle's answers as groups of one; the last of all counts for nothing."""
    reward = np.array(IN["rewards"], np.float64)
    whitened = flat(OUT["whitened_lam0.95"])
    made = []
    for c in answers:
        at = c == CANDIDATE
        columns = {
            "value_N": OLD[at], "return_N": RETURN[at], "advantage_N": whitened[at],
            "old_logp_N": flat(IN["lp_old"])[at], "ref_logp_N": flat(IN["lp_ref"])[at], "keep_N": np.ones(at.sum()),
        }  # fmt: skip
        made.append(
            SimpleNamespace(
                columns=columns, reward_G=reward[c : c + 1], counts_G=np.ones(1), length_G=LENGTH[c : c + 1]
            )
        )
    if len(LENGTH) - 1 in answers:
        idle = {name: np.full(2, 1e6) for name in made[0].columns} | {"keep_N": np.zeros(2)}
        made.append(
            SimpleNamespace(columns=idle, reward_G=np.array([np.nan]), counts_G=np.zeros(1), length_G=np.array([2]))
        )
    return made


def test_a_round_says_the_same_on_one_and_two_ranks() -> None:
    """Means, extremes, explained variance, KL and the penalty's next coefficient; an answer that
    does not count is in none of them.
    """
    told = RoundOfCritic(KlControl(0.05, 0.1, 1000), lambda value: [value])
    whole = told.look(groups(range(len(LENGTH))))
    assert whole["critic/vf_explained_var"] == pytest.approx(OUT["explained_variance"], abs=1e-9)
    assert whole["critic/score/mean"] == pytest.approx(np.mean(IN["rewards"]))
    assert (whole["critic/values/min"], whole["critic/values/max"]) == (OLD.min(), OLD.max())
    kl_C = np.bincount(CANDIDATE, flat(IN["lp_old"]) - flat(IN["lp_ref"]))
    assert whole["objective/kl"] == pytest.approx(kl_C.mean(), abs=1e-12)
    assert whole["critic/rewards/mean"] == pytest.approx(np.mean(IN["rewards"] - 0.05 * kl_C), abs=1e-12)
    step = np.clip(kl_C.mean() / 0.1 - 1, -0.2, 0.2) * len(LENGTH) / 1000
    assert told.control.coef == pytest.approx(0.05 * (1 + step), abs=1e-15)
    assert whole["objective/kl_coef"] == 0.05  # what the rewards of the round were made with

    def rank(ranks: Any) -> tuple[dict[str, float], float]:
        mine = RoundOfCritic(KlControl(0.05, 0.1, 1000), ranks.gather)
        return mine.look(groups(range(5) if ranks.rank == 0 else range(5, len(LENGTH)))), mine.control.coef

    for said, coef in on_ranks(2, rank):
        assert said == pytest.approx(whole, abs=1e-12)
        assert coef == pytest.approx(told.control.coef, abs=1e-15)
    again = RoundOfCritic(KlControl(0.05), lambda value: [value])
    again.load_state_dict(json.loads(json.dumps(told.state_dict())))
    assert again.control.coef == told.control.coef


def one_rank(value: Any) -> list[Any]:
    return [value]


def test_the_unit_of_values_is_that_of_all_returns_so_far() -> None:
    scale = ValueScale()
    assert scale.unit == (0.0, 1.0)
    rounds = np.split(RETURN, [7, 20])
    for k, some in enumerate(rounds):
        before = scale.unit
        scale.take(some, one_rank)
        seen = np.concatenate(rounds[: k + 1])
        assert scale.unit == pytest.approx((seen.mean(), seen.std()), abs=1e-12)
        assert scale.noted == before
    np.testing.assert_allclose(scale.real(np.array([-1.0, 0.0])), [RETURN.mean() - RETURN.std(), RETURN.mean()])
    again = ValueScale()
    again.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    assert (again.unit, again.noted) == (scale.unit, scale.noted)
    alike = ValueScale()
    alike.take(np.full(5, 0.3), one_rank)
    assert alike.unit == pytest.approx((0.3, 1.0))

    def rank(ranks: Any) -> tuple[float, float]:
        mine = ValueScale()
        mine.take(RETURN[:9] if ranks.rank == 0 else RETURN[9:], ranks.gather)
        return mine.unit

    assert on_ranks(2, rank)[1] == pytest.approx((RETURN.mean(), RETURN.std()), abs=1e-12)


def test_a_critic_in_units_has_the_loss_of_one_in_rewards_that_are_standardised() -> None:
    """What the head said and is to say, clipped there: the published loss of rewards that had mean
    0 and deviation 1 from the start. Rewards a hundred times as large change nothing."""
    outs = []
    for factor, shift in ((1.0, 0.0), (100.0, 7.0)):
        scale = ValueScale()
        returns = factor * RETURN + shift
        scale.take(returns - factor, one_rank)  # a round before
        said = (NEW - 0.5, OLD - 0.5)
        noted = scale.real(said[1])
        scale.take(returns, one_rank)
        objective, batch = (
            ValueObjective(0.1, 0.2, scale),
            SimpleNamespace(columns={"value_N": noted, "return_N": returns, "keep_N": np.ones(len(OLD))}),
        )
        objective.begin(objective.counts([batch]))  # type: ignore[list-item]
        outs.append(float(objective.loss({"value_N": paddle.to_tensor(said[0])}, batch).total))  # type: ignore[arg-type]
        mean, spread = scale.unit
        plain = ValueObjective(0.1, 0.2)
        batch.columns |= {"value_N": said[1], "return_N": (returns - mean) / spread}
        plain.begin(plain.counts([batch]))  # type: ignore[list-item]
        assert outs[-1] == pytest.approx(
            float(plain.loss({"value_N": paddle.to_tensor(said[0])}, batch).total),
            abs=1e-12,  # type: ignore[arg-type]
        )
    assert outs[0] == pytest.approx(outs[1], abs=1e-9)


def test_values_that_have_not_moved_are_not_counted_as_clipped() -> None:
    """What was noted in another unit comes back but for rounding."""
    scale = ValueScale()
    scale.take(np.array([0.3, 0.7, 0.35]), one_rank)
    said = np.random.default_rng(0).standard_normal(200)
    noted = scale.real(said)
    scale.take(noted + 0.1, one_rank)
    objective = ValueObjective(0.1, 0.2, scale)
    batch = SimpleNamespace(columns={"value_N": noted, "return_N": noted + 0.1, "keep_N": np.ones(200)})
    objective.begin(objective.counts([batch]))  # type: ignore[list-item]
    before, _ = scale.thought(noted, noted)
    assert 0 < np.abs(before - said).max() < 1e-12
    out = objective.loss({"value_N": paddle.to_tensor(said)}, batch)  # type: ignore[arg-type]
    assert out.metrics["critic/vf_clipfrac"][0] == 0


def test_whitening_each_rank_by_itself_is_another_advantage() -> None:
    """What must not happen: the published advantages are whitened over all tokens."""
    rough = flat(OUT["advantage_lam0.95"])
    cut = int(LENGTH[:5].sum())
    apart = np.concatenate([adv.whiten(rough[:cut]), adv.whiten(rough[cut:])])
    assert np.abs(apart - flat(OUT["whitened_lam0.95"])).max() > 0.1

    def rank(ranks: Any) -> np.ndarray:
        own = rough[:cut] if ranks.rank == 0 else rough[cut:]
        return adv.whiten(own, lambda sums: np.sum(ranks.gather(sums), axis=0))

    np.testing.assert_allclose(np.concatenate(on_ranks(2, rank)), flat(OUT["whitened_lam0.95"]), atol=1e-9)
