"""What the data doctor can find: the table of checks in two languages, the finding, the bounded
list of them, and the checks of one record.

Refuses to know: files, pictures (`media.py`), other rows (`compare.py`), how findings
are printed (`report.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from ernie_tune.config.language import Text, in_language, say
from ernie_tune.data.chat import THINK, THINK_END, ChatTemplate, has_open_thought, split_reasoning
from ernie_tune.data.records import DataError, Message, Record, show


class _Check(NamedTuple):
    severity: str
    expected: str
    fix: str
    expected_zh: str
    fix_zh: str


# What the readers accept and training should not. Errors make the exit code 1; a row is only
# dropped by --fix where a fix says so.
CHECKS = {
    "empty_answer": _Check("error", "an answer", "write it, or drop the row (--fix drops it)", "非空的回答", "补写回答，或删去该行（--fix 会删去）"),
    "unanswered": _Check("error", "an answer to learn, or what judges one", "add it as the last turn or in an answer column; questions alone are for --stage RLVR or PPO", "要学习的回答，或评判回答的依据", "补上最后一轮或回答列；仅有问题的数据请加 --stage RLVR 或 PPO"),
    "no_question": _Check("note", "a question to each picture", "nothing to do: the same question is asked of each; add a question column to ask otherwise", "每张图片都有问题", "可不处理：对每张图片提同一问题；如需其他问题请添加 question 列"),
    "empty_text": _Check("warning", "a text", "drop the row: it is not trained", "非空的文本", "删去该行：不会用于训练"),
    "mute_answer": _Check("warning", "words", "write the answer out, or drop the row", "文字", "补写回答，或删去该行"),
    "padded_answer": _Check("warning", "no space around the answer", "strip it (--fix does)", "首尾无空白的回答", "去掉首尾空白（--fix 会处理）"),
    "empty_prompt": _Check("warning", "a question or a picture", "write the question, or drop the row", "问题或图片", "补写问题，或删去该行"),
    "placeholder": _Check("warning", "<image> or <video> where media belong, no markers of models", "write <image>, or drop the marker", "以 <image> 或 <video> 标记媒体，不含模型的特殊标记", "改写为 <image>，或删去该标记"),
    "same_answers": _Check("error", "an answer unlike the better one", "correct one of them, or drop the row", "与更优回答不同的回答", "改正其一，或删去该行"),
    "score_order": _Check("error", "a score above that of the worse answer ({other})", "swap the answers or correct the scores", "高于较差回答的分数（{other}）", "交换回答或改正分数"),
    "tie": _Check("warning", "answers of different worth", "drop the row: ties teach no preference", "优劣有别的回答", "删去该行：平局不提供偏好"),
    "tools": _Check("error", "what the chat template can write: {kind}", "correct or drop it", "聊天模板可写出的内容：{kind}", "改正或删去"),
    "too_long": _Check("error", "at most {limit} tokens", "shorten the row, shrink its pictures, or raise max_seq_len", "至多 {limit} 个 token", "缩短该行、缩小图片，或调大 max_seq_len"),
    "media_missing": _Check("error", "an existing file", "correct the path (relative ones start beside the data file, or in --media-dir)", "存在的文件", "改正路径（相对路径从数据文件所在目录或 --media-dir 算起）"),
    "media_remote": _Check("error", "a local file", "download it and put its path into the data", "本地文件", "先下载，再填写本地路径"),
    "media_broken": _Check("error", "a picture that can be decoded", "{why}", "可解码的图片", "替换该文件，或另存为 PNG 或 JPEG"),
    "clip_broken": _Check("error", "a clip that can be decoded", "{why}", "可解码的视频", "替换该文件，或转为 mp4"),
    "clip_package": _Check("error", "the package PyAV, which training needs too", "pip install av", "已安装 PyAV（训练同样需要）", "pip install av"),
    "turned": _Check("warning", "pictures stored the way they are seen", "save them turned (ImageOps.exif_transpose), boxes too: the model sees them as they are stored", "按所见方向存储的图片", "旋转后另存（ImageOps.exif_transpose），标注框同样处理：模型看到的是存储方向"),
    "dim": _Check("warning", "16-bit pictures that use their range", "rescale them to 8 bits: only the upper byte of 16 reaches the model", "用满范围的 16 位图片", "重新缩放为 8 位：模型只看到 16 位中的高位字节"),
    "frames": _Check("warning", "one picture a file", "give it as a clip (videos), or save the pages that matter as files of their own: the model sees the first one alone", "每个文件一张图片", "作为视频（videos）给出，或将需要的页另存为单独文件：模型只看到第一张"),
    "blank": _Check("warning", "pictures with something to see on white", "save them on a background that shows them: transparent pixels are white to the model", "在白底上可见的图片", "换成能看清内容的底色后另存：模型看到的透明像素为白色"),
    "duplicate": _Check("warning", "a row unlike {other}", "drop one (--fix does)", "与 {other} 不同的行", "删去其一（--fix 会处理）"),
    "near_duplicate": _Check("warning", "a row that differs more from {other}", "keep one, or leave them on purpose", "与 {other} 差异更大的行", "保留其一，或确认有意为之"),
    "conflict": _Check("warning", "the answer of {other}, since the question is the same", "make them agree, or drop one", "与 {other} 相同的回答，因为问题相同", "统一回答，或删去其一"),
    "overlap": _Check("error", "a row that training does not see ({other})", "drop it from one of the files", "训练数据中没有的行（{other}）", "从其中一个文件删去"),
    "prompt_overlap": _Check("warning", "a question that training does not see ({other})", "drop it from one of the files", "训练数据中没有的问题（{other}）", "从其中一个文件删去"),
    "near_overlap": _Check("warning", "a row that differs more from what training sees ({other})", "drop it from one of the files", "与训练数据差异更大的行（{other}）", "从其中一个文件删去"),
    "length_bias": _Check("warning", "chosen answers about as long as rejected ones, at most 1.3 times", "add pairs whose better answer is the shorter one", "chosen 与 rejected 长度相近，至多 1.3 倍", "增加“更短者更优”的样本"),
    "imbalance": _Check("warning", "classes within a factor of ten", "add rows of the rare class, or drop some of the frequent one", "各类数量相差不超过十倍", "补充少数类，或减少多数类"),
    "one_kind": _Check("warning", "good answers and bad ones", "add rows of the other label: {kind} answers alone show no difference to learn; to imitate good ones take --stage SFT", "好回答与坏回答都有", "补充另一种标签的行：只有一种标签学不到差别；若只想模仿好回答，请用 --stage SFT"),
    "constant": _Check("warning", "answers that depend on the question", "add rows with other answers", "随问题变化的回答", "补充其他回答的样本"),
    "unused": _Check("warning", "names that readers know", "rename what should be trained ({hint}), or drop it: it is kept and not used", "可识别的名称", "需要训练的请改名（{hint}），或删去：这些内容会保留但不会使用"),
    "handed": _Check("note", "names that readers know", "nothing to do: functions that judge are given it as a column; rename what the model should see ({hint})", "可识别的名称", "可不处理：会作为列传给评判函数；需要给模型看的请改名（{hint}）"),
    "bookkeeping": _Check("note", "names that readers know", "nothing to do: it is kept and not used", "可识别的名称", "可不处理：会保留但不会使用"),
    "literal_tag": _Check("warning", "a picture or clip for each tag, or the tag behind a backslash (\\<image>) where the word is meant", "add the column of media (images, videos), or write the backslash; here the tag is trained as a word", "每个标记对应一个媒体；若指文字本身，写作 \\<image>", "补上媒体列（images、videos），或写反斜杠；此处按文字训练"),
    "picture_in_words": _Check("warning", "pictures in a column of their own, and <image> where they belong", "move it to images and write <image> in its place; here its name is trained as words", "图片写在单独的列中，并在其位置写 <image>", "移到 images，并在原处写 <image>；此处其名称按文字训练"),
    "answers": _Check("note", "one answer to learn", "nothing to do: the most frequent one is learnt, or that of the answer's own column", "一个要学习的回答", "可不处理：学习其中最常见的，或回答列中的那一个"),
    "two_systems": _Check("warning", "one system text", "drop one: that of the messages is used", "一个系统提示", "删去其一：使用消息中的那个"),
    "thought_open": _Check("error", "</think> after a thought that begins", "close it and write the answer, or drop the row (--fix --drop); it is not trained", "思考开始后须有 </think>", "补上结束标记与回答，或删去该行（--fix --drop）；不会用于训练"),
    "thought_late": _Check("warning", "<think> and </think> once, at the start of an answer", "move the thought to the start or into reasoning_content; here the marks are trained as words", "<think> 与 </think> 只在回答开头出现一次", "将思考移到开头或写入 reasoning_content；此处标记按文字训练"),
    "thought_foreign": _Check("warning", "a thought between <think> and </think>", "rename the marks; here they are trained as words", "思考写在 <think> 与 </think> 之间", "改写标记；此处按文字训练"),
    "thought_unopened": _Check("warning", "<think> before a thought", "nothing to do if all before </think> is the thought: it is taken as one", "思考之前有 <think>", "若 </think> 之前全部是思考则可不处理：按思考读取"),
    "thought_dropped": _Check("warning", "no thought in a row of mode nothink", "set mode to think or auto; here the thought is left out", "mode 为 nothink 的行不含思考", "将 mode 设为 think 或 auto；此处不使用该思考"),
    "earlier_thoughts": _Check("warning", "thoughts on the way to the answer of the last question", "give each question a row of its own to train its thought: earlier thoughts are not trained, since they are not shown again when answering", "只在最后一个问题的回答中思考", "若要训练，请将每个问题单独成行：较早的思考不会训练，因为回答时不再出现"),
    "bom": _Check("note", "UTF-8 without a byte order mark", "nothing to do; --fix removes it", "不带 BOM 的 UTF-8", "可不处理；--fix 会移除"),
    "crlf": _Check("note", "lines that end in \\n", "nothing to do; --fix writes \\n", "以 \\n 结尾的行", "可不处理；--fix 会改写"),
    "unmeasured": _Check("note", "clips that can be measured here", "pip install av, so that their length can be checked against max_seq_len", "可在此测量的视频", "安装 av（pip install av），以便检验 max_seq_len"),
}  # fmt: skip
_SEVERITY_ZH = {"error": "错误", "warning": "警告", "note": "提示"}

# Markers of ours in a text are only text, and those of other tools never become pictures: both mean
# that the row says something else than meant.
MARKER = re.compile(r"<\|\w+\|>|<image[ _]?\d+>|<ImageHere>|<img>")
# A picture in a question as Markdown or HTML have it.
NAMED_PICTURE = re.compile(
    r"!\[[^\]\n]*\]\((?:data:image/|[^)\s]+\.(?:png|jpe?g|webp|gif|bmp)\b)|<img\s[^>]*\bsrc\s*=", re.IGNORECASE
)
_TEMPLATE = ChatTemplate("hf")
# Marks around a thought, ours and those of other models: <seed:think>, <|begin_of_thought|>,
# [THINK] (Mistral), Kimi's.
_THOUGHTS = "think|thinking|thoughts?|reasoning|reason|reflection|scratchpad|analysis"
THOUGHT_MARK = re.compile(
    rf"</?\s*(?:\w+:)?({_THOUGHTS})\s*>|<\|/?(?:(?:begin|end|start)_of_)?({_THOUGHTS})(?:_(?:start|end|begin))?\|>"
    r"|\[/?THINK\]|◁/?think▷",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth a look, with its place and its repair in English and
    Chinese. Line 0: the whole file.
    """

    path: str
    line: int
    field: str
    found: str
    code: str
    severity: str
    expected: str
    fix: str
    expected_zh: str
    fix_zh: str

    @classmethod
    def of(cls, code: str, path: str, line: int, field: str, found: str, **params: object) -> Finding:
        """A finding of the table above; `params` fill its braces."""
        severity, expected, fix, expected_zh, fix_zh = CHECKS[code]
        said, mend = say(expected, expected_zh, **params), say(fix, fix_zh, **params)
        texts = (said.english, mend.english, said.chinese, mend.chinese)
        return cls(path, line, field, found, code, severity, *texts)

    @classmethod
    def from_error(cls, e: DataError) -> Finding:
        """What a reader refused, as a finding."""
        return cls(e.path, e.line, e.field, e.found, e.problem, "error", e.expected, e.fix, e.expected_zh, e.fix_zh)

    @property
    def place(self) -> str:
        """file:line, for editors and terminals that open it with a click; what concerns a whole
        file is said of its first line.
        """
        return f"{self.path}:{self.line or 1}"

    def __str__(self) -> str:
        return str(self.text)

    @property
    def text(self) -> Text:
        return say(self.english, self.chinese)

    @property
    def english(self) -> str:
        found = in_language(self.found, "en")
        said = f"{self.severity}: {self.field}: found {found}, expected {self.expected}; fix: {self.fix}"
        return one_line(f"{self.place}: {said}")

    @property
    def chinese(self) -> str:
        found = in_language(self.found, "zh")
        said = (
            f"{_SEVERITY_ZH[self.severity]}：{self.field}：实际为 {found}，应为 {self.expected_zh}；修复：{self.fix_zh}"
        )
        return one_line(f"{self.place}：{said}")


