"""`ernie-tune download` and `ernie-tune push`: models from and to the hubs, through the hubs' own
clients.

Refuses to know: protocols, tokens (the clients and their variables have them), paddle.
"""

from __future__ import annotations

from pathlib import Path

from ernie_tune.cli.options import options, switch
from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.language import counted, say
from ernie_tune.config.loader import Entry, split_overrides

_DEFAULT = "huggingface"


def download(args: list[str]) -> int:
    """ernie-tune download NAME [--from huggingface|modelscope|aistudio] [--to FOLDER]

    Fetches the model NAME (owner/model, such as baidu/ERNIE-4.5-0.3B-PT; the owner of the released
    ones is translated) into the hub's cache, or into FOLDER, and compares it with the hub's
    checksums. Cut short, the same command goes on. Prints the folder, which train, chat, serve and
    predict take as a model. Needs the hub's own package: pip install huggingface_hub, modelscope or
    aistudio-sdk.
    """
    words, entries = split_overrides(args)
    _refuse_tokens(entries)
    given = options(entries, {"from": str, "to": str}, "download")
    if len(words) != 1:
        raise UsageError(say(f"expected one NAME, got {len(words)}", f"需要一个模型名，得到 {len(words)} 个"))
    from ernie_tune.checkpoint import hub as hubs
    from ernie_tune.checkpoint.push import check_download

    hub = given.get("from") or hubs.hub_of_environment() or _DEFAULT
    hubs.check_hub("from", hub)
    hubs.check_repository(words[0])
    folder = hubs.download(words[0], hub, Path(given["to"]) if "to" in given else None)
    checked = check_download(folder, words[0], hub)
    print(
        say(
            f"{folder} ({counted(checked, 'file')} checked by SHA-256)",
            f"{folder}（{checked} 个文件已按 SHA-256 核对）",
        )
    )
    return 0


def push(args: list[str]) -> int:
    """ernie-tune push FOLDER NAME [--to huggingface|modelscope|aistudio] [--public true] [--message
    TEXT]

    Puts the model or adapter in FOLDER (a run's output_dir, an exported folder) into the repository
    NAME (owner/model), private unless --public true: weights, settings of model, tokenizer and
    adapter, the card; no checkpoints, logs, rows or answers. What is there is compared with the
    files here. Cut short, the same command goes on. The token is that of the hub's client (its
    login, or HF_TOKEN, MODELSCOPE_API_TOKEN, AISTUDIO_ACCESS_TOKEN).
    """
    words, entries = split_overrides(args)
    _refuse_tokens(entries)
    given = options(entries, {"to": str, "public": switch, "message": str}, "push")
    if len(words) != 2:
        raise UsageError(
            say(f"expected FOLDER NAME, got {counted(len(words), 'word')}", f"需要文件夹和名称，得到 {len(words)} 个词")
        )
    from ernie_tune.checkpoint.push import push as send

    done = send(
        Path(words[0]),
        words[1],
        given.get("to", _DEFAULT),
        private=not given.get("public", False),
        message=given.get("message", ""),
    )
    print(
        say(
            f"{done.hub}:{done.name} holds {counted(len(done.files), 'file')}, {done.checked} of them checked by checksum",
            f"{done.hub}:{done.name} 现有 {len(done.files)} 个文件，其中 {done.checked} 个已按校验和核对",
        )
    )
    return 0


def _refuse_tokens(entries: list[Entry]) -> None:
    """A token on a command line is read by everybody on the machine, and kept by the shell."""
    if any("token" in entry.name or "key" in entry.name for entry in entries):
        raise UsageError(
            say(
                "a token must not stand on the command line; set HF_TOKEN, MODELSCOPE_API_TOKEN or AISTUDIO_ACCESS_TOKEN, or log in with the hub's client",
                "令牌不能写在命令行上；请设置 HF_TOKEN、MODELSCOPE_API_TOKEN 或 AISTUDIO_ACCESS_TOKEN，或用 hub 的客户端登录",
            )
        )
