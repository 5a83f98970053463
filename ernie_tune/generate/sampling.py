"""Scores of one row -> its next token, on the host in float64: the same seed gives the same token
on every device, whatever else is in the batch.

The vocabulary is never sorted: a draw walks the sum of the weights in the order of the ids, and
what top-k and top-p keep is found by selection. Legend: V vocabulary, n ids that are left of it.
Refuses to know: the model, caches, text, other rows.
"""

from __future__ import annotations

import numbers
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ernie_tune.config.language import say


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep everything;
    `n` samples share the prompt's prefill.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0  # ids below this share of the likeliest one's probability are never sampled
    repetition_penalty: float = 1.0
    # times how often a token was sampled so far, taken from its score
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0  # taken from the score of a token that was sampled so far
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    # never sampled: image placeholders and markers cannot be answered
    banned_ids: tuple[int, ...] = ()
    n: int = 1
    seed: int = 0
    top_logprobs: int = 0  # how many of the likeliest tokens to tell beside the chosen one
    note_kept: bool = False  # tell which ids top_k, top_p and min_p left for each draw

    def __post_init__(self) -> None:
        self._check_kinds()
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "be at least 1"),
            ("temperature", self.temperature >= 0, "be at least 0; 0 is greedy"),
            ("top_p", 0 < self.top_p <= 1, "be in (0, 1]; 1 keeps everything"),
            ("top_k", self.top_k >= 0, "be at least 0; 0 keeps everything"),
            ("min_p", 0 <= self.min_p <= 1, "be in [0, 1]; 0 keeps everything"),
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
                raise ValueError(
                    say(
                        f"stop_strings ({text!r}) must be text, not empty, without half a surrogate; drop it",
                        f"stop_strings（{text!r}）须为非空文本，且不含半个代理字符；请去掉它",
                    )
                )
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                say(
                    f"n ({self.n}) must be 1 with temperature (0): greedy samples are all the same; set temperature above 0",
                    f"temperature 为 0 时 n（{self.n}）须为 1：贪心采样的结果都相同；请将 temperature 设为大于 0",
                )
            )

    def _check_kinds(self) -> None:
        """Raises ValueError for a number that is none, or no whole one where that is meant."""
        for name, default in type(self).__dataclass_fields__.items():
            value, whole = getattr(self, name), isinstance(default.default, int)
            number = isinstance(value, numbers.Integral if whole else numbers.Real)
            asked = isinstance(default.default, float | int) and not isinstance(default.default, bool)
            if asked and (not number or isinstance(value, bool)):
                kind = say("a whole number", "整数") if whole else say("a number", "数字")
                raise ValueError(
                    say(
                        "{name} ({value!r}) must be {kind}",
                        "{name}（{value!r}）须为{kind}",
                        name=name,
                        value=value,
                        kind=kind,
                    )
                )

    @cached_property
    def stop_bytes(self) -> int:
        """Bytes of the longest stop string, 0 without one."""
        return max((len(text.encode()) for text in self.stop_strings), default=0)


@dataclass(frozen=True)
class SampledToken:
    """A token and how likely it was.

    `logp`: under softmax(scores / temperature) over what is not banned (temperature 1 when greedy),
    before penalties, truncation and constraints. `sampled_logp`: under the distribution that it was
    drawn from, all of these included; equal to `logp` where there are none; 0 for a token that had
    no other choice (greedy, forced). `top`: the likeliest ids and their `logp`. `kept`: the ids
    that it was drawn from, in order, where `SamplingParams.note_kept` asks for them.
    """

    token_id: int
    logp: float
    sampled_logp: float
    top: tuple[tuple[int, float], ...] = ()
    kept: np.ndarray | None = None


def choose(
    scores_V: np.ndarray,
    params: SamplingParams,
    rng: np.random.Generator,
    seen: Collection[int] = (),
    answer: Sequence[int] = (),
    allowed_V: np.ndarray | None = None,
    forced: int | None = None,
) -> SampledToken:
    """The next token of one row. `seen`: ids of prompt and answer, for the repetition penalty;
    `answer`: those of the answer so far, for the other two; `allowed_V`: which ids may be chosen
    (None: all); `forced`: the id that it has to be.

    Takes one number from `rng` unless it is greedy, forced or not. Raises ValueError where no id
    may be chosen.
    """
    temperature, uniform = params.temperature or 1.0, rng.random() if params.temperature else 0.0
    scores = scores_V.astype(np.float64)
    scores[list(params.banned_ids)] = -np.inf
    steered = _steered(scores, params, seen, answer, allowed_V)
    if not np.isfinite(steered.max()):
        raise ValueError(
            say(
                "the tokens that may follow (0) must be at least 1; allow one that is not in banned_ids",
                "可以接续的 token（现为 0 个）至少须有 1 个；请允许一个不在 banned_ids 中的",
            )
        )
    weights = _weights(scores, temperature)
    total = weights.sum()
    drawn_logp, ids = 0.0, None
    if forced is not None:
        token = forced
    elif params.temperature == 0:
        token = int(steered.argmax())
    else:
        own = weights if steered is scores else _weights(steered, temperature)
        token, drawn_logp, ids = _draw(own, uniform, params)
    top = heaviest(weights, params.top_logprobs) if params.top_logprobs else []
    logp, *others = _log_shares(scores, [token, *top], temperature, total)
    return SampledToken(
        token,
        logp,
        logp if _plain(params, steered is scores, forced) else drawn_logp,
        tuple(zip(top, others, strict=True)),
        ids if params.note_kept else None,
    )


