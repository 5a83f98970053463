"""`python tests/parallel/curves.py [FOLDER] [STEPS] [SETTING ...]`: examples/digits under layouts
of four processes, against one process; a table.

Training amplifies rounding: in float32 two runs of one program part after some sixty steps when the
sums of a step are made in another order. So every layout is run in float64 too, where the same
difference begins at 1e-16: what then leaves one process is a mistake. A run of STEPS (default 200)
goes through its whole schedule and is measured at its end. Runs are kept in FOLDER (default
output/curves): finished ones are read, others go on. Some fifteen minutes on two cores; the exit
status is 1 where a float64 curve leaves one process by more than 1e-4, or its accuracy differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
STEPS = 200
# One window of 32 rows in all of them: four micro-batches of eight, on as many data ranks as there
# are.
_FOUR = ("per_device_train_batch_size=8", "gradient_accumulation_steps=4")
RUNS: dict[str, tuple[str, ...]] = {
    "one process": _FOUR,
    "one process, 32 rows at once": ("per_device_train_batch_size=32",),
    "TP2 x PP2": (
        *_FOUR,
        "tensor_model_parallel_size=2",
        "pipeline_model_parallel_size=2",
    ),
    "EP2 x sharding 2 x DP2": (
        "per_device_train_batch_size=8",
        "expert_model_parallel_size=2",
        "sharding=stage1",
        "sharding_parallel_size=2",
        "--nproc",
        "4",
    ),
}


def curve(run: Path) -> list[float]:
    """Loss of every step."""
    log = run / "trainer_log.jsonl"
    records = map(json.loads, log.read_text(encoding="utf-8").splitlines()) if log.is_file() else ()
    return [r["loss"] for r in records if "loss" in r]


def accuracy(run: Path) -> float:
    """Share of held-out rows that are answered exactly, at the end."""
    return float(json.loads((run / "eval_results.json").read_text(encoding="utf-8"))["eval_exact_match"])


def train(run: Path, steps: int, words: tuple[str, ...]) -> None:
    """Start, or go on; nothing where it is finished."""
    if (run / "all_results.json").is_file() and len(curve(run)) == steps:
        return
    command = [sys.executable, "-m", "ernie_tune", "train", "examples/digits/fresh.yaml", f"output_dir={run}"]
    common = [
        f"max_steps={steps}",
        "logging_steps=1",
        "save_steps=100",
        "save_total_limit=1",
        f"eval_steps={steps}",
        "per_device_eval_batch_size=99",
        "plot_loss=false",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    print(f"{run.name} ...", file=sys.stderr, flush=True)
    done = subprocess.run([*command, *common, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{run.name} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def row(folder: Path, name: str, dtype: str) -> tuple[str, bool]:
    """A line of the table, and whether it is as it must be."""
    mine, alone = (folder / f"{dtype} {n}".replace(" ", "_").replace(",", "") for n in (name, "one process"))
    differences = [abs(a - b) for a, b in zip(curve(mine), curve(alone), strict=True)]
    near = next((i for i, d in enumerate(differences) if d > TOLERANCE), len(differences))
    scores = accuracy(mine), accuracy(alone)
    line = f"| {name} | {dtype} | {near} of {len(differences)} | {max(differences):.1e} | {curve(mine)[-1]:.6f} | {scores[0]:.4f} |"
    return line, dtype == "float32" or (near == len(differences) and scores[0] == scores[1])


def main() -> int:
    words = sys.argv[1:]
    folder = Path(words[0] if words else "output/curves").resolve()
    steps = int(words[1]) if len(words) > 1 else STEPS
    for dtype in ("float64", "float32"):
        for name, layout in RUNS.items():
            run = folder / f"{dtype} {name}".replace(" ", "_").replace(",", "")
            train(run, steps, (*layout, f"float64={str(dtype == 'float64').lower()}", *words[2:]))
    print(
        f"| layout | numbers | steps within {TOLERANCE:g} | largest difference | last loss | accuracy |\n|---|---|---|---|---|---|"
    )
    good = True
    for dtype in ("float64", "float32"):
        for name in RUNS:
            line, fine = row(folder, name, dtype)
            print(line if fine else f"{line} NOT EQUAL", flush=True)
            good = good and fine
    return int(not good)


if __name__ == "__main__":
    raise SystemExit(main())
