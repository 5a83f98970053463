"""What an answer may say, token by token: JSON of a schema, one of some strings, a regular
expression, calls of tools.

Grammars are followed by `llguidance` over the bytes of our own vocabulary, byte-fallback pieces and
all. A thought that comes before is free. Needs the extra `serve`. Refuses to know: HTTP, models,
how tokens are chosen.

Source: llguidance 1.x, docs/syntax.md; the written form of calls is that of data/chat.py.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.data.chat import CALL, CALL_END, THINK_END
from ernie_tune.data.processor import Processor
from ernie_tune.data.tokenizer import UNKNOWN
from ernie_tune.generate.batch import Constraint

MAX_GRAMMAR_BYTES = 2**17
# As the template writes JSON; white space without end would be JSON, too.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# characters that may belong to a mark whose end is to come
_TAIL = max(len(CALL), len(THINK_END)) - 1
_STEP_ITEMS, _STEP_FUEL = 20_000, 100_000  # some milliseconds a token: others wait for it


class RuleFailed(ValueError):
    """A rule that compiled turns out, in the middle of an answer, to have no way on."""


@dataclass(frozen=True)
class Guide:
    """A rule: `kind` is "json" (`rule`: a schema), "regex" (a pattern) or "choice" (strings)."""

    kind: str
    rule: Any


@dataclass(frozen=True)
class CallRule:
    """Which tools may be called. `needed`: the answer is calls and nothing else; `several`: more
    than one may follow.
    """

    tools: Sequence[Mapping[str, Any]]
    needed: bool
    several: bool = True


class Grammars:
    """Compiles rules for one vocabulary, in any thread."""

    def __init__(self, processor: Processor, vocab_size: int) -> None:
        """`vocab_size`: the model's, which may have rows that no token uses."""
        self.processor, self.vocab_size = processor, vocab_size
        self._lock = threading.Lock()
        self._tokens: Any = None

    def follow(
        self, guide: Guide | None, calls: CallRule | None, *, thinks: bool = False, opened: bool = False
    ) -> Callable[[], Constraint]:
        """What makes the constraint of each sample. `thinks`: the answer begins with a thought;
        `opened`: inside it.

        With a guide and calls that are not needed, the answer is the one or the others; with such
        calls alone it is free, and each call that it opens follows its tool's schema. Raises
        ValueError for a rule that cannot be followed, ImportError where llguidance is missing.
        """
        free = guide is None and calls is not None and not calls.needed
        matcher = self._matcher(_grammar(guide, calls, self.processor, free))
        style = self.processor.template.style
        lead = style.open if thinks and not opened else ""
        forced = self.processor.tokenizer.encode(lead, allow_special=True)
        return lambda: _Guided(self, matcher, forced, thinks, free)

    def _matcher(self, grammar: str) -> Any:
        if len(grammar.encode()) > MAX_GRAMMAR_BYTES:
            raise ValueError(
                say(
                    f"rules of an answer must have at most {MAX_GRAMMAR_BYTES} bytes of JSON; send smaller ones",
                    f"回答规则的 JSON 至多 {MAX_GRAMMAR_BYTES} 字节；请发送更小的",
                )
            )
        try:
            import llguidance
        except ImportError as error:
            raise ImportError(
                say(
                    "structured answers and forced calls need llguidance; pip install llguidance",
                    "结构化回答与强制调用需要 llguidance；请执行 pip install llguidance",
                )
            ) from error
        with self._lock:
            if self._tokens is None:
                wrapper = llguidance.TokenizerWrapper(_Vocabulary(self.processor))
                self._tokens = llguidance.LLTokenizer(wrapper, eos_token=list(self.processor.stop_ids))
        limits = llguidance.LLParserLimits(step_max_items=_STEP_ITEMS, step_lexer_fuel=_STEP_FUEL, verbose_errors=False)
        matcher = llguidance.LLMatcher(
            self._tokens, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0, limits=limits
        )
        tried = matcher
        if not matcher.is_error():
            # A rule may compile and have no beginning: a schema that needs itself, without end.
            tried = matcher.deep_copy()
            tried.compute_logit_bias()
        if tried.is_error():
            said = " ".join(tried.get_error().split())
            raise ValueError(
                say(
                    f"the rule of the answer must be one that can be followed ({said[:300]}); change the schema",
                    f"回答规则须可遵循（{said[:300]}）；请修改 schema",
                )
            )
        return matcher


