"""When routers choose again what they chose before, and who notes it where sampling did not.

Refuses to know: how routers choose, how choices are laid over a pack (models/replay.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.language import say
from ernie_tune.data.processor import Processor
from ernie_tune.data.units import collate_units
from ernie_tune.machine.placed import Placed
from ernie_tune.models.replay import COLUMN, recorded
from ernie_tune.train.rolled import Rolled


def replay_mode(config: RunConfig, updates_per_round: int, model: Any) -> str:
    """ "off", "R2" or "R3". "auto" is R3 with several updates a round, where it can be. Raises
    ValueError where it was asked for and cannot be.
    """
    asked = config.rollout.router_replay
    why = None
    if model.config.moe is None:
        why = say("a model without routers", "没有路由的模型")
    elif config.model.fine_tuning in ("Prompt", "PTuning", "Prefix"):
        why = say("virtual tokens, which are no tokens of an answer", "不属于回答的虚拟 token")
    if asked in ("off", "auto"):
        wanted = asked == "auto" and updates_per_round > 1 and why is None
        # what a turn's routers chose is noted for that turn alone
        return "off" if not wanted else "R2" if config.sampling.tools else "R3"
    if asked == "R3" and config.sampling.tools:
        why = say("tools, whose turns are sampled apart (R2 can)", "工具（各轮分别采样；可用 R2）")
    if why is not None:
        raise ValueError(
            say(
                "router_replay ({asked}) must be off with {why}; set off or auto",
                "使用{why}时 router_replay（{asked}）须为 off；请设为 off 或 auto",
                asked=asked,
                why=why,
            )
        )
    return asked


def note_experts(groups: Sequence[Rolled], size: int, policy: Placed, processor: Processor) -> None:
    """Which experts the tokens of a round go to by the policy as it is, where sampling did not note
    it: R2 for all, R3 for groups that were sampled on another rank. `size` groups at a time.
    """
    for i in range(0, len(groups), size):
        part = [group for group in groups[i : i + size] if COLUMN not in group.columns]
        if not any(policy.place.gather(bool(part))):  # a forward is everybody's where experts are apart
            continue
        batch = collate_units([group.unit for group in part or groups[i : i + size]], processor)
        with policy.whole():
            found = recorded(policy.forward, batch, policy.model.config)
        ends = np.cumsum([sum(d.num_tokens for d in group.unit.dialogues) for group in part])[:-1]
        for group, own in zip(part, np.split(found, ends), strict=True) if part else ():
            group.columns[COLUMN] = own
