"""`ernie-tune ui` and `ernie-tune judge`: the studio in a browser.

Refuses to know: rooms, pages.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ernie_tune.cli.options import options
from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.language import say
from ernie_tune.config.loader import Entry, split_overrides

KEY_VARIABLE = "ERNIE_TUNE_UI_KEY"
_KNOWN: Mapping[str, Any] = {"host": str, "port": int}
_PORT = 7860


def run(args: list[str]) -> int:
    """ernie-tune ui [FOLDER] [--host 127.0.0.1] [--port 7860]

    A studio in the browser over FOLDER (default: here): check data, fill in and start runs, watch
    curves, compare two models, judge answers by hand, export and serve. It touches nothing outside
    FOLDER. Runs are processes of their own: close the page or the studio, they go on.
    Only this machine can open it; with another --host it asks for a key, which it prints, or that
    of ERNIE_TUNE_UI_KEY. It sends nothing to anybody. Needs: pip install gradio.
    """
    words, entries = split_overrides(args)
    if len(words) > 1:
        raise UsageError(say(f"expected one folder, got {len(words)}", f"需要一个文件夹，得到 {len(words)} 个"))
    return _open(Path(words[0] if words else "."), entries, "ui")


def judge(args: list[str]) -> int:
    """ernie-tune judge [MODEL] ROWS [--host 127.0.0.1] [--port 7860]

    Opens the studio's desk for ROWS: answers of MODEL (a model folder or a run's output_dir), or,
    without MODEL, those that the rows bring along (of `ernie-tune predict --n 4`, or judged rows).
    Pick, rank, rate, call good or bad, correct, by keys; rows that DPO, KTO, UPO, reward models and
    SFT read are written to judgements/ in the present folder, one after the other.
    """
    words, entries = split_overrides(args)
    if len(words) not in (1, 2):
        raise UsageError(
            say(f"expected [MODEL] ROWS, got {len(words)} words", f"需要 [模型] 数据文件，得到 {len(words)} 个词")
        )
    missing = [word for word in words if not os.path.exists(word)]
    if missing:
        raise ValueError(say(f"{missing[0]} does not exist; correct the path", f"{missing[0]} 不存在；请改正路径"))
    return _open(Path(), entries, "judge", words[-1], words[0] if len(words) == 2 else None)


def _open(root: Path, entries: list[Entry], verb: str, rows: str | None = None, model: str | None = None) -> int:
    chosen = {"host": "127.0.0.1", "port": _PORT, **options(entries, _KNOWN, verb)}
    key = os.environ.get(KEY_VARIABLE, "")
    if KEY_VARIABLE in os.environ and not key.strip():
        raise UsageError(say(f"{KEY_VARIABLE} must hold a key, or not be set", f"{KEY_VARIABLE} 须为密钥，或不设置"))
    if not root.is_dir():
        raise ValueError(say(f"{root} must be a folder; make it first", f"{root} 须为文件夹；请先创建"))
    port = _free(chosen["host"], chosen["port"], "port" in {e.name for e in entries})
    try:
        from ernie_tune.ui import app
    except ImportError as error:
        raise ValueError(
            say(
                f"the studio needs gradio ({error}); pip install gradio",
                f"工作室需要 gradio（{error}）；请 pip install gradio",
            )
        ) from error
    also = [Path(path).resolve() for path in (rows, model) if path]
    os.chdir(root)  # settings name files from here
    studio = app.open_studio(Path(), also)
    named = [studio.workspace.name(path) for path in also]
    page = app.build(studio, "judge" if rows else "", named[0] if rows else None, named[1] if model else None)
    app.serve(studio, page, chosen["host"], port, key)
    return 0


def _free(host: str, port: int, asked: bool) -> int:
    """The port, or the next free one where nobody asked for it. ValueError for a taken one."""
    for candidate in range(port, port + (1 if asked else 20)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise
            return candidate
    raise ValueError(
        say(
            f"port ({port}) must be free; stop what listens there, or take another --port",
            f"端口（{port}）已被占用；请停止占用者，或换一个 --port",
        )
    )
