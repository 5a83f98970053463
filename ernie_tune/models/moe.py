"""The heterogeneous mixture of experts: one router and one expert family per modality, a shared
expert for everyone.

Dropless: every chosen (token, expert) pair is computed. Tokens are sorted by expert, each non-empty
expert does one product on a contiguous slice, empty experts do none. Legend: T tokens of one
modality, D width, E experts, k choices per token, M = T*k pairs sorted by expert, I inner.
Refuses to know: losses' weights in the total (see `RouterTap`), which tokens share a sequence,
distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernie_tune.models import mkl
from ernie_tune.models.config import ModelConfig, MoEConfig
from ernie_tune.models.grouped import Arriving, Counts, GroupedProduct, on_card, rows_of_experts
from ernie_tune.models.layers import GatedMLP, gated_halves, row_sum, scale_rows, swiglu, where_needed
from ernie_tune.models.router_losses import RouterLossWeights, router_loss, tally


@dataclass
class RouterRecord:
    """What one router decided for one batch: logits [T, E] float32 and chosen experts [T, k]."""

    layer: int
    modality: int  # 0 text, 1 vision
    logits_TE: Tensor
    chosen_Tk: Tensor

    def plain(self) -> tuple[int, int, np.ndarray, np.ndarray]:
        """As numbers that another process can be told; `of` makes a record of them again."""
        return self.layer, self.modality, self.logits_TE.numpy(), self.chosen_Tk.numpy()

    @classmethod
    def of(cls, layer: int, modality: int, logits_TE: np.ndarray, chosen_Tk: np.ndarray) -> RouterRecord:
        return cls(layer, modality, paddle.to_tensor(logits_TE), paddle.to_tensor(chosen_Tk))


@dataclass
class RouterTap:
    """What the caller wants from the routers of one forward. `weights`: add router losses to the
    gradient, times `scale`; `records`: keep decisions.
    """

    weights: RouterLossWeights | None = None
    scale: float = 1.0
    keep: bool = False
    records: list[RouterRecord] = field(default_factory=list)
    ids_only: bool = False  # keep no more than (layer, modality, chosen [T, k])
    chosen: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    # layer -> the experts of each token of the pack, [T, k]; -1: its own choice
    force: Mapping[int, np.ndarray] | None = None
    first: int = 0  # where in the pack a layer's tokens begin: a rank's run under sequence parallelism
    # of each router that was forced: (tokens that would choose other experts, forced tokens)
    flips: list[tuple[int, int]] = field(default_factory=list)
    count_usage: bool = False  # add to each layer's expert_usage, for `update_correction_bias`
    # layers run twice, first without a graph: only that first pass is counted and kept
    recomputed: bool = False


class _AddLoss(PyLayer):
    """Identity on x; the backward also hands `loss` a gradient of `scale`. So a layer's own loss
    enters the gradient wherever the layer runs.
    """

    @staticmethod
    def forward(ctx, x, loss, scale):  # type: ignore[no-untyped-def]
        ctx.scale, ctx.frozen = scale, (x.stop_gradient, loss.stop_gradient)
        ctx.save_for_backward(loss)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (loss,) = ctx.saved_tensor()
        return where_needed(ctx.frozen, grad, paddle.full_like(loss, ctx.scale))


class _Dispatch(PyLayer):
    """x[token_of]: copies of tokens in expert order. The backward gathers too, since the inverse
    order is known: deterministic, no scatter.
    """

    @staticmethod
    def forward(ctx, x_TD, token_of_M, slot_of_Tk):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slot_of_Tk)
        return paddle.gather(x_TD, token_of_M)

    @staticmethod
    def backward(ctx, grad_MD):  # type: ignore[no-untyped-def]
        (slot_of_Tk,) = ctx.saved_tensor()
        return _sum_slots(grad_MD, slot_of_Tk), None, None


class _Combine(PyLayer):
    """y[t] = sum_j weight[t, j] * expert_out[slot(t, j)]."""

    @staticmethod
    def forward(ctx, out_MD, weight_Tk, order_M, token_of_M, slot_of_Tk):  # type: ignore[no-untyped-def]
        weight_M1 = _by_slot(weight_Tk, order_M, out_MD)
        ctx.frozen = (out_MD.stop_gradient, weight_Tk.stop_gradient)
        ctx.save_for_backward(out_MD, weight_M1, token_of_M, slot_of_Tk)
        return _sum_slots(scale_rows(out_MD, weight_M1), slot_of_Tk)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        out_MD, weight_M1, token_of_M, slot_of_Tk = ctx.saved_tensor()
        grad_MD = paddle.gather(grad_TD, token_of_M)
        product = grad_MD * out_MD
        dweight_M1 = row_sum(product.astype("float32") if product.dtype == paddle.bfloat16 else product)
        dweight = paddle.gather(dweight_M1, slot_of_Tk.reshape([-1])).reshape(slot_of_Tk.shape)
        dout_MD = scale_rows(grad_MD, weight_M1)
        return *where_needed(ctx.frozen, dout_MD, dweight), None, None, None


def _by_slot(weight_Tk: Tensor, order_M: Tensor, like: Tensor) -> Tensor:
    """Weights in expert order, [M, 1], in the dtype of `like`."""
    return paddle.gather(weight_Tk.reshape([-1, 1]), order_M).astype(like.dtype)


def combine(out_MD: Tensor, weight_Tk: Tensor, order_M: Tensor, token_of_M: Tensor, slot_of_Tk: Tensor) -> Tensor:
    """Sum the k expert outputs of each token by its weights."""
    if paddle.is_grad_enabled():
        return _Combine.apply(out_MD, weight_Tk, order_M, token_of_M, slot_of_Tk)
    return _sum_slots(scale_rows(out_MD, _by_slot(weight_Tk, order_M, out_MD)), slot_of_Tk)


def _sum_slots(x_MD: Tensor, slot_of_Tk: Tensor) -> Tensor:
    total = paddle.gather(x_MD, slot_of_Tk[:, 0])
    for j in range(1, slot_of_Tk.shape[1]):
        total.add_(paddle.gather(x_MD, slot_of_Tk[:, j]))
    return total


class Experts(nn.Layer):
    """E gated MLPs, stacked: `up_gate_proj` [E, D, 2I] (gate half first) and `down_proj` [E, I,
    D].
    """

    def __init__(self, num_experts: int, width: int, inner: int) -> None:
        super().__init__()
        zero = nn.initializer.Constant(0.0)
        self.up_gate_proj = self.create_parameter([num_experts, width, 2 * inner], default_initializer=zero)
        self.down_proj = self.create_parameter([num_experts, inner, width], default_initializer=zero)
        self.up_gate_product, self.down_product = GroupedProduct(), GroupedProduct()

    def forward(self, x_MD: Tensor, counts: Counts) -> Tensor:
        both = self.up_gate_product(x_MD, self.up_gate_proj, counts)
        inner = gated_halves(both) if mkl.ready(both) else swiglu(*_halves(both))
        return self.down_product(inner, self.down_proj, counts)


@dataclass(frozen=True)
class ExpertWork:
    """One family's part of one layer: the experts, and the rows for them, sorted by expert,
    `counts[e]` for expert e. No rows: None.
    """

    experts: Experts
    rows_MD: Tensor | None
    counts: Counts


class ExpertRows(nn.Layer):
    """Each family's rows through its experts, as a layer without parameters: where the experts live
    elsewhere, another one steps in.
    """

    def forward(self, work: list[ExpertWork]) -> list[Tensor | None]:
        return [None if w.rows_MD is None else w.experts(w.rows_MD, w.counts) for w in work]


class Tallies(nn.Layer):
    """The `tally` of each modality's router [modalities, E + 2] over the whole pack, as a layer
    without parameters: where its tokens lie on several ranks, another one steps in and adds theirs.
    """

    def forward(self, tally_mE: Tensor) -> Tensor:
        return tally_mE


class _Halves(PyLayer):
    """Split the last axis in two. Paddle's slice backward adds two zero-filled copies instead of
    concatenating.
    """

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return _split_rows(x)

    @staticmethod
    def backward(ctx, left, right):  # type: ignore[no-untyped-def]
        return paddle.concat([left, right], axis=-1)


def _split_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Halves of each row, by gathering rows of half width: much faster on the CPU than copying two
    strided slices.
    """
    rows, half = x.shape[0], x.shape[1] // 2
    x = x.reshape([2 * rows, half])
    even, odd = _every_other(rows)
    return paddle.gather(x, even), paddle.gather(x, odd)


