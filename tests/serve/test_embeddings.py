"""POST /v1/embeddings: what the official client gets, against vectors made by hand; limits,
attacks, and neighbours that answer meanwhile.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import paddle
import pytest
from live import DIGIT, OTHER, Live, image_part, live, text_part, until
from support.tiny_runs import processor

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.generate import scheduler as scheduling
from ernie_tune.generate.engine import Engine
from ernie_tune.generate.pooling import mean_states, unit_vectors
from ernie_tune.generate.scheduler import Scheduler
from ernie_tune.models.inputs import Row, pack
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import PeftModel

TEXTS = ["why 九", "三天年假", "a longer text, of several words"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    from conftest import _golden_model

    return Engine(_golden_model("tiny-a", "float32"), processor())


@pytest.fixture(scope="module")
def running(engine: Engine) -> Iterator[Live]:
    limits = {"max_model_len": 128, "images": 2, "videos": 1, "prefill_tokens": 16, "cache_tokens": 600}
    with live(engine, {"ernie": None}, **limits) as one:
        yield one


def post(one: Live, body: Any, **more: Any) -> httpx.Response:
    return httpx.post(f"{one.root}/v1/embeddings", json=body, timeout=30, **more)


def told(reply: httpx.Response, status: int = 400) -> str:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


def by_hand(engine: Engine, row: Row) -> np.ndarray:
    """The mean over all positions but the opening one, of a forward of this row alone."""
    with paddle.no_grad():
        hidden_LD = engine.model(pack([row], engine.processor.tokens)).numpy()
    mean = hidden_LD[1:].mean(0)
    return np.asarray(mean / np.linalg.norm(mean))


def test_vectors_of_texts_are_normalised_means(engine: Engine, running: Live) -> None:
    """Also of a list that is read in several turns: 16 tokens are prefilled at once."""
    found = running.client().embeddings.create(model="ernie", input=TEXTS)
    assert [one.index for one in found.data] == [0, 1, 2]
    tokens = 0
    for text, one in zip(TEXTS, found.data, strict=True):
        row = engine.processor.encode_plain(text).row
        tokens += len(row.input_ids_L)
        np.testing.assert_allclose(one.embedding, by_hand(engine, row), atol=2e-6)
        assert np.linalg.norm(one.embedding) == pytest.approx(1, abs=1e-6)
    assert found.model == "ernie"
    assert found.usage.prompt_tokens == found.usage.total_tokens == tokens
    alone = running.client().embeddings.create(model="ernie", input=TEXTS[1])
    np.testing.assert_allclose(alone.data[0].embedding, found.data[1].embedding, atol=2e-6)


def test_floats_and_base64_are_the_same_vectors(running: Live) -> None:
    """The official client asks for base64 and decodes it, unless it is told otherwise."""
    raw = post(running, {"input": TEXTS, "encoding_format": "base64"}).json()["data"]
    plain = post(running, {"input": TEXTS}).json()["data"]
    decoded = running.client().embeddings.create(model="ernie", input=TEXTS).data
    for one, two, three in zip(raw, plain, decoded, strict=True):
        values = np.frombuffer(base64.b64decode(one["embedding"]), "<f4")
        assert values.tolist() == two["embedding"] == list(three.embedding)
        assert one["object"] == "embedding"


def test_token_ids_are_taken_as_they_are(engine: Engine, running: Live) -> None:
    ids = engine.processor.encode_plain(TEXTS[0]).row.input_ids_L.tolist()
    many = post(running, {"input": [ids, ids[1:]]}).json()["data"]
    once = post(running, {"input": ids}).json()["data"]
    text = post(running, {"input": TEXTS[0]}).json()["data"]
    assert len(once) == 1
    np.testing.assert_allclose(once[0]["embedding"], text[0]["embedding"], atol=2e-6)
    np.testing.assert_allclose(many[0]["embedding"], text[0]["embedding"], atol=2e-6)
    assert np.abs(np.subtract(many[1]["embedding"], text[0]["embedding"])).max() > 1e-3


def test_fewer_dimensions_are_the_first_ones_made_long(running: Live) -> None:
    whole = np.array(post(running, {"input": TEXTS[0]}).json()["data"][0]["embedding"])
    cut = running.client().embeddings.create(model="ernie", input=TEXTS[0], dimensions=8).data[0].embedding
    np.testing.assert_allclose(cut, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-6)
    assert "dimensions (97) must be at most 96" in told(post(running, {"input": "x", "dimensions": 97}))


def test_pictures_and_mixed_parts(engine: Engine, running: Live) -> None:
    """A part, and several parts as one input; another picture gives another vector."""
    mixed = [text_part("read <image>"), image_part(DIGIT)]
    found = post(running, {"input": [image_part(DIGIT), mixed, "x"]}).json()
    parts = [{"type": "text", "text": "read <image>"}, {"type": "image", "image": str(DIGIT)}]
    vectors = [np.array(one["embedding"]) for one in found["data"]]
    np.testing.assert_allclose(vectors[0], by_hand(engine, engine.processor.encode_plain(parts[1:]).row), atol=2e-6)
    np.testing.assert_allclose(vectors[1], by_hand(engine, engine.processor.encode_plain(parts).row), atol=2e-6)
    other = np.array(post(running, {"input": [image_part(OTHER)]}).json()["data"][0]["embedding"])
    assert np.abs(other - vectors[0]).max() > 1e-4


def test_adapters_have_their_own_vectors(engine: Engine) -> None:
    own = AutoModel.from_config("tiny-a", seed=3)
    want = by_hand(Engine(own, processor()), engine.processor.encode_plain("why").row)
    model = PeftModel(own, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), "tuned")
    for name, value in model.named_parameters():
        if name.endswith("adapters.tuned.lora_B"):
            value.set_value(paddle.full_like(value, 0.3))
    with live(Engine(model, processor()), {"tuned": "tuned", "base": None}) as one:
        replies = [post(one, {"input": "why", "model": name}).json() for name in ("tuned", "base")]
    tuned, base = (reply["data"][0]["embedding"] for reply in replies)
    np.testing.assert_allclose(base, want, atol=2e-6)
    assert np.abs(np.subtract(tuned, base)).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": ""}, "input must not be empty"),
        ({"input": []}, "input"),
        ({"input": [""]}, "input[0] must not be empty"),
        ({"input": ["x", []]}, "input[1] must not be empty"),
        ({"input": None}, "input must be given"),
        ({"input": 7}, "input (7) must be a text"),
        ({"input": ["x", 7]}, "input[1] (7) must be a text"),
        ({"input": [9, "x"]}, "input[1] ('x')"),
        ({"input": [700]}, "token id (700) must be from 0 to 639"),
        ({"input": [[9], [-1]]}, "token id (-1)"),
        ({"input": [[100]]}, "placeholder"),
        ({"input": [9] * 129}, "input (129 token ids) must have at most max_model_len (128)"),
        ({"input": [[9] * 129]}, "an entry of input (129 items)"),
        ({"input": ["why " * 200]}, "input[0]: row"),
        ({"input": "why " * 9000}, "prompt (at least"),
        ({"input": [[9] * 120] * 6}, "input (more than 600 tokens together)"),
        ({"input": ["x"] * 2049}, "input (2049 inputs) must have at most the limit of a request (2048)"),
        ({"input": [image_part(DIGIT)] * 3}, "number of images (3) must be at most 2"),
        ({"input": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}, "input[0]"),
        ({"input": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}]}, "input[0]"),
        ({"input": [{"type": "audio"}]}, "must be one of 'text', 'image_url', 'video_url'"),
        ({"input": "x", "dimensions": 0}, "dimensions (0)"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "messages": []}, "use input"),
        ({"input": "x", "normalize": False}, "vectors are of length 1"),
        ({"input": "x", "imput": "y"}, "did you mean 'input'?"),
        ({"input": "x\ud800"}, "JSON"),
        ([1], "must be an object"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(change: Any, words: str, engine: Engine, running: Live) -> None:
    if change == {"input": [[100]]}:
        change = {"input": [[engine.processor.tokens.image]]}
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{running.root}/v1/embeddings", content=json.dumps(change), headers=headers, timeout=30)
    assert words in told(reply), reply.text


def test_names_keys_and_methods(engine: Engine, running: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="must be one of"):
        running.client().embeddings.create(model="other", input="x")
    assert httpx.get(f"{running.root}/v1/embeddings").status_code == 405
    with live(engine, api_keys=("secret",)) as one:
        assert post(one, {"input": "x"}).status_code == 401
        assert post(one, {"input": "x"}, headers={"authorization": "Bearer secret"}).status_code == 200


def test_the_language_of_messages(running: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIE_TUNE_LANG", "zh")
    assert "不能为空" in told(post(running, {"input": ""}))


def test_answers_go_on_while_a_long_list_is_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps of an answer no more is read than is prefilled."""
    order: list[str] = []
    step, read = Scheduler.step, scheduling.mean_states

    def stepped(self: Scheduler) -> Any:
        if len(self):
            order.append("step")
        return step(self)

    def reads(*more: Any) -> Any:
        order.append("read")
        time.sleep(0.005)
        return read(*more)

    monkeypatch.setattr(Scheduler, "step", stepped)
    monkeypatch.setattr(scheduling, "mean_states", reads)
    with live(engine, prefill_tokens=8) as one:
        asks = threading.Thread(target=post, args=(one, {"input": ["why"] * 60}))
        asks.start()
        until(lambda: "read" in order)
        body = {"prompt": [9], "max_tokens": 8, "ignore_eos": True, "temperature": 0}
        assert httpx.post(f"{one.root}/v1/completions", json=body, timeout=30).status_code == 200
        asks.join()
    first = order.index("step")
    assert order[first : first + 12].count("step") >= 5, order
    assert "read" in order[first : first + 12]


