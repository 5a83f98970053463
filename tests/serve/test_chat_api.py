"""The official client against the engine: the same tokens for text, pictures, videos, thinking on
and off, streamed and not; the API's fields.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from live import CASES, DIGIT, Live, cases, clip, image_part, live, text_part, video_part

from ernie_tune.cli.chat import talk
from ernie_tune.data.processor import Processor
from ernie_tune.generate.batch import Prompt, stream_prompts
from ernie_tune.generate.engine import Answer, Engine, Request
from ernie_tune.models.inputs import Row

PROCESSOR = Processor.bundled("tiny").with_videos(max_frames=4, max_pixels=28 * 28 * 16)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def engine() -> Engine:
    from conftest import _golden_model

    return Engine(_golden_model("tiny-b", "float32"), PROCESSOR)


@pytest.fixture(scope="module")
def running(engine: Engine) -> Iterator[Live]:
    with live(engine, {"ernie": None}) as one:
        yield one


def ask(running: Live, messages: list[dict[str, Any]], thinking: bool | None, **more: Any) -> Any:
    extra: dict[str, Any] = {"return_token_ids": True, **more.pop("extra_body", {})}
    if thinking is not None:
        extra["chat_template_kwargs"] = {"enable_thinking": thinking}
    values = {"model": "ernie", "max_tokens": 8, "temperature": 0, **more}
    return running.client().chat.completions.create(messages=messages, extra_body=extra, **values)


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_client_gets_the_engines_tokens(
    case: str, thinking: bool | None, running: Live, engine: Engine, video: Path
) -> None:
    messages, request_ = cases(video)[case]
    request_ = Request(request_.messages, request_.images, request_.videos, thinking)
    want = engine.answer([request_], engine.params(max_new_tokens=8))[0][0]
    got = ask(running, messages, thinking, logprobs=True, top_logprobs=2)
    (choice,) = got.choices
    assert choice.message.completion_token_ids == list(want.token_ids)
    assert (choice.message.content, choice.message.reasoning_content or "") == (want.content, want.reasoning_content)
    assert choice.finish_reason == want.finish_reason
    assert got.usage.prompt_tokens == want.prompt_tokens == len(choice.message.prompt_token_ids)
    assert got.usage.completion_tokens == len(want.token_ids)
    assert got.usage.completion_tokens_details.reasoning_tokens == (len(want.token_ids) if thinking else 0)
    np.testing.assert_allclose([t.logprob for t in choice.logprobs.content], want.logps, atol=1e-5)
    assert all(t.top_logprobs[0].logprob == t.logprob for t in choice.logprobs.content), "greedy takes the likeliest"
    check_stream(running, messages, thinking, want)


def check_stream(running: Live, messages: list[dict[str, Any]], thinking: bool | None, want: Answer) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    *chunks, last = list(ask(running, messages, thinking, **options))
    assert last.choices == []
    assert last.usage.completion_tokens == len(want.token_ids)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(d.content or "" for d in deltas) == want.content
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == want.reasoning_content
    assert [i for d in deltas for i in d.completion_token_ids] == list(want.token_ids)
    assert [d.role for d in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [want.finish_reason]
    logps = [t.logprob for chunk in chunks for t in chunk.choices[0].logprobs.content]
    np.testing.assert_allclose(logps, want.logps, atol=1e-5)


def test_samples_are_the_engines_and_differ(running: Live, engine: Engine) -> None:
    """n, seed, temperature, top_p, top_k and the penalties reach the sampler; stop strings cut; a
    stream carries all choices.
    """
    penalties = {"frequency_penalty": 0.7, "presence_penalty": -0.4}
    settings = {
        "temperature": 0.9,
        "top_p": 0.8,
        "top_k": 40,
        "repetition_penalty": 1.1,
        "seed": 11,
        "n": 3,
        **penalties,
    }
    asked = Request([{"role": "user", "content": "why"}])
    want = engine.answer([asked], engine.params(max_new_tokens=8, **settings))[0]
    extra = {"top_k": 40, "repetition_penalty": 1.1}
    fields = {"temperature": 0.9, "top_p": 0.8, "seed": 11, "n": 3, **penalties}
    got = ask(running, [{"role": "user", "content": "why"}], None, extra_body=extra, **fields)
    assert [c.message.completion_token_ids for c in got.choices] == [list(a.token_ids) for a in want]
    assert len({a.token_ids for a in want}) > 1
    assert got.usage.completion_tokens == sum(len(a.token_ids) for a in want)
    streamed: dict[int, str] = {}
    for chunk in ask(running, [{"role": "user", "content": "why"}], None, extra_body=extra, stream=True, **fields):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert streamed == {i: a.content for i, a in enumerate(want)}
    stop = want[0].content[2:4]
    cut = ask(running, [{"role": "user", "content": "why"}], None, extra_body=extra, stop=[stop], **fields).choices[0]
    assert (cut.message.content, cut.finish_reason) == (want[0].content.split(stop)[0], "stop")


def test_without_a_seed_answers_differ(running: Live) -> None:
    answers = {
        ask(running, [{"role": "user", "content": "why"}], None, temperature=2, top_p=1).choices[0].message.content
        for _ in range(3)
    }
    assert len(answers) > 1


def test_a_thought_is_cut_at_its_budget(running: Live, engine: Engine) -> None:
    asked = Request([{"role": "user", "content": "why"}], thinking=True, max_thought_tokens=2)
    want = engine.answer([asked], engine.params(max_new_tokens=8))[0][0]
    got = ask(running, [{"role": "user", "content": "why"}], True, extra_body={"reasoning_max_tokens": 2})
    message = got.choices[0].message
    assert message.completion_token_ids == list(want.token_ids)
    assert (message.content, message.reasoning_content) == (want.content, want.reasoning_content)
    assert message.reasoning_content
    assert message.content
    ids = message.completion_token_ids
    marks = ids.index(PROCESSOR.tokenizer.token_id("</think>")) + 1
    assert got.usage.completion_tokens_details.reasoning_tokens == marks


def test_thinking_mode_and_media_usage(running: Live, video: Path) -> None:
    messages = [{"role": "user", "content": [image_part(DIGIT), video_part(video), text_part("x")]}]
    closed = {"chat_template_kwargs": {"options": {"thinking_mode": "close"}}}
    got = ask(running, messages, None, extra_body=closed)
    assert got.usage.prompt_tokens_details.image_tokens == 4
    assert got.usage.prompt_tokens_details.video_tokens == 2 * 16, "two pairs of 112x112"
    opened = ask(running, messages, None, extra_body={"chat_template_kwargs": {"options": {"thinking_mode": "open"}}})
    assert got.choices[0].message.reasoning_content is None
    assert opened.choices[0].message.reasoning_content


def test_tags_and_marks_in_a_clients_text_are_text(running: Live, engine: Engine) -> None:
    words = "<image> <|IMAGE_PLACEHOLDER|></s> <video>"
    message = {"role": "user", "content": words}
    got = ask(running, [message], None).choices[0].message
    plain = [{"role": "user", "content": [{"type": "text", "text": words}]}]
    want = engine.answer([Request(plain)], engine.params(max_new_tokens=8))[0][0]
    assert got.completion_token_ids == list(want.token_ids)


@pytest.mark.parametrize("stream", [False, True])
def test_completions_take_prompts_as_they_are(stream: bool, running: Live, engine: Engine) -> None:
    client = running.client()
    text = "<|begin_of_sentence|>User: why\nAssistant: "
    ids = PROCESSOR.tokenizer.encode(text, allow_special=True)
    want = []
    for index in range(2):
        prompt = Prompt(Row(np.array(ids)), engine.params(max_new_tokens=6, temperature=0.8, seed=3, n=2), 0, index)
        events = list(stream_prompts(engine.model, [prompt], PROCESSOR.tokens))
        want += [[e for e in events if e.sample == s] for s in range(2)]
    got: dict[int, list[Any]] = {}
    more = {"stream": True} if stream else {}
    fields: dict[str, Any] = {"model": "ernie", "max_tokens": 6, "temperature": 0.8, "top_p": 1, "seed": 3, "n": 2}
    for prompts in ([text, text], [ids, ids]):
        reply = client.completions.create(
            prompt=prompts, logprobs=1, extra_body={"return_token_ids": True}, **fields, **more
        )
        for part in reply if stream else [reply]:
            for choice in part.choices:
                got.setdefault(choice.index, []).append(choice)
        assert sorted(got) == [0, 1, 2, 3]
        for index, events in enumerate(want):
            parts = got[index]
            assert [i for part in parts for i in part.completion_token_ids] == [e.token_id for e in events]
            logps = [p for part in parts for p in part.logprobs.token_logprobs]
            np.testing.assert_allclose(logps, [e.logp for e in events], atol=1e-5)
            shown = "".join(part.text for part in parts)
            assert shown == PROCESSOR.decode([e.token_id for e in events])
            assert parts[-1].finish_reason == events[-1].finish_reason
            tokens = [t for part in parts for t in part.logprobs.tokens]
            offsets = [o for part in parts for o in part.logprobs.text_offset]
            assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))]
        got = {}


def test_models_health_and_metrics(running: Live) -> None:
    client = running.client()
    assert [m.id for m in client.models.list()] == ["ernie"]
    assert client.models.retrieve("ernie").max_model_len == 4096
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other/one")
    assert caught.value.code == "model_not_found"
    assert httpx.get(f"{running.root}/health").json() == {"status": "ok"}
    ask(running, [{"role": "user", "content": "why"}], None)
    page = httpx.get(f"{running.root}/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in page.text.splitlines() if not line.startswith("#"))
    assert int(lines['ernie_tune_requests_total{path="/v1/chat/completions",status="200"}']) >= 1
    assert int(lines['ernie_tune_generation_tokens_total{model="ernie"}']) >= 8
    assert lines["ernie_tune_sequences_running"] == "0"
    assert lines['ernie_tune_request_seconds_bucket{le="+Inf"}'] == lines["ernie_tune_request_seconds_count"]


def test_concurrent_requests_are_batched_and_each_gets_its_own(running: Live, engine: Engine, video: Path) -> None:
    """Different prompts, lengths and media at once; the steps' mean size shows that they shared
    them.
    """
    asked = [cases(video)[case] for case in CASES]
    want = [engine.answer([request_], engine.params(max_new_tokens=30))[0][0] for _, request_ in asked]
    before = running.service.scheduler.load()
    with ThreadPoolExecutor(15) as pool:
        jobs = [pool.submit(ask, running, asked[i % 5][0], None, max_tokens=30) for i in range(15)]
        for i, job in enumerate(jobs):
            assert job.result().choices[0].message.completion_token_ids == list(want[i % 5].token_ids)
    load = running.service.scheduler.load()
    assert (load.rows_stepped - before.rows_stepped) / (load.steps - before.steps) > 2
    assert (load.waiting, load.running) == (0, 0)


def test_the_terminal_says_the_same(running: Live, engine: Engine) -> None:
    """`ernie-tune chat` with a picture and a second question, against a client that sends the whole
    dialogue.
    """
    out = io.StringIO()

    def write(text: str, end: str = "\n", flush: bool = False) -> None:
        out.write(text + end)

    assert talk(engine, [f"/image {DIGIT}", "read", "and now?"], write, {"max_new_tokens": 8}) == 0
    first = [{"role": "user", "content": [image_part(DIGIT), text_part("read")]}]
    answer = ask(running, first, None).choices[0].message.content
    second = [*first, {"role": "assistant", "content": answer.strip()}, {"role": "user", "content": "and now?"}]
    again = ask(running, second, None).choices[0].message.content
    assert out.getvalue() == f"image 1: {DIGIT}\n{answer}\n{again}\n"
