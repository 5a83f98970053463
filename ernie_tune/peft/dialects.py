"""LoRA tensors as other libraries name and lay them out: PEFT on transformers,
and PaddleNLP. Names and arrays only.

Ours: `<module>.lora_A` [I, r], `<module>.lora_B` [r, O], `<module>.magnitude` [O]; of an expert
`<product>.<expert>.lora_A`; parameters trained in full under their own name. Legend: I input, O
output width, r rank, E experts of one modality. Refuses to know: files, paddle, settings but the
rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.specs import MODALITIES, parameter_specs

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
PRODUCT = "_product"  # `models.moe.Experts` multiplies `x_proj` in its sublayer `x_product`
FACTORS = ("lora_A", "lora_B", "magnitude")
_PEFT_PREFIX = "base_model.model."
_PEFT_FACTORS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_EXPERT = re.compile(r"(layers\.(\d+)\.mlp\.(\w+)_experts\.\w+_product)\.(\d+)\.(lora_[AB])")

# kept in another form by transformers
_ROUTED = re.compile(r"\.mlp\.(gate|moe_statics|text_experts|vision_experts)\.")

_NO_LINEAR = re.compile(r"embed_tokens\.|lm_head\.|layers\.\d+\.mlp\.gate\.")


def modules(config: ModelConfig) -> list[str]:
    """Every module that can have a LoRA adapter: linear layers, and the two products of each expert
    stack.
    """
    names = []
    for name, spec in parameter_specs(config).items():
        if len(spec.shape) == 3:
            names.append(name.removesuffix("_proj") + PRODUCT)
        elif len(spec.shape) == 2 and name.endswith(".weight") and not _NO_LINEAR.match(name):
            names.append(name.removesuffix(".weight"))
    return names


def shape_of(module: str, config: ModelConfig) -> tuple[int, int]:
    """(I, O) of a module's matrix; of one expert's where they are stacked."""
    specs = parameter_specs(config)
    name = module.removesuffix(PRODUCT) + "_proj" if module.endswith(PRODUCT) else f"{module}.weight"
    n_in, n_out = specs[name].shape[-2:]
    return n_in, n_out


def split_expert(key: str) -> tuple[str, int, str, int, str] | None:
    """(product, layer, modality, expert, factor) of an expert's key, None for others."""
    match = _EXPERT.fullmatch(key)
    return (match[1], int(match[2]), match[3], int(match[4]), match[5]) if match else None


# --- PEFT on transformers -------------------------------------------------------------------------


def hf_name(name: str, config: ModelConfig) -> str:
    """The live transformers name of a module or parameter of ours; an expert product gives the
    fused parameter.
    """
    decoder = "model.language_model." if config.vision else "model."
    renames = (
        (r"^vision_model\.", "model.vision_tower."),
        (r"^resampler_model\.", "model.resampler_model."),
        (r"^(embed_tokens|layers|norm)\b", rf"{decoder}\1"),
        (r"_linear\.0\b", "_linear.fc1"),
        (r"_linear\.2\b", "_linear.fc2"),
        (r"_linear\.3\b", "_linear.ln"),
        (r"\.up_gate_product$", ".gate_up_proj"),
        (r"\.down_product$", ".down_proj"),
        (r"\.(text|vision)_experts\b", r".\1_moe.experts" if config.vision else ".experts"),
    )
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def hf_targets(tensors: Tensors, config: ModelConfig) -> tuple[list[str], list[str]]:
    """`target_modules` and `target_parameters` of these tensors, as whole names."""
    linear, stacked = [], []
    for key in tensors:
        owner, _, factor = key.rpartition(".")
        expert = split_expert(key)
        if expert:
            stacked.append(hf_name(expert[0], config))
        elif factor in FACTORS:
            linear.append(hf_name(owner, config))
    return list(dict.fromkeys(linear)), list(dict.fromkeys(stacked))


