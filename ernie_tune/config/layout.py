"""Degrees of parallelism, once for everybody: the settings ask for a layout, the planner judges it,
the mesh is made of it.

Refuses to know: models, process groups, what can be: which layouts a model may have says
plan/layouts.py, which ones Fleet can lay out parallel/mesh.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ernie_tune.config.sections_run import ParallelArguments

AXES = ("tensor", "pipe", "data", "sharding", "expert")
TENSOR, PIPE, VIRTUAL, EXPERT, SHARDING, SEGMENTS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "sharding_parallel_size",
    "pp_seg_method",
)


@dataclass(frozen=True)
class Layout:
    """How many ranks share what. Axes, outermost first: data x sharding x pipe x tensor.

    `expert`: ranks that the experts of a layer are spread over; equal to `tensor` they are spread
    over the tensor ranks, as official recipes do; beyond that over those and some of the sharding
    ranks; 1 puts all of them on every rank. `sharding_stage`: what sharding ranks share: 0 nothing,
    1 optimizer states, 2 gradients too, 3 weights too. `offload`: optimizer states in main memory.
    `virtual_pipe`: pieces of the model on one pipeline rank. `segments`: where the pipeline is cut,
    as the setting pp_seg_method says it.
    """

    tensor: int = 1
    pipe: int = 1
    virtual_pipe: int = 1
    sharding: int = 1
    data: int = 1
    expert: int = 1
    sequence_parallel: bool = False
    sharding_stage: int = 0
    offload: bool = False
    segments: tuple[str, ...] = ()

    @classmethod
    def of(cls, p: ParallelArguments, world: int | None = None) -> Layout:
        """The layout that the settings ask for. `world`: ranks that run; what the degrees leave
        over are data replicas. None: just enough ranks."""
        asked = cls(
            tensor=p.tensor_model_parallel_size,
            pipe=p.pipeline_model_parallel_size,
            virtual_pipe=p.virtual_pipeline_model_parallel_size,
            sharding=p.sharding_parallel_size,
            expert=p.expert_model_parallel_size,
            sequence_parallel=p.sequence_parallel,
            sharding_stage=0 if p.sharding == "off" else int(p.sharding[len("stage")]),
            offload=p.sharding.endswith("offload"),
            segments=p.pp_seg_method,
        )
        return asked if world is None else replace(asked, data=max(1, world // asked.world))

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.tensor * self.pipe * self.sharding * self.data

    @property
    def replicas(self) -> int:
        """Ranks that read rows of their own."""
        return self.sharding * self.data

    @property
    def experts_over_tensor(self) -> bool:
        """Whether the experts are spread over the tensor group itself."""
        return 1 < self.expert == self.tensor

    @property
    def fleet_experts(self) -> bool:
        """Whether Fleet's own expert topology is used."""
        return self.expert > 1 and not self.experts_over_tensor

    @property
    def expert_sharding(self) -> int:
        """Ranks that hold the same experts and share their optimizer states: Fleet's moe_sharding,
        tensor * sharding / expert, beyond the tensor ranks.
        """
        return self.sharding if self.expert in (1, self.tensor) else max(1, self.tensor * self.sharding // self.expert)

    def __str__(self) -> str:
        words = [f"TP{self.tensor}", f"PP{self.pipe}"]
        words += [f"VPP{self.virtual_pipe}"] if self.virtual_pipe > 1 else []
        words += [f"EP{self.expert}"] if self.expert > 1 else []
        words += [f"sharding{self.sharding}"] if self.sharding > 1 else []
        words += [f"DP{self.data}"] if self.data > 1 else []
        words += ["offload"] if self.offload else []
        return " ".join(words)

    def settings(self) -> dict[str, str]:
        """The settings that ask for this layout and differ from their defaults."""
        given = {
            TENSOR: self.tensor,
            "sequence_parallel": self.sequence_parallel,
            PIPE: self.pipe,
            VIRTUAL: self.virtual_pipe,
            EXPERT: self.expert,
            SHARDING: self.sharding,
        }
        out = {k: str(v).lower() for k, v in given.items() if v not in (1, 0, False) or v is True}
        if self.sharding_stage:
            out["sharding"] = f"stage{self.sharding_stage}{' offload' if self.offload else ''}"
        return out