def one_line(text: str) -> str:
    """The text with every sign visible, on one line."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


@dataclass
class Findings:
    """How often each thing was found, and the first `limit` findings of each: memory does not grow
    with the number of mistakes.
    """

    limit: int = 20
    kept: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    severities: dict[str, str] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        self.counts[finding.code] += 1
        self.severities[finding.code] = finding.severity
        if self.counts[finding.code] <= self.limit:
            self.kept.append(finding)

    def add_all(self, findings: Iterator[Finding], total: int, code: str) -> None:
        """`total` findings of one kind; of a lazy iterator no more than needed is taken."""
        for finding in islice(findings, max(0, min(total, self.limit - self.counts[code]))):
            self.kept.append(finding)
        if total:
            self.counts[code] += total
            self.severities[code] = CHECKS[code].severity

    def total(self, severity: str) -> int:
        return sum(count for code, count in self.counts.items() if self.severities[code] == severity)


def text_of(message: Message) -> str:
    """All that a turn says: its thought, its words, its calls."""
    calls = message.get("tool_calls")
    return message.get("reasoning_content", "") + message["content"] + (str(calls) if calls else "")


def check_record(record: Record) -> Iterator[Finding]:
    """What is wrong inside one record, beyond what its reader refused. Media are not looked at."""

    def found(code: str, field: str, value: str, **params: object) -> Finding:
        return Finding.of(code, record.meta.path, record.meta.line, field, value, **params)

    for name, turn in _answers(record):
        text = text_of(turn)
        yield from _check_thought(record, name, turn)
        if not has_open_thought(turn) and not _said(turn).strip():
            yield found("empty_answer", name, show(text))
        elif not any(sign.isalnum() for sign in text):
            yield found("mute_answer", name, show(text))
        elif turn["content"] != turn["content"].strip():
            yield found("padded_answer", name, show(turn["content"]))
    if record.signal == "text" and not record.messages[0]["content"].strip():
        yield found("empty_text", "text", show(record.messages[0]["content"]))
    for i, turn in enumerate(record.messages):
        if turn["role"] == "user" and not turn["content"].strip():
            yield found("empty_prompt", f"messages[{i}]", show(turn["content"]))
    turns = [*record.messages, *(turn for candidate in record.candidates for turn in candidate.messages)]
    for code, value in _strange_words(record, turns):
        yield found(code, "content", value)
    if record.candidates:
        yield from _check_order(record)
    if record.tools or any("tool_calls" in turn for turn in turns):
        yield from _check_tools(record)


def _strange_words(record: Record, turns: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """(code, words) of markers and of names of pictures that are trained as words."""
    hits = ((turn, MARKER.search(turn["content"])) for turn in turns)
    marker = next((hit for turn, hit in hits if hit and not _is_thought(turn, hit)), None)
    if marker:
        yield "placeholder", marker.group()
    asked = (turn["content"] for turn in record.messages if turn["role"] in ("user", "system"))
    named = next((hit for text in asked if may_name_picture(text) and (hit := NAMED_PICTURE.search(text))), None)
    if named:
        yield "picture_in_words", show(named.group())


def may_name_picture(text: str) -> bool:
    """Whether `NAMED_PICTURE` is worth a search."""
    return "<" in text or ("!" in text and "![" in text)


def may_hold_marks(text: str) -> bool:
    """Whether `THOUGHT_MARK` is worth a search."""
    return "<" in text or ("[" in text and "[THINK]" in text) or "◁" in text


def _is_thought(turn: Message, hit: re.Match[str]) -> bool:
    """Whether a marker in an answer stands around a thought, which `_check_thought` tells."""
    return turn["role"] == "assistant" and THOUGHT_MARK.fullmatch(hit[0]) is not None


def _said(message: Message) -> str:
    """What a turn says without its thought."""
    calls = message.get("tool_calls")
    content = message["content"]
    return (content if message.get("reasoning_content") else split_reasoning(content)[1]) + (
        str(calls) if calls else ""
    )


def _check_thought(record: Record, name: str, turn: Message) -> Iterator[Finding]:
    """Whether the marks in an answer make the thought that they seem to."""
    where, content = (record.meta.path, record.meta.line), turn["content"]
    if not may_hold_marks(content):
        return
    if has_open_thought(turn):
        yield Finding.of("thought_open", *where, name, show(content))
        return
    rest = _said(turn)
    mark = THOUGHT_MARK.search(rest)
    if mark and mark[0].lower() in (THINK, THINK_END):
        yield Finding.of("thought_late", *where, name, show(rest[max(0, mark.start() - 20) :]))
    elif THINK in content.lstrip()[len(THINK) : len(content) - len(rest)]:
        yield Finding.of("thought_late", *where, name, show(content))
    elif mark and not turn.get("reasoning_content") and (mark[0][:2] == "<|" or not rest[: mark.start()].strip()):
        yield Finding.of("thought_foreign", *where, name, mark[0])


def _answers(record: Record) -> Iterator[tuple[str, Message]]:
    """(name for messages, turn) of every answer that training aims at or judges."""
    if record.signal == "sft":
        for i, turn in enumerate(record.messages):
            if turn["role"] == "assistant" and turn.get("loss", True):
                yield f"messages[{i}]", turn
    names = ("chosen", "rejected") if record.signal == "pair" else ()
    for i, candidate in enumerate(record.candidates):
        for turn in candidate.messages:
            if turn["role"] == "assistant":
                yield names[i] if names else f"responses[{i}]", turn


def _check_order(record: Record) -> Iterator[Finding]:
    """Whether the judgements of a record's candidates agree with each other and can teach
    something.
    """
    where = record.meta.path, record.meta.line
    order = list(record.preferences())
    if record.signal in ("ranking", "rating") and len(record.candidates) > 1 and not order:
        yield Finding.of("tie", *where, "responses", f"{len(record.candidates)} equal judgements")
    for better, worse in order:
        a, b = record.candidates[better], record.candidates[worse]
        if a.messages == b.messages and (a.images, a.videos) == (b.images, b.videos):
            field = "rejected" if record.signal == "pair" else f"responses[{worse}]"
            yield Finding.of("same_answers", *where, field, show(text_of(b.messages[-1])))
        if a.score is not None and b.score is not None and a.score <= b.score:
            if a.score < b.score:
                yield Finding.of("score_order", *where, "score", f"{a.score:g}", other=f"{b.score:g}")
            else:
                yield Finding.of("tie", *where, "score", f"{a.score:g} = {b.score:g}")


def _check_tools(record: Record) -> Iterator[Finding]:
    """Whether tools and calls are what the chat template can write. One finding a record."""

    def wrong(field: str, found: str, kind: str) -> Finding:
        return Finding.of("tools", record.meta.path, record.meta.line, field, found, kind=kind)

    for i, tool in enumerate(record.tools):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            yield wrong(f"tools[{i}]", show(tool), '{"name": text, "parameters": {...}}')
            return
    kind = '{"function": {"name": text, "arguments": {...}}}'
    dialogues = [record.dialogue(i)[0] for i in range(len(record.candidates))] or [record.messages]
    for dialogue in dialogues:
        for call in (call for turn in dialogue for call in turn.get("tool_calls") or []):
            if not isinstance(call, dict) or not isinstance(call.get("function", {}), dict):
                yield wrong("tool_calls", show(call), kind)
                return
        try:
            _TEMPLATE.render(dialogue, tools=record.tools, add_generation_prompt=dialogue[-1]["role"] != "assistant")
        except (ValueError, RecursionError) as error:
            yield wrong("tool_calls", str(error).partition(";")[0], kind)
            return