@lru_cache(maxsize=16)
def _every_other(rows: int) -> tuple[Tensor, Tensor]:
    """Even and odd numbers below 2 * rows. (`paddle.arange` takes ten times as long to get
    going.)
    """
    even = np.arange(0, 2 * rows, 2)
    return paddle.to_tensor(even), paddle.to_tensor(even + 1)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return _Halves.apply(x) if paddle.is_grad_enabled() else _split_rows(x)


@dataclass(frozen=True)
class Routing:
    """One modality's decisions: weights and experts per token, logits in float32."""

    logits_TE: Tensor
    weight_Tk: Tensor
    chosen_Tk: Tensor


def route(
    x_TD: Tensor,
    weight_DE: Tensor,
    bias_E: Tensor,
    top_k: int,
    norm_min: float = 1e-12,
    forced_Tk: np.ndarray | None = None,
) -> Routing:
    """Choose by softmax + bias, weigh by softmax alone, renormalise.
    Everything in the router's float32 (float64 stays).
    """
    logits = paddle.matmul(x_TD.astype(weight_DE.dtype), weight_DE)
    probs = F.softmax(logits, axis=-1)
    chosen = paddle.topk(probs.detach() + bias_E, top_k, axis=-1)[1]
    if forced_Tk is not None:
        chosen = paddle.to_tensor(np.where(forced_Tk < 0, chosen.numpy(), forced_Tk).astype(np.int64))
    weight = paddle.take_along_axis(probs, chosen, axis=1)
    return Routing(logits, weight / weight.sum(-1, keepdim=True).clip(min=norm_min), chosen)


