"""What to add to a model: one frozen dataclass a method, with the names that users of other
libraries know.

Refuses to know: paddle, models, files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ernie_tune.config.language import say
from ernie_tune.models.specs import MODALITIES
from ernie_tune.peft.parts import frozen_parts

EXPERT_WORDS = (*MODALITIES, "both", "shared")
Expert = tuple[int, str, int]  # layer, modality, expert


def _require(ok: bool, english: str, chinese: str) -> None:
    if not ok:
        raise ValueError(say(english, chinese))


def _tuple(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


@dataclass(frozen=True)
class LoraConfig:
    """h = W x + scaling * B A x, B zero at the start (2106.09685). Raises ValueError for values
    that cannot be meant.

    `lora_alpha` -1: twice the rank, or 4 with `rslora`. `target_modules`: see `targets.py`; empty,
    with no `expert_targets` either: attention and dense and shared feed-forward of the decoder, and
    every linear layer of the towers that `freeze_config` leaves open. `expert_targets`:
    "text", "vision", "both", "shared" (the shared experts only), or (layer, "text" | "vision",
    expert) triples, as `select_experts` gives.
    `lora_plus_scale`: learning rate of B over that of A (2402.12354). `use_dora`: train column
        magnitudes too (2402.09353).
    `modules_to_save`: modules (or suffixes of their names) that are trained in full, in a copy, and
        saved with the adapter.
    """

    r: int = 8
    lora_alpha: float = -1
    target_modules: Sequence[str] | str = ()
    lora_dropout: float = 0.0
    task_type: str = "CAUSAL_LM"
    bias: str = "none"
    rslora: bool = False
    lora_plus_scale: float = 1.0
    use_dora: bool = False
    expert_targets: str | Sequence[Expert] = ()
    modules_to_save: Sequence[str] | str = ()
    freeze_config: Sequence[str] | str = "freeze_vision freeze_aligner"
    base_model_name_or_path: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", _tuple(self.target_modules))
        object.__setattr__(self, "modules_to_save", _tuple(self.modules_to_save))
        if not isinstance(self.expert_targets, str):
            object.__setattr__(
                self, "expert_targets", tuple((int(a), str(b), int(c)) for a, b, c in self.expert_targets)
            )
        _require(
            self.r >= 1, f"r ({self.r}) must be at least 1; 8 and 16 are usual", f"r（{self.r}）至少为 1；常用 8 与 16"
        )
        _require(
            self.lora_alpha > 0 or self.lora_alpha == -1,
            f"lora_alpha ({self.lora_alpha}) must be above 0; use -1 for the default",
            f"lora_alpha（{self.lora_alpha}）须大于 0；默认值请用 -1",
        )
        _require(
            0 <= self.lora_dropout < 1,
            f"lora_dropout ({self.lora_dropout}) must be in [0, 1); 0 is none",
            f"lora_dropout（{self.lora_dropout}）须在 [0, 1) 内；0 为不使用",
        )
        _require(
            self.lora_plus_scale > 0,
            f"lora_plus_scale ({self.lora_plus_scale}) must be above 0; 1 is plain LoRA",
            f"lora_plus_scale（{self.lora_plus_scale}）须大于 0；1 即普通 LoRA",
        )
        _require(
            self.task_type == "CAUSAL_LM",
            f"task_type ({self.task_type!r}) must be 'CAUSAL_LM'; leave it out",
            f"task_type（{self.task_type!r}）须为 'CAUSAL_LM'；可省略",
        )
        _require(
            self.bias == "none",
            f"bias ({self.bias!r}) must be 'none': biases are frozen; use modules_to_save",
            f"bias（{self.bias!r}）须为 'none'：偏置不训练；请用 modules_to_save",
        )
        words = isinstance(self.expert_targets, str)
        _require(
            not words or self.expert_targets in EXPERT_WORDS,
            f"expert_targets ({self.expert_targets!r}) must be one of {EXPERT_WORDS} or a list of (layer, "
            "modality, expert)",
            f"expert_targets（{self.expert_targets!r}）须为 {EXPERT_WORDS} 之一，或由（层、模态、专家）组成的列表",
        )
        _require(
            not (self.use_dora and self.expert_targets and self.expert_targets != "shared"),
            f"use_dora (True) must not go with expert_targets ({self.expert_targets!r}); use plain LoRA for experts",
            f"use_dora（True）不能与 expert_targets（{self.expert_targets!r}）同用；专家请用普通 LoRA",
        )
        frozen_parts(self.freeze_config)

    @property
    def alpha(self) -> float:
        """`lora_alpha`, or what -1 stands for."""
        if self.lora_alpha != -1:
            return self.lora_alpha
        return 4 if self.rslora else 2 * self.r

    @property
    def scaling(self) -> float:
        """alpha / r, with rsLoRA alpha / sqrt(r) (2312.03732)."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


@dataclass(frozen=True)
class BottleneckConfig:
    """h + W_up gelu(W_down h) after the attention and/or the feed-forward of every decoder layer,
    W_up zero at the start (1902.00751).
    """

    width: int = 64
    after: Sequence[str] | str = ("attention", "mlp")
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "after", _tuple(self.after))
        _require(
            self.width >= 1,
            f"width ({self.width}) must be at least 1; 64 is usual",
            f"width（{self.width}）至少为 1；常用 64",
        )
        known = ("attention", "mlp")
        _require(
            bool(self.after) and set(self.after) <= set(known),
            f"after ({list(self.after)}) must name one or both of {known}; leave it out for both",
            f"after（{list(self.after)}）须为 {known} 之一或两者；省略即两者",
        )


@dataclass(frozen=True)
class PromptConfig:
    """k learned embeddings before every row (2104.08691). `encoder_width` above 0: P-tuning, the
    embeddings come from a small MLP of that width.

    `init_ids`: start from the embeddings of these tokens instead of random ones; as many as
    `num_virtual_tokens`.
    """

    num_virtual_tokens: int = 20
    encoder_width: int = 0
    init_ids: Sequence[int] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "init_ids", tuple(self.init_ids))
        _require(
            self.num_virtual_tokens >= 1,
            f"num_virtual_tokens ({self.num_virtual_tokens}) must be at least 1",
            f"num_virtual_tokens（{self.num_virtual_tokens}）至少为 1",
        )
        _require(
            self.encoder_width >= 0,
            f"encoder_width ({self.encoder_width}) must be at least 0; 0 is no encoder",
            f"encoder_width（{self.encoder_width}）至少为 0；0 即没有编码器",
        )
        _require(
            len(self.init_ids) in (0, self.num_virtual_tokens),
            f"init_ids ({len(self.init_ids)}) must be as many as num_virtual_tokens ({self.num_virtual_tokens}); "
            "repeat or cut them",
            f"init_ids（{len(self.init_ids)} 个）须与 num_virtual_tokens（{self.num_virtual_tokens}）一样多；请重复或截短",
        )


@dataclass(frozen=True)
class PrefixConfig:
    """k learned keys and values before every row, in every decoder layer (2101.00190, 2110.07602).
    The keys are not rotated, no position shifts.
    """

    num_virtual_tokens: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            self.num_virtual_tokens >= 1,
            f"num_virtual_tokens ({self.num_virtual_tokens}) must be at least 1",
            f"num_virtual_tokens（{self.num_virtual_tokens}）至少为 1",
        )


PeftConfig = LoraConfig | BottleneckConfig | PromptConfig | PrefixConfig
