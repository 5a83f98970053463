"""Policy losses, advantages, corrections and the critic against values of another implementation
(`golden/online/oracle.json`, which TRL 1.16 and verl 0.8 confirm): values and gradients in float64.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest
from conftest import GOLDEN

from ernie_tune.objectives import advantages as adv
from ernie_tune.objectives.correction import correction, mismatch_metrics, mismatch_sums
from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.policy import (
    SURROGATES,
    EntropyControl,
    KlControl,
    PolicyHyper,
    Sampled,
    high_entropy,
    kl_estimate,
    policy_counts,
    policy_terms,
)
from ernie_tune.objectives.value import value_loss

ORACLE = json.loads((GOLDEN / "online" / "oracle.json").read_text(encoding="utf-8"))
IN, OUT = ORACLE["inputs"], ORACLE["outputs"]
MASK = np.array(IN["mask"], bool)
LENGTH = np.array(IN["lengths"])
CANDIDATE = np.repeat(np.arange(len(LENGTH)), LENGTH)
GROUP = np.repeat(np.arange(IN["prompts"]), IN["G"])
REWARD, SECOND = np.array(IN["rewards"]), np.array(IN["rewards_second"])
A = OUT["advantages"]
TIGHT = 1e-9


def flat(padded: Any) -> np.ndarray:
    """[C, T] of the oracle -> [N] of its tokens."""
    return np.array(padded, np.float64)[MASK]


NEW, OLD, ROLL, REF = (flat(IN[name]) for name in ("lp_new", "lp_old", "lp_roll", "lp_ref"))


def sampled(advantage: Any, **more: Any) -> tuple[paddle.Tensor, Sampled]:
    """The oracle's batch with a per-answer or per-token advantage."""
    advantage = np.asarray(advantage, np.float64)
    advantage_N = advantage[CANDIDATE] if advantage.shape == LENGTH.shape else flat(advantage)
    x = paddle.to_tensor(more.pop("new", NEW), dtype="float64", stop_gradient=False)
    return x, Sampled(x, advantage_N, CANDIDATE, LENGTH, more.pop("old", OLD), **more)


def close(name: str, out: LossOut, x: paddle.Tensor | None = None) -> None:
    assert float(out.total) / out.count == pytest.approx(OUT["losses"][name], abs=TIGHT)
    if x is not None:
        (out.total / out.count).backward()
        np.testing.assert_allclose(x.grad.numpy(), flat(OUT["gradients"][name]), atol=TIGHT)


H = PolicyHyper(max_completion_length=IN["L_max"])
CASES = {
    "grpo": replace(H, loss_type="grpo"),
    "dapo": replace(H, loss_type="dapo"),
    "dr_grpo": replace(H, loss_type="dr_grpo"),
    "seq_sum": replace(H, loss_type="grpo", loss_agg="seq_sum"),
    "grpo_delta1.3": replace(H, loss_type="grpo", delta=1.3),
    "cispo_5": replace(H, loss_type="cispo", cispo_cap=5.0),
    "cispo_1.28": replace(H, loss_type="cispo", cispo_cap=1.28),
    "sapo": replace(H, loss_type="sapo"),
    "gspo_.2_.28": replace(H, loss_type="gspo"),
    "gspo_3e-4_4e-4": replace(H, loss_type="gspo", epsilon=3e-4, epsilon_high=4e-4),
    "luspo": replace(H, loss_type="luspo"),
    "gmpo_.4": replace(H, loss_type="gmpo", epsilon=0.4, epsilon_high=0.4),
    "vespo": replace(H, loss_type="vespo"),
    "grpo_offpolicy_mask.05": replace(H, loss_type="grpo", off_policy_mask_threshold=0.05),
}


@pytest.mark.parametrize("name", CASES)
def test_losses(name: str) -> None:
    x, batch = sampled(A["grpo_eps1e-4"])
    close(name, policy_terms(batch, CASES[name])["pg"], x)


