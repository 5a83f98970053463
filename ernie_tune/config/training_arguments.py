"""`TrainingArguments`: settings from Python, under every name that YAML takes.

Refuses to know: files, model and data objects (the trainer takes those), paddle.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ernie_tune.config.arguments import SETTINGS, RunConfig
from ernie_tune.config.convert import did_you_mean, to_raw
from ernie_tune.config.loader import Entry, resolve

_PLACE = "TrainingArguments"


class TrainingArguments(RunConfig):
    """Settings from Python under the names that HF, PaddleNLP and the other tools use.

    `TrainingArguments(per_device_train_batch_size=1, gradient_accumulation_steps=4,
    learning_rate=2e-4, num_train_epochs=3)`. It is a `RunConfig`; every setting can also be read
    flat: `args.learning_rate`. Raises ValueError for an unknown name, a wrong value, or settings
    that do not fit.
    """

    def __init__(self, output_dir: str | Path | None = None, **settings: Any) -> None:
        if output_dir is not None:
            settings["output_dir"] = output_dir
        loaded = resolve([[Entry(name, to_raw(name, value), _PLACE) for name, value in settings.items()]], _PLACE)
        vars(self).update(vars(loaded.config))
        for note in loaded.notes:
            warnings.warn(note, stacklevel=2)

    def __getattr__(self, name: str) -> Any:
        if name not in SETTINGS:
            raise AttributeError(f"TrainingArguments has no setting {name!r}{did_you_mean(name, SETTINGS)}")
        return self.flat()[name]


class GRPOConfig(TrainingArguments):
    """TRL's name for the settings of a run that samples answers: stage RLVR, all weights trained
    unless `fine_tuning` says otherwise.
    """

    def __init__(self, output_dir: str | Path | None = None, **settings: Any) -> None:
        super().__init__(output_dir, **{"stage": "RLVR", "fine_tuning": "Full", **settings})


class PPOConfig(TrainingArguments):
    """TRL's name for the settings of a run with a critic: stage PPO, all weights trained unless
    `fine_tuning` says otherwise.
    """

    def __init__(self, output_dir: str | Path | None = None, **settings: Any) -> None:
        super().__init__(output_dir, **{"stage": "PPO", "fine_tuning": "Full", **settings})
