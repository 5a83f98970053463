"""A window through a pipeline of the model's stages: the vision tower shared out before it, the
objective on its last stage.

Knows the model's stage list and the objective; `parallel/pipeline.py` knows Fleet. Refuses to know:
optimizers, norms, other axes.
Legend: T tokens, D width, P patches, W tower width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.config.layout import Layout
from ernie_tune.machine.alone import Window, Work, with_flips
from ernie_tune.machine.tower import SharedTower, tower_parameters
from ernie_tune.models.cache import Cache
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.ernie import ErnieModel, Recompute, SequenceContext, stages
from ernie_tune.models.inputs import PackedInput
from ernie_tune.models.moe import RouterRecord, RouterTap
from ernie_tune.objectives.objective import Outputs
from ernie_tune.parallel.mesh import Group, Mesh
from ernie_tune.parallel.pipeline import Cut, Pipeline, cut_at, cut_balanced

# --- the model as items ---------------------------------------------------------------------------


def pipeline_items(config: ModelConfig) -> list[str]:
    """Names of the pipeline's items: the model's stages, and the head also where it is tied (57 for
    54 layers, 31 for 28).
    """
    names = [name for name, _ in stages(config)]
    return names if names[-1] == "lm_head" else [*names, "lm_head"]


def item_costs(config: ModelConfig) -> list[float]:
    """Products of one text token in each item, in units of parameters met; what a balanced cut is
    balanced by.
    """
    c, moe = config, config.moe
    head_width = c.head_dim
    attention = c.hidden_size * head_width * 2 * (c.num_attention_heads + c.num_key_value_heads)
    dense = 3 * c.hidden_size * c.intermediate_size
    sparse = 0
    if moe is not None:
        sparse = c.hidden_size * (
            3 * (moe.top_k * moe.intermediate_size[0] + moe.shared_intermediate_size) + moe.num_experts
        )
    layers = [float(attention + (sparse if c.is_moe_layer(i) else dense)) for i in range(c.num_hidden_layers)]
    return [0.0, *layers, 0.0, float(c.vocab_size * c.hidden_size)]


def stages_of(cut: Cut, stage: int) -> frozenset[str]:
    """What the model keeps on one stage (`ErnieModel.keep`): its items, the tower everywhere, the
    resampler on the first.
    """
    return frozenset(cut.items_of(stage)) | {"vision_model"} | ({"resampler_model"} if stage == 0 else set())


def cut_of(config: ModelConfig, layout: Layout, bounds: Sequence[int] = ()) -> Cut:
    """Where the pipeline is cut: at `bounds` among `pipeline_items`, or balanced by `item_costs`.
    ValueError for cuts that cannot be.
    """
    items = pipeline_items(config)
    if bounds:
        return cut_at(items, bounds, layout.pipe, layout.virtual_pipe)
    return cut_balanced(items, item_costs(config), layout.pipe, layout.virtual_pipe)


# --- one pack through this rank's stages ----------------------------------------------------------


@dataclass
class Passage:
    """One pack on its way through the stages of this rank. `rows_PW`: the tower's outputs, on the
    first stage.
    """

    model: ErnieModel
    pack: PackedInput
    rows_PW: Tensor | None = None
    tap: RouterTap | None = None
    cache: Cache | None = None
    recompute: Recompute | None = None
    runs: Any = None  # `TokenRuns` with sequence parallelism
    read: np.ndarray | None = None  # see `ErnieModel.forward`
    ctx: SequenceContext | None = None

    @property
    def rows(self) -> int:
        """Rows of the hidden states on this rank."""
        if self.runs is None or not self.model.training:
            return self.pack.num_tokens
        self.runs.total = self.pack.num_tokens
        first, end = self.runs.span()
        return int(end - first)

    def run(self, item: str, hidden: Tensor | None) -> Tensor:
        """Hidden states after one item."""
        if self.runs is not None:
            self.runs.total = self.pack.num_tokens  # the item before may have run on another pack
        if item == "embed_tokens":
            return self._embed()
        if hidden is None:
            raise AssertionError("only the first item starts from nothing")
        if item == "norm":
            return self.model.norm(hidden)
        # a place in the list; the objective applies the matrix where it needs it
        if item == "lm_head":
            return hidden
        if self.ctx is None:
            self.ctx = self.model.context(self.pack, self.tap, self.cache, self.recompute, self.read)
        number = int(item.removeprefix("layers."))
        layer, last = self.model.layers[number], number == len(self.model.layers) - 1
        ctx = self.ctx.of_layer(last)
        out = self.recompute(layer, hidden, ctx) if self.recompute else layer(hidden, ctx)
        return self.ctx.spread(out) if last else out

    def _embed(self) -> Tensor:
        features = None
        if self.rows_PW is not None:
            features = self.model.resampler_model(self.rows_PW, self.pack.grid_thw_n3)
        # Trap p: its output needs a gradient (`parallelize`), for below a boundary something must,
        # or the stages wait for each other for ever.
        return self.model.embed(self.pack, features)


# --- training -------------------------------------------------------------------------------------


class WindowProgram:
    """What this rank's stages do on the micro-batches of one window. Micro-batches past its end are
    fillers: the last one again, counting nothing.
    """

    def __init__(
        self,
        work: Work,
        window: Sequence[Any],
        rows_PW: Sequence[Tensor | None],
        scale: float = 1.0,
        data_ranks: int = 1,
        runs: Any = None,
    ) -> None:
        self.work, self.window, self.scale = work, window, scale
        self.done = Window()
        prepared = [work.model.prepared(batch.inputs) for batch in window]
        self.real_T = [real for _, real in prepared]
        self.passages = [
            Passage(
                work.model,
                pack,
                rows,
                work.tap(len(window), scale / data_ranks, batch),
                None,
                work.recompute,
                runs,
                _lengthened(batch.read_R, real_T),
            )
            for batch, (pack, real_T), rows in zip(window, prepared, rows_PW, strict=True)
        ]
        self.filler = dataclasses.replace(self.passages[-1], tap=None)

    def _passage(self, micro: int) -> Passage:
        return self.passages[micro] if micro < len(self.window) else self.filler

    def rows(self, micro: int) -> int:
        return self._passage(micro).rows

    def run(self, item: str, micro: int, hidden: Tensor | None) -> Tensor:
        return self._passage(micro).run(item, hidden)

    def leave(self, micro: int) -> None:
        if micro < len(self.window):
            passage = self.passages[micro]
            passage.ctx = passage.rows_PW = None

    def finish(self, micro: int, hidden: Tensor) -> Tensor:
        if micro >= len(self.window):
            return hidden.astype("float32").sum() * 0.0
        objective, batch = self.work.objective, self.window[micro]
        hidden = _known_rows(hidden, self.real_T[micro])
        out = objective.loss(objective.outputs(self.work.model, hidden, batch), batch)
        out = with_flips(out, self.passages[micro].tap)  # of this stage's layers
        share = out.total / self.work.divisor
        self.done.add(float(share), out.metrics)
        return (share if self.scale == 1.0 else share * self.scale).astype("float32")


def _lengthened(read: np.ndarray | None, real_T: np.ndarray | None) -> np.ndarray | None:
    """Where the tokens that are read lie in the pack as the layers see it."""
    return read if read is None or real_T is None else real_T[read]


def _known_rows(hidden: Tensor, real_T: np.ndarray | None) -> Tensor:
    return hidden if real_T is None else paddle.gather(hidden, paddle.to_tensor(real_T))


def _check_same(packs: Sequence[PackedInput], pipeline: Pipeline) -> None:
    """Trap u: stages that count other micro-batches, or cut off other rows, wait for each other for
    ever.
    """
    mine = [(pack.num_tokens, zlib.crc32(pack.input_ids_T.tobytes())) for pack in packs]
    said = pipeline.group.objects(mine)
    other = [i for i, theirs in enumerate(said) if theirs != said[0]]
    if other:
        raise ValueError(
            say(
                f"micro-batches of stage {other[0]} ({len(said[other[0]])}, tokens "
                f"{[n for n, _ in said[other[0]]]}) must be those of stage 0 ({len(said[0])}, tokens "
                f"{[n for n, _ in said[0]]}); give all ranks of a pipeline the same files, seed and data "
                "settings",
                f"流水段 {other[0]} 的微批（{len(said[other[0]])} 个，token 数 "
                f"{[n for n, _ in said[other[0]]]}）须与段 0（{len(said[0])} 个，token 数 "
                f"{[n for n, _ in said[0]]}）一致；同一流水线的各进程请用相同的文件、种子和数据设置",
            )
        )


# --- the model, spread over stages ----------------------------------------------------------------


# as `Objective.outputs`: (model, hidden_TD, batch) -> tensors by name
Compute = Callable[[Any, Tensor, Any], Outputs]


class StagedForward:
    """A model whose stages are on the ranks of a pipeline, called without a gradient (evaluation,
    generation, a reference): all ranks call it with the same packs, and all get the result; stages
    take turns, boundaries are broadcast. `model` has kept the stages of this rank
    (`ErnieModel.keep`). `runs`: what `parallelize` returned.
    """

    def __init__(self, model: ErnieModel, cut: Cut, group: Group, runs: Any = None) -> None:
        self.model, self.config, self.cut, self.group, self.runs = model, model.config, cut, group, runs
        self.is_last = group.rank == cut.stages - 1

    @property
    def training(self) -> bool:
        return bool(self.model.training)

    def train(self) -> None:
        self.model.train()

    def eval(self) -> None:
        self.model.eval()

    @property
    def compute_dtype(self) -> str:
        return str(self.model.compute_dtype)

    def own_layers(self) -> list[Any]:
        """As `ErnieModel.own_layers`: what a cache holds on this rank."""
        return self.model.own_layers()

    @paddle.no_grad()
    def __call__(
        self,
        inputs: PackedInput,
        *,
        tap: RouterTap | None = None,
        cache: Cache | None = None,
        read: np.ndarray | None = None,
    ) -> Tensor:
        """Final hidden states [T, D], as `ErnieModel.forward` gives them; what routers decided
        (`tap`), of all stages.
        """
        decoding = cache is not None and not cache.prefilling
        pack, real_T = self.model.prepared(inputs, decoding)
        if cache is not None and not decoding and not self.own_layers():
            cache.plan(pack.offsets, 1)
        cut, group = self.cut, self.group
        rows_PW = SharedTower(self.model, [pack], group).features()[0]
        passage = Passage(self.model, pack, rows_PW, tap, cache, runs=self.runs, read=_lengthened(read, real_T))
        parts, hidden = len(cut.bounds) - 1, None
        for part in range(parts):
            if part % cut.stages == group.rank:
                for item in cut.items[cut.bounds[part] : cut.bounds[part + 1]]:
                    hidden = passage.run(item, hidden)
            rows = pack.num_tokens if part == parts - 1 else passage.rows
            hidden = self._from(part % cut.stages, hidden, [rows, self.config.hidden_size])
        if tap is not None:
            said = group.objects([r.plain() for r in tap.records])
            tap.records = [RouterRecord.of(*each) for part_said in said for each in part_said]
            tap.chosen = [each for part_said in group.objects(tap.chosen) for each in part_said]
        return _known_rows(hidden, real_T)

    @paddle.no_grad()
    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Scores [T, V]."""
        scores = self.model.logits(hidden_TD) if self.is_last else None
        return self._from(self.cut.stages - 1, scores, [hidden_TD.shape[0], self.config.vocab_size])

    @paddle.no_grad()
    def outputs(self, compute: Compute, batch: Any) -> Outputs:
        """`Objective.outputs` of one micro-batch."""
        hidden = self(batch.inputs, read=batch.read_R)
        mine = compute(self.model, hidden, batch) if self.is_last else {}
        about = self.group.objects([(name, list(x.shape), str(x.dtype).rsplit(".", 1)[-1]) for name, x in mine.items()])
        last = self.cut.stages - 1
        return {name: self._from(last, mine.get(name), shape, dtype) for name, shape, dtype in about[-1]}

    def _from(self, stage: int, mine: Tensor | None, shape: list[int], dtype: str = "") -> Tensor:
        group = self.group
        if group.rank != stage or mine is None:
            mine = paddle.empty(shape, dtype or self.model.compute_dtype)
        dist.broadcast(mine, group.ranks[stage], group=group.fleet)
        return mine


