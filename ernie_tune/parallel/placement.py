"""How one parameter lies over the mesh: whole or split, over which group, and what its gradient is
before the ranks have talked.

The note rides on the parameter itself (`parameter.placement`), so it survives wrappers, pipelines
and adapters; a parameter without one is whole everywhere. Fleet's own attribute `is_distributed` is
set along. Refuses to know: models, names, collectives.
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.parallel.mesh import Group


@dataclass(frozen=True)
class Placement:
    """`axis`: the dimension that is cut into equal parts over `group` ("tensor" or "expert"); None:
    whole. `partial`: each tensor rank computes a part of its gradient, to be added up. `expert`:
    its replicas are the `expert_data` group, not the `batch` group. `handle`: the group it is cut
    over. `kept`: which indices of the whole axis are here, where the parts are not equal (adapters
    of some experts); `indices` answers for both.
    """

    axis: int | None = None
    group: str = ""
    partial: bool = False
    expert: bool = False
    handle: Group | None = None
    kept: tuple[int, ...] | None = None

    def indices(self, whole: int) -> range | tuple[int, ...]:
        """Indices of an axis of `whole` entries that are on this rank."""
        if self.kept is not None:
            return self.kept
        if self.axis is None or self.handle is None:
            return range(whole)
        size = whole // self.handle.size
        return range(self.handle.rank * size, (self.handle.rank + 1) * size)


WHOLE = Placement()


def placement_of(parameter: Tensor) -> Placement:
    """The note on a parameter; `WHOLE` without one."""
    return getattr(parameter, "placement", WHOLE)


def place(parameter: Tensor, placement: Placement) -> None:
    """Put the note, and what Fleet reads of it, on a parameter."""
    parameter.placement = placement
    parameter.is_distributed = placement.axis is not None and not placement.expert
    parameter.no_sync = placement.expert


def part(x: Tensor, axis: int, group: Group) -> Tensor:
    """This rank's slice of a whole tensor."""
    size = x.shape[axis] // group.size
    return paddle.slice(x, [axis], [group.rank * size], [(group.rank + 1) * size]).contiguous()


def shrink_(parameter: Tensor, values: Tensor) -> None:
    """Give a parameter other values of another shape and keep its identity: adapters and optimizers
    that hold it go on holding it.
    """
    values = values.detach().contiguous().clone()
    values._share_buffer_to(parameter)
    parameter.get_tensor()._set_dims(values.shape)


def split_(parameter: Tensor, axis: int, group: Group, *, partial: bool = False, expert: bool = False) -> None:
    """Keep only this rank's slice. Raises ValueError where the axis does not divide."""
    if parameter.shape[axis] % group.size:
        raise ValueError(
            say(
                f"dimension {axis} ({parameter.shape[axis]}) of a parameter {parameter.shape} must be divisible "
                f"by the {group.name} ranks "
                f"({group.size}); lower the degree",
                f"形状为 {parameter.shape} 的参数的第 {axis} 维（{parameter.shape[axis]}）须能被 {group.name} "
                f"组的进程数（{group.size}）整除；请降低并行度",
            )
        )
    if parameter._is_initialized():
        shrink_(parameter, part(parameter.detach(), axis, group))
    else:  # a model whose values are still to be read
        shape = list(parameter.shape)
        shape[axis] //= group.size
        parameter.get_tensor()._set_dims(shape)
    place(parameter, Placement(axis, group.name, partial, expert, handle=group))


def owners(parameter: Tensor) -> tuple[str, ...]:
    """Axes over which a rank's copy is one of several equal ones; of these, the ranks with number 0
    count it in a norm.
    """
    placement = placement_of(parameter)
    if placement.expert:
        return ("expert_data",)
    return ("batch",) if placement.group == "tensor" else ("batch", "tensor")
