"""`ernie-tune serve` under load on this machine: one client after the other, then many at once,
every answer checked against the engine's own.

usage: python tests/bench/bench_serve.py [--model FOLDER | --preset small] [--clients 64] [--seconds
60] [--max_tokens 32] [--single_seconds 15] The server is a process of its own. Half of the requests
stream, every fourth has a picture. Each answer must be the greedy answer to its own prompt, token
by token; prompts whose greedy answer hangs on a near tie (gap under MIN_GAP) are not asked, since
rounding in a batch may turn it.
Single clients run before and after the crowd, so that a busy machine hurts both alike. Prints one
JSON line; exit code 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import itertools
import json
import logging
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ernie_tune  # noqa: F401  sets the CPU variables before paddle loads

import httpx  # isort: skip

IMAGES = Path(__file__).parents[2] / "examples" / "digits" / "images"
MIN_GAP = 1e-3  # nats between the chosen token and the next
WORDS = [
    "read",
    "the",
    "digit",
    "what",
    "is",
    "this",
    "number",
    "please",
    "tell",
    "me",
    "why",
    "how",
    "many",
    "one",
    "two",
    "three",
    "four",
    "five",
    "看图",
    "九",
    "是",
    "什么",
]


@dataclass(frozen=True)
class Question:
    """One prompt and its greedy answer."""

    body: dict[str, Any]
    token_ids: tuple[int, ...]
    content: str


@dataclass
class Tally:
    """What one phase saw."""

    answers: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def fresh_model(preset_name: str, folder: Path) -> None:
    """A model whose greedy answers differ from prompt to prompt: fresh weights, made larger."""
    from ernie_tune.checkpoint.auto import AutoModel
    from ernie_tune.data.processor import Processor

    model = AutoModel.from_config(preset_name, seed=1)
    for name, value in model.named_parameters():
        if value.ndim >= 2 and "embed" not in name and "gate.weight" not in name:
            value.set_value(value * 3.0)
    model.save_pretrained(folder)
    tokenizer = "small" if preset_name == "small" else "tiny"
    Processor.bundled(tokenizer).save_pretrained(folder)


def questions(folder: Path, count: int, max_tokens: int) -> list[Question]:
    """Prompts of many lengths with answers from the engine, one at a time."""
    from ernie_tune.generate.batch import stream_prompts
    from ernie_tune.generate.engine import Request
    from ernie_tune.generate.opened import open_engine
    from ernie_tune.trainers.assemble import base_of_run

    engine, rng, out = open_engine(folder, base_of_run), random.Random(0), []
    pictures = sorted(IMAGES.glob("*.png"))
    params = engine.params(max_new_tokens=max_tokens, top_logprobs=2)
    for i in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randint(3, 60)))
        content: list[Any] = [{"type": "text", "text": text}]
        images: list[str] = []
        if i % 4 == 0:
            images = [str(pictures[i % len(pictures)])]
            data = base64.b64encode(Path(images[0]).read_bytes()).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
        tagged = [{"role": "user", "content": "<image>" * len(images) + text}]
        prepared = engine.prepare(Request(tagged, images), params)
        events = list(stream_prompts(engine.model, [prepared.prompt], engine.processor.tokens, engine.processor.decode))
        if any(event.top[0][1] - event.top[1][1] < MIN_GAP for event in events):
            continue
        answer = engine.answer([Request(tagged, images)], dataclasses.replace(params, top_logprobs=0))[0][0]
        body = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "return_token_ids": True,
            "stream": len(out) % 2 == 1,
        }
        out.append(Question(body, answer.token_ids, answer.content))
    return out


async def ask(client: httpx.AsyncClient, question: Question) -> tuple[tuple[int, ...], str]:
    """(tokens, text) of one answer. Raises httpx.HTTPError."""
    if not question.body["stream"]:
        reply = await client.post("/v1/chat/completions", json=question.body)
        reply.raise_for_status()
        message = reply.json()["choices"][0]["message"]
        return tuple(message["completion_token_ids"]), message["content"]
    ids: list[int] = []
    text = ""
    async with client.stream("POST", "/v1/chat/completions", json=question.body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                ids += delta["completion_token_ids"]
                text += delta.get("content") or ""
    return tuple(ids), text


async def phase(url: str, asked: Sequence[Question], clients: int, seconds: float) -> Tally:
    """`clients` ask without a pause, each its own way through the questions; a request begun in
    time is waited for.
    """
    tally, started = Tally(), time.monotonic()

    async def one(number: int) -> None:
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            order = random.Random(number).sample(asked, len(asked))
            for question in itertools.cycle(order):
                if time.monotonic() - started >= seconds:
                    return
                begun = time.monotonic()
                try:
                    ids, text = await ask(client, question)
                except httpx.HTTPError as error:
                    tally.wrong.append(f"failed: {error!r}")
                    continue
                tally.latencies.append(time.monotonic() - begun)
                tally.answers += 1
                tally.tokens += len(ids)
                if (ids, text) != (question.token_ids, question.content):
                    other = next((i for i, q in enumerate(asked) if q.token_ids == ids), None)
                    tally.wrong.append(
                        f"mixed with question {other}"
                        if other is not None
                        else f"wrong: {ids} for {question.token_ids}"
                    )

    await asyncio.gather(*(one(i) for i in range(clients)))
    tally.seconds = time.monotonic() - started
    return tally


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


async def watch(pid: int, into: list[float]) -> None:
    while True:
        into.append(resident_mb(pid))
        await asyncio.sleep(0.5)


async def load(url: str, pid: int, asked: Sequence[Question], a: argparse.Namespace) -> dict[str, Any]:
    """All phases and what they come to."""
    await phase(url, asked, a.clients, min(a.seconds, 5))  # warm
    before = await phase(url, asked, 1, a.single_seconds)
    memory: list[float] = []
    watching = asyncio.ensure_future(watch(pid, memory))
    crowd = await phase(url, asked, a.clients, a.seconds)
    watching.cancel()
    after = await phase(url, asked, 1, a.single_seconds)
    single = (before.tokens + after.tokens) / (before.seconds + after.seconds)
    half = len(memory) // 2
    wrong = before.wrong + crowd.wrong + after.wrong
    latencies = sorted(crowd.latencies)
    return {
        "questions": len(asked),
        "different_answers": len({q.token_ids for q in asked}),
        "answers": crowd.answers,
        "wrong_or_failed": len(wrong),
        "examples": wrong[:3],
        "single_tokens_per_second": round(single, 1),
        "crowd_tokens_per_second": round(crowd.tokens_per_second, 1),
        "ratio": round(crowd.tokens_per_second / single, 2),
        "median_latency_seconds": round(latencies[len(latencies) // 2], 2),
        "p99_latency_seconds": round(latencies[int(len(latencies) * 0.99)], 2),
        "resident_mb_first_half": round(max(memory[: half or 1]), 1),
        "resident_mb_second_half": round(max(memory[half:]), 1),
    }


def serve(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """The server, once it is ready, and its address."""
    words = [sys.executable, "-m", "ernie_tune", "serve", str(folder), "--port", "0"]
    child = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    for line in child.stderr:
        if " at http://" in line:
            return child, line.split()[-1].removesuffix("/v1")
    raise SystemExit("the server did not start")


def main() -> int:
    """Everything; 1 if an answer was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--single_seconds", type=float, default=15)
    parser.add_argument("--max_tokens", type=int, default=32)
    parser.add_argument("--questions", type=int, default=120)
    a = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # paddle lets everything through
    with tempfile.TemporaryDirectory() as scratch:
        folder = a.model or Path(scratch) / "model"
        if a.model is None:
            fresh_model(a.preset, folder)
        asked = questions(folder, a.questions, a.max_tokens)
        child, url = serve(folder)
        try:
            found = asyncio.run(load(url, child.pid, asked, a))
        finally:
            child.terminate()
            child.wait(30)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {"bench": "serve", "commit": commit, "python": platform.python_version(), "cores": os.cpu_count()}
    settings = {
        "model": str(a.model or a.preset),
        "clients": a.clients,
        "seconds": a.seconds,
        "max_tokens": a.max_tokens,
    }
    print(json.dumps({**about, **settings, **found}))
    return 1 if found["wrong_or_failed"] or found["answers"] < a.clients else 0


if __name__ == "__main__":
    sys.exit(main())
