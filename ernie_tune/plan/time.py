"""Seconds of a step: arithmetic, communication, pipeline bubble, optimizer. No
overlap is assumed, text and pictures as the job says.

A prediction from published speeds, not a measurement; expect 60 to 75 % of such figures until
kernels are fused.
Refuses to know: which layout is best (search.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ernie_tune.config.layout import Layout
from ernie_tune.models.specs import parameter_count
from ernie_tune.plan.cards import Card
from ernie_tune.plan.job import Job
from ernie_tune.plan.memory import PICTURE_PATCHES
from ernie_tune.plan.weights import EXPERT, TENSOR, active_values, base_bytes, held

_WIRE_BYTES = 2  # bfloat16
_LATENCY_SHARE = 0.2  # of a pipeline transfer that is not hidden behind the next micro-batch


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step and what they are made of. `compute`, `communication`: of one
    micro-batch on one rank. `flops`: of the model for the tokens of a step, 6 a parameter and
    token, whatever is recomputed; `mfu`: their share of the cards' peak.
    """

    seconds: float
    compute: float
    communication: float
    bubble: float  # share of the pipeline's time
    vision: float  # of a step
    offload: float  # of a step
    update: float  # of a step: gradients between replicas, and the optimizer
    sampling: float  # of a step: answers made one token at a time
    tokens: int
    flops: float
    tokens_per_second_per_card: float
    mfu: float


def flops_per_token(job: Job, *, visual: bool = False) -> float:
    """Of forward and backward, by the 6 N + 6 s N_q L rule (Kaplan et al. 2001.08361; causal
    attention is half). The head works on text tokens.
    """
    m = job.model
    head = 0 if visual else m.vocab_size * m.hidden_size
    attention = 6 * job.row_tokens * m.num_attention_heads * m.head_dim * m.num_hidden_layers
    return 6 * (active_values(m, visual) + head) + attention


def efficiency(job: Job, layout: Layout) -> float:
    """Share of the peak that products reach: 0.45 for experts 1536 wide and 8,192 tokens, more for
    wider experts and longer micro-batches.
    """
    width = job.model.moe.intermediate_size[0] if job.model.moe else job.model.intermediate_size
    grown = 0.45 + 0.05 * math.log(job.tokens / 8192, 4) + 0.082 * math.log2(width / 1536)
    return min(0.62, max(0.2, grown))


def step_time(job: Job, layout: Layout, card: Card, products: float | None = None) -> StepTime | None:
    """Predicted time of one optimizer step; None for a card whose speed is not known. `products`:
    share of the peak that products reach.
    """
    if not card.peak_flops:
        return None
    share = job.visual_tokens / job.tokens
    model_flops = (1 - share) * flops_per_token(job) + share * flops_per_token(job, visual=True)
    rate = card.peak_flops * (efficiency(job, layout) if products is None else products)
    # Passes over the weights, in forwards: 3 for training, one more for recompute, one less where
    # the weights themselves get no gradient.
    passes = 2 + int(job.full) + int(job.recompute)
    # Forwards beside the policy's: a reference, a reward model, a critic's values; and its
    # training.
    reference = sum((job.reference != "none", job.reward_model, job.critic != "none"))
    passes *= 2 if job.critic != "none" else 1
    compute = job.tokens * model_flops / 3 * (passes + reference) / (layout.tensor * layout.pipe) / rate
    compute += _expanding(job, layout, card) * (2 + int(job.recompute) + reference)
    communication = _communication(job, layout, card, 2 + int(job.recompute) + reference)
    waiting = (layout.pipe - 1) / layout.virtual_pipe
    pipeline = (compute + communication) * (job.accumulation + waiting)
    vision = _vision_flops(job) * job.accumulation / layout.pipe / rate
    local = _trained_here(job, layout)
    offload = local * 12 * 2 / card.host_bytes if layout.offload else 0.0
    update = local * 16 / card.memory_rate + _replicas(job, layout, card)
    sampling = job.completion_tokens * base_bytes(job) / (layout.tensor * layout.pipe) / card.memory_rate * layout.pipe
    seconds = pipeline + vision + offload + update + sampling * job.accumulation
    tokens = job.tokens * job.accumulation * layout.replicas
    flops = tokens * model_flops
    return StepTime(
        seconds,
        compute,
        communication,
        waiting / (job.accumulation + waiting),
        vision,
        offload,
        update,
        sampling * job.accumulation,
        tokens,
        flops,
        tokens / seconds / layout.world,
        flops / seconds / layout.world / card.peak_flops,
    )


def _link(ranks: int, card: Card) -> float:
    """Bandwidth inside a group of neighbouring ranks."""
    return card.link_bytes if ranks <= card.local_cards else card.network_bytes


def _communication(job: Job, layout: Layout, card: Card, passes: int) -> float:
    """Of one micro-batch on one rank: gathers and scatters around attention,
    experts' all-to-all, pipeline transfers.
    """
    m, t, e = job.model, layout.tensor, layout.expert
    layers = m.num_hidden_layers / layout.pipe
    hidden = job.tokens * m.hidden_size * _WIRE_BYTES
    around = layers * passes * 2 * (t - 1) / t * hidden / _link(t, card)
    sparse = len(m.moe.layer_indices) / layout.pipe if m.moe else 0
    exchange = sparse * passes * 2 * (m.moe.top_k if m.moe else 0) * hidden / t * (e - 1) / e / _link(e, card)
    between = 2 * hidden / t * _LATENCY_SHARE / _link(layout.world, card) if layout.pipe > 1 else 0.0
    return around + exchange + between


def _expanding(job: Job, layout: Layout, card: Card) -> float:
    """Of one pass: quantised experts become plain ones and are read again."""
    if not job.coded or job.model.moe is None:
        return 0.0
    # nearly all of them experts'
    values = parameter_count(job.model, "layers.") - job.model.num_hidden_layers
    return values / (layout.pipe * layout.expert) * 2.5 / card.memory_rate


def _vision_flops(job: Job) -> float:
    """Of the tower on a micro-batch's pictures, of usual size: a forward; trained, one more without
    a graph and a backward.
    """
    v = job.model.vision
    if v is None:
        return 0.0
    trained = job.full and "freeze_vision" not in job.freeze
    patches = job.visual_tokens * v.spatial_merge_size**2
    forward = 2 * parameter_count(job.model, "vision_model.") + 4 * PICTURE_PATCHES * v.hidden_size * v.depth
    return patches * forward * (4 if trained else 1)


def _trained_here(job: Job, layout: Layout) -> float:
    """Trained values of one rank, of a mean pipeline stage, before sharding."""
    cut = {EXPERT: layout.expert, TENSOR: layout.tensor}
    return math.fsum((h.trained + h.adapters) / cut.get(h.cut, 1) for h in held(job)) / layout.pipe


def _replicas(job: Job, layout: Layout, card: Card) -> float:
    """Gradients in float32 are reduced over the replicas and new weights gathered: 6 bytes a
    value.
    """
    n = layout.replicas
    if n == 1:
        return 0.0
    return (n - 1) / n * _trained_here(job, layout) * 6 / _link(layout.world, card)
