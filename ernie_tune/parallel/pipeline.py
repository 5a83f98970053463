"""Pipeline parallelism: an ordered list of named items, cut into parts, run by Fleet's 1F1B and
interleaved schedules.

Every rank of a pipeline reads the same rows, so only hidden states [rows, D] cross a boundary;
positions, segments and images come from each rank's own copy. Within a window all boundary tensors
have one shape: shorter micro-batches are filled up with rows of zeros that the receiver cuts off
again, so micro-batches may differ in length under every schedule, and no shape is negotiated while
the pipeline runs.
Refuses to know: what an item computes, models, batches, losses: a `Program` does. Traps of Fleet
are named as in `ernie_tune.parallel`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import paddle
from paddle import Tensor, nn
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel import PipelineLayer, SharedLayerDesc
from paddle.distributed.fleet.meta_parallel.pipeline_parallel import (
    PipelineParallel,
    PipelineParallelWithInterleave,
    PipelineParallelWithInterleaveFthenB,
)

from ernie_tune.config.language import say
from ernie_tune.parallel.mesh import Mesh


class Program(Protocol):
    """What the items do on the micro-batches of one window. Called on the ranks that own the item,
    micro-batch by micro-batch.

    Where a schedule needs more micro-batches than the window has, `micro` runs on past the end:
    such fillers must run, in any shape, and count nothing.
    """

    def rows(self, micro: int) -> int:
        """Rows of the hidden states of one micro-batch at every boundary."""

    def run(self, item: str, micro: int, hidden: Tensor | None) -> Tensor:
        """Hidden states after one item, from those before it (None for the first item)."""

    def leave(self, micro: int) -> None:
        """This rank has run all its items on the micro-batch; what its backward needs is held by
        the graph.
        """

    def finish(self, micro: int, hidden: Tensor) -> Tensor:
        """After the last item: the scalar whose gradient is wanted. The window's gradient is that
        of the sum over its micro-batches.
        """


# --- the cut --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Part i owns items [bounds[i], bounds[i+1]); part i runs on stage i mod `stages`, so that a
    rank has len(parts)/stages chunks.
    """

    items: tuple[str, ...]
    bounds: tuple[int, ...]
    stages: int

    @property
    def chunks(self) -> int:
        """Parts of each stage: 1, or the virtual pipeline degree."""
        return (len(self.bounds) - 1) // self.stages

    def items_of(self, stage: int) -> tuple[str, ...]:
        """Names of the items that one stage owns, over all its chunks."""
        parts = range(stage, len(self.bounds) - 1, self.stages)
        return tuple(name for p in parts for name in self.items[self.bounds[p] : self.bounds[p + 1]])


def cut_balanced(items: Sequence[str], costs: Sequence[float], stages: int, chunks: int = 1) -> Cut:
    """The cut whose most expensive part costs least; of equals, the one with the cheapest first
    parts (they hold most activations).

    Raises ValueError where there are fewer items than parts.
    """
    parts = stages * chunks
    _check_parts(len(items), stages, chunks)
    ends = [0.0]
    for cost in costs:
        ends.append(ends[-1] + cost)
    # best[k][i]: the least possible maximum when items [i, n) are cut into k parts
    n = len(items)
    best = [[0.0 if i == n else float("inf") for i in range(n + 1)]]
    for k in range(1, parts + 1):
        row = [float("inf")] * (n + 1)
        for i in range(n - k, -1, -1):
            row[i] = min(max(ends[j] - ends[i], best[k - 1][j]) for j in range(i + 1, n - k + 2))
        best.append(row)
    bounds = [0]
    limit = best[parts][0] * (1 + 1e-12)
    for k in range(parts - 1, 0, -1):
        i = bounds[-1]
        bounds.append(next(j for j in range(i + 1, n - k + 1) if max(ends[j] - ends[i], best[k][j]) <= limit))
    return Cut(tuple(items), (*bounds, n), stages)