@dataclass(frozen=True)
class _Sorted:
    """One modality's (token, expert) pairs, sorted by expert, and the way back to tokens."""

    rows_MD: Tensor
    counts_E: Tensor  # on the device
    routing: Routing
    order_M: Tensor
    token_of_M: Tensor
    slot_of_Tk: Tensor

    def combined(self, out_MD: Tensor) -> Tensor:
        """The weighted sum of each token's expert outputs."""
        return combine(out_MD, self.routing.weight_Tk, self.order_M, self.token_of_M, self.slot_of_Tk)


@dataclass(frozen=True)
class FewChosen:
    """A few tokens' (token, expert) pairs, sorted by expert, as arrays: their rows, how many each
    expert has, the weight of each, where each token's k pairs are, and the experts chosen.
    """

    rows_MD: np.ndarray
    counts_E: np.ndarray
    weight_M: np.ndarray
    slot_of_Tk: np.ndarray
    chosen_Tk: np.ndarray


def choose_few(x: np.ndarray, weight_DE: np.ndarray, bias_E: np.ndarray, top_k: int, norm_min: float) -> FewChosen:
    """`route` and the sorting by expert of a few rows [T, D]."""
    logits = x.astype(weight_DE.dtype, copy=False) @ weight_DE
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    chosen_Tk = np.argsort(-(probs + bias_E), -1, kind="stable")[:, :top_k]
    share_Tk = probs[np.arange(len(x))[:, None], chosen_Tk]
    share_Tk /= np.maximum(share_Tk.sum(-1, keepdims=True), norm_min)
    expert_M = chosen_Tk.reshape(-1)
    order_M = np.argsort(expert_M, kind="stable")
    slot_M = np.empty_like(order_M)
    slot_M[order_M] = np.arange(len(order_M))
    return FewChosen(
        x[order_M // top_k],
        np.bincount(expert_M, minlength=weight_DE.shape[1]),
        share_Tk.reshape(-1)[order_M].astype(x.dtype, copy=False),
        slot_M.reshape(chosen_Tk.shape),
        chosen_Tk,
    )


class _SortedFew:
    """`_Sorted` while stepping."""

    def __init__(self, few: FewChosen) -> None:
        self.few, self.rows_MD, self.counts = few, mkl.made(few.rows_MD), tuple(few.counts_E.tolist())

    def combined(self, out_MD: Tensor) -> Tensor:
        out = mkl.view(out_MD) * self.few.weight_M[:, None]
        return mkl.made(out[self.few.slot_of_Tk].sum(1))


def _asked_for(parts: Mapping[int, _Sorted | _SortedFew]) -> Callable[[], dict[int, Counts]]:
    """Start fetching each modality's counts to the host; the result waits for them."""
    known = {m: part.counts for m, part in parts.items() if isinstance(part, _SortedFew)}
    asked = {m: part.counts_E for m, part in parts.items() if isinstance(part, _Sorted)}
    arriving = Arriving(*asked.values()) if asked else None
    return lambda: {**known, **(dict(zip(asked, arriving.tuples(), strict=True)) if arriving else {})}


class _Gate(nn.Layer):
    """Router matrices, named as in the checkpoints: `weight` is text, `weight_1` vision; float32 in
    a model of any other dtype.
    """

    def __init__(self, width: int, moe: MoEConfig) -> None:
        super().__init__()
        dtype = "float64" if paddle.get_default_dtype() == "float64" else "float32"
        zero = nn.initializer.Constant(0.0)
        self.weight = self.create_parameter([width, moe.num_experts], dtype=dtype, default_initializer=zero)
        if moe.num_modalities == 2:
            self.weight_1 = self.create_parameter([width, moe.num_experts], dtype=dtype, default_initializer=zero)

    def of(self, modality: int) -> Tensor:
        return self.weight_1 if modality else self.weight


class _Statics(nn.Layer):
    """The selection bias (a parameter that no gradient moves) and the counts that move it."""

    def __init__(self, moe: MoEConfig, dtype: str) -> None:
        super().__init__()
        shape = [moe.num_modalities, moe.num_experts]
        self.e_score_correction_bias = self.create_parameter(
            shape, dtype=dtype, default_initializer=nn.initializer.Constant(0.0)
        )
        self.e_score_correction_bias.stop_gradient = True
        self.register_buffer("expert_usage", paddle.zeros(shape, "int64"), persistable=False)


class MoELayer(nn.Layer):
    """Routes each modality's tokens through its own experts and adds the shared expert once, to
    everyone.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        moe = config.moe
        if moe is None:
            raise AssertionError("a dense model has no MoE layer")
        self.layer, self.moe = layer, moe
        self.gate = _Gate(config.hidden_size, moe)
        self.moe_statics = _Statics(moe, str(self.gate.weight.dtype).rsplit(".", 1)[-1])
        self.text_experts = Experts(moe.num_experts, config.hidden_size, moe.intermediate_size[0])
        if moe.num_modalities == 2:
            self.vision_experts = Experts(moe.num_experts, config.hidden_size, moe.intermediate_size[1])
        self.expert_rows, self.tallies = ExpertRows(), Tallies()
        if moe.num_shared_experts:
            self.shared_experts = GatedMLP(config.hidden_size, moe.shared_intermediate_size)

    def forward(
        self, x_TD: Tensor, text_index: Tensor | None, vision_index: Tensor | None, tap: RouterTap | None = None
    ) -> Tensor:
        """`text_index`/`vision_index`: positions of each modality's tokens; both None: every token
        is text.
        """
        indices = (text_index, vision_index)
        if vision_index is None:
            parts = {0: self._sort(x_TD, 0, tap)}
        else:
            parts = {
                m: self._sort(paddle.gather(x_TD, index), m, tap, index)
                for m, index in enumerate(indices)
                if index is not None and index.shape[0]
            }
        counts_of = _asked_for(parts)
        losses = self._losses(parts, tap)
        # a card computes this while the counts travel to the host
        shared = self._shared(x_TD) if on_card(x_TD) and type(self.expert_rows) is ExpertRows else None
        counts, nothing = counts_of(), (0,) * self.moe.num_experts
        families = (self.text_experts, self.vision_experts) if self.moe.num_modalities == 2 else (self.text_experts,)
        work = [
            ExpertWork(experts, parts[m].rows_MD, counts[m]) if m in parts else ExpertWork(experts, None, nothing)
            for m, experts in enumerate(families)
        ]
        outs = {m: parts[m].combined(rows) for m, rows in enumerate(self.expert_rows(work)) if rows is not None}
        if vision_index is None:
            out = outs[0]
        else:
            order = paddle.concat([indices[m] for m in parts])
            # `order` is a permutation; gathering by its inverse puts every token back where it was.
            out = paddle.gather(paddle.concat([outs[m] for m in parts]), paddle.argsort(order))
        if losses and tap is not None:
            out = _AddLoss.apply(out, sum(losses[1:], losses[0]), tap.scale)
        shared = self._shared(x_TD) if shared is None else shared
        return out if shared is None else out + shared

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        return self.shared_experts(x_TD) if self.moe.num_shared_experts else None

    def _sort(
        self, x_TD: Tensor, modality: int, tap: RouterTap | None, index: Tensor | None = None
    ) -> _Sorted | _SortedFew:
        weight_DE, bias_E = self.gate.of(modality), self.moe_statics.e_score_correction_bias[modality]
        if mkl.is_stepping() and (tap is None or (tap.ids_only and tap.force is None)):
            few = choose_few(x_TD.numpy(), mkl.view(weight_DE), bias_E.numpy(), self.moe.top_k, self.moe.norm_min)
            if tap is not None:
                tap.chosen.append((self.layer, modality, few.chosen_Tk))
            return _SortedFew(few)
        forced_Tk = None
        if tap is not None and tap.force is not None:
            at_T = np.arange(x_TD.shape[0]) if index is None else index.numpy()
            forced_Tk = tap.force[self.layer][tap.first + at_T]
        r = route(x_TD, weight_DE, bias_E, self.moe.top_k, self.moe.norm_min, forced_Tk)
        pair_expert = r.chosen_Tk.reshape([-1])
        order_M = paddle.argsort(pair_expert, stable=True)
        counts_E = rows_of_experts(pair_expert, self.moe.num_experts)
        token_of_M = order_M // self.moe.top_k
        slot_of_Tk = paddle.argsort(order_M).reshape(r.chosen_Tk.shape)
        x_MD = (
            _Dispatch.apply(x_TD, token_of_M, slot_of_Tk)
            if paddle.is_grad_enabled()
            else paddle.gather(x_TD, token_of_M)
        )
        if tap is not None:
            first_pass = not (tap.recomputed and paddle.is_grad_enabled())
            if tap.count_usage and first_pass:
                self.moe_statics.expert_usage[modality] += counts_E
            if tap.ids_only and first_pass:
                tap.chosen.append((self.layer, modality, r.chosen_Tk.numpy()))
            if tap.keep and first_pass:
                tap.records.append(RouterRecord(self.layer, modality, r.logits_TE, r.chosen_Tk))
            if forced_Tk is not None and first_pass:
                tap.flips.append(_flips(r.logits_TE, bias_E, forced_Tk))
        return _Sorted(x_MD, counts_E, r, order_M, token_of_M, slot_of_Tk)

    def _losses(self, parts: dict[int, _Sorted | _SortedFew], tap: RouterTap | None) -> list[Tensor]:
        """The routers' own losses. A frozen router gets none: its gradient would only reach the
        layers below it.
        """
        trained = [m for m in range(self.moe.num_modalities) if not self.gate.of(m).stop_gradient]
        if tap is None or not tap.weights or not trained or not paddle.is_grad_enabled():
            return []
        logits = {m: part.routing.logits_TE for m, part in parts.items() if isinstance(part, _Sorted)}
        nothing = paddle.zeros([self.moe.num_experts + 2], self.gate.of(0).dtype)
        tallies = [
            tally(F.softmax(logits[m], axis=-1), self.moe.top_k) if m in logits else nothing
            for m in range(self.moe.num_modalities)
        ]
        whole_mE, weights = self.tallies(paddle.stack(tallies)), tap.weights
        found = [
            router_loss(logits[m], self.gate.of(m), self.moe.top_k, weights, m, whole_mE[m])
            for m in trained
            if m in logits
        ]
        return [loss for loss in found if loss is not None]


def _flips(logits_TE: Tensor, bias_E: Tensor, forced_Tk: np.ndarray) -> tuple[int, int]:
    """(tokens whose own choice differs from what is forced, forced tokens)."""
    kept_T = (forced_Tk >= 0).all(-1)
    score_TE = F.softmax(logits_TE.detach(), axis=-1) + bias_E
    own_Tk = paddle.topk(score_TE, forced_Tk.shape[1], axis=-1)[1].numpy()
    differ_T = (np.sort(own_Tk, -1) != np.sort(forced_Tk, -1)).any(-1)
    return int((differ_T & kept_T).sum()), int(kept_T.sum())


def update_correction_bias(model: nn.Layer, coefficient: float) -> None:
    """Aux-loss-free balancing (Wang et al. 2408.15664): bias += coefficient * sign(mean usage -
    usage) per layer and modality, then usage := 0.

    The row of a frozen router stays as it is. Under data parallelism the caller sums `expert_usage`
    over ranks first.
    """
    with paddle.no_grad():
        for layer in model.sublayers():
            if not isinstance(layer, MoELayer):
                continue
            usage = layer.moe_statics.expert_usage.astype("float32")
            step = paddle.sign(usage.mean(-1, keepdim=True) - usage) * coefficient
            for modality in range(layer.moe.num_modalities):
                if layer.gate.of(modality).stop_gradient:
                    step[modality] = 0.0
            bias = layer.moe_statics.e_score_correction_bias
            bias.set_value(bias + step.astype(bias.dtype))
            layer.moe_statics.expert_usage.set_value(paddle.zeros_like(layer.moe_statics.expert_usage))
