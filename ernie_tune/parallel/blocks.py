"""Stage 3 of sharding: the parameters of a block are on their owners alone, but for the time the
block is in use.

Recompute gives the order: a block runs without a graph (gather, run, release), and once more inside
the backward (gather, run, backward). When the next block is asked for, or the backward is over, the
former one is done: its gradients are complete, go to their owners, and the parameters are let go.
All ranks run the same blocks in the same order whatever their rows hold, so no collective waits for
a picture that another rank does not have.
What lies outside blocks (embedding, norms, head, vision tower) stays whole. Refuses to know:
models' classes, optimizers' arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn

from ernie_tune.parallel.gradients import is_fleet_expert
from ernie_tune.parallel.mesh import Group, Mesh
from ernie_tune.parallel.placement import shrink_


class _Held:
    """One parameter of a block: whole here, or on its owner alone."""

    def __init__(self, value: Tensor, group: Group, owner: int) -> None:
        self.value, self.group, self.owner, self.shape = value, group, owner, list(value.shape)
        self.here = bool(value._is_initialized())
        if self.mine and not self.here:
            raise AssertionError(f"{value.name} must have been read: this rank is to keep it")

    @property
    def mine(self) -> bool:
        return self.group.rank == self.owner

    def gather(self) -> None:
        if self.here:
            return
        whole = self.value.detach() if self.mine else paddle.empty(self.shape, self.value.dtype)
        dist.broadcast(whole, src=self.group.ranks[self.owner], group=self.group.fleet)
        if not self.mine:
            shrink_(self.value, whole)
        self.here = True

    def release(self) -> None:
        if self.here and not self.mine:
            self.value._clear_data()
        self.here = False


def _dealt(
    model: nn.Layer, mesh: Mesh, owner_of: Mapping[str, int], pattern: str
) -> Iterator[tuple[str, nn.Layer, list[tuple[Tensor, Group, int]]]]:
    """(name, block, its parameters with the ranks that share them and the number of the one that
    keeps it). What nobody trains goes to whoever has least.
    """
    loads: dict[int, int] = {}
    for name, block in model.named_sublayers():
        if name.rpartition(".")[0] != pattern:
            continue
        owned = []
        for value in block.parameters():
            group = mesh.group("expert_data" if is_fleet_expert(value, mesh) else "sharding")
            if group.size == 1:
                continue
            owner = owner_of.get(value.name)
            if owner is None:
                owner = min(range(group.size), key=lambda r: loads.get(r, 0))
            loads[owner] = loads.get(owner, 0) + int(value.size)
            owned.append((value, group, owner))
        yield name, block, owned


def kept_elsewhere(model: nn.Layer, mesh: Mesh, owner_of: Mapping[str, int], pattern: str) -> frozenset[str]:
    """Paddle's names of the parameters that `Blocks` will let go of on this rank: they need not be
    read.
    """
    every = (each for _, _, owned in _dealt(model, mesh, owner_of, pattern) for each in owned)
    return frozenset(value.name for value, group, owner in every if group.rank != owner)


class Blocks:
    """The blocks of a model. `fold(prefix)` is called when a block's gradients of this micro-batch
    are complete.
    """

    def __init__(
        self, model: nn.Layer, mesh: Mesh, owner_of: Mapping[str, int], pattern: str, fold: Callable[[str], None]
    ) -> None:
        self.fold = fold
        self.held: dict[str, list[_Held]] = {}
        self.open: str = ""  # the block that the backward is in
        self.pinned = False
        for name, block, owned in _dealt(model, mesh, owner_of, pattern):
            self.held[name] = [_Held(*each) for each in owned]
            block.register_forward_pre_hook(self._before(name))
            block.register_forward_post_hook(self._after(name))
        self.release()

    def names(self) -> set[str]:
        """Paddle's names of all parameters that are let go."""
        return {h.value.name for held in self.held.values() for h in held}

    def release(self) -> None:
        for held in self.held.values():
            for h in held:
                h.release()

    def _before(self, name: str) -> Any:
        def hook(_layer: nn.Layer, _args: tuple[Any, ...]) -> None:
            if paddle.is_grad_enabled():
                self.close()
            for h in self.held[name]:
                h.gather()

        return hook

    def _after(self, name: str) -> Any:
        def hook(_layer: nn.Layer, _args: tuple[Any, ...], _out: Any) -> None:
            if paddle.is_grad_enabled():
                self.open = name
            elif not self.pinned:
                for h in self.held[name]:
                    h.release()

        return hook

    def close(self) -> None:
        """The backward of the block in use is over."""
        if not self.open:
            return
        self.fold(f"{self.open}.")
        for h in self.held[self.open] if not self.pinned else ():
            h.release()
        self.open = ""

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """All parameters on all ranks, for the length of the outermost `with`: to save or to
        compare them.
        """
        if self.pinned:
            yield
            return
        self.pinned = True
        for held in self.held.values():
            for h in held:
                h.gather()
        try:
            yield
        finally:
            self.pinned = False
            self.release()
