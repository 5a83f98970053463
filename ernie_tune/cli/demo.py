"""`ernie-tune demo`: the first minutes, from the small model that comes with the package to one
that reads digits, first by answers that it is shown, then by its own ones and a checker.

Refuses to know how training works; both runs are those of the verbs.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

from ernie_tune.cli import train
from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.atomic import write_atomically
from ernie_tune.config.language import say
from ernie_tune.config.loader import load_config, split_overrides

# In the source tree, and where an installed wheel puts it (setup.py, data_files).
DIGITS = (
    Path(__file__).parents[2] / "examples" / "digits",
    Path(sysconfig.get_path("data")) / "share" / "ernie_tune" / "examples" / "digits",
)
SPLITS = ("train", "eval")
ALSO = ("seed", "report_max_samples", "eval_max_samples")  # settings that hold for the other runs, too
FEW_ROWS, FEW_STEPS = 50, 80


def run(args: list[str]) -> int:
    """ernie-tune demo [key=value | --key value ...]

    `nano`, a small ERNIE-4.5-VL, learns to read handwritten digits (examples/digits), on the CPU,
    in a few minutes: by LoRA from 1,500 answers that it is shown; then again from 50, and from
    there by answers of its own, which a checker judges (RLVR). The settings are those of the first
    run; the others take no more steps than it.
    """
    folder = next((folder for folder in DIGITS if (folder / "sft.yaml").is_file()), None)
    if folder is None:
        raise UsageError(
            say(
                f"demo needs examples/digits, found neither at {' nor at '.join(map(str, DIGITS))}; "
                "install ernie_tune again, or clone the repository",
                f"demo 需要 examples/digits，以下位置都没有：{'、'.join(map(str, DIGITS))}；请重新安装 ernie_tune，或克隆仓库",
            )
        )
    first = [str(folder / "sft.yaml"), *(f"{split}_dataset_path={folder / f'{split}.jsonl'}" for split in SPLITS)]
    print(say("[1/3] SFT by LoRA from 1,500 answers that are shown", "[1/3] SFT（LoRA）：从给出的 1,500 条答案学习"))
    code = train.run([*first, *args])
    if code or "--dry-run" in args:
        return code
    settings = split_overrides([*first[1:], *args])[1]
    shown = load_config(first[0], settings).config
    also = [f"{entry.name}={entry.raw}" for entry in settings if entry.name in ALSO]
    start = Path(shown.save.output_dir)
    few, out = (start.with_name(f"{start.name}_{name}") for name in (FEW_ROWS, "rlvr"))
    print(say("[2/3] SFT by LoRA from 50 of them", "[2/3] SFT（LoRA）：只从其中 50 条学习"))
    steps = _no_more(shown.train.max_steps, FEW_STEPS)
    file, rows, *held = first
    code = train.run([file, f"{rows}#{FEW_ROWS}", *held, *also, f"max_steps={steps}", f"output_dir={few}"])
    if code:
        return code
    print(say("[3/3] RLVR from there: its own answers and a checker", "[3/3] RLVR：再从自己的回答与检查器学习"))
    steps = _no_more(shown.train.max_steps, load_config(folder / "rlvr.yaml").config.train.max_steps)
    paths = [f"{split}_dataset_path={questions(folder / f'{split}.jsonl', out)}" for split in SPLITS]
    names = [f"lora_path={few}", f"output_dir={out}", f"max_steps={steps}"]
    code = train.rlvr([str(folder / "rlvr.yaml"), *paths, *names, *also])
    for line in () if code else summary(start, few, out):
        print(line)
    return code


def _no_more(given: int, usual: int) -> int:
    return min(given, usual) if given > 0 else usual


def questions(rows: Path, out: Path) -> Path:
    """The questions of a file of dialogues with what a checker wants, in the folder `out`."""
    lines = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked, answered = row["messages"]
        pictures = [str((rows.parent / name).resolve()) for name in row["images"]]
        signal = {"type": "verifiable", "answer": answered["content"]}
        lines.append(json.dumps({"messages": [asked], "images": pictures, "signal": signal}, ensure_ascii=False))
    path = out / "questions" / rows.name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{line}\n" for line in lines))
    return path


def summary(start: Path, few: Path, out: Path) -> list[str]:
    """How many held-out digits are read after each run."""

    def read(folder: Path, name: str) -> dict[str, Any]:
        path = folder / name
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def digits(metrics: dict[str, Any]) -> str:
        value = metrics.get("eval_exact_match", metrics.get("eval_reward"))
        return "-" if value is None else f"{value:.1%}"

    before = digits(read(start, "before.json").get("metrics", {}))
    every, some, own = (digits(read(folder, "eval_results.json")) for folder in (start, few, out))
    return [
        say("held-out digits read exactly", "完全读对的留出数字"),
        say(f"  before                          {before:>6}", f"  训练前                     {before:>6}"),
        say(f"  after 1,500 answers (SFT)       {every:>6}", f"  1,500 条答案之后（SFT）    {every:>6}"),
        say(f"  after 50 answers (SFT)          {some:>6}", f"  50 条答案之后（SFT）       {some:>6}"),
        say(f"  and answers of its own (RLVR)   {own:>6}", f"  再加自己的回答（RLVR）     {own:>6}"),
        say(f"every sampled answer: {out / 'rollouts.html'}", f"全部采样回答：{out / 'rollouts.html'}"),
    ]
