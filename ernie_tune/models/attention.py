"""Attention over packed segments: every segment attends to itself and to the prefix that it
continues, at the cost of the segments, not of the pack.

Legend: T tokens of the pack, R of them that ask (all where nothing else is said), N query heads, K
key/value heads, G = N/K, H head width, n equal segments of which L tokens ask, S = all tokens of a
segment + length of their prefixes (0 without), B rows, C cache columns.
Refuses to know: rope, projections, who calls it. On the CPU segments of one length share one
product; on a GPU the varlen flash kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer

from ernie_tune.models import mkl
from ernie_tune.models.layers import row_sum, scale_rows, where_needed
from ernie_tune.models.proven import proven
from ernie_tune.models.tiles import Tiles, seen

# Probabilities are kept for the backward while they are smaller than this; above it they are made
# again from queries and keys.
KEEP_PROBS_BYTES = 256 * 2**20
# Query rows per product: later rows see more keys, so a causal segment cut in blocks skips most of
# its upper triangle.
BLOCK_TOKENS = 128
_FAR = 1e30


@dataclass(frozen=True)
class SegmentRun:
    """Segments of one length (with parents: whose prefixes have one length too), which share one
    product.
    """

    starts: tuple[int, ...]  # first token of each
    rows: tuple[int, ...]  # among the tokens that ask, the first one of each
    length: int  # tokens of each that ask, its last ones
    before: int = 0  # tokens of each before those
    prefix: int = 0  # tokens of each segment's parent
    parents: tuple[int, ...] = ()  # first token of each segment's parent

    @property
    def count(self) -> int:
        return len(self.starts)

    @property
    def row_nL(self) -> np.ndarray:
        """The queries' rows among the tokens that ask."""
        return np.asarray(self.rows)[:, None] + np.arange(self.length)

    @property
    def own_nS(self) -> np.ndarray:
        """All tokens of each segment, asking or not."""
        return np.asarray(self.starts)[:, None] + np.arange(self.before + self.length)

    @property
    def keys(self) -> int:
        """Keys that the last query of a segment sees."""
        return self.prefix + self.before + self.length

    def add_to(self, total_TKH: np.ndarray, x_nKSH: np.ndarray) -> None:
        """Add what each segment has of its keys to the tokens that these are: its own, and those
        of its prefix, which others add to as well.
        """
        x_nSKH = x_nKSH.transpose(0, 2, 1, 3)
        for start, x_SKH in zip(self.starts, x_nSKH, strict=True):
            total_TKH[start : start + self.before + self.length] += x_SKH[self.prefix :]
        for parent, x_SKH in zip(self.parents, x_nSKH, strict=False):
            total_TKH[parent : parent + self.prefix] += x_SKH[: self.prefix]


def runs(
    offsets: tuple[int, ...], parents: tuple[int, ...] | None = None, asking: tuple[int, ...] | None = None
) -> Iterator[SegmentRun]:
    """The runs of a pack, by their first segments. `parents`: for each segment the number of the
    one that it continues, -1 for none. `asking`: how many of its last tokens have queries; a
    segment with none is in no run.
    """
    lengths = [b - a for a, b in pairwise(offsets)]
    parents, asking = parents or (-1,) * len(lengths), asking or tuple(lengths)
    rows = np.cumsum([0, *asking]).tolist()
    alike: dict[tuple[int, int, int], list[int]] = {}
    for i, (length, asks, parent) in enumerate(zip(lengths, asking, parents, strict=True)):
        if asks:
            alike.setdefault((asks, length - asks, lengths[parent] if parent >= 0 else 0), []).append(i)
    for (asks, before, prefix), segments in alike.items():
        above = tuple(offsets[parents[i]] for i in segments) if prefix else ()
        starts, first = (tuple(at[i] for i in segments) for at in (offsets, rows))
        yield SegmentRun(starts, first, asks, before, prefix, above)


