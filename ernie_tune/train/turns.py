"""Answers of several turns: a sampled turn that ends with a call of a tool is answered by the tool,
and the policy goes on from there.

Token ids are put one behind the other and never made again from text: what the policy chose is
trained, the tool's words and pictures are not. The tool `zoom` shows a part of the row's first
picture, cut from its original pixels. A call that cannot be understood is answered by words that
say so. Refuses to know: rewards, losses, engines, layouts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from ernie_tune.data.batching import THINKING
from ernie_tune.data.chat import CALL, CALL_END
from ernie_tune.data.media.images import image_size, load_image
from ernie_tune.data.processor import Encoded, Processor
from ernie_tune.data.records import Record, as_words
from ernie_tune.generate.batch import Completion, Prompt
from ernie_tune.rewards.functions import Called
from ernie_tune.rewards.scores import Box
from ernie_tune.train.own_tools import OwnTool

TOOLS = ("zoom",)
LEAST_SIDE = 28  # pixels of what is shown
Sample = Callable[[Sequence[Prompt]], Mapping[int, Sequence[Completion]]]


@dataclass
class Conversation:
    """One answer so far: `dialogue` holds the prompt and all that followed, `done` all that is not
    the prompt, `final` where in it the last turn begins.
    """

    dialogue: Encoded
    done: Completion = field(default_factory=Completion)
    calls: list[Called] = field(default_factory=list)
    final: int = 0

    def say(self, turn: Completion) -> None:
        """The policy's turn."""
        self.final, done = len(self.done.token_ids), self.done
        for name in ("token_ids", "logps", "sampled", "sampled_logps", "kept"):
            getattr(done, name).extend(getattr(turn, name))
        done.finish_reason = turn.finish_reason
        self.dialogue = self.dialogue.extended(turn.token_ids)
        self.dialogue.trained_L[self.dialogue.num_tokens - len(turn.token_ids) :] = turn.sampled

    def hear(self, result: Encoded) -> None:
        """The tool's words and pictures, which nobody chose."""
        ids = result.row.input_ids_L.tolist()
        for name, nothing in (("logps", 0.0), ("sampled", False), ("sampled_logps", 0.0)):
            getattr(self.done, name).extend([nothing] * len(ids))
        self.done.token_ids.extend(ids)
        whole, more = self.dialogue.extended(ids, trained=False), result.row
        if more.pixel_values_PC is not None:
            pixels = [x.pixel_values_PC for x in (whole.row, more) if x.pixel_values_PC is not None]
            grids = [x.grid_thw_n3 for x in (whole.row, more) if x.grid_thw_n3 is not None]
            row = replace(whole.row, pixel_values_PC=np.concatenate(pixels), grid_thw_n3=np.concatenate(grids))
            whole = replace(whole, row=row, num_images=whole.num_images + result.num_images)
        self.dialogue = whole


@dataclass(frozen=True)
class Turns:
    """Goes on with answers that call tools, `most` turns and `pictures` shown pictures at most."""

    processor: Processor
    most: int = 4
    pictures: int = 8
    tools: tuple[str, ...] = TOOLS
    own: Mapping[str, OwnTool] = field(default_factory=dict)
    pixels: int = 0  # of a picture that is shown, at most; 0: any

    def go_on(
        self,
        records: Sequence[Record],
        prompts: Sequence[Prompt],
        encoded: Sequence[Encoded],
        first: Mapping[int, Sequence[Completion]],
        sample: Sample,
    ) -> list[list[Conversation]]:
        """The whole answers to each prompt, from their first turns. The tokens that the policy
        chooses are at most `max_new_tokens`, over all turns. Every call of `sample` holds what all
        answers need next, perhaps nothing.
        """
        talks = [[_begun(one, turn) for turn in first[p.key]] for p, one in zip(prompts, encoded, strict=True)]
        for turn in range(1, self.most):
            asked: list[tuple[Prompt, Conversation]] = []
            for record, prompt, some in zip(records, prompts, talks, strict=True):
                for i, talk in enumerate(some):
                    if (next_prompt := self._called(record, prompt, talk, i, turn, len(asked))) is not None:
                        asked.append((next_prompt, talk))
            found = sample([prompt for prompt, _ in asked])
            for prompt, talk in asked:
                talk.say(found[prompt.key][0])
        return talks

    def _called(
        self, record: Record, prompt: Prompt, talk: Conversation, sample: int, turn: int, key: int
    ) -> Prompt | None:
        """What is to be sampled after the answer's newest turn; None where it calls nothing, or may
        go on no further.
        """
        left = prompt.params.max_new_tokens - sum(talk.done.sampled)
        text = self.processor.decode(talk.done.token_ids[talk.final :])
        if left < 1 or talk.done.finish_reason != "stop" or len(talk.calls) != turn - 1 or CALL_END not in text:
            return None
        talk.hear(self.answer(record, talk, text))
        index = prompt.index if isinstance(prompt.index, tuple) else (prompt.index,)
        params = replace(prompt.params, n=1, max_new_tokens=left)
        return Prompt(talk.dialogue.row, params, key, (*index, sample, turn))

    def answer(self, record: Record, talk: Conversation, text: str) -> Encoded:
        """What the tool has to say to the newest turn, and how the next one begins."""
        name, arguments, problem = called(text)
        known = (*self.tools, *self.own)
        if not problem and name not in known:
            problem = f"the only tool is {known[0]}" if len(known) == 1 else f"the tools are {', '.join(known)}"
        if problem or name in self.own:
            said, problem = ("", problem) if problem else self.own[name](arguments)
            call = Called(name or known[0], None, problem, arguments=arguments, result=said)
            talk.calls.append(call)
            return self.result(record, call)
        shown = sum(call.shown is not None for call in talk.calls)
        box, problem = box_of(arguments)
        if box is not None and shown >= self.pictures:
            box, problem = None, f"no more than {self.pictures} pictures are shown"
        if box is not None and not record.images:
            box, problem = None, "there is no picture"
        call = Called(TOOLS[0], box, problem)
        if box is not None:
            size = image_size(record.images[0], str(record.meta))  # type: ignore[arg-type]
            call = replace(call, shown=in_pixels(record, box, size), size=size)
        talk.calls.append(call)
        return self.result(record, call)

    def result(self, record: Record, call: Called) -> Encoded:
        """The same from the call alone."""
        thinking = THINKING.get(record.mode)
        if call.shown is None:
            text = f"error: {call.problem}" if call.problem else call.result
            return self.processor.encode_result(as_words(text), thinking=thinking)
        picture = zoomed(record, call.shown)
        if self.pixels and (scale := (self.pixels / (picture.width * picture.height)) ** 0.5) < 1:
            picture = picture.resize((max(1, int(picture.width * scale)), max(1, int(picture.height * scale))))
        return self.processor.encode_result("<image>", [picture], thinking=thinking)


