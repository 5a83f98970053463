"""How much likelier a prompt is among good answers than among bad ones: a logistic regression on
what the prompts look like (BCO 2404.04656, its matching of the underlying distributions). numpy
only, so that a few thousand rows need no other package.

Legend: N answers, D features, R rank of the features. Refuses to know: where features come from,
models, paddle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ernie_tune.config.language import say

_STEPS = 100
_GRADIENT = 1e-10  # of the objective over N


def fit_logistic(x_ND: np.ndarray, good_N: np.ndarray, penalty: float = 1.0) -> tuple[np.ndarray, float]:
    """(w, b) that minimise sum_i s_i log(1 + exp(-y_i (w x_i + b))) + penalty/2 |w|^2, y_i = 1 for
    good and -1 for bad, s_i = N / (2 N_kind): both kinds weigh alike, however many there are
    (scikit-learn's class_weight "balanced", its C is 1 / penalty). The bias is free of the penalty.

    Newton's method, with shorter steps where a full one would not descend, in the space that the
    rows span. Raises ValueError where a kind is missing.
    """
    good_N = np.asarray(good_N, bool)
    count, good = len(good_N), int(good_N.sum())
    if not 0 < good < count:
        raise ValueError(
            say(
                f"bco_density (true) must find good and bad answers, there are {good} and {count - good}; give "
                "both kinds, or unset it",
                f"bco_density（true）须有好的与坏的回答，现各有 {good} 与 {count - good} 个；请给出两类，或取消该设置",
            )
        )
    if penalty <= 0:
        raise ValueError(
            say(f"penalty ({penalty}) must be above 0; 1 is usual", f"penalty（{penalty}）须大于 0；通常为 1")
        )
    # w lies in the span of the rows, so R <= N numbers say what it is
    left_NR, size_R, basis_RD = np.linalg.svd(np.asarray(x_ND, np.float64), full_matrices=False)
    a_NR = np.column_stack([left_NR * size_R, np.ones(count)])
    sign_N = np.where(good_N, 1.0, -1.0)
    share_N = np.where(good_N, 0.5 / good, 0.5 / (count - good))  # s_i / N
    pull_R = np.append(np.full(len(size_R), penalty / count), 0.0)

    def value(v_R: np.ndarray) -> float:
        return float((share_N * np.logaddexp(0, -sign_N * (a_NR @ v_R))).sum() + (pull_R * v_R**2).sum() / 2)

    v_R = np.zeros(a_NR.shape[1])
    for _ in range(_STEPS):
        wrong_N = 1 / (1 + np.exp(np.clip(sign_N * (a_NR @ v_R), -500, 500)))
        gradient_R = -a_NR.T @ (share_N * sign_N * wrong_N) + pull_R * v_R
        if np.abs(gradient_R).max() < _GRADIENT:
            break
        curve_RR = (a_NR * (share_N * wrong_N * (1 - wrong_N))[:, None]).T @ a_NR + np.diag(pull_R)
        step_R, size = np.linalg.lstsq(curve_RR, gradient_R, rcond=None)[0], 1.0
        before = value(v_R)
        while size > 1e-8 and value(v_R - size * step_R) > before:
            size /= 2
        v_R = v_R - size * step_R
    return basis_RD.T @ v_R[:-1], float(v_R[-1])


@dataclass(frozen=True)
class PromptClassifier:
    """Tells prompts of good answers from prompts of bad ones. Features are moved to mean 0 and
    scaled to a mean squared length of 1: the states of a language model all point much the same
    way, and the penalty is made for lengths about 1.
    """

    mean_D: np.ndarray
    scale: float
    weight_D: np.ndarray
    bias: float

    @staticmethod
    def fit(x_ND: np.ndarray, good_N: np.ndarray) -> PromptClassifier:
        """ValueError as `fit_logistic`."""
        x_ND = np.asarray(x_ND, np.float64)
        mean_D = x_ND.mean(axis=0)
        spread = float(np.sqrt(((x_ND - mean_D) ** 2).sum(axis=1).mean()))
        scale = 1 / spread if spread > 1e-12 else 0.0
        return PromptClassifier(mean_D, scale, *fit_logistic((x_ND - mean_D) * scale, good_N))

    def logit(self, x_ND: np.ndarray) -> np.ndarray:
        """log p / (1 - p), p the probability that a prompt is one of a good answer."""
        out_N: np.ndarray = (np.asarray(x_ND, np.float64) - self.mean_D) * self.scale @ self.weight_D + self.bias
        return out_N


def density_ratio(logit_N: np.ndarray, low: float = 0.5, high: float = 10.0) -> np.ndarray:
    """p / (1 - p) within [low, high]: the weight of a bad answer. Raises ValueError for bounds that
    are none.
    """
    if not 0 <= low <= high:
        raise ValueError(
            say(
                f"bco_density_min ({low:g}) must be at most bco_density_max ({high:g}); swap them",
                f"bco_density_min（{low:g}）不能大于 bco_density_max（{high:g}）；请对调",
            )
        )
    return np.clip(np.exp(np.minimum(logit_N, 500.0)), low, high)