def to_peft(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Keys of `adapter_model.safetensors`: torch's [out, in]; the experts of a stack side by side,
    those without an adapter as zeros.

    PEFT wraps the parameters of a module in their order there: where both of a stack are adapted,
    gate_up_proj is inside and has one `base_layer` more.
    """
    out: Tensors = {}
    stacks: dict[str, dict[tuple[int, str], Array]] = {}
    for key, value in tensors.items():
        owner, _, factor = key.rpartition(".")
        expert = split_expert(key)
        if expert:
            stacks.setdefault(expert[0], {})[expert[3], expert[4]] = value
        elif factor in FACTORS:
            out[f"{_PEFT_PREFIX}{hf_name(owner, config)}.{_PEFT_FACTORS[factor]}"] = value.T
        else:
            out[_PEFT_PREFIX + hf_name(key, config)] = _torch_layout(key, value)
    for product, factors in stacks.items():
        wrapped = product.endswith("up_gate_product") and product.replace("up_gate_", "down_") in stacks
        module = hf_name(product, config).rpartition(".")[0] + (".base_layer" if wrapped else "")
        lora_A, lora_B = _stack(factors, config)
        out[f"{_PEFT_PREFIX}{module}.lora_A.weight"] = lora_A.transpose(0, 2, 1).reshape(-1, lora_A.shape[1])
        out[f"{_PEFT_PREFIX}{module}.lora_B.weight"] = lora_B.transpose(2, 1, 0).reshape(lora_B.shape[2], -1)
    return {key: np.ascontiguousarray(value) for key, value in out.items()}


def _torch_layout(name: str, value: Array) -> Array:
    """Ours <-> torch's, for a parameter trained in full. ValueError for those that transformers
    holds in another form.
    """
    if _ROUTED.search(name):
        raise ValueError(
            say(
                f"modules_to_save ({name}) must be a plain layer in the peft dialect; save with dialect='paddlenlp'",
                f"peft 写法中 modules_to_save（{name}）须为普通层；请用 dialect='paddlenlp' 保存",
            )
        )
    return value.T if value.ndim == 2 and not name.startswith("embed_tokens") else value


def _stack(factors: Mapping[tuple[int, str], Array], config: ModelConfig) -> tuple[Array, Array]:
    """A [E, I, r] and B [E, r, O] with zeros for the experts that are not in `factors`."""
    experts = config.moe.num_experts if config.moe else 0
    both = []
    for name in ("lora_A", "lora_B"):
        some = next(value for (_, factor), value in factors.items() if factor == name)
        stack = np.zeros((experts, *some.shape), some.dtype)
        for (expert, factor), value in factors.items():
            if factor == name:
                stack[expert] = value
        both.append(stack)
    return both[0], both[1]


def from_peft(found: Tensors, config: ModelConfig, r: int, target_parameters: list[str]) -> Tensors:
    """Our tensors from PEFT's. Experts with A = B = 0 are dropped: no gradient ever reaches them.
    ValueError for a key that has no counterpart.
    """
    products: dict[str, str] = {}
    owners: dict[str, str] = {}
    for module in modules(config):
        if module.endswith(PRODUCT):
            products[hf_name(module, config)] = module
        else:
            owners[hf_name(module, config)] = module
    parameters = {hf_name(name, config): name for name in parameter_specs(config)}
    wrapped = _wrapped_stacks(products, target_parameters)
    out: Tensors = {}
    for key, value in found.items():
        name = key.removeprefix(_PEFT_PREFIX)
        factor = next((f for f, suffix in _PEFT_FACTORS.items() if name.endswith("." + suffix)), None)
        module = name.removesuffix("." + _PEFT_FACTORS[factor]) if factor else name
        if factor and module in owners:
            out[f"{owners[module]}.{factor}"] = value.T
        elif factor and module in wrapped:
            out.update(_unstack(wrapped[module], factor, value, config, r))
        elif not factor and name in parameters:
            out[parameters[name]] = _torch_layout(parameters[name], value)
        else:
            raise ValueError(_unknown(key, "peft"))
    return without_blank(out)


def without_blank(tensors: Tensors) -> Tensors:
    """All but the experts' adapters with A = B = 0, which change nothing and never learn."""
    blank = [k for k in tensors if split_expert(k) and not tensors[k].any() and not tensors[_partner(k)].any()]
    return {key: value for key, value in tensors.items() if key not in blank}


def with_both_products(tensors: Tensors, config: ModelConfig, r: int) -> Tensors:
    """An expert that is adapted in one of its two products gets A = B = 0 in the other: no gradient
    ever reaches those, so that the product trains on as if it had no adapter.
    """
    out = dict(tensors)
    for key in tensors:
        expert = split_expert(key)
        if expert is None:
            continue
        product, _, _, number, _ = expert
        stack, name = product.rsplit(".", 1)
        other = f"{stack}.{'down' if name == f'up_gate{PRODUCT}' else 'up_gate'}{PRODUCT}"
        n_in, n_out = shape_of(other, config)
        out.setdefault(f"{other}.{number}.lora_A", np.zeros((n_in, r), np.float32))
        out.setdefault(f"{other}.{number}.lora_B", np.zeros((r, n_out), np.float32))
    return out


def _partner(key: str) -> str:
    return key[:-1] + ("B" if key.endswith("A") else "A")


def _wrapped_stacks(products: Mapping[str, str], target_parameters: list[str]) -> dict[str, str]:
    """Module name in PEFT, with its `base_layer`s -> our product: parameters are wrapped in their
    order, the last one outermost.
    """
    targeted: dict[str, list[str]] = {}
    for name in products:
        if any(name == target or name.endswith("." + target) for target in target_parameters):
            targeted.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        module + ".base_layer" * (len(names) - 1 - i): products[name]
        for module, names in targeted.items()
        for i, name in enumerate(names)
    }


