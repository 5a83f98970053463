"""UPO: worked composites, reductions to single methods (offline) in value and gradient, terms that
are absent, and where online terms join.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import paddle
import pytest
from paddle import Tensor
from preference_cases import (
    LENGTH,
    LOGP,
    PAIRS,
    REF,
    REWARDS,
    assert_gradient,
    assert_same,
    candidates,
    mean,
    tensor,
    value_and_grad,
)

from ernie_tune.objectives.listwise import Units, edge_loss, score_margins, soft_edges
from ernie_tune.objectives.loss import LossOut, combine
from ernie_tune.objectives.pairwise import Baselines, expand, nll_loss, pair_loss, pair_terms
from ernie_tune.objectives.preference import Candidates, Pairs, PreferenceHyper, implicit_rewards
from ernie_tune.objectives.unpaired import Labels, bco_loss, kto_loss
from ernie_tune.objectives.upo import PRESETS, TERMS, Signals, UpoSettings, pair_weight, upo_counts, upo_loss, upo_terms

H = PreferenceHyper


def upo(
    settings: UpoSettings, x: Tensor, signals: Signals, b: Baselines | None = None, ref: np.ndarray = REF
) -> LossOut:
    c = candidates(x, ref, np.resize(LENGTH, len(ref)))
    return upo_loss(settings, c, signals, upo_counts(settings, signals, c.length_C), b)


def trl(names: list[str], x: Tensor, h: PreferenceHyper | None = None, pairs: Pairs = PAIRS) -> LossOut:
    h = h or H()
    terms = expand(names, None, h)
    outs = pair_terms(terms, candidates(x), pairs, h)
    return combine(outs, terms, {k: v.count for k, v in outs.items()})


PAIR_ONLY = UpoSettings(weights={"pair": 1.0})
ON_PAIRS = Signals(pairs=PAIRS)
LOG_MARGINS = replace(PAIRS, margin_P=score_margins(np.array([1.0, 2, 4]), np.zeros(3), "log", 0.5))
LINEAR_MARGINS = replace(PAIRS, margin_P=np.array([0.5, 1, 2]))

# configuration of UPO and what it must equal (7.6)
REDUCTIONS: dict[str, tuple[Callable[[Tensor], LossOut], Callable[[Tensor], LossOut]]] = {
    "DPO": (lambda x: upo(PAIR_ONLY, x, ON_PAIRS), lambda x: trl(["sigmoid"], x)),
    "ODPO log": (lambda x: upo(PAIR_ONLY, x, Signals(LOG_MARGINS)), lambda x: trl(["odpo"], x, pairs=LOG_MARGINS)),
    "ODPO linear": (
        lambda x: upo(PAIR_ONLY, x, Signals(LINEAR_MARGINS)),
        lambda x: trl(["odpo"], x, pairs=LINEAR_MARGINS),
    ),
    "SimPO": (
        lambda x: upo(
            replace(PAIR_ONLY, reference=False, kappa=1, hyper=H(beta=2)),
            x,
            Signals(replace(PAIRS, margin_P=np.ones(3))),
        ),
        lambda x: trl(["simpo"], x, H(beta=2, simpo_gamma=1)),
    ),
    "cDPO": (
        lambda x: upo(PAIR_ONLY, x, Signals(replace(PAIRS, p_P=np.full(3, 0.9)))),
        lambda x: trl(["cdpo"], x, H(label_smoothing=0.1)),
    ),
    "robust": (
        lambda x: upo(replace(PAIR_ONLY, edge_loss="robust", hyper=H(label_smoothing=0.1)), x, ON_PAIRS),
        lambda x: trl(["robust"], x, H(label_smoothing=0.1)),
    ),
    "sigmoid_norm": (lambda x: upo(replace(PAIR_ONLY, kappa=1), x, ON_PAIRS), lambda x: trl(["sigmoid_norm"], x)),
    "IPO": (lambda x: upo(replace(PAIR_ONLY, edge_loss="ipo_sum"), x, ON_PAIRS), lambda x: trl(["ipo_sum"], x)),
    "SLiC": (lambda x: upo(replace(PAIR_ONLY, edge_loss="hinge"), x, ON_PAIRS), lambda x: trl(["hinge"], x)),
    "rank of two": (
        lambda x: upo(UpoSettings(weights={"rank": 1.0}), x, Signals(tiers=pairs_as_units([0, 1]))),
        lambda x: trl(["sigmoid"], x),
    ),
    "rank of two, edges": (
        lambda x: upo(UpoSettings(weights={"rank": 1.0}, rank="edges"), x, Signals(tiers=pairs_as_units([0, 1]))),
        lambda x: trl(["sigmoid"], x),
    ),
    "one-hot InfoNCA": (
        lambda x: upo(
            UpoSettings(weights={"rate": 1.0}, rate="infonca", rate_alpha=1e-3),
            x,
            Signals(ratings=pairs_as_units([1, 0])),
        ),
        lambda x: trl(["sigmoid"], x),
    ),
    "soft_bt, tau to 0": (
        lambda x: upo(UpoSettings(weights={"rate": 1.0}, rate_tau=1e-3), x, Signals(ratings=pairs_as_units([1, 0]))),
        lambda x: trl(["sigmoid"], x),
    ),
    "rating margins": (
        lambda x: upo(
            UpoSettings(weights={"rate": 1.0}, rate="margin", rate_alpha=0.5),
            x,
            Signals(ratings=pairs_as_units([1, 0])),
        ),
        lambda x: trl(["odpo"], x, pairs=replace(PAIRS, margin_P=np.full(3, 0.5))),
    ),
    "one rating at the ends of its scale": (
        lambda x: upo(
            UpoSettings(weights={"rate": 1.0}),
            x,
            Signals(ratings=Units.of(range(6), range(6), [1, 1, 1, 0, 0, 0])),
            Baselines(delta=0.2),
        ),
        lambda x: bco_loss(candidates(x), Labels.of(range(6), [1, 1, 1, 0, 0, 0]), 0.2),
    ),
    "KTO": (
        lambda x: upo(
            UpoSettings(weights={"bin": 1.0}), x, Signals(labels=Labels.of([0, 4], [1, 0])), Baselines(z0=0.3)
        ),
        lambda x: kto_loss(candidates(x), Labels.of([0, 4], [1, 0]), 0.3),
    ),
    "BCO": (
        lambda x: upo(
            UpoSettings(weights={"bin": 1.0}, bin="bco"),
            x,
            Signals(labels=Labels.of([0, 4], [1, 0])),
            Baselines(delta=0.3),
        ),
        lambda x: bco_loss(candidates(x), Labels.of([0, 4], [1, 0]), 0.3),
    ),
    "MPO": (lambda x: upo(PRESETS["mpo"], x, ON_PAIRS), lambda x: trl(["mpo"], x)),
    "RPO": (
        lambda x: upo(UpoSettings(weights={"pair": 1.0, "nll": 0.7}, hyper=H()), x, ON_PAIRS),
        lambda x: trl(["rpo"], x, H(rpo_alpha=0.7)),
    ),
    "SFT on chosen": (
        lambda x: upo(UpoSettings(weights={"nll": 1.0}), x, ON_PAIRS),
        lambda x: nll_loss(candidates(x), np.arange(3), norm="seq"),
    ),
}


def pairs_as_units(values: list[float]) -> Units:
    """V-pair's pairs as three units of two answers."""
    return Units.of([0, 3, 1, 4, 2, 5], [0, 0, 1, 1, 2, 2], values * 3)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str) -> None:
    ours, theirs = REDUCTIONS[name]
    assert_same(ours, theirs, LOGP)
    assert_gradient(ours, LOGP)


