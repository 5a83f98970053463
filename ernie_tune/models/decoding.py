"""A decode step of a whole plain model in NumPy and the math library: one token of each row through
all layers without a Paddle operator.

At a few rows Paddle's operators take longer to get going than to compute, and layer by layer
(`mkl.stepping`) a step still makes hundreds of tensors. Here the products of one kind are one call
of the library, on memory that is kept from layer to layer. The formulas are those of the layers,
which say them for arrays (`layers.py`, `moe.py`); so is the order of sums.

Only for models whose layers are the library's own, without hooks or quantised weights
(`StepForward.of` gives None for others), and rows in a `SegmentCache`. Adapters may add products of
low rank to linear layers (LoRA): the one that acts is read at the moment of the call, too.
Legend: B rows, D width, N query and K key/value heads, H head width, E experts, k choices, M = B*k
pairs sorted by expert, I inner width, r rank, P products. Refuses to know: sampling, training,
distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from paddle import Tensor, nn

from ernie_tune.models import ernie, grouped, layers, mkl, moe
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.ernie import Elsewhere, ErnieModel
from ernie_tune.models.inputs import PackedInput
from ernie_tune.models.layers import LowRank, gated, normalised, text_angles, turned, turns
from ernie_tune.models.moe import RouterTap, choose_few
from ernie_tune.models.segments import SegmentCache

_OURS = frozenset(module.__name__ for module in (ernie, grouped, layers, moe))


def _plain(layer: nn.Layer, added: Mapping[int, LowRank]) -> bool:
    """Whether a layer does what its class says and nothing beside what is added to it."""
    slot = added.get(id(layer))
    return (
        (type(layer).__module__ in _OURS or type(layer) is nn.LayerList)
        and not isinstance(layer, Elsewhere)
        and not layer._forward_pre_hooks
        and len(layer._forward_post_hooks) == (slot is not None)
        and all(part is slot or _plain(part, added) for part in layer._sub_layers.values())
    )


class StepForward:
    """Final hidden states of one token a row. Weights are read where they lie at the moment of the
    call.
    """

    def __init__(self, model: ErnieModel, added: Mapping[int, LowRank]) -> None:
        """`added`: `model.low_rank()`."""
        self.config = model.config
        self.eps = model.norm.eps
        self.layers = [_Layer(layer, added) for layer in model.layers]
        self.weights: list[Tensor] = [model.embed_tokens.weight, model.norm.weight]
        for layer in self.layers:
            self.weights += layer.weights
        self.added = [part for layer in self.layers for part in layer.added]
        self.kind = np.dtype(model.compute_dtype)
        self._at: list[int] = []  # where the weights were when they were last looked at
        self._room: _Room | None = None

    @classmethod
    def of(cls, model: Any) -> StepForward | None:
        """None for a model that is not plain, or does not compute where the library can."""
        added = model.low_rank() if isinstance(model, ErnieModel) else None
        own = getattr(type(model), "forward", None) is ErnieModel.forward
        if added is None or not (own or added) or not mkl.usable(model.compute_dtype):
            return None
        parts = (model.embed_tokens, model.layers, model.norm)
        hooked = model._forward_pre_hooks or model._forward_post_hooks
        if hooked or not all(_plain(part, added) for part in parts):
            return None
        made = cls(model, added)
        held = [*made.weights, *(x for part in made.added for x in part.tensors())]
        return made if mkl.ready(*held) and all(w.is_contiguous() for w in held) else None

    def __call__(self, inputs: PackedInput, cache: SegmentCache, tap: RouterTap | None = None) -> Tensor:
        """[B, D], after the last norm. `tap` may ask for the experts that are chosen, no more."""
        self._look()
        count = inputs.num_tokens
        if self._room is None or self._room.count != count:
            self._room = _Room(count, self.config, self.kind)
        room = self._room
        angles = text_angles(
            inputs.position_ids_T3, self.config.head_dim, self.config.freq_allocation, self.config.rope_theta
        )
        turn_B1h = turns(angles, self.kind.name)[:, None]
        x_BD = self.embed[inputs.input_ids_T]
        for i, layer in enumerate(self.layers):
            layer(i, x_BD, turn_B1h, room, cache, tap)
        return mkl.made(normalised(x_BD, self.norm, self.eps))

    def _look(self) -> None:
        """Arrays and addresses of the weights, again where one has moved or another adapter
        acts.
        """
        low = [weight.data_ptr() for part in self.added for weight in part.tensors()]
        at = [*(weight.data_ptr() for weight in self.weights), *low]
        if at == self._at:
            return
        self._at = at
        for part in self.added:
            part.look(self.kind)
        self.embed, self.norm = mkl.view(self.weights[0]), mkl.view(self.weights[1])
        rest = at[2:]
        for layer in self.layers:
            layer.look(rest[: len(layer.weights)])
            rest = rest[len(layer.weights) :]


class _Added:
    """What low-rank adapters add to neighbouring products of the same rows."""

    def __init__(self, layers: Sequence[nn.Layer], added: Mapping[int, LowRank]) -> None:
        self.slots = [(i, added[id(layer)]) for i, layer in enumerate(layers) if id(layer) in added]
        self.rows = 0

    def tensors(self) -> list[Tensor]:
        """A and B of those that act."""
        return [x for _, slot in self.slots if (found := slot.low_rank()) is not None for x in found[:2]]

    def look(self, kind: np.dtype[Any]) -> None:
        """Take those that act now."""
        found = [(i, slot.low_rank()) for i, slot in self.slots]
        acting = [(i, one) for i, one in found if one is not None]
        a, b = [one[0] for _, one in acting], [one[1] for _, one in acting]
        self.kind, self.rows = kind, 0
        self.which = np.array([i for i, _ in acting], np.intp)
        self.a, self.b = (np.array([x.data_ptr() for x in some], np.uintp) for some in (a, b))
        self.depth = np.array([x.shape[0] for x in a])
        self.rank, self.width = (np.array([x.shape[k] for x in b], np.int64) for k in (0, 1))
        self.scale = np.array([one[2] for _, one in acting], kind)

    def run(self, rows: int, x_at: int, out_at: np.ndarray | int, step: int = 0) -> None:
        """out += scale (x A) B. `out_at`: where each layer's product begins; `step`: elements from
        row to row of it, its own width without.
        """
        if not len(self.which):
            return
        if rows != self.rows:
            self.rows, count = rows, len(self.which)
            self.low = np.empty(rows * int(self.rank.sum()), self.kind)
            begin = (np.cumsum(self.rank) - self.rank) * (rows * self.low.itemsize)
            self.low_at = (begin + self.low.ctypes.data).astype(np.uintp)
            self.down = mkl.Products(
                self.kind, count, (rows, self.rank, self.depth), (self.depth, self.rank, self.rank), factor=self.scale
            )
            steps = (self.rank, self.width, step or self.width)
            self.up = mkl.Products(self.kind, count, (rows, self.width, self.rank), steps, add=True)
        self.down.run(x_at, self.a, self.low_at)
        self.up.run(self.low_at, self.b, np.asarray(out_at, np.uintp).reshape(-1)[self.which])


class _Layer:
    """One decoder layer's weights."""

    def __init__(self, layer: ernie.DecoderLayer, added: Mapping[int, LowRank]) -> None:
        a, m = layer.self_attn, layer.mlp
        self.eps = layer.input_layernorm.eps
        self.weights: list[Tensor] = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
        self.weights += [p.weight for p in (a.q_proj, a.k_proj, a.v_proj, a.o_proj)]
        self.moe = m if isinstance(m, moe.MoELayer) else None
        # what every token goes through beside the experts: a dense layer, or shared experts
        self.mlp = m if self.moe is None else getattr(m, "shared_experts", None)
        if self.mlp is not None:
            self.weights += [p.weight for p in (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj)]
        if self.moe is not None:
            experts = self.moe.text_experts
            self.weights += [experts.up_gate_proj, experts.down_proj]
            self.weights += [self.moe.gate.weight, self.moe.moe_statics.e_score_correction_bias]
        self.to_qkv, self.to_out = _Added((a.q_proj, a.k_proj, a.v_proj), added), _Added((a.o_proj,), added)
        inner = () if self.mlp is None else (self.mlp.gate_proj, self.mlp.up_proj)
        self.to_up, self.to_down = (
            _Added(inner, added),
            _Added(() if self.mlp is None else (self.mlp.down_proj,), added),
        )
        self.added = (self.to_qkv, self.to_out, self.to_up, self.to_down)

    def look(self, at: list[int]) -> None:
        """`at`: the weights' addresses."""
        self.norms = [mkl.view(weight) for weight in self.weights[:2]]
        self.qkv, self.out = np.array(at[2:5], np.uintp), np.array(at[5:6], np.uintp)
        rest = at[6:]
        self.up = self.down = np.zeros(0, np.uintp)
        if self.mlp is not None:
            self.up, self.down = np.array(rest[:2], np.uintp), np.array(rest[2:3], np.uintp)
            rest = rest[3:]
        if self.moe is not None:
            self.gate_DE, bias_mE = (mkl.view(weight) for weight in self.weights[-2:])
            self.bias_E = bias_mE[0]
            stacks = self.weights[-4:-2]
            steps = [int(np.prod(w.shape[1:])) * self.gate_DE.itemsize for w in stacks]
            each = [np.arange(w.shape[0], dtype=np.uintp) * step for w, step in zip(stacks, steps, strict=True)]
            self.up = np.concatenate([self.up, each[0] + np.uintp(rest[0])])
            self.down = np.concatenate([self.down, each[1] + np.uintp(rest[1])])

    def __call__(
        self, number: int, x_BD: np.ndarray, turn_B1h: np.ndarray, room: _Room, cache: SegmentCache, tap: Any
    ) -> None:
        """Add what the layer adds to x, in place."""
        h_BD = normalised(x_BD, self.norms[0], self.eps)
        room.project.run(h_BD.ctypes.data, self.qkv, room.qkv_at)
        self.to_qkv.run(room.count, h_BD.ctypes.data, room.qkv_at)
        cache.attend_rows(number, turned(room.q, turn_B1h), turned(room.k, turn_B1h), room.v, room.attended)
        room.merge.run(room.attended_at, self.out, room.merged_at)
        self.to_out.run(room.count, room.attended_at, room.merged_at)
        x_BD += room.merged
        h_BD = normalised(x_BD, self.norms[1], self.eps)
        x_BD += self._dense(h_BD, room) if self.moe is None else self._experts(self.moe, h_BD, room, tap)

    def _dense(self, h_BD: np.ndarray, room: _Room) -> np.ndarray:
        assert self.mlp is not None
        dense = room.mlp(self.mlp.gate_proj.weight.shape[1])
        dense.up.run(h_BD.ctypes.data, self.up, dense.both_at)
        self.to_up.run(room.count, h_BD.ctypes.data, dense.both_at, dense.both.shape[1])
        inner = gated(dense.both)
        dense.down.run(inner.ctypes.data, self.down, dense.out_at)
        self.to_down.run(room.count, inner.ctypes.data, dense.out_at)
        return dense.out

    def _experts(self, layer: moe.MoELayer, h_BD: np.ndarray, room: _Room, tap: RouterTap | None) -> np.ndarray:
        few = choose_few(h_BD, self.gate_DE, self.bias_E, layer.moe.top_k, layer.moe.norm_min)
        if tap is not None:
            tap.chosen.append((layer.layer, 0, few.chosen_Tk))
        experts = room.experts(layer)
        out_MD = experts.through(self, h_BD, few)
        out_MD *= few.weight_M[:, None]
        out_BD = out_MD[few.slot_of_Tk].sum(1)
        if self.mlp is not None:
            out_BD += experts.beside
        return out_BD


