"""The official client against the engine: the same tokens for text, pictures, videos, thinking on and off, streamed and not; the API's fields."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live import Live, image_part, live, text_part, video_part
from PIL import Image
from tiny_runs import IMAGES

from ernie_tune.data.processor import Processor
from ernie_tune.serve.engine import Answer, Engine, Request

PROCESSOR = Processor.bundled("tiny").with_videos(max_frames=4, max_pixels=28 * 28 * 16)
DIGIT, OTHER = IMAGES / "0003.png", IMAGES / "0008.png"


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "clip.gif"
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(4)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500)
    return path


@pytest.fixture(scope="module")
def engine() -> Engine:
    from conftest import _golden_model

    return Engine(_golden_model("tiny-b", "float32"), PROCESSOR)


@pytest.fixture(scope="module")
def running(engine: Engine) -> Iterator[Live]:
    with live(engine, {"ernie": None}) as one:
        yield one


def cases(video: Path) -> dict[str, tuple[list[dict[str, Any]], Request]]:
    """name -> (messages as a client writes them, the same as chat asks the engine)."""

    def ours(text: str, **media: Any) -> Request:
        return Request([{"role": "user", "content": text}], **media)

    def theirs(*content: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": list(content)}]

    dialogue = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    return {
        "text": ([{"role": "user", "content": "why 九"}], ours("why 九")),
        "dialogue": (dialogue, Request(dialogue)),
        "image": (theirs(image_part(DIGIT), text_part("read")), ours("<image>read", images=[str(DIGIT)])),
        "two_images": (
            theirs(text_part("a"), image_part(DIGIT), image_part(OTHER), text_part("same?")),
            ours("a<image><image>same?", images=[str(DIGIT), str(OTHER)]),
        ),
        "video": (theirs(video_part(video), text_part("what?")), ours("<video>what?", videos=[str(video)])),
    }


CASES = ("text", "dialogue", "image", "two_images", "video")


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