NEW = [[-1, -0.5, -2], [-0.3, -1.5]]
OLD = [[-1.2, -0.4, -1.5], [-0.3, -2]]


def grpo(new_N: Tensor, advantages: tuple[float, float] = (1.0, -0.5), old: list[list[float]] = OLD) -> LossOut:
    """The clipped surrogate (1707.06347, eq. 7), the mean over answers of token means: stands for
    the online term.
    """
    ratio = paddle.exp(new_N - tensor(np.concatenate(old)))
    total = paddle.zeros([], "float64")
    for part, advantage in zip((ratio[:3], ratio[3:]), advantages, strict=True):
        best = paddle.minimum(part * advantage, paddle.clip(part, 0.8, 1.28) * advantage)
        total = total - best.mean()
    return LossOut(total, 2.0)


def test_policy_gradient_and_dpo() -> None:
    pg = grpo(tensor(np.concatenate(NEW)))
    assert mean(pg) == pytest.approx(-0.1243716471, abs=6e-11)
    settings = UpoSettings(weights={"pg": 1.0, "pair": 1.0, "kl": 0.0})
    counts = {**upo_counts(settings, ON_PAIRS, LENGTH), "pg": 2.0}
    out = upo_loss(settings, candidates(), ON_PAIRS, counts, online={"pg": pg, "kl": pg})
    assert float(out.total) == pytest.approx(0.5650870406, abs=1.1e-10)
    assert out.metrics["upo/pg/loss"][0] / out.metrics["upo/pg/loss"][1] == pytest.approx(-0.1243716471)
    assert "upo/kl/loss" not in out.metrics, "a term without weight is left out"