class AttentionPlan:
    """What one forward's attention layers share: row orders of each run. Lives as long as the
    forward and its backward. `asking`: of how many of its last tokens each segment has queries, and
    so outputs; None: of all.

    Moving rows of H values with a gather is tens of times faster on the CPU than Paddle's copy of a
    transposed view.
    """

    def __init__(
        self,
        offsets: tuple[int, ...],
        causal: bool,
        parents: tuple[int, ...] | None = None,
        asking: tuple[int, ...] | None = None,
    ) -> None:
        self.offsets, self.causal, self.shared, self.all_ask = offsets, causal, parents is not None, asking is None
        self.runs = tuple(runs(offsets, parents, asking))
        self.queries = sum(asking) if asking is not None else offsets[-1]
        self._kept: dict[tuple[object, ...], Tensor] = {}
        self._uses: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def heads_first(self, x_TNH: Tensor, run: SegmentRun, kv_heads: int, keys: bool = False) -> Tensor:
        """Queries of one run, of x [R, N, H] -> [n, K, L*G, H]: under their key/value head,
        position by position. `keys`: of x [T, K, H] -> [n, K, S, H], prefixes before.
        """
        tokens, heads, width = x_TNH.shape
        length = run.keys if keys else run.length
        order = self._order(run, heads, kv_heads, keys and (run.prefix > 0 or not self.all_ask))
        rows = paddle.gather(x_TNH.reshape([tokens * heads, width]), order)
        return rows.reshape([run.count, kv_heads, length * (heads // kv_heads), width])

    def tokens_first(self, parts: list[Tensor], heads: int) -> Tensor:
        """Inverse of `heads_first`: what each run has for its queries -> [R, N, H]."""
        kv_heads, width = parts[0].shape[1], parts[0].shape[-1]
        key = (heads, kv_heads, "back")
        if key not in self._kept:
            order = np.concatenate([_head_rows(run.row_nL, heads, kv_heads) for run in self.runs])
            self._kept[key] = paddle.to_tensor(np.argsort(order))
        rows = paddle.gather(_join([x.reshape([-1, width]) for x in parts], 0), self._kept[key])
        return rows.reshape([self.queries, heads, width])

    def key_gradients(self, gradients: list[Tensor], kv_heads: int) -> Tensor:
        """Gradients [n, K, S, H] of each run's keys -> [T, K, H]: what the continuations of a
        prefix ask of it is added to its own.
        """
        if not self.shared and self.all_ask:
            return self.tokens_first(gradients, kv_heads)
        width = gradients[0].shape[-1]
        if mkl.ready(*gradients):
            total = paddle.zeros([self.offsets[-1], kv_heads, width], gradients[0].dtype)
            for run, gradient in zip(self.runs, gradients, strict=True):
                run.add_to(mkl.view(total), mkl.view(gradient))
            return total
        own, slots = self._slots(kv_heads)
        blank = paddle.zeros([1, width], gradients[0].dtype)
        rows = paddle.concat([*(x.reshape([-1, width]) for x in gradients), blank])
        total = paddle.gather(rows, own)
        for slot in slots:
            total.add_(paddle.gather(rows, slot))
        return total.reshape([self.offsets[-1], kv_heads, width])

    def _order(self, run: SegmentRun, heads: int, kv_heads: int, keys: bool) -> Tensor:
        key = (run, heads, kv_heads, keys)
        if key not in self._kept:
            own = run.own_nS if keys else run.row_nL
            if keys and run.prefix:
                own = np.concatenate([np.asarray(run.parents)[:, None] + np.arange(run.prefix), own], axis=1)
            self._kept[key] = paddle.to_tensor(_head_rows(own, heads, kv_heads))
        return self._kept[key]

    def _slots(self, kv_heads: int) -> tuple[Tensor, list[Tensor]]:
        """Where the key gradients of each (token, head) lie among the rows of all runs: its own,
        then one index per further use as a prefix; the row after the last is blank.
        """
        if kv_heads in self._uses:
            return self._uses[kv_heads]
        base, blank = 0, sum(run.count * run.keys for run in self.runs) * kv_heads
        own = np.full((self.offsets[-1], kv_heads), blank)
        # first token of a parent -> rows of each use, [prefix, K]
        uses: dict[int, list[np.ndarray]] = {}
        for run in self.runs:
            rows = base + np.arange(run.count * kv_heads * run.keys).reshape(run.count, kv_heads, run.keys)
            rows = rows.transpose(0, 2, 1)
            own[run.own_nS] = rows[:, run.prefix :]
            for parent, use in zip(run.parents, rows, strict=False):
                uses.setdefault(parent, []).append(use[: run.prefix])
            base += rows.size
        slots = np.full((max(map(len, uses.values()), default=0), *own.shape), blank)
        for parent, found in uses.items():
            for j, use in enumerate(found):
                slots[j, parent : parent + len(use)] = use
        made = paddle.to_tensor(own.reshape(-1)), [paddle.to_tensor(slot.reshape(-1)) for slot in slots]
        self._uses[kv_heads] = made
        return made

    def blocks(self, run: SegmentRun) -> Iterator[tuple[int, int, int]]:
        """(first query, end query, end key) of each product of one segment."""
        step = BLOCK_TOKENS if self.causal else run.length
        for a in range(0, run.length, step):
            b = min(a + step, run.length)
            yield a, b, run.keys - (run.length - b if self.causal else 0)


def _head_rows(token_nL: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """(token, head) rows of these tokens in the order segment, key/value head, token, query head of
    the group.
    """
    rows = token_nL[:, :, None] * heads + np.arange(heads)
    return rows.reshape(*token_nL.shape, kv_heads, heads // kv_heads).transpose(0, 2, 1, 3).reshape(-1)


class _SegmentAttention(PyLayer):
    @staticmethod
    def forward(ctx, q_TNH, k_TKH, v_TKH, plan):  # type: ignore[no-untyped-def]
        heads, kv_heads, scale = q_TNH.shape[1], k_TKH.shape[1], q_TNH.shape[2] ** -0.5
        probs = sum(run.count * run.length * run.keys for run in plan.runs) * heads
        keep = probs * q_TNH.element_size() <= KEEP_PROBS_BYTES
        outs, ctx.kept = [], []
        for run in plan.runs:
            q = plan.heads_first(q_TNH, run, kv_heads).scale_(scale)
            k, v = (plan.heads_first(x, run, kv_heads, keys=True) for x in (k_TKH, v_TKH))
            work: Tiles | _Blocks = (
                Tiles(q, k, v, run.length, plan.causal) if mkl.ready(q, k, v) else _Blocks(q, k, v, run, plan, keep)
            )
            outs.append(work.forward())
            ctx.kept.append(work)
        out = plan.tokens_first(outs, heads)
        ctx.plan, ctx.kv_heads, ctx.frozen = plan, kv_heads, tuple(x.stop_gradient for x in (q_TNH, k_TKH, v_TKH))
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad_TNH):  # type: ignore[no-untyped-def]
        (out_TNH,) = ctx.saved_tensor()
        plan, heads, width, kv_heads = ctx.plan, out_TNH.shape[1], out_TNH.shape[2], ctx.kv_heads
        pull_TN1 = row_sum(grad_TNH * out_TNH)
        grads: tuple[list[Tensor], ...] = ([], [], [])
        for run, work in zip(plan.runs, ctx.kept, strict=True):
            dq, dk, dv = work.backward(*(plan.heads_first(x, run, kv_heads) for x in (grad_TNH, pull_TN1)))
            for found, x in zip(grads, (dq.scale_(width**-0.5), dk, dv), strict=True):
                found.append(x)
        keys, values = (plan.key_gradients(parts, kv_heads) for parts in grads[1:])
        return where_needed(ctx.frozen, plan.tokens_first(grads[0], heads), keys, values)


class _Blocks:
    """softmax(q k^T) v of one run in Paddle's operators, a block of queries after another, forward
    once and then backward. q [n, K, L*G, H] is scaled already. `keep`: exponentials are kept for
    the backward. (tiles.py has the same formulas for the math library.)
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, run: SegmentRun, plan: AttentionPlan, keep: bool) -> None:
        self.q, self.k, self.v, self.run, self.plan, self.keep = q, k, v, run, plan, keep
        self.parts: list[tuple[Tensor, Tensor] | None] = []

    def forward(self) -> Tensor:
        pieces = []
        for block in self.plan.blocks(self.run):
            e, z = self._softmax_parts(block)
            self.parts.append((e, z) if self.keep else None)
            # Dividing H columns is cheaper than dividing as many as there are keys.
            pieces.append(scale_rows(paddle.matmul(e, self.v[:, :, : block[2]]), 1.0 / z))
        return _join(pieces, 2)

    def backward(self, g: Tensor, pull: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v. `pull`: each row of the gradient times that of the output."""
        q, k, v, group = self.q, self.k, self.v, self.q.shape[2] // self.run.length
        # The row sum that softmax's backward subtracts rides along as one more column of the
        # product grad @ v^T.
        v_aug = paddle.concat([v, paddle.full([*v.shape[:-1], 1], -1.0, v.dtype)], axis=-1)
        dq, dk, dv = [], paddle.zeros_like(k), paddle.zeros_like(v)
        for block, kept in zip(self.plan.blocks(self.run), self.parts, strict=True):
            e, z = kept or self._softmax_parts(block)
            a, b, end = block
            rows = slice(a * group, b * group)
            # softmax is e / z: z is divided out of the narrow side here too
            g_rows = scale_rows(g[:, :, rows], 1.0 / z)
            g_aug = paddle.concat([g_rows, pull[:, :, rows] / z], axis=-1)
            ds = paddle.matmul(g_aug, v_aug[:, :, :end], transpose_y=True).multiply_(e)
            dq.append(paddle.matmul(ds, k[:, :, :end]))
            dk[:, :, :end] += paddle.matmul(ds, q[:, :, rows], transpose_x=True)
            dv[:, :, :end] += paddle.matmul(e, g_rows, transpose_x=True)
        return _join(dq, 2), dk, dv

    def _softmax_parts(self, block: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """(e [n, K, rows*G, end], z [n, K, rows*G, 1]) of one block of scores; its softmax is e /
        z.
        """
        a, b, end = block
        group = self.q.shape[2] // self.run.length
        e = paddle.matmul(self.q[:, :, a * group : b * group], self.k[:, :, :end], transpose_y=True)
        if self.plan.causal:
            live = paddle.to_tensor(seen(b - a, group, end))
            e.add_(((live - 1.0) * _FAR).astype(e.dtype))
        mkl.exp_(mkl.below_zero_(e), far=True)
        if self.plan.causal:
            e.multiply_(live.astype(e.dtype))
        return e, row_sum(e)


def _join(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else paddle.concat(parts, axis=axis)


def segment_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, plan: AttentionPlan) -> Tensor:
    """softmax(q k^T / sqrt(H)) v inside each segment and its prefix; query head j reads key/value
    head j // (N/K). Returns [T, N, H]; queries and result are [R, N, H] where not all tokens ask.
    """
    if (
        not plan.shared
        and plan.all_ask
        and q_TNH.place.is_gpu_place()
        and q_TNH.dtype in (paddle.bfloat16, paddle.float16)
    ):
        heads, kv_heads, width = q_TNH.shape[1], k_TKH.shape[1], q_TNH.shape[2]
        if flash_holds(heads, kv_heads, width, plan.causal, q_TNH.dtype):
            return _flash(q_TNH, k_TKH, v_TKH, plan)
    return _SegmentAttention.apply(q_TNH, k_TKH, v_TKH, plan)


def _flash(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, plan: AttentionPlan) -> Tensor:
    bounds = paddle.to_tensor(plan.offsets, dtype="int32")
    longest = max(run.length for run in plan.runs)
    return F.flash_attention.flash_attn_unpadded(
        q_TNH, k_TKH, v_TKH, bounds, bounds, longest, longest, q_TNH.shape[2] ** -0.5, causal=plan.causal
    )[0]


def flash_holds(heads: int, kv_heads: int, width: int, causal: bool, dtype: paddle.dtype) -> bool:
    """Whether the varlen flash kernel gives what the plain path gives here, for such heads."""
    plan = AttentionPlan((0, 5, 37, 165), causal)
    rng = np.random.default_rng(0)
    shapes = [(plan.offsets[-1], count, width) for count in (heads, kv_heads, kv_heads, heads)]
    values = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]

    def results(attend: Callable[..., Tensor]) -> list[Tensor]:
        *inputs, grad = (paddle.to_tensor(value).astype(dtype) for value in values)
        for x in inputs:
            x.stop_gradient = False
        with paddle.set_grad_enabled(True):
            out = attend(*inputs, plan)
        return [out, *paddle.grad(out, inputs, grad)]

    kind = (heads, kv_heads, width, causal)
    return proven("flash attention", kind, dtype, lambda: results(_flash), lambda: results(_SegmentAttention.apply))


def cached_attention(q_BNH: Tensor, k_BKCH: Tensor, v_BKCH: Tensor, bias_BC: Tensor) -> Tensor:
    """One new token per row against that row's cache; `bias_BC` is 0 on live columns and very
    negative on the padding at the left. Returns [B, N, H].
    """
    rows, heads, width = q_BNH.shape
    kv_heads = k_BKCH.shape[1]
    q = q_BNH.reshape([rows, kv_heads, heads // kv_heads, width]) * width**-0.5
    scores = paddle.matmul(q, k_BKCH, transpose_y=True)
    if scores.dtype in (paddle.bfloat16, paddle.float16):
        scores = scores.astype(bias_BC.dtype)
    if mkl.ready(scores):  # Paddle's broadcast costs more than the rest of this function
        mkl.view(scores)[...] += mkl.view(bias_BC)[:, None, None]
    else:
        scores = scores + bias_BC.astype(scores.dtype).unsqueeze([1, 2])
    probs = F.softmax(scores, axis=-1).astype(v_BKCH.dtype)
    return paddle.matmul(probs, v_BKCH).reshape([rows, heads, width])
