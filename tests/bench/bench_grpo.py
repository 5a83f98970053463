"""A step of GRPO on this machine's CPU, ours and TRL's on the same shape ("small"), in rounds that
take turns.

usage: python tests/bench/bench_grpo.py [--shape 64|512|picture|all] [--rounds 3] [--steps 6]
[--prompts 2] [--group 8] [--new 32] [--threads 2] [--peer-python PATH]
Every round is a process of its own on each side: a whole trainer, `--steps` steps. The best step
and the best rollout of all rounds count, since others may use the machine, and since a process
fetches its memory from the system in its first three steps. Without --peer-python
(an environment with torch, transformers and trl: see peer_trl_grpo.py) ours alone is measured.
"picture": one generated picture of 896 x 896 a prompt, 1,024 tokens. Prints one JSON line: for each
shape the seconds of both, the ratios of rollout and step, and which share of our step is rollout,
reward, old log-probabilities and update.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHAPES: dict[str, dict[str, int]] = {
    "64": {"prompt": 64, "pixels": 0},
    "512": {"prompt": 512, "pixels": 0},
    "picture": {"prompt": 16, "pixels": 896},
}
PARTS = ("rollout", "reward", "old_logps", "update")


def rows(a: argparse.Namespace, processor: Any) -> list[dict[str, Any]]:
    """Prompts of exactly as many tokens as asked for, where they have no picture."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    out: list[dict[str, Any]] = []
    for i in range(64):
        if a.pixels:
            picture = Image.new("RGB", (a.pixels, a.pixels), "red" if i % 2 else "blue")
            out.append({"prompt": [{"role": "user", "content": f"<image>what colour is this? {i}"}], "image": picture})
            continue
        words = ""
        while True:
            longer = f"{words} {rng.integers(10, 99)}".strip()
            tokens, _ = processor.measure([{"role": "user", "content": longer}], add_generation_prompt=True)
            if tokens > a.prompt:
                break
            words = longer
        out.append({"prompt": [{"role": "user", "content": words}]})
    return out


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of even ids."""
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def ours(a: argparse.Namespace) -> dict[str, Any]:
    """A run of our trainer in this process."""
    import ernie_tune
    from ernie_tune.checkpoint.auto import AutoModel
    from ernie_tune.data.processor import Processor

    processor = Processor.bundled("small")
    seen: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        args = ernie_tune.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=a.prompts * a.group,
            num_generations=a.group,
            max_completion_length=a.new,
            max_prompt_len=2000,
            max_seq_len=4096,
            max_steps=a.steps,
            learning_rate=1e-3,
            loss_type="dapo",
            beta=0.0,
            logging_steps=1,
            save_strategy="no",
            dynamic_sample=False,
            disable_tqdm=True,
            plot_loss=False,
        )
        trainer = ernie_tune.GRPOTrainer(
            model=AutoModel.from_config("small"),
            reward_funcs=even,
            args=args,
            train_dataset=rows(a, processor),
            processing_class=processor,
        )
        method: Any = trainer.method
        after = method.after_step

        def note(record: Any) -> Any:
            seen.append({**method.rollouts.seconds, "step": record.seconds, "tokens": method.rollouts.tokens})
            return after(record)

        method.after_step = note
        trainer.train()
    best = min(seen, key=lambda one: one["step"])
    parts = {name: best[name] for name in PARTS if name in best}
    parts["update"] = best["step"] - sum(parts.values())
    return {
        "step_seconds": best["step"],
        "rollout_seconds": min(one["rollout"] for one in seen),
        "rollout_tokens": best["tokens"],
        "shares": {name: round(value / best["step"], 3) for name, value in parts.items()},
        "update_seconds": min(one["step"] - sum(one.get(p, 0.0) for p in PARTS[:3]) for one in seen),
        "steps": [round(one["step"], 3) for one in seen],
    }


def run(command: list[str], a: argparse.Namespace) -> dict[str, Any]:
    """One round of one side, in a process of its own."""
    threads = {name: str(a.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **threads})
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1])


def least(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The best of some rounds: seconds of the fastest, shares of the fastest step."""
    best = dict(min(rounds, key=lambda one: one["step_seconds"]))
    for name in ("rollout_seconds", "update_seconds"):
        if name in best:
            best[name] = min(one[name] for one in rounds)
    return best


def shape(name: str, a: argparse.Namespace) -> dict[str, Any]:
    """Both sides on one shape, in turns."""
    sizes = {**SHAPES[name], **{k: getattr(a, k) for k in ("prompts", "group", "new", "steps")}}
    words = [f"--{key}={value}" for key, value in sizes.items()]
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for _ in range(a.rounds):
        found["ours"].append(run([sys.executable, str(Path(__file__)), "--side=ours", *words], a))
        if a.peer_python:
            peer = [a.peer_python, str(HERE / "peer_trl_grpo.py"), f"--threads={a.threads}", *words]
            found["peer"].append(run(peer, a))
    out: dict[str, Any] = {side: least(rounds) for side, rounds in found.items() if rounds}
    out["ours"]["rollout_tokens_per_second"] = round(out["ours"]["rollout_tokens"] / out["ours"]["rollout_seconds"], 1)
    if "peer" in out:
        for part in ("rollout", "step"):
            out[f"{part}_ratio"] = round(out["peer"][f"{part}_seconds"] / out["ours"][f"{part}_seconds"], 2)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"prompts": 2, "group": 8, "new": 32, "steps": 6, "threads": 2, "rounds": 3, "prompt": 64, "pixels": 0}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--shape", choices=(*SHAPES, "all"), default="all")
    parser.add_argument("--side", choices=("ours", "both"), default="both")
    parser.add_argument("--peer-python", default="")
    a = parser.parse_args()
    if a.side == "ours":
        print(json.dumps(ours(a)))
        return
    out: dict[str, Any] = {name: shape(name, a) for name in (SHAPES if a.shape == "all" else (a.shape,))}
    out["machine"] = {"processor": platform.processor() or platform.machine(), "load_average": os.getloadavg()[0]}
    out["when"] = time.strftime("%Y-%m-%d %H:%M")
    print(json.dumps(out))


if __name__ == "__main__":
    main()
