"""What can be served: a folder, a finished run, several adapters by name in one process, exported
int8 and int4 folders; and the verb itself.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import paddle
import pytest
from live import CASES, Live, cases, clip, image_part, live, text_part
from support.tiny_runs import IMAGES, processor, train

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.cli.main import main
from ernie_tune.cli.serve import open_service, read_options, serve_options
from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.loader import split_overrides
from ernie_tune.generate.batch import generate
from ernie_tune.generate.engine import Engine, Request
from ernie_tune.generate.opened import open_engine
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import PeftModel
from ernie_tune.trainers.assemble import base_of_run

WORDS = ("why", "a longer question than the other", "read the digit 九")
PICTURE = IMAGES / "0003.png"


def lora(seed: int) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "experts"], seed=seed)


def shake(model: PeftModel, seed: int) -> None:
    """Give the active adapter an effect."""
    rng = np.random.default_rng(seed)
    assert model.active is not None
    for name, value in model.named_parameters():
        if name.endswith(f"adapters.{model.active}.lora_B"):
            value.set_value(paddle.to_tensor(rng.normal(0, 0.3, value.shape).astype(np.float32)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model with its processor, and two adapters of it."""
    root = tmp_path_factory.mktemp("models")
    base = AutoModel.from_config("tiny-a", seed=3)
    out = {"base": root / "base"}
    base.save_pretrained(out["base"])
    processor().save_pretrained(out["base"])
    for seed, name in enumerate(("red", "blue")):
        model = PeftModel(AutoModel.from_pretrained(out["base"]), lora(seed), name)
        shake(model, seed)
        out[name] = root / name
        model.save_pretrained(out[name])
    return out


def request(text: str) -> Request:
    return Request([{"role": "user", "content": "<image>" + text}], images=[str(PICTURE)])


def messages(text: str) -> list[Any]:
    return [{"role": "user", "content": [image_part(PICTURE), text_part(text)]}]


def tokens(client: openai.OpenAI, model: str, text: str) -> list[int]:
    extra = {"return_token_ids": True}
    done = client.chat.completions.create(
        model=model, messages=messages(text), max_tokens=12, temperature=0, extra_body=extra
    )
    assert done.model == model
    found: list[int] = done.choices[0].message.completion_token_ids  # type: ignore[attr-defined]
    return found


def texts(one: Live, model: str, asked: list[Any], thinking: bool) -> tuple[str, str]:
    """(answer, thought), which a stream must agree with."""
    fields: dict[str, Any] = {
        "model": model,
        "messages": asked,
        "max_tokens": 6,
        "temperature": 0,
        "extra_body": {"chat_template_kwargs": {"enable_thinking": thinking}},
    }
    whole = one.client().chat.completions.create(**fields).choices[0].message
    deltas = [c.choices[0].delta for c in one.client().chat.completions.create(stream=True, **fields)]
    out = whole.content, whole.reasoning_content or ""
    assert "".join(d.content or "" for d in deltas) == out[0]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == out[1]
    return out


def alone(engine: Engine) -> list[list[int]]:
    answers = [engine.answer([request(text)], engine.params(max_new_tokens=12))[0][0] for text in WORDS]
    return [list(answer.token_ids) for answer in answers]


def test_adapters_are_served_by_name_at_the_same_time(folders: dict[str, Path]) -> None:
    """Interleaved requests to the base and two adapters: each gets the tokens of a process that has
    only its own.
    """
    want = {"base": alone(open_engine(folders["base"], base_of_run))}
    for name in ("red", "blue"):
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(folders["base"]), folders[name], name)
        want[name] = alone(Engine(model, processor()))
    assert len({str(ids) for ids in want.values()}) == 3, "the adapters matter"
    given = {"adapters": (f"red={folders['red']}", f"blue={folders['blue']}")}
    service = open_service(folders["base"], given)
    assert service.models == {"base": None, "red": "red", "blue": "blue"}
    with live(service.engine, service.models) as one, ThreadPoolExecutor(9) as pool:
        client = one.client()
        assert [(m.id, m.parent) for m in client.models.list()] == [("base", None), ("red", "base"), ("blue", "base")]
        for _ in range(2):
            jobs = [(n, i, pool.submit(tokens, client, n, WORDS[i])) for i in range(3) for n in ("blue", "base", "red")]
            for name, i, job in jobs:
                assert job.result() == want[name][i], (name, i)


