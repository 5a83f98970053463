"""Weight-only quantisation of a frozen base: int8 per output column, int4 in groups of 64 input rows, expanded again in every product.

A quantised layer computes x W' and, backward, g W'^T with the rounded weight W': exact gradients of the rounded model, so that adapters on top
train (2305.14314). Norms, routers, biases and an untied head stay as they are. Works on every device; it saves memory, not time.
Legend: I input width, O output width, G groups of input rows, E experts, M rows sorted by expert, T tokens, V vocabulary, D width, F features. Refuses to know: adapters, files, inference kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.layers import across, has_values
from ernie_tune.models.moe import Experts
from ernie_tune.peft.formats import ALGORITHMS, GROUP_ROWS, num_groups
from ernie_tune.peft.slots import Slot


def quantize(weight_IO: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales [G, O], symmetric: |w - code * scale| <= scale / 2. int8: [I, O] in +-127. int4: codes in +-7, packed by `pack_halves`."""
    n_in, n_out = weight_IO.shape
    largest = 2 ** (bits - 1) - 1
    groups = num_groups(n_in, bits)
    grouped = weight_IO.astype(np.float32).reshape(groups, n_in // groups, n_out)
    scale = np.abs(grouped).max(1, keepdims=True) / np.float32(largest)
    scale[scale == 0] = 1.0
    codes = np.rint(grouped / scale).reshape(n_in, n_out).astype(np.int8)
    if bits == 4:
        codes = pack_halves(codes)
    return codes, scale[:, 0]


def pack_halves(codes_IO: np.ndarray) -> np.ndarray:
    """int4 codes in [-8, 7] plus 8, two to a byte: byte [i, o] of [I/2, O] holds row i in its low half and row i + I/2 in its high half."""
    low, high = np.split((codes_IO + 8).astype(np.uint8), 2, axis=-2)
    return low | high << 4


def unpack_halves(packed: np.ndarray) -> np.ndarray:
    """Inverse of `pack_halves`, int8; a stack of matrices too."""
    return np.concatenate([packed & 15, packed >> 4], axis=-2).astype(np.int8) - 8


def _part(values: np.ndarray, axis: int, rank: int, size: int) -> np.ndarray:
    return np.ascontiguousarray(np.split(values, size, axis=axis)[rank])


class QuantizedWeight(nn.Layer):
    """One matrix [I, O], or a stack of them [E, I, O], as `codes` and `scale` ([G, O] or [E, G, O]) in the form of `quantize`."""

    def __init__(self, codes: Tensor, scale: Tensor, bits: int) -> None:
        super().__init__()
        *stack, rows, columns = codes.shape
        rows *= 2 if bits == 4 else 1
        self.shape, self.bits = (*stack, rows, columns), bits
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        groups = scale.shape[-2]
        self._group_of_row = paddle.to_tensor(np.arange(rows) // (rows // groups)) if groups > 1 else None

    @classmethod
    def rounded(cls, weight: Tensor, bits: int) -> QuantizedWeight:
        """`weight` rounded to the nearest code. ValueError for an odd input width with 4 bits."""
        if bits == 4 and weight.shape[-2] % 2:
            raise ValueError(f"input width ({weight.shape[-2]}) must be even for 4 bits; use weight_only_int8")
        stack = weight if weight.ndim == 3 else weight.unsqueeze(0)
        parts = [quantize(matrix.astype("float32").numpy(), bits) for matrix in stack]
        codes, scale = (np.stack(x) if weight.ndim == 3 else x[0] for x in zip(*parts, strict=True))
        return cls(paddle.to_tensor(codes), paddle.to_tensor(scale).astype(weight.dtype), bits)

    def cut(self, axis: int | None, rank: int, size: int) -> None:
        """Keep one of `size` equal parts: of the rows (0), of the columns (1), or of the experts (None). The kept codes and scales stay as they are.

        Raises ValueError where the part would cut a group of 4-bit rows, or does not divide.
        """
        dim = 0 if axis is None else axis - 2
        if self.shape[dim] % size:
            raise ValueError(f"dimension {self.shape} must be divisible by {size} ranks; lower the degree")
        codes, scale, rows = self.codes, self.scale, self.shape[-2]
        if axis == 0 and self.bits == 4:
            if scale.shape[-2] > 1 and rows // size % GROUP_ROWS:
                raise ValueError(
                    f"rows of a rank ({rows} / {size}) must be a multiple of the {GROUP_ROWS} rows of one scale; lower the degree, or use weight_only_int8"
                )
            codes = pack_halves(_part(unpack_halves(codes.numpy()), -2, rank, size))
        else:
            codes = _part(codes.numpy(), dim, rank, size)
        shared = axis == 0 and scale.shape[-2] == 1  # one scale for all rows
        kept = scale.astype("float32").numpy() if shared else _part(scale.astype("float32").numpy(), dim, rank, size)
        shape = list(self.shape)
        shape[dim] //= size
        self.shape = tuple(shape)
        self.register_buffer("codes", paddle.to_tensor(codes))
        self.register_buffer("scale", paddle.to_tensor(kept).astype(scale.dtype))
        groups, rows = kept.shape[-2], self.shape[-2]
        self._group_of_row = paddle.to_tensor(np.arange(rows) // (rows // groups)) if groups > 1 else None

    def dense(self, expert: int | None = None) -> Tensor:
        """The rounded matrix [I, O]; of one expert where they are stacked."""
        codes, scale = (x if expert is None else x[expert] for x in (self.codes, self.scale))
        wide = codes.astype(scale.dtype)
        if self.bits == 4:
            high = paddle.floor(wide * 0.0625)
            wide = paddle.concat([wide - high * 16.0, high]) - 8.0
        return wide * (scale[0] if self._group_of_row is None else paddle.gather(scale, self._group_of_row))


class _Product(PyLayer):
    """x W' for one matrix, without keeping W'."""

    @staticmethod
    def forward(ctx, x_TI, weight):  # type: ignore[no-untyped-def]
        ctx.weight = weight
        return paddle.matmul(x_TI, weight.dense())

    @staticmethod
    def backward(ctx, grad_TO):  # type: ignore[no-untyped-def]
        return paddle.matmul(grad_TO, ctx.weight.dense(), transpose_y=True)


class _StackProduct(PyLayer):
    """The same for a stack: rows sorted by expert, counts[e] of them for expert e."""

    @staticmethod
    def forward(ctx, x_MI, weight, counts):  # type: ignore[no-untyped-def]
        ctx.weight, ctx.counts = weight, counts
        parts = [paddle.matmul(x_MI[a:b], weight.dense(e)) for e, a, b in _spans(counts)]
        return paddle.concat(parts) if parts else paddle.zeros([0, weight.shape[-1]], x_MI.dtype)

    @staticmethod
    def backward(ctx, grad_MO):  # type: ignore[no-untyped-def]
        parts = [paddle.matmul(grad_MO[a:b], ctx.weight.dense(e), transpose_y=True) for e, a, b in _spans(ctx.counts)]
        return paddle.concat(parts) if parts else paddle.zeros([0, ctx.weight.shape[-2]], grad_MO.dtype)


def _spans(counts: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end row) of every expert that has rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, start, start + count
        start += count


class QuantizedLinear(nn.Layer):
    """Stands in for `nn.Linear`; `weight` gives the rounded matrix, made anew each time."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.quant, self.bias = weight, bias

    @property
    def weight(self) -> Tensor:
        return self.quant.dense()

    def forward(self, x_TI: Tensor) -> Tensor:
        out = _Product.apply(x_TI, self.quant)
        return out if self.bias is None else out + self.bias


class QuantizedProduct(nn.Layer):
    """Stands in for `GroupedProduct` and holds the stack itself; the parameter that `Experts` had is gone."""

    def __init__(self, weight_EIO: QuantizedWeight) -> None:
        super().__init__()
        self.quant = weight_EIO

    def forward(self, x_MI: Tensor, _weight: None, counts: tuple[int, ...]) -> Tensor:
        return _StackProduct.apply(x_MI, self.quant, counts)


class QuantizedEmbedding(nn.Layer):
    """Stands in for `Embedding`: int8, one scale a token. `weight` gives the rounded table for a tied head, made anew each time."""

    def __init__(self, weight_VD: Tensor) -> None:
        super().__init__()
        codes_DV, scale_1V = quantize(weight_VD.astype("float32").numpy().T, bits=8)
        self.register_buffer("codes", paddle.to_tensor(np.ascontiguousarray(codes_DV.T)))
        self.register_buffer("scale", paddle.to_tensor(np.ascontiguousarray(scale_1V.T)).astype(weight_VD.dtype))

    @property
    def weight(self) -> Tensor:
        return self.codes.astype(self.scale.dtype) * across(self.scale, self.codes.shape[1])

    def forward(
        self, ids_T: Tensor, feature_index_F: Tensor | None = None, features_FD: Tensor | None = None
    ) -> Tensor:
        codes_TD, scale_T1 = paddle.gather(self.codes, ids_T), paddle.gather(self.scale, ids_T)
        x_TD = codes_TD.astype(scale_T1.dtype) * across(scale_T1, codes_TD.shape[1])
        if features_FD is None:
            return x_TD
        return paddle.scatter(x_TD, feature_index_F, features_FD.astype(x_TD.dtype), overwrite=True)


SWAPPED = (QuantizedLinear, QuantizedEmbedding)


def weight_bytes(model: nn.Layer) -> int:
    """Bytes of all parameters and of the quantised codes and scales."""
    quantised = [
        buffer
        for layer in model.sublayers()
        if isinstance(layer, QuantizedWeight | QuantizedEmbedding)
        for buffer in (layer.codes, layer.scale)
    ]
    return sum(int(x.size) * x.element_size() for x in (*model.parameters(), *quantised))


def is_quantised(model: nn.Layer) -> bool:
    """Whether any layer was swapped by `quantize_base`."""
    return any(isinstance(layer, QuantizedWeight) for layer in model.sublayers())


def quantize_base(model: ErnieModel, algorithm: str) -> ErnieModel:
    """Swap every linear layer and expert stack of `model` for a quantised one, in place, and say in one line what it saved.

    "weight_only_int8", "weight_only_int4" (both with an int8 embedding), or "weight_only_mix": experts int4, other linear layers int8. Raises ValueError for another
    name, for a model that has adapters already (quantise first), and for one that is quantised already.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(
            f"weight_quantize_algo ({algorithm!r}) must be one of {sorted(ALGORITHMS)}; choose one of them"
        )
    layers = model.sublayers(include_self=True)
    for what, kind in (("adapters", Slot), ("quantised layers", QuantizedWeight)):
        if any(isinstance(layer, kind) for layer in layers):
            raise ValueError(f"model must not have {what} yet; quantise the plain model once, then call get_peft_model")
    before = weight_bytes(model)
    chosen = ALGORITHMS[algorithm]
    linears = stacks = 0
    with paddle.no_grad():
        for layer in layers:
            for name, child in list(layer.named_children()):
                if isinstance(child, nn.Linear) and has_values(child.weight):
                    layer._sub_layers[name] = QuantizedLinear(
                        QuantizedWeight.rounded(child.weight, chosen.linear), child.bias
                    )
                    linears += 1
            if isinstance(layer, Experts) and has_values(layer.down_proj):
                _quantize_experts(layer, chosen.experts)
                stacks += 2
        if chosen.embedding and has_values(model.embed_tokens.weight):
            model.embed_tokens = QuantizedEmbedding(model.embed_tokens.weight)
    print(
        f"ernie_tune: {algorithm}: {linears} linear layers int{chosen.linear}, {stacks} expert stacks int{chosen.experts}, "
        f"embedding {'int8' if chosen.embedding else 'as it was'}: {before / 1e6:.1f} MB -> {weight_bytes(model) / 1e6:.1f} MB",
        file=sys.stderr,
        flush=True,
    )
    return model


def _quantize_experts(experts: Experts, bits: int) -> None:
    for name in ("up_gate", "down"):
        swap_stack(experts, name, QuantizedWeight.rounded(experts._parameters[f"{name}_proj"], bits))


def swap_stack(experts: Experts, name: str, weight_EIO: QuantizedWeight) -> None:
    """Put a quantised stack in the place of the parameter `<name>_proj` ("up_gate" or "down") of `experts`."""
    experts._parameters.pop(f"{name}_proj")
    setattr(experts, f"{name}_proj", None)
    setattr(experts, f"{name}_product", QuantizedProduct(weight_EIO))
