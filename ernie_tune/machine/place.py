"""This process's place in a run: alone, or one rank of a Fleet mesh; where its models are put, and
what several ranks need to start and stop together.

Refuses to know: methods, data, what is logged.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ernie_tune.checkpoint.source import Source
from ernie_tune.config.arguments import ParallelArguments
from ernie_tune.config.language import Text, say
from ernie_tune.config.layout import Layout
from ernie_tune.machine.alone import LocalEngine
from ernie_tune.machine.fleet import DistributedEngine, Laid, spread, unkept
from ernie_tune.machine.placed import Placed, Whole, copy_parts, read_parts
from ernie_tune.machine.stages import StagedForward
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.parallel.mesh import Mesh, init_mesh
from ernie_tune.parallel.parallelize import equalise
from ernie_tune.parallel.watch import Limits, Watch, launched_address
from ernie_tune.peft.model import PeftModel
from ernie_tune.plan.segments import bounds_of

# Between two marks lie at most a step, a save, or one measurement of all held-out rows.
LIMITS = Limits(join=300.0, stuck=7200.0)


def layout_of_run(p: ParallelArguments, world: int) -> Layout:
    """The layout of `world` processes. Raises ValueError where the world does not divide, and for
    what this version cannot do."""
    layout = Layout.of(p, world)
    if layout.offload:
        raise ValueError(
            say(
                f"sharding ({p.sharding}) must be without offload in this version; set stage{layout.sharding_stage}",
                f"此版本 sharding（{p.sharding}）不支持 offload；请设为 stage{layout.sharding_stage}",
            )
        )
    needed = layout.tensor * layout.pipe * layout.sharding
    if world % needed:
        raise ValueError(
            say(
                "tensor_model_parallel_size x pipeline_model_parallel_size x sharding_parallel_size ("
                f"{needed}) must divide the number of processes ({world}); start {needed} "
                "or a multiple of it (--nproc), or change the degrees",
                "tensor_model_parallel_size × pipeline_model_parallel_size × sharding_parallel_size（"
                f"{needed}）须整除进程数（{world}）；请启动 {needed} "
                "个或其倍数（--nproc），或修改并行度",
            )
        )
    return layout if layout.sharding > 1 else replace(layout, sharding_stage=0)  # nobody to share with


class Place:
    """This process in a run. `put` puts models on the mesh, one or several; on one process they are
    as they were. Raises ValueError for degrees that cannot be, ConnectionError for ranks that do
    not come."""

    def __init__(self, parallel: ParallelArguments, accumulation: int = 1) -> None:
        world = int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))
        self.accumulation, layout = accumulation, layout_of_run(parallel, world)
        self.watch = _watch(world)
        self.mesh = init_mesh(layout, accumulation=accumulation) if world > 1 else Mesh(layout)

    @property
    def several(self) -> bool:
        """Whether there are other processes."""
        return self.mesh.world > 1

    @property
    def is_writer(self) -> bool:
        return self.mesh.is_writer

    @property
    def batch(self) -> tuple[int, int]:
        """(rank, size) among the processes that read different rows."""
        return self.mesh.batch

    # --- the ranks as checkpoints see them --------------------------------------------------------

    @property
    def rank(self) -> int:
        return self.mesh.rank_in("world")

    @property
    def size(self) -> int:
        return self.mesh.world

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, on every rank."""
        return self.mesh.group("world").objects(value)

    def gather_batch(self, value: Any) -> list[Any]:
        """`value` of every rank that reads different rows, on every rank, in the order of
        `batch`.
        """
        return self.mesh.group("batch").objects(value)

    # --- models -----------------------------------------------------------------------------------

    def put(
        self,
        model: ErnieModel,
        source: Source | None = None,
        *,
        trained: bool = True,
        optimizer_next: bool = False,
        like: ErnieModel | None = None,
    ) -> Placed:
        """Put `model`, with its adapters, on the mesh, once, and read its values where it has none
        yet (`source`).

        `like`: one of the same layout that lies already, whose values it takes part by part.
        `trained`: with an engine, for an optimizer; else it is only asked. `optimizer_next`: an
        optimizer comes before anything else, so what sharding stage 3 would then let go of is not
        read. ValueError, on all ranks, for values that cannot be used.
        """
        if not self.several:
            if source is not None:
                read_parts(model, source)
            if like is not None:
                copy_parts(model, like)
            return Placed(model, self, LocalEngine() if trained else None, model)
        whole = Whole(model)
        d = self.mesh.layout
        bounds = bounds_of(d.segments, model.config.num_hidden_layers, d.pipe * d.virtual_pipe) if d.pipe > 1 else ()
        laid = spread(model, self.mesh, bounds)
        if source is not None:
            self._read(model, source, unkept(model, self.mesh) if optimizer_next else frozenset())
        if like is not None:
            copy_parts(model, like)
        if trained:
            engine = DistributedEngine.over(model, self.mesh, laid, accumulation=self.accumulation)
            return Placed(model, self, engine, engine.callable, whole)
        staged = laid.cut and StagedForward(model, laid.cut, self.mesh.group("pipe"), laid.runs)
        return Placed(model, self, None, staged or model, whole)

    def _read(self, model: ErnieModel, source: Source, unread: frozenset[str]) -> None:
        """This rank's parts of the values, but those of the parameters that Paddle knows under the
        names in `unread`."""
        self.together(
            lambda: read_parts(model, source, lambda p, shape: None if p.name in unread else Laid.part(p, shape))
        )
        if isinstance(model, PeftModel):  # DoRA's magnitudes are computed; all else is read alike
            for layer in (layer for adapter in model.adapters.values() for layer in adapter.places.values()):
                equalise(layer, self.mesh)

    def together(self, action: Callable[[], None]) -> None:
        """`action` on all ranks. Where it raises ValueError on some, all raise the first one's, so
        that none waits for them."""
        said = ""
        try:
            action()
        except ValueError as error:
            said = str(error)
        if wrong := [text for text in self.gather(said) if text]:
            raise ValueError(wrong[0])

    def check_alike(self, value: Any, what: Text) -> None:
        """That ranks which read the same rows came to the same value. Raises RuntimeError, on all
        ranks, where they did not; `what` it is."""
        if self.mesh.size("tensor") * self.mesh.size("pipe") == 1:
            return
        told = self.gather((self.batch[0], zlib.crc32(repr(value).encode())))
        for rank, (rows, digest) in enumerate(told):
            first = next(i for i, (other, _) in enumerate(told) if other == rows)
            if told[first][1] != digest:
                raise RuntimeError(
                    say(
                        "{what} of rank {rank} must be those of rank {first}, which reads the same rows; give all "
                        "ranks the same files and settings, and machines of one kind",
                        "进程 {rank} 的{what}须与读取相同数据的进程 {first} 一致；请为各进程提供相同的文件、设置和同类机器",
                        what=what,
                        rank=rank,
                        first=first,
                    )
                )

    # --- together ---------------------------------------------------------------------------------

    def mark(self, where: str) -> None:
        """This rank has come to `where`: the watch over the ranks knows it is alive and where."""
        if self.watch is not None:
            self.watch.mark(where)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """What happens inside ends on all ranks when it ends with an error on one."""
        with contextlib.ExitStack() as stack:
            stack.push(self._tell)
            yield

    def _tell(self, _kind: Any, error: BaseException | None, _trace: Any) -> bool:
        if self.watch is not None and error is not None and not isinstance(error, KeyboardInterrupt):
            self.watch.failed(error)
        return False


def _watch(world: int) -> Watch | None:
    address = launched_address(os.environ)
    if address is None:
        return None
    watch = Watch(int(os.environ.get("PADDLE_TRAINER_ID", "0")), world, address, LIMITS)
    atexit.register(watch.close)
    watch.wait_for_all()
    return watch