# Rows are weighed together as long as so many numbers stay in the processor's cache.
_TOGETHER = 2**18


def whole(params: SamplingParams) -> bool:
    """Whether nothing but temperature and banned ids shapes the draws, as `choose_alike` has it; of
    greedy ones the likeliest stays, whatever is cut.
    """
    steered = params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty
    cut = params.temperature and (params.top_p != 1 or params.top_k or params.min_p)
    return not (steered or cut or params.top_logprobs)


def choose_alike(
    scores_BV: np.ndarray, params: SamplingParams, rngs: Sequence[np.random.Generator]
) -> list[SampledToken | None]:
    """`choose` for rows of the same parameters, which are `whole`: the same to the last bit, in
    fewer passes; one number of each generator unless greedy. None for a row in which no id may be
    chosen.
    """
    out: list[SampledToken | None] = []
    step = max(1, _TOGETHER // scores_BV.shape[1])
    for first in range(0, len(rngs), step):
        scores = scores_BV[first : first + step].astype(np.float64)
        scores[:, list(params.banned_ids)] = -np.inf
        top_B1 = scores.max(-1, keepdims=True)
        best_B = scores.argmax(-1)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            scores -= top_B1
            if params.temperature:
                scores /= params.temperature
            weights = np.exp(scores)
        total_B = weights.sum(-1)
        upto = np.cumsum(weights, -1) if params.temperature else None
        for i, rng in enumerate(rngs[first : first + step]):
            uniform = rng.random() if upto is not None else 0.0
            if not np.isfinite(top_B1[i, 0]):
                out.append(None)
                continue
            token = int(best_B[i]) if upto is None else _walked(upto[i], weights[i], uniform)
            logp = float(scores[i, token] - np.log(total_B[i]))
            out.append(SampledToken(token, logp, logp if params.temperature else 0.0))
    return out


def _plain(params: SamplingParams, untouched: bool, forced: int | None) -> bool:
    """Whether the draw was from the very distribution that `logp` is of."""
    whole = params.top_p == 1 and not params.top_k and not params.min_p
    return bool(untouched and whole and params.temperature and forced is None)


def _steered(
    scores_V: np.ndarray,
    params: SamplingParams,
    seen: Collection[int],
    answer: Sequence[int],
    allowed_V: np.ndarray | None,
) -> np.ndarray:
    """Scores after penalties and constraints; the same array where there are none."""
    out = scores_V
    if params.repetition_penalty != 1:
        out = penalise(out, np.fromiter(seen, np.int64, len(seen)), params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        out = discourage(out, answer, params.frequency_penalty, params.presence_penalty)
    return out if allowed_V is None else np.where(allowed_V, out, -np.inf)


def penalise(scores_V: np.ndarray, ids: np.ndarray, penalty: float) -> np.ndarray:
    """Repetition penalty (1909.05858): scores of ids already seen are divided by it where positive,
    multiplied where negative.
    """
    out, s = scores_V.copy(), scores_V[ids]
    out[ids] = np.where(s > 0, s / penalty, s * penalty)
    return out


def discourage(scores_V: np.ndarray, answer: Sequence[int], frequency: float, presence: float) -> np.ndarray:
    """OpenAI's penalties: an id's score less `presence`, and less `frequency` for every time that
    it is in the answer so far; the prompt does not count.
    """
    out = scores_V.copy()
    ids, counts = np.unique(np.asarray(answer, np.int64), return_counts=True)
    out[ids] -= presence + frequency * counts
    return out


def _weights(scores_V: np.ndarray, temperature: float) -> np.ndarray:
    """exp(scores / temperature) with the largest at 1. It is subtracted first: near temperature 0
    the others then become 0 instead of all of them inf.
    """
    with np.errstate(over="ignore", under="ignore"):
        return np.exp((scores_V - scores_V.max()) / temperature)


def _log_shares(scores_V: np.ndarray, ids: Sequence[int], temperature: float, total: float) -> list[float]:
    """log softmax(scores / temperature) of some ids; `total`: the sum of the weights. The whole
    vocabulary is passed once, however many ids are asked for.
    """
    with np.errstate(over="ignore"):
        shares = (scores_V[list(ids)] - scores_V.max()) / temperature - np.log(total)
    return [float(share) for share in shares]


def _draw(weights_V: np.ndarray, uniform: float, params: SamplingParams) -> tuple[int, float, np.ndarray]:
    """(id, log of the probability with which it is drawn, the ids that it is drawn from): inverse
    transform sampling over the ids that are kept, in their order.
    """
    ids = kept(weights_V, params.top_k, params.top_p, params.min_p)
    weights = weights_V if ids is None else weights_V[ids]
    upto = np.cumsum(weights)
    at = _walked(upto, weights, uniform)
    logp = float(np.log(weights[at] / upto[-1]))
    if not params.note_kept:
        return at if ids is None else int(ids[at]), logp, np.zeros(0, np.int64)
    left = np.flatnonzero(weights)  # a banned id has no weight
    return at if ids is None else int(ids[at]), logp, left if ids is None else ids[left]


def _walked(upto: np.ndarray, weights: np.ndarray, uniform: float) -> int:
    """Where the walk along the sums of the weights comes to this share of them."""
    at = int(np.searchsorted(upto, uniform * upto[-1], side="right"))
    return at if at < len(upto) else int(np.flatnonzero(weights)[-1])  # the end is rounding


def kept(weights_V: np.ndarray, top_k: int, top_p: float, min_p: float = 0.0) -> np.ndarray | None:
    """The ids that survive min-p, then top-k, then top-p, in order; None: all. Of equal weights the
    lower ids survive; the heaviest always does.

    top-p keeps an id where the share of all heavier ones is below `top_p`.
    """
    ids = None
    if min_p > 0:
        ids = np.flatnonzero(weights_V >= min_p * weights_V.max())
    if 0 < top_k < (len(weights_V) if ids is None else len(ids)):
        weights = weights_V if ids is None else weights_V[ids]
        last = len(weights) - top_k
        bar = np.partition(weights, last)[last]
        above, level = np.flatnonzero(weights > bar), np.flatnonzero(weights == bar)
        chosen = np.sort(np.concatenate([above, level[: top_k - len(above)]]))
        ids = chosen if ids is None else ids[chosen]
    if top_p < 1:
        weights = weights_V if ids is None else weights_V[ids]
        chosen = _nucleus(weights, top_p * weights.sum(), weights.sum())
        ids = chosen if ids is None else ids[chosen]
    return ids


def _nucleus(weights_n: np.ndarray, need: float, total: float) -> np.ndarray:
    """Where the weights lie above which less than `need` of `total` lies, in order."""
    # Those lighter than the average of what may be left out are left out: together they are less
    # than that.
    bar, ties = _bar(weights_n[weights_n >= (total - need) / len(weights_n)], need)
    keep = weights_n > bar
    keep[np.flatnonzero(weights_n == bar)[:ties]] = True
    return np.flatnonzero(keep)


def _bar(left_n: np.ndarray, need: float) -> tuple[float, int]:
    """(the lightest weight that is needed to come to `need`, how many of that weight are): a radix
    selection, by the bits of the numbers.

    Positive float64 numbers lie in the order of their bits; each pass looks at those among which
    the bar is at 8 to 20 bits more.
    """
    for bits in (44, 28, 12):
        if len(left_n) <= 256:
            break
        bins_n = left_n.view(np.int64) >> bits
        first = bins_n.min()
        upto = np.cumsum(np.bincount(bins_n - first, weights=left_n)[::-1])
        at = min(int(np.searchsorted(upto, need)), len(upto) - 1)
        need -= upto[at - 1] if at else 0.0
        left_n = left_n[bins_n == first + len(upto) - 1 - at]
    left_n = np.sort(left_n)[::-1]
    count = max(int((np.cumsum(left_n) - left_n < need).sum()), 1)
    return float(left_n[count - 1]), int((left_n[:count] == left_n[count - 1]).sum())


def heaviest(weights_V: np.ndarray, count: int) -> list[int]:
    """The `count` ids of most weight, in order; ids that cannot be sampled are left out."""
    ids = kept(weights_V, count, 1.0)
    ids = np.arange(len(weights_V)) if ids is None else ids
    ids = ids[np.argsort(-weights_V[ids], kind="stable")][:count]
    return [int(i) for i in ids if weights_V[i] > 0]
