"""Which way is better for each number that a run measures: one table for pages, tables and colours.

Refuses to know: values, where they are shown. A number that is not in the table is neither good nor
bad news.
"""

from __future__ import annotations

import re

_MORE = 1
_LESS = -1
# Full names win over the part before their first slash: `rewards/rejected` over `rewards`,
# `accuracy` for `accuracy/charts`.
BETTER = {
    **dict.fromkeys(
        (
            *("exact_match", "token_f1", "squad_exact_match", "squad_f1", "anls", "relaxed_accuracy", "iou"),
            *("accuracy", "macro_f1", "token_acc", "preference_accuracy", "rating_spearman"),
            *("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen", "reward", "margin"),
            *("pass", "evidence", "evidence/precision", "evidence/recall", "evidence/twin_consistency"),
            *("evidence/invariance", "zoom", "redraw", "exact", "count", "numeric"),
        ),
        _MORE,
    ),
    **dict.fromkeys(
        (
            *("loss", "nll", "perplexity", "calibration_error", "rating_mae", "dropped_rows", "frac_reward_zero_std"),
            *("rewards/rejected", "rewards/longer_preferred", "rewards/saturated", "logps/rejected"),
            *("evidence/contradicted", "evidence/unverifiable", "evidence/blind_consistency"),
        ),
        _LESS,
    ),
}


def better(name: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither can be said. `eval_` and `train_`
    before a name, and a part after it (`/charts`, `@8`), do not count.
    """
    for prefix in ("eval_", "train_"):
        name = name.removeprefix(prefix)
    found = BETTER.get(name, BETTER.get(re.split("[/@]", name)[0], 0))
    return found or (_LESS if name.endswith("_loss") else 0)


def gain(name: str, before: float | None, after: float | None, digits: int = 4) -> int:
    """1 where the step from `before` to `after` is good news, -1 where bad, 0 where it is none:
    equal to `digits` decimals, unknown, or neutral.
    """
    if before is None or after is None:
        return 0
    change = round(after - before, digits)
    return 0 if change == 0 else better(name) * (1 if change > 0 else -1)
