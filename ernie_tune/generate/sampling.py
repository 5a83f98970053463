"""Scores -> next tokens, on the host in float64: the same seed gives the same tokens on every device.

Legend: B rows, V vocabulary. Refuses to know: the model, caches, text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep everything; `n` samples share the prompt's prefill."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0  # times how often a token was sampled so far, taken from its score
    presence_penalty: float = 0.0  # taken from the score of a token that was sampled so far
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    banned_ids: tuple[int, ...] = ()  # never sampled: image placeholders and markers cannot be answered
    n: int = 1
    seed: int = 0
    top_logprobs: int = 0  # how many of the likeliest tokens to tell beside the chosen one

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "be at least 1"),
            ("temperature", self.temperature >= 0, "be at least 0; 0 is greedy"),
            ("top_p", 0 < self.top_p <= 1, "be in (0, 1]; 1 keeps everything"),
            ("top_k", self.top_k >= 0, "be at least 0; 0 keeps everything"),
            ("repetition_penalty", self.repetition_penalty > 0, "be above 0; 1 is none"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "be from -2 to 2; 0 is none"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "be from -2 to 2; 0 is none"),
            ("n", self.n >= 1, "be at least 1"),
            ("seed", self.seed >= 0, "be at least 0"),
            ("top_logprobs", self.top_logprobs >= 0, "be at least 0; 0 tells none"),
        )
        for name, ok, rule in checks:
            if not ok:
                raise ValueError(f"{name} ({getattr(self, name)}) must {rule}")
        for text in self.stop_strings:
            if not text or any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"stop_strings ({text!r}) must be text, not empty, without half a surrogate; drop it")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n ({self.n}) must be 1 with temperature (0): greedy samples are all the same; set temperature above 0"
            )

    @cached_property
    def stop_bytes(self) -> int:
        """Bytes of the longest stop string, 0 without one."""
        return max((len(text.encode()) for text in self.stop_strings), default=0)


def log_softmax(scores_BV: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis."""
    shifted = scores_BV - scores_BV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def penalise(scores_BV: np.ndarray, seen: Sequence[np.ndarray], penalty: float) -> np.ndarray:
    """Repetition penalty (1909.05858): scores of tokens already seen are divided by it where positive, multiplied where negative."""
    out = scores_BV.copy()
    for row, ids in enumerate(seen):
        s = out[row, ids]
        out[row, ids] = np.where(s > 0, s / penalty, s * penalty)
    return out


def discourage(
    scores_BV: np.ndarray, answers: Sequence[Sequence[int]], frequency: float, presence: float
) -> np.ndarray:
    """OpenAI's penalties: a token's score less `presence`, and less `frequency` for every time that it is in the answer so far; the prompt does not count."""
    out = scores_BV.copy()
    for row, answer in enumerate(answers):
        ids, counts = np.unique(np.asarray(answer, np.int64), return_counts=True)
        out[row, ids] -= presence + frequency * counts
    return out


def truncate(logp_V: np.ndarray, top_k: int, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """Ids that survive top-k, then top-p, most probable first, and their renormalised probabilities. The most probable id always survives."""
    if 0 < top_k < logp_V.shape[0]:
        ids = np.argpartition(-logp_V, top_k - 1)[:top_k]
        ids = ids[np.lexsort((ids, -logp_V[ids]))]
    else:
        ids = np.argsort(-logp_V, kind="stable")
    probs = np.exp(logp_V[ids])
    probs /= probs.sum()
    if top_p < 1:
        keep = np.cumsum(probs) - probs < top_p
        ids, probs = ids[keep], probs[keep] / probs[keep].sum()
    return ids, probs


def choose(
    scores_BV: np.ndarray,
    params: SamplingParams,
    rngs: Sequence[np.random.Generator],
    seen: Sequence[np.ndarray],
    answers: Sequence[Sequence[int]] = (),
    allowed_V: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Next token of each row and its log-probability under softmax(scores / temperature) (temperature 1 when greedy), before penalties and truncation.

    `seen`: tokens of prompt and answer, for the repetition penalty; `answers`: those of the answer so far, for the other two; `allowed_V`: which
    tokens may be chosen (None: all). Raises ValueError where none may be.
    """
    scores = _allowed(scores_BV, params)
    steered = penalise(scores, seen, params.repetition_penalty) if params.repetition_penalty != 1 else scores
    if params.frequency_penalty or params.presence_penalty:
        steered = discourage(steered, answers, params.frequency_penalty, params.presence_penalty)
    if allowed_V is not None:
        steered = np.where(allowed_V, steered, -np.inf)
    if not np.isfinite(steered.max(-1)).all():
        raise ValueError("the tokens that may follow (0) must be at least 1; allow one that is not in banned_ids")
    if params.temperature == 0:
        picked = steered.argmax(-1)
        return picked, np.take_along_axis(log_softmax(scores), picked[:, None], 1)[:, 0]
    steered_logp = log_softmax(_cooled(steered, params.temperature))
    picked = np.empty(len(scores), np.int64)
    for row, rng in enumerate(rngs):
        ids, probs = truncate(steered_logp[row], params.top_k, params.top_p)
        # The last cumulative sum can fall short of 1 by rounding, so the index is clipped.
        picked[row] = ids[min(int(np.searchsorted(np.cumsum(probs), rng.random(), side="right")), len(ids) - 1)]
    logp = steered_logp if steered is scores else log_softmax(_cooled(scores, params.temperature))
    return picked, np.take_along_axis(logp, picked[:, None], 1)[:, 0]


def _cooled(scores_BV: np.ndarray, temperature: float) -> np.ndarray:
    """Scores over the temperature, the largest at 0 first: near temperature 0 the others then become -inf instead of all of them inf."""
    with np.errstate(over="ignore"):
        return (scores_BV - scores_BV.max(-1, keepdims=True)) / temperature


def _allowed(scores_BV: np.ndarray, params: SamplingParams) -> np.ndarray:
    scores = scores_BV.astype(np.float64)
    scores[:, list(params.banned_ids)] = -np.inf
    return scores


def logps(scores_BV: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Log-probabilities [B, V] that `choose` reports: before penalty and truncation, at the temperature (1 when greedy)."""
    return log_softmax(_cooled(_allowed(scores_BV, params), params.temperature or 1.0))


def likeliest(logp_V: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most probable (id, log-probability), in order; ids that cannot be sampled are left out."""
    ids = truncate(logp_V, min(count, len(logp_V)), 1.0)[0][:count]
    return tuple((int(i), float(logp_V[i])) for i in ids if np.isfinite(logp_V[i]))