def test_losses_with_other_advantages() -> None:
    x, batch = sampled(A["rloo"])
    close("rloo_clip.2", policy_terms(batch, replace(H, loss_type="rloo", epsilon_high=0.2))["pg"], x)
    x, batch = sampled(A["rloo"])
    close("rloo_reinforce", policy_terms(batch, replace(H, loss_type="reinforce"))["pg"], x)
    x, batch = sampled(OUT["reinforce_pp"]["advantage"])
    close("reinforce_pp", policy_terms(batch, replace(H, loss_type="ppo", epsilon_high=0.2))["pg"], x)
    _, batch = sampled(A["dr_grpo"])
    close("dr_grpo_with_dr_advantage", policy_terms(batch, replace(H, loss_type="dr_grpo"))["pg"])
    shift = 1.2 * (np.array(A["grpo_eps1e-4"])[CANDIDATE] < 0)
    _, batch = sampled(A["grpo_eps1e-4"], new=NEW + shift)
    close("ppo_dual_clip3_shifted", policy_terms(batch, replace(H, loss_type="ppo", dual_clip=3.0))["pg"])


def test_gspo_token_is_gspo_where_an_answers_tokens_share_their_advantage() -> None:
    results = []
    for name in ("gspo", "gspo_token"):
        x, batch = sampled(A["grpo_eps1e-4"])
        out = policy_terms(batch, replace(H, loss_type=name))["pg"]
        out.total.backward()
        results.append((float(out.total), x.grad.numpy()))
    assert results[0][0] == pytest.approx(results[1][0], abs=TIGHT)
    np.testing.assert_allclose(results[0][1], results[1][1], atol=TIGHT)


