"""The ledger of a run: what defines it, written beside what it makes, and compared when the same
folder is started in again.

What defines a run: every setting that shapes loss or weights (config/resuming.py), the rows of a
step, and what the named files hold: data by the SHA-256 of all their bytes, models by that of their
small files and of blocks drawn evenly from the large ones (`fingerprint`). Pictures that rows name
are not looked at.
Refuses to know: how a run is made, where rows come from, locks, what is done about a difference
beyond saying it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_tune.config.arguments import SETTINGS
from ernie_tune.config.convert import convert
from ernie_tune.config.language import Text, say
from ernie_tune.config.loader import read_yaml
from ernie_tune.config.resuming import CONTENT, COURSE, FIXED, FREE, START, on_resuming

LEDGER_FILE, STATE_FILE = "ledger.json", "trainer_state.json"
_FORMAT = 1
ROWS_A_STEP, STARTED_FROM = "rows a step", "weights started from"
_BLOCK_BYTES, _BLOCKS = 1 << 14, 64
WHOLE_BYTES = 64 << 20  # files up to this are read whole
# What makes a model folder the model that it is.
_MODEL_FILES = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "adapter_config.json", "lora_config.json",
    "tokenizer.model", "tokenizer.json", "added_tokens.json", "preprocessor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Content:
    """What one setting names: as it was written, the SHA-256 (or fingerprint) of what that holds,
    and its number of rows. "" and 0: not known.
    """

    name: str
    sha256: str = ""
    rows: int = 0

    def same(self, other: Content) -> bool:
        """Whether both hold the same; by their names where that is not known of one."""
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256 and (self.rows == other.rows or not (self.rows and other.rows))
        return self.name == other.name

    def __str__(self) -> str:
        facts = [f"{self.rows} rows"] * bool(self.rows) + [f"sha256 {self.sha256[:12]}"] * bool(self.sha256)
        return (self.name or "nothing") + (f" ({', '.join(facts)})" if facts else "")


Contents = tuple[Content, ...]


@dataclass(frozen=True)
class Difference:
    """A setting with the value that a folder was made with, and that of this start. `kind`: of
    config/resuming.py.
    """

    name: str
    saved: Any
    now: Any
    kind: str

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.saved)} -> {_shown(self.now)}"


@dataclass(frozen=True)
class Ledger:
    """What defines a run. `contents`: by setting, what the files it names hold. `rows_per_step`: 0
    where not known.

    `changed`: (step, difference) of earlier starts that went on under other settings. `finished`:
    (last step, steps planned) of a run that has ended.
    """

    settings: Mapping[str, Any]
    contents: Mapping[str, Contents]
    rows_per_step: int = 0
    changed: tuple[tuple[int, str], ...] = ()
    finished: tuple[int, int] | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], contents: Mapping[str, Sequence[Content]], rows_per_step: int = 0) -> Ledger:
        """The ledger of a run under the settings `given`, those that have an effect there.
        `contents` of what was given as objects go under the name of the setting that they replace;
        settings that name files and are missing there are known by their names alone.
        """
        settings = {name: _plain(value) for name, value in given.items() if name not in START}
        named = {name: tuple(Content(path) for path in _paths(given[name])) for name in CONTENT if name in settings}
        return cls(settings, {**named, **{k: tuple(v) for k, v in contents.items()}}, rows_per_step)

    def compare(self, saved: Ledger) -> list[Difference]:
        """What differs between `saved` and this start, what is refused first. A setting that
        `saved` does not know had its default; one that nothing reads now cannot differ.
        """
        found = []
        for name, new in self.settings.items():
            if name in CONTENT or name not in SETTINGS:
                continue
            old = saved.settings.get(name, _plain(SETTINGS[name].default))
            if old != new:
                found.append(Difference(name, old, new, on_resuming(name)))
        if saved.rows_per_step and self.rows_per_step and saved.rows_per_step != self.rows_per_step:
            found.append(Difference(ROWS_A_STEP, saved.rows_per_step, self.rows_per_step, COURSE))
        for name in dict.fromkeys([*saved.contents, *self.contents]):
            old_files, new_files = saved.contents.get(name, ()), self.contents.get(name, ())
            if old_files == new_files:
                continue
            kind = on_resuming(name) if name in SETTINGS else FIXED
            alike = len(old_files) == len(new_files) and all(map(Content.same, old_files, new_files))
            if not alike or [c.name for c in old_files] != [c.name for c in new_files]:
                found.append(Difference(name, old_files, new_files, FREE if alike else kind))
        return sorted(found, key=lambda d: (FIXED, COURSE, FREE).index(d.kind))

    def gone_on(self, step: int, differences: Iterable[Difference], saved: Ledger | None) -> Ledger:
        """This ledger with what changed at `step`, after what had changed before."""
        new = [(step, str(d)) for d in differences if d.kind != FREE]
        return dataclasses.replace(self, changed=(*(saved.changed if saved else ()), *new))

    def text(self) -> str:
        """As `read` reads it."""
        content = {
            "format": _FORMAT,
            "settings": self.settings,
            "contents": {name: [dataclasses.asdict(c) for c in files] for name, files in sorted(self.contents.items())},
            "rows_per_step": self.rows_per_step,
            "changed": self.changed,
            "finished": self.finished,
        }
        return json.dumps(content, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Ledger | None:
        """The ledger of a file; None where there is no file. Raises ValueError naming a file that
        is damaged or of a later release.
        """
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}, not {_FORMAT}")
            changed = tuple((int(step), str(text)) for step, text in content["changed"])
            done = content["finished"]
            return cls(
                dict(content["settings"]),
                {name: tuple(Content(**c) for c in files) for name, files in content["contents"].items()},
                int(content["rows_per_step"]),
                changed,
                (int(done[0]), int(done[1])) if done else None,
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(
                say(
                    f"{path} must be the ledger that a run wrote ({error!r}); restore it, or choose another output_dir",
                    f"{path} 须为运行写出的记录（{error!r}）；请恢复，或换一个 output_dir",
                )
            ) from error

    @classmethod
    def of_settings_file(cls, path: Path) -> Ledger | None:
        """What an earlier release wrote down of a run, its settings; None where there is no file.
        Settings that are no more are left out.
        """
        if not path.is_file():
            return None
        settings = {}
        for entry in read_yaml(path.read_text(encoding="utf-8"), str(path)):
            if entry.name in SETTINGS and entry.name not in START:
                value = None if entry.raw is None else convert(SETTINGS[entry.name], entry.raw)
                settings[entry.name] = _plain(value)
        contents = {name: tuple(Content(p) for p in _paths(settings[name])) for name in CONTENT if name in settings}
        return cls(settings, contents)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _paths(value: Any) -> list[str]:
    return [str(p) for p in value] if isinstance(value, list | tuple) else [str(value)] if value else []


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "nothing"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def refusal(differences: Sequence[Difference], folder: Path, *, finished: bool) -> Text | None:
    """Why a start in `folder` cannot be: what differs and must not, with the ways out; None where
    it can. Of a finished run nothing may differ but what is free: nothing would be trained under
    the new values.
    """
    refused = [d for d in differences if d.kind == FIXED or (finished and d.kind == COURSE)]
    if not refused:
        return None
    return say(
        "output_dir ({folder}) holds a {made}run made with other settings; nothing was trained or written:\n{listed}\n"
        "choose another output_dir, restore these settings, or set overwrite_output_dir: true to start anew (what is there is "
        "moved to {folder}/earlier-N); to train its weights further, in another output_dir, set resume_only_model: true and "
        "resume_from_checkpoint to one of its checkpoints",
        "输出目录（{folder}）中是另一组设置的{made}训练结果，未训练也未改写任何文件：\n{listed}\n"
        "请换一个 output_dir，或恢复这些设置，或设 overwrite_output_dir: true 重新开始（原有内容移至 {folder}/earlier-N）；"
        "如要在其权重上继续训练，请换 output_dir 并设 resume_only_model: true，resume_from_checkpoint 指向其检查点",
        folder=folder,
        made=say("finished ", "已完成的") if finished else "",
        listed="\n".join(f"  {d}" for d in refused),
    )


# --- what files hold ------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """Of all bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def sample_of(path: Path) -> str:
    """SHA-256 of a file up to 64 MiB; of a larger one, of its size, its beginning and end, and
    blocks drawn evenly from it: 1 MiB in all. Training changes nearly every block of weights; an
    edit of a few numbers may go unseen.
    """
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        return sha256_of(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for i in range(_BLOCKS):
            stream.seek((size - _BLOCK_BYTES) * i // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def fingerprint(path: Path, patterns: Sequence[str] = _MODEL_FILES) -> str:
    """Of a file, or of the files of a model folder: their names and what `sample_of` gives. "" for
    what is not there.
    """
    if path.is_file():
        return sample_of(path)
    files = sorted({f for pattern in patterns for f in path.glob(pattern) if f.is_file()})
    if not files:
        return ""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{os.fspath(file.relative_to(path))}\0{sample_of(file)}\n".encode())
    return digest.hexdigest()
