"""Tokens and texts -> the JSON of the API: whole answers, chunks of a stream, errors. Refuses to
know: how they are sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from ernie_tune.data.processor import Processor
from ernie_tune.generate.batch import TokenEvent
from ernie_tune.serve.errors import ApiError
from ernie_tune.serve.service import Choice, Step, Ticket

DONE = b"data: [DONE]\n\n"


def dumps(value: Any) -> bytes:
    """JSON in UTF-8. Half a surrogate pair, which only a client's own words can hold, stays an
    escape.
    """
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


def error(problem: ApiError) -> dict[str, Any]:
    return {"error": {"message": problem.message, "type": problem.kind, "param": problem.param, "code": problem.code}}


def usage(ticket: Ticket) -> dict[str, Any]:
    images, videos = ticket.media_tokens()
    return {
        "prompt_tokens": ticket.prompt_tokens,
        "completion_tokens": ticket.answer_tokens,
        "total_tokens": ticket.prompt_tokens + ticket.answer_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": images, "video_tokens": videos},
        "completion_tokens_details": {"reasoning_tokens": ticket.thought_tokens},
    }


def _token(processor: Processor, i: int, logp: float) -> dict[str, Any]:
    raw = processor.tokenizer.token_bytes(i)
    return {"token": raw.decode("utf-8", "replace"), "logprob": logp, "bytes": list(raw)}


def logprobs(processor: Processor, events: Iterable[TokenEvent]) -> dict[str, Any]:
    """One entry a token, the one that ends the answer included: log-probabilities at the request's
    temperature (1 when greedy).
    """
    content = [
        {
            **_token(processor, event.token_id, event.logp),
            "top_logprobs": [_token(processor, i, logp) for i, logp in event.top],
        }
        for event in events
    ]
    return {"content": content, "refusal": None}


def text_logprobs(processor: Processor, events: Sequence[TokenEvent], start: int = 0) -> dict[str, Any]:
    """The older shape of /v1/completions. `start`: characters of the answer before these tokens."""
    tokens = [processor.tokenizer.token_bytes(event.token_id).decode("utf-8", "replace") for event in events]
    offsets = [start + sum(map(len, tokens[:i])) for i in range(len(tokens))]
    top = [
        {processor.tokenizer.token_bytes(i).decode("utf-8", "replace"): logp for i, logp in event.top}
        for event in events
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [event.logp for event in events],
        "top_logprobs": top,
        "text_offset": offsets,
    }


class ReplyWriter:
    """Makes the replies of one request. `chat` False: the shapes of /v1/completions."""

    def __init__(
        self,
        ticket: Ticket,
        processor: Processor,
        number: str,
        created: int,
        *,
        chat: bool,
        logprobs: bool,
        token_ids: bool,
        usage_each: bool = False,
    ) -> None:
        """`usage_each`: every chunk of a stream tells the usage so far."""
        self.ticket, self.processor = ticket, processor
        self.chat, self.logprobs, self.token_ids, self.usage_each = chat, logprobs, token_ids, usage_each
        self._head = {"id": ("chatcmpl-" if chat else "cmpl-") + number, "created": created, "model": ticket.model}
        self._number = number
        self._begun: set[int] = set()
        self._called: dict[int, int] = {}  # calls of each choice that are out
        self._characters: dict[int, int] = {}

    def whole(self, steps: Sequence[Step]) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        choices = [self._choice(choice, [s for s in steps if s.choice is choice]) for choice in self.ticket.choices]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage(self.ticket)}

    def _choice(self, choice: Choice, steps: Sequence[Step]) -> dict[str, Any]:
        content = "".join(step.delta.content for step in steps)
        ids = self._ids(choice, choice.token_ids)
        out: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason}
        events = [step.event for step in steps]
        if not self.chat:
            found = text_logprobs(self.processor, events) if self.logprobs else None
            return {**out, "text": content, "logprobs": found, **ids}
        reasoning = "".join(step.delta.reasoning_content for step in steps)
        message = {"role": "assistant", "content": content, "reasoning_content": reasoning or None, **ids}
        if calls := [call for step in steps for call in self._calls(step)]:
            message |= {"content": content or None, "tool_calls": calls}
        return {**out, "message": message, "logprobs": logprobs(self.processor, events) if self.logprobs else None}

    def _ids(self, choice: Choice, answer: Sequence[int], with_prompt: bool = True) -> dict[str, Any]:
        if not self.token_ids:
            return {}
        if not with_prompt:
            return {"completion_token_ids": list(answer)}
        n = len(self.ticket.choices) // len(self.ticket.prepared)
        prompt = self.ticket.prepared[choice.index // n].prompt.row.input_ids_L.tolist()
        return {"prompt_token_ids": prompt, "completion_token_ids": list(answer)}

    def _calls(self, step: Step) -> list[dict[str, Any]]:
        """The tool calls that a step ended."""
        first = self._called.get(step.choice.index, 0)
        self._called[step.choice.index] = first + len(step.delta.tool_calls)
        return [
            {
                "id": f"call_{self._number}_{step.choice.index}_{i}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for i, call in enumerate(step.delta.tool_calls, first)
        ]

    def chunks(self, steps: Sequence[Step]) -> bytes:
        """What a step of the model adds to a stream; b"" where nothing can be shown yet."""
        shown = [
            step
            for step in steps
            if step.delta.content
            or step.delta.reasoning_content
            or step.delta.finish_reason
            or step.delta.tool_calls
            or self.logprobs
            or self.token_ids
        ]
        so_far = {"usage": usage(self.ticket)} if self.usage_each else {}
        return b"".join(sse({**self._chunk([self._part(step)]), **so_far}) for step in shown)

    def end(self, with_usage: bool) -> bytes:
        """The last lines of a stream."""
        return (sse({**self._chunk([]), "usage": usage(self.ticket)}) if with_usage else b"") + DONE

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk" if self.chat else "text_completion", "choices": choices}

    def _part(self, step: Step) -> dict[str, Any]:
        choice, delta = step.choice, step.delta
        first = choice.index not in self._begun
        self._begun.add(choice.index)
        ids = self._ids(choice, [step.event.token_id], first)
        out: dict[str, Any] = {"index": choice.index, "finish_reason": delta.finish_reason or None}
        if not self.chat:
            found = None
            if self.logprobs:
                found = text_logprobs(self.processor, [step.event], self._characters.get(choice.index, 0))
                self._characters[choice.index] = found["text_offset"][0] + len(found["tokens"][0])
            return {**out, "text": delta.content, "logprobs": found, **ids}
        part: dict[str, Any] = {"role": "assistant", "content": delta.content} if first else {}
        if delta.content:
            part["content"] = delta.content
        if delta.reasoning_content:
            part["reasoning_content"] = delta.reasoning_content
        first_call = self._called.get(choice.index, 0)
        if calls := self._calls(step):
            part["tool_calls"] = [{"index": first_call + i, **call} for i, call in enumerate(calls)]
        found = logprobs(self.processor, [step.event]) if self.logprobs else None
        return {**out, "delta": {**part, **ids}, "logprobs": found}
