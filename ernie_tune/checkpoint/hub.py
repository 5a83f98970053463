"""From a name to a folder on this machine: a local path, a hub's cache, or, only when asked, a
download.

The hubs' packages are optional and imported when a download was asked for, never before: their
import errors must not reach anybody else.
Refuses to know: what is in the folder, paddle.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ernie_tune.config.language import Text, say
from ernie_tune.models.presets import PRESETS, shipped_folder


@dataclass(frozen=True)
class Hub:
    """Where `snapshot_download` lives, what it calls the repository, and who owns the ERNIE
    releases there.
    """

    module: str
    argument: str
    owner: str


HUBS: dict[str, Hub] = {
    "huggingface": Hub("huggingface_hub", "repo_id", "baidu"),
    "modelscope": Hub("modelscope", "model_id", "PaddlePaddle"),
    "aistudio": Hub(
        "aistudio_sdk.snapshot_download", "repo_id", "PaddlePaddle"
    ),  # `aistudio_sdk.hub.download` is gone since 0.3.0
}
_OWNERS = {hub.owner for hub in HUBS.values()}


def resolve(name_or_path: str | os.PathLike[str], download_hub: str | None = None) -> Path:
    """The folder that `name_or_path` means: a local folder, else a model that comes with the
    package ("nano"), else a download from `download_hub` if one is given, else the hubs' caches.

    `download_hub` ("huggingface", "modelscope", "aistudio") may also come from
    ERNIE_TUNE_DOWNLOAD_HUB, or USE_MODELSCOPE_HUB=1; without it the network is not touched. Raises
    FileNotFoundError for what is not there, ValueError for a bad hub, a missing package and a
    failed download.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(
            say(
                f"model ({name}) must be a folder, but is a file; give the folder that holds it and config.json",
                f"模型（{name}）须为文件夹，但它是文件；请给出含有它和 config.json 的文件夹",
            )
        )
    ours = shipped_folder(name)
    if ours is not None:
        return ours
    check_repository(name)
    hub = hub_of_environment(download_hub)
    if hub is not None:
        return download(
            name,
            hub,
            # even if cached: the hub's package knows whether its snapshot is complete, and resumes
            # it
        )
    found = cached(name)
    if found is not None:
        return found
    raise FileNotFoundError(
        say(
            "model ({name!r}) must be a folder ({path} is not there) or in a hub's cache "
            "(it is not); nothing is downloaded unasked: set download_hub: huggingface, modelscope "
            "or aistudio (in the YAML file, on the command line, or as an argument) to fetch it, or "
            "name its folder; {hint}",
            "模型（{name!r}）须为文件夹（没有 {path}），或已在 hub "
            "缓存中（没有）；不会擅自下载：请设 download_hub: huggingface、modelscope 或 "
            "aistudio（在 YAML 文件、命令行或参数中）以下载，或给出其文件夹；{hint}",
            name=name,
            path=path.absolute(),
            hint=_suggest(name),
        )
    )