def cut_at(items: Sequence[str], bounds: Sequence[int], stages: int, chunks: int = 1) -> Cut:
    """A cut given as a list of first items, with or without the end: [0, 13, 31] or [0, 13] for two
    stages of 31 items.

    Raises ValueError for a list that is no cut into stages * chunks parts.
    """
    parts, n = stages * chunks, len(items)
    _check_parts(n, stages, chunks)
    given = [*bounds, n] if len(bounds) == parts else list(bounds)
    rising = all(a < b for a, b in itertools.pairwise(given))
    if len(given) != parts + 1 or given[0] != 0 or given[-1] != n or not rising:
        near = [round(i * n / parts) for i in range(parts + 1)]
        raise ValueError(
            say(
                f"pp_seg_method ({list(bounds)}) must be {parts + 1} rising numbers from 0 to the {n} pipeline "
                "items (embedding, layers, norm, head) "
                f"for {stages} stages x {chunks} chunks; for example {near}",
                f"pp_seg_method（{list(bounds)}）须为 {parts + 1} 个递增的数，从 0 到流水线的 {n} 项（embedding、layers、norm、head），"
                f"对应 {stages} 个阶段 x {chunks} 个分块；例如 {near}",
            )
        )
    return Cut(tuple(items), tuple(given), stages)


def _check_parts(items: int, stages: int, chunks: int) -> None:
    if stages * chunks > items:
        raise ValueError(
            say(
                f"pipeline_model_parallel_size ({stages}) x virtual_pipeline_model_parallel_size ({chunks}) must "
                f"not exceed the {items} items of the "
                "pipeline (embedding, layers, norm, head); lower one of them",
                f"pipeline_model_parallel_size（{stages}）x virtual_pipeline_model_parallel_size（{chunks}）不能超过流水线的 "
                f"{items} 项（embedding、layers、norm、head）；请调小其一",
            )
        )


def check_schedule(stages: int, chunks: int, accumulation: int) -> None:
    """Refuse what Fleet's engines cannot run (trap s). Raises ValueError naming the nearest
    settings that work.
    """
    if chunks == 1:
        return
    if stages <= 2:
        raise ValueError(
            say(
                f"virtual_pipeline_model_parallel_size ({chunks}) must be 1 with pipeline_model_parallel_size "
                f"({stages}): Fleet interleaves from 3 stages on; "
                "set pipeline_model_parallel_size: 4, or virtual_pipeline_model_parallel_size: 1",
                f"pipeline_model_parallel_size 为 {stages} 时，virtual_pipeline_model_parallel_size（{chunks}）须为 1："
                "Fleet 从 3 个阶段起才能交错；请设 pipeline_model_parallel_size: 4，或 virtual_pipeline_model_parallel_size: 1",
            )
        )
    if accumulation != stages and accumulation < 2 * stages:
        raise ValueError(
            say(
                f"gradient_accumulation_steps ({accumulation}) must be pipeline_model_parallel_size ({stages}) or "
                "at least twice that "
                f"with virtual_pipeline_model_parallel_size ({chunks}); set "
                f"{stages if accumulation < stages else 2 * stages}",
                f"virtual_pipeline_model_parallel_size 为 {chunks} 时，gradient_accumulation_steps（{accumulation}）须等于"
                f" pipeline_model_parallel_size（{stages}），或至少为其两倍；请设为 "
                f"{(stages if accumulation < stages else 2 * stages)}",
            )
        )


# --- Fleet's container ----------------------------------------------------------------------------


class Inside(nn.Layer):
    """A name for Fleet's segmenting: the item does not end a part."""


class PartEnd(nn.Layer):
    """A name for Fleet's segmenting: the item ends a part. `layer:PartEnd` with one of them a part
    is any cut, for every schedule.
    """


class _Item:
    """One item as the function that Fleet calls."""

    def __init__(self, name: str, mark: type[nn.Layer]) -> None:
        self.name, self.__name__ = name, mark.__name__
        self.container: _Container | None = None

    def __repr__(self) -> str:
        return self.name

    def __call__(self, *args: Any) -> Tensor:
        if self.container is None:
            raise AssertionError("the container adopts its items before they run")
        return self.container.run_item(self.name, args[-1])


