"""The whole matrix of layouts against one process: `python tests/parallel/matrix.py [WORD ...]`
prints a table (of what holds one of the words; a number stands for the layouts of so many
processes).

Each cell is the largest difference, over all ranks, of losses, norms, gradients, parameters after
five AdamW steps with clipping, then scores and answers.
One launch for each number of processes. It takes some ten minutes on two cores; the exit status is
1 where a cell is not within 1e-5.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from launching import largest, parity  # noqa: E402

TOLERANCE = 1e-5
_TP, _SP = {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}
_EP, _PP, _DP = {"data": 2, "expert": 2}, {"pipe": 2}, {"data": 2}


def _sharded(stage: int, ranks: int = 2) -> dict[str, Any]:
    return {"sharding": ranks, "sharding_stage": stage}


LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": _TP,
    "TP2+SP": _SP,
    "PP2": _PP,
    "EP2 (Fleet)": _EP,
    "EP2 (tensor group)": {**_SP, "expert": 2},
    "sharding 1 x2": _sharded(1),
    "sharding 2 x2": _sharded(2),
    "sharding 3 x2": _sharded(3),
    "sharding 1 x2, EP2": {**_sharded(1), "expert": 2},
    "sharding 3 x2, EP2": {**_sharded(3), "expert": 2},
    "DP2": _DP,
    "PP4": {"pipe": 4},
    "PP4 interleaved x2": {"pipe": 4, "virtual_pipe": 2},
    "EP4 (Fleet)": {"data": 4, "expert": 4},
    "EP2 on sharding 1 x4": {**_sharded(1, 4), "expert": 2},
    "TP2 x PP2": {**_TP, **_PP},
    "TP2+SP x PP2": {**_SP, **_PP},
    "TP2+SP x EP4 (Fleet)": {**_SP, **_DP, "expert": 4},
    "TP2+SP x EP2 x DP2": {**_SP, **_DP, "expert": 2},
    "TP2+SP x EP2 x PP2": {**_SP, **_PP, "expert": 2},
    "PP2 x EP2 (Fleet)": {**_PP, **_EP},
    "TP2 x sharding 1": {**_TP, **_sharded(1)},
    "TP2+SP x sharding 2": {**_SP, **_sharded(2)},
    "TP2+SP x sharding 3": {**_SP, **_sharded(3)},
    "PP2 x sharding 1": {**_PP, **_sharded(1)},
    "PP2 x DP2": {**_PP, **_DP},
    "DP2 x sharding 1": {**_DP, **_sharded(1)},
    "TP2 x DP2": {**_TP, **_DP},
}
JOBS: dict[str, dict[str, Any]] = {
    "tied, full": {},
    "untied, full": {"model": "c", "images": (0,)},
    "tied, LoRA": {"train": "lora", "recompute": True},
    "untied, LoRA on experts": {"model": "c", "train": "expert_lora"},
}
# Further methods, on the layouts that touch what they train.
METHODS: dict[str, dict[str, Any]] = {
    "LoRA on some experts": {"train": "some_experts"},
    "DoRA": {"train": "dora"},
    "bottleneck": {"train": "bottleneck"},
    "P-tuning": {"train": "prompt"},
    "prefix": {"train": "prefix"},
    "LoRA on int8": {"train": "lora:weight_only_int8"},
    "LoRA on int8, int4 experts": {"train": "expert_lora:weight_only_mix"},
    "vision experts alone": {"train": "frozen:vision experts+router", "recompute": True},
    "aligner alone": {"train": "frozen:aligner", "images": (0,)},
    "router bias": {"bias_update": 0.01},
    "text alone": {"images": ()},
    "SGD": {"optimizer": "sgd"},
}
METHOD_LAYOUTS = ("TP2", "TP2+SP", "EP2 (Fleet)", "EP2 (tensor group)", "sharding 1 x2", "TP2+SP x PP2")


def world(degrees: dict[str, Any]) -> int:
    return int(degrees.get("tensor", 1) * degrees.get("pipe", 1) * degrees.get("data", 1) * degrees.get("sharding", 1))


def rows() -> list[dict[str, Any]]:
    pairs = [(layout, job, JOBS[job]) for layout in LAYOUTS for job in JOBS]
    pairs += [(layout, job, METHODS[job]) for layout in METHOD_LAYOUTS for job in METHODS]
    out = []
    for layout, name, job in pairs:
        degrees, extra = LAYOUTS[layout], {}
        if degrees.get("sharding_stage") == 3:
            extra = {"recompute": True}
        if degrees.get("virtual_pipe"):
            if job.get("model") == "c":
                continue  # it has too few layers to be cut in eight
            extra = {"model": "d", "micro_batches": 8}
        out.append({"name": f"{layout} | {name}", "degrees": degrees, "job": {**job, **extra}})
    return out


def tables(found: dict[tuple[str, str], str]) -> list[str]:
    """The largest difference of any kind: layouts down, jobs across; the further methods the other
    way round.
    """
    lines = []
    for corner, down, across, turned in (
        ("layout", list(LAYOUTS), list(JOBS), False),
        ("method", list(METHODS), list(METHOD_LAYOUTS), True),
    ):
        cells = {row: [found.get((c, row) if turned else (row, c), "") for c in across] for row in down}
        if any(any(row) for row in cells.values()):
            lines += ["", f"| {corner} | {' | '.join(across)} |", f"|---{'|---' * len(across)}|"]
            lines += [
                f"| {row} | {' | '.join(cell or '-' for cell in values)} |"
                for row, values in cells.items()
                if any(values)
            ]
    return lines


def main() -> int:
    words = sys.argv[1:]
    chosen = [
        r
        for r in rows()
        if not words or any(w in r["name"] if not w.isdecimal() else int(w) == world(r["degrees"]) for w in words)
    ]
    failed, found = 0, {}
    for processes in sorted({world(r["degrees"]) for r in chosen}):
        mine = [r for r in chosen if world(r["degrees"]) == processes]
        folder = Path(tempfile.mkdtemp(prefix="matrix-"))
        for result in parity(folder, processes, mine, timeout_s=60 + 25 * len(mine)):
            good = largest(result) < TOLERANCE
            failed += not good
            layout, _, job = result["name"].partition(" | ")
            shown = f"{largest(result):.0e}" if largest(result) else "0"
            found[layout, job] = shown if good else f"**{shown}**"
            if not good:
                print(f"{result['name']}: {result.get('worst') or result['error'][:2000]}", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
    print("\n".join(tables(found)))
    print(f"\n{len(chosen) - failed} of {len(chosen)} within {TOLERANCE:g}")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