class _Room:
    """Memory and products for a step of so many rows, the same in every layer."""

    def __init__(self, count: int, c: ModelConfig, kind: np.dtype[Any]) -> None:
        self.count, self.config, self.kind = count, c, kind
        width, heads, kv_heads = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        q, k, v = (np.empty((count, n), kind) for n in (heads, kv_heads, kv_heads))
        self.qkv_at = np.array([x.ctypes.data for x in (q, k, v)], np.uintp)
        self.q, self.k, self.v = (x.reshape(count, -1, c.head_dim) for x in (q, k, v))
        self.project = mkl.Products(
            kind, 3, (count, np.array([heads, kv_heads, kv_heads]), width),
            (width, np.array([heads, kv_heads, kv_heads]), np.array([heads, kv_heads, kv_heads])),
        )  # fmt: skip
        self.attended, self.merged = (
            np.empty((count, c.num_attention_heads, c.head_dim), kind),
            np.empty((count, width), kind),
        )
        self.attended_at, self.merged_at = self.attended.ctypes.data, self.merged.ctypes.data
        self.merge = mkl.Products(kind, 1, (count, width, heads), (heads, width, width))
        self._mlps: dict[int, _MlpRoom] = {}
        self._experts: dict[tuple[int, int, int], _ExpertRoom] = {}

    def mlp(self, inner: int) -> _MlpRoom:
        """For a gated MLP of this inner width."""
        if inner not in self._mlps:
            self._mlps[inner] = _MlpRoom(self.count, self.config.hidden_size, inner, self.kind)
        return self._mlps[inner]

    def experts(self, layer: moe.MoELayer) -> _ExpertRoom:
        """For a layer of experts like this one, and the shared expert beside them."""
        shared = getattr(layer, "shared_experts", None)
        inner = 0 if shared is None else int(shared.gate_proj.weight.shape[1])
        stack = layer.text_experts.down_proj.shape
        key = (int(stack[0]), int(stack[1]), inner)
        if key not in self._experts:
            self._experts[key] = _ExpertRoom(self.count, self.config.hidden_size, *key, layer.moe.top_k, self.kind)
        return self._experts[key]


