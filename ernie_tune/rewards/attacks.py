"""What a policy would try instead of the task: texts made from a row's own gold, none of which may
earn more than saying nothing.

Refuses to know: which checkers or functions judge them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ernie_tune.data.records import Record
from ernie_tune.rewards.reading import read_quantity

_CIRCLED = str.maketrans("0123456789", "⓪①②③④⑤⑥⑦⑧⑨")
_LONG = 1 << 20
# What an attack may earn at most; others nothing. The whole picture overlaps any box a little, and
# IoU says how much.
ALLOWED = {"whole_picture": 0.1}


def reference_answer(gold: Any) -> str:
    """A gold answer as a policy would write it."""
    if isinstance(gold, Mapping):
        return json.dumps(gold, ensure_ascii=False)
    if isinstance(gold, list | tuple):
        return json.dumps(gold, ensure_ascii=False) if all(not isinstance(g, str) for g in gold) else str(gold[0])
    return str(gold)


def attacks(record: Record) -> dict[str, str]:
    """name -> text. Empty for a row without a gold answer. `honest_repeats` alone is right: the
    same box said twice.
    """
    gold = record.reward.answer if record.reward else None
    if gold is None:
        return {}
    right = reference_answer(gold)
    prompt = " ".join(str(message.get("content", "")) for message in record.prompt)
    found = {
        "empty": "",
        "spaces": "   \n ",
        "only_tags": "<think></think><answer></answer>",
        "thought_only": f"<think>{right}</think>",
        "thought_never_closed": f"<think>{right}",
        "another_box": f"\\boxed{{{right}}} \\boxed{{something else}}",
        "two_tags": f"<answer>{right}</answer><answer>something else</answer>",
        "gold_or_not": f"{right} or not {right}",
        "said_a_thousand_times": " ".join([right] * 1000),
        "prompt_copied": prompt[:_LONG],
        "a_megabyte": right + "x" * _LONG,
        "never_closed": f"\\boxed{{{right}",
        "nan": "NaN",
        "whole_picture": "[0, 0, 1000, 1000]",
        "the_picture_exists": '<evidence>[{"type": "exists", "subj": "picture"}]</evidence>',
        "thousand_claims": "<evidence>" + json.dumps([{"type": "exists", "subj": "thing"}] * 1000) + "</evidence>",
    }
    number = read_quantity(right) if not isinstance(gold, Mapping | list | tuple) else None
    if number is not None:
        found["range"] = f"between {number.value - 10:g} and {number.value + 10:g}"
        found["near"] = f"{number.value * 1.5 + 1:g}"
        found["circled"] = right.translate(_CIRCLED)
    options = _options(record)
    if options:
        found["all_options"] = ", ".join(options)
    return {name: text for name, text in found.items() if not (name == "prompt_copied" and text.strip() == right)}


def _options(record: Record) -> list[str]:
    for verifier in record.reward.verifiers if record.reward else ():
        given = verifier.spec.get("options")
        if isinstance(given, Mapping):
            return list(given)
    return []