class _TiedItem(SharedLayerDesc):
    """An item whose layer holds the tied weight: first and last stage get the layer that the model
    on this rank already has.
    """

    def __init__(self, item: _Item, mark: type[nn.Layer], owner: nn.Layer) -> None:
        super().__init__("tied", mark, forward_func=item, shared_weight_attr="weight")
        self.item, self.owner = item, owner

    def build_layer(self, **extra: Any) -> nn.Layer:
        return self.owner


class _Container(PipelineLayer):
    """Fleet's pipeline container around a `Program`: it counts micro-batches and fills boundary
    tensors up to the window's shape.
    """

    shared_comm: dict[str, dict[str, Any]]  # the base's

    def __init__(self, cut: Cut, topology: Any, tied: tuple[str, str, nn.Layer] | None) -> None:
        ends = set(cut.bounds[1:])
        made = [_Item(name, PartEnd if i + 1 in ends else Inside) for i, name in enumerate(cut.items)]
        descs: list[Any] = list(made)
        if tied:
            for name in tied[:2]:
                i = cut.items.index(name)
                descs[i] = _TiedItem(made[i], PartEnd if i + 1 in ends else Inside, tied[2])
        super().__init__(
            layers=descs,
            num_stages=cut.stages,
            topology=topology,
            loss_fn=self._finish,
            seg_method="layer:^PartEnd$",
            num_virtual_pipeline_stages=cut.chunks if cut.chunks > 1 else None,
        )
        assert tuple(self.segment_parts) == cut.bounds, "Fleet must cut where it was told to"
        for item in made:
            item.container = self
        self.cut, self.stage = cut, self._stage_id
        # Trap d: Fleet compares a parameter's name with an attribute's name, so both copies would
        # count in the norm.
        for comm in self.shared_comm.values():
            comm["layer"].weight.is_firstly_shared = self.global_rank == min(comm["ranks"])
        self.start(None, 0)

    def start(self, program: Program | None, micros: int) -> None:
        """Take up a window."""
        self.program = program
        self.seen = [0] * self.cut.chunks
        self.micro = 0
        self.full_rows = max((program.rows(m) for m in range(micros)), default=0) if program else 0

    def forward(self, input: Tensor | None, chunk_id: int | None = None) -> Tensor:
        """One part on the next micro-batch of its chunk: each chunk sees the window in order, under
        every schedule.
        """
        program, chunk = self._window(), chunk_id or 0
        self.micro, self.seen[chunk] = self.seen[chunk], self.seen[chunk] + 1
        rows = program.rows(self.micro)
        hidden = input if input is None or input.shape[0] == rows else input[:rows]
        out = super().forward(hidden, chunk_id=chunk_id)
        if chunk == self.cut.chunks - 1:
            program.leave(self.micro)
        if self.stage + chunk * self.cut.stages == len(self.cut.bounds) - 2:
            return out
        return self.filled(out)

    def filled(self, hidden: Tensor) -> Tensor:
        """Rows of zeros up to the window's shape. A copy in any case: Fleet frees what it has sent,
        and the last operation may need its output.
        """
        missing = self.full_rows - hidden.shape[0]
        blank = paddle.zeros([missing, hidden.shape[1]], hidden.dtype)
        return paddle.concat([hidden, blank]) if missing else hidden.clone()

    def run_item(self, name: str, hidden: Tensor | None) -> Tensor:
        return self._window().run(name, self.micro, hidden)

    def _finish(self, hidden: Tensor, _: None) -> Tensor:
        return self._window().finish(self.micro, hidden)

    def _window(self) -> Program:
        if self.program is None:
            raise AssertionError("Pipeline.train starts a window")
        return self.program

    def allreduce_shared_weight_gradients(self) -> None:
        """Add up the two gradients of a tied weight; Fleet would make gradients of zeros for a
        frozen one.
        """
        trained = {k: c for k, c in self.shared_comm.items() if not c["layer"].weight.stop_gradient}
        every, self.shared_comm = self.shared_comm, trained
        super().allreduce_shared_weight_gradients()
        self.shared_comm = every