CORRECTIONS = {
    "tis_token_2": ("tis_token", None, 2.0),
    "token_mask_.5_2": ("icepop", 0.5, 2.0),
    "icepop_.5_5": ("icepop", None, None),
    "sequence_truncate_3": ("tis_sequence", None, None),
    "sequence_mask_3": ("mask_sequence", None, None),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrected_losses(name: str) -> None:
    mode, low, high = CORRECTIONS[name]
    weight = correction(OLD, ROLL, CANDIDATE, mode, low, high)
    expected = np.array(OUT["mismatch"][name])
    np.testing.assert_allclose(weight, expected[CANDIDATE] if expected.ndim == 1 else flat(expected), atol=TIGHT)
    x, batch = sampled(A["grpo_eps1e-4"], weight_N=weight)
    close(f"grpo_{name}", policy_terms(batch, CASES["grpo"])["pg"], x)


def test_corrections_of_whole_answers() -> None:
    weight = correction(OLD, ROLL, CANDIDATE, "geometric")
    np.testing.assert_allclose(weight, np.array(OUT["mismatch"]["geometric_mask_.8_1.25"])[CANDIDATE], atol=TIGHT)
    x, batch = sampled(A["grpo_eps1e-4"], weight_N=correction(OLD, ROLL, CANDIDATE, "geometric", 0.5, 5.0))
    close("gspo_icepop_sequence", policy_terms(batch, CASES["gspo_.2_.28"])["pg"])
    x, batch = sampled(A["grpo_eps1e-4"], weight_N=correction(OLD, ROLL, CANDIDATE, "icepop"))
    close("mixed_icepop", policy_terms(batch, replace(H, loss_type="gspo_token"))["pg"], x)
    np.testing.assert_array_equal(correction(OLD, ROLL, CANDIDATE, "none"), 1)


def test_bad_corrections() -> None:
    with pytest.raises(ValueError, match=r"rollout_is \('tis'\) must be one of none, tis_token"):
        correction(OLD, ROLL, CANDIDATE, "tis")
    with pytest.raises(ValueError, match=r"rollout_is_min \(5\) must be below rollout_is_max \(2\)"):
        correction(OLD, ROLL, CANDIDATE, "icepop", 5.0, 2.0)


def test_mismatch_metrics() -> None:
    halves = [slice(0, LENGTH[:5].sum()), slice(LENGTH[:5].sum(), None)]
    parts = [mismatch_sums(OLD[h], ROLL[h], CANDIDATE[h]) for h in halves]
    sums = {k: (max if k == "max_abs" else sum)(p[k] for p in parts) for k in parts[0]}
    assert sums == pytest.approx(mismatch_sums(OLD, ROLL, CANDIDATE), abs=1e-12)
    found, wanted = mismatch_metrics(sums), OUT["mismatch"]
    names = (
        "kl",
        "k3_kl",
        "training_ppl",
        "rollout_ppl",
        "log_ppl_diff",
        "log_ppl_abs_diff",
        "chi2_token",
        "chi2_seq",
        "max_abs_dlp",
    )
    for name in names:
        assert found[f"mismatch/{name}"] == pytest.approx(wanted[name], abs=TIGHT), name
    assert found["mismatch/ess"] == pytest.approx(wanted["ess_token"], abs=TIGHT)
    assert mismatch_metrics(mismatch_sums(np.zeros(0), np.zeros(0), np.zeros(0, int)))["mismatch/kl"] == 0


@pytest.mark.parametrize(("kind", "name"), [("k3", "grpo_k3_beta.04"), ("k3_is", "grpo_k3is_beta.04")])
def test_penalties(kind: str, name: str) -> None:
    x, batch = sampled(A["grpo_eps1e-4"], ref_logp_N=REF)
    terms = policy_terms(batch, replace(CASES["grpo"], kl_type=kind), kl=True)
    assert terms["kl"].count == terms["pg"].count
    close(name, LossOut(terms["pg"].total + 0.04 * terms["kl"].total, terms["pg"].count), x)
    total, count = terms["kl"].metrics["kl"]
    assert total / count == pytest.approx(OUT["kl"]["k3" if kind == "k3" else "k3_bias_corrected"], abs=TIGHT)


def test_kl_estimates() -> None:
    new, ref = (paddle.to_tensor(v, dtype="float64") for v in (NEW, REF))
    for kind in ("k1", "k2", "k3"):
        assert float(kl_estimate(new, ref, kind).mean()) == pytest.approx(OUT["kl"][kind], abs=TIGHT)
    with pytest.raises(ValueError, match=r"kl_type \('kl'\) must be one of k1, k2, k3, k3_is"):
        kl_estimate(new, ref, "kl")
    far = kl_estimate(paddle.to_tensor([0.0]), paddle.to_tensor([500.0]), "k3")
    assert np.isfinite(far.numpy()).all()


def test_clip_metrics() -> None:
    _, batch = sampled(A["grpo_eps1e-4"])
    metrics = policy_terms(batch, CASES["grpo"])["pg"].metrics
    for name in ("low_mean", "high_mean", "region_mean"):
        total, count = metrics[f"clip_ratio/{name}"]
        assert total / count == pytest.approx(OUT["clip"][name], abs=TIGHT)
    total, count = metrics["approx_kl"]
    assert total / count == pytest.approx(OUT["ppo"]["approx_kl"], abs=TIGHT)
    assert "cispo_clip_ratio" in policy_terms(batch, CASES["cispo_5"])["pg"].metrics


@pytest.mark.parametrize("name", [n for n in CASES if n != "gspo_3e-4_4e-4"])
def test_a_window_is_the_same_however_it_is_cut(name: str) -> None:
    """Two micro-batches against one, over the counts of both; an answer that does not count is in
    neither.
    """
    keep = np.ones(len(LENGTH))
    keep[[1, 7]] = 0
    x, whole = sampled(A["grpo_eps1e-4"], keep_C=keep)
    out = policy_terms(whole, CASES[name])["pg"]
    (out.total / out.count).backward()
    count = sum(policy_counts(LENGTH[p], keep[p], CASES[name]) for p in (slice(0, 5), slice(5, None)))
    assert count == out.count
    total, grads = 0.0, []
    for part in (slice(0, 5), slice(5, None)):
        own = np.isin(CANDIDATE, np.arange(len(LENGTH))[part])
        y = paddle.to_tensor(NEW[own], dtype="float64", stop_gradient=False)
        advantage = np.array(A["grpo_eps1e-4"])[CANDIDATE[own]]
        candidate = CANDIDATE[own] - CANDIDATE[own].min()
        piece = policy_terms(Sampled(y, advantage, candidate, LENGTH[part], OLD[own], keep_C=keep[part]), CASES[name])[
            "pg"
        ]
        (piece.total / count).backward()
        total += float(piece.total) / count
        grads.append(y.grad.numpy())
    assert total == pytest.approx(float(out.total) / out.count, abs=1e-12)
    np.testing.assert_allclose(np.concatenate(grads), x.grad.numpy(), atol=1e-12)
    assert not x.grad.numpy()[np.isin(CANDIDATE, [1, 7])].any()


def test_likelihood_weighed_by_advantage() -> None:
    """AWR, eq. 9 of arXiv 1910.00177: -min(e^(A / tau), cap) log pi, whatever was said before."""
    advantage = np.array(A["grpo_eps1e-4"])
    x, batch = sampled(advantage)
    out = policy_terms(batch, replace(H, loss_type="awr", awr_temperature=0.5, awr_cap=3.0))["pg"]
    weight = np.minimum(np.exp(advantage / 0.5), 3.0)
    assert (weight == 3.0).any()
    assert (weight < 1).any()
    wanted = -(weight[CANDIDATE] * NEW / LENGTH[CANDIDATE]).sum() / len(LENGTH)
    assert float(out.total) / out.count == pytest.approx(wanted, abs=TIGHT)
    (out.total / out.count).backward()
    np.testing.assert_allclose(x.grad.numpy(), -(weight / LENGTH / len(LENGTH))[CANDIDATE], atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(SURROGATES) - {"awr"}))