def test_without_preferences_the_policy_gradient_is_left_bit_for_bit() -> None:
    settings = UpoSettings(weights={"pg": 1.0})
    x, alone = (tensor(np.concatenate(NEW), grad=True) for _ in range(2))
    upo_loss(settings, candidates(), ON_PAIRS, {"pg": 2.0}, online={"pg": grpo(x)}).total.backward()
    (grpo(alone).total / 2.0).backward()
    assert (x.grad.numpy() == alone.grad.numpy()).all()


def test_the_gradient_of_two_answers_is_two_beta_of_a_policy_gradients() -> None:
    # G = 2, advantages +-1/2, sum over tokens, mean over the two, at the old policy
    def pg(x: Tensor) -> LossOut:
        return LossOut(-(paddle.exp(x - x.detach()) * tensor([0.5, -0.5])).sum(), 2.0)

    at = np.array([-3.0, -4.0])
    dpo = value_and_grad(
        lambda x: pair_loss("sigmoid", Candidates(x, np.ones(2, int), tensor(at)), Pairs.of([0], [1])), at
    )[1]
    online = value_and_grad(pg, at)[1]
    np.testing.assert_allclose(online, [-0.25, 0.25], atol=1e-12)
    np.testing.assert_allclose(dpo, [-0.05, 0.05], atol=1e-12)
    assert pair_weight(0.1, 0.2) == pytest.approx(1.0)
    np.testing.assert_allclose(pair_weight(0.1, 0.2) * dpo, 0.2 * online, atol=1e-12)


def test_the_full_mix() -> None:
    """V-pair's answers first, then 11.3's four as a ranking and as ratings; each term with its
    printed value.
    """
    settings = UpoSettings(weights={"pg": 1, "pair": 1, "rank": 0.5, "rate": 0.5, "bin": 0.25, "nll": 0.1}, hyper=H())
    four = np.arange(6, 10)
    signals = Signals(
        PAIRS,
        Units.of(four, [0] * 4, range(4)),
        Units.of(four, [0] * 4, [5, 4, 4, 1]),
        Labels.of(range(6), [1, 1, 1, 0, 0, 0]),
    )
    c = Candidates(tensor([*LOGP, *(REWARDS / 0.1 - 9)]), np.append(LENGTH, [5] * 4), tensor([*REF, *[-9] * 4]))
    terms = upo_terms(settings, c, signals, Baselines(z0=0.3))
    assert {k: mean(v) for k, v in terms.items() if k != "nll"} == pytest.approx(
        {"pair": 0.6894586877, "rank": 2.5417399240 / 3, "rate": 0.5731572303, "bin": 0.4987558320}, abs=1e-10
    )
    # the printed sum takes the nll of V-pair's chosen answers alone
    terms["nll"] = nll_loss(c, PAIRS.better_P)
    counts = {**upo_counts(settings, signals, c.length_C), "nll": 20.0, "pg": 2.0}
    online = {"pg": grpo(tensor(np.concatenate(NEW)))}
    assert float(combine({**terms, **online}, settings.weights, counts).total) == pytest.approx(1.5274779344, abs=2e-10)


def rich(settings: UpoSettings | None = None) -> tuple[UpoSettings, Signals]:
    """Every kind of signal at once, uneven weights, on V-pair's six answers."""
    return settings or replace(PRESETS["upo_hetero"], bin="bco"), Signals(
        Pairs.of([0, 1], [3, 4], np.array([1.0, 2.0])),
        Units.of([2, 0, 5, 1, 3], [0, 0, 0, 1, 1], [0, 1, 1, 1, 0], np.array([1.0, 0.5])),
        Units.of([0, 4, 5, 2], [0, 0, 0, 1], [1.0, 0.25, 0.25, 0.75], np.array([1.5, 1.0])),
        Labels.of([3, 5, 1], [0, 1, 1]),
    )


VARIANTS = [
    PRESETS["upo_hetero"],
    PRESETS["mpo"],
    *[replace(PRESETS["upo_hetero"], rank=kind) for kind in ("edges", "lipo_lambda")],
    *[replace(PRESETS["upo_hetero"], rate=kind) for kind in ("margin", "infonca", "bernoulli_kl")],
    *[replace(PRESETS["upo_hetero"], bin=kind) for kind in ("bco", "apo_zero_unpaired")],
    replace(PRESETS["upo_hetero"], edge_weight="edge", rank="edges", hyper=H(beta=0.3)),
    replace(PRESETS["upo_hetero"], kappa=1, edge_loss="hinge"),
]


