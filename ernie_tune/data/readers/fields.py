"""What all readers share: the fields of one row, dialogues in every spelling, media and their tags,
the finished record.

Refuses to know: which format a row has, how files are stored, whether a picture exists.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

from ernie_tune.config.language import say
from ernie_tune.data.file_kinds import why_no_json
from ernie_tune.data.readers.media import (
    KIND_NAMES,
    MEDIA_NAMES,
    TAGS,
    read_medium,
    settle_media,
    turn_media,
)
from ernie_tune.data.readers.row import KINDS, Draft, Fields, Turn, Where, read_list
from ernie_tune.data.records import MODES, Candidate, DataError, Media, Message, Record, Reward, as_words, show

__all__ = ("DIALOGUES", "QUERIES", "RESPONSES", "Draft", "Fields", "Turn", "Where")

DIALOGUES = ("messages", "conversations", "conversation")
QUERIES = ("prompt", "query", "question", "problem", "instruction", "input")
RESPONSES = ("response", "completion", "output", "answer", "target", "targets", "text", "content", "answers")
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
SYSTEMS = ("system", "system_prompt", "developer")
# What a turn says of being learnt, 1 or true for yes: OpenAI and ours; axolotl; verl; ms-swift.
# (`mask` may mean either.)
LEARNT = ("loss", "weight", "train", "training", "trainable", "is_trainable", "loss_mask", "loss_scale", "loss_weight")
SWITCHES = ("enable_thinking", "thinking", "think")  # of a whole row, true or false

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "User", "USER"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model", "Assistant", "ASSISTANT"), "assistant"),
    **dict.fromkeys(("tool", "observation", "tool_response", "function_response", "function", "ipython"), "tool"),
    **{"system": "system", "System": "system", "developer": "system"},
    **{"function_call": "assistant", "tool_call": "assistant"},
}
_CALLS = ("function_call", "tool_call")  # assistant turns whose text is the call itself, as JSON
_PARTS = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
    **dict.fromkeys(("thinking", "reasoning"), "thought"),
}
_FOLLOWS = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}


def read_dialogue(f: Fields, names: Sequence[str] = (*DIALOGUES, *QUERIES)) -> list[Turn]:
    """The turns of a row before any answer column: a message list, or a query with instruction,
    input, history and system joined. `names`: of the fields that may hold it, the first counts.
    """
    name = f.name(*names)
    value = f.take(name)
    if isinstance(value, list) or name in DIALOGUES:
        turns = read_turns(f, name, value)
    else:
        query = f.typed(name, value, str)
        if name == "instruction" and f.has("input"):
            query = "\n".join(part for part in (query, f.text("input")) if part)
        turns = [make_turn(f, name, "user", query)]
    if f.has("history"):
        pairs = [f.typed("history", pair, list) for pair in f.items("history")]
        for pair in pairs:
            f.same_length("history", pair, 2, "of question and answer")
        turns = [
            make_turn(f, "history", role, text)
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ] + turns
    if f.has(*SYSTEMS):
        system = f.text(*SYSTEMS)
        if system and turns[0].message["role"] != "system":
            turns = [make_turn(f, "system", "system", system), *turns]
        elif system and system != turns[0].message["content"]:
            f.note("two_systems", "system", show(system))
    return turns


def read_answer(f: Fields, field: str, value: Any) -> list[Turn]:
    """An answer: a string or number, one message, or a list of messages; a list of one text counts
    as that text.
    """
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], list | dict):
        value = value[0]
    if isinstance(value, float) and not math.isfinite(value):  # what tables write for a missing cell
        raise f.error("type", field, show(value), kind=KINDS[str])
    if isinstance(value, bool | int | float):
        value = json.dumps(value)
    if isinstance(value, str):
        turn = make_turn(f, field, "assistant", value)
        _take_unopened(f, turn.message)
        return [turn]
    if isinstance(value, list) and value and isinstance(value[0], str):
        raise f.error("answers", field, f"{len(value)} texts")
    return read_turns(f, field, [value] if isinstance(value, dict) else value)


def read_answers(f: Fields) -> list[Turn]:
    """Several right answers to one question, as VQA has them: the most frequent is learnt, of
    equally frequent ones the first.
    """
    values = f.take("answers")
    values = values if (items := read_list(values)) is None else items
    if isinstance(values, dict):  # SQuAD: {"text": [...], "answer_start": [...]}
        row = f.nested("answers", values)
        row.use("answer_start")
        values = row.take("text", "answer", "answers")
    texts = []
    for i, value in enumerate(values if isinstance(values, list) else [values]):
        # VQA v2: {"answer": ..., "answer_confidence": ..., "answer_id": ...}
        if isinstance(value, dict):
            row = f.nested(f"answers[{i}]", value)
            row.use("answer_confidence", "answer_id", "raw_answer")
            value = row.take(row.name("answer", "text"))
        texts.append(
            value
            if isinstance(value, str)
            else json.dumps(value)
            if isinstance(value, bool | int | float) and math.isfinite(value)
            else f.typed(f"answers[{i}]", value, str)
        )
    if not texts:
        raise f.error("missing", "answers", say("an empty list", "空列表"), names="at least one answer")
    if len(set(texts)) > 1:
        f.note("answers", "answers", f"{len(set(texts))} different answers")
    return [make_turn(f, "answers", "assistant", Counter(texts).most_common(1)[0][0])]


def read_answered(f: Fields) -> list[Turn]:
    """The dialogue with its answer: the last message's, or a response column's, which only message
    lists may lack.
    """
    turns = read_dialogue(f)
    if turns[-1].message["role"] == "assistant" or (f.has(*DIALOGUES) and not f.has(*RESPONSES)):
        return turns
    name = f.name(*RESPONSES)
    answer = read_answers(f) if name == "answers" else read_answer(f, name, f.take(name))
    if isinstance(f.row.get("answers"), list) and f.row["answers"] and name != "answers":
        f.use("answers")  # all that are right; the row says itself which is to be learnt
        f.note("answers", "answers", f"{len(f.row['answers'])} answers beside {name}")
    take_thought(f, answer[-1].message)
    return turns + answer


def read_turns(f: Fields, field: str, value: Any) -> list[Turn]:
    """Messages with role/content or from/value, whose content is text or a list of parts."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # a cell of a table
        value = read_json(f, field, value)
    turns = [_read_turn(f, f"{field}[{i}]", item) for i, item in enumerate(f.typed(field, value, list))]
    if not turns:
        raise f.error("turnless", field, say("no messages", "没有对话"))
    return turns


