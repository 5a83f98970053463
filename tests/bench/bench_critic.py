"""How much of what sampled answers earn a critic could explain, and how much one does: many answers
to the same prompts, whose rewards differ by chance alone.

Usage: python tests/bench/bench_critic.py FILE.yaml [--prompts 40] [--samples 32] [key=value ...]
FILE: a run of stage PPO; its policy and rewards as they are before its first step. Prints for each
place in an answer the share of the rewards' variance (rewards as returns: gamma 1, no penalty)
between different beginnings (prompt and tokens so far), an estimate without bias of what a perfect
critic knows there; and of all tokens together, which `critic/vf_explained_var` is to be held to.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import numpy as np

from ernie_tune.config.loader import load_config, split_overrides
from ernie_tune.trainers.ppo import PPOTrainer

Known = dict[tuple[int, ...], list[float]]


def share_between(known: Known) -> tuple[float, float]:
    """(variance of the rewards of these states within a state, variance of them all), each per
    token; states that were seen once say nothing of the former and are taken as the others.
    """
    every = np.concatenate([np.array(rewards) for rewards in known.values()])
    seen = [(np.var(rewards, ddof=1), len(rewards)) for rewards in known.values() if len(rewards) > 1]
    within = sum(variance * count for variance, count in seen) / max(1, sum(count for _, count in seen))
    return float(within), float(np.var(every))


def states(ids: tuple[int, ...], prompt: int) -> Iterator[tuple[int, ...]]:
    """What is known before each of an answer's tokens."""
    return ((prompt, *ids[:t]) for t in range(len(ids)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--samples", type=int, default=32)
    a, rest = parser.parse_known_args()
    files, settings = split_overrides(rest)
    trainer = PPOTrainer(args=load_config(files[0], settings, for_training=True).config)
    rows = trainer.prompts
    some = [rows[i * len(rows) // a.prompts] for i in range(a.prompts)]
    groups = [g for k in range(0, len(some), 8) for g in trainer.score(trainer.rollout(some[k : k + 8], a.samples, k))]
    places: list[Known] = []
    for prompt, group in enumerate(groups):
        for answer, reward in zip(group.answers, group.reward_G.tolist(), strict=True):
            for t, state in enumerate(states(answer.token_ids, prompt)):
                places += [{}] if t == len(places) else []
                places[t].setdefault(state, []).append(reward)
    found = [share_between(known) for known in places]
    counts = np.array([sum(map(len, known.values())) for known in places], np.float64)
    whole = np.concatenate([np.array(rewards) for known in places for rewards in known.values()])
    within = float(np.dot(counts, [inside for inside, _ in found]) / counts.sum())
    out = {
        "answers": int(counts[0]),
        "reward": [round(float(whole.mean()), 3), round(float(whole.std()), 3)],
        "tokens": counts.astype(int).tolist(),
        "known before token": [round(1 - inside / every, 3) if every else None for inside, every in found],
        "a perfect critic explains": round(1 - within / float(np.var(whole)), 3),
    }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