@pytest.mark.parametrize("settings", VARIANTS, ids=range(len(VARIANTS)))
def test_counts_are_known_before_the_forward(settings: UpoSettings) -> None:
    signals = rich()[1]
    terms = upo_terms(settings, candidates(), signals)
    assert upo_counts(settings, signals, LENGTH) == pytest.approx({k: v.count for k, v in terms.items()})
    assert_gradient(lambda x: upo(settings, x, signals), LOGP)


@pytest.mark.parametrize("settings", VARIANTS, ids=range(len(VARIANTS)))
def test_terms_may_be_absent_anywhere(settings: UpoSettings) -> None:
    """Micro-batches (or ranks) that have only one kind of signal each: the same names are counted
    everywhere, and the loss is that of the whole.
    """
    whole = rich()[1]
    parts = [
        Signals(pairs=whole.pairs),
        Signals(tiers=whole.tiers),
        Signals(ratings=whole.ratings),
        Signals(labels=whole.labels),
        Signals(),
    ]
    each = [upo_counts(settings, p, LENGTH) for p in parts]
    assert all(c.keys() == {t for t in TERMS if settings.active(t)} for c in each), "a fixed vector to be summed"
    counts = {k: sum(c[k] for c in each) for k in each[0]}
    assert counts == pytest.approx(upo_counts(settings, whole, LENGTH))

    def in_parts(x: Tensor) -> LossOut:
        outs = [upo_loss(settings, candidates(x), p, counts) for p in parts]
        assert not any(o.total.stop_gradient for o in outs if not x.stop_gradient), "every rank walks backward"
        return LossOut(sum((o.total for o in outs[1:]), outs[0].total), 1.0)

    assert_same(in_parts, lambda x: upo(settings, x, whole), LOGP)


def test_a_step_without_any_unit_is_zero() -> None:
    settings = PRESETS["upo_hetero"]
    x = tensor(LOGP, grad=True)
    out = upo(settings, x, Signals())
    out.total.backward()
    assert float(out.total) == 0
    assert not x.grad.numpy().any()


def test_twice_every_unit_leaves_the_mean() -> None:
    settings, s = rich()

    def twice(units: Units) -> Units:
        number = [units.unit_M, units.unit_M + len(units)]
        return Units.of(
            *(np.concatenate(v) for v in ([units.index_M] * 2, number, [units.value_M] * 2, [units.weight_U] * 2))
        )

    p, la = s.pairs, s.labels
    doubled = Signals(
        Pairs.of(*(np.tile(v, 2) for v in (p.better_P, p.worse_P, p.weight_P, p.margin_P, p.p_P))),
        twice(s.tiers),
        twice(s.ratings),
        Labels(*(np.tile(v, 2) for v in (la.index_M, la.good_M, la.weight_M))),
    )
    assert_same(lambda x: upo(settings, x, doubled), lambda x: upo(settings, x, s), LOGP)


def test_a_ranking_of_four_counts_as_one_pair() -> None:
    weights = {"pair": 1.0}
    signals = Signals(tiers=Units.of(range(4), [0] * 4, range(4)))
    assert upo_counts(UpoSettings(weights={"rank": 1.0}, rank="edges"), signals, LENGTH) == {"rank": pytest.approx(1)}
    each = UpoSettings(weights={"rank": 1.0}, rank="edges", edge_weight="edge")
    assert upo_counts(each, signals, LENGTH) == {"rank": pytest.approx(6)}
    assert upo_counts(UpoSettings(weights=weights), signals, LENGTH) == {"pair": 0}


def test_who_the_nll_raises() -> None:
    index, weight = rich()[1].best()
    # pairs' better 0, 1; first tiers {2} and {3}; the best rated of three, 0 (one rated alone is
    # not compared); good labels 5 and 1
    assert list(zip(index.tolist(), weight.tolist(), strict=True)) == [
        (0, 1),
        (1, 2),
        (2, 1),
        (3, 0.5),
        (0, 1.5),
        (5, 1),
        (1, 1),
    ]
    shared = Signals(tiers=Units.of(range(3), [0] * 3, [0, 0, 1])).best()
    assert [v.tolist() for v in shared] == [[0, 1], [0.5, 0.5]]


