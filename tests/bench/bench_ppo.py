"""A toy that PPO must learn: emit even token ids. What each round of answers earns and how much of
it the critic explains.

Usage: python tests/bench/bench_ppo.py [--answers 48] [--tokens 3] [--rounds 11] [--seed 42]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.training_arguments import PPOConfig
from ernie_tune.data.processor import Processor
from ernie_tune.trainers.ppo import PPOTrainer


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(np.mean([i % 2 == 0 for i in ids])) for ids in completion_ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, usual in (("answers", 48), ("tokens", 3), ("rounds", 11), ("seed", 42)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(8)), encoding="utf-8")
        settings = PPOConfig(
            output_dir=f"{folder}/run", train_dataset_path=str(data), per_device_train_batch_size=asked.answers,
            max_completion_length=asked.tokens, num_iterations=4, max_steps=4 * asked.rounds, kl_coef=0.0,
            learning_rate=5e-3, value_learning_rate=5e-3, lr_scheduler_type="constant", logging_steps=4, seed=asked.seed,
            save_strategy="no", plot_loss=False, disable_tqdm=True,
        )  # fmt: skip
        started = time.process_time()
        PPOTrainer(
            AutoModel.from_config("tiny-a"), settings, processor=Processor.bundled("tiny"), reward_funcs=even
        ).train()
        state = json.loads((Path(folder) / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    for row in state["log_history"]:
        if "reward" in row:
            print(
                f"step {row['step']:>3}  reward {row['reward']:.3f}  explained {row.get('critic/vf_explained_var', 0):+.3f}"
            )
    print(f"{time.process_time() - started:.1f} s of CPU")


if __name__ == "__main__":
    main()
