"""Hidden states -> log-probability of each target token, without ever holding all scores: the seam between the model and every objective.

Legend: T tokens, D width, V vocabulary. Refuses to know: which tokens count, how they are averaged, what is done with them.
"""

from __future__ import annotations

import numpy as np
import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from ernie_tune.models import mkl
from ernie_tune.models.layers import row_sum, scale_rows
from ernie_tune.parallel.mesh import MAX, Group
from ernie_tune.parallel.placement import placement_of

# Scores are made and consumed in chunks that stay in the processor's cache.
CHUNK_BYTES = 16 * 2**20
# Exponentials of scores are kept for the backward while they are smaller than this; above it they are computed again.
KEEP_BYTES = 512 * 2**20


class _Slice:
    """This rank's run of a vocabulary that is split over a group: which targets are its own, and sums over the group."""

    def __init__(self, group: Group, target_T: Tensor, own_vocab: int) -> None:
        local = target_T.numpy() - group.rank * own_vocab
        mine = (local >= 0) & (local < own_vocab)
        self.group = group
        self.target_T = paddle.to_tensor(np.where(mine, local, 0))
        self.mine_T1 = paddle.to_tensor(mine.astype(np.float32)[:, None])

    def whole(self, dhidden_TD: Tensor) -> Tensor:
        """The gradient through all of the vocabulary."""
        return self.group.sum_(dhidden_TD)

    def any(self, flag: bool) -> bool:
        return bool(self.group.reduce_(paddle.to_tensor([int(flag)]), MAX).item())


class _TokenLogp(PyLayer):
    @staticmethod
    def forward(ctx, hidden_TD, weight, target_T, transposed, temperature, part):  # type: ignore[no-untyped-def]
        ctx.args, ctx.part = (transposed, temperature), part
        tokens, vocab = hidden_TD.shape[0], weight.shape[0 if transposed else 1]
        needs_grad = not (hidden_TD.stop_gradient and weight.stop_gradient)
        keep = needs_grad and tokens * vocab * 4 <= KEEP_BYTES
        kept, logps = [], []
        for a, b in _chunks(tokens, vocab):
            logp, *parts = _scored(hidden_TD, weight, target_T, (a, b), transposed, temperature, part)
            logps.append(logp)
            if keep:
                kept.append(parts)
        ctx.kept = kept if keep else None
        ctx.save_for_backward(hidden_TD, weight, target_T)
        return paddle.concat(logps).squeeze(1)

    @staticmethod
    def backward(ctx, grad_T):  # type: ignore[no-untyped-def]
        hidden_TD, weight, target_T = ctx.saved_tensor()
        (transposed, temperature), part = ctx.args, ctx.part
        vocab = weight.shape[0 if transposed else 1]
        # d logp / d scores = onehot - e / z: the exponentials go through two products as they are, rows of the small side are scaled by grad / z.
        grad_T1 = (grad_T / temperature).unsqueeze(1)
        dh, dw = [], None
        for i, (a, b) in enumerate(_chunks(hidden_TD.shape[0], vocab)):
            if ctx.kept is None:
                e, z = _scored(hidden_TD, weight, target_T, (a, b), transposed, temperature, part)[1:]
            else:
                e, z = ctx.kept[i]
            scale_n1 = -grad_T1[a:b] / z
            if not hidden_TD.stop_gradient:
                product = paddle.matmul(e.astype(weight.dtype), weight, transpose_y=not transposed)
                dh.append(scale_rows(product.astype(e.dtype), scale_n1))
            if not weight.stop_gradient:
                rows = scale_rows(hidden_TD[a:b].astype(e.dtype), scale_n1)
                left, right = (e, rows) if transposed else (rows, e)
                product = paddle.matmul(left, right, transpose_x=True)
                dw = product if dw is None else dw.add_(product)
        dhidden = dweight = None
        if part is not None:
            grad_T1 = grad_T1 * part.mine_T1.astype(grad_T1.dtype)
        if not hidden_TD.stop_gradient:
            rows = paddle.gather(weight, target_T) if transposed else paddle.gather(weight, target_T, axis=1).t()
            dhidden = paddle.concat(dh) + rows.astype(grad_T1.dtype) * grad_T1
            dhidden = (dhidden if part is None else part.whole(dhidden)).astype(hidden_TD.dtype)
        if dw is not None:
            rows = hidden_TD.astype(grad_T1.dtype) * grad_T1
            dweight = paddle.index_add_(dw, target_T, 0 if transposed else 1, rows if transposed else rows.t())
            dweight = dweight.astype(weight.dtype)
        return dhidden, dweight, None


def _scored(
    hidden_TD: Tensor,
    weight: Tensor,
    target_T: Tensor,
    chunk: tuple[int, int],
    transposed: bool,
    temperature: float,
    part: _Slice | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability of the target [n, 1], e [n, V], z [n, 1]) of one chunk; its softmax is e / z. V is this rank's run where the vocabulary is split."""
    a, b = chunk
    target = target_T[a:b]
    scores = paddle.matmul(hidden_TD[a:b], weight, transpose_y=transposed)
    if scores.dtype in (paddle.bfloat16, paddle.float16):
        scores = scores.astype("float32")
    if temperature != 1.0:
        scores = scores / temperature
    far = not mkl.near_zero(scores)
    if part is not None:
        if far := part.any(far):
            scores = scores - part.group.reduce_(scores.max(-1, keepdim=True), MAX)
    elif far:
        mkl.below_zero_(scores)
    at = paddle.to_tensor(np.arange(target.shape[0]) * scores.shape[1]) + target
    picked = paddle.gather(scores.reshape([-1]), at).unsqueeze(1)
    e = mkl.exp_(scores, far)
    z = row_sum(e)
    if part is not None:
        both_n2 = part.group.sum_(paddle.concat([picked * part.mine_T1[a:b].astype(picked.dtype), z], axis=1))
        picked, z = both_n2[:, :1], both_n2[:, 1:]
    return picked - paddle.log(z), e, z


def _chunks(tokens: int, vocab: int) -> list[tuple[int, int]]:
    step = max(1, CHUNK_BYTES // (4 * vocab))
    return [(a, min(a + step, tokens)) for a in range(0, tokens, step)]


def token_logp(
    hidden_TD: Tensor,
    weight: Tensor,
    target_T: Tensor,
    *,
    transposed: bool,
    temperature: float = 1.0,
    group: Group | None = None,
) -> Tensor:
    """log softmax(hidden @ W / temperature)[target] for each token, [T], in float32 (float64 stays).

    `weight` is [V, D] with `transposed`, else [D, V] (`ErnieModel.head_weight()` gives both). Targets must be valid ids everywhere; pass only the rows whose
    log-probability is used. `group`: the ranks that the vocabulary is split over, by default those that the weight itself names; every one of them must
    call, with equal hidden states and targets, and gets equal values and the whole gradient of the hidden states.
    """
    where = placement_of(weight)
    group = group or (where.handle if where.axis is not None else None)
    part = None
    if group is not None and group.size > 1:
        part = _Slice(group, target_T, weight.shape[0 if transposed else 1])
        target_T = part.target_T
    return _TokenLogp.apply(hidden_TD, weight, target_T, transposed, temperature, part)
