"""Hidden states -> log-probability of each target token, without ever holding all scores: the seam
between the model and every objective.

Legend: T tokens, D width, V vocabulary. Refuses to know: which tokens count, how they are averaged,
what is done with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from ernie_tune.config.language import say
from ernie_tune.models import mkl
from ernie_tune.models.layers import row_sum, scale_rows
from ernie_tune.parallel.mesh import MAX, Group
from ernie_tune.parallel.placement import placement_of

# Scores are made and consumed in chunks that stay in the processor's cache.
CHUNK_BYTES = 16 * 2**20
# Exponentials of scores are kept for the backward while they are smaller than this; above it they
# are computed again.
KEEP_BYTES = 512 * 2**20
_LOWEST = -1e30


class _Slice:
    """This rank's run of a vocabulary that is split over a group: which targets are its own, and
    sums over the group.
    """

    def __init__(self, group: Group, target_T: Tensor, own_vocab: int) -> None:
        local = target_T.numpy() - group.rank * own_vocab
        mine = (local >= 0) & (local < own_vocab)
        self.group = group
        self.target_T = paddle.to_tensor(np.where(mine, local, 0))
        self.mine_T1 = paddle.to_tensor(mine.astype(np.float32)[:, None])

    def own(self, banned: Sequence[int], own_vocab: int) -> list[int]:
        """Those of the ids that lie in this rank's run, counted from its start."""
        local = (b - self.group.rank * own_vocab for b in banned)
        return [b for b in local if 0 <= b < own_vocab]

    def whole(self, dhidden_TD: Tensor) -> Tensor:
        """The gradient through all of the vocabulary."""
        return self.group.sum_(dhidden_TD)

    def any(self, flag: bool) -> bool:
        return bool(self.group.reduce_(paddle.to_tensor([int(flag)]), MAX).item())


class _TokenLogp(PyLayer):
    @staticmethod
    def forward(ctx, hidden_TD, weight, target_T, how, entropy):  # type: ignore[no-untyped-def]
        ctx.how, ctx.entropy = how, entropy
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs its backward nothing
        tokens, vocab = hidden_TD.shape[0], weight.shape[0 if how.transposed else 1]
        needs_grad = not (hidden_TD.stop_gradient and weight.stop_gradient)
        keep = needs_grad and tokens * vocab * 4 <= KEEP_BYTES
        kept, logps, entropies = [], [], []
        for a, b in _chunks(tokens, vocab):
            logp, e, z = _scored(hidden_TD, weight, target_T, (a, b), how)
            logps.append(logp)
            if entropy:
                entropies.append(_entropy(e, z, how.part))
            if keep:
                kept.append((e, z))
        ctx.kept = kept if keep else None
        ctx.save_for_backward(hidden_TD, weight, target_T)
        logp_T = paddle.concat(logps).squeeze(1)
        return (logp_T, paddle.concat(entropies).squeeze(1)) if entropy else logp_T

    @staticmethod
    def backward(ctx, grad_T, entropy_grad_T=None):  # type: ignore[no-untyped-def]
        hidden_TD, weight, target_T = ctx.saved_tensor()
        how, part = ctx.how, ctx.how.part
        if grad_T is None:
            grad_T = paddle.zeros_like(entropy_grad_T)
        vocab = weight.shape[0 if how.transposed else 1]
        # d logp / d scores = onehot - e / z: the exponentials go through two products as they are,
        # rows of the small side are scaled by grad / z.
        # d entropy / d scores = -p (log p + entropy): with it the exponentials are weighed first.
        grad_T1 = (grad_T / how.temperature).unsqueeze(1)
        dh, dw = [], None
        for i, (a, b) in enumerate(_chunks(hidden_TD.shape[0], vocab)):
            e, z = ctx.kept[i] if ctx.kept is not None else _scored(hidden_TD, weight, target_T, (a, b), how)[1:]
            scale_n1 = -grad_T1[a:b] / z
            if entropy_grad_T is not None and ctx.entropy:
                more_n1 = (entropy_grad_T / how.temperature).unsqueeze(1)[a:b]
                e = e * (grad_T1[a:b] + more_n1 * (_log(e) - paddle.log(z) + _entropy(e, z, part)))
                scale_n1 = -1 / z
            if not hidden_TD.stop_gradient:
                product = paddle.matmul(e.astype(weight.dtype), weight, transpose_y=not how.transposed)
                dh.append(scale_rows(product.astype(e.dtype), scale_n1))
            if not weight.stop_gradient:
                rows = scale_rows(hidden_TD[a:b].astype(e.dtype), scale_n1)
                left, right = (e, rows) if how.transposed else (rows, e)
                product = paddle.matmul(left, right, transpose_x=True)
                dw = product if dw is None else dw.add_(product)
        dhidden = dweight = None
        if part is not None:
            grad_T1 = grad_T1 * part.mine_T1.astype(grad_T1.dtype)
        if not hidden_TD.stop_gradient:
            rows = paddle.gather(weight, target_T) if how.transposed else paddle.gather(weight, target_T, axis=1).t()
            dhidden = paddle.concat(dh) + rows.astype(grad_T1.dtype) * grad_T1
            dhidden = (dhidden if part is None else part.whole(dhidden)).astype(hidden_TD.dtype)
        if dw is not None:
            rows = hidden_TD.astype(grad_T1.dtype) * grad_T1
            dweight = paddle.index_add_(dw, target_T, 0 if how.transposed else 1, rows if how.transposed else rows.t())
            dweight = dweight.astype(weight.dtype)
        return dhidden, dweight, None


