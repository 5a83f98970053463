"""A prompt of a round with its judged answers; what must be known to make it again; what a round of
them amounts to.

Refuses to know: how they are sampled, dealt out or learned from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ernie_tune.checkpoint.state import Ranks
from ernie_tune.data.processor import Encoded
from ernie_tune.data.records import Record
from ernie_tune.data.units import Unit
from ernie_tune.generate.batch import Completion
from ernie_tune.objectives.advantages import deviation
from ernie_tune.objectives.objective import SUPPORT
from ernie_tune.rewards.functions import Answered, Called
from ernie_tune.rewards.rubric import Scored


@dataclass(frozen=True)
class AnsweredPrompt:
    """One prompt, as the model saw it, and the answers that were sampled."""

    number: int
    record: Record
    prompt: Encoded
    completions: tuple[Completion, ...]
    answers: tuple[Answered, ...]
    dialogues: tuple[Encoded, ...] = ()  # with what tools said and showed, where answers may call some


@dataclass
class Rolled:
    """One prompt of a round with its answers. `counts_G`: answers that count in the loss.
    `columns`: arrays over the unit's trained tokens by name.
    """

    number: int
    record: Record
    unit: Unit
    answers: tuple[Answered, ...]
    scored: tuple[Scored, ...]
    reward_G: np.ndarray
    counts_G: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def spread(self) -> bool:
        """Whether the answers' rewards differ: else the group teaches nothing."""
        known = self.reward_G[~np.isnan(self.reward_G)]
        return bool(len(known) > 1 and known.max() > known.min())

    @property
    def share_right(self) -> float | None:
        """The share of right answers; None where none was judged."""
        return None if np.isnan(self.reward_G).all() else float(np.mean(self.right_G >= 1))

    @property
    def right_G(self) -> np.ndarray:
        """How right each answer is, on [0, 1], apart from its form and its evidence; 0 for one that
        was not judged.
        """
        return np.array([one.right or 0.0 for one in self.scored])

    @property
    def tokens_G(self) -> np.ndarray:
        """Tokens of each answer, those of tools included."""
        return np.array([len(one.token_ids) for one in self.answers], np.float64)

    @property
    def length_G(self) -> np.ndarray:
        return np.array([int(d.trained_L.sum()) for d in self.unit.dialogues])


def group_state(group: Rolled) -> dict[str, Any]:
    """What a group is made again from, as JSON: tokens, rewards, what counts; without its prompt
    and its columns.
    """
    size = group.unit.shared or None
    # what an answer's tokens and log-probabilities do not tell again
    called = any(answer.calls for answer in group.answers)
    noted = ("sampled_logp_N", "old_logp_N", SUPPORT) if SUPPORT in group.columns else ()
    completions = []
    for dialogue, answer in zip(group.unit.dialogues, group.answers, strict=True):
        start = size if size is not None else dialogue.num_tokens - len(answer.token_ids)
        sampled = dialogue.trained_L[start:].tolist()
        completions.append([list(answer.token_ids), list(answer.logps), answer.finish_reason, sampled])
    return {
        "number": group.number,
        "completions": completions,
        "scored": [[dict(one.parts), dict(one.details), one.right, one.earned] for one in group.scored],
        "reward": [None if np.isnan(r) else float(r) for r in group.reward_G],
        "counts": group.counts_G.tolist(),
        **({"calls": [[dataclasses.astuple(call) for call in a.calls] for a in group.answers]} if called else {}),
        **({"columns": {name: group.columns[name].tolist() for name in noted}} if noted else {}),
    }


def support_of(completions: Sequence[Completion], most: int) -> np.ndarray:
    """The ids that each chosen token was drawn from, [N, most], -1 behind them; of a token that was
    drawn from something that nobody noted, the token alone.
    """
    rows = []
    for done in completions:
        kept = iter(done.kept)
        for token, chosen in zip(done.token_ids, done.sampled, strict=True):
            if chosen:
                rows.append(next(kept, np.array([token])))
    out = np.full((len(rows), most), -1, np.int64)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out


def _deviation(reward_G: np.ndarray) -> float:
    """Of the rewards of one prompt's answers: 0 of a single answer, nan where fewer than two of
    several were judged.
    """
    known = reward_G[~np.isnan(reward_G)]
    return 0.0 if len(reward_G) == 1 else float(np.std(known, ddof=1)) if len(known) > 1 else float("nan")