def test_without_an_old_policy_the_ratio_is_one_and_the_gradient_is_reinforce(name: str) -> None:
    x, batch = sampled(A["grpo_eps1e-4"], old=None)
    out = policy_terms(batch, replace(H, loss_type=name))["pg"]
    (out.total / out.count).backward()
    y, batch = sampled(A["grpo_eps1e-4"])
    plain = policy_terms(batch, replace(H, loss_type="reinforce", loss_agg=SURROGATES[name].aggregation))["pg"]
    (plain.total / plain.count).backward()
    scale = LENGTH[CANDIDATE] if name == "rloo" else 1.0  # its ratio is the whole answer's product
    np.testing.assert_allclose(x.grad.numpy(), y.grad.numpy() * scale, atol=1e-12)


def test_a_micro_batch_without_answers_still_walks_backward() -> None:
    x = paddle.to_tensor(np.zeros(0), dtype="float64", stop_gradient=False)
    none = np.zeros(0, np.int64)
    for name in SURROGATES:
        out = policy_terms(Sampled(x, np.zeros(0), none, none), replace(H, loss_type=name))["pg"]
        assert (float(out.total), out.count) == (0.0, 0.0)
        out.total.backward()


def test_entropy() -> None:
    entropy = flat(IN["entropy"])
    keep = high_entropy(entropy, 0.2)
    quantile, number = OUT["shaping"]["entropy_keep_top20"]
    assert keep.sum() == number
    assert entropy[keep > 0].min() >= quantile
    assert high_entropy(entropy, 1.0).all()
    with pytest.raises(ValueError, match=r"top_entropy_quantile \(0\) must lie in \(0, 1\]"):
        high_entropy(entropy, 0.0)
    h = paddle.to_tensor(entropy, dtype="float64", stop_gradient=False)
    _, batch = sampled(A["grpo_eps1e-4"], entropy_N=h)
    terms = policy_terms(batch, CASES["dapo"], entropy=True)
    assert float(terms["ent"].total) / terms["ent"].count == pytest.approx(-entropy.mean(), abs=TIGHT)
    total, count = terms["pg"].metrics["entropy"]
    assert total / count == pytest.approx(entropy.mean(), abs=TIGHT)


def test_controllers() -> None:
    control = KlControl(0.05, target=0.1)
    assert [control.step(kl, 256) for kl in (0.02, 0.1, 0.4)] == pytest.approx(OUT["ppo"]["adaptive_beta"], abs=TIGHT)
    fixed = KlControl(0.05)
    assert fixed.step(9.0, 256) == 0.05
    entropy = EntropyControl(0.0, adaptive=True)
    assert [entropy.step(e) for e in (0.1, 0.1, 0.3, 0.3, 0.3)] == pytest.approx([0.005, 0.01, 0.005, 0, 0])
    assert EntropyControl(0.3).step(0.0) == 0.3


@pytest.mark.parametrize(("name", "made"), [
    ("grpo_eps1e-4", lambda: adv.group_relative(REWARD, GROUP)),
    ("grpo_eps1e-6", lambda: adv.group_relative(REWARD, GROUP, epsilon=1e-6)),
    ("batch_std_eps1e-4", lambda: adv.group_relative(REWARD, GROUP, "batch")),
    ("dr_grpo", lambda: adv.group_relative(REWARD, GROUP, "none")),
    ("rloo", lambda: adv.leave_one_out(REWARD, GROUP)),
    ("max_rl", lambda: adv.mean_relative(REWARD, GROUP)),
    ("gdpo_w1_.5", lambda: adv.normalise_then_sum(np.stack([REWARD, SECOND], 1), np.array([1, 0.5]), GROUP)),
    ("sum_then_norm_w1_.5", lambda: adv.group_relative(adv.weighted_sum(np.stack([REWARD, SECOND], 1), np.array([1, 0.5])), GROUP)),
])  # fmt: skip
def test_advantages(name: str, made: Any) -> None:
    np.testing.assert_allclose(made(), A[name], atol=TIGHT)