@dataclass(frozen=True)
class _How:
    """How scores are made of hidden states: the weight's layout, the temperature, ids that cannot
    be chosen (of this rank's run), the split.
    """

    transposed: bool
    temperature: float
    banned: tuple[int, ...]
    part: _Slice | None


def _scored(
    hidden_TD: Tensor, weight: Tensor, target_T: Tensor, chunk: tuple[int, int], how: _How
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability of the target [n, 1], e [n, V], z [n, 1]) of one chunk; its softmax is e /
    z. V is this rank's run where the vocabulary is split.
    """
    (a, b), part = chunk, how.part
    target = target_T[a:b]
    scores = paddle.matmul(hidden_TD[a:b], weight, transpose_y=how.transposed)
    if scores.dtype in (paddle.bfloat16, paddle.float16):
        scores = scores.astype("float32")
    if how.temperature != 1.0:
        scores = scores / how.temperature
    _fill_(scores, how.banned, 0.0)
    far = not mkl.near_zero(scores)
    if part is not None:
        far = part.any(far)
    if far:
        # else a banned maximum would push all others below what exp tells apart
        _fill_(scores, how.banned, _LOWEST)
        if part is not None:
            scores = scores - part.group.reduce_(scores.max(-1, keepdim=True), MAX)
        else:
            mkl.below_zero_(scores)
    at = paddle.to_tensor(np.arange(target.shape[0]) * scores.shape[1]) + target
    picked = paddle.gather(scores.reshape([-1]), at).unsqueeze(1)
    e = mkl.exp_(scores, far)
    _fill_(e, how.banned, 0.0)
    z = row_sum(e)
    if part is not None:
        both_n2 = part.group.sum_(paddle.concat([picked * part.mine_T1[a:b].astype(picked.dtype), z], axis=1))
        picked, z = both_n2[:, :1], both_n2[:, 1:]
    return picked - paddle.log(z), e, z


def _fill_(x: Tensor, columns: tuple[int, ...], value: float) -> None:
    """Set some columns in place."""
    if not columns:
        return
    if mkl.ready(x):
        mkl.view(x)[:, list(columns)] = value
    else:
        paddle.index_fill_(x, paddle.to_tensor(np.array(columns)), 1, value)


def _log(e: Tensor) -> Tensor:
    """log of exponentials; of those that are 0, a number that times 0 is 0."""
    return mkl.log_(paddle.clip(e, min=1e-37))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Each row of a times that of b, [n, 1]; without a whole product where memory can be seen."""
    if not mkl.ready(a, b):
        return row_sum(a * b)
    return mkl.made(np.einsum("nv,nv->n", mkl.view(a), mkl.view(b))[:, None])


