"""What `--quantization` means: how many bits each matrix of a model gets, as FastDeploy 2.x decides
it for ERNIE.

"wint4" is int8 for attention, dense and shared feed-forward and int4 for routed experts: FastDeploy
rewrites the word so. "wint8" is int8 for all of them. "mix" is wint4 with int8 vision experts,
which are smaller and see outliers. Towers, routers, norms, embedding and head stay as they are.
"weight_only_int8", "weight_only_int4", "weight_only_mix" are what those settings of a run make
while it loads a model (`at_load.py`); FastDeploy has no kernels for them.
Refuses to know: how codes are chosen, files, paddle.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from ernie_tune.config.language import say
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.specs import parameter_specs
from ernie_tune.peft.formats import ALGORITHMS


@dataclass(frozen=True)
class Scheme:
    """Bits of dense matrices and of each modality's experts; `argument`: the value of FastDeploy's
    --quantization, "" for none.
    """

    dense: int
    experts: tuple[int, int]
    argument: str


_MIX = {
    "quantization": "mix_quant",
    "dense_quant_type": "wint8",
    "moe_quant_type": "wint4",
    "image_moe_quant_type": "wint8",
    # without it FastDeploy takes the weights of a JSON of several keys for quantised
    "is_quantized": False,
}
SCHEMES: dict[str, Scheme] = {
    "none": Scheme(0, (0, 0), ""),
    "wint8": Scheme(8, (8, 8), "wint8"),
    "wint4": Scheme(8, (4, 4), "wint4"),
    "mix": Scheme(8, (4, 8), json.dumps(_MIX, separators=(",", ":"))),
}
_DENSE = re.compile(r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(shared_experts\.)?(gate|up|down)_proj)\.weight")
_EXPERTS = re.compile(r"layers\.\d+\.mlp\.(text|vision)_experts\.(up_gate|down)_proj")
_ROW_PARALLEL = re.compile(r".*\.(o_proj|down_proj)(\.weight)?")
CLASSES = ("attention", "dense feed-forward", "shared experts", "text experts", "vision experts")


def scheme(name: str) -> Scheme:
    """Of FastDeploy's, or of the algorithms that quantise while a model is loaded. ValueError for
    an unknown name.
    """
    if name in ALGORITHMS:
        at_load = ALGORITHMS[name]
        return Scheme(at_load.linear, (at_load.experts, at_load.experts), "")
    if name not in SCHEMES:
        known = [*sorted(SCHEMES), *sorted(ALGORITHMS)]
        raise ValueError(
            say(
                f"quantization ({name!r}) must be one of {known}; choose one of them",
                f"quantization（{name!r}）须为 {known} 之一；请选一种",
            )
        )
    return SCHEMES[name]


def bits_of(name: str, chosen: Scheme) -> int:
    """Bits of one canonical parameter: 8, 4, or 0 for one that is not quantised."""
    experts = _EXPERTS.fullmatch(name)
    if experts:
        return chosen.experts[experts[1] == "vision"]
    return chosen.dense if _DENSE.fullmatch(name) else 0


def row_parallel(name: str) -> bool:
    """Whether tensor parallelism shares out the input rows, so that every rank has scales of its
    own.
    """
    return _ROW_PARALLEL.fullmatch(name) is not None


def class_of(name: str) -> str:
    """The class of a quantisable parameter, one of `CLASSES`: what tables of errors are by."""
    experts = _EXPERTS.fullmatch(name)
    if experts:
        return f"{experts[1]} experts"
    if ".self_attn." in name:
        return "attention"
    return "shared experts" if ".shared_experts." in name else "dense feed-forward"


def quantised_names(config: ModelConfig, chosen: Scheme) -> list[str]:
    """The canonical parameters that get codes, in the model's order."""
    return [name for name in parameter_specs(config) if bits_of(name, chosen)]


def kernel_problems(config: ModelConfig, chosen: Scheme, tp: int) -> list[str]:
    """The shapes [K, N] on one rank that FastDeploy's kernels cannot multiply with, which need K %
    64 = N % 16 = 0. Empty: they can.
    """
    found: dict[str, None] = {}
    for name in quantised_names(config, chosen):
        rows, columns = parameter_specs(config)[name].shape[-2:]
        rows, columns = (rows // tp, columns) if row_parallel(name) else (rows, columns // tp)
        if rows % 64 or columns % 16:
            found[f"{class_of(name)} [{rows}, {columns}]"] = None
    return list(found)
