"""The room Export and serve: a model as an OpenAI server on this machine, that can be asked from
here too; as a quantised folder; the command that serves it with FastDeploy.

Refuses to know: how either is done; all are child processes.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from ernie_tune.config.language import VARIABLE, Text, halves, say
from ernie_tune.data.records import IMAGE_TAG
from ernie_tune.report import html
from ernie_tune.ui import asking
from ernie_tune.ui import studio as kit
from ernie_tune.ui.asking import SERVED, ModelServer
from ernie_tune.ui.jobs import DONE, RUNNING, STOPPED
from ernie_tune.ui.studio import Offers, Studio

EXPORT = "export"
QUANTIZATIONS = ("none", "wint8", "wint4")
_LOOK_SECONDS = 2.0
_COMMAND_SECONDS = 60.0
_ANSWER_TOKENS = 256


def room(studio: Studio) -> Offers:
    """Build it."""
    model = gr.Dropdown(
        studio.workspace.models(),
        label=studio("model", "模型"),
        value=None,
        allow_custom_value=True,
        elem_id="serve-model",
    )
    with gr.Row():
        serve = gr.Button(studio("serve", "启动服务"), variant="primary", elem_id="serve-start")
        end = gr.Button(studio("end servers", "停止服务"), variant="stop", elem_id="serve-end")
    told = gr.HTML(elem_id="serve-told")
    running, shown = gr.HTML(elem_id="serve-running"), gr.State("")
    with gr.Row():
        picture = gr.Image(
            type="filepath",
            label=studio("picture", "图片"),
            sources=["upload", "clipboard"],
            elem_id="serve-picture",
            height=160,
        )
        with gr.Column():
            question = gr.Textbox(label=studio("ask the newest server", "向最新的服务提问"), elem_id="serve-question")
            ask = gr.Button(studio("ask", "提问"), elem_id="serve-ask")
            said = gr.HTML(elem_id="serve-said")
    with gr.Row():
        kind = gr.Dropdown(
            list(QUANTIZATIONS), value="wint8", label=studio("quantization", "量化"), elem_id="serve-quantization"
        )
        target = gr.Textbox("output/exported", label=studio("export to", "导出到"), elem_id="serve-target")
        export = gr.Button(studio("export", "导出"), elem_id="serve-export")
        command = gr.Button(studio("FastDeploy command", "FastDeploy 命令"), elem_id="serve-fastdeploy")
    exported = gr.HTML(elem_id="serve-exported")
    going, gone = gr.HTML(elem_id="serve-exporting"), gr.State("")
    serve.click(lambda name: _serve(studio, name), model, told)
    end.click(lambda: _end(studio), outputs=told)
    question.submit(lambda q, p: (yield from _ask(studio, q, p)), [question, picture], said, show_progress="hidden")
    ask.click(lambda q, p: (yield from _ask(studio, q, p)), [question, picture], said, show_progress="hidden")
    export.click(
        lambda name, q, to, tongue: _export(studio, name, q, to, tongue),
        [model, kind, target, target],
        exported,
        js=kit.IN_TONGUE,
    )
    command.click(lambda name: _fastdeploy(studio, name), model, exported)
    gr.Timer(_LOOK_SECONDS).tick(
        lambda seen: _look(studio, seen), shown, [running, shown], show_progress="hidden", api_visibility="private"
    )
    gr.Timer(_LOOK_SECONDS).tick(
        lambda seen: _exporting(studio, seen), gone, [going, gone], show_progress="hidden", api_visibility="private"
    )
    return [(model, studio.workspace.models)]


def _exporting(studio: Studio, seen: str) -> tuple[Any, Any]:
    """How the newest export goes; nothing is sent where nothing has changed."""
    job = next((job for job in studio.jobs.all() if job.kind == EXPORT), None)
    if job is None:
        return gr.skip(), gr.skip()
    state = studio.jobs.state(job)
    last = [line.strip() for line in studio.jobs.output(job).splitlines() if line.strip()][-5:]
    head = f'<p><b>{escape(job.title)}</b> · <span class="state" data-state="{state}">{html.both(kit.STATES[state])}</span></p>'
    now = f'<div class="card">{head}{kit.log([halves(line) for line in last])}</div>'
    return (gr.skip(), gr.skip()) if now == seen else (now, now)


def _serve(studio: Studio, name: str | None) -> str:
    try:
        model = studio.workspace.model(name or "")
        server = studio.servers.serve(model, f"serve {name}")
    except (ValueError, OSError) as error:
        return kit.line(error, "bad")
    return kit.line(say(f"starting as {server.job.id}", f"正在启动（{server.job.id}）"), "good")


def _look(studio: Studio, seen: str) -> tuple[Any, Any]:
    """The servers of this studio, the newest first; nothing is sent where nothing has changed."""
    cards = [_card(studio, server) for server in reversed(list(studio.servers.served.values()))]
    now = "".join(cards)
    return (gr.skip(), gr.skip()) if now == seen else (now, now)


def _card(studio: Studio, server: ModelServer) -> str:
    state = studio.jobs.state(server.job)
    ready = state == RUNNING and studio.servers.is_ready(server)
    word = say("ready", "就绪") if ready else kit.STATES[state] if state != RUNNING else say("starting", "正在启动")
    address = f"http://127.0.0.1:{server.port}"
    head = f'<p><b>{escape(server.job.title)}</b> · <span class="state" data-state="{"ready" if ready else state}">{html.both(word)}</span></p>'
    if state in (DONE, STOPPED):
        return f'<div class="card">{head}</div>'
    if not ready:
        last = [line for line in studio.jobs.output(server.job).splitlines() if line.strip()][-5:]
        return f'<div class="card">{head}{kit.log([halves(line) for line in last])}</div>'
    body = json.dumps({"model": "model", "messages": [{"role": "user", "content": "…"}]}, ensure_ascii=False)
    curl = (
        f"curl {address}/v1/chat/completions -H 'Authorization: Bearer {server.key}' "
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )
    link = f'<a href="{address}/" target="_blank" rel="noopener noreferrer">{address}/</a>'
    facts: list[tuple[Text, str]] = [
        (say("page to talk to it", "对话页面"), link),
        (say("address for OpenAI clients", "OpenAI 客户端地址"), f"<code>{address}/v1</code>"),
        (say("key", "密钥"), f"<code>{escape(server.key)}</code>"),
    ]
    return f'<div class="card">{head}{html.facts(facts)}<pre class="log">{escape(curl)}</pre></div>'


def _ask(studio: Studio, question: str, picture: str | None) -> Iterator[str]:
    """What the newest server says, as it says it."""
    running = [s for s in studio.servers.served.values() if studio.jobs.state(s.job) == RUNNING]
    if not running or not (question or "").strip():
        yield kit.line(say("start a server and write a question", "请先启动服务并填写问题"), "bad")
        return
    yield kit.line(say("asking …", "正在提问……"))
    try:
        image = [str(studio.workspace.received(picture))] if picture else []
        content = (IMAGE_TAG if image else "") + question
        studio.servers.wait(running[-1])
        body = asking.asked_body([{"role": "user", "content": content}], image, max_tokens=_ANSWER_TOKENS)
        for said in asking.stream(running[-1], body):
            yield kit.text(said)
    except (ValueError, OSError) as error:
        yield kit.line(error, "bad")


def _end(studio: Studio) -> str:
    running = [job for job in studio.jobs.all() if job.kind == SERVED and studio.jobs.state(job) == RUNNING]
    for job in running:
        studio.jobs.kill(job)
    studio.servers.close()
    if not running:
        return kit.line(say("no server is running", "没有正在运行的服务"))
    what = "1 server was" if len(running) == 1 else f"{len(running)} servers were"
    return kit.line(say(f"{what} asked to end", f"已请求停止 {len(running)} 个服务"))


def _export(studio: Studio, name: str | None, quantization: str, target: str, tongue: str) -> str:
    try:
        model, to = studio.workspace.model(name or ""), studio.workspace.inside(target)
        if quantization not in QUANTIZATIONS:
            raise ValueError(
                say(
                    f"quantization ({quantization}) must be one of {', '.join(QUANTIZATIONS)}",
                    f"量化（{quantization}）须为 {'、'.join(QUANTIZATIONS)} 之一",
                )
            )
        words = ["export", model, "--output_dir", f"./{studio.workspace.name(to)}"]
        words += [] if quantization == "none" else ["--quantization", quantization]
        title, spoken = f"export {studio.workspace.name(to)}", {VARIABLE: kit.tongue(tongue)}
        job = studio.jobs.start(EXPORT, title, words, studio.workspace.root, spoken)
    except (ValueError, OSError) as error:
        return kit.line(error, "bad")
    return kit.line(say(f"exporting as {job.id}; see below how it goes", f"正在导出（{job.id}）；进展见下"), "good")


def _fastdeploy(studio: Studio, name: str | None) -> str:
    """The command for a folder, as `ernie-tune serve` itself makes it."""
    try:
        model = studio.workspace.model(name or "")
        made = [_printed(studio, model, lang) for lang in ("en", "zh")]
        told = Text(*(one.stderr.strip()[-2000:].removeprefix("ernie-tune: ") for one in made))
        if made[0].returncode:
            raise ValueError(told)
    except (ValueError, OSError, subprocess.TimeoutExpired) as error:
        return kit.line(error, "bad")
    where = say("on a machine with cards and FastDeploy:", "在装有显卡与 FastDeploy 的机器上：")
    command = f'<pre class="log">{escape(made[0].stdout.strip())}</pre>'
    return kit.line(where) + command + (kit.log([told]) if told.english else "")


def _printed(studio: Studio, model: str, lang: str) -> subprocess.CompletedProcess[str]:
    words = ["--lang", lang, "serve", model, "--engine", "fastdeploy", "--print"]
    return subprocess.run(
        [sys.executable, "-m", "ernie_tune", *words],
        cwd=studio.workspace.root,
        capture_output=True,
        text=True,
        timeout=_COMMAND_SECONDS,
    )
