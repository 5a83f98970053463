"""The operators that `card_check.py` looks at: each as the library computes it, by whatever fast
path it has for a device, and as its formula says in elementary operators alone.

The formulas share no code with the library: no hand-written backward, no kernel, nothing of the
math library that `models/mkl.py` calls; Paddle's autograd differentiates them. Inputs are numbers
that bfloat16 holds, so that every format computes with the same ones.
Legend: T tokens, M rows sorted by expert, E experts, k choices, I and O widths, D width, V
vocabulary, G groups of rows that share a scale. Refuses to know: devices, tolerances, models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.models import mkl, moe
from ernie_tune.models.attention import AttentionPlan, cached_attention, segment_attention
from ernie_tune.models.grouped import grouped_matmul
from ernie_tune.models.layers import (
    gated_halves,
    rms_norm,
    rotate_halves,
    rotate_pairs,
    swiglu,
    text_angles,
    turn_factors,
    vision_angles,
)
from ernie_tune.models.vision import quick_gelu
from ernie_tune.objectives.distill import ScoreHead, token_jsd
from ernie_tune.objectives.logprobs import token_logp, token_logp_and_entropy
from ernie_tune.peft import lora, virtual_tokens
from ernie_tune.peft.quantize import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedProduct,
    QuantizedWeight,
    pack_halves,
)
from ernie_tune.train.optim import build_adamw

Outputs: TypeAlias = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Operator:
    """`ours` and `plain`: outputs for tensors of `arrays`; the first `trained` of them get
    gradients, -1: all.
    """

    ours: Callable[..., Outputs]
    plain: Callable[..., Outputs]
    arrays: tuple[np.ndarray, ...]
    trained: int = -1

    def results(self, make: Callable[[np.ndarray], Tensor], plain: bool = False) -> list[np.ndarray]:
        """Outputs and gradients in float64, computed of what `make` makes of arrays."""
        inputs = [make(array) for array in self.arrays]
        trained = inputs if self.trained < 0 else inputs[: self.trained]
        for x in trained:
            x.stop_gradient = False
        found = (self.plain if plain else self.ours)(*inputs)
        outs = [found] if isinstance(found, Tensor) else list(found)
        grads = []
        if trained:
            towards = [paddle.to_tensor(normal(90 + i, *x.shape)).astype(x.dtype) for i, x in enumerate(outs)]
            grads = paddle.grad(outs, trained, towards)
        return [x.astype("float64").numpy() for x in (*outs, *grads)]


def normal(seed: int, *shape: int) -> np.ndarray:
    """Normal draws, cut to bfloat16's digits."""
    drawn = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return (drawn.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)