class _Guided:
    """Follows one sample (a `Constraint` of generate/batch.py): an opening that is due, a thought,
    then the grammar; or, where the answer is `free`, text with calls in it, each by the grammar.
    """

    def __init__(self, grammars: Grammars, matcher: Any, lead: Sequence[int], thinks: bool, free: bool) -> None:
        self._grammars, self._compiled, self._free = grammars, matcher, free
        self._due, self._thinks = list(lead), thinks  # `due`: tokens that come next
        self._matcher = None if free else matcher.deep_copy()
        self._decoder, self._text = grammars.processor.stream(), ""
        self._stops = list(grammars.processor.stop_ids)

    def allowed(self) -> np.ndarray | None:
        if self._due:
            return self._only([self._due[0]])
        if self._thinks:  # the answer cannot end before it has begun
            allowed_V = np.ones(self._grammars.vocab_size, bool)
            allowed_V[self._stops] = False
            return allowed_V
        if self._matcher is None:
            return None
        if self._matcher.is_stopped():
            self._check(self._matcher)
            return self._only(self._stops)
        mask = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)
        self._check(self._matcher)
        allowed_V = np.zeros(self._grammars.vocab_size, bool)
        size = min(len(mask), len(allowed_V))
        allowed_V[:size] = mask[:size] > 0
        return allowed_V

    def accept(self, token_id: int) -> None:
        if self._due:
            self._due = self._due[1:] if token_id == self._due[0] else []
            return
        if self._matcher is None or self._thinks:
            self._text = self._text[-_TAIL:] + self._decoder.push(token_id)
            if self._thinks and THINK_END in self._text:
                self._end_thought(self._text.partition(THINK_END)[2])
            elif not self._thinks and CALL in self._text:
                rest = self._text.partition(CALL)[2]
                self._matcher, self._text = self._compiled.deep_copy(), ""
                self._consume(self._grammars.processor.tokenizer.encode(rest))
            return
        if token_id not in self._stops:
            self._consume([token_id])

    def _end_thought(self, rest: str) -> None:
        """`rest`: what the token that closed it brought along, mostly nothing."""
        self._thinks, self._text = False, ""
        tokenizer = self._grammars.processor.tokenizer
        breaks = self._grammars.processor.template.style.close.partition(THINK_END)[2]
        if not rest.strip("\n"):
            self._due = tokenizer.encode(breaks[len(rest) :])
        elif self._matcher is not None:
            self._consume(tokenizer.encode(rest.lstrip("\n")))

    def _consume(self, token_ids: list[int]) -> None:
        assert self._matcher is not None
        if token_ids:
            self._matcher.consume_tokens(token_ids)
            self._check(self._matcher)
        if self._free and self._matcher.is_stopped():  # the call is complete
            self._matcher = None

    def _check(self, matcher: Any) -> None:
        if matcher.is_error():
            said = " ".join(matcher.get_error().split())[:200]
            raise RuleFailed(
                say(
                    f"the rule of the answer cannot be followed further ({said}); change the schema",
                    f"回答规则无法继续遵循（{said}）；请修改 schema",
                )
            )

    def _only(self, token_ids: Sequence[int]) -> np.ndarray:
        allowed_V = np.zeros(self._grammars.vocab_size, bool)
        allowed_V[list(token_ids)] = True
        return allowed_V


class _Vocabulary:
    """Our tokenizer in the words of llguidance."""

    bos_token_id = None

    def __init__(self, processor: Processor) -> None:
        tokenizer = processor.tokenizer
        self._tokenizer = tokenizer
        self.eos_token_id = processor.stop_ids[0]
        self.special_token_ids = sorted(tokenizer.special.values())
        pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        # An id without a token has no bytes: it can be no part of an answer.
        self.tokens = [b"" if piece == UNKNOWN.encode() else piece for piece in pieces]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"))


def _grammar(guide: Guide | None, calls: CallRule | None, processor: Processor, free: bool) -> str:
    """In llguidance's dialect of Lark."""
    rules: list[str] = []
    forms: list[str] = []
    if guide is not None:
        forms.append("answer")
        rules.append(f"answer: {_answer(guide)}")
    if calls is not None:
        mark, end = (_mark(token, processor) for token in (CALL, CALL_END))
        names = [f"call_{i}" for i, _ in enumerate(calls.tools)]
        # What opens a free answer's call is already there.
        rules.append(f'call: {"" if free else mark} "\\n" called "\\n" {end}')
        rules.append(f"called: {' | '.join(names)}")
        forms.append('call ("\\n" call)*' if calls.several and not free else "call")
        for name, tool in zip(names, calls.tools, strict=True):
            rules += _call(name, tool)
    return "\n".join([f"start: {' | '.join(forms)}", *rules])


def _answer(guide: Guide) -> str:
    if guide.kind == "json":
        return f"%json {_schema(guide.rule)}"
    if guide.kind == "choice":
        return " | ".join(json.dumps(one, ensure_ascii=False) for one in guide.rule)
    return _lark_of_regex(guide.rule)


def _lark_of_regex(pattern: str) -> str:
    """/pattern/, with the slashes and line breaks in it escaped as llguidance escapes them."""
    from llguidance import LLMatcher

    made = json.loads(LLMatcher.grammar_from_regex(pattern))
    return str(made["grammars"][0]["lark_grammar"]).removeprefix("start: ")


def _call(name: str, tool: Mapping[str, Any]) -> list[str]:
    function = tool["function"]
    schema = {"type": "object", **(function.get("parameters") or {})}
    opening = f'{{"name": {json.dumps(function["name"])}, "arguments": '
    return [
        f'{name}: {json.dumps(opening, ensure_ascii=False)} {name}_arguments "}}"',
        f"{name}_arguments: %json {_schema(schema)}",
    ]


def _schema(schema: Any) -> str:
    spaced = {**schema, "x-guidance": _SPACING} if isinstance(schema, dict) else schema
    return json.dumps(spaced, ensure_ascii=False)


def _mark(token: str, processor: Processor) -> str:
    special = processor.tokenizer.special.get(token)
    return json.dumps(token) if special is None else f"<[{special}]>"