def _entropy(e: Tensor, z: Tensor, part: _Slice | None) -> Tensor:
    """log z - sum e log e / z, [n, 1]: the entropy of e / z, whatever the scores were shifted
    by.
    """
    own_n1 = _dot(e, _log(e))
    return paddle.log(z) - (own_n1 if part is None else part.group.sum_(own_n1)) / z


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
    banned: Sequence[int] = (),
) -> Tensor:
    """log softmax(hidden @ W / temperature)[target] for each token, [T], in float32 (float64
    stays).

    `weight` is [V, D] with `transposed`, else [D, V] (`ErnieModel.head_weight()` gives both).
    Targets must be valid ids everywhere; pass only the rows whose log-probability is used.
    `banned`: ids that could not be chosen, so that the rest shares their probability, as sampling
    has it; no target may be one of them. `group`: the ranks that the vocabulary is split over, by
    default those that the weight itself names; every one of them must call, with equal hidden
    states and targets, and gets equal values and the whole gradient of the hidden states.
    """
    target_T, how = _prepared(weight, target_T, transposed, temperature, group, banned)
    return _TokenLogp.apply(hidden_TD, weight, target_T, how, False)


def supported_logp(
    hidden_TD: Tensor,
    weight: Tensor,
    target_T: np.ndarray,
    support_TK: np.ndarray,
    *,
    transposed: bool,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ W / temperature)[target] over the ids of `support` alone (-1: none), and
    the entropy of that distribution, [T] each, with a gradient: what was drawn under top-k, top-p
    and min-p (DeepSeek-V3.2, arXiv 2512.02556).

    Scores of no other ids are made: K rows of the weight a token. Raises ValueError for a target
    that is not among them, and for a vocabulary that is split over ranks.
    """
    if placement_of(weight).axis is not None:
        raise ValueError(
            say(
                "keep_sampling_mask (true) must be false where the vocabulary is split over tensor ranks; set it",
                "词表切分到张量并行进程时 keep_sampling_mask（true）须为 false；请修改",
            )
        )
    found_TK = support_TK == np.asarray(target_T)[:, None]
    if not found_TK.any(1).all():
        raise ValueError(
            say(
                f"targets ({int((~found_TK.any(1)).sum())}) must be among the ids that they were sampled from; note both together",
                f"目标（{int((~found_TK.any(1)).sum())} 个）须在其采样时可选的 id 之中；请一并记录",
            )
        )
    tokens, size = support_TK.shape
    ids = paddle.to_tensor(np.maximum(support_TK, 0).reshape(-1))
    rows = paddle.gather(weight if transposed else weight.t(), ids).reshape([tokens, size, -1])
    hidden = hidden_TD.astype(rows.dtype)
    scores = paddle.matmul(rows, hidden.unsqueeze(2)).squeeze(2)
    if scores.dtype in (paddle.bfloat16, paddle.float16):
        scores = scores.astype("float32")
    dead_TK = paddle.to_tensor((support_TK < 0).astype(np.float32)).astype(scores.dtype)
    logp_TK = paddle.nn.functional.log_softmax(scores / temperature + dead_TK * _LOWEST, axis=-1)
    picked = paddle.to_tensor(np.arange(tokens) * size + found_TK.argmax(1))
    live_TK = 1 - dead_TK
    entropy_T = -(paddle.exp(logp_TK) * logp_TK * live_TK).sum(-1)
    return paddle.gather(logp_TK.reshape([-1]), picked), entropy_T


def token_logp_and_entropy(
    hidden_TD: Tensor,
    weight: Tensor,
    target_T: Tensor,
    *,
    transposed: bool,
    temperature: float = 1.0,
    group: Group | None = None,
    banned: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """`token_logp`, and the entropy in nats of each token's whole distribution, [T] each; both with
    a gradient.
    """
    target_T, how = _prepared(weight, target_T, transposed, temperature, group, banned)
    logp_T, entropy_T = _TokenLogp.apply(hidden_TD, weight, target_T, how, True)
    return logp_T, entropy_T


def _prepared(
    weight: Tensor, target_T: Tensor, transposed: bool, temperature: float, group: Group | None, banned: Sequence[int]
) -> tuple[Tensor, _How]:
    where = placement_of(weight)
    group = group or (where.handle if where.axis is not None else None)
    vocab = weight.shape[0 if transposed else 1]
    if group is not None and group.size > 1:
        part = _Slice(group, target_T, vocab)
        return part.target_T, _How(transposed, temperature, tuple(part.own(banned, vocab)), part)
    return target_T, _How(transposed, temperature, tuple(banned), None)
