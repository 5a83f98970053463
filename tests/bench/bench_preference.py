"""DPO steps on this CPU: ours against TRL + transformers on the same weights and rows, and ours
with against without shared prefixes.

usage: python tests/bench/bench_preference.py [--peer-python PATH] [--rounds 2] [--prompt 192]
[--answer 32] [--pairs 4] [--steps 6] A step is what a run does: the reference's forward, the
policy's forward and backward, AdamW; full fine-tuning with a frozen copy as the reference, every
row new. Rounds of all sides alternate; a side's number is its best round's median step, so that a
busy machine hurts all alike. --images: sharing is also measured with one picture of so many patches
a row, which TRL's side does not take.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import ernie_tune  # sets the CPU variables before paddle loads

import numpy as np  # isort: skip

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.data.processor import Encoded, Processor
from ernie_tune.data.units import Unit, collate_units
from ernie_tune.models.inputs import Row
from ernie_tune.objectives.preference import PreferenceHyper
from ernie_tune.train.loop import Loop, LoopSettings
from ernie_tune.train.optim import Schedule, build_adamw
from ernie_tune.train.preference import PairObjective
from ernie_tune.train.reference import Reference

EOS = 2


def rows(a: argparse.Namespace, count: int) -> list[dict[str, list[int]]]:
    """Prompts and two answers of random tokens; answers differ in their first token."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        prompt, better, worse = (rng.integers(10, 7900, n).tolist() for n in (a.prompt, a.answer, a.answer))
        worse[0] = better[0] + 1
        made.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return made


def unit(row: dict[str, list[int]], share: bool, patches: int, seed: int) -> Unit:
    """One pair as our data layer would make it, with a square picture of so many patches before the
    prompt.
    """
    head, pixels, grid = list(row["prompt"]), None, None
    if patches:
        side = round(patches**0.5)
        pixels = np.random.default_rng(seed).standard_normal((side * side, 588)).astype(np.float32)
        grid = np.array([[1, side, side]])
        head = [8005, *[8004] * (side * side // 4), 8006, *head]
    dialogues = []
    for answer in (row["chosen"], row["rejected"]):
        ids = np.array([*head, *answer, EOS])
        dialogues.append(Encoded(Row(ids, pixels, grid), np.arange(len(ids)) >= len(head)))
    nan = np.full(2, np.nan)
    return Unit(tuple(dialogues), len(head) if share else 0, "pair", nan, np.array([1.0, 2.0]), nan)


def ours(a: argparse.Namespace, folder: Path, share: bool, patches: int = 0) -> tuple[list[float], float]:
    """Seconds of each step after the first, and the first loss."""
    model = AutoModel.from_pretrained(folder)
    processor = Processor.bundled("small")
    reference = Reference(model, "model")
    units = [unit(row, share, patches, i) for i, row in enumerate(rows(a, a.pairs * a.steps))]

    def windows() -> Iterator[list[object]]:
        for i in range(0, len(units), a.pairs):
            yield [reference.attached(collate_units(units[i : i + a.pairs], processor))]

    optimizer = build_adamw(
        list(model.named_parameters()), lambda _: 1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8
    )
    objective = PairObjective({"sigmoid": 1.0}, PreferenceHyper())
    loop = Loop(model, objective, optimizer, Schedule(1e-5, a.steps, 0, "linear"), LoopSettings())
    ends, losses = [], []
    for record in loop.steps(windows()):
        ends.append(time.perf_counter())
        losses.append(record.loss)
    return [b - a for a, b in pairwise(ends)], losses[0]


def peer(a: argparse.Namespace, folder: Path, file: Path) -> tuple[list[float], float]:
    script = Path(__file__).with_name("peer_trl.py")
    command = [
        a.peer_python,
        str(script),
        "--model",
        str(folder),
        "--rows",
        str(file),
        "--batch",
        str(a.pairs),
        "--steps",
        str(a.steps),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    out = json.loads(done.stdout.strip().splitlines()[-1])
    return out["steps"], out["first_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default="")
    for name, value in {"rounds": 2, "prompt": 192, "answer": 32, "pairs": 4, "steps": 6, "images": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    best: dict[str, float] = {}
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, file = Path(scratch) / "model", Path(scratch) / "rows.jsonl"
        AutoModel.from_config("small").save_pretrained(folder, flavour="hf_saved")
        lines = [
            {key: " ".join(f"t{i}" for i in ids) for key, ids in row.items()} for row in rows(a, a.pairs * a.steps)
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        sides = {"shared": lambda: ours(a, folder, True), "whole": lambda: ours(a, folder, False)}
        if a.images:
            sides["shared_images"] = lambda: ours(a, folder, True, a.images)
            sides["whole_images"] = lambda: ours(a, folder, False, a.images)
        if a.peer_python:
            sides["trl"] = lambda: peer(a, folder, file)
        for _ in range(a.rounds):
            for name, run in sides.items():
                steps, first[name] = run()
                best[name] = min(best.get(name, float("inf")), statistics.median(steps))
    out = {
        "pairs_per_second": {name: round(a.pairs / seconds, 3) for name, seconds in best.items()},
        "first_loss": {name: round(loss, 6) for name, loss in first.items()},
        "sharing": round(best["whole"] / best["shared"], 3),
        **({"sharing_images": round(best["whole_images"] / best["shared_images"], 3)} if a.images else {}),
        **({"over_trl": round(best["trl"] / best["shared"], 3)} if a.peer_python else {}),
        "sizes": {name: vars(a)[name] for name in ("prompt", "answer", "pairs", "steps", "images", "rounds")},
        "machine": platform.processor() or platform.machine(),
        "version": ernie_tune.__version__,
    }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
