"""The DPO family against worked examples: values, gradients, labels with noise,
normalisers, extremes.
"""

from __future__ import annotations

import itertools
import math
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
    assert_gradient,
    assert_same,
    candidates,
    mean,
    tensor,
    value_and_grad,
)

from ernie_tune.objectives import pairwise
from ernie_tune.objectives.listwise import score_margins
from ernie_tune.objectives.loss import LossOut, combine
from ernie_tune.objectives.pairwise import (
    LOSSES,
    NAMES,
    Baselines,
    expand,
    needs_reference,
    nll_loss,
    pair_counts,
    pair_loss,
    pair_terms,
    reward_kappa,
)
from ernie_tune.objectives.preference import (
    Candidates,
    Pairs,
    PreferenceHyper,
    mixed_reference,
    preference_metrics,
    segment_sum,
    sequence_logp,
)

H = PreferenceHyper
GAPS = np.array([1.0, 2, 4])  # of the scores in 11.1's ODPO rows
NO_NOISE = Baselines()
LOG_MARGIN = replace(PAIRS, margin_P=score_margins(GAPS, np.zeros(3), "log", 0.5))
LINEAR_MARGIN = replace(PAIRS, margin_P=score_margins(GAPS, np.zeros(3), "linear", 0.5))

# name, value, hyper-parameters, pairs, baselines
ORACLE = [
    ("sigmoid", 0.6894586877, H(), PAIRS, NO_NOISE),
    ("cdpo", 0.6904586877, H(label_smoothing=0.1), PAIRS, NO_NOISE),
    ("robust", 0.6882086877, H(label_smoothing=0.1), PAIRS, NO_NOISE),
    ("hinge", 0.99, H(), PAIRS, NO_NOISE),
    ("ipo_sum", 25.05, H(), PAIRS, NO_NOISE),
    ("ipo", 25.1068750, H(), PAIRS, NO_NOISE),
    ("sigmoid_norm", 0.6935932739, H(), PAIRS, NO_NOISE),
    ("simpo", 1.1064829487, H(beta=2, simpo_gamma=1), PAIRS, NO_NOISE),
    ("odpo", 0.8931721058, H(), LOG_MARGIN, NO_NOISE),
    ("odpo", 1.4750930098, H(), LINEAR_MARGIN, NO_NOISE),
    ("dpop", 0.7355816119, H(dpop_lambda=5), PAIRS, NO_NOISE),
    ("dpop_outside", 1.5227920211, H(dpop_lambda=5), PAIRS, NO_NOISE),
    ("bco_pair", 1.3821066504, H(), PAIRS, NO_NOISE),
    ("bco_pair", 1.3821059461, H(), PAIRS, Baselines(delta=0.05 / 30)),
    ("sft", 1.275, H(), PAIRS, NO_NOISE),
    ("sft", 1.5166666667, H(nll_norm="seq"), PAIRS, NO_NOISE),
    ("mpo", 2.1029882802, H(), PAIRS, NO_NOISE),
    ("rpo", 1.9644586877, H(rpo_alpha=1), PAIRS, NO_NOISE),
    ("nca_pair", 1.3844254838, H(), PAIRS, NO_NOISE),
    ("sppo_hard", 49.65, H(), PAIRS, NO_NOISE),
    ("apo_zero", 0.9975056808, H(), PAIRS, NO_NOISE),
    ("apo_down", 0.9991847501, H(), PAIRS, NO_NOISE),
    ("odds", 0.5765199052, H(), PAIRS, NO_NOISE),
    ("orpo", 1.3326519905, H(orpo_lambda=0.1), PAIRS, NO_NOISE),
    ("cpo_sigmoid", 0.6703317258, H(), PAIRS, NO_NOISE),
    ("cpo", 0.6703317258 + 1.275, H(cpo_alpha=1), PAIRS, NO_NOISE),
    ("kto_pair", 0.4979204926, H(), PAIRS, Baselines(kl_chosen=0.2 / 3)),
]