def _constant(array: np.ndarray, like: Tensor) -> Tensor:
    return paddle.to_tensor(array).astype(like.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == paddle.float64 else x.astype("float32")


def _softmax(x: Tensor) -> Tensor:
    e = paddle.exp(x - x.max(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def _silu(x: Tensor) -> Tensor:
    return x / (1.0 + paddle.exp(-x))


# --- layers ------------------------------------------------------------------------------------


def _rope() -> Operator:
    angles = text_angles(np.arange(60).reshape(20, 3), 64, 8, 1e4)

    def ours(x: Tensor) -> Tensor:
        return rotate_pairs(x, turn_factors(angles, 4, str(x.dtype).rsplit(".", 1)[-1]))

    def plain(x: Tensor) -> Tensor:
        cos, sin = (_constant(f(angles)[:, None], x) for f in (np.cos, np.sin))
        pairs = x.reshape([20, 4, 32, 2])
        a, b = pairs[..., 0], pairs[..., 1]
        return paddle.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)

    return Operator(ours, plain, (normal(0, 20, 4, 64),))


def _picture_rope() -> Operator:
    angles = vision_angles(np.array([[1, 4, 6]]), 32, 1e4)

    def ours(x: Tensor) -> Tensor:
        cos, sin = (
            _constant(np.repeat(f(np.concatenate([-angles, angles], 1))[:, None], 4, 1), _wide(x))
            for f in (np.cos, np.sin)
        )
        return rotate_halves(x, cos, sin)

    def plain(x: Tensor) -> Tensor:
        cos, sin = (_constant(f(angles)[:, None], x) for f in (np.cos, np.sin))
        a, b = x[:, :, :16], x[:, :, 16:]
        return paddle.concat([a * cos - b * sin, b * cos + a * sin], -1)

    return Operator(ours, plain, (normal(0, 24, 4, 32),))


def _attention(
    offsets: tuple[int, ...], causal: bool, parents: tuple[int, ...] | None = None, size: float = 1.0
) -> Operator:
    above = parents or (-1,) * (len(offsets) - 1)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = paddle.to_tensor(np.arange(q.shape[1]) * k.shape[1] // q.shape[1])
        spans = list(pairwise(offsets))
        outs = []
        for (a, b), parent in zip(spans, above, strict=True):
            before = [] if parent < 0 else [spans[parent]]
            keys, values = (
                paddle.gather(paddle.concat([x[c:d] for c, d in (*before, (a, b))]), group, 1) for x in (k, v)
            )
            scores = paddle.matmul(q[a:b].transpose([1, 0, 2]), keys.transpose([1, 2, 0])) * q.shape[2] ** -0.5
            if causal:
                later = np.triu(np.full((b - a, b - a), -np.inf), 1)
                hidden = np.concatenate([np.zeros((b - a, keys.shape[0] - (b - a))), later], 1)
                scores = scores + _constant(hidden, scores)
            outs.append(paddle.matmul(_softmax(scores), values.transpose([1, 0, 2])).transpose([1, 0, 2]))
        return paddle.concat(outs)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return segment_attention(q, k, v, AttentionPlan(offsets, causal, parents))

    arrays = tuple(normal(i, offsets[-1], heads, 64) for i, heads in enumerate((4, 2, 2)))
    return Operator(ours, plain, (size * arrays[0], *arrays[1:]))


def _cached() -> Operator:
    dead = np.zeros((3, 40))
    dead[0, :7] = -1e30

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = paddle.to_tensor(np.arange(4) // 2)
        keys, values = (paddle.gather(x, group, 1) for x in (k, v))
        scores = (keys * q.unsqueeze(2)).sum(-1) / 8.0 + _constant(dead[:, None], q)
        return (_softmax(scores).unsqueeze(-1) * values).sum(2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cached_attention(q, k, v, _constant(dead, _wide(q)))

    return Operator(ours, plain, (normal(0, 3, 4, 64), normal(1, 3, 2, 40, 64), normal(2, 3, 2, 40, 64)), trained=0)


# --- experts -----------------------------------------------------------------------------------

_COUNTS = (5, 0, 17, 10)
_STARTS = np.cumsum((0, *_COUNTS)).tolist()


def _by_expert(x_MI: Tensor, weight_EIO: Tensor) -> Tensor:
    """Each expert's rows by its matrix."""
    return paddle.concat(
        [paddle.matmul(x_MI[a:b], weight_EIO[e]) for e, (a, b) in enumerate(pairwise(_STARTS)) if a < b]
    )


def _router() -> Operator:
    tokens, experts, top_k = 32, 8, 2

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
        found = moe.route(_wide(x), _wide(weight), _wide(bias), top_k)
        return [found.logits_TE, found.weight_Tk]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
        logits = paddle.matmul(x, weight)
        probs = _softmax(logits)
        chosen = np.argsort(-(probs + bias).numpy(), -1)[:, :top_k]
        picked = (probs.unsqueeze(1) * _constant(np.eye(experts)[chosen], probs)).sum(-1)
        return [logits, picked / picked.sum(-1, keepdim=True)]

    return Operator(ours, plain, (normal(0, tokens, 48), normal(1, 48, experts), 0.25 * normal(2, experts)), trained=2)


def _dispatch() -> Operator:
    """Tokens go to experts as the router dealt them, and come back summed by their weights."""
    tokens, experts, top_k = 13, 4, 2
    chosen_Tk = np.argsort(np.random.default_rng(0).random((tokens, experts)), -1)[:, :top_k]
    order_M = np.argsort(chosen_Tk.reshape(-1), kind="stable")
    counts = tuple(np.bincount(chosen_Tk.reshape(-1), minlength=experts).tolist())

    def ours(x: Tensor, matrices: Tensor, weight: Tensor) -> Tensor:
        order, token_of, slot_of = (
            paddle.to_tensor(a) for a in (order_M, order_M // top_k, np.argsort(order_M).reshape(tokens, top_k))
        )
        rows = grouped_matmul(moe._Dispatch.apply(x, token_of, slot_of), matrices, counts)
        return moe.combine(swiglu(*moe._halves(rows)), weight, order, token_of, slot_of)

    def plain(x: Tensor, matrices: Tensor, weight: Tensor) -> Tensor:
        outs = []
        for t in range(tokens):
            both = [paddle.matmul(x[t : t + 1], matrices[int(e)]) for e in chosen_Tk[t]]
            parts = [_silu(y[:, :24]) * y[:, 24:] * weight[t, j] for j, y in enumerate(both)]
            outs.append(parts[0] + parts[1])
        return paddle.concat(outs)

    return Operator(ours, plain, (normal(0, tokens, 48), normal(1, experts, 48, 48), normal(2, tokens, top_k)))


def _router_loss() -> Operator:
    """A loss that the backward adds where a layer runs; the value passes."""

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return moe._AddLoss.apply(x, (x * weight).sum(), 0.5)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        loss, towards = (x * weight).sum(), _constant(normal(90, *x.shape), x)
        return x + 0.5 * (loss - loss.detach()) * towards / (towards * towards).sum()

    return Operator(ours, plain, (normal(0, 6, 8), normal(1, 6, 8)))


# --- quantised weights ---------------------------------------------------------------------------


def _codes(bits: int, groups: int, *shape: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes as they are held, scales [.., G, O], the matrices that they stand for)."""
    *stack, rows, columns = shape
    most = 2 ** (bits - 1) - 1
    codes = np.random.default_rng(5).integers(-most, most + 1, shape).astype(np.int8)
    scale = np.abs(normal(6, *stack, groups, columns)) / most
    return pack_halves(codes) if bits == 4 else codes, scale, codes * np.repeat(scale, rows // groups, -2)


def _held(codes: np.ndarray, scale: np.ndarray, bits: int, like: Tensor) -> QuantizedWeight:
    return QuantizedWeight(paddle.to_tensor(codes), _constant(scale, like), bits)


def _quantised(bits: int, groups: int) -> Operator:
    codes, scale, whole = _codes(bits, groups, 128, 48)

    def ours(x: Tensor) -> Outputs:
        return QuantizedLinear(_held(codes, scale, bits, x))(x)

    return Operator(ours, lambda x: paddle.matmul(x, _constant(whole, x)), (normal(0, 16, 128),))


def _quantised_matrix(bits: int, groups: int) -> Operator:
    """The matrix itself, which DoRA and merging take."""
    codes, scale, whole = _codes(bits, groups, 128, 48)

    def ours(x: Tensor) -> Outputs:
        return QuantizedLinear(_held(codes, scale, bits, x)).weight

    return Operator(ours, lambda x: _constant(whole, x), (normal(0, 1),), trained=0)


def _quantised_experts(bits: int, groups: int) -> Operator:
    codes, scale, whole = _codes(bits, groups, len(_COUNTS), 128, 48)

    def ours(x: Tensor) -> Outputs:
        return QuantizedProduct(_held(codes, scale, bits, x))(x, None, _COUNTS)

    return Operator(ours, lambda x: _by_expert(x, _constant(whole, x)), (normal(0, _STARTS[-1], 128),))


def _quantised_table() -> Operator:
    codes, scale, whole = _codes(8, 1, 24, 40)
    ids = np.arange(60) % 40

    def ours(x: Tensor) -> Outputs:
        table = QuantizedEmbedding(paddle.zeros([40, 24], x.dtype))
        table.put(codes.T, scale.T)
        return [table(paddle.to_tensor(ids)), table.weight]

    def plain(x: Tensor) -> Outputs:
        return [_constant(whole.T[ids], x), _constant(whole.T, x)]

    return Operator(ours, plain, (normal(0, 1),), trained=0)


# --- adapters ----------------------------------------------------------------------------------

_TALL = 2 * lora._TALL_ROWS + 5  # rows that the gradient of a factor is summed over in blocks


def _low_rank(dora: bool) -> Operator:
    def ours(out: Tensor, x: Tensor, a: Tensor, b: Tensor, *rest: Tensor) -> Outputs:
        added = lora._add_product(out, lora._project(x, a, 0.5), b)
        if not dora:
            return added
        magnitude, weight = rest
        return lora._ScaleColumns.apply(added, magnitude / lora.column_norms(weight.detach()))

    def plain(out: Tensor, x: Tensor, a: Tensor, b: Tensor, *rest: Tensor) -> Outputs:
        added = out + 0.5 * paddle.matmul(paddle.matmul(x, a), b)
        if not dora:
            return added
        magnitude, weight = rest
        return added * (magnitude / paddle.sqrt((weight * weight).sum(0))).unsqueeze(0)

    arrays = (normal(0, _TALL, 12), normal(1, _TALL, 16), normal(2, 16, 4), normal(3, 4, 12))
    return Operator(
        ours, plain, (*arrays, normal(4, 12), normal(5, 16, 12)) if dora else arrays, trained=5 if dora else 4
    )


def _low_rank_experts() -> Operator:
    # experts 0 and 2 have adapters, experts 1 and 3 none
    spans = ((0, _STARTS[0], _STARTS[1]), (1, _STARTS[2], _STARTS[3]))

    def ours(out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Outputs:
        return lora._AddExpertProducts.apply(out, x, a, b, spans, 0.5)

    def plain(out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Outputs:
        total = out
        for j, first, end in spans:
            own = _constant(np.r_[np.zeros(first), np.ones(end - first), np.zeros(_STARTS[-1] - end)][:, None], x)
            total = total + 0.5 * paddle.matmul(paddle.matmul(x * own, a[j]), b[j])
        return total

    rows = _STARTS[-1]
    return Operator(ours, plain, (normal(0, rows, 12), normal(1, rows, 16), normal(2, 2, 16, 4), normal(3, 2, 4, 12)))


def _prompt_rows() -> Operator:
    rows = np.array([0, 1, 6, 7])  # two virtual tokens before each of two segments

    def ours(x: Tensor, values: Tensor) -> Outputs:
        return virtual_tokens._SetRows.apply(x, values, paddle.to_tensor(rows))

    def plain(x: Tensor, values: Tensor) -> Outputs:
        return paddle.concat([values, x[2:6], values, x[8:]])

    return Operator(ours, plain, (normal(0, 10, 8), normal(1, 2, 8)))


# --- objectives --------------------------------------------------------------------------------


def _log_softmax(hidden: Tensor, weight_VD: Tensor) -> Tensor:
    return paddle.log(_softmax(paddle.matmul(hidden, weight_VD.t())))


def _logp(size: float) -> Operator:
    """`size` of the scores: beyond 60 they are shifted before exp."""
    tokens, vocab, targets = 16, 500, np.arange(16) * 31

    def ours(hidden: Tensor, weight: Tensor) -> Outputs:
        both = token_logp_and_entropy(hidden, weight, paddle.to_tensor(targets), transposed=True)
        return [token_logp(hidden, weight, paddle.to_tensor(targets), transposed=True), *both]

    def plain(hidden: Tensor, weight: Tensor) -> Outputs:
        scores = paddle.matmul(hidden, weight.t())
        shifted = scores - scores.max(-1, keepdim=True)
        log = shifted - paddle.log(paddle.exp(shifted).sum(-1, keepdim=True))
        logp = (log * _constant(np.eye(vocab)[targets], log)).sum(-1)
        return [logp, 1.0 * logp, -(paddle.exp(log) * log).sum(-1)]

    return Operator(ours, plain, (size * normal(0, tokens, 48), normal(1, vocab, 48)))


def _distillation() -> Operator:
    def ours(hidden: Tensor, weight: Tensor, teacher: Tensor, other: Tensor) -> Outputs:
        return token_jsd(hidden, ScoreHead(weight, True), teacher, ScoreHead(other, True), 0.25)

    def plain(hidden: Tensor, weight: Tensor, teacher: Tensor, other: Tensor) -> Outputs:
        student, above = _log_softmax(hidden, weight), _log_softmax(teacher, other)
        p_s, p_t = paddle.exp(student), paddle.exp(above)
        mixed = paddle.log(0.25 * p_t + 0.75 * p_s)
        return (0.25 * p_t * (above - mixed) + 0.75 * p_s * (student - mixed)).sum(-1)

    arrays = (0.25 * normal(0, 9, 16), normal(1, 60, 16), 0.25 * normal(2, 9, 24), normal(3, 60, 24))
    return Operator(ours, plain, arrays, trained=2)


def _adamw() -> Operator:
    rate, decay, beta1, beta2, epsilon = 0.125, 0.125, 0.875, 0.9375, 1e-8

    def ours(start: Tensor, *grads: Tensor) -> Outputs:
        kind = "float64" if start.dtype == paddle.float64 else "float32"
        parameter = paddle.create_parameter(start.shape, kind)
        parameter.set_value(start.astype(kind))
        optimizer = build_adamw(
            [("w", parameter)], lambda _: 1.0, weight_decay=decay, beta1=beta1, beta2=beta2, epsilon=epsilon
        )
        optimizer.set_lr(rate)
        for grad in grads:
            (parameter * grad.astype(kind)).sum().backward()
            optimizer.step()
            optimizer.clear_grad()
        return parameter

    def plain(start: Tensor, *grads: Tensor) -> Outputs:
        x, first, second = start, paddle.zeros_like(start), paddle.zeros_like(start)
        for t, grad in enumerate(grads, 1):
            first, second = beta1 * first + (1 - beta1) * grad, beta2 * second + (1 - beta2) * grad * grad
            step = first / (1 - beta1**t) / (paddle.sqrt(second / (1 - beta2**t)) + epsilon)
            x = x * (1 - rate * decay) - rate * step
        return x

    return Operator(ours, plain, tuple(normal(i, 8, 8) for i in range(4)), trained=0)


OPERATORS: dict[str, Operator] = {
    "product": Operator(
        paddle.matmul,
        lambda a, b: (a.unsqueeze(2) * b.unsqueeze(0)).sum(1),
        (normal(0, 40, 64), normal(1, 64, 32)),
    ),
    "RMSNorm": Operator(
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: x / paddle.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w,
        (normal(0, 300, 64), normal(1, 64)),
    ),
    # large enough for the math library
    "SwiGLU": Operator(swiglu, lambda gate, up: _silu(gate) * up, (normal(0, 300, 64), normal(1, 300, 64))),
    "SwiGLU, halves": Operator(
        lambda x: gated_halves(x) if mkl.ready(x) else swiglu(*moe._halves(x)),
        lambda x: _silu(x[:, :64]) * x[:, 64:],
        (normal(0, 300, 128),),
    ),
    "quick GELU": Operator(quick_gelu, lambda x: x / (1.0 + paddle.exp(-1.702 * x)), (normal(0, 700, 64),)),
    "rotary embedding": _rope(),
    "rotary embedding, pictures": _picture_rope(),
    "attention, causal": _attention((0, 5, 37, 197), True),
    "attention, whole pictures": _attention((0, 16, 80), False),
    "attention, shared prefix": _attention((0, 40, 52, 70), True, (-1, 0, 0)),
    "attention, large scores": _attention((0, 9, 30), True, size=32.0),
    "attention, decoding": _cached(),
    "router": _router(),
    "router's loss": _router_loss(),
    "experts": Operator(
        lambda x, w: grouped_matmul(x, w, _COUNTS), _by_expert, (normal(0, _STARTS[-1], 48), normal(1, 4, 48, 24))
    ),
    "experts, dealt and summed": _dispatch(),
    "log-probabilities": _logp(1.0),
    "log-probabilities, large scores": _logp(16.0),
    "distillation": _distillation(),
    "int8 layer": _quantised(8, 1),
    "int8 layer, groups": _quantised(8, 2),
    "int4 layer": _quantised(4, 1),
    "int4 layer, groups": _quantised(4, 2),
    "int8 matrix, groups": _quantised_matrix(8, 2),
    "int4 matrix, groups": _quantised_matrix(4, 2),
    "int8 experts": _quantised_experts(8, 1),
    "int8 experts, groups": _quantised_experts(8, 4),
    "int4 experts": _quantised_experts(4, 1),
    "int4 experts, groups": _quantised_experts(4, 4),
    "int8 table": _quantised_table(),
    "LoRA": _low_rank(dora=False),
    "DoRA": _low_rank(dora=True),
    "LoRA on experts": _low_rank_experts(),
    "virtual tokens": _prompt_rows(),
    "AdamW": _adamw(),
}
