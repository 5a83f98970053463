"""`ernie-tune demo`: the first minutes, from fresh weights to a model that reads digits, first by
answers that it is shown, then by its own ones and a checker.

Refuses to know how training works; both runs are those of the verbs.
"""

from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path
from typing import Any

from ernie_tune.cli import train
from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.language import say
from ernie_tune.config.loader import load_config, split_overrides

# In the source tree, and where an installed wheel puts it (setup.py, data_files).
DIGITS = (
    Path(__file__).parents[2] / "examples" / "digits",
    Path(sysconfig.get_path("data")) / "share" / "ernie_tune" / "examples" / "digits",
)
SPLITS = ("train", "eval")
ALSO = ("seed", "report_max_samples", "eval_max_samples")  # settings that hold for the second run, too


def run(args: list[str]) -> int:
    """ernie-tune demo [key=value | --key value ...]

    A small ERNIE-4.5-VL with fresh weights learns to read handwritten digits (examples/digits), on
    the CPU, in a few minutes: from 1,500 answers that it is shown, then some steps from answers of
    its own, which a checker judges (RLVR). The settings are those of the first run; the second
    takes no more steps than it.
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
    print(say("[1/2] SFT: from answers that are shown", "[1/2] SFT：从给出的答案学习"))
    code = train.run([*first, *args])
    if code or "--dry-run" in args:
        return code
    settings = split_overrides([*first[1:], *args])[1]
    shown = load_config(first[0], settings).config
    start = Path(shown.save.output_dir)
    if not (start / "config.json").is_file():
        print(say("[2/2] RLVR: left out, it goes on from whole models", "[2/2] RLVR：略过，仅从完整模型继续"))
        return 0
    out = start.with_name(f"{start.name}_rlvr")
    print(say("[2/2] RLVR: from answers of its own and a checker", "[2/2] RLVR：从自己的回答与检查器学习"))
    most = load_config(folder / "rlvr.yaml").config.train.max_steps
    steps = min(shown.train.max_steps, most) if shown.train.max_steps > 0 else most
    paths = [f"{split}_dataset_path={questions(folder / f'{split}.jsonl', out)}" for split in SPLITS]
    also = [f"{entry.name}={entry.raw}" for entry in settings if entry.name in ALSO]
    names = [f"model_name_or_path={start}", f"output_dir={out}", f"max_steps={steps}"]
    code = train.rlvr([str(folder / "rlvr.yaml"), *paths, *names, *also])
    for line in () if code else summary(start, out):
        print(line)
    return code


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
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def summary(start: Path, out: Path) -> list[str]:
    """How many held-out digits are read before, between and after, and what sampled answers
    earned.
    """

    def read(folder: Path, name: str) -> dict[str, Any]:
        path = folder / name
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def digits(metrics: dict[str, Any]) -> str:
        value = metrics.get("eval_exact_match")
        return "-" if value is None else f"{value:.1%}"

    before = read(start, "before.json").get("metrics", {})
    earned = [row["reward"] for row in read(out, "trainer_state.json").get("log_history", ()) if "reward" in row]
    reward = f" ({earned[0]:.2f} -> {earned[-1]:.2f})" if earned else ""
    return [
        say("held-out digits read exactly", "完全读对的留出数字"),
        say(f"  before        {digits(before):>6}", f"  训练前      {digits(before):>6}"),
        say(
            f"  after SFT     {digits(read(start, 'eval_results.json')):>6}",
            f"  SFT 之后    {digits(read(start, 'eval_results.json')):>6}",
        ),
        say(
            f"  after RLVR    {digits(read(out, 'eval_results.json')):>6}   reward of sampled answers{reward}",
            f"  RLVR 之后   {digits(read(out, 'eval_results.json')):>6}   采样回答的奖励{reward}",
        ),
        say(f"every sampled answer: {out / 'rollouts.html'}", f"全部采样回答：{out / 'rollouts.html'}"),
    ]
