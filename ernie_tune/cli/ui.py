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
from ernie_tune.cli.serve import listen
from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.language import say
from ernie_tune.config.loader import ARGS_FILE, Entry, split_overrides
from ernie_tune.models.presets import shipped_folder, shipped_name

KEY_VARIABLE = "ERNIE_TUNE_UI_KEY"
_KNOWN: Mapping[str, Any] = {"host": str, "port": int}
_PORT, _TRIES = 7860, 20
_SIGNS = ("config.json", "adapter_config.json", "lora_config.json", ARGS_FILE)


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

    Opens the studio's desk for ROWS: answers of MODEL (a model folder, a run's output_dir, or
    nano), or, without MODEL, those that the rows bring along (of `ernie-tune predict --n 4`, or
    judged rows). ROWS and their pictures may lie anywhere; MODEL too.
    Pick, rank, rate, call good or bad, correct, by keys; rows that DPO, KTO, UPO, reward models and
    SFT read are written to judgements/ in the present folder, one after the other.
    """
    words, entries = split_overrides(args)
    if len(words) not in (1, 2):
        raise UsageError(
            say(f"expected [MODEL] ROWS, got {len(words)} words", f"需要 [模型] 数据文件，得到 {len(words)} 个词")
        )
    for word in words:
        if not os.path.exists(word) and (word is words[-1] or shipped_folder(word) is None):
            raise ValueError(say(f"{word} does not exist; correct the path", f"{word} 不存在；请改正路径"))
    if len(words) == 2 and shipped_folder(words[0]) is None and not _is_model(Path(words[0])):
        raise ValueError(
            say(
                f"MODEL ({words[0]}) must be a folder with a model, an adapter or a run in it, or nano; correct the path",
                f"MODEL（{words[0]}）须为含有模型、适配器或某次运行的文件夹，或 nano；请改正路径",
            )
        )
    if os.path.isdir(words[-1]):
        raise ValueError(
            say(
                f"ROWS ({words[-1]}) must be a file of rows, not a folder; name the file, after the model",
                f"ROWS（{words[-1]}）须为数据文件，而不是文件夹；请在模型之后写出文件",
            )
        )
    return _open(Path(), entries, "judge", words[-1], words[0] if len(words) == 2 else None)


def _is_model(path: Path) -> bool:
    """Whether `serve` may open it: what is in it says so."""
    return path.suffix in (".yaml", ".yml") or any((path / name).is_file() for name in _SIGNS)


def _open(root: Path, entries: list[Entry], verb: str, rows: str | None = None, model: str | None = None) -> int:
    chosen = {"host": "127.0.0.1", "port": _PORT, **options(entries, _KNOWN, verb)}
    key = os.environ.get(KEY_VARIABLE, "")
    if KEY_VARIABLE in os.environ and not key.strip():
        raise UsageError(say(f"{KEY_VARIABLE} must hold a key, or not be set", f"{KEY_VARIABLE} 须为密钥，或不设置"))
    if not root.is_dir():
        raise ValueError(say(f"{root} must be a folder; make it first", f"{root} 须为文件夹；请先创建"))
    try:
        from ernie_tune.ui import app, judging
    except ImportError as error:
        raise ValueError(
            say(
                f"the studio needs gradio ({error}); pip install gradio",
                f"工作室需要 gradio（{error}）；请 pip install gradio",
            )
        ) from error
    shipped = shipped_name(model) if model and shipped_folder(model) else None
    also = [Path(path).resolve() for path in (rows, None if shipped else model) if path]
    with _listening(chosen["host"], chosen["port"], "port" in {e.name for e in entries}) as sock:
        os.chdir(root)  # settings name files from here
        studio = app.open_studio(Path(), also)
        named = [studio.workspace.name(path) for path in also]
        answered = shipped or (named[1] if model else None)
        if rows:
            judging.to_judge(studio.workspace, named[0], bool(answered))
        page = app.build(studio, "judge" if rows else "", named[0] if rows else None, answered)
        app.serve(studio, page, chosen["host"], sock, key)
    return 0


def _listening(host: str, port: int, asked: bool) -> socket.socket:
    """A socket that nobody else gets, of the port, or of the next free one where nobody asked for
    it. Raises ValueError as `listen`.
    """
    for candidate in range(port, port + (1 if asked else _TRIES)):
        try:
            sock = listen(host, candidate)
            sock.listen()
            return sock
        except OSError as error:  # of one that was started at the same moment
            taken = error.errno == errno.EADDRINUSE
            if not taken:
                raise
        except ValueError as error:
            taken = isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
            if asked or not taken:
                raise
    raise ValueError(
        say(
            f"port ({port}) must be free; stop what listens there, or take another --port",
            f"端口（{port}）已被占用；请停止占用者，或换一个 --port",
        )
    )
