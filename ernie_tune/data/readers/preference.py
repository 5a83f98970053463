"""Rows that judge answers: pairs, ratings, rankings, good/bad labels, checkable answers, and our
own form that holds any of them.

Refuses to know: how files are stored, which loss will use the judgement, how an answer is checked.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from ernie_tune.config.language import say
from ernie_tune.data.readers.fields import (
    DIALOGUES,
    QUERIES,
    Draft,
    Fields,
    Turn,
    finish,
    read_answer,
    read_answered,
    read_dialogue,
    read_flag,
)
from ernie_tune.data.readers.media import MEDIA_NAMES, read_columns
from ernie_tune.data.records import SIGNALS, Media, Message, Record, Reward, Verifier, show

_ANSWER = Turn({"role": "assistant", "content": ""})
DEFAULT_SCALE = (1.0, 5.0)  # of ratings, where a row names none
_LABELS = {
    **dict.fromkeys(("good", "true", "1", "yes", "desirable", "chosen"), True),
    **dict.fromkeys(("bad", "false", "0", "no", "undesirable", "rejected"), False),
}
# kinds of answers as other tools name them -> our checkers
_REWARD_TYPES = {"choice": "mcq", "number": "numeric", "bbox": "box_iou", "ocr": "ocr_ned"}
# signal -> what each candidate must have
_JUDGEMENTS = {"ranking": "rank", "rating": "score", "label": "label"}


def read_pair(f: Fields) -> Record:
    """chosen and rejected, as text, messages, or whole dialogues; ms-swift's messages with
    rejected_response or rejected_messages.
    """
    rejected_name = f.name("rejected", "rejected_response", "rejected_messages")
    rejected = read_answer(f, rejected_name, f.take(rejected_name))
    if f.has("chosen"):
        chosen = read_answer(f, "chosen", f.take("chosen"))
        context = read_dialogue(f) if f.has(*DIALOGUES, *QUERIES) else []
    else:
        context, chosen = split_answer(f, read_answered(f))
    prompt, (better, worse) = share_prompt(f, context, [chosen, rejected])
    drafts = [
        Draft(better, _side_media(f, "chosen"), rank=1.0),
        Draft(worse, _side_media(f, "rejected"), rank=2.0),
    ]
    if f.has("score"):
        scores, scale = f.nested("score", f.take("score")), read_scale(f)
        drafts = [
            dataclasses.replace(draft, score=to_unit(scores, name, scores.take(scores.name(name)), scale))
            for draft, name in zip(drafts, ("chosen", "rejected"), strict=True)
        ]
    margin, confidence = f.number_or(None, "margin"), f.number_or(1.0, "confidence", 0.0, 1.0)
    return finish(f, "pair", prompt, drafts, margin=margin, confidence=confidence)


def _side_media(f: Fields, side: str) -> tuple[tuple[Media, ...], tuple[Media, ...]]:
    """The images and videos of one side of a pair, such as `rejected_images`."""
    images, videos = (read_columns(f, i, [f"{side}_{name}" for name in names]) for i, names in enumerate(MEDIA_NAMES))
    return images, videos


def split_answer(f: Fields, turns: list[Turn]) -> tuple[list[Turn], list[Turn]]:
    """Cut a dialogue before the assistant turns that end it."""
    end = len(turns)
    while end and turns[end - 1].message["role"] == "assistant":
        end -= 1
    if end == len(turns):
        raise f.error("last", "roles", ", ".join(turn.message["role"] for turn in turns), who="assistant")
    return turns[:end], turns[end:]


def share_prompt(f: Fields, context: list[Turn], answers: list[list[Turn]]) -> tuple[list[Turn], list[list[Turn]]]:
    """The prompt and each answer's own turns. Answers that repeat the dialogue before them are cut
    where they stop being equal.
    """
    if all(answer[0].message["role"] == "assistant" for answer in answers):
        if not context:
            raise f.missing(*QUERIES, *DIALOGUES)
        return context, answers
    whole = [answer if answer[0].message["role"] != "assistant" else context + answer for answer in answers]
    differs = (i for i, turns in enumerate(zip(*whole, strict=False)) if any(turn != turns[0] for turn in turns))
    shared = next(differs, min(map(len, whole)))
    prompt, _ = split_answer(f, [*whole[0][:shared], _ANSWER])
    if not prompt or (context and context not in (prompt[: len(context)], prompt[-len(context) :])):
        raise f.error("prompt", "prompt", say(f"{len(prompt)} common turns", f"{len(prompt)} 轮相同"))
    return prompt, [dialogue[len(prompt) :] for dialogue in whole]


def read_scale(f: Fields) -> tuple[float, float]:
    """`scale`: [lowest, highest] score."""
    if not f.has("scale"):
        return DEFAULT_SCALE
    scale = f.items("scale")
    f.same_length("scale", scale, 2, "of lowest and highest")
    low = f.number("scale[0]", scale[0])
    high = f.number("scale[1]", scale[1], low)
    if low == high:
        raise f.error("range", "scale[1]", show(high), low=f"above {low}", high="inf")
    return low, high


def to_unit(f: Fields, field: str, value: Any, scale: tuple[float, float]) -> float:
    """A score on [0, 1]."""
    low, high = scale
    score = f.number(field, value, low, high, hint=', or add "scale": [lowest, highest]')
    return (score - low) / (high - low)


def read_responses(f: Fields, wanted: str = "") -> Record:
    """Any number of judged answers: an order or ranks (ranking), scores (rating), or labels.
    `wanted`: only this signal will do.
    """
    if f.has("responses", "candidates"):
        turns = read_dialogue(f)
        name = f.name("responses", "candidates")
        # {"A": ..., "B": ...}: the keys are the names that the order uses
        if isinstance(f.row[name], dict):
            names, items = list(f.row[name]), list(f.take(name).values())
        else:
            items = f.items(name)
            names = [chr(ord("A") + i) for i in range(len(items))]
        drafts = [_read_candidate(f, f"{name}[{i}]", item) for i, item in enumerate(items)]
    else:
        turns, answer = split_answer(f, read_answered(f))
        names, drafts = ["A"], [Draft(answer)]
    if not drafts:
        raise f.error("missing", "responses", say("an empty list", "空列表"), names="at least one response")
    prompt, tails = share_prompt(f, turns, [draft.turns for draft in drafts])
    drafts = [dataclasses.replace(draft, turns=tail) for draft, tail in zip(drafts, tails, strict=True)]
    drafts = _judge(f, drafts, names)
    for signal, judgement in _JUDGEMENTS.items():
        if wanted in ("", signal) and all(vars(draft)[judgement] is not None for draft in drafts):
            return finish(f, signal, prompt, drafts)
    needed = "an order, or one score, rank or label for each response"
    raise f.error("missing", "responses", f"{len(drafts)} responses", names=needed)


def _read_candidate(f: Fields, field: str, item: Any) -> Draft:
    """One response: text, or an object with text or messages and its own score, rank, label and
    images.
    """
    if isinstance(item, str):
        return Draft(read_answer(f, field, item))
    row = f.nested(field, item)
    name = row.name("messages", "text", "content", "response")
    turns = read_answer(row, name, row.take(name))
    return Draft(
        turns,
        (read_columns(row, 0), read_columns(row, 1)),
        score=to_unit(row, "score", row.take("score", "rating"), read_scale(f)) if row.has("score", "rating") else None,
        rank=row.number_or(None, "rank", 0.0),
        label=read_label(row, "label") if row.has("label") else None,
    )


def _judge(f: Fields, drafts: list[Draft], names: list[str]) -> list[Draft]:
    """Join the row's columns of judgements to its candidates."""
    n = len(drafts)
    if f.has("order", "ranking", "ranks"):
        ranks = read_ranks(f, n) if f.has("ranks") else read_order(f, f.take("order", "ranking"), names)
        drafts = [dataclasses.replace(draft, rank=rank) for draft, rank in zip(drafts, ranks, strict=True)]
    if f.has("scores", "ratings", "score", "rating"):
        name, scale = f.name("scores", "ratings", "score", "rating"), read_scale(f)
        value = f.take(name)
        scores = value if isinstance(value, list) else [value]
        f.same_length(name, scores, n, "response")
        drafts = [
            dataclasses.replace(draft, score=to_unit(f, name, score, scale))
            for draft, score in zip(drafts, scores, strict=True)
        ]
    return drafts