def test_an_answer_without_a_reward_is_left_out() -> None:
    reward = REWARD.copy()
    reward[1] = np.nan
    np.testing.assert_allclose(adv.group_relative(reward, GROUP), A["grpo_with_none_at_1"], atol=TIGHT)
    for function in (adv.leave_one_out, adv.mean_relative):
        assert function(reward, GROUP)[1] == 0
        others = np.delete(np.arange(len(REWARD)), 1)
        np.testing.assert_allclose(function(reward, GROUP)[others], function(reward[others], GROUP[others]), atol=1e-12)
    both = np.stack([reward, SECOND], 1)
    assert adv.weighted_sum(both, np.array([1.0, 0.5]))[1] == pytest.approx(0.5 * SECOND[1])
    both[1, 1] = np.nan
    assert np.isnan(adv.weighted_sum(both, np.array([1.0, 0.5]))[1])


def test_equal_rewards_give_exactly_nothing() -> None:
    """0.1 added three times is not 0.3: without care a group of equal rewards would learn from
    rounding.
    """
    reward, group = np.full(7, 0.1), np.zeros(7, int)
    for made in (adv.group_relative(reward, group), adv.leave_one_out(reward, group), adv.mean_relative(reward, group)):
        np.testing.assert_array_equal(made, 0.0)
    with pytest.raises(ValueError, match=r"scale_rewards \('std'\) must be one of group, batch, none"):
        adv.group_relative(reward, group, "std")


def test_what_spans_ranks_does_not_depend_on_them() -> None:
    """Two ranks, each with its part of the groups, exchange nothing but sums."""
    parts = [slice(0, 8), slice(8, None)]

    def over(values: list[Any], function: Any) -> list[np.ndarray]:
        asked: list[list[np.ndarray]] = [[], []]
        while True:
            answers, done = [], []
            for i, value in enumerate(values):
                known = iter(asked[i])

                def total(sums: np.ndarray, known: Any = known) -> np.ndarray:
                    found = next(known, None)
                    if found is None:
                        raise StopAsyncIteration(sums)
                    return found

                try:
                    done.append(function(value, total))
                except StopAsyncIteration as waiting:
                    answers.append(waiting.args[0])
            if not answers:
                return done
            for known_sums in asked:
                known_sums.append(sum(answers))

    batch = over([(REWARD[p], GROUP[p]) for p in parts], lambda v, total: adv.group_relative(*v, "batch", total=total))
    np.testing.assert_allclose(np.concatenate(batch), A["batch_std_eps1e-4"], atol=TIGHT)
    pp = OUT["reinforce_pp"]
    togo = flat(pp["return_to_go"])
    white = over([togo[:20], togo[20:]], lambda v, total: adv.whiten(v, total))
    np.testing.assert_allclose(np.concatenate(white), flat(pp["advantage"]), atol=TIGHT)


def test_token_rewards_and_returns() -> None:
    pp = OUT["reinforce_pp"]
    reward = adv.token_rewards(REWARD, CANDIDATE, OLD - REF, 0.05)
    np.testing.assert_allclose(reward, flat(pp["token_reward"]), atol=TIGHT)
    np.testing.assert_allclose(adv.returns_to_go(reward, CANDIDATE), flat(pp["return_to_go"]), atol=TIGHT)
    base = adv.group_relative(REWARD, GROUP, "none")[CANDIDATE]
    np.testing.assert_allclose(adv.whiten(base), flat(pp["advantage_baseline"]), atol=TIGHT)
    kept = adv.whiten(base, keep_mean=True)
    np.testing.assert_allclose(kept - adv.whiten(base), base.mean(), atol=1e-12)
    kl_C = np.bincount(CANDIDATE, OLD - REF)
    np.testing.assert_allclose(adv.leave_one_out(REWARD - 0.05 * kl_C, GROUP), A["rloo_k1_beta.05"], atol=TIGHT)
    assert not len(adv.returns_to_go(np.zeros(0), np.zeros(0, int)))


