"""Resident memory of real training steps on this CPU beside what `ernie-tune estimate` says, for
the "small" model.

usage: python tests/bench/bench_memory.py [--steps 3] [--case NAME ...]
Every case is a process of its own: two micro-batches a step, forward, backward, clipping and AdamW
by the library's own loop; the peak is VmHWM.
Rows of random text of one length, with pictures where the case has them, every text token a target.
Exit code 1 when a case is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TOLERANCE = 0.10
_LORA = {"fine_tuning": "LoRA", "lora_rank": 16}
_FULL = {"fine_tuning": "Full"}
_EVERYWHERE = {**_LORA, "lora_target_modules": "all", "lora_experts": "both"}
# name -> (settings, rows of a micro-batch, tokens a row, pictures a row of 256 tokens each)
CASES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "full 4x512": (_FULL, 4, 512, 0),
    "full 8x512": (_FULL, 8, 512, 0),
    "full 2x2048": (_FULL, 2, 2048, 0),
    "full 4x512 recompute": ({**_FULL, "recompute": True}, 4, 512, 0),
    "full 8x512 pictures": (_FULL, 8, 512, 1),
    "lora 8x512": (_LORA, 8, 512, 0),
    "lora 16x512": (_LORA, 16, 512, 0),
    "lora all 8x512": (_EVERYWHERE, 8, 512, 0),
    "lora 8x512 recompute": ({**_LORA, "recompute": True}, 8, 512, 0),
    "lora 8x512 pictures": (_LORA, 8, 512, 1),
}
SIDE = 32  # patches of a picture's side: 256 tokens


def child(name: str, steps: int) -> dict[str, float]:
    """Train in this process; GB after the imports, with the model, and at most."""
    settings, rows, length, pictures = CASES[name]
    import numpy as np

    from ernie_tune.checkpoint.auto import AutoModel
    from ernie_tune.config.training_arguments import TrainingArguments
    from ernie_tune.data.batching import Sample, collate
    from ernie_tune.models.inputs import Row
    from ernie_tune.models.startup import prepare_device
    from ernie_tune.report.progress import resident_gib
    from ernie_tune.train.loop import Loop, LoopSettings
    from ernie_tune.train.optim import Schedule, build_adamw
    from ernie_tune.train.sft import SFTObjective
    from ernie_tune.trainers.assemble import apply_method, recompute

    prepare_device()
    bare = resident_gib()
    args = TrainingArguments(model_name_or_path="small", **settings)
    model = apply_method(args, AutoModel.from_config("small"))
    rng, tokens = np.random.default_rng(0), model.config.tokens

    def sample() -> Sample:
        ids = rng.integers(10, 7900, length)
        pixels = grid = None
        if pictures:
            visual = SIDE**2 // 4
            for i in range(pictures):
                ids[1 + i * (visual + 2) : 1 + i * (visual + 2) + visual] = tokens.image
            pixels = rng.standard_normal((pictures * SIDE**2, 588), np.float32)
            grid = np.array([[1, SIDE, SIDE]] * pictures)
        trained = ids != tokens.image
        return Sample(Row(ids, pixels, grid), trained, trained.astype(np.float32))

    window = [collate([sample() for _ in range(rows)], tokens) for _ in range(2)]
    optimizer = build_adamw(
        list(model.named_parameters()), lambda _: 1.0, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8
    )
    loop = Loop(
        model,
        SFTObjective(),
        optimizer,
        Schedule(1e-4, steps),
        LoopSettings(recompute=recompute() if args.compute.recompute else None),
    )
    loaded = resident_gib()
    for _ in loop.steps([window] * steps):
        pass
    gib = 2**30 / 1e9
    return {"bare": bare * gib, "loaded": loaded * gib, "peak": resident_gib(peak=True) * gib}


def estimated(name: str) -> dict[str, float]:
    from ernie_tune.plan.estimate import estimate

    settings, rows, length, pictures = CASES[name]
    e = estimate(
        "small",
        card="cpu-16g",
        visual_tokens=rows * pictures * SIDE**2 // 4,
        cards=1,
        max_seq_len=length,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=2,
        **{"recompute": False, "bf16": False, **settings},
    )
    return {k: v / 1e9 for k, v in e.plan.memory.items.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--case", nargs="*", default=list(CASES))
    parser.add_argument("--child", default="")
    a = parser.parse_args()
    if a.child:
        print(json.dumps(child(a.child, a.steps)))
        return 0
    root = str(Path(__file__).parents[2])
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    worst = 0.0
    print(f"{'case':<24}{'bare':>7}{'model':>7}{'peak GB':>9}{'estimate':>10}{'off':>8}   items")
    for name in a.case:
        done = subprocess.run(
            [sys.executable, __file__, "--child", name, "--steps", str(a.steps)],
            capture_output=True, text=True, env=environ, timeout=600, check=True,
        )  # fmt: skip
        measured, items = json.loads(done.stdout.splitlines()[-1]), estimated(name)
        total = sum(items.values())
        off = total / measured["peak"] - 1
        worst = max(worst, abs(off))
        shown = ", ".join(f"{k} {v:.2f}" for k, v in items.items() if abs(v) >= 0.005)
        print(
            f"{name:<24}{measured['bare']:>7.2f}{measured['loaded']:>7.2f}{measured['peak']:>9.2f}{total:>10.2f}{off:>+8.1%}   {shown}",
            flush=True,
        )
    print(f"worst: {worst:.1%} (must be within {TOLERANCE:.0%})")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