def test_a_client_that_goes_stops_the_reading(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    read = scheduling.mean_states

    def slow(*more: Any) -> Any:
        turns.append(1)
        time.sleep(0.02)
        return read(*more)

    monkeypatch.setattr(scheduling, "mean_states", slow)
    with live(engine, prefill_tokens=2, max_concurrency=1) as one:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{one.root}/v1/embeddings", json={"input": ["why"] * 500}, timeout=0.5)
        until(lambda: one.service.scheduler.load().waiting == 0)
        assert len(turns) < 400
        until(lambda: post(one, {"input": "x"}).status_code == 200)


def test_a_failing_model_fails_its_own_request_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with live(engine) as one:
        with monkeypatch.context() as patch:
            patch.setattr(scheduling, "mean_states", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
            assert "the model failed on this request (out of memory)" in told(post(one, {"input": "x"}), 500)
        assert post(one, {"input": "x"}).status_code == 200
        assert 'path="/v1/embeddings",status="500"' in httpx.get(f"{one.root}/metrics").text


def test_a_request_that_takes_too_long_ends(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "mean_states", lambda *_: time.sleep(0.05) or np.zeros((1, 96), np.float32))
    with live(engine, prefill_tokens=1, request_timeout_seconds=0.3) as one:
        told(post(one, {"input": ["x"] * 100}), 504)
        until(lambda: one.service.scheduler.load().waiting == 0)


def test_the_end_tells_whoever_waits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "mean_states", lambda *_: time.sleep(0.05) or np.zeros((1, 96), np.float32))
    replies: list[httpx.Response] = []
    with live(engine, prefill_tokens=1, shutdown_timeout_seconds=0.2) as one:
        body = {"input": ["x"] * 500}
        asks = threading.Thread(target=lambda: replies.append(post(one, body)))
        asks.start()
        until(lambda: one.service.scheduler.load().waiting)
        one.drain()
        asks.join(20)
        assert replies
        told(replies[0], 503)


def test_a_vector_of_zeros_stays_one() -> None:
    assert unit_vectors(np.zeros((1, 4), np.float32)).tolist() == [[0, 0, 0, 0]]
    assert unit_vectors(np.array([[3, 4, 9]], np.float32), 2)[0].tolist() == pytest.approx([0.6, 0.8])


def test_a_row_that_holds_nothing_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="row 1 must hold a token"):
        mean_states(engine.model, [Row(np.array([1, 9])), Row(np.array([1]))], engine.processor.tokens, 1)
