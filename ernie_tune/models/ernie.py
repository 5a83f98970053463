"""ERNIE-4.5-VL as single-device code: an ordered list of named stages over flat, packed tokens, and
the table that says how to shard it.

Legend: T tokens of the pack, R of them whose final states are read, D width, N/K query and
key/value heads, H head width, V vocabulary, F feature rows.
Refuses to know: files, losses, optimisers, distribution. Head counts are inferred from the tensors,
so a layer whose columns were split from outside works unchanged. Checked against transformers' and
the released modeling files.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ernie_tune.config.language import say
from ernie_tune.models import mkl
from ernie_tune.models.attention import AttentionPlan, segment_attention
from ernie_tune.models.cache import Cache
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.inputs import PackedInput, tails
from ernie_tune.models.layers import GatedMLP, Linear, LowRank, RMSNorm, rotate_pairs, text_angles, turn_factors
from ernie_tune.models.moe import MoELayer, RouterTap
from ernie_tune.models.startup import CPU_PLAN, DEBUG_VARIABLE, prepare_device
from ernie_tune.models.vision import Resampler, VisionTower

Recompute = Callable[..., Tensor]

# Parameter name -> how a tensor-parallel wrapper cuts it. Names not listed are replicated.
PLAN: dict[str, str] = {
    "embed_tokens.weight": "vocab",
    "lm_head.weight": "column",
    "layers.*.self_attn.[qkv]_proj.weight": "column",
    "layers.*.self_attn.o_proj.weight": "row",
    "layers.*.mlp.gate_proj.weight": "column",
    "layers.*.mlp.up_proj.weight": "column",
    "layers.*.mlp.down_proj.weight": "row",
    "layers.*.mlp.shared_experts.gate_proj.weight": "column",
    "layers.*.mlp.shared_experts.up_proj.weight": "column",
    "layers.*.mlp.shared_experts.down_proj.weight": "row",
    "layers.*.mlp.*_experts.up_gate_proj": "expert",
    "layers.*.mlp.*_experts.down_proj": "expert",
}


@dataclass
class SequenceContext:
    """What every decoder layer needs to know of one pack, computed once per forward."""

    plan: AttentionPlan
    turn_q: Tensor  # complex rope factors [T, N, H/2]
    turn_k: Tensor
    text_index: Tensor | None = None  # None with vision_index None: everything is text
    vision_index: Tensor | None = None
    tap: RouterTap | None = None
    cache: Cache | None = None
    # What the last layer is told, of whose results some are read: it computes these rows alone.
    rows: Tensor | None = None
    last: SequenceContext | None = None
    # Tokens of a modality are in the pack, but none of them is read: its experts get a row of
    # nothing, for a gradient of 0 and none at all are two things to an optimizer that decays.
    lacking: bool = False

    @classmethod
    def of(
        cls, inputs: PackedInput, config: ModelConfig, tap: RouterTap | None = None, cache: Cache | None = None
    ) -> SequenceContext:
        angles = text_angles(inputs.position_ids_T3, config.head_dim, config.freq_allocation, config.rope_theta)
        dtype = paddle.get_default_dtype()
        text = vision = None
        if inputs.vision_T.any():
            text, vision = (paddle.to_tensor(np.flatnonzero(m)) for m in (~inputs.vision_T, inputs.vision_T))
        return cls(
            plan=AttentionPlan(inputs.offsets, causal=True, parents=inputs.parents),
            turn_q=turn_factors(angles, config.num_attention_heads, dtype),
            turn_k=turn_factors(angles, config.num_key_value_heads, dtype),
            text_index=text,
            vision_index=vision,
            tap=tap,
            cache=cache,
        )

    def read(self, inputs: PackedInput, read: np.ndarray) -> None:
        """Make `last`, where something is left out when no final states but those are wanted."""
        asking, rows_R = tails(inputs.offsets, read)
        if not len(rows_R) or len(rows_R) == inputs.num_tokens:
            return
        vision_R, text = inputs.vision_T[rows_R], None
        lacking = len({*inputs.vision_T.tolist()}) > len({*vision_R.tolist()})
        vision_R = np.append(vision_R, not vision_R[0]) if lacking else vision_R
        if vision_R.any():
            text, vision = (paddle.to_tensor(np.flatnonzero(m)) for m in (~vision_R, vision_R))
        rows = paddle.to_tensor(rows_R)
        self.last = dataclasses.replace(
            self,
            plan=AttentionPlan(inputs.offsets, causal=True, parents=inputs.parents, asking=asking),
            turn_q=paddle.gather(self.turn_q, rows),
            text_index=text,
            vision_index=None if text is None else vision,
            rows=rows,
            lacking=lacking,
        )

    def of_layer(self, last: bool) -> SequenceContext:
        """What a layer is told."""
        return self.last if last and self.last is not None else self

    def among(self, x_TD: Tensor) -> Tensor:
        """The rows that are computed."""
        return x_TD if self.rows is None else paddle.gather(x_TD, self.rows)

    def spread(self, x_RD: Tensor) -> Tensor:
        """What the last layer gave, at its places in the pack [T, D]; zeros elsewhere."""
        if self.last is None or self.last.rows is None:
            return x_RD
        blank = paddle.zeros([self.plan.offsets[-1], x_RD.shape[1]], x_RD.dtype)
        return paddle.scatter(blank, self.last.rows, x_RD)


class Attention(nn.Layer):
    """Grouped-query attention with 3-D rope, no biases."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)

    def forward(self, x_TD: Tensor, ctx: SequenceContext) -> Tensor:
        asking = ctx.among(x_TD)
        q, k, v = (
            proj(x).reshape([x.shape[0], -1, self.head_dim])
            for proj, x in ((self.q_proj, asking), (self.k_proj, x_TD), (self.v_proj, x_TD))
        )
        q, k = rotate_pairs(q, _first(ctx.turn_q, q.shape[1])), rotate_pairs(k, _first(ctx.turn_k, k.shape[1]))
        if ctx.cache is None:
            out = segment_attention(q, k, v, ctx.plan)
        elif ctx.cache.prefilling:
            ctx.cache.fill(self.layer, k, v, ctx.plan.offsets)
            out = segment_attention(q, k, v, ctx.plan)
        else:
            out = ctx.cache.attend(self.layer, q, k, v)
        return self.o_proj(out.reshape([asking.shape[0], -1]))