@pytest.mark.parametrize("lam", [0.95, 1.0])
def test_gae(lam: float) -> None:
    ppo, tag = OUT["ppo"], f"lam{lam:g}"
    reward = adv.token_rewards(REWARD, CANDIDATE, OLD - REF, 0.05)
    advantage, returns = adv.gae(reward, flat(IN["values_old"]), CANDIDATE, 1.0, lam)
    np.testing.assert_allclose(advantage, flat(ppo[f"advantage_{tag}"]), atol=TIGHT)
    np.testing.assert_allclose(returns, flat(ppo[f"returns_{tag}"]), atol=TIGHT)
    np.testing.assert_allclose(adv.whiten(advantage), flat(ppo[f"whitened_{tag}"]), atol=TIGHT)


def test_ppo() -> None:
    ppo = OUT["ppo"]
    x, batch = sampled(ppo["whitened_lam0.95"])
    out = policy_terms(batch, replace(H, loss_type="ppo", epsilon_high=0.2))["pg"]
    assert float(out.total) / out.count == pytest.approx(ppo["policy_loss"], abs=TIGHT)
    (out.total / out.count).backward()
    np.testing.assert_allclose(x.grad.numpy(), flat(ppo["d_policy_loss"]), atol=TIGHT)
    v = paddle.to_tensor(flat(IN["values_new"]), dtype="float64", stop_gradient=False)
    returns, old = flat(ppo["returns_lam0.95"]), flat(IN["values_old"])
    critic = value_loss(v, old, returns, np.ones(len(returns)), 0.2)
    (critic.total / critic.count).backward()
    assert float(critic.total) / critic.count == pytest.approx(ppo["value_loss"], abs=TIGHT)
    np.testing.assert_allclose(v.grad.numpy(), flat(ppo["d_value_loss_d_value"]), atol=TIGHT)
    over, count = critic.metrics["critic/vf_clipfrac"]
    assert over / count == pytest.approx(ppo["value_clip_fraction"], abs=TIGHT)
    total = float(out.total) / out.count + 0.1 * float(critic.total) / critic.count
    assert total == pytest.approx(ppo["total"], abs=TIGHT)
    plain = value_loss(v, old, returns, np.ones(len(returns)), None)
    assert float(plain.total) == pytest.approx(0.5 * ((flat(IN["values_new"]) - returns) ** 2).sum())
    with pytest.raises(ValueError, match=r"cliprange_value \(0\) must be positive"):
        value_loss(v, old, returns, np.ones(len(returns)), 0.0)
    empty = value_loss(v[:0], old[:0], returns[:0], np.ones(0), 0.2)
    assert (float(empty.total), empty.count) == (0.0, 0.0)


@pytest.mark.parametrize(("settings", "match"), [
    ({"loss_type": "trpo"}, r"loss_type \('trpo'\) must be one of grpo, dapo"),
    ({"loss_agg": "mean"}, r"loss_agg \('mean'\) must be one of seq_mean, token, fixed, seq_sum"),
    ({"kl_type": "abs"}, r"kl_type \('abs'\) must be one of k1, k2, k3, k3_is"),
    ({"epsilon": 0.0}, r"epsilon \(0\) must be positive"),
    ({"epsilon": 1.5}, r"epsilon \(1.5\) must be below 1"),
    ({"delta": 1.1}, r"delta \(1.1\) must be above 1 \+ epsilon \(1.2\)"),
    ({"dual_clip": 1.0}, r"dual_clip \(1\) must be above 1"),
    ({"max_completion_length": 0}, r"max_completion_length \(0\) must be at least 1"),
])  # fmt: skip
def test_bad_settings(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PolicyHyper(**settings)


def test_batches_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"old_logp_N \(3 tokens\) must have one entry per token \(44\)"):
        sampled(A["rloo"], old=OLD[:3])
    with pytest.raises(ValueError, match=r"length_C .* must count the tokens of each answer"):
        Sampled(paddle.to_tensor(NEW), NEW, CANDIDATE, LENGTH[::-1])
    _, batch = sampled(A["rloo"])
    with pytest.raises(ValueError, match=r"ref_logp_N \(None\) must be given for the kl term"):
        policy_terms(batch, H, kl=True)
    with pytest.raises(ValueError, match=r"entropy_N \(None\) must be given for the ent term"):
        policy_terms(batch, H, entropy=True)
