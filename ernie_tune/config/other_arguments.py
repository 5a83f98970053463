"""`TrainingArguments` of PaddleNLP, PaddleFormers or transformers, as an object: taken under their
own names, and given back with what was changed.

Known by its fields; no other library is imported. Refuses to know: files, models.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from typing import Any

from ernie_tune.config.aliases import EXPANDED, RENAMED
from ernie_tune.config.arguments import SETTINGS, RunConfig
from ernie_tune.config.language import say
from ernie_tune.config.training_arguments import TrainingArguments

# What they make of other fields by themselves, or what only their trainer could do.
_THEIR_OWN = frozenset(
    {"logging_dir", "run_name", "output_signal_dir", "device", "local_rank", "report_to", "scale_loss"}
    | {"fp16_opt_level", "hybrid_parallel_topo_order", "fa_version"}
)
_NOTHING: tuple[Any, ...] = (None, -1, "", [], {})  # of a field of theirs: nobody has set it


def is_arguments(given: object) -> bool:
    """Whether it is another library's settings of a run."""
    has = ("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps")
    return (
        dataclasses.is_dataclass(given)
        and not isinstance(given, RunConfig | type)
        and all(hasattr(given, n) for n in has)
    )


def take_arguments(theirs: Any, **settings: Any) -> TrainingArguments:
    """Ours with the values of theirs: all that we know of, and of the rest what differs from its
    default, which is noted or refused as in a YAML file. `settings`: ours that they have no field
    for (stage, fine_tuning) or that replace theirs.

    Raises ValueError as `TrainingArguments`.
    """
    given = {name: value for name, value in _told(theirs).items() if _is_meant(theirs, name, value)}
    reports = [one for one in getattr(theirs, "report_to", None) or [] if one not in ("none", "all")]
    mixed = {"fine_tuning": "Full", "report_to": reports, **given}
    replaced = {RENAMED.get(name, name) for name in settings}
    mixed = {name: value for name, value in mixed.items() if RENAMED.get(name, name) not in replaced}
    return TrainingArguments(**mixed, **settings)


def give_back_arguments(ours: RunConfig, theirs: Any, **settings: Any) -> Any:
    """A copy of theirs in which the fields stand that ours has changed since `take_arguments`
    (`settings` as there); without a change, equal to theirs.
    """
    out = copy.copy(theirs)
    before, now = take_arguments(theirs, **settings).flat(), ours.flat()
    fields = {field.name for field in dataclasses.fields(theirs)}
    for name in [name for name in now if name in before and now[name] != before[name]]:
        spelt = [n for n in (name, *(other for other, own in RENAMED.items() if own == name)) if n in fields]
        if not spelt:
            raise ValueError(
                say(
                    f"{name} ({now[name]}) must be a field of their {type(theirs).__name__} to be given back; set it in ours",
                    f"{name}（{now[name]}）须为其 {type(theirs).__name__} 的字段才能交还；请在本工具中设置",
                )
            )
        setattr(out, spelt[0], _as_theirs(getattr(theirs, spelt[0]), now[name]))
    return out


def _told(theirs: Any) -> dict[str, Any]:
    return {field.name: plain(getattr(theirs, field.name)) for field in dataclasses.fields(theirs) if field.init}


def plain(value: Any) -> Any:
    """Members of enumerations as their values, tuples as lists."""
    if isinstance(value, enum.Enum):
        return value.value
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def _is_meant(theirs: Any, name: str, value: Any) -> bool:
    if name in _THEIR_OWN or value in _NOTHING or isinstance(value, dict):
        return False
    field = next(field for field in dataclasses.fields(theirs) if field.name == name)
    known = name in SETTINGS or name in RENAMED or name in EXPANDED
    if field.default is not dataclasses.MISSING:
        default = field.default
    else:
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    return known or value != plain(default)


def _as_theirs(before: Any, value: Any) -> Any:
    """In the type that the field had: a member of an enumeration, a list."""
    if isinstance(before, enum.Enum):
        return type(before)(value)
    return list(value) if isinstance(value, tuple) else value
