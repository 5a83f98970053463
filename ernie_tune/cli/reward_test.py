"""`ernie-tune reward test`: the rewards of a run on right answers and on attacks, before hours are
spent on them.

Refuses to know: how rewards are computed, how answers are sampled.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ernie_tune.cli.train import trainer_of
from ernie_tune.cli.verbs import UsageError, file_and_settings
from ernie_tune.config.cpu import while_paddle_loads
from ernie_tune.config.language import padded, say
from ernie_tune.config.loader import load_config
from ernie_tune.config.stages import ONLINE_PRESETS, STAGES

if TYPE_CHECKING:
    from ernie_tune.config.arguments import RunConfig
    from ernie_tune.rewards.trial import Tried

_ROWS = 200  # rows that are tried, spread over the data
_SHOWN = 60


def run(args: list[str]) -> int:
    """ernie-tune reward test FILE [--samples N] [--rows N] [key=value | --key value ...]

    The rewards of a YAML file (stage RLVR or PPO, or UPO with a loss_type that samples) on right
    answers, which must earn 0.95 of what they can on average, and on texts that a policy would try
    instead, which must earn nothing. Exit code 1 where a test fails. --samples N: also N answers of
    the model; --rows N: so many rows (200).
    """
    words, samples, rows = _counted(args)
    config = load_config(*file_and_settings(words)).config  # no model is needed yet
    if not config.samples:
        name = ",".join(config.preference.loss_type) if config.model.stage == "UPO" else ""
        given = f"{config.model.stage}{f', loss_type {name}' if name else ''}"
        raise ValueError(
            say(
                f"stage ({given}) must be one that learns from rewards: RLVR, PPO, or UPO with loss_type "
                f"{', '.join(ONLINE_PRESETS)}; set it, or give another file",
                f"stage（{given}）须为用奖励学习的 RLVR、PPO，或 loss_type 为 {', '.join(ONLINE_PRESETS)} 的 UPO；"
                "请修改，或换用其他文件",
            )
        )
    with while_paddle_loads():
        from ernie_tune.rewards.trial import attacked, references
        from ernie_tune.trainers import assemble
        from ernie_tune.trainers.judges import rubric_of
        from ernie_tune.trainers.online import SampledAnswers

    # nobody rewards rows that bring answers of their own (judged ones of UPO, demonstrations)
    asked, taught = SampledAnswers.signals, ("sft",) if config.teacher.teacher_model else ()
    known = dict.fromkeys((*asked, *STAGES[config.model.stage].signals, *taught))
    sets = assemble.train_sets(config, tuple(known))
    every = [some[i] for some in sets for i in range(len(some))]
    records = _spread([record for record in every if record.signal in asked], rows)
    if not records:
        raise ValueError(
            say(
                f"train_dataset_path ({len(every)} rows) must hold prompts that are answered by sampling; add verifiable rows",
                f"train_dataset_path（{len(every)} 行）须含可供采样回答的提示；请加入 verifiable 数据",
            )
        )
    rubric = rubric_of(config, None, None)
    rubric.know(records)
    reference = references(rubric, records)
    lines = attacked(rubric, records)
    for line in _table([*([reference] if reference else []), *lines]):
        print(line)
    if reference is None:
        print(
            say(
                f"none of the {len(records)} rows has a gold answer: right answers and attacks were not tried",
                f"{len(records)} 行都没有标准答案：未测试正确回答与攻击",
            )
        )
    if samples:
        for line in _sampled(config, samples):
            print(line)
    failed = [line.name for line in [*([reference] if reference else []), *lines] if not line.passed]
    if failed:
        print(say(f"failed: {', '.join(failed)}", f"未通过：{', '.join(failed)}"))
    elif reference is not None:
        print(say("the rewards hold", "奖励通过测试"))
    return 1 if failed else 0


def _counted(args: Sequence[str]) -> tuple[list[str], int, int]:
    """The words without --samples N and --rows N, and both numbers. Raises UsageError."""
    rest, numbers = [], {"--samples": 0, "--rows": _ROWS}
    left = iter(args)
    for word in left:
        name, equals, value = word.partition("=")
        if name not in numbers:
            rest.append(word)
            continue
        value = value if equals else next(left, "")
        if not value.isdecimal():
            raise UsageError(
                say(f"{name} ({value}) must be a number, such as 200", f"{name}（{value}）须为数字，如 200")
            )
        numbers[name] = int(value)
    return rest, numbers["--samples"], numbers["--rows"]


def _spread(records: Sequence[Any], count: int) -> list[Any]:
    count = min(count or len(records), len(records))
    return [records[i * len(records) // count] for i in range(count)]


def _table(lines: Sequence[Tried]) -> list[str]:
    """Name, rows, mean, worst, bound; where it failed also the row and the text."""
    if not lines:
        return []
    heads = [say("tried", "尝试"), say("rows", "行"), say("mean", "平均"), say("worst", "最差"), say("bound", "界")]
    names = [_NAMES.get(line.name, line.name) for line in lines]
    width = max(len(str(name)) for name in [*names, heads[0]]) + 2
    width = max(width, 24)
    out = [padded(heads[0], width) + "".join(padded(head, 9) for head in heads[1:])]
    for line, name in zip(lines, names, strict=True):
        mark = "✓" if line.passed else "✗"
        numbers = (f"{line.rows}", f"{line.mean:.3f}", f"{line.worst:.3f}", f"{line.bound:.3f}")
        out.append(f"{padded(name, width)}{''.join(padded(n, 9) for n in numbers)}{mark}")
        if not line.passed:
            out.append(f"    {line.place}: {line.text[:_SHOWN]!r}")
    return out


_NAMES = {"reference": say("right answers (share)", "正确回答（占比）")}


def _sampled(config: RunConfig, count: int) -> list[str]:
    """What the model's own answers earn."""
    from ernie_tune.rewards.trial import total

    n = config.rollout.num_generations
    quiet = dataclasses.replace(config.rollout, log_completions=False)
    trainer: Any = trainer_of(config)(args=type(config)(**{**vars(config), "rollout": quiet}))
    records = _spread(trainer.prompts, math.ceil(count / n))
    groups = trainer.score(trainer.rollout(records, n))
    earned = [total(one, trainer.rubric) for group in groups for one in group.scored]
    known = [value for value in earned if value is not None]
    lines = [
        str(
            say(
                f"{len(earned)} answers of the model: "
                + (
                    f"mean {statistics.fmean(known):.3f}, spread {statistics.pstdev(known):.3f}"
                    if known
                    else "no reward"
                )
                + f"; {sum(g.spread for g in groups)} of {len(groups)} prompts have answers that differ",
                f"模型的 {len(earned)} 个回答："
                + (
                    f"平均 {statistics.fmean(known):.3f}，标准差 {statistics.pstdev(known):.3f}"
                    if known
                    else "没有奖励"
                )
                + f"；{len(groups)} 个提示中 {sum(g.spread for g in groups)} 个的回答有差别",
            )
        )
    ]
    answers = [
        (a.text, t)
        for g in groups
        for a, t in zip(g.answers, [total(s, trainer.rubric) for s in g.scored], strict=True)
    ]
    return lines + [f"    {'-' if t is None else f'{t:.3f}'}  {text[:_SHOWN]!r}" for text, t in answers[:8]]