class _MlpRoom:
    def __init__(self, count: int, width: int, inner: int, kind: np.dtype[Any]) -> None:
        self.both, self.out = np.empty((count, 2 * inner), kind), np.empty((count, width), kind)
        begin = self.both.ctypes.data
        self.both_at, self.out_at = np.array([begin, begin + inner * kind.itemsize], np.uintp), self.out.ctypes.data
        self.up = mkl.Products(kind, 2, (count, inner, width), (width, inner, 2 * inner))
        self.down = mkl.Products(kind, 1, (count, width, inner), (inner, width, width))


class _ExpertRoom:
    """The shared expert's products (two up, one down, or none), then one for each expert, of as
    many rows as it gets.
    """

    def __init__(
        self, count: int, width: int, experts: int, inner: int, shared: int, top_k: int, kind: np.dtype[Any]
    ) -> None:
        pairs, size = count * top_k, kind.itemsize
        self.width, self.inner, self.size = width, inner, size
        self.both, self.out = np.empty((pairs, 2 * inner), kind), np.empty((pairs, width), kind)
        self.both_shared, self.beside = np.empty((count, 2 * shared), kind), np.empty((count, width), kind)
        self.shared, self.ones = shared, 1 if shared else 0
        two, one = 2 * self.ones, self.ones
        each = [np.repeat(np.array(x), (two, experts)) for x in ((shared, 2 * inner), (2 * shared, 2 * inner))]
        self.up = mkl.Products(kind, two + experts, (count, each[0], width), (width, each[0], each[1]))
        depth = np.repeat(np.array([shared, inner]), (one, experts))
        self.down = mkl.Products(kind, one + experts, (count, width, depth), (depth, width, width))
        self.up_at, self.down_at = (np.empty((2, n + experts), np.uintp) for n in (two, one))  # left and out
        begin = self.both_shared.ctypes.data
        self.up_at[1, :two] = [begin, begin + shared * size][:two]
        self.down_at[1, :one] = self.beside.ctypes.data
        self.both_at, self.out_at = self.both.ctypes.data, self.out.ctypes.data

    def through(self, layer: _Layer, h_BD: np.ndarray, few: moe.FewChosen) -> np.ndarray:
        """Each expert's rows through it, [M, D]; what the shared one makes of all is in
        `beside`.
        """
        one, two, size = self.ones, 2 * self.ones, self.size
        counts_E, rows_MD = few.counts_E, few.rows_MD
        start_E = np.cumsum(counts_E) - counts_E
        self.up.rows(two, counts_E)
        self.up_at[0, :two] = h_BD.ctypes.data
        self.up_at[0, two:] = rows_MD.ctypes.data + start_E * (self.width * size)
        self.up_at[1, two:] = self.both_at + start_E * (2 * self.inner * size)
        self.up.run(self.up_at[0], layer.up, self.up_at[1])
        if one:
            layer.to_up.run(len(h_BD), h_BD.ctypes.data, self.up_at[1, :two], self.both_shared.shape[1])
        inner = gated(self.both)
        self.down.rows(one, counts_E)
        if one:
            inner_shared = gated(self.both_shared)
            self.down_at[0, :one] = inner_shared.ctypes.data
        self.down_at[0, one:] = inner.ctypes.data + start_E * (self.inner * size)
        self.down_at[1, one:] = self.out_at + start_E * (self.width * size)
        self.down.run(self.down_at[0], layer.down, self.down_at[1])
        if one:
            layer.to_down.run(len(h_BD), inner_shared.ctypes.data, self.down_at[1, :1])
        return self.out