def _read_turn(f: Fields, field: str, item: Any) -> Turn:
    row = f.nested(field, item)
    name = row.text("role", "from")
    if name not in _ROLES:
        raise row.error("choice", "role" if row.has("role") else "from", show(name), options=", ".join(_ROLES))
    content, calls = row.take("content", "value"), row.take("tool_calls")
    if name in _CALLS:
        content, calls = "", [{"type": "function", "function": read_json(row, "value", content)}]
    if content is None and not calls:
        raise row.missing("content", "value")
    if isinstance(calls, str):
        calls = read_json(row, "tool_calls", calls)
    turn = turn_media(row, make_turn(row, "content", _ROLES[name], "" if content is None else content))
    if calls:
        turn.message["tool_calls"] = calls if isinstance(calls, list) else [calls]
    if turn.message["role"] == "assistant":
        take_thought(row, turn.message)
        learnt = {name: read_flag(row, name) for name in LEARNT if row.has(name)}
        if len(set(learnt.values())) > 1:
            raise row.error("twice", [*learnt][-1], show(learnt), names=" and ".join(learnt))
        if learnt:
            turn.message["loss"] = next(iter(learnt.values()))
    else:  # never learnt, so saying it is nothing new
        row.use(*(name for name in LEARNT if row.row.get(name) in (0, False)))
    row.use("tool_call_id", "name", "id")  # templates of other models ask for them
    cast("dict[str, Any]", turn.message).update(
        {key: row.row[key] for key in row.row if key not in turn.message and _is_kept(row, key)}
    )
    return turn