def check_repository(name: str) -> None:
    """Raises FileNotFoundError for what is no name of a repository."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise FileNotFoundError(
            say(
                "model ({name!r}) must be a folder or a repository name 'owner/model'; {hint}",
                "模型（{name!r}）须为文件夹，或 'owner/model' 形式的仓库名；{hint}",
                name=name,
                hint=_suggest(name),
            )
        )


def cached(name: str) -> Path | None:
    """The folder of a repository in a hub's cache, None where none has it. The network is not
    touched.
    """
    return next((folder for folder in _cached(name) if (folder / "config.json").is_file()), None)


def _suggest(name: str) -> Text:
    close = difflib.get_close_matches(name.rsplit("/", 1)[-1].lower(), PRESETS, n=1, cutoff=0.5)
    name = (close or ["tiny-a"])[0]
    return say(
        f"fresh weights of that shape have the preset {name!r} (AutoModel.from_config({name!r}))",
        f"该形状的随机权重可用预设 {name!r}（AutoModel.from_config({name!r})）",
    )


def hub_of_environment(download_hub: str | None = None) -> str | None:
    """The hub to download from: the one given, else that of the environment. Raises ValueError for
    one that does not exist.
    """
    source = "download_hub"
    if download_hub is None:
        source = "ERNIE_TUNE_DOWNLOAD_HUB"
        download_hub = os.environ.get(source) or ("modelscope" if os.environ.get("USE_MODELSCOPE_HUB") == "1" else None)
    if download_hub is not None:
        check_hub(source, download_hub)
    return download_hub


def check_hub(source: str, hub: str) -> None:
    """Raises ValueError where `hub`, which `source` names, is none of HUBS."""
    if hub not in HUBS:
        raise ValueError(
            say(
                f"{source} ({hub!r}) must be one of {sorted(HUBS)}; choose one of them",
                f"{source}（{hub!r}）须为 {sorted(HUBS)} 之一；请选一种",
            )
        )


def owned(name: str, hub: str) -> str:
    """The same release is owned by baidu on one hub and by PaddlePaddle on the others."""
    owner, model = name.split("/")
    return f"{HUBS[hub].owner if owner in _OWNERS else owner}/{model}"


def _cached(name: str) -> Iterator[Path]:
    """Folders in which the hubs' packages would have left this repository, newest layout of each
    first.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    owner, model = owned(name, "huggingface").split("/")
    home = os.environ.get("HF_HOME") or cache / "huggingface"
    hf = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser() / f"models--{owner}--{model}"
    main = hf / "refs" / "main"
    if main.is_file():
        yield hf / "snapshots" / main.read_text(encoding="utf-8").strip()

    owner, model = owned(name, "modelscope").split("/")
    masked = model.replace(".", "___")  # both packages avoid dots in folder names
    modelscope = Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
    yield modelscope / "models" / f"{owner}--{model}" / "snapshots" / "master"
    for parent in ("models", "hub/models", "hub", "."):
        yield modelscope / parent / owner / masked

    aistudio = Path(os.environ.get("AISTUDIO_CACHE_HOME") or "~/.cache/aistudio/hub").expanduser()
    yield aistudio / "models" / owner / masked


def download(name: str, hub: str, to: Path | None = None) -> Path:
    """All files of the repository, through the hub's own resumable snapshot, into its cache or the
    folder `to`. Raises ValueError for a missing package and for what the hub says.
    """
    where, repository = HUBS[hub], owned(name, hub)
    package = where.module.split(".")[0]
    by_hand = by_other_means(repository)
    try:
        snapshot_download = importlib.import_module(where.module).snapshot_download
    except (ImportError, AttributeError) as error:
        raise missing_package("download_hub", hub, package, error, by_hand) from error
    print(
        say(f"ernie_tune: downloading {repository} from {hub}", f"ernie_tune：正在从 {hub} 下载 {repository}"),
        file=sys.stderr,
        flush=True,
    )
    place = {} if to is None else {"local_dir": str(to)}
    try:
        return Path(snapshot_download(**{where.argument: repository}, **place))
    except errors_of(package) as error:
        raise ValueError(
            say(
                f"download_hub ({hub}) must give {repository}, but says: {reason_of(error)}; check the name and "
                f"the network, {by_hand}",
                f"download_hub（{hub}）没有给出 {repository}，而是说：{reason_of(error)}；请检查名称和网络，{by_hand}",
            )
        ) from error


def by_other_means(repository: str) -> str:
    """What else a user can do."""
    return f"or download {repository} by other means and name its folder as model_name_or_path"


def missing_package(source: str, hub: str, package: str, error: Exception, otherwise: str = "") -> ValueError:
    """The error where a hub's package is not installed, or too old."""
    name, rest = package.replace("_", "-"), f", {otherwise}" if otherwise else ""
    return ValueError(
        say(
            f"{source} ({hub}) must have the package {name} ({error}); pip install {name}{rest}",
            f"{source}（{hub}）需要软件包 {name}（{error}）；pip install {name}{rest}",
        )
    )


def reason_of(error: Exception, token: str = "") -> str:
    """The first line of what a hub's client says, without the token."""
    if isinstance(error, KeyError):  # the client looked for a field that the hub did not send
        return say(f"an answer without {error}", f"回复中没有 {error}")
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].replace(token, "***") if token else lines[0]


def errors_of(package: str) -> tuple[type[Exception], ...]:
    """What a download may raise: the exceptions that a hub's package defines are not all OSError or
    ValueError.
    """
    # KeyError: an answer of the hub that the client does not understand
    found: list[type[Exception]] = [OSError, ValueError, RuntimeError, KeyError]
    for name in (f"{package}.errors", f"{package}.hub.errors", f"{package}.exceptions", "httpx"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        found += [e for e in vars(module).values() if isinstance(e, type) and issubclass(e, Exception)]
    return tuple(found)
