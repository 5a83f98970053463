"""A reward that can be hacked, learned from with and without pairs that say what is meant.

Usage: python tests/bench/bench_upo.py [--steps 40] [--seeds 3] [--pair 1.0] [--bonus 0.6]

Meant are even token ids in at most four tokens: quality = share of even ids x min(1, 4 / tokens).
Paid is the share of even ids plus `--bonus` for twelve tokens, fewer in proportion: length is
the easy half of it. Pairs from a file (short and even beats long and odd) are judged by what is
meant. `upo_offline` learns from both, its twin from the policy gradient alone (pair=0: RLVR), from
the same start. Prints for each seed reward and quality of the sampled answers at the end, and the
quality of both at equal reward: what each had where its reward first reached what both reach.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.training_arguments import TrainingArguments
from ernie_tune.data.processor import Processor
from ernie_tune.trainers.upo import UPOTrainer

MOST, MEANT = 12, 4
ENDS = tuple(range(2, 500, 3))  # fresh weights never say the end: here every third token is one


def even(ids: list[int]) -> float:
    return float(np.mean([i % 2 == 0 for i in ids]))


def quality(ids: list[int]) -> float:
    """What is meant."""
    return even(ids) * min(1.0, MEANT / len(ids))


def texts(processor: Processor, rng: np.random.Generator, odd: bool, length: int) -> str:
    """Words whose ids are all odd or even, so many, none of which is an end but the last."""
    ids = [i for i in range(10, 500) if i % 2 == odd and i not in ENDS]
    while True:
        text = processor.decode(rng.choice(ids, length).tolist())
        again = processor.tokenizer.encode(text)
        if len(again) == length and all(i % 2 == odd and i not in ENDS for i in again):
            return text


def rows(processor: Processor, folder: Path, pairs: bool) -> str:
    """Prompts, and as many judged pairs where they are wanted."""
    rng, made = np.random.default_rng(0), []
    for i in range(64):
        asked = {"messages": [{"role": "user", "content": f"say {i % 8}"}]}
        if i < 8:
            made.append({**asked, "signal": {"type": "verifiable", "answer": "0"}})
        elif pairs:
            short, long = texts(processor, rng, False, 3), texts(processor, rng, True, 6)
            made.append({**asked, "signal": {"type": "pair", "chosen": short, "rejected": long}})
    path = folder / f"rows_{pairs}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    return str(path)


def learned(a: argparse.Namespace, folder: Path, seed: int, pairs: bool) -> np.ndarray:
    """(reward, quality) of the answers of each step, [steps, 2]."""
    processor = Processor.bundled("tiny")
    processor.stop_ids = (*processor.stop_ids, *ENDS)
    seen: list[tuple[float, float]] = []

    def paid(completion_ids: list[list[int]], **_: Any) -> list[float]:
        rewards = [even(ids) + a.bonus * len(ids) / MOST for ids in completion_ids]
        seen.append((float(np.mean(rewards)), float(np.mean([quality(ids) for ids in completion_ids]))))
        return rewards

    settings = TrainingArguments(
        stage="UPO", loss_type="upo_offline" if pairs else "upo_online", term_weights=f"pair={a.pair if pairs else 0}",
        train_dataset_path=rows(processor, folder, pairs), output_dir=f"{folder}/{pairs}_{seed}", allow_base=True,
        num_generations=8, per_device_train_batch_size=64, max_completion_length=MOST, max_prompt_len=64,
        max_seq_len=128, max_steps=a.steps, learning_rate=2e-3, lr_scheduler_type="constant", logging_steps=a.steps,
        save_strategy="no", fine_tuning="Full", disable_tqdm=True, plot_loss=False, reward_check=False, seed=seed,
        dynamic_sample=False, num_completions_to_print=0,
    )  # fmt: skip
    paddle.seed(5)
    UPOTrainer(AutoModel.from_config("tiny-a"), settings, processor=processor, reward_funcs=paid).train()
    return np.array(seen)


def smooth(steps: np.ndarray) -> np.ndarray:
    """Means of five steps."""
    return np.stack([np.convolve(column, np.ones(5) / 5, "valid") for column in steps.T], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pair", type=float, default=1.0, help="weight of the pairs")
    parser.add_argument("--bonus", type=float, default=0.6)
    a = parser.parse_args()
    started, lines = time.process_time(), []
    with tempfile.TemporaryDirectory() as name:
        for seed in range(a.seeds):
            both, alone = (smooth(learned(a, Path(name), seed, pairs)) for pairs in (True, False))
            level = min(both[:, 0].max(), alone[:, 0].max())
            at = [curve[np.argmax(curve[:, 0] >= level - 1e-9), 1] for curve in (both, alone)]
            lines.append(
                f"seed {seed}: at the end reward, quality with pairs {both[-1, 0]:.3f}, {both[-1, 1]:.3f}, alone "
                f"{alone[-1, 0]:.3f}, {alone[-1, 1]:.3f}; at reward {level:.3f} quality {at[0]:.3f}, alone {at[1]:.3f}"
            )
    print("\n".join([*lines, f"{time.process_time() - started:.0f} s of CPU"]))


if __name__ == "__main__":
    main()
