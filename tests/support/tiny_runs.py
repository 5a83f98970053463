"""Shared by the tests of training: small rows with and without pictures, runs of a few steps, and
what such a run leaves in its folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ernie_tune.config.training_arguments import TrainingArguments
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import Record
from ernie_tune.data.sources import load_dataset
from ernie_tune.trainers.sft import SFTTrainer

IMAGES = Path(__file__).parents[2] / "examples" / "digits" / "images"
# no run repeats these
CLOCK = (
    *("tokens_per_second", "interval_runtime", "max_memory_gib", "remaining_time"),
    *("timing/rollout", "timing/reward", "timing/old_logps", "rollout/tokens_per_second"),
)
_WORDS = ("read", "the", "digit", "seven", "九", "看图", "a longer question", "why", "tell me", "one two three")


def picture_row(i: int, **more: Any) -> dict[str, Any]:
    """A digit with a question whose length depends on `i`."""
    question = "<image>" + " ".join(_WORDS[: 1 + i % 4])
    return {"messages": _dialogue(question, str(i % 10)), "images": [str(IMAGES / f"{i:04d}.png")], **more}


def text_row(i: int, **more: Any) -> dict[str, Any]:
    """A text dialogue, one to ten words long, whose answer is as long."""
    words = [_WORDS[(i * 7 + k) % len(_WORDS)] for k in range(1 + i % 10)]
    return {"messages": _dialogue(" ".join(words), " ".join(reversed(words))), **more}


def _dialogue(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def mixed_rows(count: int) -> list[dict[str, Any]]:
    """Every third row has a picture."""
    return [picture_row(i) if i % 3 == 0 else text_row(i) for i in range(count)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def records(folder: Path, rows: Sequence[dict[str, Any]]) -> Sequence[Record]:
    return load_dataset(write_rows(folder / "rows.jsonl", rows))


def processor() -> Processor:
    return Processor.bundled("tiny")


def settings(folder: Path, **changes: Any) -> TrainingArguments:
    """A run of tiny-a on 12 mixed rows with a shuffled, bending course; `changes` go over it."""
    data = folder / "train.jsonl"
    if "train_dataset_path" not in changes and not data.exists():
        write_rows(data, mixed_rows(12))
    values: dict[str, Any] = {
        "model_name_or_path": "tiny-a",
        "fine_tuning": "Full",
        "train_dataset_path": str(data),
        "output_dir": str(folder / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "save_steps": 100,
        "eval_max_new_tokens": 3,
        "plot_loss": False,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**values, **changes})


def train(folder: Path, **changes: Any) -> Path:
    """Run to the end and return the output folder."""
    trainer = SFTTrainer(args=settings(folder, **changes))
    trainer.train()
    return trainer.output_dir


def history(folder: Path) -> list[dict[str, Any]]:
    """The records of a run without what a clock decides."""
    lines = (folder / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def steps_logged(folder: Path) -> list[int]:
    return [r["step"] for r in history(folder) if "loss" in r]


# Of a run stopped and gone on with: paths, clocks, the ledger of its processes, and the stop in its
# schedule.
NOT_ALIKE_WHEN_CUT = (
    "trainer_state.json",
    "loop_state.json",
    "ernie_tune_args.yaml",
    "checkpoint_files.json",
    "ledger.json",
    "scheduler.json",
)


def same_bytes(a: Path, b: Path, but: Sequence[str] = ()) -> list[str]:
    """The names of all files under `a`, after checking that `b` has the same with the same bytes,
    those in `but` aside.
    """
    names = sorted(str(p.relative_to(a)) for p in a.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(b)) for p in b.rglob("*") if p.is_file())
    for name in names:
        assert name in but or (a / name).read_bytes() == (b / name).read_bytes(), name
    return names


def checkpoints(folder: Path) -> list[str]:
    """Names of everything in a run's folder that looks like a checkpoint, in any state."""
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("checkpoint"))
