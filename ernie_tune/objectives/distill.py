"""How far a student's next tokens are from a teacher's, over the whole vocabulary: hidden states of
both in, one number a token out, without ever holding all scores.

Legend: N tokens, D and E widths of student and teacher, V vocabulary. p_s, p_t: their
distributions. Refuses to know: which tokens count, how they are averaged, where the teacher's
states come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from ernie_tune.config.language import say
from ernie_tune.objectives.logprobs import CHUNK_BYTES
from ernie_tune.parallel.mesh import MAX, Group
from ernie_tune.parallel.placement import placement_of

_LOWEST = -1e30


@dataclass(frozen=True)
class ScoreHead:
    """What makes scores of hidden states: [V, D] with `transposed`, else [D, V]; of a split
    vocabulary this rank's run of it."""

    weight: Tensor
    transposed: bool

    @property
    def vocab(self) -> int:
        return int(self.weight.shape[0 if self.transposed else 1])


@dataclass(frozen=True)
class _How:
    beta: float
    temperature: float
    banned: tuple[int, ...]  # of this rank's run
    group: Group | None
    student: ScoreHead
    teacher: ScoreHead


class _TokenJsd(PyLayer):
    @staticmethod
    def forward(ctx, hidden_ND, weight, teacher_NE, how):  # type: ignore[no-untyped-def]
        ctx.how = how
        ctx.save_for_backward(hidden_ND, weight, teacher_NE)
        parts = [_of_chunk(hidden_ND[a:b], teacher_NE[a:b], how)[0] for a, b in _chunks(hidden_ND, how)]
        return paddle.concat(parts).squeeze(1)

    @staticmethod
    def backward(ctx, grad_N):  # type: ignore[no-untyped-def]
        hidden_ND, weight, teacher_NE = ctx.saved_tensor()
        how, dh, dw = ctx.how, [], None
        for a, b in _chunks(hidden_ND, how):
            # d jsd / d score = p_s (g - sum p_s g) / T, g the derivative by p_s
            _, student_nV, g_nV = _of_chunk(hidden_ND[a:b], teacher_NE[a:b], how)
            p_nV = paddle.exp(student_nV)
            mean_n1 = _sum(p_nV * g_nV, how)
            d_nV = p_nV * (g_nV - mean_n1) * (grad_N[a:b] / how.temperature).unsqueeze(1)
            d_nV = d_nV.astype(weight.dtype)
            if not hidden_ND.stop_gradient:
                dh.append(paddle.matmul(d_nV, weight, transpose_y=not how.student.transposed))
            if not weight.stop_gradient:
                left, right = (d_nV, hidden_ND[a:b]) if how.student.transposed else (hidden_ND[a:b], d_nV)
                product = paddle.matmul(left, right, transpose_x=True)
                dw = product if dw is None else dw + product
        dhidden = paddle.concat(dh) if dh else None
        if dhidden is not None and how.group is not None:
            dhidden = how.group.sum_(dhidden)
        return dhidden, dw, None


def _chunks(hidden_ND: Tensor, how: _How) -> list[tuple[int, int]]:
    step = max(1, CHUNK_BYTES // (4 * how.student.vocab))
    tokens = hidden_ND.shape[0]
    return [(a, min(a + step, tokens)) for a in range(0, tokens, step)] or [(0, 0)]


def _sum(x_nV: Tensor, how: _How) -> Tensor:
    total_n1 = x_nV.sum(-1, keepdim=True)
    return total_n1 if how.group is None else how.group.sum_(total_n1)


def _log_softmax(hidden_nD: Tensor, head: ScoreHead, how: _How) -> Tensor:
    """log p of this rank's run of the vocabulary, [n, V], in float32 (float64 stays)."""
    scores = paddle.matmul(hidden_nD, head.weight, transpose_y=head.transposed)
    if scores.dtype in (paddle.bfloat16, paddle.float16):
        scores = scores.astype("float32")
    scores = scores / how.temperature
    if how.banned:
        scores = paddle.index_fill(scores, paddle.to_tensor(np.array(how.banned)), 1, _LOWEST)
    top_n1 = scores.max(-1, keepdim=True)
    if how.group is not None:
        top_n1 = how.group.reduce_(top_n1, MAX)
    scores = scores - top_n1
    return scores - paddle.log(_sum(paddle.exp(scores), how))


def _of_chunk(hidden_nD: Tensor, teacher_nE: Tensor, how: _How) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [n, 1], log p_s [n, V], its derivative by p_s up to a constant [n, V])."""
    student = _log_softmax(hidden_nD, how.student, how)
    teacher = _log_softmax(teacher_nE, how.teacher, how).astype(student.dtype)
    p_s, p_t, beta = paddle.exp(student), paddle.exp(teacher), how.beta
    if beta == 0:  # d / d p_s of -p_t log p_s; times p_s it is -p_t, also where p_s is 0
        ratio = paddle.exp(paddle.clip(teacher - student, max=80.0))
        return _sum(p_t * (teacher - student), how), student, -ratio
    if beta == 1:
        return _sum(p_s * (student - teacher), how), student, student - teacher
    high = paddle.maximum(student, teacher)
    mixed = high + paddle.log((1 - beta) * paddle.exp(student - high) + beta * paddle.exp(teacher - high))
    value = beta * p_t * (teacher - mixed) + (1 - beta) * p_s * (student - mixed)
    return _sum(value, how), student, (1 - beta) * (student - mixed)


def token_jsd(
    hidden_ND: Tensor,
    student: ScoreHead,
    teacher_NE: Tensor,
    teacher: ScoreHead,
    beta: float,
    temperature: float = 1.0,
    banned: Sequence[int] = (),
) -> Tensor:
    """Generalised Jensen-Shannon divergence of each token, [N], with a gradient to the student
    alone (GKD, arXiv 2306.13649, eq. 1): beta KL(p_t || m) + (1 - beta) KL(p_s || m), m = beta p_t
    + (1 - beta) p_s. beta 0 is KL(p_t || p_s), beta 1 KL(p_s || p_t), as TRL has it.

    `banned`: ids that neither can choose. Where the vocabulary is split over ranks, both heads must
    be, all ranks call, and get equal values. Raises ValueError for beta outside [0, 1], and for
    heads of different vocabularies.
    """
    if not 0 <= beta <= 1:
        raise ValueError(
            say(
                f"distill_beta ({beta:g}) must lie in [0, 1]; 0 is forward KL, 1 reverse KL",
                f"distill_beta（{beta:g}）须在 [0, 1] 内；0 为前向 KL，1 为反向 KL",
            )
        )
    if student.vocab != teacher.vocab:
        raise ValueError(
            say(
                f"teacher's vocabulary ({teacher.vocab} ids) must be the student's ({student.vocab}); take a "
                "teacher with the same tokenizer",
                f"教师的词表（{teacher.vocab} 个 id）须与学生的（{student.vocab} 个）相同；请用分词器相同的教师",
            )
        )
    where = placement_of(student.weight)
    group = where.handle if where.axis is not None else None
    first = 0
    if group is None or group.size == 1:
        group = None
    else:
        first = group.rank * student.vocab
    own = tuple(b - first for b in banned if 0 <= b - first < student.vocab)
    how = _How(beta, temperature, own, group, student, teacher)
    return _TokenJsd.apply(hidden_ND, student.weight, teacher_NE, how)
