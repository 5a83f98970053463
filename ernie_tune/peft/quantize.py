"""Weight-only quantisation of a frozen base: int8 per output column, int4 in groups of 64 input
rows, expanded again in every product.

A quantised layer computes x W' and, backward, g W'^T with the rounded weight W': exact gradients of
the rounded model, so that adapters on top train (2305.14314). Norms, routers, biases and an untied
head stay as they are. Works on every device; it saves memory, not time.
Legend: I input width, O output width, G groups of input rows, E experts, M rows sorted by expert, T
tokens, V vocabulary, D width, F features. Refuses to know: adapters, files, inference kernels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernie_tune.config.language import say
from ernie_tune.models import mkl
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.layers import across, has_values
from ernie_tune.models.moe import Experts
from ernie_tune.peft import unpack
from ernie_tune.peft.formats import ALGORITHMS, num_groups
from ernie_tune.peft.slots import Slot
from ernie_tune.peft.unpack import Codes

# bytes of a scale
_WIDTHS = {paddle.float64: 8, paddle.float32: 4, paddle.bfloat16: 2, paddle.float16: 2}
# Takes float32 matrices as `read(expert)` gives them (checkpoint/source.py).
Taker = Callable[[Callable[[int | None], np.ndarray]], None]


def quantize(weight_IO: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales [G, O], symmetric: |w - code * scale| <= scale / 2. int8: [I, O] in +-127.
    int4: codes in +-7, packed by `pack_halves`.
    """
    n_in, n_out = weight_IO.shape
    largest = 2 ** (bits - 1) - 1
    groups = num_groups(n_in, bits)
    grouped = weight_IO.astype(np.float32, copy=False).reshape(groups, n_in // groups, n_out)
    scale = np.maximum(grouped.max(1, keepdims=True), -grouped.min(1, keepdims=True)) / np.float32(largest)
    scale[scale == 0] = 1.0
    steps = grouped / scale  # the one copy of its size that is made here
    codes = np.rint(steps, out=steps).astype(np.int8).reshape(n_in, n_out)
    if bits == 4:
        codes = pack_halves(codes)
    return codes, scale[:, 0]


def pack_halves(codes_IO: np.ndarray) -> np.ndarray:
    """int4 codes in [-8, 7] plus 8, two to a byte: byte [i, o] of [I/2, O] holds row i in its low
    half and row i + I/2 in its high half.
    """
    low, high = np.split((codes_IO + 8).astype(np.uint8), 2, axis=-2)
    return low | high << 4


def unpack_halves(packed: np.ndarray) -> np.ndarray:
    """Inverse of `pack_halves`, int8; a stack of matrices too."""
    return np.concatenate([packed & 15, packed >> 4], axis=-2).astype(np.int8) - 8


def _part(values: np.ndarray, axis: int, rank: int, size: int) -> np.ndarray:
    return np.ascontiguousarray(np.split(values, size, axis=axis)[rank])


def _part_groups(rows: int, groups: int, size: int) -> int:
    """Groups of a part of `rows` rows in `size`: of as many rows as divide both a group and a
    part.
    """
    part = rows // size
    return part // math.gcd(rows // groups, part)


def _part_scale(scale_GO: np.ndarray, rows: int, rank: int, size: int) -> np.ndarray:
    """The scales of the rows of a part. Where a border of parts runs through a group, its scale is
    repeated: each row keeps its own.
    """
    groups = scale_GO.shape[-2]
    fine = rows // size // _part_groups(rows, groups, size)
    first = rank * (rows // size) + np.arange(0, rows // size, fine)
    return np.ascontiguousarray(scale_GO[..., first // (rows // groups), :])


def _columns(weight_IO: np.ndarray, cuts: Sequence[tuple[int | None, int, int]]) -> np.ndarray:
    """The columns that the cuts leave; each has scales of its own, so they are cut before
    rounding.
    """
    for axis, rank, size in cuts:
        weight_IO = _part(weight_IO, 1, rank, size) if axis == 1 else weight_IO
    return weight_IO


class Filled:
    """A tensor that is filled piece by piece: on a CPU in its own memory, so that it is there
    once.
    """

    def __init__(self, shape: list[int], kind: type[np.generic]) -> None:
        self._tensor = paddle.empty(shape, np.dtype(kind).name)
        self._direct = bool(self._tensor.place.is_cpu_place())
        self.array = mkl.view(self._tensor) if self._direct else np.empty(shape, kind)

    def tensor(self) -> Tensor:
        return self._tensor if self._direct else paddle.to_tensor(self.array)


class QuantizedWeight(nn.Layer):
    """One matrix [I, O], or a stack of them [E, I, O], as `codes` and `scale` ([G, O] or [E, G, O])
    in the form of `quantize`. Both None: not yet known.
    """

    codes: Tensor | None
    scale: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, bits: int) -> None:
        super().__init__()
        *stack, rows, columns = codes.shape
        self.bits, self.dtype = bits, scale.dtype
        self.shape: tuple[int, ...] = (*stack, rows * (2 if bits == 4 else 1), columns)
        self._groups = scale.shape[-2]
        self._cuts: list[tuple[int | None, int, int]] = []
        self._mapped: Sequence[Codes] = ()
        self._set(codes, scale)

    @classmethod
    def mapped(cls, matrices: Sequence[Codes], stacked: bool) -> QuantizedWeight:
        """Matrices whose codes stay where they are, in a mapped file: read when they are multiplied
        with, where `unpack.ready` says so. One matrix, or with `stacked` those of a stack.
        """
        made = cls.__new__(cls)
        nn.Layer.__init__(made)
        first = matrices[0]
        made.bits, made.dtype = first.bits, paddle.float32
        made.shape = (len(matrices), *first.shape) if stacked else first.shape
        made._groups, made._cuts = first.scale.shape[0], []
        made._set(None, None)
        made._mapped = matrices
        return made

    def _set(self, codes: Tensor | None, scale: Tensor | None) -> None:
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self._group_of_row = None
        if scale is not None and scale.shape[-2] > 1:
            rows = self.shape[-2]
            self._group_of_row = paddle.to_tensor(np.arange(rows) // (rows // scale.shape[-2]))

    @classmethod
    def rounded(cls, weight: Tensor, bits: int) -> QuantizedWeight:
        """`weight` rounded to the nearest code; without values where the parameter has none yet.
        ValueError for an odd input width with 4 bits.
        """
        if bits == 4 and weight.shape[-2] % 2:
            raise ValueError(
                say(
                    f"input width ({weight.shape[-2]}) must be even for 4 bits; use weight_only_int8",
                    f"4 位量化要求输入宽度（{weight.shape[-2]}）为偶数；请用 weight_only_int8",
                )
            )
        made = cls.__new__(cls)
        nn.Layer.__init__(made)
        made.bits, made.dtype, made.shape = bits, weight.dtype, tuple(weight.shape)
        made._groups, made._cuts = num_groups(weight.shape[-2], bits), []
        made._mapped = ()
        made._set(None, None)
        if has_values(weight):
            made.take(lambda e: (weight if e is None else weight[e]).astype("float32").numpy())
        return made

    @property
    def known(self) -> bool:
        """Whether it has values."""
        return self.codes is not None or bool(self._mapped)

    @property
    def nbytes(self) -> int:
        """Of codes and scales, known or not."""
        *stack, rows, columns = self.shape
        each = rows * self.bits // 8 + self._groups * _WIDTHS[self.dtype]
        return int(np.prod(stack, dtype=np.int64)) * columns * each

    def take(self, read: Callable[[int | None], np.ndarray]) -> None:
        """Round the float32 matrices that `read` gives, one at a time: the whole one for None, one
        expert by its number in the whole stack. Cuts that were made before decide what is asked for
        and what is kept: the codes are those of cutting afterwards.
        """
        cuts, stacked = self._cuts, len(self.shape) == 3
        count, (rows, columns) = (self.shape[0] if stacked else 1), self.shape[-2:]
        first = sum(rank * count for axis, rank, _ in cuts if axis is None)
        codes = Filled([count, rows * self.bits // 8, columns], np.uint8 if self.bits == 4 else np.int8)
        scales = np.empty((count, self._groups, columns), np.float32)
        for i in range(count):
            made = quantize(_columns(read(first + i if stacked else None), cuts), self.bits)
            for _, rank, size in (cut for cut in cuts if cut[0] == 0):
                made = self._rows(*made, rank, size)
            codes.array[i], scales[i] = made
        both = codes.tensor(), paddle.to_tensor(scales).astype(self.dtype)
        self._set(*(x if stacked else x.reshape(x.shape[1:]) for x in both))

    def cut(self, axis: int | None, rank: int, size: int) -> None:
        """Keep one of `size` equal parts: of the rows (0), of the columns (1), or of the experts
        (None). The kept codes stay as they are, and each keeps its scale.

        Raises ValueError where it does not divide, or leaves an odd number of 4-bit rows.
        """
        dim, rows = 0 if axis is None else axis - 2, self.shape[-2]
        if self.shape[dim] % size:
            raise ValueError(
                say(
                    f"dimension {self.shape} must be divisible by {size} ranks; lower the degree",
                    f"维度 {self.shape} 须能被 {size} 个进程整除；请降低并行度",
                )
            )
        if axis == 0 and self.bits == 4 and rows // size % 2:
            raise ValueError(
                say(
                    f"rows of a rank ({rows} / {size}) must be even for 4 bits; lower the degree, or use 8 bits "
                    "(weight_only_int8, or export with wint8)",
                    f"4 位编码要求每个进程的行数（{rows} / {size}）为偶数；请降低并行度，或用 8 位（weight_only_int8，或以 wint8 导出）",
                )
            )
        shape = list(self.shape)
        shape[dim] //= size
        self.shape = tuple(shape)
        if axis == 0:
            self._groups = _part_groups(rows, self._groups, size)
        self._cuts.append((axis, rank, size))
        if self._mapped and axis is None:  # which stay where they are
            self._mapped = self._mapped[rank * self.shape[0] : (rank + 1) * self.shape[0]]
        elif self._mapped:
            parts = [self._cut_arrays(m.codes, m.scale, axis, rank, size) for m in self._mapped]
            codes, scale = (np.stack(a) if len(self.shape) == 3 else a[0] for a in zip(*parts, strict=True))
            self._mapped = ()
            self._set(paddle.to_tensor(codes), paddle.to_tensor(scale))
        elif self.codes is not None and self.scale is not None:
            whole = self.codes.numpy(), self.scale.astype("float32").numpy()
            codes, scale = self._cut_arrays(*whole, axis, rank, size)
            self._set(paddle.to_tensor(codes), paddle.to_tensor(scale).astype(self.dtype))

    def _cut_arrays(
        self, codes: np.ndarray, scale: np.ndarray, axis: int | None, rank: int, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if axis == 0:
            return self._rows(codes, scale, rank, size)
        dim = 0 if axis is None else axis - 2
        return _part(codes, dim, rank, size), _part(scale, dim, rank, size)

    def _rows(self, codes: np.ndarray, scale: np.ndarray, rank: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """A part of the rows, which two halves of a byte and one scale for many rows may share."""
        plain = unpack_halves(codes) if self.bits == 4 else codes
        kept = _part_scale(scale, plain.shape[-2], rank, size)
        plain = _part(plain, -2, rank, size)
        return pack_halves(plain) if self.bits == 4 else plain, kept

    def dense(self, expert: int | None = None) -> Tensor:
        """The rounded matrix [I, O]; of one expert where they are stacked."""
        if self._mapped or (self.scale is not None and unpack.ready(self.scale)):
            return mkl.made(unpack.whole(self.matrix(expert)))
        return self.plain(*(x if expert is None else x[expert] for x in self._values()))

    def _values(self) -> tuple[Tensor, Tensor]:
        if self.codes is None or self.scale is None:
            raise ValueError(
                say(
                    "a quantised weight must have its values before it is used; read them into the model first",
                    "量化权重须先有值才能使用；请先把它们读入模型",
                )
            )
        return self.codes, self.scale

    def plain(self, codes: Tensor, scale: Tensor) -> Tensor:
        """`dense` by Paddle's operators, for every device and number format."""
        wide = codes.astype(scale.dtype)
        if self.bits == 4:
            high = paddle.floor(wide * 0.0625)
            wide = paddle.concat([wide - high * 16.0, high]) - 8.0
        return wide * (scale[0] if self._group_of_row is None else paddle.gather(scale, self._group_of_row))

    def matrix(self, expert: int | None = None) -> Codes:
        """The codes and scales in their own memory, on a CPU; not to be kept."""
        if self._mapped:
            return self._mapped[expert or 0]
        codes, scale = map(mkl.view, self._values())
        return Codes(codes, scale, self.bits) if expert is None else Codes(codes[expert], scale[expert], self.bits)


class _Product(PyLayer):
    """x W' for one matrix, without keeping W'."""

    @staticmethod
    def forward(ctx, x_TI, weight):  # type: ignore[no-untyped-def]
        ctx.weight = weight
        if unpack.ready(x_TI):
            return unpack.rows_by_codes(x_TI, weight.matrix())
        return paddle.matmul(x_TI, weight.dense())

    @staticmethod
    def backward(ctx, grad_TO):  # type: ignore[no-untyped-def]
        if unpack.ready(grad_TO):
            return unpack.rows_by_codes_transposed(grad_TO, ctx.weight.matrix())
        return paddle.matmul(grad_TO, ctx.weight.dense(), transpose_y=True)


class _StackProduct(PyLayer):
    """The same for a stack: rows sorted by expert, counts[e] of them for expert e."""

    @staticmethod
    def forward(ctx, x_MI, weight, counts):  # type: ignore[no-untyped-def]
        ctx.weight, ctx.counts = weight, counts
        if unpack.ready(x_MI):
            return unpack.stack_product(x_MI, weight.matrix, _spans(counts), weight.shape[1:])
        parts = [paddle.matmul(x_MI[a:b], weight.dense(e)) for e, a, b in _spans(counts)]
        return paddle.concat(parts) if parts else paddle.zeros([0, weight.shape[-1]], x_MI.dtype)

    @staticmethod
    def backward(ctx, grad_MO):  # type: ignore[no-untyped-def]
        if unpack.ready(grad_MO):
            return unpack.stack_product_transposed(grad_MO, ctx.weight.matrix, _spans(ctx.counts), ctx.weight.shape[1:])
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
    """Stands in for `GroupedProduct` and holds the stack itself; the parameter that `Experts` had
    is gone.
    """

    def __init__(self, weight_EIO: QuantizedWeight) -> None:
        super().__init__()
        self.quant = weight_EIO

    def forward(self, x_MI: Tensor, _weight: None, counts: tuple[int, ...]) -> Tensor:
        return _StackProduct.apply(x_MI, self.quant, counts)


class QuantizedEmbedding(nn.Layer):
    """Stands in for `Embedding`: int8, one scale a token. `weight` gives the rounded table for a
    tied head, made anew each time.
    """

    codes: Tensor | None
    scale: Tensor | None

    def __init__(self, weight_VD: Tensor) -> None:
        super().__init__()
        self.shape, self.dtype = tuple(weight_VD.shape), weight_VD.dtype
        self.register_buffer("codes", None)
        self.register_buffer("scale", None)
        if has_values(weight_VD):
            self.take(lambda _: weight_VD.astype("float32").numpy())

    @property
    def known(self) -> bool:
        """Whether it has values."""
        return self.codes is not None

    @property
    def nbytes(self) -> int:
        """Of codes and scales, known or not."""
        return self.shape[0] * (self.shape[1] + _WIDTHS[self.dtype])

    def take(self, read: Callable[[int | None], np.ndarray]) -> None:
        """Round the float32 table that `read(None)` gives."""
        codes_DV, scale_1V = quantize(read(None).T, bits=8)
        self.put(codes_DV.T, scale_1V.T)

    def put(self, codes_VD: np.ndarray, scale_V1: np.ndarray) -> None:
        """Take codes and scales that were made before."""
        self.register_buffer("codes", paddle.to_tensor(np.ascontiguousarray(codes_VD)))
        self.register_buffer("scale", paddle.to_tensor(np.ascontiguousarray(scale_V1)).astype(self.dtype))

    @property
    def weight(self) -> Tensor:
        if self.codes is None or self.scale is None:
            raise ValueError(
                say(
                    "a quantised embedding must have its values before it is used; read them into the model first",
                    "量化的词嵌入须先有值才能使用；请先把它们读入模型",
                )
            )
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
    quantised = sum(x.nbytes for x in model.sublayers() if isinstance(x, QuantizedWeight | QuantizedEmbedding))
    return quantised + sum(int(x.size) * x.element_size() for x in model.parameters())


def is_quantised(model: nn.Layer) -> bool:
    """Whether any layer was swapped by `quantize_base`."""
    return any(isinstance(layer, QuantizedWeight) for layer in model.sublayers())


def quantize_base(model: ErnieModel, algorithm: str) -> ErnieModel:
    """Swap every linear layer and expert stack of `model` for a quantised one, in place, and say in
    one line what it saved. Where the model has no values yet, they are rounded as they come
    (`takers`): it is never whole in its own type.

    "weight_only_int8", "weight_only_int4" (both with an int8 embedding), or "weight_only_mix":
    experts int4, other linear layers int8. Raises ValueError for another name, for a model that has
    adapters already (quantise first), and for one that is quantised already.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(
            say(
                f"weight_quantize_algo ({algorithm!r}) must be one of {sorted(ALGORITHMS)}; choose one of them",
                f"weight_quantize_algo（{algorithm!r}）须为 {sorted(ALGORITHMS)} 之一；请选一种",
            )
        )
    layers = model.sublayers(include_self=True)
    for what, kind in (("adapters", Slot), ("quantised layers", QuantizedWeight)):
        if any(isinstance(layer, kind) for layer in layers):
            raise ValueError(
                say(
                    f"model must not have {what} yet; quantise the plain model once, then call get_peft_model",
                    f"模型不能已有 {what}；请先量化普通模型一次，再调用 get_peft_model",
                )
            )
    before = weight_bytes(model)
    chosen = ALGORITHMS[algorithm]
    linears = stacks = 0
    with paddle.no_grad():
        for layer in layers:
            for name, child in list(layer.named_children()):
                if isinstance(child, nn.Linear):
                    layer._sub_layers[name] = QuantizedLinear(
                        QuantizedWeight.rounded(child.weight, chosen.linear), child.bias
                    )
                    linears += 1
            if isinstance(layer, Experts):
                _quantize_experts(layer, chosen.experts)
                stacks += 2
        if chosen.embedding:
            model.embed_tokens = QuantizedEmbedding(model.embed_tokens.weight)
    print(
        say(
            f"ernie_tune: {algorithm}: {linears} linear layers int{chosen.linear}, {stacks} expert "
            f"stacks int{chosen.experts}, embedding {('int8' if chosen.embedding else 'as it was')}: "
            f"{before / 1000000.0:.1f} MB -> {weight_bytes(model) / 1000000.0:.1f} MB",
            f"ernie_tune：{algorithm}：{linears} 个线性层 int{chosen.linear}，{stacks} 组专家 int"
            f"{chosen.experts}，词嵌入 {('int8' if chosen.embedding else 'as it was')}："
            f"{before / 1000000.0:.1f} MB → {weight_bytes(model) / 1000000.0:.1f} MB",
        ),
        file=sys.stderr,
        flush=True,
    )
    return model


def takers(model: nn.Layer) -> dict[str, Taker]:
    """Canonical name of every parameter that was swapped -> what rounds its matrices when they are
    read.
    """
    out: dict[str, Taker] = {}
    for name, layer in model.named_sublayers():
        if isinstance(layer, QuantizedLinear):
            out[f"{name}.weight"] = layer.quant.take
        elif isinstance(layer, QuantizedProduct):
            out[f"{name.removesuffix('_product')}_proj"] = layer.quant.take
        elif isinstance(layer, QuantizedEmbedding):
            out[f"{name}.weight"] = layer.take
    return out


def _quantize_experts(experts: Experts, bits: int) -> None:
    for name in ("up_gate", "down"):
        swap_stack(experts, name, QuantizedWeight.rounded(experts._parameters[f"{name}_proj"], bits))


def swap_stack(experts: Experts, name: str, weight_EIO: QuantizedWeight) -> None:
    """Put a quantised stack in the place of the parameter `<name>_proj` ("up_gate" or "down") of
    `experts`.
    """
    experts._parameters.pop(f"{name}_proj")
    setattr(experts, f"{name}_proj", None)
    setattr(experts, f"{name}_product", QuantizedProduct(weight_EIO))
