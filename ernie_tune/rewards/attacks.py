"""What a policy would write: the right answer as a row wants it, saying nothing, and what is tried
instead of the task.

Texts made from a row's own gold, so that no constant can happen to be right. None of the attacks
may earn more than saying nothing. Refuses to know: how checkers or functions judge them.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_tune.data.media.images import image_size
from ernie_tune.data.records import Record
from ernie_tune.rewards.functions import Called
from ernie_tune.rewards.reading import read_quantity
from ernie_tune.rewards.scores import Box, iou
from ernie_tune.rewards.verifiers import PARTIAL, VERIFIERS

_CIRCLED = str.maketrans("0123456789", "⓪①②③④⑤⑥⑦⑧⑨")
_LONG = 1 << 20
# What an attack may earn at most; others nothing. The whole picture overlaps any box a little, and
# IoU says how much.
ALLOWED = {"whole_picture": 0.1}
ABSTENTIONS = ("I do not know.", "不知道。")
_THOUGHT = "<think>\nlook at it\n</think>\n\n"


def reference_answer(gold: Any) -> str:
    """A gold answer as a policy would write it."""
    if isinstance(gold, Mapping):
        return json.dumps(gold, ensure_ascii=False)
    if isinstance(gold, list | tuple):
        return json.dumps(gold, ensure_ascii=False) if all(not isinstance(g, str) for g in gold) else str(gold[0])
    return str(gold)


def gold_of(record: Record) -> Any:
    """What is right: the row's answer, else what the first checker that knows one holds; None where
    nothing says so."""
    if record.reward is None or record.reward.answer is not None:
        return record.reward.answer if record.reward else None
    held = (v.spec[name] for v in record.reward.verifiers for name in ("gold", "golds") if name in v.spec)
    return next(held, None)


def reference_text(record: Record) -> str | None:
    """The whole of a right completion: the demonstration that the row ends with, else its gold in
    the form that its checkers ask for (thought, tag or box, relative corners, a table, the claims
    that prove it); None for a row without a gold answer."""
    shown = record.messages[len(record.prompt) :]
    if shown:
        thought = shown[-1].get("reasoning_content", "")
        return (f"<think>\n{thought}\n</think>\n\n" if thought else "") + shown[-1]["content"]
    specs = {v.name: v.spec for v in record.reward.verifiers} if record.reward else {}
    gold = gold_of(record)
    if gold is None and "redraw" in specs and record.reward is not None and record.reward.scene.get("objects"):
        return json.dumps(record.reward.scene["objects"])
    if gold is None:
        return None
    text = _table(gold) if "table" in specs and isinstance(gold, list) else reference_answer(_as_stated(gold, specs))
    style = next((spec["style"] for spec in specs.values() if "style" in spec), "auto")
    text = f"\\boxed{{{text}}}" if style == "boxed" else f"<answer>{text}</answer>" if style == "tag" else text
    thinks = record.mode == "think" or specs.get("format", {}).get("mode") == "think"
    return (_THOUGHT if thinks else "") + required_claims(record) + text


def reference_calls(record: Record) -> tuple[Called, ...]:
    """What a right answer has had shown: the target, where a checker asks for that."""
    target = record.reward.scene.get("target") if record.reward else None
    asks = record.reward is not None and any(v.name == "zoom" for v in record.reward.verifiers)
    if not asks or target is None or not record.images:
        return ()
    left, top, right, bottom = map(float, target)
    box, size = (left, top, right, bottom), image_size(record.images[0], str(record.meta))  # type: ignore[arg-type]
    return (Called("zoom", box, "", box, size),)


def required_claims(record: Record) -> str:
    """The evidence block with every claim that a row requires; empty for a row that asks for
    none."""
    asks = record.reward is not None and any(v.name == "evidence" for v in record.reward.verifiers)
    required = record.reward.evidence.get("required") if asks and record.reward else None
    return f"<evidence>{json.dumps(required, ensure_ascii=False)}</evidence>" if required else ""


def _as_stated(gold: Any, specs: Mapping[str, Mapping[str, Any]]) -> Any:
    """Boxes in the frame in which the answer states them."""
    spec = next((specs[name] for name in ("box", "box_iou", "boxes") if name in specs), {})
    frame, size = spec.get("frame"), spec.get("size")
    if not frame or not size or not isinstance(gold, list | tuple):
        return gold
    if gold and isinstance(gold[0], list | tuple):
        return [_as_stated(box, specs) for box in gold]
    return [round(x / side * frame, 4) for x, side in zip(gold, (*size[:2], *size[:2]), strict=True)]


def _table(rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def attacks(record: Record) -> dict[str, str]:
    """name -> text. Empty for a row without a gold answer."""
    gold = gold_of(record)
    if gold is None:
        return {}
    specs = {v.name: v.spec for v in record.reward.verifiers} if record.reward else {}
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
        "whole_picture": str(list(_whole(specs))),
        "the_picture_exists": '<evidence>[{"type": "exists", "subj": "picture"}]</evidence>',
        "thousand_claims": "<evidence>" + json.dumps([{"type": "exists", "subj": "thing"}] * 1000) + "</evidence>",
        "claim_copied": "<evidence>" + json.dumps([{"type": "exists", "subj": prompt[:200]}]) + "</evidence>",
    }
    found |= _near_numbers(gold, right, specs) | _boxes_again(gold)
    options = _options(record)
    if len(options) > 1:
        found["all_options"] = ", ".join(options)
    return {name: text for name, text in found.items() if not (name == "prompt_copied" and text.strip() == right)}


def evidence_attacks(record: Record) -> dict[str, str]:
    """The right answer with evidence that is not there: none of it may earn more than the answer
    alone. Empty for rows that ask for no evidence.
    """
    gold = gold_of(record)
    required = record.reward.evidence.get("required") if record.reward and required_claims(record) else None
    if gold is None or not isinstance(required, list):
        return {}
    right = reference_answer(gold)
    block = lambda claims: f"<evidence>{json.dumps(claims, ensure_ascii=False)}</evidence>{right}"  # noqa: E731
    bare = [{k: v for k, v in claim.items() if k != "box"} for claim in required]
    placed = [claim for claim in required if "box" in claim]
    found = {
        "right_alone": right,
        "right_and_no_claims": block([]),
        "right_and_the_picture_exists": block([{"type": "exists", "subj": "picture"}]),
        "right_and_open_evidence": f"<evidence>{json.dumps(required, ensure_ascii=False)}{right}",
        "right_and_two_blocks": block(required) + block(required),
        "right_and_evidence_thought": f"<think>{block(required)}</think>{right}",
        "right_and_false_claims": block([{**claim, "subj": f"no {claim.get('subj', '')}"} for claim in required]),
    }
    if placed:
        whole = _picture_of(record)
        found["right_and_no_places"] = block(bare)
        found["right_and_the_whole_picture"] = block([{**claim, "box": whole} for claim in placed])
        found["right_and_nan_boxes"] = block([{**claim, "box": [math.nan] * 4} for claim in placed])
        found["right_and_turned_boxes"] = block([{**claim, "box": claim["box"][::-1]} for claim in placed])
    return found


def _picture_of(record: Record) -> list[float]:
    """A box around all that the scene names and as much again."""
    scene = record.reward.scene if record.reward else {}
    boxes = [thing["box"] for name in ("objects", "ocr") for thing in scene.get(name, ()) if "box" in thing]
    return [0, 0, 4 * max((b[2] for b in boxes), default=1000), 4 * max((b[3] for b in boxes), default=1000)]


def _near_numbers(gold: Any, right: str, specs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    number = read_quantity(right) if not isinstance(gold, Mapping | list | tuple) else None
    if number is None:
        return {}
    found = {"range": f"between {number.value - 10:g} and {number.value + 10:g}"}
    if any(sign.isdigit() for sign in right):
        found["circled"] = right.translate(_CIRCLED)
    if not any(soft in specs for soft in PARTIAL):
        width = _tolerance(number.value, specs)
        found["near"] = f"{number.value + (1.5 * width if width > 1e-3 else 0.5 * abs(number.value) + 1):.10g}"
    return found


def _tolerance(number: float, specs: Mapping[str, Mapping[str, Any]]) -> float:
    """How far from a gold number the first checker that has a tolerance goes, by its row's spec or
    its own default; 0 where none has."""
    for name, spec in specs.items():
        known = inspect.signature(VERIFIERS[name]).parameters if name in VERIFIERS else {}
        tol, rel = (spec.get(n, known[n].default) if n in known else None for n in ("tol", "rel"))
        if rel is not None:
            return float(max(tol or 0.0, rel * abs(number)))
    return 0.0


def _boxes_again(gold: Any) -> dict[str, str]:
    """The gold box said twice where one is asked for; of several, the first said as often as there
    are."""
    if not isinstance(gold, list | tuple) or not gold:
        return {}
    if isinstance(gold[0], list | tuple):
        return {"first_box_only": json.dumps([list(gold[0])] * len(gold))} if len(gold) > 1 else {}
    return {"box_twice": f"{list(gold)}, {list(gold)}"} if len(gold) == 4 else {}


def _whole(specs: Mapping[str, Mapping[str, Any]]) -> Box:
    spec = next((specs[name] for name in ("box", "box_iou", "boxes") if name in specs), {})
    width, height = (spec["frame"],) * 2 if spec.get("frame") else spec.get("size", (1000, 1000))[:2]
    return (0.0, 0.0, float(width), float(height))


def allowed(record: Record, name: str) -> float:
    """What an attack may earn of a checker that gives parts of an answer its part: half of a soft
    one's for the gold among other words, the gold box's share of the picture for the whole picture,
    what one of several boxes is worth; nothing otherwise."""
    gold = gold_of(record)
    specs = {v.name: v.spec for v in record.reward.verifiers} if record.reward else {}
    boxed = isinstance(gold, list | tuple) and bool(gold)
    if name == "whole_picture" and boxed and len(gold) == 4 and not isinstance(gold[0], list | tuple | str):
        spec = next((specs[n] for n in ("box", "box_iou") if n in specs), {})
        size = spec.get("size", (1000, 1000))
        return max(ALLOWED[name], iou((0.0, 0.0, float(size[0]), float(size[1])), (gold[0], gold[1], gold[2], gold[3])))
    if name == "first_box_only":
        return 1 / len(gold)
    if "ocr_ned" in specs:  # any two texts have letters in common
        return 0.5
    if name in ("gold_or_not", "said_a_thousand_times", "another_box", "two_tags") and any(s in specs for s in PARTIAL):
        return 0.5
    return ALLOWED.get(name, 0.0)


def _options(record: Record) -> list[str]:
    for verifier in record.reward.verifiers if record.reward else ():
        given = verifier.spec.get("options")
        if isinstance(given, Mapping):
            return list(given)
    return []