def test_metrics() -> None:
    settings, signals = rich()
    x = tensor(LOGP, grad=True)
    metrics = upo(settings, x, signals).metrics
    shares = {k: v for k, v in metrics.items() if k.endswith("grad_share")}
    assert set(shares) == {f"upo/{t}/grad_share" for t in ("pair", "rank", "rate", "bin", "nll")}
    assert sum(part / whole for part, whole in shares.values()) == pytest.approx(1)
    only = upo(UpoSettings(weights={"nll": 1.0}, hyper=H(nll_norm="seq")), x, signals).metrics
    assert only["upo/nll/grad_share"][0] == pytest.approx(only["upo/nll/grad_share"][1])
    r = (LOGP - REF) * 0.1
    assert metrics["rewards/chosen"] == (pytest.approx(r[[0, 1, 5, 1]].sum()), 4), "of pairs and labels"
    assert metrics["rewards/accuracies"] == (1.0, 2.0)
    assert metrics["upo/rank/accuracies"][1] == 3
    # ratings: 0 against 4 and 5 at 0.25 each; r = .05, .05, .04
    assert metrics["upo/rate/accuracies"] == (float((r[0] > r[4]) + (r[0] > r[5])), 2.0)
    assert metrics["upo/pair/loss"][1] == 3


def test_log_ratios_by_token_have_no_share_and_raise_nothing() -> None:
    owner = np.repeat(np.arange(6), LENGTH)
    x = tensor((LOGP / LENGTH)[owner], grad=True)
    from ernie_tune.objectives.preference import sequence_logp

    c = Candidates(sequence_logp(x, owner, 6), LENGTH, tensor(REF), x, tensor((REF / LENGTH)[owner]), owner)
    settings = UpoSettings(weights={"pair": 1.0}, edge_loss="hinge", hyper=H(ld_alpha=0.5))
    out = upo_loss(settings, c, ON_PAIRS, {"pair": 3.0})
    out.total.backward()
    assert np.abs(x.grad.numpy()).max() > 1e-4
    assert "upo/pair/grad_share" not in out.metrics


REFUSED = [
    (lambda: UpoSettings(weights={"dpo": 1.0}), r"weights \(dpo\) must name one of pg, pair"),
    (lambda: UpoSettings(weights={"pair": -1.0}), r"weights\[pair\] \(-1\) must not be negative"),
    (lambda: UpoSettings(weights={"pair": 0.0}), r"weights \(all 0\) must give at least one term a weight"),
    (lambda: UpoSettings(edge_loss="dpo"), r"edge_loss \('dpo'\) must be one of sigmoid, .*; use 'sigmoid'"),
    (lambda: UpoSettings(rank="pl"), r"rank \('pl'\) must be one of plackett_luce"),
    (lambda: UpoSettings(rate="mse"), r"rate \('mse'\) must be one of soft_bt"),
    (lambda: UpoSettings(bin="dpo"), r"bin \('dpo'\) must be one of kto"),
    (lambda: UpoSettings(kappa=2), r"kappa \(2\) must be one of 0, 1"),
    (lambda: UpoSettings(reference=False), r"reference \(False\) must be True for the bin term"),
    (lambda: upo_terms(PAIR_ONLY, candidates(ref=None), ON_PAIRS), r"ref_logp_C \(None\) must be the reference's"),
]


@pytest.mark.parametrize(("act", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(act: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        act()


def test_a_wrong_normaliser_is_noticed() -> None:
    """Mutant: one common divisor for all terms, as a mean over all units would be, is another loss
    and another gradient.
    """
    settings, signals = rich()
    counts = upo_counts(settings, signals, LENGTH)
    common = dict.fromkeys(counts, sum(counts.values()))
    right, wrong = (
        value_and_grad(lambda x, n=n: upo_loss(settings, candidates(x), signals, n), LOGP) for n in (counts, common)
    )
    assert abs(right[0] - wrong[0]) > 0.01
    assert np.abs(right[1] / np.abs(right[1]).sum() - wrong[1] / np.abs(wrong[1]).sum()).max() > 0.01


def test_edges_are_those_of_the_rewards() -> None:
    """UPO's rate term on raw functions, so that the wiring of beta and kappa is seen."""
    settings = UpoSettings(weights={"rate": 1.0}, kappa=1, hyper=H(beta=0.7))
    ratings = Units.of([0, 1, 2], [0, 0, 0], [1.0, 0.5, 0.0])

    def direct(x: Tensor) -> LossOut:
        return edge_loss(implicit_rewards(candidates(x), 0.7, 1), soft_edges(ratings))

    assert_same(lambda x: upo(settings, x, Signals(ratings=ratings)), direct, LOGP)