def _first(turn_TNh: Tensor, heads: int) -> Tensor:
    """The factors of so many heads: fewer than the model has where it was split by columns."""
    return turn_TNh if turn_TNh.shape[1] == heads else turn_TNh[:, :heads]


class DecoderLayer(nn.Layer):
    """Pre-norm attention, then a dense MLP or a mixture of experts."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MoELayer(c, layer) if c.is_moe_layer(layer) else GatedMLP(c.hidden_size, c.intermediate_size)

    def forward(self, x_TD: Tensor, ctx: SequenceContext) -> Tensor:
        x_TD = ctx.among(x_TD) + self.self_attn(self.input_layernorm(x_TD), ctx)
        h_TD = self.post_attention_layernorm(x_TD)
        if not isinstance(self.mlp, MoELayer):
            return x_TD + self.mlp(h_TD)
        if ctx.lacking:
            h_TD = paddle.concat([h_TD, paddle.zeros([1, h_TD.shape[1]], h_TD.dtype)])
        out_TD = self.mlp(h_TD, ctx.text_index, ctx.vision_index, ctx.tap)
        return x_TD + (out_TD[:-1] if ctx.lacking else out_TD)


class Lookup(nn.Layer):
    """Rows of a table, as a layer without parameters: where the table is split, another one steps
    in.
    """

    def forward(self, ids_T: Tensor, weight_VD: Tensor) -> Tensor:
        return F.embedding(ids_T, weight_VD)


class Scores(nn.Layer):
    """Hidden states times the output matrix, as a layer without parameters: where the matrix is
    split, another one steps in.
    """

    def forward(self, hidden_TD: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        if transposed and mkl.is_stepping() and mkl.ready(hidden_TD, weight):
            return mkl.rows_by_table(hidden_TD, weight)
        return paddle.matmul(hidden_TD, weight, transpose_y=transposed)


class Embedding(nn.Layer):
    """Token embedding; rows of placeholders are overwritten, in order, by visual features."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.weight = self.create_parameter(
            [c.vocab_size, c.hidden_size], default_initializer=nn.initializer.Constant(0.0)
        )
        self.lookup = Lookup()

    def forward(
        self, ids_T: Tensor, feature_index_F: Tensor | None = None, features_FD: Tensor | None = None
    ) -> Tensor:
        x_TD = self.lookup(ids_T, self.weight)
        if features_FD is None:
            return x_TD
        return paddle.scatter(x_TD, feature_index_F, features_FD.astype(x_TD.dtype), overwrite=True)


