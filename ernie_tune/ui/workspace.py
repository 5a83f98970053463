"""The folder that a studio works in: every path that a browser names is looked up here, and none
leads out of it.

Refuses to know: what is done with files, pages.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.language import say
from ernie_tune.config.loader import ARGS_FILE
from ernie_tune.data.records import DataError
from ernie_tune.data.sources import INFO_FILE, find
from ernie_tune.models.presets import SHIPPED, shipped_name
from ernie_tune.report.log import LOG_FILE

OWN_FOLDER = ".ernie_tune_ui"  # jobs, uploads
_DEPTH, _MOST = 4, 400  # of folders that are searched, of names that are offered
_ROWS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_NOT_ROWS = ("trainer_log", "trainer_state", "ledger", "metrics", "config", "tokenizer", "all_results", "eval_results",
             "train_results", "before.json", "dataset_info", "added_tokens", "special_tokens", "preprocessor",
             "processor_config", "adapter_config", "lora_config", "export_report", ".settings.json", "index.json",
             "_state.json", "rollouts")  # fmt: skip


class Workspace:
    """One folder, with what the command line has let in beside it (`also`, files or folders). Of
    files of rows among these the pictures are let in too, one by one and only to be shown
    (`let_in`): whoever sits at a browser chooses none of them.
    """

    def __init__(self, root: Path, also: Iterable[Path] = ()) -> None:
        self.root = root.resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        self.also = tuple(path.resolve() for path in also)
        self.pictures: set[Path] = set()
        self.own = self.root / OWN_FOLDER
        self.own.mkdir(exist_ok=True)

    def inside(self, text: str) -> Path:
        """The path that a browser means, links followed. Raises ValueError where it leads out of
        the workspace, and for what cannot be a path.
        """
        if not text.strip() or "\0" in text:
            raise ValueError(
                say(f"path ({text[:80]!r}) must not be empty; choose one", f"路径（{text[:80]!r}）不能为空；请选择")
            )
        path = Path(os.path.realpath(self.root / text.strip()))
        if not self.holds(path):
            raise ValueError(
                say(
                    f"path ({text[:200]}) must lie in the workspace ({self.root.name}); move it there, or start the studio in its folder",
                    f"路径（{text[:200]}）须在工作区（{self.root.name}）内；请移入，或在其所在文件夹启动",
                )
            )
        return path

    def model(self, text: str) -> str:
        """What `serve` is told for a model that a browser means: a folder of the workspace, or the
        name of the model that comes with the package. Raises ValueError as `inside`.
        """
        shipped = None if (self.root / text).exists() else shipped_name(text)
        if shipped:
            return shipped
        path = self.inside(text)
        name = self.name(path)
        return name if os.path.isabs(name) else f"./{name}"  # every process of a studio works in its folder

    def holds(self, path: Path) -> bool:
        """Whether a resolved path is one that this studio may touch; its own folder is not."""
        if path.is_relative_to(self.own):
            return path.is_relative_to(self.uploads)
        return any(path == known or path.is_relative_to(known) for known in (self.root, *self.also))

    def may_show(self, path: str) -> bool:
        """Whether a file that data name may be shown: links followed, it lies in here, or the rows
        of the command line name it.
        """
        if "\0" in path:
            return False
        file = Path(os.path.realpath(self.root / path))
        return self.holds(file) or file in self.pictures

    def let_in(self, picture: Path) -> None:
        """Have a picture shown that rows of the command line name, wherever it lies."""
        self.pictures.add(picture.resolve())

    @property
    def uploads(self) -> Path:
        """Where what a browser sends is kept."""
        return self.own / "uploads"

    @property
    def sent(self) -> Path:
        """Where the page's server puts what a browser sends, before anything is made of it."""
        return self.own / "sent"

    def received(self, text: str) -> Path:
        """A file that a browser has just sent. Raises ValueError for any other path."""
        path = Path(os.path.realpath(text))
        if not path.is_relative_to(self.sent) or not path.is_file():
            raise ValueError(say("the file must be sent with the page; send it again", "文件须由页面上传；请重新上传"))
        return path

    def name(self, path: Path) -> str:
        """A path as people are shown it: from the workspace where it is in it."""
        resolved = path.resolve()
        return str(resolved.relative_to(self.root)) if resolved.is_relative_to(self.root) else str(resolved)

    def here(self, path: Path) -> str:
        """How this process opens a path: from the workspace where it works in it, so that whatever
        is said of the file names it as people know it.
        """
        return self.name(path) if Path.cwd() == self.root else str(path)

    def check_settings(self, config: RunConfig) -> None:
        """Raises ValueError where a setting, whichever, names a file or folder outside, and where
        one would hand a secret of this machine to an address, or act under its owner's name.
        """
        if config.save.push_to_hub:
            raise ValueError(
                say(
                    f"push_to_hub ({config.save.push_to_hub[:80]}) must not be used from here: whoever opens this page would "
                    "publish under your name; push the finished run with ernie-tune push",
                    f"此处不得使用 push_to_hub（{config.save.push_to_hub[:80]}）：任何打开此页的人都会以您的名义发布；请在训练完成后用 "
                    "ernie-tune push 上传",
                )
            )
        for name, value in config.flat().items():
            for text in _texts(value):
                try:
                    self._check_value(text)
                    if name.endswith("dataset_path"):
                        self._check_rows(text, str(config.data.dataset_dir or ""))
                except ValueError as error:
                    raise ValueError(say("{setting}: {why}", "{setting}：{why}", setting=name, why=error)) from None

    def _check_value(self, text: str) -> None:
        """Whatever a value means, none of the paths that it may be read as leads out."""
        if text.startswith("judge:"):
            asked = parse_qs(urlsplit(text.removeprefix("judge:")).query)
            if "token_env" in asked:
                raise ValueError(
                    say(
                        f"token_env ({asked['token_env'][0]}) must not be sent from here; start this run with ernie-tune train",
                        f"不得从此处发送 token_env（{asked['token_env'][0]}）；请用 ernie-tune train 启动",
                    )
                )
            readings = asked.get("prompt", [])
        else:
            # rows.jsonl#500, rewards.py:function
            readings = [text, text.rpartition("#")[0], text.rpartition(":")[0]]
        for reading in readings:
            if reading.strip():
                self.inside(os.path.expanduser(reading))

    def _check_rows(self, text: str, dataset_dir: str) -> None:
        """The files that a pattern, or a name of dataset_info.json, stands for."""
        base = text.rpartition("#")[0] or text
        for file in glob.glob(str(self.root / base), recursive=True):
            self.inside(file)
        info = self.root / dataset_dir
        if not (self.root / base).exists() and (info / INFO_FILE).is_file():
            try:
                entries = find(base, str(info))
            except DataError:  # the run says so
                return
            for entry in entries:
                self.inside(entry.path)

    # --- what there is ----------------------------------------------------------------------------

    def runs(self) -> list[str]:
        """Output folders of runs, the newest first."""
        found = [p.parent for p in self._files(lambda name: name in (LOG_FILE, ARGS_FILE))]
        return self._named(sorted(set(found), key=lambda p: -p.stat().st_mtime))

    def models(self) -> list[str]:
        """What can be asked: models, runs with an adapter, the model that comes along."""
        found = [
            p.parent
            for p in self._files(lambda name: name in ("config.json", "adapter_config.json", "lora_config.json"))
            if any(p.parent.glob("*.safetensors"))
        ]
        return [*self._named(dict.fromkeys([*[p for p in self.also if p.is_dir()], *found])), *sorted(SHIPPED)]

    def rows(self) -> list[str]:
        """Files that may hold rows."""
        found = self._files(lambda name: name.lower().endswith(_ROWS) and not any(no in name for no in _NOT_ROWS))
        return self._named([*[p for p in self.also if p.is_file()], *found])

    def settings(self) -> list[str]:
        """YAML files."""
        return self._named(self._files(lambda name: name.endswith((".yaml", ".yml"))))

    def _named(self, paths: Iterable[Path]) -> list[str]:
        return [self.name(path) for path in paths][:_MOST]

    def _files(self, wanted: Callable[[str], bool]) -> Iterator[Path]:
        for folder, folders, files in os.walk(self.root):
            depth = len(Path(folder).relative_to(self.root).parts)
            folders[:] = sorted(f for f in folders if not f.startswith((".", "checkpoint-"))) if depth < _DEPTH else []
            for name in sorted(files):
                path = Path(folder) / name
                if wanted(name) and self.holds(path.resolve()):
                    yield path


def _texts(value: object) -> Iterator[str]:
    """Every text in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)
