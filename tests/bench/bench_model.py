"""Training step, prefill and decode of the "small" model on this CPU, side by side with
transformers in one run.

usage: python tests/bench/bench_model.py [--peer-python PATH] [--rounds 3] [--profile]
Rounds of ours and the peer's alternate, each number is the best over all rounds, so that a busy
machine hurts both alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import ernie_tune  # sets the CPU variables before paddle loads

import numpy as np  # isort: skip
import paddle

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.generate.batch import generate
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.models.inputs import Row, pack
from ernie_tune.objectives.logprobs import token_logp
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import get_peft_model
from ernie_tune.train.optim import build_adamw

ADAMW = {"weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}


def best(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


class Ours:
    """The measured things of this library, built once."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.model = a, AutoModel.from_config("small")
        rng = np.random.default_rng(0)
        ids = rng.integers(10, 7900, (a.rows, a.tokens))
        self.batch = pack([Row(row) for row in ids], self.model.config.tokens)
        at = np.flatnonzero(np.arange(ids.size) % a.tokens != a.tokens - 1)
        self.source, self.target = paddle.to_tensor(at), paddle.to_tensor(ids.reshape(-1)[at + 1])
        self.prompts = [Row(row) for row in rng.integers(10, 7900, (a.batch, a.prompt))]
        self.optimizer = self._adamw()

    def _adamw(self) -> paddle.optimizer.AdamW:
        return build_adamw(list(self.model.named_parameters()), lambda _: 1e-5, **ADAMW)

    def forward_backward(self) -> None:
        hidden = paddle.gather(self.model(self.batch), self.source)
        weight, transposed = self.model.head_weight()
        (-token_logp(hidden, weight, self.target, transposed=transposed).mean()).backward()
        self.model.clear_gradients(set_to_zero=False)

    def full_step(self) -> None:
        hidden = paddle.gather(self.model(self.batch), self.source)
        weight, transposed = self.model.head_weight()
        (-token_logp(hidden, weight, self.target, transposed=transposed).mean()).backward()
        self.optimizer.step()
        self.model.clear_gradients(set_to_zero=False)

    def lora_step(self) -> float:
        """Seconds of one step of LoRA r=16 on the attention projections, best of the repeats."""
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(AutoModel.from_config("small"), LoraConfig(r=16, lora_alpha=32, target_modules=targets))
        optimizer = build_adamw(list(model.named_parameters()), lambda _: 1e-5, **ADAMW)

        def step() -> None:
            hidden = paddle.gather(model(self.batch), self.source)
            weight, transposed = model.head_weight()
            (-token_logp(hidden, weight, self.target, transposed=transposed).mean()).backward()
            optimizer.step()
            model.clear_gradients(set_to_zero=False)

        model.train()
        step()
        return best(step, self.a.repeats)

    def generate(self, new: int) -> None:
        generate(self.model, self.prompts, self.model.config.tokens, SamplingParams(max_new_tokens=new))

    def measure(self) -> dict[str, float]:
        a = self.a
        self.model.train()
        self.full_step()
        out = {"forward_backward": best(self.forward_backward, a.repeats), "full_step": best(self.full_step, a.repeats)}
        out["lora_step"] = self.lora_step()
        self.generate(2)
        out["prefill"] = best(lambda: self.generate(1), a.repeats)
        out["decode"] = (best(lambda: self.generate(a.new), 2) - out["prefill"]) / (a.new - 1)
        return out


def peer(a: argparse.Namespace) -> dict[str, float]:
    script = Path(__file__).with_name("peer_transformers.py")
    sizes = [f"--{k}={getattr(a, k)}" for k in ("rows", "tokens", "repeats", "batch", "prompt", "new")]
    done = subprocess.run([a.peer_python, str(script), *sizes], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("--peer-python", default="", help="python of an environment with torch and transformers")
    args.add_argument(
        "--profile", action="store_true", help="print paddle's operator table of one forward and backward"
    )
    for name, value in {
        "rounds": 3,
        "rows": 4,
        "tokens": 256,
        "repeats": 5,
        "batch": 8,
        "prompt": 128,
        "new": 64,
    }.items():
        args.add_argument(f"--{name}", type=int, default=value)
    a = args.parse_args()
    ours, theirs, mine = Ours(a), {}, {}
    for _ in range(a.rounds):
        for seen, new in ((mine, ours.measure()), (theirs, peer(a) if a.peer_python else {})):
            seen.update({k: min(v, seen.get(k, v)) for k, v in new.items()})
    step = a.rows * a.tokens
    tokens = {
        "forward_backward": step,
        "full_step": step,
        "lora_step": step,
        "prefill": a.batch * a.prompt,
        "decode": a.batch,
    }
    print(json.dumps({"machine": platform.processor() or platform.machine(), "version": ernie_tune.__version__}))
    for name, count in tokens.items():
        line = {"name": name, "tokens_per_second": round(count / mine[name], 1)}
        if name in theirs:
            line |= {
                "peer_tokens_per_second": round(count / theirs[name], 1),
                "ratio": round(theirs[name] / mine[name], 2),
            }
        print(json.dumps(line))
    memory = {"name": "peak_gib", "ours": round(peak_gib(), 2)}
    print(json.dumps(memory | ({"peer": round(theirs["peak_gib"], 2)} if theirs else {})))
    if a.profile:
        profile(ours)


def peak_gib() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def profile(ours: Ours) -> None:
    from paddle import profiler

    ours.model.train()
    run = profiler.Profiler(targets=[profiler.ProfilerTarget.CPU])
    run.start()
    ours.forward_backward()
    run.step()
    run.stop()
    run.summary(sorted_by=profiler.SortedKeys.CPUTotal, op_detail=False, thread_sep=False, time_unit="ms")


if __name__ == "__main__":
    main()
