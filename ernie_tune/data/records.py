"""The one record that every reader makes and every trainer takes, and the one error that bad data
raises.

Refuses to know: file formats, column names, tokens, pixels. Readers check rows; building a `Record`
in code checks nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

from ernie_tune.config.language import in_language, say

# sft: messages end with the answer. prompt, verifiable: they end before it. text: the only message
# is a text of role "text", all of which is learnt. The others: candidates continue the messages.
SIGNALS = ("sft", "prompt", "pair", "rating", "ranking", "label", "verifiable", "text")
MODES = ("auto", "think", "nothink")
ROLES = ("system", "user", "assistant", "tool")
IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"
_SHOWN_CHARACTERS = 80
# A tag of a medium; behind a backslash it is the words themselves, as in a text about HTML's
# \\<video>.
TAG = re.compile(r"(?<!\\)<(image|video)>")
_WORDS = re.compile(r"\\(<(?:image|video)>)")


def as_words(text: str, tag: str = "") -> str:
    """A text whose tags (or only this one) mean themselves, as a message holds it: `<image>`
    becomes `\\<image>`.
    """
    return (
        TAG.sub(lambda found: found[0] if tag and tag != found[0] else "\\" + found[0], text) if "<" in text else text
    )


def plain_words(text: str) -> str:
    """The text that a reader of the dialogue sees: `\\<image>` becomes `<image>`."""
    return _WORDS.sub(r"\1", text) if "\\" in text else text


def count_tags(text: str, tag: str) -> int:
    """How many media of this kind a text shows; tags that mean themselves are none."""
    return text.count(tag) - text.count("\\" + tag)


Note = tuple[str, str, str]  # a key of doctor.CHECKS, the field, what was found there

# a path, URL or data URL; encoded bytes; for a video also its frames
Media = str | bytes | tuple[str, ...]


class Message(TypedDict, total=False):
    """One turn. `content` holds a tag for each image and video (`\\<image>` is the word); `loss`
    False keeps an assistant turn out of the loss; `ends` False: a text goes on in another record.
    """

    role: str
    content: str
    reasoning_content: str
    tool_calls: list[Any]
    loss: bool
    ends: bool


@dataclass(frozen=True)
class Corruption:
    """What is done to pictures (media/corruption.py): "mask", or "noise" of this strength, drawn
    from `seed`.
    """

    kind: str
    noise: float = 0.99
    seed: int = 0


@dataclass(frozen=True)
class Candidate:
    """One judged answer: turns that continue the record's messages, and what is known about
    them.
    """

    messages: tuple[Message, ...]
    images: tuple[
        Media, ...
        # all that messages + answer show, where it differs from the record's; empty: the record's
    ] = ()
    videos: tuple[Media, ...] = ()
    score: float | None = None  # on [0, 1], whatever scale the file used
    rank: float | None = None  # lowest is best, equal ranks are ties
    label: bool | None = None  # good or bad on its own
    corruption: Corruption | None = None  # of the pictures that this answer alone is shown with


@dataclass(frozen=True)
class Verifier:
    """One checker of answers by name; `spec` is the checker's own business."""

    name: str
    weight: float = 1.0
    spec: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reward:
    """What makes an answer checkable. No verifiers: the trainer chooses by the kind of the
    answer.
    """

    answer: Any = None
    verifiers: tuple[Verifier, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)  # {"required": [claim, ...]}
    # annotation of the picture: objects, ocr, chart
    scene: Mapping[str, Any] = field(default_factory=dict)
    hint: str = ""


