"""Runs that learn from sampled answers, on this process or as a rank: `online_worker.py FOLDER
LAYOUT ...`, started by the launcher, runs every layout that it is given, one after the other, each
case in FOLDER/LAYOUT/CASE. Starting processes costs more than the runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from support.online_runs import sampled_run
from support.tiny_runs import IMAGES, write_rows

from ernie_tune.generate.batch import Completion, Prompt, eval_mode
from ernie_tune.generate.engine import Engine
from ernie_tune.generate.scheduler import complete
from ernie_tune.machine import place
from ernie_tune.machine.stages import outputs_of
from ernie_tune.trainers.online import RLVRTrainer, SampledAnswers
from ernie_tune.trainers.ppo import PPOTrainer
from ernie_tune.trainers.upo import UPOTrainer

# Settings of a layout. One process has a window's micro-batches in turn where several ranks share
# them.
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {"gradient_accumulation_steps": 1},
    "TP2 SP EP2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
    },
    "PP2": {"pipeline_model_parallel_size": 2},
    "EP2 sharding 2": {
        "expert_model_parallel_size": 2,
        "sharding": "stage1",
        "sharding_parallel_size": 2,
        "gradient_accumulation_steps": 1,
    },
    "sharding 3": {
        "sharding": "stage3",
        "sharding_parallel_size": 2,
        "gradient_accumulation_steps": 1,
        "recompute": True,
    },
    "TP2 DP2": {"tensor_model_parallel_size": 2, "gradient_accumulation_steps": 1},
    "one process": {},
}
# case -> settings
CASES: dict[str, dict[str, Any]] = {
    "reference": {"beta": 0.05, "num_iterations": 2, "max_steps": 2},
    # answers of one rank end with their first token; fewer prompts than ranks are drawn again, so a
    # rank has none
    "uneven": {"num_mini_batches": 2, "per_device_train_batch_size": 3, "max_steps": 4},
    "critic": {"stage": "PPO", "kl_target": 0.01, "kl_horizon": 40, "max_steps": 3},
    "critic adapter": {"stage": "PPO", "fine_tuning": "LoRA", "lora_rank": 4, "num_mini_batches": 2, "max_steps": 4},
    # pairs among sampled answers, whose reference reads them alone; a rank may have none
    "pairs": {
        "stage": "UPO",
        "loss_type": "upo_online",
        "allow_base": True,
        "pair_min_gap": 0.4,
        "pair_weight": "auto",
        "max_steps": 2,
    },
}
TRIED: dict[str, tuple[str, ...]] = {
    "DP2": ("reference", "uneven", "critic", "critic adapter", "pairs"),
    "TP2 SP EP2": ("uneven", "critic adapter"),
    "PP2": ("reference", "critic"),
    "EP2 sharding 2": ("uneven", "critic adapter", "pairs"),
    "sharding 3": ("reference",),
    "TP2 DP2": ("reference", "uneven"),
}


def rows(case: str) -> list[dict[str, Any]]:
    """Prompts of all lengths, some with a picture."""
    out = []
    for i in range(12):
        picture = {"images": [str(IMAGES / f"{i:04d}.png")]} if i % 3 == 0 else {}
        dull = " calmly" if case == "uneven" and i % 4 == 1 else ""
        words = ("<image>" if picture else "") + "read the digit" + " please" * (i % 4) + dull
        signal = {"type": "verifiable", "answer": str(i % 10)}
        out.append({"messages": [{"role": "user", "content": words}], **picture, "signal": signal})
    return out


def even(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of even ids, what fresh weights get in all shades; answers to some prompts all earn
    the same. Then fewer prompts than ranks are drawn again, and a rank has none.
    """
    share = [float(np.mean([i % 2 == 0 for i in ids])) for ids in completion_ids]
    return [0.0 if "calmly" in p[-1]["content"] else value for p, value in zip(prompts, share, strict=True)]


