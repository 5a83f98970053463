"""From what users write (`query_key_value`, `q_proj`, `.*q_proj.*`, `all-linear`, `text_experts`)
to the modules that get an adapter.

Works on names alone. Refuses to know: paddle, what is done with the modules.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

from ernie_tune.config.language import say
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.specs import MODALITIES
from ernie_tune.peft.config import Expert, LoraConfig
from ernie_tune.peft.parts import frozen_parts, part_of

_L = r"layers\.\d+\."
# Words for groups of linear layers. "query_key_value", "qkv_proj" and "up_gate_proj" are the fused
# layers of other ports of this model.
WORDS: dict[str, str] = {
    "query_key_value": _L + r"self_attn\.[qkv]_proj",
    "qkv_proj": _L + r"self_attn\.[qkv]_proj",
    "attention": _L + r"self_attn\.\w+",
    "mlp": _L + r"mlp\.\w+_proj",
    "shared_experts": _L + r"mlp\.shared_experts\.\w+",
    "up_gate_proj": _L + r"mlp\.(shared_experts\.)?(up|gate)_proj",
    "vision": r"vision_model\.blocks\..*",
    "resampler": r"resampler_model\..*",
    "all-linear": rf"({_L}|vision_model\.blocks\.|resampler_model\.).*",
    "all": rf"({_L}|vision_model\.blocks\.|resampler_model\.).*",
}
EXPERT_TARGETS = {"experts": "both", "text_experts": "text", "vision_experts": "vision"}
_DEFAULT = ("attention", "mlp", "shared_experts", "vision", "resampler")
_FUSED = re.compile(r"\.\*(query_key_value|qkv_proj|up_gate_proj)\.\*")  # as PaddleNLP writes them
_META = re.compile(r"[\\^$*+?\[\]|(){}]")
Experts = dict[tuple[int, int], tuple[int, ...]]  # (layer, modality index) -> experts, ascending


def linear_targets(config: LoraConfig, linears: Sequence[str]) -> list[str]:
    """The names in `linears`, in their order, that `config` targets: words of `WORDS`, names, their
    last parts, or regular expressions of whole names.

    Parts frozen by `freeze_config` are left out. ValueError for an item that matches nothing, or
    only frozen parts.
    """
    frozen = frozen_parts(config.freeze_config)
    items = [item for item in config.target_modules if item not in EXPERT_TARGETS]
    if config.expert_targets == "shared":
        items.append("shared_experts")
    defaults = not config.target_modules and not config.expert_targets
    chosen: set[str] = set()
    for item in _DEFAULT if defaults else items:
        matched = [name for name in linears if _matches(item, name)]
        allowed = [name for name in matched if part_of(name) not in frozen]
        if not allowed and not defaults:
            raise ValueError(_nothing(item, matched, linears))
        chosen.update(allowed)
    return [name for name in linears if name in chosen]


def _matches(item: str, name: str) -> bool:
    fused = _FUSED.fullmatch(item)
    word = fused.group(1) if fused else item
    if word in WORDS:
        return re.fullmatch(WORDS[word], name) is not None
    if name == item or name.endswith("." + item):
        return True
    if not _META.search(item):
        return False
    try:
        return re.fullmatch(item, name) is not None
    except re.error as error:
        raise ValueError(
            say(
                f"target_modules ({item!r}) must be a name or a valid regular expression ({error}); "
                "escape its special characters",
                f"target_modules（{item!r}）须为名称或合法的正则表达式（{error}）；请转义特殊字符",
            )
        ) from error


def _nothing(item: str, frozen_matches: Sequence[str], names: Collection[str]) -> str:
    if frozen_matches:
        return (
            f"target_modules ({item!r}) must match a layer that is not frozen, but matches only {frozen_matches[0]} and the like; "
            "take their part out of freeze_config"
        )
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
    known = [*WORDS, *EXPERT_TARGETS, *leaves]
    close = difflib.get_close_matches(item.strip(".*"), known, n=1)
    hint = (
        f"did you mean {close[0]!r}?" if close else "choose from these, or give a regular expression of the whole name"
    )
    return f"target_modules ({item!r}) must match a linear layer: there are {leaves} and the words {[*WORDS, *EXPERT_TARGETS]}; {hint}"


def modules_named(items: Sequence[str], modules: Sequence[str]) -> list[str]:
    """The modules whose name is one of `items`, ends with it, or lies inside it. ValueError for an
    item that matches none.
    """
    chosen: set[str] = set()
    for item in items:
        matched = [n for n in modules if n == item or n.endswith("." + item) or n.startswith(item + ".")]
        if not matched:
            leaves = sorted({part for name in modules for part in name.split(".") if not part.isdigit()})
            close = difflib.get_close_matches(item, leaves, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {leaves}"
            raise ValueError(
                say(
                    f"modules_to_save ({item!r}) must name a module that has parameters; {hint}",
                    f"modules_to_save（{item!r}）须为有参数的模块；{hint}",
                )
            )
        chosen.update(matched)
    return [name for name in modules if name in chosen]


def expert_targets(config: LoraConfig, model: ModelConfig) -> Experts:
    """The experts that get adapters, by (layer, modality). ValueError for experts that the model
    does not have or `freeze_config` freezes.
    """
    wanted = _expert_list(config, model)
    moe = model.moe
    chosen: dict[tuple[int, int], set[int]] = {}
    frozen = frozen_parts(config.freeze_config)
    for layer, modality, expert in wanted:
        if moe is None or layer not in moe.layer_indices or modality not in MODALITIES[: moe.num_modalities]:
            have = None if moe is None else (list(moe.layer_indices), list(MODALITIES[: moe.num_modalities]))
            raise ValueError(
                say(
                    f"expert_targets ({layer}, {modality!r}, {expert}) must name a sparse layer and a "
                    f"modality of the model ({have}); correct the list",
                    f"expert_targets（{layer}、{modality!r}、{expert}）须为模型的稀疏层与模态（{have}）；请改正列表",
                )
            )
        if not 0 <= expert < moe.num_experts:
            raise ValueError(
                say(
                    f"expert_targets ({layer}, {modality!r}, {expert}) must be below num_experts ("
                    f"{moe.num_experts}); correct the list",
                    f"expert_targets（{layer}、{modality!r}、{expert}）须小于专家数（{moe.num_experts}）；请改正列表",
                )
            )
        if f"{modality} experts" in frozen:
            raise ValueError(
                say(
                    f"expert_targets ({modality!r}) must not be frozen by freeze_config ("
                    f"{config.freeze_config}); drop one of the two",
                    f"expert_targets（{modality!r}）不能被 freeze_config（{config.freeze_config}）冻结；请去掉其一",
                )
            )
        chosen.setdefault((layer, MODALITIES.index(modality)), set()).add(expert)
    return {key: tuple(sorted(chosen[key])) for key in sorted(chosen)}


def _expert_list(config: LoraConfig, model: ModelConfig) -> list[Expert]:
    explicit = [] if isinstance(config.expert_targets, str) else list(config.expert_targets)
    words = [EXPERT_TARGETS[item] for item in config.target_modules if item in EXPERT_TARGETS]
    if isinstance(config.expert_targets, str) and config.expert_targets != "shared":
        words.append(config.expert_targets)
    if words and model.moe is None:
        raise ValueError(
            say(
                f"expert_targets ({words[0]!r}) must be empty for a model without experts; drop it",
                f"模型没有专家，expert_targets（{words[0]!r}）须为空；请去掉",
            )
        )
    for word in words:
        if model.moe is not None:
            present = MODALITIES[: model.moe.num_modalities]
            modalities = present if word == "both" else (word,)
            explicit += [
                (layer, modality, expert)
                for layer in model.moe.layer_indices
                for modality in modalities
                for expert in range(model.moe.num_experts)
            ]
    return explicit