def loss(name: str, x: Tensor, h: PreferenceHyper, pairs: Pairs = PAIRS, b: Baselines = NO_NOISE) -> LossOut:
    """Any name, composed ones too, on V-pair's reference and lengths."""
    if name == "kto_pair":  # its baselines are a batch's, so nobody trains by it
        return pair_loss(name, candidates(x), pairs, h, b)
    terms = expand([name], None, h)
    outs = pair_terms(terms, candidates(x), pairs, h, b)
    return combine(outs, terms, {k: v.count for k, v in outs.items()})


@pytest.mark.parametrize(("name", "value", "h", "pairs", "b"), ORACLE, ids=lambda v: v if isinstance(v, str) else "")
def test_values_and_gradients(name: str, value: float, h: PreferenceHyper, pairs: Pairs, b: Baselines) -> None:
    # the specification prints ten decimals, and IPO's as few as seven
    assert mean(loss(name, tensor(LOGP), h, pairs, b)) == pytest.approx(value, abs=6e-11 if value < 25 else 1e-9)
    assert_gradient(lambda x: loss(name, x, h, pairs, b), LOGP)


def test_every_loss_has_a_worked_value() -> None:
    """exo_pair's is computed below."""
    assert {name for name, *_ in ORACLE} == {*NAMES, "kto_pair"} - {"exo_pair"}


def test_values_in_float32() -> None:
    for name, value, h, pairs, b in ORACLE:
        x = paddle.to_tensor(LOGP.astype(np.float32))
        c = Candidates(x, LENGTH, paddle.to_tensor(REF.astype(np.float32)))
        terms = {name: 1.0} if name == "kto_pair" else expand([name], None, h)
        outs = pair_terms(terms, c, pairs, h, b)
        out = combine(outs, terms, {k: v.count for k, v in outs.items()})
        assert out.total.dtype == paddle.float32
        assert mean(out) == pytest.approx(value, rel=1e-5), name


def test_dpo_gradient() -> None:
    gradient = value_and_grad(lambda x: pair_loss("sigmoid", candidates(x), PAIRS), LOGP)[1]
    chosen = [-0.0154190052, -0.0169166479, -0.0174161608]
    np.testing.assert_allclose(gradient, [*chosen, *(-g for g in chosen)], atol=6e-11)


def test_exo_pair_is_a_divergence_between_two_coins() -> None:
    h = H(beta=0.7, label_smoothing=0.05)
    u = 0.7 * ((LOGP - REF)[:3] - (LOGP - REF)[3:])
    q = 1 / (1 + np.exp(-u))
    expected = q * np.log(q / 0.95) + (1 - q) * np.log((1 - q) / 0.05)
    assert mean(pair_loss("exo_pair", candidates(), PAIRS, h)) == pytest.approx(expected.mean(), abs=1e-12)
    assert_gradient(lambda x: pair_loss("exo_pair", candidates(x), PAIRS, h), LOGP)


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_other_divergences(kind: str) -> None:
    ratio = np.exp(LOGP - REF)
    score = {
        "forward_kl": 1 - 1 / ratio,
        "js_divergence": np.log(2 * ratio / (ratio + 1)),
        "alpha_divergence": (ratio**-0.5 - 1) / -0.5,
    }[kind]
    u = 0.1 * (score[:3] - score[3:])
    h = H(f_divergence_type=kind)
    out = pair_loss("sigmoid", candidates(), PAIRS, h)
    assert mean(out) == pytest.approx(np.log1p(np.exp(-u)).mean(), abs=1e-12)
    assert_gradient(lambda x: pair_loss("sigmoid", candidates(x), PAIRS, h), LOGP)


def test_the_alpha_divergence_of_one_is_the_reverse_kl() -> None:
    h = H(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0)
    assert_same(
        lambda x: pair_loss("sigmoid", candidates(x), PAIRS, h),
        lambda x: pair_loss("sigmoid", candidates(x), PAIRS),
        LOGP,
    )