def _is_kept(row: Fields, key: str) -> bool:
    """Whether a key of a turn goes along with it: what nobody took, and the ids of tools."""
    return row.row[key] is not None and (key in ("tool_call_id", "name", "id") or not row.took(key))


def take_thought(f: Fields, message: Message) -> None:
    """The thought of an answer from its own field, or from the text before a closing mark that was
    never opened. Raises DataError for two thoughts.
    """
    field, thought = "", message.get("reasoning_content", "")
    for name in THOUGHTS:
        if not f.has(name) or not isinstance(f.row[name], str | list | dict):
            continue
        value = f.text(name)
        if thought and value.strip() != thought.strip():
            raise f.error("twice", name, show(value), names=f"{field or 'the thought in content'} and {name}")
        field, thought = field or name, thought or value
    content = message["content"]
    opened = content.lstrip().startswith("<think>")
    if opened and thought and "</think>" in content:
        inside, rest = content.lstrip().removeprefix("<think>").split("</think>", 1)
        if inside.strip() and inside.strip() != thought.strip():
            raise f.error(
                "twice",
                field or "content",
                show(thought),
                names=f"the thought in content and {field or 'reasoning_content'}",
            )
        message["content"] = rest.lstrip("\n")
    if thought:
        message["reasoning_content"] = thought
    else:
        _take_unopened(f, message)


def _take_unopened(f: Fields, message: Message) -> None:
    """Take the text before a closing mark that was never opened as the thought, where the mark ends
    a line or begins one.
    """
    content = message["content"]
    if "<think>" in content or content.count("</think>") != 1:
        return
    before, after = content.split("</think>")
    if before.strip() and (after[:1] in ("\n", "") or before.endswith("\n")):
        f.note("thought_unopened", "content", "</think> alone")
        message["reasoning_content"], message["content"] = before.strip("\n"), after.lstrip("\n")


