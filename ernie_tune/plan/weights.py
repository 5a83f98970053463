"""What each place of a model (embedding, a decoder layer, ..., the vision tower) holds, summed by
how tensor and expert parallelism cut it.

Counted from `parameter_specs`, so exactly. Refuses to know: stages of a pipeline, optimizers
(memory.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ernie_tune.config.language import say
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.specs import MODALITIES, ParameterSpec, parameter_specs
from ernie_tune.peft.formats import ALGORITHMS, bits_at_load, is_linear, num_groups
from ernie_tune.peft.packed_header import TABLE
from ernie_tune.peft.parts import frozen_parts, part_of
from ernie_tune.peft.targets import expert_targets, linear_targets
from ernie_tune.plan.job import Job

WHOLE, TENSOR, EXPERT = (
    "whole",
    "tensor",
    "expert",
)  # on every rank; cut over tensor ranks; over the ranks of the experts
# What `models.ernie.PLAN` cuts, by the kind of cut that a matrix [in, out] gets. A test holds the
# two together.
_COLUMN = re.compile(r"layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.(shared_experts\.)?(gate|up)_proj)")
_ROW = re.compile(r"layers\.\d+\.(self_attn\.o_proj|mlp\.(shared_experts\.)?down_proj)")
_EXPERTS = re.compile(r"layers\.\d+\.mlp\.(text|vision)_experts\.")
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Held:
    """One place and one kind of cut: bytes of the base's weights, values that are trained in it,
    those of adapters, those of them with a master copy.
    """

    place: str  # "embed_tokens", "layers.7", "norm", "lm_head", "vision_model", "resampler_model"
    cut: str
    base_bytes: float = 0.0
    mapped_bytes: float = 0.0  # of them: pages of a packed folder's files, where one CPU process runs
    trained: int = 0
    trained_float32: int = 0  # of `trained`: kept in float32 whatever the model's format
    adapters: int = 0


def cut_of(name: str) -> str:
    """How a parameter is cut."""
    if _EXPERTS.match(name):
        return EXPERT
    split = _COLUMN.match(name) or _ROW.match(name) or name.startswith(("embed_tokens.", "lm_head."))
    return TENSOR if split else WHOLE


def place_of(name: str) -> str:
    layer = _LAYER.match(name)
    return layer.group(0)[:-1] if layer else name.split(".")[0]


@lru_cache(maxsize=64)
def held(job: Job) -> tuple[Held, ...]:
    """Everything that the job's model holds, at most one entry a place and cut."""
    sums: dict[tuple[str, str], list[float]] = {}
    frozen = frozen_parts(job.freeze) if job.full else frozenset()
    for name, spec in parameter_specs(job.model).items():
        entry = sums.setdefault((place_of(name), cut_of(name)), [0.0, 0.0, 0, 0, 0])
        entry[0] += stored_bytes(name, spec, job)
        entry[1] += mapped_bytes(name, spec, job)
        if job.full and spec.trainable and part_of(name) not in frozen:
            entry[2] += spec.size
            entry[3] += spec.size if spec.float32 else 0
    for place, cut, count in adapters(job):
        sums.setdefault((place, cut), [0.0, 0.0, 0, 0, 0])[4] += count
    return tuple(Held(place, cut, a, m, int(b), int(c), int(d)) for (place, cut), (a, m, b, c, d) in sums.items())


def stored_bytes(name: str, spec: ParameterSpec, job: Job) -> float:
    """Bytes of one parameter as the job stores it, scales of a quantised one included. ValueError
    for a format that does not exist.
    """
    plain = spec.size * (4 if spec.float32 else job.element_bytes)
    if not job.coded:
        return plain
    if job.packed is not None:
        matrix = job.packed.of.get(name)
        if matrix is None:
            return plain
        if name == TABLE:
            return _of_table(spec, job.element_bytes)
        return _quantised(spec, matrix.bits, job.element_bytes, matrix.groups)
    if job.quantize not in ALGORITHMS:
        raise ValueError(
            say(
                f"weight_quantize_algo ({job.quantize!r}) must be one of {sorted(ALGORITHMS)}; choose one of them",
                f"weight_quantize_algo（{job.quantize!r}）须为 {sorted(ALGORITHMS)} 之一；请选一种",
            )
        )
    bits = bits_at_load(name, spec.shape, job.quantize)
    if bits and name == TABLE:
        return _of_table(spec, job.element_bytes)
    return _quantised(spec, bits, job.element_bytes) if bits else plain