@dataclass(frozen=True)
class Meta:
    """Where a record comes from, and the fields of the row that no reader used."""

    path: str = ""
    line: int = 0  # 1-based; the row number in formats without lines; 0: not from a file
    format: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    # names of all that no reader took, such as "source" or "messages[].name"
    unused: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()  # what the reader had to decide
    asked_as_text: bool = False  # the row's question is one text, no list of messages
    row: Mapping[str, Any] = field(default_factory=dict)  # all of a row that is asked, for functions that judge

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class Record:
    """One training unit: a dialogue, its media in the order of their tags, and the signal to learn
    from.
    """

    signal: str
    messages: tuple[Message, ...]
    images: tuple[Media, ...] = ()
    videos: tuple[Media, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    candidates: tuple[Candidate, ...] = ()
    reward: Reward | None = None
    margin: float | None = None  # of a pair, in units of reward
    confidence: float = 1.0  # probability that a pair's order is right
    domain: str = ""
    mode: str = "auto"
    weight: float = 1.0
    id: str = ""
    meta: Meta = field(default_factory=Meta)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages without the assistant turns that end them: what a rollout starts from."""
        end = len(self.messages)
        while end and self.messages[end - 1]["role"] == "assistant":
            end -= 1
        return self.messages[:end]

    @property
    def serves(self) -> tuple[str, ...]:
        """The signals this record can be used as: its own, and verifiable where a reward is
        known.
        """
        return (self.signal,) if self.reward is None or self.signal == "verifiable" else (self.signal, "verifiable")

    def dialogue(self, index: int) -> tuple[tuple[Message, ...], tuple[Media, ...], tuple[Media, ...]]:
        """Messages, images and videos of the dialogue that ends with candidate `index`."""
        candidate = self.candidates[index]
        return self.messages + candidate.messages, candidate.images or self.images, candidate.videos or self.videos

    def preferences(self) -> Iterator[tuple[int, int]]:
        """(better, worse) candidate indices, by rank or else by score; ties give none. K strictly
        ordered answers give K(K-1)/2.
        """
        values = [-c.rank if c.rank is not None else c.score for c in self.candidates]
        for i, a in enumerate(values):
            for j, b in enumerate(values):
                if a is not None and b is not None and a > b:
                    yield i, j

    @property
    def best(self) -> tuple[int, ...]:
        """The candidates known to be right: those that are better than another and that none is
        better than, and good ones.
        """
        edges = list(self.preferences())
        right = {better for better, _ in edges} - {worse for _, worse in edges}
        return tuple(sorted(right | {i for i, c in enumerate(self.candidates) if c.label}))


class _Problem(NamedTuple):
    expected: str
    fix: str
    expected_zh: str
    fix_zh: str


# Everything that can be wrong with data. Braces are filled by the reader; the doctor groups by the
# key.
PROBLEMS = {
    "missing": _Problem("{names}", "add it, or rename yours{hint}", "{names}", "补上该字段，或改名{hint}"),
    "type": _Problem("{kind}", "write {field} as {kind}", "类型 {kind}", "将 {field} 写成 {kind}"),
    "choice": _Problem("one of {options}", "use one of them", "{options} 之一", "改用其中之一"),
    "count": _Problem("{n}, one for each {other}", "make both counts equal{hint}", "{n} 个，与 {other} 一一对应", "使两者数量一致{hint}"),
    "range": _Problem("a number in [{low}, {high}]", "correct it{hint}", "[{low}, {high}] 内的数", "改正该值{hint}"),
    "order": _Problem("each of {options} exactly once", "write it like B>A=C>D", "{options} 各出现一次", "写成 B>A=C>D 的形式"),
    "roles": _Problem("an optional system, then user (or tool) and assistant in turn", "merge or drop turns", "可选的 system，然后 user（或 tool）与 assistant 交替", "合并或删去多余轮次"),
    "last": _Problem("a last turn by {who}", "add or drop turns at the end", "最后一轮是 {who}", "补上或删去末尾轮次"),
    "system": _Problem("system, a reply, then the dialogue", "add the reply, or drop is_system", "system、占位回复，然后是对话", "补上占位回复，或删去 is_system"),
    "turnless": _Problem("at least one message", "add the messages, or drop the row", "至少一轮对话", "补上对话，或删去该行"),
    "prompt": _Problem("answers to the same prompt", "give each prompt its own row", "对同一提问的回答", "不同提问分行书写"),
    "frames": _Problem("still images", "give the video file in video_info", "静态图片", "在 video_info 中给出视频文件"),
    "answers": _Problem("one answer", "keep one, give each its own row, or rename it to answers (the most frequent is learnt); judged ones go into responses with scores", "一个回答", "只保留其一、分行书写，或改名为 answers（学习其中最常见的）；有评分的写入 responses 与 scores"),
    "twice": _Problem("one of {names}, or the same in each", "keep one", "{names} 之一，或各处相同", "只保留其一"),
    "unread_picture": _Problem("its pictures under a name that readers know (images, image, image_path, img, picture)", "rename it to images, or to _{name} to leave it out on purpose", "图片列使用可识别的名称（images、image、image_path、img、picture）", "改名为 images；若有意不用，改名为 _{name}"),
    "unread_clip": _Problem("its clips under a name that readers know (videos, video, video_path)", "rename it to videos, or to _{name} to leave it out on purpose", "视频列使用可识别的名称（videos、video、video_path）", "改名为 videos；若有意不用，改名为 _{name}"),
    "unread_sound": _Problem("text, pictures and clips: the models hear nothing", "drop it, or rename it to _{name}", "文本、图片与视频：模型不支持音频", "删去，或改名为 _{name}"),
    "unread_mask": _Problem("loss: true or false in an assistant turn, for what is to be learnt", "write loss: false in the turns that are not to be learnt, or rename it to _{name} to leave it out on purpose", "在 assistant 轮次中以 loss: true 或 false 标明是否学习", "在不学习的轮次写 loss: false；若有意不用，改名为 _{name}"),
    "unread_thought": _Problem("the thought in reasoning_content of its turn", "rename it to reasoning_content, or to _{name} to leave it out on purpose", "思考内容写在该轮次的 reasoning_content 中", "改名为 reasoning_content；若有意不用，改名为 _{name}"),
    "signal": _Problem("one of {options}", "{hint}", "{options} 之一", "{hint}"),
    "mixed": _Problem("{format}, as most rows", "correct the row, split the file, or set the format", "与多数行相同的 {format}", "改正该行、拆分文件或指定格式"),
    "unknown": _Problem("the fields of a known format", "{hint}", "已知格式的字段", "{hint}"),
    "json": _Problem("one JSON object a row", "correct the row: {why}", "每行一个 JSON 对象", "改正该行：{why}"),
    "twice_named": _Problem("one value for each name of an object", "drop one of them", "对象中每个名称只有一个值", "删去其一"),
    "csv": _Problem("a table with the cells of its header", "correct the row: {why}", "与表头一致的表格", "改正该行：{why}"),
    "utf8": _Problem("UTF-8 text", "save the file as UTF-8, e.g. iconv -f {charset} -t UTF-8", "UTF-8 文本", "另存为 UTF-8，如 iconv -f {charset} -t UTF-8"),
    "file": _Problem("an existing file, folder or pattern", "correct the path", "存在的文件、文件夹或通配路径", "改正路径"),
    "foreign": _Problem("rows: jsonl, json, csv, tsv, parquet or arrow", "{remedy}", "数据行：jsonl、json、csv、tsv、parquet 或 arrow", "{remedy}"),
    "damaged": _Problem("a whole file", "write or download it again ({why})", "完整的文件", "重新生成或下载（{why}）"),
    "spool": _Problem("room for it in {folder} ({why})", "free some, set TMPDIR to another folder, or write the file with smaller row groups", "{folder} 中有足够空间（{why}）", "腾出空间、将 TMPDIR 设为其他文件夹，或以更小的行组写出文件"),
    "split": _Problem("one split", "name one: {names}", "单个划分", "指定其一：{names}"),
    "indices": _Problem("a data set whose rows are all in use", "save it with ds.flatten_indices().save_to_disk(...)", "使用全部行的数据集", "用 ds.flatten_indices().save_to_disk(...) 保存"),
    "empty": _Problem("at least one row", "add rows, or drop the file from the list", "至少一行数据", "补充数据，或从列表中删去该文件"),
    "changed": _Problem("the file as it was when opened", "start again, and do not edit data during a run", "与打开时相同的文件", "重新开始，训练中勿改数据"),
    "package": _Problem("the package {name}", "pip install {name}, or save as jsonl", "已安装 {name}", "pip install {name}，或另存为 jsonl"),
    "hub": _Problem("file_name or path", "download the data set and give its local file", "file_name 或 path", "先下载数据集，再填写本地文件"),
}  # fmt: skip


def show(value: object) -> str:
    """A value for an error message: short, on one line, with its kind where the value alone would
    not tell.
    """
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value)) or 'no fields'}"[:_SHOWN_CHARACTERS]
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}... ({type(value).__name__})"


def _one_line(text: str) -> str:
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


class DataError(ValueError):
    """A row, file or list of files that cannot be used. `str()` is one line in the language that is
    wanted, `english` and `chinese` are both.

    `problem` is a key of PROBLEMS, `params` fill its braces. Line 0 means the whole file. Instances
    pickle, so workers can raise them.
    """

    def __init__(
        self, path: str, line: int, field: str, found: str, problem: str, params: Mapping[str, object]
    ) -> None:
        super().__init__(path, line, field, found, problem, params)
        self.path, self.line, self.field, self.found, self.problem = path, line, field, found, problem
        expected, fix, expected_zh, fix_zh = PROBLEMS[problem]
        known: dict[str, object] = {"hint": "", "field": field, **params}
        said = [say(en, zh, **known) for en, zh in ((expected, expected_zh), (fix, fix_zh))]
        (self.expected, self.expected_zh), (self.fix, self.fix_zh) = ((t.english, t.chinese) for t in said)

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path

    def __str__(self) -> str:
        return str(say(self.english, self.chinese))

    @property
    def english(self) -> str:
        found = in_language(self.found, "en")
        return _one_line(f"{self.place}: {self.field}: found {found}, expected {self.expected}; fix: {self.fix}")

    @property
    def chinese(self) -> str:
        found = in_language(self.found, "zh")
        return _one_line(f"{self.place}：{self.field}：实际为 {found}，应为 {self.expected_zh}；修复：{self.fix_zh}")