def _unstack(product: str, factor: str, value: Array, config: ModelConfig, r: int) -> Tensors:
    """A [E*r, I] or B [O, r*E] (the expert runs fastest) -> one matrix an expert."""
    experts = config.moe.num_experts if config.moe else 0
    if factor == "lora_A":
        stack = value.reshape(experts, r, -1).transpose(0, 2, 1)
    else:
        stack = value.reshape(value.shape[0], r, experts).transpose(2, 1, 0)
    return {f"{product}.{e}.{factor}": matrix for e, matrix in enumerate(stack)}


# --- PaddleNLP ------------------------------------------------------------------------------------

_ROOT = re.compile(r"(?:^|\.)((?:layers|vision_model|resampler_model|embed_tokens|norm|lm_head)\b.*)")
_PADDLE_EXPERT = re.compile(r"(layers\.\d+\.mlp)\.experts\.(\d+)\.(up_gate|down)_proj\.(lora_[AB])")
# fused layer -> the layers of ours that it stands for, side by side on the output axis
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "up_gate_proj": ("gate_proj", "up_proj")}


def paddle_name(name: str) -> str:
    """Decoder and resampler names have the prefix `model.`, tower and head have none."""
    return name if name.startswith(("vision_model.", "lm_head")) else f"model.{name}"


def to_paddle(tensors: Tensors, config: ModelConfig) -> Tensors:
    """PaddleNLP keys: no `.weight` after a factor, [in, out]; experts are numbered through both
    modalities.
    """
    out: Tensors = {}
    for key, value in tensors.items():
        expert = split_expert(key)
        if expert:
            product, layer, modality, e, factor = expert
            number = e + MODALITIES.index(modality) * (config.moe.num_experts if config.moe else 0)
            leaf = product.rsplit(".", 1)[-1].removesuffix(PRODUCT)
            key = f"layers.{layer}.mlp.experts.{number}.{leaf}_proj.{factor}"
        elif key.endswith(".magnitude"):
            raise ValueError(
                say(
                    "use_dora (True) must be saved with dialect='peft': PaddleNLP has no DoRA",
                    "use_dora（True）须以 dialect='peft' 保存：PaddleNLP 没有 DoRA",
                )
            )
        out[paddle_name(key)] = np.ascontiguousarray(value)
    return out


def from_paddle(found: Tensors, config: ModelConfig) -> Tensors:
    """Our tensors from PaddleNLP's, whatever prefix the base model has there. A fused layer is
    split: A is shared, B is cut by columns.
    """
    known, parameters = set(modules(config)), parameter_specs(config)
    out: Tensors = {}
    for key, value in found.items():
        root = _ROOT.search(key)
        name = root[1] if root else key
        owner, _, factor = name.rpartition(".")
        expert = _PADDLE_EXPERT.fullmatch(name)
        if expert and config.moe:
            modality, e = divmod(int(expert[2]), config.moe.num_experts)
            if modality >= config.moe.num_modalities:
                raise ValueError(_unknown(key, "paddlenlp"))
            out[f"{expert[1]}.{MODALITIES[modality]}_experts.{expert[3]}{PRODUCT}.{e}.{expert[4]}"] = value
        elif factor in FACTORS[:2] and owner in known:
            out[name] = value
        elif factor in FACTORS[:2] and _parts_of_fused(owner, known):
            out.update(_split_fused(_parts_of_fused(owner, known), factor, value, config, key))
        elif name in parameters:
            out[name] = value
        else:
            raise ValueError(_unknown(key, "paddlenlp"))
    return out


def _parts_of_fused(owner: str, known: set[str]) -> list[str]:
    parent, _, leaf = owner.rpartition(".")
    parts = [f"{parent}.{part}" for part in _FUSED.get(leaf, ())]
    return parts if parts and known.issuperset(parts) else []


def _split_fused(parts: list[str], factor: str, value: Array, config: ModelConfig, key: str) -> Tensors:
    widths = [shape_of(part, config)[1] for part in parts]
    if factor == "lora_A":
        return {f"{part}.lora_A": value for part in parts}
    if value.shape[-1] != sum(widths):
        raise ValueError(
            say(
                f"{key} {list(value.shape)} must have {sum(widths)} columns, those of {parts}; use its own base model",
                f"{key} {list(value.shape)} 须有 {sum(widths)} 列，即 {parts} 的列；请用它自己的基础模型",
            )
        )
    cuts = np.split(value, np.cumsum(widths)[:-1], axis=1)
    return {f"{part}.lora_B": cut for part, cut in zip(parts, cuts, strict=True)}


def _unknown(key: str, dialect: str) -> str:
    return f"tensor {key!r} ({dialect}) must belong to a layer of this model; load the adapter on the base model it was trained on"
