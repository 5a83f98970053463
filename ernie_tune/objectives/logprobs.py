"""Hidden states -> log-probability of each target token, without ever holding all scores: the seam between the model and every objective.

Legend: T tokens, D width, V vocabulary. Refuses to know: which tokens count, how they are averaged, what is done with them.
"""

from __future__ import annotations

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from ernie_tune.models.layers import row_sum

# Scores are made and consumed in chunks that stay in the processor's cache.
CHUNK_BYTES = 16 * 2**20
# Softmax outputs are kept for the backward while they are smaller than this; above it they are computed again.
KEEP_BYTES = 512 * 2**20


class _TokenLogp(PyLayer):
    @staticmethod
    def forward(ctx, hidden_TD, weight, target_T, transposed, temperature):  # type: ignore[no-untyped-def]
        ctx.args = (transposed, temperature)
        tokens, vocab = hidden_TD.shape[0], weight.shape[0 if transposed else 1]
        kept, logps = [], []
        needs_grad = not (hidden_TD.stop_gradient and weight.stop_gradient)
        keep = needs_grad and tokens * vocab * 4 <= KEEP_BYTES
        for a, b in _chunks(tokens, vocab):
            scores = _scores(hidden_TD[a:b], weight, transposed, temperature)
            shifted = scores - scores.max(-1, keepdim=True)
            picked = paddle.take_along_axis(shifted, target_T[a:b].unsqueeze(1), axis=1)
            weights = paddle.exp(shifted)
            total = row_sum(weights)
            logps.append(picked - paddle.log(total))
            if keep:
                kept.append((weights, total))
        ctx.kept = kept if keep else None
        ctx.save_for_backward(hidden_TD, weight, target_T)
        return paddle.concat(logps).squeeze(1)

    @staticmethod
    def backward(ctx, grad_T):  # type: ignore[no-untyped-def]
        hidden_TD, weight, target_T = ctx.saved_tensor()
        transposed, temperature = ctx.args
        vocab = weight.shape[0 if transposed else 1]
        # d logp / d scores = onehot - softmax: the softmax goes through two products unscaled, the upstream gradient scales rows of the small side.
        grad_T1 = (grad_T / temperature).unsqueeze(1)
        dh: list[Tensor] | None = None if hidden_TD.stop_gradient else []
        dw = paddle.zeros(weight.shape, grad_T.dtype) if not weight.stop_gradient else None
        for i, (a, b) in enumerate(_chunks(hidden_TD.shape[0], vocab)):
            if ctx.kept is not None:
                weights, total = ctx.kept[i]
            else:
                scores = _scores(hidden_TD[a:b], weight, transposed, temperature)
                weights = paddle.exp(scores - scores.max(-1, keepdim=True))
                total = row_sum(weights)
            scale = grad_T1[a:b] / total
            if dh is not None:
                dh.append(
                    paddle.matmul(weights.astype(weight.dtype), weight, transpose_y=not transposed).astype(scale.dtype)
                    * -scale
                )
            if dw is not None:
                scaled = hidden_TD[a:b].astype(scale.dtype) * -scale
                dw += (
                    paddle.matmul(weights, scaled, transpose_x=True)
                    if transposed
                    else paddle.matmul(scaled, weights, transpose_x=True)
                )
        dhidden = (
            _add_target_rows(dh, weight, target_T, grad_T1, transposed).astype(hidden_TD.dtype)
            if dh is not None
            else None
        )
        if dw is not None:
            onehot_side = hidden_TD.astype(grad_T.dtype) * grad_T1
            dw = _add_target_columns(dw, onehot_side, target_T, transposed).astype(weight.dtype)
        return dhidden, dw, None


def _chunks(tokens: int, vocab: int) -> list[tuple[int, int]]:
    step = max(1, CHUNK_BYTES // (4 * vocab))
    return [(a, min(a + step, tokens)) for a in range(0, tokens, step)]


def _scores(hidden_TD: Tensor, weight: Tensor, transposed: bool, temperature: float) -> Tensor:
    scores = paddle.matmul(hidden_TD, weight, transpose_y=transposed)
    scores = scores.astype("float32") if scores.dtype in (paddle.bfloat16, paddle.float16) else scores
    return scores if temperature == 1.0 else scores / temperature


def _add_target_rows(dh: list[Tensor], weight: Tensor, target_T: Tensor, grad_T1: Tensor, transposed: bool) -> Tensor:
    rows = paddle.gather(weight, target_T) if transposed else paddle.gather(weight, target_T, axis=1).t()
    return paddle.concat(dh) + rows.astype(grad_T1.dtype) * grad_T1


def _add_target_columns(dw: Tensor, rows_TD: Tensor, target_T: Tensor, transposed: bool) -> Tensor:
    return paddle.index_add(dw, target_T, 0 if transposed else 1, rows_TD if transposed else rows_TD.t())


def token_logp(
    hidden_TD: Tensor, weight: Tensor, target_T: Tensor, *, transposed: bool, temperature: float = 1.0
) -> Tensor:
    """log softmax(hidden @ W / temperature)[target] for each token, [T], in float32 (float64 stays).

    `weight` is [V, D] with `transposed`, else [D, V] (`ErnieModel.head_weight()` gives both). Targets must be valid ids everywhere: replace
    ignored ones by any id and mask the result. Only rows whose log-probability is used need to be passed.
    """
    return _TokenLogp.apply(hidden_TD, weight, target_T, transposed, temperature)