def read_ranks(f: Fields, n: int) -> list[float]:
    """`ranks`: one place for each response, 1 is best."""
    ranks = f.items("ranks")
    f.same_length("ranks", ranks, n, "response")
    return [f.number("ranks", rank, 0.0) for rank in ranks]


def read_order(f: Fields, order: Any, names: list[str]) -> list[float]:
    """The rank of each response from "B>A=C>D" (A is the first response) or tiers of 0-based
    indices, [[1], [0, 2], [3]].
    """
    if isinstance(order, str):
        tiers: list[Any] = [re.split(r"\s*[=＝]\s*", tier) for tier in re.split(r"\s*[>＞]\s*", order.strip())]
        tiers = [[names.index(name) if name in names else name for name in tier] for tier in tiers]
    else:
        tiers = [tier if isinstance(tier, list) else [tier] for tier in f.typed("order", order, list)]
    flat = [index for tier in tiers for index in tier]
    if any(type(index) is not int for index in flat) or sorted(flat) != list(range(len(names))):
        options = names if isinstance(order, str) else range(len(names))
        raise f.error("order", "order", show(order), options=", ".join(map(str, options)))
    place = {index: 1.0 + sum(map(len, tiers[:i])) for i, tier in enumerate(tiers) for index in tier}
    return [place[index] for index in range(len(names))]


def read_label(f: Fields, *names: str) -> bool:
    """true/false, 1/0, or a word such as good/bad, desirable/undesirable."""
    name = f.name(*names)
    if not isinstance(f.row[name], str):
        return read_flag(f, name)
    value = f.text(name).strip().lower()
    if value not in _LABELS:
        raise f.error("choice", name, show(value), options=", ".join(_LABELS))
    return _LABELS[value]