@paddle.no_grad()
def outputs_of(model: ErnieModel | StagedForward, compute: Compute, batch: Any) -> Outputs:
    """`Objective.outputs` of one micro-batch without a gradient, of a model that is here or over a
    pipeline.
    """
    if isinstance(model, StagedForward):
        return model.outputs(compute, batch)
    return compute(model, model(batch.inputs, read=batch.read_R), batch)


def frozen_outputs(model: ErnieModel | StagedForward, compute: Compute, batch: Any) -> dict[str, np.ndarray]:
    """`outputs_of` without dropout, for numpy; the model goes on as it was."""
    training = model.training
    model.eval()
    outputs = {name: np.asarray(x.numpy()) for name, x in outputs_of(model, compute, batch).items()}
    if training:
        model.train()
    return outputs


class StagedModel(StagedForward):
    """The same, trained: `forward_backward` goes through Fleet's schedule. `accumulation`:
    micro-batches of a window.

    Raises ValueError for cuts and schedules that cannot work.
    """

    def __init__(self, model: ErnieModel, cut: Cut, accumulation: int, mesh: Mesh, runs: Any = None) -> None:
        if runs is not None and cut.bounds[-2] == len(cut.items) - 1:
            raise ValueError(
                say(
                    f"pp_seg_method ({list(cut.bounds)}) must leave norm and head on one stage with "
                    f"sequence_parallel; move the last cut to {len(cut.items) - 2}",
                    f"启用 sequence_parallel 时 pp_seg_method（{list(cut.bounds)}）须使 norm 与 head "
                    f"在同一段；请将最后一刀移到 {len(cut.items) - 2}",
                )
            )
        tied = ("embed_tokens", "lm_head", model.embed_tokens) if model.config.tie_word_embeddings else None
        self.pipeline = Pipeline(cut, accumulation, mesh, tied)
        super().__init__(model, cut, self.pipeline.group, runs)
        # Trap w: every stage has the tower, one counts it.
        for parameter in tower_parameters(model):
            parameter.is_firstly_shared = self.pipeline.stage == 0

    def forward_backward(self, work: Work, window: Sequence[Any], scale: float = 1.0, data_ranks: int = 1) -> Window:
        """Leaves the window's gradient in the parameters; the last stage's loss and metrics, on all
        ranks of the pipeline.

        `scale`: the engine's gradient scale; `data_ranks`: ranks that read different rows, over
        which router losses are means. ValueError where the ranks of the pipeline were not given the
        same window.
        """
        packs = [batch.inputs for batch in window]
        _check_same(packs, self.pipeline)
        tower = SharedTower(self.model, packs, self.group, work.recompute)
        program = WindowProgram(work, window, tower.features(), scale, data_ranks, self.runs)
        self.pipeline.train(program, len(window))
        tower.backward()
        done: Window = self.group.objects(program.done)[-1]
        return done
