"""The verbs that train and measure: train and its stages, eval.

Refuses to know how training works; paddle loads when a verb runs, after the settings are known to
be right.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from ernie_tune.checkpoint.lock import check_free
from ernie_tune.cli import workers
from ernie_tune.cli.doctor import installed
from ernie_tune.cli.verbs import file_and_settings
from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.cpu import while_paddle_loads
from ernie_tune.config.host_memory import free_addresses, free_memory
from ernie_tune.config.language import say, shown
from ernie_tune.config.loader import load_config, split_overrides
from ernie_tune.config.stages import STAGES
from ernie_tune.peft.packed_header import is_packed
from ernie_tune.plan.free import check_weights, shortage
from ernie_tune.plan.job import known_shape
from ernie_tune.plan.judgement import judged

ANSWERS_FILE = "eval_answers.jsonl"


def run(args: list[str]) -> int:
    """ernie-tune train FILE [key=value | --key value ...] [--dry-run] [--nproc N]

    Fine-tunes as the YAML file says; its stage names the method. The same command again goes on
    where the run stopped. --dry-run: settings, data, and one forward and backward of the heaviest
    batch, then stop. Where several cards are visible, or the degrees ask for it, one process a card
    is started; --nproc N: so many processes on this machine, on a CPU too. Several machines:
    NNODES, RANK, MASTER_ADDR, MASTER_PORT.
    """
    return _train(args)


def dpo(args: list[str]) -> int:
    """ernie-tune dpo FILE [key=value | --key value ...] [--dry-run]

    Learns from pairs of answers, rankings and ratings, as `ernie-tune train` with stage=DPO.
    loss_type: sigmoid, ipo, simpo, orpo, ...
    """
    return _train(args, "DPO")


def kto(args: list[str]) -> int:
    """ernie-tune kto FILE [key=value | --key value ...] [--dry-run]

    Learns from single answers called good or bad, as `ernie-tune train` with stage=KTO. loss_type:
    kto, bco, apo_zero_unpaired.
    """
    return _train(args, "KTO")


def upo(args: list[str]) -> int:
    """ernie-tune upo FILE [key=value | --key value ...] [--dry-run]

    Learns from pairs, rankings, ratings and labels together, as `ernie-tune train` with stage=UPO.
    loss_type: upo_hetero, mpo; upo_online, upo_group, upo_offline and dpo_aux sample answers to
    prompts that can be checked, and add pairs to the policy's own loss.
    """
    return _train(args, "UPO")


def reward(args: list[str]) -> int:
    """ernie-tune reward FILE [key=value | --key value ...] [--dry-run]

    Trains a reward model on pairs, rankings and ratings, as `ernie-tune train` with stage=RM.
    `ernie-tune score` applies it.

    ernie-tune reward test FILE [--samples N] [--rows N] [key=value | --key value ...]

    Tries the rewards of FILE (stage RLVR or PPO) before a run: right answers must earn 0.95 of what
    they can on average, what a policy would try instead nothing. Exit code 1 where a test fails.
    """
    if args[:1] == ["test"]:
        from ernie_tune.cli import reward_test

        return reward_test.run(args[1:])
    return _train(args, "RM")


def rlvr(args: list[str]) -> int:
    """ernie-tune rlvr FILE [key=value | --key value ...] [--dry-run]

    Samples answers, judges them and learns from what was better than expected, as
    `ernie-tune train` with stage=RLVR. loss_type: dapo, grpo, gspo, ...
    """
    return _train(args, "RLVR")


def ppo(args: list[str]) -> int:
    """ernie-tune ppo FILE [key=value | --key value ...] [--dry-run]

    Samples answers, judges them by a reward model, checkers or both, and learns from what was
    better than a critic expected, as `ernie-tune train` with stage=PPO. reward_model: a folder of
    `ernie-tune reward`.
    """
    return _train(args, "PPO")


def _train(args: list[str], stage: str = "") -> int:
    words, nproc = workers.split_nproc([*args, *([f"stage={stage}"] if stage else [])])
    dry_run = "--dry-run" in words
    config = _config([a for a in words if a != "--dry-run"])
    cards = workers.visible_cards(os.environ, installed("paddlepaddle-gpu"))
    start = workers.wanted(config.parallel, nproc, cards, os.environ)
    if start is not None:
        if not dry_run:
            # before the log folder of the run that is there is touched
            check_free(Path(config.save.output_dir))
        return workers.start(start, workers.log_folder(os.environ, config.save.output_dir), ["train", *words])
    if not cards and "PADDLE_TRAINER_ID" not in os.environ:  # one of several holds a part alone
        _check_memory(config)
    with while_paddle_loads():
        from ernie_tune.trainers.interrupts import Interrupted

    try:
        trainer_of(config)(args=config).train(dry_run=dry_run)
    except (FloatingPointError, Interrupted) as error:
        print(shown(error), file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 1
    return 0


def _check_memory(config: RunConfig) -> None:
    """ValueError for a run whose weights alone are more than what is free; a line for one that may
    turn out too large. (A process that the system ends cannot say why.)
    """
    model, free = known_shape(config.model.model_name_or_path), free_memory()
    if model is None or free is None:
        return
    told, certain = shortage(config, model, free, free_addresses())
    if certain:
        raise ValueError(told)
    if told:
        print(shown(told), file=sys.stderr)


def evaluate(args: list[str]) -> int:
    """ernie-tune eval FOLDER | FILE [key=value | --key value ...]

    Loss and scores of generated answers on the evaluation rows. FOLDER: the output_dir of a run,
    whose result is measured.
    FILE: a YAML file; the model that it names is measured. The answers are written to
    eval_answers.jsonl in output_dir.
    """
    config = _config([*args, *_result_of(args)])
    name = config.model.model_name_or_path
    model = known_shape(name)
    on_cpu = not workers.visible_cards(os.environ, installed("paddlepaddle-gpu"))
    if model is not None and on_cpu and not is_packed(Path(name)):
        check_weights(model, config.compute.weight_quantize_algo, free_memory())
    from ernie_tune.report.log import metrics_table

    answers = Path(config.save.output_dir) / ANSWERS_FILE
    for line in metrics_table("eval", trainer_of(config)(args=config).evaluate(answers)):
        print(line)
    if answers.is_file() and answers.stat().st_size:
        print(say(f"every answer: {answers}", f"全部回答：{answers}"))
    return 0


def _result_of(args: list[str]) -> list[str]:
    """The settings that name what a run left in the folder in `args`: a whole model, or an adapter;
    nothing for a file, or where they are given.
    """
    words, entries = split_overrides(args)
    folder = words[0] if len(words) == 1 and Path(words[0]).is_dir() else ""
    given = {entry.name for entry in entries}
    if not folder or given & {"model_name_or_path", "lora_path", "adapter_name_or_path"}:
        return []
    name = "model_name_or_path" if (Path(folder) / "config.json").is_file() else "lora_path"
    return [f"{name}={folder}", *([] if "output_dir" in given else [f"output_dir={folder}"])]


def trainer_of(config: RunConfig) -> Any:
    """The trainer of the stage, which loading the settings has found to be built."""
    module, _, name = STAGES[config.model.stage].trainer.partition(":")
    with while_paddle_loads():
        return vars(importlib.import_module(module))[name]


def _config(args: list[str]) -> RunConfig:
    path, overrides = file_and_settings(args)
    loaded = load_config(path, overrides, for_training=True)
    for note in (*loaded.notes, *judged(loaded, f"{path}:1", training=True)):
        print(shown(note), file=sys.stderr)
    return loaded.config