def test_a_finished_run_is_served_under_its_own_name_and_its_base_too(tmp_path: Path) -> None:
    out = train(tmp_path, max_steps=1, fine_tuning="LoRA", weight_quantize_algo="weight_only_int8")
    service = open_service(out, {})
    assert service.models == {"out": "default", "tiny-a": None}
    want = {"out": alone(open_engine(out, base_of_run))}
    engine = open_engine(out, base_of_run)
    with engine.model.disable_adapter():
        want["tiny-a"] = alone(engine)
    with live(service.engine, service.models) as one:
        for name in service.models:
            assert [tokens(one.client(), name, text) for text in WORDS] == want[name]
    named = open_service(out, {"served_model_name": "mine"})
    assert list(named.models) == ["mine", "tiny-a"]


@pytest.mark.parametrize("quantization", ["wint8", "wint4"])
def test_exported_folders_are_served(quantization: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Adapter -> export -> packed folder -> the server: the tokens of `ernie-tune chat`, and those
    of the dense model with the same rounding.
    """
    out = tmp_path / quantization
    words = ["export", str(folders["base"]), str(folders["red"]), "--output_dir", str(out)]
    assert main([*words, "--quantization", quantization, "--emit", "packed", "--verify", "files"]) == 0
    want = alone(open_engine(out, base_of_run))
    service = open_service(out, {})
    video = clip(tmp_path)
    service.engine.processor = service.engine.processor.with_videos(max_frames=4, max_pixels=28 * 28 * 16)
    with live(service.engine, service.models) as one:
        assert [tokens(one.client(), quantization, text) for text in WORDS] == want
        for i, case in enumerate(CASES):
            # both for every case, over the two folders
            thinking = i % 2 == (quantization == "wint4")
            asked, request_ = cases(video)[case]
            again = Request(request_.messages, request_.images, request_.videos, thinking)
            chat = list(service.engine.stream(again, service.engine.params(max_new_tokens=6)))
            said = "".join(d.content for d in chat), "".join(d.reasoning_content for d in chat)
            assert texts(one, quantization, asked, thinking) == said
    dense = Engine(unrolled(service.engine.model, folders["base"]), processor())
    assert alone(dense) == want


def unrolled(packed: Any, base: Path) -> Any:
    """A plain model with the packed one's rounded matrices."""
    from ernie_tune.peft.quantize import QuantizedLinear, QuantizedProduct

    plain = AutoModel.from_pretrained(base)
    state = plain.state_dict()
    for name, value in packed.state_dict().items():
        if name in state:
            state[name].set_value(value)
    for name, layer in packed.named_sublayers():
        if isinstance(layer, QuantizedLinear):
            state[f"{name}.weight"].set_value(layer.weight)
        elif isinstance(layer, QuantizedProduct):
            stack = paddle.stack([layer.quant.dense(e) for e in range(layer.quant.shape[0])])
            state[name.replace("_product", "_proj")].set_value(stack)
    return plain


def test_merged_folders_are_served(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    words = ["export", str(folders["base"]), str(folders["blue"]), "--output_dir", str(out), "--verify", "files"]
    assert main(words) == 0
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(folders["base"]), folders["blue"], "blue")
    want = alone(open_engine(out, base_of_run))
    service = open_service(out, {})
    with live(service.engine, service.models) as one:
        assert [tokens(one.client(), "merged", text) for text in WORDS] == want
    rounded = model.merge()[0]  # export writes bfloat16
    for value in rounded.state_dict().values():
        if value.dtype == paddle.float32:
            value.set_value(value.astype("bfloat16").astype("float32"))
    row = processor().encode(request(WORDS[0]).messages, [str(PICTURE)], add_generation_prompt=True).row
    engine = Engine(rounded, processor())
    assert generate(rounded, [row], processor().tokens, engine.params(max_new_tokens=12))[0][0].token_ids == want[0]


# --- the verb -------------------------------------------------------------------------------------


@pytest.fixture
def process(folders: dict[str, Path]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`ernie-tune serve` as a process of its own, and its address."""
    words = [sys.executable, "-m", "ernie_tune", "serve", str(folders["base"]), "--port", "0", "--api_key", "k"]
    child = subprocess.Popen(
        [*words, "--adapters", f"red={folders['red']}"], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        assert child.stderr is not None
        for line in child.stderr:
            if "serving base, red at" in line:
                break
        yield child, line.split()[-1]
    finally:
        child.kill()
        child.wait()


def test_the_verb_serves_until_a_signal_and_finishes_what_runs(process: tuple[Any, str]) -> None:
    child, url = process
    client = openai.OpenAI(base_url=url, api_key="k", max_retries=0)
    assert len(tokens(client, "red", "why")) > 0
    stream = client.chat.completions.create(
        model="base", messages=messages("why"), max_tokens=300, temperature=1, top_p=1, stream=True
    )
    next(iter(stream))
    child.send_signal(signal.SIGTERM)
    *_, last = list(stream)
    assert last.choices[0].finish_reason in ("length", "stop"), "the stream was finished"
    started = time.monotonic()
    assert child.wait(20) == 0
    assert time.monotonic() - started < 20


def options(*words: str) -> dict[str, Any]:
    return read_options(split_overrides(words)[1])


def test_options_of_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIE_TUNE_API_KEY", "from,env")
    words = ("--max_body_mb", "2", "--request-timeout", "9", "--max_num_seqs=3", "--allow_local_media", str(tmp_path))
    made = serve_options(options(*words, "--allow_media_hosts", "A.local,b.local", "--allow_private_media=true"))
    assert (made.max_body_bytes, made.request_timeout_seconds, made.max_num_seqs) == (2 * 2**20, 9, 3)
    assert made.api_keys == ("from", "env")
    assert made.media.local_folder == tmp_path
    assert made.media.fetch.allowed_hosts == {"a.local", "b.local"}
    assert made.media.fetch.allow_private
    assert serve_options(options("--api_key", "x")).api_keys == ("x",)
    for nothing in ("", " , "):
        with pytest.raises(ValueError, match="api_key is set but names no key"):
            serve_options(options("--api_key", nothing))
        monkeypatch.setenv("ERNIE_TUNE_API_KEY", nothing)
        with pytest.raises(ValueError, match="ERNIE_TUNE_API_KEY is set but names no key"):
            serve_options({})
    monkeypatch.delenv("ERNIE_TUNE_API_KEY")
    assert serve_options({}).api_keys == ()
    home = serve_options(options("--allow_hosts", "API.example,b", "--log_requests=true", "--max_connections", "9"))
    assert (home.host_names, home.any_address, home.log_requests) == (("api.example", "b"), False, True)
    abroad = serve_options(options("--host", "0.0.0.0"))
    assert abroad.any_address
    assert socket.gethostname().lower() in abroad.host_names
    assert not serve_options({}).media.fetch.allow_private
    for bad, message in (
        (("--max_num_seq", "1"), "unknown option 'max_num_seq'.*max_num_seqs"),
        (("--port", "x"), r"port \('x'\) cannot be read"),
        (("--allow_private_media=maybe",), "neither true nor false"),
    ):
        with pytest.raises(UsageError, match=message):
            options(*bad)
    with pytest.raises(ValueError, match=r"allow_local_media \(/nowhere\) must be a folder"):
        serve_options(options("--allow_local_media", "/nowhere"))


def test_the_verb_refuses_wrong_words(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base = str(folders["base"])
    for words, code, message in (
        (["serve"], 2, "expected one folder or YAML file, got 0"),
        (["serve", base, "--engine", "vllm"], 2, "engine must be 'paddle'"),
        (["deploy", base, "--adapters", "x"], 2, "must be NAME=FOLDER"),
        (["serve", base, "--adapters", f"base={folders['red']}"], 1, "adapter name (base) must be new"),
        (["serve", base, "--max_model_len", "9999"], 1, "max_model_len (9999) must not exceed"),
    ):
        assert main(words) == code
        assert message in capsys.readouterr().err


def test_ports_are_looked_at_before_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder holds no model: nothing was loaded before the port was found wrong."""
    monkeypatch.delenv("ERNIE_TUNE_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        for words, message in (
            (["--port", "99999999"], "port (99999999) must be from 0 to 65535"),
            (["--port", "-1"], "port (-1) must be from 0 to 65535"),
            (["--port", str(port)], f"port ({port}) of 127.0.0.1 must be free for this program"),
            (["--port", "0", "--host", "no.such.host.invalid"], "host (no.such.host.invalid) must be an address"),
        ):
            assert main(["serve", str(tmp_path), *words]) == 1
            assert message in capsys.readouterr().err
    main(["serve", str(tmp_path), "--port", "0", "--host", "0.0.0.0"])
    assert "WARNING: 0.0.0.0 is open to other machines and there is no --api_key" in capsys.readouterr().err


def test_without_the_extra_the_verb_says_what_to_install(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [
        m for m in sys.modules if m.startswith(("ernie_tune.serve.server", "ernie_tune.serve.app", "uvicorn"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(folders["base"])]) == 1
    assert "pip install fastapi uvicorn" in capsys.readouterr().err
