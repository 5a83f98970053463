"""The room Export and serve: a model as an OpenAI server on this machine, as a quantised folder,
and the command that serves it with FastDeploy.

Refuses to know: how either is done; both are jobs.
"""

from __future__ import annotations

import secrets
import shlex
from html import escape

import gradio as gr

from ernie_tune.config.language import say
from ernie_tune.ui import studio as kit
from ernie_tune.ui.asking import free_port
from ernie_tune.ui.jobs import RUNNING
from ernie_tune.ui.studio import Offers, Studio

QUANTIZATIONS = ("none", "wint8", "wint4")


def room(studio: Studio) -> Offers:
    """Build it."""
    with gr.Row():
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
    with gr.Row():
        kind = gr.Dropdown(list(QUANTIZATIONS), value="wint8", label=studio("quantization", "量化"))
        target = gr.Textbox("output/exported", label=studio("export to", "导出到"))
        export = gr.Button(studio("export", "导出"))
    told = gr.HTML(elem_id="serve-told")
    serve.click(lambda name: _serve(studio, name), model, told)
    end.click(lambda: _end(studio), outputs=told)
    export.click(lambda name, q, to: _export(studio, name, q, to), [model, kind, target], told)
    return [(model, studio.workspace.models)]


def _serve(studio: Studio, name: str | None) -> str:
    try:
        folder = studio.workspace.inside(name or "")
    except ValueError as error:
        return kit.line(error, "bad")
    port, key = free_port(), secrets.token_urlsafe(18)
    words = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--served_model_name", folder.name]
    job = studio.jobs.start(
        "serve", f"serve {studio.workspace.name(folder)}", words, studio.workspace.root, {"ERNIE_TUNE_API_KEY": key}
    )
    ask = f"curl http://127.0.0.1:{port}/v1/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json'"
    body = f'{{"model": "{folder.name}", "messages": [{{"role": "user", "content": "…"}}]}}'
    fast = [
        "python", "-m", "fastdeploy.entrypoints.openai.api_server", "--model", str(folder), "--quantization", "wint4",
        "--enable-mm", "--reasoning-parser", "ernie-45-vl",
    ]  # fmt: skip
    return (
        kit.line(say(f"starting as {job.id}; ask it with", f"正在启动（{job.id}）；这样提问"), "good")
        + f'<pre class="log">{escape(ask)} -d {escape(shlex.quote(body))}</pre>'
        + kit.line(say("with FastDeploy, on a machine with cards:", "在有显卡的机器上用 FastDeploy："))
        + f'<pre class="log">{escape(shlex.join(fast))}</pre>'
    )


def _end(studio: Studio) -> str:
    running = [job for job in studio.jobs.all() if job.kind == "serve" and studio.jobs.state(job) == RUNNING]
    for job in running:
        studio.jobs.kill(job)
    studio.servers.close()
    return kit.line(say(f"{len(running)} servers were asked to end", f"已请求停止 {len(running)} 个服务"))


def _export(studio: Studio, name: str | None, quantization: str, target: str) -> str:
    try:
        folder, to = studio.workspace.inside(name or ""), studio.workspace.inside(target)
        if quantization not in QUANTIZATIONS:
            raise ValueError(
                say(
                    f"quantization ({quantization}) must be one of {', '.join(QUANTIZATIONS)}",
                    f"量化（{quantization}）须为 {'、'.join(QUANTIZATIONS)} 之一",
                )
            )
        words = ["export", str(folder), str(to)]
        words += [] if quantization == "none" else ["--quantization", quantization]
        job = studio.jobs.start("export", f"export {studio.workspace.name(to)}", words, studio.workspace.root)
    except (ValueError, OSError) as error:
        return kit.line(error, "bad")
    return kit.line(
        say(f"exporting as {job.id}; its output is in the room Train", f"正在导出（{job.id}）；输出见“训练”"), "good"
    )
