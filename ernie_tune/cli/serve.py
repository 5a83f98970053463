"""`ernie-tune serve`: an OpenAI-compatible server over the in-process engine, or FastDeploy's own
where it is installed.

Refuses to know: training, how requests are answered.
"""

from __future__ import annotations

import errno
import gc
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.cpu import while_paddle_loads
from ernie_tune.config.language import say
from ernie_tune.config.loader import Entry, split_overrides
from ernie_tune.models.presets import shipped_folder

if TYPE_CHECKING:
    from ernie_tune.serve.server import Server

API_KEY_VARIABLE = "ERNIE_TUNE_API_KEY"
_FLAGS = ("allow_private_media", "log_requests", "print")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _flag(text: str) -> bool:
    from ernie_tune.config.convert import FALSE, TRUE

    if text.lower() not in (*TRUE, *FALSE):
        raise ValueError(say(f"{text!r} is neither true nor false", f"{text!r} 既不是 true 也不是 false"))
    return text.lower() in TRUE


# option -> how its text is read
_OPTIONS: Mapping[str, Callable[[str], Any]] = {
    "host": str,
    "port": int,
    "served_model_name": str,
    "adapters": _names,
    "api_key": _names,
    "max_model_len": int,
    "default_max_tokens": int,
    "max_num_seqs": int,
    "max_concurrency": int,
    "cache_tokens": int,
    "prefill_tokens": int,
    "images": int,
    "videos": int,
    "max_body_mb": float,
    "request_timeout": float,
    "shutdown_timeout": float,
    "allow_local_media": str,
    "allow_private_media": _flag,
    "allow_media_hosts": _names,
    "allow_hosts": _names,
    "media_timeout": float,
    "max_connections": int,
    "log_requests": _flag,
    "engine": str,
}


def run(args: list[str]) -> int:
    """ernie-tune serve FOLDER_OR_YAML [--port 8180] [--host 127.0.0.1] [--adapters
    NAME=FOLDER,NAME=FOLDER] [--api_key KEY,KEY] …

    Answers OpenAI's API (/v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models;
    /health, /metrics) with the model of a folder, of a finished run, or of an exported int8 or int4
    folder; / is a page to talk to it. Needs: pip install fastapi uvicorn pydantic llguidance.
    Embeddings are means of the last hidden states, of length 1; an entry of their `input` may be
    the parts of a message, pictures among them.

    names     --served_model_name NAME what requests call the model (default: its folder's name);
              adapters go by the names in --adapters
    keys      --api_key KEY,KEY, or the variable ERNIE_TUNE_API_KEY; none: everyone may ask
    hosts     --allow_hosts NAME,NAME names by which clients call the server, beside localhost (and,
              where --host is
              not of this machine alone, its addresses and its own name)
    limits    --max_model_len, --default_max_tokens 1024, --max_num_seqs 64 (answers at once),
              --max_concurrency 256 (requests; beyond it 429),
              --cache_tokens 262144, --prefill_tokens 8192, --images 10, --videos 3, --max_body_mb
              64, --request_timeout 600, --shutdown_timeout 60, --max_connections 2048,
              --media_timeout 60
    log       --log_requests   one line for each request
    media     --allow_local_media FOLDER (file:/// URLs inside it), --allow_media_hosts HOST,HOST
              (may be private), --allow_private_media

    ernie-tune serve FOLDER --engine fastdeploy [--tensor_parallel_size 8 --quantization wint4 …]
    [--print] starts FastDeploy's own server where it is installed and waits until it is healthy;
    --print only shows the command.
    """
    flags = {f"--{flag}".replace("_", sign) for flag in _FLAGS for sign in "_-"}
    words, entries = split_overrides([f"{word}=true" if word in flags else word for word in args])
    if len(words) != 1:
        raise UsageError(
            say(
                f"expected one folder or YAML file, got {len(words)}",
                f"需要一个文件夹或 YAML 文件，得到 {len(words)} 个",
            )
        )
    if any(entry.name == "engine" and entry.raw == "fastdeploy" for entry in entries):
        from ernie_tune.cli.serve_fastdeploy import run_fastdeploy

        return run_fastdeploy(words[0], entries)
    settings = read_options(entries)
    if settings.pop("engine", "paddle") != "paddle":
        raise UsageError(
            say(
                "engine must be 'paddle' (in this process) or 'fastdeploy'",
                "engine 只能是 paddle（本进程）或 fastdeploy",
            )
        )
    return _serve(shipped_folder(words[0]) or Path(words[0]), settings)


