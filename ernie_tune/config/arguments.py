"""Every setting of a run: frozen sections composed in `RunConfig`, and one flat table of all
settings with what is known of each.

Refuses to know: other spellings (aliases.py), where a value was written (loader.py), which values
fit together (checks.py), paddle.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ernie_tune.config.field import Setting, settings_of
from ernie_tune.config.sections_methods import (
    PictureArguments,
    PreferenceArguments,
    ReferenceArguments,
    SignalArguments,
)
from ernie_tune.config.sections_model import (
    ADDED,
    AddedArguments,
    DataArguments,
    FreezeArguments,
    LoraArguments,
    MediaArguments,
    ModelArguments,
)
from ernie_tune.config.sections_online import (
    CriticArguments,
    MismatchArguments,
    PairArguments,
    PolicyArguments,
    RolloutArguments,
    TeacherArguments,
)
from ernie_tune.config.sections_run import (
    ComputeArguments,
    EvalArguments,
    LogArguments,
    OptimArguments,
    ParallelArguments,
    SaveArguments,
    TrainArguments,
)
from ernie_tune.config.sections_sampling import EvidenceArguments, SamplingArguments, WatchArguments
from ernie_tune.config.stages import STAGES, samples

__all__ = [
    "ADDED",
    "SETTINGS",
    "VARYING",
    "AddedArguments",
    "LoraArguments",
    "ParallelArguments",
    "RunConfig",
    "Setting",
    "build",
    "default_for",
    "shapes_weights",
]

VARYING = (
    "learning_rate",
    "per_device_train_batch_size",
    "prefix_sharing",
    "beta",
    "metric_for_best_model",
    "num_generations",
)  # defaults that `default_for` decides
# Sections whose settings belong together at every stage that compares answers: there, one that the
# stage does not read is a mistake to point at.
KINDRED = ("preference", "picture", "reference")
SAMPLING = (
    "rollout",
    "sampling",
    "watch",
    "policy",
    "mismatch",
    "critic",
    "pairs",
    "teacher",
)  # sections of runs that sample answers


@dataclass(frozen=True)
class RunConfig:
    """One run, resolved: no setting is missing and none depends on how it was spelled."""

    data: DataArguments = field(default_factory=DataArguments)
    media: MediaArguments = field(default_factory=MediaArguments)
    model: ModelArguments = field(default_factory=ModelArguments)
    lora: LoraArguments = field(default_factory=LoraArguments)
    added: AddedArguments = field(default_factory=AddedArguments)
    freeze: FreezeArguments = field(default_factory=FreezeArguments)
    train: TrainArguments = field(default_factory=TrainArguments)
    optim: OptimArguments = field(default_factory=OptimArguments)
    compute: ComputeArguments = field(default_factory=ComputeArguments)
    eval: EvalArguments = field(default_factory=EvalArguments)
    save: SaveArguments = field(default_factory=SaveArguments)
    log: LogArguments = field(default_factory=LogArguments)
    parallel: ParallelArguments = field(default_factory=ParallelArguments)
    preference: PreferenceArguments = field(default_factory=PreferenceArguments)
    picture: PictureArguments = field(default_factory=PictureArguments)
    reference: ReferenceArguments = field(default_factory=ReferenceArguments)
    signals: SignalArguments = field(default_factory=SignalArguments)
    rollout: RolloutArguments = field(default_factory=RolloutArguments)
    sampling: SamplingArguments = field(default_factory=SamplingArguments)
    evidence: EvidenceArguments = field(default_factory=EvidenceArguments)
    watch: WatchArguments = field(default_factory=WatchArguments)
    policy: PolicyArguments = field(default_factory=PolicyArguments)
    mismatch: MismatchArguments = field(default_factory=MismatchArguments)
    critic: CriticArguments = field(default_factory=CriticArguments)
    pairs: PairArguments = field(default_factory=PairArguments)
    teacher: TeacherArguments = field(default_factory=TeacherArguments)

    @property
    def samples(self) -> bool:
        """Whether answers are sampled while the run learns."""
        return samples(self.model.stage, self.preference.loss_type)

    def applies(self, section: str) -> bool:
        """Whether settings of `section` have an effect at this stage and method."""
        stage, method = self.model.stage, self.model.fine_tuning
        if section in KINDRED and STAGES[stage].compares:
            return True
        if section in SAMPLING and not self.samples:
            return False
        return any(s.read_at(stage, method) for s in SETTINGS.values() if s.section == section)

    def reads(self, name: str) -> bool:
        """Whether this stage, method and preset read the setting."""
        setting = SETTINGS[name]
        if setting.section in SAMPLING and not self.samples:
            return False
        return setting.read_at(self.model.stage, self.model.fine_tuning)

    def effective(self) -> dict[str, Any]:
        """The settings by name that this stage, method and preset read."""
        return {name: value for name, value in self.flat().items() if self.reads(name)}

    def flat(self) -> dict[str, Any]:
        """Every setting by name."""
        return {name: vars(vars(self)[s.section])[name] for name, s in SETTINGS.items()}


SETTINGS: Mapping[str, Setting] = {
    setting.name: setting
    for section, cls in typing.get_type_hints(RunConfig).items()
    for setting in settings_of(section, cls)
}


def shapes_weights(name: str) -> bool:
    """Whether another value of the setting can give another loss or other trained weights, beyond
    rounding. Degrees of parallelism, what is saved, logged and measured, and what trades time for
    memory cannot; rows, lengths, seeds, the method and its rates can, and so does what ends a run
    or chooses its checkpoint. KeyError for a name that is no setting.
    """
    return SETTINGS[name].about.shapes


def default_for(name: str, stage: str, method: str, losses: Sequence[str] = ()) -> Any:
    """The value that a run of this stage, method and `loss_type` takes where nobody wrote one."""
    if name == "learning_rate":
        return STAGES[stage].rates[method not in ("Full", "Freeze")]
    if name == "per_device_train_batch_size":
        if samples(stage, losses):
            return 8  # answers: one group of the usual size
        # its baseline compares the answers of a step with one another
        return 2 if stage == "KTO" else 1
    if name == "metric_for_best_model":
        return "reward" if samples(stage, losses) else SETTINGS[name].default
    if name == "beta":
        return 0.0 if STAGES[stage].samples else SETTINGS[name].default
    if name == "num_generations" and stage == "PPO":
        return 1  # a critic says what was expected, not the prompt's other answers
    if name == "prefix_sharing":  # virtual tokens begin every dialogue
        return method not in ("Prompt", "PTuning", "Prefix")
    return SETTINGS[name].default


def build(values: dict[str, Any]) -> RunConfig:
    """The configuration with these settings; the others, and those of sections without effect, at
    their defaults. Values are converted, names ours.
    """
    classes = typing.get_type_hints(RunConfig)
    chosen: dict[str, dict[str, Any]] = {section: {} for section in classes}
    for name, value in values.items():
        chosen[SETTINGS[name].section][name] = value
    config = RunConfig(**{section: cls(**chosen[section]) for section, cls in classes.items()})
    return dataclasses.replace(
        config, **{section: cls() for section, cls in classes.items() if not config.applies(section)}
    )
