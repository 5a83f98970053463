"""A toy that PPO must learn: emit even token ids. What each round of answers earns, how much of it
the critic explains, and how much any critic could.

Usage: python tests/bench/bench_ppo.py [--answers 128] [--tokens 8] [--rounds 30] [--warmup 12]
[--iterations 2] [--rate 0.0015] [--value-rate 0.005] [--lam 0.95] [--raw] [--seed 42]

The reward is the share of even ids. Before token t a critic may know how many of the earlier ones
were even, and nothing of those to come: with T independent tokens of one probability it explains
(t - 1) / T of the returns' variance there, (T - 1) / 2T of all tokens'. The ceiling that is printed
is measured: one less the variance of rewards among answers that had as many even ids at the same
place, over that of all. Rounds in which nearly all ids are even have nothing to explain.

The critic has to find out which of some 500 ids are even, from rewards of which each token is an
eighth; what it lacks beside the policy seems to be answers (seed 42: .05 explained at step 30,
where the reward is .96; a rate four times as high, seed 1 alone, had .04 there). With `--warmup` it
learns for so many rounds while the policy rests: with 12 of 30 rounds the reward passes .95 at
steps 56, 54, 58 of 60 (seeds 42, 1, 2), and .27, .31, .12 are explained over the last four rounds,
of at most .40, .44, .42: more than without for two seeds, and no cure for the third.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.training_arguments import PPOConfig
from ernie_tune.data.processor import Processor
from ernie_tune.train import critic
from ernie_tune.trainers.ppo import PPOTrainer


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(np.mean([i % 2 == 0 for i in ids])) for ids in completion_ids]


def ceiling(answers: Sequence[Sequence[int]], rewards: Sequence[float]) -> float:
    """The share of the variance of rewards, over all tokens, that is known from how many earlier
    ids were even.
    """
    known: dict[tuple[int, int], list[float]] = {}
    for ids, reward in zip(answers, rewards, strict=True):
        for t in range(len(ids)):
            known.setdefault((t, sum(i % 2 == 0 for i in ids[:t])), []).append(reward)
    every = np.concatenate([np.array(some) for some in known.values()])
    rest = sum(np.var(some, ddof=1) * len(some) for some in known.values() if len(some) > 1)
    counted = sum(len(some) for some in known.values() if len(some) > 1)
    return float(1 - rest / counted / np.var(every)) if np.var(every) > 0 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = {"answers": 128, "tokens": 8, "rounds": 30, "warmup": 12, "iterations": 2, "seed": 42}
    for name, usual in whole.items():
        parser.add_argument(f"--{name}", type=int, default=usual)
    for name, rate in (("rate", 1.5e-3), ("value-rate", 5e-3), ("lam", 0.95), ("clip", 0.2)):
        parser.add_argument(f"--{name}", type=float, default=rate)
    parser.add_argument("--raw", action="store_true", help="normalize_values: false")
    a = parser.parse_args()
    ceilings: list[float] = []
    look = critic.RoundOfCritic.look

    def looked(self: Any, groups: Any) -> dict[str, float]:
        said = [
            (answer.token_ids, reward) for g in groups for answer, reward in zip(g.answers, g.reward_G, strict=True)
        ]
        ceilings.append(ceiling(*zip(*said, strict=True)))
        return look(self, groups)

    critic.RoundOfCritic.look = looked  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(8)), encoding="utf-8")
        settings = PPOConfig(
            output_dir=f"{folder}/run", train_dataset_path=str(data), per_device_train_batch_size=a.answers,
            max_completion_length=a.tokens, num_iterations=a.iterations, max_steps=a.iterations * a.rounds, kl_coef=0.0,
            learning_rate=a.rate, value_learning_rate=a.value_rate, lr_scheduler_type="constant",
            logging_steps=a.iterations, seed=a.seed, save_strategy="no", plot_loss=False, disable_tqdm=True,
            critic_warmup=a.warmup * a.iterations, normalize_values=not a.raw, lam=a.lam,
            cliprange_value=a.clip,
        )  # fmt: skip
        started = time.process_time()
        PPOTrainer(
            AutoModel.from_config("tiny-a"), settings, processor=Processor.bundled("tiny"), reward_funcs=even
        ).train()
        state = json.loads((Path(folder) / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    for row, most in zip((row for row in state["log_history"] if "reward" in row), ceilings, strict=False):
        explained = row.get("critic/vf_explained_var", 0.0)
        print(f"step {row['step']:>3}  reward {row['reward']:.3f}  explained {explained:+.3f}  at most {most:+.3f}")
    print(f"{time.process_time() - started:.1f} s of CPU")


if __name__ == "__main__":
    main()
