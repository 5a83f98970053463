"""Where a step that learns from sampled answers spends this process's processor time.

Usage: python tests/bench/bench_step.py FILE.yaml [--steps 12] [key=value ...]
FILE: a run of stage RLVR, PPO or UPO. Processor seconds, which others on the machine do not change:
of making a round (sampling, judging, comparing) and of the steps on it, for each step the median
and the least, and answers and tokens of a step. `prefix_sharing=false` says what one prompt for all
its answers saves.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

from ernie_tune.cli.train import trainer_of
from ernie_tune.config.loader import load_config, split_overrides
from ernie_tune.train.loop import Loop
from ernie_tune.train.rollouts import Rollouts


def timed(kind: Any, name: str, seen: list[float]) -> None:
    """Note the processor seconds of each call of a method."""
    inner = getattr(kind, name)

    def outer(self: Any, *args: Any) -> Any:
        started = time.process_time()
        out = inner(self, *args)
        seen.append(time.process_time() - started)
        return out

    setattr(kind, name, outer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    a, rest = parser.parse_known_args()
    quiet = ["eval_dataset_path=null", "eval_strategy=no", "plot_loss=false", "disable_tqdm=true"]
    quiet += [f"max_steps={a.steps}", "save_strategy=no", "output_dir=output/bench_step", "overwrite_output_dir=true"]
    files, settings = split_overrides([*rest, *quiet])
    config = load_config(files[0], settings, for_training=True).config
    rounds: list[float] = []
    steps: list[float] = []
    timed(Rollouts, "make_round", rounds)
    timed(Loop, "_step", steps)
    trainer = trainer_of(config)(args=config)
    trainer.train()
    r = trainer.method.settings
    said = {"answers": r.prompts * r.num_generations, "tokens": trainer.loop.tokens // a.steps}
    for name, some in (("round", rounds), ("step", steps)):
        known = some[1:] or some  # the first makes ready
        said[f"{name} CPU s"] = {"median": round(float(np.median(known)), 3), "least": round(min(known), 3)}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
