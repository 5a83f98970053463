"""Which settings of sampled answers do not go together, said before anything is loaded.

Refuses to know: how answers are sampled, paddle.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.language import Text, say

MOST_KEPT = 64  # ids that are noted of one draw
_SHOWN_FUNCTIONS = 12


def cut_problem(top_p: float, top_k: int, min_p: float, keep_mask: bool) -> Text | None:
    """Why answers that are drawn from a part of what is likely could not be learned from; None
    where they can.
    """
    if (top_p != 1 or top_k or min_p) and not keep_mask:
        return say(
            f"top_p ({top_p:g}), top_k ({top_k}) and min_p ({min_p:g}) must be 1, 0 and 0 when learning without "
            "keep_sampling_mask: training would have to know which tokens were left out; leave them out, or set it",
            f"学习时若不启用 keep_sampling_mask，top_p（{top_p:g}）、top_k（{top_k}）与 min_p（{min_p:g}）须为 1、0 和 0，"
            "否则训练须知道哪些 token 被排除；请去掉，或启用它",
        )
    if keep_mask and not 1 <= top_k <= MOST_KEPT:
        return say(
            f"top_k ({top_k}) must be from 1 to {MOST_KEPT} with keep_sampling_mask, which notes the ids of every draw; "
            "set it",
            f"启用 keep_sampling_mask（记录每次可选的 id）时 top_k（{top_k}）须为 1 至 {MOST_KEPT}；请设置",
        )
    return None


def function_problem(place: str, held: Sequence[str], kind: str = "", setting: str = "reward_funcs") -> Text:
    """Why `path/file.py:name` is no function to judge by: what the file holds, the nearest name.
    `kind`: the type of what has the name and cannot be called.
    """
    path, _, name = place.rpartition(":")
    close = difflib.get_close_matches(name, held, 1)
    shown = ", ".join(held[:_SHOWN_FUNCTIONS]) + (", ..." if len(held) > _SHOWN_FUNCTIONS else "")
    return say(
        f"{setting} ({place}) must name a function of {path}, which has none called {name!r}"
        + (f" (that is of type {kind})" if kind else "")
        + (f" but {shown}" if held else " nor any other")
        + (f"; did you mean {path}:{close[0]}?" if close else "; name one of them" if held else "; write it"),
        f"{setting}（{place}）须指明 {path} 中的函数，其中没有 {name!r}"
        + (f"（其类型为 {kind}）" if kind else "")
        + (f"，只有 {shown}" if held else "，也没有其他函数")
        + (f"；是否指 {path}:{close[0]}？" if close else "；请从中选择" if held else "；请写出该函数"),
    )


def clip_problem(reward_clip: Sequence[float], aggregation: str) -> Text | None:
    """Why rewards cannot be bounded like this; None where they can."""
    given = ", ".join(map(str, reward_clip))
    if reward_clip and (len(reward_clip) != 2 or reward_clip[0] >= reward_clip[1]):
        return say(
            f"reward_clip ({given}) must be two numbers, low and then high; give both, or leave it out",
            f"reward_clip（{given}）须为两个数，先低后高；请给出两者，或去掉",
        )
    if reward_clip and aggregation == "normalize_then_sum":
        return say(
            f"reward_clip ({given}) bounds a sum, reward_aggregation (normalize_then_sum) must then be "
            "sum_then_normalize; set it, or leave reward_clip out",
            f"reward_clip（{given}）限制的是总和，reward_aggregation（normalize_then_sum）须为 sum_then_normalize；请修改，"
            "或去掉 reward_clip",
        )
    return None


def group_problem(answers: int, generations: int) -> Text | None:
    """Why a process cannot take so many answers a step, None where they are whole groups."""
    if answers % generations == 0:
        return None
    near = sorted({max(1, answers // generations + k) * generations for k in (-1, 0, 1)})
    return say(
        f"per_device_train_batch_size x gradient_accumulation_steps ({answers} answers) must be a multiple of "
        f"num_generations ({generations}); take one of {near}",
        f"per_device_train_batch_size × gradient_accumulation_steps（{answers} 个回答）须为 "
        f"num_generations（{generations}）的倍数；可取 {near}",
    )


def round_problem(name: str, size: int | None, unit: int) -> Text | None:
    """Why a round cannot be as large as the setting `name` says; None where it is a whole number of
    optimizer steps of `unit`, or nobody says.
    """
    if size is None or size % unit == 0:
        return None
    near = sorted({max(1, size // unit + k) * unit for k in (-1, 0, 1)})
    return say(
        f"{name} ({size}) must be a multiple of what one optimizer step takes ({unit}); take one of {near}",
        f"{name}（{size}）须为每个优化步所需（{unit}）的倍数；可取 {near}",
    )


def sampling_rules(c: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings of runs that sample answers."""
    if not c.samples:
        return
    r, s, e = c.rollout, c.sampling, c.evidence
    if c.mismatch.repetition_penalty != 1:
        yield (
            "repetition_penalty",
            say(
                f"repetition_penalty ({c.mismatch.repetition_penalty:g}) must be 1 when learning: training would see "
                "another policy; leave it out, or punish repetition by a reward",
                f"学习时 repetition_penalty（{c.mismatch.repetition_penalty:g}）须为 1，否则训练看到的是另一策略；请去掉，"
                "或用奖励惩罚重复",
            ),
        )
    answers = c.train.per_device_train_batch_size * c.train.gradient_accumulation_steps
    group = group_problem(answers, r.num_generations)
    if group is not None:
        yield "per_device_train_batch_size", group
    # of one device; several take multiples of it
    for name, size, unit in (
        ("steps_per_generation", c.mismatch.steps_per_generation, c.train.gradient_accumulation_steps),
        ("generation_batch_size", c.mismatch.generation_batch_size, answers),
    ):
        whole = round_problem(name, size, unit)
        if whole is not None:
            yield name, whole
    cut = cut_problem(r.top_p, r.top_k, s.min_p, s.keep_sampling_mask)
    if cut is not None:
        yield "top_k" if s.keep_sampling_mask else "top_p", cut
    clip = clip_problem(s.reward_clip, r.reward_aggregation)
    if clip is not None:
        yield "reward_clip", clip
    if len(e.perception_entropy) not in (0, 2):
        given = ", ".join(map(str, e.perception_entropy))
        yield (
            "perception_entropy",
            say(
                f"perception_entropy ({given}) must be two weights, with the picture and without; give both",
                f"perception_entropy（{given}）须为两个权重：看图与不看图；请给出两者",
            ),
        )
    if unknown := [name for name in c.sampling.tools if name != "zoom" and ":" not in name]:
        yield (
            "tools",
            say(
                f"tools ({', '.join(unknown)}) must be of zoom or file.py:function; correct the name",
                f"tools（{', '.join(unknown)}）须为 zoom 或 file.py:function；请改正名称",
            ),
        )
    yield from _read_again(c)


def _read_again(c: RunConfig) -> Iterator[tuple[str, str]]:
    """What reads answers once more sees one picture a prompt, and all that could be sampled."""
    e, s = c.evidence, c.sampling
    perceives = e.perception_coef > 0 or bool(e.perception_entropy)
    again = {
        "evidence_dependence": e.evidence_dependence > 0,
        "evidence_boxes": e.evidence_boxes > 0,
        "perception_coef": perceives and bool(s.tools),
        "teacher_model": bool(c.teacher.teacher_model),
    }
    for name, given in (("tools", ", ".join(s.tools)), ("keep_sampling_mask", "true" if s.keep_sampling_mask else "")):
        other = next((key for key, used in again.items() if used), None)
        if given and other is not None:
            yield (
                name,
                say(
                    f"{name} ({given}) must not be set with {other}, which reads answers once more; leave one out",
                    f"{name}（{given}）不能与会再次读取回答的 {other} 同时使用；请去掉其一",
                ),
            )
