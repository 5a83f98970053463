"""What learning from answers of the step before last costs: a run of stage RLVR whose rounds are
sampled one step ahead, as they would be while the step before them is still under way.

Usage: python tests/bench/bench_stale.py FILE.yaml [key=value ...]
Round t + 1 is sampled by the policy that step t has not yet changed, so that its answers are one
version old when they are learned from. `old` is the policy at the moment of the update, and
`rollout_is: icepop` (unless another is given) leaves out tokens whose ratio to it has left the
bounds. A measurement of the method, not a way to train: nothing runs side by side, and a run that
was stopped does not resume.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from ernie_tune.config.loader import load_config, split_overrides
from ernie_tune.data.units import UnitBatch
from ernie_tune.train.rollouts import Rollouts
from ernie_tune.trainers.online import RLVRTrainer


class OneAhead(RLVRTrainer):
    """Each round is sampled before the one that it follows is learned from."""

    def prepare(self, *args: Any, **more: Any) -> Any:
        made = super().prepare(*args, **more)
        rollouts, method = self.method.rollouts, self.method  # type: ignore[attr-defined]

        def windows() -> Iterator[list[UnitBatch]]:
            ahead = Rollouts.make_round(rollouts)
            size = rollouts.settings.groups_per_batch
            while True:
                now, ahead = ahead, Rollouts.make_round(rollouts)
                batches = [rollouts.batch(now[i : i + size]) for i in range(0, len(now), size)]
                olds = [method._logp(batch) for batch in batches]
                ratio_N = np.concatenate(olds) - np.concatenate([b.columns["sampled_logp_N"] for b in batches])
                drifts.append(float(np.abs(ratio_N).mean()))
                yield [batch.with_columns(old_logp_N=old_N) for batch, old_N in zip(batches, olds, strict=True)]

        drifts: list[float] = []
        rollouts.windows, self.drifts = windows, drifts
        return made


def main() -> None:
    files, settings = split_overrides(sys.argv[1:])
    usual = [] if any(entry.name == "rollout_is" for entry in settings) else ["rollout_is=icepop"]
    config = load_config(files[0], [*settings, *split_overrides(usual)[1]], for_training=True).config
    trainer = OneAhead(args=config)
    trainer.train()
    print(f"mean |log ratio| of the policy to the one that sampled: {np.mean(trainer.drifts):.4f} nats a token")


if __name__ == "__main__":
    main()
