"""Partial fine-tuning: which parameters of the model itself are trained, by layer, by part, or by
pattern.

Refuses to know: adapters, optimizers.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddle import Tensor, nn

from ernie_tune.config.language import say
from ernie_tune.models.ernie import ErnieModel, Recompute
from ernie_tune.peft.parts import PARTS, TOWERS, frozen_parts, part_of

_LAYERS = re.compile(r"(?:layers?[._ ]?)?(\d+)(?:\s*-\s*(\d+))?")
_KEYS = ("trainable_layers", "frozen_layers")


@dataclass(frozen=True)
class FreezeSpec:
    """What is trained. An item is a decoder layer (3, "3", "layers.3", "0-5"), a part ("attention",
    "router", "vision experts", or "llm", "vision", "aligner"), the start of a parameter's name, or
    a regular expression of whole names. Empty: everything is trained (full fine-tuning).

    With `trainable` only these are trained, else all but `frozen`; the two must not overlap.
    `freeze_config` ("freeze_vision freeze_aligner ...") is taken away from either.
    """

    trainable: Sequence[str | int] = ()
    frozen: Sequence[str | int] = ()
    freeze_config: str | Sequence[str] = ""

    @classmethod
    def from_json(cls, file: str | Path) -> FreezeSpec:
        """{"trainable_layers": [...], "frozen_layers": [...]}. ValueError, naming the file, for
        other content.
        """
        try:
            raw = json.loads(Path(file).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                say(
                    f"{file} must be JSON ({error}); see trainable_layers and frozen_layers",
                    f"{file} 须为 JSON（{error}）；参见 trainable_layers 与 frozen_layers",
                )
            ) from error
        lists = isinstance(raw, dict) and all(isinstance(raw.get(key, []), list) for key in _KEYS)
        if not lists or not raw or set(raw) - set(_KEYS):
            raise ValueError(
                say(
                    f'{file} must be {{"trainable_layers": [...], "frozen_layers": [...]}} (one of them may be missing); correct its keys',
                    f'{file} 须为 {{"trainable_layers": [...], "frozen_layers": [...]}}（可缺其一）；请改正键名',
                )
            )
        return cls(tuple(raw.get(_KEYS[0], ())), tuple(raw.get(_KEYS[1], ())))

    def apply(self, model: ErnieModel) -> int:
        """Set every parameter to trained or frozen; returns the number of trained values.
        Correction biases are moved by their own rule and never trained.

        Raises ValueError for an item that matches nothing or a name that is in both lists, and
        where nothing would be trained.
        """
        names = [name for name, _ in model.named_parameters() if "e_score_correction_bias" not in name]
        wanted = _names(self.trainable, names, "trainable_layers") if self.trainable else set(names)
        frozen = _names(self.frozen, names, "frozen_layers")
        both = [name for name in names if self.trainable and name in wanted and name in frozen]
        if both:
            raise ValueError(
                say(
                    f"trainable_layers and frozen_layers must not share parameters, but both hold {both[0]} ("
                    f"{len(both)} in all); take it out of one",
                    f"trainable_layers 与 frozen_layers 不能包含相同的参数，但两者都有 {both[0]}（共 "
                    f"{len(both)} 个）；请从其一去掉",
                )
            )
        parts = frozen_parts(self.freeze_config)
        trained = {name for name in wanted - frozen if part_of(name) not in parts}
        if not trained:
            raise ValueError(
                say(
                    f"freeze settings (trainable_layers {list(self.trainable)}, frozen_layers "
                    f"{list(self.frozen)}, freeze_config {self.freeze_config!r}) must leave something to "
                    "train; free a part",
                    f"冻结设置（trainable_layers {list(self.trainable)}、frozen_layers {list(self.frozen)}"
                    f"、freeze_config {self.freeze_config!r}）须留下可训练的部分；请放开一部分",
                )
            )
        total = 0
        for name, value in model.named_parameters():
            value.stop_gradient = name not in trained
            total += int(value.size) if name in trained else 0
        return total


def _names(items: Sequence[str | int], names: Sequence[str], field: str) -> set[str]:
    """The parameters that the items mean."""
    found: set[str] = set()
    for item in items:
        matches = _matcher(str(item).strip(), field)
        matched = {name for name in names if matches(name)}
        if not matched:
            known = [*PARTS, *TOWERS, *dict.fromkeys(name.rsplit(".", 1)[0] for name in names)]
            close = difflib.get_close_matches(str(item), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"use layer numbers, names, or {[*PARTS, *TOWERS]}"
            raise ValueError(
                say(
                    f"{field} ({item!r}) must match a parameter of the model; {hint}",
                    f"{field}（{item!r}）须与模型的某个参数匹配；{hint}",
                )
            )
        found |= matched
    return found


def _matcher(item: str, field: str) -> Callable[[str], bool]:
    layers = _LAYERS.fullmatch(item)
    if layers:
        first, last = int(layers.group(1)), int(layers.group(2) or layers.group(1))
        wanted = {str(i) for i in range(first, last + 1)}
        return lambda name: name.startswith("layers.") and name.split(".")[1] in wanted
    parts = TOWERS.get(item, (item.replace("_", " "),))
    if parts[0] in PARTS:
        return lambda name: part_of(name) in parts
    try:
        pattern = re.compile(item)
    except re.error as error:
        raise ValueError(
            say(
                f"{field} ({item!r}) must be a name or a valid regular expression ({error}); escape its "
                "special characters",
                f"{field}（{item!r}）须为名称或合法的正则表达式（{error}）；请转义特殊字符",
            )
        ) from error
    return lambda name: name.startswith(item) or pattern.fullmatch(name) is not None


def opened(recompute: Recompute) -> Recompute:
    """`recompute` for a model whose lower layers are frozen.

    It returns a detached output where its input needs no gradient, and then nothing in that layer
    trains (trap p of Fleet). So the input of a layer with trained parameters is made to need one,
    and a frozen layer below the first of these runs without being recomputed.
    """

    def run(layer: nn.Layer, x: Tensor, *rest: Any) -> Tensor:
        if x.stop_gradient:
            if all(value.stop_gradient for value in layer.parameters()):
                return layer(x, *rest)
            x = x.detach()
            x.stop_gradient = False
        return recompute(layer, x, *rest)

    return run