def read_options(entries: Sequence[Entry]) -> dict[str, Any]:
    """Values by option. Raises UsageError for unknown options and unreadable values."""
    from ernie_tune.config.convert import did_you_mean

    values: dict[str, Any] = {}
    for entry in entries:
        if entry.name not in _OPTIONS:
            raise UsageError(
                say(
                    "unknown option {name!r}{near}; `ernie-tune serve --help` lists them",
                    "未知的选项 {name!r}{near}；`ernie-tune serve --help` 列出全部选项",
                    name=entry.name,
                    near=did_you_mean(entry.name, _OPTIONS),
                )
            )
        try:
            values[entry.name] = _OPTIONS[entry.name](str(entry.raw))
        except ValueError as error:
            raise UsageError(
                say(
                    "{name} ({value!r}) cannot be read: {why}",
                    "{name}（{value!r}）无法读取：{why}",
                    name=entry.name,
                    value=entry.raw,
                    why=error,
                )
            ) from error
    return values


def serve_options(settings: Mapping[str, Any]) -> Any:
    """`ServeOptions` of what was given. Raises ValueError for impossible ones."""
    from ernie_tune.serve.fetch import FetchPolicy
    from ernie_tune.serve.media import MediaPolicy
    from ernie_tune.serve.options import ServeOptions

    same = (
        "max_model_len",
        "default_max_tokens",
        "max_num_seqs",
        "max_concurrency",
        "cache_tokens",
        "prefill_tokens",
        "images",
        "videos",
        "max_connections",
        "log_requests",
    )
    values: dict[str, Any] = {name: settings[name] for name in same if name in settings}
    if "max_body_mb" in settings:
        values["max_body_bytes"] = int(settings["max_body_mb"] * 2**20)
    for name in ("request_timeout", "shutdown_timeout", "media_timeout"):
        if name in settings:
            values[f"{name}_seconds"] = settings[name]
    folder = settings.get("allow_local_media")
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(
            say(
                f"allow_local_media ({folder}) must be a folder; create it, or leave the option out",
                f"allow_local_media（{folder}）须为文件夹；请创建它，或去掉该选项",
            )
        )
    private = settings.get("allow_private_media", False)
    fetch = FetchPolicy(
        allow_private=private, allowed_hosts=frozenset(host.lower() for host in settings.get("allow_media_hosts", ()))
    )
    media = MediaPolicy(local_folder=Path(folder) if folder else None, fetch=fetch)
    host = settings.get("host", "127.0.0.1").lower()
    names, outside = settings.get("allow_hosts", ()), host not in _LOOPBACK
    if outside:
        names += (host, socket.gethostname())
    return ServeOptions(
        api_keys=_keys(settings),
        media=media,
        host_names=tuple(name.lower().rstrip(".") for name in names),
        any_address=outside,
        **values,
    )


