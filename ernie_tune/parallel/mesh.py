"""A layout -> `fleet.init` -> groups by name. The one place that asks Fleet for its topology; a
single process has the same mesh with one rank.

Axes: `tensor`, `pipe`, `data`, `sharding`, `expert`. Further groups: `batch` (data x sharding: the
ranks that read different rows), `expert_data` (the ranks that hold the same experts and see other
tokens), `stage` (all ranks of one pipeline stage), `world`. Every rank makes every group, in one
order (a rank that skips one hangs the others).
Two ways to spread experts: over the tensor group, as the official recipes do
(`expert` == `tensor`), or over Fleet's own expert topology, where they are spread over tensor and
sharding ranks together and `data` is folded into `sharding`.
Refuses to know: models, optimizers, the settings' names in a YAML.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.config.layout import AXES, Layout
from ernie_tune.parallel import gloo

MAX = dist.ReduceOp.MAX
# Fleet wants the pipeline outside the experts, and the model axis innermost.
_ORDER = ("sharding", "moe_sharding", "pp", "sep", "cp", "dp", "ep", "mp")


def check_degrees(layout: Layout) -> None:
    """Raises ValueError for what Fleet cannot lay out, whatever the model."""
    for name in (*AXES, "virtual_pipe"):
        if getattr(layout, name) < 1:
            raise ValueError(
                say(
                    f"{name} ({getattr(layout, name)}) must be at least 1; set it to the number of ranks",
                    f"{name}（{getattr(layout, name)}）至少为 1；请设为进程数",
                )
            )
    if layout.sharding_stage not in (0, 1, 2, 3):
        raise ValueError(
            say(
                f"sharding_stage ({layout.sharding_stage}) must be 0, 1, 2 or 3; choose one",
                f"sharding_stage（{layout.sharding_stage}）须为 0、1、2 或 3；请选择其一",
            )
        )
    if layout.sharding_stage and layout.sharding == 1 and layout.data > 1:
        raise ValueError(
            say(
                f"sharding_stage ({layout.sharding_stage}) must go with sharding (1) above 1; give its ranks to "
                f"sharding instead of data ({layout.data})",
                f"sharding_stage（{layout.sharding_stage}）要求 sharding（现为 1）大于 1；请把 data（{layout.data}）的进程改给 sharding",
            )
        )
    if layout.sharding > 1 and not layout.sharding_stage:
        raise ValueError(
            say(
                f"sharding ({layout.sharding}) must go with sharding_stage 1, 2 or 3; set it, or use data",
                f"sharding（{layout.sharding}）须与 sharding_stage 1、2 或 3 同用；请设置它，或改用 data",
            )
        )
    if layout.sharding_stage > 1 and layout.pipe > 1:
        raise ValueError(
            say(
                f"sharding_stage ({layout.sharding_stage}) must be 0 or 1 with pipe ({layout.pipe}), whose stages "
                "keep gradients over micro-batches; use 1",
                f"有 pipe（{layout.pipe}）时 sharding_stage（{layout.sharding_stage}）须为 0 或 1，因为各阶段要跨微批保留梯度；请用 1",
            )
        )
    if layout.sequence_parallel and layout.tensor == 1:
        raise ValueError(
            say(
                "sequence_parallel must go with tensor (1) above 1; there is no tensor group to split over",
                "sequence_parallel 要求 tensor（现为 1）大于 1；没有可供切分的张量并行组",
            )
        )
    if layout.expert > 1 and layout.tensor > 1 and not layout.sequence_parallel:
        raise ValueError(
            say(
                f"expert ({layout.expert}) with tensor ({layout.tensor}) must go with sequence_parallel: true, "
                "else every tensor rank sends the same tokens; set it",
                f"有 tensor（{layout.tensor}）时 expert（{layout.expert}）须与 sequence_parallel: true 同用，"
                "否则每个张量并行进程都发送相同的 token；请设置它",
            )
        )
    spread = layout.tensor * layout.data * layout.sharding
    if layout.expert > 1 and (layout.expert % layout.tensor or spread % layout.expert):
        raise ValueError(
            say(
                f"expert ({layout.expert}) must be a multiple of tensor ({layout.tensor}) and divide tensor x "
                f"data x sharding ({spread}); "
                f"nearest: {layout.tensor} or {spread}",
                f"expert（{layout.expert}）须为 tensor（{layout.tensor}）的整数倍，且整除 tensor x data x sharding（{spread}）；"
                f"最近的是 {layout.tensor} 或 {spread}",
            )
        )


def fleet_degrees(layout: Layout) -> dict[str, int]:
    """The degrees as `fleet` names them. Its expert topology has no data axis: those ranks join
    the sharding axis, sharded or not.
    """
    folded = layout.sharding * layout.data if layout.fleet_experts else layout.sharding
    return {
        "dp_degree": 1 if layout.fleet_experts else layout.data,
        "mp_degree": layout.tensor,
        "pp_degree": layout.pipe,
        "sharding_degree": folded,
        "ep_degree": layout.expert if layout.fleet_experts else 1,
        "moe_sharding_degree": layout.tensor * folded // layout.expert if layout.fleet_experts else 1,
    }


@dataclass(frozen=True)
class Group:
    """Some ranks and this one's place among them. `fleet` is None in a group of one."""

    name: str
    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    fleet: Any = None

    @property
    def size(self) -> int:
        return len(self.ranks)

    def sum_(self, x: Tensor) -> Tensor:
        """Add up over the group in place."""
        return self.reduce_(x, dist.ReduceOp.SUM)

    def reduce_(self, x: Tensor, op: int) -> Tensor:
        if self.size > 1:
            with paddle.no_grad():
                dist.all_reduce(x, op, group=self.fleet)
        return x

    def objects(self, mine: Any) -> list[Any]:
        """What every member says, in the group's order. For small things."""
        if self.size == 1:
            return [mine]
        said: list[Any] = []
        dist.all_gather_object(said, mine, group=self.fleet)
        return said