def tokens() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token log-probabilities that add up to V-pair's, under the policy and the reference, and
    whose they are.
    """
    owner_N = np.repeat(np.arange(6), LENGTH)
    shape_N = np.random.default_rng(3).uniform(0.2, 1, len(owner_N))
    shape_N /= np.bincount(owner_N, weights=shape_N)[owner_N]
    return shape_N * LOGP[owner_N], (REF / LENGTH)[owner_N], owner_N


def test_ld_dpo_weighs_the_tail_of_the_longer_answer() -> None:
    logp_N, ref_N, owner_N = tokens()
    place_N = np.arange(len(owner_N)) - np.repeat(np.cumsum(LENGTH) - LENGTH, LENGTH)
    shared_C = np.tile(np.minimum(LENGTH[:3], LENGTH[3:]), 2)
    weight_N = np.where(place_N < shared_C[owner_N], 1.0, 0.3)
    score_C = np.bincount(owner_N, weights=weight_N * (logp_N - ref_N))
    expected = np.log1p(np.exp(-0.1 * (score_C[:3] - score_C[3:]))).mean()

    def ld(x: Tensor, alpha: float | None = 0.3) -> LossOut:
        c = Candidates(sequence_logp(x, owner_N, 6), LENGTH, tensor(REF), x, tensor(ref_N), owner_N)
        return pair_loss("sigmoid", c, PAIRS, H(ld_alpha=alpha))

    assert mean(ld(tensor(logp_N))) == pytest.approx(expected, abs=1e-12)
    gradient = assert_gradient(ld, logp_N)
    first = gradient[owner_N == 0]
    assert first[-1] == pytest.approx(first[0]), "pair 0's chosen is the shorter: no tail"
    tail = gradient[owner_N == 3]
    assert tail[7] == pytest.approx(0.3 * tail[0]), "and its rejected has two tokens more"
    assert_same(lambda x: ld(x, 1.0), lambda x: ld(x, None), logp_N)
    with pytest.raises(ValueError, match=r"ld_alpha \(0.3\) must come with logp_N and candidate_N \(None\)"):
        pair_loss("sigmoid", candidates(), PAIRS, H(ld_alpha=0.3))
    c = Candidates(tensor(LOGP), LENGTH, tensor(REF), tensor(logp_N), None, owner_N)
    with pytest.raises(ValueError, match=r"ref_logp_N \(None\) must be the reference's log-probabilities"):
        pair_loss("sigmoid", c, PAIRS, H(ld_alpha=0.3))


def test_wpo_weighs_pairs_and_has_no_gradient_of_its_own() -> None:
    each_P = np.array([mean(pair_loss("sigmoid", candidates(), Pairs.of([i], [i + 3]))) for i in range(3)])
    factor_P = np.exp((LOGP / LENGTH)[:3] + (LOGP / LENGTH)[3:])
    h = H(use_weighting=True)
    out = pair_loss("sigmoid", candidates(), PAIRS, h)
    assert out.count == 3, "the factor does not enter the divisor"
    assert mean(out) == pytest.approx((each_P * factor_P).mean(), abs=1e-12)
    plain, weighted = (
        value_and_grad(lambda x, h=h: pair_loss("sigmoid", candidates(x), PAIRS, h), LOGP)[1] for h in (H(), h)
    )
    np.testing.assert_allclose(weighted, plain * np.tile(factor_P, 2), atol=1e-12)
    aligned = replace(candidates(), log_sum_square_C=tensor(-LENGTH * 0.5))
    factor_P *= np.exp(1.0)
    assert mean(pair_loss("sigmoid", aligned, PAIRS, h)) == pytest.approx((each_P * factor_P).mean(), abs=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_label_right_with_probability_p_is_a_mixture(name: str) -> None:
    h = H(label_smoothing=0.1)
    p = np.array([0.9, 0.5, 1.0])
    soft = replace(PAIRS, p_P=p)
    right, wrong = (
        [mean(pair_loss(name, candidates(), Pairs.of([a], [b]), h)) for a, b in order]
        for order in ([(0, 3), (1, 4), (2, 5)], [(3, 0), (4, 1), (5, 2)])
    )
    expected = (p * right + (1 - p) * wrong).mean()
    assert mean(pair_loss(name, candidates(), soft, h)) == pytest.approx(expected, abs=1e-12)
    assert_gradient(lambda x: pair_loss(name, candidates(x), soft, h), LOGP)


def test_label_noise_and_its_correction() -> None:
    smooth = replace(PAIRS, p_P=np.full(3, 0.8))
    h = H(label_smoothing=0.2)
    assert_same(
        lambda x: pair_loss("sigmoid", candidates(x), smooth),
        lambda x: pair_loss("cdpo", candidates(x), PAIRS, h),
        LOGP,
    )

    # robust DPO is the combination of both labels that noise of that share turns into DPO again
    def denoised(x: Tensor) -> LossOut:
        as_is, flipped = (pair_loss("sigmoid", candidates(x), p) for p in (PAIRS, Pairs.of([3, 4, 5], [0, 1, 2])))
        return LossOut((0.8 * as_is.total - 0.2 * flipped.total) / 0.6, 3.0)

    assert_same(denoised, lambda x: pair_loss("robust", candidates(x), PAIRS, h), LOGP)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("sft", "odds", "orpo", "cpo", "simpo", "cpo_sigmoid")])
def test_swapping_both_answers_moves_every_loss(name: str) -> None:
    h = H(label_smoothing=0.1)
    assert mean(loss(name, tensor(LOGP), h)) != pytest.approx(
        mean(loss(name, tensor(LOGP), h, Pairs.of([3, 4, 5], [0, 1, 2]))), abs=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
def test_twice_the_same_pairs_leave_the_mean(name: str) -> None:
    h = H(label_smoothing=0.1)
    twice = Pairs.of([0, 1, 2, 0, 1, 2], [3, 4, 5, 3, 4, 5])
    halves = replace(twice, weight_P=np.full(6, 0.5))
    for pairs in (twice, halves):
        assert_same(lambda x, p=pairs: loss(name, x, h, p), lambda x: loss(name, x, h), LOGP)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up(name: str) -> None:
    """One window of three pairs, or of two and one: the same loss and gradient, since every term
    has its own global count (3.3).
    """
    h = H(label_smoothing=0.1)
    terms = expand([name], None, h)
    cut = [(np.array([0, 1, 3, 4]), Pairs.of([0, 1], [2, 3])), (np.array([2, 5]), Pairs.of([0], [1]))]
    counts: dict[str, float] = {}
    for index, pairs in cut:
        for term, n in pair_counts(terms, pairs, LENGTH[index], h).items():
            counts[term] = counts.get(term, 0.0) + n
    assert counts == pytest.approx(pair_counts(terms, PAIRS, LENGTH, h))

    def in_two(x: Tensor) -> LossOut:
        total = paddle.zeros([], "float64")
        for index, pairs in cut:
            c = Candidates(paddle.gather(x, paddle.to_tensor(index)), LENGTH[index], tensor(REF[index]))
            outs = pair_terms(terms, c, pairs, h)
            assert {k: v.count for k, v in outs.items()} == pair_counts(terms, pairs, LENGTH[index], h)
            total = total + combine(outs, terms, counts).total
        return LossOut(total, 1.0)

    assert_same(in_two, lambda x: loss(name, x, h), LOGP)


@pytest.mark.parametrize("name", NAMES)
def test_a_micro_batch_without_pairs_adds_nothing_and_walks_backward(name: str) -> None:
    h = H(label_smoothing=0.1)
    terms = expand([name], None, h)
    x = tensor(LOGP, grad=True)
    outs = pair_terms(terms, candidates(x), Pairs.of([], []), h)
    out = combine(outs, terms, dict.fromkeys(terms, 7.0))
    out.total.backward()
    assert float(out.total) == 0
    assert {o.count for o in outs.values()} == {0}
    assert not x.grad.numpy().any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [-1e4, -1e-30])
def test_extreme_log_probabilities_stay_numbers(name: str, scale: float) -> None:
    h = H(label_smoothing=0.1)
    terms = expand([name], None, h)
    for dtype, order in itertools.product(("float32", "float64"), (([0], [1]), ([1], [0]))):
        x = paddle.to_tensor(np.array([scale, -1.0]), dtype=dtype, stop_gradient=False)
        c = Candidates(x, np.array([1, 1]), paddle.to_tensor([-1.0, scale], dtype=dtype))
        outs = pair_terms(terms, c, Pairs.of(*order), h)
        out = combine(outs, terms, {k: v.count for k, v in outs.items()})
        out.total.backward()
        assert np.isfinite(float(out.total)), order
        assert np.isfinite(x.grad.numpy()).all(), order


@pytest.mark.parametrize("ratio", [-45.0, -88.0, -160.0, -1e4])
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.divergence])
@pytest.mark.parametrize(
    "divergence",
    [("forward_kl", 0.5), ("js_divergence", 0.5), *(("alpha_divergence", a) for a in (0.0, 0.5, 0.999, 3.0))],
)
def test_extreme_ratios_of_other_divergences_stay_numbers(
    divergence: tuple[str, float], name: str, ratio: float
) -> None:
    x = paddle.to_tensor([ratio - 1.0, -1.0], dtype="float32", stop_gradient=False)
    c = Candidates(x, np.array([1, 1]), paddle.to_tensor([-1.0, ratio - 1.0], dtype="float32"))
    h = H(f_divergence_type=divergence[0], f_alpha_divergence_coef=divergence[1], label_smoothing=0.1)
    out = pair_loss(name, c, Pairs.of([0], [1]), h)
    out.total.backward()
    assert np.isfinite(float(out.total))
    assert np.isfinite(x.grad.numpy()).all()


def test_at_the_reference_every_sigmoid_is_ln_2() -> None:
    same = candidates(REF)
    for name in ("sigmoid", "odpo", "sigmoid_norm", "cdpo", "dpop"):
        assert mean(pair_loss(name, same, PAIRS, H(label_smoothing=0.1))) == pytest.approx(math.log(2), abs=1e-12)


def test_the_reference_gets_no_gradient() -> None:
    ref = tensor(REF, grad=True)
    x = tensor(LOGP, grad=True)
    pair_loss("sigmoid", Candidates(x, LENGTH, ref), PAIRS).total.backward()
    assert ref.grad is None


def test_metrics_have_trl_names() -> None:
    metrics = preference_metrics(candidates(), PAIRS, 0.1)
    means = {k: total / count for k, (total, count) in metrics.items()}
    assert means["rewards/accuracies"] == pytest.approx(1 / 3)
    assert means["rewards/margins"] == pytest.approx(0.01)
    assert means["rewards/chosen"] - means["rewards/rejected"] == pytest.approx(means["rewards/margins"])
    assert means["rewards/chosen"] == pytest.approx(0.02 / 3)
    assert means["logps/chosen"] == pytest.approx(-8.5)
    assert means["logps/rejected"] == pytest.approx(-9)
    assert (means["length/chosen"], means["length/rejected"]) == pytest.approx((20 / 3, 17 / 3))
    # chosen are shorter, longer, longer; margins +, -, -: the rewards never prefer the longer
    assert metrics["length/longer_chosen"] == (2, 3)
    assert metrics["rewards/longer_preferred"] == (0, 3)
    even = preference_metrics(candidates(length=np.full(6, 4)), PAIRS, 0.1)
    assert "length/longer_chosen" not in even, "pairs of one length say nothing"
    assert means["rewards/saturated"] == 0
    assert preference_metrics(candidates(), PAIRS, 10.0)["rewards/saturated"] == (1.0, 3.0), (
        "only 10 * 1.5 is beyond 10"
    )
    swapped = preference_metrics(candidates(), Pairs.of([3, 4, 5], [0, 1, 2]), 0.1)
    assert swapped["rewards/margins"][0] == pytest.approx(-metrics["rewards/margins"][0])
    bare = preference_metrics(candidates(ref=None), PAIRS, 2.0, 1.0)
    assert bare["rewards/chosen"][0] == pytest.approx(2 * (LOGP / LENGTH)[:3].sum())


def test_segments_add_up_in_any_order() -> None:
    x = tensor([1.0, 2, 3, 4], grad=True)
    out = segment_sum(x, np.array([2, 0, 2, 3]), 5)
    assert out.numpy().tolist() == [2, 0, 4, 4, 0]
    (out * tensor([1.0, 2, 3, 4, 5])).sum().backward()
    assert x.grad.numpy().tolist() == [3, 1, 3, 4]
    assert sequence_logp(tensor([]), np.zeros(0, int), 2).numpy().tolist() == [0, 0]


def test_a_mixed_reference() -> None:
    new, old = tensor([1.0, 2.0], grad=True), tensor([0.0, 4.0])
    assert mixed_reference(old, new).numpy() == pytest.approx([0.6, 2.8])
    assert mixed_reference(old, new, 1.0).numpy() == pytest.approx([1, 2])
    assert mixed_reference(old, new).stop_gradient
    with pytest.raises(ValueError, match=r"ref_model_mixup_alpha \(0\) must lie in \(0, 1\]"):
        mixed_reference(old, new, 0)


def test_loss_lists() -> None:
    h = H(rpo_alpha=0.5)
    assert expand(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], h) == expand(["mpo"], None, h)
    assert expand(["sigmoid", "rpo"], [1.0, 2.0], h) == {"sigmoid": 3.0, "sft": 1.0}
    assert needs_reference(expand(["mpo"], None, h))
    assert not needs_reference(expand(["orpo", "simpo"], None, h))
    assert not needs_reference({"sft": 1.0})
    assert (reward_kappa({"sigmoid_norm": 1}), reward_kappa({"simpo": 1}), reward_kappa({"cpo_sigmoid": 1})) == (
        0,
        1,
        0,
    )
    with pytest.raises(ValueError, match=r"loss_weights \(1\) must be as many as loss_type \(2\)"):
        expand(["sigmoid", "sft"], [1.0], h)
    for unknown in ("dpo", "kto_pair"):
        with pytest.raises(ValueError, match=rf"loss_type \({unknown}\) must be one of sigmoid, "):
            expand([unknown], None, h)
    with pytest.raises(ValueError, match=r"loss_type \(sigmoid, simpo\) must not mix losses with and without"):
        expand(["sigmoid", "simpo"], None, h)


def test_combine_refuses_terms_it_cannot_divide() -> None:
    out = pair_loss("sigmoid", candidates(), PAIRS)
    with pytest.raises(ValueError, match=r"term sigmoid must have a weight, one of sft"):
        combine({"sigmoid": out}, {"sft": 1.0}, {"sigmoid": 3.0})
    with pytest.raises(ValueError, match=r"term sigmoid \(3 units here\) must be counted globally \(0\)"):
        combine({"sigmoid": out}, {"sigmoid": 1.0}, {})
    with pytest.raises(ValueError, match=r"terms \(0\) must name at least one loss"):
        combine({}, {}, {})
    both = combine({"sigmoid": out}, {"sigmoid": 2.0}, {"sigmoid": 6.0})
    assert float(both.total) == pytest.approx(mean(out))
    assert both.metrics == {"loss/sigmoid": (pytest.approx(float(out.total)), 3.0)}


REFUSED = [
    (lambda: H(beta=0), r"beta \(0\) must be positive"),
    (lambda: H(label_smoothing=0.5), r"label_smoothing \(0.5\) must be at least 0 and below 0.5"),
    (lambda: H(ld_alpha=1.5), r"ld_alpha \(1.5\) must lie in \[0, 1\]"),
    (lambda: H(f_divergence_type="kl"), r"f_divergence_type \('kl'\) must be one of reverse_kl"),
    (lambda: H(nll_norm="batch"), r"nll_norm \('batch'\) must be token or seq"),
    (lambda: pair_loss("exo_pair", candidates(), PAIRS), r"label_smoothing \(0\) must be positive for exo_pair"),
    (
        lambda: pair_loss("ipo", candidates(), LINEAR_MARGIN),
        r"loss_type \(ipo\) must be one of sigmoid, .* with margins",
    ),
    (
        lambda: pair_loss("nca_pair", candidates(), PAIRS, H(f_divergence_type="forward_kl")),
        r"loss_type \(nca_pair\) must be one of .* for f_divergence_type forward_kl",
    ),
    (lambda: pair_loss("sigmoid", candidates(ref=None), PAIRS), r"ref_logp_C \(None\) must be .* set ref_mode"),
    (lambda: Pairs.of([0], [1, 2]), r"worse_P \(2 pairs\) must have as many entries as better_P \(1\)"),
    (lambda: Pairs.of([0], [1], p_P=np.array([1.5])), r"p_P \(1.5 to 1.5\) must lie in \[0, 1\]"),
    (lambda: Candidates(tensor(LOGP), LENGTH[:5]), r"length_C \(5 answers\) must have one entry per .* \(6\)"),
    (lambda: Candidates(tensor([-1.0]), np.array([0])), r"length_C \(candidate 0: 0 tokens\) must be at least 1"),
]


@pytest.mark.parametrize(("act", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(act, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        act()


def test_nll_of_chosen_answers() -> None:
    out = nll_loss(candidates(), np.array([0, 2]), np.array([3.0, 1.0]), "seq")
    assert mean(out) == pytest.approx((3 * 12 / 6 + 5.5 / 10) / 4)
    out = nll_loss(candidates(), np.array([0, 2]), np.array([3.0, 1.0]))
    assert mean(out) == pytest.approx((3 * 12 + 5.5) / (3 * 6 + 10))


MUTANTS = {
    "sigmoid": lambda s, h, b: -paddle.nn.functional.log_sigmoid(-s.u(h)),
    # TRL 1.16 lost the smoothing here
    "cdpo": lambda s, h, b: -paddle.nn.functional.log_sigmoid(s.u(h)),
    "robust": lambda s, h, b: pairwise._cdpo(s, h, b) / (1 - 2 * h.label_smoothing),
    "ipo_sum": lambda s, h, b: (s.better - s.worse - 1 / h.beta).square(),
    "dpop": pairwise._dpop_outside,
    "simpo": lambda s, h, b: -paddle.nn.functional.log_sigmoid(s.u(h) - h.beta * h.simpo_gamma),
    "bco_pair": lambda s, h, b: pairwise._bco_pair(s, h, Baselines()),
    "odds": lambda s, h, b: -paddle.nn.functional.log_sigmoid(s.better - s.worse),
    "apo_down": lambda s, h, b: pairwise._apo_zero(s, h, b),
    "sppo_hard": lambda s, h, b: (s.better - 0.5 / h.beta).square() + (s.worse - 0.5 / h.beta).square(),
    "nca_pair": lambda s, h, b: -paddle.nn.functional.log_sigmoid(h.beta * s.better),
    "odpo": lambda s, h, b: -paddle.nn.functional.log_sigmoid(s.u(h) + 2 * s.margin),
    "kto_pair": lambda s, h, b: pairwise._kto_pair(s, h, Baselines()),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "LOSSES", {**LOSSES, name: replace(LOSSES[name], value=MUTANTS[name])})
    rows = [r for r in ORACLE if r[0] == name]
    wrong = [abs(mean(loss(name, tensor(LOGP), *row[2:])) - row[1]) for row in rows]
    assert max(wrong) > 1e-8
