"""From the settings of a run to the `LoraConfig` that they mean, so that who trains and who plans
memory read them alike.

Refuses to know: paddle, models, which experts a measurement of affinity picks (the caller passes
them).
"""

from __future__ import annotations

from typing import Any

from ernie_tune.config.language import say
from ernie_tune.config.sections_model import LoraArguments
from ernie_tune.peft.config import Expert, LoraConfig


def lora_config(
    c: LoraArguments, freeze_config: tuple[str, ...], base: str, seed: int, picked: list[Expert] | None = None
) -> LoraConfig:
    """The LoRA settings of a run on the model called `base`. `picked`: the experts that
    `lora_expert_affinity` chose. ValueError for a `lora_expert_list` of another form.
    """
    experts: Any = () if c.lora_experts == "none" else c.lora_experts
    if c.lora_expert_list:
        experts = [triple for item in c.lora_expert_list for triple in expert_range(item)]
    elif picked is not None:
        experts = picked
    return LoraConfig(
        r=c.lora_rank,
        lora_alpha=c.effective_alpha,
        target_modules=c.lora_target_modules,
        lora_dropout=c.lora_dropout,
        rslora=c.rslora,
        lora_plus_scale=c.lora_plus_scale,
        use_dora=c.dora,
        expert_targets=experts,
        freeze_config=freeze_config or _towers_frozen_by_default(c.lora_target_modules),
        base_model_name_or_path=base,
        seed=seed,
    )


def _towers_frozen_by_default(targets: tuple[str, ...]) -> tuple[str, ...]:
    """Adapters stay in the decoder unless the settings name modules of the towers themselves."""
    named = [t for t in targets if t not in ("all", "all-linear")]
    return () if named else ("freeze_vision", "freeze_aligner")


def expert_range(item: str) -> list[Expert]:
    """ "3:vision:0-7" -> its (layer, modality, expert) triples. Raises ValueError for another
    form.
    """
    layer, _, rest = item.partition(":")
    modality, _, experts = rest.partition(":")
    first, _, last = experts.partition("-")
    if not (layer.isdecimal() and modality in ("text", "vision") and first.isdecimal() and (last or first).isdecimal()):
        raise ValueError(
            say(
                f"lora_expert_list ({item!r}) must look like layer:text|vision:first-last, e.g. "
                "3:vision:0-7; correct it",
                f"lora_expert_list（{item!r}）须形如 layer:text|vision:first-last，例如 3:vision:0-7；请改正",
            )
        )
    return [(int(layer), modality, e) for e in range(int(first), int(last or first) + 1)]
