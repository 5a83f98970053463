"""What a run finds in its folder when it starts: nothing, an unfinished run of its own, a finished
one, or another's; and what it leaves there of itself.

Rank 0 looks, and all ranks go by what it has found. Raises ValueError for what must not be mixed,
before anything is written.
Refuses to know: models, the loop, what is saved but for the ledger and the settings beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ernie_tune.checkpoint.ledger import (
    LEDGER_FILE,
    STATE_FILE,
    Ledger,
    refusal,
)
from ernie_tune.checkpoint.lock import LOCK_FILE, locked
from ernie_tune.checkpoint.state import Checkpoint, Ranks, complete_checkpoints, find_checkpoint
from ernie_tune.checkpoint.whole import damage
from ernie_tune.checkpoint.writer import write_atomically
from ernie_tune.config.language import Text, say
from ernie_tune.config.loader import ARGS_FILE
from ernie_tune.config.resuming import COURSE, FREE
from ernie_tune.config.sections_run import SaveArguments

CARD = "README.md"
# What a run writes into its folder, and so what `overwrite_output_dir` moves away. Whatever else is
# there is the user's.
_OURS = (
    "checkpoint-*", "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "adapter_config.json", "lora_config.json", "*tokenizer*", "*preprocessor_config.json", "added_tokens.json",
    "special_tokens_map.json", "chat_template*", "*.npz", "reward_head*", "before*.json", "before_after*",
    "guard_baseline.json", "*_results.json", "metrics.csv", "trainer_log*.jsonl", STATE_FILE, "training_loss.*",
    "rollouts*.jsonl", "samples.jsonl", "runs", CARD, ARGS_FILE, LEDGER_FILE,
)  # fmt: skip
# Of these, what cannot be had again: weights, what describes them, and words about them.
_PRECIOUS = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json", CARD)

Line = tuple[str, Text]  # level, text


@dataclass(frozen=True)
class Found:
    """What was found. `checkpoint`: its number where the run goes on from one. `finished`: nothing
    is left to train. `lines`: what the user must see.
    """

    ledger: Ledger
    checkpoint: Path | None = None
    lines: tuple[Line, ...] = ()
    finished: bool = False
    was_finished: bool = False  # the folder holds a finished run, which this start may go on with


class RunFolder:
    """The folder of one run. `starts`: what the weights come from. `ledger()` gives what defines
    the run, `total_steps()` its length; both are asked for on rank 0 alone, the latter where the
    folder is not new.
    """

    def __init__(
        self,
        settings: SaveArguments,
        starts: Sequence[str],
        ranks: Ranks,
        ledger: Callable[[], Ledger],
        total_steps: Callable[[], int],
    ) -> None:
        self.settings, self.starts = settings, starts
        self.ranks, self._ledger_of, self._total_of = ranks, ledger, total_steps
        self.path = Path(settings.output_dir)
        self.found: Found | None = None
        self._written = False

    @contextlib.contextmanager
    def held(self, dry_run: bool = False) -> Iterator[None]:
        """The folder is this run's while the block runs; a dry run leaves no trace. Raises
        FolderTaken, on rank 0.
        """
        if dry_run or self.ranks.rank != 0:
            yield
            return
        with locked(self.path):
            yield

    # --- the start --------------------------------------------------------------------------------

    def look(self, dry_run: bool = False) -> Found:
        """Compare, and say what to do. Every rank calls it. Raises ValueError with every difference
        where the folder is another run's, where settings contradict each other, and where no
        checkpoint of several is whole.
        """
        outcome: Found | str = ""
        if self.ranks.rank == 0:
            try:
                outcome = self._look(dry_run)
            except (ValueError, OSError) as error:
                if self.ranks.size == 1:
                    raise
                outcome = error.args[0] if len(error.args) == 1 else str(error)
        outcome = self.ranks.gather(outcome)[0]
        if isinstance(outcome, str):
            raise ValueError(outcome)
        self.found = outcome
        return outcome

    def _look(self, dry_run: bool) -> Found:
        self._check_settings()
        if self.settings.overwrite_output_dir:
            held = [] if dry_run else self._leftovers()
            return Found(self._ledger_of(), lines=(_moved(self.path, self._set_aside(held)),) if held else ())
        checkpoint, chosen, lines = self._chosen()
        saved, now = self._saved(checkpoint, lines), self._ledger_of()
        if saved is None and checkpoint is None:
            self._check_strangers()
        has_weights = any(self.path.glob("*.safetensors"))  # with the result gone, it is made again
        done = saved.finished if saved and has_weights else None
        # an earlier start left nothing to go on from
        if saved is None or (checkpoint is None and done is None):
            return Found(now, checkpoint.path if checkpoint else None, tuple(lines))
        total, differences = self._total_of(), now.compare(saved)
        step = checkpoint.step if checkpoint else done[0] if done else 0
        same_course = not any(d.kind == COURSE for d in differences)
        over = checkpoint is None or step >= total or (done is not None and same_course and not chosen)
        if text := refusal(differences, self.path, finished=over):
            raise ValueError(text)
        lines += [
            _note(f"changed since the run began: {d}", f"与训练开始时不同：{d}", d.kind != FREE) for d in differences
        ]
        if over and done:
            lines.append(_already(done, self.path))
            return Found(saved, None, tuple(lines), finished=True)
        now = now.gone_on(step, differences, saved)
        return Found(now, checkpoint.path if checkpoint else None, tuple(lines), was_finished=done is not None)

    def _check_settings(self) -> None:
        s, named = self.settings, self._named()
        starts = [*self.starts, str(named or "")]
        held = [path for path in starts if path and Path(path).exists() and self._holds(Path(path))]
        if s.overwrite_output_dir and held:
            raise ValueError(
                say(
                    f"overwrite_output_dir (true) must not move away what the run starts from ({held[0]}); choose another output_dir",
                    f"overwrite_output_dir（true）会移走训练的起点（{held[0]}）；请换一个 output_dir",
                )
            )
        if s.overwrite_output_dir:
            return
        if s.resume_from_checkpoint == "no":
            self._check_new()
        inside = named is not None and named.resolve().parent == self.path.resolve()
        if s.resume_only_model and (named is None or inside):
            raise ValueError(
                say(
                    "resume_only_model (true) starts a run from the weights of another and must go with "
                    f"resume_from_checkpoint ({s.resume_from_checkpoint}): a checkpoint outside output_dir ("
                    f"{self.path}); name it, and choose a new output_dir",
                    "resume_only_model（true）以另一次运行的权重开始，resume_from_checkpoint（"
                    f"{s.resume_from_checkpoint}）须为 output_dir（{self.path}"
                    "）之外的检查点；请写明它，并换一个新的 output_dir",
                )
            )

    def _check_new(self) -> None:
        done, own = Ledger.read(self.path / LEDGER_FILE), complete_checkpoints(self.path)
        if own or (done and done.finished):
            raise ValueError(
                say(
                    "output_dir ({folder}) holds {what} and must be empty with resume_from_checkpoint: no; choose another folder, or "
                    "set overwrite_output_dir: true",
                    "resume_from_checkpoint: no 要求 output_dir（{folder}）为空，而其中有{what}；请换一个目录，或设 overwrite_output_dir: true",
                    folder=self.path,
                    what=say("checkpoints", "检查点") if own else say("a finished run", "已完成的训练"),
                )
            )

    def _check_strangers(self) -> None:
        """That nothing is here which no run has written and this one would write over."""
        held = sorted({p.name for pattern in _PRECIOUS for p in self.path.glob(pattern)})
        if held and self._named() is None:
            raise ValueError(
                say(
                    "output_dir ({folder}) holds {held}, which no run has written there and this one would write over; choose another "
                    "output_dir, or move what is there away",
                    "output_dir（{folder}）中有并非训练所写的 {held}，训练会覆盖它们；请换一个 output_dir，或先移走它们",
                    folder=self.path,
                    held=", ".join(held[:8]),
                )
            )

    def _named(self) -> Path | None:
        word = self.settings.resume_from_checkpoint
        return None if word in ("auto", "no") else Path(word)

    def _holds(self, path: Path) -> bool:
        return self.path.resolve() in (path.resolve(), *path.resolve().parents)

    def _chosen(self) -> tuple[Checkpoint | None, bool, list[Line]]:
        """The checkpoint to go on from; whether it was named and lies in this folder; and what is
        wrong with newer ones.
        """
        own, named = complete_checkpoints(self.path), self._named()
        notes: list[Line] = []
        if named is not None and (not own or named.resolve().parent == self.path.resolve()):
            checkpoint = find_checkpoint(self.path, str(named))
            if checkpoint is not None and (wrong := damage(checkpoint.path)):
                raise ValueError(
                    say(
                        f"{checkpoint.path} must hold what was written, but {'; '.join(wrong)}: {_REMEDY}",
                        f"{checkpoint.path} 须与写出时一致，但 {'; '.join(wrong)}：{_REMEDY}",
                    )
                )
            return (None, False, []) if self.settings.resume_only_model else (checkpoint, bool(own), [])
        for checkpoint in reversed(own):
            wrong = damage(checkpoint.path)
            if not wrong:
                return checkpoint, False, notes
            notes.append(
                _note(
                    f"{checkpoint.path} is damaged and left out: {'; '.join(wrong)}",
                    f"{checkpoint.path} 已损坏，改用更早的检查点：{'; '.join(wrong)}",
                    True,
                )
            )
        if own:
            raise ValueError(
                "\n".join([*(text for _, text in notes), f"no checkpoint in {self.path} is whole: {_REMEDY}"])
            )
        return None, False, notes

    def _saved(self, checkpoint: Checkpoint | None, lines: list[Line]) -> Ledger | None:
        """What the folder, or the checkpoint of another folder, was made with; of earlier releases
        what they wrote down.
        """
        here = None
        try:
            here = Ledger.read(self.path / LEDGER_FILE)
        except ValueError as error:
            if checkpoint is None:
                raise
            lines.append(_note(f"{error}; going by the checkpoint's", f"{error}；以检查点中的为准", True))
        if checkpoint is None:
            return here or self._of_earlier_release(None)
        inside = checkpoint.path.resolve().parent == self.path.resolve()
        made = Ledger.read(checkpoint.path / LEDGER_FILE)
        if made is None:
            return here if here and inside else self._of_earlier_release(checkpoint)
        return dataclasses.replace(made, finished=here.finished if here and inside else None)

    def _of_earlier_release(self, checkpoint: Checkpoint | None) -> Ledger | None:
        made = Ledger.of_settings_file((checkpoint.path if checkpoint else self.path) / ARGS_FILE)
        step = _last_step(self.path / STATE_FILE)
        # the card came last
        ended = (self.path / CARD).is_file() and step >= (checkpoint.step if checkpoint else 1)
        return dataclasses.replace(made, finished=(step, step)) if made and ended else made

    def _leftovers(self) -> list[Path]:
        return sorted({p for pattern in _OURS for p in self.path.glob(pattern) if p.name != LOCK_FILE})

    def _set_aside(self, held: Sequence[Path]) -> Path:
        target = next(p for n in range(1, 10_000) if not (p := self.path / f"earlier-{n}").exists())
        target.mkdir()
        for path in held:
            os.rename(path, target / path.name)
        return target

    @property
    def checkpoint(self) -> Checkpoint | None:
        """What the run goes on from."""
        path = self.found.checkpoint if self.found else None
        return None if path is None else find_checkpoint(self.path, str(path))

    # --- the end ----------------------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        assert self.found is not None
        return self.found.ledger

    def stepped(self, arguments: str) -> None:
        """Called after a step: after the first one the folder says what this run is, and with which
        `arguments`."""
        if self.ranks.rank == 0 and not self._written:
            write_atomically(self.path / ARGS_FILE, arguments)
            write_atomically(self.path / LEDGER_FILE, self.ledger.text())
        self._written = True

    def texts(self, arguments: str) -> dict[str, str]:
        """What a checkpoint says of the run."""
        return {ARGS_FILE: arguments, LEDGER_FILE: self.ledger.text()}

    @property
    def untouched(self) -> bool:
        """Whether no step was made on top of a finished run: what it wrote stays as it is."""
        return bool(self.found and self.found.was_finished and not self._written)

    @contextlib.contextmanager
    def result(self) -> Iterator[None]:
        """While the result is written: an OSError says what is not there, and what to do."""
        try:
            yield
        except OSError as error:
            kept = complete_checkpoints(self.path)
            why, file = error.strerror or str(error), error.filename or str(self.path)
            left = (
                say(
                    "the last steps are in {folder}: free some space and run the same command",
                    "训练结果保留在 {folder} 中：请腾出空间后重新运行同一命令",
                    folder=kept[-1].path,
                )
                if kept
                else say(
                    "there is no checkpoint to make it from again: set save_strategy: steps in the next run",
                    "没有检查点可供恢复：下次请设 save_strategy: steps",
                )
            )
            raise OSError(
                error.errno,
                say(
                    "the result could not be saved ({why}); {left}",
                    "训练结果无法保存（{why}）；{left}",
                    why=why,
                    left=left,
                ),
                file,
            ) from error

    def finish(self, arguments: str, step: int, total: int, *, over: bool) -> None:
        """Everything is written. `over`: nothing is left to train, the same command has nothing to
        do.
        """
        self.stepped(arguments)
        if over and self.ranks.rank == 0:
            write_atomically(self.path / LEDGER_FILE, dataclasses.replace(self.ledger, finished=(step, total)).text())

    def metrics(self) -> dict[str, float]:
        """The final metrics that the folder's run wrote down; empty where it has none."""
        file = self.path / "all_results.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return {k: float(v) for k, v in found.items() if v is not None and k not in ("epoch", "progress_or_epoch")}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}


_REMEDY = "copy it again from where it was kept, or set overwrite_output_dir: true to start anew"


def _note(english: str, chinese: str, warning: bool = False) -> Line:
    return ("WARNING" if warning else "INFO"), say(english, chinese)


def _moved(folder: Path, target: Path) -> Line:
    return _note(
        f"overwrite_output_dir: what earlier runs left in {folder} is now in {target}",
        f"overwrite_output_dir：{folder} 中原有的训练结果已移至 {target}",
    )


def _already(done: tuple[int, int], folder: Path) -> Line:
    step, total = done
    return _note(
        f"already finished: step {step} of {total}{' (stopped early)' * (step < total)} in {folder}; nothing was trained or written",
        f"{folder} 中的训练早已完成：第 {step} 步，共 {total} 步{'（提前停止）' * (step < total)}；未训练也未改写任何文件",
    )


def _last_step(file: Path) -> int:
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


# --- what defines the run -------------------------------------------------------------------------
