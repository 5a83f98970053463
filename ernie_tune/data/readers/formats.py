"""One row of any known format -> one `Record`: the table of formats, their recognition, and the
readers of demonstrations.

Refuses to know: how files are stored, tokens, pixels. Judged answers are read in
`preference.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

from ernie_tune.config.language import say
from ernie_tune.data.file_kinds import are_turns
from ernie_tune.data.readers.fields import (
    DIALOGUES,
    QUERIES,
    RESPONSES,
    SWITCHES,
    SYSTEMS,
    THOUGHTS,
    Draft,
    Fields,
    Turn,
    Where,
    finish,
    make_turn,
    read_answered,
    read_dialogue,
    read_flag,
)
from ernie_tune.data.readers.media import FILE_NAMES, IMAGE_NAMES, KIND_NAMES, MEDIA_NAMES, VIDEO_NAMES, suffix_kind
from ernie_tune.data.readers.preference import (
    read_canonical,
    read_labelled,
    read_pair,
    read_responses,
    read_verifiable,
)
from ernie_tune.data.readers.unused import check_unused
from ernie_tune.data.records import DataError, Message, Meta, Record, Reward, Verifier, as_words, show


def read_sft(f: Fields) -> Record:
    """A demonstration: a query with a response column, or messages; messages that end before an
    answer are a prompt.
    """
    turns = read_answered(f)
    return finish(f, "sft" if turns[-1].message["role"] == "assistant" else "prompt", turns)


def read_prompt(f: Fields) -> Record:
    """A query without an answer, for rollouts."""
    return finish(f, "prompt", read_dialogue(f))


def read_asked(f: Fields) -> Record:
    """A row as those read it who sample answers: a question, and what checks an answer where the
    row says that. Other columns, answers among them, are for the functions that judge.
    """
    names = ("prompt", *DIALOGUES, *QUERIES)  # TRL's name for what is asked goes first
    if f.has(*_CHECKED, "answer"):
        return read_verifiable(f, names)
    turns = read_dialogue(f, names)
    return finish(f, "sft" if turns[-1].message["role"] == "assistant" else "prompt", turns)


def read_classification(f: Fields) -> Record:
    """text + label: the label is the answer to learn, and a reward by exact match for verifiable
    training.
    """
    label = f.take(f.name("label"))
    answer = label if isinstance(label, str) else show(label)
    turns = [make_turn(f, "text", "user", f.text("text")), make_turn(f, "label", "assistant", answer)]
    return finish(f, "sft", turns, reward=Reward(answer, (Verifier("exact"),)))


# Where texts that are not about a question stand: web and code corpora.
TEXTS = ("text", "content", "raw_content", "document")
PICTURE_ANSWERS = ("label", "class", "category", "caption", "description", "text")
_PICTURE_QUESTIONS = {"label": "What is this?", "class": "What is this?", "category": "What is this?"}
_DESCRIBE = "Describe the picture."


def read_text(f: Fields) -> Record:
    """A text alone, all of which is learnt: what continued pre-training reads. A list of texts
    (PaddleFormers) is one text of several lines. Its tags are words.
    """
    name = f.name(*TEXTS)
    value = f.take(name)
    parts = value if isinstance(value, list) else [value]
    text = as_words("\n".join(f.typed(name, part, str) for part in parts))
    row_id = f.take("id")
    return Record(
        "text",
        ({"role": "text", "content": text},),
        domain=f.text("domain", "task", "channel") if f.has("domain", "task", "channel") else "",
        weight=f.number_or(1.0, "weight", 0.0),
        id=f"{f.where.path}:{f.where.line}" if row_id is None else str(row_id),
    )


def read_picture(f: Fields) -> Record:
    """A picture with its class, or with words about it: what is learnt is the answer to one
    question, the same for all, that the row need not have.
    """
    name = f.name(*PICTURE_ANSWERS)
    question = _PICTURE_QUESTIONS.get(name, _DESCRIBE)
    value = f.take(name)
    answer = value if isinstance(value, str) else show(value)
    f.note("no_question", name, f"{name} without a question, asked as {question!r}")
    turns = [make_turn(f, "question", "user", question), make_turn(f, name, "assistant", answer)]
    reward = Reward(answer, (Verifier("exact"),)) if name in _PICTURE_QUESTIONS else None
    record = finish(f, "sft", turns, reward=reward)
    if not record.images and not record.videos:
        raise f.missing("image", "file_name")
    return record


def _erniekit_turns(f: Fields, answers: Sequence[Any]) -> list[Turn]:
    """src and tgt alternate, after an optional system text."""
    questions = f.items("src")
    turns = [make_turn(f, "system", "system", f.text("system"))] if f.has("system") and f.row["system"] != "" else []
    for i, question in enumerate(questions):
        turns.append(make_turn(f, f"src[{i}]", "user", question))
        if i < len(answers):
            turns.append(make_turn(f, f"tgt[{i}]", "assistant", answers[i]))
    return turns


def read_erniekit(f: Fields) -> Record:
    """ERNIEKit text: src[], tgt[], label[] (0 keeps an answer out of the loss), system."""
    answers = f.items("tgt")
    f.same_length("tgt", answers, len(f.items("src")), "src")
    turns = _erniekit_turns(f, answers)
    if f.has("label"):
        labels = f.items("label")
        f.same_length("label", labels, len(answers), "tgt")
        targets = [turn.message for turn in turns if turn.message["role"] == "assistant"]
        for i, (label, message) in enumerate(zip(labels, targets, strict=True)):
            if label not in (0, 1):
                raise f.error("choice", f"label[{i}]", show(label), options="0, 1")
            message["loss"] = bool(label)
    return finish(f, "sft", turns)


def read_erniekit_dpo(f: Fields) -> Record:
    """ERNIEKit preference: src[], tgt[] one shorter, response[][], sort[] (higher is better).
    Beyond two responses: a ranking.
    """
    history, responses, sort = f.items("tgt") if f.has("tgt") else [], f.items("response"), f.items("sort")
    f.same_length("tgt", history, len(f.items("src")) - 1, "src but the last")
    f.same_length("response", responses, max(2, len(responses)), "of the sides compared, two or more")
    f.same_length("sort", sort, len(responses), "response")
    values = [f.number(f"sort[{i}]", value) for i, value in enumerate(sort)]
    if len(set(values)) == 1:
        raise f.error("choice", "sort", show(sort), options="values that differ, such as [1, 0]")
    drafts = []
    for i, (response, value) in enumerate(zip(responses, values, strict=True)):
        texts = f.typed(f"response[{i}]", [response] if isinstance(response, str) else response, list)
        if len(texts) % 2 == 0:
            f.same_length(f"response[{i}]", texts, len(texts) + 1, "turn, answer first and last")
        turns = [make_turn(f, f"response[{i}]", ("assistant", "user")[j % 2], text) for j, text in enumerate(texts)]
        drafts.append(Draft(turns, rank=1.0 + sum(other > value for other in values)))
    if len(drafts) == 2:
        return finish(f, "pair", _erniekit_turns(f, history), sorted(drafts, key=lambda draft: cast(float, draft.rank)))
    return finish(f, "ranking", _erniekit_turns(f, history), drafts)


def read_erniekit_vl(f: Fields) -> Record:
    """ERNIEKit multimodal: text_info [{text, tag mask|no_mask}], image_info and video_info
    [{matched_text_index, *_url}].

    Neighbours with one tag form one turn; turns alternate from mask to no_mask. Media stand before
    the text they match. With is_system the first turn is the system's and the no_mask turn after
    it, which only keeps the alternation, is left out.
    """
    infos = [f.nested(f"text_info[{i}]", item) for i, item in enumerate(f.items("text_info", "text_list"))]
    images, videos = _matched(f, "image_info", len(infos)), _matched(f, "video_info", len(infos))
    turns: list[Turn] = []
    for i, info in enumerate(infos):
        tag = info.text("tag")
        if tag not in ("mask", "no_mask"):
            raise info.error("choice", "tag", show(tag), options="mask, no_mask")
        role = "assistant" if tag == "no_mask" else "tool" if info.take("tool_response") else "user"
        own_images, own_videos = images.get(i, []), videos.get(i, [])
        if role == "assistant" and (own_images or own_videos):
            raise f.error("choice", "matched_text_index", f"{i}, a no_mask text", options="the indices of mask texts")
        text = info.take("text")
        parts = [{"type": "image", "image": url} for url in own_images] + [
            {"type": "video", "video": url} for url in own_videos
        ]
        turn = make_turn(
            info, "text", role, [*parts, info.typed("text", text, str)] if role != "tool" or parts else text
        )
        if info.has("label"):
            turn.message["loss"] = read_flag(info, "label")
        if info.has("tool_calls"):
            turn.message["tool_calls"] = info.take("tool_calls")
        turns = [*turns[:-1], _join(turns[-1], turn)] if turns and turns[-1].message["role"] == role else [*turns, turn]
    if f.take("is_system"):
        roles = [turn.message["role"] for turn in turns[:2]]
        if roles != ["user", "assistant"] or len(turns) < 4:
            raise f.error("system", "is_system", ", ".join(roles))
        turns = [turns[0]._replace(message=cast(Message, {**turns[0].message, "role": "system"})), *turns[2:]]
    if not turns or turns[-1].message["role"] != "assistant":
        raise f.error("choice", "text_info[-1].tag", "mask" if turns else say("no text", "没有文本"), options="no_mask")
    return finish(f, "sft", turns)


def _matched(f: Fields, field: str, n: int) -> dict[int, list[Any]]:
    """Index of a text -> URLs of the media before it."""
    found: dict[int, list[Any]] = {}
    for i, item in enumerate(f.items(field) if f.has(field) else []):
        info = f.nested(f"{field}[{i}]", item)
        if info.take("image_type") == "video":
            raise info.error("frames", "image_type", "video")
        index = info.take("matched_text_index") if info.has("matched_text_index") else 0
        if type(index) is not int or not 0 <= index < n:
            raise info.error("range", "matched_text_index", show(index), low=0, high=n - 1)
        found.setdefault(index, []).append(
            info.take(info.name("image_url" if field == "image_info" else "video_url", "image_url"))
        )
    return found


def _join(first: Turn, second: Turn) -> Turn:
    """Two neighbours of one role as one turn; ERNIEKit puts nothing between them."""
    message = {**first.message, **second.message, "content": first.message["content"] + second.message["content"]}
    (images, videos), (more_images, more_videos) = first.media, second.media
    return Turn(cast(Message, message), (images + more_images, videos + more_videos))


class Format(NamedTuple):
    """A format: each group of `needs` must have a field in the row ("a.b": field b in the objects
    of a).
    """

    name: str
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Fields], Record]
    families: tuple[str, ...] = ()

    def matches(self, keys: set[str]) -> bool:
        return all(not keys.isdisjoint(group) for group in self.needs)

    def describe(self, keys: set[str]) -> str:
        """The fields that make a row of this format, in the names that a row has, else in ours."""
        return " + ".join(next((name for name in group if name in keys), group[0]) for group in self.needs)


# What some reader takes beside the fields that choose its format.
_BESIDE = frozenset(
    (
        *IMAGE_NAMES, *VIDEO_NAMES, *FILE_NAMES, *THOUGHTS, *SYSTEMS, *SWITCHES, "answers",
        *(f"{side}_{name}" for side in ("chosen", "rejected") for names in MEDIA_NAMES for name in names),
        "history", "tools", "mode", "weight", "domain", "channel", "scale", "margin", "confidence", "scene", "hint",
        "image_info", "video_info", "is_system", "sort",
    )
)  # fmt: skip
_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[\s\-]+")

_FILES = frozenset(FILE_NAMES)
_ASKED = (*DIALOGUES, *QUERIES)
_CHECKED = ("solution", "ground_truth", "verifiers", "reward", "reward_model", "evidence")
_ORDERED = ("order", "ranking", "ranks", "responses.rank")
_SCORED = ("scores", "ratings", "score", "rating", "responses.score", "responses.rating")
_ANSWERED = ("responses", *RESPONSES, *DIALOGUES)

# The first that matches a row is its format, so the specific stand before the general.
FORMATS = (
    Format("canonical", (("messages",), ("signal", "candidates")), read_canonical),
    Format("erniekit_vl", (("text_info", "text_list"),), read_erniekit_vl, ("erniekit",)),
    Format("erniekit_dpo", (("src",), ("response",)), read_erniekit_dpo, ("erniekit",)),
    Format("erniekit", (("src",), ("tgt",)), read_erniekit, ("erniekit",)),
    Format("pairs", (("rejected", "rejected_response", "rejected_messages"),), read_pair, ("alpaca", "sharegpt")),
    Format("ranked", (_ASKED, ("responses",), _ORDERED), read_responses),
    Format("scored", (_ASKED, _ANSWERED, _SCORED), read_responses),
    Format("labels", (_ASKED, ("kto_tag", "label"), _ANSWERED), read_labelled, ("alpaca", "sharegpt")),
    Format("verifiable", (_ASKED, _CHECKED), read_verifiable),
    Format("messages", (("messages",),), read_sft, ("sharegpt",)),
    Format("vqa", (("image", "images"), ("conversations", "conversation")), read_sft, ("sharegpt",)),
    Format("sharegpt", (("conversations", "conversation"),), read_sft, ("sharegpt",)),
    Format("task", (("task",), ("input",), ("output",)), read_sft, ("alpaca",)),
    Format("alpaca", (("instruction",), ("output", "response")), read_sft, ("alpaca",)),
    Format("prompt_response", (QUERIES, RESPONSES), read_sft, ("alpaca",)),
    Format("classification", (("text",), ("label",)), read_classification),
    Format("prompt", (QUERIES,), read_prompt),
    Format("pictures", ((*IMAGE_NAMES, *FILE_NAMES), PICTURE_ANSWERS), read_picture),
    Format("text", (TEXTS,), read_text),
)
# Those of rows that are asked and not learnt: an answer beside a question is one to check by, or a
# column for the functions that judge. What compares answers is nothing to ask.
_COMPARING = ("canonical", "erniekit_vl", "erniekit_dpo", "erniekit", "pairs", "ranked")
ASKED_FORMATS = (
    Format("scored", (_ASKED, ("responses",), _SCORED), read_responses),
    Format("verifiable", (_ASKED, (*_CHECKED, "answer")), read_asked),
    Format("messages", (DIALOGUES,), read_asked),
    Format("prompt", (QUERIES,), read_asked),
    *(form for form in FORMATS if form.name in ("classification", "pictures", "text")),
)
_JUDGED = {"scored": "rating", "labels": "label"}  # formats whose answers have the names of those to check by
_TEXTUAL = frozenset((*DIALOGUES, *QUERIES, *RESPONSES, "chosen", "rejected", "id"))
_CHOOSING = frozenset(name.partition(".")[0] for form in FORMATS for group in form.needs for name in group)
# Every field that some reader takes, but those of plain rows of texts.
SPECIAL_FIELDS = _BESIDE | (_CHOOSING - _TEXTUAL)
PLAIN_FIELDS = _TEXTUAL - SPECIAL_FIELDS


@dataclass(frozen=True)
class Sniff:
    """The recognised format, and why."""

    name: str
    reason: str


def choose(name: str, signals: Sequence[str] = ()) -> tuple[Format, ...]:
    """The formats that a `format` setting allows: "auto" all, a family ("erniekit", "alpaca",
    "sharegpt") its members, a name that one. `signals`: what the caller can use (default: all);
    where it asks and learns no demonstrations, "auto" reads rows as questions.

    Raises ValueError for any other name.
    """
    chosen = tuple(form for form in FORMATS if name in ("auto", form.name, *form.families))
    if name == "auto" and "sft" not in signals and {"prompt", "verifiable"} & set(signals):
        compared = (form for form in FORMATS if form.name in _COMPARING or _JUDGED.get(form.name) in signals)
        return (*compared, *ASKED_FORMATS)
    if not chosen:
        names = ", ".join(dict.fromkeys(["auto", *(form.name for form in FORMATS)]))
        raise ValueError(
            say(
                f"format ({name!r}) must be one of {names}; use 'auto' to have it recognised",
                f"格式（{name!r}）须为 {names} 之一；用 'auto' 可自动识别",
            )
        )
    return chosen


@lru_cache(maxsize=1024)
def _spelt_otherwise(keys: tuple[str, ...]) -> dict[str, str] | None:
    known = SPECIAL_FIELDS | PLAIN_FIELDS
    small = {key: _CAPITAL.sub("_", key.strip()).lower() for key in keys if key not in known}
    found = {key: name for key, name in small.items() if name in known and name not in keys}
    once = {key: name for key, name in found.items() if [*found.values()].count(name) == 1}
    return once or None


def spelt_otherwise(row: Mapping[str, Any]) -> dict[str, str] | None:
    """Columns that are ours but for capitals, blanks and hyphens (`Image`, `Image Path`,
    `imagePath`) -> our names; None: there are none.
    """
    try:
        return _spelt_otherwise(tuple(row))
    except (TypeError, AttributeError):  # keys that are no text, in rows made in Python
        return None


def nearest_name(name: str) -> str:
    """The field of ours that a name resembles, or ""."""
    close = difflib.get_close_matches(name.lower(), SPECIAL_FIELDS | PLAIN_FIELDS, 1, 0.8)
    return close[0] if close else ""


def match(row: Mapping[str, Any], formats: Sequence[Format] = FORMATS) -> Format | None:
    """The first format whose fields the row has. The name of a file tells nothing unless it is that
    of a picture or a clip.
    """
    keys = {str(key) for key, value in row.items() if value is not None}
    keys -= {name for name in keys & _FILES if not isinstance(row[name], str) or suffix_kind(row[name]) is None}
    for key, value in row.items():
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict):
            keys.update(f"{key}.{name}" for name, inner in first.items() if inner is not None)
    return next((form for form in formats if form.matches(keys)), None)


def sniff(rows: Sequence[Mapping[str, Any]], formats: Sequence[Format] = FORMATS, path: str = "<rows>") -> Sniff:
    """The format of most of these rows, and why. Raises DataError when no row has a known one."""
    votes = Counter(form.name for form in (match(row, formats) for row in rows) if form)
    if not votes:
        raise _unknown(rows[0] if rows else {}, formats, path)
    name, count = votes.most_common(1)[0]
    form = next(form for form in formats if form.name == name)
    seen = set().union(*(map(str, row) for row in rows if match(row, formats) is form))
    others = "".join(f"; {other} look like {other_name}" for other_name, other in votes.most_common()[1:])
    return Sniff(name, f"{name}: {count} of {len(rows)} sampled rows have {form.describe(seen)}{others}")


_SHOWN_FIELDS = 12
IN_MEMORY = "train_dataset"  # what rows are called that came from no file
EXAMPLE_ROWS = (
    '[{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}] or '
    '[{"prompt": "...", "response": "..."}]'
)


def _unknown(row: Mapping[str, Any], formats: Sequence[Format], path: str) -> DataError:
    """The error for rows of no known format: the formats that are nearest, and how to say which
    column is what.
    """
    keys = {str(key) for key, value in row.items() if value is not None}
    strange = {str(key): value for key, value in row.items() if key not in SPECIAL_FIELDS | PLAIN_FIELDS}
    media = {key: KIND_NAMES[kind] for key, cell in strange.items() if (kind := _kind_of_cell(cell)) is not None}
    known = keys | set(media.values())  # a cell names a picture, whatever its column is called
    met = {form.name: sum(not known.isdisjoint(group) for group in form.needs) / len(form.needs) for form in formats}
    usual = ("prompt_response", "messages", "classification", "pictures", "text")
    order = [*usual, *(form.name for form in formats if form.name not in usual)]
    by_name = {form.name: form for form in formats}
    near = sorted((name for name in order if name in by_name), key=lambda name: -met[name])[:2]
    described = "; ".join(f"{by_name[name].describe(known)} ({name})" for name in near)
    words = [key for key in strange if key not in media]
    ours: tuple[str, ...] = ("prompt", "response")
    if turns := [key for key in words if are_turns(strange[key])]:
        words, ours = turns, ("messages",)
    elif media and len(words) < 2 and keys.isdisjoint(QUERIES):
        ours = ("label",)
    named = [*((kind, key) for key, kind in media.items()), *zip(ours, [*words, "...", "..."], strict=False)]
    columns = ", ".join(f'"{name}": "{yours}"' for name, yours in named)
    entry = f'{{"mine": {{"file_name": "{os.path.basename(path)}", "columns": {{{columns}}}}}}}'
    names, table = list(map(str, row)), path.lower().endswith((".csv", ".tsv"))
    more = ", ..." if len(names) > _SHOWN_FIELDS else ""
    found = say(
        "fields {names}", "字段 {names}", names=f"{', '.join(names[:_SHOWN_FIELDS])}{more}" or say("none", "无")
    )
    if path == IN_MEMORY:
        hint = say(
            f"name them {described}; pass rows such as {EXAMPLE_ROWS}",
            f"将其命名为 {described}；请传入如 {EXAMPLE_ROWS} 的数据",
        )
        return DataError(path, 0, "format", found, "unknown", {"hint": hint})
    hint = say(
        f"name them {described}, or say which is which in dataset_info.json: {entry}"
        + ("; the first line of a table must name its columns" if table else ""),
        f"将其命名为 {described}，或在 dataset_info.json 中写明对应关系：{entry}"
        + ("；表格首行须为列名" if table else ""),
    )
    return DataError(path, 0, "format", found, "unknown", {"hint": hint})


def _kind_of_cell(value: object) -> int | None:
    return suffix_kind(value) if isinstance(value, str) else None


def read(
    row: Mapping[str, Any],
    form: Format,
    where: Where,
    others: Sequence[Format] = (),
    extra: Mapping[str, Any] | None = None,
) -> Record:
    """One row of this format; `extra` joins the fields that no reader used. Raises DataError.

    With `others`, a row that rather looks like one of those is refused, not read by halves.
    """
    f = Fields(row, where)
    better = match(row, others)
    if better and better.read is not form.read:
        raise f.error("mixed", "format", f"{better.name}", format=form.name)
    try:
        record = form.read(f)
    except RecursionError:
        why = {"why": say("nest them less", "请减少嵌套")}
        raise DataError(
            where.path, where.line, "row", say("values nested too deeply", "值的嵌套过深"), "json", why
        ) from None
    unused = (*check_unused(f, record), *(extra or {}))
    left = {**(extra or {}), **f.extra()}
    as_text = any(f.took(name) and isinstance(row[name], str) for name in QUERIES if name in row)
    whole = {} if record.signal != "prompt" and record.reward is None else {**(extra or {}), **row}
    meta = Meta(where.path, where.line, form.name, left, unused, tuple(f.notes), as_text, whole)
    return dataclasses.replace(record, meta=meta)
