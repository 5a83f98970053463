"""The studio as a page: its rooms under one roof, behind the gate, on this machine unless told
otherwise.

No telemetry, no share link, nothing fetched from elsewhere. Refuses to know: what rooms do.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

# Before gradio loads: it reports its use, looks for newer versions, and keeps uploads in /tmp.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import fastapi
import gradio as gr
import uvicorn
from gradio.i18n import I18nData

from ernie_tune.config.language import say
from ernie_tune.ui import room_compare, room_data, room_judge, room_serve, room_train, room_watch
from ernie_tune.ui.gate import LOOPBACK, StudioGate
from ernie_tune.ui.studio import Studio
from ernie_tune.ui.style import CSS, HEAD

_UPLOAD = "64mb"
_SANS = ("system-ui", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans SC", "PingFang SC", "Microsoft YaHei", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

# Letters that stand out from what is behind them by 4.5 to 1 at least (WCAG 2.1, 1.4.3).
_COLOURS = {
    "body_text_color_subdued": "#4b5563",
    "body_text_color_subdued_dark": "#d1d5db",
    "block_info_text_color": "#4b5563",
    "block_info_text_color_dark": "#d1d5db",
    "block_label_text_color": "#374151",
    "block_label_text_color_dark": "#e5e7eb",
    "block_title_text_color": "#374151",
    "block_title_text_color_dark": "#e5e7eb",
    "button_primary_background_fill": "#1d4ed8",
    "button_primary_background_fill_hover": "#1e40af",
    "button_primary_background_fill_dark": "#1d4ed8",
    "button_cancel_background_fill": "#b91c1c",
    "button_cancel_background_fill_dark": "#b91c1c",
    "button_cancel_text_color": "#ffffff",
}


def open_studio(root: Path, also: Sequence[Path] = ()) -> Studio:
    """The studio of a folder; its servers end with this process."""
    studio = Studio.at(root, also, I18nData)
    os.environ["GRADIO_TEMP_DIR"] = str(studio.workspace.sent)
    atexit.register(studio.servers.close)
    return studio


def build(studio: Studio, room: str = "", rows: str | None = None, model: str | None = None) -> gr.Blocks:
    """The page. `room`: the one that is open at first; `rows`, `model`: what lies on the judge's
    desk.
    """
    with gr.Blocks(title="ernie_tune", analytics_enabled=False) as blocks:
        gr.HTML("<h1>ernie_tune</h1>")
        rooms = (
            ("data", studio("Data", "数据"), room_data.room),
            ("train", studio("Train", "训练"), room_train.room),
            ("watch", studio("Watch", "观察"), room_watch.room),
            ("compare", studio("Compare", "比较模型"), room_compare.room),
            ("judge", studio("Judge", "评判"), partial(room_judge.room, rows=rows, model=model)),
            ("serve", studio("Export and serve", "导出与服务"), room_serve.room),
        )
        with gr.Tabs(selected=room or "data") as tabs:
            studio.parts["tabs"] = tabs
            for name, label, make in rooms:
                with gr.Tab(label, id=name) as tab:
                    offers = make(studio)
                parts, lists = [part for part, _ in offers], [names for _, names in offers]
                for event in (tab.select, blocks.load):  # what there is may have changed
                    event(partial(_offered, lists), outputs=parts, show_progress="hidden")
    return blocks


def _offered(lists: Sequence[Callable[[], list[Any]]]) -> Any:
    """Updates of lists of names; of one alone, as gradio wants it."""
    found = [gr.update(choices=names()) for names in lists]
    return found if len(found) > 1 else found[0]


def application(studio: Studio, blocks: gr.Blocks, key: str = "", hosts: tuple[str, ...] = LOOPBACK) -> StudioGate:
    """What a server runs. `key`: "" where none is asked for."""
    theme = gr.themes.Default(primary_hue="blue", font=_SANS, font_mono=_MONO).set(**_COLOURS)
    app: Any = fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    gr.mount_gradio_app(
        app,
        blocks.queue(default_concurrency_limit=8),
        path="/",
        footer_links=[],
        max_file_size=_UPLOAD,
        i18n=gr.I18n(**studio.translations()),
        theme=theme,
        css=CSS,
        head=HEAD,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
    )
    return StudioGate(app, hosts, key, studio.workspace.sent)


def serve(studio: Studio, blocks: gr.Blocks, host: str, sock: socket.socket, key: str = "") -> None:
    """Until it is interrupted, on a bound socket. Elsewhere than on this machine alone a key is
    asked for; one is made where none is given.
    """
    alone = host in LOOPBACK
    key = key or ("" if alone else secrets.token_urlsafe(18))
    address = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}/"
    told = f"{address}?key={quote(os.fsencode(key), safe='')}" if key else address
    app = application(studio, blocks, key, LOOPBACK if alone else ())
    config = uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=5,
    )
    server = _Server(config)
    server.line = say(f"studio of {studio.workspace.root}: {told}", f"{studio.workspace.root} 的工作室：{told}")
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[sock])


class _Server(uvicorn.Server):
    """Says `line` once it can be reached, not before."""

    line: str = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self.line, flush=True)
