"""The verbs that train and measure: train, eval, demo.

Refuses to know how training works; paddle loads when a verb runs, after the settings are known to be right.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ernie_tune.cli import workers
from ernie_tune.cli.doctor import installed
from ernie_tune.cli.verbs import UsageError, file_and_settings
from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.loader import load_config

DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "sft.yaml"


def run(args: list[str]) -> int:
    """ernie-tune train FILE [key=value | --key value ...] [--dry-run] [--nproc N]

    Fine-tunes as the YAML file says. The same command again goes on where the run stopped. --dry-run: settings, data, and one
    forward and backward of the heaviest batch, then stop. Where several cards are visible, or the degrees ask for it, one process
    a card is started; --nproc N: so many processes on this machine, on a CPU too. Several machines: NNODES, RANK, MASTER_ADDR, MASTER_PORT.
    """
    words, nproc = workers.split_nproc(args)
    dry_run = "--dry-run" in words
    config = _config([a for a in words if a != "--dry-run"])
    cards = workers.visible_cards(os.environ, installed("paddlepaddle-gpu"))
    start = workers.wanted(config.parallel, nproc, cards, os.environ)
    if start is not None:
        return workers.start(start, workers.log_folder(os.environ, config.save.output_dir), ["train", *words])
    from ernie_tune.trainers.base import Interrupted
    from ernie_tune.trainers.sft import SFTTrainer

    try:
        SFTTrainer(args=config).train(dry_run=dry_run)
    except (FloatingPointError, Interrupted) as error:
        print(error, file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 1
    return 0


def evaluate(args: list[str]) -> int:
    """ernie-tune eval FILE [key=value | --key value ...]

    Loss and scores of generated answers on the evaluation rows of the YAML file, for the model that it names, or for the
    trained one with model_name_or_path=output_dir (Full) or lora_path=output_dir (LoRA).
    """
    config = _config(args)
    from ernie_tune.train.log import metrics_table
    from ernie_tune.trainers.sft import SFTTrainer

    for line in metrics_table("eval", SFTTrainer(args=config).evaluate()):
        print(line)
    return 0


def demo(args: list[str]) -> int:
    """ernie-tune demo [key=value | --key value ...]

    A small ERNIE-4.5-VL with fresh weights learns to read handwritten digits (examples/digits), on the CPU, in a few minutes.
    """
    if not DIGITS.is_file():
        raise UsageError(
            f"demo needs examples/digits of the source tree, not found at {DIGITS.parent}; clone the repository and install it with pip install -e ."
        )
    return run([str(DIGITS), *args])


def _config(args: list[str]) -> RunConfig:
    path, overrides = file_and_settings(args)
    loaded = load_config(path, overrides, for_training=True)
    for note in loaded.notes:
        print(note, file=sys.stderr)
    return loaded.config