def make_turn(f: Fields, field: str, role: str, content: Any) -> Turn:
    """One turn. Content parts become text with tags; a tool's object becomes JSON text."""
    media: tuple[list[Media | None], list[Media | None]] = ([], [])
    thoughts: list[str] = []
    if _is_parts(content, role):
        content = "".join(_read_part(f, f"{field}[{i}]", part, media, thoughts) for i, part in enumerate(content))
    elif role == "tool" and isinstance(content, list | dict):
        content = json.dumps(content, ensure_ascii=False)
    message: Message = {"role": role, "content": f.typed(field, content, str)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return Turn(message, (tuple(media[0]), tuple(media[1])))


def _is_parts(content: Any, role: str) -> bool:
    """Whether a content is a list of parts; of a tool, whose content may be any list of objects,
    only if they say what they are.
    """
    if not isinstance(content, list):
        return False
    typed = all(isinstance(part, str) or (isinstance(part, dict) and "type" in part) for part in content)
    return typed or (role != "tool" and all(isinstance(part, str | dict) for part in content))


def _read_part(
    f: Fields, field: str, part: Any, media: tuple[list[Media | None], list[Media | None]], thoughts: list[str]
) -> str:
    """The text of one content part, in which tags are words; its medium or thought goes to the
    lists.
    """
    if isinstance(part, str):
        return as_words(part)
    row = f.nested(field, part)
    kind = row.text("type") if row.has("type") else next((key for key in part if key in _PARTS), "")
    if kind not in _PARTS:
        raise row.error("choice", "type", show(kind or part), options=", ".join(_PARTS))
    if _PARTS[kind] == "thought":
        thoughts.append(row.text("thinking", "reasoning", "text"))
        row.use("signature")
        return ""
    if _PARTS[kind] == "text":
        return as_words(row.text("text", kind))
    number = KIND_NAMES.index(_PARTS[kind])
    value = row.take(kind, "url", "path", "image", "video", "source", *MEDIA_NAMES[number])
    medium = None if value is None else read_medium(row, number, kind, value)
    media[number].append(medium)
    return TAGS[number]


def read_flag(f: Fields, name: str) -> bool:
    """true/false or 1/0."""
    value = f.take(name)
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0"):
        return value.strip().lower() in ("true", "1")
    if not isinstance(value, int | float) or value not in (0, 1):
        raise f.error("type", name, show(value), kind=KINDS[bool])
    return bool(value)


def read_json(f: Fields, field: str, text: Any) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(f.typed(field, text, str))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise f.error("json", field, show(text), why=why_no_json(text, error)) from error


def check_dialogue(f: Fields, turns: Sequence[Turn], ends: Sequence[str]) -> None:
    """An optional system turn, then user (or tool results) and assistant in turn; the last role as
    the signal needs it. Raises DataError.
    """
    if not turns:  # ERNIEKit's src and tgt, both empty
        raise f.error("turnless", "messages", say("no messages", "没有对话"))
    roles = [turn.message["role"] for turn in turns]
    talk = roles[1:] if roles[0] == "system" else roles
    if talk[:1] != ["user"] or any(after not in _FOLLOWS.get(role, ()) for role, after in pairwise(talk)):
        raise f.error("roles", "roles", ", ".join(roles))
    if roles[-1] not in ends:
        raise f.error("last", "roles", ", ".join(roles), who=" or ".join(ends))


def finish(
    f: Fields,
    signal: str,
    turns: list[Turn],
    drafts: Sequence[Draft] = (),
    reward: Reward | None = None,
    margin: float | None = None,
    confidence: float = 1.0,
) -> Record:
    """Check turns and media, take the fields every format may have (tools, domain, mode, weight,
    id), and build the record.
    """
    check_dialogue(f, turns, ("assistant",) if signal == "sft" else ("user", "tool"))
    for draft in drafts:
        check_dialogue(f, turns + draft.turns, ("assistant",))
    images, own_images = settle_media(f, 0, turns, drafts)
    videos, own_videos = settle_media(f, 1, turns, drafts)
    candidates = tuple(
        Candidate(tuple(turn.message for turn in d.turns), own_images[i], own_videos[i], d.score, d.rank, d.label)
        for i, d in enumerate(drafts)
    )
    row_id = f.take("id")
    return Record(
        signal=signal,
        messages=tuple(turn.message for turn in turns),
        images=images,
        videos=videos,
        tools=_read_tools(f),
        candidates=candidates,
        reward=reward,
        margin=margin,
        confidence=confidence,
        domain=f.text("domain", "task", "channel") if f.has("domain", "task", "channel") else "",
        mode=_read_mode(f),
        weight=f.number_or(1.0, "weight", 0.0),
        id=f"{f.where.path}:{f.where.line}" if row_id is None else str(row_id),
    )


def _read_mode(f: Fields) -> str:
    """`mode`, or the switch that other tools have for it."""
    mode = f.take("mode")
    for name in SWITCHES:
        if isinstance(f.row.get(name), bool):
            mode = mode or MODES[1 if f.take(name) else 2]
            f.use(name)
    if mode is None:
        return MODES[0]
    if mode not in MODES:
        raise f.error("choice", "mode", show(mode), options=", ".join(MODES))
    return str(mode)


def _read_tools(f: Fields) -> tuple[Mapping[str, Any], ...]:
    value = f.take("tools")
    if isinstance(value, str) and value.strip():
        value = read_json(f, "tools", value)
    tools = [value] if isinstance(value, dict) else [] if value in (None, "") else value
    return tuple(f.typed("tools", tool, dict) for tool in f.typed("tools", tools, list))
