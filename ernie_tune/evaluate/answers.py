"""Measuring a model on held-out rows: the loss on their answers, and what it answers itself.

Refuses to know: when evaluation happens, where results go, how answers are scored (`rewards`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import paddle

from ernie_tune.config.language import join, say
from ernie_tune.data.batching import THINKING, Dropped, Encoder, Sample, collate
from ernie_tune.data.chat import split_reasoning
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import IMAGE_TAG, VIDEO_TAG, Record, count_tags, plain_words
from ernie_tune.generate.engine import Engine, Request
from ernie_tune.generate.scheduler import Capacity


@dataclass(frozen=True)
class Question:
    """A held-out row cut before its last answer: what is asked, with its media, and the reference
    without its thought.
    """

    record: Record
    images: tuple[Any, ...]
    videos: tuple[Any, ...]
    reference: str


def question(record: Record) -> Question:
    """Cut a dialogue before its last answer. Raises ValueError for a row that has none."""
    last = record.messages[-1]
    if last["role"] != "assistant":
        raise ValueError(
            say(
                f"{record.meta}: last role ({last['role']}) must be assistant to evaluate; add the reference answer",
                f"{record.meta}：要评测，最后一轮（{last['role']}）须为 assistant；请补上参考答案",
            )
        )
    prompt = record.messages[:-1]
    text = "".join(m["content"] for m in prompt)
    reference = last["content"] if last.get("reasoning_content") else split_reasoning(last["content"])[1]
    images, videos = record.images[: count_tags(text, IMAGE_TAG)], record.videos[: count_tags(text, VIDEO_TAG)]
    return Question(record, images, videos, plain_words(reference))


def nothing_to_measure(dropped: Dropped) -> ValueError:
    """What is raised where no held-out row can be used: a mean would be a number about nothing."""
    return ValueError(
        say(
            "evaluation rows must hold one that can be measured: {why}; raise max_seq_len or change them",
            "评测数据中没有可用的行：{why}；请调大 max_seq_len，或更换数据",
            why=join("; ", dropped.lines()) if dropped.count else say("there is none", "没有数据"),
        )
    )


def evaluation_loss(
    model: Any,
    records: Iterable[Record],
    encoder: Encoder,
    rows: int,
    done: Callable[[int], object] = lambda count: None,
) -> dict[str, float]:
    """Mean nll per target token, the share of targets that are the most probable token, and the
    number of rows. Rows that do not fit are counted.
    `done` is told how many more rows have been measured.

    Raises ValueError where none fits: their mean would be a number about nothing.
    """
    dropped = Dropped()
    samples: list[Sample] = []
    total = correct = tokens = used = 0.0
    training = model.training
    model.eval()

    def flush() -> None:
        nonlocal total, correct, tokens, used
        batch = collate(samples, encoder.processor.tokens)
        with paddle.no_grad():
            hidden_ND = paddle.gather(model(batch.inputs, read=batch.source_N), paddle.to_tensor(batch.source_N))
            scores_NV = model.logits(hidden_ND).astype("float32")
            target_N = paddle.to_tensor(batch.target_N)
            total += float(paddle.nn.functional.cross_entropy(scores_NV, target_N, reduction="sum"))
            correct += int((scores_NV.argmax(-1) == target_N).sum())
        tokens += len(batch.target_N)
        used += batch.num_rows
        done(len(samples))
        samples.clear()

    for record in records:
        sample = encoder(record, dropped)
        if sample is not None:
            samples.append(sample)
        if len(samples) == rows:
            flush()
    if samples:
        flush()
    if training:
        model.train()
    if not used:
        raise nothing_to_measure(dropped)
    out = {"loss": total / tokens, "token_acc": correct / tokens, "rows": used}
    return {**out, "dropped_rows": float(sum(dropped.count.values()))} if dropped.count else out


def answers(
    model: Any,
    processor: Processor,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    rows: int,
    done: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """Greedy answers, in the order of the questions, thoughts cut off; an answer thinks where its
    reference does. `rows`: answers computed at once.
    `done` is told how many more questions have their answers.
    """
    engine, requests = Engine(model, processor), []
    for q in questions:
        thinks = processor.template.thinks(q.record.messages, THINKING.get(q.record.mode))
        asked, where = q.record.messages[:-1], str(q.record.meta)
        requests.append(Request(asked, q.images, q.videos, thinks, tools=q.record.tools, where=where))
    found = engine.answer(requests, engine.params(max_new_tokens=max_new_tokens), Capacity(rows=rows), done)
    return [answer.content.strip() for (answer,) in found]