def _keys(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the option, else of the variable. Raises ValueError where one is set and names no key: it
    would open the server.
    """
    if "api_key" in settings:
        source, keys = "api_key", settings["api_key"]
    elif API_KEY_VARIABLE in os.environ:
        source, keys = API_KEY_VARIABLE, _names(os.environ[API_KEY_VARIABLE])
    else:
        return ()
    if not keys:
        raise ValueError(
            say(
                f"{source} is set but names no key; give one, or leave it out and everyone may ask",
                f"{source} 已设置但没有密钥；请给出密钥，或去掉该设置（任何人都可以访问）",
            )
        )
    return tuple(keys)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, before the model is loaded for nothing. Raises ValueError."""
    if not 0 <= port <= 65535:
        raise ValueError(
            say(
                f"port ({port}) must be from 0 to 65535; 0 is any free one",
                f"port（{port}）须在 0 到 65535 之间；0 为任意空闲端口",
            )
        )
    try:
        if not host.strip():
            raise OSError("empty")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise _elsewhere(host, error) from error
    try:
        if os.name == "posix":  # elsewhere it would let two programs listen
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _taken(host, port, error) from error
    return sock


def _elsewhere(host: str, error: Exception) -> ValueError:
    return ValueError(
        say(
            f"host ({host}) must be an address of this machine ({error}); use 127.0.0.1 or 0.0.0.0",
            f"host（{host}）须为本机地址（{error}）；请用 127.0.0.1 或 0.0.0.0",
        )
    )


def _taken(host: str, port: int, error: OSError) -> ValueError:
    if error.errno == errno.EADDRNOTAVAIL:
        return _elsewhere(host, error)
    return ValueError(
        say(
            f"port ({port}) of {host} must be free for this program ({error.strerror}); "
            "stop what listens there, or choose another with --port",
            f"{host} 的端口（{port}）不可用（{error.strerror}）；请停止占用它的程序，或用 --port 换一个",
        )
    )


def open_service(path: Path, settings: Mapping[str, Any]) -> Any:
    """The model, its adapters and the limits as one `Service`. Raises ValueError, OSError."""
    with while_paddle_loads():
        from ernie_tune.generate.opened import open_engine
        from ernie_tune.peft.model import PeftModel
        from ernie_tune.serve.service import Service
        from ernie_tune.trainers.assemble import base_of_run

    options = serve_options(settings)
    adapters = [_pair(text) for text in settings.get("adapters", ())]
    engine = open_engine(path, base_of_run)
    name = settings.get("served_model_name") or (path.parent if path.is_file() else path).resolve().name
    models: dict[str, str | None] = {name: None}
    # a finished run's adapter has the run's name; its base answers to its own
    if isinstance(engine.model, PeftModel):
        base = Path(engine.model.name_or_path).name or "base"
        models = {name: engine.model.active, f"{base}-base" if base == name else base: None}
    elif adapters:
        engine.model = PeftModel(engine.model)
    for adapter, folder in adapters:
        if adapter in models:
            raise ValueError(
                say(
                    f"adapter name ({adapter}) must be new, there is {list(models)}; choose another",
                    f"适配器名（{adapter}）不能重复，已有 {list(models)}；请换一个",
                )
            )
        engine.model.load_adapter(folder, adapter)
        models[adapter] = adapter
    return Service(engine, models, options)


def _pair(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise UsageError(
            say(
                f"adapters ({text!r}) must be NAME=FOLDER, several joined by commas",
                f"adapters（{text!r}）须为 名称=文件夹，多个用逗号连接",
            )
        )
    return name, folder


def _serve(path: Path, settings: Mapping[str, Any]) -> int:
    try:
        from ernie_tune.serve.server import server
    except ImportError as error:
        raise ValueError(
            say(
                f"serve needs the package {error.name}; pip install fastapi uvicorn pydantic llguidance",
                f"serve 需要 {error.name}；请先执行 pip install fastapi uvicorn pydantic llguidance",
            )
        ) from error
    host, port = settings.get("host", "127.0.0.1"), settings.get("port", 8180)
    options = serve_options(settings)
    with listen(host, port) as sock:
        if options.any_address and not options.api_keys:
            print(
                say(
                    f"ernie_tune: WARNING: {host} is open to other machines and there is no --api_key: everyone may ask",
                    f"ernie_tune: 警告：{host} 对其他机器开放且没有 --api_key：任何人都可以访问",
                ),
                file=sys.stderr,
                flush=True,
            )
        return _run(server(open_service(path, settings), host, port), sock, host, port)


def _run(one: Server, sock: socket.socket, host: str, port: int) -> int:
    service = one.service
    one.on_ready = lambda address: print(
        say(
            f"ernie_tune: serving {', '.join(service.models)} at http://{address[0]}:{address[1]}/v1\n"
            f"ernie_tune: talk to it in a browser: http://{address[0]}:{address[1]}/",
            f"ernie_tune：{', '.join(service.models)} 已在 http://{address[0]}:{address[1]}/v1 提供服务\n"
            f"ernie_tune：在浏览器中对话：http://{address[0]}:{address[1]}/",
        ),
        file=sys.stderr,
        flush=True,
    )
    gc.collect()
    # what is loaded stays: looking through it again and again would stop all answers each time
    gc.freeze()
    try:
        one.run(sockets=[sock])
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise _taken(host, port, error) from error  # by one that was started at the same moment
    return 0 if one.started else 1