def _is_linear(name: str, spec: ParameterSpec) -> bool:
    return is_linear(name, spec.shape)


def _quantised(spec: ParameterSpec, bits: int, scale_bytes: int, groups: int | None = None) -> float:
    """`groups`: rows of its scales where the matrix does not decide."""
    n_in, n_out = spec.shape[-2:]
    stack = spec.size // (n_in * n_out)
    return spec.size * bits / 8 + stack * (groups or num_groups(n_in, bits)) * n_out * scale_bytes


def _of_table(spec: ParameterSpec, scale_bytes: int) -> float:
    """An embedding of int8 codes, with a scale a token."""
    return spec.size + spec.shape[0] * scale_bytes


def mapped_bytes(name: str, spec: ParameterSpec, job: Job) -> float:
    """Of `stored_bytes`, what one CPU process uses where it lies in a packed folder's files: codes,
    and scales that need no converting.
    """
    matrix = job.packed.of.get(name) if job.packed is not None else None
    if matrix is None or name == TABLE:
        return 0.0
    return stored_bytes(name, spec, job) if matrix.mapped_scales else spec.size * matrix.bits / 8


def _linears(model: ModelConfig) -> list[str]:
    """Linear layers, which a target of LoRA may name."""
    return [n.removesuffix(".weight") for n, spec in parameter_specs(model).items() if _is_linear(n, spec)]


def adapters(job: Job) -> Iterator[tuple[str, str, int]]:
    """(place, cut, values) of everything that is added to the frozen base."""
    if job.lora is not None:
        yield from _lora(job)
    elif job.added_width:
        for i in range(job.model.num_hidden_layers):
            yield f"layers.{i}", WHOLE, job.added_width * job.model.hidden_size


def _lora(job: Job) -> Iterator[tuple[str, str, int]]:
    """Low-rank factors A [in, r] and B [r, out]: in a column layer B is cut and A whole, in a row
    layer the other way round.
    """
    lora, specs = job.lora, parameter_specs(job.model)
    if lora is None:
        return
    for name in linear_targets(lora, _linears(job.model)):
        n_in, n_out = specs[f"{name}.weight"].shape
        column, row = bool(_COLUMN.match(name)), bool(_ROW.match(name))
        yield place_of(name), TENSOR if row else WHOLE, n_in * lora.r
        yield place_of(name), TENSOR if column else WHOLE, lora.r * n_out
        if lora.use_dora:
            yield place_of(name), TENSOR if column else WHOLE, n_out
    for (layer, modality), chosen in expert_targets(lora, job.model).items():
        for product in ("up_gate_proj", "down_proj"):
            shape = specs[f"layers.{layer}.mlp.{MODALITIES[modality]}_experts.{product}"].shape
            yield f"layers.{layer}", EXPERT, len(chosen) * lora.r * (shape[-2] + shape[-1])


def bare(job: Job, kind: str) -> bool:
    """Whether the feed-forward's matrices are codes that no adapter stands beside: those of its
    "linear" layers, dense and shared, or of its "experts".
    """
    if not job.coded or job.lora is None:
        return job.coded
    if kind == "experts":
        return not expert_targets(job.lora, job.model)
    return not any(".mlp." in name for name in linear_targets(job.lora, _linears(job.model)))


def trained_values(job: Job) -> int:
    """Values that the optimizer moves, over the whole model."""
    return sum(h.trained + h.adapters for h in held(job))


def base_bytes(job: Job) -> float:
    """Bytes of the base's weights, over the whole model."""
    return math.fsum(h.base_bytes for h in held(job))


@lru_cache(maxsize=16)
def active_values(model: ModelConfig, visual: bool) -> int:
    """Parameters that one token passes through: the decoder with the chosen experts of its
    modality, without embedding, head and towers.
    """
    total = 0.0
    own = MODALITIES[int(visual)]
    for name, spec in parameter_specs(model).items():
        if not name.startswith("layers.") or not spec.trainable or len(spec.shape) < 2:
            continue
        if len(spec.shape) == 3 and model.moe is not None:
            total += spec.size * model.moe.top_k / model.moe.num_experts if f".{own}_experts." in name else 0
        elif ".mlp.gate." not in name or name.endswith("_1") == visual:
            total += spec.size
    return int(total)
