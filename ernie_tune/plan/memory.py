"""Bytes of one card, item by item, for the rank that needs most. Counts of
weights are exact, activations are counted from what the layers keep.

Legend: D hidden, N/K query/key-value channels, I expert width, V vocabulary; `share` = 1 / tensor
degree. Refuses to know: seconds, which layout is best.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ernie_tune.config.cpu import has_math_library
from ernie_tune.config.layout import Layout
from ernie_tune.plan.cards import GB, Card
from ernie_tune.plan.job import Job
from ernie_tune.plan.segments import bounds_of
from ernie_tune.plan.weights import EXPERT, TENSOR, Held, bare, held

# What the code keeps, in its own constants (a test holds them together): exponentials of scores for
# the backward of the loss, while they are smaller; scores are made in chunks. Attention keeps its
# own on a CPU without the math library alone, up to a size, a block of queries after another.
LOSS_KEEP_BYTES = 512 * 2**20
LOSS_CHUNK_BYTES = 16 * 2**20
PROBS_KEEP_BYTES = 256 * 2**20
ATTENTION_BLOCK = 128
# Fullest over mean rank of the experts, dropless: 1.0 to 1.5.
IMBALANCE = 1.3
# CUDA context and communicators; what the allocator loses.
CONTEXT_BYTES = 4 * GB
FRAGMENTATION = 0.05
# Measured with tests/bench/bench_memory.py: a process with Paddle loaded, before any model; the
# share of activations that glibc's heap loses in holes, into which gradients then fit; and the
# share of the loss's memory that the layers' backward uses again.
PROCESS_BYTES = 0.37 * GB
CPU_FRAGMENTATION = 0.26
CPU_REUSE = 0.5
PICTURE_PATCHES = 1024  # a picture of 448 x 448 pixels
ITEMS = {
    "weights": "权重",
    "quantised base": "量化权重",
    "vision tower": "视觉塔",
    "adapters": "适配器",
    "reference model": "参考模型",
    "critic": "价值网络",
    "reward model": "奖励模型",
    "gradients": "梯度",
    "optimizer": "优化器",
    "kept activations": "激活值",
    "working set": "单层工作区",
    "loss": "损失",
    "vision activations": "视觉激活",
    "key/value cache": "KV 缓存",
    "released in time": "错峰释放",
    "process and context": "进程与上下文",
    "fragmentation": "碎片",
}


@dataclass(frozen=True)
class Memory:
    """Bytes by item (names of `ITEMS`) of the rank that needs most: one of pipeline stage `stage`;
    and of main memory, for offloaded states, a machine.
    """

    items: Mapping[str, float]
    stage: int = 0
    host_bytes: float = 0.0
    stages: tuple[float, ...] = field(default=())  # total of each pipeline stage

    @property
    def total(self) -> float:
        return math.fsum(self.items.values())


def memory(job: Job, layout: Layout, card: Card) -> Memory:
    """What the job needs on each card of `layout`. The layout is taken to be legal."""
    each = [_of_stage(job, layout, card, stage) for stage in range(layout.pipe)]
    totals = tuple(math.fsum(items.values()) for items, _ in each)
    worst = max(range(len(each)), key=lambda i: totals[i])
    host = math.fsum(offloaded for _, offloaded in each) * min(layout.tensor * layout.sharding, card.local_cards)
    return Memory({k: v for k, v in each[worst][0].items() if v}, worst, host, totals)


def stage_layers(layers: int, layout: Layout) -> list[list[int]]:
    """The decoder layers of each pipeline stage: equal runs unless the layout says where to cut,
    dealt out in turn when a rank holds several.
    """
    chunks = layout.pipe * layout.virtual_pipe
    bounds = [chunk * layers // chunks for chunk in range(chunks + 1)]
    if layout.segments and layout.pipe > 1:  # among items, of which the embedding is the first
        bounds = [min(max(first - 1, 0), layers) for first in bounds_of(layout.segments, layers, chunks)]
    return [
        [i for chunk in range(stage, chunks, layout.pipe) for i in range(bounds[chunk], bounds[chunk + 1])]
        for stage in range(layout.pipe)
    ]


def _places(job: Job, layout: Layout, stage: int) -> set[str]:
    """What a rank of this stage holds. The tower is on every rank; a tied
    embedding on the first and the last stage.
    """
    places = {f"layers.{i}" for i in stage_layers(job.model.num_hidden_layers, layout)[stage]} | {"vision_model"}
    first, last = stage == 0, stage == layout.pipe - 1
    if first:
        places |= {"embed_tokens", "resampler_model"}
    if last:
        places |= {"norm", "lm_head"} | ({"embed_tokens"} if job.model.tie_word_embeddings else set())
    return places


def _of_stage(job: Job, layout: Layout, card: Card, stage: int) -> tuple[dict[str, float], float]:
    """(items, bytes in main memory) of one rank of a stage."""
    places = _places(job, layout, stage)
    mine = [h for h in held(job) if h.place in places]
    items = dict.fromkeys(ITEMS, 0.0)
    offloaded = _states(items, mine, job, layout, card)
    activations = _Activations(job, layout, card, stage)
    items["kept activations"] = activations.kept()
    items["loss"] = activations.loss()
    reused = CPU_REUSE if card.is_cpu else 1.0
    items["working set"] = max(0.0, activations.working() - reused * items["loss"])
    items["vision activations"] = activations.vision()
    items["key/value cache"] = activations.cache()
    if layout.world == 1 and job.accumulation == 1:
        # Gradients are made as activations are freed; only one of the two is whole at any time.
        items["released in time"] = -min(items["gradients"], items["kept activations"] + items["loss"])
    if job.sequences:
        # Sampling and training take turns.
        training = items["kept activations"] + items["working set"] + items["loss"]
        items["released in time"] -= min(items["key/value cache"], training)
    if card.is_cpu:
        items["process and context"] = PROCESS_BYTES
        passing = ("kept activations", "working set", "loss", "vision activations")
        items["fragmentation"] = max(0.0, CPU_FRAGMENTATION * sum(items[k] for k in passing) - items["gradients"])
        return items, offloaded
    items["process and context"] = CONTEXT_BYTES
    items["fragmentation"] = FRAGMENTATION * math.fsum(v for k, v in items.items() if k != "process and context")
    return items, offloaded


def _states(items: dict[str, float], mine: list[Held], job: Job, layout: Layout, card: Card) -> float:
    """Weights, gradients and optimizer states of one rank; returns the bytes that go to main memory
    instead.
    """
    wide = job.element_bytes
    # Fleet accumulates in float32 beside the weights; one process accumulates in the weights' own
    # format.
    gradient = job.gradient_bytes or (4 if layout.world > 1 else wide)
    offloaded = 0.0
    for h in mine:
        cut = {EXPERT: layout.expert, TENSOR: layout.tensor}.get(h.cut, 1)
        sharded = (layout.expert_sharding if h.cut == EXPERT else layout.sharding) if layout.sharding > 1 else 1
        trained = (h.trained + h.adapters) / cut
        float32 = h.trained_float32 / cut
        towers = h.place in ("vision_model", "resampler_model")
        base = "vision tower" if towers else "weights" if not job.coded else "quantised base"
        stored = sharded if layout.sharding_stage == 3 else 1
        if job.packed is not None:  # what is no code counts as in any model
            base = "vision tower" if towers else "weights"
            items["quantised base"] += h.mapped_bytes / cut / stored
        items[base] += (h.base_bytes - (h.mapped_bytes if job.packed is not None else 0.0)) / cut / stored
        items["adapters"] += h.adapters / cut * wide / stored
        items["reference model"] += h.base_bytes / cut if job.reference == "copy" else 0.0
        items["reward model"] += h.base_bytes / cut if job.reward_model else 0.0
        items["gradients"] += (trained * gradient + float32 * (4 - gradient)) / (
            sharded if layout.sharding_stage > 1 else 1
        )
        master = 4 if wide < 4 else 0
        states = (trained * (master + 2 * job.moment_bytes) - float32 * master) / sharded
        if job.critic != "none":  # trained as the policy is: weights, gradients and moments of its own
            own = h.base_bytes / cut if job.critic == "copy" else h.adapters * wide / cut
            items["critic"] += own + trained * gradient + float32 * (4 - gradient) + states
        if layout.offload:
            offloaded += states
        else:
            items["optimizer"] += states
    return offloaded


class _Activations:
    """Bytes that the forward keeps for the backward, and what one layer needs beside them."""

    def __init__(self, job: Job, layout: Layout, card: Card, stage: int) -> None:
        self.job, self.layout, self.card = job, layout, card
        self.layers = stage_layers(job.model.num_hidden_layers, layout)[stage]
        self.first, self.last = stage == 0, stage == layout.pipe - 1
        self.wide = job.element_bytes
        self.share = 1 / layout.tensor
        # Tokens whose hidden states a rank holds: its slice under sequence parallelism, else all of
        # the micro-batch.
        self.local = job.tokens * (self.share if layout.sequence_parallel else 1)
        self.in_flight: float = min(job.accumulation, layout.pipe - stage)
        if layout.virtual_pipe > 1:
            self.in_flight *= 1 + (layout.pipe - 1) / (layout.pipe * layout.virtual_pipe)

    def attention(self) -> float:
        """Input and normed input; rotated pairs in float32; queries, keys and values as attention
        keeps them; its output.
        """
        m, tokens = self.job.model, self.job.tokens
        query, key = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
        hidden = 2 * self.local * m.hidden_size + self._gathered()
        heads = tokens * self.share * (2 * query + 2 * key)
        return self.wide * (hidden + heads) + 4 * tokens * self.share * (query + key) + self._probabilities()

    def _probabilities(self) -> float:
        """Blocks of the causal half of attention's exponentials, where they are kept."""
        rows, length = self.job.tokens / self.job.row_tokens, self.job.row_tokens
        each = rows * self.job.model.num_attention_heads * self.share * self.wide
        ends = [min(a + ATTENTION_BLOCK, length) for a in range(0, length, ATTENTION_BLOCK)]
        blocks = each * sum((b - a) * b for a, b in zip(range(0, length, ATTENTION_BLOCK), ends, strict=True))
        return self._if_kept(each * length**2, blocks)

    def _if_kept(self, whole: float, blocks: float) -> float:
        """Bytes of exponentials: none on a card or with the library, none that are too many."""
        kept = self.card.is_cpu and whole <= PROBS_KEEP_BYTES and not has_math_library()
        return blocks if kept else 0.0

    def _gathered(self) -> float:
        """Values of hidden states that sequence parallelism gathers before a column layer and
        before the sum after a row layer.
        """
        return 2 * self.job.tokens * self.job.model.hidden_size if self.layout.sequence_parallel else 0.0

    def mlp(self, layer: int, gradients: bool = False) -> float:
        """Input and normed input; then gate, up, their product and what the product needs, of the
        dense, shared and chosen experts' layers. A product with codes that no adapter stands beside
        keeps neither its input nor, behind it, that of the next: gate and up alone. Their
        `gradients` are all made.
        """
        m, moe = self.job.model, self.job.model.moe
        hidden = 2 * self.local * m.hidden_size
        parts = 2 if bare(self.job, "linear") and not gradients else 4
        if moe is None or not m.is_moe_layer(layer):
            return self.wide * (hidden + self._gathered() + parts * self.job.tokens * self.share * m.intermediate_size)
        shared = parts * self.job.tokens * self.share * moe.shared_intermediate_size
        inputs, parts = (1, 2) if bare(self.job, "experts") and not gradients else (2, 4)
        # dispatched rows arrive in buffers of their own, and go back so
        exchanged = 2 if self.layout.expert > 1 else 0
        uneven = IMBALANCE if self.layout.expert > 1 else 1.0
        visual = self.job.visual_tokens
        routed = 0.0
        for tokens, inner in zip((self.job.tokens - visual, visual), (*moe.intermediate_size, 0), strict=False):
            rows = uneven * moe.top_k * tokens * self.share
            routed += rows * ((inputs + exchanged) * m.hidden_size + parts * inner)
        # logits, probabilities and their gradients, float32
        router = 4 * 5 * self.local * moe.num_experts
        return self.wide * (hidden + shared + routed) + router

    def kept(self) -> float:
        """Kept from the forward to the backward, by all micro-batches in flight."""
        rope = (
            4
            * self.job.tokens
            * self.share
            * (self.job.model.num_attention_heads + self.job.model.num_key_value_heads)
            * self.job.model.head_dim
        )
        if self.job.recompute:
            saved = self.wide * self.local * self.job.model.hidden_size * len(self.layers)
        else:
            saved = math.fsum(self.attention() + self.mlp(i) for i in self.layers)
        return saved * self.in_flight + rope

    def working(self) -> float:
        """The layer that is recomputed: kept parts of both halves, and the gradients of the larger.
        Without recompute only the latter.
        """
        if not self.layers:
            return 0.0
        ends = {self.layers[0], self.layers[-1]}
        gradients = {i: max(self.attention(), self.mlp(i, gradients=True)) for i in ends}
        if self.job.recompute:
            return max(self.attention() + self.mlp(i) + gradients[i] for i in ends)
        return max(gradients.values())

    def loss(self) -> float:
        """Exponentials kept for the backward, a chunk of scores, hidden states and their gradient,
        and the head's gradient in float32.
        """
        if not self.last or self.job.stage == "RM":
            return 0.0
        m, targets = self.job.model, self.job.tokens - self.job.visual_tokens
        scores = 4 * targets * m.vocab_size * self.share
        kept = scores if scores <= LOSS_KEEP_BYTES else 0.0
        head = (
            4 * m.vocab_size * m.hidden_size * self.share
            if self.job.full and "freeze_llm" not in self.job.freeze
            else 0.0
        )
        return kept + 2 * LOSS_CHUNK_BYTES + targets * m.hidden_size * (2 * self.wide + 4) + head

    def vision(self) -> float:
        """The tower on this rank's share of the pictures (balanced over pipeline ranks), and the
        features on the first stage.
        """
        v = self.job.model.vision
        if v is None or not self.job.visual_tokens:
            return 0.0
        mine = self.job.visual_tokens * v.spatial_merge_size**2 / self.layout.pipe
        # Two norms with their inputs, queries, keys and values twice, attention's output, two of
        # the MLP's width; rotation in float32.
        block = mine * (self.wide * (8 * v.hidden_size + 2 * v.intermediate_size) + 4 * 4 * v.hidden_size)
        scores = mine * PICTURE_PATCHES * v.num_heads * self.wide
        block += self._if_kept(scores, scores)
        rope = 2 * 4 * mine * v.hidden_size
        merged = v.hidden_size * v.spatial_merge_size**2
        features = (
            self.job.visual_tokens * self.wide * (12 * merged + 2 * self.job.model.hidden_size) if self.first else 0.0
        )
        if not self.job.full or "freeze_vision" in self.job.freeze:
            # without a graph about half of a block lives at once
            return rope + block / 2 + features
        saved = mine * self.wide * v.hidden_size if self.job.recompute else block
        return rope + saved * v.depth + block + features

    def cache(self) -> float:
        """Keys and values of all answers that are sampled together, of a shared prompt once."""
        m = self.job.model
        a_token = self.wide * 2 * m.num_key_value_heads * m.head_dim * self.share * len(self.layers)
        prompt_tokens = self.job.sequence_tokens - self.job.completion_tokens
        tokens = self.job.sequence_prompts * prompt_tokens
        return a_token * (tokens + self.job.sequences * self.job.completion_tokens)


def rows(items: Mapping[str, float]) -> Iterator[tuple[str, str, float]]:
    """(item, 项目, GB) in the order of `ITEMS`."""
    for name, chinese in ITEMS.items():
        if name in items:
            yield name, chinese, items[name] / GB