def measured(
    groups: Sequence[Rolled], attempts: int, judges: Sequence[str], ranks: Ranks, dropped: int = 0
) -> dict[str, float]:
    """Means over all ranks and all that was sampled, also what was replaced, under TRL's names.
    `attempts`: how often was drawn again; `dropped`: groups of the round that count for nothing.
    """

    flat = sum(not group.spread for group in groups)
    answers = [a for g in groups for a in g.answers]
    reward_C = np.concatenate([*(g.reward_G for g in groups), np.zeros(0)])
    length_C = np.array([len(a.token_ids) for a in answers], np.float64)
    ended_C = np.array([a.finished for a in answers], np.float64)
    columns = {"reward": reward_C, "completions/mean_length": length_C, "completions/clipped_ratio": 1 - ended_C}
    scored = [one for g in groups for one in g.scored]
    details = sorted({name for one in scored for name in one.details})
    for name in judges if len(judges) > 1 or not details else ():
        columns[f"rewards/{name}/mean"] = np.array([number_of(one.parts[name]) for one in scored])
    for name in details:
        key = name if "/" in name else f"rewards/{name}/mean"
        columns[key] = np.array([number_of(one.details.get(name)) for one in scored])
    columns["reward_std"] = np.array([_deviation(g.reward_G) for g in groups])
    columns["frac_groups_all_right"] = np.array([g.share_right == 1 for g in groups], np.float64)
    columns["frac_groups_all_wrong"] = np.array([g.share_right == 0 for g in groups], np.float64)
    right_C = np.concatenate([*(g.right_G for g in groups), np.zeros(0)])
    columns["completions/mean_terminated_length"] = length_C[ended_C > 0]
    columns[_RIGHT], columns[_WRONG] = length_C[right_C >= 1], length_C[right_C < 1]
    about_C = np.concatenate([*(_about_mean(g.reward_G) for g in groups), np.zeros(0)])
    long_C = np.concatenate([*(_about_mean(g.tokens_G) for g in groups), np.zeros(0)])
    for name, product in (
        ("xy", about_C * long_C),
        ("xx", about_C**2),
        ("yy", np.where(np.isnan(about_C), np.nan, long_C**2)),
    ):
        columns[_PRODUCTS + name] = product
    for name in judges:
        columns[f"rewards/{name}/none_share"] = np.array([one.parts[name] is None for one in scored], np.float64)
    mine = {}
    for name, values in columns.items():
        known = values[~np.isnan(values)]
        mine[name] = (float(known.sum()), float((known**2).sum()), len(known))
    lengths = (length_C.min(initial=np.inf), length_C.max(initial=0))
    told = ranks.gather((mine, flat, len(groups), *lengths, max((len(g.reward_G) for g in groups), default=0)))
    out = {}
    for name in sorted({name for means, *_ in told for name in means}):
        sums = [means.get(name, (0.0, 0.0, 0)) for means, *_ in told]
        if count := sum(count for *_, count in sums):
            out[name] = float(np.sum([total for total, *_ in sums])) / count
            if name.startswith("rewards/") and name.endswith("/mean"):
                square = float(np.sum([squares for _, squares, _ in sums])) / count
                out[name.removesuffix("mean") + "std"] = max(square - out[name] ** 2, 0.0) ** 0.5
    out["frac_reward_zero_std"] = sum(one[1] for one in told) / max(sum(one[2] for one in told), 1)
    if max(one[5] for one in told) == 1:  # a group of one has no spread, its round has
        del out["frac_reward_zero_std"]
        out["reward_std"] = deviation(reward_C, lambda sums: np.sum(ranks.gather(sums), axis=0))
    out |= _lengths(out)
    out["completions/min_length"] = float(min(one[3] for one in told))
    out["completions/max_length"] = float(max(one[4] for one in told))
    out["groups_refilled"], out["groups_dropped"] = float(attempts), float(dropped)
    return out


_RIGHT, _WRONG, _PRODUCTS = "right length", "wrong length", "length and reward "


def _about_mean(x_G: np.ndarray) -> np.ndarray:
    """Less the mean of those that are known."""
    return x_G - np.nanmean(x_G) if np.isfinite(x_G).any() else x_G


