"""Several answers of one prompt, ordered in tiers or rated: Plackett-Luce, LiPO-lambda, InfoNCA,
and the edges that make pairs of them.

Legend: C candidate answers of a micro-batch, M of them in units (one prompt and its signal), U
units, K the largest unit's answers, P edges.
Refuses to know: where rewards come from (implicit, r = beta log-ratio, or a head's), how losses are
divided.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.preference import Pairs, padded, padded_index, take, vector

# Stands for minus infinity where an answer does not compete: exp of it is 0 and so is its gradient.
ABSENT = -1e30


@dataclass(frozen=True)
class Units:
    """Candidate `index_M` belongs to unit `unit_M` and has `value_M` there: a tier (0 the best,
    equal numbers tie) or a score (higher is better).
    """

    index_M: np.ndarray
    unit_M: np.ndarray
    value_M: np.ndarray
    weight_U: np.ndarray

    @staticmethod
    def of(
        index_M: np.ndarray | list[int],
        unit_M: np.ndarray | list[int],
        value_M: np.ndarray | list[float],
        weight_U: np.ndarray | None = None,
    ) -> Units:
        """Unit numbers start at 0; weights default to 1."""
        unit_M = np.asarray(unit_M, np.int64)
        weight_U = np.ones(int(unit_M.max(initial=-1)) + 1) if weight_U is None else np.asarray(weight_U)
        return Units(np.asarray(index_M, np.int64), unit_M, np.asarray(value_M, np.float64), weight_U)

    def __post_init__(self) -> None:
        if not len(self.index_M) == len(self.unit_M) == len(self.value_M):
            raise ValueError(
                say(
                    f"unit_M ({len(self.unit_M)}) and value_M ({len(self.value_M)}) must have as many entries as "
                    "index_M "
                    f"({len(self.index_M)}); give one per answer",
                    f"unit_M（{len(self.unit_M)}）与 value_M（{len(self.value_M)}）的项数须与 "
                    f"index_M（{len(self.index_M)}）相同；请每个回答给一项",
                )
            )
        if int(self.unit_M.max(initial=-1)) >= len(self.weight_U):
            raise ValueError(
                say(
                    f"weight_U ({len(self.weight_U)} units) must have an entry for unit {int(self.unit_M.max())}; "
                    "give one per unit",
                    f"weight_U（{len(self.weight_U)} 组）中须有第 {int(self.unit_M.max())} 组的一项；请每组给一项",
                )
            )

    def __len__(self) -> int:
        return len(self.weight_U)

    @property
    def size_U(self) -> np.ndarray:
        return np.bincount(self.unit_M, minlength=len(self.weight_U))

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """(position in M of each unit's answers, M where a unit has no more; whether there is one),
        [U, K] each.
        """
        at_UK = padded_index(self.unit_M, len(self.weight_U))
        return at_UK, at_UK < len(self.unit_M)

    def values(self, at_UK: np.ndarray) -> np.ndarray:
        return np.append(self.value_M, 0.0)[at_UK]

    def rewards(self, r_C: Tensor, at_UK: np.ndarray) -> Tensor:
        return padded(take(r_C, self.index_M), at_UK, 0.0)


def unit_edges(
    units: Units, *, higher_is_better: bool, ties: bool = False, edge_weight: str = "unit"
) -> tuple[Pairs, np.ndarray]:
    """Every comparison inside each unit, as pairs of candidates, and [P, 2] their values (better,
    worse).

    edge_weight "unit": the edges of one unit share its weight, so a ranking counts as one pair
    does; "edge": each has the unit's weight.
    `ties` keeps pairs of equal value, in the order given. Units of one answer have no edges.
    """
    if edge_weight not in ("unit", "edge"):
        raise ValueError(
            say(
                f"edge_weight ({edge_weight!r}) must be unit or edge; use 'unit'",
                f"edge_weight（{edge_weight!r}）须为 unit 或 edge；请用 'unit'",
            )
        )
    at_UK, real_UK = units.table()
    score_UK = units.values(at_UK) * (1 if higher_is_better else -1)
    both_UKK = real_UK[:, :, None] & real_UK[:, None, :]
    beats_UKK = both_UKK & (score_UK[:, :, None] > score_UK[:, None, :])
    if ties:
        equal_UKK = both_UKK & (score_UK[:, :, None] == score_UK[:, None, :])
        beats_UKK |= equal_UKK & np.triu(np.ones(at_UK.shape[1:] * 2, bool), 1)[None]
    unit_P, i_P, j_P = np.nonzero(beats_UKK)
    better_P, worse_P = at_UK[unit_P, i_P], at_UK[unit_P, j_P]
    weight_P = units.weight_U[unit_P].astype(np.float64)
    if edge_weight == "unit":
        weight_P = weight_P / np.bincount(unit_P, minlength=len(units))[unit_P]
    pairs = Pairs.of(units.index_M[better_P], units.index_M[worse_P], weight_P)
    return pairs, np.stack([units.value_M[better_P], units.value_M[worse_P]], axis=1)


def tier_edges(tiers: Units, edge_weight: str = "unit") -> Pairs:
    """Pairs of every two answers in different tiers; K(K-1)/2 of a strict order."""
    return unit_edges(tiers, higher_is_better=False, edge_weight=edge_weight)[0]


def score_margins(better: np.ndarray, worse: np.ndarray, kind: str, alpha: float) -> np.ndarray:
    """What a difference of scores asks of the rewards: "linear" alpha (s_w - s_l), "log" alpha
    log(s_w - s_l) (ODPO 2402.10571), "none" 0.

    Raises ValueError for "log" of a difference that is not positive.
    """
    gap = np.asarray(better, np.float64) - np.asarray(worse, np.float64)
    if kind == "none":
        return np.zeros_like(gap)
    if kind == "linear":
        return alpha * gap
    if kind != "log":
        raise ValueError(
            say(
                f"margin ({kind!r}) must be none, linear or log; use 'linear'",
                f"margin（{kind!r}）须为 none、linear 或 log；请用 'linear'",
            )
        )
    if len(gap) and gap.min() <= 0:
        raise ValueError(
            say(
                f"score difference ({gap.min():g}) must be positive for margin log; drop pairs whose chosen is "
                "not rated higher, or use linear",
                f"margin 为 log 时分差（{gap.min():g}）须为正；请去掉较优一方评分不更高的样本对，或用 linear",
            )
        )
    return alpha * np.log(gap)


def rating_edges(ratings: Units, margin: str = "none", alpha: float = 0.0, edge_weight: str = "unit") -> Pairs:
    """Pairs of every two answers with different scores, with margins from the difference."""
    pairs, score_P2 = unit_edges(ratings, higher_is_better=True, edge_weight=edge_weight)
    margin_P = score_margins(score_P2[:, 0], score_P2[:, 1], margin, alpha)
    return Pairs(pairs.better_P, pairs.worse_P, pairs.weight_P, margin_P, pairs.p_P)


def soft_edges(ratings: Units, tau: float = 1.0, edge_weight: str = "unit", *, ties: bool = True) -> Pairs:
    """Soft Bradley-Terry: pairs of every two answers, right with probability sigma((s_i - s_j) /
    tau); ties pull rewards together.
    """
    if tau <= 0:
        raise ValueError(
            say(
                f"tau ({tau}) must be positive; use hard pairs for its limit 0",
                f"tau（{tau}）须为正；极限 0 请用硬性的样本对",
            )
        )
    pairs, score_P2 = unit_edges(ratings, higher_is_better=True, ties=ties, edge_weight=edge_weight)
    p_P = 1 / (1 + np.exp(-np.clip((score_P2[:, 0] - score_P2[:, 1]) / tau, None, 700)))
    return Pairs(pairs.better_P, pairs.worse_P, pairs.weight_P, pairs.margin_P, p_P)


def edge_loss(r_C: Tensor, pairs: Pairs) -> LossOut:
    """-p log sigma(r_w - r_l - m) - (1 - p) log sigma(-(r_w - r_l - m)) on rewards, whatever made
    them.
    """
    if not len(pairs):
        return LossOut(r_C.sum() * 0.0, 0.0)
    u_P = take(r_C, pairs.better_P) - take(r_C, pairs.worse_P)
    u_P = u_P - vector(pairs.margin_P, u_P)
    p_P = vector(pairs.p_P, u_P)
    value_P = -p_P * F.log_sigmoid(u_P) - (1 - p_P) * F.log_sigmoid(-u_P)
    return LossOut((value_P * vector(pairs.weight_P, value_P)).sum(), float(pairs.weight_P.sum()))


def bernoulli_kl_loss(r_C: Tensor, ratings: Units, eta: float = 1.0, edge_weight: str = "unit") -> LossOut:
    """Reward-aware preference optimisation (2502.00203): KL(sigma(eta (s_i - s_j)) || sigma(r_i -
    r_j)) over answers with different scores.
    """
    pairs = soft_edges(ratings, 1 / eta, edge_weight, ties=False)
    out = edge_loss(r_C, pairs)
    p_P = np.clip(pairs.p_P, 1e-300, 1.0)
    q_P = np.clip(1 - pairs.p_P, 1e-300, 1.0)
    entropy = float((pairs.weight_P * -(p_P * np.log(p_P) + q_P * np.log(q_P))).sum())
    return LossOut(out.total - entropy, out.count)


def plackett_luce_loss(r_C: Tensor, tiers: Units, top_k: int | None = None, scale: str = "pair") -> LossOut:
    """-sum over answers of [r_i - log(e^{r_i} + sum of e^{r_j} over lower tiers)] per unit
    (2305.18290 appendix; ties: nobody in a tier beats another of it).

    Members of one tier never compete. top_k: only the k best tiers choose. scale "pair" divides a
    unit by K - 1, which keeps the size of one pair; "sum" does not. Units in which nothing competes
    are not counted.
    """
    if scale not in ("pair", "sum"):
        raise ValueError(
            say(
                f"scale ({scale!r}) must be pair or sum; use 'pair'", f"scale（{scale!r}）须为 pair 或 sum；请用 'pair'"
            )
        )
    if top_k is not None and top_k < 1:
        raise ValueError(
            say(
                f"top_k ({top_k}) must be at least 1; leave it out to rank all answers",
                f"top_k（{top_k}）至少为 1；不设置则对所有回答排序",
            )
        )
    at_UK, real_UK = tiers.table()
    tier_UK = _dense_tiers(tiers.values(at_UK), real_UK)
    lower_UKK = real_UK[:, :, None] & real_UK[:, None, :] & (tier_UK[:, None, :] > tier_UK[:, :, None])
    chooses_UK = lower_UKK.any(axis=2) & (tier_UK < (top_k or np.inf))
    counted_U = chooses_UK.any(axis=1)
    if not counted_U.any():
        return LossOut(r_C.sum() * 0.0, 0.0)
    weight_U = tiers.weight_U * counted_U / (np.maximum(tiers.size_U - 1, 1) if scale == "pair" else 1)
    r_UK = tiers.rewards(r_C, at_UK)
    competes_UKK = paddle.to_tensor(lower_UKK | np.eye(at_UK.shape[1], dtype=bool)[None])
    others_UKK = paddle.where(competes_UKK, r_UK.unsqueeze(1), paddle.full([1], ABSENT, dtype=r_UK.dtype))
    value_UK = paddle.logsumexp(others_UKK, axis=2) - r_UK
    return LossOut((value_UK * vector(chooses_UK * weight_U[:, None], r_UK)).sum(), competing(tiers))


def _dense_tiers(value_UK: np.ndarray, real_UK: np.ndarray) -> np.ndarray:
    """Tiers renumbered 0, 1, ... in each unit, so that top_k counts tiers that exist."""
    out = np.zeros(value_UK.shape, np.int64)
    for u in range(len(value_UK)):
        out[u, real_UK[u]] = np.unique(value_UK[u, real_UK[u]], return_inverse=True)[1].reshape(-1)
    return out


def lipo_lambda_loss(r_C: Tensor, ratings: Units) -> LossOut:
    """LiPO-lambda (2402.01878): sum over s_i > s_j of |G_i - G_j| |D_i - D_j| (-log sigma(r_i -
    r_j)) per unit; G = 2^s - 1, D = 1 / log2(1 + rank by r).

    Ranks are of the present rewards and carry no gradient; ties of r keep the order given.
    """
    pairs, score_P2 = unit_edges(ratings, higher_is_better=True, edge_weight="edge")
    if not len(pairs):
        return LossOut(r_C.sum() * 0.0, 0.0)
    at_UK, real_UK = ratings.table()
    r_UK = np.where(real_UK, ratings.rewards(r_C.detach(), at_UK).numpy().astype(np.float64), -np.inf)
    rank_UK = np.argsort(np.argsort(-r_UK, axis=1, kind="stable"), axis=1, kind="stable") + 1
    discount_C = np.zeros(r_C.shape[0])
    discount_C[ratings.index_M[at_UK[real_UK]]] = (1 / np.log2(1 + rank_UK))[real_UK]
    gain_P = np.abs(np.exp2(score_P2[:, 0]) - np.exp2(score_P2[:, 1]))
    lambda_P = gain_P * np.abs(discount_C[pairs.better_P] - discount_C[pairs.worse_P])
    weighted = Pairs(pairs.better_P, pairs.worse_P, pairs.weight_P * lambda_P, pairs.margin_P, pairs.p_P)
    return LossOut(edge_loss(r_C, weighted).total, competing(ratings))


def infonca_loss(r_C: Tensor, ratings: Units, alpha: float = 1.0) -> LossOut:
    """InfoNCA (2402.05369): -sum_i q_i log softmax(r)_i with q = softmax(s / alpha) per unit; its
    minimum is q's entropy. Units of one are not counted.
    """
    if alpha <= 0:
        raise ValueError(
            say(
                f"alpha ({alpha}) must be positive; it is the temperature of the scores",
                f"alpha（{alpha}）须为正；它是评分的温度",
            )
        )
    at_UK, real_UK = ratings.table()
    weight_U = ratings.weight_U * (ratings.size_U > 1)
    if not weight_U.any():
        return LossOut(r_C.sum() * 0.0, 0.0)
    score_UK = np.where(real_UK, ratings.values(at_UK) / alpha, -np.inf)
    score_UK = score_UK - np.max(score_UK, axis=1, keepdims=True, initial=ABSENT)
    q_UK = np.exp(score_UK) / np.maximum(np.exp(score_UK).sum(axis=1, keepdims=True), 1e-300)
    r_UK = ratings.rewards(r_C, at_UK)
    absent = paddle.full([1], ABSENT, dtype=r_UK.dtype)
    total_U1 = paddle.logsumexp(paddle.where(paddle.to_tensor(real_UK), r_UK, absent), axis=1, keepdim=True)
    return LossOut(((total_U1 - r_UK) * vector(q_UK * weight_U[:, None], r_UK)).sum(), float(weight_U.sum()))


def competing(ratings: Units) -> float:
    """Weight of the units that have two different scores."""
    at_UK, real_UK = ratings.table()
    value_UK = ratings.values(at_UK)
    low_U = np.where(real_UK, value_UK, np.inf).min(axis=1, initial=np.inf)
    high_U = np.where(real_UK, value_UK, -np.inf).max(axis=1, initial=-np.inf)
    return float(ratings.weight_U[high_U > low_U].sum())