def read_labelled(f: Fields) -> Record:
    """One answer with `label` or `kto_tag`: good or bad on its own."""
    turns, answer = split_answer(f, read_answered(f))
    return finish(f, "label", turns, [Draft(answer, label=read_label(f, "kto_tag", "label"))])


def read_verifiable(f: Fields, names: Sequence[str] = (*DIALOGUES, *QUERIES)) -> Record:
    """A prompt and what checks its answers. A dialogue that ends with an answer is a demonstration
    too, and serves both trainings. `names`: of the fields that may hold the dialogue.
    """
    turns = read_dialogue(f, names)
    demonstrated = turns[-1].message["role"] == "assistant"
    return finish(f, "sft" if demonstrated else "verifiable", turns, reward=read_reward(f))


def read_reward(f: Fields) -> Reward:
    """answer (else ground_truth, else solution, which beside an answer is the way to it),
    verifiers, evidence, scene and hint, on the row or inside `reward`; verl's reward_model.
    """
    value = f.take("reward", "reward_model")
    inner = f.nested("reward", {"type": value} if isinstance(value, str) else {} if value is None else value)

    def first(*names: str) -> Any:
        return f.take(*names) if f.has(*names) else inner.take(*names)

    answer = first("answer", "ground_truth", "solution")
    parts = {name: first(name) for name in ("verifiers", "evidence", "scene", "hint")}
    if isinstance(parts["verifiers"], str | dict):
        parts["verifiers"] = [parts["verifiers"]]
    if isinstance(parts["evidence"], list):
        parts["evidence"] = {"required": parts["evidence"]}
    kinds = {"verifiers": list, "evidence": dict, "scene": dict, "hint": str}
    parts = {name: kind() if parts[name] is None else f.typed(name, parts[name], kind) for name, kind in kinds.items()}
    verifiers = [_read_verifier(f, i, item) for i, item in enumerate(parts["verifiers"])]
    if inner.has("type"):
        name = inner.text("type")
        verifiers.append(Verifier(_REWARD_TYPES.get(name, name)))
    if answer is None and not (verifiers or parts["evidence"] or parts["scene"]):
        raise f.missing("solution", "answer", "verifiers", "evidence", "scene")
    return Reward(answer, tuple(verifiers), parts["evidence"], parts["scene"], parts["hint"])


def _read_verifier(f: Fields, i: int, item: Any) -> Verifier:
    if isinstance(item, str):
        return Verifier(item)
    row = f.nested(f"verifiers[{i}]", item)
    spec = row.typed("spec", row.take("spec"), dict) if row.has("spec") else {}
    return Verifier(row.text("name"), row.number_or(1.0, "weight"), spec)


def read_sft_signal(f: Fields) -> Record:
    """Our own form of a demonstration: messages and exactly one response, or messages that end with
    the answer.
    """
    turns = read_dialogue(f)
    if f.has("responses"):
        responses = f.items("responses")
        f.same_length("responses", responses, 1, "row (give each further answer its own row)")
        turns = turns + read_answer(f, "responses[0]", responses[0])
    return finish(f, "sft", turns)


def read_text_signal(f: Fields) -> Record:
    """Our own form of a text, as `convert` writes it: one message of role "text"."""
    messages = f.items("messages")
    f.same_length("messages", messages, 1, "row of signal text")
    row = f.nested("messages[0]", messages[0])
    if row.text("role") != "text":
        raise row.error("choice", "role", show(row.row["role"]), options="text")
    message: Message = {"role": "text", "content": row.text("content")}
    if row.has("ends"):
        message["ends"] = read_flag(row, "ends")
    return Record("text", (message,), weight=f.number_or(1.0, "weight", 0.0), id=str(f.take("id") or ""))


_CANONICAL = {
    "text": read_text_signal,
    "sft": read_sft_signal,
    "prompt": lambda f: finish(f, "prompt", read_dialogue(f)),
    "pair": read_pair,
    "rating": lambda f: read_responses(f, "rating"),
    "ranking": lambda f: read_responses(f, "ranking"),
    "label": lambda f: read_responses(f, "label") if f.has("candidates", "responses") else read_labelled(f),
    "verifiable": read_verifiable,
}


def read_canonical(f: Fields) -> Record:
    """messages + signal {type, ...}, or messages + candidates. The
    signal's fields join the row's.
    """
    if not f.has("signal"):
        record = read_responses(f)
        return dataclasses.replace(record, reward=read_reward(f)) if f.has("reward") else record
    signal = f.nested("signal", f.take("signal"))
    kind = signal.text("type")
    if kind not in SIGNALS:
        raise signal.error("choice", "type", show(kind), options=", ".join(SIGNALS))
    inner = {key: value for key, value in signal.row.items() if key != "type"}
    doubled = [key for key in inner if f.has(key)]
    if doubled:
        raise f.error("choice", doubled[0], say("two values", "两个值"), options=f"{doubled[0]} or signal.{doubled[0]}")
    signal.use(*inner)
    f.row = {**{key: value for key, value in f.row.items() if key != "signal"}, **inner}
    return _CANONICAL[kind](f)