def _begun(prompt: Encoded, turn: Completion) -> Conversation:
    talk = Conversation(replace(prompt, trained_L=np.zeros_like(prompt.trained_L)))
    talk.say(turn)
    return talk


def called(text: str) -> tuple[str, Mapping[str, Any], str]:
    """(name, arguments, what is wrong) of the call that a turn ends with; arguments that are JSON
    text are read, as many models write them.
    """
    written = text.rpartition(CALL)[2].partition(CALL_END)[0]
    try:
        call = json.loads(written)
        name, arguments = call["name"], call.get("arguments", {})
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "", {}, "a call is {name, arguments: {…}}"
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        return "", {}, "a call is {name, arguments: {…}}"
    return name, arguments, ""


def box_of(arguments: Mapping[str, Any]) -> tuple[Box | None, str]:
    """(the box that a call of `zoom` asks for, what is wrong with it)."""
    try:
        box = tuple(float(x) for x in arguments["box"])
    except (ValueError, TypeError, KeyError):
        return None, "a call is {name, arguments: {box: [x1, y1, x2, y2]}}"
    if len(box) != 4 or not np.isfinite(box).all() or box[0] >= box[2] or box[1] >= box[3]:
        return None, "box must be x1 < x2 and y1 < y2"
    return (box[0], box[1], box[2], box[3]), ""


def zoomed(record: Record, shown: Box) -> Image.Image:
    """A part of the row's first picture, in its own pixels."""
    left, top, right, bottom = (int(x) for x in shown)
    return load_image(record.images[0], str(record.meta)).crop((left, top, right, bottom))  # type: ignore[arg-type]


def in_pixels(record: Record, box: Box, size: tuple[int, int]) -> Box:
    """What of a picture of `size` (width, height) a call shows, in whole pixels: the box, moved
    into the picture, at least LEAST_SIDE a side. It is in the frame that the row's scene names
    (1000 or 1), by default in pixels.
    """
    frame = record.reward.scene.get("frame") if record.reward else None
    low_high = []
    for axis, length in enumerate(size):
        scale = length / frame if frame else 1.0
        low = max(0.0, min(box[axis] * scale, length - 1.0))
        high = max(1.0, min(box[axis + 2] * scale, float(length)))
        least = float(min(LEAST_SIDE, length))
        if high - low < least:
            low = min(max(0.0, (low + high - least) / 2), length - least)
            high = low + least
        low_high.append((float(np.floor(low)), float(np.ceil(high))))
    return low_high[0][0], low_high[1][0], low_high[0][1], low_high[1][1]


def last_turn(done: Completion) -> int:
    """Where the last turn of an answer begins: behind all that nobody chose."""
    forced = [i for i, chosen in enumerate(done.sampled) if not chosen]
    return forced[-1] + 1 if forced else 0


def rebuilt(turns: Turns, record: Record, prompt: Encoded, done: Completion, calls: Sequence[Called]) -> Encoded:
    """The dialogue of an answer from its tokens and calls."""
    talk = Conversation(prompt.extended(done.token_ids))
    for call in calls:
        if call.shown is not None:
            shown = turns.result(record, call)
            nothing = replace(shown, row=replace(shown.row, input_ids_L=shown.row.input_ids_L[:0]))
            talk.hear(nothing)
    talk.dialogue.trained_L[:] = False
    talk.dialogue.trained_L[prompt.num_tokens :] = done.sampled
    return talk.dialogue


def tool_metrics(calls: Sequence[Sequence[Called]]) -> dict[str, tuple[float, float]]:
    """(sum, count) over answers, under TRL's names: tools/call_frequency, tools/failure_frequency
    (of calls), tools/turns_mean.
    """
    every = [call for some in calls for call in some]
    return {
        "tools/call_frequency": (float(sum(bool(some) for some in calls)), float(len(calls))),
        "tools/failure_frequency": (float(sum(bool(call.problem) for call in every)), float(len(every))),
        "tools/turns_mean": (float(sum(len(some) + 1 for some in calls)), float(len(calls))),
    }