class Halting(SampledAnswers):
    """Answers to every second prompt end with their first token."""

    def sample(self, prompts: Sequence[Prompt]) -> Mapping[int, Sequence[Completion]]:
        every = tuple(range(self.policy.forward.config.vocab_size))
        short = [
            dataclasses.replace(p, params=dataclasses.replace(p.params, stop_ids=every)) if p.index % 2 else p  # type: ignore[operator]
            for p in prompts
        ]
        return super().sample(short)


def train(folder: Path, case: str, layout: str = "one process") -> Path:
    """A run of two rounds; what it leaves, and the answers of its policy."""
    out = folder / case.replace(" ", "_")
    out.mkdir(parents=True, exist_ok=True)
    data = write_rows(out / f"rows_{os.environ.get('PADDLE_TRAINER_ID', '0')}.jsonl", rows(case))
    exact = {"adam_epsilon": 1e-5, "float64": True, "lr_scheduler_type": "constant"}
    whole = {"model_name_or_path": "tiny-a", "gradient_accumulation_steps": 2, **exact}
    args = sampled_run(data, out / "run", **{**whole, **CASES[case], **LAYOUTS[layout]})
    stage = CASES[case].get("stage", "RLVR")
    kind: Any = {"PPO": PPOTrainer, "UPO": UPOTrainer, "RLVR": RLVRTrainer}[stage]
    made = kind(args=args, reward_funcs=even)
    if case == "pairs":  # fresh weights never end an answer: every third token does
        made.processor.stop_ids = (*made.processor.stop_ids, *range(2, 500, 3))
    if case == "uneven":
        made.method.__class__ = Halting
    made.train()
    replayed = made.method.settings.num_iterations * made.method.settings.num_mini_batches > 1
    assert made.method.replay == ("R3" if replayed else "off")
    method = made.method
    assert isinstance(method, SampledAnswers)
    greedy = greedy_answers(method)
    gap = mismatch(method)
    np.savez(out / f"rank_{os.environ.get('PADDLE_TRAINER_ID', '0')}.npz", gap=gap, **greedy)
    return out


def greedy_answers(method: SampledAnswers) -> dict[str, np.ndarray]:
    """Ids and log-probabilities of greedy answers, the same prompts on all ranks."""
    engine = Engine(method.policy.forward, method.processor)
    records = [method.rollouts.records[i] for i in range(3)]
    encoded = [
        method.processor.encode(r.prompt, list(r.images), [], add_generation_prompt=True, max_tokens=200, where="")
        for r in records
    ]
    params = engine.params(max_new_tokens=4)
    prompts = [Prompt(one.row, params, key=i) for i, one in enumerate(encoded)]
    found = dict(complete(engine.scheduler(), prompts))
    flat = list(itertools.chain.from_iterable(found[i] for i in range(len(prompts))))
    return {
        "ids": np.concatenate([c.token_ids for c in flat]),
        "logps": np.concatenate([c.logps for c in flat]),
    }


def mismatch(method: SampledAnswers) -> float:
    """How far the log-probabilities of the engine are from those of the forward that trains."""
    groups = method.rollouts.make_round()
    batch = method.rollouts.batch(groups)
    objective = method.present_objective()
    forward = method.policy.forward
    with eval_mode(forward), paddle.no_grad():
        logp_N = outputs_of(forward, objective.outputs, batch)["logp_N"].numpy()
    return float(np.abs(logp_N - batch.columns["sampled_logp_N"]).max())


def main() -> None:
    from paddle.distributed.fleet.base import topology

    place._watch = lambda world: None  # its address is the launcher's, for one run
    folder = Path(sys.argv[1])
    for layout in sys.argv[2:]:
        for case in TRIED[layout]:
            print("case", layout, case, flush=True)
            topology._HYBRID_PARALLEL_GROUP = (
                None  # Fleet lays out a process once; here it lays out one after the other
            )
            train(folder / layout.replace(" ", "_"), case, layout)


if __name__ == "__main__":
    main()