class Mesh:
    """This process's place in the layout. `Mesh()` is a single process: every group has one rank,
    nothing is initialised.
    """

    def __init__(self, layout: Layout | None = None, groups: dict[str, Group] | None = None, rank: int = 0) -> None:
        """Raises ValueError for a layout that Fleet cannot lay out."""
        self.layout = layout or Layout()
        check_degrees(self.layout)
        self.rank = rank
        self._groups = groups or {}
        self.hcg: Any = None

    def group(self, name: str) -> Group:
        """Group of an axis, or `batch`, `expert_data`, `stage`, `world`."""
        return self._groups.get(name) or Group(name, (self.rank,))

    def size(self, name: str) -> int:
        return self.group(name).size

    def rank_in(self, name: str) -> int:
        return self.group(name).rank

    @property
    def world(self) -> int:
        return self.size("world")

    @cached_property
    def batch(self) -> tuple[int, int]:
        """(rank, size) for the data: ranks with other numbers read other rows; the tensor and
        pipeline ranks of one number read the same.
        """
        return self.rank_in("batch"), self.size("batch")

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes what a run writes once (logs, the model card)."""
        return self.rank == 0

    def describe(self) -> str:
        """One line: the degrees above 1."""
        d = self.layout
        used = [f"{name} {getattr(d, name)}" for name in AXES if getattr(d, name) > 1]
        extra = [f"sharding stage {d.sharding_stage}"] * (d.sharding > 1) + ["sequence parallel"] * d.sequence_parallel
        extra += [f"{d.virtual_pipe} chunks a stage"] * (d.virtual_pipe > 1)
        return ", ".join([f"{self.world} process(es)", *used, *extra])

    def seed(self, base: int, step: int) -> int:
        """Seed of one step for Paddle's global generator: the same over the tensor group, another
        for every data rank and stage, so that no two rows share a dropout mask; on one process it
        is the loop's own.
        """
        plain = base * 1_000_003 + step
        place = self.rank_in("batch") + self.size("batch") * self.rank_in("pipe")
        return (plain + 7_919 * 1_000_003 * place) % 2**31


def init_mesh(layout: Layout, *, accumulation: int = 1) -> Mesh:
    """Initialise Fleet for `layout` and name its groups. Raises ValueError when the launcher
    started another number of processes.
    """
    check_degrees(layout)
    world = dist.get_world_size()
    if layout.world != world:
        raise ValueError(
            say(
                f"tensor x pipe x data x sharding ({layout.tensor} x {layout.pipe} x {layout.data} x "
                f"{layout.sharding} = {layout.world}) must equal "
                f"the number of processes ({world}); start {layout.world}, or change the degrees",
                f"tensor x pipe x data x sharding（{layout.tensor} x {layout.pipe} x {layout.data} x "
                f"{layout.sharding} = {layout.world}）须等于进程数（{world}）；请启动 {layout.world} 个，或修改并行度",
            )
        )
    if world == 1:
        return Mesh(layout)
    gloo.install()
    from paddle.distributed import fleet
    from paddle.distributed.fleet.base import topology

    if topology._HYBRID_PARALLEL_GROUP is not None:
        raise ValueError(
            say(
                "degrees must be given once in a process, but Fleet is laid out already; start new processes",
                "每个进程只能设置一次并行度，而 Fleet 已经布置好；请启动新的进程",
            )
        )
    # Fleet meets every group on every rank, and warns of those that the rank is not in
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Current global rank")
        fleet.init(is_collective=True, strategy=_strategy(layout, accumulation), log_level="WARNING")
    mesh = Mesh(layout, rank=dist.get_rank())
    mesh.hcg = fleet.get_hybrid_communicate_group()
    mesh._groups = _named_groups(layout, mesh.hcg)
    # everybody knows everybody from here on, so a rank that ends is noticed
    mesh.group("world").objects(None)
    return mesh


def _strategy(layout: Layout, accumulation: int) -> Any:
    from paddle.distributed import fleet

    strategy = fleet.DistributedStrategy()
    if layout.fleet_experts:
        strategy.hybrid_parallel_order = list(_ORDER)
    strategy.hybrid_configs = fleet_degrees(layout)
    # Packs differ in length, and under sequence parallelism a stage boundary is not the same on all
    # tensor ranks (traps q, r).
    strategy.pipeline_configs = {
        "accumulate_steps": accumulation,
        "micro_batch_size": 1,
        "enable_partial_send_recv": False,
    }
    strategy.hybrid_configs["pp_configs"].enable_dynamic_shape = layout.virtual_pipe == 1
    return strategy


def _named_groups(d: Layout, hcg: Any) -> dict[str, Group]:
    """Fleet's groups under our names, and the ones that it does not have."""
    me = dist.get_rank()
    place = {r: _place(hcg, r) for r in range(dist.get_world_size())}

    def along(*axes: str) -> list[tuple[int, ...]]:
        """The world cut into groups that differ only in `axes`."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for r, at in place.items():
            groups.setdefault(tuple(at[a] for a in sorted(at) if a not in axes), []).append(r)
        return [tuple(ranks) for ranks in groups.values()]

    def own(name: str, ranks: tuple[int, ...], fleet_group: Any) -> Group:
        return Group(name, ranks, ranks.index(me), fleet_group if len(ranks) > 1 else None)

    def made(name: str, groups: list[tuple[int, ...]]) -> Group:
        """A new group; all ranks make all of them, in one order."""
        mine = None
        for ranks in sorted(groups):
            group = dist.new_group(list(ranks)) if len(ranks) > 1 else None
            if me in ranks:
                mine = own(name, ranks, group)
        if mine is None:
            raise AssertionError(f"rank {me} is in no group {name}")
        return mine

    def named(name: str, fleet_group: Any) -> Group:
        return own(name, tuple(fleet_group.ranks), fleet_group)

    out = {
        "tensor": named("tensor", hcg.get_model_parallel_group()),
        "pipe": named("pipe", hcg.get_pipe_parallel_group()),
        "data": named("data", hcg.get_data_parallel_group()),
        "sharding": named("sharding", hcg.get_sharding_parallel_group()),
        "batch": made("batch", along("data", "sharding")),
        "stage": made("stage", along("data", "sharding", "tensor")),
        "world": made("world", [tuple(place)]),
    }
    if d.fleet_experts:
        out["expert"] = named("expert", hcg.get_expert_parallel_group())
        out["expert_data"] = named("expert_data", hcg.get_moe_sharding_parallel_group())
    elif d.experts_over_tensor:
        out["expert"] = named("expert", hcg.get_model_parallel_group())
        out["expert_data"] = out["batch"]
    else:
        out["expert_data"] = out["batch"]
    return out


def _place(hcg: Any, rank: int) -> dict[str, int]:
    """Coordinates of any rank on the dense axes; Fleet's expert topology cuts its sharding axis in
    two, which are joined again.
    """
    at = hcg.topology().get_coord(rank)._asdict()
    if "dense_sharding" in at:
        dense = hcg.topology().get_dim("dense_sharding")
        at["sharding"] = at.pop("moe_sharding") * dense + at.pop("dense_sharding")
    return {"tensor": at["model"], "pipe": at["pipe"], "data": at["data"], "sharding": at["sharding"]}
