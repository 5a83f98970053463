"""One record as the model will see it: the rendered text with the trained tokens marked and
pictures told in numbers.

Refuses to know: files, terminals (a style says how trained text is marked). What is shown is what
`Processor.encode` gives the trainers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np

from ernie_tune.config.language import Text, counted, say
from ernie_tune.data.batching import thinking_of
from ernie_tune.data.chat import has_open_thought
from ernie_tune.data.processor import Encoded, Processor
from ernie_tune.data.records import Record
from ernie_tune.models.inputs import feature_count


class Style(NamedTuple):
    """What stands around trained text and around media."""

    trained: tuple[str, str]
    media: tuple[str, str]


PLAIN = Style(("⟦", "⟧"), ("", ""))
COLOUR = Style(("\x1b[1;32m", "\x1b[0m"), ("\x1b[36m", "\x1b[0m"))


def show_record(record: Record, processor: Processor, style: Style = PLAIN) -> Iterator[str]:
    """The dialogues of a record, each with a heading and a line of counts. Raises ValueError for
    media that cannot be read.
    """
    count = len(record.candidates)
    dialogues = [record.dialogue(i) for i in range(count)] or [(record.messages, record.images, record.videos)]
    pair = record.signal == "pair"
    for i, (messages, images, videos) in enumerate(dialogues):
        judged = (("chosen", "rejected")[i] if pair else _place(i, count)) if count else record.signal
        generates = messages[-1]["role"] not in ("assistant", "text")
        cut = any(message.get("loss", True) and has_open_thought(message) for message in messages)
        encoded = processor.encode(
            messages,
            list(images),
            list(videos),
            tools=record.tools,
            thinking=thinking_of(record, processor.template),
            add_generation_prompt=generates,
            where=str(record.meta),
        )
        yield f"--- {record.meta} ({record.meta.format}, {judged})"
        if cut:
            encoded = dataclasses.replace(encoded, trained_L=np.zeros_like(encoded.trained_L))
            yield say("--- left out of training: a thought that never ends", "--- 不参与训练：思考没有结束")
        yield render(encoded, processor, style)
        media = encoded.num_images + encoded.num_videos
        tokens, trained = encoded.num_tokens, encoded.num_trained
        yield str(
            say(
                f"--- {counted(tokens, 'token')}, {trained} trained, {counted(media, 'picture or video', 'pictures and videos')}",
                f"--- 共 {tokens} 个 token，训练 {trained} 个，图片与视频 {media} 个",
            )
        )


def _place(i: int, count: int) -> Text:
    return say(f"answer {i + 1} of {count}", f"第 {i + 1} 个回答，共 {count} 个")


def render(encoded: Encoded, processor: Processor, style: Style) -> str:
    """The text of a row: trained stretches marked, a picture as
    `<image 34x46 patches = 391 tokens>`.
    """
    placeholders = processor.tokens.placeholders()
    grids = iter([] if encoded.row.grid_thw_n3 is None else encoded.row.grid_thw_n3.tolist())
    tokens = zip(encoded.row.input_ids_L.tolist(), encoded.trained_L.tolist(), strict=True)
    out = []
    for (trained, visual), group in groupby(tokens, key=lambda token: (token[1], token[0] in placeholders)):
        ids = [i for i, _ in group]
        if not visual:
            text = "".join(map(_visible, processor.tokenizer.decode(ids)))
            out.append(style.trained[0] + text + style.trained[1] if trained else text)
            continue
        left = len(ids)
        while left > 0:  # two pictures may touch where a vocabulary has no markers between them
            frames, rows, columns = grid = next(grids)
            left -= feature_count(grid)
            kind = "image" if frames == 1 else f"video of {frames} frames,"
            said = f"<{kind} {rows}x{columns} patches = {feature_count(grid)} tokens>"
            out.append(style.media[0] + said + style.media[1])
    return "".join(out)


def _visible(sign: str) -> str:
    """A character that a terminal shows and does not obey."""
    return sign if sign.isprintable() or sign in "\n\t" else repr(sign)[1:-1]