# --- the engine -----------------------------------------------------------------------------------


class Pipeline:
    """This rank's stages with Fleet's engine around them.

    `tied`: (first item, last item, the layer whose `weight` both use), None for untied heads.
    `accumulation`: micro-batches of a window; shorter windows are possible, and with chunks are
    filled up with micro-batches that count nothing. Raises ValueError for what `check_schedule`
    refuses.
    """

    def __init__(self, cut: Cut, accumulation: int, mesh: Mesh, tied: tuple[str, str, nn.Layer] | None = None) -> None:
        check_schedule(cut.stages, cut.chunks, accumulation)
        if mesh.size("pipe") != cut.stages:
            raise ValueError(
                say(
                    f"stages of the cut ({cut.stages}) must equal the pipeline ranks ({mesh.size('pipe')}); cut "
                    "for them",
                    f"切分的阶段数（{cut.stages}）须等于流水线进程数（{mesh.size('pipe')}）；请按其切分",
                )
            )
        self.cut, self.accumulation = cut, accumulation
        self.group = mesh.group("pipe")
        self.stage, self.is_last = self.group.rank, self.group.rank == cut.stages - 1
        self.container = _Container(cut, mesh.hcg.topology(), tied)
        kind = PipelineParallel
        if cut.chunks > 1:
            interleaved = accumulation >= 2 * cut.stages
            kind = PipelineParallelWithInterleave if interleaved else PipelineParallelWithInterleaveFthenB
        self.engine = kind(self.container, mesh.hcg, _engine_strategy(fleet.fleet._user_defined_strategy, accumulation))

    def train(self, program: Program, micros: int) -> None:
        """Forward and backward of a window of `micros` micro-batches; gradients stay in the
        parameters. All ranks of the pipeline call it.
        """
        self._open(program, micros)
        self.engine.set_virtual_pipeline_rank(0)
        self.engine.user_hooks_enabled = True
        self.engine.forward_backward_pipeline(_nothing(), None)
        self._close()

    def _open(self, program: Program, micros: int) -> None:
        least = 1
        if self.cut.chunks > 1:
            least = self.accumulation if self.accumulation == self.cut.stages else 2 * self.cut.stages
            if micros > self.accumulation == self.cut.stages:
                raise ValueError(
                    say(
                        f"micro-batches of a window ({micros}) must not exceed gradient_accumulation_steps "
                        f"({self.accumulation}); cut the window",
                        f"一个窗口的微批数（{micros}）不能超过 gradient_accumulation_steps（{self.accumulation}）；请切分窗口",
                    )
                )
        self.container.start(program, max(micros, least))
        self.engine.accumulate_steps = max(micros, least)
        self.engine._init_user_hooks()

    def _close(self) -> None:
        self.container.start(None, 0)
        # Boundary shapes belong to the window; the next one sends its own.
        self.engine._p2p_helper.clear_meta_cache()


def _nothing() -> Iterator[tuple[None, None]]:
    """What Fleet's engine takes as data: the program has its own."""
    while True:
        yield None, None


def _engine_strategy(strategy: Any, accumulation: int) -> Any:
    """Fleet's strategy with the settings under which the engine computes what one process would."""
    own = copy.deepcopy(strategy)
    own.pipeline_configs = {
        "accumulate_steps": accumulation,
        "micro_batch_size": 1,
        # trap r: it takes boundary tensors for replicated over the tensor ranks
        "enable_partial_send_recv": False,
    }
    # Trap t: Fleet would average over micro-batches; `Program.finish` gives shares of one sum,
    # divided once by the global count.
    own.hybrid_configs = {"pp_configs": {"delay_scale_loss": True, "enable_dynamic_shape": False}}
    return own