class Head(nn.Layer):
    """Untied output matrix [D, V]."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.weight = self.create_parameter(
            [c.hidden_size, c.vocab_size], default_initializer=nn.initializer.Constant(0.0)
        )


def stages(c: ModelConfig) -> Iterator[tuple[str, Callable[[], nn.Layer]]]:
    """The decoder as an ordered list of named builders; a pipeline is a partition of it. The tower
    runs before the first stage, outside the list.
    """
    yield "embed_tokens", lambda: Embedding(c)
    for i in range(c.num_hidden_layers):
        yield f"layers.{i}", lambda i=i: DecoderLayer(c, i)  # type: ignore[misc]
    yield "norm", lambda: RMSNorm(c.hidden_size, c.rms_norm_eps)
    if not c.tie_word_embeddings:
        yield "lm_head", lambda: Head(c)


def in_stages(c: ModelConfig, names: Collection[str], parameter: str) -> bool:
    """Whether a parameter belongs to what `ErnieModel.keep(names)` leaves."""
    tied = c.tie_word_embeddings and "lm_head" in names
    return any(parameter.startswith(f"{name}.") for name in ({*names, "embed_tokens"} if tied else names))


@contextmanager
def default_dtype(dtype: str) -> Iterator[None]:
    """Build layers in `dtype` without converting them afterwards."""
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        yield
    finally:
        paddle.set_default_dtype(before)


class Elsewhere(nn.Layer):
    """Stands where a layer would be that another pipeline stage has, so that the names of the
    others stay.
    """

    def forward(self, *_: object, **__: object) -> Tensor:
        raise ValueError(
            say(
                "this rank holds a part of the model (pipeline); run it through the pipeline, or on one stage",
                "此进程只持有模型的一部分（流水线）；请经由流水线运行，或只用一个阶段",
            )
        )


class ErnieModel(nn.Layer):
    """The whole model on one device. Parameters start at zero (norms at one): `AutoModel` gives
    them values, fresh ones or those of a checkpoint.

    Raises ValueError when features and placeholders do not match, or when a text-only model is
    given images.
    """

    name_or_path: str = ""  # where the weights came from: a folder, or the name of a preset
    # False where the last layer's tokens or experts are on several ranks, which all must have some
    leaves_out = True

    def __init__(self, config: ModelConfig, dtype: str = "float32") -> None:
        super().__init__()
        line = prepare_device()
        # news only where it is slow, or looked for
        if line and (CPU_PLAN.too_late or os.environ.get(DEBUG_VARIABLE)):
            print(line, file=sys.stderr)
        self.config, self.compute_dtype = config, dtype
        with default_dtype(dtype):
            self.layers = nn.LayerList()
            for name, build in stages(config):
                if name.startswith("layers."):
                    self.layers.append(build())
                else:
                    self.add_sublayer(name, build())
            self.scores = Scores()
            if config.vision is not None:
                self.vision_model = VisionTower(config.vision)
                self.resampler_model = Resampler(config.vision, config.hidden_size, config.rms_norm_eps)

    def keep(self, names: Collection[str]) -> None:
        """Drop the stages that are not in `names` (`stages`, "vision_model", "resampler_model"):
        what is left of the model on one pipeline stage.

        "lm_head" stands for a tied head, too, which needs the embedding's matrix. What somebody has
        put on the model beside its stages (a reward's head) stays where the last one is.
        """
        own = {*(name for name, _ in stages(self.config)), "layers", "scores", "vision_model", "resampler_model"}
        for name in [name for name in self._sub_layers if name not in own and "lm_head" not in names]:
            self.add_sublayer(name, Elsewhere())
        for name in [*(name for name, _ in stages(self.config)), "vision_model", "resampler_model"]:
            owner, _, leaf = name.rpartition(".")
            place = self.layers if owner else self
            if not in_stages(self.config, names, f"{name}.") and leaf in place._sub_layers:
                place.add_sublayer(leaf, Elsewhere())
        for i, layer in enumerate(self.own_layers()):
            layer.self_attn.layer = i  # its place in a cache, which holds this rank's layers

    def own_layers(self) -> list[DecoderLayer]:
        """The decoder layers of this rank, in order."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def features(self, inputs: PackedInput, recompute: Recompute | None = None) -> Tensor | None:
        """Visual features [F, D] of the pack, None without images."""
        if inputs.pixel_values_PC is None:
            return None
        if self.config.vision is None:
            raise ValueError(
                say(
                    "a text-only model was given images; load an ERNIE-4.5-VL model or drop the images",
                    "纯文本模型收到了图片；请加载 ERNIE-4.5-VL 模型，或去掉图片",
                )
            )
        pixels = paddle.to_tensor(inputs.pixel_values_PC, dtype=self.compute_dtype)
        return self.resampler_model(self.vision_model(pixels, inputs.grid_thw_n3, recompute), inputs.grid_thw_n3)

    def prepared(self, inputs: PackedInput, decoding: bool = False) -> tuple[PackedInput, np.ndarray | None]:
        """The pack as the layers are to see it, and the rows of it that the caller knows (None:
        all). `decoding`: a cache holds what came before.
        """
        return inputs, None

    def context(
        self,
        inputs: PackedInput,
        tap: RouterTap | None = None,
        cache: Cache | None = None,
        recompute: Recompute | None = None,
        read: np.ndarray | None = None,
    ) -> SequenceContext:
        """What the decoder layers need to know of the pack; `read`: see `forward`. ValueError for
        shared prefixes with a cache.
        """
        if cache is not None and inputs.parents is not None:
            raise ValueError(
                say(
                    "parents must be None with a cache, whose rows are whole; pack whole rows",
                    "使用缓存时 parents 须为 None，其中各行都是完整的；请打包完整的行",
                )
            )
        if tap is not None:
            tap.recomputed = recompute is not None
        with default_dtype(self.compute_dtype):
            ctx = SequenceContext.of(inputs, self.config, tap, cache)
        # A tap counts, judges or forces every token; a card's kernel takes whole segments.
        whole = tap is not None or ctx.turn_q.place.is_gpu_place()
        if read is not None and self.leaves_out and not whole:
            ctx.read(inputs, read)
        return ctx

    def embed(self, inputs: PackedInput, features_FD: Tensor | None) -> Tensor:
        """Input of the first decoder layer [T, D]. ValueError where features and placeholders do
        not match.
        """
        index = np.flatnonzero(inputs.placeholder_T)
        have = 0 if features_FD is None else features_FD.shape[0]
        if have != len(index):
            raise ValueError(
                say(
                    f"number of visual features ({have}) must equal the number of placeholder tokens "
                    f"({len(index)}); build both with one processor",
                    f"视觉特征数（{have}）须等于占位 token 数（{len(index)}）；请用同一个处理器生成两者",
                )
            )
        return self.embed_tokens(
            paddle.to_tensor(inputs.input_ids_T), paddle.to_tensor(index) if have else None, features_FD
        )

    def forward(
        self,
        inputs: PackedInput,
        *,
        tap: RouterTap | None = None,
        cache: Cache | None = None,
        recompute: Recompute | None = None,
        read: np.ndarray | None = None,
    ) -> Tensor:
        """Final hidden states [T, D], after the last norm; `logits` turns them into scores.
        `recompute(layer, *args)` reruns a layer in its backward. `read`: the tokens whose states
        the caller looks at; what the last layer would do for others is left out where it can be,
        and what the result says of them is undefined. None: all.
        """
        features = self.features(inputs, recompute)
        x_TD = self.embed(inputs, features)
        ctx = self.context(inputs, tap, cache, recompute, read)
        for i, layer in enumerate(self.layers):
            of_layer = ctx.of_layer(i == len(self.layers) - 1)
            x_TD = recompute(layer, x_TD, of_layer) if recompute else layer(x_TD, of_layer)
        return ctx.spread(self.norm(x_TD))

    def low_rank(self) -> Mapping[int, LowRank] | None:
        """By `id` of a linear layer, what adds to its product; None where adapters do anything
        else.
        """
        return {}

    def head_weight(self) -> tuple[Tensor, bool]:
        """(matrix, transposed): [V, D] and True when tied to the embedding, else [D, V] and
        False.
        """
        if self.config.tie_word_embeddings:
            return self.embed_tokens.weight, True
        return self.lm_head.weight, False

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Scores [T, V] in the model's dtype."""
        weight, transposed = self.head_weight()
        return self.scores(hidden_TD, weight, transposed)