def _lengths(out: dict[str, float]) -> dict[str, float]:
    """How length goes with reward among the answers to one prompt (correlation), and how much
    longer right answers are than wrong ones, in tokens; takes what they are made of out.
    """
    xy, xx, yy = (out.pop(_PRODUCTS + name, 0.0) for name in ("xy", "xx", "yy"))
    right, wrong = out.pop(_RIGHT, None), out.pop(_WRONG, None)
    found = {"length/reward_corr": xy / (xx * yy) ** 0.5} if xx > 0 and yy > 0 else {}
    return found | ({} if right is None or wrong is None else {"length/right_minus_wrong": right - wrong})


def advantage_metrics(groups: Sequence[Rolled], ranks: Ranks) -> dict[str, float]:
    """Mean, deviation and largest size of the advantages that a round learns from, over its tokens
    on all ranks, and how many these are.
    """
    kept = [g.columns["advantage_N"][g.columns["keep_N"] > 0] for g in groups]
    x_N = np.concatenate([*kept, np.zeros(0)])
    told = ranks.gather((float(x_N.sum()), float((x_N**2).sum()), len(x_N), float(np.abs(x_N).max(initial=0.0))))
    total, squares, count = (float(np.sum([one[i] for one in told])) for i in range(3))
    mean = total / max(count, 1.0)
    deviation = max(squares / max(count, 1.0) - mean**2, 0.0) ** 0.5
    found = {"mean": mean, "std": deviation, "abs_max": max(one[3] for one in told)}
    return {"tokens_trained": count, **{f"advantage/{name}": value for name, value in found.items()}}


def answer_advantages(group: Rolled) -> np.ndarray:
    """The mean advantage of each answer's tokens, [G]; 0 for an answer without."""
    ends = np.cumsum(group.length_G)[:-1]
    return np.array([own.mean() if len(own) else 0.0 for own in np.split(group.columns["advantage_N"], ends)])


def told(number: int, group: Rolled) -> Iterator[dict[str, Any]]:
    """What the log of answers says of a group: one object an answer."""
    advantage_G = answer_advantages(group)
    asked = next((m["content"] for m in reversed(group.record.prompt) if m["role"] == "user"), "")
    for i, (answer, scored) in enumerate(zip(group.answers, group.scored, strict=True)):
        yield {
            "round": number,
            "prompt": group.number,
            "row": str(group.record.meta),
            **({"question": asked} if i == 0 else {}),  # once a group
            "images": [name if isinstance(name, str) else "" for name in group.record.images],
            "gold": group.record.reward.answer if group.record.reward else None,
            "sample": i,
            "text": answer.text,
            "tokens": len(answer.token_ids),
            "finish_reason": answer.finish_reason,
            **({"calls": [_call(one) for one in answer.calls]} if answer.calls else {}),
            "reward": None if np.isnan(group.reward_G[i]) else float(group.reward_G[i]),
            "rewards": {**scored.parts, **{k: v for k, v in scored.details.items() if k not in scored.parts}},
            "advantage": float(advantage_G[i]),
            **({"extra": dict(scored.extra)} if scored.extra else {}),
        }


def _call(one: Called) -> dict[str, Any]:
    """What there is to tell of a call of a tool."""
    known = {"box": one.box, "shown": one.shown, "arguments": dict(one.arguments), "result": one.result}
    return {"name": one.name, **{k: v for k, v in (known | {"problem": one.problem}).items() if v}}


def number_of(value: float | None) -> float:
    """A reward, nan where there is none."""
    return np.nan if value is None else float(value)


def parts_of(
    groups: Sequence[Rolled], first_N: np.ndarray, second_N: np.ndarray
) -> Iterator[tuple[Rolled, np.ndarray, np.ndarray]]:
    """Two columns of all groups' tokens, cut into each group's."""
    at = 0
    for group in groups:
        end = at + int(group.length_G.sum())
        yield group, first_N[at:end], second_N[at:end]
        at = end


def called_of(known: Sequence[Any]) -> Called:
    """A call from what JSON made of it."""
    name, box, problem, shown, size, *own = known
    return Called(name, tuple(box) if box else None, problem, tuple(shown) if shown else None, tuple(size), *own)
